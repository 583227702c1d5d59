"""The exact laws of the samplers' results for Gaussian data, from the coefficients that the samplers run on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor

from piadm._checks import positive_int
from piadm.corrector import Corrector
from piadm.grid import TimeGrid
from piadm.integrators import Integrator, ScoreExponential, integrator, variance_preserving
from piadm.linearization import ScoreFrozen
from piadm.schedule import NoiseSchedule
from piadm.theory.chain import Chain, ScoreError, chain, constant_start_maps, sequential_maps
from piadm.theory.langevin import corrector_map, sequential_corrector_map
from piadm.theory.law import AffineMap, Law
from piadm.theory.spectrum import OU, Modes, noised


class Partition(Protocol):
    """Blocks of an OU horizon: ``piadm.Blocks``, or a way to cut some."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of steps of each block."""
        ...

    def grid(self, schedule: NoiseSchedule) -> TimeGrid:
        """All times, on the schedule's own clock."""
        ...


def initial_law(modes: Modes, schedule: NoiseSchedule, time: float) -> Law:
    """The samplers' first state, ``N(0, alpha^2 + sigma^2)``, at the first time."""
    scale = variance_preserving(schedule, torch.tensor(time, dtype=torch.float64))[2]
    return Law(torch.zeros_like(modes.variances), torch.ones_like(modes.variances) * scale.square())


def sequential_law(
    modes: Modes,
    method: str | Integrator,
    grid: TimeGrid,
    *,
    schedule: NoiseSchedule = OU,
    error: ScoreError | None = None,
) -> Law:
    """Law of ``sample_sequential``'s result: ``m' = f m + b g``, ``v' = f^2 v + c^2`` with ``f = a + b J``.

    Args:
        modes: the data, a ``Spectrum`` or ``VarianceBounds``.
        method: as for ``sample_sequential``.
        grid: its times.
        schedule: its schedule.
        error: what is wrong with the score; None: nothing.

    Returns:
        Mean and variance per mode, ``(m,)``.

    Raises:
        TypeError, ValueError: for an unknown method.
    """
    steps = integrator(method).steps(schedule, grid)
    start = initial_law(modes, schedule, float(grid.times[0]))
    return sequential_maps(chain(modes, schedule, steps, error))[0](start)


def piadm_sde_law(
    modes: Modes,
    blocks: Partition,
    iterations: int,
    *,
    schedule: NoiseSchedule = OU,
    error: ScoreError | None = None,
) -> Law:
    """Law of ``piadm_sde``'s result (Algorithm 1) after each number of iterations up to ``iterations``.

    Args:
        modes: the data, a ``Spectrum`` or ``VarianceBounds``.
        blocks: partition of the OU horizon.
        iterations: largest number ``K`` of Picard iterations per block.
        schedule: noise schedule.
        error: what is wrong with the score; None: nothing.

    Returns:
        Mean and variance per mode, ``(K, m)``; row ``k - 1`` is that of ``piadm_sde(..., iterations=k)``.

    Raises:
        TypeError, ValueError: for bad arguments, or a step too long for the score-frozen iteration.
    """
    return _block_by_block(modes, blocks, iterations, schedule, error, 1.0, None)


def piadm_ode_law(
    modes: Modes,
    blocks: Partition,
    iterations: int,
    corrector: Corrector | None,
    *,
    schedule: NoiseSchedule = OU,
    error: ScoreError | None = None,
) -> Law:
    """Law of ``piadm_ode``'s result (Algorithm 2) after each number of predictor iterations up to ``iterations``.

    Args:
        modes: the data, a ``Spectrum`` or ``VarianceBounds``.
        blocks: partition of the OU horizon.
        iterations: largest number ``K`` of Picard iterations per predictor block.
        corrector: settings of the corrector, with its own number of iterations; None: none.
        schedule: noise schedule.
        error: what is wrong with the score (for the corrector: the bias alone); None: nothing.

    Returns:
        Mean and variance per mode, ``(K, m)``; row ``k - 1`` is that of ``piadm_ode(..., iterations=k)``.

    Raises:
        TypeError, ValueError: for bad arguments, or a step too long for the score-frozen iteration.
    """
    return _block_by_block(modes, blocks, iterations, schedule, error, 0.0, corrector)


