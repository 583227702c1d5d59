"""Networks that fail, memory that runs out, callers that interrupt; and what reaches the network."""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import piadm
from piadm.models import MixtureNetwork

BATCH, DIM = 4, 4
SHAPE = (BATCH, DIM)
VP = piadm.VPSchedule()
MEANS = torch.randn(5, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
exact = MixtureNetwork(VP, MEANS, 0.3)
LABELS = torch.arange(BATCH)
# A batch of another size rounds differently: some float32 epsilons, carried through the path; 1e-6 was reached.
SINGLE = 1e-5
Run = Callable[..., piadm.Solution]
Network = Callable[..., Any]


def runner(call: Run, **settings: object) -> Run:
    def run(network: Network, shape: tuple[int, ...] = SHAPE, **more: object) -> piadm.Solution:
        return call(piadm.Denoiser(network, VP, "sample", data_variance=1.2), shape, **settings | more)

    return run


parallel = runner(piadm.sample, nodes="all", steps=40)
refined = runner(piadm.sample, steps=100)
sequential = runner(piadm.sample_sequential, steps=40)
PAPER = dict(blocks=piadm.Blocks.paper(horizon=4.0, early_stop=0.05, length=1.5, step=0.25), iterations=4)
paper_sde = runner(piadm.piadm_sde, **PAPER)
paper_ode = runner(piadm.piadm_ode, corrector=piadm.Corrector(0.4, 0.2, 0.05, iterations=2), **PAPER)
SAMPLERS = dict(parallel=parallel, refined=refined, sequential=sequential, paper_sde=paper_sde, paper_ode=paper_ode)
every_sampler = pytest.mark.parametrize("run", SAMPLERS.values(), ids=SAMPLERS)


def named(solution: piadm.Solution) -> list[str]:
    return [status.name for status in solution.status]


def relative(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).abs().max() / expected.abs().max())


def raising(error: BaseException, when: Callable[[Tensor, Tensor], bool]) -> Network:
    def network(x: Tensor, t: Tensor) -> Tensor:
        if when(x, t):
            raise error
        return exact(x, t)

    return network


