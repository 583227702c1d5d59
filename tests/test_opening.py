"""The first rounds, which are confined to a few of the nodes."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

import piadm
from piadm import Status, settings
from piadm.activity import NARROW
from piadm.cli.model import mixture
from piadm.settings import SampleSettings, resolve
from piadm.solution import RoundInfo

SHAPE = (16, 1, 8, 8)


def engine(method: str, steps: int = 1000, nodes: object = None, tol: float = 1e-2) -> SampleSettings:
    given: dict[str, Any] = {"grid": None, "window": None, "guess": None}
    return resolve(mixture(), method=method, steps=steps, tol=tol, nodes=nodes, **given)


@pytest.mark.parametrize("method", ["ode", "sde"])
@pytest.mark.parametrize("steps", [30, 50, 100, 300, 1000])
def test_opening_nodes_are_few_of_the_nodes_with_both_ends(method: str, steps: int) -> None:
    found = engine(method, steps)
    if method == "sde" and steps <= 30:  # fewer steps than an opening would have nodes
        assert not found.opening
        return
    sets = [few.indices for few in found.opening] + [found.nodes.indices]
    assert len(sets) > 1 and len(sets[0]) >= settings.OPENING_FEWEST
    for few, more in itertools.pairwise(sets):
        assert torch.isin(few, more).all() and few[0] == more[0] and few[-1] == more[-1]
        assert len(few) <= len(more) / 2 + 1


@pytest.mark.parametrize("nodes", ["all", 40])
def test_nodes_that_were_asked_for_are_evaluated_from_the_first_round(nodes: object) -> None:
    assert not engine("ode", nodes=nodes).opening
    rows: list[int] = []
    piadm.sample(mixture(), SHAPE, method="ode", steps=100, nodes=nodes, window="all", callback=lambda info: (
        rows.append(info.active_rows)))  # fmt: skip
    assert rows[0] == 16 * (100 if nodes == "all" else 40)


@pytest.mark.parametrize("window", [None, "all", "auto", 5])
def test_the_first_rounds_evaluate_no_more_than_the_opening(window: object) -> None:
    infos: list[RoundInfo] = []
    found = piadm.sample(mixture(), SHAPE, method="ode", window=window, callback=lambda info: infos.append(info))
    opening = engine("ode").opening
    assert len(opening) == 2 and found.converged
    most = [16 * (5 if window == 5 else math.ceil(NARROW * few.count)) for few in opening]
    assert infos[0].active_rows == most[0] and infos[1].active_rows <= most[1]
    assert all(info.error_estimate.isinf().all() for info in infos[:2])  # it tells nothing of the errors
    assert window in ("auto", 5) or infos[2].active_rows > most[1]


@pytest.mark.parametrize("method", ["ode", "sde"])
def test_the_opening_saves_evaluations_and_changes_no_sample(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of 192 samples it saved a sixth of the evaluations or more, and took 0.7 rounds more at most, on average.
    opened = piadm.sample(mixture(), SHAPE, method=method)
    monkeypatch.setattr(settings, "OPENING_FEWEST", 10**9)
    plain = piadm.sample(mixture(), SHAPE, method=method)
    assert opened.converged and plain.converged
    assert opened.stats.evaluations < 0.95 * plain.stats.evaluations
    assert opened.stats.rounds_per_sample.sum() <= plain.stats.rounds_per_sample.sum() + len(opened.status)
    apart = (opened.sample - plain.sample).flatten(1).square().mean(1).sqrt()
    assert (apart > 2e-2).sum() <= 1  # twice tol; one in a hundred is undecided between two components


@pytest.mark.parametrize("method", ["ode", "sde"])
@pytest.mark.parametrize("last", [1, 2, 3])
def test_a_run_that_ends_in_the_opening_returns_one_path(method: str, last: int) -> None:
    limited = piadm.sample(mixture(), SHAPE, method=method, max_rounds=last, return_states=True)
    asked = piadm.sample(mixture(), SHAPE, method=method, callback=lambda info: info.round == last, return_states=True)
    for found, status in ((limited, Status.MAX_ROUNDS), (asked, Status.INTERRUPTED)):
        assert found.stats.rounds == last and set(found.status) == {status}
        assert found.states is not None
        assert (found.states[-1] - found.sample).abs().max() < 1e-4  # solved by two sums of a thousand terms in float32
    assert torch.equal(limited.sample, asked.sample)
