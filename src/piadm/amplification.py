"""How much more an error grows on its way to the end than the linear model says, from the slopes of the network."""

from __future__ import annotations

import numpy as np

from piadm.numerics import Flags, Table

#: Factors below this are taken for one.  A mixture's SDE shows 1.1 in the median and 3.2 in one of ten samples, a
#: U-Net's 1.2.  Of 1536 samples of the mixture 9 ended on the wrong side of a border without any amplification, by 55
#: to 78 times the tolerance, and none with this; of 16 of the U-Net 3 were outside, by up to 3.7 times, and one with
#: this, by 1.75.  With 1.5 that one was within, too, but another mixture took half as many evaluations again.
LEAST_AMPLIFICATION = 3.0

#: Largest factor.  With 10, one of 768 such samples was still on the wrong side; with 100 as many were right.
MOST_AMPLIFICATION = 30.0


class Amplification:
    """Factor by which an error that enters at a node grows on its way to the end, beyond its influence there.

    With ``lambda = ln(alpha/sigma)`` and ``J`` the slope of the denoised estimate in the direction of an error, the
    error of ``x/alpha`` obeys

        d ln|error| / d lambda = p (alpha J - 1),    p = 1 for the ODE, 2 for the SDE

    The influence of nodes on the end (``Builder._influence``) takes ``alpha J`` for at most 1.  Near a border between
    two outcomes it is several times that, and errors grow exponentially until one of the outcomes is chosen.  ``J`` is
    measured along the moves of the iteration, which are errors themselves and turn into the direction that grows:

        f_i = max_{k >= i} exp(sum_{i <= j < k} p (alpha_j J_j - 1) (lambda_{j+1} - lambda_j))

    The maximum, since what follows after the choice does not undo it.  Where no slope was measured, ``alpha J = 1``.

    Args:
        alpha: at the nodes, shape ``(n,)`` float64.
        clock: ``p lambda`` at the nodes, shape ``(n,)`` float64; gaps that are infinite are left out.
        slopes: the linearization's ``G``, shape ``(n,)`` float64.
        batch: number of samples ``B``.

    Attributes:
        factor: shape ``(n, B)`` float64: 1, or from ``LEAST_AMPLIFICATION`` to ``MOST_AMPLIFICATION``.
        recent: the larger of the last two rounds' factors, likewise, by which samples are judged: rows that share are
            measured in turns.  One of 3072 samples of a mixture's SDE was judged in a round between two that showed a
            border, and ended on its wrong side.
    """

    def __init__(self, alpha: Table, clock: Table, slopes: Table, batch: int) -> None:
        with np.errstate(invalid="ignore"):
            gap = np.diff(clock)
        gap[~np.isfinite(gap)] = 0.0
        self.gap, self.alpha, self.slopes = gap[:, None], alpha[:-1, None], slopes[:-1, None]
        # The logarithm per gap; of the last node, after which no other can show what grows, there is none.
        self.rise = np.zeros((len(gap), batch))
        self.factor = self.recent = self.inherited = np.ones((len(alpha), batch))

    def learn(self, excess: Table) -> None:
        """Take in the slopes ``J - G`` that a round has measured, ``(n, B)``; 0 where it has not."""
        measured = excess[:-1] != 0
        self.recent = self.factor
        if not measured.any():
            return
        rise = self.gap * (self.alpha * (self.slopes + excess[:-1]) - 1)
        self.rise = np.where(measured & np.isfinite(rise), rise, self.rise)
        total = np.zeros_like(excess)
        self.rise.cumsum(0, out=total[1:])
        most = np.maximum.accumulate(total[::-1])[::-1] - total
        factor = np.exp(np.minimum(most, np.log(MOST_AMPLIFICATION)))
        factor[factor < LEAST_AMPLIFICATION] = 1.0
        self.factor = np.maximum(factor, self.inherited)
        self.recent = np.maximum(self.recent, self.factor)

    def forget(self) -> None:
        """Take all slopes for not measured, here and on a coarser node set."""
        self.rise = np.zeros_like(self.rise)
        self.factor = self.recent = self.inherited = np.ones_like(self.factor)

    def inherit(self, old: Flags, coarse: Amplification, keep: Flags | slice) -> None:
        """Take over the factors of a coarser node set: ``old`` of the nodes, ``keep`` of its samples.

        They stay: on finer nodes a path on the wrong side of a border may hardly move, and show nothing.
        """
        self.factor = self.recent = self.inherited = coarse.factor[:, keep][old.cumsum() - 1]
