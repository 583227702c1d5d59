"""What a pipeline makes of its networks' outputs and the state, as factors: its code is measured instead of run.

Code between a network's call and the scheduler's step does for rows of several steps where it treats every row alone,
whatever its step.  Where it reads the state, or has numbers of its own for every step or sample, it does not; but what
it computes is in most cases, of every coordinate by itself,

    D_j = alpha_j x_j + sum_k beta_jk F_k + gamma_j

with the denoised estimate ``D`` of the scheduler, before clipping, and one output ``F_k`` for every call of a network
and every copy of the batch in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from piadm.interop.diffusers.arguments import Rows
from piadm.interop.diffusers.nested import leaves
from piadm.interop.diffusers.probe import RowsError

#: Relative difference of guided outputs that rounding may leave.  At every step the same code reads the same numbers in
#: the same shapes: all pipelines of the tests make the same of them to the bit, in float32, bfloat16 and float16.  What
#: adds up a million numbers in another order each time is off by some 1e-6 in float32.
ROUNDING = 1e-5

#: What single precision leaves of a difference of two numbers, relative to them.
CANCELLED = 1e-6


@dataclass(frozen=True)
class Blend:
    """The factors of all steps of a phase.

    Attributes:
        rest: ``gamma``, shape ``(steps, L, *shape)``, with ones for the axes along which it is the same.
        factors: ``alpha``, and every ``beta_k``, likewise.
    """

    rest: Tensor
    factors: Sequence[Tensor]

    def __call__(self, inputs: Sequence[Tensor], rows: Rows) -> Tensor:
        """Denoised estimates of some rows, from their states and the networks' outputs, each ``(r, *shape)``."""
        state = inputs[0]
        total = self._own(self.rest, rows).to(state).expand_as(state)
        for factor, one in zip(self.factors, inputs, strict=True):
            total = torch.addcmul(total, self._own(factor, rows).to(state), one.to(state))
        return total

    @staticmethod
    def _own(table: Tensor, rows: Rows) -> Tensor:
        """The entries of some rows."""
        return table[rows.calls, rows.samples if table.shape[1] > 1 else 0]


def stacked_blend(steps: Sequence[Sequence[Tensor]]) -> Blend:
    """The factors of single steps, ``gamma`` first, as those of a phase."""
    rest, *factors = (_stacked(table) for table in zip(*steps, strict=True))
    return Blend(rest, factors)


def _stacked(table: Sequence[Tensor]) -> Tensor:
    """Entries some of which have ones for all axes, as one tensor."""
    largest = torch.Size(max(sizes) for sizes in zip(*(entry.shape for entry in table), strict=True))
    return torch.stack([entry.expand(largest) for entry in table])


def pieces(output: Any, chunks: int, state: Tensor) -> list[Tensor]:  # noqa: ANN401 - a network's output
    """A network's output for every copy of its rows, as far as the state goes: its first channels, where it has more.

    Raises:
        RowsError: if the output is of another shape.
    """
    leaf = next(leaf for leaf in leaves(output).values() if isinstance(leaf, Tensor))
    parts = leaf.reshape(chunks, -1, *leaf.shape[1:])
    if leaf.ndim != state.ndim or any(has < wants for has, wants in zip(leaf.shape[1:], state.shape[1:], strict=True)):
        shapes = f"{tuple(leaf.shape[1:])} of a state of shape {tuple(state.shape[1:])}"
        raise RowsError(f"nor can be measured what its code computes of outputs of shape {shapes}")
    for axis, size in enumerate(state.shape[1:], 2):
        parts = parts.narrow(axis, 0, size)
    return list(parts.unbind())


def factor(response: Tensor, given: Tensor, rounding: float) -> Tensor:
    """``response / given`` of every coordinate, with one entry for the axes along which it is the same up to rounding.

    These are means, in which the rounding of half precision averages out.
    """

    def near(left: Tensor, rounding: float) -> bool:
        return bool((left.abs() <= rounding * response.abs().max() + CANCELLED * given.abs().max()).all())

    def even(left: Tensor, axis: int) -> bool:
        """Rounding leaves next to nothing in the mean over the many numbers that each entry of an axis has."""
        finer = max(ROUNDING, rounding / 2 * (left.shape[axis] / left.numel()) ** 0.5)
        return near(left.mean([other for other in range(left.ndim) if other != axis]), finer)

    number = (response * given).sum() / given.square().sum()
    left = response - number * given
    if near(left, rounding) and all(even(left * given.sign(), axis) for axis in range(left.ndim)):
        return number.reshape([1] * given.ndim)
    ratios = torch.where(given == 0, 0.0, response / given)
    for axis in range(ratios.ndim):
        means = ratios.mean(axis, keepdim=True)
        left = (ratios - means).expand_as(given)
        if near(left, rounding) and even(left, axis):
            ratios = means
    return ratios
