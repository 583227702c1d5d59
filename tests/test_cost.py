"""The cost model: which window it takes for which network, and how it comes to know."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import piadm
from piadm.cost import TIMED, Latency, latency
from piadm.models import GaussianDenoiser

SHAPE = (2, 4)


class Timed:
    """A Gaussian network that takes ``fixed + rows * per_row`` seconds by its own clock, and counts calls and rows."""

    def __init__(self, fixed: float, per_row: float) -> None:
        exact = GaussianDenoiser(piadm.VPSchedule(), 0.5, 2.0)
        self.exact, self.schedule, self.prediction = exact.network, exact.schedule, exact.prediction
        self.fixed, self.per_row, self.calls, self.rows = fixed, per_row, 0, 0
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls, self.rows = self.calls + 1, self.rows + len(x)
        self.now += self.fixed + self.per_row * len(x)
        return self.exact(x, t)

    def sample(self, **given: object) -> piadm.Solution:
        denoiser = piadm.Denoiser(self, self.schedule, self.prediction)
        return piadm.sample(denoiser, SHAPE, steps=200, nodes=64, tol=1e-2, window="auto", max_batch=256, **given)


def known(**seconds: float) -> Latency:
    found = Latency()
    for rows, taken in seconds.items():
        found.add(int(rows[1:]), taken)
    return found


def test_a_network_that_takes_as_long_for_many_rows_as_for_one_gets_all_of_them() -> None:
    assert known(r1=1.0, r4=1.0, r64=1.0, r1000=1.0).best_window(33, 16, None) == 33


def test_a_network_whose_time_is_that_of_its_rows_gets_a_small_window() -> None:
    assert known(r1=1.0, r4=4.0, r64=64.0).best_window(128, 1, None) <= 8


def test_latency_between_and_beyond_what_was_seen() -> None:
    found = known(r2=1.0, r10=5.0)
    assert [found.of(rows) for rows in (1, 2, 6, 10, 20)] == [1.0, 1.0, 3.0, 5.0, 10.0]


def test_the_fastest_round_counts_for_the_first_may_have_to_warm_up() -> None:
    found = known(r1=9.0)
    found.add(1, 1.0)
    found.add(1, 2.0)
    assert found.of(1) == 1.0


def test_the_width_is_where_time_per_row_stops_falling() -> None:
    assert known(r1=1.0, r2=1.0, r4=1.0, r8=1.0, r16=2.0, r32=4.0).width() == 8
    assert known(r1=1.0, r2=2.0, r4=4.0).width() == 1
    assert known(r1=1.0, r2=1.0, r4=1.0).width() == 4


@pytest.mark.parametrize("most", [8, 64])
def test_max_batch_bounds_the_rows_of_a_round(most: int) -> None:
    flat = known(r1=1.0, r1000=1.0)
    assert flat.best_window(64, 2, most) * 2 <= most
    assert flat.best_window(64, 100, most) == 2  # the least there is


@pytest.mark.parametrize(("fixed", "per_row", "wide"), [(0.02, 0.0, True), (0.0, 0.004, False)])
def test_the_window_suits_the_network(
    fixed: float, per_row: float, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = Timed(fixed, per_row)
    monkeypatch.setattr("piadm.iteration.time", network)  # its clock, which no other process can disturb
    first = network.sample()
    assert first.converged and first.stats.window is not None
    assert (first.stats.window >= 32) if wide else (first.stats.window <= 16)
    assert first.stats.nodes == 64
    # Every call is counted, those that were timed too, and they are part of the work.
    assert first.stats.rounds == network.calls and first.stats.evaluations * SHAPE[0] == network.rows
    second = network.sample()
    assert second.stats.window == first.stats.window
    assert not wide or second.stats.rounds < first.stats.rounds


def test_a_network_is_remembered_by_device_and_shape() -> None:
    network = Timed(0.0, 0.0)
    here = latency(network, torch.device("cpu"), (4,))
    assert latency(network, torch.device("cpu"), (4,)) is here
    assert latency(network, torch.device("cpu"), (5,)) is not here
    assert latency((), torch.device("cpu"), (4,)).timed == 0  # cannot be remembered: no weak reference to it


def test_every_number_of_timed_rounds_ends_well() -> None:
    for rounds in range(1, len(TIMED) + 2):
        found = Timed(0.0, 0.0).sample(max_rounds=rounds)
        assert found.stats.rounds == rounds and set(found.status) == {piadm.Status.MAX_ROUNDS}
        assert found.stats.window is not None and bool(found.sample.isfinite().all())
