"""Ranks: one result whoever evaluates the rows, and one policy of dealing out."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from _ranks import group, values
from torch import Tensor

import piadm
from piadm.models import MixtureDenoiser

#: Where rows are cut, kernels round differently: about ten roundings of float32, relative to the largest state.
SAME = 1e-6
SIZE = 16
BLOCKS = dict(horizon=6.0, early_stop=0.02, length=1.5, step=0.25)


def mixture() -> piadm.Denoiser:
    """Six narrow Gaussians: not linear, and cheap."""
    means = torch.randn(6, SIZE, generator=torch.Generator().manual_seed(0))
    return MixtureDenoiser(piadm.DiscreteSchedule.ddpm(), means, 0.04)


def run(sampler: str, batch: int, workers: object, **given: object) -> piadm.Solution:
    if sampler in ("piadm_sde", "piadm_ode"):
        given |= dict(blocks=piadm.Blocks.paper(**BLOCKS), iterations=3)
    else:
        given = dict(steps=60, method="sde") | given
    if sampler == "piadm_ode":
        given["corrector"] = piadm.Corrector(duration=0.2, length=0.1, step=0.05, iterations=2)
    return getattr(piadm, sampler)(mixture(), (batch, SIZE), workers=workers, **given)


def on_rank(rank: int, sampler: str, batch: int, split: str, given: dict[str, Any]) -> piadm.Solution:
    return run(sampler, batch, piadm.Ranks(timeout=20, split=split), **given)


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize(
    "sampler, batch, split, given",
    [
        ("sample", 1, "auto", {}),
        ("sample", 3, "rows", dict(method="ode", max_batch=5, return_states=True)),
        ("sample", 6, "samples", dict(nodes="all", window=16, return_states=True)),
        ("sample", 2, "samples", dict(seed=[(3, 8), 5])),
        ("sample_sequential", 3, "rows", {}),
        ("piadm_sde", 5, "auto", {}),
        ("piadm_ode", 1, "auto", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_solution_does_not_depend_on_the_ranks(
    count: int, sampler: str, batch: int, split: str, given: dict[str, Any]
) -> None:
    alone = run(sampler, batch, None, **given)
    same = SAME * float(alone.sample.abs().max())
    for found in values(group(count, on_rank, sampler, batch, split, given)):
        assert (found.sample - alone.sample).abs().max() <= same
        assert found.status == alone.status
        assert found.stats.rounds == alone.stats.rounds
        torch.testing.assert_close(found.stats.evaluations_per_sample, alone.stats.evaluations_per_sample)
        torch.testing.assert_close(found.stats.rounds_per_sample, alone.stats.rounds_per_sample)
        if split != "samples":  # an estimate may depend on the other samples of a batch
            torch.testing.assert_close(found.error_estimate, alone.error_estimate, equal_nan=True, rtol=1e-2, atol=same)
        assert (found.states is None) == (alone.states is None)
        if alone.states is not None and found.states is not None:
            assert (found.states - alone.states).abs().max() <= SAME * float(alone.states.abs().max())


class Slowly:
    """The mixture, its time per row that of a slow device, counting its rows."""

    def __init__(self, per_row: float) -> None:
        self.inner, self.per_row, self.rows, self.calls = mixture(), per_row, 0, 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.rows, self.calls = self.rows + len(x), self.calls + 1
        time.sleep(self.per_row * len(x))
        return self.inner(x, t)


def uneven(rank: int) -> tuple[Tensor, int]:
    network = Slowly(0.004 if rank == 1 else 0.001)
    denoiser = piadm.Denoiser(network, piadm.DiscreteSchedule.ddpm(), "sample")
    given = dict(method="ode", steps=200, nodes=32, tol=1e-9, max_rounds=8)
    return piadm.sample(denoiser, (1, SIZE), **given, workers=piadm.Ranks(timeout=20)).sample, network.rows


def test_a_slow_rank_gets_fewer_rows_and_changes_nothing() -> None:
    (first, fast), (second, slow) = values(group(2, uneven))
    assert torch.equal(first, second)
    alone = piadm.sample(
        piadm.Denoiser(mixture(), piadm.DiscreteSchedule.ddpm(), "sample"), (1, SIZE), method="ode", steps=200,
        nodes=32, tol=1e-9, max_rounds=8,
    )  # fmt: skip
    assert (first - alone.sample).abs().max() <= SAME
    # The first round is cut evenly, the other seven about 4 : 1: 128 : 40 in all if every row stays active.
    assert slow < 0.5 * fast


def told(rank: int) -> piadm.Solution:
    """A callback that on rank 1 alone asks to stop after three rounds."""
    callback: Callable[[piadm.RoundInfo], bool] = lambda info: rank == 1 and info.round == 3  # noqa: E731
    return run("sample", 1, piadm.Ranks(timeout=20), callback=callback, tol=1e-6)


def test_one_rank_that_stops_stops_all_at_the_same_round() -> None:
    for found in values(group(2, told)):
        assert found.stats.rounds == 3
        assert found.status == (piadm.Status.INTERRUPTED,)


def grouped(rank: int) -> list[torch.Tensor | None]:
    """Runs of two of three ranks, in two groups in turn, and then of all."""
    pairs = [dist.new_group([0, 1]) for _ in range(2)]
    found = [run("sample", 1, piadm.Ranks(pair, 20)).sample if rank < 2 else None for pair in (*pairs, pairs[0])]
    return [*found, run("sample", 1, piadm.Ranks(timeout=20)).sample]


def test_ranks_may_be_in_any_number_of_groups() -> None:
    """A group is told from others of the same ranks, and all ranks find each other although some are in more groups."""
    alone = run("sample", 1, None).sample
    for found in values(group(3, grouped)):
        assert all(one is None or (one - alone).abs().max() <= SAME for one in found)
        assert found[-1] is not None


def seeded(rank: int) -> None:
    run("sample", 1, piadm.Ranks(timeout=20), seed=rank)


def weighted(rank: int) -> None:
    torch.manual_seed(rank)
    network = torch.nn.Linear(SIZE, SIZE)
    denoiser = piadm.Denoiser(lambda x, t: network(x), piadm.VPSchedule(), "sample")
    denoiser.network.parameters = network.parameters
    piadm.sample(denoiser, (1, SIZE), steps=10, workers=piadm.Ranks(timeout=20))


def clocked(rank: int) -> None:
    run("sample", 1, piadm.Ranks(timeout=20), window="auto")


@pytest.mark.parametrize(
    "program, message",
    [
        (seeded, "seed must be the same on every rank, got 0 on rank 0 and 1 on rank 1"),
        (weighted, "denoiser must be the same on every rank"),
        (clocked, "window must be None or an integer where ranks share out rows"),
    ],
)
def test_ranks_that_were_not_given_the_same_are_told_so(program: Callable[[int], None], message: str) -> None:
    for ended in group(2, program):
        assert ended.error is not None and ended.error.startswith("ValueError")
        assert message in ended.error


def strict(rank: int, split: str) -> None:
    run("sample", 2, piadm.Ranks(timeout=20, split=split), tol=1e-9, max_rounds=1, raise_on_failure=True)


@pytest.mark.parametrize("split", ["rows", "samples"])
def test_samples_that_did_not_converge_are_counted_over_all_ranks(split: str) -> None:
    for ended in group(2, strict, split):
        assert ended.error == "NotConvergedError: not every sample converged: 2 MAX_ROUNDS"


def dealt(rank: int) -> list[bool]:
    ranks = piadm.Ranks()
    return [ranks.by_samples(batch) for batch in (1, 3, 4, 5, 7, 8, 9, 11)]


def test_samples_are_dealt_out_where_every_rank_has_about_as_many() -> None:
    # Four ranks: with 5 samples one would have two and three one, 2/1.25 = 1.6 times the time of an even split.
    for found in values(group(4, dealt)):
        assert found == [False, False, True, False, True, True, False, True]


@pytest.mark.parametrize(
    "call, kind, message",
    [
        (lambda: piadm.Ranks(timeout=0), ValueError, "timeout must be a finite number > 0"),
        (lambda: piadm.Ranks(split="time"), ValueError, "split must be one of 'auto', 'rows', 'samples'"),
        (lambda: piadm.Ranks(group=3), TypeError, "group must be a torch.distributed process group"),
        (functools.partial(run, "sample", 1, 3), TypeError, "workers must be a piadm.Devices, a piadm.Ranks or None"),
        (functools.partial(run, "sample", 1, piadm.Ranks()), RuntimeError, "init_process_group first"),
    ],
)
def test_what_is_no_group_is_refused(call: Callable[[], object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()
