"""``sample``: its fixed point is the sequential sampler's result, its verdicts are honest and its counts are true."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import piadm
from piadm.models import MixtureDenoiser
from piadm.noise import Stream, normals, seed_keys
from piadm.witness import MOVES

DIM = 6
VP, VE, OU, FLOW = piadm.VPSchedule(), piadm.VESchedule(), piadm.OUSchedule(), piadm.FlowSchedule()
SCHEDULES = [VP, VE, OU, FLOW]
METHODS = ["sde", "ode", "paper-sde", "paper-ode"]
LINEARIZATIONS = ["diagonal", "secant", "gaussian", "score", "identity", "data"]
# Rounding of some sixty steps, relative to the largest value; at most 2e-15 and 5e-7 were reached over five schedules.
DOUBLE, SINGLE = 1e-12, 1e-5
MORE_ROWS = 10**6  # a ``max_batch`` that no round here reaches
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)


def mixture(schedule: piadm.NoiseSchedule, variance: float = 0.1, components: int = 5) -> piadm.Denoiser:
    means = torch.randn(components, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return MixtureDenoiser(schedule, means, variance)


def first_states(schedule: piadm.NoiseSchedule, batch: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Noise of the size that the schedule has at its default first time."""
    scale = torch.hypot(schedule.alpha(schedule.t_start), schedule.sigma(schedule.t_start))
    return torch.randn(batch, DIM, dtype=dtype, generator=torch.Generator().manual_seed(2)) * float(scale)


def relative(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).abs().max() / expected.abs().max())


def rms(difference: Tensor) -> Tensor:
    return difference.double().flatten(1).square().mean(1).sqrt()


class Counting:
    """A network that counts its calls and rows."""

    def __init__(self, network: Callable[..., Any]) -> None:
        self.network, self.calls, self.rows = network, 0, 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls, self.rows = self.calls + 1, self.rows + len(x)
        return self.network(x, t)


def counted(denoiser: piadm.Denoiser) -> tuple[piadm.Denoiser, Counting]:
    network = Counting(denoiser.network)
    return dataclasses.replace(denoiser, network=network), network


@pytest.mark.parametrize("dtype, limit", [(torch.float64, DOUBLE), (torch.float32, SINGLE)], ids=["double", "single"])
@pytest.mark.parametrize("linearization", LINEARIZATIONS)
@pytest.mark.parametrize("method", METHODS)
def test_fixed_point_is_the_sequential_sampler(
    method: str, linearization: str, dtype: torch.dtype, limit: float
) -> None:
    for schedule, steps in itertools.product(SCHEDULES, (24, 60)):
        if schedule is FLOW and (method.startswith("paper") or linearization == "score"):
            continue  # alpha = 0 at the first time, see below
        denoiser, given = mixture(schedule), dict(method=method, steps=steps, return_states=True)
        given["initial"] = first_states(schedule, 3, dtype)
        exact = piadm.sample_sequential(denoiser, (3, DIM), **given)
        # A tolerance that no estimate but zero meets: the iteration stops when nothing moves any more.
        found = piadm.sample(denoiser, (3, DIM), nodes="all", linearization=linearization, tol=1e-300, **given)
        assert found.sample.dtype == dtype
        assert relative(found.sample, exact.sample) < limit
        assert relative(found.states, exact.states) < limit


@pytest.mark.parametrize("method, linearization", [("paper-sde", None), ("paper-ode", "data"), ("sde", "score")])
def test_a_score_where_alpha_is_zero_is_refused_before_any_call(method: str, linearization: str | None) -> None:
    denoiser, network = counted(mixture(FLOW))
    with pytest.raises(ValueError, match="alpha = 0 at time 1"):
        piadm.sample(denoiser, (3, DIM), method=method, linearization=linearization, steps=24)
    assert network.calls == 0


@pytest.mark.parametrize("rounds", [1, 3, 6])
@pytest.mark.parametrize("method", METHODS)
def test_after_k_rounds_the_first_k_states_are_exact(method: str, rounds: int) -> None:
    for linearization in LINEARIZATIONS:
        given = dict(method=method, steps=24, initial=first_states(VP, 3), return_states=True)
        exact = piadm.sample_sequential(mixture(VP), (3, DIM), **given).states
        found = piadm.sample(
            mixture(VP), (3, DIM), nodes="all", linearization=linearization, max_rounds=rounds, tol=1e-300, **given
        )
        assert relative(found.states[: rounds + 1], exact[: rounds + 1]) < DOUBLE
        # The last states are still wrong, by far more than rounding: the test above has not come for free.
        assert relative(found.states[-1], exact[-1]) > 1e-6
        assert found.stats.rounds == rounds


