"""The picture of ``piadm sample``: both sets of samples, and how the parallel one was reached."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatterSciNotation, MaxNLocator
from torch import Tensor

from piadm.cli import portraits
from piadm.cli.report import Report, Spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARKED = 30  # rounds up to which every one is marked
# Inches: margin, side of a grid, space between panels, room for axis labels, width of the curves.
_EDGE, _GRID, _SPACE, _LABELS, _CURVES = 0.25, 3.9, 0.35, 0.5, 4.6
_BOTTOM, _HEIGHT = 0.55, 5.6
_INK, _QUIET = "#222222", "#777777"
_TRUE, _ESTIMATE = "#0072B2", "#D55E00"
_TITLE: dict[str, Any] = {"fontsize": 15, "fontweight": "bold", "color": _INK}
_SUBTITLE: dict[str, Any] = {"fontsize": 10.5, "color": _QUIET}


def draw(report: Report, parallel: Tensor, sequential: Tensor | None) -> Figure:
    """Draw the picture.

    Args:
        report: The figures of the run.
        parallel: Samples ``(B, *shape)``.
        sequential: The reference on the same noise, of the same shape, or None.

    Returns:
        A figure with its own canvas; pyplot's global state is not touched.
    """
    panels = [(f"parallel: {_count(report.parallel.rounds, 'round')}", parallel)]
    if report.sequential is not None and sequential is not None:
        panels.insert(0, (f"sequential: {_count(report.sequential.rounds, 'round')}", sequential))
    width = _EDGE + len(panels) * (_GRID + _SPACE) + _LABELS + _CURVES + _EDGE
    figure = Figure(figsize=(width, _HEIGHT), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)

    def place(left: float, across: float) -> Axes:
        return figure.add_axes((left / width, _BOTTOM / _HEIGHT, across / width, _GRID / _HEIGHT))

    for index, (title, samples) in enumerate(panels):
        _show_samples(place(_EDGE + index * (_GRID + _SPACE), _GRID), title, samples)
    _show_convergence(place(width - _EDGE - _CURVES, _CURVES), report, portraits.unit(parallel))
    for text, top, style in ((_title(report), 0.28, _TITLE), (_subtitle(report), 0.6, _SUBTITLE)):
        figure.text(_EDGE / width, 1 - top / _HEIGHT, text, va="center", **style)
    return figure


def _show_samples(axes: Axes, title: str, samples: Tensor) -> None:
    count = portraits.show(axes, samples)
    shown = f" (first {count} of {len(samples)})" if len(samples) > count else ""
    axes.set_title(title + shown, fontsize=11, color=_INK, loc="left", pad=6)


def _show_convergence(axes: Axes, report: Report, unit: str) -> None:
    tol = float(report.settings["tol"])
    rounds = [entry.round for entry in report.convergence]
    differences = [entry.rms_difference for entry in report.convergence if entry.rms_difference is not None]
    if differences:
        _curves(axes, rounds, differences, _TRUE, "difference to sequential")
    _curves(axes, rounds, [entry.error_estimate for entry in report.convergence], _ESTIMATE, "error estimate")
    axes.axhline(tol, color=_QUIET, linewidth=1, linestyle=(0, (1, 2)), label=f"tolerance {tol:g}", zorder=1)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(LogFormatterSciNotation())
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.set_xlim(min(rounds, default=0) - 0.3, max(rounds, default=1) + 0.3)
    axes.set_xlabel("round", fontsize=10, color=_INK)
    axes.set_title(f"RMS error per {unit} after each round", fontsize=11, color=_INK, loc="left", pad=6)
    axes.tick_params(labelsize=9, colors=_INK)
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8.5, loc="best", labelcolor=_INK, edgecolor="none", framealpha=0.9)


def _curves(axes: Axes, rounds: list[int], spreads: list[Spread], color: str, name: str) -> None:
    """Draw worst (solid) and median (dashed); a log axis has no place for zero, so it is left out."""
    marker = "o" if len(rounds) <= _MARKED else ""
    points: dict[str, Any] = {"marker": marker, "markersize": 3, "linewidth": 1.6}
    for label, values, style in (
        (f"{name}, worst", [spread.worst for spread in spreads], "-"),
        (f"{name}, median", [spread.median for spread in spreads], "--"),
    ):
        heights = [value if math.isfinite(value) and value > 0 else math.nan for value in values]
        axes.plot(rounds, heights, style, color=color, label=label, **points)


def _title(report: Report) -> str:
    rounds = _count(report.parallel.rounds, "parallel round")
    if report.sequential is None:
        return f"{report.counted} in {rounds} instead of {_count(report.settings['steps'], 'sequential step')}"
    return f"{report.counted}: {_count(report.sequential.rounds, 'sequential step')} or {rounds}, same noise"


def _subtitle(report: Report) -> str:
    s, final = report.settings, report.rms_difference
    parts = [f"{s['method'].upper()}, {_count(s['steps'], 'step')}"]
    if final is not None:
        parts.append(f"RMS difference: median {final.median:.1e}, worst {final.worst:.1e}")
    parts.append(f"evaluations per sample: {report.parallel.evaluations_per_sample:.0f}")
    seconds = f"{report.parallel.seconds:.1f} s"
    if report.sequential is not None:
        seconds = f"{report.sequential.seconds:.1f} s sequential, {seconds} parallel"
    return "   |   ".join([*parts, f"{seconds} on {s['device']}", *report.warnings[:1]])


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
