"""Ranks that run the same pipeline: one result, told to all; a rank that differs, fails or dies is named by all."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from _ranks import group
from test_interop_measured import REAL
from test_interop_workers import RUN, SPLIT, guided_controlnet, latents
from tiny import SD, SQUARE, Case, image, normals, prompts, stable_diffusion
from torch import Tensor, nn

import piadm
from piadm.interop.diffusers import ParallelPipeline, parallelize

COUNT, LIMIT = 3, 20.0

#: Seconds for all of it: importing diffusers in three processes on two busy cores takes most of them.
ALL = 300.0

#: What a check returned, or its error, and after how many seconds.
Outcome = tuple[Any, str | None, float]


def shared(pipe: Any = None, **options: Any) -> ParallelPipeline:  # noqa: ANN401 - a pipeline
    return parallelize(pipe or stable_diffusion(), workers=piadm.Ranks(timeout=LIMIT), **options)


@contextmanager
def patched(network: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within it the network calls ``forward(own, *args, **kwargs)``, with its own one."""
    own = type(network).forward

    def other(self: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - the network's own
        return forward(lambda: own(self, *args, **kwargs), *args)

    other.__wrapped__ = own
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(network), "forward", other)
        yield


def equal(case: Case, members: int = COUNT, **options: Any) -> Callable[[int], Any]:  # noqa: ANN401 - parallelize's own
    """A run by some ranks beside one by each alone: its result, how far it is off, and the counts of both."""

    def check(rank: int) -> Any:  # noqa: ANN401 - as said
        some = dist.new_group(list(range(members))) if members < COUNT else None
        if rank >= members:
            return None
        pipe, ranks = case.build(), piadm.Ranks(some, LIMIT)
        alone, several = (parallelize(pipe, tol=1e-5, **options, workers=workers) for workers in (None, ranks))
        want = latents(alone, case.call)
        latents(several, case.call)
        got = latents(several, case.call)  # the shapes of outputs are known by now
        off = float((got - want).square().mean().sqrt() / want.square().mean().sqrt())
        return got, off, several.last_solution.stats, alone.last_solution.stats

    return check


def other_seeds(rank: int) -> None:
    shared()(**SD, **RUN, generator=torch.Generator().manual_seed(rank))


def no_seeds(rank: int) -> None:
    fast = shared()
    torch.manual_seed(rank)
    fast(**SD, **RUN)


def other_prompts(rank: int) -> None:
    latents(shared(), SD | dict(prompt_embeds=normals(rank, 2, 5, 16)))


def unsupported(rank: int) -> None:
    shared()(**SD, **RUN, callback=print)


def interrupted(rank: int) -> Any:  # noqa: ANN401 - status and rounds
    def callback(pipe: Any, step: int, t: Tensor, values: dict[str, Any]) -> dict[str, Any]:  # noqa: ANN401
        pipe._interrupt = rank == 1 and step == 2
        return values

    fast = shared(tol=1e-6)
    latents(fast, SD | (dict(callback_on_step_end=callback) if rank == 1 else {}))
    return fast.last_solution.status, fast.last_solution.stats.rounds


def bad_callback(rank: int) -> None:
    def callback(pipe: Any, step: int, t: Tensor, values: dict[str, Any]) -> dict[str, Any]:  # noqa: ANN401
        if rank == 1 and step == 2:
            raise LookupError("no such file")
        return values

    latents(shared(), SD | dict(callback_on_step_end=callback))


def cramped(rank: int) -> Any:  # noqa: ANN401 - the result, and the most rows in a call
    pipe = stable_diffusion()
    fast = shared(pipe)
    latents(fast, SD)

    def small(own: Callable[[], Any], sample: Tensor, *rest: Any) -> Any:  # noqa: ANN401 - the network's own
        if rank == 1 and len(sample) > 4:
            raise RuntimeError("CUDA out of memory")
        return own()

    with patched(pipe.unet, small):
        return latents(fast, SD), fast.last_solution.stats.peak_batch


def failing(rank: int) -> None:
    pipe = stable_diffusion()
    fast = shared(pipe)
    latents(fast, SD)

    def fail(own: Callable[[], Any], *given: Any) -> Any:  # noqa: ANN401 - the network's own
        if rank == 1:
            raise ValueError("a bad layer")
        return own()

    with patched(pipe.unet, fail):
        latents(fast, SD)


def undecoded(rank: int) -> None:
    pipe = stable_diffusion()
    if rank == 1:
        pipe.vae.decode = None
    shared(pipe)(**SD | RUN | dict(output_type="pt"), generator=torch.Generator().manual_seed(5))


def dying(rank: int) -> None:
    pipe, calls = stable_diffusion(), []

    def die(own: Callable[[], Any], *given: Any) -> Any:  # noqa: ANN401 - the network's own
        calls.append(given)
        if rank == 2 and len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return own()

    with patched(pipe.unet, die):
        latents(shared(pipe, tol=1e-6), SD)


