"""Local models: slopes learnt from evaluations, their bounds, and the solve that uses them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import piadm
from piadm.condense import first_moved
from piadm.local_model import Acting, Learning, LocalModel
from piadm.models import GaussianDenoiser
from piadm.turn import _places, _Rows

NODES, BATCH, SIZE = 5, 3, 7
SCHEDULE = piadm.VPSchedule(0.1, 20.0)


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def model(states: Tensor, most: float = 2.0, *, own: bool = False) -> LocalModel:
    bound = torch.ones(NODES, dtype=torch.float64)
    return LocalModel(Learning(0 * bound, most * bound, bound, bound, bound, own), 0.25 * bound, states)


def known(rows: Tensor) -> Tensor:
    return torch.ones_like(rows, dtype=torch.bool)


def observed(slope: Tensor, most: float = 2.0, *, own: bool = False) -> tuple[LocalModel, Tensor]:
    """A model that has seen ``R = slope x - 0.25 x`` twice, and the second states."""
    rows = torch.arange(NODES * BATCH)
    first, second = normals(NODES * BATCH, SIZE), normals(NODES * BATCH, SIZE, seed=1)
    local = model(first.view(NODES, BATCH, SIZE), most, own=own)
    local.observe(rows, first, (slope - 0.25) * first, ~known(rows))
    local.observe(rows, second, (slope - 0.25) * (second - first), known(rows))
    return local, second


@pytest.mark.parametrize("own", [False, True])
def test_the_slope_of_a_linear_network_is_learnt_exactly(own: bool) -> None:
    slope = torch.linspace(0.1, 1.9, NODES * BATCH, dtype=torch.float64)[:, None]
    local, second = observed(slope, own=own)
    slope = slope.expand_as(local.excess)
    # Two roundings of a quotient of sums of seven products.
    assert torch.allclose(local.excess, slope - 0.25, rtol=0, atol=1e-13)
    third, rows = normals(NODES * BATCH, SIZE, seed=2), torch.arange(NODES * BATCH)
    local.observe(rows, third, 0.125 * (third - second), known(rows))  # beyond the line, which so turns by as much
    assert torch.allclose(local.excess, (slope - 0.125).clamp(max=1.75), rtol=0, atol=1e-13)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(("slope", "kept"), [(-1.0, 0.0), (5.0, 2.0), (0.5, 0.5)])
def test_slopes_are_kept_within_their_bounds(slope: float, kept: float, own: bool) -> None:
    local, _ = observed(torch.full((NODES * BATCH, 1), slope, dtype=torch.float64), own=own)
    assert torch.allclose(local.excess + 0.25, torch.full_like(local.excess, kept), rtol=0, atol=1e-13)


@pytest.mark.parametrize("own", [False, True])
def test_the_slope_along_a_move_is_measured_beyond_the_bounds(own: bool) -> None:
    local, states = observed(torch.full((NODES * BATCH, 1), 5.0, dtype=torch.float64), own=own)  # kept at 2
    rows, moved = torch.arange(NODES * BATCH), normals(NODES * BATCH, SIZE, seed=2)
    _, _, along = local.observe(rows, moved, 3.0 * (moved - states), known(rows))
    assert torch.allclose(along, torch.full_like(along, 5.0 - 0.25), rtol=0, atol=1e-12)
    assert not local.observe(rows, moved, 0 * moved, known(rows))[2].any()  # no move


def test_coordinates_of_different_slopes_are_told_apart() -> None:
    """Ever better with every evaluation: what one leaves of a coordinate's error is at most ``r/(r + its share)``."""
    slope = torch.linspace(0.1, 1.9, SIZE, dtype=torch.float64)
    local, states = observed(slope, own=True)
    left = [(local.excess + 0.25 - slope).abs().max()]
    for seed in range(2, 30):
        moved = normals(NODES * BATCH, SIZE, seed=seed)
        innovation = (slope - 0.25 - local.excess) * (moved - states)
        rows = torch.arange(NODES * BATCH)
        local.observe(rows, moved, innovation, known(rows))
        states = moved
        left.append((local.excess + 0.25 - slope).abs().max())
    assert left[0] > 0.3 and left[-1] < 0.01 and local.excess.shape == (NODES * BATCH, SIZE)


