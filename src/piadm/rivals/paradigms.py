"""ParaDiGMS: Picard iterations in a sliding window, with its own stopping rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from piadm.grid import TimeGrid
from piadm.numerics import rms
from piadm.rivals.course import Course, Lane
from piadm.rivals.drive import Solver
from piadm.rivals.rival import TOLERANCES, Ladder, Rival, Setting, Unavailable, at_most, setting
from piadm.schedule import DiscreteSchedule

#: Rows per round that are tried, beside all steps at once.
WINDOWS = (100, 50, 25, 200)

#: One step from each of the states ``first .. last - 1``, noise included: ``(first, last, x, D) -> x'``.
Step = Callable[[int, int, Tensor, Tensor], Tensor]


def paradigms(
    lane: Lane, window: int, tolerance: float, step: Step | None = None, spread: Tensor | None = None
) -> Solver:
    """Picard iterations that carry the state unchanged, in a window that slides over what has settled.

    With ``S_j`` the sampler's step from state ``j``, a round gives every state of the window ``[p, p + w)`` as

        x_{j+1} <- x_p + sum_{i=p}^{j} (S_i(x_i) - x_i)

    and the window moves on to the first state that has changed by more than ``tolerance`` times the noise of a step,
    in RMS per coordinate; at least by one, for the next state is exact.

    Args:
        lane: the sample.
        window: rows evaluated in a round.
        tolerance: the rule's; 0 goes on to the sequential sample.
        step: the sampler's step; None: the course's own.
        spread: the noise of a step, ``(J + 1,)``; None: the course's own.

    Reference: Shih et al. 2023 (arXiv 2305.16317), Algorithm 1.
    """
    course = lane.course
    step, spread = step or lane.step, course.spread if spread is None else spread
    x = lane.start.repeat(course.count + 1, 1)
    first, last = 0, min(window, course.count)
    while first < course.count:
        old = x[first:last]
        estimate = yield old, torch.arange(first, last, device="cpu")
        fresh = x[first] + (step(first, last, old, estimate) - old).cumsum(0)
        change = rms(fresh - x[first + 1 : last + 1])
        settled = change <= tolerance * spread[first + 1 : last + 1]
        x[first + 1 : last + 1] = fresh
        stride = 1 + int(settled.long().cumprod(0).sum())
        first, end = min(first + stride, last), last
        last = min(first + window, course.count)
        x[end + 1 : last + 1] = x[end]
    return x[course.count]


@dataclass(frozen=True, eq=False)
class DiffusersSteps:
    """diffusers' own step for many times at once, ``batch_step_no_noise``, and its own noise and tolerance unit.

    Attributes:
        scheduler: ``DDPMParallelScheduler`` or ``DDIMParallelScheduler``, set to the course's times.
        noise: standard deviation of the noise that belongs to each step, ``(J,)``.
    """

    scheduler: Any
    noise: Tensor

    @classmethod
    def of(cls, course: Course) -> DiffusersSteps:
        """The scheduler with the course's table and times.

        Raises:
            Unavailable: without diffusers, or if the times are not those that it can step between.
        """
        try:
            import diffusers

            kind = "DDPMParallelScheduler" if course.method == "sde" else "DDIMParallelScheduler"
            scheduler_class = getattr(diffusers, kind)
        except (ImportError, AttributeError) as error:
            raise Unavailable("needs a diffusers with parallel schedulers: pip install 'piadm[diffusers]'") from error
        table = course.denoiser.schedule
        if not isinstance(table, DiscreteSchedule):
            raise Unavailable("diffusers' parallel schedulers need a discrete table of alpha_bar")
        ddpm = len(table.alphas_cumprod) >= course.count
        if not ddpm or not torch.equal(course.grid.times, TimeGrid.ddpm(table, course.count).times):
            raise Unavailable("diffusers' parallel schedulers need the grid TimeGrid.ddpm")
        products = torch.cat([table.alphas_cumprod.new_ones(1), table.alphas_cumprod])
        betas = 1 - products[1:] / products[:-1]
        more = {"variance_type": "fixed_small"} if course.method == "sde" else {"set_alpha_to_one": True}
        with torch.device("cpu"):  # it names no device for its tables
            scheduler = scheduler_class(
                num_train_timesteps=len(betas), trained_betas=betas.numpy(), prediction_type="sample",
                clip_sample=False, timestep_spacing="leading", **more,
            )  # fmt: skip
            scheduler.set_timesteps(course.count)
            variance = [float(scheduler._get_variance(t)) for t in scheduler.timesteps]
        return cls(scheduler, torch.tensor(variance, dtype=torch.float64, device="cpu").sqrt().to(course.a.device))

    def solver(self, lane: Lane, window: int, tolerance: float) -> Solver:
        """``paradigms`` with these steps; the end's unit is 0, as in the authors' code: it must be exact."""

        def step(first: int, last: int, x: Tensor, estimate: Tensor) -> Tensor:
            times = self.scheduler.timesteps[first:last].to(x.device)
            with torch.device("cpu"):
                moved: Tensor = self.scheduler.batch_step_no_noise(estimate.float(), times, x.float())
            kicks = 0.0 if lane.noise is None else self.noise[first:last, None] * lane.noise[first:last]
            return moved.double() + kicks

        return paradigms(lane, window, tolerance, step, torch.cat([self.noise, self.noise.new_zeros(1)]))


def _ladders(course: Course) -> list[Ladder]:
    return _climbs(course, paradigms)


def _diffusers_ladders(course: Course) -> list[Ladder]:
    return _climbs(course, DiffusersSteps.of(course).solver)


def _climbs(course: Course, solver: Callable[[Lane, int, float], Solver]) -> list[Ladder]:
    """A ladder of tolerances per window."""

    def rung(window: int, tolerance: float) -> Setting:
        return setting(f"window {window}, tolerance {tolerance:.1e}", lambda lane: solver(lane, window, tolerance))

    windows = at_most((course.count, *WINDOWS), course.count)
    return [[rung(window, tolerance) for tolerance in TOLERANCES] for window in windows]


_REFERENCE = "Shih et al. 2023 (arXiv 2305.16317)"
PARADIGMS = Rival("paradigms", lambda method: "ParaDiGMS", _ladders, _REFERENCE)
PARADIGMS_DIFFUSERS = Rival(
    "paradigms-diffusers", lambda method: "ParaDiGMS, diffusers", _diffusers_ladders, _REFERENCE
)
