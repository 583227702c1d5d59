"""Few-step rivals: coarse steps carry the fine noise, and diffusers' solvers have their order on any grid."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

import piadm
from piadm.condense import condense
from piadm.models import GaussianDenoiser, MixtureDenoiser
from piadm.nodes import NodeSet
from piadm.rivals import Course, Lane, drive, prepare
from piadm.rivals.drive import Solver
from piadm.rivals.few_steps import few_steps
from piadm.rivals.multistep import dpm_solver, multistep, unipc
from piadm.rivals.spacing import SPACINGS, borders

SHAPE, STEPS = (3, 8), 30
SCHEDULES = {
    "table": piadm.DiscreteSchedule.ddpm(),
    "vp": piadm.VPSchedule(),
    "ve": piadm.VESchedule(),
    "flow": piadm.FlowSchedule(),
}


def mixture(schedule: piadm.NoiseSchedule) -> piadm.Denoiser:
    means = 0.6 * torch.randn(4, *SHAPE[1:], generator=torch.Generator().manual_seed(1))
    return MixtureDenoiser(schedule, means, 0.01)


def course(method: str, schedule: str = "table", steps: int = STEPS) -> Course:
    return prepare(mixture(SCHEDULES[schedule]), SHAPE, method=method, steps=steps, seed=2)


@pytest.mark.parametrize("method", ["sde", "ode"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_coarse_step_is_what_the_fine_steps_give_with_the_estimate_frozen(method: str, spacing: str) -> None:
    on = course(method)
    lane, cells = on.lane(0), borders(on, 4, spacing)
    factor, pull, spread, kicks = lane.coarsen(cells)
    for n, (first, last) in enumerate(zip(cells.tolist(), cells[1:].tolist(), strict=False)):
        one = NodeSet(torch.tensor([0]), torch.ones(last - first, 1, dtype=torch.float64))
        path = condense(on.steps.part(first, last), torch.zeros(last - first, dtype=torch.float64), one)
        weights = path.noise[-1, 0].flatten()
        assert factor[n] == pytest.approx(path.start[-1].item(), rel=1e-12)
        assert pull[n] == pytest.approx(path.response[-1].item(), rel=1e-12)
        # The coarse step's own noise, by the formula for one long step, and the very same normals.
        assert spread[n] == pytest.approx(weights.square().sum().sqrt().item(), rel=1e-12, abs=1e-300)
        want = weights @ lane.noise[first:last] if lane.noise is not None else torch.zeros_like(kicks[n])
        torch.testing.assert_close(kicks[n], want, rtol=1e-10, atol=1e-12)
    coarse = piadm.TimeGrid(on.grid.times[cells])
    own = piadm.DataExponential(1.0 if method == "sde" else 0.0).steps(on.denoiser.schedule, coarse)
    torch.testing.assert_close(factor, own.a[:, 0, 0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(pull, own.b[:, 0], rtol=1e-9, atol=1e-12)
    if method == "sde":
        torch.testing.assert_close(spread, own.c[:, 0, 0], rtol=1e-9, atol=1e-12)


def test_borders_are_distinct_and_as_many_as_asked_for() -> None:
    for schedule in SCHEDULES:
        on = course("ode", schedule)
        for spacing in SPACINGS:
            for count in (1, 2, 3, 7, STEPS - 1, STEPS):
                found = borders(on, count, spacing).tolist()
                assert found[0] == 0 and found[-1] == STEPS and len(found) == count + 1
                assert all(after > before for before, after in zip(found, found[1:], strict=False))


def gaussian_error(steps: int, solver: Callable[[Lane, Tensor, Course], Solver]) -> float:
    """Error against the exact flow of Gaussian data, from noise to a little before clean data."""
    schedule = piadm.VPSchedule()
    denoiser = GaussianDenoiser(schedule, 0.3, 0.25)
    # Equal steps in log-SNR, which the order is about; the fine grid is the coarse one.
    grid = piadm.TimeGrid.log_snr(schedule, steps, start=0.9, end=0.05)
    on = prepare(denoiser, (2, 4), method="ode", grid=grid, seed=3)
    exact = denoiser.network.flow(on.start.double(), 0.9, 0.05)
    got = drive(on, lambda lane: solver(lane, torch.arange(steps + 1), on)).sample
    return float((got - exact).square().mean().sqrt())


@pytest.mark.parametrize(
    ("order", "solver"),
    [
        (1, lambda lane, cells, on: few_steps(lane, cells)),
        (2, lambda lane, cells, on: multistep(lane, cells, dpm_solver(on))),
        # The corrector would make it 3, but the scheduler's last step is of first order.
        (2, lambda lane, cells, on: multistep(lane, cells, unipc(on, 2))),
    ],
)
def test_solvers_have_their_order(order: int, solver: Callable[[Lane, Tensor, Course], Solver]) -> None:
    # Errors down to 3e-5, far above float32 rounding; the slope is 1.00, 1.84 and 2.01 here, and 1.99 at twice as many.
    slope = math.log2(gaussian_error(64, solver) / gaussian_error(128, solver))
    assert slope == pytest.approx(order, abs=0.25)


def test_dpm_solver_takes_the_steps_of_the_scheduler_on_its_own_times() -> None:
    """On the scheduler's own table and times the loop is the one that everybody writes."""
    table = piadm.DiscreteSchedule.ddpm()
    scheduler = DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02, prediction_type="sample")
    scheduler.set_timesteps(20)
    times = torch.cat([scheduler.timesteps.double(), torch.tensor([-1.0], dtype=torch.float64)])
    on = prepare(mixture(table), SHAPE, method="ode", grid=piadm.TimeGrid(times), seed=2)
    x = on.start
    for t in scheduler.timesteps:
        x = scheduler.step(on.denoiser(x, t.expand(len(x)).double()), t, x).prev_sample
    got = drive(on, lambda lane: multistep(lane, torch.arange(21), dpm_solver(on))).sample
    # The scheduler's table is float32: 1 - alpha_bar near clean data has a relative error of 6e-4.
    assert float((got - x).square().mean().sqrt()) <= 1e-4


