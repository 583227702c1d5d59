"""Whether a network answers a row alike in other company: one that mixes rows has no well-defined sample."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from piadm.executor import Request
from piadm.network import resolution
from piadm.numerics import Table
from piadm.path import ParallelPath

#: Rounds of a path after which its samples are asked about: what mixes rows takes many, others are finished by then or
#: hardly notice two evaluations more.
SLOW = 9

#: Relative difference of two answers to the same row that kernels for other numbers of rows may leave, and how many
#: times the resolution of the network's numbers that is at least.  Dense layers leave nothing.  Of 16 samples, networks
#: that take one row's time for all differed by 0.3 to 5, the mean of times by 1, with dropout by 2 to 4, with the
#: batch's mean by 0.2 to 0.6, with a hundredth of noise by 0.1.
ALIKE, RESOLUTIONS = 0.05, 8


class Witness:
    """One row of every slow sample, asked after the others in one round and before them in the next.

    In each of the two rounds ``request`` is to be answered, then ``follow`` called, then ``finish``.

    Args:
        path: the path.
        network: the network, for its resolution.

    Attributes:
        samples: the sample of every row, on the CPU.
        apart: largest relative difference of two answers that rounding cannot explain; 0: there was none.
    """

    def __init__(self, path: ParallelPath, network: object) -> None:
        self.path, self.alike = path, max(ALIKE, RESOLUTIONS * resolution(network))
        self.samples = path.samples[:0]
        # Of noise alone rounding is multiplied, at the data every network says what it is given.
        self.node = path.path.count // 2
        self.answers: list[Tensor] = []
        self.apart = 0.0

    def due(self, rounds: int) -> bool:
        """Whether it has a question in the round after so many of the path."""
        return SLOW <= rounds < SLOW + 2

    def choose(self, going: Tensor) -> None:
        """Take the middle node's states of these samples, ``(B,)`` bool on the CPU; the first time only."""
        if not self.answers:
            path, kept = self.path, going.to(self.path.device)
            self.samples, self.numbers, self.rows = path.samples[going], path.numbers[kept], path.nodes[self.node, kept]
        self.answers.append(torch.full_like(self.rows, torch.nan))

    @property
    def again(self) -> bool:
        """Whether this is the second time."""
        return len(self.answers) == 2

    @property
    def request(self) -> Request:
        """The rows, for the executor; made when asked for, as that of a ``Turn``."""
        times = self.path.times[self.node].expand(len(self.numbers))
        return Request(self.numbers, times, self.rows.__getitem__, self.answers[-1].__setitem__)

    def follow(self) -> Tensor:
        """How far the two answers are apart, on the device, shape ``(S,)``; nothing after the first."""
        if not self.again:
            return self.rows.new_empty(0)
        first, second = self.answers
        apart: Tensor = (second - first).norm(dim=1) / first.norm(dim=1)
        return apart

    def finish(self, numbers: Table) -> None:
        """Take in these numbers, copied to the host; NaN where an answer is not finite says nothing."""
        self.apart = float(np.where(numbers > self.alike, numbers, 0.0).max(initial=0.0))
