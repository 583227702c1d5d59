"""This library's own samplers among the rivals: the sequential one, and ``piadm.sample``."""

from __future__ import annotations

import piadm
from piadm.rivals.course import Course
from piadm.rivals.drive import Budget, Outcome
from piadm.rivals.rival import Ladder, Rival, Setting

#: Tolerances that ``piadm.sample`` is tried with, and numbers of rounds after which it is stopped, as solvers of few
#: steps are told how many to take; rows are then evaluated for as long as a small tolerance asks.
_TOLERANCES = tuple(10.0 ** (-1 - k / 4) for k in range(17))
_ROUNDS, _SMALL = (2, 3, 4, 5, 6, 7, 8, 10, 12), 1e-3


def _sequential(course: Course) -> list[Ladder]:
    return [[Setting(f"{course.count} steps", lambda course, budget: Outcome.of(course.truth))]]


def _sample(course: Course) -> list[Ladder]:
    """Ladders of tolerances, with the library's own nodes and window and with others, and ladders of rounds."""

    def rung(nodes: str | int | None, window: int | str | None, tolerance: float, rounds: int | None = None) -> Setting:
        def run(course: Course, budget: Budget) -> Outcome:
            solution = piadm.sample(
                course.denoiser, course.shape, method=course.method, grid=course.grid, tol=tolerance, seed=course.seed,
                nodes=nodes, window=window, condition=course.condition, max_batch=course.max_batch,
                max_rounds=rounds or course.count,
            )  # fmt: skip
            return Outcome.of(solution)

        chosen = [f"{name} {value}" for name, value in (("nodes", nodes), ("window", window)) if value]
        until = f"tol {tolerance:.1e}" if rounds is None else f"{rounds} rounds"
        return Setting(", ".join([until, *chosen, *begun]), run)

    # The draft's calls are no network's and not among the rounds: the table says that there were some.
    begun = [] if course.denoiser.draft is None else ["from a draft"]
    some = [count for count in (16, 32, 64, 128) if count < course.count]
    counts = [(count, window) for count in some for window in (None, "all")]
    pairs = [(None, None), ("all", None), *counts, (None, "all"), (None, 32), (None, 8)]
    tolerances = [[rung(nodes, window, tolerance) for tolerance in _TOLERANCES] for nodes, window in pairs]
    return tolerances + [[rung(count, "all", _SMALL, rounds) for rounds in _ROUNDS] for count in some]


SEQUENTIAL = Rival("sequential", lambda method: "sequential", _sequential, "what the others are measured against")
SAMPLE = Rival("sample", lambda method: "piadm.sample", _sample, "this library")
