"""Noise schedules: how much signal and how much noise a state holds at each time.

Every formula here is arranged so that no digits cancel at either end of its range: alpha, sigma and times are
accurate to 1e-12 relative, log-SNR to 1e-12 relative to ``max(1, |log_snr|)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from ._checks import finite_float
from ._schedule_base import NoiseSchedule, VariancePreserving
from ._schedule_table import DiscreteSchedule

__all__ = [
    "CosineSchedule",
    "DiscreteSchedule",
    "FlowSchedule",
    "NoiseSchedule",
    "OUSchedule",
    "VESchedule",
    "VPSchedule",
    "VariancePreserving",
]


@final
@dataclass(frozen=True)
class OUSchedule(VariancePreserving):
    """Ornstein–Uhlenbeck process ``dx = -x/2 dt + dw``: ``alpha = exp(-t/2)``, ``sigma^2 = 1 - exp(-t)``.

    Defined for t >= 0. Default sampling times: 10 to 1e-3.

    Reference: Chen et al. 2024 (arXiv 2405.15986), the forward process.
    """

    t_range = (0.0, math.inf)
    t_start = 10.0
    t_end = 1e-3

    def _ou_time(self, t: Tensor) -> Tensor:
        return t

    def _from_ou_time(self, ou_time: Tensor) -> Tensor:
        return ou_time


@final
@dataclass(frozen=True)
class VPSchedule(VariancePreserving):
    """Variance preserving with linear beta: ``-ln alpha^2 = beta_min t + (beta_max - beta_min) t^2 / 2``.

    Defined for 0 <= t <= 1. Default sampling times: 1 to 1e-3.

    Args:
        beta_min: Noise rate at t = 0, > 0.
        beta_max: Noise rate at t = 1, >= ``beta_min``.

    Raises:
        TypeError: If a rate is not a real number.
        ValueError: If a rate is out of bounds.

    Reference: Song et al. 2021 (arXiv 2011.13456), the VP SDE.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    t_range = (0.0, 1.0)
    t_start = 1.0
    t_end = 1e-3

    def __post_init__(self) -> None:
        """Check the rates."""
        low = finite_float("beta_min", self.beta_min, low=0.0)
        high = finite_float("beta_max", self.beta_max, low=low, low_open=False)
        object.__setattr__(self, "beta_min", low)
        object.__setattr__(self, "beta_max", high)

    def _ou_time(self, t: Tensor) -> Tensor:
        return t * (self.beta_min + 0.5 * (self.beta_max - self.beta_min) * t)

    def _from_ou_time(self, ou_time: Tensor) -> Tensor:
        # The root of the quadratic in the form without a difference, exact also for beta_max = beta_min.
        slope = self.beta_max - self.beta_min
        return 2.0 * ou_time / (self.beta_min + torch.sqrt(self.beta_min**2 + 2.0 * slope * ou_time))


