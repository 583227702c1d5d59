"""What every noise schedule has: four functions of time, checked and converted in one place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from numbers import Real

import torch
from torch import Tensor

from ._checks import described, shown

_SLACK = 1e-9  # how far rounding may carry ``time`` past an end of the range before it counts as an error


class NoiseSchedule(ABC):
    r"""Signal and noise levels over time, ``x_t = alpha(t) x_0 + sigma(t) eps``.

    ``log_snr(t) = ln(alpha(t)^2 / sigma(t)^2)`` decreases in t: large times are noise, small times are data.

    A new kind implements the abstract members. Its underscored methods receive float64 tensors that lie in
    ``t_range`` and return float64 tensors of the same shape on the same device. Range and NaN are checked for
    CPU tensors only: on an accelerator the check would wait for the device at every call. Nor are they checked in
    compiled code, which cannot depend on values.
    """

    @property
    @abstractmethod
    def t_range(self) -> tuple[float, float]:
        """Smallest (data) and largest (noise) time at which the schedule is defined."""

    @property
    @abstractmethod
    def t_start(self) -> float:
        """Default first, noisiest sampling time."""

    @property
    @abstractmethod
    def t_end(self) -> float:
        """Default last sampling time, the one nearest to data."""

    @abstractmethod
    def _alpha(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _sigma(self, t: Tensor) -> Tensor: ...

    def _levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Both at once, for a schedule whose ``_alpha`` and ``_sigma`` share most of their work."""
        return self._alpha(t), self._sigma(t)

    @abstractmethod
    def _log_snr(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _time(self, log_snr: Tensor) -> Tensor: ...

    def alpha(self, t: float | Tensor) -> Tensor:
        """Factor on the data, ``alpha(t)``.

        Args:
            t: Times in ``t_range``, any shape.

        Returns:
            float64, same shape and device as ``t``.

        Raises:
            TypeError: If ``t`` is not a real number or a tensor of real numbers.
            ValueError: If a time lies outside ``t_range`` (CPU only).
        """
        return self._alpha(self._checked_time(t))

    def sigma(self, t: float | Tensor) -> Tensor:
        """Standard deviation of the noise, ``sigma(t)``; arguments and errors as for :meth:`alpha`."""
        return self._sigma(self._checked_time(t))

    def levels(self, t: float | Tensor) -> tuple[Tensor, Tensor]:
        """``(alpha(t), sigma(t))``, which cost little more than one; arguments and errors as for :meth:`alpha`."""
        return self._levels(self._checked_time(t))

    def log_snr(self, t: float | Tensor) -> Tensor:
        """Log signal-to-noise ratio ``ln(alpha^2 / sigma^2)``; arguments and errors as for :meth:`alpha`.

        It is +inf where sigma = 0 and -inf where alpha = 0.
        """
        return self._log_snr(self._checked_time(t))

    def time(self, log_snr: float | Tensor) -> Tensor:
        """Time at which the schedule has the given log-SNR, the inverse of :meth:`log_snr`.

        Args:
            log_snr: Values of ``ln(alpha^2 / sigma^2)``, any shape; infinite where the schedule is.

        Returns:
            Times in ``t_range``: float64, same shape and device as ``log_snr``.

        Raises:
            TypeError: If ``log_snr`` is not a real number or a tensor of real numbers.
            ValueError: If the schedule does not take such a value (CPU only).
        """
        values = _as_float64("log_snr", log_snr)
        low, high = self.t_range
        t = self._time(values)
        if _checkable(t):
            slack = _SLACK * max(1.0, abs(high))
            if not _all_within(t, low - slack, high + slack):
                wrong = ~((t >= low - slack) & (t <= high + slack))
                ends = self._log_snr(torch.tensor([high, low], dtype=torch.float64, device="cpu")).tolist()
                raise ValueError(
                    f"log_snr must lie in [{ends[0]:.6g}, {ends[1]:.6g}], the values of {type(self).__name__}"
                    f", got {values[wrong].flatten()[0].item()}"
                )
        return t.clamp(low, high)

    def _checked_time(self, t: float | Tensor) -> Tensor:
        times = _as_float64("t", t)
        if _checkable(times):
            low, high = self.t_range
            if not _all_within(times, low, high):
                wrong = ~((times >= low) & (times <= high))
                raise ValueError(
                    f"t must lie in [{low:g}, {high:g}], the range of {type(self).__name__}"
                    f", got {times[wrong].flatten()[0].item()}"
                )
        return times


class VariancePreserving(NoiseSchedule):
    r"""A schedule with ``alpha^2 + sigma^2 = 1``: the Ornstein–Uhlenbeck process on its own clock.

    With the OU time ``B(t) = -ln alpha(t)^2``:  ``alpha = exp(-B/2)``, ``sigma = sqrt(1 - exp(-B))``,
    ``log_snr = -B - ln(1 - exp(-B))`` and, inversely, ``B = ln(1 + exp(-log_snr))``.
    """

    @abstractmethod
    def _ou_time(self, t: Tensor) -> Tensor:
        """OU time B of the schedule's time."""

    @abstractmethod
    def _from_ou_time(self, ou_time: Tensor) -> Tensor:
        """Schedule's time of the OU time B."""

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-0.5 * self._ou_time(t))

    def _sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(-self._ou_time(t)))

    def _log_snr(self, t: Tensor) -> Tensor:
        ou_time = self._ou_time(t)
        return -ou_time - torch.log(-torch.expm1(-ou_time))

    def _time(self, log_snr: Tensor) -> Tensor:
        # torch.softplus turns linear above its threshold of 20 and would lose half of the digits there.
        return self._from_ou_time((-log_snr).clamp(min=0.0) + torch.log1p(torch.exp(-log_snr.abs())))


def _checkable(values: Tensor) -> bool:
    """Whether their numbers can be looked at, without waiting for a device or breaking a graph."""
    return values.device.type == "cpu" and not torch.compiler.is_compiling()


def _all_within(values: Tensor, low: float, high: float) -> bool:
    """Whether none is outside or not a number, in one pass."""
    if not values.numel():
        return True
    least, most = torch.aminmax(values.detach())
    return low <= float(least) and float(most) <= high


def _as_float64(name: str, value: float | Tensor) -> Tensor:
    """Times or log-SNRs as a float64 tensor, shape and device kept."""
    if isinstance(value, Tensor) and not value.is_complex() and value.dtype != torch.bool:
        return value.to(torch.float64)
    if isinstance(value, Real) and not isinstance(value, bool):
        try:
            return torch.tensor(float(value), dtype=torch.float64, device="cpu")
        except OverflowError as error:
            raise ValueError(f"{name} must be a number that float64 holds, got {shown(value)}") from error
    raise TypeError(f"{name} must be a real number or a tensor of real numbers, got {described(value)}")
