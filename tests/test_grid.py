"""Time grids and the paper's blocks: their spacing, their ends, and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from piadm.grid import Blocks, TimeGrid
from piadm.schedule import (
    CosineSchedule,
    DiscreteSchedule,
    FlowSchedule,
    NoiseSchedule,
    OUSchedule,
    VESchedule,
    VPSchedule,
)

TABLE = DiscreteSchedule.ddpm()
SCHEDULES = [OUSchedule(), VPSchedule(), CosineSchedule(), VESchedule(), FlowSchedule(), TABLE]
CONTINUOUS = SCHEDULES[:-1]
ROUNDING = 1e-9  # a quotient this little above an integer counts as that integer (Blocks.paper)

horizons, stops = st.floats(0.5, 15.0), st.floats(-4.0, -0.5).map(lambda x: 10.0**x)
lengths, steps_ = st.floats(0.2, 20.0), st.floats(-2.0, 0.5).map(lambda x: 10.0**x)
patient = settings(deadline=None)  # a machine may be busy


@pytest.mark.parametrize("times", [[3, 1, 0], (3.0, 1.0, 0.0), np.float32([3, 1, 0]), torch.tensor([3, 1, 0])])
def test_any_decreasing_vector_becomes_a_float64_copy(times: object) -> None:
    grid = TimeGrid(times)  # type: ignore[arg-type]
    assert grid.times.dtype == torch.float64 and grid.times.tolist() == [3.0, 1.0, 0.0] and grid.steps == 2
    if isinstance(times, np.ndarray | torch.Tensor):
        times[0] = 7
        assert grid.times[0] == 3.0


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("steps", [1, 2, 17, 1000])
def test_uniform_and_log_snr_are_even_and_keep_their_ends(schedule: NoiseSchedule, steps: int) -> None:
    uniform, even = TimeGrid.uniform(schedule, steps), TimeGrid.log_snr(schedule, steps)
    for grid in (uniform, even):
        assert grid.steps == steps
        assert (grid.times[0].item(), grid.times[-1].item()) == (schedule.t_start, schedule.t_end)
    # Differences of rounded numbers: a few last digits of the largest one.
    lengths = uniform.times.diff()
    assert torch.allclose(lengths, lengths.mean(), rtol=0.0, atol=1e-15 * max(1.0, schedule.t_start))
    levels = schedule.log_snr(even.times)
    inner = levels[levels.isfinite()].diff()
    assert len(inner) == 0 or torch.allclose(inner, inner.mean(), rtol=0.0, atol=1e-12)


def test_log_snr_grid_replaces_infinite_ends_by_thirteen() -> None:
    levels = FlowSchedule().log_snr(TimeGrid.log_snr(FlowSchedule(), 4).times)
    assert levels.tolist() == pytest.approx([-math.inf, -6.5, 0.0, 6.5, math.inf], abs=1e-12)


def test_log_snr_grid_of_a_table_stays_within_the_trained_times() -> None:
    times = TimeGrid.log_snr(TABLE, 1000).times
    assert bool((times[:-1] >= 0.0).all()) and times[-1] == -1.0


@patient
@given(position=st.floats(1e-8, 1.0 - 1e-8))
def test_log_snr_grid_decreases_whichever_end_is_infinite(position: float) -> None:
    for start, end in ((1.0, position), (position, 0.0)):
        times = TimeGrid.log_snr(FlowSchedule(), 9, start, end).times
        assert bool((times.diff() < 0).all()) and times[0] == start and times[-1] == end


@pytest.mark.parametrize("steps", [1, 7, 50, 600, 1000])
def test_ddpm_times_are_those_of_diffusers(steps: int) -> None:
    scheduler = pytest.importorskip("diffusers").DDPMScheduler(1000)
    scheduler.set_timesteps(steps)
    assert TimeGrid.ddpm(TABLE, steps).times.tolist() == [*scheduler.timesteps.tolist(), -1]


def test_default_grid_follows_the_custom_of_the_schedule() -> None:
    assert torch.equal(TimeGrid.default(TABLE, 20).times, TimeGrid.ddpm(TABLE, 20).times)
    assert torch.equal(TimeGrid.default(VESchedule(), 20).times, TimeGrid.log_snr(VESchedule(), 20).times)
    for schedule in (OUSchedule(), VPSchedule(), CosineSchedule(), FlowSchedule()):
        assert torch.equal(TimeGrid.default(schedule, 20).times, TimeGrid.uniform(schedule, 20).times)


@patient
@given(horizon=horizons, stop=stops, length=lengths, step=steps_)
def test_paper_blocks_tile_the_horizon_in_equal_parts(horizon: float, stop: float, length: float, step: float) -> None:
    blocks = Blocks.paper(horizon, stop, length, step)
    assert blocks.times[0][0] == horizon and blocks.times[-1][-1] == stop
    assert all(torch.equal(a[-1], b[0]) for a, b in zip(blocks.times[:-1], blocks.times[1:], strict=True))
    equal = (horizon - stop) / blocks.count
    spans = torch.stack([block[0] - block[-1] for block in blocks.times])
    assert torch.allclose(spans, torch.full_like(spans, equal), rtol=0.0, atol=1e-14 * horizon)
    assert equal <= length * (1 + ROUNDING)
    assert blocks.count == 1 or (horizon - stop) / (blocks.count - 1) > length  # no fewer would do
    assert blocks.sizes == tuple(len(block) - 1 for block in blocks.times)
    assert blocks.sizes == Blocks.paper_sizes(horizon, stop, blocks.count, step)
    assert blocks.steps == sum(blocks.sizes) == blocks.grid(OUSchedule()).steps


@patient
@given(horizon=horizons, stop=stops, length=lengths, step=steps_)
@example(horizon=2.0, stop=0.1, length=2.0, step=0.9999999999533115)  # starts 5e-11 above the turn at 1 + step
@example(horizon=3.0, stop=1.0 + 0.5 - 1e-11, length=20.0, step=0.5)  # ends 1e-11 below it
@example(horizon=3.0 + 1e-11, stop=1.5 - 1e-11, length=20.0, step=0.5)  # and starts 1e-11 more than steps above
def test_paper_steps_are_as_long_as_their_bound_allows(horizon: float, stop: float, length: float, step: float) -> None:
    *early, last = Blocks.paper(horizon, stop, length, step).times
    for block in early:
        steps = -block.diff()
        assert torch.allclose(steps, steps.mean(), rtol=0.0, atol=1e-14 * horizon)
        assert steps.max() <= step * (1 + 2 * ROUNDING)
        assert len(steps) == 1 or (block[0] - block[-1]) / (len(steps) - 1) > step
    bound = step * last[1:].clamp(max=1.0)
    steps = -last.diff()
    # Rounding of the times, 2^-53 of the largest, per step; and the sliver that the last step may take along.
    assert bool((steps <= bound * (1 + 2 * ROUNDING) + 1e-14 * horizon).all())
    longest = torch.maximum(last[:-2] - step, last[:-2] / (1 + step))
    assert torch.allclose(last[1:-1], longest, rtol=1e-12, atol=1e-14 * horizon)
    assert steps[-1] >= 0.5 * ROUNDING * bound[-1]  # no step of rounding only


def test_paper_blocks_without_remainder_have_the_counts_of_the_formula() -> None:
    assert Blocks.paper(9.0 + 0.3, 0.3, 1.0, 0.1).sizes[:-1] == (10,) * 8  # 9 blocks, 10 steps in 1.0
    last = Blocks.paper(1.5, 0.5, 1.0, 0.25).times[-1]  # uniform above 1.25, ratio 1.25 below
    assert last.tolist() == pytest.approx([1.5, 1.25, 1.0, 0.8, 0.64, 0.512, 0.5], rel=1e-14)


@pytest.mark.parametrize("step", [0.07, 0.1, 0.25, 0.3])
def test_paper_steps_that_land_on_the_end_leave_no_sliver(step: float) -> None:
    assert [Blocks.paper(1.0, (1 + step) ** -k, 5.0, step).steps for k in range(1, 60)] == list(range(1, 60))


@pytest.mark.parametrize("schedule", CONTINUOUS, ids=lambda s: type(s).__name__)
def test_grid_of_blocks_has_their_log_snr_on_any_clock(schedule: NoiseSchedule) -> None:
    blocks = Blocks.paper(10.0, 1e-3, 1.0, 0.1)
    joined = torch.cat([blocks.times[0], *(block[1:] for block in blocks.times[1:])])
    grid = blocks.grid(schedule)
    expected = OUSchedule().log_snr(joined)
    assert torch.allclose(schedule.log_snr(grid.times), expected, rtol=1e-12, atol=1e-12)
    if isinstance(schedule, OUSchedule):
        assert torch.equal(grid.times, joined)


def test_grid_of_blocks_on_a_table() -> None:
    blocks = Blocks.paper(10.0, 1e-3, 1.0, 0.1)
    levels = TABLE.log_snr(blocks.grid(TABLE).times)
    joined = torch.cat([blocks.times[0], *(block[1:] for block in blocks.times[1:])])
    assert torch.allclose(levels, OUSchedule().log_snr(joined), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "error", "parts"),
    [
        (lambda: TimeGrid([1.0]), ValueError, ["times", "at least 2", "(1,)"]),
        (lambda: TimeGrid([[2.0, 1.0]]), ValueError, ["times", "one-dimensional", "(1, 2)"]),
        (lambda: TimeGrid([0.0, 1.0]), ValueError, ["times", "strictly decreasing", "1.0 at index 1"]),
        (lambda: TimeGrid([1.0, 1.0]), ValueError, ["times", "strictly decreasing", "noise first"]),
        (lambda: TimeGrid([1.0, math.nan]), ValueError, ["times[1]", "nan"]),
        (lambda: TimeGrid([math.inf, 0.0]), ValueError, ["times[0]", "inf"]),
        (lambda: TimeGrid([[1.0], [1.0, 2.0]]), ValueError, ["times", "one-dimensional"]),
        (lambda: TimeGrid("abc"), TypeError, ["times", "real numbers", "'abc'"]),
        (lambda: TimeGrid([True, False]), TypeError, ["times", "real numbers"]),
        (lambda: TimeGrid(torch.tensor([2.0, 1j])), TypeError, ["times", "complex64"]),
        (lambda: TimeGrid.uniform(VPSchedule(), 0), ValueError, ["steps", ">= 1", "got 0"]),
        (lambda: TimeGrid.uniform(VPSchedule(), 2.5), TypeError, ["steps", "integer", "2.5"]),
        (lambda: TimeGrid.uniform("vp", 10), TypeError, ["schedule", "NoiseSchedule", "'vp'"]),
        (lambda: TimeGrid.uniform(VPSchedule(), 9, start=1.5), ValueError, ["start", "at most 1", "1.5"]),
        (lambda: TimeGrid.uniform(VPSchedule(), 9, end=-0.5), ValueError, ["end", ">= 0", "-0.5"]),
        (lambda: TimeGrid.log_snr(VPSchedule(), 9, 0.1, 0.2), ValueError, ["end", "less than start", "0.2"]),
        (lambda: TimeGrid.log_snr(VPSchedule(), 9, "1"), TypeError, ["start", "number", "'1'"]),
        (lambda: TimeGrid.ddpm(TABLE, 1001), ValueError, ["steps", "1 to 1000", "1001"]),
        (lambda: TimeGrid.ddpm(TABLE, True), TypeError, ["steps", "integer", "bool"]),
        (lambda: TimeGrid.ddpm(VPSchedule(), 10), TypeError, ["schedule", "DiscreteSchedule", "VPSchedule"]),
        (lambda: Blocks([]), ValueError, ["times", "at least one block"]),
        (lambda: Blocks(3.0), TypeError, ["times", "sequence", "float"]),
        (lambda: Blocks([[3.0, 2.0], [1.5, 1.0]]), ValueError, ["times[1]", "2.0", "1.5"]),
        (lambda: Blocks([[3.0, 2.0], [2.0, 2.5]]), ValueError, ["times[1]", "strictly decreasing"]),
        (lambda: Blocks([[3.0, -1.0]]), ValueError, ["times", ">= 0", "-1.0"]),
        (lambda: Blocks.paper(1.0, 0.0, 1.0, 0.1), ValueError, ["early_stop", "> 0", "got 0.0"]),
        (lambda: Blocks.paper(1.0, 1.0, 1.0, 0.1), ValueError, ["horizon", "> 1", "got 1.0"]),
        (lambda: Blocks.paper(math.inf, 0.1, 1.0, 0.1), ValueError, ["horizon", "finite", "inf"]),
        (lambda: Blocks.paper(9.0, 0.1, -1.0, 0.1), ValueError, ["length", "> 0", "-1.0"]),
        (lambda: Blocks.paper(9.0, 0.1, 1.0, math.nan), ValueError, ["step", "> 0", "nan"]),
        (lambda: Blocks.paper(9.0, 0.1, 1.0, "0.1"), TypeError, ["step", "number", "'0.1'"]),
        (lambda: Blocks.paper(9.0, 0.1, 1e-9, 0.1), ValueError, ["length", "at least", "1e-09"]),
        (lambda: Blocks.paper(9.0, 0.1, 1.0, 1e-30), ValueError, ["step", "at least", "1e-30"]),
        (lambda: Blocks.paper(12.0, 0.1, 1.0, 0.1).grid(VPSchedule()), ValueError, ["12", "VPSchedule"]),
        (lambda: Blocks.paper(9.0, 0.1, 1.0, 0.1).grid(None), TypeError, ["schedule", "None"]),
    ],
)
def test_bad_input_is_named(call: Callable[[], object], error: type[Exception], parts: list[str]) -> None:
    with pytest.raises(error) as caught:
        call()
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_blocks_show_themselves_in_one_line() -> None:
    """Not with a thousand times: they are shown with the plan they belong to."""
    assert repr(Blocks.paper(3.0, 1.0, 1.0, 0.25)) == "Blocks(2 from 3 to 1, steps: [4, 4])"