@final
@dataclass(frozen=True)
class CosineSchedule(VariancePreserving):
    r"""Variance preserving with a cosine signal level: ``alpha = cos(theta) / cos(theta0)``.

    ``theta(t) = (pi/2) (t + s)/(1 + s)``, ``theta0 = theta(0)``. Defined for 0 <= t <= 1; alpha(1) = 0, so
    that ``log_snr(1) = -inf``. Default sampling times: 1 to 1e-3.

    Args:
        offset: The offset s, 0 <= s < 1.

    Raises:
        TypeError: If ``offset`` is not a real number.
        ValueError: If ``offset`` is out of bounds.

    Reference: Nichol & Dhariwal 2021 (arXiv 2102.09672), eq. 17.
    """

    offset: float = 0.008

    t_range = (0.0, 1.0)
    t_start = 1.0
    t_end = 1e-3

    def __post_init__(self) -> None:
        """Check the offset."""
        offset = finite_float("offset", self.offset, low=0.0, high=1.0, low_open=False)
        object.__setattr__(self, "offset", offset)

    @property
    def _unit(self) -> float:
        """Angle per unit of time."""
        return 0.5 * math.pi / (1.0 + self.offset)

    @property
    def _theta0(self) -> float:
        return self._unit * self.offset

    def _alpha(self, t: Tensor) -> Tensor:
        # cos(theta) = sin(pi/2 - theta) keeps the digits near t = 1, and has a slope there.
        return torch.sin(self._unit * (1.0 - t)) / math.cos(self._theta0)

    def _variance(self, t: Tensor) -> Tensor:
        # The product form of cos(theta0)^2 - cos(theta)^2 = sin(theta - theta0) sin(theta + theta0), for t near 0.
        product = torch.sin(self._unit * t) * torch.sin(self._unit * (t + 2.0 * self.offset))
        return product / math.cos(self._theta0) ** 2

    def _sigma(self, t: Tensor) -> Tensor:
        return self._variance(t).sqrt()

    def _ou_time(self, t: Tensor) -> Tensor:
        noise = self._variance(t)
        return torch.where(noise < 0.5, -torch.log1p(-noise), -2.0 * torch.log(self._alpha(t)))

    def _from_ou_time(self, ou_time: Tensor) -> Tensor:
        # Angle theta - theta0 from its sine and cosine by sums only:
        # sin(theta - theta0) = cos0 sigma^2 / (sin(theta) + alpha sin0).
        sin0, cos0 = math.sin(self._theta0), math.cos(self._theta0)
        alpha, noise = torch.exp(-0.5 * ou_time), -torch.expm1(-ou_time)
        sin_theta = torch.sqrt(sin0**2 + noise * cos0**2)
        # The smallest divisor only matters for s = 0 at t = 0, where it turns 0/0 into 0.
        sine = cos0 * noise / (sin_theta + alpha * sin0).clamp(min=1e-300)
        return torch.atan2(sine, alpha * cos0**2 + sin0 * sin_theta) / self._unit


@final
@dataclass(frozen=True)
class VESchedule(NoiseSchedule):
    """Variance exploding on the EDM clock: ``alpha = 1``, ``sigma = t``.

    Defined for t >= 0; the two noise levels are only the default sampling times.

    Args:
        sigma_min: Last sampling time, > 0.
        sigma_max: First sampling time, > ``sigma_min``.

    Raises:
        TypeError: If a level is not a real number.
        ValueError: If a level is out of bounds.

    Reference: Karras et al. 2022 (arXiv 2206.00364), Table 1.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    t_range = (0.0, math.inf)

    def __post_init__(self) -> None:
        """Check the noise levels."""
        low = finite_float("sigma_min", self.sigma_min, low=0.0)
        high = finite_float("sigma_max", self.sigma_max, low=low)
        object.__setattr__(self, "sigma_min", low)
        object.__setattr__(self, "sigma_max", high)

    @property
    def t_start(self) -> float:
        """Largest noise level."""
        return self.sigma_max

    @property
    def t_end(self) -> float:
        """Smallest noise level."""
        return self.sigma_min

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def _sigma(self, t: Tensor) -> Tensor:
        return t.clone()

    def _log_snr(self, t: Tensor) -> Tensor:
        return -2.0 * torch.log(t)

    def _time(self, log_snr: Tensor) -> Tensor:
        return torch.exp(-0.5 * log_snr)


@final
@dataclass(frozen=True)
class FlowSchedule(NoiseSchedule):
    """Rectified flow, the straight line from data to noise: ``alpha = 1 - t``, ``sigma = t``.

    Defined for 0 <= t <= 1; ``log_snr`` is infinite at both ends. Default sampling times: 1 to 0.

    Reference: Liu et al. 2023 (arXiv 2209.03003); Lipman et al. 2023 (arXiv 2210.02747).
    """

    t_range = (0.0, 1.0)
    t_start = 1.0
    t_end = 0.0

    def _alpha(self, t: Tensor) -> Tensor:
        return 1.0 - t

    def _sigma(self, t: Tensor) -> Tensor:
        return t.clone()

    def _log_snr(self, t: Tensor) -> Tensor:
        return 2.0 * (torch.log1p(-t) - torch.log(t))

    def _time(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-0.5 * log_snr)
