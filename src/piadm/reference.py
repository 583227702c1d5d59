"""The path of a reference model, ``D = G x + g``: what the network is compared with, free of its calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from piadm.condense import CondensedPath
from piadm.numerics import full_precision

#: Gives standard normals ``first .. last - 1`` of a path, shape ``(last - first, B, d)``.
Draw = Callable[[int, int], Tensor]

#: Rows of noise drawn at once: the noise of a path is never stored whole.
NOISE_CHUNK = 64


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
        count = columns[0].shape[1]
        for first in range(0, count, NOISE_CHUNK):
            last = min(first + NOISE_CHUNK, count)
            normals = draw(first, last).flatten(1)
            for found, column in zip(free, columns, strict=True):
                found.addmm_(column[:, first:last].to(start), normals)
    return free
