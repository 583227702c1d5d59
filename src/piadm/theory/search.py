"""The fewest rounds with which a sampler's law comes near enough to its target.

What the steps leave and what the iterations leave are looked at apart, on coarse grids, where a law takes milliseconds:

- the settled law is smooth in the step: three grids give its expansion, and with it the largest step that keeps the
  divergence within its share;
- what iteration ``k`` is off from the settled law hardly depends on the step: one coarse grid tells how many it takes.

The settings so found are then evaluated exactly, on their own grid, and the iterations are what that says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from piadm.theory.families import Family, Target
from piadm.theory.law import Law

#: The settled law is expanded from grids of these multiples of a finest step: so many times sqrt(allowed/d), which is
#: about the step that will be found, between so much of the smallest variance and this bound.
GRIDS, FINEST, FINEST_FROM, FINEST_TO = (8, 4, 2, 1), 12.0, 0.03, 0.01

#: Fewest steps per block of the coarse grids, where blocks are many: of those for the expansion and of the one for the
#: iterations.
IN_BLOCK, COUNTED_IN_BLOCK = 4, 25

#: Step of the grid that iterations are counted on.
COUNTED_ON = 0.01

#: Share of the divergence that steps and horizon may take; the rest is left to the iterations.
SHARE = 0.5

#: Part of that share that the horizon alone may take: with more of it, the steps would have to be far shorter.
HORIZON_SHARE = 0.5

#: The steps that are considered, 61 to a decade.
STEPS = torch.logspace(-7, -1, 367, dtype=torch.float64, device="cpu")

#: Iterations beyond those needed that must be within the divergence too: it may pass its target and come back.
BEYOND = 3

#: Relative change of the divergence in an iteration below which further ones leave it as it is: theirs fall faster.
STILL = 1e-4

#: Horizons beyond this one are not tried: e^-60 is nothing beside one.
LONGEST_HORIZON = 60.0

#: Times that a step is shortened by a tenth, should the exact law turn out not to keep to the share.
SHORTENED = 6

#: Least ratio of variances, where one drawn on from two grids would not be positive: there is no such law.
TINY = 1e-6


@dataclass(frozen=True)
class Found:
    """Settings and what they come to.

    Attributes:
        horizon: OU time ``T`` of the first state.
        count: number of blocks ``N``.
        step: longest step ``eps``.
        iterations: Picard iterations per block ``K``, or rounds of the one window.
        rounds: network calls in a row.
        crossing: rounds with a fraction of an iteration, at which the logarithm of the divergence, drawn as a line
            between the last two iterations, passes what is allowed: for fits, free of the jumps of whole numbers.
        kl: divergence from the target.
        exact: whether that was evaluated on the settings' own grid, not carried over from a coarser one.
    """

    horizon: float
    count: int
    step: float
    iterations: int
    rounds: int
    crossing: float
    kl: float
    exact: bool

    @property
    def settings(self) -> tuple[float, int, float]:
        """Horizon, number of blocks and step."""
        return self.horizon, self.count, self.step


@dataclass(frozen=True)
class Expansion:
    """A settled law as a polynomial of the step, ``sum_i coefficient_i eps^i``.

    Attributes:
        means: coefficients of the means, ``(4, m)``.
        variances: of the variances, ``(4, m)``.
    """

    means: Tensor
    variances: Tensor

    @classmethod
    def of(cls, family: Family, target: Target, horizon: float, count: int, allowed: float) -> Expansion:
        """Of a family at a horizon and number of blocks, near the step that goes with a divergence."""
        least = FINEST_FROM * float(target.law.variance.min())
        most = min(FINEST_TO, target.span(horizon) / (GRIDS[0] * IN_BLOCK * count))
        finest = min(most, max(least, FINEST * math.sqrt(allowed / target.modes.dimension)))
        finest = family.fitting(target, horizon, count, finest, GRIDS[0])
        grids, powers = torch.tensor(GRIDS, dtype=torch.float64, device="cpu"), torch.arange(len(GRIDS), device="cpu")
        laws = [family.settled(target, horizon, count, step) for step in (grids * finest).tolist()]
        # In units of the finest step, for a well-conditioned system.
        inverse = torch.linalg.inv(grids[:, None] ** powers) / finest ** powers[:, None]
        means, variances = ([getattr(law, name) for law in laws] for name in ("mean", "variance"))
        return cls(inverse @ torch.stack(means), inverse @ torch.stack(variances))

    def at(self, steps: Tensor | float) -> Law:
        """The law of a step, or of each of several ``(k,)``: ``(m,)`` or ``(k, m)``."""
        step = torch.as_tensor(steps, dtype=torch.float64, device="cpu")
        powers = step[..., None] ** torch.arange(len(GRIDS), device="cpu")
        return Law(powers @ self.means, powers @ self.variances)

    def mixed(self, other: Expansion, share: float) -> Expansion:
        """Between two of them, so far from this one to the other."""
        means = torch.lerp(self.means, other.means, share)
        return Expansion(means, torch.lerp(self.variances, other.variances, share))

    def longest_step(self, target: Target, allowed: float) -> float | None:
        """The longest step up to which the law is within a divergence; None: the horizon alone takes too much of it."""
        return self.longest_steps(target, [allowed])[0]

    def longest_steps(self, target: Target, allowed: Sequence[float]) -> list[float | None]:
        """The same for several divergences."""
        left, divergence = float(target.kl(self.at(0.0))), target.kl(self.at(STEPS))
        return [_last_within(divergence, one) if left <= HORIZON_SHARE * one else None for one in allowed]


@dataclass(frozen=True)
class Left:
    """What iterations leave of the settled law's deviations, ``(K, m)``, on a grid of some step.

    Attributes:
        mean: difference of the means.
        variance: ratio of the variances.
    """

    mean: Tensor
    variance: Tensor

    @classmethod
    def of(cls, iterates: Law, settled: Law) -> Left:
        """From the law after each number of iterations ``(K, m)`` and the settled law ``(m,)``."""
        return cls(iterates.mean - settled.mean, iterates.variance / settled.variance)

    def towards(self, other: Left, share: float | Tensor) -> Left:
        """On the line through this one and another, so far from this one to the other, for one share or several."""
        mean, variance = torch.lerp(self.mean, other.mean, share), torch.lerp(self.variance, other.variance, share)
        return Left(mean, variance.clamp(min=TINY))

    def on(self, settled: Law) -> Law:
        """The law after these iterations where the settled law is another, as with finer steps."""
        return Law(settled.mean + self.mean, settled.variance * self.variance)


def _last_within(divergence: Tensor, allowed: float) -> float:
    above = (divergence > allowed).nonzero()
    return float(STEPS[max(0, int(above[0, 0]) - 1) if len(above) else -1])


def candidates(
    family: Family,
    target: Target,
    allowed: float,
    horizons: Iterable[float],
    counts: Callable[[float], Iterable[int]],
    most: int,
) -> Iterator[Found]:
    """Settings that should do, judged on coarse grids.

    Args:
        family: the sampler.
        target: what to come near to.
        allowed: divergence.
        horizons: ``T`` to try.
        counts: numbers of blocks to try at a horizon.
        most: largest number of iterations to try.
    """
    for horizon in horizons:
        for count in counts(horizon):
            expansion = Expansion.of(family, target, horizon, count, allowed)
            step = expansion.longest_step(target, SHARE * allowed)
            if step is None:
                break
            grid = counted_on(target, horizon, count, step)
            iterates = family.iterates(target, horizon, count, grid, most)
            settled = family.settled(target, horizon, count, grid)
            divergence = target.kl(Left.of(iterates, settled).on(expansion.at(step)))
            needed = iterations_needed(divergence, allowed)
            if needed is not None:
                found = Found(horizon, count, step, needed, 0, 0.0, 0.0, exact=False)
                yield _with_iterations(found, family, divergence, needed, allowed)


def evaluated(family: Family, target: Target, found: Found, allowed: float) -> Found | None:
    """The same settings with the iterations that the exact law asks for; None: it is not within the divergence.

    Args:
        family: the sampler.
        target: what to come near to.
        found: settings, of which the step may be shortened.
        allowed: divergence.
    """
    for _ in range(SHORTENED):
        law = family.iterates(target, found.horizon, found.count, found.step, found.iterations + BEYOND)
        divergence = target.kl(law)
        needed = iterations_needed(divergence, allowed)
        if needed is not None and needed < len(divergence):
            return replace(_with_iterations(found, family, divergence, needed, allowed), exact=True)
        found = replace(found, step=0.9 * found.step)
    return None


def _with_iterations(found: Found, family: Family, divergence: Tensor, needed: int, allowed: float) -> Found:
    """The settings with a number of iterations, given the divergence after each, ``(K,)``."""
    last, fraction = float(divergence[needed - 1]), 0.0
    if needed > 1:
        fraction = math.log(allowed / last) / math.log(float(divergence[needed - 2]) / last)
    rounds = family.rounds(found.count, needed)
    per_iteration = rounds - family.rounds(found.count, needed - 1)
    return replace(found, iterations=needed, rounds=rounds, crossing=rounds - fraction * per_iteration, kl=last)


def best(found: Iterable[Found]) -> Found | None:
    """The one of fewest rounds, whole ones and then with their fraction of an iteration."""
    return min(found, key=lambda one: (one.rounds, one.crossing), default=None)


def iterations_needed(divergence: Tensor, allowed: float) -> int | None:
    """The least number of iterations from which on the divergence ``(K,)`` stays within what is allowed."""
    above = (~(divergence <= allowed)).nonzero()  # so that NaN counts as above
    first = int(above[-1, 0]) + 1 if len(above) else 0
    return first + 1 if first < len(divergence) else None


def stands_still(divergence: Tensor) -> bool:
    """Whether the divergences, ``(..., K)``, are what any more iterations would leave too."""
    return divergence.shape[-1] > 1 and bool((divergence.diff()[..., -1].abs() <= STILL * divergence[..., -1]).all())


def fewest_steps(
    family: Family, target: Target, allowed: float, horizons: Iterable[float], longest_block: float
) -> Found | None:
    """The settings of fewest steps for the sampler that takes them in turn; its rounds are its steps.

    Args:
        family: the sampler.
        target: what to come near to.
        allowed: divergence, all of which the steps and the horizon may take.
        horizons: ``T`` to try, ascending, until the steps become more again.
        longest_block: length of the blocks, at whose ends a corrector may run.
    """
    found: list[Found] = []
    for horizon in horizons:
        count = math.ceil(horizon / longest_block)
        expansion = Expansion.of(family, target, horizon, count, allowed)
        step = expansion.longest_step(target, allowed)
        if step is not None:
            steps = round(family.steps(target, horizon, count, step))
            divergence = float(target.kl(expansion.at(step)))
            found.append(Found(horizon, count, step, 1, steps, float(steps), divergence, exact=False))
        if past_the_best(found) or horizon > LONGEST_HORIZON:
            break
    return best(found)


def past_the_best(found: Sequence[Found]) -> bool:
    """Whether the last settings take a tenth more rounds than the best before them."""
    return len(found) > 1 and found[-1].rounds > 1.1 * min(one.rounds for one in found)


def shortest_horizon(family: Family, target: Target, allowed: float, spacing: float) -> float:
    """The first of the horizons ``2, 2 + spacing, ..`` with which the divergence can be reached.

    Raises:
        ValueError: if none up to 60 will do.
    """
    first = max(2.0, spacing * math.ceil(2 * target.early_stop / spacing))

    def reached(number: int) -> bool:
        expansion = Expansion.of(family, target, first + spacing * number, 1, allowed)
        return expansion.longest_step(target, SHARE * allowed) is not None

    low, high = -1, 4
    while not reached(high):
        low, high = high, 2 * high
        if first + spacing * high > LONGEST_HORIZON:
            raise ValueError(f"kl must be one that some horizon up to {LONGEST_HORIZON:g} can reach, got {allowed:g}")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return first + spacing * high


def counted_on(target: Target, horizon: float, count: int, step: float) -> float:
    """Step of the grid that iterations are counted on, where the sampler's own grid has another step."""
    return max(step, min(COUNTED_ON, target.span(horizon) / (COUNTED_IN_BLOCK * count)))