def test_a_coordinate_that_has_not_moved_keeps_what_all_have_in_common() -> None:
    rows = torch.arange(NODES * BATCH)
    local = model(normals(NODES, BATCH, SIZE), own=True)
    start = local.seen.clone()
    local.observe(rows, start, torch.zeros_like(start), ~known(rows))
    moved = start + torch.tensor([0.0, *[1.0] * (SIZE - 1)], dtype=torch.float64)
    local.observe(rows, moved, 0.5 * (moved - start), known(rows))
    assert torch.allclose(local.excess, torch.full_like(local.excess, 0.5), rtol=0, atol=1e-13)


def test_equal_bounds_learn_nothing() -> None:
    bound = torch.full((NODES,), 0.25, dtype=torch.float64)
    assert not LocalModel(Learning(*[bound] * 5), bound, normals(NODES, BATCH, SIZE)).learns


def test_a_step_too_short_for_the_networks_rounding_teaches_no_slope() -> None:
    local, states = observed(torch.full((NODES * BATCH, 1), 0.5, dtype=torch.float64))
    before = local.excess.clone()
    rows = torch.arange(NODES * BATCH)
    local.observe(rows, states * (1 + 1e-5), torch.full_like(states, 1e-3), known(rows))
    assert torch.equal(local.excess, before) and torch.equal(local.seen, states * (1 + 1e-5))


def test_surprise_is_a_mean_square_and_stride_a_length() -> None:
    local, states = observed(torch.full((NODES * BATCH, 1), 0.5, dtype=torch.float64))
    rows, moved = torch.tensor([2, 11]), torch.tensor([2.0, 3.0], dtype=torch.float64)
    innovation = torch.tensor([[3.0, 0, 0, 0, 0, 0, 0], [0.125] * 7], dtype=torch.float64)
    surprise, stride, _ = local.observe(rows, states[rows] + moved[:, None], innovation, known(rows))
    assert torch.allclose(stride, moved * 7**0.5, rtol=1e-13, atol=0)
    assert torch.allclose(surprise, torch.tensor([9 / 7, 0.125**2], dtype=torch.float64), rtol=1e-13, atol=0)


