"""The exact law of the corrector: Picard iterations of underdamped Langevin dynamics on Gaussian modes.

All steps of a run are equal, so the states of all iterates together, position and velocity each, follow one linear map
again and again; its power takes as many matrix products as the number of steps has binary digits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from piadm.corrector import Corrector
from piadm.integrators import AffineSteps
from piadm.linearization import ScoreFrozen
from piadm.schedule import NoiseSchedule
from piadm.theory.chain import jacobians
from piadm.theory.law import AffineMap
from piadm.theory.spectrum import Modes


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


def corrector_map(
    modes: Modes, schedule: NoiseSchedule, time: float, corrector: Corrector, bias: float = 0.0
) -> AffineMap:
    """What one run of the corrector at a time does to positions: gain, shift and variance ``(m,)``.

    Args:
        modes: variances and means of the data.
        schedule: noise schedule.
        time: schedule time of the dynamics.
        corrector: its settings.
        bias: constant error of the score.
    """
    steps = corrector.steps(schedule, time).part(0, 1)
    slopes = ScoreFrozen().slopes(schedule, steps)
    block = _block_map(modes, schedule, steps, slopes, bias, corrector.block_steps, corrector.iterations)
    return _positions(block.power(corrector.blocks))


def sequential_corrector_map(
    modes: Modes, schedule: NoiseSchedule, time: float, corrector: Corrector, bias: float = 0.0
) -> AffineMap:
    """The same with every step taken in turn, which as many iterations as a block has steps come to."""
    steps = corrector.steps(schedule, time).part(0, 1)
    return _positions(_step_map(modes, schedule, steps, bias).power(corrector.blocks * corrector.block_steps))


def _step_map(modes: Modes, schedule: NoiseSchedule, steps: AffineSteps, bias: float) -> VectorMap:
    """One step with the exact denoiser, of ``(u, v)``."""
    jacobian = jacobians(modes, schedule, steps)[0]
    return _with_slope(modes, schedule, steps, jacobian, bias)


def _with_slope(modes: Modes, schedule: NoiseSchedule, steps: AffineSteps, slope: Tensor, bias: float) -> VectorMap:
    """One step that answers its own position with a slope ``(m,)`` or ``()``, of ``(u, v)``."""
    b, count = steps.b[0], len(modes.variances)
    matrix = steps.a[0].expand(count, 2, 2).clone()
    matrix[:, :, 0] += slope.expand(count)[:, None] * b
    alpha, sigma = (float(level(steps.times)) for level in (schedule.alpha, schedule.sigma))
    constant = (1 - alpha * jacobians(modes, schedule, steps)[0]) * modes.means + sigma**2 / alpha * bias
    noise = (steps.c[0] @ steps.c[0].T).expand(count, 2, 2)
    return VectorMap(matrix, constant[:, None] * b, noise)


def _block_map(
    modes: Modes, schedule: NoiseSchedule, steps: AffineSteps, slopes: Tensor, bias: float, count: int, iterations: int
) -> VectorMap:
    """One block after ``iterations`` Picard iterations from a constant start, of ``(u, v)``.

    The states carried are the position of the starting guess, which stays, then ``(u, v)`` of each iterate.
    """
    own = _with_slope(modes, schedule, steps, slopes[0], bias)
    rest = (jacobians(modes, schedule, steps)[0] - slopes[0])[:, None] * steps.b[0]
    size = 1 + 2 * iterations
    matrix, shift = (torch.zeros(len(rest), size, *more, dtype=torch.float64) for more in ((size,), ()))
    matrix[:, 0, 0] = 1
    for k in range(iterations):
        rows = slice(1 + 2 * k, 3 + 2 * k)
        matrix[:, rows, rows] = own.matrix
        matrix[:, rows, max(0, 2 * k - 1)] = rest
        shift[:, rows] = own.shift
    noise = torch.zeros_like(matrix)
    noise[:, 1:, 1:] = own.covariance.repeat(1, iterations, iterations)
    whole = VectorMap(matrix, shift, noise).power(count)
    # Every iterate starts from the same position and velocity; the last one is the result.
    last, starts = slice(size - 2, size), torch.zeros(size, 2, dtype=torch.float64)
    starts[0, 0] = 1
    starts[1:] = torch.eye(2, dtype=torch.float64).repeat(iterations, 1)
    return VectorMap(whole.matrix[:, last] @ starts, whole.shift[:, last], whole.covariance[:, last, last])


def _positions(run: VectorMap) -> AffineMap:
    """The positions that a run leads to, its velocities having started from ``N(0, 1)``."""
    variance = run.covariance[:, 0, 0] + run.matrix[:, 0, 1].square()
    return AffineMap(run.matrix[:, 0, 0], run.shift[:, 0], variance)
