"""What a sampler returns: the samples, a status and an error estimate for each, and the counts."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum

from torch import Tensor


class Status(Enum):
    """Verdict on one sample; the value is the message."""

    CONVERGED = "the error estimate is within the tolerance, or the prescribed iterations are done"
    MAX_ROUNDS = "the error estimate is above the tolerance, and no rounds are left or more would change nothing"
    NONFINITE = "the network returned a value that is not finite"
    INTERRUPTED = "stopped by the callback or from the keyboard before the sample was finished"


class NetworkError(RuntimeError):
    """The network raised an exception or returned something of the wrong shape or type."""


class NotConvergedError(RuntimeError):
    """Raised with ``raise_on_failure=True`` when a sample is not CONVERGED; ``.solution`` has the result so far."""

    def __init__(self, message: str, solution: Solution) -> None:
        super().__init__(message)
        self.solution = solution

    def __reduce__(self) -> tuple[type[NotConvergedError], tuple[str, Solution]]:
        return type(self), (str(self), self.solution)  # by the message alone a pickled one could not be made again


@dataclass(frozen=True)
class Stats:
    """What a run has cost.

    Attributes:
        rounds: sequential batched network calls on the critical path, all of them.
        evaluations: network rows evaluated, per sample (mean over the batch).
        rounds_per_sample: rounds in which each sample took part, shape ``(B,)`` int64.
        evaluations_per_sample: network rows of each sample, shape ``(B,)`` int64.
        peak_batch: most rows handed to the network in one call, after micro-batching.
        peak_states: most states, samples x nodes, on the paths of one round.
        nodes: nodes of the finest node set that ``sample`` came to, the first one if it ended before; None for the
            other samplers, which call the network at every step.
        window: most rows per sample and round on that node set; None likewise.
        wall_time: seconds from the call to the return, everything included; of a diffusers pipeline, to the end of its
            denoising loop.
        residuals: error estimate after each round, RMS per coordinate of the final sample, shape ``(rounds, B)``;
            empty where the method makes no estimate.
        draft_rounds: sequential batched calls of the denoiser's draft, which do not count as rounds.
        draft_evaluations: rows of the draft, per sample (mean over the batch).
    """

    rounds: int
    evaluations: float
    rounds_per_sample: Tensor
    evaluations_per_sample: Tensor
    peak_batch: int
    peak_states: int
    nodes: int | None
    window: int | None
    wall_time: float
    residuals: Tensor
    draft_rounds: int = 0
    draft_evaluations: float = 0.0


@dataclass(frozen=True)
class Solution:
    """The result of a sampler.

    Attributes:
        sample: the final state, shape ``(B, *shape)``.
        status: one ``Status`` per sample.
        error_estimate: estimated RMS error per coordinate of the final sample against the sequential sampler on
            the same grid and noise, shape ``(B,)`` float64; 0 for the sequential sampler itself, inf where nothing is
            known yet, NaN where the method makes no estimate.
        stats: rounds, evaluations, memory and time.
        states: states along the path, shape ``(J + 1, B, *shape)``, noise first, where they were asked for; fewer
            where a sequential or block-by-block run was interrupted.
        failures: one line per sample that failed, naming its number and the time.
    """

    sample: Tensor
    status: tuple[Status, ...]
    error_estimate: Tensor
    stats: Stats
    states: Tensor | None = None
    failures: tuple[str, ...] = ()

    @property
    def converged(self) -> bool:
        """Whether every sample is CONVERGED."""
        return all(status is Status.CONVERGED for status in self.status)


def timed(solve: Callable[[], Solution], began: float) -> Solution:
    """The solution that ``solve`` returns, or raises with a ``NotConvergedError``, with ``wall_time`` set.

    Args:
        solve: a sampler's work.
        began: when the sampler was called, by ``time.perf_counter``.
    """
    try:
        solution = solve()
    except NotConvergedError as error:
        error.solution = _since(error.solution, began)
        raise
    return _since(solution, began)


def _since(solution: Solution, began: float) -> Solution:
    return replace(solution, stats=replace(solution.stats, wall_time=time.perf_counter() - began))


def demand(solution: Solution) -> Solution:
    """The solution itself.

    Raises:
        NotConvergedError: if a sample is not CONVERGED.
    """
    if solution.converged:
        return solution
    counted = {status.name: solution.status.count(status) for status in Status if status in solution.status}
    said = ", ".join(f"{count} {name}" for name, count in counted.items())
    raise NotConvergedError(f"not every sample converged: {said}", solution)


@dataclass(frozen=True)
class RoundInfo:
    """What a callback sees after each round (of the sequential sampler: each step).

    Attributes:
        round: number of network rounds so far.
        total: number of rounds of the whole run, or None where that is not known in advance.
        sample: current final sample (of the sequential sampler: current state), shape ``(B, *shape)``.
        denoised: best guess of the clean sample so far, a preview, shape ``(B, *shape)``.
        error_estimate: per sample, shape ``(B,)`` float64 on the CPU.
        active_rows: network rows evaluated in this round.
    """

    round: int
    total: int | None
    sample: Tensor
    denoised: Tensor
    error_estimate: Tensor
    active_rows: int
