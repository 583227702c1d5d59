"""Condensed paths against the recurrence they stand for, and the invariants of node sets."""

from __future__ import annotations

from dataclasses import replace

import mpmath as mp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import piadm
from piadm.condense import CondensedPath, condense, weights_on_end
from piadm.integrators import AffineSteps, MultistepSteps
from piadm.models import GaussianDenoiser
from piadm.nodes import GOLDEN, MIDDLE, NodeSet, averaged, every_step, refine, spread, thin

EPS = float(np.finfo(np.float64).eps)
quick = settings(max_examples=60, deadline=None)  # no deadline: a machine may be busy


@st.composite
def clocks(draw: st.DrawFn, least: int = 3, most: int = 60) -> Tensor:
    """Log-SNRs at the start of every step, ascending by 0.01 to 3; the first may be -inf."""
    gaps = draw(st.lists(st.floats(0.01, 3.0), min_size=least - 1, max_size=most - 1))
    clock = torch.tensor([0.0, *gaps], dtype=torch.float64).cumsum(0) - draw(st.floats(0.0, 20.0))
    if draw(st.booleans()):
        clock[0] = -torch.inf
    return clock


@st.composite
def node_sets(draw: st.DrawFn, clock: Tensor) -> NodeSet:
    """A node set on a clock, made in every way there is."""
    nodes = spread(clock, draw(st.integers(2, len(clock)))) if draw(st.booleans()) else every_step(len(clock))
    for change in draw(st.lists(st.sampled_from([refine, thin]), max_size=2)):
        changed = change(nodes, clock)
        nodes = changed if isinstance(changed, NodeSet) else draw(st.sampled_from(changed))
    return nodes


@st.composite
def problems(draw: st.DrawFn) -> tuple[AffineSteps, Tensor, NodeSet, Tensor]:
    """Steps, slopes, nodes and constants; the factors ``a + b G`` lie in +-[1e-3, 1.5] but for s = 2, where a does."""
    clock = draw(clocks(most=40))
    steps, s, r = len(clock), draw(st.sampled_from([1, 2])), draw(st.integers(0, 2))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    low, high = draw(st.sampled_from([(1e-3, 1e-2), (0.05, 1.0), (0.9, 1.1), (1.0, 1.5), (1e-3, 1.5)]))
    signs = rng.choice([-1.0, 1.0], (steps, s, s)) if draw(st.booleans()) else 1.0
    a, b = rng.uniform(low, high, (steps, s, s)) * signs, rng.normal(size=(steps, s))
    slopes = rng.normal(size=steps)
    if s == 1:
        a[:, 0, 0] -= b[:, 0] * slopes
    numbers = (clock, a, b, rng.normal(size=(steps, s, r)), slopes, rng.normal(size=steps))
    times, a, b, c, slopes, constants = (torch.as_tensor(x) for x in numbers)
    return AffineSteps(times, a, b, c), slopes, draw(node_sets(clock)), constants


