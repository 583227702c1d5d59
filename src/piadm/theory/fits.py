"""Growth with the dimension: powers of d against polynomials in ln d, each with its error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Fit:
    """A linear least-squares fit.

    Attributes:
        coefficients: constant first; of a power law its logarithm, then the exponent.
        errors: their standard errors.
        r_squared: share of the variance that is explained, 1 for a perfect fit.
        residual: root mean square of what is left, in the units of what was fitted.
    """

    coefficients: tuple[float, ...]
    errors: tuple[float, ...]
    r_squared: float
    residual: float


def power_fit(x: Sequence[float], y: Sequence[float]) -> Fit:
    """``y = C x^p``: coefficients ``(ln C, p)``; residual and R^2 are those of ``ln y``.

    Args:
        x: positive, at least three.
        y: positive.
    """
    return _least_squares(_log(x), _log(y), 1)


def log_polynomial_fit(d: Sequence[float], y: Sequence[float], degree: int = 2) -> Fit:
    """``y = sum_i c_i (ln d)^i``.

    Args:
        d: positive, more than ``degree + 1``.
        y: what grows.
        degree: of the polynomial.
    """
    return _least_squares(_log(d), _vector(y), degree)


def against_power(d: Sequence[float], y: Sequence[float], power: float) -> float:
    """Standard errors between the data and the nearest ``y = a + b d^p`` with ``p >= power``.

    With ``S(p)`` the least sum of squares over ``a`` and ``b`` for an exponent, ``p = 0`` being ``a + b ln d``:

        t = sqrt((n - 3) (min_{p >= power} S / min_p S - 1))

    which is Student's t with ``n - 3`` degrees of freedom if the truth is of that form.

    Args:
        d: positive, more than three.
        y: what grows.
        power: smallest exponent that is tried, between -1 and 2.
    """
    logs, values = _log(d), _vector(y)
    tried = torch.cat([torch.linspace(-1, 2, 3001, dtype=torch.float64, device="cpu"), _vector([power])])
    tried = torch.where(tried.abs() < 1e-9, 1e-9, tried)
    slope = torch.expm1(tried[:, None] * logs) / tried[:, None]
    slope = slope - slope.mean(1, keepdim=True)
    values = values - values.mean()
    left = values.square().sum() - (slope @ values).square() / slope.square().sum(1)
    return math.sqrt(max(0.0, (len(d) - 3) * float(left[tried >= power].min() / left.min() - 1)))


def last_exponent(d: Sequence[float], fit: Fit) -> float:
    """Local exponent ``d ln y/d ln d`` of a fitted polynomial in ln d, at the last of ``d``."""
    x, c = float(_log(d)[-1]), fit.coefficients
    value = sum(coefficient * x**i for i, coefficient in enumerate(c))
    return sum(i * coefficient * x ** (i - 1) for i, coefficient in enumerate(c) if i) / value


def _vector(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def _log(values: Sequence[float]) -> Tensor:
    return _vector(values).log()


def _least_squares(x: Tensor, y: Tensor, degree: int) -> Fit:
    """Fit of a polynomial; errors from the residuals, as if these were independent and of one size."""
    design = x[:, None] ** torch.arange(degree + 1, device="cpu")
    solution = torch.linalg.lstsq(design, y[:, None]).solution[:, 0]
    left = y - design @ solution
    freedom = max(1, len(y) - degree - 1)
    covariance = torch.linalg.pinv(design.T @ design, hermitian=True) * float(left.square().sum()) / freedom
    spread = float((y - y.mean()).square().sum())
    return Fit(
        coefficients=tuple(solution.tolist()),
        errors=tuple(covariance.diagonal().clamp(min=0).sqrt().tolist()),
        r_squared=1 - float(left.square().sum()) / spread if spread else 1.0,
        residual=float(left.square().mean().sqrt()),
    )
