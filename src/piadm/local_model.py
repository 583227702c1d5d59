"""What is known of the denoiser about the states where it was last evaluated."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: A secant is drawn through two states only if they are at least this far apart, relative to their size: closer ones
#: would show the rounding of the network.
LEAST_STRIDE = 1e-3


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

    def implicit(self, free: Tensor, response: Tensor, residual: Tensor) -> Tensor:
        """Node states ``(n, B d)`` that solve ``x = q + P R(x)``, by one small linear system per sample.

            (I - P diag(e)) x = q + P (R - e x_seen)

        Args:
            free: ``q`` at the outputs, shape ``(n + 1, B d)``.
            response: ``P``, shape ``(n + 1, n)``.
            residual: ``R``, shape ``(n, B d)``.
        """
        n, size = len(residual), self.seen.shape[1]
        known = torch.addcmul(residual.view(-1, size), self.excess[:, None], self.seen, value=-1).view_as(residual)
        right = torch.addmm(free[:-1], response[:-1], known).view(n, -1, size).transpose(0, 1)
        excess = self.excess.view(n, -1).T[:, None]
        system = torch.eye(n, dtype=free.dtype, device=free.device) - response[:-1] * excess
        states: Tensor = torch.linalg.solve(system, right)
        return states.transpose(0, 1).flatten(1)

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
