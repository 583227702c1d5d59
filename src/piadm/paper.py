"""PIADM-SDE and PIADM-ODE, Algorithms 1 and 2 of the paper, exactly as stated there.

Both are settings of the common loop: the score-frozen integrator, the score-frozen linearization, every step
a node, a constant start, and a fixed number of rounds per block.

Reference: Chen, Ren, Ying & Rotskoff 2024, "Accelerating Diffusion Models with Parallel Sampling: Inference at
    Sub-Linear Time Complexity" (arXiv 2405.15986).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from piadm._checks import positive_int
from piadm.activity import AllRows
from piadm.condense import condense
from piadm.corrector import Corrector
from piadm.denoiser import Denoiser
from piadm.grid import Blocks, TimeGrid
from piadm.integrators import AffineSteps, ScoreExponential, variance_preserving
from piadm.iteration import solve
from piadm.linearization import ScoreFrozen
from piadm.nodes import every_step
from piadm.noise import GivenNoise, Seed
from piadm.path import ParallelPath
from piadm.problem import Callback, Problem, check_denoiser, grid_of, make_problem
from piadm.reference import Draw, free_states
from piadm.solution import Solution
from piadm.stopping import FixedIterations
from piadm.tally import Tally
from piadm.workers.base import Workers, on_workers


@on_workers
def piadm_sde(
    denoiser: Denoiser,
    shape: tuple[int, ...],
    *,
    blocks: Blocks,
    iterations: int,
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
    """PIADM-SDE, Algorithm 1: K Picard iterations of the reverse SDE on each block.

    On a block that starts at ``t_n``, with steps ``eps_j`` and inner times ``tau_j``, for all ``m`` at once, K times:

        y_m <- e^{tau_m/2} y_0 + sum_{j<m} e^{(tau_m - tau_{j+1})/2} [2 (e^{eps_j/2} - 1) s(y_j, t_n + tau_j)
               + sqrt(e^{eps_j} - 1) xi_j]

    starting from ``y_m = y_0``; the last node starts the next block.  A schedule that is not variance preserving has
    the same iterates on its own scale, ``x = sqrt(alpha^2 + sigma^2) y``.

    Args:
        denoiser: network, schedule and prediction; any schedule, the blocks' OU times are converted by log-SNR.
        shape: ``(B, *sample_shape)``.
        blocks: the partition of the OU horizon, usually ``Blocks.paper(horizon, early_stop, length, step)``.
        iterations: Picard iterations ``K`` per block.
        seed: one int, or one per sample (an int, or a pair (seed, sample)).
        initial: state at the first time, ``(B, *sample_shape)``, on the schedule's scale; None draws
            ``N(0, alpha^2 + sigma^2)``.
        noise: standard normals, ``(J, B, *sample_shape)``, ``J = blocks.steps``; None draws them.
        condition: keyword arguments of the network.  Tensors and arrays have one row per sample, also inside nested
            mappings (passed on as dicts), lists and tuples; every other value is passed on unchanged.
        max_batch: most rows in one network call; None: chosen by device, and halved when memory runs out.
        callback: called with a ``RoundInfo`` after each round; a true return value ends the run.
        progress: whether to show a progress bar; None: no.
        return_states: keep the states at every step (of an interrupted run: of the blocks that were finished).
        raise_on_failure: raise ``NotConvergedError`` unless every sample is CONVERGED.
        workers: ``piadm.Devices`` or ``piadm.Ranks``, which evaluate the network; None: this process.

    Returns:
        A ``Solution``; CONVERGED means that the prescribed iterations are done, the error estimate is NaN.

    Raises:
        TypeError, ValueError: for bad input, before any network call.
        NetworkError: if the network raises or returns the wrong shape.
        NotConvergedError: with ``raise_on_failure``, if a sample is not CONVERGED.
        RuntimeError: if ``workers`` is a ``Ranks`` and ``torch.distributed`` is not initialised.

    Reference: Chen, Ren, Ying & Rotskoff 2024 (arXiv 2405.15986), Algorithm 1.
    """
    grid, steps = _predictor(denoiser, blocks, iterations, eta=1.0)
    problem = make_problem(
        denoiser, shape, grid, seed=seed, initial=initial, noise=noise,
        noise_count=steps.count, condition=condition, max_batch=max_batch, callback=callback,
        workers=workers, nodes=max(blocks.sizes), kept=blocks.steps + 1 if return_states else 0,
    )  # fmt: skip
    tally = Tally(problem, blocks.count * iterations, callback, progress)
    return _run(problem, tally, steps, blocks, iterations, None, return_states, raise_on_failure)


@on_workers
def piadm_ode(
    denoiser: Denoiser,
    shape: tuple[int, ...],
    *,
    blocks: Blocks,
    iterations: int,
    corrector: Corrector | None,
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
    """PIADM-ODE, Algorithm 2: on each block Picard iterations of the probability-flow ODE, then Langevin dynamics.

    On a block that starts at ``t_n``, with steps ``eps_j`` and inner times ``tau_j``, for all ``m`` at once, K times:

        y_m <- e^{tau_m/2} y_0 + sum_{j<m} e^{(tau_m - tau_{j+1})/2} (e^{eps_j/2} - 1) s(y_j, t_n + tau_j)

    After each block the corrector runs underdamped Langevin dynamics at the block's end time, its own blocks
    solved by Picard iterations too (see ``Corrector``).

    Args:
        denoiser: network, schedule and prediction; any schedule, the blocks' OU times are converted by log-SNR.
        shape: ``(B, *sample_shape)``.
        blocks: the partition of the OU horizon.
        iterations: Picard iterations ``K`` per predictor block.
        corrector: settings of the corrector; None leaves it out.
        seed: one int, or one per sample (an int, or a pair (seed, sample)).
        initial: state at the first time, ``(B, *sample_shape)``, on the schedule's scale; None draws
            ``N(0, alpha^2 + sigma^2)``.
        noise: standard normals of the corrector, ``(blocks.count * corrector.normals, B, *sample_shape)``: for
            each block ``v_0``, then per step one normal for the velocity's noise and one for the part of the
            position's noise that is independent of it.  None draws them.
        condition: keyword arguments of the network.  Tensors and arrays have one row per sample, also inside nested
            mappings (passed on as dicts), lists and tuples; every other value is passed on unchanged.
        max_batch: most rows in one network call; None: chosen by device, and halved when memory runs out.
        callback: called with a ``RoundInfo`` after each round; a true return value ends the run.
        progress: whether to show a progress bar; None: no.
        return_states: keep the predictor's states at every step (of an interrupted run: of the finished blocks).
        raise_on_failure: raise ``NotConvergedError`` unless every sample is CONVERGED.
        workers: ``piadm.Devices`` or ``piadm.Ranks``, which evaluate the network; None: this process.

    Returns:
        A ``Solution``; CONVERGED means that the prescribed iterations are done, the error estimate is NaN.

    Raises:
        TypeError, ValueError: for bad input, before any network call.
        NetworkError: if the network raises or returns the wrong shape.
        NotConvergedError: with ``raise_on_failure``, if a sample is not CONVERGED.
        RuntimeError: if ``workers`` is a ``Ranks`` and ``torch.distributed`` is not initialised.

    Reference: Chen, Ren, Ying & Rotskoff 2024 (arXiv 2405.15986), Algorithm 2.
    """
    grid, steps = _predictor(denoiser, blocks, iterations, eta=0.0)
    if corrector is not None and not isinstance(corrector, Corrector):
        raise TypeError(f"corrector must be a piadm.Corrector or None, got {type(corrector).__name__}")
    problem = make_problem(
        denoiser, shape, grid, seed=seed, initial=initial, noise=noise,
        noise_count=blocks.count * corrector.normals if corrector else 0, condition=condition,
        max_batch=max_batch, callback=callback, workers=workers,
        nodes=max(*blocks.sizes, 2 * corrector.block_steps if corrector else 0),
        kept=blocks.steps + 1 if return_states else 0,
    )  # fmt: skip
    if corrector is not None and not bool(denoiser.schedule.sigma(problem.grid.times[-1]) > 0):
        raise ValueError(
            "blocks must end before clean data (sigma = 0) for a corrector, got a last time of "
            f"{problem.grid.times[-1].item():g}"
        )
    per_block = iterations + (corrector.blocks * corrector.iterations if corrector else 0)
    tally = Tally(problem, blocks.count * per_block, callback, progress)
    return _run(problem, tally, steps, blocks, iterations, corrector, return_states, raise_on_failure)


def _predictor(denoiser: object, blocks: object, iterations: object, eta: float) -> tuple[TimeGrid, AffineSteps]:
    """Check the arguments of the paper's own and give the grid of all blocks and the predictor's steps on it."""
    schedule = check_denoiser(denoiser).schedule
    if not isinstance(blocks, Blocks):
        raise TypeError(f"blocks must be a piadm.Blocks, got {type(blocks).__name__}; see piadm.Blocks.paper")
    positive_int("iterations", iterations)
    grid = grid_of(blocks.grid(schedule), schedule, blocks.steps)
    return grid, ScoreExponential(eta).steps(schedule, grid)


@torch.no_grad()
def _run(
    problem: Problem,
    tally: Tally,
    steps: AffineSteps,
    blocks: Blocks,
    iterations: int,
    corrector: Corrector | None,
    return_states: bool,
    raise_on_failure: bool,
) -> Solution:
    """Block after block: Picard iterations, then the corrector."""
    x, first, kept = problem.start[:, None], 0, [problem.start[None]]
    tally.error.fill_(torch.nan)
    with tally.running():
        for n, size in enumerate(blocks.sizes):
            part, due = steps.part(first, first + size), tally.rounds + iterations
            path = _picard(problem, tally, part, x, _shifted(problem.noise.path, first), iterations)
            if tally.rounds < due:
                break
            x = path.end.clone()
            if return_states:
                kept += [path.nodes[1:].clone(), x[None, :, 0]]
            if corrector is not None and not tally.interrupted:
                x = _correct(problem, tally, corrector, n, problem.grid.times[first + size].item(), x)
            first += size
    tally.finish()
    states = torch.cat(kept).reshape(-1, *problem.shape) if return_states else None
    return tally.solution(states, raise_on_failure=raise_on_failure)


def _picard(
    problem: Problem, tally: Tally, steps: AffineSteps, start: Tensor, draw: Draw, iterations: int
) -> ParallelPath:
    """K rounds on one block, all its nodes starting at the block's start ``(B, s, d)``, constant on the OU scale."""
    condensed = condense(steps, ScoreFrozen().slopes(problem.denoiser.schedule, steps), every_step(steps.count))
    path = ParallelPath(condensed, free_states([condensed], start, draw)[0], torch.arange(problem.batch, device="cpu"))
    scale = variance_preserving(problem.denoiser.schedule, steps.times)[2].to(start)
    path.nodes.copy_(start[:, 0] * (scale / scale[0])[:, None, None])
    solve(tally, path, AllRows(), FixedIterations(iterations), limit=tally.rounds + iterations)
    return path


def _correct(problem: Problem, tally: Tally, corrector: Corrector, block: int, time: float, x: Tensor) -> Tensor:
    """Langevin dynamics at ``time`` after predictor block ``block``, from positions ``x (B, 1, d)``."""
    draw = _corrector_noise(problem, corrector, block)
    state = torch.stack([x[:, 0], draw(0, 1)[0]], dim=1)
    steps = corrector.steps(problem.denoiser.schedule, time)
    for n in range(corrector.blocks):
        shifted = _shifted(draw, 1 + n * steps.count * steps.normals)
        state = _picard(problem, tally, steps, state, shifted, corrector.iterations).end.clone()
    return state[:, :1]


def _corrector_noise(problem: Problem, corrector: Corrector, block: int) -> Draw:
    """The caller's noise holds the corrector's normals block after block; drawn noise has a stream per block."""
    if isinstance(problem.noise, GivenNoise):
        return _shifted(problem.noise.path, block * corrector.normals)
    return partial(problem.noise.corrector, block)


def _shifted(draw: Draw, by: int) -> Draw:
    return lambda first, last: draw(by + first, by + last)
