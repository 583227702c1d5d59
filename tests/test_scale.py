"""Networks that do not answer as data of the told mean and variance would: the tolerance holds all the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import piadm
from piadm.models import MixtureDenoiser

VP, VE, OU = piadm.VPSchedule(), piadm.VESchedule(), piadm.OUSchedule()
DIM, BATCH, STEPS = 8, 8, 300


def untold(schedule: piadm.NoiseSchedule, scale: float) -> piadm.Denoiser:
    """A mixture of that scale, of which the library is told nothing."""
    means = scale * torch.randn(6, DIM, generator=torch.Generator().manual_seed(4))
    return piadm.Denoiser(MixtureDenoiser(schedule, means, 0.05 * scale**2).network, schedule, "sample")


def worst(denoiser: piadm.Denoiser, method: str, tol: float) -> float:
    """Largest true error of samples that all are CONVERGED."""
    given = {"method": method, "steps": STEPS}
    found = piadm.sample(denoiser, (BATCH, DIM), tol=tol, **given)
    exact = piadm.sample_sequential(denoiser, (BATCH, DIM), **given)
    assert found.converged
    return float((found.sample - exact.sample).square().mean(1).sqrt().max())


CASES: list[Callable[[], piadm.Denoiser]] = [
    lambda: piadm.Denoiser(lambda x, t: torch.zeros_like(x), OU, "score"),  # nothing is forgotten: D = x/alpha
    lambda: piadm.Denoiser(lambda x, t: x.tanh(), VP, "epsilon"),
    lambda: untold(VP, 1e3),
    lambda: untold(VE, 1e3),
]


@pytest.mark.parametrize("build", CASES, ids=["score-0", "tanh", "vp-1000", "ve-1000"])
def test_early_rows_count_for_data_of_any_width(build: Callable[[], piadm.Denoiser]) -> None:
    # With the told variance alone the SDE's early rows settle although their errors reach the end: 13 to 4700 x tol.
    assert worst(build(), "sde", 1e-2) <= 1e-2


def test_changes_that_are_large_at_first_leave_no_rounding() -> None:
    # Data of 1e-3 under noise of 80: 9e-7 with states that are computed anew now and then, 1.7e-5 with added changes.
    assert worst(untold(VE, 1e-3), "sde", 1e-5) <= 3e-6


def test_an_autocast_around_the_sampler_does_not_reach_its_sums() -> None:
    denoiser = untold(VP, 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = piadm.sample(denoiser, (2, DIM), method="ode", steps=100).sample
    outside: Tensor = piadm.sample(denoiser, (2, DIM), method="ode", steps=100).sample
    # The network's own products are in bfloat16, a relative 4e-3; the sampler's would not even be accepted.
    assert inside.dtype == torch.float32 and float((inside - outside).abs().max()) < 5e-2


def test_what_explodes_on_the_way_leaves_no_rounding() -> None:
    # Estimates of 1e9 at states that only the iteration visits left their rounding in residuals: an error of 6.6 tol.
    denoiser = piadm.Denoiser(lambda x, t: 0.3 * x.tanh() + 1e9 * (x.abs() - 4).clamp(min=0), VP, "sample")
    initial = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    given = {"method": "sde", "steps": 100, "initial": initial}
    found = piadm.sample(denoiser, (8, 4), nodes="all", **given)
    exact = piadm.sample_sequential(denoiser, (8, 4), **given)
    assert found.converged and float((found.sample - exact.sample).square().mean(1).sqrt().max()) <= 1e-2
