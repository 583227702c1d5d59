"""The error at the end of the path due to interpolation between the nodes, estimated from the residuals at the nodes.

It is estimated from the sizes of some linear combinations of the residuals, the ``rows``.  Which ones, and how, depends
on whether the path is rough with noise (SDE) or smooth (ODE).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np
import torch
from torch import Tensor

from piadm.memo import memoized
from piadm.nodes import NodeSet, left_out, thin
from piadm.numerics import TINY, Table
from piadm.ripples import missed

#: SDE: estimated error per RMS of the change of the end with half of the nodes and without averages.  It was 0.03 to
#: 0.24 times, but 0.4 and more for one sample in five of a network with autoguidance; on mixtures 0.2 and 0.04.  What
#: averages leave is of second order: with nodes far apart in log-SNR the share grows with their mean distance.
ROUGH_SHARE, ROUGH_SHARE_PER_GAP = 0.4, 0.8

#: ODE, ripples: estimated error per size that the end's error has where ripples are independent from node to node.  On
#: the first node set of ten trained networks it was 0.05 to 0.7 times in the median, and up to 1.4 for 95 % of their
#: samples; of the shipped one 1.0.
RIPPLE_SHARE = 1.5

#: ODE, ripples: independent ones are smaller by 0.7 with twice as many nodes, and resolved ones by more: trained
#: networks showed 0.45 to 0.65, two whose errors were smaller 0.3, mixtures 0.13.  Below this the share falls with the
#: square; on mixtures it was still ten times the error.
INDEPENDENT = 0.35

#: What twice as many nodes leave of the error where that is not measured: of a U-Net's SDE they about halved it, and
#: interpolation alone leaves as much.
LEFT = 0.5

#: ODE: it is measured, as the ratio of the ripples at all nodes to those at half of them, which is 0.7 for independent
#: ones; it is taken to be no more than this, or no number of nodes would be enough.
MOST_LEFT = 0.75

#: ODE: on finer nodes the distance from the end on the coarser ones is at hand, and ripples count by this share of what
#: they do on the first: of few coordinates a distance may be small by chance.
FINER_SHARE = 0.5


@dataclass(frozen=True)
class Interpolation(ABC):
    """How the error at the end of the path due to interpolation between the nodes is estimated.

    Attributes:
        fewest: with fewer nodes than this the error counts as unknown, and the estimate is inf.
        rows: linear combinations of the residuals at the nodes, shape ``(m, n)`` float64.
        coarse_end: end of the path on a coarser node set, shape ``(B, d)``; None: that was not solved.  Its distance
            also contains the network's response to the difference.
        share: the error is taken to be at least this share of the distance (``share_of_distance``).
        ripples: what ripples from step to step leave, as far as it was measured, shape ``(B,)``; it is independent of
            the rest: their squares add.
    """

    fewest: ClassVar[int]
    rows: Tensor
    coarse_end: Tensor | None
    share: float
    ripples: Callable[[], Table]

    @np.errstate(all="ignore")  # the stopping rule reports a network that fails
    def error(self, sizes: Table, apart: Table) -> tuple[Table, Table]:
        """The estimate, and what twice as many nodes would leave of it, as a factor, each ``(B,)``.

        Args:
            sizes: RMS over the coordinates of the rows, shape ``(m, B)``.
            apart: RMS distance from ``coarse_end``, shape ``(B,)``; 0 where there is none.
        """
        unknown = self.rows.shape[1] < self.fewest
        error, left = self._estimate(sizes)
        found: Table = np.hypot(np.maximum(self.share * apart, np.inf if unknown else error), self.ripples())
        return found, left

    @abstractmethod
    def _estimate(self, sizes: Table) -> tuple[Table, Table]:
        """The estimate from the rows alone, and what twice as many nodes would leave of it, each ``(B,)``."""


@final
@dataclass(frozen=True)
class RoughInterpolation(Interpolation):
    """For a path that is rough with noise: the larger of the two changes of the end with half of the nodes."""

    fewest = 24

    def _estimate(self, sizes: Table) -> tuple[Table, Table]:
        changes: Table = sizes.max(0)
        return changes, np.full_like(changes, LEFT)


@final
@dataclass(frozen=True)
class SmoothInterpolation(Interpolation):
    """For a smooth path, whose network has ripples in time that the nodes may miss.

    Two rows are the changes of the end with half of the nodes; ``n`` rows are the effects on the end of the ripples at
    the nodes if these are independent, and as many are the same for the two halves of the nodes.  The changes contain
    errors that add up coherently, but may be small by chance if there are few coordinates; the sum of the squares of
    the ripples may not.
    """

    fewest = 9

    def _estimate(self, sizes: Table) -> tuple[Table, Table]:
        count = self.rows.shape[1]
        changes, ripples = sizes[:2].max(0), np.sqrt(np.square(sizes[2 : 2 + count]).sum(0))
        coarser = np.sqrt(0.5 * np.square(sizes[2 + count :]).sum(0))
        left = ripples / np.maximum(coarser, TINY)
        found: Table = RIPPLE_SHARE * np.minimum(1.0, np.square(left / INDEPENDENT)) * ripples
        left = np.minimum(left, MOST_LEFT)
        if self.coarse_end is not None:
            return FINER_SHARE * found, left
        together: Table = np.hypot(found, changes)
        return together, left


def share_of_distance(ratio: float) -> float:
    """Error per distance from the end on a coarser node set, for ``ratio`` times its nodes: ``1/sqrt(ratio - 1)``.

    With twice as many nodes the two are equal, both for errors that add up coherently and fall by half and for
    independent ripples, whose squares do.  With more it is exact for these, and more than the others' error.
    """
    return min(1.0, 1 / math.sqrt(ratio - 1))


@memoized
def rough_rows(nodes: NodeSet, clock: Tensor, order: int, node_influence: Tensor, step_influence: Tensor) -> Tensor:
    """The rows of a ``RoughInterpolation``.

    Args:
        nodes: the nodes.
        clock: log-SNR at the start of every step, shape ``(J,)``.
        order: degree of the interpolation.
        node_influence: change of the end per unit of the residual at each node, shape ``(n,)``.
        step_influence: the same if every step were a node, shape ``(J,)``.
    """
    knots = clock[nodes.indices[1:]]
    gap = float(knots[-1] - knots[0]) / max(1, len(knots) - 1)
    share = max(ROUGH_SHARE, ROUGH_SHARE_PER_GAP * gap)
    return share * _changes(nodes, thin(nodes, clock, order), node_influence, step_influence)


@memoized
def smooth_rows(nodes: NodeSet, clock: Tensor, order: int, node_influence: Tensor, step_influence: Tensor) -> Tensor:
    """The rows of a ``SmoothInterpolation``; arguments as ``rough_rows``."""
    halves = thin(nodes, clock, order)
    rows = [_changes(nodes, halves, node_influence, step_influence), _ripples(nodes, clock, order, step_influence)]
    for half in halves:
        among = torch.zeros(half.count, nodes.count, dtype=torch.float64, device="cpu")
        among[:, torch.isin(nodes.indices, half.indices)] = _ripples(half, clock, order, step_influence)
        rows.append(among)
    return torch.cat(rows)


def _changes(nodes: NodeSet, halves: list[NodeSet], node_influence: Tensor, step_influence: Tensor) -> Tensor:
    """The change of the end if residuals are interpolated from each half of the nodes, shape ``(2, n)``."""
    rows = node_influence.repeat(len(halves), 1)
    for row, half in zip(rows, halves, strict=True):
        row[torch.isin(nodes.indices, half.indices)] -= step_influence @ half.weights
    return rows


def _ripples(nodes: NodeSet, clock: Tensor, order: int, step_influence: Tensor) -> Tensor:
    """The effect of independent ripples at the nodes on the end, one row per node, shape ``(n, n)``: their squares add.

    Their size is the residual at a node less its interpolation from others (``missed`` has the equation).
    """
    lacks = left_out(nodes, clock, order)
    squares = missed(nodes, step_influence) / lacks.square().sum(1).clamp(min=1.0)
    return squares.sqrt()[:, None] * lacks
