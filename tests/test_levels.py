"""Samples that need finer nodes go on there at once, beside the others, and every round is one batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import piadm
from piadm.executor import Executor, Request, drive
from piadm.models import MixtureDenoiser


@pytest.fixture(scope="module")
def uneven() -> piadm.Denoiser:
    """Some of its samples need finer nodes: waves in the time on one side of space alone."""
    modes = torch.randn(10, 8, generator=torch.Generator().manual_seed(0))
    smooth = MixtureDenoiser(piadm.DiscreteSchedule.ddpm(), modes, 0.1)

    def network(x: Tensor, t: Tensor) -> Tensor:
        wave = 0.05 * torch.sin(0.31 * t) * torch.sigmoid(4 * x.mean(1))
        estimate: Tensor = smooth.network(x, t)
        return estimate + wave[:, None]

    return replace(smooth, network=network)


def test_no_sample_waits_for_another(uneven: piadm.Denoiser) -> None:
    given = dict(method="ode", steps=400, tol=3e-3)
    together = piadm.sample(uneven, (8, 8), **given)
    rounds = together.stats.rounds_per_sample
    alone = [piadm.sample(uneven, (1, 8), seed=[(0, number)], **given) for number in range(8)]
    nodes = {one.stats.nodes for one in alone}
    assert len(nodes) > 1 and together.stats.nodes == max(nodes)  # they do end on different node sets
    assert rounds.tolist() == [one.stats.rounds for one in alone]
    assert together.stats.rounds == rounds.max() == together.stats.residuals.shape[0]
    torch.testing.assert_close(together.sample, torch.cat([one.sample for one in alone]), atol=1e-5, rtol=0)


def test_each_samples_states_are_those_of_its_own_nodes(uneven: piadm.Denoiser) -> None:
    found = piadm.sample(uneven, (8, 8), method="ode", steps=400, tol=3e-3, return_states=True)
    truth = piadm.sample_sequential(uneven, (8, 8), method="ode", steps=400, return_states=True)
    assert found.states is not None and truth.states is not None
    torch.testing.assert_close(found.states[-1], found.sample, atol=1e-5, rtol=0)
    # Between the nodes a state may be somewhat further off than the end.
    assert float((found.states - truth.states).square().mean(2).sqrt().max()) < 5 * 3e-3


@pytest.mark.parametrize("limit", [2, 5, 7])
def test_a_limit_cuts_off_all_levels_at_once(uneven: piadm.Denoiser, limit: int) -> None:
    found = piadm.sample(uneven, (8, 8), method="ode", steps=400, tol=3e-3, max_rounds=limit, return_states=True)
    assert found.stats.rounds == limit and piadm.Status.MAX_ROUNDS in found.status
    assert found.states is not None
    torch.testing.assert_close(found.states[-1], found.sample, atol=1e-5, rtol=0)


def test_rows_of_several_requests_are_one_batch_and_find_their_way_back() -> None:
    sizes: list[int] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        sizes.append(len(x))
        if len(x) > 4:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return x + t.to(x)[:, None]

    denoiser = piadm.Denoiser(network, piadm.VPSchedule(), "sample")
    executor = Executor(denoiser, (3, 2), max_batch=6)
    states = [torch.randn(rows, 2, generator=torch.Generator().manual_seed(rows)) for rows in (5, 0, 4, 1)]
    times = [torch.rand(len(part), dtype=torch.float64) for part in states]
    found = [torch.full_like(part, torch.nan) for part in states]
    requests = [
        Request(torch.zeros(len(part), dtype=torch.int64), time, part.__getitem__, place.__setitem__)
        for part, time, place in zip(states, times, found, strict=True)
    ]
    drive(executor.ask(requests), executor.answer)
    assert sizes == [6, 3, 3, 3, 1]  # halved once, and then as full as they may be
    for part, time, place in zip(states, times, found, strict=True):
        torch.testing.assert_close(place, part + time.to(part)[:, None])
