"""What ``piadm compare`` measured: one record, printed as tables and written as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from piadm.cli import files
from piadm.cli.device import device_text
from piadm.rivals import Result, Run

_HEAD = ("", "rounds", "evaluations", "seconds", "worst", "median", "setting")


@dataclass(frozen=True)
class Report:
    """Everything the command measured; the tables, the JSON file and the figure all read from here."""

    settings: dict[str, Any]
    versions: dict[str, str]
    targets: tuple[float, ...]
    results: tuple[Result, ...]

    def title(self, result: Result) -> str:
        """A rival's name in a table."""
        return result.rival.title(self.settings["method"])

    def headline(self) -> str:
        """Return what was run, on one line."""
        s = self.settings
        return (
            f"{s['model']}: {s['num']} sample{'s' * (s['num'] != 1)}, {s['method'].upper()}, {s['steps']} steps, "
            f"seed {s['seed']}, {device_text(s['device'], s['threads'])}"
        )

    def table(self, target: float) -> Table:
        """The fewest rounds of every rival with all samples within an error; then the fewest evaluations, if fewer."""
        table = Table(box=box.SIMPLE_HEAD, title=f"every sample within {target:g} RMS per coordinate", title_style="")
        for name in _HEAD:
            table.add_column(name, justify="left" if name in ("", "setting") else "right", overflow="fold")
        for result in self.results:
            first = result.best(target)
            if first is None:
                table.add_row(self.title(result), *["-"] * 3, *_closest(result))
                continue
            table.add_row(self.title(result), *_cells(first))
            cheap = result.best(target, cost="evaluations")
            if cheap is not None and cheap.evaluations < first.evaluations:
                table.add_row("  fewest evaluations", *_cells(cheap), style="dim")
        return table

    def write_json(self, path: Path) -> None:
        """Write every figure as JSON; a figure that is not finite becomes null: JSON has no such number."""
        figures = {
            "settings": self.settings,
            "versions": self.versions,
            "targets": self.targets,
            "rivals": [self._rival(result) for result in self.results],
        }
        files.write_json(path, figures)

    def _rival(self, result: Result) -> dict[str, Any]:
        return {
            "name": result.rival.name,
            "title": self.title(result),
            "reference": result.rival.reference,
            "reason": result.reason,
            "best": [
                {
                    "target": target,
                    "statistic": statistic,
                    "fewest": cost,
                    "run": _record(result.best(target, cost=cost, statistic=statistic)),
                }
                for target in self.targets
                for statistic in ("worst", "median")
                for cost in ("rounds", "evaluations")
            ],
            "runs": [_record(run) for run in result.runs],
        }


def _cells(run: Run) -> list[str]:
    return [
        str(run.rounds), f"{run.evaluations:.0f}", f"{run.seconds:.2f}", f"{run.worst:.1e}", f"{run.median:.1e}",
        run.setting,
    ]  # fmt: skip


def _closest(result: Result) -> list[str]:
    """The smallest error of a rival that did not reach the one asked for, or why it did not run."""
    run = result.closest
    if run is None:
        return ["-", "-", result.reason or ""]
    return [f"{run.worst:.1e}", f"{run.median:.1e}", f"not reached; closest in {run.rounds} rounds: {run.setting}"]


def _record(run: Run | None) -> dict[str, Any] | None:
    return None if run is None else asdict(run)
