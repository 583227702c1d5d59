"""The rivals of ``piadm compare``: the sequential sample as fixed point, their own rules, and honest counts."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from diffusers import DDIMParallelScheduler, DDPMParallelScheduler
from torch import Tensor

import piadm
from piadm.models import MixtureDenoiser
from piadm.rivals import Course, Lane, Outcome, Rival, Unavailable, chosen, drive, prepare
from piadm.rivals.drive import Budget, Solver
from piadm.rivals.few_steps import few_steps
from piadm.rivals.paradigms import DiffusersSteps, paradigms
from piadm.rivals.parataa import parataa
from piadm.rivals.picard import picard
from piadm.rivals.spacing import borders
from piadm.rivals.srds import srds

SHAPE, STEPS = (3, 8), 30
SCHEDULES = {
    "table": piadm.DiscreteSchedule.ddpm(),
    "vp": piadm.VPSchedule(),
    "ve": piadm.VESchedule(),
    "flow": piadm.FlowSchedule(),
}
# float32 states and estimates on both sides, summed in a different order, relative to the largest state.
SINGLE = 1e-5


def mixture(schedule: piadm.NoiseSchedule) -> piadm.Denoiser:
    means = 0.6 * torch.randn(4, *SHAPE[1:], generator=torch.Generator().manual_seed(1))
    return MixtureDenoiser(schedule, means, 0.01)


def course(method: str, schedule: str = "table", steps: int = STEPS, shape: tuple[int, ...] = SHAPE) -> Course:
    return prepare(mixture(SCHEDULES[schedule]), shape, method=method, steps=steps, seed=2)


def worst(on: Course, outcome: Outcome) -> float:
    return float(on.errors(outcome.sample).max())


#: Every iterative rival, with settings that never stop before the sequential sample is reached.
ENDLESS: dict[str, Callable[[Lane], Solver]] = {
    "paradigms": lambda lane: paradigms(lane, STEPS, 0.0),
    "paradigms, window": lambda lane: paradigms(lane, 7, 0.0),
    "parataa": lambda lane: parataa(lane, STEPS, STEPS, 2, 0.0),
    "parataa, window and order": lambda lane: parataa(lane, 9, 3, 4, 0.0),
    "parataa, no memory": lambda lane: parataa(lane, 9, 1, 0, 0.0),
    "picard": lambda lane: picard(lane, borders(lane.course, 1, "ou"), STEPS),
    "picard, blocks": lambda lane: picard(lane, borders(lane.course, 3, "ou"), STEPS),
    "srds": lambda lane: srds(lane, borders(lane.course, 5, "grid"), -1.0, False),
    "srds, pipelined": lambda lane: srds(lane, borders(lane.course, 6, "log-snr"), -1.0, True),
    "srds, a block per step": lambda lane: srds(lane, borders(lane.course, STEPS, "grid"), -1.0, True),
    "every step": lambda lane: few_steps(lane, torch.arange(STEPS + 1)),
}


#: A frozen score needs alpha > 0 at the first time.
FROZEN = ("parataa", "picard", "piadm")


@pytest.mark.parametrize(
    ("schedule", "name"),
    [pair for pair in itertools.product(SCHEDULES, ENDLESS) if not (pair[0] == "flow" and pair[1].startswith(FROZEN))],
)
@pytest.mark.parametrize("method", ["sde", "ode"])
def test_the_fixed_point_is_the_sequential_sample(method: str, schedule: str, name: str) -> None:
    on = course(method, schedule)
    assert worst(on, drive(on, ENDLESS[name])) <= SINGLE * max(1.0, float(on.start.abs().max()))


@pytest.mark.parametrize("name", FROZEN)
def test_a_frozen_score_is_refused_where_it_says_nothing(name: str) -> None:
    with pytest.raises(Unavailable, match="alpha > 0"):
        chosen([name])[0].ladders(course("ode", "flow"))


@pytest.mark.parametrize("method", ["sde", "ode"])
def test_a_sample_goes_its_own_way_whatever_its_batch(method: str) -> None:
    on, alone = course(method), course(method, shape=(1, *SHAPE[1:]))
    for solver in (
        lambda lane: paradigms(lane, 10, 0.1),
        lambda lane: parataa(lane, 10, 10, 2, 0.1),
        lambda lane: srds(lane, borders(lane.course, 5, "grid"), 1e-2, True),
    ):
        together, single = drive(on, solver), drive(alone, solver)
        assert torch.allclose(together.sample[:1], single.sample, rtol=0, atol=1e-5)  # float32 products by batch size
        assert together.rounds >= single.rounds


@pytest.mark.parametrize(("method", "steps"), [("sde", 1000), ("sde", 50), ("ode", 1000), ("ode", 50)])
def test_our_paradigms_steps_are_those_of_diffusers(method: str, steps: int) -> None:
    on = course(method, steps=steps)
    theirs, lane = DiffusersSteps.of(on), on.lane(1)
    assert isinstance(theirs.scheduler, DDPMParallelScheduler if method == "sde" else DDIMParallelScheduler)
    x = torch.randn(steps, SHAPE[1], generator=torch.Generator().manual_seed(4))
    estimate = torch.randn(steps, SHAPE[1], generator=torch.Generator().manual_seed(5))
    moved = theirs.scheduler.batch_step_no_noise(estimate, theirs.scheduler.timesteps, x)
    ours = lane.step(0, steps, x.double(), estimate.double()) - lane.kicks(0, steps)
    assert float((moved - ours).abs().max()) <= 1e-3  # near clean data by the scheduler's float32 table
    assert float((moved - ours).square().mean().sqrt()) <= 1e-4
    # From diffusers' own variances: the unit of the rule, and the noise.
    torch.testing.assert_close(theirs.noise[:-1], on.spread[: steps - 1], rtol=2e-3, atol=1e-4)
    both = [
        drive(on, lambda lane: paradigms(lane, 25, 0.1)).sample,
        drive(on, lambda lane: theirs.solver(lane, 25, 0.1)).sample,
    ]
    assert worst(on, Outcome(both[1], 0, 0, 0)) <= worst(on, Outcome(both[0], 0, 0, 0)) + 1e-3


def test_diffusers_steps_need_their_own_grid() -> None:
    with pytest.raises(Unavailable, match="discrete table"):
        DiffusersSteps.of(course("ode", "vp"))
    odd = piadm.TimeGrid([999.0, 500.0, 3.0, -1.0])
    with pytest.raises(Unavailable, match="TimeGrid.ddpm"):
        DiffusersSteps.of(prepare(mixture(SCHEDULES["table"]), SHAPE, method="ode", grid=odd))


class Counter:
    """A network that keeps the rows of every call."""

    def __init__(self, network: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.network, self.calls = network, []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls.append(len(x))
        return self.network(x, t)


@pytest.mark.parametrize("method", ["sde", "ode"])
@pytest.mark.parametrize("name", chosen(None), ids=lambda rival: rival.name)
def test_every_call_and_every_row_is_counted(name: Rival, method: str) -> None:
    inner = mixture(SCHEDULES["table"])
    counter = Counter(inner.network)
    denoiser = piadm.Denoiser(counter, inner.schedule, "sample", inner.data_mean, inner.data_variance)
    on = prepare(denoiser, SHAPE, method=method, steps=STEPS, max_batch=10**6)
    try:
        ladders = name.ladders(on)
    except Unavailable:
        assert (name.name, method) == ("unipc", "sde")
        return
    for ladder in ladders[:3]:
        if name.name != "sequential":  # which has run already
            counter.calls.clear()
        outcome = ladder[min(6, len(ladder) - 1)].run(on, Budget())
        assert outcome.rounds == len(counter.calls)
        assert outcome.evaluations * SHAPE[0] == sum(counter.calls)


def test_srds_takes_the_rounds_that_parareal_takes() -> None:
    on, blocks, length = course("ode"), 5, STEPS // 5
    cells = borders(on, blocks, "grid")
    # One correction: a coarse sweep, whose rows are the fine solves' first too; the rest of these, all blocks at
    # once; and the second sweep, of which the first block is known.
    plain = drive(on, lambda lane: srds(lane, cells, 1e9, False))
    assert plain.rounds == blocks + (length - 1) + (blocks - 1)
    assert plain.evaluations == blocks * length + (blocks - 1)
    # Pipelined, the first sweep's solve of block n ends in round n + length, and the second sweep follows at once.
    piped = drive(on, lambda lane: srds(lane, cells, 1e9, True))
    assert piped.rounds == length + (blocks - 1)
    assert torch.allclose(plain.sample, piped.sample, rtol=0, atol=1e-6)
    assert piped.evaluations >= plain.evaluations


@pytest.mark.parametrize("method", ["sde", "ode"])
def test_srds_is_done_after_one_correction_where_coarse_steps_are_exact(method: str) -> None:
    """Data of one point have an estimate that stays the same, so the sweep is right, noise included."""
    denoiser = piadm.Denoiser(lambda x, t: torch.full_like(x, 0.7), SCHEDULES["vp"], "sample")
    grid = piadm.TimeGrid.uniform(SCHEDULES["vp"], STEPS, end=0.1)
    on = prepare(denoiser, SHAPE, method=method, grid=grid, seed=2)
    cells = borders(on, 5, "grid")
    outcome = drive(on, lambda lane: srds(lane, cells, 1e-6, False))
    assert outcome.rounds == drive(on, lambda lane: srds(lane, cells, 1e9, False)).rounds
    assert worst(on, outcome) <= 1e-6


def test_the_window_bounds_the_rows_of_a_round() -> None:
    on = course("sde")
    sizes: list[int] = []

    def watched(lane: Lane) -> Solver:
        work = paradigms(lane, 7, 0.1)
        asked = next(work)
        while True:
            sizes.append(len(asked[1]))
            try:
                asked = work.send((yield asked))
            except StopIteration as end:
                return end.value

    drive(on, watched)
    assert max(sizes) == 7


def test_anderson_needs_fewer_rounds_than_the_plain_iteration() -> None:
    on = course("ode", steps=100)
    plain, accelerated = (drive(on, lambda lane, m=m: parataa(lane, 100, 100, m, 1e-3)) for m in (0, 3))
    assert worst(on, plain) <= 1e-3 and worst(on, accelerated) <= 1e-3
    assert accelerated.rounds < plain.rounds


def test_the_published_algorithm_and_its_blocks_agree_where_their_integrators_do() -> None:
    on = course("ode", steps=1000)
    published, blocks = (chosen([name])[0].ladders(on)[0] for name in ("piadm", "picard"))
    label = "1 block, 20 iterations"
    one, other = (next(rung for rung in rungs if rung.label == label) for rungs in (published, blocks))
    a, b = one.run(on, Budget()), other.run(on, Budget())
    assert (a.rounds, a.evaluations) == (b.rounds, b.evaluations)
    # The two first-order integrators differ by about 1/steps times the size of what they integrate.
    assert float((a.sample.flatten(1) - b.sample).square().mean().sqrt()) <= 1e-2