def spoil(value: float, sample: int = 1) -> Network:
    """A network that returns ``value`` in one coordinate of one sample at times below 1/2."""

    def network(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        output = exact(x, t)
        output[(label == sample) & (t < 0.5), 2] = value
        return output

    return network


@every_sampler
def test_callback_sees_every_round(run: Run) -> None:
    def watch(info: piadm.RoundInfo) -> None:
        seen.append((info.round, info.total, info.active_rows, info.sample.clone()))
        assert info.sample.shape == info.denoised.shape == SHAPE
        assert info.error_estimate.shape == (BATCH,) and info.error_estimate.dtype == torch.float64
        for preview in (info.sample, info.denoised, info.error_estimate):
            preview.fill_(torch.nan)  # what a caller does to a preview is no concern of the run

    seen: list[tuple[int, int | None, int, Tensor]] = []
    solution = run(exact, callback=watch)
    rounds, totals, rows, samples = zip(*seen, strict=True)
    assert rounds == tuple(range(1, solution.stats.rounds + 1))
    assert set(totals) == {None if run in (parallel, refined) else solution.stats.rounds}
    assert sum(rows) == int(solution.stats.evaluations_per_sample.sum())
    assert torch.equal(samples[-1], solution.sample) and not torch.equal(samples[0], solution.sample)
    assert torch.equal(solution.sample, run(exact).sample) and solution.converged


@every_sampler
def test_callback_ends_the_run_with_a_usable_state(run: Run) -> None:
    last: list[Tensor] = []
    solution = run(exact, callback=lambda info: last.append(info.sample) or info.round >= 3)
    assert set(named(solution)) == {"INTERRUPTED"} and solution.stats.rounds == len(last) == 3
    assert bool(solution.sample.isfinite().all()) and torch.equal(solution.sample, last[-1])


@every_sampler
@pytest.mark.parametrize("first", [1, 4])
def test_keyboard_interrupt_ends_the_run_with_a_usable_state(run: Run, first: int) -> None:
    calls = itertools.count(1)
    solution = run(raising(KeyboardInterrupt(), lambda x, t: next(calls) == first), max_batch=10**6)
    assert set(named(solution)) == {"INTERRUPTED"} and not solution.failures
    assert bool(solution.sample.isfinite().all())
    assert (next(calls), solution.stats.rounds) == (first + 1, first - 1)


@every_sampler
def test_states_of_an_interrupted_run_are_real(run: Run) -> None:
    solution = run(exact, callback=lambda info: info.round >= 3, return_states=True)
    if solution.states is not None:  # leaving them out would be honest too
        # No state of this process is far beyond a few standard deviations; uninitialised memory may be.
        assert bool(solution.states.isfinite().all()) and float(solution.states.abs().max()) < 20
        assert run in (paper_sde, paper_ode) or relative(solution.states[-1], solution.sample) < SINGLE


@pytest.mark.parametrize("last", [3, 12, 25])
def test_states_end_in_the_sample_where_a_round_was_interrupted(last: int) -> None:
    calls = itertools.count(1)
    failing = raising(KeyboardInterrupt(), lambda x, t: next(calls) == last)
    solution = parallel(failing, max_batch=8, return_states=True)
    assert set(named(solution)) == {"INTERRUPTED"}
    assert relative(solution.states[-1], solution.sample) < SINGLE


def test_samples_finished_before_the_interruption_are_converged() -> None:
    enough = functools.partial(lambda info, tol: int((info.error_estimate <= tol).sum()) >= 8, tol=1e-2)
    solution = parallel(exact, (16, DIM), tol=1e-2, callback=enough)
    assert 8 <= int((solution.error_estimate <= 1e-2).sum()) < 16
    assert named(solution) == ["CONVERGED" if error <= 1e-2 else "INTERRUPTED" for error in solution.error_estimate]


@every_sampler
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_only_the_sample_with_a_value_that_is_not_finite_fails(run: Run, value: float) -> None:
    given = dict(condition={"label": LABELS})
    with pytest.warns(RuntimeWarning, match="sample 1: the network returned a value that is not finite") as caught:
        solution = run(spoil(value), **given)
    assert named(solution) == ["CONVERGED", "NONFINITE", "CONVERGED", "CONVERGED"]
    assert solution.failures == (str(caught[0].message),) and len(caught) == 1
    time = float(re.fullmatch(r"sample 1: .* at time ([\d.e+-]+)", solution.failures[0])[1])
    assert 0 < time < 0.5
    if run in (parallel, sequential):  # these see every step: the first time of the grid below 1/2
        times = piadm.TimeGrid.default(VP, 40).times
        assert time == pytest.approx(float(times[times < 0.5][0]), rel=1e-5)
    clean, others = run(spoil(value, sample=9), **given), [0, 2, 3]
    assert clean.converged and relative(solution.sample[others], clean.sample[others]) < SINGLE
    saved = clean.stats.evaluations_per_sample - solution.stats.evaluations_per_sample
    assert saved[others].tolist() == [0, 0, 0] and (run is sequential or saved[1] > 0)  # given up, it costs no more


@every_sampler
def test_an_exception_in_the_network_is_named(run: Run) -> None:
    network = raising(ZeroDivisionError("my own words"), lambda x, t: float(t.min()) < 0.7)
    with pytest.raises(piadm.NetworkError, match=r"samples 0\.\.3 at times? .*: ZeroDivisionError: my own") as caught:
        run(network)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(piadm.NetworkError, match=r"sample 0 at time [\d.]+:") as caught:
        run(network, max_batch=1)
    assert float(re.search(r"at time ([\d.]+):", str(caught.value))[1]) < 0.7


WRONG: dict[str, tuple[Network, str]] = {
    "columns": (lambda x, t: x[:, :3], r"returned shape \(\d+, 3\) for rows of shape \(\d+, 4\)"),
    "rows": (lambda x, t: x[:1], r"returned shape \(1, 4\) for rows"),
    "tuple": (lambda x, t: (1, x), "got int"),
    "dict": (lambda x, t: {"sample": x}, "got dict"),
    "none": (lambda x, t: None, "got NoneType"),
    "integers": (lambda x, t: x.long(), "int64"),
    "complex": (lambda x, t: torch.complex(x, x), "complex64"),
}


@pytest.mark.filterwarnings("ignore:Casting complex values")
@pytest.mark.parametrize("network, message", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("run", [parallel, sequential], ids=["parallel", "sequential"])
def test_wrong_output_is_named(run: Run, network: Network, message: str) -> None:
    with pytest.raises(piadm.NetworkError, match=rf"samples 0\.\.3 at times? .*{message}"):
        run(network)


@every_sampler
@pytest.mark.parametrize(
    "error", [torch.cuda.OutOfMemoryError(), RuntimeError("MPS backend out of memory"), MemoryError()], ids=repr
)
def test_smaller_batches_follow_when_memory_runs_out(run: Run, error: Exception) -> None:
    sizes: list[int] = []

    network = raising(error, lambda x, t: sizes.append(len(x)) or len(x) > 3)
    found, free = run(network, max_batch=64), run(exact, max_batch=64)
    assert relative(found.sample, free.sample) < SINGLE and found.stats.peak_batch <= 3
    assert torch.equal(found.stats.evaluations_per_sample, free.stats.evaluations_per_sample)
    assert sum(size for size in sizes if size <= 3) == int(found.stats.evaluations_per_sample.sum())
    # The size is halved and remembered: from 64 rows to 2 in five failures, not one in every round.
    assert 1 <= sum(size > 3 for size in sizes) <= 5
    with pytest.raises(piadm.NetworkError, match=r"sample 0 at time") as caught:
        run(raising(error, lambda x, t: True))
    assert caught.value.__cause__ is error


@pytest.mark.filterwarnings("ignore:sample 1:RuntimeWarning")
def test_raise_on_failure_hands_over_the_solution() -> None:
    nan = dict(condition={"label": LABELS})
    cases: list[tuple[Run, Network, dict[str, Any], str]] = [
        (parallel, exact, dict(max_rounds=2, tol=1e-6), "4 MAX_ROUNDS"),
        (refined, exact, dict(callback=lambda info: True), "4 INTERRUPTED"),
        *((run, spoil(math.nan), nan, "3 CONVERGED, 1 NONFINITE") for run in SAMPLERS.values()),
    ]
    for run, network, more, message in cases:
        with pytest.raises(piadm.NotConvergedError, match=message) as caught:
            run(network, raise_on_failure=True, **more)
        without, handed = run(network, **more), caught.value.solution
        assert handed.status == without.status
        assert torch.allclose(handed.sample, without.sample, rtol=0, atol=0, equal_nan=True)
    assert parallel(exact, raise_on_failure=True).converged


@every_sampler
def test_gradients_stay_out(run: Run) -> None:
    weight = torch.nn.Parameter(torch.ones(()))

    def network(x: Tensor, t: Tensor) -> Tensor:
        assert not torch.is_grad_enabled() and not x.requires_grad and not t.requires_grad
        return weight * exact(x, t)

    solution = run(network, initial=torch.ones(SHAPE, requires_grad=True), return_states=True)
    assert not solution.sample.requires_grad and not solution.states.requires_grad and torch.is_grad_enabled()


@every_sampler
def test_conditions_reach_the_network_row_by_row(run: Run) -> None:
    token, targets = object(), torch.linspace(-3, 3, BATCH)[:, None].expand(SHAPE)

    def network(x: Tensor, t: Tensor, label: Tensor, target: Tensor, scale: float, token_: object) -> Tensor:
        assert scale == 2.5 and token_ is token and label.shape == (len(x),) == t.shape
        assert torch.equal(target, targets[label])
        return target + 0.3 * t[:, None].to(x) * torch.tanh(x)

    def condition(chosen: list[int]) -> dict[str, object]:
        return dict(label=LABELS[chosen], target=targets[chosen], scale=2.5, token_=token)

    together = run(network, condition=condition([0, 1, 2, 3]), max_batch=7, seed=3)
    for sample in range(BATCH):  # a row with another sample's condition would end at another target
        alone = run(network, (1, DIM), condition=condition([sample]), seed=[(3, sample)])
        assert relative(alone.sample[0], together.sample[sample]) < 1e-2  # the tolerance; targets are 2 apart


@every_sampler
def test_guidance_is_its_formula_and_counts_both_rows(run: Run) -> None:
    def network(x: Tensor, t: Tensor, shift: Tensor) -> Tensor:
        sizes.append(len(x))
        return exact(x, t) + shift

    def by_hand(x: Tensor, t: Tensor, shift: Tensor) -> Tensor:
        with_, without = network(x, t, shift), network(x, t, torch.full_like(shift, -0.1))
        return without + 1.5 * (with_ - without)

    sizes: list[int] = []
    given = dict(condition={"shift": torch.linspace(0, 0.3, BATCH)[:, None]})
    guided = run(piadm.GuidedNetwork(network, 1.5, {"shift": torch.tensor([[-0.1]])}), max_batch=5, **given)
    assert max(sizes) == guided.stats.peak_batch == 4  # whole pairs only
    assert sum(sizes) == int(guided.stats.evaluations_per_sample.sum())
    plain = run(by_hand, **given)
    assert relative(guided.sample, plain.sample) < SINGLE
    assert torch.equal(guided.stats.evaluations_per_sample, 2 * plain.stats.evaluations_per_sample)


@every_sampler
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("given", [None, torch.float16, torch.float64])
def test_the_network_keeps_its_dtype(run: Run, kind: torch.dtype, given: torch.dtype | None) -> None:
    class Network(torch.nn.Linear):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            assert x.dtype == self.weight.dtype == kind
            assert t.dtype == (torch.float64 if kind == torch.float64 else torch.float32)  # whatever the states are
            return 0.1 * super().forward(x)

    wide = torch.float64 if torch.float64 in (kind, given) else torch.float32
    solution = run(Network(DIM, DIM, dtype=kind), initial=None if given is None else torch.ones(SHAPE, dtype=given))
    assert solution.sample.dtype == wide and bool(solution.sample.isfinite().all())


@pytest.mark.parametrize("schedule", [VP, piadm.VESchedule(), piadm.FlowSchedule()], ids=["vp", "ve", "flow"])
@pytest.mark.parametrize("method", ["sde", "ode"])
def test_every_prediction_of_one_model_gives_one_sample(method: str, schedule: piadm.NoiseSchedule) -> None:
    def predict(x: Tensor, t: Tensor, kind: str) -> Tensor:
        alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
        x0 = MixtureNetwork(schedule, MEANS, 0.3)(x, t)
        eps = (x - alpha * x0) / sigma
        beta = (0.1 + 19.9 * t)[:, None]  # of the VP schedule: alpha' = -beta alpha/2, sigma' = beta alpha^2/(2 sigma)
        slopes = {VP: (-beta * alpha / 2, beta * alpha**2 / sigma / 2), piadm.VESchedule(): (0, 1)}
        fall, rise = slopes.get(schedule, (-1, 1))
        forms = dict(sample=x0, epsilon=eps, score=-eps / sigma, v=alpha * eps - sigma * x0)
        return (forms | {"velocity": fall * x0 + rise * eps})[kind]

    grid = piadm.TimeGrid.log_snr(schedule, 40, *((0.99, 0.01) if isinstance(schedule, piadm.FlowSchedule) else ()))
    given = dict(method=method, grid=grid, initial=torch.ones(SHAPE, dtype=torch.float64))
    samples: list[Tensor] = []
    for kind in ("sample", "epsilon", "score", "v", "velocity"):
        denoiser = piadm.Denoiser(functools.partial(predict, kind=kind), schedule, kind)
        samples.append(piadm.sample_sequential(denoiser, SHAPE, **given).sample)
        samples.append(piadm.sample(denoiser, SHAPE, nodes="all", tol=1e-12, **given).sample)
    # Dividing by alpha, at least 0.0066 here, or by sigma, at least 0.002, leaves 13 of 16 digits.
    assert max(relative(sample, samples[0]) for sample in samples) < 1e-11