@pytest.mark.parametrize("ahead", [0.0, 0.02])
@pytest.mark.parametrize("size", [2, SIZE])  # fewer coordinates than evaluated rows, and more
@pytest.mark.parametrize("own", [False, True])
def test_a_path_that_follows_evaluations_is_the_fixed_point(
    ahead: float, size: int, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounds of rows chosen at random, another number for every sample: ``x = q + P R(x)`` after each."""
    free, response = normals(NODES + 1, BATCH, size), 0.3 * normals(NODES + 1, NODES, seed=4)
    response = response.tril(-1) + ahead * response.triu()
    ends = []
    for elements in (1, 1 << 22):  # one sample at a time, and all at once
        monkeypatch.setattr("piadm.local_model.SOLVE_ELEMENTS", elements)
        outputs, residual = free.clone(), torch.zeros(NODES, BATCH, size, dtype=torch.float64)
        local = model(outputs[:-1], own=own)
        for turn in range(4):
            active = (normals(NODES, BATCH, seed=5 + turn) > 0).numpy()
            order, places = active.cumsum(0) - 1, _places(active, residual.device)
            rows = _Rows.of(active, order + places.shape[1] * np.arange(BATCH), residual.device)
            innovation = torch.zeros(*places.shape, size, dtype=torch.float64)
            innovation.view(-1, size)[rows.place] = beyond = normals(len(rows.node), size, seed=9 + turn)
            states = outputs[:-1].clone()
            seen = known(rows.node) & (turn > 0)
            local.observe(rows.number, states[rows.node, rows.sample], beyond, seen)
            expected = residual.clone()
            expected[rows.node, rows.sample] += beyond
            residual.copy_(expected)
            sweeps = 40 if own else 12 if ahead else 0
            local.follow(Acting(response), places, innovation, outputs, residual, sweeps)
            expected += local.excess.view(NODES, BATCH, -1) * (outputs[:-1] - states)
            # Systems of five equations, of condition number about ten; sweeps gain a factor of 1/0.02 and more
            # each, and of two or so where coordinates have slopes of their own.
            assert torch.allclose(residual, expected, rtol=0, atol=1e-12)
            assert torch.allclose(outputs.flatten(1), free.flatten(1) + response @ residual.flatten(1), atol=1e-12)
        assert (local.excess != 0).any()
        ends.append(outputs)
    assert torch.allclose(ends[0], ends[1], rtol=0, atol=1e-12)


def test_what_the_sweeps_leave_is_in_the_residuals_only() -> None:
    free, response = normals(NODES + 1, BATCH, SIZE), 0.3 * normals(NODES + 1, NODES, seed=4)
    local, _ = observed(torch.full((NODES * BATCH, 1), 1.5, dtype=torch.float64))
    outputs, residual = free.clone(), normals(NODES, BATCH, SIZE, seed=6)
    places = torch.arange(NODES).expand(BATCH, -1)
    local.follow(Acting(response), places, residual.transpose(0, 1).clone(), outputs, residual, sweeps=0)
    assert torch.allclose(outputs.flatten(1), free.flatten(1) + response @ residual.flatten(1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("own", [False, True])
def test_what_the_sweeps_do_not_reach_may_be_left_alone(own: bool) -> None:
    """Nodes that read one node ahead: two rounds of sweeps go two nodes back, and states one more."""
    free, response = normals(NODES + 1, BATCH, SIZE), 0.3 * normals(NODES + 1, NODES, seed=4)
    response = response.tril(-1) + 0.05 * (response.triu() - response.triu(2))
    assert first_moved(response) == [max(0, node - 1) for node in range(NODES)]
    innovation, first, found = normals(1, BATCH, SIZE, seed=6), NODES - 1, []
    for onward in ((0, 0), (first - 2, first - 3)):
        local, _ = observed(torch.full((NODES * BATCH, 1), 0.5, dtype=torch.float64), own=own)
        outputs, residual = free.clone(), torch.zeros(NODES, BATCH, SIZE, dtype=torch.float64)
        residual[first:] = innovation
        places = torch.full((BATCH, 1), first)
        local.follow(Acting(response), places, innovation.transpose(0, 1), outputs, residual, 1, onward)
        found.append((outputs, residual))
    assert all(torch.allclose(one, other, rtol=0, atol=1e-13) for one, other in zip(*found, strict=True))
    outputs, residual = found[0]
    assert (residual[: first - 2] == 0).all() and (residual[first - 2] != 0).all()
    assert torch.equal(outputs[: first - 3], free[: first - 3]) and (outputs[first - 3] != free[first - 3]).all()


@pytest.mark.parametrize("method", ["ode", "sde"])
def test_coordinates_of_many_widths_take_fewer_rounds_with_slopes_of_their_own(method: str) -> None:
    variances = torch.logspace(-2, 1, 32, dtype=torch.float64)
    network = GaussianDenoiser(SCHEDULE, 0.0, variances).network
    denoiser = piadm.Denoiser(network, SCHEDULE, "sample", 0.0, float(variances.mean()))
    given = dict(method=method, steps=200, seed=1)
    exact = piadm.sample_sequential(denoiser, (8, 32), **given).sample
    rounds = {}
    for linearization in ("secant", None):
        found = piadm.sample(denoiser, (8, 32), tol=1e-3, linearization=linearization, **given)
        assert found.converged and float((found.sample - exact).square().mean(1).sqrt().max()) <= 1e-3
        rounds[linearization] = found.stats.rounds_per_sample
    # 9 and 6 (ODE), 10 and 7 (SDE), every sample within one of these.
    assert (rounds[None] < rounds["secant"]).all()
    assert rounds[None].double().mean() <= 0.8 * rounds["secant"].double().mean()
