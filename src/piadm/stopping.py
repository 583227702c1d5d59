"""Stopping rules: when a sample is finished, judged by what a round has moved.

The tolerance is the RMS error per coordinate of the final sample against the sequential sampler on the same
grid and noise, judged sample by sample.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol

import torch
from torch import Tensor

from piadm.path import Movement


class Verdict(IntEnum):
    """What a stopping rule says of one sample after a round."""

    GO_ON = 0
    DONE = 1
    REFINE = 2  # the iteration has settled, but the node set cannot resolve the tolerance
    NONFINITE = 3


class StoppingRule(Protocol):
    """Judges every sample after every round of one path."""

    def judge(self, movement: Movement, moves: Tensor) -> tuple[Tensor, Tensor]:
        """Error estimate ``(B,)`` float64 and ``Verdict`` ``(B,)`` int64 of every sample.

        Args:
            movement: what this round has changed.
            moves: RMS move of every row's residual at its last evaluation, ``(n, B)`` float64; inf: never evaluated.
        """
        ...


@dataclass
class FixedIterations:
    """The paper's rule: K rounds, no estimate.

    Args:
        iterations: number of rounds K.
    """

    iterations: int
    done: int = field(default=0, init=False)

    def judge(self, movement: Movement, moves: Tensor) -> tuple[Tensor, Tensor]:
        """DONE for every sample after K rounds; the error estimate is NaN."""
        self.done += 1
        verdict = torch.full_like(movement.end, Verdict.DONE if self.done >= self.iterations else Verdict.GO_ON)
        verdict[~movement.end.isfinite()] = Verdict.NONFINITE
        return torch.full_like(movement.end, torch.nan), verdict.long()


#: Contraction factors above this are not trusted: the remaining error is then taken as nine times the last move.
SLOWEST = 0.9

#: Share of the tolerance that rows which are no longer evaluated may leave together.
SETTLED_SHARE = 0.1


class CarriedResidual:
    """Stop when the residual that is left, carried to the end of the path, is within the tolerance.

    A round that moves the node residuals by ``r_i`` (RMS) moves the end by at most

        m = sum_i w_i r_i,    w the influence of the nodes on the end, about |P_end,i|

    without any cancellation between nodes.  Rounds contract it, by ``rho`` in the last two; the rest of the
    geometric series bounds the error that remains, ``e = m max(1, rho/(1 - rho))``.  To this come the path's
    own estimates of its interpolation and rounding errors.  No estimate is made before every row has been
    evaluated once.

    Args:
        influence: ``w``, shape ``(n,)`` float64.
        tol: tolerance.
        refinable: whether finer nodes can be had when interpolation is what limits the sample.
        earliest: round before which no sample is judged that still moves.
        exact_after: number of rounds after which the iteration is exact but for settled rows.
        contraction: ``rho`` known from a coarser node set, shape ``(B,)``; None expects the slowest.
    """

    def __init__(
        self,
        influence: Tensor,
        tol: float,
        *,
        refinable: bool,
        earliest: int,
        exact_after: int,
        contraction: Tensor | None = None,
    ) -> None:
        self.influence, self.tol, self.refinable, self.exact_after = influence, tol, refinable, exact_after
        self.earliest, self.rounds = earliest, 0
        self.last: Tensor | None = None
        self.contraction = contraction

    def _iteration_error(self, moves: Tensor, exact: Tensor) -> Tensor:
        """``e`` of the class docstring; inf for samples with rows that were never evaluated."""
        reached = moves.isfinite().all(0)
        move = torch.where(reached, self.influence @ moves.nan_to_num(posinf=0.0), torch.inf)
        rho = torch.full_like(move, SLOWEST) if self.contraction is None else self.contraction
        if self.last is not None:
            ratio = move / self.last.clamp(min=torch.finfo(torch.float64).tiny)
            # A sample that is judged already stands still; what it had contracted by is kept.
            rho = torch.where(self.last.isfinite() & (move != self.last), ratio.clamp(0, SLOWEST), rho)
            self.contraction = rho
        self.last = move
        error = move * (rho / (1 - rho)).clamp(min=1)
        return torch.full_like(error, SETTLED_SHARE * self.tol).where(exact, error)

    def judge(self, movement: Movement, moves: Tensor) -> tuple[Tensor, Tensor]:
        """The estimate of the class docstring, and its verdict."""
        self.rounds += 1
        # Where nothing has moved, nothing was left to evaluate.
        still = (movement.residual == 0).all(0)
        iteration = self._iteration_error(moves, still | (self.rounds >= self.exact_after))
        interpolation = movement.interpolation
        error = iteration + interpolation + movement.rounding

        verdict = torch.full_like(error, Verdict.GO_ON)
        ripe = still | (self.rounds >= self.earliest)
        enough = 0.5 * interpolation if self.refinable else torch.full_like(error, SETTLED_SHARE * self.tol)
        verdict[ripe & (iteration <= enough) & (interpolation > 0.5 * self.tol)] = Verdict.REFINE
        verdict[ripe & (error <= self.tol)] = Verdict.DONE
        verdict[~movement.end.isfinite()] = Verdict.NONFINITE
        return error, verdict.long()
