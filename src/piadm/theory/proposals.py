"""Settings that may make the best plan, judged on coarse grids: where they are cut, their step and corrector.

The steps proposed for a number of blocks do not depend on a limit of memory, which only strikes out some: with more
memory the best of those left is no worse, as long as the same numbers of blocks are looked at, as they mostly are.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from piadm.corrector import Corrector
from piadm.grid import Blocks
from piadm.theory.cuts import cut
from piadm.theory.families import PaperODE, PaperSDE, Target
from piadm.theory.law import AffineMap, Law
from piadm.theory.laws import Predictor
from piadm.theory.search import BEYOND, Expansion, Left, counted_on, iterations_needed, stands_still
from piadm.theory.stairs import Look, Proposal, Stairs, cost, lowered

#: Most blocks: with more, parallel sampling is none.
MOST_BLOCKS = 500

#: Numbers of blocks tried: all of the small ones, then each 3 % more than the one before.
COUNTS = tuple(dict.fromkeys([*range(1, 34), *(round(33 * 1.03**i) for i in range(92)), MOST_BLOCKS]))

#: Numbers of blocks at which the law that the ODE settles to is expanded in the step; between them it is interpolated.
KNOTS = tuple(dict.fromkeys([*range(1, 5), *(round(4 * 1.3**i) for i in range(19)), MOST_BLOCKS]))

#: Shares of the divergence that the steps and the horizon may take: with fewer steps blocks are fewer or smaller, and
#: may need an iteration more.
SHARES = (0.4, 0.5, 0.6, 0.75, 0.9, 0.97)

#: What a divergence on coarse grids may differ by from the exact one, as a factor.
DOUBT = 1.1

#: How much coarser a grid must be than the step for it to be worth while, and iterations that are tried first.
NEARLY, FEW = 2.5, 16

#: Most Picard iterations per block; those of the corrector, and more where these are too few; how long it runs, in
#: units of ``1/sqrt(L)``: with 1, it takes an iteration more.
MOST, INNER, MORE, CORRECTED = 60, (1, 2, 3), (4, 5, 7, 10), 0.7


@dataclass(frozen=True)
class Search:
    """What is searched for, and where.

    Attributes:
        method: "sde" or "ode".
        target: what to come near to.
        allowed: divergence.
        longest_block: of the paper's blocks.
        horizons: OU times ``T``.
        known: what has been found at each of these, filled in as it is asked for.
    """

    method: str
    target: Target
    allowed: float
    longest_block: float
    horizons: Sequence[float]
    known: dict[float, Settings] = field(default_factory=dict)

    def proposals(self, limit: float = math.inf) -> list[Proposal]:
        """Those that may be the best with so many states per sample at once, the most promising ones first."""
        found: list[Proposal] = []
        bar = MOST_BLOCKS * (MOST + MORE[-1])
        within = ((settings, settings.counts(limit)) for settings in self._settings())
        last, beyond = math.inf, dict[int, int]()
        # The fewer blocks will do, the sooner a bar is low that saves looks at others.
        for settings, counts in sorted((one for one in within if one[1]), key=lambda one: one[1][0]):
            # Blocks of a longer horizon are longer and take no fewer rounds; but its steps may fit a limit sooner.
            last, beyond = settings.horizon, beyond if limit == math.inf and settings.horizon > last else {}
            some = settings.proposals(self._families(INNER), counts, limit, bar, beyond)
            for family in self._families(MORE):
                some = some or settings.proposals([family], counts, limit, bar)
            found, bar = found + some, lowered(bar, some)
        fit = (one.within(bar) for one in found if one.cost(one.least)[0] <= bar)
        return sorted(fit, key=lambda one: one.cost(one.least))

    def least_states(self) -> int | None:
        """The fewest states with which there is a proposal at all, one of as many blocks as may be."""
        found = (some.least_states(self._families(INNER + MORE)) for some in self._settings())
        return min((states for states in found if states is not None), default=None)

    def _families(self, inner: Sequence[int]) -> list[PaperSDE | PaperODE]:
        if self.method == "ode":
            return [PaperODE(iterations, CORRECTED, self.longest_block) for iterations in inner]
        return [] if inner == MORE else [PaperSDE(self.longest_block)]

    def _settings(self) -> Iterator[Settings]:
        family = self._families(INNER)[0]
        for horizon in self.horizons:
            if horizon not in self.known:
                self.known[horizon] = Settings(self.target, self.allowed, family, horizon)
            yield self.known[horizon]


@dataclass(frozen=True)
class Settings:
    """Proposals that differ in their blocks, steps and the corrector's iterations.

    Attributes:
        target: what to come near to.
        allowed: divergence.
        family: one of the samplers, which have the same settled law.
        horizon: OU time ``T``.
        expansions: of the settled law, by the number of blocks, filled in as they are asked for.
        steps: the longest for each share of the divergence, by the number of blocks, likewise.
        coarse: coarse grids, by the number of blocks and the step, likewise.
    """

    target: Target
    allowed: float
    family: PaperSDE | PaperODE
    horizon: float
    expansions: dict[int, Expansion] = field(default_factory=dict)
    steps: dict[int, list[float | None]] = field(default_factory=dict)
    coarse: dict[tuple[int, float], Coarse] = field(default_factory=dict)

    def proposals(
        self,
        families: Sequence[PaperSDE | PaperODE],
        counts: Sequence[int],
        limit: float,
        bar: int,
        beyond: dict[int, int] | None = None,
    ) -> list[Proposal]:
        """Those of some samplers and numbers of blocks that may take ``bar`` rounds or fewer (``Stairs``)."""
        stairs = Stairs(counts, bar, lambda count, most: self.look(families, count, most, limit), beyond)
        stairs.climb(min(family.rounds(1, 1) for family in families))
        return [one for look in stairs.found.values() for one in look.fit]

    def least_states(self, families: Sequence[PaperSDE | PaperODE]) -> int | None:
        """Fewest states of a proposal, one of as many blocks as may be; None: there is none."""
        counts = self.counts(math.inf)
        fit = self.look(families, counts[-1], MOST + MORE[-1], math.inf).fit if counts else []
        return min((one.cost(1)[2] for one in fit), default=None)

    def counts(self, limit: float) -> list[int]:
        """Numbers of blocks from the first that have no more states than may be; blocks have two steps or more."""
        all_steps = sum(sum(sizes) for _, _, sizes in self._sizes(self._fewest, self.family, math.inf)[:1])
        counts = [count for count in COUNTS if self._fewest <= count <= max(self._fewest, all_steps // 2)]
        first = min(bisect_left(counts, all_steps / limit), len(counts) - 1)  # the more blocks, the smaller they are
        while first > 0 and self._sizes(counts[first - 1], self.family, limit):
            first -= 1
        while first < len(counts) and not self._sizes(counts[first], self.family, limit):
            first += 1
        return counts[first:] if all_steps else []

    def look(self, families: Sequence[PaperSDE | PaperODE], count: int, most: int, limit: float) -> Look:
        """What so many blocks have to offer within a number of rounds each, and of states."""
        found, least = list[Proposal](), most + 1
        for family in families:
            own = family.rounds(1, 0)
            some, iterations = self.judged(family, count, min(MOST, most - own), limit)
            found, least = found + some, min(least, iterations + own)
            most = lowered(most * count, some) // count
        surely = min((one.cost(one.most)[0] // count for one in found), default=most + 1)
        return Look(found, least, surely)

    def judged(self, family: PaperSDE | PaperODE, count: int, most: int, limit: float) -> tuple[list[Proposal], int]:
        """One proposal for each share that has no more states than may be, and the fewest iterations, or ``most + 1``.

        Where the coarse grid would be hardly coarser than the step, the step's own takes its place, and there is no
        doubt; but for the shortest of the steps only if that one's law, carried over, does not speak against it.
        """
        settings = self._sizes(count, family, limit) if most >= 1 else []
        if not settings:
            return [], most + 1
        found, steps = list[Proposal](), [step for step, _, _ in settings]
        grid = counted_on(self.target, self.horizon, count, steps[0])
        if own := grid <= NEARLY * steps[0]:
            grid = steps[0]
        carried = self._carried(family, count, grid, steps, most + BEYOND)
        for (step, corrector, sizes), divergence in zip(settings, carried, strict=True):
            doubt = DOUBT
            if own and (step == grid or _needed(divergence, DOUBT * self.allowed, most)):
                divergence, doubt = self._exact(family, count, step, most + BEYOND), 1.0
            if least := _needed(divergence, doubt * self.allowed, most):
                surely = iterations_needed(divergence, self.allowed / doubt) or most + BEYOND
                found.append(Proposal(family, self.horizon, count, step, corrector, sizes, least, surely, doubt == 1))
        return found, min((one.least for one in found), default=most + 1)

    def _sizes(
        self, count: int, family: PaperSDE | PaperODE, limit: float
    ) -> list[tuple[float, Corrector | None, tuple[int, ...]]]:
        """Steps, ascending, with corrector and steps of each block, that have no more states than may be."""
        found = []
        for step in sorted({step for step in self._steps(count) if step is not None}):
            paper = Blocks.paper_sizes(self.horizon, self.target.early_stop, self._fewest, step)
            if count <= sum(paper):
                corrector, sizes = family.corrector(self.target, self.horizon, count, step), tuple(cut(paper, count))
                if cost(sizes, corrector, 1)[2] <= limit:
                    found.append((step, corrector, sizes))
        return found

    def _carried(
        self, family: PaperSDE | PaperODE, count: int, grid: float, steps: Sequence[float], iterations: int
    ) -> Tensor:
        """Divergence after each number of iterations for some steps, ``(s, K)``, as counted on a grid.

        What the iterations leave on that grid, and on one of twice its step, is drawn as a line to each step.
        """
        tried_steps = torch.tensor(steps, dtype=torch.float64, device="cpu")
        settled, shares = self._expansion(count).at(tried_steps), tried_steps / grid - 1

        def divergence(tried: int) -> Tensor:
            left = self._coarse(count, grid).left(family, tried)
            if grid > NEARLY * steps[0]:
                left = left.towards(self._coarse(count, 2 * grid).left(family, tried), shares[:, None, None])
            return self.target.kl(left.on(settled[:, None]))

        return self._enough(divergence, iterations)

    def _exact(self, family: PaperSDE | PaperODE, count: int, step: float, iterations: int) -> Tensor:
        """Divergence after each number of iterations, ``(K,)``, on the step's own grid."""
        return self._enough(lambda tried: self.target.kl(self._coarse(count, step).iterates(family, tried)), iterations)

    def _enough(self, divergence: Callable[[int], Tensor], iterations: int) -> Tensor:
        """After each of a few iterations, or after each of all where a few are not enough and more would be."""
        few = divergence(min(FEW, iterations))
        return few if bool((few[..., -1] <= self.allowed).all()) or stands_still(few) else divergence(iterations)

    @property
    def _fewest(self) -> int:
        return self.family.fewest_blocks(self.target, self.horizon)

    def _expansion(self, count: int) -> Expansion:
        """The settled law; that of the SDE, which has nothing between its blocks, is the same with all of them."""
        if not isinstance(self.family, PaperODE):
            return self._knot(self._fewest)
        after = next(i for i, knot in enumerate(KNOTS) if knot >= count)
        if KNOTS[after] == count or KNOTS[after - 1] < self._fewest:
            return self._knot(count)
        low, high = KNOTS[after - 1 : after + 1]
        return self._knot(low).mixed(self._knot(high), math.log(count / low) / math.log(high / low))

    def _knot(self, count: int) -> Expansion:
        if count not in self.expansions:
            self.expansions[count] = Expansion.of(self.family, self.target, self.horizon, count, self.allowed)
        return self.expansions[count]

    def _steps(self, count: int) -> list[float | None]:
        """The longest step for each share; None: the horizon alone takes too much of it."""
        if count not in self.steps:
            shares = [share * self.allowed for share in SHARES]
            self.steps[count] = self._expansion(count).longest_steps(self.target, shares)
        return self.steps[count]

    def _coarse(self, count: int, grid: float) -> Coarse:
        if (count, grid) not in self.coarse:
            settings = (self.target, self.horizon, count, grid)
            self.coarse[count, grid] = Coarse(settings, self.family.predictor(*settings))
        return self.coarse[count, grid]


