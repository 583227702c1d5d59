"""Exact laws: those of the samplers themselves, fed with unit vectors; distances; the divergence of whole paths."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import piadm
from piadm import theory
from piadm.integrators import ScoreExponential
from piadm.models import GaussianDenoiser
from piadm.theory.law import Law

# A sampler run on unit vectors shows its law to the rounding of a few hundred float64 operations; 6e-15 was reached.
EXACT = 1e-12
VARIANCES, MEANS = [0.05, 0.3, 1.0, 3.0], [0.5, -1.0, 0.0, 2.0]
SPECTRUM = theory.Spectrum(VARIANCES, [1.0, 2.0, 3.0, 4.0], MEANS)
BLOCKS = piadm.Blocks.paper(horizon=4.0, early_stop=0.05, length=1.5, step=0.1)
CORRECTOR = piadm.Corrector(duration=0.5, length=0.25, step=0.05, iterations=3, friction=1.5)
SCHEDULES = [piadm.OUSchedule(), piadm.VPSchedule(), piadm.VESchedule()]
Sampler = Callable[..., piadm.Solution]


def law_of(sampler: Sampler, schedule: piadm.NoiseSchedule, normals: int, **given: object) -> Law:
    """Mean and variance of a sampler's result, without chance: its response to every normal number in turn."""
    first = BLOCKS.grid(schedule).times[:1]
    scale = float(torch.hypot(schedule.alpha(first), schedule.sigma(first)))
    unit = torch.eye(2 + normals, dtype=torch.float64)[:, :, None].expand(-1, -1, len(VARIANCES))
    denoiser = GaussianDenoiser(schedule, torch.tensor(MEANS).double(), torch.tensor(VARIANCES, dtype=torch.float64))
    noise = unit[:, 2:].transpose(0, 1) if normals else None
    shape = (2 + normals, len(VARIANCES))
    found = sampler(denoiser, shape, initial=scale * unit[:, 1], noise=noise, max_batch=1 << 16, **given).sample
    return Law(found[0], (found[1:] - found[0]).square().sum(0))


def deviation(found: Law, wanted: Law) -> float:
    """Largest difference, relative to standard deviations and variances."""
    means = (found.mean - wanted.mean).abs() / wanted.variance.sqrt()
    return float(torch.maximum(means, (found.variance / wanted.variance - 1).abs()).max())


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("iterations", [1, 4, 9])
def test_law_of_piadm_sde_is_the_samplers_own(schedule: piadm.NoiseSchedule, iterations: int) -> None:
    wanted = law_of(piadm.piadm_sde, schedule, BLOCKS.steps, blocks=BLOCKS, iterations=iterations)
    assert deviation(theory.piadm_sde_law(SPECTRUM, BLOCKS, 9, schedule=schedule)[iterations - 1], wanted) <= EXACT


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("corrector", [CORRECTOR, None], ids=["corrected", "plain"])
def test_law_of_piadm_ode_is_the_samplers_own(schedule: piadm.NoiseSchedule, corrector: piadm.Corrector | None) -> None:
    normals = BLOCKS.count * corrector.normals if corrector else 0
    given = dict(blocks=BLOCKS, iterations=3, corrector=corrector)
    wanted = law_of(piadm.piadm_ode, schedule, normals, **given)
    assert deviation(theory.piadm_ode_law(SPECTRUM, BLOCKS, 5, corrector, schedule=schedule)[2], wanted) <= EXACT


@pytest.mark.parametrize("method", ["sde", "ode", "paper-sde", "paper-ode"])
def test_law_of_sample_sequential_is_the_samplers_own(method: str) -> None:
    schedule = piadm.VPSchedule()
    grid = BLOCKS.grid(schedule)
    wanted = law_of(piadm.sample_sequential, schedule, grid.steps, method=method, grid=grid)
    assert deviation(theory.sequential_law(SPECTRUM, method, grid, schedule=schedule), wanted) <= EXACT


