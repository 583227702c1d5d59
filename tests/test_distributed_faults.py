"""A rank that dies, hangs or fails ends the run on all of them, soon, and is named."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest
import torch
from _ranks import Ended, group, values
from torch import Tensor

import piadm
from piadm.workers.heartbeat import Heartbeat

#: The time limit of these runs, in seconds; by default it is 30.
LIMIT = 5.0

#: Seconds for starting a group of four on two busy cores.
START = 15.0

#: The call in which the fault comes: in the middle of the run.
CALL = 4


class Faulty:
    """A network of which one call goes wrong, if ``fault`` is one."""

    def __init__(self, fault: Callable[[], None] | None) -> None:
        self.fault, self.calls = fault, 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        if self.fault is not None and self.calls == CALL:
            self.fault()
        return torch.tanh(x)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    time.sleep(1000)


def fail() -> None:
    raise RuntimeError("a bad layer")


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def program(rank: int, bad: int, fault: Callable[[], None], split: str) -> tuple[list[str], int]:
    denoiser = piadm.Denoiser(Faulty(fault if rank == bad else None), piadm.VPSchedule(), "sample")
    given = dict(method="ode", steps=48, nodes=16, tol=1e-9, max_rounds=20)
    workers = piadm.Ranks(timeout=LIMIT, split=split)
    found = piadm.sample(denoiser, (4, 8), **given, workers=workers)
    return [status.name for status in found.status], found.stats.rounds


def errors(ended: list[Ended], bad: int | None = None) -> list[str]:
    """What the ranks raised, that of ``bad``, which was killed, left out; all in time."""
    assert all(one.seconds < LIMIT + START for one in ended)
    assert [one.code for rank, one in enumerate(ended) if rank != bad] == [0] * (len(ended) - (bad is not None))
    return [str(one.error) for rank, one in enumerate(ended) if rank != bad]


@pytest.mark.parametrize("split", ["rows", "samples"])
def test_a_rank_that_is_killed_is_named_by_all_others(split: str) -> None:
    ended = group(4, program, 2, die, split)
    assert ended[2].code == -signal.SIGKILL
    for error in errors(ended, bad=2):
        assert error.startswith("NetworkError: rank 2 died, last seen "), error
        # Ranks that share out rows know each other's; else the last sign is up to a beat old.
        assert "evaluating sample" in error or split == "samples"


@pytest.mark.parametrize("split", ["rows", "samples"])
def test_a_rank_that_sleeps_for_ever_is_named_by_all_and_ends_too(split: str) -> None:
    for error in errors(group(4, program, 1, hang, split)):
        assert error.startswith("NetworkError: rank 1 has not finished evaluating sample")
        assert "at time" in error


@pytest.mark.parametrize("split", ["rows", "samples"])
def test_an_exception_on_one_rank_is_raised_on_all_with_its_sample_and_time(split: str) -> None:
    found = errors(group(4, program, 3, fail, split))
    assert len(set(found)) == 1
    assert found[0].startswith("NetworkError: rank 3: the network failed on sample")
    assert "at time" in found[0] and found[0].endswith("a bad layer")
    if split == "samples":
        assert "on sample 3 at" in found[0]  # its number in the whole batch, not on the rank


def test_the_loss_of_rank_0_which_keeps_the_store_is_told_too() -> None:
    for error in errors(group(3, program, 0, die, "rows"), bad=0):
        assert error.startswith("NetworkError: rank 0")


def test_ctrl_c_on_one_rank_stops_all_after_the_same_round() -> None:
    found = values(group(2, program, 1, interrupt, "rows"))
    assert found[0] == found[1] == (["INTERRUPTED"] * 4, CALL - 1)


def called_back(rank: int) -> None:
    def callback(info: piadm.RoundInfo) -> None:
        if rank == 1 and info.round == 2:
            raise ValueError("no such file")

    denoiser = piadm.Denoiser(Faulty(None), piadm.VPSchedule(), "sample")
    piadm.sample(denoiser, (1, 8), steps=48, tol=1e-9, callback=callback, workers=piadm.Ranks(timeout=LIMIT))


def test_a_callback_that_fails_on_one_rank_ends_all_at_once() -> None:
    first, second = group(2, called_back)
    assert first.error == "NetworkError: rank 1: its callback raised ValueError: no such file"
    assert second.error == "ValueError: no such file"


class Small:
    """A network on a device with room for so many rows."""

    def __init__(self, room: int) -> None:
        self.room, self.largest = room, 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        if len(x) > self.room:
            raise RuntimeError("CUDA out of memory")
        self.largest = max(self.largest, len(x))
        return torch.tanh(x)


def cramped(rank: int) -> tuple[Tensor, int]:
    network = Small(3 if rank == 1 else 1000)
    denoiser = piadm.Denoiser(network, piadm.VPSchedule(), "sample")
    found = piadm.sample(denoiser, (1, 8), method="ode", steps=64, nodes="all", workers=piadm.Ranks(timeout=LIMIT))
    return found.sample, network.largest


def test_memory_that_runs_out_on_one_rank_shrinks_that_ranks_micro_batch_alone() -> None:
    (first, roomy), (second, small) = values(group(2, cramped))
    assert torch.equal(first, second)
    assert small <= 3 < roomy


class LostStore:
    """A store whose host is gone."""

    def set(self, key: str, value: str) -> None:
        raise RuntimeError("connection reset")


def test_a_verdict_outlives_the_store() -> None:
    heartbeat = Heartbeat(LostStore(), rank=1, count=2, interval=1e-3, run=1)
    heartbeat.wait()
    heartbeat.verdict = "rank 0 died"
    heartbeat._thread.start()
    time.sleep(0.05)
    heartbeat._over.set()
    heartbeat._thread.join()
    assert heartbeat.verdict == "rank 0 died"


STILL = piadm.Denoiser(Faulty(None), piadm.VPSchedule(), "sample")


def absent(rank: int, before: int, split: str) -> str:
    """Rank 1 takes part in some runs, and then is busy elsewhere."""
    workers = piadm.Ranks(timeout=LIMIT, split=split)
    for _ in range(before):
        piadm.sample(STILL, (3, 8), steps=8, workers=workers)
    if rank == 1:
        time.sleep(2 * LIMIT)
        return ""
    with pytest.raises(piadm.NetworkError) as found:
        piadm.sample(STILL, (3, 8), steps=8, workers=piadm.Ranks(timeout=LIMIT, split=split))
    return str(found.value)


@pytest.mark.parametrize(("before", "split"), [(0, "rows"), (2, "samples")])
def test_a_rank_that_does_not_come_is_named(before: int, split: str) -> None:
    told, _, same = values(group(3, absent, before, split))
    assert told == same == "rank 1 has not joined"


def again(rank: int) -> list[int]:
    """Open files after each of some runs, every one with workers of its own."""
    found = []
    for _ in range(4):
        piadm.sample(STILL, (3, 8), steps=8, workers=piadm.Ranks(timeout=LIMIT))
        found.append(len(os.listdir("/proc/self/fd")))
    return found


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="no list of open files")
def test_the_runs_of_a_group_share_its_connections() -> None:
    for open_files in values(group(2, again)):
        assert len(set(open_files)) == 1
