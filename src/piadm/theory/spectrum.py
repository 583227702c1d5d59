"""What is assumed of the data: independent Gaussian modes, each repeated, or only bounds of their variance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, final

import numpy as np
import torch
from torch import Tensor

from piadm._checks import finite_float, float_field, positive_int, real_vector
from piadm.schedule import NoiseSchedule, OUSchedule
from piadm.theory.law import Law

OU = OUSchedule()

_MOST_DIMENSIONS = 10**15  # beyond, a float64 sum over the modes has no digits left
_BOUND_POINTS = 9  # variances tried between the bounds; the worst of them stands for all
_QUADRATURE = 1e-8  # relative error of sums over modes


class Modes(Protocol):
    """Gaussian modes ``N(mean_i, variance_i)`` and how a figure of each makes a figure of all."""

    @property
    def variances(self) -> Tensor:
        """Variance of each mode, ``(m,)`` float64."""
        ...

    @property
    def means(self) -> Tensor:
        """Mean of each mode, ``(m,)`` float64."""
        ...

    @property
    def dimension(self) -> int:
        """Number of coordinates ``d`` of the data."""
        ...

    def total(self, per_mode: Tensor) -> Tensor:
        """Sum over all coordinates of a figure of each mode ``(..., m)``, shape ``(...)``."""
        ...


def noised(modes: Modes, schedule: NoiseSchedule, time: float | Tensor) -> Law:
    """Law of the noised data at a time: ``N(alpha mean, alpha^2 variance + sigma^2)`` per mode, ``(..., m)``."""
    t = torch.as_tensor(time, dtype=torch.float64, device="cpu")[..., None]
    alpha, sigma = schedule.levels(t)
    return Law(alpha * modes.means, alpha.square() * modes.variances + sigma.square())


@final
@dataclass(frozen=True, eq=False, init=False)
class Spectrum:
    """Gaussian data: eigenvalues of the covariance with multiplicities, and the mean along each.

    Attributes:
        variances: eigenvalues, in the squared units of the data, ``(m,)`` float64.
        counts: how many coordinates have each, ``(m,)`` float64; they need not be whole numbers.
        means: mean of these coordinates, ``(m,)`` float64.
    """

    variances: Tensor
    counts: Tensor
    means: Tensor

    def __init__(self, variances: object, counts: object, means: object = None) -> None:
        """Check and copy the modes.

        Args:
            variances: eigenvalues > 0, ``(m,)``.
            counts: multiplicities > 0, ``(m,)``.
            means: mean of each, ``(m,)``; None: zero.

        Raises:
            TypeError, ValueError: if one is no vector of finite real numbers, of another length, or not positive.
        """
        lam, weight = positive_vector("variances", variances), positive_vector("counts", counts)
        mean = torch.zeros_like(lam) if means is None else real_vector("means", means, minimum=1)
        for name, vector in (("counts", weight), ("means", mean)):
            if len(vector) != len(lam):
                raise ValueError(f"{name} must have one entry per variance, {len(lam)}, got {len(vector)}")
        if float(weight.sum()) > _MOST_DIMENSIONS:
            raise ValueError(f"counts must add up to at most {_MOST_DIMENSIONS:g}, got {float(weight.sum()):g}")
        for name, value in (("variances", lam), ("counts", weight), ("means", mean)):
            object.__setattr__(self, name, value)

    @classmethod
    def repeated(cls, values: object, dimension: int, means: object = None) -> Spectrum:
        """Eigenvalues that share the coordinates equally, each ``dimension/len`` times.

        Args:
            values: eigenvalues > 0, ``(m,)``.
            dimension: number of coordinates ``d``.
            means: mean of each, ``(m,)``; None: zero.

        Raises:
            TypeError, ValueError: for values that are not positive and finite, or a dimension below 1.
        """
        lam = positive_vector("spectrum", values)
        d = positive_int("dimension", dimension, maximum=_MOST_DIMENSIONS)
        return cls(lam, torch.full_like(lam, d / len(lam)), means)

    @classmethod
    def two_level(cls, low: float, high: float, share: float, dimension: int) -> Spectrum:
        """Data near a subspace: variance ``high`` on a share of the coordinates, ``low`` on the others.

        Args:
            low: variance across the subspace, > 0.
            high: variance along it, > 0.
            share: share of the coordinates that lie along it, 0 < share < 1.
            dimension: number of coordinates ``d``.

        Raises:
            TypeError, ValueError: for arguments out of bounds.
        """
        part = finite_float("share", share, low=0.0, high=1.0)
        d = positive_int("dimension", dimension, maximum=_MOST_DIMENSIONS)
        levels = [finite_float("low", low, low=0.0), finite_float("high", high, low=0.0)]
        return cls(levels, [(1 - part) * d, part * d])

    @classmethod
    def power_law(cls, power: float, dimension: int, *, top: float = 1.0, ratio: float = 100.0) -> Spectrum:
        """Eigenvalues ``top q^-power`` of a rank ``q`` from 1 to ``ratio^(1/power)``, as natural images have them.

        The continuum of ranks is represented by 24 ranks, the midpoints of equal shares of the coordinates.

        Args:
            power: exponent > 0.
            dimension: number of coordinates ``d``.
            top: largest eigenvalue, > 0.
            ratio: largest over smallest eigenvalue, > 1.

        Raises:
            TypeError, ValueError: for arguments out of bounds.
        """
        p = finite_float("power", power, low=0.0)
        last = finite_float("ratio", ratio, low=1.0) ** (1 / p)
        ranks = 1 + (last - 1) * (torch.arange(24, dtype=torch.float64, device="cpu") + 0.5) / 24
        return cls.repeated(finite_float("top", top, low=0.0) * ranks**-p, dimension)

    @property
    def dimension(self) -> int:
        """Number of coordinates ``d``."""
        return round(float(self.counts.sum()))

    @property
    def average(self) -> float:
        """Average eigenvalue ``tr C / d``: what a measured variance of all coordinates comes to, for one mean."""
        return float(self.counts @ self.variances / self.counts.sum())

    def total(self, per_mode: Tensor) -> Tensor:
        """``sum_i counts_i figure_i``."""
        return per_mode @ self.counts

    def condensed(self) -> Spectrum:
        """Fewer modes for the same sums over smooth figures: the nodes and weights of Gauss in ``ln variance``.

        What a sampler makes of a mode is smooth in ``ln variance``, with no singularity nearer than ``i pi``, where a
        noised variance would be zero.  Half of that distance gives the number of nodes: the error falls like
        ``rho^(-2n)``, with ``rho`` the sum of the half axes of the ellipse about the eigenvalues that reaches so far.
        Modes with means, and those that are few already, stay as they are.

        Reference: Golub and Welsch 1969, Calculation of Gauss quadrature rules; Trefethen 2013, theorem 19.3.
        """
        if bool(self.means.any()):
            return self
        levels, place = np.unique(self.variances.log().numpy(), return_inverse=True)
        values, counts = torch.from_numpy(levels), torch.from_numpy(np.bincount(place, self.counts.numpy()))
        half = float(values[-1] - values[0]) / 2
        nodes = math.ceil(-math.log(_QUADRATURE) / 2 / math.asinh(math.pi / 2 / half)) if half else 1
        if len(values) > nodes:
            values, counts = _gauss(values, counts, nodes)
        return Spectrum(values.exp(), counts)


@final
@dataclass(frozen=True)
class VarianceBounds:
    """Data of which only bounds are known: in every direction a variance between ``low`` and ``high``.

    Every coordinate is taken to have the variance that is worst for the figure in question: a bound for all
    spectra within the bounds.

    Args:
        low: smallest variance, > 0; a score with Lipschitz constant ``L`` at the data has ``low = 1/L``.
        high: largest variance, >= ``low``.
        dimension: number of coordinates ``d``.

    Raises:
        TypeError, ValueError: for arguments out of bounds.
    """

    low: float
    high: float
    dimension: int

    def __post_init__(self) -> None:
        float_field(self, "low", low=0.0)
        float_field(self, "high", low=self.low, low_open=False)
        positive_int("dimension", self.dimension, maximum=_MOST_DIMENSIONS)

    @property
    def variances(self) -> Tensor:
        """Variances from ``low`` to ``high``, evenly in their logarithm."""
        low, high = math.log(self.low), math.log(self.high)
        return torch.linspace(low, high, _BOUND_POINTS, dtype=torch.float64, device="cpu").exp()

    @property
    def means(self) -> Tensor:
        """Zeros."""
        return torch.zeros_like(self.variances)

    def total(self, per_mode: Tensor) -> Tensor:
        """``d max_i figure_i``."""
        return self.dimension * per_mode.amax(-1)


def positive_vector(name: str, value: object, minimum: int = 1) -> Tensor:
    """Return a vector of at least ``minimum`` positive numbers, float64.

    Raises:
        TypeError, ValueError: if it is no vector of finite real numbers, or one of them is not positive.
    """
    vector = real_vector(name, value, minimum)
    if bool((vector <= 0).any()):
        raise ValueError(f"{name} must be positive, got {float(vector.min()):g}")
    return vector


def _gauss(points: Tensor, weights: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights with which sums of polynomials of degree below ``2 count`` over weighted points are exact.

    They are the eigenvalues of the Jacobi matrix, which Lanczos' iteration finds from the points, and the squares of
    its eigenvectors' first components.
    """
    centre = (points[0] + points[-1]) / 2
    mass, basis = weights.sum(), [(weights / weights.sum()).sqrt()]
    jacobi = points.new_zeros(count, count)
    for k in range(count):
        following = (points - centre) * basis[k]
        jacobi[k, k] = following @ basis[k]
        kept = torch.stack(basis)
        for _ in range(2):  # once more, for what rounding leaves
            following = following - kept.T @ (kept @ following)
        if k + 1 < count:
            jacobi[k, k + 1] = jacobi[k + 1, k] = length = following.norm()
            basis.append(following / length)
    nodes, vectors = torch.linalg.eigh(jacobi)
    return centre + nodes, mass * vectors[0].square()
