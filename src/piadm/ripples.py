"""Ripples from step to step: how much a network changes between neighbouring times at one and the same state.

A network with a table of times, one learnt vector per step, answers differently at every step.  What it adds at a step
between nodes says nothing of the nodes, and nodes on two node sets agree on what they both miss; so it is measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from piadm.memo import memoized
from piadm.nodes import NodeSet
from piadm.numerics import TINY, Table

#: Steps at which ripples are measured, of every sample once: of the SDE of a small network with a table of times, 0.02
#: to 0.1 wide, up to a third of the samples ended outside, by up to 5 times, and with this up to 6 %.  Of trained
#: networks with sines of the time it showed 0.001 to 0.08 times the tolerance, and at most 1.5 % more evaluations.
PLACES = 4

#: Estimated error per RMS that independent ripples have at the end: they are the same for all samples.  In two
#: dimensions 4 % of a network's samples were outside with 1.5, 2 % with this, 1 % with 2, which took networks with fast
#: sines of the time up to twice as many evaluations.
RIPPLE_SAFETY = 1.75


@memoized
def missed(nodes: NodeSet, step_influence: Tensor) -> Tensor:
    """Mean square of the end's error per mean square of independent ripples about each node, shape ``(n,)``.

    At a step between nodes a ripple ``r_j`` is missed and an interpolated one takes its place, so that at the end

        e^2 = sum_i ( (sum_j w_j W_ji)^2 + sum_{j about i} w_j^2 ) r_i^2,      w_j: influence of step ``j`` on the end

    summed over steps that are not nodes.

    Args:
        nodes: the nodes.
        step_influence: ``w``, shape ``(J,)`` float64.
    """
    between = step_influence.clone()
    between[nodes.indices] = 0
    middles = (nodes.indices[1:] + nodes.indices[:-1] + 1) // 2
    nearest = torch.searchsorted(middles, torch.arange(len(step_influence), device="cpu"), right=True)
    return (between @ nodes.weights).square().index_add(0, nearest, between.square())


def no_ripples() -> Table:
    """In the place of a ``RippleEffect`` where no ripples are measured."""
    return np.zeros(1)


class Ripples:
    """The ripples of all samples of a run, and the error at the end of the path that they make between nodes.

    At a place ``j``, and from there on linearly to the next, in the units of the model output ``D = p x + q m``,

        r_j = RMS(D_j - u D_{j-1} - v D_{j+1}) / (|q_j| sqrt(1 + u^2 + v^2))

    all at one state, with ``u`` and ``v`` the linear interpolation in log-SNR; independent ripples have this RMS.

    Args:
        nodes: the first node set on which they are measured; samples may skip it and come to a finer one.
        times: schedule times of the steps, shape ``(J,)`` float64.
        clock: log-SNR there, likewise.
        scale: ``|q|`` there, likewise.
        step_influence: change of the end per unit of the residual at each step, likewise.
        batch: number of samples of the run.

    Attributes:
        sizes: ``r``, shape ``(K, batch)`` float64; NaN where not measured.
    """

    def __init__(
        self, nodes: NodeSet, times: Tensor, clock: Tensor, scale: Tensor, step_influence: Tensor, batch: int
    ) -> None:
        self.times, self.clock, self.scale, self.step_influence = times, clock, scale, step_influence
        inside = (nodes.indices > 1) & (nodes.indices < len(times) - 1)  # nor beside a first one without data
        squares = missed(nodes, step_influence) * scale[nodes.indices].square() * inside
        share = squares.cumsum(0) / squares.sum().clamp(min=TINY)
        quantiles = (torch.arange(PLACES, dtype=torch.float64, device="cpu") + 0.5) / PLACES
        last = torch.searchsorted(share, share[-1:])
        self.count, self.steps = nodes.count, nodes.indices[torch.searchsorted(share, quantiles).minimum(last)]
        self.sizes = np.full((PLACES, batch), np.nan)

    def on(self, nodes: NodeSet, samples: Tensor) -> RippleEffect:
        """What they leave on a node set, of some samples."""
        squares = missed(nodes, self.step_influence) * self.scale[nodes.indices].square()
        # The sizes at the nodes are linear in those at the places, and their squares a quadratic form.
        between = np.stack([np.interp(nodes.indices, self.steps, row) for row in np.eye(PLACES)])
        return RippleEffect((between * squares.numpy()) @ between.T, self, samples)

    def wanted(self, nodes: NodeSet, samples: Tensor) -> bool:
        """Whether those of some samples are to be measured on a node set: the first one for it or a finer one."""
        return self.count <= nodes.count < len(self.times) and bool(np.isnan(self.sizes[:, samples.numpy()]).any())


@dataclass(frozen=True)
class RippleEffect:
    """The error at the end of the path that ripples leave on a node set, of some samples.

    Attributes:
        form: its square as a quadratic form of the sizes, shape ``(K, K)`` float64.
        ripples: the sizes, once they are known.
        samples: numbers of the samples, shape ``(B,)`` int64.
    """

    form: Table
    ripples: Ripples
    samples: Tensor

    def __call__(self) -> Table:
        """RMS over the coordinates, shape ``(B,)``; 0 where ripples were not measured yet."""
        sizes = self.ripples.sizes[:, self.samples.numpy()]
        sizes = np.where(np.isnan(sizes), 0.0, sizes)
        found: Table = RIPPLE_SAFETY * np.sqrt((sizes * (self.form @ sizes)).sum(0))
        return found
