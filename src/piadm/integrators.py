"""Integrators as the coefficients of one affine step, shared by sequential and parallel samplers.

A first-order sampler is affine in its state and in the denoised estimate ``D = x0_hat(x_j, t_j)``:

    x_{j+1} = a_j x_j + b_j D(x_j[0], t_j) + c_j xi_j,        xi_j ~ N(0, I)                       (1)

The state has ``s`` components per coordinate: one for diffusion samplers, two (position, velocity) for
the underdamped Langevin corrector.  The network reads the first component.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from piadm._checks import choice, described, float_field
from piadm.grid import TimeGrid
from piadm.schedule import NoiseSchedule


@dataclass(frozen=True)
class AffineSteps:
    """Coefficients of ``J`` steps of equation (1), float64 on the CPU.

    Attributes:
        times: schedule times of the network calls, shape ``(J,)``.
        a: state to state, shape ``(J, s, s)``.
        b: denoised estimate to state, shape ``(J, s)``.
        c: noise to state, shape ``(J, s, r)`` with ``r`` standard normals per step (0: deterministic).
    """

    times: Tensor
    a: Tensor
    b: Tensor
    c: Tensor

    @property
    def count(self) -> int:
        """Number of steps ``J``."""
        return len(self.times)

    @property
    def components(self) -> int:
        """Number of state components ``s``."""
        return self.a.shape[1]

    @property
    def normals(self) -> int:
        """Number of standard normals per step ``r``."""
        return self.c.shape[2]

    def own(self) -> tuple[Tensor, Tensor]:
        """What a step makes of its own state and its own denoised estimate, first components, each ``(J,)``."""
        return self.a[:, 0, 0], self.b[:, 0]

    def silent(self) -> AffineSteps:
        """The same steps without their noise."""
        return AffineSteps(self.times, self.a, self.b, self.c[..., :0])

    def part(self, first: int, last: int) -> AffineSteps:
        """Steps ``first .. last - 1``."""
        return AffineSteps(self.times[first:last], self.a[first:last], self.b[first:last], self.c[first:last])


@dataclass(frozen=True)
class MultistepSteps:
    """Coefficients of ``J`` steps that remember all before them, float64 on the CPU.

        x_{j+1} = sum_{i<=j} a_ji x_i + b_ji D(x_i, t_i) + c_ji xi_i,        xi_i ~ N(0, I)

    Equation (1) is the case of diagonal ``a``, ``b`` and ``c``.  The state has one component.

    Attributes:
        times: schedule times of the network calls, shape ``(J,)``.
        a: states to state, shape ``(J, J)``, lower triangular.
        b: denoised estimates to state, likewise.
        c: noises to state, shape ``(J, J, r)`` with ``r`` standard normals per step (0: deterministic).
    """

    times: Tensor
    a: Tensor
    b: Tensor
    c: Tensor

    @property
    def count(self) -> int:
        """Number of steps ``J``."""
        return len(self.times)

    @property
    def components(self) -> int:
        """Number of state components, one."""
        return 1

    @property
    def normals(self) -> int:
        """Number of standard normals per step ``r``."""
        return self.c.shape[2]

    def own(self) -> tuple[Tensor, Tensor]:
        """What a step makes of its own state and its own denoised estimate, each ``(J,)``."""
        return self.a.diagonal(), self.b.diagonal()

    def silent(self) -> MultistepSteps:
        """The same steps without their noise."""
        return MultistepSteps(self.times, self.a, self.b, self.c[..., :0])


Steps = AffineSteps | MultistepSteps


class Integrator(Protocol):
    """Turns a schedule and a grid into the coefficients of one affine step per grid interval."""

    def steps(self, schedule: NoiseSchedule, grid: TimeGrid) -> AffineSteps:
        """Coefficients of every step of ``grid``, of a state of one component."""
        ...


@dataclass(frozen=True)
class DataExponential:
    """Exponential integrator with the denoised estimate frozen over the step.

    With ``h = lambda_{j+1} - lambda_j``, ``lambda = ln(alpha/sigma)`` and ``k = sqrt(1 - eta^2 (1 - e^{-2h}))``:

        a = (sigma_{j+1}/sigma_j) k,   b = alpha_{j+1} (1 - e^{-h} k),   c = eta sigma_{j+1} sqrt(1 - e^{-2h})

    ``eta = 1`` is the reverse SDE (DDPM ancestral sampling), ``eta = 0`` the probability-flow ODE (DDIM).

    Args:
        eta: share of the noise, 0 <= eta <= 1.

    Reference: Song, Meng & Ermon 2021 (arXiv 2010.02502, eq. 12 and 16); Lu et al. 2022
        (arXiv 2211.01095, first-order SDE-DPM-Solver++).
    """

    eta: float

    def __post_init__(self) -> None:
        float_field(self, "eta", low=0.0, high=1.0, low_open=False, high_open=False)

    def steps(self, schedule: NoiseSchedule, grid: TimeGrid) -> AffineSteps:
        """Coefficients of every step of ``grid``; ``sigma = 0`` at the end and ``alpha = 0`` at the start work."""
        t = grid.times
        sigma, h = schedule.sigma(t), schedule.log_snr(t).diff() / 2
        drop = torch.expm1(-2 * h)
        log_k = 0.5 * torch.log1p(self.eta**2 * drop)
        a = sigma[1:] / sigma[:-1] * log_k.exp()
        b = -schedule.alpha(t[1:]) * torch.expm1(log_k - h)
        c = self.eta * sigma[1:] * (-drop).sqrt()
        return _scalar_steps(t, a, b, c, noisy=self.eta > 0)


@dataclass(frozen=True)
class ScoreExponential:
    """Exponential integrator with the score frozen over the step: the paper's own.

    On the Ornstein-Uhlenbeck clock, with step ``eps`` and ``e = e^{eps/2} - 1``, one step of
    ``dy = (y/2 + (1 + eta^2)/2 s) dt + eta dw`` is ``y' = e^{eps/2} y + (1 + eta^2) e s + eta sqrt(e^{eps}-1) xi``.
    With ``s = (alpha D - y)/sigma^2``:

        a = e^{eps/2} - (1 + eta^2) e/sigma^2,   b = (1 + eta^2) e alpha/sigma^2,   c = eta sqrt(e^{eps} - 1)

    Any other schedule is this process after a change of clock (``eps`` is a difference of
    ``ln(1 + sigma^2/alpha^2)``) and of scale (``x = sqrt(alpha^2 + sigma^2) y``).

    Args:
        eta: share of the noise; 1 is Algorithm 1 (SDE), 0 is Algorithm 2's predictor (ODE).

    Reference: Chen, Ren, Ying & Rotskoff 2024 (arXiv 2405.15986), Algorithms 1 and 2.
    """

    eta: float

    def __post_init__(self) -> None:
        float_field(self, "eta", low=0.0, high=1.0, low_open=False, high_open=False)

    def steps(self, schedule: NoiseSchedule, grid: TimeGrid) -> AffineSteps:
        """Coefficients of every step of ``grid``.

        Raises:
            ValueError: if alpha is 0 at the first time, where the score carries nothing about the data.
        """
        log_snr = schedule.log_snr(grid.times)
        if not log_snr[0].isfinite():
            raise ValueError(
                f"grid must start where alpha > 0 for the score-frozen integrator, got alpha = 0 at time "
                f"{grid.times[0].item():g}; start a little later or use method 'sde' or 'ode'"
            )
        alpha, variance, scale = variance_preserving(schedule, grid.times)
        eps = -torch.logaddexp(torch.zeros_like(log_snr), -log_snr).diff()
        drift = (1 + self.eta**2) * torch.expm1(eps / 2) / variance[:-1]
        a = scale[1:] / scale[:-1] * ((eps / 2).exp() - drift)
        b = scale[1:] * drift * alpha[:-1]
        c = self.eta * scale[1:] * torch.expm1(eps).sqrt()
        return _scalar_steps(grid.times, a, b, c, noisy=self.eta > 0)


def variance_preserving(schedule: NoiseSchedule, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(alpha, sigma^2, scale)`` of the variance-preserving process ``x / scale`` at times ``t``, float64."""
    alpha, sigma = schedule.levels(t)
    scale = torch.hypot(alpha, sigma)
    return alpha / scale, (sigma / scale).square(), scale


