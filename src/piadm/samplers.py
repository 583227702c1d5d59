"""``sample``: the sequential sampler's result, parallel in time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from piadm._checks import positive_int
from piadm.denoiser import Denoiser
from piadm.engine import STATE_COPIES, run
from piadm.grid import TimeGrid
from piadm.integrators import Integrator
from piadm.linearization import Linearization
from piadm.noise import Seed
from piadm.problem import Callback, make_problem
from piadm.settings import resolve
from piadm.solution import Solution
from piadm.tally import Tally
from piadm.workers.base import Workers, on_workers


@on_workers
def sample(
    denoiser: Denoiser,
    shape: tuple[int, ...],
    *,
    method: str | Integrator = "sde",
    grid: TimeGrid | None = None,
    steps: int = 1000,
    tol: float = 1e-2,
    seed: Seed = 0,
    initial: Tensor | None = None,
    noise: Tensor | None = None,
    condition: Mapping[str, Any] | None = None,
    nodes: str | int | None = None,
    window: int | str | None = None,
    linearization: str | Linearization | None = None,
    max_rounds: int | None = None,
    max_batch: int | None = None,
    callback: Callback | None = None,
    progress: bool | None = None,
    return_states: bool = False,
    raise_on_failure: bool = False,
    workers: Workers | None = None,
) -> Solution:
    """Sample in parallel over time: the result of ``sample_sequential`` within ``tol``, in few rounds.

    Each round calls the network on the rows that matter of all unfinished samples at once and solves the recurrence

        x_{j+1} = (a_j + b_j G_j) x_j + b_j R_j + c_j xi_j,      R = D(x_old) - G x_old at the nodes

    exactly for the whole path, with residuals interpolated between the nodes and, by default, slopes that the
    rounds themselves have shown.  With every step a node its fixed point is the sequential sampler's path.

    Args:
        denoiser: network, schedule and prediction.
        shape: ``(B, *sample_shape)``.
        method: "sde" (DDPM ancestral), "ode" (DDIM), "paper-sde", "paper-ode" (score-frozen), or an integrator.
        grid: times from noise to data; None is ``TimeGrid.default(schedule, steps)``.
        steps: number of steps ``J`` of the default grid.
        tol: RMS error per coordinate of the final sample against ``sample_sequential``, > 0, judged per sample.
        seed: one int, or one per sample (an int, or a pair (seed, sample)).
        initial: state at the first time, ``(B, *sample_shape)``; None draws it.
        noise: standard normals, ``(J, B, *sample_shape)``; None draws them.  The ODE methods do not read them.
        condition: tensors with one row per sample, and any other values, as the network's keyword arguments.  Tensors
            in nested mappings (which arrive as dicts), lists and tuples have rows, too; other objects go whole.
        nodes: where the network is called: "all" steps (the fixed point is then exactly the sequential
            sampler's), a number of steps spread in log-SNR, evenly or, for the SDE, closer where noise and data are
            alike (fewer than 9, for the SDE 24, are too few to be certified), or None: as many as the tolerance should
            need, doubled for samples that need more.
        window: rows per sample evaluated in a round, the first ones that have not settled, >= 2; "all" of these; None:
            half to three quarters of the nodes, or all where every step is one; "auto": as many as take the least time,
            by a cost model of the network, whose first run times its first rounds.  A narrow window saves evaluations
            and costs rounds.
        linearization: "diagonal" (None), "secant", "gaussian", "score", "identity", "data", or an object with
            ``slopes``.
        max_rounds: most network rounds; None: twice as many as the path has steps, or nodes where you have set these.
        max_batch: most rows in one network call; None chooses.
        callback: called with a ``RoundInfo`` after each round; a true return value ends the run.
        progress: show a progress bar; None: no.
        return_states: keep the states at every step.
        raise_on_failure: raise ``NotConvergedError`` unless every sample is CONVERGED.
        workers: who evaluates the network: ``piadm.Devices``, ``piadm.Ranks``, or None: this process.

    Returns:
        A ``Solution``, with a status and an error estimate per sample.

    Raises:
        TypeError, ValueError: for bad input, before any network call.
        NetworkError: if the network raises or returns the wrong shape.
        NotConvergedError: with ``raise_on_failure``, if a sample is not CONVERGED.
        RuntimeError: if ``workers`` are ``Ranks`` and no process group is there.

    Reference: Chen et al. 2024 (arXiv 2405.15986) for the blocks' Picard iteration; Shih et al. 2023
        (arXiv 2305.16317) for Picard iterations on DDPM and DDIM.
    """
    settings = resolve(
        denoiser, method=method, grid=grid, steps=steps, tol=tol, nodes=nodes, window=window, guess=linearization
    )
    limit = settings.most_rounds if max_rounds is None else positive_int("max_rounds", max_rounds)
    problem = make_problem(
        denoiser, shape, settings.grid, seed=seed, initial=initial, noise=noise,
        noise_count=settings.steps.count * max(1, settings.steps.normals), condition=condition, max_batch=max_batch,
        callback=callback, workers=workers, nodes=settings.held,
        kept=STATE_COPIES * (settings.steps.count + 1) if return_states else 0,
    )  # fmt: skip
    tally = Tally(problem, None, callback, progress)
    states = run(settings, problem, tally, limit, return_states)
    return tally.solution(states, raise_on_failure=raise_on_failure)
