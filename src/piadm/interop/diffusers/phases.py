"""The phases of a pipeline's loop: steps at which its body calls the same networks and makes the same of their outputs.

Most pipelines have one.  Guidance that begins late or ends early, or a second network for the last steps, makes two: a
round then passes the body once for each of them, at one of its steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from piadm.interop.diffusers.arguments import Rows, Slot
from piadm.interop.diffusers.blend import ROUNDING, Blend
from piadm.interop.diffusers.nested import leaves, same
from piadm.interop.diffusers.probe import RowsError, UnsupportedError
from piadm.interop.diffusers.watch import is_number

#: Most phases of a loop: each is a pass of its body in every round.  Guidance of another scale at every step would have
#: as many phases as steps, one row in each.
MOST = 4

#: Of a network and its argument.
AGAIN = (
    "{} is given another {} when the pipeline makes a step again: what it is told beside the state goes by the state, "
    "or by a network's output, as in self-conditioning"
)

#: Network calls of one step: names, and arguments by name.
Calls = list[tuple[str, dict[str, Any]]]


def alike(output: Tensor, wanted: Tensor, rounding: float = ROUNDING) -> bool:
    """Whether model outputs are the same up to rounding."""
    near = rounding * float(wanted.abs().max())
    if math.isnan(near) or output.shape != wanted.shape:
        return False
    return torch.allclose(output, wanted, rtol=rounding, atol=near)


def _unchanged(value: Any, known: Any) -> bool:  # noqa: ANN401 - any argument
    """Whether an argument is what it was, up to rounding; of objects nobody knows.

    NaN says nothing: it is what remains of a state of NaN in whose place something is set by way of factors of 0 and 1.
    """
    if isinstance(value, Tensor) and isinstance(known, Tensor):
        if not known.is_floating_point() or value.shape != known.shape:
            return same(value, known)
        return alike(torch.where(value.isnan(), known, value), known, max(ROUNDING, unit(known)))
    return not is_number(known) or same(value, known)


def unit(values: Any) -> float:  # noqa: ANN401 - any values
    """The last digit of numbers near one in the shortest type of some values, in any nesting."""
    tensors = [leaf for leaf in leaves(values).values() if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return max((torch.finfo(leaf.dtype).eps for leaf in tensors), default=0.0)


def forms(calls: Calls) -> list[Any]:
    """Which networks are called, with which arguments, of which shapes: one table holds those of a phase's steps."""
    return [
        (name, {path: getattr(leaf, "shape", None) for path, leaf in leaves(given).items()}) for name, given in calls
    ]


