"""A path being solved: the node states of a batch, and one turn of the iteration on them.

A reference model ``D_ref(x) = G_ref x + g_ref`` has the path ``q = start x_0 + offset + N xi``, free of network
calls.  Everything is kept relative to it, so that large cancelling terms never meet in single precision.  A
turn is one network call on the active nodes and one product with the condensed path:

    R <- D(x) - D_ref(q) - G (x - q)   on the active rows,        x <- q + P R
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from piadm.condense import CondensedPath
from piadm.executor import Executor

#: Gives standard normals ``first .. last - 1`` of a path, shape ``(last - first, B, d)``.
Draw = Callable[[int, int], Tensor]

#: Rows of noise drawn at once: the noise of a path is never stored whole.
NOISE_CHUNK = 64

#: Relative roundings of the end that two ways of computing it may be apart: up to 5 were seen on a trained network.
ROUNDINGS = 5


@dataclass(frozen=True)
class Movement:
    """What one round changed, on the CPU: the only host synchronisation of the round.

    Attributes:
        residual: RMS change of the residual of every row, shape ``(n, B)`` float64; 0 where not evaluated.
        end: RMS change of the end of the path, shape ``(B,)`` float64.
        interpolation: estimated RMS error at the end of the path that interpolation between the nodes leaves,
            shape ``(B,)`` float64.
        rounding: what rounding of the states may leave at the end of the path, shape ``(B,)`` float64.
    """

    residual: Tensor
    end: Tensor
    interpolation: Tensor
    rounding: Tensor


@dataclass(frozen=True)
class Interpolation:
    """How the error that interpolation between the nodes leaves at the end of the path is estimated.

    Attributes:
        probe: change of the end's row of ``P`` when half the nodes are left out, shape ``(n,)``.
        probe_share: estimated error per RMS of the probe; inf: too few nodes, the error is unknown.
        coarse_end: end of the path on a node set of half as many nodes, shape ``(B, d)``, where that was solved;
            it then takes the place of the probe, for it has also seen what the network made of the difference.
        coarse_share: estimated error per RMS distance from it.
    """

    probe: Tensor
    probe_share: float
    coarse_end: Tensor | None
    coarse_share: float


class ParallelPath:
    """The states of one path at its nodes and its end, for a batch of samples.

    Three copies of the node states are kept: ``q``, ``x`` and ``R``.  ``influence`` says how strongly each node's
    residual acts on the end, the larger of what the iteration's linearization and the reference model say: a
    linearization that freezes the denoised estimate sees no way from an early residual to the end.

    Args:
        path: the condensed path, with the linearization ``G`` of the iteration.
        start: initial state, shape ``(B, s, d)``.
        draw: the path's standard normals, ``r`` per step, in the order of the steps.
        samples: number of each sample in the whole batch, shape ``(B,)`` int64 on the CPU.
        reference: the condensed path of the reference model on the same nodes; None: ``path`` itself.
        interpolation: how its error is estimated; None: every step is a node.
    """

    def __init__(
        self,
        path: CondensedPath,
        start: Tensor,
        draw: Draw,
        samples: Tensor,
        reference: CondensedPath | None = None,
        interpolation: Interpolation | None = None,
    ) -> None:
        self.samples, self.interpolation = samples, interpolation
        self.path, self.batch, self.size = path, start.shape[0], start.shape[2]
        self.dtype, self.device = start.dtype, start.device
        self.numbers, self.times = samples.to(self.device), path.times.to(self.device)
        self.slopes, self.response = self._matrix(path.slopes), self._matrix(path.response.flatten(0, 1))
        reference = path if reference is None else reference
        self.influence = torch.maximum(path.response[-1, 0].abs(), reference.response[-1, 0].abs())
        self.reference_slopes, self.constants = self._matrix(reference.slopes), self._matrix(reference.constants)
        self.free = self._free(reference, start, draw)
        self.state = self.free.clone()
        self.residual = torch.zeros(path.count, self.batch * self.size, dtype=self.dtype, device=self.device)

    def _matrix(self, matrix: Tensor) -> Tensor:
        return matrix.to(self.device, self.dtype)

    def _free(self, reference: CondensedPath, start: Tensor, draw: Draw) -> Tensor:
        """``q``, the reference model's states, with the noise drawn chunk by chunk."""
        columns = reference.noise.flatten(2).flatten(0, 1)
        with full_precision():
            free = self._matrix(reference.start.flatten(0, 1)) @ start.transpose(0, 1).flatten(1)
            free += self._matrix(reference.offset.flatten())[:, None]
            for first in range(0, columns.shape[1], NOISE_CHUNK):
                last = min(first + NOISE_CHUNK, columns.shape[1])
                free.addmm_(self._matrix(columns[:, first:last]), draw(first, last).flatten(1))
        return free

    @property
    def nodes(self) -> Tensor:
        """What the network reads at the nodes, a view of shape ``(n, B, d)``."""
        return self._first_component(self.state)

    @property
    def end(self) -> Tensor:
        """The state at the end of the path, shape ``(B, s, d)``."""
        return self.state.view(-1, self.path.components, self.batch, self.size)[-1].transpose(0, 1)

    def _first_component(self, states: Tensor) -> Tensor:
        return states.view(-1, self.path.components, self.batch, self.size)[:-1, 0]

    def solve(self) -> None:
        """The linear recurrence: ``x <- q + P R``."""
        with full_precision():
            torch.addmm(self.free, self.response, self.residual, out=self.state)

    def turn(self, executor: Executor, active: Tensor) -> Movement:
        """One round: evaluate the active rows, solve, and report what has moved.

        Args:
            executor: evaluates the rows.
            active: which rows to evaluate, shape ``(n, B)`` bool on the CPU.
        """
        rows = active.flatten().nonzero().squeeze(1).to(self.device)
        node, sample = rows.div(self.batch, rounding_mode="floor"), rows.remainder(self.batch)
        states, free, residual = self.nodes, self._first_component(self.free), self.residual.view(-1, self.size)
        moved = torch.zeros(self.path.count * self.batch, dtype=self.dtype, device=self.device)

        def fetch(part: slice) -> Tensor:
            return states[node[part], sample[part]]

        def store(part: slice, estimate: Tensor) -> None:
            # In place: on an accelerator a part is the whole round, and six copies of it must do.
            at, model = node[part], free[node[part], sample[part]]
            fresh = estimate.sub_(self.constants[at, None]).addcmul_(self.reference_slopes[at, None], model, value=-1)
            fresh.addcmul_(self.slopes[at, None], fetch(part).sub_(model), value=-1)
            del model
            moved[rows[part]] = (residual[rows[part]] - fresh).square_().mean(1).sqrt_()
            residual[rows[part]] = fresh

        executor.run(self.numbers[sample], self.times[node], fetch, store)
        before = self.end.clone()
        self.solve()
        return self._movement(moved, before)

    def _movement(self, moved: Tensor, before: Tensor) -> Movement:
        end = self.end[:, 0]
        rounding = ROUNDINGS * torch.finfo(self.dtype).eps * rms(end)
        host = torch.cat([moved, rms(end - before[:, 0]), self._interpolation(end), rounding]).cpu().double()
        table, *of_samples = torch.split(host, [len(moved), *[self.batch] * 3])
        return Movement(table.view(self.path.count, self.batch), *of_samples)

    def _interpolation(self, end: Tensor) -> Tensor:
        how = self.interpolation
        if how is None:
            return end.new_zeros(self.batch)
        if math.isinf(how.probe_share):
            return end.new_full((self.batch,), math.inf)
        if how.coarse_end is not None:
            return how.coarse_share * rms(end - how.coarse_end)
        with full_precision():
            probe = self._matrix(how.probe[None]) @ self.residual
        return how.probe_share * rms(probe.view(self.batch, self.size))


def rms(rows: Tensor) -> Tensor:
    """Root mean square over the coordinates of rows ``(B, d)``, shape ``(B,)``."""
    return rows.square().mean(1).sqrt()


@contextmanager
def full_precision() -> Iterator[None]:
    """Matrix products in full float32: TF32 would lose three digits of a long sum."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