def outputs(path: CondensedPath, x: np.ndarray, residuals: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Equation (2): the states at the nodes and at the end, ``(n + 1, s)``."""
    matrices = (path.start, path.offset, path.response, path.noise)
    start, offset, response, noises = (matrix.numpy() for matrix in matrices)
    return start @ x + offset + response @ residuals + np.einsum("nsjr,jr->ns", noises, noise)


@quick
@given(problem=problems(), seed=st.integers(0, 2**32 - 1))
def test_a_condensed_path_is_the_recurrence(problem: tuple[AffineSteps, Tensor, NodeSet, Tensor], seed: int) -> None:
    steps, slopes, nodes, constants = problem
    rng = np.random.default_rng(seed)
    x0, residuals = rng.normal(size=steps.components), rng.normal(size=nodes.count)
    noise = rng.normal(size=(steps.count, steps.normals))

    weights, indices = nodes.weights.numpy(), nodes.indices.tolist()
    x, size, wanted, sizes = x0, np.abs(x0), [], []
    for j in range(steps.count + 1):
        if j in indices or j == steps.count:
            wanted.append(x)
            sizes.append(size)
        if j < steps.count:
            a, b, c = (part[j].numpy() for part in (steps.a, steps.b, steps.c))
            slope, known = slopes[j].item(), constants[j].item() + weights[j] @ residuals
            # Absolute values carried through the same recurrence, without its cancellations, bound all that is rounded.
            most = abs(constants[j].item()) + weights[j] @ np.abs(residuals)
            size = np.abs(a) @ size + np.abs(b) * (abs(slope) * size[0] + most) + np.abs(c) @ np.abs(noise[j])
            x = a @ x + b * (slope * x[0] + known) + c @ noise[j]

    path = condense(steps, slopes, nodes, constants)
    error = np.abs(outputs(path, x0, residuals, noise) - np.array(wanted))
    # A handful of roundings per step on either side, for forty steps; reached in 2000 examples: 1.6.
    assert float((error / np.array(sizes)).max()) <= 50 * EPS
    assert torch.equal(path.times, steps.times[nodes.indices])
    assert torch.equal(path.slopes, slopes[nodes.indices]) and torch.equal(path.constants, constants[nodes.indices])


@quick
@given(problem=problems())
def test_weights_on_the_end_are_the_last_row_of_the_path(problem: tuple[AffineSteps, Tensor, NodeSet, Tensor]) -> None:
    steps, slopes, nodes, _ = problem
    weights, response = weights_on_end(steps, slopes), condense(steps, slopes, nodes).response[-1, 0]
    most = weights_on_end(replace(steps, a=steps.a.abs(), b=steps.b.abs()), slopes.abs()) @ nodes.weights.abs() + 1e-300
    assert float(((weights @ nodes.weights - response).abs() / most).max()) <= 50 * EPS  # as above


def test_weights_on_the_end_of_steps_that_look_back() -> None:
    rng = np.random.default_rng(0)
    times, (a, b) = np.arange(30.0), np.tril(rng.normal(size=(2, 30, 30))) / 6
    *parts, slopes = map(torch.tensor, (times, a, b, rng.normal(size=(30, 30, 1)), rng.normal(size=30)))
    wanted = condense(steps := MultistepSteps(*parts), slopes, every_step(30)).response[-1, 0]
    torch.testing.assert_close(weights_on_end(steps, slopes), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "ends",
    [(1.5, 1.5), (0.6, 0.6), (1.5, 0.5), (0.5, 1.5), (0.3, 0.3), (1e-3, 1e-3), (3.0, 1e-3)],
    ids=["growing", "decaying", "growing-then-decaying", "decaying-then-growing", "underflow", "tiny", "peak"],
)
def test_a_thousand_steps_are_exact_entry_by_entry(ends: tuple[float, float]) -> None:
    # Nothing cancels where all numbers are positive: an entry is a sum of products of at most 1000 factors, each with
    # an error of at most three roundings, 1000 * 3 * 1.1e-16 in all; reached: 5e-15.  The products of long decays
    # underflow, where a ratio of cumulative products would be 0/0; 1e-300 stands for what is lost there.
    count, rng = 1000, np.random.default_rng(0)
    clock = torch.linspace(-10.0, 9.0, count, dtype=torch.float64)
    factor, share = np.repeat(ends, count // 2) * rng.uniform(0.9, 1.0, count), rng.uniform(0.1, 0.9, count)
    b, c = rng.uniform(0.1, 1.0, count), rng.uniform(0.1, 1.0, count)
    a, slopes = share * factor, (1 - share) * factor / b
    nodes = spread(clock, 9)
    parts = (torch.tensor(part) for part in (a[:, None, None], b[:, None], c[:, None, None]))
    path = condense(AffineSteps(clock, *parts), torch.tensor(slopes), nodes)

    with mp.workdps(30):
        factors = [mp.mpf(p) + mp.mpf(q) * mp.mpf(g) for p, q, g in zip(a, b, slopes, strict=True)]
        cumulative = [mp.mpf(1)]
        for factor in factors:
            cumulative.append(cumulative[-1] * factor)
        for row, node in enumerate([*nodes.indices.tolist(), count]):
            carried = [cumulative[node] / cumulative[j + 1] for j in range(node)]
            pushed = [p * mp.mpf(q) for p, q in zip(carried, b, strict=False)]
            response = [
                mp.fsum(pushed[j] * mp.mpf(weight[j].item()) for j in weight.nonzero().flatten().tolist() if j < node)
                for weight in nodes.weights.T
            ]
            noises = [p * mp.mpf(q) for p, q in zip(carried, c, strict=False)] + [mp.mpf(0)] * (count - node)
            wanted = np.array([float(x) for x in (cumulative[node], *response, *noises)])
            got = torch.cat([path.start[row, 0], path.response[row, 0], path.noise[row, 0, :, 0]]).numpy()
            assert float((np.abs(got - wanted) / np.maximum(np.abs(wanted), 1e-300)).max()) <= 1e-12


def test_constants_are_zero_unless_given() -> None:
    steps = AffineSteps(torch.arange(4.0), torch.ones(4, 1, 1).double(), torch.ones(4, 1).double(), torch.ones(4, 1, 0))
    path = condense(steps, torch.zeros(4).double(), every_step(4))
    assert not path.offset.any() and not path.constants.any()
    assert path.noise.shape == (5, 1, 4, 0)


@quick
@given(data=st.data(), clock=clocks())
def test_a_node_set_starts_with_the_first_step_and_ascends(data: st.DataObject, clock: Tensor) -> None:
    nodes = data.draw(node_sets(clock))
    assert nodes.indices[0] == 0 and bool((nodes.indices.diff() > 0).all()) and nodes.indices[-1] == len(clock) - 1
    assert nodes.weights.shape == (len(clock), nodes.count) and nodes.weights.dtype == torch.float64
    assert bool((nodes.weights >= 0).all()) and bool((nodes.weights <= 1).all())
    assert torch.equal(nodes.weights[nodes.indices], torch.eye(nodes.count, dtype=torch.float64))
    # Two neighbours share a row: 1 - w and w, each rounded.
    assert torch.allclose(nodes.weights.sum(1), torch.ones(len(clock), dtype=torch.float64), rtol=0, atol=2 * EPS)
    assert int((nodes.weights > 0).sum(1).max()) <= 2


@quick
@given(data=st.data(), clock=clocks())
def test_log_snr_is_interpolated_to_itself(data: st.DataObject, clock: Tensor) -> None:
    # With rows that sum to one, so is every linear function of it.
    nodes = data.draw(node_sets(clock))
    line = clock.nan_to_num(neginf=0.0)
    # From -inf nothing is linear: only rows from the next node on can be judged there.
    first = 0 if clock[0].isfinite() else int(nodes.indices[1])
    # A weight is a quotient of differences of log-SNRs, each of which rounds by eps |log_snr|.
    slack = 8 * EPS * float(1 + line.abs().max())
    assert torch.allclose((nodes.weights @ line[nodes.indices])[first:], line[first:], rtol=0, atol=slack)


@quick
@given(clock=clocks(least=2), count=st.integers(2, 80))
def test_spread_has_the_number_of_nodes_asked_for(clock: Tensor, count: int) -> None:
    nodes = spread(clock, count)
    assert nodes.count == min(count, len(clock)) and nodes.weights.shape[1] == nodes.count


@pytest.mark.parametrize("first", [-8.0, -torch.inf])
def test_spread_and_refine_are_even_in_log_snr(first: float) -> None:
    clock = torch.linspace(-8.0, 8.0, 1001, dtype=torch.float64) ** 3  # crowded in the middle
    clock[0] = first if first == -torch.inf else clock[0]
    coarse = spread(clock, 9)
    # Wanted: every 128 from -512 on.  Steps are at most 3 x^2 dx = 3.1 long (at x = 8), and the nearest one is taken.
    even = torch.arange(-384.0, 513.0, 128.0, dtype=torch.float64)
    assert torch.allclose(clock[coarse.indices[1:]], even, rtol=0, atol=1.6)
    # In between after refinement, and there the step behind the middle.
    finer = clock[refine(coarse, clock).indices[1:]]
    assert torch.allclose(finer[::2], even - 64.0, rtol=0, atol=1.6 + 3.1)


@quick
@given(data=st.data(), clock=clocks(), share=st.sampled_from([MIDDLE, GOLDEN]))
def test_refined_nodes_keep_residuals_and_end_in_every_step(data: st.DataObject, clock: Tensor, share: float) -> None:
    nodes = data.draw(node_sets(clock))
    finite = clock[1:] if len(clock) > 2 and not clock[0].isfinite() else clock
    # A weight's rounding is that of log-SNR differences over the smallest gap, times residuals of order one.
    slack = 32 * EPS * (1 + 2 * float(finite.abs().max() + finite.diff().max()) / float(finite.diff().min()))
    residuals = torch.randn(nodes.count, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    while nodes.count < len(clock):
        finer = refine(nodes, clock, share=share)
        assert torch.isin(nodes.indices, finer.indices).all() and nodes.count < finer.count < 2 * nodes.count
        moved = nodes.weights[finer.indices] @ residuals
        assert torch.allclose(finer.weights @ moved, nodes.weights @ residuals, rtol=0, atol=slack)
        nodes, residuals = finer, moved
    assert torch.equal(nodes.weights, torch.eye(len(clock), dtype=torch.float64))
    assert torch.equal(refine(nodes, clock).indices, torch.arange(len(clock)))


@quick
@given(data=st.data(), clock=clocks())
def test_thin_leaves_out_every_second_node_beside_steps_that_are_none(data: st.DataObject, clock: Tensor) -> None:
    order = data.draw(st.sampled_from([1, 3]))
    nodes = spread(clock, data.draw(st.integers(2, len(clock))), order)
    indices = nodes.indices.tolist()
    between = {i for i in indices[1:-1] if {i - 1, i + 1} <= {*indices}}
    halves = thin(nodes, clock, order)
    assert [half.indices.tolist() for half in halves] == [
        sorted({*indices[first::2], indices[0], indices[-1], *between}) for first in (0, 1)
    ]
    assert all(torch.equal(half.weights[half.indices], torch.eye(half.count).double()) for half in halves)


LINEAR = {"sde": piadm.VPSchedule(0.1, 20.0), "ode": piadm.FlowSchedule(), "paper-sde": piadm.OUSchedule()}


@pytest.mark.parametrize("method", LINEAR)
@pytest.mark.parametrize("nodes", ["all", 7, 40])
def test_a_network_as_linear_as_the_reference_is_evaluated_once(method: str, nodes: str | int) -> None:
    # Isotropic Gaussian data: D is the reference model itself, every residual is rounding, on any node set.
    denoiser, steps = GaussianDenoiser(LINEAR[method], 0.3, 0.5), 100
    initial = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    run = dict(method=method, steps=steps, seed=2, initial=initial, return_states=True)
    got = piadm.sample(denoiser, (4, 5), nodes=nodes, window="all", tol=1e-9, **run)
    want = piadm.sample_sequential(denoiser, (4, 5), **run)
    assert got.stats.evaluations == (steps if nodes == "all" else nodes)
    assert got.stats.rounds == 1
    assert got.converged == (nodes != 7)  # so few nodes cannot be certified
    # The recurrence run directly; a few hundred roundings of numbers of order one.
    assert torch.allclose(got.states, want.states, rtol=0, atol=1e-12)
    assert torch.allclose(got.sample, want.sample, rtol=0, atol=1e-12)


@pytest.mark.parametrize("linearization", ["score", "identity", "data"])
def test_any_linearization_has_the_same_fixed_point(linearization: str) -> None:
    # After as many rounds as steps nothing of the guess is left, whatever it was.
    schedule, steps = LINEAR["sde"], 12
    grid = piadm.TimeGrid.log_snr(schedule, steps, 0.9, 0.01)
    denoiser = GaussianDenoiser(schedule, 0.3, torch.tensor([0.1, 1.0, 3.0], dtype=torch.float64))
    initial = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    run = dict(grid=grid, seed=2, initial=initial, return_states=True)
    got = piadm.sample(denoiser, (4, 3), nodes="all", linearization=linearization, tol=1e-13, **run)
    want = piadm.sample_sequential(denoiser, (4, 3), **run)
    assert got.stats.rounds <= steps
    # Rounding grows by at most the path's response, of order ten here.
    assert torch.allclose(got.states, want.states, rtol=0, atol=1e-11)


@quick
@given(data=st.data(), clock=clocks(), seed=st.integers(0, 2**32 - 1))
def test_averaged_readings_answer_for_all_steps_about_a_node(data: st.DataObject, clock: Tensor, seed: int) -> None:
    # What every step's residual adds up to, weighted by its importance, is exact for a denoised estimate that is linear
    # in the state, whatever the states are: no noise between the nodes is missed.
    nodes = data.draw(node_sets(clock))
    rng = np.random.default_rng(seed)
    importance, states = torch.tensor(rng.uniform(0.1, 1.0, len(clock))), torch.tensor(rng.normal(size=len(clock)))
    read = averaged(nodes, importance)
    assert torch.equal(read.indices, nodes.indices) and torch.equal(read.weights, nodes.weights)
    whole = importance @ (nodes.weights @ (read.reading_matrix() @ states))
    # Sums of at most sixty products of order one to ten, a rounding each.
    assert abs(float(whole - importance @ states)) <= 1e3 * EPS
    ones = read.reading_matrix().sum(1)
    assert torch.allclose(ones, torch.ones_like(ones), rtol=0, atol=1e2 * EPS)
    # A step that is a node reads itself and what lies between it and its neighbours, no further.
    far = (torch.arange(nodes.count)[:, None] - torch.searchsorted(nodes.indices, torch.arange(len(clock)))).abs() > 2
    assert not bool(read.reading_matrix()[far].any())


def test_with_every_step_a_node_an_average_reads_the_state() -> None:
    read = averaged(every_step(7), torch.rand(7, dtype=torch.float64) + 0.1)
    assert torch.equal(read.reading_matrix(), torch.eye(7, dtype=torch.float64))


@quick
@given(clock=clocks(least=6), count=st.integers(4, 40), seed=st.integers(0, 2**32 - 1))
def test_cubics_are_interpolated_to_themselves(clock: Tensor, count: int, seed: int) -> None:
    nodes = spread(clock, count, order=3)
    line = (clock - clock[-1]).nan_to_num(neginf=0.0) / 60
    first = 0 if clock[0].isfinite() else int(nodes.indices[min(4, nodes.count - 1)])
    cubic = torch.tensor(np.random.default_rng(seed).normal(size=4))
    values = cubic[0] + line * (cubic[1] + line * (cubic[2] + line * cubic[3]))
    # Lagrange's weights grow where a step lies far from its nodes; so does their rounding.
    slack = 1e3 * EPS * (1 + float(nodes.weights.abs().sum(1).max())) * (1 + float(values.abs().max()))
    found = nodes.weights @ values[nodes.indices]
    assert nodes.count == len(clock) or torch.allclose(found[first:], values[first:], rtol=0, atol=max(slack, 1e-9))
    assert torch.equal(nodes.weights[nodes.indices], torch.eye(nodes.count, dtype=torch.float64))
