"""The divergence of whole paths, the quantity that the paper's proof for the SDE bounds.

The sampler's states at all times of the grid and those of the exact reverse process are two Gaussian Markov chains.
Their divergence adds up step by step, is at least that of the results alone (data processing), and tends to Girsanov's
integral as the steps shrink.
"""

from __future__ import annotations

import torch
from torch import Tensor

from piadm.grid import TimeGrid
from piadm.integrators import Integrator, integrator
from piadm.schedule import NoiseSchedule
from piadm.theory.chain import ScoreError, chain
from piadm.theory.law import kl
from piadm.theory.laws import initial_law
from piadm.theory.spectrum import OU, Modes, noised


def path_kl(
    modes: Modes,
    method: str | Integrator,
    grid: TimeGrid,
    *,
    schedule: NoiseSchedule = OU,
    error: ScoreError | None = None,
) -> tuple[Tensor, Tensor]:
    """``KL(exact reverse chain || sequential sampler)`` of all states together, at the start and on the way.

    A step of the exact chain is ``N(alpha' m + A (x - alpha m), C^2)``, one of the sampler ``N(f x + b g, c^2)``:

        1/2 sum_j [ C^2/c^2 - 1 - ln(C^2/c^2) + E (difference of the two means)^2/c^2 ]

    With ``s^2 = alpha^2 lam + sigma^2``, ``rho = alpha/alpha'`` and ``q = sigma^2 - rho^2 sigma'^2``, ``'`` being the
    later state: ``A = rho s'^2/s^2`` and ``C^2 = q s'^2/s^2``.

    Args:
        modes: the data.
        method: an SDE method of ``sample_sequential``.
        grid: its times.
        schedule: its schedule.
        error: what is wrong with the score; None: nothing.

    Returns:
        Both parts per mode, each ``(m,)``.

    Raises:
        ValueError: if a step takes no noise, or a path ends in clean data.

    Reference: Chen et al. 2024 (arXiv 2405.15986), proof of theorem 3.3 (Girsanov's theorem).
    """
    steps = integrator(method).steps(schedule, grid)
    sampler = chain(modes, schedule, steps, error)
    if sampler.variance is None or not bool((sampler.variance > 0).all()):
        raise ValueError("method must be one whose every step takes noise, such as 'paper-sde', got one that does not")
    (alpha, noise), factor = schedule.levels(grid.times), sampler.factor
    spread = alpha.square() * modes.variances[:, None] + noise.square()
    ratio, narrowed = alpha[:-1] / alpha[1:], spread[:, 1:] / spread[:, :-1]
    added = noise[:-1].square() - ratio.square() * noise[1:].square()
    off = (alpha[1:] - factor * alpha[:-1]) * modes.means[:, None]
    if sampler.shift is not None:
        off = off - sampler.shift
    distance = (off.square() + (ratio * narrowed - factor).square() * spread[:, :-1]) / sampler.variance
    excess = added * narrowed / sampler.variance - 1
    first = float(grid.times[0])
    start = kl(noised(modes, schedule, first), initial_law(modes, schedule, first))
    return start, 0.5 * (excess - torch.log1p(excess) + distance).sum(-1)
