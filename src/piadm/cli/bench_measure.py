"""What ``piadm bench`` measures: a network's latency by the number of rows, and samplers run in turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from piadm.cli.report import RunFigures, Spread, rms_difference
from piadm.cost import Latency
from piadm.problem import Problem
from piadm.rivals.course import finite
from piadm.solution import Solution, Status
from piadm.timing import median_seconds, seconds

LONGEST = 10.0  # seconds of one call, after which larger ones are left out
SHORTEST = 0.2  # seconds for which calls of one size are timed: a moment's trouble must not decide


@dataclass(frozen=True)
class Curve:
    """Seconds of a network call by its number of rows.

    Attributes:
        seconds: median seconds, by ascending numbers of rows.
        ended: why larger calls were left out, or None if all that were asked for were timed.
    """

    seconds: dict[int, float]
    ended: str | None

    def latency(self) -> Latency:
        """The same in the cost model's terms: of any number of rows."""
        found = Latency()
        for rows, taken in self.seconds.items():
            found.add(rows, taken)
        return found


@dataclass(frozen=True)
class Timing:
    """What one sampler cost, and how far its samples are from the sequential ones.

    Attributes:
        name: the sampler and its window.
        figures: counts of its last run; ``seconds`` is the median of ``times``.
        rows: rows that one of its rounds hands to the network, on average.
        first: seconds of the first run, which sets up what later ones find, and is not among ``times``.
        times: seconds of the others.
        errors: RMS per coordinate against the sequential samples, one per sample.
    """

    name: str
    figures: RunFigures
    rows: float
    first: float
    times: tuple[float, ...]
    errors: tuple[float, ...]

    @property
    def error(self) -> Spread:
        """Median and worst of the errors."""
        return Spread.of(torch.tensor(self.errors, dtype=torch.float64, device="cpu"))

    @property
    def converged(self) -> int:
        """Samples that are CONVERGED."""
        return self.figures.status.get(Status.CONVERGED.name, 0)

    @property
    def complete(self) -> bool:
        """Whether all of them are."""
        return self.converged == len(self.errors)


@torch.no_grad()
def latencies(problem: Problem, sizes: list[int], repeats: int, before: Callable[[int], object]) -> Curve:
    """Time calls of ascending numbers of rows, until memory or patience ends; each is called once before it is timed.

    Args:
        problem: one sample; its state is what the rows hold, at times all along its grid.
        sizes: numbers of rows.
        repeats: calls of each that are timed at least.
        before: told the number of rows before they are timed.

    Raises:
        NetworkError: If the network fails, by want of memory too where that is for a single row.
    """
    found: dict[int, float] = {}
    for rows in sizes:
        before(rows)
        try:
            found[rows] = median_seconds(_call(problem, rows), problem.start.device, repeats, at_least=SHORTEST)
        except MemoryError:
            most = max(found)
            return Curve(found, f"a call of {rows} rows does not fit into memory; the largest that did has {most}")
        if found[rows] > LONGEST and rows < sizes[-1]:
            return Curve(found, f"a call of {rows} rows takes {found[rows]:.0f} s: larger ones were left out")
    return Curve(found, None)


def _call(problem: Problem, rows: int) -> Callable[[], None]:
    """A call of the network on so many rows; it raises a ``MemoryError`` where these do not fit."""
    start, steps = problem.start, len(problem.grid.times) - 1
    x, samples = start.repeat(rows, 1), torch.zeros(rows, dtype=torch.int64, device=start.device)
    times = problem.grid.times[torch.arange(rows, device="cpu") * steps // rows].to(start.device)

    def call() -> None:
        if problem.executor.evaluate(x, samples, times) is None:
            raise MemoryError

    return call


@dataclass(frozen=True)
class Lap:
    """One run of one sampler: its seconds, its counts, and the errors of its samples."""

    name: str
    seconds: float
    figures: RunFigures
    errors: tuple[float, ...]


def race(
    samplers: Mapping[str, Callable[[], Solution]],
    repeats: int,
    device: torch.device,
    before: Callable[[int, str], object],
) -> Iterator[Lap]:
    """Run samplers in turns, so that what else the machine does slows down all of them alike.

    Args:
        samplers: by name; the samples of the first one are the right answer.
        repeats: how often each is run after its first time.
        device: where they run.
        before: told how many runs there were and what comes next.

    Raises:
        KeyboardInterrupt: If a run was interrupted.
        ValueError: If the right answer is not finite.
    """
    truth: Tensor | None = None
    for turn in range(repeats + 1):
        for number, (name, run) in enumerate(samplers.items()):
            before(turn * len(samplers) + number, f"{name}, {f'run {turn} of {repeats}' if turn else 'first run'}")
            took, solution = seconds(run, device)
            if Status.INTERRUPTED in solution.status:
                raise KeyboardInterrupt
            truth = finite(solution).sample if truth is None else truth
            errors = rms_difference(solution.sample, truth).tolist()
            yield Lap(name, took, RunFigures.of(solution), tuple(errors))


def timings(laps: Sequence[Lap], rows_per_call: int) -> tuple[Timing, ...]:
    """What the laps of each sampler come to, of those that have more than their first.

    Args:
        laps: those of all samplers.
        rows_per_call: rows that the network makes of one that it is given.
    """
    names = dict.fromkeys(lap.name for lap in laps)
    groups = [[lap for lap in laps if lap.name == name] for name in names]
    return tuple(_timing(group, rows_per_call) for group in groups if len(group) > 1)


def _timing(laps: Sequence[Lap], rows_per_call: int) -> Timing:
    first, *others = laps
    last, times = laps[-1], tuple(lap.seconds for lap in others)
    figures = replace(last.figures, seconds=statistics.median(times))
    rows = len(last.errors) * figures.evaluations_per_sample / rows_per_call / figures.rounds
    return Timing(last.name, figures, rows, first.seconds, times, last.errors)