def sequential_ode_law(
    modes: Modes, blocks: Partition, corrector: Corrector | None, *, schedule: NoiseSchedule = OU
) -> Law:
    """Law of Algorithm 2 with all its steps, the corrector's too, taken one after the other.

    Args:
        modes: the data, a ``Spectrum`` or ``VarianceBounds``.
        blocks: partition of the OU horizon.
        corrector: settings of the corrector; None: none.
        schedule: noise schedule.

    Returns:
        Mean and variance per mode, ``(m,)``.
    """
    whole, ends, law = _predictor(modes, blocks, schedule, None, 0.0)
    maps = [sequential_maps(whole.part(*steps), count) for steps, count in _alike(blocks)]
    if corrector is None:
        return _through(law, maps, None)
    corrections = _corrections(modes, schedule, ends, lambda at, _: sequential_corrector_map(at, corrector))
    return _through(law, maps, corrections)


def _predictor(
    modes: Modes, blocks: Partition, schedule: NoiseSchedule, error: ScoreError | None, eta: float
) -> tuple[Chain, Tensor, Law]:
    """The predictor's steps over all blocks, the schedule times at which blocks end, and the first state."""
    grid = blocks.grid(schedule)
    whole = chain(modes, schedule, ScoreExponential(eta).steps(schedule, grid), error)
    last = torch.tensor(blocks.sizes).cumsum(0)
    return whole, grid.times[last], initial_law(modes, schedule, float(grid.times[0]))


def _block_by_block(
    modes: Modes,
    blocks: Partition,
    iterations: int,
    schedule: NoiseSchedule,
    error: ScoreError | None,
    eta: float,
    corrector: Corrector | None,
) -> Law:
    """Picard iterations, then the corrector's, block after block."""
    positive_int("iterations", iterations)
    whole, ends, law = _predictor(modes, blocks, schedule, error, eta)
    slopes = ScoreFrozen().slopes(schedule, whole.steps)
    scales = variance_preserving(schedule, whole.steps.times)[2]
    maps = [
        constant_start_maps(whole.part(*at), slopes[slice(*at)], scales[slice(*at)], iterations, count)
        for at, count in _alike(blocks)
    ]
    if corrector is None:
        return _through(law, maps, None)
    bias = 0.0 if error is None else error.bias
    corrections = _corrections(modes, schedule, ends, lambda at, scale: corrector_map(at, corrector, bias * scale))
    return _through(law, maps, corrections[:, None])


def _alike(blocks: Partition) -> Iterator[tuple[tuple[int, int], int]]:
    """Runs of blocks of as many steps each: their steps ``first .. last - 1`` and their number."""
    first = 0
    for size, run in groupby(blocks.sizes):
        count = len(list(run))
        yield (first, first + size * count), count
        first += size * count


def _corrections(
    modes: Modes, schedule: NoiseSchedule, ends: Tensor, run: Callable[[Law, Tensor], AffineMap]
) -> AffineMap:
    """What a corrector does at each of some times, ``(N, m)``, from what it does on the variance-preserving scale."""
    law, scale = noised(modes, schedule, ends), variance_preserving(schedule, ends)[2][:, None]
    scale = scale.expand_as(law.mean)
    found = run(Law((law.mean / scale).flatten(), (law.variance / scale.square()).flatten()), scale.flatten())
    gain, shift, variance = (array.view_as(scale) for array in (found.gain, found.shift, found.variance))
    return AffineMap(gain, scale * shift, scale.square() * variance)


def _through(law: Law, maps: Sequence[AffineMap], corrections: AffineMap | None) -> Law:
    """The law after all blocks, given as runs ``(N', ..., m)`` of them, each followed by its correction."""
    blocks = AffineMap.joined(maps)
    return (blocks if corrections is None else corrections.after(blocks)).chained()(law)