def _scalar_steps(times: Tensor, a: Tensor, b: Tensor, c: Tensor, *, noisy: bool) -> AffineSteps:
    """Steps of a one-component state from scalar coefficients of shape ``(J,)``."""
    return AffineSteps(times[:-1], a[:, None, None], b[:, None], c[:, None, None][..., : int(noisy)])


METHODS: dict[str, Integrator] = {
    "sde": DataExponential(1.0),
    "ode": DataExponential(0.0),
    "paper-sde": ScoreExponential(1.0),
    "paper-ode": ScoreExponential(0.0),
}


def integrator(method: str | Integrator) -> Integrator:
    """The integrator of that name, or the integrator object itself.

    Raises:
        TypeError, ValueError: if it is neither one of ``METHODS`` nor has a method ``steps``.
    """
    if not isinstance(method, type) and callable(getattr(method, "steps", None)):
        return method  # type: ignore[return-value]
    return METHODS[choice("method", method, tuple(METHODS))]  # type: ignore[index]


def steps_of(method: str | Integrator, schedule: NoiseSchedule, grid: TimeGrid) -> Steps:
    """Every step that a method makes of a grid, checked, float64 on the CPU.

    Raises:
        TypeError, ValueError: if it is no method, or its steps are not finite or not of a state of one component.
    """
    steps = integrator(method).steps(schedule, grid)
    if not isinstance(steps, (AffineSteps, MultistepSteps)):
        raise TypeError(f"method.steps(schedule, grid) must return a piadm.AffineSteps, got {described(steps)}")
    for name in ("times", "a", "b", "c"):
        numbers = getattr(steps, name)
        if not isinstance(numbers, Tensor) or numbers.is_complex() or not numbers.ndim:
            what = f"{name} = {described(numbers)}"
            raise TypeError(f"method.steps(schedule, grid) must return tensors of real numbers, got {what}")
    if (count := steps.count) == 0:
        raise ValueError("method.steps(schedule, grid) must return at least one step, got none")
    one, state = ((1,), (count, 1)) if isinstance(steps, AffineSteps) else ((), (count, count))
    shapes = {"times": (count,), "a": (*state, *one), "b": state, "c": (*state, steps.c.shape[-1])}
    for name, shape in shapes.items():
        table: Tensor = getattr(steps, name)
        if table.shape != shape or not bool(table.isfinite().all()):
            bad = table.numel() - int(table.isfinite().sum())
            raise ValueError(
                f"method.steps(schedule, grid) must return finite {name} of shape {shape}, got shape "
                f"{tuple(table.shape)} with {bad} entries that are NaN or infinite"
            )
    return replace(steps, **{name: getattr(steps, name).to("cpu", torch.float64) for name in shapes})
