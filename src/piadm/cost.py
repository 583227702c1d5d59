"""The cost model: the window of least expected time, from the times of a few rounds.

A narrow window takes fewer evaluations, a wide one fewer rounds.  Which is faster depends on the time of a network
call of many rows relative to one of a few, and so on the network and the device.
"""

from __future__ import annotations

import math
from weakref import WeakKeyDictionary

import torch

from piadm.activity import PATIENCE, SlidingWindow
from piadm.numerics import Flags, Table

#: Rows of the rounds that are timed, which are the first ones of a network's first run.  One row comes twice, since a
#: network's first call may be slow.
TIMED = (1, 1, 4, 16, 64)

#: Expected times within this factor of the least count as equal: of such windows the widest is taken, which takes the
#: fewest rounds.
INDIFFERENT = 1.25

#: Rounds of a path of ``n`` nodes with a window of ``w`` rows, ``ROUNDS + ROUNDS_PER_WINDOW n/w``: about right for 33
#: (ODE) and 142 (SDE) nodes and windows of 4 rows to all, on a trained network and on a mixture.
ROUNDS, ROUNDS_PER_WINDOW = 10.0, 1.6


class Latency:
    """Seconds that a round of a network takes, by its number of rows.

    Attributes:
        seconds: the fastest round seen of each number of rows.
        timed: rounds that have been timed.
    """

    def __init__(self) -> None:
        self.seconds: dict[int, float] = {}
        self.timed = 0

    def add(self, rows: int, seconds: float) -> None:
        """Take in one round."""
        self.seconds[rows] = min(seconds, self.seconds.get(rows, math.inf))
        self.timed += 1

    def of(self, rows: float) -> float:
        """Expected seconds of a round: linear between the rounds seen, in proportion to the rows beyond the largest."""
        known = sorted(self.seconds.items())
        if rows >= known[-1][0]:
            return known[-1][1] * rows / known[-1][0]
        above = next(i for i, (size, _) in enumerate(known) if rows <= size)
        if above == 0:
            return known[0][1]
        (low, fast), (high, slow) = known[above - 1], known[above]
        return fast + (slow - fast) * (rows - low) / (high - low)

    def width(self) -> int:
        """Rows that a device has room for: the fewest whose time per row is (nearly) the least that was seen."""
        per_row = {rows: taken / rows for rows, taken in self.seconds.items()}
        return min(rows for rows, taken in per_row.items() if taken <= INDIFFERENT * min(per_row.values()))

    def best_window(self, nodes: int, batch: int, max_rows: int | None) -> int:
        """Window of (nearly) the least expected time: a power of two, or all of the nodes.

        Args:
            nodes: rows per sample.
            batch: number of samples.
            max_rows: most rows of a round; None: any number.
        """
        sizes = [1 << k for k in range(1, nodes.bit_length()) if 1 << k < nodes] + [nodes]
        allowed = [size for size in sizes if max_rows is None or size * batch <= max_rows] or sizes[:1]
        times = {size: (ROUNDS + ROUNDS_PER_WINDOW * nodes / size) * self.of(size * batch) for size in allowed}
        return max(size for size in allowed if times[size] <= INDIFFERENT * min(times.values()))


#: Latencies by network, and for each by device and shape of a sample.
_SEEN: WeakKeyDictionary[object, dict[object, Latency]] = WeakKeyDictionary()


def latency(network: object, device: torch.device, shape: tuple[int, ...]) -> Latency:
    """What is known of a network on a device; of networks that cannot be remembered, nothing."""
    try:
        return _SEEN.setdefault(network, {}).setdefault((str(device), shape), Latency())
    except TypeError:
        return Latency()


class TimedWindow:
    """``SlidingWindow`` of the size that the cost model chooses.

    While the network's latency is not known the window grows from round to round, and every one is timed; these
    rounds count and do their part of the work like any other.

    Args:
        threshold: as in ``SlidingWindow``.
        known: what is known of the network; added to.
        max_rows: most rows of a round; None: any number.
        patience: as in ``SlidingWindow``.

    Attributes:
        size: the window's size once it is chosen.
    """

    def __init__(self, threshold: Table, known: Latency, max_rows: int | None, patience: float = PATIENCE) -> None:
        self.threshold, self.known, self.max_rows, self.patience = threshold, known, max_rows, patience
        self.size: int | None = None

    def choose(self, expected: Table, rounds: int) -> Flags:
        """The window's rows."""
        (nodes, batch), timed = expected.shape, self.known.timed  # once: another thread may be timing this network
        if self.size is None and timed >= len(TIMED):
            self.size = self.known.best_window(nodes, batch, self.max_rows)
        size = max(1, TIMED[timed] // batch) if self.size is None else self.size
        return SlidingWindow(min(size, nodes), self.threshold, self.patience).choose(expected, rounds)

    def took(self, rows: int, seconds: float) -> None:
        """Time a round, until enough are known."""
        if self.size is None:
            self.known.add(rows, seconds)