def judged(
    schedule: piadm.NoiseSchedule, method: str, steps: int, tol: float, nodes: str | int | None, variance: float
) -> tuple[piadm.Solution, Tensor]:
    """A solution for 64 samples, and their true errors in units of the tolerance."""
    denoiser, shape = mixture(schedule, variance), (64, DIM)
    found = piadm.sample(denoiser, shape, method=method, steps=steps, tol=tol, nodes=nodes)
    exact = piadm.sample_sequential(denoiser, shape, method=method, steps=steps)
    return found, rms(found.sample - exact.sample) / tol


@pytest.mark.parametrize("variance", [0.1, 1.0])
@pytest.mark.parametrize("method", ["sde", "ode"])
@every_schedule
def test_converged_on_all_steps_means_within_tolerance(
    schedule: piadm.NoiseSchedule, method: str, variance: float
) -> None:
    for tol in (1e-1, 1e-2, 1e-3):
        found, errors = judged(schedule, method, 120, tol, "all", variance)
        assert found.converged and bool((found.error_estimate <= tol).all())
        # Over 256 samples per case at least 99.2 % were within the tolerance.  Those beyond it went along a border
        # between components; from 1e-2 on the worst of 10240 was 6.3.
        assert float((errors <= 1).double().mean()) >= 0.95
        if tol <= 1e-2:
            assert float(errors.max()) <= 10
        # And the tolerance is not met by doing everything: that would be as many rounds as steps.
        assert found.stats.rounds < 30