ONE = dict(SQUARE, **prompts(1), image=image(32, 1), guidance_scale=4.0)
EQUAL = {
    "SD": equal(SPLIT["SD"]),
    "SD, ControlNet": equal(SPLIT["SD, ControlNet"]),
    "SD, ControlNet, small calls": equal(SPLIT["SD, ControlNet"], max_batch=4),
    "SD, ControlNet, fewer rows than ranks": equal(Case(guided_controlnet, ONE), window=2),
    "SD, two of the ranks": equal(SPLIT["SD"], 2),
    "Wan, two transformers": equal(SPLIT["Wan, two transformers"]),
    "Cosmos 2, measured": equal(Case(*REAL["Cosmos 2"])),
}
REFUSED = {
    "other seeds": (other_seeds, "generator must be the same on every rank, got a generator of seed 0"),
    "no seeds": (no_seeds, "the initial latents must be the same on every rank, got torch.float32 (2, 4, 8, 8)"),
    "other prompts": (other_prompts, "prompt_embeds must be the same on every rank"),
}
OTHERS = {one.__name__: one for one in (interrupted, unsupported, bad_callback, cramped, failing, undecoded)}
CHECKS = EQUAL | {name: check for name, (check, _) in REFUSED.items()} | OTHERS


def outcome(check: Callable[[int], Any], rank: int) -> Outcome:
    began = time.monotonic()
    try:
        return check(rank), None, time.monotonic() - began
    except Exception as error:
        return None, f"{type(error).__name__}: {error}", time.monotonic() - began


def program(rank: int) -> Any:  # noqa: ANN401 - what is said of ``told``
    own, everyone = {name: outcome(check, rank) for name, check in CHECKS.items()}, [None] * COUNT
    dist.all_gather_object(everyone, own)
    return everyone, outcome(dying, rank)


@pytest.fixture(scope="module")
def told() -> Any:  # noqa: ANN401 - outcomes of every check by rank, and what every rank said of the one that died
    ended = group(COUNT, program, patience=ALL)
    assert [one.error for one in ended[:2]] == [None, None]
    return ended[0].value[0], [one.value and one.value[1] for one in ended]


@pytest.mark.parametrize("name", EQUAL)
def test_the_result_is_that_of_one_process(told: Any, name: str) -> None:  # noqa: ANN401
    found = [ranks[name] for ranks in told[0]]
    assert [error for _, error, _ in found] == [None] * COUNT
    found = [value for value, _, _ in found if value is not None]
    for got, off, several, alone in found:
        assert torch.equal(got, found[0][0])
        assert off <= 3e-5  # as of several devices
        assert several.rounds <= alone.rounds + 1
        assert several.peak_batch <= (4 if "small" in name else alone.peak_batch)


@pytest.mark.parametrize("name", REFUSED)
def test_ranks_that_were_not_given_the_same_or_draw_other_numbers_are_told_so(told: Any, name: str) -> None:  # noqa: ANN401
    for ranks in told[0]:
        assert ranks[name][1].startswith("ValueError: " + REFUSED[name][1])
    assert "generator=torch.Generator().manual_seed" in told[0][0]["no seeds"][1]


def test_what_is_not_supported_is_refused_by_all_ranks_as_by_one(told: Any) -> None:  # noqa: ANN401
    for ranks in told[0]:
        assert ranks["unsupported"][1].startswith("UnsupportedError: callback is not supported")
        assert ranks["unsupported"][2] < LIMIT / 2


def test_one_rank_whose_callback_interrupts_stops_all_after_the_same_round(told: Any) -> None:  # noqa: ANN401
    for ranks in told[0]:
        assert ranks["interrupted"][:2] == (((piadm.Status.INTERRUPTED,) * 2, 3), None)


def test_memory_that_runs_out_on_one_rank_shrinks_its_own_calls_alone(told: Any) -> None:  # noqa: ANN401
    (first, most), (second, small), (third, other) = (ranks["cramped"][0] for ranks in told[0])
    assert torch.equal(first, second) and torch.equal(first, third)
    assert small <= 4 < min(most, other)


@pytest.mark.parametrize(
    "name, own, text",
    [
        ("failing", "NetworkError: rank 1: unet failed on samples", "ValueError: a bad layer"),
        ("bad_callback", "LookupError: ", "no such file"),
        ("undecoded", "TypeError: ", "object is not callable"),
    ],
)
def test_what_fails_on_one_rank_ends_all_at_once(told: Any, name: str, own: str, text: str) -> None:  # noqa: ANN401
    for rank, ranks in enumerate(told[0]):
        _, error, seconds = ranks[name]
        assert error.startswith(own if rank == 1 else "NetworkError: rank 1: ") and text in error
        assert seconds < LIMIT / 2  # no time limit had to pass


def test_a_rank_that_is_killed_is_named_by_all_others(told: Any) -> None:  # noqa: ANN401
    for _, error, seconds in told[1][:2]:
        assert error.startswith("NetworkError: rank 2 died, last seen evaluating sample") and "at step" in error
        assert seconds < LIMIT
    assert told[1][2] is None
