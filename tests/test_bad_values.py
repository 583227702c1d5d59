"""Whatever a number, an array or a name is replaced by: it works, or a ValueError or TypeError names the argument."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_bad_input import BLOCKS, DENOISER, VP, WORKING, one_line, run, zeros
from torch import Tensor

import piadm
from piadm.models import GaussianDenoiser

STEPS, SHAPE = 4, (2, 3)
FEW = {"denoiser": WORKING, "steps": STEPS, "nodes": None}
HUGE = 10**400  # more than a float or an int64 holds


def paper(**changes: object) -> piadm.Blocks:
    return piadm.Blocks.paper(**{"horizon": 3.0, "early_stop": 0.5, "length": 1.0, "step": 0.5, **changes})  # type: ignore[arg-type]


def corrector(**changes: object) -> piadm.Corrector:
    return piadm.Corrector(**{"duration": 0.2, "length": 0.1, "step": 0.1, "iterations": 2, **changes})  # type: ignore[arg-type]


def uniform(**changes: object) -> piadm.TimeGrid:
    return piadm.TimeGrid.uniform(VP, **{"steps": STEPS, **changes})  # type: ignore[arg-type]


# Every argument that is a number, and the call that takes it.
NUMBERS: list[tuple[Callable[..., object], str]] = [
    *[(lambda **k: run("sample", **FEW | k), name) for name in ("tol", "nodes", "window", "max_rounds", "max_batch")],
    *[(lambda **k: run("sample", **FEW | k), name) for name in ("seed", "steps")],
    (lambda **k: run("sample_sequential", denoiser=WORKING, **{"steps": STEPS} | k), "steps"),
    (lambda **k: run("piadm_sde", denoiser=WORKING, blocks=BLOCKS, **k), "iterations"),
    *[(paper, name) for name in ("horizon", "early_stop", "length", "step")],
    *[(corrector, name) for name in ("duration", "length", "step", "iterations", "friction")],
    *[(uniform, name) for name in ("steps", "start", "end")],
    (lambda **k: piadm.TimeGrid.log_snr(VP, **k), "steps"),
    *[(piadm.VPSchedule, name) for name in ("beta_min", "beta_max")],
    *[(piadm.VESchedule, name) for name in ("sigma_min", "sigma_max")],
    (piadm.CosineSchedule, "offset"),
    *[(piadm.DiscreteSchedule.ddpm, name) for name in ("timesteps", "beta_start", "beta_end")],
    *[(lambda **k: piadm.Denoiser(zeros, VP, "v", **k), name) for name in ("data_mean", "data_variance")],
    (lambda **k: piadm.GuidedNetwork(zeros, null={}, **k), "scale"),
    (VP.alpha, "t"),
    (VP.time, "log_snr"),
]
numbers = pytest.mark.parametrize(("call", "argument"), NUMBERS, ids=[name for _, name in NUMBERS])

nonsense = st.one_of(
    st.none(),
    st.booleans(),
    st.text(max_size=400),
    st.binary(max_size=200),
    st.integers(max_value=0),
    st.just(-HUGE),
    st.floats(max_value=0.0),
    st.sampled_from([math.nan, math.inf, 1j, Decimal("NaN"), object(), int, len, slice(None), Fraction(-1, 3)]),
    st.lists(st.floats() | st.none() | st.text(max_size=5), max_size=200),
    st.dictionaries(st.integers(), st.none(), max_size=200),
    st.integers(0, 50).map(lambda n: torch.zeros(n, n)),
    st.integers(0, 50).map(lambda n: np.full((n, 2), "a")),
)


def works_or_names(call: Callable[..., object], argument: str, value: object) -> None:
    try:
        call(**{argument: value})
    except (TypeError, ValueError) as error:
        one_line(error, argument)


@numbers
@settings(deadline=None)
@given(value=nonsense)
def test_nonsense_for_a_number_works_or_is_refused_by_name(
    call: Callable[..., object], argument: str, value: object
) -> None:
    works_or_names(call, argument, value)


@numbers
def test_a_number_beyond_every_machine_type_works_or_is_refused_by_name(
    call: Callable[..., object], argument: str
) -> None:
    if argument != "iterations":  # as many Picard iterations as asked for, be it until the end of time
        works_or_names(call, argument, HUGE)


@pytest.mark.parametrize("sampler", ["sample", "sample_sequential"])
def test_more_steps_than_memory_holds_are_refused_by_name(sampler: str) -> None:
    # 8 TB of times: neither a crash of the allocator nor a machine that swaps.
    with pytest.raises(ValueError) as caught:
        run(sampler, steps=10**12)
    one_line(caught.value, "steps")


LONG: list[Any] = ["x" * 10_000, torch.zeros(40, 40), list(range(10_000)), np.full((9, 9), "a"), "two\nlines"]


@pytest.mark.parametrize("value", LONG, ids=["string", "tensor", "list", "array", "lines"])
@pytest.mark.parametrize(
    "argument",
    "shape method grid steps tol seed initial noise condition nodes window linearization max_rounds max_batch "
    "callback".split(),
)
def test_a_message_stays_short_and_on_one_line_whatever_it_shows(argument: str, value: object) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        run("sample", **{"steps": STEPS, argument: value})
    one_line(caught.value, argument)


@pytest.mark.parametrize("value", LONG, ids=["string", "tensor", "list", "array", "lines"])
@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda name: piadm.load(name), "name"),
        (lambda times: piadm.TimeGrid(times), "times"),
        (lambda schedule: piadm.TimeGrid.default(schedule, 3), "schedule"),
        (lambda prediction: piadm.Denoiser(zeros, VP, prediction), "prediction"),
        (lambda mean: piadm.models.GaussianDenoiser(VP, mean), "mean"),
    ],
)
def test_other_messages_stay_short_too(call: Callable[[object], object], argument: str, value: object) -> None:
    try:
        call(value)
    except (TypeError, ValueError) as error:
        one_line(error, argument)
    else:
        assert argument == "mean" and isinstance(value, Tensor | list)  # the others take none of these


STATE = torch.linspace(-1.0, 1.0, 6).reshape(SHAPE)
ODD_ARRAYS: list[Any] = [
    STATE.numpy()[::-1],
    STATE.numpy().astype("U3"),
    np.full(SHAPE, None),
    STATE.numpy().astype(np.longdouble),
    STATE.to_sparse(),
    STATE.to("meta"),
]


@pytest.mark.parametrize("argument", ["initial", "noise"])
@pytest.mark.parametrize("array", ODD_ARRAYS, ids=["reversed", "text", "objects", "long double", "sparse", "meta"])
def test_an_unusual_array_works_or_is_refused_by_name(argument: str, array: object) -> None:
    changes = {"initial": array} if argument == "initial" else {"noise": array, "nodes": None, "steps": 1}
    if argument == "noise":
        changes["noise"] = array[None]  # type: ignore[index]
    works_or_names(lambda **k: run("sample", **FEW | changes | k), argument, changes[argument])


def sampled(**changes: object) -> Tensor:
    return run("sample", **FEW | changes).sample


@pytest.mark.parametrize(
    ("argument", "value", "plain"),
    [
        ("shape", [2, 3], SHAPE),
        ("shape", torch.Size(SHAPE), SHAPE),
        ("shape", (np.int64(2), 3), SHAPE),
        ("steps", np.int64(STEPS), STEPS),
        ("tol", np.float32(0.5), 0.5),
        ("tol", Fraction(1, 2), 0.5),
        ("seed", np.int64(3), 3),
        ("seed", torch.tensor(3), 3),
        ("seed", np.array([7, 8]), [7, 8]),
        ("seed", [(3, 0), (3, 1)], 3),
        ("seed", torch.tensor([[3, 0], [3, 1]]), 3),
        ("initial", STATE.numpy(), STATE),
        ("initial", STATE.clone().requires_grad_(), STATE),
        ("initial", STATE.half().float().half(), STATE.half().float()),
        ("noise", torch.ones(STEPS, *SHAPE).numpy(), torch.ones(STEPS, *SHAPE)),
        ("nodes", 10**6, "all"),
        ("window", STEPS + 1, None),
        ("condition", {}, None),
        ("linearization", piadm.ScoreFrozen(), "score"),
        ("method", piadm.DataExponential(0.0), "ode"),
    ],
)
def test_a_sensible_form_of_an_argument_means_the_plain_one(argument: str, value: object, plain: object) -> None:
    odd, usual = sampled(**{argument: value}), sampled(**{argument: plain})
    assert torch.equal(odd, usual) and odd.dtype == usual.dtype and not odd.requires_grad


def test_equal_seeds_give_equal_samples() -> None:
    first, second = sampled(seed=[5, 5])
    assert torch.equal(first, second)


@pytest.mark.parametrize("argument", ["initial", "noise"])
def test_a_float64_array_makes_a_float64_state_be_it_numpy_or_torch(argument: str) -> None:
    value = torch.ones(STEPS, *SHAPE).double() if argument == "noise" else STATE.double()
    assert sampled(**{argument: value}).dtype == sampled(**{argument: value.numpy()}).dtype == torch.float64


def test_the_network_that_must_not_be_called_fails_where_it_is() -> None:
    # The guard of all these tests is alive: with good arguments it is reached, through the executor.
    with pytest.raises(pytest.fail.Exception, match="the network was called"):
        run("sample", denoiser=DENOISER, steps=STEPS)


@pytest.mark.parametrize("name", ["sample", "sample_sequential"])
@pytest.mark.parametrize("several", [torch.ones(2) > 0, np.ones(2) > 0])
def test_a_callback_that_answers_neither_yes_nor_no_is_told(name: str, several: object) -> None:
    with pytest.raises(TypeError, match="callback must return a true or false value, got"):
        run(name, denoiser=WORKING, steps=STEPS, callback=lambda info: several)


@pytest.mark.parametrize("name", ["sample", "sample_sequential"])
def test_a_callback_that_raises_stop_iteration_is_named(name: str) -> None:
    with pytest.raises(RuntimeError, match="callback raised StopIteration; to end the run, return a true value"):
        run(name, denoiser=WORKING, steps=STEPS, callback=lambda info: next(iter(())))


@pytest.mark.parametrize("sampler", ["sample", "sample_sequential", "piadm_sde"])
def test_a_device_without_float64_is_named(sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("piadm.problem.network_device", lambda network: torch.device("mps"))
    with pytest.raises(ValueError, match=r"denoiser must have its network where there are float64 .* got mps"):
        run(sampler, **FEW if sampler == "sample" else {})


@pytest.mark.parametrize("sampler", [piadm.sample, piadm.sample_sequential])
def test_the_warning_of_many_failures_names_the_first_and_counts_the_rest(
    sampler: Callable[..., piadm.Solution],
) -> None:
    broken = piadm.Denoiser(lambda x, t: math.nan * x, piadm.VPSchedule(), "sample")
    with pytest.warns(RuntimeWarning) as told:
        found = sampler(broken, (200, 2), method="ode", steps=5)
    assert len(found.failures) == 200
    assert str(told[0].message) == "; ".join([*found.failures[:3], "and 197 more"])
    with pytest.raises(ValueError, match="; and 125 more$"), pytest.warns(RuntimeWarning, match="; and 125 more$"):
        piadm.measure_moments(broken, (1, 2))


def test_the_smallest_tolerance_there_is_ends_too() -> None:
    run = dict(steps=20, max_rounds=25)
    found = [piadm.sample(GaussianDenoiser(VP), SHAPE, tol=tol, **run).sample for tol in (1e-300, 5e-324)]
    assert torch.equal(*found)
