"""Running a rival: all samples together, one batched network call after the other, all of them counted."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from piadm.executor import Executor
from piadm.rivals.course import Course, Lane
from piadm.solution import Solution, Status

#: A rival at work on one sample: yields states ``(r, d)`` and their step numbers ``(r,)``, is sent the denoised
#: estimates ``(r, d)``, float64 all of them, and returns its final state ``(d,)``.
Solver = Generator[tuple[Tensor, Tensor], Tensor, Tensor]


class GaveUp(Exception):  # noqa: N818 - an outcome, not an error
    """A run that was not worth finishing: over its budget, or diverged."""


@dataclass(frozen=True)
class Budget:
    """A run ends as soon as it has used more rounds *and* more evaluations per sample than this."""

    rounds: float = math.inf
    evaluations: float = math.inf


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a run gave and what it cost.

    Attributes:
        sample: final states, ``(B, d)`` or ``(B, *sample_shape)``.
        rounds: batched network calls, one after the other, all of them.
        evaluations: network rows per sample, mean over the samples.
        seconds: wall time, everything included.
    """

    sample: Tensor
    rounds: int
    evaluations: float
    seconds: float

    @classmethod
    def of(cls, solution: Solution) -> Outcome:
        """The outcome of one of the library's own samplers.

        Raises:
            KeyboardInterrupt: if Ctrl-C ended it early: they return what they have.
        """
        if Status.INTERRUPTED in solution.status:
            raise KeyboardInterrupt
        stats = solution.stats
        return cls(solution.sample, stats.rounds, stats.evaluations, stats.wall_time)


@torch.no_grad()
def drive(course: Course, solver: Callable[[Lane], Solver], budget: Budget | None = None) -> Outcome:
    """Run a rival on every sample; what the samples ask for at the same time goes to the network as one batch.

    Each sample goes its own way: it asks for no more rows once it is done, however long the others take.

    Args:
        course: the course.
        solver: starts the rival on one sample.
        budget: when to give up; None: never.

    Raises:
        GaveUp: if the budget is used up, or a state or an estimate is not finite.
        NetworkError: if the network raises or returns the wrong shape.
    """
    began, budget = time.perf_counter(), budget or Budget()
    executor = Executor(course.denoiser, course.shape, course.condition, course.max_batch)
    at_work = {sample: solver(course.lane(sample)) for sample in range(course.batch)}
    asked = {sample: next(work) for sample, work in at_work.items()}
    done: dict[int, Tensor] = {}
    rounds = 0
    while asked:
        estimates = _call(course, executor, asked)
        rounds += 1
        following = {}
        for sample, estimate in zip(asked, estimates, strict=True):
            try:
                following[sample] = at_work[sample].send(estimate)
            except StopIteration as end:
                done[sample] = end.value
        asked = following
        evaluations = float(executor.evaluations.sum()) / course.batch
        if asked and rounds > budget.rounds and evaluations > budget.evaluations:
            raise GaveUp(f"over budget after {rounds} rounds")
    ends = torch.stack([done[number] for number in range(course.batch)])
    return Outcome(ends, rounds, evaluations, time.perf_counter() - began)


def _call(course: Course, executor: Executor, asked: dict[int, tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
    """One round: the denoised estimates of all rows that the samples ask for, per sample."""
    device, dtype = course.start.device, course.start.dtype
    counts = [len(steps) for _, steps in asked.values()]
    samples = torch.repeat_interleave(torch.tensor(list(asked), device="cpu"), torch.tensor(counts, device="cpu"))
    states = torch.cat([states for states, _ in asked.values()]).to(dtype)
    steps = torch.cat([steps for _, steps in asked.values()])
    times = course.steps.times[steps.cpu()].to(device)
    estimates = executor.whole(states, samples.to(device), times)
    executor.count(samples)
    if not bool(estimates.isfinite().all()):
        raise GaveUp("diverged")
    return torch.split(estimates.double(), counts)