@dataclass(frozen=True)
class Coarse:
    """A predictor on one grid, and what it came to for those who have asked.

    Attributes:
        settings: target, horizon, number of blocks and step.
        predictor: over all blocks.
        laws: after each number of iterations, by the sampler; of None with all steps in turn.
        maps: its blocks after each number of iterations, as many as were asked for.
    """

    settings: tuple[Target, float, int, float]
    predictor: Predictor
    laws: dict[PaperSDE | PaperODE | None, Law] = field(default_factory=dict)
    maps: list[AffineMap] = field(default_factory=list)

    def settled(self, family: PaperSDE | PaperODE) -> Law:
        """With all steps in turn, the corrector's too: the same for all samplers."""
        if None not in self.laws:
            self.laws[None] = self.predictor.settled(family.corrector(*self.settings))
        return self.laws[None]

    def left(self, family: PaperSDE | PaperODE, iterations: int) -> Left:
        """What each number of iterations leaves."""
        return Left.of(self.iterates(family, iterations), self.settled(family))

    def iterates(self, family: PaperSDE | PaperODE, iterations: int) -> Law:
        """After each number of iterations, ``(K, m)``."""
        if family not in self.laws or len(self.laws[family].mean) < iterations:
            if not self.maps or self.maps[0].gain.shape[1] < iterations:
                self.maps[:] = [self.predictor.picard(iterations)]
            maps = self.maps[0][:, :iterations]
            self.laws[family] = self.predictor.followed(maps, family.corrector(*self.settings))
        return self.laws[family][:iterations]


def _needed(divergence: Tensor, allowed: float, most: int) -> int:
    """The iterations needed, if they are no more than may be; 0: they are."""
    needed = iterations_needed(divergence, allowed)
    return needed if needed is not None and needed <= most else 0
