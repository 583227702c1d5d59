"""Fewer steps of the sequential sampler itself."""

from __future__ import annotations

from torch import Tensor

from piadm.rivals.course import Course, Lane
from piadm.rivals.drive import Solver
from piadm.rivals.rival import Ladder, Rival, Setting, setting
from piadm.rivals.spacing import COUNTS, borders


def few_steps(lane: Lane, cells: Tensor) -> Solver:
    """One step per cell, ``x' = A x + B D + z`` with the fine noise gathered into ``z`` (``Lane.coarsen``).

    Args:
        lane: the sample.
        cells: borders of the cells, ``(n + 1,)``; with every fine step a cell it is the sequential sampler.
    """
    factor, pull, _, kicks = lane.coarsen(cells)
    x = lane.start
    for n in range(len(cells) - 1):
        estimate = yield x[None], cells[n : n + 1]
        x = factor[n] * x + pull[n] * estimate[0] + kicks[n]
    return x


def _ladders(course: Course) -> list[Ladder]:
    """A ladder per spacing, from few steps to many."""

    def rung(count: int, spacing: str) -> Setting:
        cells = borders(course, count, spacing)
        return setting(f"{count} steps, {spacing}", lambda lane: few_steps(lane, cells))

    counts = [count for count in COUNTS if count < course.count]
    return [[rung(count, spacing) for count in counts] for spacing in ("log-snr", "grid", "karras")]


FEW_STEPS = Rival("few-steps", lambda method: "fewer steps", _ladders, "Song, Meng & Ermon 2021 (arXiv 2010.02502)")
