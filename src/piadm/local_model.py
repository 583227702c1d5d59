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

    ``e`` is what the linearization's ``G`` lacks of the secant slope, and is kept within bounds.

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

    def residual(self, residual: Tensor, states: Tensor) -> Tensor:
        """``R(x)`` at states ``(n B, d)``."""
        return torch.sub(states, self.seen).mul_(self.excess[:, None]).add_(residual)

    def solve(self, free: Tensor, response: Tensor, residual: Tensor, states: Tensor, sweeps: int) -> None:
        """Solve ``x = q + P R(x)`` for the node states, in place, by one small triangular system per sample.

            (I - L diag(e)) x <- q + P (R - e x_seen) + U diag(e) x,    L + U = P

        ``U``, above the diagonal, is what the nodes ahead add to what is read at a node: zero where every step is a
        node and little elsewhere, so that a few sweeps settle it.

        Args:
            free: ``q`` at the nodes, shape ``(n, B d)``.
            response: ``P``, shape ``(n, n)``.
            residual: ``R``, shape ``(n, B d)``.
            states: ``x``, where the sweeps start and end, shape ``(n, B d)``.
            sweeps: their number.
        """
        n, size = len(residual), self.seen.shape[1]
        lower, ahead, identity = response.tril(), response.triu(1), torch.eye(n).to(response)
        seen, excess = self.seen.view(n, -1, size), self.excess.view(n, -1)
        free, residual, states = (table.view_as(seen) for table in (free, residual, states))
        chunk = max(1, SOLVE_ELEMENTS // (n * (n + size)))
        for first in range(0, excess.shape[1], chunk):
            at = slice(first, first + chunk)
            slopes = excess[:, at, None]
            known = torch.addcmul(residual[:, at], slopes, seen[:, at], value=-1).flatten(1)
            known = torch.addmm(free[:, at].flatten(1), response, known)
            system = identity - lower * excess[:, at].T[:, None]
            for _ in range(sweeps):
                right = known if sweeps == 1 else torch.addmm(known, ahead, (slopes * states[:, at]).flatten(1))
                right = right.view(n, -1, size).transpose(0, 1)
                states[:, at] = torch.linalg.solve_triangular(system, right, upper=False).transpose(0, 1)

    def drift(self, states: Tensor) -> Tensor:
        """RMS distance of states ``(n B, d)`` from where they were last evaluated, ``(n B,)``."""
        return (states - self.seen).square_().mean(1).sqrt_()

    def observe(self, rows: Tensor, states: Tensor, before: Tensor, fresh: Tensor) -> tuple[Tensor, Tensor]:
        """Learn from an evaluation of some rows.

        Args:
            rows: their numbers, shape ``(r,)``.
            states: where they were evaluated, shape ``(r, d)``.
            before: their residuals so far, shape ``(r, d)``.
            fresh: their residuals now, shape ``(r, d)``.

        Returns:
            Surprise ``RMS(fresh - R(x))`` and stride ``RMS(x - x_seen)``, each ``(r,)``.
        """
        dx, dr = states - self.seen[rows], fresh - before
        old = self.excess[rows]
        surprise = torch.addcmul(dr, dx, old[:, None], value=-1).square_().mean(1).sqrt_()
        along, across = (dx * dr).sum(1), dx.square().sum(1)
        far = across > LEAST_STRIDE**2 * states.square().sum(1)
        slope = (along / across.where(far, torch.ones_like(across))).clamp(self.least[rows], self.most[rows])
        self.excess[rows] = torch.where(far & self.known[rows], slope, old)
        self.seen[rows], self.known[rows] = states, True
        return surprise, (across / dx.shape[1]).sqrt()

    def inherit(self, nodes: Tensor, coarse: LocalModel, columns: Tensor, excess: Tensor, states: Tensor) -> None:
        """Take over what a coarser node set has learnt.

        Args:
            nodes: which of the nodes are the coarse ones, shape ``(n',)``.
            coarse: the model on those.
            columns: which of its samples go on, shape ``(B',)`` bool.
            excess: slopes interpolated to all nodes, shape ``(n, B)``.
            states: the path that the coarse residuals describe, shape ``(n, B, d)``.
        """
        n, batch = excess.shape
        self.excess = excess.flatten().clamp(self.least, self.most)
        seen, known = states.clone(), self.known.view(n, batch)
        seen[nodes] = coarse.seen.view(len(nodes), len(columns), -1)[:, columns]
        known[nodes] = coarse.known.view(len(nodes), len(columns))[:, columns]
        self.seen = seen.flatten(0, 1)
