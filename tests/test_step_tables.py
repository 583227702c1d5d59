"""Networks with a table of times, one learnt vector per step: what they add at a step says nothing of the next."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import piadm
from piadm.builder import Builder
from piadm.condense import weights_on_end
from piadm.models import GaussianDenoiser, MixtureDenoiser
from piadm.nodes import NodeSet, every_step, spread
from piadm.ripples import PLACES, RIPPLE_SAFETY, Ripples
from piadm.settings import SampleSettings, resolve

TABLE, SHAPE = piadm.DiscreteSchedule.ddpm(), (32, 4)
MODES = torch.randn(6, 4, generator=torch.Generator().manual_seed(3))
SMOOTH = MixtureDenoiser(TABLE, MODES, 0.3)


def tabled(width: float) -> piadm.Denoiser:
    added = width * torch.randn(1000, 4, generator=torch.Generator().manual_seed(4))
    return piadm.Denoiser(lambda x, t: SMOOTH.network(x, t) + added[t.long()].to(x), TABLE, "sample")


def settings(nodes: int = 60, denoiser: piadm.Denoiser = SMOOTH) -> SampleSettings:
    return resolve(denoiser, method="sde", grid=None, steps=1000, tol=1e-2, nodes=nodes, window=None, guess=None)


def ripples(given: SampleSettings, nodes: NodeSet, batch: int) -> Ripples:
    on_end, scale = weights_on_end(given.steps, given.prior[0]), torch.linspace(3, 1, 1000).double()
    return Ripples(nodes, given.steps.times, given.clock, scale, on_end, batch)


@pytest.mark.parametrize("method", ["ode", "sde"])
@pytest.mark.parametrize("width", [0.02, 0.1])
def test_samples_of_a_table_of_times_are_what_they_are_certified_to_be(method: str, width: float) -> None:
    found, exact = (run(tabled(width), SHAPE, method=method) for run in (piadm.sample, piadm.sample_sequential))
    errors = (found.sample - exact.sample).square().mean(1).sqrt()
    # Not measured, ripples let up to a third of the SDE's samples stop outside, and two thirds of the ODE's.
    assert found.converged and float(errors.max()) <= 1e-2


def test_ripples_take_as_many_nodes_as_they_need() -> None:
    found = piadm.sample(tabled(0.02), SHAPE, method="sde")
    # All 1000 steps would be nodes, and evaluations a third more, if twice the nodes or every step were the choice.
    assert found.converged and found.stats.nodes < 1000


def test_a_smooth_network_pays_a_few_rows_of_a_round_that_is_made_anyway(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Tensor] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        asked.append(t)
        return exact.network(x, t)

    exact = GaussianDenoiser(TABLE, 0.0, 0.1)
    denoiser = piadm.Denoiser(network, TABLE, "sample")
    found = piadm.sample(denoiser, SHAPE, method="sde")
    assert sum(map(len, asked)) == int(found.stats.evaluations_per_sample.sum())
    monkeypatch.setattr(Builder, "ripples", None)
    without = piadm.sample(denoiser, SHAPE, method="sde")
    assert found.stats.rounds == without.stats.rounds and torch.allclose(found.sample, without.sample, atol=1e-5)
    assert found.stats.evaluations == without.stats.evaluations + 3 * PLACES


def test_nodes_that_were_asked_for_are_all_that_is_evaluated() -> None:
    asked: list[Tensor] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        asked.append(t)
        return SMOOTH.network(x, t)

    denoiser = piadm.Denoiser(network, TABLE, "sample")
    piadm.sample(denoiser, SHAPE, method="sde", nodes=60)
    given = settings(denoiser=denoiser)
    assert torch.isin(torch.cat(asked).double(), given.steps.times[given.nodes.indices]).all()


@pytest.mark.parametrize("nodes", [40, 150])
def test_independent_ripples_do_to_the_end_what_they_are_said_to(nodes: int) -> None:
    given = settings(nodes)
    on_end = weights_on_end(given.steps, given.prior[0])
    known = ripples(given, given.nodes, 2)
    known.sizes[:] = [[1.0, 3.0]] * PLACES
    lacks = on_end.clone()
    lacks[given.nodes.indices] -= on_end @ given.nodes.weights
    want = RIPPLE_SAFETY * float((lacks * known.scale).square().sum().sqrt())
    # A node's ripple stands for those about it, whose scale is another one.
    assert known.on(given.nodes, torch.arange(2))() == pytest.approx([want, 3 * want], rel=0.05)


def test_ripples_are_measured_once_and_count_as_none_before() -> None:
    given = settings()
    known = ripples(given, given.nodes, 3)
    some, all_ = torch.tensor([0, 2]), torch.arange(3)
    assert known.on(given.nodes, all_)().tolist() == [0, 0, 0] and known.wanted(given.nodes, some)
    known.sizes[:, [0, 2]] = 1.0
    assert not known.wanted(given.nodes, some) and known.wanted(given.nodes, all_)
    assert known.wanted(given.finer(given.nodes), all_)  # some samples skip a node set
    assert not known.wanted(spread(given.clock, 31, 1), all_) and not known.wanted(every_step(1000), all_)
    assert (np.diff(known.steps) > 0).all() and 0 < known.steps[0] and known.steps[-1] < 999
