"""What interpolation between nodes leaves: estimated right for independent ripples, and not small by chance."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import piadm
from piadm.condense import weights_on_end
from piadm.interpolation import RoughInterpolation, SmoothInterpolation, share_of_distance, smooth_rows
from piadm.models import GaussianDenoiser
from piadm.nodes import left_out
from piadm.ripples import no_ripples
from piadm.settings import SampleSettings, resolve

SCHEDULE = piadm.VPSchedule()
DENOISER = GaussianDenoiser(SCHEDULE, 0.0, 1.0)


def engine(nodes: int | None) -> SampleSettings:
    return resolve(DENOISER, method="ode", grid=None, steps=400, tol=1e-2, nodes=nodes, window=None, guess=None)


@pytest.mark.parametrize("nodes", [5, 9, 40, None])
def test_nothing_is_lacking_of_a_cubic(nodes: int | None) -> None:
    given = engine(nodes)
    knots = given.clock[given.nodes.indices] / 10
    powers = torch.stack([knots**k for k in range(5)], dim=1)
    lacks = left_out(given.nodes, given.clock, given.order) @ powers
    assert lacks[:, :4].abs().max() < 1e-9  # hundreds of roundings of numbers of order one
    assert lacks[1:-1, 4].abs().min() > 1e-9 and not lacks[[0, -1]].any()


@pytest.mark.parametrize("nodes", [20, 50, 150])
def test_independent_ripples_do_to_the_end_what_they_are_said_to(nodes: int) -> None:
    given = engine(nodes)
    every, chosen = weights_on_end(given.steps, given.prior[0]), given.nodes
    rows = smooth_rows(chosen, given.clock, given.order, torch.zeros(nodes).double(), every)[2 : 2 + nodes]
    # The variance at the end of independent ripples of variance one at every step, some interpolated from the nodes.
    functional = every.clone()
    functional[chosen.indices] -= every @ chosen.weights
    # At the two ends of the path nothing is interpolated that the estimate could compare; their part is small.
    assert float(rows.square().sum()) == pytest.approx(float(functional.square().sum()), rel=0.02)


def test_with_too_few_nodes_the_error_is_unknown() -> None:
    for kind in (SmoothInterpolation, RoughInterpolation):
        for count, known in ((kind.fewest - 1, False), (kind.fewest, True)):
            rows = torch.zeros(2 + 3 * count, count).double()
            found, _ = kind(rows, None, 1.0, no_ripples).error(np.zeros((len(rows), 3)), np.zeros(3))
            assert found.tolist() == [0.0 if known else np.inf] * 3


@pytest.mark.parametrize("ratio", [2, 4, 16])
def test_the_distance_of_two_ends_says_what_independent_ripples_leave(ratio: int) -> None:
    # The fine nodes leave an error of variance one; without those between the coarse ones, it is ``ratio`` times that.
    left, known = torch.randn(2, 100_000, generator=torch.Generator().manual_seed(0))
    apart = math.sqrt(ratio - 1) * known
    assert share_of_distance(ratio) * float(apart.square().mean().sqrt()) == pytest.approx(1, rel=0.02)
    assert float((left + apart).square().mean()) == pytest.approx(ratio, rel=0.02)
    # Errors that add up coherently fall in proportion: ``ratio - 1`` is their distance, and they are not more.
    assert share_of_distance(ratio) * (ratio - 1) >= 1


def test_ripples_of_few_coordinates_are_not_missed_by_chance() -> None:
    frequencies, samples = torch.tensor([7.0, 11.0, 17.0, 23.0]), 128
    phases = 2 * torch.pi * torch.rand(samples, len(frequencies), 2, generator=torch.Generator().manual_seed(0))

    def rippled(x: Tensor, t: Tensor, phase: Tensor) -> Tensor:
        waves = torch.sin(frequencies[:, None] * SCHEDULE.log_snr(t.double()).float()[:, None, None] + phase)
        return DENOISER.network(x, t) + 0.16 * waves.mean(1).to(x)

    denoiser, given = piadm.Denoiser(rippled, SCHEDULE, "sample"), dict(method="ode", condition={"phase": phases})
    found = piadm.sample(denoiser, (samples, 2), tol=1e-2, **given)
    exact = piadm.sample_sequential(denoiser, (samples, 2), **given)
    errors = (found.sample - exact.sample).square().mean(1).sqrt()
    # By changes of the end alone, which add up with signs, two in five were outside, up to 1.9 times.
    assert found.converged and float(errors.max()) <= 1e-2


def test_ripples_with_whole_periods_between_nodes_are_not_missed_twice() -> None:
    # The fastest sine of the usual time embedding, one period in 6.3 steps: gaps of 25 and 13 have whole periods.
    phases = 2 * torch.pi * torch.rand(16, 16, generator=torch.Generator().manual_seed(0))

    def rippled(x: Tensor, t: Tensor, phase: Tensor) -> Tensor:
        noise = torch.exp(-0.5 * SCHEDULE.log_snr(t.double())).float().clamp(max=20)[:, None]
        return DENOISER.network(x, t) + 0.02 * noise * torch.sin(1000 * t[:, None] + phase)

    denoiser, given = piadm.Denoiser(rippled, SCHEDULE, "sample"), dict(method="ode", condition={"phase": phases})
    found = piadm.sample(denoiser, (16, 16), tol=1e-2, **given)
    exact = piadm.sample_sequential(denoiser, (16, 16), **given)
    errors = (found.sample - exact.sample).square().mean(1).sqrt()
    # With finer nodes in the middles of the gaps all were outside, by up to 1.7 times, and said to have converged.
    assert found.converged and float(errors.max()) <= 1e-2
