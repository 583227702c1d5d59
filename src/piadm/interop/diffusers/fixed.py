"""What a pipeline sets in its state itself, such as the known part in inpainting."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Fixed:
    """Coordinates that the pipeline sets itself after every step, as in inpainting.

    Attributes:
        mask: which, shape ``(L, *shape)`` bool.
        values: what they are when the network reads them, at each call from the second on, each ``(count,)``.
    """

    mask: Tensor
    values: list[Tensor]

    @cached_property
    def table(self) -> Tensor:
        """The values of every call, those of the first one not set: shape ``(J, count)``."""
        return torch.stack([torch.zeros_like(self.values[0]), *self.values])

    @cached_property
    def places(self) -> Tensor:
        """Which of the values each coordinate has, where it has one: shape ``(L, *shape)`` int64."""
        return (self.mask.flatten().cumsum(0) - 1).clamp(min=0).reshape(self.mask.shape)

    def put(self, state: Tensor, samples: Tensor, calls: Tensor) -> None:
        """Set them in rows ``(r, *shape)`` of states, in place."""
        values = self.table.to(state)[calls].gather(1, self.places[samples].flatten(1)).reshape(state.shape)
        later = (calls > 0).reshape(-1, *[1] * (state.ndim - 1))
        state.copy_(torch.where(self.mask[samples] & later, values, state))
