"""Step coefficients against 50-digit formulas, their limits, and the order at which they reach the exact law."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import mpmath as mp
import pytest
import torch
from torch import Tensor

import piadm
from piadm.integrators import AffineSteps, DataExponential, Integrator, ScoreExponential
from piadm.models import GaussianDenoiser

OU, VP, COSINE = piadm.OUSchedule(), piadm.VPSchedule(0.1, 20.0), piadm.CosineSchedule()
VE, FLOW, TABLE = piadm.VESchedule(), piadm.FlowSchedule(), piadm.DiscreteSchedule.ddpm()
GRIDS: dict[str, tuple[piadm.NoiseSchedule, piadm.TimeGrid]] = {
    "ou-unequal": (OU, piadm.TimeGrid([9.0, 7.5, 7.4, 4.0, 3.9, 1.0, 0.3, 0.29, 0.01, 1e-3])),
    "ou-blocks": (OU, piadm.Blocks.paper(horizon=8.0, early_stop=1e-3, length=1.0, step=0.2).grid(OU)),
    "vp": (VP, piadm.TimeGrid.uniform(VP, 100)),
    "vp-log-snr": (VP, piadm.TimeGrid.log_snr(VP, 100)),
    "cosine": (COSINE, piadm.TimeGrid.uniform(COSINE, 100)),  # starts at alpha = 0
    "ve": (VE, piadm.TimeGrid.log_snr(VE, 100)),
    "flow": (FLOW, piadm.TimeGrid.uniform(FLOW, 100)),  # starts at alpha = 0, ends at sigma = 0
    "flow-one-step": (FLOW, piadm.TimeGrid([1.0, 0.0])),
    "ddpm-50": (TABLE, piadm.TimeGrid.ddpm(TABLE, 50)),  # ends at sigma = 0
    "ddpm-1000": (TABLE, piadm.TimeGrid.ddpm(TABLE, 1000)),
}
Pair = tuple[mp.mpf, mp.mpf]
Formula = Callable[[Pair, Pair, float], tuple[mp.mpf, mp.mpf, mp.mpf]]


def levels(schedule: piadm.NoiseSchedule, t: float) -> Pair:
    """``(alpha, sigma)`` from the definitions of the schedules, in the precision of mpmath."""
    t = mp.mpf(t)
    if schedule is VE:
        return mp.mpf(1), t
    if schedule is FLOW:
        return 1 - t, t
    if schedule is OU:
        alpha = mp.exp(-t / 2)
    elif schedule is VP:
        alpha = mp.exp(-(mp.mpf(0.1) * t + (mp.mpf(20) - mp.mpf(0.1)) * t**2 / 2) / 2)
    elif schedule is COSINE:
        s = mp.mpf(0.008)
        alpha = mp.sin(mp.pi / 2 * (1 - t) / (1 + s)) / mp.cos(mp.pi / 2 * s / (1 + s))
    else:
        alpha = mp.sqrt(mp.mpf(TABLE.alphas_cumprod[int(t)].item())) if t >= 0 else mp.mpf(1)
    return alpha, mp.sqrt(1 - alpha**2)


def eq_1(start: Pair, end: Pair, eta: float) -> tuple[mp.mpf, mp.mpf, mp.mpf]:
    """``(a, b, c)`` of the reverse SDE (eta = 1) and the probability-flow ODE (eta = 0), with ``shrink = e^{-h}``."""
    (alpha, sigma), (alpha_next, sigma_next) = start, end
    shrink = sigma_next * alpha / (alpha_next * sigma)
    if eta == 1.0:
        drop = 1 - shrink**2
        return sigma_next / sigma * shrink, alpha_next * drop, sigma_next * mp.sqrt(drop)
    return sigma_next / sigma, alpha_next * (1 - shrink), mp.mpf(0)


def ddim(start: Pair, end: Pair, eta: float) -> tuple[mp.mpf, mp.mpf, mp.mpf]:
    """``(a, b, c)`` from what defines them: the forward process' posterior, its noise scaled by eta.

    The noise of ``x`` given ``x'`` has variance ``s2 = sigma^2 - (alpha/alpha')^2 sigma'^2``; Bayes' rule gives ``x'``
    given ``x`` and the data the variance ``sigma'^2 s2/sigma^2``.  The direction of the predicted noise takes the rest.
    """
    (alpha, sigma), (alpha_next, sigma_next) = start, end
    c = eta * sigma_next * mp.sqrt(sigma**2 - (alpha / alpha_next * sigma_next) ** 2) / sigma
    a = mp.sqrt(sigma_next**2 - c**2) / sigma
    return a, alpha_next - alpha * a, c


def paper(start: Pair, end: Pair, eta: float) -> tuple[mp.mpf, mp.mpf, mp.mpf]:
    """``(a, b, c)`` of the paper's step on the OU clock and scale, carried over to the schedule's scale."""
    scales = [mp.hypot(alpha, sigma) for alpha, sigma in (start, end)]
    clocks = [mp.log(1 + (sigma / alpha) ** 2) for alpha, sigma in (start, end)]
    alpha, sigma = start[0] / scales[0], start[1] / scales[0]
    eps = clocks[0] - clocks[1]
    weight = (1 + mp.mpf(eta) ** 2) * mp.expm1(eps / 2)  # of the score (alpha D - y)/sigma^2
    y_to_y = mp.exp(eps / 2) - weight / sigma**2
    a, b, c = y_to_y, weight * alpha / sigma**2, eta * mp.sqrt(mp.expm1(eps))
    return scales[1] / scales[0] * a, scales[1] * b, scales[1] * c


def worst(name: str, integrator: Integrator, formula: Formula, eta: float) -> float:
    """Largest relative error of any coefficient of a grid, in units of the step's conditioning (see ``CONDITIONED``).

    The paper's ``a`` is a difference; its error is relative to the term that is taken away, where that is larger.
    """
    schedule, grid = GRIDS[name]
    steps, found = integrator.steps(schedule, grid), 0.0
    rows = [steps.a[:, 0, 0], steps.b[:, 0], steps.c.sum((1, 2))]  # no noise column: zero
    with mp.workdps(50):
        ends = [levels(schedule, t) for t in grid.times.tolist()]
        for j in range(grid.steps):
            (alpha, sigma), (alpha_next, sigma_next) = ends[j], ends[j + 1]
            finite = alpha > 0 and sigma_next > 0
            size = max(1.0, *(abs(2 * mp.log(p / q)) for p, q in ends[j : j + 2])) if finite else 1.0
            h = mp.log(alpha_next * sigma / (sigma_next * alpha)) if finite else mp.inf
            a, b, c = formula(ends[j], ends[j + 1], eta)
            taken = b / alpha if formula is paper else 0
            for row, want, scale in zip(rows, (a, b, c), (max(abs(a), taken), b, c), strict=True):
                error = abs(mp.mpf(row[j].item()) - want)
                assert scale != 0 or error == 0
                found = max(found, float(error / scale / size * min(mp.mpf(1), h))) if scale != 0 else found
    return found


# log-SNR is good to a few roundings of max(1, |log_snr|), and its difference h is what the coefficients are made
# of: their relative error is a few roundings times max(1, |log_snr|)/min(1, h), a factor of up to 2000 on these
# grids (1000 steps of DDPM).  Reached were 7e-16 times that; the bound, 1e-11 in all, leaves room for other libm's.
CONDITIONED = 5e-15


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize(("formula", "eta"), [(eq_1, 1.0), (eq_1, 0.0), (ddim, 1.0), (ddim, 0.5), (ddim, 0.0)])
def test_data_exponential_is_equation_1_and_ddim(name: str, formula: Formula, eta: float) -> None:
    assert worst(name, DataExponential(eta), formula, eta) <= CONDITIONED


@pytest.mark.parametrize("name", ["ou-unequal", "ou-blocks", "vp", "ve", "ddpm-50", "ddpm-1000"])
@pytest.mark.parametrize("eta", [1.0, 0.5, 0.0])
def test_score_exponential_is_the_papers_step(name: str, eta: float) -> None:
    assert worst(name, ScoreExponential(eta), paper, eta) <= CONDITIONED


@pytest.mark.parametrize("schedule", [FLOW, COSINE], ids=["flow", "cosine"])
@pytest.mark.parametrize("eta", [1.0, 0.5, 0.0])
def test_pure_noise_at_the_start_gives_a_finite_first_step(schedule: piadm.NoiseSchedule, eta: float) -> None:
    grid = piadm.TimeGrid.uniform(schedule, 10)
    assert schedule.alpha(grid.times[0]) == 0
    steps = DataExponential(eta).steps(schedule, grid)
    assert torch.cat([steps.a.flatten(), steps.b.flatten(), steps.c.flatten()]).isfinite().all()
    # Nothing of the data is in the state yet: the first step scales the noise and adds the estimate as it is.
    alpha, sigma = (float(level(grid.times[1])) for level in (schedule.alpha, schedule.sigma))
    first = steps.a[0].item(), steps.b[0].item(), steps.c[0].sum().item()
    assert first == pytest.approx((sigma * math.sqrt(1 - eta**2), alpha, eta * sigma), rel=1e-15, abs=0)  # rounding


def test_the_papers_step_refuses_to_start_at_pure_noise() -> None:
    with pytest.raises(ValueError, match="grid must start where alpha > 0"):
        ScoreExponential(1.0).steps(FLOW, piadm.TimeGrid.uniform(FLOW, 10))


@pytest.mark.parametrize("grid", ["ddpm-50", "flow"])
@pytest.mark.parametrize("method", ["sde", "ode", DataExponential(0.5)], ids=str)
def test_the_last_step_to_clean_data_lands_on_the_denoised_estimate(grid: str, method: str | Integrator) -> None:
    schedule, times = GRIDS[grid]
    denoiser = GaussianDenoiser(schedule, torch.tensor([0.3, -1.0], dtype=torch.float64), 0.2)
    states = sequential(denoiser, times, method, torch.eye(2, dtype=torch.float64))
    estimate = denoiser(states[-2], times.times[-2].expand(2))
    assert torch.equal(states[-1], estimate * schedule.alpha(times.times[-1]))


# What follows is for Gaussian data N(MEAN, C), where everything has a closed form.  Along each eigenvector of C the
# noised data has variance s^2 = alpha^2 lam + sigma^2, and D(x) = m + (alpha lam/s^2)(x - alpha m) is affine.
MEAN = torch.tensor([1.0, -0.5], dtype=torch.float64)
EIGENVALUES = torch.tensor([0.1, 2.0], dtype=torch.float64)
ROTATION = torch.tensor([[0.8, -0.6], [0.6, 0.8]], dtype=torch.float64)
COVARIANCE = ROTATION @ EIGENVALUES.diag() @ ROTATION.T


def even(kind: str, steps: int) -> tuple[piadm.NoiseSchedule, piadm.TimeGrid]:
    """Grids of steps of equal length in log-SNR, or in OU time."""
    if kind == "ou":
        return OU, piadm.TimeGrid.uniform(OU, steps, 4.0, 0.05)
    schedule, start, end = {"vp": (VP, 1.0, 0.05), "flow": (FLOW, 0.99, 0.05), "ve": (VE, 20.0, 0.1)}[kind]
    return schedule, piadm.TimeGrid.log_snr(schedule, steps, start, end)


def sequential(
    denoiser: piadm.Denoiser, grid: piadm.TimeGrid, method: object, initial: Tensor, noise: Tensor | None = None
) -> Tensor:
    """States at every step, ``(J + 1, B, 2)``."""
    solution = piadm.sample_sequential(
        denoiser, tuple(initial.shape), grid=grid, method=method, initial=initial, noise=noise, return_states=True
    )  # fmt: skip
    assert solution.states is not None
    return solution.states


def marginal(schedule: piadm.NoiseSchedule, times: Tensor) -> tuple[Tensor, Tensor]:
    """Exact mean and variance along the eigenvectors at every time, each ``(J + 1, 2)``."""
    alpha, sigma = schedule.alpha(times)[:, None], schedule.sigma(times)[:, None]
    return alpha * (MEAN @ ROTATION), alpha.square() * EIGENVALUES + sigma.square()


def chain(schedule: piadm.NoiseSchedule, steps: AffineSteps, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Exact mean and variance of the numerical chain at every step, along the eigenvectors: an affine recurrence."""
    means, variances = [mean], [variance]
    centre = MEAN @ ROTATION
    for t, a, b, c in zip(steps.times, steps.a[:, 0, 0], steps.b[:, 0], steps.c.sum((1, 2)), strict=True):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        slope = alpha * EIGENVALUES / (alpha.square() * EIGENVALUES + sigma.square())
        factor = a + b * slope
        means.append(factor * means[-1] + b * (1 - alpha * slope) * centre)
        variances.append(factor.square() * variances[-1] + c.square())
    return torch.stack(means), torch.stack(variances)


