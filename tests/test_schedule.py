"""Schedules against 50-digit arithmetic, their inverses, and what they refuse."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mpmath as mp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from piadm.schedule import (
    CosineSchedule,
    DiscreteSchedule,
    FlowSchedule,
    NoiseSchedule,
    OUSchedule,
    VESchedule,
    VPSchedule,
)

patient = settings(deadline=None)  # a machine may be busy

TOLERANCE = 1e-12  # the accuracy the library promises
NEAR_DATA = [1e-12, 1e-9, 1e-6, 1e-3, 0.02]
UNIT = [*NEAR_DATA, 0.1, 0.3, 0.5, 0.77, 0.95, 0.999, 1 - 1e-6, 1 - 1e-12, 1 - 2**-53]
HALF_LINE = [*NEAR_DATA, 0.3, math.log(2.0), 1.0, 2.0, 7.0, 10.0, 37.0, 100.0, 700.0]
LEVELS = [
    -60.0,
    -25.0,
    -10.0,
    -3.0,
    -1e-9,
    0.0,
    0.4,
    5.0,
    20.0,
    21.0,
    40.0,
    60.0,
]  # softplus bends at 20


@dataclass(frozen=True)
class Exact:
    """One schedule, its textbook formulas in 50-digit arithmetic, and the arguments to compare at."""

    schedule: NoiseSchedule
    alpha: Callable[[Any], Any]
    sigma: Callable[[Any], Any]
    time: Callable[[Any], Any]
    times: list[float]
    levels: list[float]


def preserving(
    schedule: NoiseSchedule,
    alpha: Callable[[Any], Any],
    time_of_alpha: Callable[[Any], Any],
    times: list[float],
    levels: list[float],
) -> Exact:
    """A variance-preserving schedule from its alpha and the inverse of that."""
    return Exact(
        schedule,
        alpha,
        lambda t: mp.sqrt(1 - alpha(t) ** 2),
        lambda level: time_of_alpha(1 / mp.sqrt(1 + mp.exp(-level))),
        times,
        levels,
    )


def exact_vp(low: float, high: float) -> Exact:
    b, slope = mp.mpf(low), mp.mpf(high) - mp.mpf(low)

    def time(alpha: Any) -> Any:  # noqa: ANN401
        integral = -2 * mp.log(alpha)
        return (mp.sqrt(b**2 + 2 * slope * integral) - b) / slope if slope else integral / b

    return preserving(
        VPSchedule(low, high),
        lambda t: mp.exp(-(b * t + slope * t**2 / 2) / 2),
        time,
        UNIT,
        [x for x in LEVELS if x > -0.5 * (low + high)],
    )


def exact_cosine(offset: float) -> Exact:
    s = mp.mpf(offset)

    def theta(t: Any) -> Any:  # noqa: ANN401
        return mp.pi / 2 * (t + s) / (1 + s)

    return preserving(
        CosineSchedule(offset),
        lambda t: mp.cos(theta(t)) / mp.cos(theta(0)),
        lambda alpha: mp.acos(alpha * mp.cos(theta(0))) * 2 / mp.pi * (1 + s) - s,
        UNIT,
        LEVELS,
    )


mp.mp.dps = 50
EXACT = {
    "ou": preserving(OUSchedule(), lambda t: mp.exp(-t / 2), lambda a: -2 * mp.log(a), HALF_LINE, LEVELS),
    "vp": exact_vp(0.1, 20.0),
    "vp-constant": exact_vp(0.7, 0.7),
    "cosine": exact_cosine(0.008),
    "cosine-no-offset": exact_cosine(0.0),
    "ve": Exact(VESchedule(), lambda t: mp.mpf(1), lambda t: t, lambda x: mp.exp(-x / 2), HALF_LINE, LEVELS),
    "flow": Exact(FlowSchedule(), lambda t: 1 - t, lambda t: t, lambda x: 1 / (1 + mp.exp(x / 2)), UNIT, LEVELS),
}
TABLE = DiscreteSchedule.ddpm()
each = pytest.mark.parametrize("exact", EXACT.values(), ids=EXACT.keys())


def worst(computed: torch.Tensor, expected: list[Any], floor: float = 0.0) -> float:
    """Largest error relative to ``max(floor, |expected|)``."""
    assert computed.dtype == torch.float64 and len(computed) == len(expected)
    pairs = zip(computed.tolist(), expected, strict=True)
    return max(float(abs(mp.mpf(value) - true) / max(mp.mpf(floor), abs(true))) for value, true in pairs)


@each
def test_values_have_twelve_digits_over_the_whole_range(exact: Exact) -> None:
    times = torch.tensor(exact.times, dtype=torch.float64)
    points = [mp.mpf(t) for t in exact.times]
    log_snr = [2 * mp.log(exact.alpha(t) / exact.sigma(t)) for t in points]
    assert worst(exact.schedule.alpha(times), [exact.alpha(t) for t in points]) <= TOLERANCE
    assert worst(exact.schedule.sigma(times), [exact.sigma(t) for t in points]) <= TOLERANCE
    assert worst(exact.schedule.log_snr(times), log_snr, floor=1.0) <= TOLERANCE


@each
def test_inverse_has_twelve_digits_over_the_whole_range(exact: Exact) -> None:
    times = exact.schedule.time(torch.tensor(exact.levels, dtype=torch.float64))
    assert worst(times, [exact.time(mp.mpf(level)) for level in exact.levels]) <= TOLERANCE


@each
@patient
@given(position=st.floats(-12.0, 0.0))
def test_time_inverts_log_snr(exact: Exact, position: float) -> None:
    low, high = exact.schedule.t_range
    t = 10.0**position * min(high, 50.0)
    assert exact.schedule.time(exact.schedule.log_snr(t)).item() == pytest.approx(t, rel=TOLERANCE, abs=0.0)


@pytest.mark.parametrize("schedule", [*(e.schedule for e in EXACT.values()), TABLE], ids=[*EXACT, "table"])
def test_log_snr_falls_from_end_to_start_and_inverts_there(schedule: NoiseSchedule) -> None:
    low, high = schedule.t_range
    assert low <= schedule.t_end < schedule.t_start <= high
    times = torch.linspace(schedule.t_end, schedule.t_start, 1001, dtype=torch.float64)
    assert bool((schedule.log_snr(times).diff() < 0).all())
    ends = torch.tensor([low, high], dtype=torch.float64)
    assert torch.allclose(schedule.time(schedule.log_snr(ends)), ends, rtol=TOLERANCE, atol=0.0)


@pytest.mark.parametrize(
    ("schedule", "t", "log_snr"),
    [
        (OUSchedule(), 0.0, math.inf),
        (VPSchedule(), 0.0, math.inf),
        (CosineSchedule(), 0.0, math.inf),
        (CosineSchedule(0.0), 0.0, math.inf),
        (CosineSchedule(), 1.0, -math.inf),
        (VESchedule(), 0.0, math.inf),
        (FlowSchedule(), 0.0, math.inf),
        (FlowSchedule(), 1.0, -math.inf),
        (TABLE, -1.0, math.inf),
    ],
)
def test_pure_data_and_pure_noise_are_exact(schedule: NoiseSchedule, t: float, log_snr: float) -> None:
    assert schedule.log_snr(t).item() == log_snr
    assert schedule.time(log_snr).item() == t
    assert (schedule.sigma(t) if log_snr > 0 else schedule.alpha(t)).item() == 0.0
    assert log_snr < 0 or schedule.alpha(t).item() == 1.0


@pytest.mark.parametrize("schedule", [*(e.schedule for e in EXACT.values()), TABLE], ids=[*EXACT, "table"])
def test_both_levels_are_those_asked_for_one_by_one(schedule: NoiseSchedule) -> None:
    times = torch.linspace(schedule.t_end, schedule.t_start, 23, dtype=torch.float64)
    alpha, sigma = schedule.levels(times)
    assert torch.equal(alpha, schedule.alpha(times)) and torch.equal(sigma, schedule.sigma(times))
    with pytest.raises(ValueError, match="t must lie in"):
        schedule.levels(-2.0)


@pytest.mark.parametrize("schedule", [*(e.schedule for e in EXACT.values()), TABLE], ids=[*EXACT, "table"])
@pytest.mark.parametrize("method", ["alpha", "sigma", "log_snr", "time"])
def test_shape_is_kept_and_the_result_is_float64(schedule: NoiseSchedule, method: str) -> None:
    function = getattr(schedule, method)
    assert function(0.5).shape == ()
    grid = torch.tensor([[0.25, 0.5, 1.0], [0.0, 0.75, 0.125]]).T  # float32, not contiguous, exact in binary
    assert grid.shape == function(grid).shape == (3, 2)
    assert function(grid).dtype == function(torch.tensor([0, 1])).dtype == torch.float64
    assert torch.equal(function(grid)[1, 0], function(0.5))
    assert function(torch.zeros(0)).shape == (0,)


@patient
@given(t=st.one_of(st.floats(-1.0, 999.0), st.integers(0, 999).map(float)))
def test_table_is_exact_at_indices_and_linear_in_log_snr_between(t: float) -> None:
    def level(i: int) -> Any:  # noqa: ANN401
        entry = mp.mpf(TABLE.alphas_cumprod[i].item())
        return mp.log(entry / (1 - entry))

    if t < 0:
        variance = (1 - mp.mpf(TABLE.alphas_cumprod[0].item())) * (mp.mpf(t) + 1) ** 2
        signal = 1 - variance
    else:
        i = min(int(t), 998)
        signal = 1 / (1 + mp.exp(-(level(i) + (mp.mpf(t) - i) * (level(i + 1) - level(i)))))
        variance = 1 - signal
    assert worst(TABLE.alpha(t)[None], [mp.sqrt(signal)]) <= TOLERANCE
    assert variance == 0 or worst(TABLE.sigma(t)[None], [mp.sqrt(variance)]) <= TOLERANCE
    assert variance == 0 or worst(TABLE.log_snr(t)[None], [mp.log(signal / variance)], 1.0) <= TOLERANCE
    # A log-SNR near 10 is rounded to 2e-15, and neighbouring entries differ by at least 0.01.
    assert TABLE.time(TABLE.log_snr(t)).item() == pytest.approx(t, rel=0.0, abs=TOLERANCE)


def test_table_inverts_exactly_at_indices() -> None:
    indices = torch.arange(1000, dtype=torch.float64)
    assert torch.equal(TABLE.time(TABLE.log_snr(indices)), indices)


def test_ddpm_table_is_the_one_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(1000, 1e-4, 0.02)
    # A thousand float32 products of rounded factors: at most 2 * 1000 * 2^-24 relative.
    assert torch.allclose(TABLE.alphas_cumprod, scheduler.alphas_cumprod.double(), rtol=1.2e-4, atol=0.0)
    copied = DiscreteSchedule(scheduler.alphas_cumprod)
    assert torch.equal(copied.alphas_cumprod, scheduler.alphas_cumprod.double())


def test_table_is_copied_and_accepts_any_vector_of_numbers() -> None:
    source = np.array([0.9, 0.5, 0.1])
    schedule = DiscreteSchedule(source)
    source[:] = 0.0
    assert schedule.alphas_cumprod.tolist() == DiscreteSchedule([0.9, 0.5, 0.1]).alphas_cumprod.tolist()
    assert repr(schedule) == "DiscreteSchedule(3 times)"


def test_settings_are_frozen_values() -> None:
    assert VPSchedule(0.1, 20) == VPSchedule() and hash(VPSchedule()) == hash(VPSchedule(0.1, 20))
    with pytest.raises(dataclasses.FrozenInstanceError):
        VPSchedule().beta_min = 1.0  # type: ignore[misc]


@patient
@given(t=st.floats().filter(lambda t: not 0.0 <= t <= 1.0))
def test_every_time_outside_the_range_is_refused(t: float) -> None:
    for schedule in (VPSchedule(), CosineSchedule(), FlowSchedule()):
        for function in (schedule.alpha, schedule.sigma, schedule.log_snr):
            with pytest.raises(ValueError, match=r"t must lie in \[0, 1\]"):
                function(torch.tensor([0.5, t], dtype=torch.float64))


@pytest.mark.parametrize(
    ("call", "error", "parts"),
    [
        (lambda: VPSchedule(beta_min=0.0), ValueError, ["beta_min", "> 0", "got 0.0"]),
        (lambda: VPSchedule(beta_min=2.0, beta_max=1.0), ValueError, ["beta_max", ">= 2", "got 1.0"]),
        (lambda: VPSchedule(beta_max=math.nan), ValueError, ["beta_max", "finite", "got nan"]),
        (lambda: VPSchedule(beta_min="0.1"), TypeError, ["beta_min", "number", "'0.1'", "str"]),
        (lambda: VPSchedule(beta_min=True), TypeError, ["beta_min", "number", "True", "bool"]),
        (lambda: CosineSchedule(offset=-0.1), ValueError, ["offset", ">= 0 and < 1", "got -0.1"]),
        (lambda: CosineSchedule(offset=1.0), ValueError, ["offset", ">= 0 and < 1", "got 1.0"]),
        (lambda: VESchedule(sigma_min=3.0, sigma_max=2.0), ValueError, ["sigma_max", "> 3", "got 2.0"]),
        (lambda: VESchedule(sigma_max=math.inf), ValueError, ["sigma_max", "finite", "got inf"]),
        (lambda: VPSchedule().alpha("noon"), TypeError, ["t must", "'noon'", "str"]),
        (lambda: VPSchedule().alpha(torch.tensor(1j)), TypeError, ["t must", "complex"]),
        (lambda: VPSchedule().sigma(torch.tensor(True)), TypeError, ["t must", "bool"]),
        (lambda: VPSchedule().log_snr([0.1]), TypeError, ["t must", "list"]),
        (lambda: OUSchedule().alpha(-0.1), ValueError, ["t must", "[0, inf]", "OUSchedule", "-0.1"]),
        (lambda: TABLE.alpha(999.5), ValueError, ["t must", "[-1, 999]", "999.5"]),
        (lambda: VPSchedule().time(-11.0), ValueError, ["log_snr", "[-10.05, inf]", "VPSchedule", "-11"]),
        (lambda: TABLE.time(-11.0), ValueError, ["log_snr", "inf]", "DiscreteSchedule", "-11"]),
        (lambda: FlowSchedule().time(math.nan), ValueError, ["log_snr", "[-inf, inf]", "nan"]),
        (lambda: DiscreteSchedule([0.9]), ValueError, ["alphas_cumprod", "at least 2", "(1,)"]),
        (lambda: DiscreteSchedule([[0.9, 0.1]]), ValueError, ["alphas_cumprod", "one-dim", "(1, 2)"]),
        (lambda: DiscreteSchedule([0.9, 0.9]), ValueError, ["alphas_cumprod", "decreasing", "index 1"]),
        (lambda: DiscreteSchedule([1.0, 0.9]), ValueError, ["alphas_cumprod", "between 0 and 1", "1.0"]),
        (lambda: DiscreteSchedule([0.9, math.nan]), ValueError, ["alphas_cumprod[1]", "nan"]),
        (lambda: DiscreteSchedule("abc"), TypeError, ["alphas_cumprod", "'abc'"]),
        (lambda: DiscreteSchedule.ddpm(1), ValueError, ["timesteps", ">= 2", "got 1"]),
        (lambda: DiscreteSchedule.ddpm(10.0), TypeError, ["timesteps", "integer", "float"]),
        (lambda: DiscreteSchedule.ddpm(beta_end=1.5), ValueError, ["beta_end", "< 1", "1.5"]),
    ],
)
def test_bad_input_is_named(call: Callable[[], object], error: type[Exception], parts: list[str]) -> None:
    with pytest.raises(error) as caught:
        call()
    assert all(part in str(caught.value) for part in parts), str(caught.value)
