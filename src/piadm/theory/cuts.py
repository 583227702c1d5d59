"""The paper's blocks cut into more, each with as few steps as can be."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from piadm.grid import Blocks, TimeGrid
from piadm.schedule import NoiseSchedule
from piadm.theory.spectrum import OU


@dataclass(frozen=True)
class CutBlocks:
    """Blocks cut into more.

    Attributes:
        paper: the blocks.
        sizes: steps of each of the more.
    """

    paper: Blocks
    sizes: tuple[int, ...]

    def grid(self, schedule: NoiseSchedule) -> TimeGrid:
        """All times, on the schedule's own clock."""
        return self.paper.grid(schedule)

    def blocks(self) -> Blocks:
        """For the samplers."""
        times = self.paper.grid(OU).times
        borders = itertools.accumulate(self.sizes, initial=0)
        return Blocks([times[first : last + 1] for first, last in itertools.pairwise(borders)])


def cut(sizes: Sequence[int], count: int) -> list[int]:
    """Steps of ``count`` blocks, each at most as long as one of those given and with as few steps as can be.

    The last of the paper's blocks has several times the steps of one of the others: it is cut first, and all of them
    anew once its parts have fewer.

    Args:
        sizes: steps of each of the paper's blocks; all but the last have as many.
        count: number of blocks, between theirs and that of all steps.
    """
    before, last = list(sizes[:-1]), sizes[-1]
    parts = _evenly(last, count - len(before)) if count - len(before) <= last else []
    if parts and (not before or parts[0] >= before[0]):
        return before + parts
    return _evenly(sum(sizes), count)


def _evenly(steps: int, count: int) -> list[int]:
    """So many steps in blocks that differ by one at most, the larger ones first."""
    fewest, more = divmod(steps, count)
    return [fewest + 1] * more + [fewest] * (count - more)
