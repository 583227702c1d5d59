"""Beyond Gaussian data: products of one-dimensional mixtures, whose divergences add up over the coordinates.

Every coordinate of such data runs by itself, so one line tells all.  For the sequential SDE the density on that line is
carried from step to step by quadrature; for the parallel sampler it is estimated from many samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from piadm._checks import finite_float, instance, positive_int, real_vector
from piadm.denoiser import Denoiser
from piadm.grid import Blocks, TimeGrid
from piadm.integrators import AffineSteps, Integrator, integrator
from piadm.models import MixtureDenoiser
from piadm.noise import Seed
from piadm.paper import piadm_sde
from piadm.schedule import NoiseSchedule
from piadm.theory.spectrum import OU, positive_vector

#: Points per standard deviation of the narrowest noise: the trapezoidal rule then errs by e^{-2 (1.6 pi)^2} = 1e-22.
PER_DEVIATION = 1.6

#: Standard deviations beyond which a Gaussian is left out (e^{-40} of its height), and the data's reach on the line.
REACH, RANGE = 9.0, 9.0

_MOST_POINTS = 200_000  # on the line: beyond, the quadrature would take hours
_BIN_POINTS = 100_000  # on the line of which bins are cut

#: Least of them in a standard deviation of the narrowest component: borders of bins, found by linear interpolation of
#: the distribution, then err by a probability of at most 0.24/(8 * 30^2) = 3e-5.
_BIN_PER_DEVIATION = 30
_ROWS = 1 << 15  # rows per call of the closed-form network


@final
@dataclass(frozen=True, eq=False, init=False)
class MixtureProduct:
    """``d`` independent coordinates, each from ``sum_k w_k N(m_k, v)``.

    Attributes:
        means: ``m``, in the units of the data, ``(K,)`` float64.
        variance: ``v``, of every component.
        weights: ``w``, ``(K,)`` float64, of sum one.
        dimension: ``d``.
    """

    means: Tensor
    variance: float
    weights: Tensor
    dimension: int

    def __init__(self, means: object, variance: float, weights: object, dimension: int) -> None:
        """Check and copy.

        Args:
            means: ``(K,)``.
            variance: > 0.
            weights: > 0, ``(K,)``; they are divided by their sum.
            dimension: number of coordinates.

        Raises:
            TypeError, ValueError: for arguments out of bounds.
        """
        share, size = positive_vector("weights", weights), positive_int("dimension", dimension)
        centre = real_vector("means", means, minimum=1)
        if len(centre) != len(share):
            raise ValueError(f"means must have one entry per weight, {len(share)}, got {len(centre)}")
        for name, value in (
            ("means", centre),
            ("variance", finite_float("variance", variance, low=0.0)),
            ("weights", share / share.sum()),
            ("dimension", size),
        ):
            object.__setattr__(self, name, value)

    def denoiser(self, schedule: NoiseSchedule = OU) -> Denoiser:
        """Exact denoiser of one coordinate, for states ``(B, 1)``."""
        return MixtureDenoiser(schedule, self.means[:, None], self.variance, self.weights)

    def density(self, x: Tensor, time: float, schedule: NoiseSchedule = OU) -> Tensor:
        """Density of one coordinate of the data noised up to a time, at points ``x (n,)``."""
        alpha, noise = self._levels(time, schedule)
        spread = alpha**2 * self.variance + noise
        parts = torch.exp(-(x[:, None] - alpha * self.means).square() / (2 * spread)) / math.sqrt(2 * math.pi * spread)
        return parts @ self.weights

    def sequential_kl(self, method: str | Integrator, grid: TimeGrid, *, schedule: NoiseSchedule = OU) -> float:
        """Divergence of the sequential sampler's result from the data noised up to the last time, all coordinates.

        The density ``p`` at a step becomes ``p'(y) = int p(x) N(y; a x + b D(x), c^2) dx``, by the trapezoidal rule.

        Args:
            method: an SDE method of ``sample_sequential``.
            grid: its times.
            schedule: its schedule.

        Raises:
            ValueError: if a step takes no noise, or so little that the line would need more than 200 000 points.
        """
        steps = integrator(method).steps(schedule, grid)
        x, density = self._propagate(steps, schedule)
        target = self.density(x, float(grid.times[-1]), schedule)
        spacing = float(x[1] - x[0])
        # Both terms of p ln(p/q) - p + q >= 0, so that what the quadrature loses of the masses does not count.
        held = density > 1e-300
        terms = torch.where(held, density * torch.log(density.clamp(min=1e-300) / target.clamp(min=1e-300)), 0.0)
        return self.dimension * float((terms - density + target).sum()) * spacing

    def parallel_kl(
        self, blocks: Blocks, iterations: int, *, samples: int, bins: int = 64, seed: Seed = 0
    ) -> tuple[float, float]:
        """Divergence of ``piadm_sde``'s result from the early-stopped data, all coordinates, estimated.

        Samples of one coordinate are counted in bins of equal probability under the target; the mean of what counting
        alone would show, ``(bins - 1)/(2 samples)``, is taken off.

        Args:
            blocks: partition of the OU horizon.
            iterations: Picard iterations per block.
            samples: number of samples.
            bins: number of bins; what is finer than they are is not seen.
            seed: of the samples.

        Returns:
            The estimate and its standard error, both times the dimension.

        Raises:
            TypeError, ValueError: for arguments out of bounds, and means so far apart, beside the width of the
                components, that the borders of the bins would not be found well.
        """
        instance("blocks", blocks, Blocks)
        positive_int("samples", samples)
        edges = self._quantiles(float(blocks.times[-1][-1]), positive_int("bins", bins, minimum=2))
        found = piadm_sde(
            self.denoiser(), (samples, 1), blocks=blocks, iterations=iterations, seed=seed, max_batch=_ROWS
        ).sample[:, 0]
        share = torch.bincount(torch.bucketize(found.double(), edges), minlength=bins).double() / samples
        held = share[share > 0]
        divergence = float((held * (held * bins).log()).sum()) - (bins - 1) / (2 * samples)
        spread = float((held * (held * bins).log().square()).sum()) / samples + (bins - 1) / (2 * samples**2)
        return self.dimension * divergence, self.dimension * math.sqrt(spread)

    def _levels(self, time: float, schedule: NoiseSchedule) -> tuple[float, float]:
        t = torch.tensor(time, dtype=torch.float64, device="cpu")
        return float(schedule.alpha(t)), float(schedule.sigma(t).square())

    def _half(self) -> float:
        """How far the line reaches to either side."""
        return float(self.means.abs().max()) + RANGE * math.sqrt(max(1.0, self.variance))

    def _line(self, spacing: float) -> Tensor:
        """Points that hold the data and the noise at every time, of a variance-preserving schedule."""
        half = self._half()
        count = 2 * math.ceil(half / spacing) + 1
        if count > _MOST_POINTS:
            raise ValueError(
                f"grid must have steps with more noise than a standard deviation of {PER_DEVIATION * spacing:g}, or "
                f"the line needs {count} points; end it earlier or take longer steps"
            )
        return torch.linspace(-half, half, count, dtype=torch.float64, device="cpu")

    def _propagate(self, steps: AffineSteps, schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
        """Points, and the density there after the last step."""
        a, b, c = steps.a[:, 0, 0].tolist(), steps.b[:, 0].tolist(), steps.c.sum((1, 2)).tolist()
        if min(c) <= 0:
            raise ValueError("method must be one whose every step takes noise, such as 'paper-sde', got one without")
        x = self._line(min(c) / PER_DEVIATION)
        spacing, denoiser = float(x[1] - x[0]), self.denoiser(schedule)
        density = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
        for j, time in enumerate(steps.times):
            moved = a[j] * x + b[j] * denoiser(x[:, None], time.expand(len(x)))[:, 0]
            density = _spread(density * spacing, moved, x, c[j])
        return x, density

    def _quantiles(self, time: float, bins: int) -> Tensor:
        """Inner borders of ``bins`` intervals of equal probability under the noised data, ``(bins - 1,)``."""
        spacing, (alpha, noise) = 2 * self._half() / _BIN_POINTS, self._levels(time, OU)
        width = math.sqrt(alpha**2 * self.variance + noise)
        if width < _BIN_PER_DEVIATION * spacing:
            raise ValueError(
                f"means must be within {_BIN_POINTS / (2 * _BIN_PER_DEVIATION):.0f} standard deviations of the noised "
                f"components, {width:g} each, got up to {float(self.means.abs().max()):g}"
            )
        x = self._line(spacing)
        mass = self.density(x, time).cumsum(0)
        wanted = torch.arange(1, bins, dtype=torch.float64, device="cpu") / bins * mass[-1]
        place = torch.searchsorted(mass, wanted).clamp(min=1)
        low, high = mass[place - 1], mass[place]
        # A cumulative sum of midpoint masses is the distribution at half a spacing further on.
        return x[place - 1] + (x[1] - x[0]) * ((wanted - low) / (high - low) + 0.5)


def _spread(mass: Tensor, centres: Tensor, x: Tensor, deviation: float) -> Tensor:
    """Density at the points ``x`` of masses at ``centres``, each spread as a Gaussian."""
    spacing, first = float(x[1] - x[0]), float(x[0])
    reach = math.ceil(REACH * deviation / spacing)
    held = mass > 1e-300
    nearest = ((centres[held] - first) / spacing).round().long()
    indices = nearest[:, None] + torch.arange(-reach, reach + 1, device="cpu")
    distance = (first + spacing * indices.double() - centres[held][:, None]) / deviation
    weights = torch.exp(-distance.square() / 2) * (mass[held][:, None] / (deviation * math.sqrt(2 * math.pi)))
    inside = (indices >= 0) & (indices < len(x))
    return torch.zeros_like(x).index_add_(0, indices[inside], weights[inside])
