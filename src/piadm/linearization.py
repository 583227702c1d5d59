"""Linearizations: the guess ``G_j`` of the denoiser's Jacobian that a parallel iteration solves with.

The network is replaced, for one round, by ``D(x) = G x + R`` with the residual ``R = D(x_old) - G x_old``
kept from its last evaluation.  The fixed point does not depend on G; the number of rounds does.
"""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from typing import Protocol, final

import torch
from torch import Tensor

from piadm._checks import choice, float_field, shown
from piadm.denoiser import Denoiser
from piadm.integrators import Steps
from piadm.schedule import NoiseSchedule


class Linearization(Protocol):
    """A scalar Jacobian guess per step."""

    def slopes(self, schedule: NoiseSchedule, steps: Steps) -> Tensor:
        """``G_j`` for every step, float64 of shape ``(J,)``."""
        ...


@dataclass(frozen=True)
class ScoreFrozen:
    """``G = 1/alpha``: the score (equivalently the noise) is frozen, the paper's Picard iteration."""

    def slopes(self, schedule: NoiseSchedule, steps: Steps) -> Tensor:
        """``1/alpha`` for every step.

        Raises:
            ValueError: if alpha is 0 at the first time.
        """
        alpha = schedule.alpha(steps.times)
        if not alpha.all():
            raise ValueError(
                "linearization 'score' needs alpha > 0 on the whole grid, got alpha = 0 at time "
                f"{steps.times[0].item():g}; use 'gaussian', 'data' or 'identity'"
            )
        return 1 / alpha


@dataclass(frozen=True)
class Identity:
    """``a + b G = 1``: the state is carried unchanged, ParaDiGMS (Shih et al. 2023, arXiv 2305.16317)."""

    def slopes(self, schedule: NoiseSchedule, steps: Steps) -> Tensor:
        """``(1 - a)/b`` for every step."""
        a, b = steps.own()
        return (1 - a) / b


@dataclass(frozen=True)
class DataFrozen:
    """``G = 0``: the denoised estimate is frozen."""

    def slopes(self, schedule: NoiseSchedule, steps: Steps) -> Tensor:
        """Zero for every step."""
        return steps.times.new_zeros(steps.count)


@dataclass(frozen=True)
class Gaussian:
    """``G = alpha v/(alpha^2 v + sigma^2)``: the exact Jacobian for Gaussian data of variance ``v``.

    Args:
        variance: ``v``, in the squared units of the data.
    """

    variance: float

    def __post_init__(self) -> None:
        float_field(self, "variance", low=0.0)

    def slopes(self, schedule: NoiseSchedule, steps: Steps) -> Tensor:
        """``alpha v/(alpha^2 v + sigma^2)`` for every step."""
        return gaussian_slopes(schedule, steps.times, self.variance)


def gaussian_slopes(schedule: NoiseSchedule, times: Tensor, variance: float | Tensor) -> Tensor:
    """``alpha v/(alpha^2 v + sigma^2)`` at times ``(J,)``, for a variance or several ``(..., 1)``."""
    alpha, sigma = schedule.levels(times)
    return (alpha * variance).div_((alpha.square() * variance).add_(sigma.square()))


@dataclass(frozen=True)
class LearnedSlopes(ABC):
    """``Gaussian`` first, and from a node's second evaluation on what its evaluations show; at no network call.

    Args:
        variance: ``v`` of ``Gaussian``.
    """

    variance: float

    def __post_init__(self) -> None:
        float_field(self, "variance", low=0.0)

    def slopes(self, schedule: NoiseSchedule, steps: Steps) -> Tensor:
        """The slopes of ``Gaussian``."""
        return Gaussian(self.variance).slopes(schedule, steps)

    def bounds(self, schedule: NoiseSchedule, steps: Steps) -> tuple[Tensor, Tensor]:
        """Least and largest slope of every step, each ``(J,)``."""
        top = 1 / schedule.alpha(steps.times)
        return torch.zeros_like(top), top


@final
@dataclass(frozen=True)
class Secant(LearnedSlopes):
    """``Gaussian`` first, and from a node's second evaluation on the slope that its last two show, sample by sample.

        G = <dx, dD> / <dx, dx>,   kept within [0, 1/alpha]

    dx and dD being what has changed in the state and in the denoised estimate.  The bounds are those of a posterior
    whose noised density is log-concave; below 1/alpha a wrong slope cannot make the recurrence grow.  It costs no
    network call.

    Args:
        variance: ``v`` of ``Gaussian``.

    Reference: Barzilai & Borwein 1988 (IMA J. Numer. Anal. 8, 141-148) for the scalar secant.
    """


@final
@dataclass(frozen=True)
class DiagonalSecant(LearnedSlopes):
    """``Secant``, and on top of it a slope per coordinate, from all evaluations of a row.

        G = diag(g),   g <- g + dx (dD - g dx) / (dx^2 + r mean(dx^2)),   kept within [0, 1/alpha]

    coordinate by coordinate, after ``g`` was updated by the secant, which all coordinates share.  In
    images, the network responds differently to noise, edges and flat areas; in other data, coordinates may have
    different scales.  It costs no network call.

    Args:
        variance: ``v`` of ``Gaussian``.
    """


def check_slopes(slopes: object, count: int) -> Tensor:
    """Slopes as float64.

    Raises:
        TypeError, ValueError: if they are no finite tensor of shape ``(count,)``.
    """
    if not isinstance(slopes, Tensor):
        raise TypeError(f"linearization must give slopes as a tensor of shape ({count},), got {shown(slopes)}")
    if slopes.shape != (count,):
        raise ValueError(f"linearization must give slopes of shape ({count},), got {tuple(slopes.shape)}")
    if bad := count - int(slopes.isfinite().sum()):
        raise ValueError(f"linearization must give finite slopes, got {bad} that are not")
    return slopes.double()


NAMES = ("diagonal", "secant", "gaussian", "score", "identity", "data")


def linearization(choice_: str | Linearization | None, denoiser: Denoiser) -> Linearization:
    """The linearization of that name, or the object itself; ``None`` is "diagonal".

    Raises:
        TypeError, ValueError: if it is neither one of ``NAMES`` nor has a method ``slopes``.
    """
    if not isinstance(choice_, type) and callable(getattr(choice_, "slopes", None)):
        return choice_  # type: ignore[return-value]
    name = choice("linearization", "diagonal" if choice_ is None else choice_, NAMES)
    kinds: dict[object, Linearization] = {
        "diagonal": DiagonalSecant(denoiser.data_variance),
        "secant": Secant(denoiser.data_variance),
        "gaussian": Gaussian(denoiser.data_variance),
        "score": ScoreFrozen(),
        "identity": Identity(),
        "data": DataFrozen(),
    }
    return kinds[name]
