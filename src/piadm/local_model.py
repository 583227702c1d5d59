"""A local model of the denoiser at every row: a line through its last evaluations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor
from torch.nn.functional import embedding

#: A secant is drawn through two states only if they are at least this far apart, relative to their size: closer ones
#: would show the rounding of the network.
LEAST_STRIDE = 1e-3

#: Share of the mean square of a move that is added to the square of each coordinate's: coordinates that have hardly
#: moved keep the slope that they had.  Innovations of a trained network and of mixtures were the same within a tenth
#: from 0.03 to 1.
RIDGE = 0.3

#: Numbers held at once while samples are solved for, beside their states: many at a time, for speed, but not all.
SOLVE_ELEMENTS = 1 << 22

#: Coordinates up to which all samples are one matrix.
NARROW_STATES = 8

#: Copies of a sample's node states that are held then where coordinates have slopes of their own.
SOLVE_COPIES = 4


@dataclass(frozen=True)
class Learning:
    """What a local model may learn, for every step or node, each float64 on the CPU.

    Attributes:
        least: smallest slope dD/dx.
        most: largest slope; equal bounds learn nothing.
        rate: surprise per drift that is assumed before anything was learnt.
        alpha: scale of the data.
        clock: ``p ln(alpha/sigma)``, ``p`` as in ``Amplification``.
        own: whether every coordinate has a slope of its own.
        resolution: relative change of a state that the network cannot resolve, as far as its dtype tells.
    """

    least: Tensor
    most: Tensor
    rate: Tensor
    alpha: Tensor
    clock: Tensor
    own: bool = False
    resolution: float = 0.0

    def at(self, indices: Tensor) -> Learning:
        """That of some steps."""
        tables = {name: getattr(self, name)[indices] for name in ("least", "most", "rate", "alpha", "clock")}
        return replace(self, **tables)


@dataclass(frozen=True)
class Acting:
    """How residuals act on states: ``P``, and forms of it that rounds need, each made once.

    Attributes:
        whole: ``P``, from node residuals to the nodes and the end, shape ``(n + 1, n)``.
    """

    whole: Tensor

    @cached_property
    def columns(self) -> Tensor:
        """Its columns as rows, shape ``(n, n + 1)``."""
        return self.whole.T.contiguous()

    @cached_property
    def lower(self) -> Tensor:
        """``-L``, its lower triangle at the nodes, shape ``(n, n)``."""
        return self.whole[:-1].tril().neg_()


class LocalModel:
    """The residual of every row as a line through its last evaluation, with a slope per row.

        R(x) = R + e (x - x_seen),    e = <dx, dR> / <dx, dx>  from the last two evaluations

    ``e`` is the secant slope less the linearization's ``G``, clamped so that their sum stays within bounds.  The path
    keeps ``R(x)`` at its present states, so that only changes are ever computed.  An evaluation brings the innovation
    ``s``, the evaluated residual less the predicted ``R(x)``, and updates the slope by the secant condition,
    ``e <- e + <dx, s> / <dx, dx>``.  Where every coordinate has a slope of its own, what remains of ``s`` updates
    each of them by ``dx s / (dx^2 + r mean(dx^2))``, a regularised secant update of a diagonal.

    Args:
        learning: bounds of the slopes at the nodes, each ``(n,)``.
        slopes: ``G`` at the nodes, shape ``(n,)`` float64.
        states: node states, shape ``(n, B, d)``, in the state's dtype and on its device.

    Attributes:
        seen: states of the last evaluations, or of the starting guess, shape ``(n B, d)``.
        excess: ``e``, shape ``(n B, d)``, or ``(n B, 1)`` for one of all coordinates.
        mean: its mean over the coordinates, shape ``(n B, 1)``.
        resolution: relative change of a state that the network cannot resolve, shape ``(n B, 1)``.
    """

    def __init__(self, learning: Learning, slopes: Tensor, states: Tensor) -> None:
        batch, size = states.shape[1:]
        self.learns, self.own = bool((learning.most > learning.least).any()), learning.own
        bounds = torch.stack([learning.least - slopes, learning.most - slopes])
        self.bounds = bounds.to(states).repeat_interleave(batch, 1)[..., None]
        self.seen = states.flatten(0, 1).clone()
        self.excess = self.seen.new_zeros(len(self.seen), size if self.own else 1)
        self.mean = self.excess.mean(1, keepdim=True) if self.own else self.excess
        self.resolution = self.seen.new_full((len(self.seen), 1), learning.resolution)

    def observe(
        self, rows: Tensor, states: Tensor, innovation: Tensor, teaches: Tensor, limit: Tensor | float = torch.inf
    ) -> Tensor:
        """Learn from an evaluation of some rows.

        Args:
            rows: their numbers, shape ``(r,)``.
            states: where they were evaluated, shape ``(r, d)``.
            innovation: innovations ``s``, shape ``(r, d)``.  One that is lost is set to zero, and nothing is learnt
                from it: the state may still be far from where the iteration ends.
            teaches: which innovations are due to a move from a known state and teach a slope, shape ``(r,)`` bool.
            limit: an innovation is lost if its mean square is not below this, shape ``(r,)`` or one for all.

        Returns:
            Shape ``(3, r)``: the mean square of ``s``, inf where it is lost; the stride ``|x - x_seen|``, 0
            where it is below the network's resolution, and the innovation nothing but rounding; and the secant slope
            along the move less ``G``, not clamped, 0 where the move is too short or teaches nothing.
        """
        dx, old = states - self.seen.index_select(0, rows), self.excess.index_select(0, rows)
        size, (least, most) = states.shape[1], self.bounds.index_select(1, rows)
        squares = innovation.square().mean(1)
        kept = squares < limit
        squares = torch.where(kept, squares, torch.inf)
        innovation.nan_to_num_(0.0, 0.0, 0.0).mul_(kept[:, None])  # whole rows; twice as fast as a mask
        moved = torch.linalg.vector_norm(dx, dim=1, keepdim=True)
        relative = moved / torch.linalg.vector_norm(states, dim=1, keepdim=True)
        resolved = relative > self.resolution.index_select(0, rows)
        far, stride = resolved & (relative > LEAST_STRIDE) & teaches[:, None], moved * resolved
        square = torch.where(far, moved.square(), torch.inf)  # of other rows nothing is learnt
        change = (dx * innovation).sum(1, keepdim=True) / square
        slope = _within(old + change, least, most)
        if self.own:
            left = torch.addcmul(innovation, slope - old, dx, value=-1)
            slope = _within(slope.addcdiv_(left.mul_(dx), dx.square().add_(RIDGE / size * square)), least, most)
            along = torch.addcmul(innovation, old, dx).mul_(dx).sum(1, keepdim=True) / square
        else:
            along = (old + change) * far
        self.excess[rows], self.seen[rows] = slope, states
        if self.own:
            self.mean[rows] = slope.mean(1, keepdim=True)
        return torch.stack([squares, stride[:, 0], along[:, 0]])

    def follow(
        self,
        acting: Acting,
        places: Tensor,
        innovation: Tensor,
        outputs: Tensor,
        residual: Tensor,
        sweeps: int,
        onward: tuple[int, int] = (0, 0),
    ) -> None:
        """Update a path in place by innovations ``s``: the change ``w`` of the states that solves ``x = q + P R(x)``.

            w = P s + P (e w),        R <- R + e w,        x <- x + P (s + e w)

        ``P`` is lower triangular but for what averaged readings take from the nodes ahead, and ``e`` one number per
        row but for slopes per coordinate.  With ``L`` the lower triangle of ``P`` and ``m`` the mean of ``e`` over
        the coordinates, a small triangular system per sample is solved for ``w``, and in each sweep for what is left:

            w = (I - L diag(m))^-1 P s,        w <- w + (I - L diag(m))^-1 (P s + P (e w) - w)

        ``x = q + P R`` holds however few the sweeps; what they leave shows up in the next innovations.  Where
        coordinates outnumber the evaluated rows, the first system is solved for unit vectors in the place of ``s``;
        where they share a slope besides, all of them are.

        Args:
            acting: ``P``, from node residuals to the nodes and the end.
            places: the evaluated rows of every sample, shape ``(B, a)``.
            innovation: innovations ``s``, shape ``(B, a, d)``; a sample with fewer than ``a`` rows has zeros.
            outputs: ``x``, the states at the nodes and the end, shape ``(n + 1, B, d)``.
            residual: ``R(x)``, with ``s`` already in it, shape ``(n, B, d)``.
            sweeps: number of sweeps after the first solution.
            onward: the first node whose residual, and the first whose state, the sweeps can change.
        """
        (batch, count, size), (after, since) = innovation.shape, onward
        outputs, residual = outputs[since:], residual[after:]
        onto, within, lower = acting.whole[since:, after:], acting.whole[after:-1, after:], acting.lower[after:, after:]
        n, few = len(residual), size > count
        units = few and not self.own
        excess, mean = (table.view(-1, batch, table.shape[1])[after:] for table in (self.excess, self.mean))
        held = count if units else SOLVE_COPIES * size if self.own else size
        chunk = max(1, SOLVE_ELEMENTS // (n * (n + held)))
        for first in range(0, batch, chunk):
            at = slice(first, first + chunk)
            slopes, common = excess[:, at].transpose(0, 1), mean[:, at].transpose(0, 1)
            system = lower * common.mT
            system.diagonal(dim1=1, dim2=2).add_(1)
            solved = _solver(system, size)
            direct = embedding(places[at], acting.columns)[..., since:].mT  # whole columns: fast
            if not few:
                direct = direct @ innovation[at]
            moved = driven = solved(direct[:, after - since : -1])
            there, beside = outputs[:, at].transpose(0, 1), residual[:, at].transpose(0, 1)
            if few and not units:
                there.baddbmm_(direct, innovation[at])
                moved = driven = driven @ innovation[at]
            for _ in range(sweeps):
                left = _product(within, slopes * moved).sub_(moved)
                moved = solved(left).add_(driven).add_(moved)
            bent = moved.mul_(slopes)
            further = _product(onto, bent)
            if units:
                there.baddbmm_(direct.add_(further), innovation[at])
                beside.baddbmm_(bent, innovation[at])
            else:
                there.add_(further if few else direct.add_(further))
                beside.add_(bent)

    def drift(self, states: Tensor) -> Tensor:
        """Mean square of the distance of states ``(n B, d)`` from where they were last evaluated, ``(n B,)``."""
        return (states - self.seen).square_().mean(1)

    def forget(self, lost: Tensor, states: Tensor) -> None:
        """Keep the slopes as a guess at states ``(n, B, d)``, zero for the samples ``lost (B,)``."""
        for table in (self.excess, self.mean):
            table.view(-1, len(lost), table.shape[1])[:, lost] = 0
        self.seen = states.flatten(0, 1).clone()

    def inherit(
        self, nodes: Tensor, coarse: LocalModel, columns: Tensor | slice, weights: Tensor, states: Tensor
    ) -> None:
        """Take over what a coarser node set has learnt.

        Args:
            nodes: which of the nodes are the coarse ones, shape ``(n',)``.
            coarse: the model on those.
            columns: which of its samples go on, shape ``(B',)`` bool, or all of them.
            weights: interpolation to all nodes, shape ``(n, n')``.
            states: the path that the coarse residuals describe, shape ``(n, B, d)``.
        """
        n, batch, _ = states.shape
        slopes = coarse.excess.view(len(nodes), -1, coarse.excess.shape[1])[:, columns]
        torch.mm(weights, slopes.flatten(1), out=self.excess.view(n, -1))
        self.excess.clamp_(*self.bounds)
        self.mean.copy_(self.excess.mean(1, keepdim=True))
        seen = self.seen.view(states.shape).copy_(states)
        seen[nodes] = coarse.seen.view(len(nodes), -1, states.shape[2])[:, columns]


def _within(slopes: Tensor, least: Tensor, most: Tensor) -> Tensor:
    """Slopes ``(r, d)`` or ``(r, 1)`` within bounds ``(r, 1)``; ``clamp`` by tensors takes four times as long."""
    return torch.minimum(torch.maximum(slopes, least), most)


def _product(matrix: Tensor, states: Tensor) -> Tensor:
    """A matrix ``(m, n)`` on the states ``(B, n, d)`` of every sample: one product of all where they are narrow.

    Products of every sample with a few columns take up to twenty times as long.
    """
    if states.shape[2] > NARROW_STATES:
        return matrix @ states
    batch, _, size = states.shape
    return (matrix @ states.transpose(0, 1).flatten(1)).view(len(matrix), batch, size).transpose(0, 1)


def _solver(systems: Tensor, columns: int) -> Callable[[Tensor], Tensor]:
    """What solves lower triangular systems ``(B, n, n)``: products with the inverse where columns outnumber rows.

    These are several times as fast as a solution.
    """
    if columns <= systems.shape[1]:
        return partial(torch.linalg.solve_triangular, systems, upper=False)
    identity = torch.eye(systems.shape[1], dtype=systems.dtype, device=systems.device)
    inverse: Tensor = torch.linalg.solve_triangular(systems, identity, upper=False)
    return inverse.matmul
