"""The exact law of the fast engine's rounds for Gaussian data, its secant slopes in the limit of many coordinates.

With fixed slopes a round is linear and its law is exact for any number of coordinates.  A secant
``<dx, dD>/<dx, dx>`` is one number per sample and node, taken over all coordinates; for many of them it tends to the
ratio of the expectations, the sums over modes of count times variance.  In that limit, too, every round is linear.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from piadm._checks import finite_float, positive_int
from piadm.denoiser import Denoiser
from piadm.grid import TimeGrid
from piadm.integrators import Integrator, integrator
from piadm.linearization import Gaussian, Linearization, Secant
from piadm.local_model import LEAST_STRIDE
from piadm.models import GaussianDenoiser
from piadm.samplers import sample
from piadm.schedule import NoiseSchedule
from piadm.solution import RoundInfo
from piadm.theory.chain import Chain, chain, reference_start_map
from piadm.theory.law import Law
from piadm.theory.laws import initial_law
from piadm.theory.spectrum import OU, Spectrum

_Array = np.ndarray[Any, np.dtype[np.float64]]
_FINEST = 1e-300  # a tolerance that no sample reaches: all rounds are run


def engine_law(
    spectrum: Spectrum,
    method: str | Integrator,
    grid: TimeGrid,
    rounds: int,
    *,
    variance: float,
    linearization: str | Linearization = "secant",
    nodes: str | int = "all",
    schedule: NoiseSchedule = OU,
) -> Law:
    """Law of ``sample``'s result after each number of rounds, found by running ``sample`` itself.

    A round is linear in the first state and the noise, so it is run on one sample whose coordinates are the
    coefficients of these for every mode, each times the root of the mode's share of the coordinates: inner products
    over the coordinates, of which secants are made, are then the expectations of those of a sample of many
    coordinates.  The squares of the result's coordinates add up to the variance.

    Args:
        spectrum: the data.
        method: as for ``sample``.
        grid: its times, a thousand at most or so: ``J^2`` numbers per mode and node are held.
        rounds: largest number of rounds.
        variance: what the engine is told of the data: ``data_variance``, about a mean of zero.
        linearization: as for ``sample``; of "diagonal", whose slopes depend on the coordinates, it is not the law.
        nodes: as for ``sample``: "all", or a number of nodes.
        schedule: noise schedule.

    Returns:
        Mean and variance per mode, ``(rounds, m)``.

    Raises:
        TypeError, ValueError: for arguments that ``sample`` refuses.
    """
    positive_int("rounds", rounds)
    modes, share = len(spectrum.variances), (spectrum.counts / spectrum.counts.sum()).sqrt()
    steps = integrator(method).steps(schedule, grid)
    width = 2 + steps.count  # the mean, the first state, and the noise of every step
    unit = torch.eye(width, dtype=torch.float64, device="cpu")[:, None] * share[:, None]
    start = initial_law(spectrum, schedule, float(grid.times[0])).variance.sqrt()
    centre = share.new_zeros(modes, width)
    centre[:, 0] = share * spectrum.means
    exact = GaussianDenoiser(schedule, centre, spectrum.variances[:, None].expand(modes, width).contiguous())
    ends: list[Tensor] = []

    def keep(info: RoundInfo) -> None:
        ends.append(info.sample[0].clone())

    denoiser = Denoiser(exact.network, schedule, "sample", data_variance=finite_float("variance", variance, low=0.0))
    sample(
        denoiser, (1, modes, width), method=method, grid=grid, tol=_FINEST, initial=unit[1][None] * start[:, None],
        noise=unit[2:, None], nodes=nodes, linearization=linearization, window="all", max_rounds=rounds,
        callback=keep, progress=False,
    )  # fmt: skip
    ends += ends[-1:] * (rounds - len(ends))  # a path that no round changes any more
    found = torch.stack(ends) / share[:, None]
    return Law(found[..., 0], found[..., 1:].square().sum(-1))


def gaussian_law(
    spectrum: Spectrum,
    method: str | Integrator,
    grid: TimeGrid,
    rounds: int,
    *,
    variance: float,
    schedule: NoiseSchedule = OU,
) -> Law:
    """``engine_law`` with linearization "gaussian" and every step a node, on grids of any length.

    Args:
        spectrum: the data.
        method: as for ``sample``.
        grid: its times.
        rounds: largest number of rounds.
        variance: what the engine is told of the data, about a mean of zero.
        schedule: noise schedule.

    Returns:
        Mean and variance per mode, ``(rounds, m)``.

    Raises:
        TypeError, ValueError: for bad arguments, or a step too long for the iteration.
    """
    whole, slopes = _settings(spectrum, method, grid, rounds, variance, schedule)
    start = initial_law(spectrum, schedule, float(grid.times[0]))
    return reference_start_map(whole, slopes, torch.zeros_like(slopes), rounds)(start)


def secant_law(
    spectrum: Spectrum,
    method: str | Integrator,
    grid: TimeGrid,
    rounds: int,
    *,
    variance: float,
    schedule: NoiseSchedule = OU,
) -> Law:
    """``engine_law`` with the secant and every step a node, on grids of any length, for data of mean zero.

    The iterates at one step are jointly Gaussian; their covariance is carried from step to step.  From that at a step
    follow the secants of all rounds there:

        e_k = E<dx, (J - G) dx>/E<dx, dx>,   dx = x^{k-1} - x^{k-2}
        x^k' = (a + b (G + e_k)) x^k + b (J - G - e_k) x^{k-1} + c xi

    Args:
        spectrum: the data; its means must be zero.
        method: as for ``sample``.
        grid: its times.
        rounds: largest number of rounds.
        variance: what the engine is told of the data, about a mean of zero.
        schedule: noise schedule.

    Returns:
        Mean and variance per mode, ``(rounds, m)``.

    Raises:
        TypeError, ValueError: for bad arguments, or means that are not zero.
    """
    if bool(spectrum.means.any()):
        raise ValueError(f"spectrum must have means of zero, got up to {float(spectrum.means.abs().max()):g}")
    whole, slopes = _settings(spectrum, method, grid, rounds, variance, schedule)
    least, most = Secant(variance).bounds(schedule, whole.steps)
    share = (spectrum.counts / spectrum.counts.sum())[:, None].numpy()
    a, b = whole.steps.a[:, 0, 0].numpy(), whole.steps.b[:, 0].numpy()
    c2 = (torch.zeros_like(slopes) if whole.variance is None else whole.variance).numpy()
    missing, bounds = (whole.jacobian - slopes).T.numpy(), np.stack([least - slopes, most - slopes])
    kept = a + b * slopes.numpy()
    start = initial_law(spectrum, schedule, float(grid.times[0])).variance.numpy()
    joint = np.empty((len(share), rounds + 1, rounds + 1))
    joint[:] = start[:, None, None]
    for j in range(len(b)):
        excess = _secants(joint, share, missing[j][:, None], *bounds[:, j])
        own = kept[j] + b[j] * excess
        from_before = b[j] * (missing[j][:, None] - excess[1:])
        moved = own[:, None] * joint
        moved[:, 1:] += from_before[:, :, None] * joint[:, :-1]
        joint = moved * own
        joint[:, :, 1:] += from_before[:, None] * moved[:, :, :-1]
        joint += c2[j]
    found = torch.from_numpy(np.diagonal(joint, axis1=1, axis2=2)[:, 1:].T.copy())
    return Law(torch.zeros_like(found), found)


def _settings(
    spectrum: Spectrum, method: str | Integrator, grid: TimeGrid, rounds: int, variance: float, schedule: NoiseSchedule
) -> tuple[Chain, Tensor]:
    """The chain, and the slopes of the Gaussian reference model."""
    positive_int("rounds", rounds)
    steps = integrator(method).steps(schedule, grid)
    return chain(spectrum, schedule, steps), Gaussian(variance).slopes(schedule, steps)


def _secants(joint: _Array, share: _Array, missing: _Array, least: float, most: float) -> _Array:
    """Excess slope of every round at one step, ``(rounds + 1,)``, as ``LocalModel`` learns it.

    A row's slope is that of its last two evaluations; it stays where these are too close together.
    """
    variance, beside = np.diagonal(joint, axis1=1, axis2=2), np.diagonal(joint, 1, axis1=1, axis2=2)
    move = variance[:, 1:] + variance[:, :-1] - 2 * beside
    across, along = (share * move).sum(0), (share * missing * move).sum(0)
    far = across > LEAST_STRIDE**2 * (share * variance[:, 1:]).sum(0)
    slope = np.clip(along / np.where(far, across, 1.0), least, most)
    excess = np.zeros(joint.shape[1])
    for k in range(2, len(excess)):
        excess[k] = slope[k - 2] if far[k - 2] else excess[k - 1]
    return excess
