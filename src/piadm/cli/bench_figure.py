"""The figure of ``piadm bench``: the network's latency by the number of rows, and the time of every sampler."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from piadm.cli.bench_report import Report
from piadm.cli.bench_verdict import duration, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _QUIET, _FAST = "#222222", "#777777", "#D55E00"


def draw(report: Report) -> Figure:
    """Draw the figure: latency on the left, between none and all of it per row; median times on the right.

    Returns:
        A figure with its own canvas; pyplot's global state is not touched.
    """
    figure = Figure(figsize=(12, 4.6), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _latency(left, report.curve.seconds)
    _times(right, report)
    figure.suptitle(report.headline(), x=0.01, ha="left", fontsize=12, fontweight="bold", color=_INK)
    return figure


def _latency(axes: Axes, seconds: dict[int, float]) -> None:
    rows, one = list(seconds), 1e3 * seconds[1]
    axes.plot(rows, [one * count for count in rows], ":", color=_QUIET, label="in proportion: only evaluations count")
    axes.plot(rows, [one] * len(rows), "--", color=_QUIET, label="constant: only rounds count")
    axes.plot(rows, [1e3 * taken for taken in seconds.values()], "o-", color=_FAST, label="this network here")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("rows of a call", fontsize=10, color=_INK)
    axes.set_title("one network call, milliseconds", fontsize=11, color=_INK, loc="left", pad=6)
    axes.legend(fontsize=8.5, labelcolor=_INK, frameon=False)
    _dress(axes, "both")


def _times(axes: Axes, report: Report) -> None:
    names = [timing.name for timing in report.timings]
    bars = axes.barh(
        names, [timing.figures.seconds for timing in report.timings],
        color=[_INK] + [_FAST if timing.complete else "#DDDDDD" for timing in report.timings[1:]],
    )  # fmt: skip
    axes.bar_label(bars, [_label(report, index) for index in range(len(names))], padding=4, fontsize=8.5, color=_INK)
    axes.invert_yaxis()
    axes.margins(x=0.3)
    axes.set_xlabel("seconds; grey: not every sample converged", fontsize=10, color=_INK)
    axes.set_title("samplers, and how many times faster", fontsize=11, color=_INK, loc="left", pad=6)
    _dress(axes, "x")


def _label(report: Report, index: int) -> str:
    timing = report.timings[index]
    return f"{duration(timing.figures.seconds)}, {short(report.speed_up(timing))} x"


def _dress(axes: Axes, grid: str) -> None:
    axes.grid(axis=grid, color="#E6E6E6", linewidth=0.8)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9, colors=_INK)
    axes.spines[["top", "right"]].set_visible(False)
