"""The phases of a pipeline's loop: steps at which its body calls the same networks and makes the same of their outputs.

Most pipelines have one.  Guidance that begins late or ends early, or a second network for the last steps, makes two: a
round then passes the body once for each of them, at one of its steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from piadm.interop.diffusers.arguments import Slot
from piadm.interop.diffusers.probe import UnsupportedError

#: Most phases of a loop: each is a pass of its body in every round.  Guidance of another scale at every step would have
#: as many phases as steps, one row in each.
MOST = 4

#: Relative difference of guided outputs that rounding may leave.  At every step the same code reads the same numbers in
#: the same shapes: all pipelines of the tests make the same of them to the bit, in float32, bfloat16 and float16.  What
#: adds up a million numbers in another order each time is off by some 1e-6 in float32.
ROUNDING = 1e-5

#: Network calls of one step: names, and arguments by name.
Calls = list[tuple[str, dict[str, Any]]]


def alike(output: Tensor, wanted: Tensor, rounding: float = ROUNDING) -> bool:
    """Whether model outputs are the same up to rounding."""
    near = rounding * float(wanted.abs().max())
    return output.shape == wanted.shape and torch.allclose(output, wanted, rtol=rounding, atol=near)


class Phase:
    """A phase of a loop.

    Args:
        names: the networks that its steps call, in order; the last call's output is the model output.
        spares: their stand-ins, in order.
        output: what the pipeline makes of these, one row or several per sample.
        feeders: networks that are called for the first time, and for another one: what for, the next step shows.

    Attributes:
        steps: numbers of its steps.
        slots: the network calls of one step, in order.
    """

    def __init__(self, names: list[str], spares: list[Any], output: Tensor, feeders: set[str]) -> None:
        self.names, self.spares, self.output, self.feeders = names, spares, output, feeders
        self.steps: list[int] = []
        self.slots: list[Slot] = []
        self._waiting: list[Calls] = []

    def fits(self, names: list[str], output: Tensor) -> bool:
        """Whether a step with these calls, and what the pipeline has made of their stand-ins, is one of its own."""
        return names == self.names and alike(output, self.output)

    def add(self, number: int, calls: Calls) -> None:
        """A step of its own, whose calls wait to be learnt from."""
        self.steps.append(number)
        self._waiting.append(calls)

    def learn(self, state: Tensor, denoises: Callable[[str], bool]) -> None:
        """Learn from the calls that wait.

        Args:
            state: that of the latest of their steps, shape ``(L, *shape)``.
            denoises: whether a network's output is the model output.
        """
        if not self._waiting:
            return
        if not self.slots:
            self.slots = [Slot(name, given, state, denoises=denoises(name)) for name, given in self._waiting[-1]]
        for calls in self._waiting:
            for slot, (_, given) in zip(self.slots, calls, strict=True):
                slot.learn(given)
        self._waiting = []

    def check(self) -> None:
        """Whether enough steps were seen.

        Raises:
            UnsupportedError: if it has a single one, which does not show what a network is for.
        """
        if self.feeders and len(self.steps) == 1:
            what = ", ".join(sorted(self.feeders))
            raise UnsupportedError(f"what {what} is for does not show in one step; ask for two")

    @property
    def repeated(self) -> int:
        """The step that rounds repeat."""
        return self.steps[-1]

    @property
    def rows_per_call(self) -> int:
        """Network rows that one row of the state takes."""
        return sum(slot.state.chunks for slot in self.slots if slot.denoises)

    @property
    def jumps(self) -> bool:
        """Whether an argument changes between its steps that is not the time."""
        return any(slot.jumps for slot in self.slots)