def order(errors: list[float]) -> float:
    """Order of convergence from the errors at a step size and at half of it."""
    return math.log2(errors[0] / errors[1])


# The error is C h + C' h^2 + ..., so the measured order is off by a multiple of h.  Measured on these grids: 0.91 to
# 1.05.  A wrong coefficient (order 0), or a law that is not the one claimed, is far outside.
NEAR_ONE = pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize("case", ["ode vp", "ode flow", "ode ve", "ode ou", "paper-ode ou"])
def test_ode_methods_converge_to_the_exact_flow_with_order_one(case: str) -> None:
    # dx/dt = f x - (g^2/2) grad log p carries y = x - alpha m as dy/dt = (f + g^2/(2 s^2)) y, and s^2 itself obeys
    # d ln s^2/dt = 2 f + g^2/s^2: so y/s is constant, x_end = alpha_end m + (s_end/s_start)(x_start - alpha_start m).
    initial = torch.tensor([[1.0, 2.0], [-3.0, 0.5], [0.0, 0.0]], dtype=torch.float64)
    (method, kind), errors = case.split(), []
    for count in (128, 256):
        schedule, grid = even(kind, count)
        mean, variance = marginal(schedule, grid.times[[0, -1]])
        want = (mean[1] + (variance[1] / variance[0]).sqrt() * (initial @ ROTATION - mean[0])) @ ROTATION.T
        got = sequential(GaussianDenoiser(schedule, MEAN, COVARIANCE), grid, method, initial)[-1]
        errors.append(float((got - want).norm()))
    assert order(errors) == NEAR_ONE


