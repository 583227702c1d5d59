"""Shared innovations: which rows go without an evaluation, what they take instead, and what is known of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import piadm
from piadm.activity import Outlook
from piadm.builder import Builder
from piadm.iteration import PathRun
from piadm.models import MixtureDenoiser
from piadm.numerics import Flags
from piadm.sharing import MISSED, Between, Sharing, neighbours
from piadm.turn import Turn

NODES = 12


def outlook(drift: float | np.ndarray = 1.0, known: bool = True) -> Outlook:
    found = Outlook(np.ones(NODES), 1)
    found.known[:] = found.taught[:] = known
    found.look(np.broadcast_to(np.reshape(drift, (-1, 1)), (NODES, 1)).astype(float))
    return found


def below(strength: float = 1.0) -> np.ndarray:
    return strength * np.tril(np.ones((NODES, NODES)), -1)


def chosen(*rows: int) -> Flags:
    found = np.zeros((NODES, 1), bool)
    found[list(rows)] = True
    return found


def test_every_second_row_is_shared_and_lies_between_two_that_are_evaluated() -> None:
    sharing = Sharing(below(), drafted=False)
    some = chosen(2, 3, 4, 5, 6, 7, 9, 10, 11)  # 8 has settled: no innovation reaches 7 or 9
    assert sharing.choose(some, outlook(), 1)[:, 0].nonzero()[0].tolist() == [3, 5]


def test_rows_before_which_nothing_moves_any_more_are_evaluated() -> None:
    """What sharing would miss of them, nothing would bring later."""
    drift = np.where(np.arange(NODES) < 6, 1e-3, 1.0)
    rows = Sharing(below(0.01), drafted=False).choose(chosen(*range(NODES)), outlook(drift), 1)[:, 0]
    # At node i > 6 the moves to come bring 0.01 (i - 6), of which COMING times are to exceed MISSED.
    assert not rows[:7].any()
    assert not rows[7:].any()
    assert Sharing(below(), drafted=False).choose(chosen(*range(NODES)), outlook(drift), 1)[7:11:2, 0].all()


def test_a_row_that_has_missed_more_than_its_neighbours_still_expect_is_evaluated() -> None:
    doubtful = outlook()
    doubtful.doubt[5] = 0.6
    rows = Sharing(below(), drafted=False).choose(chosen(*range(NODES)), doubtful, 1)[:, 0]
    assert rows[3] and not rows[5] and rows[7]


def test_a_row_that_has_learnt_less_than_its_neighbours_is_evaluated() -> None:
    found = outlook()
    found.taught[[3, 5, 6]] = False
    sharing, everywhere = Sharing(below(), drafted=False), chosen(*range(NODES))
    assert sharing.choose(everywhere, found, 1)[:, 0].nonzero()[0].tolist() == [1, 7, 9]
    found.taught[4] = False  # none of 4, 5 and 6 has
    assert sharing.choose(everywhere, found, 1)[:, 0].nonzero()[0].tolist() == [1, 5, 7, 9]


def test_what_an_innovation_has_taught() -> None:
    found, ones, doubtful = outlook(), np.ones((NODES, 1)), np.where(chosen(3, 4), 0.4, 0.0)
    found.taught[:] = False
    found.learn(chosen(2), chosen(3, 4), ones, ones, doubtful)
    assert found.taught[:, 0].nonzero()[0].tolist() == [2, 3, 4]
    found.learn(chosen(3), chosen(4), ones, ones, doubtful)  # what was missed of row 3 says nothing of its slope
    assert found.taught[:, 0].nonzero()[0].tolist() == [2, 4]


def test_what_is_missed_beside_rows_of_which_something_else_is_expected() -> None:
    shared = chosen(3, 4, 8)
    between = Between.of(shared, chosen(2, 5, 7, 9))
    expected = outlook().drifted.copy()
    apart = np.array([0.3, 0.3, np.nan])
    alike = [2**0.5 / 3 * 0.3, 2**0.5 / 3 * 0.3, np.inf]  # w = 1/3, 2/3, 1/2
    assert between.missed(apart, expected) == pytest.approx(alike, rel=1e-12)
    expected[[2, 3, 5], 0] = 4.0, 1.5, 1.0  # interpolated, 3 and 2 are expected of rows 3 and 4
    assert between.missed(np.zeros(3), expected) == pytest.approx([1.5, 1.0, 0.0], rel=1e-12)
    expected[2] = np.inf  # never evaluated
    assert between.missed(np.zeros(3), expected).tolist() == [0, 0, 0]


def test_rows_never_evaluated_are_shared_in_the_first_round_from_a_draft_alone() -> None:
    unknown, everywhere = outlook(known=False), chosen(*range(NODES))
    first = Sharing(below(), drafted=True).choose(everywhere, unknown, 0)[:, 0]
    assert (~first).nonzero()[0].tolist() == [0, 4, 8, 9, 10, 11]  # nothing lies beyond 8
    assert not Sharing(below(), drafted=False).choose(everywhere, unknown, 0).any()
    assert not Sharing(below(), drafted=True).choose(everywhere, unknown, 1).any()


def test_the_nearest_evaluated_rows() -> None:
    before, after = neighbours(chosen(2, 5))
    assert before[:, 0].tolist() == [-1, -1, 2, 2, 2, *[5] * 7]
    assert after[:, 0].tolist() == [2, 2, 2, 5, 5, 5, *[NODES] * 6]


def test_what_was_missed_is_expected_until_the_row_is_evaluated() -> None:
    found, nothing = outlook(), chosen()
    zero = np.zeros((NODES, 1))
    missed = np.where(chosen(3), 0.4, 0.0)
    for _ in range(2):  # independent: the squares add
        found.learn(nothing, chosen(3), zero, zero, missed)
    found.look(zero)
    assert found.expected[3, 0] == pytest.approx(0.4 * 2**0.5, rel=1e-12) and found.expected[2, 0] == 0
    # Evaluated: nothing is left; but the surprise is what was missed, and says nothing of the next drift.
    found.learn(chosen(3), nothing, np.where(chosen(3), 0.5, 0.0), np.where(chosen(3), 1e-6, 0.0), zero)
    found.look(zero + 1)
    assert found.doubt[3, 0] == 0 and found.expected[3, 0] == 1


def mixture(seed: int = 0) -> piadm.Denoiser:
    modes = torch.randn(8, 16, generator=torch.Generator().manual_seed(seed)).double()
    return MixtureDenoiser(piadm.DiscreteSchedule.ddpm(), modes, 0.04)


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Turn, Tensor, Tensor]]:
    """Every round with shared rows, with its innovations and how far their neighbours' are apart."""
    found = []
    share = Turn._share

    def watched(self: Turn) -> list[Tensor]:
        missed = share(self)
        if missed:
            found.append((self, self.innovation.clone(), torch.cat(missed)))
        return missed

    monkeypatch.setattr(Turn, "_share", watched)
    return found


