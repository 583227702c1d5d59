"""The sequential sampler: the definition of the right answer for every parallel one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from piadm.denoiser import Denoiser
from piadm.grid import TimeGrid
from piadm.integrators import AffineSteps, Integrator, steps_of
from piadm.noise import Seed
from piadm.problem import Callback, check_denoiser, grid_of, make_problem
from piadm.reference import noise_rows
from piadm.solution import Solution
from piadm.tally import Tally
from piadm.workers.base import Workers, on_workers


@on_workers
@torch.no_grad()
def sample_sequential(
    denoiser: Denoiser,
    shape: tuple[int, ...],
    *,
    method: str | Integrator = "sde",
    grid: TimeGrid | None = None,
    steps: int = 1000,
    seed: Seed = 0,
    initial: Tensor | None = None,
    noise: Tensor | None = None,
    condition: Mapping[str, Any] | None = None,
    max_batch: int | None = None,
    callback: Callback | None = None,
    progress: bool | None = None,
    return_states: bool = False,
    raise_on_failure: bool = False,
    workers: Workers | None = None,
) -> Solution:
    """Sample step by step: ``x_{j+1} = a_j x_j + b_j x0_hat(x_j, t_j) + c_j xi_j`` for ``j = 0 .. J-1``.

    Args:
        denoiser: network, schedule and prediction.
        shape: ``(B, *sample_shape)``.
        method: "sde" (DDPM ancestral), "ode" (DDIM), "paper-sde", "paper-ode" (score-frozen), or an integrator.
        grid: times from noise to data; None is ``TimeGrid.default(schedule, steps)``.
        steps: number of steps ``J`` of the default grid.
        seed: one int, or one per sample (an int, or a pair (seed, sample)).
        initial: state at the first time, ``(B, *sample_shape)``; None draws ``N(0, alpha^2 + sigma^2)``.
        noise: standard normals, ``(J, B, *sample_shape)``; None draws them.  The ODE methods do not read them.
        condition: keyword arguments of the network.  Tensors and arrays have one row per sample, also inside nested
            mappings (passed on as dicts), lists and tuples; every other value is passed on unchanged.
        max_batch: most rows in one network call; None: chosen by device, and halved when memory runs out.
        callback: called with a ``RoundInfo`` after each step; a true return value ends the run.
        progress: whether to show a progress bar; None: no.
        return_states: keep every state (of an interrupted run: those that were reached).
        raise_on_failure: raise ``NotConvergedError`` unless every sample is CONVERGED.
        workers: ``piadm.Devices`` or ``piadm.Ranks``, which evaluate the network; None: this process.

    Returns:
        A ``Solution``; its error estimate is 0, since errors are measured against this result, or inf for samples
        that were interrupted or failed.

    Raises:
        TypeError, ValueError: for bad input, before any network call.
        NetworkError: if the network raises or returns the wrong shape.
        NotConvergedError: with ``raise_on_failure``, if a sample is not CONVERGED.
        RuntimeError: if ``workers`` is a ``Ranks`` and ``torch.distributed`` is not initialised.

    Reference: Ho et al. 2020 (arXiv 2006.11239) for DDPM; Song et al. 2020 (arXiv 2010.02502) for DDIM; Chen et al.
        2024 (arXiv 2405.15986) for the exponential integrators of "paper-sde" and "paper-ode".
    """
    schedule = check_denoiser(denoiser).schedule
    grid = grid_of(grid, schedule, steps)
    coefficients = steps_of(method, schedule, grid)
    if not isinstance(coefficients, AffineSteps):
        kind = type(coefficients).__name__
        raise TypeError(f"method.steps(schedule, grid) must return a piadm.AffineSteps here, got a {kind}")
    problem = make_problem(
        denoiser, shape, grid, seed=seed, initial=initial, noise=noise,
        noise_count=coefficients.count * max(1, coefficients.normals), condition=condition, max_batch=max_batch,
        callback=callback, workers=workers, kept=coefficients.count + 1 if return_states else 0,
    )  # fmt: skip
    tally = Tally(problem, coefficients.count, callback, progress)
    x, batch = problem.start.clone(), problem.batch
    samples = torch.arange(batch, device="cpu")
    rows, nodes = samples.to(x.device), coefficients.times.to(x.device)
    a, b, c = coefficients.a[:, 0, 0].tolist(), coefficients.b[:, 0].tolist(), coefficients.c[:, 0].tolist()
    normals = coefficients.normals
    states = [x] if return_states else []
    failed_at = torch.full((batch,), coefficients.count, device=x.device)
    chunk, ahead = x[None], max(1, noise_rows(x.device, x.numel()) // max(1, normals))

    with tally.running():
        for j in range(coefficients.count):
            if normals and j % ahead == 0:
                chunk = problem.noise.path(normals * j, normals * min(j + ahead, coefficients.count))
            estimate = problem.executor.whole(x, rows, nodes[j].expand(batch))
            failed_at = torch.where(estimate.isfinite().all(1), failed_at, failed_at.clamp(max=j))
            x = a[j] * x + b[j] * estimate
            for row, weight in enumerate(c[j], normals * (j % ahead)):
                x = x.add(chunk[row], alpha=weight)
            if return_states:
                states.append(x)
            tally.end = x
            tally.round(samples, samples, estimate)
    tally.peak_states = batch
    tally.finish()
    if tally.rounds == coefficients.count:
        tally.error.zero_()
    for sample, step in enumerate(failed_at.tolist()):
        if step < tally.rounds:
            tally.fail(sample, f"the network returned a value that is not finite at time {coefficients.times[step]:g}")
    kept = torch.stack(states).reshape(-1, *problem.shape) if return_states else None
    return tally.solution(kept, raise_on_failure=raise_on_failure)
