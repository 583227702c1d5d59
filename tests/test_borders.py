"""Samples whose paths run along a border between two outcomes, where the iteration may be drawn to and fro."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import piadm
from piadm import builder, settings, stopping
from piadm.activity import SlidingWindow
from piadm.caution import FINER_ROUGH, FIRST_ROUGH, FIRST_SMOOTH, Caution, CoarseRecord
from piadm.cli.model import mixture
from piadm.models import MixtureDenoiser
from piadm.numerics import Table
from piadm.turn import Movement

#: Of 256 samples of this mixture the two that go in circles on 33 nodes for as long as they are let, if all their rows
#: are evaluated from the first round.
CIRCLING = [(0, 115), (0, 160)]


@pytest.fixture
def laps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluate all nodes from the first round, and do not look for samples that are astray."""
    monkeypatch.setattr(settings, "OPENING_FEWEST", 10**9)
    monkeypatch.setattr(stopping, "EARLY", 10**9)


@pytest.mark.usefixtures("laps_alone")
def test_a_sample_that_goes_in_circles_ends_on_finer_nodes() -> None:
    denoiser, shape = mixture(), (len(CIRCLING), 1, 8, 8)
    found = piadm.sample(denoiser, shape, method="ode", seed=CIRCLING)
    exact = piadm.sample_sequential(denoiser, shape, method="ode", seed=CIRCLING)
    assert found.converged and found.stats.rounds < 100
    # The tolerance; two outcomes are about one apart.
    assert float((found.sample - exact.sample).flatten(1).square().mean(1).sqrt().max()) < 1e-2


@pytest.mark.usefixtures("laps_alone")
def test_without_finer_nodes_it_would_go_on_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "LAPS", torch.inf)
    monkeypatch.setattr(builder, "FIRST_SMOOTH", Caution())
    found = piadm.sample(mixture(), (len(CIRCLING), 1, 8, 8), method="ode", seed=CIRCLING, max_rounds=150)
    assert not found.converged


def test_given_nodes_end_it_after_as_many_rounds_as_could_have_told() -> None:
    found = piadm.sample(mixture(), (len(CIRCLING), 1, 8, 8), method="ode", seed=CIRCLING, nodes=33)
    assert piadm.Status.MAX_ROUNDS in found.status and found.stats.rounds == 2 * 33


@pytest.mark.parametrize("tol", [1e-1, 3e-2])
def test_a_loose_tolerance_does_not_end_on_the_wrong_side(tol: float) -> None:
    denoiser, shape = mixture(), (256, 1, 8, 8)
    found = piadm.sample(denoiser, shape, method="ode", tol=tol)
    exact = piadm.sample_sequential(denoiser, shape, method="ode")
    error = (found.sample - exact.sample).flatten(1).square().mean(1).sqrt()
    # Of 1024 samples 99.6 % were within; they were 92 % of those at 1e-1 when the iteration stopped there.
    assert found.converged and float((error <= tol).double().mean()) >= 0.97


@pytest.mark.parametrize("nodes", ["all", None])
@pytest.mark.parametrize("schedule", [piadm.VPSchedule(), piadm.VESchedule()], ids=["VP", "VE"])
def test_data_far_wider_than_told_do_not_pass_for_converged(schedule: piadm.NoiseSchedule, nodes: str | None) -> None:
    means = 100.0 * torch.randn(5, 2, generator=torch.Generator().manual_seed(1)).double()
    denoiser = replace(MixtureDenoiser(schedule, means, 100.0), data_mean=0.0, data_variance=1.0)
    found = piadm.sample(denoiser, (32, 2), method="ode", steps=200, tol=0.1, nodes=nodes)
    exact = piadm.sample_sequential(denoiser, (32, 2), method="ode", steps=200)
    errors = (found.sample - exact.sample).double().square().mean(1).sqrt()
    assert found.converged
    # Judged by the told variance half of them were outside, by up to 60 times.  One may be on a border.
    assert int((errors > 0.1).sum()) <= 1


def moved(surprise: Table, end: Table, interpolation: Table, amplification: float = 1.0) -> Movement:
    """A round of samples of any size, of which no row was lost."""
    zero = np.zeros_like(end)
    lost = np.zeros_like(surprise, dtype=bool)
    none = np.zeros_like(surprise)
    once, no = zero + amplification, lost[0]
    return Movement(surprise, none, end, interpolation, zero, zero, once, zero + 99, lost, no, no)


@pytest.mark.parametrize("refinable", [True, False])
def test_amplified_errors_are_held_to_the_same_aim(refinable: bool) -> None:
    def judged(amplification: float) -> tuple[float, stopping.Verdict]:
        rule = stopping.CarriedResidual(
            np.ones(2), np.full((2, 1), 1e-9), 1.0, aim=np.ones(1), refinable=refinable, exact_after=math.inf,
            caution=Caution(),
        )  # fmt: skip
        for number in range(4):
            heard = np.full((2, 1), 0.1 * 0.1**number)
            movement = moved(heard, np.full(1, 1e-9), np.full(1, 0.3), amplification)
            error, verdict = rule.judge(movement, 0.1 * heard)
        return float(error[0]), stopping.Verdict(int(verdict[0]))

    once, often = judged(1.0), judged(10.0)
    assert once[0] == pytest.approx(0.3, rel=1e-4) and often[0] == pytest.approx(10 * once[0])
    assert (once[1], often[1]) == (stopping.Verdict.DONE, stopping.Verdict.REFINE)


