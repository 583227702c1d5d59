"""The exact laws of the samplers' results for Gaussian data, from the coefficients that the samplers run on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
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
    scale = variance_preserving(schedule, torch.tensor(time, dtype=torch.float64, device="cpu"))[2]
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
    predictor = Predictor.of(modes, blocks, 1.0, schedule, error)
    return predictor.followed(predictor.picard(iterations), None)


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
    predictor = Predictor.of(modes, blocks, 0.0, schedule, error)
    return predictor.followed(predictor.picard(iterations), corrector)


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
    return Predictor.of(modes, blocks, 0.0, schedule).settled(corrector)


@dataclass(frozen=True)
class Predictor:
    """The predictor of Algorithm 1 or 2 on Gaussian modes, block after block; a corrector may run after each.

    Attributes:
        modes: the data.
        schedule: noise schedule.
        sizes: steps of each of the ``N`` blocks.
        times: schedule times of all steps, and the last one, ``(J + 1,)``.
        chain: the steps of all blocks.
        start: law of the first state.
        bias: of the score, which the corrector has too.
    """

    modes: Modes
    schedule: NoiseSchedule
    sizes: tuple[int, ...]
    times: Tensor
    chain: Chain
    start: Law
    bias: float

    @classmethod
    def of(
        cls, modes: Modes, blocks: Partition, eta: float, schedule: NoiseSchedule = OU, error: ScoreError | None = None
    ) -> Predictor:
        """That of Algorithm 1 (``eta`` 1) or 2 (``eta`` 0)."""
        grid = blocks.grid(schedule)
        whole = chain(modes, schedule, ScoreExponential(eta).steps(schedule, grid), error)
        start, bias = initial_law(modes, schedule, float(grid.times[0])), 0.0 if error is None else error.bias
        return cls(modes, schedule, blocks.sizes, grid.times, whole, start, bias)

    def cut(self, sizes: tuple[int, ...]) -> Predictor:
        """The same steps in other blocks, of so many steps each."""
        return replace(self, sizes=sizes)

    def settled(self, corrector: Corrector | None) -> Law:
        """Law with all steps, the corrector's too, taken one after the other, ``(m,)``."""
        blocks = AffineMap.joined(
            [sequential_maps(self.chain.part(*steps), count) for steps, count in _alike(self.sizes)]
        )
        if corrector is None:
            return blocks.chained()(self.start)
        corrections = self._corrections(lambda at, _: sequential_corrector_map(at, corrector))
        return corrections.after(blocks).chained()(self.start)

    def picard(self, iterations: int) -> AffineMap:
        """What 1 .. K Picard iterations make of each block, ``(N, K, m)``."""
        positive_int("iterations", iterations)
        slopes = ScoreFrozen().slopes(self.schedule, self.chain.steps)
        scales = variance_preserving(self.schedule, self.chain.steps.times)[2]
        return AffineMap.joined([
            constant_start_maps(self.chain.part(*at), slopes[slice(*at)], scales[slice(*at)], iterations, count)
            for at, count in _alike(self.sizes)
        ])  # fmt: skip

    def followed(self, blocks: AffineMap, corrector: Corrector | None) -> Law:
        """Law after blocks of so many iterations ``(N, K, m)``, each followed by the corrector's own, ``(K, m)``."""
        if corrector is None:
            return blocks.chained()(self.start)
        corrections = self._corrections(lambda at, scale: corrector_map(at, corrector, self.bias * scale))
        return corrections[:, None].after(blocks).chained()(self.start)

    @cached_property
    def _at_ends(self) -> tuple[Law, Tensor]:
        """Law of the noised data where blocks end, on the variance-preserving scale, and that scale: ``(N, m)``."""
        ends = self.times[torch.tensor(self.sizes, device="cpu").cumsum(0)]
        law = noised(self.modes, self.schedule, ends)
        scale = variance_preserving(self.schedule, ends)[2][:, None].expand_as(law.mean)
        return Law(law.mean / scale, law.variance / scale.square()), scale

    def _corrections(self, run: Callable[[Law, Tensor], AffineMap]) -> AffineMap:
        """What a corrector does after each block, ``(N, m)``, from what it does on the variance-preserving scale."""
        law, scale = self._at_ends
        found = run(Law(law.mean.flatten(), law.variance.flatten()), scale.flatten())
        gain, shift, variance = (array.view_as(scale) for array in (found.gain, found.shift, found.variance))
        return AffineMap(gain, scale * shift, scale.square() * variance)


def _alike(sizes: Sequence[int]) -> Iterator[tuple[tuple[int, int], int]]:
    """Runs of blocks of as many steps each: their steps ``first .. last - 1`` and their number."""
    first = 0
    for size, run in groupby(sizes):
        count = len(list(run))
        yield (first, first + size * count), count
        first += size * count
