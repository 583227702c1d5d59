"""This library's own samplers among the rivals: the sequential one, and ``piadm.sample``."""

from __future__ import annotations

import piadm
from piadm.rivals.course import Course
from piadm.rivals.drive import Budget, Outcome
from piadm.rivals.rival import Ladder, Rival, Setting

#: Tolerances that ``piadm.sample`` is tried with.
_TOLERANCES = tuple(10.0 ** (-1 - k / 4) for k in range(17))


def _sequential(course: Course) -> list[Ladder]:
    return [[Setting(f"{course.count} steps", lambda course, budget: Outcome.of(course.truth))]]


def _sample(course: Course) -> list[Ladder]:
    """A ladder of tolerances with the library's own choice of nodes, and one per number of nodes and per window."""

    def rung(nodes: str | int | None, window: int | str | None, tolerance: float) -> Setting:
        def run(course: Course, budget: Budget) -> Outcome:
            solution = piadm.sample(
                course.denoiser, course.shape, method=course.method, grid=course.grid, tol=tolerance,
                seed=course.seed, nodes=nodes, window=window, max_batch=course.max_batch, max_rounds=course.count,
            )  # fmt: skip
            return Outcome.of(solution)

        chosen = [f"{name} {value}" for name, value in (("nodes", nodes), ("window", window)) if value]
        return Setting(", ".join([f"tol {tolerance:.1e}", *chosen, *begun]), run)

    # The draft's calls are no network's and not among the rounds: the table says that there were some.
    begun = [] if course.denoiser.draft is None else ["from a draft"]
    counts = [(count, window) for count in (16, 32, 64, 128) if count < course.count for window in (None, "all")]
    pairs = [(None, None), ("all", None), *counts, (None, "all"), (None, 32), (None, 8)]
    return [[rung(nodes, window, tolerance) for tolerance in _TOLERANCES] for nodes, window in pairs]


SEQUENTIAL = Rival("sequential", lambda method: "sequential", _sequential, "what the others are measured against")
SAMPLE = Rival("sample", lambda method: "piadm.sample", _sample, "this library")
