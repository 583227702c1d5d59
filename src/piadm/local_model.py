"""What is known of the denoiser about the states where it was last evaluated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import embedding

#: A secant is drawn through two states only if they are at least this far apart, relative to their size: closer ones
#: would show the rounding of the network.
LEAST_STRIDE = 1e-3

#: Share of the mean square of a move that is added to the square of each coordinate's: coordinates that have hardly
#: moved keep the slope that they had.  What evaluations of a trained network and of mixtures told beyond the lines was
#: the same within a tenth from 0.03 to 1.
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
        own: whether every coordinate has a slope of its own.
        resolution: relative change of a state that the network's numbers are too short to tell.
    """

    least: Tensor
    most: Tensor
    rate: Tensor
    own: bool = False
    resolution: float = 0.0

    def at(self, indices: Tensor) -> Learning:
        """That of some steps."""
        return replace(self, least=self.least[indices], most=self.most[indices], rate=self.rate[indices])


class LocalModel:
    """The residual of every row as a line through its last evaluation, with a slope per row.

        R(x) = R + e (x - x_seen),    e = <dx, dR> / <dx, dx>  from the last two evaluations

    ``e`` is what the linearization's ``G`` lacks of the secant slope, and is kept within bounds.  The path keeps
    ``R(x)`` at its present states, so that only changes are ever computed: an evaluation tells ``s``, what the
    denoiser says beyond ``R(x)``, which turns the line to ``e + <dx, s> / <dx, dx>``.  Where every coordinate has a
    slope of its own, what that leaves of ``s`` turns it further, by ``dx s / (dx^2 + r mean(dx^2))``.

    Args:
        learning: bounds of the slopes at the nodes, each ``(n,)``.
        slopes: ``G`` at the nodes, shape ``(n,)`` float64.
        states: node states, shape ``(n, B, d)``, in the state's dtype and on its device.

    Attributes:
        seen: states of the last evaluations, or of the starting guess, shape ``(n B, d)``.
        excess: ``e``, shape ``(n B, d)``, or ``(n B, 1)`` for one of all coordinates.
        known: which rows have been evaluated, shape ``(n B,)`` bool.
    """

    def __init__(self, learning: Learning, slopes: Tensor, states: Tensor) -> None:
        batch, size = states.shape[1:]
        self.learns, self.own = bool((learning.most > learning.least).any()), learning.own
        self.resolution = learning.resolution
        bounds = (learning.least - slopes, learning.most - slopes)
        self.least, self.most = (bound.to(states).repeat_interleave(batch)[:, None] for bound in bounds)
        self.seen = states.flatten(0, 1).clone()
        self.excess = self.seen.new_zeros(len(self.seen), size if self.own else 1)
        self.known = torch.zeros(len(self.seen), dtype=torch.bool, device=states.device)

    def observe(self, rows: Tensor, states: Tensor, told: Tensor) -> Tensor:
        """Learn from an evaluation of some rows.

        Args:
            rows: their numbers, shape ``(r,)``.
            states: where they were evaluated, shape ``(r, d)``.
            told: ``s``, their residuals there beyond ``R(x)``, shape ``(r, d)``.

        Returns:
            Surprise ``RMS(s)`` and stride ``RMS(x - x_seen)``, ``(2, r)``; a stride of 0 where it is too short for the
            network to tell: what it brought is rounding.
        """
        dx, old, size = states - self.seen[rows], self.excess[rows], states.shape[1]
        least, most = self.least[rows], self.most[rows]
        across = dx.square().sum(1, keepdim=True)
        square = states.square().sum(1, keepdim=True)
        far = across > max(LEAST_STRIDE, self.resolution) ** 2 * square
        stride = across * (across > self.resolution**2 * square)
        length = across.where(far, torch.ones_like(across))
        slope = (old + (dx * told).sum(1, keepdim=True) / length).clamp_(least, most)
        if self.own:
            left = torch.addcmul(told, slope - old, dx, value=-1)
            slope = (slope + left.mul_(dx).div_(dx.square().add_(RIDGE / size * length))).clamp_(least, most)
        self.excess[rows] = torch.where(far & self.known[rows, None], slope, old)
        self.seen[rows], self.known[rows] = states, True
        return torch.stack([told.square().sum(1), stride[:, 0]]).div_(size).sqrt_()

    def follow(
        self,
        response: Tensor,
        places: Tensor,
        told: Tensor,
        outputs: Tensor,
        residual: Tensor,
        sweeps: int,
        onward: tuple[int, int] = (0, 0),
    ) -> None:
        """Move a path by what evaluations have told, in place: the changes of ``x = q + P R(x)`` by ``s``.

            w = P s + P (e w),        R <- R + e w,        x <- x + P (s + e w)

        by small triangular systems, with ``L`` the part of ``P`` below the diagonal and ``m`` the mean of ``e``,

            (I - L diag(m)) w <- P s + P (e w) - L (m w)

        What is on the right besides ``P s``, that the nodes ahead add to what is read at a node and that coordinates
        have slopes of their own, is zero at first.  ``x = q + P R`` holds whatever the sweeps leave: it is in the ``s``
        of the next evaluations.  Where coordinates have one slope, all is done for unit vectors in the place of ``s``
        if states have more coordinates than rows were evaluated.

        Args:
            response: ``P``, from node residuals to the nodes and the end, shape ``(n + 1, n)``.
            places: the evaluated rows of every sample, shape ``(B, a)``.
            told: ``s``, shape ``(B, a, d)``; a sample with fewer than ``a`` rows has zeros.
            outputs: ``x``, the states at the nodes and the end, shape ``(n + 1, B, d)``.
            residual: ``R(x)``, with ``s`` already in it, shape ``(n, B, d)``.
            sweeps: how many times what is on the right is brought up to date.
            onward: the nodes from which on residuals, and states, change: the sweeps do not reach those before them.
        """
        (batch, count, size), (after, since) = told.shape, onward
        outputs, residual = outputs[since:], residual[after:]
        acting, within, n = response[since:, after:], response[after:-1, after:], len(residual)
        units = not self.own and size > count
        lower, columns = within.tril().neg_(), response[since:].T.contiguous()
        excess = self.excess.view(-1, batch, self.excess.shape[1])[after:]
        held = count if units else SOLVE_COPIES * size if self.own else size
        chunk = max(1, SOLVE_ELEMENTS // (n * (n + held)))
        for first in range(0, batch, chunk):
            at = slice(first, first + chunk)
            direct, slopes = embedding(places[at], columns).mT, excess[:, at].transpose(0, 1)  # whole columns: fast
            if not units:
                direct = direct @ told[at]
            told_there = right = direct[:, after - since : -1]
            system = lower * slopes.mean(2)[:, None]
            system.diagonal(dim1=1, dim2=2).add_(1)
            solved = _solver(system, size)
            moved = solved(right)
            for _ in range(sweeps):
                # L (m w) is what the last solution differs by from its right side.
                right = _product(within, slopes * moved).add_(told_there).add_(right).sub_(moved)
                moved = solved(right)
            bent = moved.mul_(slopes)
            for change, table in ((bent, residual), (direct.add_(_product(acting, bent)), outputs)):
                there = table[:, at].transpose(0, 1)
                there.baddbmm_(change, told[at]) if units else there.add_(change)

    def drift(self, states: Tensor) -> Tensor:
        """RMS distance of states ``(n B, d)`` from where they were last evaluated, ``(n B,)``."""
        return (states - self.seen).square_().mean(1).sqrt_()

    def forget(self, lost: Tensor, states: Tensor) -> None:
        """Take the lines for a guess about states ``(n, B, d)``, and constants for the samples ``lost (B,)``."""
        self.excess.view(-1, len(lost), self.excess.shape[1])[:, lost] = 0
        self.seen = states.flatten(0, 1).clone()
        self.known.fill_(False)

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
        self.excess.clamp_(self.least, self.most)
        seen, known = self.seen.view(states.shape).copy_(states), self.known.view(n, batch)
        seen[nodes] = coarse.seen.view(len(nodes), -1, states.shape[2])[:, columns]
        known[nodes] = coarse.known.view(len(nodes), -1)[:, columns]


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