@pytest.mark.parametrize("variance", [0.1, 1.0])
@pytest.mark.parametrize("tol", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("method", ["sde", "ode"])
def test_converged_on_chosen_nodes_means_within_tolerance(method: str, tol: float, variance: float) -> None:
    errors = []
    for schedule in SCHEDULES:
        found, error = judged(schedule, method, 300, tol, None, variance)
        assert found.converged
        errors.append(error)
    # Of 2048 samples per case at least 99 % were within the tolerance.  The rest were near the border between two
    # components; where these overlap (variance 1) the worst was 1.02, or 2.6 where the tolerance is coarse.
    assert float((torch.cat(errors) <= 1).double().mean()) >= 0.95
    if variance == 1.0 and tol <= 1e-2:
        assert float(torch.cat(errors).max()) <= 1.5


@pytest.mark.parametrize("method", ["sde", "ode"])
@every_schedule
def test_given_nodes_converge_honestly_or_not_at_all(schedule: piadm.NoiseSchedule, method: str) -> None:
    for nodes, tol in itertools.product((4, 24, 120), (1e-1, 1e-2, 1e-3)):
        found, errors = judged(schedule, method, 300, tol, nodes, 1.0)
        done = torch.tensor([status is piadm.Status.CONVERGED for status in found.status])
        assert set(found.status) <= {piadm.Status.CONVERGED, piadm.Status.MAX_ROUNDS}
        assert bool((found.error_estimate[done] <= tol).all()) and bool((found.error_estimate[~done] > tol).all())
        assert float(errors[done].max() if done.any() else 0.0) <= 2.0
        if nodes == 4 and tol == 1e-3:  # four nodes for 300 steps leave errors of 0.1 and more
            assert not done.any()


@pytest.mark.parametrize("nodes", ["all", None, 24])
@pytest.mark.parametrize("rounds", [1, 3])
def test_too_few_rounds_are_reported(nodes: str | int | None, rounds: int) -> None:
    found = piadm.sample(mixture(VP), (4, DIM), steps=300, nodes=nodes, max_rounds=rounds, tol=1e-3)
    assert set(found.status) == {piadm.Status.MAX_ROUNDS} and not found.converged
    assert bool((found.error_estimate > 1e-3).all()) and bool(found.sample.isfinite().all())
    assert found.stats.rounds == rounds


def test_a_tolerance_below_rounding_is_not_claimed() -> None:
    given = dict(steps=50, seed=3)
    found = piadm.sample(mixture(VP), (8, DIM), nodes="all", tol=1e-9, **given)
    error = rms(found.sample - piadm.sample_sequential(mixture(VP), (8, DIM), **given).sample)
    # No float32 state is that near; how far rounding has left it is what the estimate says.
    assert bool((error > 1e-9).all())
    assert set(found.status) == {piadm.Status.MAX_ROUNDS}
    assert bool((found.error_estimate >= error).all()) and bool((found.error_estimate <= SINGLE).all())


@pytest.mark.parametrize("window", [2, 5, 16, 40, 1000])
@pytest.mark.parametrize("method", ["sde", "ode"])
def test_a_window_changes_the_cost_but_not_the_answer(method: str, window: int) -> None:
    tol, given = 1e-4, dict(method=method, steps=40)
    exact = piadm.sample_sequential(mixture(VP), (3, DIM), **given)
    wide = piadm.sample(mixture(VP), (3, DIM), nodes="all", tol=tol, **given)
    found = piadm.sample(mixture(VP), (3, DIM), nodes="all", tol=tol, window=window, **given)
    assert found.converged
    assert float(rms(found.sample - exact.sample).max()) <= tol
    if window < 16:  # fewer rows per round: more rounds, fewer evaluations
        assert found.stats.rounds > wide.stats.rounds
        assert found.stats.evaluations < wide.stats.evaluations
        assert found.stats.evaluations <= window * found.stats.rounds + 1 + len(MOVES)  # rows of a witness


@pytest.mark.parametrize("dtype, limit", [(torch.float64, DOUBLE), (torch.float32, SINGLE)], ids=["double", "single"])
@pytest.mark.parametrize("nodes", ["all", None])
def test_a_sample_is_the_same_alone_and_in_a_batch(nodes: str | None, dtype: torch.dtype, limit: float) -> None:
    initial = first_states(VP, 8, dtype) if dtype == torch.float64 else None
    denoiser, given = mixture(VP, 1.0), dict(steps=300, nodes=nodes, tol=1e-2, return_states=True)
    batch = piadm.sample(denoiser, (8, DIM), seed=5, initial=initial, **given)
    for sample in range(8):
        own = None if initial is None else initial[sample : sample + 1]
        alone = piadm.sample(denoiser, (1, DIM), seed=[(5, sample)], initial=own, **given)
        assert torch.equal(alone.states[0, 0], batch.states[0, sample])
        assert relative(alone.sample[0], batch.sample[sample]) < limit
        assert alone.stats.evaluations_per_sample[0] == batch.stats.evaluations_per_sample[sample]


@pytest.mark.parametrize("sampler", [piadm.sample, piadm.sample_sequential])
def test_micro_batches_change_nothing_but_the_largest_call(sampler: Callable[..., piadm.Solution]) -> None:
    whole = sampler(mixture(VP), (5, DIM), steps=30, max_batch=MORE_ROWS)
    for limit in (1, 3, None):
        denoiser, network = counted(mixture(VP))
        found = sampler(denoiser, (5, DIM), steps=30, max_batch=limit)
        # A matrix product of other sizes rounds differently: a few float32 epsilons; 4e-7 was reached.
        assert relative(found.sample, whole.sample) < 1e-6
        assert found.stats.peak_batch <= (limit or MORE_ROWS)
        assert network.rows == found.stats.evaluations * 5
        assert network.calls >= network.rows / (limit or MORE_ROWS)


@pytest.mark.parametrize("sampler", [piadm.sample, piadm.sample_sequential])
def test_given_noise_and_initial_state_are_the_drawn_ones(sampler: Callable[..., piadm.Solution]) -> None:
    shape, steps = (3, DIM), 80
    drawn = sampler(mixture(VP), shape, steps=steps, seed=9, return_states=True)
    noise = normals(seed_keys(9, 3), Stream.PATH, range(steps), DIM)
    given = sampler(mixture(VP), shape, steps=steps, seed=0, initial=drawn.states[0], noise=noise)
    assert torch.equal(given.sample, drawn.sample)


@pytest.mark.parametrize("nodes", ["all", None, 20])
@pytest.mark.parametrize("method", ["sde", "ode"])
def test_counts_are_what_the_network_saw(method: str, nodes: str | int | None) -> None:
    batch, (denoiser, network) = 6, counted(mixture(VP))
    found = piadm.sample(denoiser, (batch, DIM), method=method, steps=150, nodes=nodes, max_batch=MORE_ROWS)
    stats = found.stats
    assert (stats.rounds, network.rows) == (network.calls, round(stats.evaluations * batch))
    assert int(stats.evaluations_per_sample.sum()) == network.rows
    assert stats.evaluations_per_sample.shape == stats.rounds_per_sample.shape == (batch,)
    assert 0 < int(stats.rounds_per_sample.min()) <= int(stats.rounds_per_sample.max()) <= stats.rounds
    assert stats.residuals.shape == (stats.rounds, batch)
    assert torch.equal(stats.residuals[-1], found.error_estimate) and found.error_estimate.dtype == torch.float64
    assert stats.peak_batch <= stats.peak_states <= batch * 150 and stats.wall_time > 0


def test_the_sequential_sampler_counts_one_row_per_step() -> None:
    denoiser, network = counted(mixture(VP))
    found = piadm.sample_sequential(denoiser, (4, DIM), steps=30)
    assert (network.calls, network.rows) == (30, 120)
    assert (found.stats.rounds, found.stats.evaluations, found.stats.peak_batch) == (30, 30.0, 4)
    assert found.converged and found.error_estimate.tolist() == [0.0] * 4


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("sampler", [piadm.sample, piadm.sample_sequential])
def test_runs_repeat_bit_by_bit_and_leave_global_state_alone(
    sampler: Callable[..., piadm.Solution], mode: Callable[[], Any]
) -> None:
    def run() -> Tensor:
        return sampler(mixture(VP), (3, DIM), steps=70, seed=[4, (1, 2), 4]).sample

    before, generator = run(), torch.get_rng_state()
    with mode():
        enabled = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        again = run()
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == enabled
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(before, again)
    # The same seed twice; another column of a matrix product may round differently.
    assert relative(before[0], before[2]) < SINGLE < relative(before[0], before[1])


@pytest.mark.parametrize("nodes", ["all", None, 20])
@pytest.mark.parametrize("method", ["sde", "ode"])
def test_states_lead_from_the_initial_state_to_the_sample(method: str, nodes: str | int | None) -> None:
    given = dict(method=method, steps=100, initial=first_states(VP, 3), return_states=True)
    found = piadm.sample(mixture(VP, 1.0), (3, DIM), nodes=nodes, tol=1e-3, **given)
    exact = piadm.sample_sequential(mixture(VP, 1.0), (3, DIM), **given)
    assert found.states.shape == exact.states.shape == (101, 3, DIM)
    assert torch.equal(found.states[0], given["initial"]) and torch.equal(exact.states[-1], exact.sample)
    # Without every step a node, the path is solved once more for all steps, which rounds anew.
    assert relative(found.states[-1], found.sample) < DOUBLE
    if nodes != 20:  # the states between the nodes are the path's too, not only its end
        assert relative(found.states, exact.states) < 0.05
    assert piadm.sample(mixture(VP), (3, DIM), steps=10).states is None


@pytest.mark.parametrize("sampler", [piadm.sample, piadm.sample_sequential])
def test_a_sample_may_have_any_shape(sampler: Callable[..., piadm.Solution]) -> None:
    def network(x: Tensor, t: Tensor) -> Tensor:
        """Of coordinates that are 0.8 or -0.8: acts on each alone, so that the layout cannot matter."""
        alpha, sigma = (level.to(x.dtype).view(-1, *[1] * (x.ndim - 1)) for level in (VP.alpha(t), VP.sigma(t)))
        return 0.8 * torch.tanh(0.8 * alpha * x / sigma.square())

    denoiser = piadm.Denoiser(network, VP, "sample", data_variance=0.64)
    flat, image = (sampler(denoiser, shape, steps=40, return_states=True) for shape in ((3, 16), (3, 1, 4, 4)))
    assert image.sample.shape == (3, 1, 4, 4) and image.states.shape == (41, 3, 1, 4, 4)
    assert torch.equal(image.sample.flatten(1), flat.sample)


def test_a_run_that_is_stopped_after_its_last_step_is_whole() -> None:
    given = dict(steps=5, callback=lambda info: info.round == 5)
    found = piadm.sample_sequential(mixture(piadm.VPSchedule()), (2, DIM), **given)
    assert found.converged and found.error_estimate.tolist() == [0.0, 0.0]