@pytest.mark.parametrize(
    ("interpolation", "refinable", "expected", "leaves"),
    [
        ([1.0] * 9, True, 1.0, stopping.EARLY + 2),
        ([1.0] * 7 + [0.1, 1.0, 1.0], True, 1.0, stopping.EARLY + 2),
        ([0.1] * 6 + [1.0, 0.1, 1.0, 1.0, 0.1], True, 1.0, 10),  # in two rounds running
        ([0.3] * 9, True, 1.0, None),  # below ASTRAY times the aim
        ([1.0] * 9, False, 1.0, None),  # there are no finer nodes
        ([1.0] * 9, True, np.inf, None),  # a row was never evaluated
    ],
)
def test_a_sample_far_from_resolved_leaves_before_it_has_converged(
    interpolation: list[float], refinable: bool, expected: float, leaves: int | None
) -> None:
    rule = stopping.CarriedResidual(
        np.ones(2), np.full((2, 1), 1e-9), 1.0, aim=np.ones(1), refinable=refinable, exact_after=math.inf,
        caution=FIRST_SMOOTH,
    )  # fmt: skip
    for number, error in enumerate(interpolation, start=1):
        movement = moved(np.ones((2, 1)), np.full(1, 9.0), np.full(1, error), 10.0)
        _, verdict = rule.judge(movement, np.full((2, 1), expected))
        left = leaves is not None and number >= leaves
        assert (bool(rule.leaving[0]), verdict[0] == stopping.Verdict.REFINE) == (left, left)


def test_the_slowest_sample_of_a_batch_does_not_wait_on_nodes_that_are_too_few() -> None:
    found = piadm.sample(mixture(), (256, 1, 8, 8), method="ode")
    # It had converged on five node sets, one after the other, in 79 rounds; leaving early it takes 26.
    assert found.converged and found.stats.rounds < 40


def test_the_interpolation_error_of_a_slow_sample_is_doubted() -> None:
    def judged(rounds: int) -> tuple[float, stopping.Verdict]:
        rule = stopping.CarriedResidual(
            np.ones(2), np.full((2, 1), 1e-9), 1.0, aim=np.ones(1), refinable=True, exact_after=math.inf,
            caution=Caution(calm=4.5),
        )  # fmt: skip
        for number in range(rounds):
            heard, small = np.full((2, 1), 1e-3 * 0.1**number), np.full(1, 1e-3 * 0.1**number)
            movement = moved(heard, small, np.full(1, 0.3))
            error, verdict = rule.judge(movement, 0.1 * heard)
        return float(error[0]), stopping.Verdict(int(verdict[0]))

    assert judged(4) == (pytest.approx(0.3, rel=1e-4), stopping.Verdict.DONE)
    assert judged(7) == (pytest.approx(0.3 * 2**2.5, rel=1e-4), stopping.Verdict.REFINE)  # two and a half later


def test_what_is_left_on_finer_nodes_is_not_taken_to_cancel_like_their_first_surprises() -> None:
    def judged(caution: Caution) -> float:
        rule = stopping.CarriedResidual(
            np.ones(2), np.full((2, 1), 1e-9), 1.0, aim=np.ones(1), refinable=False, exact_after=math.inf,
            caution=caution, coarse=CoarseRecord(np.zeros(1), np.full(1, np.inf), np.ones(1)),
        )  # fmt: skip
        heard, nothing = np.ones((2, 1)), np.zeros(1)
        for _round in range(6):  # the end moves by 0.005 of what is heard
            movement = moved(heard, np.full(1, 0.01), nothing)
            error, _ = rule.judge(movement, np.full((2, 1), 0.5))
        return float(error[0])

    # Two rows of 0.5 are left, and a path that stands still contracts by nothing.
    for caution in (FIRST_ROUGH, FINER_ROUGH):
        assert judged(caution) == pytest.approx(caution.least_share)
    assert FINER_ROUGH.least_share > FIRST_ROUGH.least_share


def test_errors_count_more_where_the_ends_are_further_apart_than_foretold() -> None:
    coarse = CoarseRecord(np.zeros(4), np.array([0.2, 0.2, 0.2, np.inf]), np.array([1.0, 1.0, 3.0, 1.0]))
    rule = stopping.CarriedResidual(
        np.ones(2), np.full((2, 4), 1e-9), 1.0, aim=np.ones(4), refinable=True, exact_after=math.inf,
        caution=FINER_ROUGH, coarse=coarse,
    )  # fmt: skip
    heard, small = np.full((2, 4), 1e-3), np.full(4, 1e-3)
    assert rule.growth.tolist() == [1, 1, 3, 1]
    for apart in ([0.05, 0.2, 0.2, 9.0], [0.05, 0.1, 0.2, 9.0]):  # what was once seen is kept
        rule.judge(moved(heard, small, np.array(apart)), heard)
        assert rule.growth.tolist() == [1, pytest.approx(2), 3, 1]
    assert rule.record(np.array([True, True, False, True])).interpolation.tolist() == [0.05, 0.1, 9.0]
    rule.judge(moved(heard, small, np.full(4, 9.0)), heard)
    assert rule.growth.tolist() == [stopping.MOST_GROWTH] * 3 + [1]
    assert rule.record(np.ones(4, bool)).interpolation.tolist() == [0.1, 0.1, 0.1, 9.0]  # finer nodes leave half


