"""What ``piadm bench`` measured: one record, printed as tables and words and written as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from piadm.cli import files
from piadm.cli.bench_measure import Curve, Timing
from piadm.cli.bench_verdict import capacity, short, verdict
from piadm.cli.device import device_text

_HEAD = (
    "", "rounds", "evaluations", "rows a round", "seconds", "times faster", "first run", "median", "worst", "converged"
)  # fmt: skip


@dataclass(frozen=True)
class Report:
    """Everything the command measured; the tables, the JSON file and the figure all read from here.

    Attributes:
        settings: the options.
        versions: of the packages.
        curve: the network's latency.
        timings: the sequential sampler's first, then those of the others; of a run cut short, those that were timed.
    """

    settings: dict[str, Any]
    versions: dict[str, str]
    curve: Curve
    timings: tuple[Timing, ...]

    def headline(self) -> str:
        """Return what was run, on one line."""
        s = self.settings
        return (
            f"{s['model']}: {s['batch']} sample{'s' * (s['batch'] != 1)} at once, {s['method'].upper()}, "
            f"{s['steps']} steps, tolerance {s['tol']:g}, seed {s['seed']}, {device_text(s['device'], s['threads'])}"
        )

    def latency(self) -> Table:
        """The network's latency by the number of rows."""
        table = Table(box=box.SIMPLE_HEAD, title="one network call", title_style="")
        for name in ("rows", "ms", "ms per row", "times one row"):
            table.add_column(name, justify="right")
        for call in self._calls():
            milliseconds = [short(1e3 * call[name]) for name in ("seconds", "seconds_per_row")]
            table.add_row(str(call["rows"]), *milliseconds, short(call["times_one_row"]))
        return table

    def remarks(self) -> tuple[str, ...]:
        """What is to be said of the latency: why larger calls are missing, and how many rows there is room for."""
        return *(() if self.curve.ended is None else (self.curve.ended,)), capacity(self.curve)

    def samplers(self) -> Table:
        """Time, cost and true error of every sampler."""
        table = Table(box=box.SIMPLE_HEAD, title=self._title(), title_style="")
        for name in _HEAD:
            table.add_column(name, justify="right" if name else "left")
        for timing in self.timings:
            table.add_row(timing.name, *self._cells(timing))
        return table

    def verdict(self) -> tuple[str, ...]:
        """What it means."""
        return verdict(self.curve, self.timings, self.settings["tol"])

    def speed_up(self, timing: Timing) -> float:
        """How many times faster than the sequential sampler."""
        return self.timings[0].figures.seconds / timing.figures.seconds

    def write_json(self, path: Path) -> None:
        """Write every figure as JSON; a figure that is not finite becomes null: JSON has no such number."""
        figures = {
            "settings": self.settings,
            "versions": self.versions,
            "latency": {
                "calls": self._calls(),
                "width": self.curve.latency().width(),
                "ended": self.curve.ended,
                "remarks": self.remarks(),
            },
            "samplers": [self._record(timing) for timing in self.timings],
            "verdict": self.verdict(),
        }
        files.write_json(path, figures)

    def _calls(self) -> list[dict[str, Any]]:
        one = self.curve.seconds[1]
        return [
            {"rows": rows, "seconds": taken, "seconds_per_row": taken / rows, "times_one_row": taken / one}
            for rows, taken in self.curve.seconds.items()
        ]

    def _title(self) -> str:
        repeats = self.settings["repeats"]
        which = f"median seconds of {repeats} runs" if repeats > 1 else "seconds of one run"
        return f"{which}, after a first one; RMS error per coordinate against the sequential samples"

    def _cells(self, timing: Timing) -> list[str]:
        run, error = timing.figures, timing.error
        return [
            str(run.rounds), f"{run.evaluations_per_sample:.0f}", short(timing.rows), short(run.seconds),
            short(self.speed_up(timing)), short(timing.first), f"{error.median:.1e}", f"{error.worst:.1e}",
            f"{timing.converged} of {len(timing.errors)}",
        ]  # fmt: skip

    def _record(self, timing: Timing) -> dict[str, Any]:
        return {
            "name": timing.name,
            **asdict(timing.figures),
            "rows_per_round": timing.rows,
            "first_seconds": timing.first,
            "times": timing.times,
            "times_faster": self.speed_up(timing),
            **asdict(timing.error),
            "errors": timing.errors,
            "converged": timing.converged,
        }
