"""The loop over timesteps that a pipeline walks while it runs in parallel."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from typing import Protocol

from torch import Tensor


class LoopEvents(Protocol):
    """What a ``Loop`` reports, and asks, as it goes."""

    def begin(self, timesteps: Tensor) -> None:
        """The loop begins, over timesteps of shape ``(J,)``."""

    def starts(self, step: int) -> None:
        """A step begins that is made for the first time."""

    def turn_to_rounds(self) -> None:
        """The pass over all timesteps is done; rounds follow."""

    def repeated(self) -> int | None:
        """The step that is to be made once more; None: none is."""

    def finish(self) -> None:
        """The loop ends."""


class Loop:
    """The pipeline's loop over timesteps: once through all of them, then round after round at one or a few of them."""

    def __init__(self, run: LoopEvents, timesteps: Tensor) -> None:
        self.run, self.timesteps = run, timesteps

    def __len__(self) -> int:
        return len(self.timesteps)

    def __iter__(self) -> Iterator[Tensor]:
        return (t for _, t in self.numbered())

    def numbered(self, start: int = 0) -> Iterator[tuple[int, Tensor]]:
        """Steps and their numbers from ``start`` on."""
        run = self.run
        run.begin(self.timesteps)
        for number, t in builtins.enumerate(self.timesteps):
            run.starts(number)
            yield start + number, t
        run.turn_to_rounds()
        while (step := run.repeated()) is not None:
            yield start + step, self.timesteps[step]
        run.finish()
