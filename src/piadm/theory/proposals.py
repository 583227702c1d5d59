"""Settings that may make the best plan, judged on coarse grids: where they are cut, their step and corrector.

Which settings are proposed does not depend on a limit of memory, which only strikes out some of them: with more memory
the best of those left cannot be worse.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from piadm.corrector import Corrector
from piadm.grid import Blocks
from piadm.theory.families import PaperODE, PaperSDE, Target, cut
from piadm.theory.law import Law
from piadm.theory.search import BEYOND, Expansion, carried, counted_on, iterations_needed

#: Most blocks: with more, parallel sampling is none.
MOST_BLOCKS = 500

#: Numbers of blocks tried: all of the small ones, then each 3 % more than the one before.
COUNTS = tuple(dict.fromkeys([*range(1, 34), *(round(33 * 1.03**i) for i in range(92)), MOST_BLOCKS]))

#: Shares of the divergence that the steps and the horizon may take: with fewer steps blocks are fewer or smaller, and
#: may need an iteration more.
SHARES = (0.4, 0.6, 0.9)

#: What a divergence on coarse grids may differ by from the exact one, as a factor.
DOUBT = 1.15

#: How much longer the steps between correctors may be than those of the predictor alone.
STRETCH = 1.5

#: Most Picard iterations per block; those of the corrector, and more where these are too few; how long it runs, in
#: units of ``1/sqrt(L)``: with 1, it takes an iteration more.
MOST, INNER, MORE, CORRECTED = 60, (3, 2, 1), (4, 5, 7, 10), 0.7

#: What is to be least: rounds, then evaluations, then states.
Cost = tuple[int, int, int]


@dataclass(frozen=True)
class Proposal:
    """Settings, and between which numbers of iterations per block lies the one that they need.

    Attributes:
        family: the sampler, with its corrector's iterations and duration.
        horizon: OU time ``T`` of the first state.
        count: number of blocks ``N``.
        step: longest step ``eps``.
        corrector: of the ODE.
        sizes: steps of each block, ``N`` of them.
        least: fewest iterations ``K``.
        most: most iterations.
    """

    family: PaperSDE | PaperODE
    horizon: float
    count: int
    step: float
    corrector: Corrector | None
    sizes: tuple[int, ...]
    least: int
    most: int

    def cost(self, iterations: int) -> Cost:
        """What it comes to with a number of iterations per block."""
        return cost(self.sizes, self.corrector, iterations)


def cost(sizes: Sequence[int], corrector: Corrector | None, iterations: int) -> Cost:
    """Rounds, evaluations per sample and states at once of Algorithm 1 or 2.

    Args:
        sizes: steps of each block.
        corrector: of the ODE; None: there is none.
        iterations: ``K``, per block.
    """
    runs, steps = (corrector.blocks * corrector.iterations, corrector.block_steps) if corrector else (0, 0)
    count = len(sizes)
    return count * (iterations + runs), sum(sizes) * iterations + count * runs * steps, max(*sizes, steps)


@dataclass(frozen=True)
class Search:
    """What is searched for, and where.

    Attributes:
        method: "sde" or "ode".
        target: what to come near to.
        allowed: divergence.
        longest_block: of the paper's blocks.
        horizons: OU times ``T``.
    """

    method: str
    target: Target
    allowed: float
    longest_block: float
    horizons: Sequence[float]

    def proposals(self, limit: float = math.inf) -> list[Proposal]:
        """Those that may be the best with so many states per sample at once, the most promising ones first."""
        found: list[Proposal] = []
        bar = MOST_BLOCKS * (MOST + MORE[-1])
        for settings in self._settings():
            before = len(found)
            for number, family in enumerate(self._families(INNER)):
                some = settings.proposals(family, limit, bar)
                found, bar = found + some, lowered(bar, some)
                if number and not some:
                    break  # still fewer of the corrector's iterations will not do either
            for family in self._families(MORE):
                if len(found) == before:
                    found += settings.proposals(family, limit, bar)
                    bar = lowered(bar, found)
        return sorted((one for one in found if one.cost(one.least)[0] <= bar), key=lambda one: one.cost(one.least))

    def least_states(self) -> int | None:
        """The fewest states with which there is a proposal at all, one of as many blocks as may be."""
        families = list(self._families(INNER + MORE))
        found = (some.judged(family, MOST_BLOCKS, MOST)[0] for some in self._settings() for family in families)
        return min((one.cost(1)[2] for some in found for one in some), default=None)

    def _families(self, inner: Sequence[int]) -> Iterator[PaperSDE | PaperODE]:
        if self.method == "ode":
            yield from (PaperODE(iterations, CORRECTED, self.longest_block) for iterations in inner)
        elif inner != MORE:
            yield PaperSDE(self.longest_block)

    def _settings(self) -> Iterator[Settings]:
        family = next(self._families(INNER))
        return (Settings(self.target, self.allowed, family, horizon) for horizon in self.horizons)


def lowered(bar: int, found: Sequence[Proposal]) -> int:
    """Rounds with which one is sure to do: those of a proposal with an iteration more than it should take at most."""
    return min([bar, *(one.cost(one.most + 1)[0] for one in found)])


@dataclass(frozen=True)
class Settings:
    """Proposals that differ in their blocks, steps and the corrector's iterations.

    Attributes:
        target: what to come near to.
        allowed: divergence.
        family: one of the samplers, which have the same settled law.
        horizon: OU time ``T``.
        expansions: of the settled law, by the number of blocks, filled in as they are asked for.
        settled: settled laws on coarse grids, by the number of blocks and the step, likewise.
    """

    target: Target
    allowed: float
    family: PaperSDE | PaperODE
    horizon: float
    expansions: dict[int, Expansion] = field(default_factory=dict)
    settled: dict[tuple[int, float], Law] = field(default_factory=dict)

    def proposals(self, family: PaperSDE | PaperODE, limit: float, bar: int) -> list[Proposal]:
        """Those of a sampler that may take ``bar`` rounds or fewer.

        The more blocks, the fewer iterations they take.  So there is nothing between two numbers of blocks with the
        same iterations, nor where the fewest blocks and the fewest iterations together take too many rounds.
        """
        found: dict[int, tuple[list[Proposal], int, bool]] = {}

        def look(count: int) -> None:
            nonlocal bar
            some, iterations = self.judged(family, count, min(MOST, bar // count - family.rounds(1, 0)))
            fit = [one for one in some if one.cost(one.most)[2] <= limit]
            found[count] = fit, iterations, bool(some) and not fit
            bar = lowered(bar, fit)

        step = self._expansion(self._fewest).longest_step(self.target, SHARES[-1] * self.allowed)
        if step is None:
            return []
        first = max(self._fewest, math.ceil(self.target.steps(self.horizon, STRETCH * step) / limit))
        if family.rounds(first, 1) > bar or first > MOST_BLOCKS:
            return []
        counts = [count for count in COUNTS if count >= first]
        look(counts[0])
        intervals = [(0, sum(family.rounds(count, 1) <= bar for count in counts) - 1)]
        while intervals:
            low, high = intervals.pop()
            if high <= low or family.rounds(counts[low + 1], 1) > bar:
                continue
            if counts[high] not in found:
                look(counts[high])
            (fit, most, _), (_, least, too_large) = found[counts[low]], found[counts[high]]
            settled = too_large or most == least and any(one.most == most for one in fit)
            if high - low > 1 and not settled and family.rounds(counts[low + 1], least) <= bar:
                middle = (low + high) // 2
                look(counts[middle])
                intervals += [(middle, high), (low, middle)]
        return [one for fit, *_ in found.values() for one in fit]

    def judged(self, family: PaperSDE | PaperODE, count: int, most: int) -> tuple[list[Proposal], int]:
        """One proposal for each share, and the fewest iterations that any of them may take, or ``most + 1``."""
        if most < 1:
            return [], most + 1
        expansion = self._expansion(count)
        lengths = {expansion.longest_step(self.target, share * self.allowed) for share in SHARES}
        found, fewest, iterates = [], most + 1, {}
        for step in sorted(step for step in lengths if step is not None):
            paper = paper_sizes(self.horizon, self.target.early_stop, self._fewest, step)
            if count > sum(paper):
                continue
            grid = counted_on(self.target, self.horizon, count, step)
            if grid not in iterates:
                iterates[grid] = family.iterates(self.target, self.horizon, count, grid, most + BEYOND)
            divergence = self.target.kl(carried(iterates[grid], self._settled(count, grid), expansion.at(step)))
            least = iterations_needed(divergence, DOUBT * self.allowed)
            if least is None or least > most:
                continue
            surely = iterations_needed(divergence, self.allowed / DOUBT) or most + BEYOND
            fewest = min(fewest, least)
            corrector = family.corrector(self.target, self.horizon, count, step)
            sizes = tuple(cut(paper, count))
            found.append(Proposal(family, self.horizon, count, step, corrector, sizes, least, surely))
        return found, fewest if iterates else 1

    @property
    def _fewest(self) -> int:
        return self.family.fewest_blocks(self.target, self.horizon)

    def _expansion(self, count: int) -> Expansion:
        """The settled law; that of the SDE, which has nothing between its blocks, is the same with all of them."""
        key = count if isinstance(self.family, PaperODE) else self._fewest
        if key not in self.expansions:
            self.expansions[key] = Expansion.of(self.family, self.target, self.horizon, key, self.allowed)
        return self.expansions[key]

    def _settled(self, count: int, grid: float) -> Law:
        if (count, grid) not in self.settled:
            self.settled[count, grid] = self.family.settled(self.target, self.horizon, count, grid)
        return self.settled[count, grid]


@lru_cache(maxsize=256)
def paper_sizes(horizon: float, early_stop: float, count: int, step: float) -> tuple[int, ...]:
    """Steps of each of the paper's blocks; many proposals have the same."""
    return Blocks.paper(horizon, early_stop, (horizon - early_stop) / count, step).sizes
