"""Active rows: which (node, sample) rows the network evaluates in a round."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from piadm.numerics import Flags, Table


class ActiveRows(Protocol):
    """Chooses the rows of a round by the surprise that evaluating them is expected to bring."""

    def choose(self, expected: Table, rounds: int) -> Flags:
        """Rows to evaluate.

        Args:
            rounds: number of rounds that the path has had.
            expected: RMS surprise that an evaluation of each row would bring (``Outlook``), times the ``growth`` of
                its sample (``StoppingRule``), ``(n, B)`` float64; inf: never evaluated.

        Returns:
            ``(n, B)`` bool.
        """
        ...

    def took(self, rows: int, seconds: float) -> None:
        """Record how long a round of so many rows took, in seconds."""
        ...


@dataclass(frozen=True)
class AllRows:
    """Every row, every round: the paper's rule on its blocks."""

    def choose(self, expected: Table, rounds: int) -> Flags:
        """True everywhere."""
        return np.ones_like(expected, dtype=np.bool_)

    def took(self, rows: int, seconds: float) -> None:
        """Does nothing: the rows do not depend on time."""


#: Default window relative to the nodes, unless every step is a node.  States further ahead are still far from their
#: final values.  Without them the SDE takes fewer rounds and a tenth fewer evaluations; so does the ODE in its first
#: rounds, and a fifth fewer evaluations if it starts from a draft.  Without a draft its later rounds are better wide:
#: with half of the nodes mixtures took half a round more.
NARROW, WIDE, ROUGH = 1 / 2, 3 / 4, 3 / 5

#: Rounds, counted in windows of ``NARROW`` times the nodes, after which rows settle at half the threshold, then a
#: quarter and so on, and the number of these halvings.  A sample that takes so long may be close to a border between
#: two outcomes, where small errors grow.
PATIENCE, HALVINGS = 12, 6


@dataclass(frozen=True)
class SlidingWindow:
    """Rows whose evaluation matters: of every sample the first ``size``.

    A row whose state has hardly moved since its last evaluation would bring nothing new: it has settled, until rows
    before it move it again.  A window as wide as the path leaves out settled rows only; a much narrower one saves
    evaluations and costs rounds.  Every sample has its own window, so that an easy one never waits for a hard one.

    Attributes:
        size: rows per sample and round.
        threshold: a row has settled when its expected surprise is no more than this, ``(n, B)`` float64.
        patience: rounds after which the threshold is halved repeatedly, as far as there is room in the window.

    Reference: Shih et al. 2023 (arXiv 2305.16317), section 3.2, for the window.
    """

    size: int
    threshold: Table
    patience: float = PATIENCE

    def choose(self, expected: Table, rounds: int) -> Flags:
        """The first ``size`` rows that have not settled."""
        passed = int(rounds * min(1.0, self.size / (NARROW * len(expected))))
        late = min(max(0, passed - int(self.patience)), HALVINGS)
        matter = expected > self.threshold
        chosen = _first(matter, self.size)
        if late:
            # Only as many as the others leave room for: there may be many of them, near the noise end.
            finer = (expected > self.threshold * 2.0**-late) & ~matter
            chosen |= _first(finer, self.size - chosen.sum(0))
        return chosen

    def took(self, rows: int, seconds: float) -> None:
        """Does nothing: the rows do not depend on time."""


def _first(rows: Flags, size: int | NDArray[np.int64]) -> Flags:
    """The first ``size`` of the rows that are true, of every sample: ``(n, B)`` bool."""
    chosen: Flags = rows & (rows.cumsum(0) <= size)
    return chosen


class Outlook:
    """The surprise to be expected if a row is evaluated now.

    The surprise is the RMS difference between an evaluated residual and the one that the local model predicted.  It
    grows with the drift, the RMS distance of the state from where the row was last evaluated:

        expected^2 = (rate * drift)^2 + doubt^2,
        rate = surprise / drift at the row's last evaluation, or the assumed rate if larger

    The lower bound on the rate is there because networks are not linear: a small surprise says little of the next.  A
    row that takes the innovation of its neighbours (``Sharing``) drifts from there on, and keeps what that may have
    missed as its doubt.

    Args:
        rate: what is assumed at least, shape ``(n,)`` float64.
        batch: number of samples ``B``.

    Attributes:
        expected: shape ``(n, B)`` float64 on the CPU; inf for rows that were never evaluated.
        rate: shape ``(n, B)`` likewise.
        drifted: ``rate * drift``, likewise.
        doubt: what shared innovations may have missed since the row was last evaluated, or what rounding left of a
            large one, likewise.
        known: which rows have been evaluated, shape ``(n, B)`` bool.
        taught: which rows' last innovations have taught their local models, likewise.
    """

    def __init__(self, rate: Table, batch: int) -> None:
        self.assumed = rate[:, None]
        self.rate = self.assumed.repeat(batch, 1)
        self.known, self.taught = np.zeros((2, *self.rate.shape), dtype=np.bool_)
        self.expected = self.drifted = np.full_like(self.rate, np.inf)
        self.doubt = np.zeros_like(self.rate)

    def teaches(self, shared: Flags) -> Flags:
        """Of which rows an innovation would be due to their drift from a known state, ``(n, B)``.

        That of a row in doubt is what was missed before, unless it is ``shared`` once more.
        """
        found: Flags = self.known & (shared | (self.doubt == 0))
        return found

    @np.errstate(all="ignore")  # the stopping rule reports a network that fails
    def learn(self, active: Flags, shared: Flags, surprise: Table, stride: Table, missed: Table) -> None:
        """Take in a round.

        Args:
            active: which rows were evaluated, shape ``(n, B)``.
            shared: which took the innovation of their neighbours, likewise.
            surprise: RMS of their innovations, likewise; a row where it is not finite counts as never evaluated.
            stride: how far they had drifted, likewise.
            missed: what sharing or rounding may have missed, RMS, 0 in other rows, likewise.
        """
        finite = np.isfinite(surprise)
        again = (active | shared) & self.teaches(shared) & finite & (stride > 0)
        rate = np.maximum(surprise / np.where(again, stride, 1.0), self.assumed)
        self.rate = np.where(again, rate, self.rate)
        self.taught = np.where(active | shared, again, self.taught)
        self.known = np.where(active, finite, self.known)
        self.doubt = np.hypot(np.where(active, 0.0, self.doubt), missed)

    @np.errstate(all="ignore")
    def look(self, drift: Table) -> None:
        """Expect what the distances ``(n, B)`` from the last evaluations say."""
        self._expect(self.rate * drift)

    def distrust(self, samples: Flags) -> None:
        """Forget the rates of some samples ``(B,)``, which rounding brought about."""
        rate = np.where(samples, self.assumed, self.rate)
        drifted, self.rate = self.drifted * (rate / self.rate), rate
        self._expect(drifted)

    def _expect(self, drifted: Table) -> None:
        """Expect what the drifts, each times its rate, and the doubts say."""
        self.drifted = drifted
        self.expected = np.where(self.known, np.hypot(drifted, self.doubt), np.inf)

    def inherit(self, old: Flags, coarse: Outlook, keep: Flags | slice) -> None:
        """Take over what is known of the rows of a coarser node set: ``old`` of the nodes, ``keep`` of its samples."""
        for table in ("rate", "known", "taught", "doubt"):
            getattr(self, table)[old] = getattr(coarse, table)[:, keep]
