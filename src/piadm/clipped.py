"""Steps that clip the denoised estimate and keep the noise of the unclipped one, as diffusers' DDIM does.

    x_{j+1} = a_j x_j + b_j D_j + f_j (clip(D_j) - D_j) + c_j xi_j,        D_j = D(x_j, t_j)             (1b)

``b_j`` falls in proportion to the length of the step, ``f_j = alpha_{j+1}`` does not: whatever an estimate exceeds the
clip by is taken off the state within a few steps, however short they are.  As a part of the network's answer this would
be a slope of ``-f/b``, as steep as there are many steps, which comes and goes with the coordinate.  Here the network's
answer is ``D``, as smooth as without clipping, and (1b) is followed step by step, coordinate by coordinate, which takes
no network call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from piadm.integrators import AffineSteps
from piadm.nodes import NodeSet
from piadm.reference import Draw

#: Numbers held at once of residuals between the nodes.
WALK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Excess:
    """What equation (1b) adds to a step.

    Attributes:
        clip: what becomes of denoised estimates ``(B, d)``.
        factors: ``f``, shape ``(J,)`` float64 on the CPU.
    """

    clip: Callable[[Tensor], Tensor]
    factors: Tensor


class ClippedWalk:
    """Follows (1b) with local models in the place of the network, between the nodes of a path as well.

    Relative to the reference's path ``q``, with ``y = x - q`` and ``D_ref = G_ref q + g_ref``, the estimate is

        D_j = D_ref,j + G_j y_j + r_j,    r_j = sum_i W_ji (R_i + e_i (y_j - sum_k W_jk y_k))

    ``R_i`` being the residual at the present ``y_i`` of the nodes, ``e_i`` its slopes there.

    Args:
        excess: what is added to the steps.
        steps: their other coefficients.
        slopes: ``G``, shape ``(J,)``.
        prior: ``G_ref`` and ``g_ref``, likewise.
        nodes: where the network is called.
        start: initial states, shape ``(B, d)``.
        draw: the steps' standard normals.
    """

    def __init__(
        self,
        excess: Excess,
        steps: AffineSteps,
        slopes: Tensor,
        prior: tuple[Tensor, Tensor],
        nodes: NodeSet,
        start: Tensor,
        draw: Draw,
    ) -> None:
        self.clip, self.start, self.draw = excess.clip, start, draw
        a, b = steps.own()
        self.table = torch.stack([a, b, a + b * slopes, slopes, *prior, excess.factors], 1).tolist()
        self.noises = steps.c[:, 0]
        self.weights = None if nodes.count == steps.count else nodes.weights.to(start)
        readings = nodes.reading_matrix()
        self.readers: list[list[tuple[int, float]]] = [[] for _ in range(steps.count)]
        for i, j in readings.nonzero().tolist():
            self.readers[j].append((i, float(readings[i, j])))

    def __call__(self, residual: Tensor, slopes: Tensor, present: Tensor) -> Tensor:
        """The new ``y`` at the nodes and the end, ``(n + 1, B, d)``.

        Args:
            residual: ``R``, shape ``(n, B, d)``.
            slopes: ``e``, shape ``(n, B, d)``, or ``(n, B, 1)`` for one of all coordinates.
            present: present ``y`` at the nodes, ``(n, B, d)``.
        """
        found = residual.new_zeros(len(residual) + 1, *residual.shape[1:])
        q, y = self.start.clone(), torch.zeros_like(self.start)
        for first in range(0, len(self.table), rows := max(1, WALK_ELEMENTS // y.numel())):
            part = slice(first, first + rows)
            along = self._between(part, slopes)
            rest = torch.addcmul(self._between(part, residual), along, self._between(part, present), value=-1)
            noise = self._noise(part)
            for j, (a, b, own, slope, prior, constant, factor) in enumerate(self.table[part]):
                for i, weight in self.readers[first + j]:
                    found[i].add_(y, alpha=weight)
                reference, left = (prior * q).add_(constant), rest[j].addcmul_(along[j], y)
                estimate = torch.add(reference, y, alpha=slope).add_(left)
                y = (own * y).add_(left, alpha=b).add_(self.clip(estimate).sub(estimate), alpha=factor)
                q = (a * q).add_(reference, alpha=b)
                if noise is not None:
                    q.add_(noise[j])
        found[-1] = y
        return found

    def _between(self, part: slice, table: Tensor) -> Tensor:
        """A table of the nodes at some of the steps."""
        if self.weights is None:
            return table[part]
        return (self.weights[part] @ table.flatten(1)).view(-1, *table.shape[1:])

    def _noise(self, part: slice) -> Tensor | None:
        """The noise of some of the steps; None: they have none."""
        factors, normals = self.noises[part], self.noises.shape[1]
        if normals == 0:
            return None
        drawn = self.draw(part.start * normals, (part.start + len(factors)) * normals)
        return (drawn.view(len(factors), normals, *self.start.shape) * factors.to(drawn)[..., None, None]).sum(1)
