"""Samplers as families of settings, for the search: horizon, blocks and step give laws, rounds and memory."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Protocol

from torch import Tensor

from piadm._checks import float_field
from piadm.corrector import Corrector
from piadm.grid import Blocks, covering
from piadm.theory.cuts import CutBlocks, cut
from piadm.theory.engine import gaussian_law, secant_law
from piadm.theory.law import Law, kl
from piadm.theory.laws import Predictor, sequential_law
from piadm.theory.spectrum import OU, Modes, Spectrum, noised

#: Predictors are kept on grids of so many steps at most, so many of them.
KEPT_STEPS, KEPT_GRIDS = 30_000, 32


@dataclass(frozen=True)
class Target:
    """What the law of the samples shall be near to: the data, noised up to the early-stopping time.

    Args:
        modes: the data.
        early_stop: OU time ``eta`` at which sampling ends, > 0.

    Attributes:
        known: predictors on some grids, for those who ask for the same steps in other blocks.

    Raises:
        TypeError, ValueError: for an ``early_stop`` that is not a positive number.
    """

    modes: Modes
    early_stop: float = 1e-2
    known: dict[tuple[float, float, int, float], Predictor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        float_field(self, "early_stop", low=0.0)

    @cached_property
    def law(self) -> Law:
        """Law of the noised data."""
        return noised(self.modes, OU, self.early_stop)

    def keep(self, key: tuple[float, float, int, float], predictor: Predictor) -> None:
        """Have a predictor at hand, in the place of the oldest where they are many."""
        if len(self.known) >= KEPT_GRIDS:
            self.known.pop(next(iter(self.known)))
        self.known[key] = predictor

    def kl(self, law: Law) -> Tensor:
        """Divergence from the target of all coordinates together, ``(...)`` for a law ``(..., m)``."""
        return self.modes.total(kl(law, self.law))

    def blocks(self, horizon: float, count: int, step: float) -> Blocks:
        """The paper's partition into ``count`` blocks."""
        return Blocks.paper(horizon, self.early_stop, (horizon - self.early_stop) / count, step)

    def fewest_blocks(self, horizon: float, longest: float) -> int:
        """How many blocks of some length at most it takes."""
        return covering((horizon - self.early_stop) / longest)

    def span(self, horizon: float) -> float:
        """Number of steps times their length ``eps``, for short ones."""
        return max(0.0, horizon - max(self.early_stop, 1.0)) + math.log(min(horizon, 1.0) / self.early_stop)

    def steps(self, start: float, step: float) -> float:
        """How many steps that partition has from a time on, before they are rounded up to whole ones."""
        uniform = max(0.0, start - max(self.early_stop, 1 + step)) / step
        return uniform + math.log(min(start, 1 + step) / self.early_stop) / math.log1p(step)


class Family(Protocol):
    """A sampler with its settings left open, for one kind of data."""

    def settled(self, target: Target, horizon: float, count: int, step: float) -> Law:
        """Law after so many iterations that nothing moves, ``(m,)``."""
        ...

    def iterates(self, target: Target, horizon: float, count: int, step: float, iterations: int) -> Law:
        """Law after each number of iterations, ``(iterations, m)``."""
        ...

    def rounds(self, count: int, iterations: int) -> int:
        """Network calls in a row."""
        ...

    def steps(self, target: Target, horizon: float, count: int, step: float) -> float:
        """Network calls of the sampler that takes every step in turn."""
        ...

    def states(self, target: Target, horizon: float, count: int, step: float) -> float:
        """States per sample that the parallel sampler holds at once."""
        ...

    def fitting(self, target: Target, horizon: float, count: int, step: float, coarsest: int) -> float:
        """A step, at most so long, of which it and multiples up to some are not rounded to fit: its law is smooth."""
        ...


class _InBlocks:
    """What the paper's algorithms share: their blocks."""

    longest_block: float | None
    eta: ClassVar[float]

    def predictor(self, target: Target, horizon: float, count: int, step: float) -> Predictor:
        """Of the exact law, over ``count`` blocks."""
        fewest = self._paper_blocks(target, horizon, count)
        key = self.eta, horizon, fewest, step
        if (whole := target.known.get(key)) is None:
            whole = Predictor.of(target.modes, target.blocks(horizon, fewest, step), self.eta)
            if fewest < count and len(whole.times) <= KEPT_STEPS:
                target.keep(key, whole)
        return whole.cut(tuple(cut(whole.sizes, count)))

    def fewest_blocks(self, target: Target, horizon: float) -> int:
        """The least number of blocks."""
        return 1 if self.longest_block is None else target.fewest_blocks(horizon, self.longest_block)

    def blocks(self, target: Target, horizon: float, count: int, step: float) -> CutBlocks:
        """The partition into ``count`` blocks."""
        paper = target.blocks(horizon, self._paper_blocks(target, horizon, count), step)
        return CutBlocks(paper, tuple(cut(paper.sizes, count)))

    def _paper_blocks(self, target: Target, horizon: float, count: int) -> int:
        """How many of the paper's blocks are cut into ``count``."""
        return count if self.longest_block is None else self.fewest_blocks(target, horizon)


