"""Node sets: the steps at which the network is called, and how residuals reach the steps in between."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from piadm._checks import positive_int


@dataclass(frozen=True)
class NodeSet:
    """Steps that call the network, and the interpolation from them to every step.

    ``R_j = sum_i W[j, i] R_{node i}``, float64 on the CPU.

    Attributes:
        indices: step numbers, ascending, starting with 0, shape ``(n,)`` int64.
        weights: interpolation matrix ``W``, shape ``(J, n)``.
    """

    indices: Tensor
    weights: Tensor

    @property
    def count(self) -> int:
        """Number of nodes ``n``."""
        return len(self.indices)


def every_step(steps: int) -> NodeSet:
    """Every step is a node: the fixed point is then exactly the sequential sampler's."""
    return NodeSet(torch.arange(steps), torch.eye(steps, dtype=torch.float64))


def spread(log_snr: Tensor, count: int) -> NodeSet:
    """About ``count`` steps spread evenly in log-SNR, residuals interpolated linearly in log-SNR.

    Args:
        log_snr: log-SNR at the start of every step, ascending, shape ``(J,)``; the first may be -inf.
        count: number of nodes, at least 2 and at most ``J`` (more is cut to ``J``).
    """
    clock = _finite(log_snr)
    steps = len(clock)
    count = min(positive_int("nodes", count, minimum=2), steps)
    if count == steps:
        return every_step(steps)
    wanted = torch.linspace(0, 1, count, dtype=torch.float64).mul(clock[-1] - clock[0]).add(clock[0])
    order = torch.arange(count)
    nearest = torch.searchsorted((clock[1:] + clock[:-1]) / 2, wanted)
    # Distinct steps: push collisions forwards, then keep room for those that follow.
    indices = torch.cummax(nearest - order, 0).values + order
    indices = torch.minimum(indices, steps - count + order)
    return NodeSet(indices, linear_weights(clock, indices))


def refine(nodes: NodeSet, log_snr: Tensor) -> NodeSet:
    """Node set with one more node between every two neighbours, in the middle of the gap in log-SNR.

    The old nodes stay, so residuals interpolated to the new set describe the very same path.
    """
    clock, old = _finite(log_snr), nodes.indices
    middle = torch.searchsorted(clock, (clock[old[1:]] + clock[old[:-1]]) / 2)
    middle = torch.maximum(torch.minimum(middle, old[1:] - 1), old[:-1] + 1)
    indices = torch.unique(torch.cat([old, middle[old[1:] - old[:-1] > 1]]))
    return every_step(len(clock)) if len(indices) == len(clock) else NodeSet(indices, linear_weights(clock, indices))


def thin(nodes: NodeSet, log_snr: Tensor) -> NodeSet:
    """Every second node and the last: what the interpolation is compared with to judge it."""
    indices = torch.unique(torch.cat([nodes.indices[::2], nodes.indices[-1:]]))
    return NodeSet(indices, linear_weights(_finite(log_snr), indices))


def linear_weights(clock: Tensor, indices: Tensor) -> Tensor:
    """Linear interpolation from ``clock[indices]`` to ``clock``, constant beyond the last, shape ``(J, n)``."""
    knots = clock[indices]
    left = (torch.searchsorted(knots, clock, right=True) - 1).clamp(0, len(indices) - 2)
    share = ((clock - knots[left]) / (knots[left + 1] - knots[left])).clamp(0, 1)
    weights = clock.new_zeros(len(clock), len(indices))
    rows = torch.arange(len(clock))
    weights[rows, left] = 1 - share
    weights[rows, left + 1] = share
    return weights


def _finite(log_snr: Tensor) -> Tensor:
    """Log-SNR with an infinite first entry (alpha = 0) moved to one spacing before the second."""
    if len(log_snr) < 3 or log_snr[0].isfinite():
        return log_snr
    clock = log_snr.clone()
    clock[0] = 2 * clock[1] - clock[2]
    return clock
