"""What a pipeline draws itself: in rounds its last step is made over and over, and its generators must not go on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from piadm.interop.diffusers.nested import leaves


class Draws:
    """The generators that a pipeline may draw from, and where they were after its scheduler's latest step.

    Args:
        given: the arguments of the pipeline's call, in any nesting.
    """

    def __init__(self, given: Any) -> None:  # noqa: ANN401 - any arguments
        own = [leaf for leaf in leaves(given).values() if isinstance(leaf, torch.Generator)]
        self.generators = [torch.default_generator, *torch.cuda.default_generators, *own]
        self.states: list[Tensor] = []

    def keep(self) -> None:
        """Keep where they are."""
        self.states = [generator.get_state() for generator in self.generators]

    def put_back(self) -> None:
        """Have them draw again what they have drawn since."""
        for generator, state in zip(self.generators, self.states, strict=True):
            generator.set_state(state)