def test_rows_settle_later_where_errors_grow() -> None:
    def evaluations(growth: float) -> int:
        class Grown(stopping.CarriedResidual):
            def _compare(self, interpolation: Table) -> None:
                self.grown = np.full_like(interpolation, growth)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(builder, "CarriedResidual", Grown)
            found = piadm.sample(mixture(), (4, 1, 8, 8), method="sde", steps=200, nodes=50)
        return int(found.stats.evaluations)

    assert evaluations(1.0) < evaluations(4.0) < evaluations(16.0)


def test_late_rows_do_not_crowd_out_those_that_matter_more() -> None:
    expected = np.array([0.9, 0.9, 0.9, 2.0, 0.9, 2.0, 2.0])[:, None]  # in units of the threshold
    window = SlidingWindow(4, np.ones((7, 1)))
    assert window.choose(expected, 0)[:, 0].nonzero()[0].tolist() == [3, 5, 6]
    assert window.choose(expected, 100)[:, 0].nonzero()[0].tolist() == [0, 3, 5, 6]
    patient = SlidingWindow(4, np.ones((7, 1)), patience=200)
    assert patient.choose(expected, 100)[:, 0].nonzero()[0].tolist() == [3, 5, 6]


@pytest.mark.parametrize("caution", [FIRST_SMOOTH, FIRST_ROUGH, FINER_ROUGH])
def test_a_sample_whose_rows_have_all_settled_does_not_wait_for_more(caution: Caution) -> None:
    interpolation = np.linspace(0, 3, 301)
    samples, nothing = len(interpolation), np.zeros((2, 301))
    rule = stopping.CarriedResidual(
        np.ones(2), np.full((2, samples), 0.5 * caution.settled), 1.0, aim=np.ones(samples), refinable=True,
        exact_after=math.inf, caution=caution,
    )  # fmt: skip
    movement = moved(nothing, np.zeros(samples), interpolation)
    error, verdict = rule.judge(movement, np.full((2, samples), 0.5 * caution.settled))
    assert (error[interpolation == 0] == caution.settled).all()  # what the rows that settled may leave
    assert ((verdict == stopping.Verdict.DONE) == (error <= 1)).all()
    assert (verdict[error > 1] == stopping.Verdict.REFINE).all()


def test_samples_may_take_a_round_more_for_every_halving_of_a_small_aim() -> None:
    def later(tol: float, variance: float) -> float:
        denoiser = replace(mixture(), data_variance=variance)
        return settings.resolve(
            denoiser, method="sde", grid=None, steps=100, tol=tol, nodes=None, window=None, guess=None
        ).later

    assert [later(tol, 1.0) for tol in (0.5, 1e-2, 5e-3, 1.25e-3)] == pytest.approx([0, 0, 1, 3])
    assert later(1e-2, 4.0) == pytest.approx(1)  # relative to the data


def test_a_round_without_surprise_is_taken_for_chance() -> None:
    rule = stopping.CarriedResidual(
        np.ones(2), np.full((2, 1), 1e-9), 1.0, aim=np.ones(1), refinable=False, exact_after=math.inf,
        caution=FIRST_SMOOTH,
    )  # fmt: skip
    nothing = np.zeros(1)
    for left, contraction in ((4.0, 0.9), (2.0, 0.5), (2e-3, 0.25), (1e-6, 0.125)):  # halved at most
        heard = np.full((2, 1), 10 * left)
        error, _ = rule.judge(moved(heard, 10 * heard[0], nothing), np.full((2, 1), left))
        assert rule.contraction == pytest.approx(contraction)
    assert error == pytest.approx(100 * 1e-6)  # the end's last change, as before


@pytest.mark.parametrize("method", ["ode", "sde"])
def test_what_settled_rows_leave_is_looked_at_before_a_sample_that_moved_much_is_still(method: str) -> None:
    means = torch.randn(200, 50, generator=torch.Generator().manual_seed(21)).double()
    denoiser = MixtureDenoiser(piadm.VPSchedule(), means, 0.02)
    # Of these samples 15 (ODE) and 17 (SDE) had ended outside, by up to 3.9 times.
    found = piadm.sample(denoiser, (512, 50), method=method, steps=5)
    exact = piadm.sample_sequential(denoiser, (512, 50), method=method, steps=5)
    outside = (found.sample - exact.sample).square().mean(1).sqrt() > 1e-2
    assert found.converged and found.stats.rounds <= 6
    assert outside.double().mean() <= 0.01  # a fifth of what is promised
