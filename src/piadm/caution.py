"""How cautiously the rounds on a node set are judged, and what a coarser node set has shown."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from piadm.numerics import Table

#: Largest contraction factor that is used: the changes still to come then sum to ten times the next one.
SLOWEST = 0.9

#: Share of the aim that all settled rows together may leave as an error, for the ODE and for the SDE.  With twice
#: as much samples take 3 % (ODE) and 4 to 13 % (SDE, trained networks most) fewer evaluations, and half a round less of
#: the SDE.  Of its samples as many were within the tolerance; of 4608 of mixtures' ODE 10 ended on the wrong side of a
#: border instead of 3.  With 0.7 one of sixteen of a U-Net's SDE was outside.
SETTLED_SMOOTH, SETTLED_ROUGH = 0.25, 0.5


@dataclass(frozen=True)
class Caution:
    """How cautiously the rounds on a node set are judged.

    Attributes:
        earliest: first round after which a sample that still changes may be judged.
        calm: rounds, counted in windows of half the nodes, after which a sample is slow: each further one doubles its
            interpolation error.
        least_share: lower bound on the ratio of the end's change to the sum of the surprises.
        settled: share of the aim that all settled rows together may leave as an error.
    """

    earliest: int = 1
    calm: float = np.inf
    least_share: float = 0.05
    settled: float = SETTLED_SMOOTH


#: On the first node set what makes an iteration slow also amplifies errors: on a trained network the error of samples
#: that took seven to nine rounds was 0.2 times its estimate, of those that took twelve or more 1 to 10 times (ODE); of
#: those that took ten to twelve 0.4 times, of those that took fourteen and more up to 9 times (SDE).
FIRST_SMOOTH, FIRST_ROUGH = Caution(calm=9), Caution(calm=13, settled=SETTLED_ROUGH)

#: On a finer one the distance from the end on the coarser, which starts at zero, has to grow first.  Its first
#: surprises are as rough as what interpolation has left between the old nodes and cancel; what follows does not: of a
#: trained network's SDE, whose noise is between them, 0.67 of the tolerance was said to be left where 2.3 was.  Of the
#: ODE's five other networks as many samples were within the tolerance with a round less and half of that share.
FINER_SMOOTH = Caution(earliest=2, least_share=0.25)
FINER_ROUGH = Caution(earliest=3, least_share=0.5, settled=SETTLED_ROUGH)


@dataclass(frozen=True)
class CoarseRecord:
    """What a coarser node set has shown of the samples that go on with finer nodes.

    Attributes:
        contraction: factor by which the last round reduced the iteration error, shape ``(B,)``.
        interpolation: the interpolation error to be expected on the finer nodes, shape ``(B,)``.
        growth: observed factor on the influence that the linear model gives to errors, shape ``(B,)``.
    """

    contraction: Table
    interpolation: Table
    growth: Table

    @staticmethod
    def unknown(samples: int) -> CoarseRecord:
        """Of samples that have had no coarser node set: the slowest contraction, and nothing to compare with."""
        return CoarseRecord(np.full(samples, SLOWEST), np.full(samples, np.inf), np.ones(samples))