every_eta = pytest.mark.parametrize(
    ("integrator", "kind"),
    [(DataExponential(eta), kind) for eta in (1.0, 0.5, 0.0) for kind in ("vp", "flow", "ve", "ou")]
    + [(ScoreExponential(eta), "ou") for eta in (1.0, 0.5, 0.0)],
    ids=str,
)


@every_eta
def test_the_marginals_are_those_of_the_forward_process_whatever_eta(
    integrator: DataExponential | ScoreExponential, kind: str
) -> None:
    errors = []
    for count in (128, 256):
        schedule, grid = even(kind, count)
        mean, variance = marginal(schedule, grid.times)
        means, variances = chain(schedule, integrator.steps(schedule, grid), mean[0], variance[0])
        errors.append(float((variances / variance - 1).abs().max()))
        # At x = alpha m the estimate is m at every time, and a step is exact: only rounding is left, measured 2e-15.
        assert torch.allclose(means, mean, rtol=0, atol=1e-13)
    assert order(errors) == NEAR_ONE


@every_eta
def test_the_transition_from_a_point_converges_with_order_one(
    integrator: DataExponential | ScoreExponential, kind: str
) -> None:
    # y = x - alpha m obeys dy = (f + (1 + eta^2) g^2/(2 s^2)) y dt + noise.  With the equation of s^2 above,
    # g^2/(2 s^2) dt = d ln(s/alpha): from time 0 on, y shrinks by (s/s_0) ((s/alpha)/(s_0/alpha_0))^(eta^2), and what
    # this leaves of the marginal variance s^2 is the noise's.  For eta = 0 that is nothing.
    # One case is exact: DDPM's mean is E[x' | x] itself, as E[x' | x, x_0] is affine in x_0 and D = E[x_0 | x].
    errors: list[list[float]] = [[], []]
    for count in (128, 256):
        schedule, grid = even(kind, count)
        mean, variance = marginal(schedule, grid.times)
        spread, alpha = variance.sqrt(), schedule.alpha(grid.times)[:, None]
        factor = spread / spread[0] * (spread / alpha / (spread[0] / alpha[0])) ** integrator.eta**2
        away = 2 * spread[0]
        start = mean[0] + away, torch.zeros_like(away)
        means, variances = chain(schedule, integrator.steps(schedule, grid), *start)
        errors[0].append(float(((means - mean - factor * away) / spread).abs().max()))
        errors[1].append(float(((variances + factor.square() * variance[0]) / variance - 1).abs().max()))
    exact = [integrator == DataExponential(1.0), integrator.eta == 0]
    for pair, to_rounding in zip(errors, exact, strict=True):
        assert max(pair) <= 1e-12 if to_rounding else order(pair) == NEAR_ONE  # 256 steps of a few roundings


