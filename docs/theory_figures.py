"""The figures of ``docs/theory.md``: growth with the dimension, the terms of the bound, what iterations take off.

    python docs/theory_figures.py [--out docs/assets]

Needs ``piadm[cli,plots]``; about a minute on two cores.  Nothing is sampled: every number is an exact Gaussian law.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import piadm
from piadm import theory
from piadm.cli import scaling_figure
from piadm.cli.files import write_figure
from piadm.cli.scaling_report import Report
from piadm.theory.families import PaperODE, PaperSDE, Target

VARIANCES, STOP, KL = [0.05, 0.3, 1.0, 3.0], 0.01, 0.1
TARGET = Target(theory.Spectrum.repeated(VARIANCES, 1), STOP)
SHIFTED = Target(theory.Spectrum.repeated(VARIANCES, 1, [1.0] * 4), STOP)


def growth() -> Figure:
    """Rounds and memory against the dimension, as ``piadm scaling`` draws them."""
    began = perf_counter()
    curves = theory.scaling(VARIANCES, [round(10 ** (k / 2)) for k in range(2, 17)], kl=KL, early_stop=STOP)
    settings = {"spectrum": VARIANCES, "kl": KL, "early_stop": STOP}
    return scaling_figure.draw(Report(settings, {}, perf_counter() - began, curves))


def path(target: Target, horizon: float, step: float) -> tuple[float, float]:
    """Divergence of whole paths per coordinate, at the start and on the way."""
    grid = target.blocks(horizon, 1, step).grid(piadm.OUSchedule())
    start, way = theory.path_kl(target.modes, "paper-sde", grid)
    return float(target.modes.total(start)), float(target.modes.total(way))


def settled(target: Target, family: PaperSDE | PaperODE, horizon: float, step: float) -> float:
    """Divergence of the samples per coordinate, all iterations done."""
    return float(target.kl(family.settled(target, horizon, math.ceil(horizon), step)))


def terms(step_axes: Axes, horizon_axes: Axes) -> None:
    """The step's term and the horizon's, for whole paths and for samples."""
    steps, horizons = [0.05 / 2**k for k in range(7)], [2.0 + 0.5 * k for k in range(17)]
    step_axes.loglog(steps, [path(TARGET, 14.0, step)[1] for step in steps], "o-", label="whole path (the bound)")
    for family, label in ((PaperSDE(), "samples, SDE"), (PaperODE(1), "samples, ODE with corrector")):
        step_axes.loglog(steps, [settled(TARGET, family, 14.0, step) for step in steps], "s-", label=label)
    step_axes.set(xlabel="step", ylabel="KL per coordinate", title="the step's term")
    horizon_axes.semilogy(horizons, [path(SHIFTED, t, 0.02)[0] for t in horizons], "o-", label="whole path, mean 1")
    horizon_axes.semilogy(horizons, [path(TARGET, t, 0.02)[0] for t in horizons], "o--", label="whole path, mean 0")
    horizon_axes.semilogy(
        horizons, [settled(SHIFTED, PaperSDE(), t, 2e-4) for t in horizons], "s-", label="samples, SDE, mean 1"
    )
    horizon_axes.semilogy(horizons, [math.exp(-t) for t in horizons], "k:", label="e^-T")
    horizon_axes.set(xlabel="horizon T", title="the horizon's term")


def iterations(axes: Axes) -> None:
    """What Picard iterations leave, for several lengths of the blocks."""
    counts = range(1, 26)
    for length in (0.5, 1.0, 2.0, 8.0):
        blocks = TARGET.blocks(8.0, math.ceil(8.0 / length), 0.01)
        law = theory.piadm_sde_law(TARGET.modes, blocks, 45)
        left = TARGET.modes.total(theory.kl(law, law[-1]))[: len(counts)]
        axes.semilogy(counts, left, "o-", markersize=3, label=f"blocks of {length:g}")
    axes.semilogy(counts, [math.exp(-k) for k in counts], "k:", label="e^-K")
    axes.set(xlabel="iterations per block K", ylabel="KL per coordinate", title="what iterations leave")
    axes.set_ylim(1e-15, 1e6)


def panels(count: int, draw: Callable[..., None]) -> Figure:
    """A figure of some panels with legends."""
    figure = Figure(figsize=(5 * count, 4), dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, count, squeeze=False)[0]
    draw(*axes)
    for one in axes:
        one.legend(fontsize=8)
        one.grid(color="#E6E6E6", linewidth=0.8)
    return figure


def main() -> None:
    """Draw all three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "assets")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    figures = {"growth": growth(), "terms": panels(2, terms), "iterations": panels(1, iterations)}
    for name, figure in figures.items():
        write_figure(out / f"theory_{name}.png", figure)


if __name__ == "__main__":
    main()
