"""The figure of ``piadm compare``: error against depth and against work, a curve per rival."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from piadm.cli.compare_report import Report
from piadm.rivals import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _QUIET = "#222222", "#777777"
_COSTS = {"rounds": "rounds (network calls in a row)", "evaluations": "evaluations (network rows per sample)"}
_STATISTICS = {"worst": "worst sample", "median": "median sample"}
#: A colour and a marker per rival, whichever of them run; those of one family share the colour.
_STYLES: dict[str, tuple[str, str]] = {
    "sequential": (_INK, "D"),
    "few-steps": (_QUIET, "s"),
    "dpm-solver": ("#E69F00", "^"),
    "unipc": ("#E69F00", "v"),
    "paradigms": ("#009E73", "o"),
    "paradigms-diffusers": ("#009E73", "x"),
    "piadm": ("#CC79A7", "P"),
    "picard": ("#CC79A7", "p"),
    "parataa": ("#56B4E9", "h"),
    "srds": ("#8B6D3F", "<"),
    "sample": ("#D55E00", "o"),
}


def draw(report: Report) -> Figure:
    """Draw the figure: rounds and evaluations across, the worst and the median sample's error up.

    A curve joins the runs of a rival that no other run of it beats in both cost and error.

    Returns:
        A figure with its own canvas; pyplot's global state is not touched.
    """
    figure = Figure(figsize=(11.5, 9), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2, sharex="col", sharey=True)
    for row, statistic in zip(panels, _STATISTICS, strict=True):
        for axes, cost in zip(row, _COSTS, strict=True):
            _panel(axes, report, cost, statistic)
    for axes, label in zip(panels[-1], _COSTS.values(), strict=True):
        axes.set_xlabel(label, fontsize=10, color=_INK)
    for axes, label in zip(panels[:, 0], _STATISTICS.values(), strict=True):
        axes.set_ylabel(f"RMS error per coordinate, {label}", fontsize=10, color=_INK)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9, frameon=False, labelcolor=_INK)
    figure.suptitle(report.headline(), x=0.01, ha="left", fontsize=13, fontweight="bold", color=_INK)
    return figure


def _panel(axes: Axes, report: Report, cost: str, statistic: str) -> None:
    for result in report.results:
        _curve(axes, result, report.title(result), cost, statistic)
    for target in report.targets:
        axes.axhline(target, color=_QUIET, linewidth=1, linestyle=(0, (1, 2)), zorder=1)
    steps = report.settings["steps"]
    axes.axvline(steps, color=_INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axes.annotate(
        f"sequential: {steps}", (steps, 1), (-4, -4), xycoords=("data", "axes fraction"), textcoords="offset points",
        ha="right", va="top", rotation=90, fontsize=8, color=_INK,
    )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.grid(color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9, colors=_INK)
    axes.spines[["top", "right"]].set_visible(False)


def _curve(axes: Axes, result: Result, title: str, cost: str, statistic: str) -> None:
    """A rival's front; a log axis has no place for an error of zero, the sequential sampler's own."""
    front = [run for run in result.front(cost=cost, statistic=statistic) if 0 < getattr(run, statistic) < float("inf")]
    if not front:
        return
    color, marker = _STYLES.get(result.rival.name, (_QUIET, "."))
    own: dict[str, Any] = {"linewidth": 2.6, "zorder": 4} if result.rival.name == "sample" else {"linewidth": 1.3}
    across, up = [getattr(run, cost) for run in front], [getattr(run, statistic) for run in front]
    axes.plot(across, up, color=color, marker=marker, markersize=5, label=title, **own)
