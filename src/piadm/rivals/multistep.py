"""Multistep solvers of higher order, by diffusers' own schedulers: DPM-Solver++ 2M, its SDE form, UniPC."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from piadm.rivals.course import Course, Lane
from piadm.rivals.drive import Solver
from piadm.rivals.rival import Ladder, Rival, Setting, Unavailable, setting
from piadm.rivals.spacing import COUNTS, borders

#: Stands in for sigma/alpha where alpha is 0, which the schedulers cannot take.
_LARGEST_RATIO = 1e5

Scheduler = Any  # diffusers is an extra without types


def multistep(lane: Lane, cells: Tensor, scheduler: Scheduler) -> Solver:
    """Let a scheduler step from border to border of the cells.

    The scheduler knows variance-preserving states only and reads nothing of a schedule but ``sigma/alpha``: it is
    given those of the cells' borders, states divided by ``sqrt(alpha^2 + sigma^2)``, and the denoised estimate as a
    prediction of the sample.  A stochastic one is given the fine noise, gathered per cell (``Lane.coarsen``) and
    brought to unit variance.

    Args:
        lane: the sample.
        cells: borders of the cells, ``(n + 1,)``.
        scheduler: a new ``DPMSolverMultistepScheduler`` or ``UniPCMultistepScheduler`` with
            ``prediction_type="sample"``; its counters are used up.

    Reference: Lu et al. 2022 (arXiv 2211.01095); Zhao et al. 2023 (arXiv 2302.04867).
    """
    course, count = lane.course, len(cells) - 1
    at = cells.to(course.a.device)
    alpha, sigma = course.alpha[at], course.sigma[at]
    scale = torch.hypot(alpha, sigma)
    with torch.device("cpu"):  # schedulers name no device for their tables
        scheduler.set_timesteps(count)
    scheduler.timesteps = torch.arange(count, device="cpu")
    scheduler.sigmas = (sigma / alpha).clamp(max=_LARGEST_RATIO).float().cpu()
    scheduler.set_begin_index(0)
    more: list[dict[str, Tensor]] = [{}] * count
    if lane.noise is not None:
        _, _, spread, kicks = lane.coarsen(cells)
        unit = torch.where(spread[:, None] > 0, kicks / spread[:, None], 0.0).float()
        more = [{"variance_noise": row[None]} for row in unit]
    x = (lane.start / scale[0])[None].float()
    for n in range(count):
        estimate = yield scale[n] * x.double(), cells[n : n + 1]
        x = scheduler.step(estimate.float(), scheduler.timesteps[n], x, **more[n]).prev_sample
    return scale[-1] * x[0].double()


def dpm_solver(course: Course) -> Scheduler:
    """DPM-Solver++ 2M, or its SDE form for that method.

    Raises:
        Unavailable: without diffusers.
    """
    kind = "sde-dpmsolver++" if course.method == "sde" else "dpmsolver++"
    with torch.device("cpu"):
        return _schedulers().DPMSolverMultistepScheduler(
            algorithm_type=kind, solver_order=2, prediction_type="sample", final_sigmas_type=_final(course)
        )


def unipc(course: Course, order: int) -> Scheduler:
    """UniPC with predictor and corrector of an order, for the ODE.

    Raises:
        Unavailable: without diffusers, or for the SDE.
    """
    if course.method == "sde":
        raise Unavailable("UniPC solves the ODE only")
    with torch.device("cpu"):
        return _schedulers().UniPCMultistepScheduler(
            solver_order=order, prediction_type="sample", final_sigmas_type=_final(course)
        )


def _final(course: Course) -> str:
    """Whether the scheduler must take its last step with care: the log-SNR is infinite at clean data."""
    return "sigma_min" if bool(course.sigma[-1] > 0) else "zero"


def _schedulers() -> Any:  # noqa: ANN401 - a module without types
    try:
        import diffusers
    except ImportError as error:
        raise Unavailable("needs diffusers: pip install 'piadm[diffusers]'") from error
    return diffusers


def _ladder(course: Course, spacing: str, label: str, new: Callable[[], Scheduler]) -> Ladder:
    """A ladder of numbers of steps."""
    new()  # says at once what is missing

    def rung(count: int) -> Setting:
        cells = borders(course, count, spacing)
        return setting(f"{count} steps, {spacing}{label}", lambda lane: multistep(lane, cells, new()))

    return [rung(count) for count in COUNTS if count < course.count]


def _dpm_ladders(course: Course) -> list[Ladder]:
    return [_ladder(course, spacing, "", lambda: dpm_solver(course)) for spacing in ("log-snr", "karras", "grid")]


def _unipc_ladders(course: Course) -> list[Ladder]:
    return [
        _ladder(course, spacing, f", order {order}", lambda order=order: unipc(course, order))  # type: ignore[misc]
        for order in (2, 3)
        for spacing in ("log-snr", "karras", "grid")
    ]


DPM_SOLVER = Rival(
    "dpm-solver",
    lambda method: "DPM-Solver++ 2M" + (" SDE" if method == "sde" else ""),
    _dpm_ladders,
    "Lu et al. 2022 (arXiv 2211.01095)",
)
UNIPC = Rival("unipc", lambda method: "UniPC", _unipc_ladders, "Zhao et al. 2023 (arXiv 2302.04867)")
