"""The figure of ``piadm scaling``: rounds, and states in memory, against the dimension, a curve per sampler."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from piadm.cli.scaling_report import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from piadm.theory import Curve

_INK = "#222222"
#: A colour and a line per sampler, whichever of them run; those of one family share the colour.
_STYLES: dict[str, tuple[str, str, str]] = {
    "sequential-sde-path": (_INK, ":", ""),
    "sequential-sde": (_INK, "-", ""),
    "sequential-ode": (_INK, "--", ""),
    "piadm-sde-blocks": ("#CC79A7", "-", "o"),
    "piadm-sde": ("#CC79A7", "--", "o"),
    "piadm-ode-blocks": ("#0072B2", "-", "s"),
    "piadm-ode": ("#0072B2", "--", "s"),
    "engine-sde-gaussian": ("#E69F00", "-", "^"),
    "engine-sde-secant": ("#D55E00", "-", "^"),
    "engine-ode-gaussian": ("#E69F00", "--", "v"),
    "engine-ode-secant": ("#D55E00", "--", "v"),
}


def draw(report: Report) -> Figure:
    """Draw the figure: all samplers with rounds on a log axis, the parallel ones on a linear one, and states.

    Returns:
        A figure with its own canvas; pyplot's global state is not touched.
    """
    figure = Figure(figsize=(15, 5.6), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    everything, parallel, memory = figure.subplots(1, 3)
    for curve in report.curves:
        if not curve.points:
            continue
        dimensions, rounds = [point.dimension for point in curve.points], [point.found.rounds for point in curve.points]
        _curve(everything, curve, dimensions, rounds)
        if not curve.name.startswith("sequential"):
            _curve(parallel, curve, dimensions, rounds)
            _curve(memory, curve, dimensions, [point.states for point in curve.points])
    titles = ("rounds (sequential: steps)", "rounds, the parallel ones", "states per sample held at once")
    for axes, title in zip((everything, parallel, memory), titles, strict=True):
        _dress(axes, title)
    for axes in (everything, memory):
        axes.set_yscale("log")
    parallel.set_ylim(bottom=0)
    handles, labels = everything.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9, frameon=False, labelcolor=_INK)
    figure.suptitle(report.headline(), x=0.01, ha="left", fontsize=12, fontweight="bold", color=_INK)
    return figure


def _curve(axes: Axes, curve: Curve, across: list[int], up: list[Any]) -> None:
    color, line, marker = _STYLES.get(curve.name, ("#777777", "-", "."))
    axes.plot(across, up, line, color=color, marker=marker, markersize=4, linewidth=1.6, label=curve.title)


def _dress(axes: Axes, title: str) -> None:
    axes.set_xscale("log")
    axes.set_xlabel("dimension d", fontsize=10, color=_INK)
    axes.set_title(title, fontsize=11, color=_INK, loc="left", pad=6)
    axes.grid(color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9, colors=_INK)
    axes.spines[["top", "right"]].set_visible(False)
