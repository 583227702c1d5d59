"""What is told of the data may be wrong: a sample's own size says so, and CONVERGED keeps its word."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import piadm
from piadm import settings, stopping
from piadm.caution import FIRST_SMOOTH
from piadm.models import GaussianDenoiser, MixtureDenoiser
from piadm.nodes import NodeSet, refine
from piadm.turn import Movement

SCHEDULE = piadm.VPSchedule()


def errors(denoiser: piadm.Denoiser, shape: tuple[int, ...], method: str, steps: int, tol: float) -> Tensor:
    """True errors over the tolerance; every sample has to be CONVERGED."""
    found = piadm.sample(denoiser, shape, method=method, steps=steps, tol=tol)
    exact = piadm.sample_sequential(denoiser, shape, method=method, steps=steps)
    assert found.converged
    return (found.sample - exact.sample).double().flatten(1).square().mean(1).sqrt() / tol


def widths(*sizes: float) -> piadm.Denoiser:
    """Gaussians of these standard deviations about one point, in closed form; told to have the one of 1."""
    deviation = torch.tensor(sizes, dtype=torch.float64)

    def estimate(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (level[:, None] for level in SCHEDULE.levels(t.double()))
        total = (alpha * deviation).square() + sigma.square()
        likely = -0.5 * x.double().square().sum(1, keepdim=True) / total - 0.5 * x.shape[1] * total.log()
        gain = (likely.softmax(1) * alpha * deviation.square() / total).sum(1, keepdim=True)
        return (gain * x).to(x)

    return piadm.Denoiser(estimate, SCHEDULE, "sample")


def test_data_wider_than_told_get_the_nodes_that_they_need() -> None:
    told = errors(widths(1.0, 5.0), (128, 16), "sde", 1000, 1e-2)
    # Before, 12 % of 192 were outside, by up to 21 times.
    assert float((told <= 1).double().mean()) >= 0.95


@pytest.mark.parametrize(("method", "nodes"), [("ode", 150), ("sde", 500)])
def test_samples_wider_than_told_are_judged_anew_on_their_nodes(method: str, nodes: int) -> None:
    denoiser = replace(GaussianDenoiser(SCHEDULE, 0.0, 9.0), data_variance=1.0)
    found = piadm.sample(denoiser, (8, 16), method=method)
    # They leave the first nodes after two rounds.  Compared with where their paths ended there, they would go on once
    # more, and for longer: 189 (ODE) and 662 (SDE) nodes, and twice as many evaluations (SDE).
    assert found.converged and found.stats.nodes < nodes


def test_node_sets_that_no_sample_goes_on_to_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def noted(nodes: NodeSet, clock: Tensor, order: int, share: float) -> NodeSet:
        finer = refine(nodes, clock, order, share)
        made.append(finer.count)
        return finer

    monkeypatch.setattr(settings, "refine", noted)
    found = piadm.sample(replace(GaussianDenoiser(SCHEDULE, 0.0, 9.0), data_variance=1.0), (8, 16), method="ode")
    # Those of thousands of steps take seconds and gigabytes.
    assert found.converged and max(made) == found.stats.nodes


def test_samples_narrower_than_told_are_aimed_at_by_their_own_size() -> None:
    means = 0.1 * torch.randn(10, 16, generator=torch.Generator().manual_seed(0)).double()
    denoiser = replace(MixtureDenoiser(SCHEDULE, means, 0.02**2), data_mean=0.0, data_variance=1.0)
    # Held to the aim of data a hundred times as wide in variance, 3 % of 512 ended on the wrong side of a border.
    assert float((errors(denoiser, (512, 16), "ode", 100, 1e-2) <= 1).double().mean()) >= 0.99


def judged(rule: stopping.CarriedResidual, size: float, moved: float = 0.0) -> tuple[float, stopping.Verdict]:
    """What the rule says of a sample of that size whose rows have settled."""
    heard = np.full((2, 1), moved)
    nothing, no, none = np.zeros(1), np.zeros((2, 1), bool), np.zeros((2, 1))
    end, once = np.full(1, moved), np.ones(1)
    movement = Movement(heard, none, end, nothing, nothing, nothing, once, np.full(1, size), no, no[0], no[0])
    error, verdict = rule.judge(movement, heard)
    return float(error[0]), stopping.Verdict(int(verdict[0]))


def rule_for(widest: float, exact_after: float = math.inf) -> stopping.CarriedResidual:
    return stopping.CarriedResidual(
        np.ones(2), np.full((2, 1), 0.1), 1.0, aim=np.ones(1), refinable=widest < math.inf, widest=widest,
        caution=FIRST_SMOOTH, exact_after=exact_after,
    )  # fmt: skip


def test_a_sample_goes_on_to_finer_nodes_once_it_was_large_twice() -> None:
    rule = rule_for(widest=90.0)
    assert [judged(rule, size)[1] for size in (99.0, 80.0, 99.0)] == [stopping.Verdict.DONE] * 3
    assert judged(rule, 99.0)[1] == stopping.Verdict.REFINE


@pytest.mark.parametrize(("size", "keenness"), [(99.0, 1.0), (25.0, 1.0), (12.5, 2.0), (0.0, stopping.KEENEST)])
def test_rows_of_a_small_sample_settle_later(size: float, keenness: float) -> None:
    rule = rule_for(widest=math.inf)  # an aim of 1 is right for a size of 25, twice the loosest share of it
    judged(rule, size)
    assert rule.growth.tolist() == [keenness]


def test_a_path_that_should_be_exact_but_still_moves_is_not_within() -> None:
    rule = rule_for(widest=math.inf, exact_after=3)
    assert [judged(rule, 99.0, moved=2.0)[1] for _round in range(5)] == [stopping.Verdict.GO_ON] * 5
    error, verdict = judged(rule, 99.0, moved=0.5)
    assert verdict == stopping.Verdict.DONE and error == 0.5


@pytest.mark.parametrize("nodes", [None, "all"])
def test_a_chaotic_network_is_not_called_converged_while_its_end_moves(nodes: str | None) -> None:
    weights = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)) / 4
    denoiser = piadm.Denoiser(lambda x, t: torch.tanh((x @ weights * 12.0).sin() * 2), SCHEDULE, "epsilon")
    found = piadm.sample(denoiser, (4, 16), method="ode", steps=20, nodes=nodes)
    exact = piadm.sample_sequential(denoiser, (4, 16), method="ode", steps=20)
    error = (found.sample - exact.sample).square().mean(1).sqrt()
    assert float(error.min()) > 0.1  # rounding is enough to move the end by so much
    assert all(status is piadm.Status.MAX_ROUNDS for status in found.status)


def test_noise_at_the_end_of_a_grid_is_not_taken_for_wide_data() -> None:
    schedule = piadm.VESchedule()
    grid = piadm.TimeGrid(piadm.TimeGrid.log_snr(schedule, 1000).times[:251])  # ends where sigma is 5.7
    means = torch.randn(10, 16, generator=torch.Generator().manual_seed(0)).double()
    found = piadm.sample(MixtureDenoiser(schedule, means, 0.05), (8, 16), method="ode", grid=grid)
    assert found.converged and found.stats.nodes is not None and found.stats.nodes <= 53  # the first node set


@pytest.mark.parametrize("sampler", [piadm.sample, piadm.sample_sequential])
@pytest.mark.parametrize(
    ("schedule", "mean", "variance", "off"),
    [
        (piadm.VESchedule(2e-7, 8e-3), 0.0, 1e-8, r"N\(0, 1\^2\), but data of .* are of size 0.008 at time 0.008"),
        (piadm.VESchedule(), 1e3, 1.0, r"N\(0, 80\^2\), but data of data_mean=1000 .* are of size 1e\+03 at time 80"),
        (piadm.VESchedule(), 0.0, 1.0, None),
        (piadm.VESchedule(160.0, 8e6), 0.0, 1e8, None),
        (piadm.FlowSchedule(), 1e3, 1e6, None),  # nothing is left of the data at its first time
        (piadm.VPSchedule(), 0.5, 0.25, None),
    ],
)
def test_a_first_state_of_another_size_than_the_datas_is_told(
    sampler: Callable[..., piadm.Solution], schedule: piadm.NoiseSchedule, mean: float, variance: float, off: str | None
) -> None:
    denoiser = piadm.Denoiser(lambda x, t: torch.full_like(x, mean), schedule, "sample", mean, variance)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        sampler(denoiser, (2, 4), method="ode", steps=5)
        sampler(denoiser, (2, 4), method="ode", steps=5, initial=torch.zeros(2, 4))  # whoever gives it knows
    assert len(told) == (off is not None)
    for one in told:
        assert re.search(f"drawn from {off}; give initial", str(one.message)) and one.filename == __file__
