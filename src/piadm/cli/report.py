"""What ``piadm sample`` measured: one record, printed as a table and written as JSON."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from torch import Tensor

from piadm.cli import files
from piadm.cli.device import device_text
from piadm.numerics import rms
from piadm.solution import Status

if TYPE_CHECKING:
    from piadm.solution import RoundInfo, Solution


@dataclass(frozen=True)
class Spread:
    """Median and worst of a figure that every sample has."""

    median: float
    worst: float

    @classmethod
    def of(cls, values: Tensor) -> Spread:
        """Return the spread of ``values``, one per sample; NaN as soon as one of them is NaN."""
        values = values.detach().double().cpu()
        return cls(float(values.quantile(0.5)), float(values.max()))


@dataclass(frozen=True)
class RunFigures:
    """What one sampler cost and how its samples ended."""

    rounds: int
    evaluations_per_sample: float
    seconds: float
    status: dict[str, int]
    failures: tuple[str, ...]
    nodes: int | None
    window: int | None
    draft_rounds: int
    draft_evaluations_per_sample: float

    @classmethod
    def of(cls, solution: Solution) -> RunFigures:
        """Return the figures of a solution."""
        stats = solution.stats
        counts = Counter(status.name for status in solution.status)
        cost = (stats.rounds, stats.evaluations, stats.wall_time)
        draft = (stats.draft_rounds, stats.draft_evaluations)
        return cls(*cost, dict(counts), solution.failures, stats.nodes, stats.window, *draft)


@dataclass(frozen=True)
class RoundFigures:
    """The state of the samples after one round; ``rms_difference`` is None without a reference."""

    round: int
    error_estimate: Spread
    rms_difference: Spread | None


@dataclass(frozen=True)
class Trace:
    """A callback that keeps every round's sample and error estimate, for later comparison."""

    rounds: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)

    def record(self, info: RoundInfo) -> None:
        """Keep a copy of what the round produced: samplers may go on in the same memory."""
        sample, estimate = (x.detach().to("cpu", copy=True) for x in (info.sample, info.error_estimate))
        self.rounds.append((info.round, sample, estimate))

    def convergence(self, reference: Tensor | None) -> tuple[RoundFigures, ...]:
        """Return the figures per round, with the difference to ``reference`` where there is one."""
        return tuple(
            RoundFigures(
                number,
                Spread.of(estimate),
                None if reference is None else Spread.of(rms_difference(sample, reference)),
            )
            for number, sample, estimate in self.rounds
        )


def rms_difference(x: Tensor, y: Tensor) -> Tensor:
    """Return ``sqrt(mean (x - y)^2)`` per sample, float64 of shape ``(B,)``, for ``x, y (B, *shape)``."""
    difference = x.detach().double().cpu() - y.detach().double().cpu()
    return rms(difference.flatten(1))


@dataclass(frozen=True)
class Report:
    """Everything the command measured; the table, the JSON file and the picture all read from here.

    Attributes:
        counted: what was sampled, in words, such as "16 garments".
    """

    settings: dict[str, Any]
    counted: str
    versions: dict[str, str]
    parallel: RunFigures
    sequential: RunFigures | None
    error_estimate: Spread
    rms_difference: Spread | None
    convergence: tuple[RoundFigures, ...]
    warnings: tuple[str, ...]

    def table(self) -> Table:
        """Return the table that is printed."""
        runs = [run for run in (self.sequential, self.parallel) if run is not None]
        table = Table(box=box.SIMPLE_HEAD)
        table.add_column("")
        for name in (["sequential"] if self.sequential else []) + ["parallel"]:
            table.add_column(name, justify="right")

        def row(name: str, cells: Sequence[str]) -> None:
            table.add_row(name, *[""] * (len(runs) - len(cells)), *cells)

        row("rounds (network calls in a row)", [str(run.rounds) for run in runs])
        row("evaluations per sample", [f"{run.evaluations_per_sample:.0f}" for run in runs])
        if self.parallel.draft_rounds:
            calls = f"{self.parallel.draft_rounds}, {self.parallel.draft_evaluations_per_sample:.0f}"
            row("rounds and evaluations of the draft", [calls])
        row("nodes, and most rows in a round", [f"{self.parallel.nodes}, {self.parallel.window}"])
        row("seconds", [f"{run.seconds:.1f}" for run in runs])
        if self.rms_difference is not None:
            row("RMS difference, median", [f"{self.rms_difference.median:.2e}"])
            row("RMS difference, worst", [f"{self.rms_difference.worst:.2e}"])
        row("error estimate, median", [f"{self.error_estimate.median:.2e}"])
        row("error estimate, worst", [f"{self.error_estimate.worst:.2e}"])
        for status in dict.fromkeys(name for run in runs for name in run.status):
            row(_words(status), [str(run.status.get(status, 0)) for run in runs])
        return table

    def headline(self) -> str:
        """Return what was run, on one line."""
        s = self.settings
        return (
            f"{self.counted}, {s['method'].upper()}, {s['steps']} steps, "
            f"tolerance {s['tol']:g}, seed {s['seed']}, {device_text(s['device'], s['threads'])}"
        )

    def write_json(self, path: Path) -> None:
        """Write every figure as JSON; a figure that is not finite becomes null: JSON has no such number."""
        files.write_json(path, dataclasses.asdict(self))


def warnings_of(runs: dict[str, RunFigures]) -> tuple[str, ...]:
    """Return a line for every sampler that left samples unfinished, and one for every sample that failed."""
    lines = []
    for sampler, run in runs.items():
        failed = {_words(name): count for name, count in run.status.items() if name != Status.CONVERGED.name}
        if failed:
            reasons = ", ".join(f"{count} {status}" for status, count in failed.items())
            total = sum(run.status.values())
            lines.append(f"{sum(failed.values())} of {total} {sampler} samples did not converge: {reasons}")
        lines.extend(f"{sampler} {failure}" for failure in run.failures)
    return tuple(lines)


def _words(status: str) -> str:
    return status.lower().replace("_", " ")
