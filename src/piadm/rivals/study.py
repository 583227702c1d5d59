"""The study: every rival climbs its ladders, and the best of its settings is found for each error."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from piadm._checks import finite_float
from piadm.rivals.course import Course
from piadm.rivals.drive import Budget, GaveUp
from piadm.rivals.rival import Ladder, Rival, Setting, Unavailable

#: A ladder is left when so many settings in a row, each of more rounds than the one before, have changed its error by
#: less than this share: it has met its floor.
STALLED, CHANGE = 3, 0.01


@dataclass(frozen=True)
class Run:
    """One setting of one rival, and what came of it.

    Attributes:
        setting: the setting in a few words.
        rounds: batched network calls, one after the other, all of them.
        evaluations: network rows per sample.
        seconds: wall time, everything included.
        worst: largest error of a sample, RMS per coordinate against the sequential sample of the same noise.
        median: median error.
        errors: error per sample.
    """

    setting: str
    rounds: int
    evaluations: float
    seconds: float
    worst: float
    median: float
    errors: tuple[float, ...]


@dataclass(frozen=True)
class Result:
    """A rival's runs, or why there are none."""

    rival: Rival
    runs: tuple[Run, ...]
    reason: str | None = None

    def best(self, target: float, *, cost: str = "rounds", statistic: str = "worst") -> Run | None:
        """The cheapest run within an error.

        Args:
            target: the error.
            cost: "rounds", or "evaluations"; the other decides between equals.
            statistic: which error is meant: that of the "worst" sample, or the "median".
        """
        within = [run for run in self.runs if getattr(run, statistic) <= target]
        other = "evaluations" if cost == "rounds" else "rounds"
        return min(within, key=lambda run: (getattr(run, cost), getattr(run, other)), default=None)

    def front(self, *, cost: str, statistic: str) -> tuple[Run, ...]:
        """The runs that no other run beats in both cost and error, in ascending order of cost."""
        kept: list[Run] = []
        for run in sorted(self.runs, key=lambda run: (getattr(run, cost), getattr(run, statistic))):
            if not kept or getattr(run, statistic) < getattr(kept[-1], statistic):
                kept.append(run)
        return tuple(kept)

    @property
    def closest(self) -> Run | None:
        """The run with the smallest error of its worst sample."""
        return min(self.runs, key=lambda run: run.worst, default=None)


def study(
    course: Course,
    rivals: Sequence[Rival],
    targets: Sequence[float],
    watch: Callable[[int, str], None] = lambda number, label: None,
) -> tuple[Result, ...]:
    """Run every rival with settings of its own until its worst sample is within the smallest of the targets.

    A ladder of settings is climbed from the cheapest; it is left when the error is reached, when it no longer
    changes, or when a setting costs more rounds and more evaluations than one already known to reach it (or than
    the sequential sampler).  A rival's second ladder and those after it are entered just below the rung at which the
    one before met the largest target, and climbed downwards too if that rung already meets it.

    Args:
        course: the course.
        rivals: who runs.
        targets: errors that are asked for, > 0.
        watch: called before each run with the rival's number and the setting.

    Returns:
        A result per rival; if interrupted (Ctrl-C), of those that were finished.

    Raises:
        TypeError, ValueError: for a target that is no positive number.
        NetworkError: if the network fails.
    """
    checked = [finite_float("targets", target, low=0.0) for target in targets]
    results: list[Result] = []
    try:
        for number, rival in enumerate(rivals):
            climber = _Climber(course, min(checked), max(checked), partial(watch, number))
            results.append(climber.result(rival))
    except KeyboardInterrupt:
        pass
    return tuple(results)


class _Climber:
    """One rival's runs, as they come in."""

    def __init__(self, course: Course, tightest: float, loosest: float, watch: Callable[[str], None]) -> None:
        self.course, self.tightest, self.loosest, self.watch = course, tightest, loosest, watch
        self.runs: list[Run] = []

    def result(self, rival: Rival) -> Result:
        """Climb all ladders of a rival."""
        try:
            ladders = rival.ladders(self.course)
        except Unavailable as error:
            return Result(rival, (), str(error))
        entry = 0
        for ladder in filter(None, ladders):
            entry = self._climb(ladder, min(entry, len(ladder) - 1))
        return Result(rival, tuple(self.runs), None if self.runs else "no setting came to an end")

    def _climb(self, ladder: Ladder, entry: int) -> int:
        """Climb a ladder from a rung; returns the rung at which to enter the next one."""
        errors: dict[int, float] = {}
        dearer: list[Run] = []
        for rung in range(entry, len(ladder)):
            run = self._run(ladder[rung])
            if run is None:
                break
            errors[rung] = run.worst
            if not dearer or run.rounds > dearer[-1].rounds:
                dearer.append(run)
            if run.worst <= self.tightest or _stalled(dearer) or self._beaten(run):
                break
        for rung in range(entry - 1, -1, -1):
            if errors.get(rung + 1, math.inf) > self.loosest:
                break
            run = self._run(ladder[rung])
            errors[rung] = math.inf if run is None else run.worst
        within = [rung for rung, error in errors.items() if error <= self.loosest]
        return max(0, min(within) - 1 if within else max(errors, default=entry) - STALLED)

    def _run(self, setting: Setting) -> Run | None:
        """Run a setting and keep what came of it; None if it was given up."""
        self.watch(setting.label)
        try:
            outcome = setting.run(self.course, self._budget())
        except GaveUp:
            return None
        errors = self.course.errors(outcome.sample)
        worst, median = float(errors.max()), float(torch.quantile(errors, 0.5))
        cost = (outcome.rounds, outcome.evaluations, outcome.seconds)
        self.runs.append(Run(setting.label, *cost, worst, median, tuple(errors.tolist())))
        return self.runs[-1]

    def _budget(self) -> Budget:
        """What the cheapest runs within the error cost, in rounds and in evaluations; else what sequential steps do."""
        within = [run for run in self.runs if run.worst <= self.tightest]
        if not within:
            return Budget(self.course.count, self.course.count)
        return Budget(min(run.rounds for run in within), min(run.evaluations for run in within))

    def _beaten(self, run: Run) -> bool:
        """Whether a run outside the error has cost at least what it takes to be within: the next will cost more."""
        budget = self._budget()
        return run.rounds >= budget.rounds and run.evaluations >= budget.evaluations


def _stalled(dearer: list[Run]) -> bool:
    """Whether the last errors are one and the same, each of a run of more rounds than the one before."""
    last = [run.worst for run in dearer[-1 - STALLED :]]
    return len(last) > STALLED and all(
        abs(after - before) <= CHANGE * before for before, after in zip(last, last[1:], strict=False)
    )
