"""The course that all rivals run: one sampler's steps, one initial state, one noise, one right answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from piadm._checks import choice
from piadm.denoiser import Denoiser
from piadm.grid import TimeGrid
from piadm.integrators import AffineSteps, integrator
from piadm.noise import Seed
from piadm.numerics import rms
from piadm.problem import check_denoiser, grid_of, make_problem
from piadm.sequential import sample_sequential
from piadm.solution import RoundInfo, Solution

METHODS = ("sde", "ode")


@dataclass(frozen=True, eq=False)
class Course:
    """What is sampled, how finely, from which noise, and the sequential sampler's answer.

    The vectors are float64 on the state's device; ``J`` steps join ``J + 1`` states.

    Attributes:
        denoiser: the denoiser.
        shape: ``(B, *sample_shape)``.
        method: "sde" or "ode".
        grid: all times, noise first.
        seed: the noise.
        condition: the network's conditions.
        max_batch: most rows in one network call; None chooses.
        steps: coefficients of every step.
        a, b, c: the same as vectors ``(J,)``; ``c`` is 0 for the ODE.
        alpha, sigma: at every time, ``(J + 1,)``.
        spread: standard deviation of the stochastic sampler's noise in the step that leaves each state, the unit of
            several rivals' tolerances, whatever the method; where that is 0, the last one before, ``(J + 1,)``.
        start: state at the first time, ``(B, d)``.
        noise: standard normals, ``(J, B, d)``, or None for the ODE.
        truth: the sequential sampler's solution.
    """

    denoiser: Denoiser
    shape: tuple[int, ...]
    method: str
    grid: TimeGrid
    seed: Seed
    condition: Mapping[str, Any]
    max_batch: int | None
    steps: AffineSteps
    a: Tensor
    b: Tensor
    c: Tensor
    alpha: Tensor
    sigma: Tensor
    spread: Tensor
    start: Tensor
    noise: Tensor | None
    truth: Solution

    @property
    def count(self) -> int:
        """Number of steps ``J``."""
        return len(self.a)

    @property
    def batch(self) -> int:
        """Number of samples ``B``."""
        return len(self.start)

    @property
    def log_snr(self) -> Tensor:
        """Log-SNR at every time, float64 on the CPU, ``(J + 1,)``; infinite where alpha or sigma is 0."""
        return self.denoiser.schedule.log_snr(self.grid.times)

    def lane(self, sample: int) -> Lane:
        """The course of one sample."""
        noise = None if self.noise is None else self.noise[:, sample].double()
        return Lane(self, self.start[sample].double(), noise)

    def errors(self, sample: Tensor) -> Tensor:
        """RMS per coordinate against the sequential sample, float64 on the CPU ``(B,)``; inf where not finite."""
        apart = rms(sample.flatten(1).double() - self.truth.sample.flatten(1).double()).cpu()
        return torch.where(apart.isfinite(), apart, torch.inf)


@dataclass(frozen=True, eq=False)
class Lane:
    """One sample's part of a course.

    Attributes:
        course: the course.
        start: state at the first time, float64 ``(d,)``.
        noise: standard normals, float64 ``(J, d)``, or None for the ODE.
    """

    course: Course
    start: Tensor
    noise: Tensor | None

    def kicks(self, first: int, last: int) -> Tensor | float:
        """What the noise adds in steps ``first .. last - 1``: ``c_j xi_j``, ``(last - first, d)``; 0 for the ODE."""
        return 0.0 if self.noise is None else self.course.c[first:last, None] * self.noise[first:last]

    def step(self, first: int, last: int, x: Tensor, denoised: Tensor) -> Tensor:
        """Steps ``first .. last - 1``, each from its own state: ``a_j x_j + b_j D_j + c_j xi_j``, ``(n, d)``."""
        a, b = self.course.a[first:last, None], self.course.b[first:last, None]
        return a * x + b * denoised + self.kicks(first, last)

    def coarsen(self, borders: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One step over each cell of the fine grid, with the same noise.

        The fine steps are exact while the denoised estimate stays the same, so the coarse step is what they give
        with ``D`` frozen at the cell's start.  From step ``i`` to the cell's end the fine recurrence multiplies by
        ``w_i = prod_{k > i} a_k``, hence

            x' = A x + B D + z,      A = prod a_k,   B = sum_i w_i b_i,   z = sum_i w_i c_i xi_i

        and ``z`` has variance ``C^2 = sum_i (w_i c_i)^2``, that of the coarse step's own noise.

        Args:
            borders: fine steps at which cells begin, then ``J``; ascending from 0, int64 on the CPU ``(n + 1,)``.

        Returns:
            ``A (n,)``, ``B (n,)``, ``C (n,)`` and ``z (n, d)``, zero for the ODE; float64.

        Reference: Lu et al. 2022 (arXiv 2211.01095), whose first-order steps these are.
        """
        course, cells = self.course, len(borders) - 1
        device = course.a.device
        cell = torch.repeat_interleave(torch.arange(cells, device="cpu"), borders.diff()).to(device)
        whole, weight = [1.0] * cells, torch.empty(course.count, dtype=torch.float64, device="cpu")
        factors, owner = course.a.tolist(), cell.tolist()
        for i in reversed(range(course.count)):
            weight[i] = whole[owner[i]]
            whole[owner[i]] *= factors[i]
        weight = weight.to(device)

        def gather(values: Tensor) -> Tensor:
            return values.new_zeros(cells, *values.shape[1:]).index_add_(0, cell, values)

        scale = gather((weight * course.c).square()).sqrt()
        kicks = self.start.new_zeros(cells, len(self.start))
        if self.noise is not None:
            kicks = gather((weight * course.c)[:, None] * self.noise)
        return torch.tensor(whole, dtype=torch.float64, device=device), gather(weight * course.b), scale, kicks


