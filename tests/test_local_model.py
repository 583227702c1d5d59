"""Local models: slopes learnt from evaluations, their bounds, and the solve that uses them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from piadm.local_model import Learning, LocalModel

NODES, BATCH, SIZE = 5, 3, 7


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def model(states: Tensor, most: float = 2.0) -> LocalModel:
    bound = torch.ones(NODES, dtype=torch.float64)
    return LocalModel(Learning(0 * bound, most * bound, bound), 0.25 * bound, states)


def observed(slope: Tensor, most: float = 2.0) -> tuple[LocalModel, Tensor, Tensor]:
    """A model that has seen ``R = slope x - 0.25 x`` twice, its last states and residuals."""
    rows = torch.arange(NODES * BATCH)
    first, second = normals(NODES * BATCH, SIZE), normals(NODES * BATCH, SIZE, seed=1)
    local = model(first.view(NODES, BATCH, SIZE), most)
    residual = (slope[:, None] - 0.25) * first
    local.observe(rows, first, torch.zeros_like(first), residual)
    fresh = (slope[:, None] - 0.25) * second
    local.observe(rows, second, residual, fresh)
    return local, second, fresh


def test_the_slope_of_a_linear_network_is_learnt_exactly() -> None:
    slope = torch.linspace(0.1, 1.9, NODES * BATCH, dtype=torch.float64)
    local, _, residual = observed(slope)
    elsewhere = normals(NODES * BATCH, SIZE, seed=2)
    # Two roundings of a quotient of sums of seven products.
    assert torch.allclose(local.residual(residual, elsewhere), (slope[:, None] - 0.25) * elsewhere, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("slope", "kept"), [(-1.0, 0.0), (5.0, 2.0), (0.5, 0.5)])
def test_slopes_are_kept_within_their_bounds(slope: float, kept: float) -> None:
    local, _, _ = observed(torch.full((NODES * BATCH,), slope, dtype=torch.float64))
    assert torch.allclose(local.excess + 0.25, torch.full_like(local.excess, kept), rtol=0, atol=1e-13)


def test_equal_bounds_learn_nothing() -> None:
    bound = torch.full((NODES,), 0.25, dtype=torch.float64)
    assert not LocalModel(Learning(bound, bound, bound), bound, normals(NODES, BATCH, SIZE)).learns


def test_a_step_too_short_for_the_networks_rounding_teaches_no_slope() -> None:
    local, states, residual = observed(torch.full((NODES * BATCH,), 0.5, dtype=torch.float64))
    before = local.excess.clone()
    rows = torch.arange(NODES * BATCH)
    local.observe(rows, states * (1 + 1e-5), residual, residual + 1e-3)
    assert torch.equal(local.excess, before) and torch.equal(local.seen, states * (1 + 1e-5))


def test_surprise_is_what_the_line_had_not_said() -> None:
    slope = torch.full((NODES * BATCH,), 0.5, dtype=torch.float64)
    local, states, residual = observed(slope)
    rows, moved = torch.tensor([2, 11]), torch.tensor([2.0, 3.0], dtype=torch.float64)
    there = states[rows] + moved[:, None]
    surprise, stride = local.observe(rows, there, residual[rows], 0.25 * there + 0.125)
    assert torch.allclose(stride, moved, rtol=1e-13, atol=0)
    assert torch.allclose(surprise, torch.full((2,), 0.125, dtype=torch.float64), rtol=0, atol=1e-13)


@pytest.mark.parametrize(("ahead", "sweeps"), [(0.0, 1), (0.02, 12)])
def test_the_solve_is_the_fixed_point_of_the_substitution(
    ahead: float, sweeps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    local, _, residual = observed(torch.linspace(0.1, 1.9, NODES * BATCH, dtype=torch.float64))
    free, response = normals(NODES, BATCH * SIZE, seed=3), 0.3 * normals(NODES, NODES, seed=4)
    response = response.tril() + ahead * response.triu(1)
    solved = []
    for elements in (1, 1 << 22):  # one sample at a time, and all at once
        monkeypatch.setattr("piadm.local_model.SOLVE_ELEMENTS", elements)
        states = torch.zeros_like(free)
        local.solve(free, response, residual.view(NODES, -1), states, sweeps)
        found = local.residual(residual, states.reshape(-1, SIZE)).view(NODES, -1)
        # A system of five equations, of condition number about ten; sweeps gain a factor of 1/0.02 and more each.
        assert torch.allclose(states, free + response @ found, rtol=0, atol=1e-12)
        solved.append(states)
    assert torch.allclose(solved[0], solved[1], rtol=0, atol=1e-13)
