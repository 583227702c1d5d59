"""Time grids: the times a sampler visits, and the paper's partition of them into blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from numpy.typing import NDArray
from torch import Tensor

from ._checks import decreasing_vector, finite_float, instance, positive_int, shown
from .schedule import DiscreteSchedule, NoiseSchedule, OUSchedule, VESchedule

LOG_SNR_LIMIT = 13.0  # stands in for an infinite log-SNR: there sigma (or alpha) is about 1.5e-3
_ROUNDING = 1e-9  # what rounding may add to a quotient before it counts as one more block or step
_MAX_STEPS, _MAX_BLOCKS = 10**8, 10**5  # beyond these an argument is a slip, and would only eat memory


@final
@dataclass(frozen=True, eq=False, init=False)
class TimeGrid:
    """The times of a sampling run, noise first.

    Attributes:
        times: Schedule times, float64 on the CPU, shape (J+1,), strictly decreasing.
    """

    times: Tensor

    def __init__(self, times: Tensor | Sequence[float] | NDArray[Any]) -> None:
        """Check and copy the times.

        Args:
            times: Schedule times, shape (J+1,), J >= 1, finite and strictly decreasing.

        Raises:
            TypeError: If ``times`` does not hold real numbers.
            ValueError: If it is not one-dimensional, finite, strictly decreasing and of at least two entries.
        """
        object.__setattr__(self, "times", decreasing_vector("times", times))

    @property
    def steps(self) -> int:
        """Number of steps J."""
        return len(self.times) - 1

    @classmethod
    def uniform(
        cls, schedule: NoiseSchedule, steps: int, start: float | None = None, end: float | None = None
    ) -> TimeGrid:
        """Steps of equal length in the schedule's time, ``t_j = start + (end - start) j / J``.

        Args:
            schedule: The schedule whose clock is meant.
            steps: Number of steps J, >= 1.
            start: First time; None for ``schedule.t_start``.
            end: Last time, < ``start``; None for ``schedule.t_end``.

        Returns:
            The grid, both ends included exactly.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If ``steps`` < 1, or the ends lie outside the schedule's range or in the wrong order.
        """
        count, first, last = positive_int("steps", steps, maximum=_MAX_STEPS), *_ends(schedule, start, end)
        return cls(torch.linspace(first, last, count + 1, dtype=torch.float64, device="cpu"))

    @classmethod
    def log_snr(
        cls, schedule: NoiseSchedule, steps: int, start: float | None = None, end: float | None = None
    ) -> TimeGrid:
        """Steps of equal length in log-SNR.

        An end with infinite log-SNR (alpha = 0 or sigma = 0) stays the first or last time, but the spacing is
        that of a grid ending at log-SNR -13 or 13 instead (a discrete table: at index 0, the last time its
        network knows). If the other end lies beyond that already, it is one unit past the other end.

        Args:
            schedule: The schedule whose log-SNR is meant.
            steps: Number of steps J, >= 1.
            start: First time; None for ``schedule.t_start``.
            end: Last time, < ``start``; None for ``schedule.t_end``.

        Returns:
            The grid, both ends included exactly.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If ``steps`` < 1, or the ends lie outside the schedule's range or in the wrong order.
        """
        count, first, last = positive_int("steps", steps, maximum=_MAX_STEPS), *_ends(schedule, start, end)
        levels = torch.linspace(*_finite_levels(schedule, first, last), count + 1, dtype=torch.float64, device="cpu")
        times = schedule.time(levels)
        times[0], times[-1] = first, last
        return cls(times)

    @classmethod
    def ddpm(cls, schedule: DiscreteSchedule, steps: int) -> TimeGrid:
        """Every (N // J)-th index of a trained table, down to 0, then clean data at -1.

        The same times as diffusers' "leading" spacing with offset 0.

        Args:
            schedule: A discrete schedule with N times.
            steps: Number of steps J, 1..N.

        Returns:
            The grid.

        Raises:
            TypeError: If ``schedule`` is not discrete or ``steps`` not an integer.
            ValueError: If ``steps`` is not in 1..N.
        """
        table = len(instance("schedule", schedule, DiscreteSchedule).alphas_cumprod)
        count = positive_int("steps", steps)
        if count > table:
            raise ValueError(f"steps must be an integer from 1 to {table}, the table's length, got {shown(steps)}")
        indices = torch.arange(count - 1, -1, -1, dtype=torch.float64, device="cpu") * (table // count)
        return cls(torch.cat([indices, indices.new_tensor([-1.0])]))

    @classmethod
    def default(cls, schedule: NoiseSchedule, steps: int) -> TimeGrid:
        """The customary grid: :meth:`ddpm` for a table, :meth:`log_snr` for VE, else :meth:`uniform`.

        Args:
            schedule: The schedule to sample with.
            steps: Number of steps J, >= 1.

        Returns:
            The grid.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If ``steps`` is out of bounds.
        """
        if isinstance(schedule, DiscreteSchedule):
            return cls.ddpm(schedule, steps)
        if isinstance(schedule, VESchedule):
            return cls.log_snr(schedule, steps)
        return cls.uniform(schedule, steps)


@final
@dataclass(frozen=True, eq=False, init=False)
class Blocks:
    """A horizon of Ornstein–Uhlenbeck time cut into consecutive blocks, noise first.

    Attributes:
        times: Per block its OU times, float64 on the CPU, shape (M_n + 1,), both ends included, strictly
            decreasing. A block starts at exactly the time at which the one before it ends.

    Reference: Chen et al. 2024 (arXiv 2405.15986), the PIADM discretisation.
    """

    times: tuple[Tensor, ...]

    def __init__(self, times: Sequence[Tensor | Sequence[float] | NDArray[Any]]) -> None:
        """Check and copy the times.

        Args:
            times: Per block its OU times, >= 0, shape (M_n + 1,), M_n >= 1, strictly decreasing.

        Raises:
            TypeError: If ``times`` is not a sequence of vectors of real numbers.
            ValueError: If it is empty, a block does not decrease, a time is negative or two borders differ.
        """
        if not isinstance(times, Sequence) or isinstance(times, str):
            raise TypeError(f"times must be a sequence of vectors, one per block, got {type(times).__name__}")
        if not times:
            raise ValueError("times must hold at least one block, got none")
        blocks = tuple(decreasing_vector(f"times[{n}]", block) for n, block in enumerate(times))
        for n in range(1, len(blocks)):
            if blocks[n][0] != blocks[n - 1][-1]:
                pair = f"{blocks[n - 1][-1].item()}, got {blocks[n][0].item()}"
                raise ValueError(f"times[{n}] must start where times[{n - 1}] ends, at {pair}")
        if blocks[-1][-1] < 0.0:
            raise ValueError(f"times must be OU times >= 0, got {blocks[-1][-1].item()}")
        object.__setattr__(self, "times", blocks)

    def __repr__(self) -> str:
        return f"Blocks({self.count} from {self.times[0][0]:g} to {self.times[-1][-1]:g}, steps: {list(self.sizes)})"

    @property
    def count(self) -> int:
        """Number of blocks N."""
        return len(self.times)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of steps M_n of each block."""
        return tuple(len(block) - 1 for block in self.times)

    @property
    def steps(self) -> int:
        """Number of steps of all blocks together."""
        return sum(self.sizes)

    @classmethod
    def paper(cls, horizon: float, early_stop: float, length: float, step: float) -> Blocks:
        r"""The paper's partition: equal blocks, uniform steps, geometric ones towards data in the last block.

        ``N = ceil((T - eta)/h)`` blocks of length ``(T - eta)/N``. Each but the last takes the fewest equal
        steps ``<= eps``. In the last a step from t to t' satisfies ``t - t' <= min(eps, eps t')``, that is
        ``t' = max(t - eps, t / (1 + eps))``; its last step is cut at eta.

        Args:
            horizon: T, the OU time of the first state, > ``early_stop``.
            early_stop: eta, the OU time at which sampling ends, > 0.
            length: h, the longest block, > 0, in OU time.
            step: eps, the longest step, > 0, in OU time.

        Returns:
            The blocks, from T down to eta exactly.

        Raises:
            TypeError: If an argument is not a real number.
            ValueError: If an argument is out of bounds, or asks for over 1e5 blocks or 1e8 steps.

        Reference: Chen et al. 2024 (arXiv 2405.15986), Algorithm 1 and its step size condition.
        """
        eta = finite_float("early_stop", early_stop, low=0.0)
        top = finite_float("horizon", horizon, low=eta)
        longest, eps = finite_float("length", length, low=0.0), finite_float("step", step, low=0.0)
        if (top - eta) / longest > _MAX_BLOCKS:
            raise ValueError(f"length must be at least {(top - eta) / _MAX_BLOCKS:g} here, got {shown(length)}")
        fewest = (top - eta + math.log(top) - math.log(eta)) / _MAX_STEPS
        if eps < fewest:
            raise ValueError(f"step must be at least {fewest:g} here, got {shown(step)}")
        count = covering((top - eta) / longest)
        borders = torch.linspace(top, eta, count + 1, dtype=torch.float64, device="cpu").tolist()
        inner = covering((top - eta) / count / eps)
        spans = zip(borders[:-2], borders[1:-1], strict=True)
        uniform = [torch.linspace(*span, inner + 1, dtype=torch.float64, device="cpu") for span in spans]
        return cls([*uniform, _shrinking(borders[-2], eta, eps)])

    @staticmethod
    def paper_sizes(horizon: float, early_stop: float, count: int, step: float) -> tuple[int, ...]:
        """Steps of each block of that partition into ``count`` equal blocks; takes arguments that are right."""
        length = (horizon - early_stop) / count
        last = horizon if count == 1 else early_stop + length
        return (covering(length / step),) * (count - 1) + (max(1, sum(_shrinking_steps(last, early_stop, step))),)

    def grid(self, schedule: NoiseSchedule) -> TimeGrid:
        """All blocks joined, on the schedule's own clock: the times of equal log-SNR.

        Args:
            schedule: The schedule to sample with. For an OU schedule the times stay as they are.

        Returns:
            The grid, with as many steps as the blocks.

        Raises:
            TypeError: If ``schedule`` is not a noise schedule.
            ValueError: If the blocks reach beyond the schedule's range.
        """
        instance("schedule", schedule, NoiseSchedule)
        joined = torch.cat([self.times[0][:1], *(block[1:] for block in self.times)])
        if isinstance(schedule, OUSchedule):
            return TimeGrid(joined)
        try:
            return TimeGrid(schedule.time(OUSchedule().log_snr(joined)))
        except ValueError as error:
            span = f"{joined[0]:g} to {joined[-1]:g}"
            raise ValueError(f"schedule must cover the OU times {span}, got {schedule!r}: {error}") from error


def _shrinking(start: float, end: float, step: float) -> Tensor:
    """Times from ``start`` to ``end``; a step is at most ``step * min(1, time at its end)``, the last one cut."""
    uniform, geometric = _shrinking_steps(start, end, step)
    coarse = start - step * torch.arange(uniform + 1, dtype=torch.float64, device="cpu")
    fine = coarse[-1] * torch.exp(-math.log1p(step) * torch.arange(1, geometric + 1, dtype=torch.float64, device="cpu"))
    inner = torch.cat([coarse[1:], fine])[:-1]
    return torch.cat([inner.new_tensor([start]), inner, inner.new_tensor([end])])


def _shrinking_steps(start: float, end: float, step: float) -> tuple[int, int]:
    """How many of these steps are uniform, and how many geometric; rounding alone makes no step."""
    # Above 1 + step the uniform step is the shorter one, below it the geometric one: t' = t / (1 + step).
    uniform = max(0, min(math.ceil((start - 1.0 - step) / step), math.ceil((start - end) / step - _ROUNDING)))
    turn = start - step * uniform
    return uniform, max(0, math.ceil(math.log(turn / end) / math.log1p(step) - _ROUNDING)) if turn > end else 0


def covering(quotient: float) -> int:
    """Smallest count >= 1 that covers the quotient, rounding forgiven."""
    return max(1, math.ceil(quotient - _ROUNDING))


def _finite_levels(schedule: NoiseSchedule, start: float, end: float) -> tuple[float, float]:
    """Log-SNR at both ends, a finite stand-in where it is infinite."""
    first, last = schedule.log_snr(start).item(), schedule.log_snr(end).item()
    highest = schedule.log_snr(0.0).item() if isinstance(schedule, DiscreteSchedule) else LOG_SNR_LIMIT
    first = first if math.isfinite(first) else min(-LOG_SNR_LIMIT, last - 1.0)
    return first, last if math.isfinite(last) else max(highest, first + 1.0)


def _ends(schedule: NoiseSchedule, start: float | None, end: float | None) -> tuple[float, float]:
    """First and last time of a grid, checked against the schedule."""
    low, high = instance("schedule", schedule, NoiseSchedule).t_range
    first = schedule.t_start if start is None else finite_float("start", start, low=low, low_open=False)
    last = schedule.t_end if end is None else finite_float("end", end, low=low, low_open=False)
    if first > high:
        raise ValueError(f"start must be at most {high:g}, the end of the schedule's range, got {start!r}")
    if last >= first:
        raise ValueError(f"end must be less than start = {first:g}, got {last:g}")
    return first, last
