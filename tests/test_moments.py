"""Moments of the data measured on the network's own samples: near the truth, and worth their calls."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import piadm
from piadm import moments
from piadm.models import GaussianDenoiser, MixtureDenoiser

SCHEDULES = [piadm.VPSchedule(), piadm.VESchedule(), piadm.FlowSchedule(), piadm.CosineSchedule()]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)
@pytest.mark.parametrize(("mean", "variance"), [(0.0, 1.0), (3.0, 0.01), (-40.0, 400.0)])
def test_moments_of_gaussian_data_are_near(schedule: piadm.NoiseSchedule, mean: float, variance: float) -> None:
    known = GaussianDenoiser(schedule, mean, variance)
    found = piadm.measure_moments(replace(known, data_mean=0.0, data_variance=1.0), (4, 3, 8))
    # First-order steps make samples a little too narrow; of 16 of 24 coordinates the variance is seen to 7 %.
    assert found.data_variance == pytest.approx(variance, rel=0.2)
    # The start knows of no mean: alpha of it is missing, and where sigma ends at 50 a fifth of 40 is.
    assert found.data_mean == pytest.approx(mean, abs=0.1 * variance**0.5 + 0.25 * abs(mean))


def test_a_network_that_says_nothing_of_noise_alone_is_asked_a_little_later() -> None:
    cosine = piadm.CosineSchedule()  # alpha is 0 at its first time

    def epsilon(x: Tensor, t: Tensor) -> Tensor:  # of data of variance 0.25 about 0.5
        alpha, sigma = (level(t.double()).to(x).view(-1, 1) for level in (cosine.alpha, cosine.sigma))
        return sigma * (x - 0.5 * alpha) / (0.25 * alpha**2 + sigma**2)

    found = piadm.measure_moments(piadm.Denoiser(epsilon, cosine, "epsilon"), (2, 64))
    assert found.data_variance == pytest.approx(0.25, rel=0.2) and found.data_mean == pytest.approx(0.5, abs=0.1)


def test_moments_of_tiny_data_are_near_where_the_noise_is_tiny_too() -> None:
    known = GaussianDenoiser(piadm.VESchedule(2e-7, 8e-3), 0.0, 1e-8)  # metres; the noise is eighty times as wide
    found = piadm.measure_moments(replace(known, data_variance=1.0), (4, 3, 8))
    assert found.data_variance == pytest.approx(1e-8, rel=0.2) and abs(found.data_mean) < 1e-5


def test_the_variance_of_a_mixture_is_that_of_its_covariance() -> None:
    means = 2.0 * torch.randn(12, 64, generator=torch.Generator().manual_seed(3)).double()
    found = piadm.measure_moments(MixtureDenoiser(piadm.VPSchedule(), means, 0.1), (1, 64))
    wanted = float(means.var(0, correction=0).mean()) + 0.1
    # Sixteen samples of twelve modes: sqrt(2/(16 x 12)), 10 %, half as much again, and the steps' 8 %.
    assert found.data_variance == pytest.approx(wanted, rel=0.25)


@pytest.mark.parametrize("deviation", [0.02, 9.0])
def test_clusters_far_apart_are_one_wide_distribution(deviation: float) -> None:
    means = 100.0 * torch.randn(5, 8, generator=torch.Generator().manual_seed(1)).double()
    found = piadm.measure_moments(MixtureDenoiser(piadm.VPSchedule(), means, deviation**2), (1, 8))
    wanted = float(means.var(0, correction=0).mean()) + deviation**2
    assert wanted / 3 < found.data_variance < wanted * 3  # a factor of three costs no round


def test_a_scale_that_was_unknown_is_worth_measuring() -> None:
    exact = MixtureDenoiser(
        piadm.VPSchedule(), 100.0 * torch.randn(5, 8, generator=torch.Generator().manual_seed(1)).double(), 400.0
    )
    guessed = replace(exact, data_mean=0.0, data_variance=1.0)
    given = dict(method="ode", steps=300, tol=1.0)
    found = [piadm.sample(it, (8, 8), **given) for it in (guessed, piadm.measure_moments(guessed, (8, 8)))]
    assert found[1].converged and found[1].stats.rounds < found[0].stats.rounds


@pytest.mark.parametrize(("size", "rows"), [(4, 64), (1024, 16)])  # more samples where they have few coordinates
def test_conditions_reach_the_network_row_by_row(size: int, rows: int) -> None:
    seen = []

    def network(x: Tensor, t: Tensor, label: Tensor, scale: float) -> Tensor:
        seen.append((len(x), label.clone(), scale))
        return schedule.alpha(t.double()).float()[:, None] * x  # data of variance one

    schedule = piadm.VPSchedule()
    denoiser = piadm.Denoiser(network, schedule, "sample")
    piadm.measure_moments(denoiser, (3, size), condition={"label": torch.tensor([7, 8, 9]), "scale": 2.0})
    assert [count for count, _, _ in seen] == [rows] * moments.STEPS
    assert all(len(label) == rows and bool((label == 7).all()) and scale == 2.0 for _, label, scale in seen)


# Stable Diffusion's table ends at a log-SNR of -5.4.
TABLE = piadm.DiscreteSchedule((1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000).double() ** 2).cumprod(0))


@pytest.mark.parametrize("error", [0.03, 0.01, -0.01, -0.03])
@pytest.mark.parametrize("schedule", [piadm.VPSchedule(), TABLE], ids=["vp", "table"])
def test_what_a_network_says_wrong_of_noise_alone_is_not_taken_for_data(
    schedule: piadm.NoiseSchedule, error: float
) -> None:
    def epsilon(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (one[:, None].float() for one in (schedule.alpha(t.double()), schedule.sigma(t.double())))
        return sigma / (0.25 * alpha**2 + sigma**2) * (1 + error) * x  # exact for a variance of 1/4, but for the error

    found = piadm.measure_moments(piadm.Denoiser(epsilon, schedule, "epsilon"), (1, 16))
    assert 0.25 / 3 < found.data_variance < 0.25 * 3  # a factor of three costs no round


def test_the_default_type_of_numbers_makes_no_difference() -> None:
    linear = torch.nn.Linear(4, 4)
    denoiser = piadm.Denoiser(lambda x, t: 0.1 * linear(x) + 0.2 * x, piadm.OUSchedule(), "v")
    try:
        found = piadm.measure_moments(denoiser, (1, 4)).data_variance
        torch.set_default_dtype(torch.float64)
        assert piadm.measure_moments(denoiser, (1, 4)).data_variance == found
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("output", "told"), [(torch.nan, "nan.*not finite at time"), (0.0, "0; it must be positive")])
def test_a_network_that_tells_of_no_variance_is_refused(output: float, told: str) -> None:
    denoiser = piadm.Denoiser(lambda x, t: output * x, piadm.FlowSchedule(), "sample")  # ends without noise
    with pytest.raises(ValueError, match=f"a variance of {told}"):
        piadm.measure_moments(denoiser, (1, 4))


@pytest.mark.parametrize(("shape", "error"), [((4,), ValueError), (4, TypeError), ((1, 0), ValueError)])
def test_bad_shapes_are_refused_before_any_call(shape: object, error: type[Exception]) -> None:
    denoiser = piadm.Denoiser(lambda x, t: pytest.fail("called"), piadm.VPSchedule(), "sample")
    with pytest.raises(error, match="shape"):
        piadm.measure_moments(denoiser, shape)


def test_conditions_are_checked_before_any_call() -> None:
    denoiser = piadm.Denoiser(lambda x, t, label: pytest.fail("called"), piadm.VPSchedule(), "sample")
    with pytest.raises(ValueError, match=r"condition\['label'\] must have one row per sample"):
        piadm.measure_moments(denoiser, (3, 4), condition={"label": torch.zeros(2)})


def test_a_network_that_fails_is_named_with_the_time() -> None:
    denoiser = piadm.Denoiser(lambda x, t: x[:, :1], piadm.VPSchedule(), "sample")
    with pytest.raises(piadm.NetworkError, match="the network failed on samples 0..63 at time"):
        piadm.measure_moments(denoiser, (1, 4))
