"""Growth with the dimension: powers of d against polynomials in ln d, each with its error."""

from __future__ import annotations

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
    return _least_squares(_log(d), torch.tensor(y, dtype=torch.float64), degree)


def last_exponent(d: Sequence[float], fit: Fit) -> float:
    """Local exponent ``d ln y/d ln d`` of a fitted polynomial in ln d, at the last of ``d``."""
    x, c = float(_log(d)[-1]), fit.coefficients
    value = sum(coefficient * x**i for i, coefficient in enumerate(c))
    return sum(i * coefficient * x ** (i - 1) for i, coefficient in enumerate(c) if i) / value


def _log(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).log()


def _least_squares(x: Tensor, y: Tensor, degree: int) -> Fit:
    """Fit of a polynomial; errors from the residuals, as if these were independent and of one size."""
    design = x[:, None] ** torch.arange(degree + 1)
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
