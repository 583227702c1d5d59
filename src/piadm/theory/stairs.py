"""Proposals for a plan, what they cost, and which numbers of blocks are looked at for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from piadm.corrector import Corrector
from piadm.theory.families import PaperODE, PaperSDE

#: Numbers of blocks that are looked at for one that is sure: where these are not, it is for want of shorter steps.
UNSURE = 6

#: Numbers of rounds in a row that are found out of reach, after which only the fewest of all are still tried: what all
#: blocks take together is next to convex in their number.
MISSES = 2

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
        sure: whether it is sure that these are enough.
    """

    family: PaperSDE | PaperODE
    horizon: float
    count: int
    step: float
    corrector: Corrector | None
    sizes: tuple[int, ...]
    least: int
    most: int
    sure: bool

    def cost(self, iterations: int) -> Cost:
        """What it comes to with a number of iterations per block."""
        return cost(self.sizes, self.corrector, iterations)

    def within(self, bar: int) -> Proposal:
        """The same with no more iterations than make so many rounds."""
        return replace(self, most=min(self.most, bar // self.count - self.family.rounds(1, 0)))


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


def lowered(bar: int, found: Sequence[Proposal]) -> int:
    """Rounds with which one is sure to do: those of a proposal with an iteration more than it should take at most."""
    return min([bar, *(one.cost(one.most + (not one.sure))[0] for one in found)])


@dataclass(frozen=True)
class Look:
    """What a number of blocks has to offer.

    Attributes:
        fit: proposals.
        least: fewest rounds that a block may take in any of them.
        surely: fewest that it should take at most.
    """

    fit: list[Proposal]
    least: int
    surely: int


class Stairs:
    """The numbers of blocks that may be the best: the more blocks, the fewer rounds each of them takes.

    So for each number of rounds the most blocks that the bar allows tell whether it is within reach at all, and the
    fewest blocks that may reach it are found by halving; from there on until it is sure all are looked at.
    """

    def __init__(
        self, counts: Sequence[int], bar: int, judge: Callable[[int, int], Look], beyond: dict[int, int] | None = None
    ) -> None:
        """What is looked at.

        Args:
            counts: numbers of blocks, ascending.
            bar: most rounds in all.
            judge: what so many blocks offer within so many rounds each.
            beyond: by rounds, the most blocks that are known to take more of them; filled in.
        """
        self.counts, self.bar, self.judge = counts, bar, judge
        self.beyond: dict[int, int] = {} if beyond is None else beyond
        self.found: dict[int, Look] = {}

    def climb(self, fewest: int) -> None:
        """Look at all that may be the best, each block taking ``fewest`` rounds at least."""
        low, rounds, missed = 0, self._until_sure(0, self.bar // self.counts[0]), 0
        while rounds >= fewest:
            top = sum(count * rounds <= self.bar for count in self.counts) - 1
            if top <= low or not self._within(top, rounds):
                missed += top > low
                low, rounds = max(low, top), rounds - 1 if missed < MISSES else min(rounds - 1, fewest)
                continue
            missed = 0
            while top - low > 1:
                middle = (low + top) // 2
                low, top = (low, middle) if self._look(middle, rounds).least <= rounds else (middle, top)
            low, rounds = top, self._until_sure(top, rounds)

    def _within(self, at: int, rounds: int) -> bool:
        """Whether so many rounds may be within reach of a number of blocks."""
        count = self.counts[at]
        if self.beyond.get(rounds, 0) < count and self._look(at, rounds).least > rounds:
            self.beyond[rounds] = count
        return self.beyond.get(rounds, 0) < count

    def _until_sure(self, at: int, rounds: int) -> int:
        """Look on from there until blocks take no more than they may there for sure; one round less than that."""
        least = self._look(at, rounds).least
        for further in range(at, min(at + UNSURE, len(self.counts))):
            if self.counts[further] * least > self.bar or self._look(further, least).surely <= least:
                break
        return least - 1

    def _look(self, at: int, rounds: int) -> Look:
        if at not in self.found:
            count = self.counts[at]
            self.found[at] = self.judge(count, min(rounds, self.bar // count))
            self.bar = lowered(self.bar, self.found[at].fit)
        return self.found[at]