class Phase:
    """A phase of a loop.

    Args:
        calls: the networks that its steps call, in order; the last call's output is the model output.
        spares: their stand-ins, in order.
        output: what the pipeline makes of these, one row or several per sample.
        feeders: networks that are called for the first time, and for another one: what for, the next step shows.

    Attributes:
        steps: numbers of its steps.
        slots: the network calls of one step, in order.
        blend: what the pipeline makes of the outputs, where that was measured; None: its code does it, of all rows.
    """

    def __init__(self, calls: Calls, spares: list[Any], output: Tensor, feeders: set[str]) -> None:
        self.names, self.forms = [name for name, _ in calls], forms(calls)
        self.spares, self.output, self.feeders = spares, output, feeders
        self.steps: list[int] = []
        self.slots: list[Slot] = []
        self.blend: Blend | None = None
        self._waiting: list[tuple[Calls, Tensor]] = []

    def fits(self, calls: list[Any], output: Tensor | None) -> bool:
        """Whether a step with calls of these forms, of whose stand-ins the pipeline made this, is one of its own.

        What it made of them does not matter where that is going to be measured (None).
        """
        return calls == self.forms and (output is None or alike(output, self.output))

    def add(self, number: int, calls: Calls, state: Tensor) -> None:
        """A step of its own, whose calls wait to be learnt from, with the state that they were given."""
        self.steps.append(number)
        self._waiting.append((calls, state))

    def learn(self, state: Tensor, denoises: Callable[[str], bool]) -> None:
        """Learn from the calls that wait.

        Args:
            state: that of the latest of their steps, shape ``(L, *shape)``.
            denoises: whether a network's output is the model output.
        """
        if not self._waiting:
            return
        if not self.slots:
            latest, _ = self._waiting[-1]
            self.slots = [Slot(name, given, state, denoises=denoises(name)) for name, given in latest]
        for calls, own in self._waiting:
            for slot, (_, given) in zip(self.slots, calls, strict=True):
                slot.learn(given, own[: len(state)])
        self._waiting = []

    def check_again(self, place: int, arguments: dict[str, Any], step: int) -> None:
        """A network call is made once more, to which the rows of rounds are given what was learnt from the first time.

        Args:
            place: of the call among those of the step.
            arguments: what the pipeline hands the network now, by name.
            step: the step.

        Raises:
            UnsupportedError: if that is something else, other than by the state and by what came from other networks.
        """
        slot, number = self.slots[place], self.steps.index(step)
        for path, value in leaves(arguments).items():
            if path not in slot.live and not _unchanged(slot.kept(path, value), slot.value(path, number)):
                raise UnsupportedError(AGAIN.format(slot.name, ".".join(map(str, path))))

    def check(self, measured: bool) -> None:
        """Whether enough was seen.

        Raises:
            UnsupportedError: if there is a single step, which does not show what a network is for.
            RowsError: if a network reads a multiple of the state: what that goes by shows where it is ``measured``.
        """
        if not measured and (names := [slot.name for slot in self.slots if set(slot.factors) != {1.0}]):
            raise RowsError(f"{names[0]} does not read the scheduler's state as it is, but a multiple of it")
        if self.feeders and len(self.steps) == 1:
            what = ", ".join(sorted(self.feeders))
            raise UnsupportedError(f"what {what} is for does not show in one step; ask for more, or call it again")

    @property
    def repeated(self) -> int:
        """The step that rounds repeat."""
        return self.steps[-1]

    @property
    def longest(self) -> int:
        """The most steps of its own in a row."""
        starts = [at for at, step in enumerate(self.steps) if step - 1 not in self.steps] + [len(self.steps)]
        return max(after - before for before, after in pairwise(starts))

    @property
    def rows_per_call(self) -> int:
        """Network rows that one row of the state takes."""
        return sum(slot.state.chunks for slot in self.slots if slot.denoises)

    @property
    def jumps(self) -> bool:
        """Whether an argument changes between its steps that is not the time, or what is made of outputs may."""
        return self.blend is not None or any(slot.jumps for slot in self.slots)


@dataclass(frozen=True)
class Part:
    """The rows of a request that belong to one phase of the loop.

    Attributes:
        phase: the phase.
        at: which rows of the request they are.
        rows: the rows, their steps numbered among those of the phase.
    """

    phase: Phase
    at: Tensor | slice
    rows: Rows


def trials(phases: Sequence[Phase]) -> list[tuple[Phase, bool]]:
    """The passes that try a loop before any round, by phase; True: a blank one.

    In a blank pass the networks answer otherwise, and the state is NaN afterwards, after others zero: what a pass keeps
    for a later one, or reads of the state, shows in those that follow.  Several phases are passed once more than they
    last: code that counts its passes, not the steps, goes on.
    """
    phases = [phase for phase in phases if phase.blend is None]  # in others no rows go through the code
    passes = [(phase, True) for phase in phases]
    for phase in phases:
        times = 1 + phase.longest if len(phases) > 1 else 2
        passes += [(phase, False)] * times + [(phase, True)]
    return passes[:-1]


def numbered(phases: Sequence[Phase], count: int) -> tuple[Tensor, Tensor]:
    """The phase of every step, and its number among the steps of that phase, both ``(J,)``."""
    phase, own = torch.zeros(2, count, dtype=torch.int64, device="cpu")
    for number, one in enumerate(phases):
        phase[one.steps], own[one.steps] = number, torch.arange(len(one.steps), device="cpu")
    return phase, own
