"""The path of the reference model, ``D = G x + g``, which needs no call of the network."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from piadm.condense import CondensedPath
from piadm.numerics import full_precision

#: Returns standard normals ``first .. last - 1`` of a path, shape ``(last - first, B, d)``.
Draw = Callable[[int, int], Tensor]

#: Steps whose noise is drawn at once, so that the noise of a path is never stored as a whole.  Accelerators draw more
#: steps, up to so many numbers, because launching many small draws takes longer there than the numbers themselves.
NOISE_CHUNK, ACCELERATOR_NUMBERS = 64, 1 << 20


def free_states(references: Sequence[CondensedPath], start: Tensor, draw: Draw) -> list[Tensor]:
    """``q = start x_0 + offset + N xi`` on several node sets of the same paths, the noise of all drawn once.

    Args:
        references: condensed paths of the reference model.
        start: initial state, shape ``(B, s, d)``.
        draw: the paths' standard normals, ``r`` per step, in the order of the steps.

    Returns:
        For each of them the states at its nodes and at the end, ``((n + 1) s, B d)``.
    """
    columns = [reference.noise.flatten(2).flatten(0, 1) for reference in references]
    first_state = start.transpose(0, 1).flatten(1)
    with full_precision(start.device):
        free = [one.start.flatten(0, 1).to(start) @ first_state for one in references]
        for found, reference in zip(free, references, strict=True):
            found += reference.offset.flatten().to(start)[:, None]
        count, rows = columns[0].shape[1], noise_rows(start.device, first_state.shape[1])
        for first in range(0, count, rows):
            last = min(first + rows, count)
            normals = draw(first, last).flatten(1)
            for found, column in zip(free, columns, strict=True):
                found.addmm_(column[:, first:last].to(start), normals)
    return free


def noise_rows(device: torch.device, numbers: int) -> int:
    """Steps whose noise is drawn at once on a device, of so many numbers each."""
    return NOISE_CHUNK if device.type == "cpu" else max(NOISE_CHUNK, ACCELERATOR_NUMBERS // numbers)
