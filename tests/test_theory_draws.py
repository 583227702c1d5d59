"""Laws against draws: the samplers' moments, the engine's secants, mixtures; and the engine's exact rounds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import piadm
from piadm import theory
from piadm.models import GaussianDenoiser
from piadm.theory import products
from piadm.theory.law import Law

# Every statistic is held to five standard errors: of the 80 here one is outside with a probability of 5e-5.
ERRORS = 5.0
SCHEDULE = piadm.OUSchedule()
VARIANCES = [0.05, 0.3, 1.0, 3.0]
BLOCKS = piadm.Blocks.paper(horizon=4.0, early_stop=0.05, length=1.5, step=0.1)
CORRECTOR = piadm.Corrector(duration=0.5, length=0.25, step=0.05, iterations=2, friction=1.5)
SPECTRUM = theory.Spectrum(VARIANCES, [1, 1, 1, 1], [0.5, -1.0, 0.0, 2.0])
COUNT = 20_000


def scores(sample: Tensor, law: Law) -> Tensor:
    """Deviation of each mode's mean and variance from a law, in standard errors; ``sample (count, m)``."""
    x, count = sample.double() - law.mean, len(sample)
    means = x.mean(0) / (law.variance / count).sqrt()
    variances = (x.square().mean(0) / law.variance - 1) / math.sqrt(2 / count)
    return torch.cat([means, variances]).abs()


@pytest.mark.parametrize("name", ["sequential", "sde", "ode", "corrected"])
def test_drawn_moments_are_those_of_the_law(name: str) -> None:
    denoiser = GaussianDenoiser(SCHEDULE, SPECTRUM.means, SPECTRUM.variances)
    shape, given = (COUNT, 4), dict(blocks=BLOCKS, iterations=3, max_batch=1 << 15, seed=3)
    if name == "sequential":
        grid = BLOCKS.grid(SCHEDULE)
        found = piadm.sample_sequential(denoiser, shape, method="paper-sde", grid=grid, seed=3)
        law = theory.sequential_law(SPECTRUM, "paper-sde", grid)
    elif name == "sde":
        found = piadm.piadm_sde(denoiser, shape, **given)
        law = theory.piadm_sde_law(SPECTRUM, BLOCKS, 3)[2]
    else:
        corrector = CORRECTOR if name == "corrected" else None
        found = piadm.piadm_ode(denoiser, shape, corrector=corrector, **given)
        law = theory.piadm_ode_law(SPECTRUM, BLOCKS, 3, corrector)[2]
    assert float(scores(found.sample, law).max()) <= ERRORS
    # And three iterations are far from all of them: the test would see the sequential law in their place.
    if name == "sde":
        wrong = theory.sequential_law(SPECTRUM, "paper-sde", BLOCKS.grid(SCHEDULE))
        assert float(scores(found.sample, wrong).max()) > 2 * ERRORS


CENTRED = theory.Spectrum.repeated(VARIANCES, 4000)
ROUNDS = 6


@pytest.mark.parametrize("method", ["paper-sde", "ode"])
@pytest.mark.parametrize("guess", ["gaussian", "secant"])
def test_laws_on_long_grids_are_those_of_the_engine_itself(method: str, guess: str) -> None:
    grid = BLOCKS.grid(SCHEDULE)
    given = dict(variance=1.2)
    wanted = theory.engine_law(CENTRED, method, grid, ROUNDS, linearization=guess, **given)
    law = {"gaussian": theory.gaussian_law, "secant": theory.secant_law}[guess]
    found = law(CENTRED, method, grid, ROUNDS, **given)
    # Sums of a hundred steps in float64; 6e-13 was reached.
    assert float((found.variance / wanted.variance - 1).abs().max()) <= 1e-10


def test_engine_law_with_means_is_that_of_the_recurrence() -> None:
    grid = BLOCKS.grid(SCHEDULE)
    wanted = theory.engine_law(SPECTRUM, "sde", grid, ROUNDS, variance=0.8, linearization="gaussian")
    found = theory.gaussian_law(SPECTRUM, "sde", grid, ROUNDS, variance=0.8)
    assert torch.allclose(found.mean, wanted.mean, rtol=0, atol=1e-12)
    assert torch.allclose(found.variance, wanted.variance, rtol=1e-12)
    assert float(wanted.mean.abs().max()) > 1