def test_a_shared_innovation_lies_between_its_neighbours(turns: list[tuple[Turn, Tensor, Tensor]]) -> None:
    piadm.sample(mixture(), (8, 16), seed=1)
    assert len(turns) > 3
    for turn, innovation, missed in turns:
        for (node, sample), square in zip(np.argwhere(turn.shared), missed, strict=True):
            place = turn.place[node, sample]
            assert turn.active[node - 1, sample] and turn.active[node + 1, sample]
            left, middle, right = innovation[place - 1 : place + 2]
            # One rounding of float32 each for the difference, its half and the sum.
            scale = float(left.abs().max() + right.abs().max())
            assert torch.allclose(middle, (left + right) / 2, rtol=0, atol=4e-7 * scale)
            assert float(square) == pytest.approx(float((right - left).square().mean()), rel=1e-4, abs=1e-24)


def test_sharing_saves_evaluations_and_keeps_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth at least, on this mixture; 6 to 21 % were saved in the mean on five networks."""
    found = piadm.sample(mixture(), (32, 16), seed=2)
    whole = piadm.sample_sequential(mixture(), (32, 16), seed=2)
    errors = (found.sample - whole.sample).square().mean(1).sqrt()
    assert found.converged and (errors < 1e-2).float().mean() > 0.95
    monkeypatch.setattr(Builder, "sharing", lambda *_: None)
    alone = piadm.sample(mixture(), (32, 16), seed=2)
    assert found.stats.evaluations < 0.9 * alone.stats.evaluations
    assert found.stats.rounds_per_sample.float().mean() < 1.1 * alone.stats.rounds_per_sample.float().mean()


@pytest.mark.parametrize(
    ("given", "some"),
    [
        ({}, True),
        ({"nodes": 60}, True),
        ({"nodes": "all"}, False),
        ({"method": "ode"}, False),
        ({"linearization": "score"}, False),
    ],
)
def test_who_shares(turns: list[tuple[Turn, Tensor, Tensor]], given: dict[str, object], some: bool) -> None:
    settings: dict[str, object] = {"method": "sde", "steps": 400, "tol": 2e-2, **given}
    piadm.sample(mixture(), (4, 16), seed=1, max_rounds=12, **settings)  # type: ignore[arg-type]
    assert bool(turns) == some


def test_no_row_is_shared_in_the_last_round_that_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing could be evaluated later."""
    found, original = [], PathRun.turn

    def watched(self: PathRun, *, last: bool) -> Turn:
        found.append(original(self, last=last))
        return found[-1]

    monkeypatch.setattr(PathRun, "turn", watched)
    assert not piadm.sample(mixture(), (8, 16), seed=1, max_rounds=6).converged
    assert found[-2].shared.any() and found[-1].active.any() and not found[-1].shared.any()


