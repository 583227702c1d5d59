"""``sample``: the sequential sampler's result, parallel in time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
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
@torch.no_grad()
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

    Each round calls the network once, on the active rows of all unfinished samples, and solves the linear recurrence

        x_{j+1} = (a_j + b_j G_j) x_j + b_j R_j + c_j xi_j,      R = D(x_old) - G x_old at the nodes

    exactly for the whole path.  Residuals are interpolated between the nodes; by default the slopes ``G`` are improved
    from round to round.  If every step is a node, the fixed point is the sequential sampler's path.

    Args:
        denoiser: network, schedule and prediction.
        shape: ``(B, *sample_shape)``.
        method: "sde" (DDPM ancestral), "ode" (DDIM), "paper-sde", "paper-ode" (score-frozen), or an integrator.
        grid: times from noise to data; None is ``TimeGrid.default(schedule, steps)``.
        steps: number of steps ``J`` of the default grid.
        tol: RMS error per coordinate of the final sample against ``sample_sequential``, > 0, judged per sample.
        seed: one int, or one per sample (an int, or a pair (seed, sample)).
        initial: state at the first time, ``(B, *sample_shape)``; None draws ``N(0, alpha^2 + sigma^2)``.
        noise: standard normals, ``(J, B, *sample_shape)``; None draws them.  The ODE methods do not read them.
        condition: keyword arguments of the network.  Tensors and arrays have one row per sample, also inside nested
            mappings (passed on as dicts), lists and tuples; every other value is passed on unchanged.
        nodes: where the network is called.  "all": at every step; the fixed point is then exactly the sequential
            sampler's.  An integer >= 2: at so many steps, spread evenly in log-SNR (for the SDE more densely where
            signal and noise are comparable); with fewer than 9 (SDE: 24) no error estimate is possible.  None: as many
            as the tolerance is expected to need, about doubled for samples that turn out to need more.
        window: most rows evaluated per sample and round, the first ones that have not settled.  An integer >= 2;
            "all": no limit; None: half to three quarters of the nodes, or all if every step is a node; "auto": the
            number of least expected time by a cost model of the network, whose first run times its first rounds.  A
            narrow window saves evaluations and costs rounds.
        linearization: the guess ``G`` of the network's Jacobian: "diagonal" (None), "secant", "gaussian", "score",
            "identity", "data", or an object with a method ``slopes``.
        max_rounds: most network rounds; None: twice the number of steps, or of nodes if ``nodes`` is a number.
        max_batch: most rows in one network call; None: chosen by device, and halved when memory runs out.
        callback: called with a ``RoundInfo`` after each round; a true return value ends the run.
        progress: whether to show a progress bar; None: no.
        return_states: keep the states at every step.
        raise_on_failure: raise ``NotConvergedError`` unless every sample is CONVERGED.
        workers: ``piadm.Devices`` or ``piadm.Ranks``, which evaluate the network; None: this process.

    Returns:
        A ``Solution``, with a status and an error estimate per sample.

    Raises:
        TypeError, ValueError: for bad input, before any network call.
        NetworkError: if the network raises or returns the wrong shape.
        NotConvergedError: with ``raise_on_failure``, if a sample is not CONVERGED.
        RuntimeError: if ``workers`` is a ``Ranks`` and ``torch.distributed`` is not initialised.

    Reference: Chen et al. 2024 (arXiv 2405.15986) for Picard iterations on blocks; Shih et al. 2023
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
