"""The noise schedule of a network trained on a table of discrete times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from numpy.typing import NDArray
from torch import Tensor

from ._checks import finite_float, positive_int, real_vector
from ._schedule_base import NoiseSchedule


@final
@dataclass(frozen=True, eq=False, repr=False, init=False)
class DiscreteSchedule(NoiseSchedule):
    r"""A table of ``alpha_bar``: at index i, ``alpha^2 = alpha_bar_i`` and ``sigma^2 = 1 - alpha_bar_i``.

    Times are indices 0..N-1; the log-SNR is linear in between. From index 0 the schedule goes on to clean
    data at t = -1 with ``sigma(t) = sigma(0) (t + 1)``, ``alpha^2 = 1 - sigma^2``. Default sampling times:
    N-1 to -1.

    alpha, sigma and log-SNR are accurate like those of the other schedules; a time, being an index, to 1e-12
    relative to N for tables like DDPM's (what rounding of the log-SNR leaves to know of it).

    Attributes:
        alphas_cumprod: The table, float64 on the CPU, shape (N,).

    Reference: Ho et al. 2020 (arXiv 2006.11239), eq. 4.
    """

    alphas_cumprod: Tensor
    _log_snrs: Tensor
    _first: tuple[float, float]  # alpha^2 and sigma^2 at index 0; as numbers, which compiled code may read

    def __init__(self, alphas_cumprod: Tensor | Sequence[float] | NDArray[Any]) -> None:
        """Check and copy the table, and keep its log-SNR.

        Args:
            alphas_cumprod: The table, shape (N,), N >= 2, strictly decreasing within (0, 1).

        Raises:
            TypeError: If the table does not hold real numbers.
            ValueError: If it has another shape, leaves (0, 1) or does not decrease strictly.
        """
        table = real_vector("alphas_cumprod", alphas_cumprod)
        if not bool(((table > 0.0) & (table < 1.0)).all()):
            span = f"{table.min().item()} to {table.max().item()}"
            raise ValueError(f"alphas_cumprod must lie strictly between 0 and 1, got values from {span}")
        levels = torch.log(table) - torch.log1p(-table)
        rising = (levels.diff() >= 0.0).nonzero()
        if len(rising):
            i = int(rising[0])
            pair = f"{table[i + 1].item()} at index {i + 1} after {table[i].item()}"
            raise ValueError(f"alphas_cumprod must be strictly decreasing, got {pair}")
        object.__setattr__(self, "alphas_cumprod", table)
        object.__setattr__(self, "_log_snrs", levels)
        object.__setattr__(self, "_first", (levels[0].sigmoid().item(), (-levels[0]).sigmoid().item()))

    @classmethod
    def ddpm(cls, timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> DiscreteSchedule:
        """Table of the original DDPM, ``alpha_bar_i = prod_{j<=i} (1 - beta_j)`` with linear betas.

        Computed in float64. diffusers computes the same table in float32, so its entries differ by about 1e-5
        relative; for exact parity pass ``scheduler.alphas_cumprod`` to the class instead.

        Args:
            timesteps: Length N of the table, >= 2.
            beta_start: First beta, within (0, 1).
            beta_end: Last beta, within (0, 1).

        Returns:
            The schedule.

        Raises:
            TypeError: If an argument is not a number of its kind.
            ValueError: If an argument is out of bounds.

        Reference: Ho et al. 2020 (arXiv 2006.11239), Sec. 4.
        """
        count = positive_int("timesteps", timesteps, minimum=2, maximum=10**6)
        first = finite_float("beta_start", beta_start, low=0.0, high=1.0)
        last = finite_float("beta_end", beta_end, low=0.0, high=1.0)
        betas = torch.linspace(first, last, count, dtype=torch.float64, device="cpu")
        return cls(torch.cumprod(1.0 - betas, 0))

    def __repr__(self) -> str:
        """Name and length of the table."""
        return f"DiscreteSchedule({len(self.alphas_cumprod)} times)"

    @property
    def t_range(self) -> tuple[float, float]:
        """From clean data, -1, to the last index of the table."""
        return -1.0, self.t_start

    @property
    def t_start(self) -> float:
        """Last index of the table."""
        return float(len(self.alphas_cumprod) - 1)

    @property
    def t_end(self) -> float:
        """Clean data."""
        return -1.0

    def _alpha(self, t: Tensor) -> Tensor:
        return self._levels(t)[0]

    def _sigma(self, t: Tensor) -> Tensor:
        return self._levels(t)[1]

    def _levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_snr = self._log_snr(t)
        return torch.sqrt(torch.sigmoid(log_snr)), torch.sqrt(torch.sigmoid(-log_snr))

    def _log_snr(self, t: Tensor) -> Tensor:
        levels = self._log_snrs.to(t.device, non_blocking=True)  # a blocking copy would wait for the device
        (signal, noise), u = self._first, t.clamp(max=0.0)
        inside = t - u  # 0 before index 0
        cell = inside.long().clamp(max=len(levels) - 2)
        in_table = torch.lerp(levels.take(cell), levels.take(cell + 1), inside - cell)
        # Before index 0: alpha^2 = alpha(0)^2 - sigma(0)^2 u (2 + u), sigma^2 = sigma(0)^2 (1 + u)^2.
        return in_table + torch.log1p(u * (2.0 + u) * (-noise / signal)) - 2.0 * torch.log1p(u)

    def _time(self, log_snr: Tensor) -> Tensor:
        levels = self._log_snrs.to(log_snr.device, non_blocking=True)
        cell = torch.searchsorted(-levels, -log_snr.contiguous(), right=True).sub(1).clamp(0, len(levels) - 2)
        in_table = cell + (levels[cell] - log_snr) / (levels[cell] - levels[cell + 1])
        to_data = torch.sqrt(torch.sigmoid(-log_snr) / self._first[1]) - 1.0
        return torch.where(log_snr > levels[0], to_data, in_table)
