"""The exact law of the corrector: Picard iterations of underdamped Langevin dynamics on Gaussian modes.

All steps of a run are equal, so the states of all iterates together, position and velocity each, follow one linear map
again and again; its power takes as many matrix products as the number of steps has binary digits.  The dynamics knows
the time by the noised law alone: runs at different times are as many modes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from piadm.corrector import Corrector
from piadm.integrators import variance_preserving
from piadm.theory.law import AffineMap, Law
from piadm.theory.spectrum import OU


@dataclass(frozen=True)
class VectorMap:
    """``y = matrix x + shift + noise`` of a vector, for each mode, float64 on the CPU.

    Attributes:
        matrix: ``(m, n, n)``.
        shift: ``(m, n)``.
        covariance: of the noise, ``(m, n, n)``.
    """

    matrix: Tensor
    shift: Tensor
    covariance: Tensor

    def after(self, first: VectorMap) -> VectorMap:
        """This map applied to what ``first`` gives, their noises independent."""
        return VectorMap(
            self.matrix @ first.matrix,
            (self.matrix @ first.shift[..., None])[..., 0] + self.shift,
            self.matrix @ first.covariance @ self.matrix.mT + self.covariance,
        )

    def power(self, count: int) -> VectorMap:
        """The map applied ``count >= 1`` times with fresh noise, by repeated squaring."""
        square, result = self, None
        while True:
            if count % 2:
                result = square if result is None else square.after(result)
            count //= 2
            if not count:
                assert result is not None
                return result
            square = square.after(square)


def corrector_map(law: Law, corrector: Corrector, bias: float | Tensor = 0.0) -> AffineMap:
    """What one run of the corrector does to positions: gain, shift and variance ``(m,)``.

    Args:
        law: of the noised data, on the variance-preserving scale, ``(m,)``; modes may be noised up to different times.
        corrector: its settings.
        bias: constant error of the score on that scale, ``()`` or ``(m,)``.
    """
    return _positions(_block_map(law, corrector, bias).power(corrector.blocks))


def sequential_corrector_map(law: Law, corrector: Corrector) -> AffineMap:
    """The same with every step taken in turn, which as many iterations as a block has steps come to."""
    carried, push = _step(corrector)
    matrix = carried.matrix.repeat(len(law.variance), 1, 1)
    matrix[:, :, 0] -= push / law.variance[:, None]
    step = VectorMap(matrix, push * (law.mean / law.variance)[:, None], carried.covariance.expand_as(matrix))
    return _positions(step.power(corrector.blocks * corrector.block_steps))


def _step(corrector: Corrector) -> tuple[VectorMap, Tensor]:
    """A step of ``(u, v)`` without a score, and what a score adds to it, ``(2,)``: the same at all OU times."""
    steps = corrector.steps(OU, 1.0)
    alpha, variance, _ = variance_preserving(OU, steps.times[:1])
    a, b, c = steps.a[0], steps.b[0] / alpha, steps.c[0]
    still = VectorMap(torch.stack([a[:, 0] + b, a[:, 1]], dim=1), torch.zeros(2, dtype=torch.float64), c @ c.T)
    return still, b * variance  # D = (x + sigma^2 s)/alpha


def _block_map(law: Law, corrector: Corrector, bias: float | Tensor) -> VectorMap:
    """One block after its Picard iterations from a constant start, of ``(u, v)``: the score ``-(u - mean)/variance``.

    The states carried are the position of the starting guess, which stays, then ``(u, v)`` of each iterate.
    """
    carried, push = _step(corrector)
    answer, constant = push / law.variance[:, None], push * (law.mean / law.variance + bias)[:, None]
    count, size = corrector.iterations, 1 + 2 * corrector.iterations
    matrix, shift = (torch.zeros(len(answer), size, *more, dtype=torch.float64) for more in ((size,), ()))
    matrix[:, 0, 0] = 1
    for k in range(count):
        rows = slice(1 + 2 * k, 3 + 2 * k)
        matrix[:, rows, rows] = carried.matrix
        matrix[:, rows, max(0, 2 * k - 1)] = -answer
        shift[:, rows] = constant
    noise = torch.zeros_like(matrix)
    noise[:, 1:, 1:] = carried.covariance.repeat(count, count)
    whole = VectorMap(matrix, shift, noise).power(corrector.block_steps)
    # Every iterate starts from the same position and velocity; the last one is the result.
    last, starts = slice(size - 2, size), torch.zeros(size, 2, dtype=torch.float64)
    starts[0, 0] = 1
    starts[1:] = torch.eye(2, dtype=torch.float64).repeat(count, 1)
    return VectorMap(whole.matrix[:, last] @ starts, whole.shift[:, last], whole.covariance[:, last, last])


def _positions(run: VectorMap) -> AffineMap:
    """The positions that a run leads to, its velocities having started from ``N(0, 1)``."""
    variance = run.covariance[:, 0, 0] + run.matrix[:, 0, 1].square()
    return AffineMap(run.matrix[:, 0, 0], run.shift[:, 0], variance)
