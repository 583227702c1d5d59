"""What is asked about a slow sample: whether the network answers a row alike in other company, and how finely."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from piadm.executor import Request
from piadm.numerics import Table
from piadm.path import ParallelPath

#: Rounds, on all node sets, after which samples are asked about: what mixes rows takes many, and so does what rounds;
#: others are finished by then or hardly notice four evaluations more.
SLOW = 9

#: Relative changes of the state with which the row is asked the second time.
MOVES = (1e-5, 1e-4, 1e-3)

#: A difference may be as many times larger than in proportion to the next one by the curvature of the network.
CURVED = 2.0

#: Relative difference of two answers to the same row that kernels for other numbers of rows may leave, and how many
#: times the resolution of the network's numbers that is at least.  Dense layers leave nothing.  Of 16 samples, networks
#: that take one row's time for all differed by 0.3 to 5, the mean of times by 1, with dropout by 2 to 4, with the
#: batch's mean by 0.2 to 0.6, with a hundredth of noise by 0.1.
ALIKE, RESOLUTIONS = 0.05, 8

#: Relative change of a state that a network does not resolve, in roundings of its answer: a U-Net's are 3e-6 in
#: float32, 2.4e-4 in TF32, 4e-4 in float16 and 3e-3 in bfloat16, whose numbers are 1e-7, 1e-3, 1e-3 and 8e-3 apart; and
#: the largest one, that of bfloat16, since what is coarser may be the answers of a state near a border.
ROUNDINGS, COARSEST = 3.0, 2.0**-7


def roundings(apart: Table) -> Table:
    """The roundings ``n`` in a network's answers, relative to them, shape ``(S,)``; 0 where an answer is not finite.

    Of a network that rounds nothing, the answer to ``(1 + h) x`` differs from that to ``x`` in proportion to ``h``;
    roundings do not depend on it, and are independent of the rest:

        a^2 = n^2 + s^2 h^2,    b^2 = n^2 + s^2 k^2 h^2,    n^2 = (k^2 a^2 - b^2) / (k^2 - 1)

    If the smallest change was rounded away, in every coordinate, ``n`` is what the largest one brought.

    Args:
        apart: how far the answers are apart, relatively, by each of ``MOVES``, shape ``(3, S)``.
    """
    near, further, largest = apart
    factor = MOVES[1] / MOVES[0]
    square = ((factor * near) ** 2 - further**2) / (factor**2 - 1)
    alike = np.sqrt(np.where(factor * near > CURVED * further, square, 0.0))
    return np.where((near == 0) & np.isfinite(largest), largest, alike)


class Witness:
    """One row of every slow sample, asked after the others in one round; in the next before them, moved by a little.

    In each of the two rounds ``request`` is to be answered, then ``follow`` called, then ``finish``.

    Args:
        path: the path.
        resolution: relative spacing of the network's numbers, as far as it is known.
        earlier: rounds that its samples have had on coarser nodes.

    Attributes:
        samples: the sample of every row, on the CPU.
        apart: largest relative difference of two answers that rounding cannot explain; 0: there was none.
        resolution: relative change of a state that the network was found not to resolve, of every sample of the path,
            shape ``(B,)``; 0: none was found.
    """

    def __init__(self, path: ParallelPath, resolution: float, earlier: int) -> None:
        self.first = max(0, SLOW - earlier)
        self.path, self.alike = path, max(ALIKE, RESOLUTIONS * resolution)
        self.samples = path.samples[:0]
        # Of noise alone rounding is multiplied, at the data every network says what it is given.
        self.node = path.path.count // 2
        self.answers: list[Tensor] = []
        self.apart, self.resolution = 0.0, np.zeros(path.batch)

    def due(self, rounds: int) -> bool:
        """Whether it has a question in the round after so many of the path."""
        return self.first <= rounds < self.first + 2

    def choose(self, going: Tensor) -> None:
        """Take the middle node's states of these samples, ``(B,)`` bool on the CPU; the same ones, moved, next time."""
        path = self.path
        if not self.answers:
            going &= torch.from_numpy(~path.asked)
            kept = going.to(path.device)
            self.going, self.samples, self.numbers = going.numpy(), path.samples[going], path.numbers[kept]
            self.rows = path.nodes[self.node, kept]
        else:
            self.samples, self.numbers = self.samples.repeat(len(MOVES)), self.numbers.repeat(len(MOVES))
            self.rows = torch.cat([(1 + h) * self.rows for h in MOVES])
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
        """How far the answers are apart, relatively, on the device, move by move; nothing after the first time."""
        if not self.again:
            return self.rows.new_empty(0)
        first, moved = self.answers
        apart: Tensor = (moved.view(len(MOVES), *first.shape) - first).norm(dim=2) / first.norm(dim=1)
        return apart.flatten()

    def finish(self, numbers: Table) -> None:
        """Take in these numbers, copied to the host; NaN where an answer is not finite says nothing."""
        if self.again:
            apart = numbers.reshape(len(MOVES), -1)
            self.apart = float(np.where(apart[0] > self.alike, apart[0], 0.0).max(initial=0.0))
            self.resolution[self.going] = np.minimum(ROUNDINGS * roundings(apart), COARSEST)
            self.path.asked |= self.going
