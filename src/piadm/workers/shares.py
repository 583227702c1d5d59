"""How rows are split: evenly among workers of about equal speed, else in proportion to measured speeds."""

from __future__ import annotations

from collections.abc import Sequence

#: Workers whose speeds are within this factor count as equal: timing scatters, and the same cut gives the same bits.
EVEN = 1.25

#: Weight of the newest timing in the moving average; the first call of a network is slow, and is soon forgotten.
NEWEST = 0.5


class Shares:
    """Contiguous shares of the rows of a call, in proportion to the speeds measured in earlier calls.

    Args:
        count: number of workers ``W``.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._cost: list[float | None] = [None] * count

    def cut(self, rows: int) -> list[slice]:
        """The share of every worker, ``W`` slices that tile ``0 .. rows``; some may be empty.

        Of at least ``W`` rows every worker has one, so that its speed stays known.
        """
        weights = self._speeds()
        spare, each = (rows - self.count, 1) if rows >= self.count else (rows, 0)
        total, passed, ends = sum(weights), 0.0, []
        for number, weight in enumerate(weights, start=1):
            passed += weight
            ends.append(each * number + round(spare * min(1.0, passed / total)))
        ends[-1] = rows
        return [slice(first, last) for first, last in zip([0, *ends[:-1]], ends, strict=True)]

    def learn(self, shares: Sequence[slice], seconds: Sequence[float]) -> None:
        """Take in how long every worker took for its share."""
        for worker, (share, took) in enumerate(zip(shares, seconds, strict=True)):
            if share.stop > share.start and took > 0:
                cost, before = took / (share.stop - share.start), self._cost[worker]
                self._cost[worker] = cost if before is None else NEWEST * cost + (1 - NEWEST) * before

    def _speeds(self) -> list[float]:
        """Rows per second of every worker; ones where they are unknown or near enough."""
        known = [cost for cost in self._cost if cost is not None]
        if len(known) < self.count or max(known) <= EVEN * min(known):
            return [1.0] * self.count
        return [1 / cost for cost in known]
