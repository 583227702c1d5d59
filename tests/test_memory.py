"""The memory that a run's states take is told before the run."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import piadm
from piadm import memory
from piadm.executor import Here
from piadm.models import MixtureDenoiser
from piadm.path import ParallelPath

GIGA = 1_000_000_000


def never(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    raise AssertionError("the network was called")


DENOISER = piadm.Denoiser(never, piadm.VPSchedule(), "sample")


@pytest.mark.parametrize("return_states", [False, True])
def test_a_run_that_does_not_fit_is_refused_with_the_largest_batch_that_does(
    return_states: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free", lambda device: GIGA)
    given = dict(nodes="all", steps=500, return_states=return_states)
    with pytest.raises(ValueError, match="needs about .* GB for states, and 1 GB are free on cpu") as refused:
        piadm.sample(DENOISER, (64, 3072), **given)
    most = int(re.search(r"at most shape\[0\] = (\d+) fits", str(refused.value))[1])
    for batch, fits in ((most, True), (most + 1, False)):
        with pytest.raises(piadm.NetworkError if fits else ValueError):
            piadm.sample(DENOISER, (batch, 3072), **given)


def test_where_one_sample_does_not_fit_the_nodes_that_do_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free", lambda device: GIGA // 100)
    with pytest.raises(ValueError, match="of one sample at most") as refused:
        piadm.sample(DENOISER, (1, 10_000), nodes="all", steps=500)
    most = int(re.search(r"at most (\d+) nodes", str(refused.value))[1])
    with pytest.raises(piadm.NetworkError):
        piadm.sample(DENOISER, (1, 10_000), nodes=most, steps=500)
    with pytest.raises(ValueError, match="nodes"):
        piadm.sample(DENOISER, (1, 10_000), nodes=most + 1, steps=500)


def test_the_papers_blocks_are_counted_by_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = piadm.Blocks.paper(horizon=4.0, early_stop=0.05, length=1.0, step=0.01)
    monkeypatch.setattr(memory, "free", lambda device: memory.needed(max(blocks.sizes), 2, 64, 4))
    with pytest.raises(piadm.NetworkError):
        piadm.piadm_sde(DENOISER, (2, 64), blocks=blocks, iterations=2)
    with pytest.raises(ValueError, match=r"at most shape\[0\] = 2 fits"):
        piadm.piadm_sde(DENOISER, (3, 64), blocks=blocks, iterations=2)


def test_where_nothing_is_known_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free", lambda device: None)
    with pytest.raises(piadm.NetworkError):
        piadm.sample(DENOISER, (1, 4), steps=10)


def test_what_is_free_on_this_machine_is_a_sensible_number() -> None:
    found = memory.free(torch.device("cpu"))
    assert found is None or 1e6 < found < 1e14


def test_finer_nodes_are_taken_by_turns_where_not_all_fit_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    modes = torch.randn(10, 8, generator=torch.Generator().manual_seed(0))
    rough = MixtureDenoiser(piadm.DiscreteSchedule.ddpm(), modes, 0.1)
    network = rough.network
    # Waves in the time, of which the first nodes know nothing.
    denoiser = replace(rough, network=lambda x, t: network(x, t) + 0.05 * torch.sin(0.31 * t)[:, None])
    # In double precision no row is evaluated for its rounding's sake, which is another in another batch.
    start = torch.randn(6, 8, generator=torch.Generator().manual_seed(1)).double()
    given = dict(method="ode", steps=400, tol=3e-3, initial=start)
    at_once = piadm.sample(denoiser, (6, 8), **given)
    assert at_once.stats.nodes == 400  # they had to go on
    room = [4 * GIGA]  # for the run itself, then for none but the one that may always go on
    monkeypatch.setattr(memory, "free", lambda device: room.pop() if room else 0)
    by_turns = piadm.sample(denoiser, (6, 8), **given)
    assert by_turns.stats.rounds > at_once.stats.rounds
    assert torch.equal(by_turns.stats.evaluations_per_sample, at_once.stats.evaluations_per_sample)
    torch.testing.assert_close(by_turns.sample, at_once.sample, atol=1e-5, rtol=0)

    # Ranks that share out rows have to do the same, whatever room each of them has.
    room.append(4 * GIGA)
    monkeypatch.setattr(Here, "lockstep", True)
    assert piadm.sample(denoiser, (6, 8), **given).stats.rounds == at_once.stats.rounds


def test_cached_files_do_not_count_against_a_containers_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"max": f"{4 * GIGA}\n", "current": f"{3 * GIGA}\n", "stat": f"anon {GIGA}\ninactive_file {2 * GIGA}\n"}
    monkeypatch.setattr(memory.Path, "read_text", lambda path, encoding: files[path.name.removeprefix("memory.")])
    assert memory._left_of_the_container() == 3 * GIGA
    files["max"] = "max\n"
    assert memory._left_of_the_container() is None


def paths_left(call: Callable[[], object]) -> int:
    """Paths that a call leaves behind until Python next looks for cycles of references."""

    def alive() -> int:
        return sum(type(one) is ParallelPath for one in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        before = alive()  # other tests may hold some
        call()
        return alive() - before
    finally:
        gc.enable()


@pytest.mark.parametrize("method", ["ode", "sde"])
def test_states_are_gone_when_the_sampler_returns(method: str) -> None:
    # Python looks for cycles as little for gigabytes as for bytes.
    means = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).double()
    denoiser, nodes = MixtureDenoiser(piadm.VPSchedule(), means, 0.05), []
    run = dict(method=method, steps=300, tol=5e-3)
    assert paths_left(lambda: nodes.append(piadm.sample(denoiser, (8, 8), **run).stats.nodes)) == 0
    assert nodes[0] > 100  # finer node sets, and the rows that measure ripples, were there


def test_states_are_gone_when_the_network_has_failed() -> None:
    def call() -> None:
        with pytest.raises(piadm.NetworkError):
            piadm.sample(DENOISER, (2, 4), steps=20)

    assert paths_left(call) == 0