def test_rows_on_finer_nodes_are_not_led_astray_by_their_neighbours() -> None:
    """Three times as wide as told: these go on to finer nodes, half of whose rows are new."""
    means = 3 * torch.randn(10, 16, generator=torch.Generator().manual_seed(0)).double()
    denoiser = replace(MixtureDenoiser(piadm.DiscreteSchedule.ddpm(), means, 0.04), data_mean=0.0, data_variance=1.0)
    found = piadm.sample(denoiser, (64, 16), tol=3e-3, seed=1)
    errors = (found.sample - piadm.sample_sequential(denoiser, (64, 16), seed=1).sample).square().mean(1).sqrt()
    # When rows shared whatever they had learnt, 14 were outside, by up to 42 times.
    assert found.converged and float(errors.max()) <= 3e-3


def test_what_is_missed_is_about_what_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network is asked after all: in most rounds rows differ from their neighbours by less than ``2 MISSED``."""
    shares, watched = [], []
    original = PathRun.turn

    def asked(self: PathRun, *, last: bool) -> Turn:
        turn = original(self, last=last)
        if turn.shared.any():
            turn = Turn(self.path, turn.active | turn.shared, np.zeros_like(turn.shared))
            watched.append(turn)
        return turn

    follow = Turn.follow

    def compared(self: Turn) -> Tensor:
        if self in watched:
            table = self.path.state.new_zeros(*self.active.shape, self.path.size)
            table[self.rows.node, self.rows.sample] = self.innovation[self.rows.place]
            inside = torch.from_numpy(self.active[:-2] & self.active[1:-1] & self.active[2:])
            missed = table[1:-1] - (table[:-2] + table[2:]) / 2
            shares.append(float(missed[inside].square().mean().sqrt() / table[1:-1][inside].square().mean().sqrt()))
        return follow(self)

    monkeypatch.setattr(PathRun, "turn", asked)
    monkeypatch.setattr(Turn, "follow", compared)
    piadm.sample(mixture(), (8, 16), seed=1)
    assert len(shares) > 3 and np.median(shares) < 2 * MISSED


def test_a_row_beside_one_that_was_lost_is_evaluated_next() -> None:
    """Its neighbour's answer was not finite: nothing is known of what it misses."""
    exact, lost = mixture(), []

    def network(x: Tensor, t: Tensor) -> Tensor:
        answer = exact.network(x, t)
        if len(calls) == 5:
            lost.append(float(t[len(x) // 2]))
            answer[len(x) // 2] = torch.nan
        calls.append(len(x))
        return answer

    calls: list[int] = []
    found = piadm.sample(replace(exact, network=network), (1, 16), seed=1, max_batch=10_000)
    whole = piadm.sample_sequential(exact, (1, 16), seed=1)
    assert lost and found.converged
    assert float((found.sample - whole.sample).square().mean().sqrt()) < 1e-2
