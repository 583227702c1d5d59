"""The study behind ``piadm compare``: how ladders are climbed, and which run is the best."""

from __future__ import annotations

import math

import pytest
import torch

import piadm
from piadm.models import MixtureDenoiser
from piadm.rivals import Course, Lane, Outcome, Rival, Setting, chosen, drive, prepare, rival, study
from piadm.rivals.drive import Budget, GaveUp, Solver
from piadm.rivals.few_steps import few_steps
from piadm.rivals.spacing import borders

SHAPE, STEPS = (3, 8), 30
SCHEDULE = piadm.VPSchedule()


def mixture() -> piadm.Denoiser:
    means = 0.6 * torch.randn(4, *SHAPE[1:], generator=torch.Generator().manual_seed(1))
    return MixtureDenoiser(SCHEDULE, means, 0.01)


def course() -> Course:
    return prepare(mixture(), SHAPE, method="ode", steps=STEPS, seed=2)


def rungs(*costs_and_errors: tuple[int, float]) -> list[Setting]:
    """A ladder with known outcomes: all samples are so far from the truth."""

    def rung(rounds: int, error: float) -> Setting:
        def run(on: Course, budget: Budget) -> Outcome:
            if rounds > budget.rounds and rounds > budget.evaluations:
                raise GaveUp
            return Outcome(on.truth.sample + error, rounds, float(rounds), 0.0)

        return Setting(f"{rounds}", run)

    return [rung(*pair) for pair in costs_and_errors]


def tried(ladders: list[list[Setting]], *targets: float) -> list[str]:
    known = Rival("known", lambda method: "known", lambda on: ladders, "")
    return [run.setting for run in study(course(), [known], targets)[0].runs]


def test_a_ladder_is_climbed_until_the_smallest_error_is_reached() -> None:
    ladder = rungs((2, 0.5), (4, 0.09), (6, 0.03), (8, 0.009), (10, 0.001))
    assert tried([ladder], 0.1) == ["2", "4"]
    assert tried([ladder], 0.1, 0.01) == ["2", "4", "6", "8"]


def test_a_later_ladder_is_entered_where_the_last_one_met_the_error() -> None:
    first = rungs((2, 0.5), (4, 0.3), (6, 0.2), (8, 0.09))
    later = rungs((1, 0.5), (3, 0.05), (5, 0.04), (7, 0.03))
    assert tried([first, later], 0.1) == ["2", "4", "6", "8", "5", "3", "1"]  # entered at "5": down, not up


def test_a_ladder_is_left_at_its_floor_and_when_it_costs_too_much() -> None:
    floor = rungs(*((k, 0.2) for k in range(2, 20)))
    assert tried([floor], 0.1) == ["2", "3", "4", "5"]
    idle = rungs((1, 2.0), (1, 2.0), (1, 2.0), (1, 2.0), (1, 2.0), (3, 0.05))
    assert tried([idle], 0.1) == ["1"] * 5 + ["3"]  # the same run again is no floor
    dear = rungs(*((10 * k, 1 / k) for k in range(1, 99)))
    assert tried([dear], 1e-3)[-1] == str(STEPS)  # what the sequential sampler costs


def test_the_best_is_the_cheapest_within_the_error_and_the_front_is_undominated() -> None:
    ladders = [rungs((9, 0.5), (6, 0.2), (5, 0.3), (7, 0.04))]
    result = study(course(), [Rival("known", str, lambda on: ladders, "")], [0.05])[0]
    assert result.best(0.25).rounds == 6
    assert result.best(0.01) is None
    assert result.closest.rounds == 7
    assert [run.rounds for run in result.front(cost="rounds", statistic="worst")] == [5, 6, 7]


def test_a_run_that_diverges_or_costs_too_much_is_given_up() -> None:
    on = course()

    def explode(lane: Lane) -> Solver:
        yield lane.start[None] * math.nan, torch.tensor([0])
        return lane.start

    with pytest.raises(GaveUp, match="diverged"):
        drive(on, explode)
    with pytest.raises(GaveUp, match="budget after 11 rounds"):
        drive(on, lambda lane: few_steps(lane, torch.arange(STEPS + 1)), Budget(10, 10))


def test_interrupting_a_study_keeps_what_is_finished() -> None:
    def interrupted(on: Course) -> list[list[Setting]]:
        raise KeyboardInterrupt

    good = Rival("good", str, lambda on: [rungs((2, 0.0))], "")
    bad = Rival("bad", str, interrupted, "")
    assert [result.rival.name for result in study(course(), [good, bad, good], [0.1])] == ["good"]


def test_bad_input_is_named() -> None:
    denoiser = mixture()
    with pytest.raises(ValueError, match="method must be one of 'sde', 'ode'"):
        prepare(denoiser, SHAPE, method="euler")
    with pytest.raises(ValueError, match="targets must be a finite number > 0"):
        study(course(), [], [0.0])
    with pytest.raises(ValueError, match="only must be one of"):
        chosen(["anderson"])
    with pytest.raises(ValueError, match="count must be an integer from 1 to 30"):
        borders(course(), 31, "grid")
    broken = piadm.Denoiser(lambda x, t: x * math.nan, SCHEDULE, "sample")
    with pytest.warns(RuntimeWarning), pytest.raises(ValueError, match="denoiser must give finite values; sample 0"):
        prepare(broken, SHAPE, steps=3)
    assert rival.at_most((100, 8, 200), 50) == [50, 8]
