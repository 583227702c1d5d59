"""What a rival is: a name, and its settings in ladders to climb until the error is small enough."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from piadm.rivals.course import Course, Lane
from piadm.rivals.drive import Budget, Outcome, Solver, drive


class Unavailable(Exception):  # noqa: N818 - a reason, not an error
    """A rival that cannot run this course, and why."""


@dataclass(frozen=True)
class Setting:
    """One setting of a rival.

    Attributes:
        label: the setting in a few words.
        run: runs it; may raise ``GaveUp``.
    """

    label: str
    run: Callable[[Course, Budget], Outcome]


#: Settings in the order of their cost, each with a smaller error than the one before, or so it should be.
Ladder = list[Setting]


@dataclass(frozen=True)
class Rival:
    """One way to a sample.

    Attributes:
        name: what it is called on the command line.
        title: what it is called in a table, for the method "sde" or "ode".
        ladders: its settings for a course; raises ``Unavailable`` where it has none.
        reference: where it comes from.
    """

    name: str
    title: Callable[[str], str]
    ladders: Callable[[Course], list[Ladder]]
    reference: str


def setting(label: str, solver: Callable[[Lane], Solver]) -> Setting:
    """The setting of a rival that is written for one sample."""
    return Setting(label, lambda course, budget: drive(course, solver, budget))


def at_most(values: Iterable[int], count: int) -> list[int]:
    """Distinct values, those above ``count`` cut to it."""
    return list(dict.fromkeys(min(value, count) for value in values))


#: Tolerances that the rivals with a stopping rule of their own are tried with, in whatever unit the rule has.
TOLERANCES = tuple(10.0 ** (2 - k / 3) for k in range(22))