@pytest.mark.parametrize(("method", "nodes"), [("sde", "all"), ("ode", "all"), ("sde", 24), ("ode", 12)])
def test_secant_rounds_of_many_coordinates_have_the_law_of_the_limit(method: str, nodes: str | int) -> None:
    each, count = 2500, 12
    variances = torch.tensor(VARIANCES, dtype=torch.float64).repeat_interleave(each)
    denoiser = piadm.Denoiser(GaussianDenoiser(SCHEDULE, 0.0, variances).network, SCHEDULE, "sample", 0.0, 1.2)
    grid = BLOCKS.grid(SCHEDULE)
    law = theory.engine_law(CENTRED, method, grid, 3, variance=1.2, nodes=nodes)
    found = piadm.sample(
        denoiser, (count, 4 * each), method=method, grid=grid, tol=1e-300, nodes=nodes, window="all", max_rounds=3,
        linearization="secant", seed=1,
    ).sample  # fmt: skip
    drawn = found.double().view(count, 4, each).square().mean((0, 2))
    # A secant of 10 000 coordinates scatters by about 1 %, and the third round by what that does to a correction of
    # the third order: nothing beside the standard error of 30 000 squares, 0.8 %.
    error = (drawn / law[2].variance - 1).abs() / math.sqrt(2 / (each * count))
    assert float(error.max()) <= ERRORS
    assert float((law[1].variance / law[2].variance - 1).abs().max()) > 0.05  # the rounds differ by more


def test_secant_needs_means_of_zero_on_long_grids() -> None:
    with pytest.raises(ValueError, match="means of zero"):
        theory.secant_law(SPECTRUM, "sde", BLOCKS.grid(SCHEDULE), 2, variance=1.0)


def whole_steps(step: float, horizon: float = 4.0) -> piadm.TimeGrid:
    """A grid of the paper's steps without the last one, which is cut to fit."""
    times = piadm.Blocks.paper(horizon, 0.02, 1.0, step).grid(SCHEDULE).times
    return piadm.TimeGrid(times[times >= 0.05])


def test_quadrature_of_one_component_is_the_gaussian_law() -> None:
    line, grid = theory.MixtureProduct([0.3], 0.4, [1.0], 7), whole_steps(0.2)
    spectrum = theory.Spectrum([0.4], [7], [0.3])
    target = theory.noised(spectrum, SCHEDULE, float(grid.times[-1]))
    wanted = float(spectrum.total(theory.kl(theory.sequential_law(spectrum, "paper-sde", grid), target)))
    assert line.sequential_kl("paper-sde", grid) == pytest.approx(wanted, rel=1e-8)


MIXTURE = theory.MixtureProduct([-1.0, 1.5], 0.15, [0.3, 0.7], 1)


def test_divergence_of_mixtures_falls_with_the_square_of_the_step() -> None:
    found = [MIXTURE.sequential_kl("paper-sde", whole_steps(step, 8.0)) for step in (0.2, 0.1)]
    # First order in the density, second in the divergence; 1.88 was measured, and 1.95 with steps a quarter of these.
    assert 1.8 < math.log2(found[0] / found[1]) < 2.2


def test_parallel_draws_of_mixtures_agree_with_the_quadrature() -> None:
    grid = whole_steps(0.2)
    blocks = piadm.Blocks([grid.times[:11], grid.times[10:21], grid.times[20:]])
    wanted = MIXTURE.sequential_kl("paper-sde", grid)
    # As many iterations as a block has steps: exact.  Of 256 bins and 4000 samples chance alone makes 0.032, which is
    # taken off: ten standard errors.
    found, error = MIXTURE.parallel_kl(blocks, max(blocks.sizes), samples=4000, bins=256)
    assert abs(found - wanted) <= ERRORS * error
    few, few_error = MIXTURE.parallel_kl(blocks, 2, samples=20_000)
    assert few > wanted + ERRORS * few_error


def test_means_far_apart_are_no_hindrance_to_the_bins() -> None:
    far, grid = theory.MixtureProduct([-12.0, 12.0], 0.15, [0.25, 0.75], 1), whole_steps(0.2)
    wanted = far.sequential_kl("paper-sde", grid)
    found, error = far.parallel_kl(piadm.Blocks([grid.times]), grid.steps, samples=4000)
    assert abs(found - wanted) <= ERRORS * error


def test_means_beyond_the_bins_are_named_before_anything_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "piadm_sde", None)
    with pytest.raises(ValueError, match="^means must be .* got up to 10000$"):
        theory.MixtureProduct([-1e4, 1e4], 0.15, [0.5, 0.5], 1).parallel_kl(BLOCKS, 2, samples=10)
    with pytest.raises(ValueError, match="^bins must be"):
        MIXTURE.parallel_kl(BLOCKS, 2, samples=10, bins=1)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: theory.MixtureProduct([0.0, 1.0], 0.1, [1.0], 3), "means"),
        (lambda: theory.MixtureProduct([math.nan], 0.1, [1.0], 3), "means"),
        (lambda: theory.MixtureProduct([[0.0]], 0.1, [1.0], 3), "means"),
        (lambda: theory.MixtureProduct([0.0], -0.1, [1.0], 3), "variance"),
        (lambda: theory.MixtureProduct([0.0], 0.1, [-1.0], 3), "weights"),
        (lambda: theory.MixtureProduct([0.0], 0.1, [1.0], 0), "dimension"),
        (lambda: MIXTURE.sequential_kl("paper-ode", whole_steps(0.2)), "noise"),
        (lambda: MIXTURE.sequential_kl("sde", piadm.TimeGrid([1.0, 1e-9])), "points"),
    ],
)
def test_wrong_products_are_named(call: object, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        call()
