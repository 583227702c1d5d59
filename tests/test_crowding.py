"""Where nodes crowd for the SDE: on a clock that runs faster where noise and data are alike."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

import piadm
from piadm.models import GaussianDenoiser
from piadm.nodes import FLOOR, NOISY_SIDE, REACH, crowded
from piadm.settings import resolve

LEVELS = torch.linspace(-12, 12, 4801, dtype=torch.float64)


def test_the_clock_runs_at_the_stated_rate() -> None:
    level = LEVELS + math.log(9.0) + NOISY_SIDE
    rate = torch.gradient(crowded(LEVELS, 3.0), spacing=(LEVELS,))[0][1:-1]
    stated = FLOOR + 1 / torch.cosh(level / REACH)
    torch.testing.assert_close(rate, stated[1:-1], rtol=1e-5, atol=0)  # differences of second order: 0.005^2/r^2


@pytest.mark.parametrize("unit", [1e-8, 1e-2, 100.0, 1e8])
def test_the_unit_of_the_data_does_not_matter(unit: float) -> None:
    def nodes(unit: float) -> list[int]:
        schedule = piadm.VESchedule(2e-3 * unit, 80 * unit)
        denoiser = piadm.Denoiser(lambda x, t: x, schedule, "sample", data_variance=unit**2)
        settings = dict(method="sde", grid=None, steps=1000, tol=1e-2 * unit, nodes=None, window=None, guess=None)
        return resolve(denoiser, **settings).nodes.indices.tolist()

    assert nodes(unit) == nodes(1.0)


def test_a_start_of_pure_noise_has_a_place() -> None:
    levels = LEVELS.clone()
    levels[0] = -math.inf
    clock = crowded(levels, 1.0)
    assert clock.isfinite().all() and (clock.diff() > 0).all()


def test_the_sde_crowds_its_nodes_and_the_ode_does_not() -> None:
    denoiser = GaussianDenoiser(piadm.DiscreteSchedule.ddpm())

    def gaps(method: str) -> torch.Tensor:
        engine = resolve(denoiser, method=method, grid=None, steps=1000, tol=1e-2, nodes=40, window=None, guess=None)
        return engine.clock[engine.nodes.indices].diff()

    # Rates are FLOOR + sech(l/r): 1.1 at the centre and 0.17 at -10; the last steps are far apart in log-SNR anyway.
    sde, ode = gaps("sde")[:-5], gaps("ode")[:-5]
    assert sde[0] / sde.min() == pytest.approx(1.1 / 0.2, rel=0.2)  # the first gap reaches from -10 to about -8
    assert ode.max() / ode.min() < 1.5


def test_the_sde_goes_on_to_every_step_where_finer_nodes_would_be_few_more() -> None:
    engine = resolve(
        piadm.load("fashion"), method="sde", grid=None, steps=1000, tol=1e-2, nodes=None, window=None, guess=None
    )
    counts, nodes = [], engine.nodes
    while nodes.count < 1000:
        counts.append(nodes.count)
        nodes = engine.finer(nodes)
    ratios = [finer / coarse for coarse, finer in pairwise(counts)]
    assert len(ratios) >= 2 and min(ratios) >= 1.5  # of 979 after 799 a fifth would be new
    assert counts[-1] < 979