def test_the_stochastic_multistep_solver_is_driven_by_the_fine_noise() -> None:
    """First-order steps of the scheduler are the sampler's own, so with every step taken they are the same sample."""

    def first_order(on: Course) -> DPMSolverMultistepScheduler:
        return DPMSolverMultistepScheduler(
            algorithm_type="sde-dpmsolver++", solver_order=1, prediction_type="sample", final_sigmas_type="zero"
        )

    on = course("sde")
    fine = drive(on, lambda lane: multistep(lane, torch.arange(STEPS + 1), first_order(on)))
    assert float(on.errors(fine.sample).max()) <= 1e-4  # the scheduler's own float32
    cells = borders(on, 8, "log-snr")
    coarse = drive(on, lambda lane: multistep(lane, cells, first_order(on))).sample
    assert torch.allclose(coarse, drive(on, lambda lane: few_steps(lane, cells)).sample, rtol=0, atol=1e-4)


def test_stochastic_steps_stay_with_the_fine_noise() -> None:
    def median(on: Course, solver: Callable[[Lane], Solver]) -> float:
        return float(on.errors(drive(on, solver).sample).median())

    def few(on: Course, count: int) -> float:
        return median(on, lambda lane: few_steps(lane, borders(on, count, "log-snr")))

    def second_order(on: Course) -> float:
        return median(on, lambda lane: multistep(lane, torch.arange(on.count + 1), dpm_solver(on)))

    coarse, fine = course("sde", "vp", steps=400), course("sde", "vp", steps=1600)
    other = prepare(coarse.denoiser, SHAPE, method="sde", steps=400, seed=9)
    apart = float(coarse.errors(other.truth.sample).median())  # with other noise, however many the steps
    assert few(coarse, 160) < 0.5 * few(coarse, 40) < 0.1 * apart
    # A solver of higher order keeps away from the fine path by the latter's own error, which is of first order.
    assert second_order(fine) < 0.5 * second_order(coarse) < 0.1 * apart
