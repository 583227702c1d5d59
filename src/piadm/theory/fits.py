"""Growth with the dimension: powers of d against polynomials in ln d, each with its error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from piadm._checks import finite_float, positive_int, real_vector
from piadm.theory.spectrum import positive_vector


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
        x: positive, at least three, two of them different.
        y: positive, one for each.

    Raises:
        TypeError, ValueError: naming the argument, what was received and what is accepted.
    """
    logs = _logs("x", x, points=3, different=2)
    return _least_squares(logs, _as_many("y", positive_vector("y", y), "x", len(logs)).log(), 1)


def log_polynomial_fit(d: Sequence[float], y: Sequence[float], degree: int = 2) -> Fit:
    """``y = sum_i c_i (ln d)^i``.

    Args:
        d: positive, at least ``degree + 2``, and all but one of these different.
        y: what grows, a number for each.
        degree: of the polynomial, at least 1.

    Raises:
        TypeError, ValueError: naming the argument, what was received and what is accepted.
    """
    number = positive_int("degree", degree)
    logs = _logs("d", d, points=number + 2, different=number + 1)
    return _least_squares(logs, _as_many("y", real_vector("y", y), "d", len(logs)), number)


def against_power(d: Sequence[float], y: Sequence[float], power: float) -> float:
    """Standard errors between the data and the nearest ``y = a + b d^p`` with ``p >= power``.

    With ``S(p)`` the least sum of squares over ``a`` and ``b`` for an exponent, ``p = 0`` being ``a + b ln d``:

        t = sqrt((n - 3) (min_{p >= power} S / min_p S - 1))

    which is Student's t with ``n - 3`` degrees of freedom if the truth is of that form.

    Args:
        d: positive, at least four, three of them different.
        y: what grows, a number for each.
        power: smallest exponent that is tried, from -1 to 2.

    Raises:
        TypeError, ValueError: naming the argument, what was received and what is accepted.
    """
    least = finite_float("power", power, low=-1.0, high=2.0, low_open=False, high_open=False)
    logs = _logs("d", d, points=4, different=3)
    values = _as_many("y", real_vector("y", y), "d", len(logs))
    tried = torch.linspace(-1, 2, 3001, dtype=torch.float64, device="cpu")
    tried = torch.cat([tried, tried.new_tensor([least])])
    tried = torch.where(tried.abs() < 1e-9, 1e-9, tried)
    slope = torch.expm1(tried[:, None] * logs) / tried[:, None]
    slope = slope - slope.mean(1, keepdim=True)
    values = values - values.mean()
    total = values.square().sum()
    if not total:
        return 0.0  # what does not grow is of every such form, with b = 0
    left = total - (slope @ values).square() / slope.square().sum(1)
    left = left.clamp(min=torch.finfo(left.dtype).eps * float(total))  # what rounding leaves of a perfect fit
    return math.sqrt(max(0.0, (len(logs) - 3) * float(left[tried >= least].min() / left.min() - 1)))


def last_exponent(d: Sequence[float], fit: Fit) -> float:
    """Local exponent ``d ln y/d ln d`` of a fitted polynomial in ln d, at the last of ``d``, all positive."""
    x, c = float(_logs("d", d, points=1, different=1)[-1]), fit.coefficients
    value = sum(coefficient * x**i for i, coefficient in enumerate(c))
    return sum(i * coefficient * x ** (i - 1) for i, coefficient in enumerate(c) if i) / value


def _logs(name: str, values: Sequence[float], *, points: int, different: int) -> Tensor:
    """Logarithms of at least so many positive numbers, of which at least so many are different."""
    logs = positive_vector(name, values, minimum=points).log()
    if (found := len(set(logs.tolist()))) < different:
        raise ValueError(f"{name} must have at least {different} different entries, got {found}")
    return logs


def _as_many(name: str, values: Tensor, other: str, count: int) -> Tensor:
    if len(values) != count:
        raise ValueError(f"{name} must have as many entries as {other}, {count}, got {len(values)}")
    return values


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