def prepare(
    denoiser: Denoiser,
    shape: tuple[int, ...],
    *,
    method: str = "ode",
    grid: TimeGrid | None = None,
    steps: int = 1000,
    seed: Seed = 0,
    condition: Mapping[str, Any] | None = None,
    max_batch: int | None = None,
    callback: Callable[[RoundInfo], object] | None = None,
) -> Course:
    """Lay out a course, and walk it once, step by step; arguments as ``sample_sequential``.

    Raises:
        TypeError, ValueError: for bad input, before any network call; ValueError too if the network's values, and
            so the right answer, are not finite.
        KeyboardInterrupt: if the walk was interrupted.
    """
    schedule = check_denoiser(denoiser).schedule
    choice("method", method, METHODS)
    times = grid_of(grid, schedule, steps)
    scheme = integrator(method).steps(schedule, times)
    problem = make_problem(
        denoiser, shape, times, seed=seed, initial=None, noise=None, noise_count=scheme.count, condition=condition,
        max_batch=max_batch, callback=callback,
    )  # fmt: skip
    truth = sample_sequential(
        denoiser, problem.shape, method=method, grid=times, seed=seed, condition=condition, max_batch=max_batch,
        callback=callback,
    )  # fmt: skip
    if truth.stats.rounds < scheme.count:
        raise KeyboardInterrupt
    finite(truth)
    device = problem.start.device
    noisy, (alpha, sigma) = scheme.normals > 0, schedule.levels(times.times)
    c = scheme.c[:, 0, 0] if noisy else scheme.c.new_zeros(scheme.count)
    return Course(
        denoiser=denoiser,
        shape=problem.shape,
        method=method,
        grid=times,
        seed=seed,
        condition=problem.executor.condition,
        max_batch=max_batch,
        steps=scheme,
        a=scheme.a[:, 0, 0].to(device),
        b=scheme.b[:, 0].to(device),
        c=c.to(device),
        alpha=alpha.to(device),
        sigma=sigma.to(device),
        spread=_spread(integrator("sde").steps(schedule, times).c[:, 0, 0]).to(device),
        start=problem.start,
        noise=problem.noise.path(0, scheme.count) if noisy else None,
        truth=truth,
    )


def finite(truth: Solution) -> Solution:
    """The right answer itself.

    Raises:
        ValueError: if the network's values, and so the answer, are not finite.
    """
    if not bool(truth.sample.isfinite().all()):
        raise ValueError("denoiser must give finite values; " + "; ".join(truth.failures or ("the states overflowed",)))
    return truth


def _spread(noise: Tensor) -> Tensor:
    """Noise per step, one more entry for the end, and zeros replaced by the last value before them."""
    positive = [1e-12]
    for value in [*noise.tolist(), 0.0]:
        positive.append(value if value > 0 else positive[-1])
    return torch.tensor(positive[1:], dtype=torch.float64, device="cpu")
