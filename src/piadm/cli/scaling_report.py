"""What ``piadm scaling`` found: one record, printed as tables and written as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from piadm.cli import files
from piadm.theory import Curve, Point

_FEWEST = 4  # points that a fit of three coefficients needs
_COLUMNS = 8  # dimensions in the table at most


@dataclass(frozen=True)
class Report:
    """Everything the command found; the tables, the JSON file and the figure all read from here."""

    settings: dict[str, Any]
    versions: dict[str, str]
    seconds: float
    curves: tuple[Curve, ...]

    def headline(self) -> str:
        """Return what was asked, on one line."""
        s = self.settings
        variances = ", ".join(f"{value:g}" for value in s["spectrum"])
        return (
            f"fewest rounds with KL <= {s['kl']:g}; Gaussian data of variances {variances}; early stopping at "
            f"{s['early_stop']:g}; {self.seconds:.0f} s"
        )

    def table(self) -> Table:
        """Rounds, and states at the largest dimension, of every sampler."""
        dimensions = sorted({point.dimension for curve in self.curves for point in curve.points})
        every = -(-len(dimensions) // _COLUMNS)
        shown = dimensions[::-1][::every][::-1]
        table = Table(box=box.SIMPLE_HEAD, title="rounds (sequential: steps)", title_style="")
        table.add_column("")
        for dimension in shown:
            table.add_column(f"d = {_short(dimension)}", justify="right")
        table.add_column("states", justify="right")
        for curve in self.curves:
            rounds = {point.dimension: _short(point.found.rounds) for point in curve.points}
            states = _short(curve.points[-1].states) if curve.points else "-"
            table.add_row(curve.title, *(rounds.get(dimension, "-") for dimension in shown), states)
        return table

    def growth(self) -> Table:
        """Fitted growth of every sampler."""
        head = ("", "exponent of d", "ln d", "(ln d)^2", "R^2", "rms rounds", "exponent at the end")
        table = Table(box=box.SIMPLE_HEAD, title="growth: C d^p, or a quadratic in ln d", title_style="")
        for name in head:
            table.add_column(name, justify="left" if not name else "right")
        for curve in self.curves:
            if len(curve.points) < _FEWEST:
                table.add_row(curve.title, *["-"] * (len(head) - 1))
                continue
            power, fit = curve.power(), curve.polynomial()
            cells = [_with_error(power.coefficients[1], power.errors[1])]
            if curve.name.startswith("sequential"):
                table.add_row(curve.title, *cells, *["-"] * (len(head) - 2))
                continue
            cells += [_with_error(fit.coefficients[i], fit.errors[i]) for i in (1, 2)]
            table.add_row(
                curve.title, *cells, f"{fit.r_squared:.4f}", f"{fit.residual:.2g}", f"{curve.end_exponent():.3f}"
            )
        return table

    def write_json(self, path: Path) -> None:
        """Write every figure as JSON."""
        figures = {
            "settings": self.settings,
            "versions": self.versions,
            "seconds": self.seconds,
            "samplers": [_record(curve) for curve in self.curves],
        }
        files.write_json(path, figures)


def _record(curve: Curve) -> dict[str, Any]:
    fits: dict[str, Any] = {"power": None, "polynomial": None, "end_exponent": None, "against_power": None}
    if len(curve.points) >= _FEWEST:
        fits = {
            "power": asdict(curve.power()),
            "polynomial": asdict(curve.polynomial()),
            "end_exponent": curve.end_exponent(),
            "against_power": {"power": 0.1, "standard_errors": curve.against_power(0.1)},
        }
    return {"name": curve.name, "title": curve.title, **fits, "points": [_point(point) for point in curve.points]}


def _point(point: Point) -> dict[str, Any]:
    return {"dimension": point.dimension, **asdict(point.found), "inner": point.inner, "states": point.states}


def _with_error(value: float, error: float) -> str:
    return f"{value:.3f} +- {error:.3f}"


def _short(number: float) -> str:
    """A number in few characters: whole below 100 000, else two digits and a power of ten."""
    return f"{number:.0f}" if number < 1e5 else f"{number:.1e}".replace("e+0", "e").replace("e+", "e")