def test_as_many_iterations_as_steps_give_the_sequential_law() -> None:
    corrector = piadm.Corrector(duration=0.5, length=0.25, step=0.05, iterations=5, friction=1.5)
    whole = max(BLOCKS.sizes)
    grid = BLOCKS.grid(piadm.OUSchedule())
    found = theory.piadm_sde_law(SPECTRUM, BLOCKS, whole)[-1]
    assert deviation(found, theory.sequential_law(SPECTRUM, "paper-sde", grid)) <= EXACT
    found = theory.piadm_ode_law(SPECTRUM, BLOCKS, whole, corrector)[-1]
    assert deviation(found, theory.sequential_ode_law(SPECTRUM, BLOCKS, corrector)) <= EXACT


def wrong_score(denoiser: piadm.Denoiser, bias: float) -> piadm.Denoiser:
    """The same data with a constant added to the score."""

    def network(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (level(t.double())[:, None] for level in (denoiser.schedule.alpha, denoiser.schedule.sigma))
        return denoiser(x, t) + sigma.square() / alpha * bias

    return piadm.Denoiser(network, denoiser.schedule, "sample")


@pytest.mark.parametrize("name", ["sde", "ode"])
def test_law_with_a_biased_score_is_the_samplers_own(name: str) -> None:
    schedule, error = piadm.OUSchedule(), theory.ScoreError(bias=0.3)

    def sampler(denoiser: piadm.Denoiser, shape: tuple[int, ...], **given: object) -> piadm.Solution:
        kind = piadm.piadm_sde if name == "sde" else piadm.piadm_ode
        return kind(wrong_score(denoiser, error.bias), shape, **given)

    if name == "sde":
        wanted = law_of(sampler, schedule, BLOCKS.steps, blocks=BLOCKS, iterations=4)
        found = theory.piadm_sde_law(SPECTRUM, BLOCKS, 4, error=error)[3]
    else:
        given = dict(blocks=BLOCKS, iterations=4, corrector=CORRECTOR)
        wanted = law_of(sampler, schedule, BLOCKS.count * CORRECTOR.normals, **given)
        found = theory.piadm_ode_law(SPECTRUM, BLOCKS, 4, CORRECTOR, error=error)[3]
    assert deviation(found, wanted) <= EXACT


def test_a_long_corrector_samples_the_law_it_is_run_at() -> None:
    # Langevin dynamics forgets where it started; steps of 0.002 leave a bias of that order in the variance.
    corrector = piadm.Corrector(duration=40.0, length=0.1, step=0.002, iterations=12, friction=2.0)
    spectrum = theory.Spectrum([0.5, 1.0, 2.0], [1, 1, 1], [1.0, 0.0, -1.0])
    found = theory.piadm_ode_law(spectrum, piadm.Blocks([[0.3, 0.2]]), 1, corrector)[0]
    assert deviation(found, theory.noised(spectrum, piadm.OUSchedule(), 0.2)) < 0.004


def test_noise_in_the_score_is_noise_in_every_step() -> None:
    grid, size = BLOCKS.grid(piadm.OUSchedule()), 0.4
    found = theory.sequential_law(SPECTRUM, "paper-ode", grid, error=theory.ScoreError(noise=size))
    # On the OU clock a step of the ODE moves by (e^{eps/2} - 1) times the score.
    steps = ScoreExponential(0.0).steps(piadm.OUSchedule(), grid)
    added = torch.zeros(len(VARIANCES), dtype=torch.float64)
    for j, (t, later) in enumerate(zip(grid.times[:-1], grid.times[1:], strict=True)):
        factor = steps.a[j, 0, 0] + steps.b[j, 0] * slope(float(t))
        added = factor.square() * added + (math.expm1(float(t - later) / 2) * size) ** 2
    plain = theory.sequential_law(SPECTRUM, "paper-ode", grid)
    assert torch.allclose(found.variance - plain.variance, added, rtol=1e-10)


@pytest.mark.parametrize("wrong", [dict(bias=math.nan), dict(noise=-0.1), dict(noise=math.inf)], ids=str)
def test_wrong_score_errors_are_named(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        theory.ScoreError(**wrong)


def slope(t: float) -> Tensor:
    """Jacobian of the exact denoiser of every mode on the OU clock."""
    lam, decay = torch.tensor(VARIANCES, dtype=torch.float64), math.exp(-t)
    return math.exp(-t / 2) * lam / (decay * lam + 1 - decay)


def test_distances_of_gaussians() -> None:
    law, target = (Law(*torch.tensor(pair).double()) for pair in ([[0.3], [1.7]], [[0.1], [0.9]]))
    p, q = (torch.distributions.Normal(one.mean, one.variance.sqrt()) for one in (law, target))
    x = torch.linspace(-15, 15, 60_001, dtype=torch.float64)
    dx = float(x[1] - x[0])
    a, b = p.log_prob(x).exp(), q.log_prob(x).exp()
    assert float(theory.kl(law, target)) == pytest.approx(float(torch.distributions.kl_divergence(p, q)), rel=1e-12)
    loss = float(theory.affinity_loss(law, target))
    assert math.exp(-loss) == pytest.approx(float((a * b).sqrt().sum()) * dx, rel=1e-9)
    tv = float((a - b).abs().sum()) * dx / 2
    low, high = (float(bound) for bound in theory.hellinger_bounds(torch.tensor(loss)))
    assert low <= tv <= min(high, float(theory.pinsker(theory.kl(law, target))))
    # On a line the optimal transport is that of quantiles.
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    transport = float((p.icdf(u) - q.icdf(u)).square().mean())
    assert float(theory.squared_distance(law, target)) == pytest.approx(transport, rel=1e-3)


def test_divergences_of_1e_minus_12_keep_their_digits() -> None:
    excess, zero = torch.tensor([1e-6, 3e-8], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    found = theory.kl(Law(zero, 0.7 * (1 + excess)), Law(zero, zero + 0.7))
    # delta^2/4 - delta^3/6; 0.7 (1 + delta) itself is rounded to 1e-16, which is 1e-16/delta of delta.
    assert torch.allclose(found, excess**2 / 4 - excess**3 / 6, rtol=1e-7, atol=0)


def test_divergence_of_paths_is_that_of_the_joint_gaussians() -> None:
    schedule, grid = piadm.OUSchedule(), piadm.TimeGrid([2.0, 1.2, 0.7, 0.4, 0.3])
    lam, mean = 0.4, 0.8
    spectrum = theory.Spectrum([lam], [1], [mean])
    alpha, sigma = schedule.alpha(grid.times), schedule.sigma(grid.times)
    # Forward in time: x_t = (alpha_t/alpha_s) x_s + noise for s < t, so cov(x_s, x_t) = (alpha_t/alpha_s) var(x_s).
    later = torch.minimum(*torch.meshgrid(grid.times, grid.times, indexing="ij"))
    var = schedule.alpha(later).square() * lam + schedule.sigma(later).square()
    exact = var * alpha[:, None] * alpha / schedule.alpha(later).square()
    steps = ScoreExponential(1.0).steps(schedule, grid)
    gain = alpha * lam / (alpha.square() * lam + sigma.square())
    bidiagonal, shift, noise = torch.eye(5).double(), torch.zeros(5).double(), torch.ones(5).double()
    for j in range(4):
        bidiagonal[j + 1, j] = -(steps.a[j, 0, 0] + steps.b[j, 0] * gain[j])
        shift[j + 1] = steps.b[j, 0] * (1 - alpha[j] * gain[j]) * mean
        noise[j + 1] = steps.c[j, 0, 0]
    inverse = torch.linalg.inv(bidiagonal)
    sampler = torch.distributions.MultivariateNormal(inverse @ shift, inverse @ torch.diag(noise**2) @ inverse.T)
    joint = torch.distributions.MultivariateNormal(alpha * mean, exact)
    start, way = theory.path_kl(spectrum, "paper-sde", grid)
    assert float(start + way) == pytest.approx(float(torch.distributions.kl_divergence(joint, sampler)), rel=1e-9)


def test_divergence_of_paths_bounds_that_of_the_results() -> None:
    for step in (0.2, 0.05):
        grid = piadm.Blocks.paper(5.0, 0.02, 1.0, step).grid(piadm.OUSchedule())
        start, way = theory.path_kl(SPECTRUM, "paper-sde", grid)
        result = theory.kl(
            theory.noised(SPECTRUM, piadm.OUSchedule(), 0.02), theory.sequential_law(SPECTRUM, "paper-sde", grid)
        )
        assert bool((result <= start + way).all())  # data processing, mode by mode


def test_paths_need_noise() -> None:
    with pytest.raises(ValueError, match="takes noise"):
        theory.path_kl(SPECTRUM, "paper-ode", BLOCKS.grid(piadm.OUSchedule()))