@pytest.mark.parametrize("method", ["sde", "paper-sde", DataExponential(0.5)], ids=["sde", "paper-sde", "half"])
@pytest.mark.parametrize("kind", ["vp", "ou"])
def test_the_sampler_has_the_mean_and_covariance_of_the_affine_chain(method: str | Integrator, kind: str) -> None:
    # The state is affine in (initial, noise).  One row of zeros, one per unit vector of the initial state and one
    # per unit impulse of noise give the whole map, so moments without a Monte-Carlo error.
    count = 24
    schedule, grid = even(kind, count)
    mean, variance = marginal(schedule, grid.times[:1])
    rows = 1 + 2 + 2 * count
    initial, noise = torch.zeros(rows, 2, dtype=torch.float64), torch.zeros(count, rows, 2, dtype=torch.float64)
    initial[1:3] = variance[0].sqrt()[:, None] * ROTATION.T
    initial += ROTATION @ mean[0]
    noise[:, 3:] = torch.eye(2 * count, dtype=torch.float64).view(count, 2, 2 * count).mT
    states = sequential(GaussianDenoiser(schedule, MEAN, COVARIANCE), grid, method, initial, noise) @ ROTATION
    response = states[:, 1:] - states[:, :1]
    covariances = response.mT @ response
    means, variances = chain(schedule, piadm.integrators.integrator(method).steps(schedule, grid), mean[0], variance[0])
    # A few hundred roundings of numbers of order one; reached: 2e-15.
    assert torch.allclose(states[:, 0], means, rtol=0, atol=1e-13)
    assert torch.allclose(covariances, torch.diag_embed(variances), rtol=0, atol=1e-13)


def test_a_step_may_take_several_normals() -> None:
    grid = even("vp", 24)[1]
    one = DataExponential(1.0).steps(VP, grid)
    both = SimpleNamespace(steps=lambda *given: replace(one, c=torch.cat([0.6 * one.c, 0.8 * one.c], dim=2)))
    noise = torch.randn(24, 2, 3, 4, dtype=torch.float64)
    def last(sampler: Callable[..., piadm.Solution], method: object, noise: Tensor) -> Tensor:
        return sampler(GaussianDenoiser(VP), (3, 4), method=method, grid=grid, noise=noise).sample

    mixed = last(piadm.sample_sequential, "sde", 0.6 * noise[:, 0] + 0.8 * noise[:, 1])
    for sampler in (piadm.sample_sequential, piadm.sample):
        torch.testing.assert_close(last(sampler, both, noise.flatten(0, 1)), mixed, rtol=0, atol=1e-12)
