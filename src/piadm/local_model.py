"""What is known of the denoiser about the states where it was last evaluated."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: A secant is drawn through two states only if they are at least this far apart, relative to their size: closer ones
#: would show the rounding of the network.
LEAST_STRIDE = 1e-3

#: Numbers held at once while samples are solved for, beside their states: many at a time, for speed, but not all.
SOLVE_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Learning:
    """What a local model may learn, for every step or node, each float64 on the CPU.

    Attributes:
        least: smallest slope dD/dx.
        most: largest slope; equal bounds learn nothing.
        rate: surprise per drift that is assumed before anything was learnt.
    """

    least: Tensor
    most: Tensor
    rate: Tensor

    def at(self, indices: Tensor) -> Learning:
        """That of some steps."""
        return Learning(self.least[indices], self.most[indices], self.rate[indices])


class LocalModel:
    """The residual of every row as a line through its last evaluation, with a slope per row.

        R(x) = R + e (x - x_seen),    e = <dx, dR> / <dx, dx>  from the last two evaluations

    ``e`` is what the linearization's ``G`` lacks of the secant slope, and is kept within bounds.  The path keeps
    ``R(x)`` at its present states, so that only changes are ever computed: an evaluation tells ``s``, what the
    denoiser says beyond ``R(x)``, which turns the line to ``e + <dx, s> / <dx, dx>``.

    Args:
        learning: bounds of the slopes at the nodes, each ``(n,)``.
        slopes: ``G`` at the nodes, shape ``(n,)`` float64.
        states: node states, shape ``(n, B, d)``, in the state's dtype and on its device.

    Attributes:
        seen: states of the last evaluations, or of the starting guess, shape ``(n B, d)``.
        excess: ``e``, shape ``(n B,)``.
        known: which rows have been evaluated, shape ``(n B,)`` bool.
    """

    def __init__(self, learning: Learning, slopes: Tensor, states: Tensor) -> None:
        batch = states.shape[1]
        self.learns = bool((learning.most > learning.least).any())
        bounds = (learning.least - slopes, learning.most - slopes)
        self.least, self.most = (bound.to(states).repeat_interleave(batch) for bound in bounds)
        self.seen = states.flatten(0, 1).clone()
        self.excess = self.seen.new_zeros(len(self.seen))
        self.known = torch.zeros(len(self.seen), dtype=torch.bool, device=states.device)

    def observe(self, rows: Tensor, states: Tensor, told: Tensor) -> tuple[Tensor, Tensor]:
        """Learn from an evaluation of some rows.

        Args:
            rows: their numbers, shape ``(r,)``.
            states: where they were evaluated, shape ``(r, d)``.
            told: ``s``, their residuals there beyond ``R(x)``, shape ``(r, d)``.

        Returns:
            Surprise ``RMS(s)`` and stride ``RMS(x - x_seen)``, each ``(r,)``.
        """
        dx, old = states - self.seen[rows], self.excess[rows]
        along, across = (dx * told).sum(1), dx.square().sum(1)
        far = across > LEAST_STRIDE**2 * states.square().sum(1)
        turned = old + along / across.where(far, torch.ones_like(across))
        slope = turned.clamp(self.least[rows], self.most[rows])
        self.excess[rows] = torch.where(far & self.known[rows], slope, old)
        self.seen[rows], self.known[rows] = states, True
        return told.square().mean(1).sqrt_(), (across / dx.shape[1]).sqrt_()

    def follow(
        self, response: Tensor, places: Tensor, told: Tensor, outputs: Tensor, residual: Tensor, sweeps: int
    ) -> None:
        """Move a path by what evaluations have told, in place: the changes of ``x = q + P R(x)`` by ``s``.

            w = P s + P diag(e) w,        R <- R + e w,        x <- x + P (s + e w)

        by small triangular systems, with ``L`` and ``U`` the parts of ``P`` below the diagonal and above it,

            (I - L diag(e)) w <- P s + U diag(e) w

        ``U``, what the nodes ahead add to what is read at a node, is zero where every step is a node and little
        elsewhere.  ``x = q + P R`` holds whatever the sweeps leave: it is in the ``s`` of the next evaluations.  All is
        done for unit vectors in the place of ``s`` where states have more coordinates than rows were evaluated.

        Args:
            response: ``P``, from node residuals to the nodes and the end, shape ``(n + 1, n)``.
            places: the evaluated rows of every sample, shape ``(B, a)``.
            told: ``s``, shape ``(B, a, d)``; a sample with fewer than ``a`` rows has zeros.
            outputs: ``x``, the states at the nodes and the end, shape ``(n + 1, B, d)``.
            residual: ``R(x)``, with ``s`` already in it, shape ``(n, B, d)``.
            sweeps: how many times the part with ``U``, first taken to be zero, is brought up to date.
        """
        n, (batch, count, size) = len(residual), told.shape
        lower, ahead, identity = response[:-1].tril(), response[:-1].triu(1), torch.eye(n).to(response)
        excess, chunk = self.excess.view(n, batch).T[:, :, None], max(1, SOLVE_ELEMENTS // (n * (n + min(count, size))))
        for first in range(0, batch, chunk):
            at = slice(first, first + chunk)
            direct = response[:, places[at]].transpose(0, 1)
            if size <= count:
                direct = direct @ told[at]
            system = identity - lower * excess[at].mT
            moved = torch.linalg.solve_triangular(system, direct[:, :-1], upper=False)
            for _ in range(sweeps):
                right = direct[:, :-1] + ahead @ (excess[at] * moved)
                moved = torch.linalg.solve_triangular(system, right, upper=False)
            bent = excess[at] * moved
            for change, table in ((bent, residual), (direct + response @ bent, outputs)):
                there = table[:, at].transpose(0, 1)
                there.add_(change) if size <= count else there.baddbmm_(change, told[at])

    def drift(self, states: Tensor) -> Tensor:
        """RMS distance of states ``(n B, d)`` from where they were last evaluated, ``(n B,)``."""
        return (states - self.seen).square_().mean(1).sqrt_()

    def forget(self, lost: Tensor, states: Tensor) -> None:
        """Take the lines for a guess about states ``(n, B, d)``, and constants for the samples ``lost (B,)``."""
        self.excess.view(-1, len(lost))[:, lost] = 0
        self.seen = states.flatten(0, 1).clone()
        self.known.fill_(False)

    def inherit(
        self, nodes: Tensor, coarse: LocalModel, columns: Tensor | slice, excess: Tensor, states: Tensor
    ) -> None:
        """Take over what a coarser node set has learnt.

        Args:
            nodes: which of the nodes are the coarse ones, shape ``(n',)``.
            coarse: the model on those.
            columns: which of its samples go on, shape ``(B',)`` bool, or all of them.
            excess: slopes interpolated to all nodes, shape ``(n, B)``.
            states: the path that the coarse residuals describe, shape ``(n, B, d)``.
        """
        n, batch = excess.shape
        self.excess = excess.flatten().clamp(self.least, self.most)
        seen, known = self.seen.view(states.shape).copy_(states), self.known.view(n, batch)
        seen[nodes] = coarse.seen.view(len(nodes), -1, states.shape[2])[:, columns]
        known[nodes] = coarse.known.view(len(nodes), -1)[:, columns]