@dataclass(frozen=True)
class PaperSDE(_InBlocks):
    """PIADM-SDE, Algorithm 1.

    Args:
        longest_block: longest of the paper's blocks, which are cut into ``count``; None: the paper's are as many.
    """

    longest_block: float | None = None
    eta: ClassVar[float] = 1.0

    def corrector(self, target: Target, horizon: float, count: int, step: float) -> Corrector | None:
        """None: it has no corrector."""
        return None

    def settled(self, target: Target, horizon: float, count: int, step: float) -> Law:
        """Law of the sequential sampler."""
        return self.predictor(target, horizon, count, step).settled(None)

    def iterates(self, target: Target, horizon: float, count: int, step: float, iterations: int) -> Law:
        """Law after each number of iterations per block."""
        predictor = self.predictor(target, horizon, count, step)
        return predictor.followed(predictor.picard(iterations), None)

    def rounds(self, count: int, iterations: int) -> int:
        """``K N``."""
        return iterations * count

    def steps(self, target: Target, horizon: float, count: int, step: float) -> float:
        """The grid's."""
        return target.steps(horizon, step)

    def states(self, target: Target, horizon: float, count: int, step: float) -> float:
        """The last block has the most steps."""
        return _largest_block(target, horizon, count, step)

    def fitting(self, target: Target, horizon: float, count: int, step: float, coarsest: int) -> float:
        """Any: blocks have so many steps that one more or less is nothing."""
        return step


@dataclass(frozen=True)
class PaperODE(_InBlocks):
    """PIADM-ODE, Algorithm 2, with the corrector's time and friction in the natural units of the sharpest mode.

    With ``L`` the Lipschitz constant of the score where sampling ends: ``T_dagger = h_dagger = 1/sqrt(L)``,
    friction ``sqrt(L)``, and as many steps as a predictor block of unit length, ``eps_dagger = eps/sqrt(L)``.  Where
    predictor blocks have fewer steps than that, a run has no more than these: there are more runs, and as much Langevin
    time in all.

    Args:
        inner: Picard iterations ``K_dagger`` of the corrector.
        time: longest ``T_dagger``, in units of ``1/sqrt(L)``.
        longest_block: as of ``PaperSDE``.
    """

    inner: int
    time: float = 1.0
    longest_block: float | None = None
    eta: ClassVar[float] = 0.0

    def corrector(self, target: Target, horizon: float, count: int, step: float) -> Corrector:
        """The corrector that goes with a partition."""
        root = 1 / math.sqrt(float(target.law.variance.min()))
        time = self._time(target, horizon, count)
        return Corrector(time / root, time / root, step / root, self.inner, root)

    def settled(self, target: Target, horizon: float, count: int, step: float) -> Law:
        """Law of the sequential sampler, the corrector's steps taken in turn too."""
        settings = (target, horizon, count, step)
        return self.predictor(*settings).settled(self.corrector(*settings))

    def iterates(self, target: Target, horizon: float, count: int, step: float, iterations: int) -> Law:
        """Law after each number of the predictor's iterations per block."""
        settings = (target, horizon, count, step)
        predictor = self.predictor(*settings)
        return predictor.followed(predictor.picard(iterations), self.corrector(*settings))

    def rounds(self, count: int, iterations: int) -> int:
        """``(K + K_dagger N_dagger) N`` with ``N_dagger = 1``."""
        return (iterations + self.inner) * count

    def steps(self, target: Target, horizon: float, count: int, step: float) -> float:
        """The grid's, and a corrector's ``1/eps`` for each block."""
        return target.steps(horizon, step) + count / step

    def states(self, target: Target, horizon: float, count: int, step: float) -> float:
        """The last predictor block has the most steps, unless blocks are so short that the corrector has."""
        return max(_largest_block(target, horizon, count, step), 1 / step)

    def fitting(self, target: Target, horizon: float, count: int, step: float, coarsest: int) -> float:
        """One of which the corrector takes a whole number, of its multiples too; it has few steps where blocks do."""
        time = self._time(target, horizon, count)
        return time / (coarsest * covering(time / (coarsest * step)))

    def _time(self, target: Target, horizon: float, count: int) -> float:
        return min(self.time, target.span(horizon) / count)


@dataclass(frozen=True)
class FastEngine:
    """The fast engine with every step a node: one window, started from the reference model's path.

    It is told one variance for all modes, and a mean of zero.

    Args:
        method: "sde" or "ode".
        linearization: "gaussian" or "secant".
        variance: what it is told; None: the average, as a measurement would give.
    """

    method: str
    linearization: str
    variance: float | None = None

    def settled(self, target: Target, horizon: float, count: int, step: float) -> Law:
        """Law of the sequential sampler."""
        return sequential_law(target.modes, self.method, target.blocks(horizon, count, step).grid(OU))

    def iterates(self, target: Target, horizon: float, count: int, step: float, iterations: int) -> Law:
        """Law after each number of rounds."""
        law = {"gaussian": gaussian_law, "secant": secant_law}[self.linearization]
        assert isinstance(target.modes, Spectrum)
        grid = target.blocks(horizon, count, step).grid(OU)
        told = target.modes.average if self.variance is None else self.variance
        return law(target.modes, self.method, grid, iterations, variance=told)

    def rounds(self, count: int, iterations: int) -> int:
        """One round per iteration."""
        return iterations

    def steps(self, target: Target, horizon: float, count: int, step: float) -> float:
        """The grid's."""
        return target.steps(horizon, step)

    def states(self, target: Target, horizon: float, count: int, step: float) -> float:
        """All of the grid's: there is one window."""
        return target.steps(horizon, step)

    def fitting(self, target: Target, horizon: float, count: int, step: float, coarsest: int) -> float:
        """Any: it takes the grid's."""
        return step


def _largest_block(target: Target, horizon: float, count: int, step: float) -> float:
    """Steps of the last block, or of one of the others where these are more."""
    length = (horizon - target.early_stop) / count
    return max(target.steps(target.early_stop + length, step), length / step if count > 1 else 0.0)
