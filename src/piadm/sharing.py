"""Shared innovations: rows that matter but are not evaluated take the innovation of their neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from piadm.activity import Outlook
from piadm.numerics import Flags, Table, beside

#: What interpolation between the neighbours misses of an innovation, as a share of it: a U-Net showed 0.05 to 0.25 with
#: every second row (SDE; up to 0.4 for the ODE), mixtures 0.1 to 0.3.
MISSED = 0.25

#: A row is left to its neighbours if what they miss is at most this many times the surprise that its next evaluation is
#: expected to bring anyway; that takes the moves of the path for coherent, and so is more than comes.  With 1 mixtures
#: took up to 3 % more evaluations in the mean, with 4 as many as with 2.
COMING = 2.0

#: What a row's shared innovations have missed so far may be this many times its neighbours' expected surprise: beyond
#: it evaluating the neighbours again is of less use than evaluating the row.
OUTSTANDING = 0.5

#: In the first round from a draft, whose path is far from the network's, one in so many rows is evaluated.
FIRST = 4


@dataclass(frozen=True)
class Sharing:
    """Chooses which rows of a round take their innovation from their neighbours.

    The innovation of a row, by which its evaluation differs from what its local model predicts, resembles its
    neighbours': all have moved alike.  So every second row may do without an evaluation and take an interpolated
    innovation.  What that may miss (``Between``) stays in the row as a doubt (``Outlook``), until it is evaluated.

    Sharing pays where the row has to be evaluated again in any case, because those before it still change: a row is
    shared as long as what is missed is small beside the surprise that the moves to come will bring.  It takes local
    models that are alike, too: a row whose last innovation taught it nothing, since it was new or in doubt, is not
    shared beside rows that have learnt.  Its neighbours may be right about what they answer, and it be far off: without
    this, and without the second part of what ``Between`` says is missed, 40 of 256 samples of a mixture three times as
    wide as told were outside a tolerance of 3e-3, by up to 42 times, and with it none.

    Attributes:
        response: ``|P|`` below the diagonal, from node residuals to nodes, shape ``(n, n)`` float64.
        drafted: whether the path starts from a draft.
    """

    response: Table
    drafted: bool

    def choose(self, chosen: Flags, outlook: Outlook, rounds: int) -> Flags:
        """Which of the ``chosen`` rows are not evaluated, ``(n, B)`` bool: all of them lie between two that are.

        Args:
            chosen: rows that matter in this round, ``(n, B)``.
            outlook: what is expected of them.
            rounds: number of rounds that the path has had.
        """
        index = np.arange(len(chosen))[:, None]
        shared: Flags = np.zeros_like(chosen)
        if rounds > 0:
            shared = self._redundant(chosen, outlook) & outlook.known & (index % 2 == 1)
        elif self.drafted:
            shared = ~outlook.known & (index % FIRST != 0)
        shared = shared & chosen
        before, after = neighbours(chosen & ~shared)
        left_out = np.zeros((len(chosen) + 1, chosen.shape[1]), np.int64)
        left_out[:-1] = (~chosen).cumsum(0)
        inside = (before >= 0) & (after < len(chosen))
        column = np.arange(chosen.shape[1])
        whole = left_out[before, column] == left_out[after, column]
        found: Flags = shared & inside & whole
        return found

    @np.errstate(all="ignore")  # the stopping rule reports a network that fails
    def _redundant(self, chosen: Flags, outlook: Outlook) -> Flags:
        """Rows of which the next evaluation would bring more than sharing misses now."""
        moving = np.where(chosen & outlook.known, outlook.expected, 0.0)
        to_come = outlook.rate * (self.response @ moving)
        missed = np.hypot(outlook.doubt, MISSED * outlook.drifted)
        least = np.minimum(*beside(outlook.drifted))
        alike = outlook.taught | ~np.logical_or(*beside(outlook.taught))
        found: Flags = alike & (missed <= COMING * to_come) & (outlook.doubt <= OUTSTANDING * least)
        return found


@dataclass(frozen=True)
class Between:
    """Where shared rows lie between evaluated ones, whose innovations are ``s`` before and ``s'`` after them.

    A shared row takes ``w s' + (1 - w) s``.  If innovations are a random walk from node to node, that misses ``sqrt(w
    (1 - w)) RMS(s' - s)``, and less if they are smooth.  If another surprise ``e`` was expected of the row than of its
    neighbours, their local models differ, and so may the innovations:

        missed^2 = w (1 - w) RMS(s' - s)^2 + (e - w e' - (1 - w) e_before)^2

    Attributes:
        node: nodes of the shared rows, shape ``(r,)``.
        sample: their samples, likewise.
        before: the nearest evaluated node before each of them, likewise.
        after: that after it, likewise.
        weight: ``w``, how far the row is on the way between them, likewise.
    """

    node: NDArray[np.int64]
    sample: NDArray[np.int64]
    before: NDArray[np.int64]
    after: NDArray[np.int64]
    weight: Table

    @staticmethod
    def of(shared: Flags, evaluated: Flags) -> Between:
        """Of the rows that are true in a table ``(n, B)``, in its order."""
        none = np.zeros(0, np.int64)
        if not shared.any():
            return Between(none, none, none, none, np.zeros(0))
        node, sample = shared.nonzero()
        before, after = (table[shared] for table in neighbours(evaluated))
        return Between(node, sample, before, after, (node - before) / (after - before))

    @np.errstate(invalid="ignore")
    def missed(self, apart: Table, expected: Table) -> Table:
        """The equation above, shape ``(r,)``; inf where ``apart`` is not finite, and tells nothing.

        Args:
            apart: ``RMS(s' - s)``, shape ``(r,)``.
            expected: ``e`` of all rows, shape ``(n, B)``; where it is not finite, that part is left out.
        """
        own, before, after = (expected[node, self.sample] for node in (self.node, self.before, self.after))
        beyond = own - before - self.weight * (after - before)
        walk = np.sqrt(self.weight * (1 - self.weight)) * np.where(np.isfinite(apart), apart, np.inf)
        found: Table = np.hypot(walk, np.where(np.isfinite(beyond), beyond, 0.0))
        return found


def neighbours(evaluated: Flags) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For every row the nearest that are evaluated, before it (else -1) and after it (else ``n``), each ``(n, B)``."""
    index, count = np.arange(len(evaluated))[:, None], len(evaluated)
    before = np.maximum.accumulate(np.where(evaluated, index, -1), axis=0)
    after = np.minimum.accumulate(np.where(evaluated, index, count)[::-1], axis=0)[::-1]
    return before, after
