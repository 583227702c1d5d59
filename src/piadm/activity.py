"""Active rows: which (node, sample) rows the network evaluates in a round."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class ActiveRows(Protocol):
    """Chooses the rows of a round from how much each row's residual moved when it was last evaluated."""

    def choose(self, moves: Tensor) -> Tensor:
        """Rows to evaluate.

        Args:
            moves: RMS move of every row's residual at its last evaluation, ``(n, B)`` float64; inf: never evaluated.

        Returns:
            ``(n, B)`` bool.
        """
        ...


@dataclass(frozen=True)
class AllRows:
    """Every row, every round: the paper's rule on its blocks."""

    def choose(self, moves: Tensor) -> Tensor:
        """True everywhere."""
        return torch.ones_like(moves, dtype=torch.bool)


@dataclass(frozen=True)
class SlidingWindow:
    """The first ``size`` rows of every sample that have not settled.

    As wide as the path it only leaves out what has settled; narrower, it saves evaluations and costs rounds.  Every
    sample has its own front, so that an easy one never waits for a hard one.

    Attributes:
        size: rows per sample and round.
        threshold: a row has settled when it last moved by no more than this, ``(n,)`` float64.

    Reference: Shih et al. 2023 (arXiv 2305.16317), section 3.2.
    """

    size: int
    threshold: Tensor

    def choose(self, moves: Tensor) -> Tensor:
        """Rows ``front .. front + size - 1``, the front being the first row that has not settled."""
        settled = moves <= self.threshold[:, None]
        front = settled.long().cumprod(0).sum(0)
        row = torch.arange(len(moves))[:, None]
        return (row >= front) & (row < front + self.size)
