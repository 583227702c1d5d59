"""Stopping rules: whether a sample is finished, judged by what a round has changed.

The tolerance is the RMS error per coordinate of the final sample against the sequential sampler on the same
grid and noise, judged sample by sample.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from piadm.activity import NARROW
from piadm.caution import SLOWEST, Caution, CoarseRecord
from piadm.interpolation import LEFT
from piadm.numerics import TINY, Flags, Table
from piadm.turn import Movement

#: A ``Verdict`` for every sample.
Verdicts = NDArray[np.int64]


class Verdict(IntEnum):
    """What a stopping rule says of one sample after a round."""

    GO_ON = 0
    DONE = 1
    REFINE = 2  # the iteration has settled, but the node set cannot resolve the tolerance
    NONFINITE = 3


class StoppingRule(Protocol):
    """Judges every sample after every round of one path."""

    @property
    def growth(self) -> Table | float:
        """Factor on the influence that the linear model gives to a row, shape ``(B,)`` or one for all."""
        ...

    @property
    def leaving(self) -> Flags | bool:
        """Which samples leave their nodes before they have converged, shape ``(B,)`` or one for all."""
        ...

    def judge(self, movement: Movement, expected: Table) -> tuple[Table, Verdicts]:
        """Error estimate ``(B,)`` float64 and ``Verdict`` ``(B,)`` int64 of every sample.

        Args:
            movement: what this round has changed.
            expected: surprise that evaluating each row would bring, ``(n, B)`` float64; inf: never evaluated.
        """
        ...


@dataclass
class FixedIterations:
    """The paper's rule: K rounds, no estimate.

    Args:
        iterations: number of rounds K.
        estimate: what stands for an error estimate.

    Attributes:
        done: rounds so far.
        growth: 1, as every row is evaluated in any case.
        leaving: False, as there are no other nodes.
    """

    iterations: int
    estimate: float = np.nan
    done: int = field(default=0, init=False)
    growth: float = field(default=1.0, init=False)
    leaving: bool = field(default=False, init=False)

    def judge(self, movement: Movement, expected: Table) -> tuple[Table, Verdicts]:
        """DONE for every sample after K rounds."""
        self.done += 1
        verdict = Verdict.DONE if self.done >= self.iterations else Verdict.GO_ON
        judged = np.where(movement.failed, Verdict.NONFINITE, verdict)
        return np.full_like(movement.end, self.estimate), judged


#: The errors of iteration and interpolation are brought below this, relative to the standard deviation of the data,
#: even if the tolerance is looser: near a border between two outcomes the error is either as large as the data or far
#: smaller, and a looser aim cannot tell which.  Of samples of mixtures up to 16 % ended on the wrong side with 0.07, 6
#: % with 0.04 and 1 % with 0.02; the rounds differ by one.
LOOSEST = 0.02

#: The aim of a sample is at most ``SMALL * LOOSEST`` times its own size, but no less than 1/``KEENEST`` of the common
#: aim, since a sample of few coordinates may be small by chance.
SMALL, KEENEST = 2.0, 10.0

#: The surprises of a round do not all have one direction: they change the end by less than their sum.  The observed
#: ratio is multiplied by this factor.
SHARE_SAFETY = 2.0

#: A round may by chance bring hardly any surprise, or one that hardly moves the end: what rounds have shown is believed
#: to change by no more than this factor for the better.
KEPT = 0.5

#: Evaluations per node after which a sample counts as oscillating: if nodes read ahead (averages), the iteration may
#: alternate between two outcomes for ever.  Of the samples that converged, on mixtures and on a trained network, few
#: took more than ten.
LAPS = 16

#: The same for half precision, where every evaluation brings rounding, so that some rows never settle.  A rough network
#: in bfloat16 took a quarter to two fifths fewer rounds with it, and as many evaluations.
LAPS_HALF = 8

#: A sample may move on to finer nodes when its iteration error is below this many times the aim.  With 1 the samples of
#: a mixture took 8.1 rounds and 134 evaluations on average instead of 7.8 and 127, those of rough networks 0.1 rounds
#: more.
ARRIVED = 4.0

#: A sample near a border between two outcomes is astray if its interpolation error, multiplied by what errors grow, is
#: more than ``ASTRAY`` times its aim in two rounds running, after the first ``EARLY``.  There is no use in waiting for
#: its iteration to converge, perhaps to the wrong outcome: the slowest of 768 samples of a mixture's ODE took 19 rounds
#: instead of 60, of the digits' 32 instead of 96, and all of them together 6 and 9 % fewer evaluations.  With 3 as
#: ``EARLY`` or 16 as ``ASTRAY`` it was the same within a few per cent.
ASTRAY, EARLY = 4.0, 5

#: Most doublings of the interpolation error of a slow sample.
MOST_DOUBLINGS = 6

#: For an ordinary sample, the distance between the ends on two node sets is at most this share of the interpolation
#: error that was estimated on the coarser one.  If it is larger, errors grow on their way to the end by the ratio of
#: the two more than the linear models say, and so do those that settled rows leave.  The ratio is limited: with 16 some
#: samples oscillated, as one did when the estimate of the remaining changes was multiplied as well.
ORDINARY_SHARE, MOST_GROWTH = 0.5, 4.0


class CarriedResidual:
    """Stop when the expected surprises, propagated to the end of the path, are within the tolerance.

    If evaluating node ``i`` is expected to bring the surprise ``r_i`` (``Outlook``), the next round moves the end by
    at most

        m = sum_i w_i r_i,    w the influence of the nodes on the end, about |P_end,i|

    which is reached if no two nodes cancel.  The ratio ``c`` of the end's actual move to that sum, in the last
    rounds, measures the cancellation, and every round contracts ``m`` by a factor ``rho``, the last one seen, or half
    of the one before if that is larger: the remaining error is estimated by the geometric series ``c m/(1 - rho)``;
    rows that have settled enter without the factor 1/(1 - rho).
    The interpolation error, estimated by the path and increased for slow samples, is taken to be orthogonal to it:
    the squares add.  Near a border between two outcomes both are multiplied (``Amplification``).  Rounding is added.
    No estimate is made before every row has been evaluated.  A sample that oscillates is sent to finer nodes, in the
    end to every step, where the iteration must terminate; so is, before it has converged, one that has too few nodes
    for its size, if that is larger than ``data_variance`` says, or for a border between two outcomes (``leaving``).
    If its ends on two node sets are further apart than predicted, or it is far smaller than ``data_variance`` says, its
    rows settle later (``growth``).

    Args:
        influence: ``w``, shape ``(n,)`` float64.
        threshold: expected surprise of a row that has settled, shape ``(n, B)`` float64.
        tol: tolerance.
        aim: what the iteration's share of a sample's error must come below, and all of it where finer nodes can be had,
            shape ``(B,)`` float64.
        refinable: whether finer nodes can be had when interpolation is what limits the sample.
        widest: size of samples for which there are nodes enough.
        caution: how cautiously to judge.
        exact_after: number of rounds after which the iteration is exact but for settled rows.
        coarse: what a coarser node set has shown of the samples; None: there was none.
    """

    def __init__(
        self,
        influence: Table,
        threshold: Table,
        tol: float,
        *,
        aim: Table,
        refinable: bool,
        widest: float = np.inf,
        caution: Caution,
        exact_after: float,
        coarse: CoarseRecord | None = None,
    ) -> None:
        self.influence, self.threshold, self.tol, self.aim = influence, threshold, tol, aim
        self.refinable, self.widest, self.caution = refinable, widest, caution
        self.exact_after, self.rounds = exact_after, 0
        self.laps, self.passed, self.size, self.width, self.remains = np.zeros((5, len(aim)))
        self.share, self.keenness = np.ones_like(aim), np.ones_like(aim)
        self.last: Table | None = None
        self.between = np.zeros_like(aim)  # the interpolation error, when it was last estimated
        self.far, self.astray, self.half_precision = np.zeros((3, len(aim)), np.bool_)
        self.begun = coarse is not None
        self.coarse = coarse = CoarseRecord.unknown(len(aim)) if coarse is None else coarse
        self.contraction, self.interpolation, self.grown = coarse.contraction, coarse.interpolation, coarse.growth

    def record(self, samples: Flags) -> CoarseRecord:
        """What this node set has shown of some samples, ``(B,)`` bool."""
        predicted = np.minimum(self.interpolation, LEFT * self.coarse.interpolation)
        return CoarseRecord(self.contraction[samples], predicted[samples], self.grown[samples])

    @property
    def growth(self) -> Table:
        """How many times more a row matters than the linear model says, shape ``(B,)``."""
        found: Table = self.grown * self.keenness
        return found

    @property
    def leaving(self) -> Flags:
        """Which samples these nodes cannot resolve: they are too large for them, or astray, shape ``(B,)`` bool."""
        return (self.width > self.widest) | self.astray

    @property
    def circling(self) -> Flags:
        """Which samples oscillate, shape ``(B,)`` bool."""
        return self.laps >= np.where(self.half_precision, LAPS_HALF, LAPS)

    def _cancellation(self, movement: Movement) -> Table:
        """``c``: the last ratio, or ``KEPT`` of the one before if larger; unchanged where nothing was evaluated."""
        bound = self.influence @ movement.surprise
        seen = np.maximum(SHARE_SAFETY * movement.end / np.maximum(bound, TINY), self.caution.least_share)
        measured = (bound > 0) & (movement.end > movement.rounding)  # a ratio of roundings says nothing
        self.share = np.where(measured, np.maximum(seen, KEPT * self.share), self.share)
        return self.share

    def _iteration_error(self, movement: Movement, expected: Table, reached: Flags) -> Table:
        """The estimate of the class docstring; inf for samples with rows that were never evaluated."""
        live = expected * self.growth > self.threshold
        ahead = np.where(reached, self.influence @ np.where(live & (expected < np.inf), expected, 0.0), np.inf)
        settled = self.influence @ np.where(live, 0.0, expected)
        if self.last is not None:
            # A sample that is judged already no longer changes; its contraction is kept.
            anew = np.isfinite(self.last) & (ahead != self.last)
            seen = np.clip(ahead / np.maximum(self.last, TINY), 0, SLOWEST)
            self.contraction = np.where(anew, np.maximum(seen, KEPT * self.contraction), self.contraction)
        self.last = ahead
        left: Table = self._cancellation(movement) * (ahead / (1 - self.contraction) + settled)
        return left

    def _measure(self, size: Table) -> Table:
        """How large the samples are, at least in two rounds running; returns what is aimed at, ``(B,)``."""
        self.width = np.minimum(size, self.size)
        aim: Table = np.clip(SMALL * LOOSEST * size, self.aim / KEENEST, self.aim)
        self.size, self.keenness = size, self.aim / aim
        return aim

    def _look_astray(self, far: Flags) -> None:
        """Take in whose interpolation error is far above the aim; who was astray once remains so."""
        if self.refinable and self.rounds > EARLY:
            self.astray, self.far = self.astray | (far & self.far), far

    def _compare(self, interpolation: Table) -> None:
        """Compare the interpolation error, on finer nodes at least the distance of the ends, with that predicted."""
        ratio = interpolation / (ORDINARY_SHARE * self.coarse.interpolation)
        grown = np.clip(np.where(np.isfinite(ratio), ratio, 1.0), 1.0, MOST_GROWTH)
        self.grown, self.interpolation = np.maximum(self.grown, grown), interpolation

    @np.errstate(all="ignore")  # the verdict reports what is not finite
    def judge(self, movement: Movement, expected: Table) -> tuple[Table, Verdicts]:
        """The estimate of the class docstring, and its verdict."""
        self.rounds += 1
        reached: Flags = np.asarray(np.isfinite(expected).all(0))
        evaluated = (movement.surprise > 0).mean(0)
        self.laps[movement.half_precision & ~self.half_precision] = 0  # those so far were due to rounding
        self.half_precision = movement.half_precision
        self.laps, self.passed = self.laps + evaluated, self.passed + np.minimum(evaluated / NARROW, 1.0)
        # No surprise in any row: nothing is left to evaluate, unless there are rows ahead of the window.
        still = (movement.surprise == 0).all(0) & reached
        exact = still | (reached & (self.rounds >= self.exact_after))
        aim = self._measure(movement.size)
        settled = self.caution.settled * aim
        left = np.where(exact, settled, movement.amplification * self._iteration_error(movement, expected, reached))
        # A contraction that was seen once may be chance: the error is at least the last change.
        iteration = np.maximum(left, movement.end)
        # What shared innovations have missed would pass for a difference between the nodes.
        doubtful = self.influence @ movement.doubt > settled
        self.between = np.where(doubtful, self.between, movement.interpolation)
        self.remains = np.where(doubtful, self.remains, movement.remains)
        amplified = self.between * movement.amplification
        interpolation = amplified * np.exp2(np.clip(self.passed - self.caution.calm, 0, MOST_DOUBLINGS))
        error = np.hypot(iteration, interpolation) + movement.rounding
        self._compare(amplified)
        self._look_astray(reached & (movement.amplification > 1) & (amplified > ASTRAY * aim))

        ripe = still | (self.rounds >= self.caution.earliest)
        # Finer nodes are for paths that have nearly converged: others would take their errors along.
        enough = np.maximum(settled, np.minimum(0.5 * interpolation, ARRIVED * aim)) if self.refinable else settled
        refine = ripe & ~doubtful & (iteration <= enough) & (interpolation > 0.5 * aim)
        refine |= (self.circling | self.leaving) & self.refinable
        within = (iteration <= aim) & (error <= (aim if self.refinable else self.tol))
        within &= ripe & ~doubtful & ~self.leaving
        verdict = np.where(within, Verdict.DONE, np.where(refine, Verdict.REFINE, Verdict.GO_ON))
        return error, np.where(movement.failed, Verdict.NONFINITE, verdict)
