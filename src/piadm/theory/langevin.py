"""The exact law of the corrector: Picard iterations of underdamped Langevin dynamics on Gaussian modes.

All steps of a run are equal, so the states of all iterates together, position and velocity each, follow one linear map
again and again; its power takes as many matrix products as the number of steps has binary digits.  About the mode's
mean, moved by ``variance * bias`` where the score has a bias, the dynamics knows of the mode and of the time the
variance ``v`` of the noised law alone.  What ``K`` iterations make of a position is a polynomial in ``1/v``, with as
many factors as there were scores: where there are many modes, or runs at many times, few values of ``v`` tell all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from piadm.corrector import Corrector
from piadm.integrators import variance_preserving
from piadm.theory.law import AffineMap, Law
from piadm.theory.spectrum import OU

#: Points that a run with every step taken in turn is interpolated from, and more for each unit of its longest natural
#: time: an entire function of ``1/v`` like ``cos(t/sqrt(v))``, whose expansion falls faster than any power.
POINTS, MORE_POINTS = 16, 4


@dataclass(frozen=True)
class VectorMap:
    """``y = matrix x + noise`` of a vector, for each mode, float64 on the CPU.

    Attributes:
        matrix: ``(m, n, n)``.
        covariance: of the noise, ``(m, n, n)``.
    """

    matrix: Tensor
    covariance: Tensor

    def after(self, first: VectorMap) -> VectorMap:
        """This map applied to what ``first`` gives, their noises independent."""
        spread = torch.baddbmm(self.covariance, self.matrix @ first.covariance, self.matrix.mT)
        return VectorMap(self.matrix @ first.matrix, spread)

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

    def run(precision: Tensor) -> VectorMap:
        return _block_map(precision, corrector).power(corrector.blocks)

    return _about(law, bias, run, 2 * corrector.iterations * corrector.blocks + 1)


def sequential_corrector_map(law: Law, corrector: Corrector) -> AffineMap:
    """The same with every step taken in turn, which as many iterations as a block has steps come to."""
    carried, push = _step(corrector.step_length, corrector.friction)

    def run(precision: Tensor) -> VectorMap:
        matrix = carried.matrix.repeat(len(precision), 1, 1)
        matrix[:, :, 0] -= precision[:, None] * push
        step = VectorMap(matrix, carried.covariance.expand_as(matrix))
        return step.power(corrector.blocks * corrector.block_steps)

    longest = corrector.duration / math.sqrt(float(law.variance.min()))
    return _about(law, 0.0, run, POINTS + math.ceil(MORE_POINTS * longest))


def _about(law: Law, bias: float | Tensor, run: Callable[[Tensor], VectorMap], points: int) -> AffineMap:
    """Positions after a run, from what it is for each of some ``1/v``, velocities having started from ``N(0, 1)``."""

    def gain_and_variance(precision: Tensor) -> Tensor:
        found = run(precision)
        return torch.stack([found.matrix[:, 0, 0], found.covariance[:, 0, 0] + found.matrix[:, 0, 1].square()], dim=1)

    gain, variance = interpolated(gain_and_variance, 1 / law.variance, points).unbind(1)
    return AffineMap(gain, (1 - gain) * (law.mean + law.variance * bias), variance)


def interpolated(function: Callable[[Tensor], Tensor], x: Tensor, points: int) -> Tensor:
    """A function ``(n,) -> (n, c)`` at ``x``: where that is more points, from as many Chebyshev points as are given."""
    if len(x) <= points:
        return function(x)
    centre, half = (x.max() + x.min()) / 2, ((x.max() - x.min()) / 2).clamp(min=1e-300)
    order = torch.arange(points, dtype=torch.float64, device="cpu")
    angles = math.pi * (order + 0.5) / points
    coefficients = torch.cos(order[:, None] * angles) @ function(centre + half * angles.cos()) * (2 / points)
    coefficients[0] /= 2
    return torch.cos(((x - centre) / half).clamp(-1, 1).acos()[:, None] * order) @ coefficients


@lru_cache(maxsize=64)
def _step(length: float, friction: float) -> tuple[VectorMap, Tensor]:
    """A step of ``(u, v)`` without a score, and what a score adds to it, ``(2,)``: the same at all OU times."""
    steps = Corrector(length, length, length, 1, friction).steps(OU, 1.0)
    alpha, variance, _ = variance_preserving(OU, steps.times[:1])
    a, b, c = steps.a[0], steps.b[0] / alpha, steps.c[0]
    still = VectorMap(torch.stack([a[:, 0] + b, a[:, 1]], dim=1), c @ c.T)
    return still, b * variance  # D = (x + sigma^2 s)/alpha


def _block_map(precision: Tensor, corrector: Corrector) -> VectorMap:
    """One block after its Picard iterations from a constant start, of ``(u, v)``: the score ``-precision u``.

    The states carried are the position of the starting guess, which stays, then ``(u, v)`` of each iterate.
    """
    carried, push = _step(corrector.step_length, corrector.friction)
    answer, count, size = precision[:, None] * push, corrector.iterations, 1 + 2 * corrector.iterations
    matrix = precision.new_zeros(len(precision), size, size)
    matrix[:, 0, 0] = 1
    for k in range(count):
        rows = slice(1 + 2 * k, 3 + 2 * k)
        matrix[:, rows, rows] = carried.matrix
        matrix[:, rows, max(0, 2 * k - 1)] = -answer
    noise = torch.zeros_like(matrix)
    noise[:, 1:, 1:] = carried.covariance.repeat(count, count)
    whole = VectorMap(matrix, noise).power(corrector.block_steps)
    # Every iterate starts from the same position and velocity; the last one is the result.
    last, starts = slice(size - 2, size), matrix.new_zeros(size, 2)
    starts[0, 0] = 1
    starts[1:] = torch.eye(2, dtype=torch.float64, device="cpu").repeat(count, 1)
    return VectorMap(whole.matrix[:, last] @ starts, whole.covariance[:, last, last])
