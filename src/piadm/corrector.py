"""The corrector: underdamped Langevin dynamics at one time, as affine steps of a two-component state.

    du = v dtau,    dv = (-gamma v + s(u)) dtau + sqrt(2 gamma) dB,    v_0 ~ N(0, I)

With the score frozen over a step the dynamics is linear with Gaussian noise, so the step is exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from piadm._checks import float_field, positive_int
from piadm.grid import covering
from piadm.integrators import AffineSteps, variance_preserving
from piadm.schedule import NoiseSchedule

_MOST = 1e8  # steps or blocks: beyond, an argument is a slip


@dataclass(frozen=True)
class Corrector:
    """Settings of the corrector of Algorithm 2 (PIADM-ODE).

    Args:
        duration: total Langevin time ``T_dagger`` at the end of every predictor block.
        length: longest block ``h_dagger``; the duration is cut into ``N_dagger`` equal blocks.
        step: longest step ``eps_dagger``; a block is cut into ``M_dagger`` equal steps.
        iterations: Picard iterations ``K_dagger`` per block.
        friction: ``gamma``, of the order of the square root of the score's Lipschitz constant.

    Raises:
        TypeError, ValueError: if an argument is not a positive finite number, ``iterations`` not a positive int.

    Reference: Chen, Ren, Ying & Rotskoff 2024 (arXiv 2405.15986), Algorithm 2.
    """

    duration: float
    length: float
    step: float
    iterations: int
    friction: float = 2.0

    def __post_init__(self) -> None:
        for name in ("duration", "length", "step", "friction"):
            float_field(self, name, low=0.0)
        positive_int("iterations", self.iterations)
        for name in ("length", "step"):
            if self.duration / getattr(self, name) > _MOST:
                least = self.duration / _MOST
                raise ValueError(f"{name} must be at least {least:g} for this duration, got {getattr(self, name)}")

    @property
    def blocks(self) -> int:
        """Number of blocks ``N_dagger``."""
        return covering(self.duration / self.length)

    @property
    def block_steps(self) -> int:
        """Steps per block ``M_dagger``."""
        return covering(self.duration / self.blocks / self.step)

    @property
    def step_length(self) -> float:
        """Length of every step, ``eps_dagger`` or less."""
        return self.duration / self.blocks / self.block_steps

    @property
    def normals(self) -> int:
        """Standard normals per coordinate of one corrector run: ``v_0``, then two per step (velocity first)."""
        return 1 + 2 * self.blocks * self.block_steps

    def steps(self, schedule: NoiseSchedule, time: float) -> AffineSteps:
        """Coefficients of one block at schedule time ``time``, state components ``(u, v)``.

        On the variance-preserving scale ``y = u/scale`` with ``s = (alpha D - y)/sigma^2``, ``E = e^{-gamma eps}``:

            v' = E v + g1 s + xi_v,   y' = y + g1 v + g2 s + xi_u,   g1 = (1-E)/gamma,  g2 = (eps - g1)/gamma

        with ``Var xi_v = 1 - E^2``, ``Cov(xi_u, xi_v) = (1-E)^2/gamma`` and
        ``Var xi_u = (2/gamma)(eps - 2(1-E)/gamma + (1-E^2)/(2 gamma))``.
        """
        t = torch.tensor([time], dtype=torch.float64, device="cpu")
        alpha, variance, scale = (value.item() for value in variance_preserving(schedule, t))
        gamma = self.friction
        x = gamma * self.step_length
        decay, lost = math.exp(-x), -math.expm1(-x)
        g1, g2 = lost / gamma, _drift_weight(x) / gamma**2
        a = t.new_tensor([[1 - g2 / variance, scale * g1], [-g1 / variance / scale, decay]])
        b = t.new_tensor([scale * g2, g1]) * (alpha / variance)
        # First normal: the velocity's noise and what the position shares with it; second: the position's rest.
        sd_v = math.sqrt(-math.expm1(-2 * x))
        shared = lost**2 / gamma / sd_v
        rest = math.sqrt(2 * _position_weight(x) - lost**2 * math.tanh(x / 2)) / gamma
        c = t.new_tensor([[scale * shared, scale * rest], [sd_v, 0.0]])
        count = self.block_steps
        return AffineSteps(t.expand(count), a.expand(count, 2, 2), b.expand(count, 2), c.expand(count, 2, 2))


def _drift_weight(x: float) -> float:
    """``x - (1 - e^{-x})``, without cancellation for small ``x``."""
    return _series(x, lambda n: (-1) ** n, 2) if x < 0.5 else x + math.expm1(-x)


def _position_weight(x: float) -> float:
    """``x - 2 (1 - e^{-x}) + (1 - e^{-2x})/2``, without cancellation for small ``x``."""
    if x < 0.5:
        return _series(x, lambda n: (-1) ** (n + 1) * (2.0 ** (n - 1) - 2), 3)
    return x + 2 * math.expm1(-x) - math.expm1(-2 * x) / 2


def _series(x: float, coefficient: Callable[[int], float], first: int) -> float:
    """``sum_{n >= first} coefficient(n) x^n / n!``; 25 terms are beyond rounding for ``x < 1``."""
    return math.fsum(coefficient(n) * x**n / math.factorial(n) for n in range(first, first + 25))
