"""What a pipeline draws itself: steps are made over and over in rounds, each time with the same random numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from piadm.interop.diffusers.nested import leaves


class Draws:
    """The generators that a pipeline may draw from, and where they were at moments that it comes back to.

    Args:
        given: the arguments of the pipeline's call, in any nesting.
    """

    def __init__(self, given: Any) -> None:  # noqa: ANN401 - any arguments
        own = [leaf for leaf in leaves(given).values() if isinstance(leaf, torch.Generator)]
        self.generators = [torch.default_generator, *torch.cuda.default_generators, *own]
        self.states: dict[int | None, list[Tensor]] = {}

    def keep(self, moment: int | None = None) -> None:
        """Keep where they are: at the beginning of a step, or after the scheduler's latest step (None)."""
        self.states[moment] = [generator.get_state() for generator in self.generators]

    def put_back(self, moment: int | None = None) -> None:
        """Have them draw again what they have drawn since."""
        for generator, state in zip(self.generators, self.states[moment], strict=True):
            generator.set_state(state)
