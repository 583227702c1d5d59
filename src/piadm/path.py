"""A path being solved: the node states of a batch, and how evaluations move them.

A reference model ``D_ref(x) = G_ref x + g_ref`` has the path ``q = start x_0 + offset + N xi``, free of network
calls.  Everything is kept relative to it, so that large cancelling terms never meet in single precision.  A
turn (``turn.py``) is one network call on the active nodes and one product with the condensed path:

    R <- D(x) - D_ref(q) - G (x - q)   on the active rows,        x <- q + P R(x)

with ``R(x)`` what the last evaluations say of the residual at ``x`` (``LocalModel``): constant, or a line.  Only what
a round changes is computed, through small matrices.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from piadm.activity import Outlook
from piadm.amplification import Amplification
from piadm.clipped import ClippedWalk
from piadm.condense import CondensedPath
from piadm.interpolation import Interpolation
from piadm.local_model import Acting, Learning, LocalModel
from piadm.numerics import Flags, Table, full_precision, host, rms
from piadm.precision import HALF

#: Sweeps in which the path follows an evaluation where nodes read ahead, or coordinates have slopes of their own.  What
#: they leave the next evaluations hear of: rounds were the same with one as with three, and hardly more with none.
SWEEPS = 1

#: Rounds after which the states are computed anew from the residuals: every change that is added leaves its rounding,
#: and the first ones are large where ``data_mean`` and ``data_variance`` are wrong.
ANCHOR = 4

#: Largest state that is worth starting from, relative to those of the reference: on others networks may fail.
ABSURD = 1e3


class ParallelPath:
    """The states of one path at its nodes and its end, for a batch of samples.

    Three copies of the node states are kept: ``q``, ``x`` and ``R(x)``; a fourth and a fifth where a local model is.

    Args:
        path: the condensed path, with the linearization ``G`` of the iteration.
        free: ``q``, as ``reference.free_states`` gives it, shape ``((n + 1) s, B d)``.
        samples: number of each sample in the whole batch, shape ``(B,)`` int64 on the CPU.
        reference: the condensed path of the reference model on the same nodes; None: ``path`` itself.
        interpolation: how its error is estimated; None: every step is a node.
        learning: what the local model may learn at the nodes; None: residuals are constants and there is no
            outlook, as a fixed number of rounds needs none.
        centre: mean of the end according to ``data_mean``, about which its size is measured.
        deviation: its standard deviation according to ``data_variance``.
        walk: follows evaluations where steps clip; None: they do not.

    Attributes:
        usual: how large samples are as far as is known, shape ``(B,)``: by what was told, by the reference's end, and
            by the smallest answer of the first round.
        resolution: relative change of a state that the network cannot resolve, of every sample, shape ``(B,)``.
        asked: whose network was asked what it resolves (``Witness``), likewise.
        shaken: whether the last round's changes were so large that their rounding must not stay in the states.
    """

    def __init__(
        self,
        path: CondensedPath,
        free: Tensor,
        samples: Tensor,
        reference: CondensedPath | None = None,
        interpolation: Interpolation | None = None,
        learning: Learning | None = None,
        centre: float = 0.0,
        deviation: float = 0.0,
        walk: ClippedWalk | None = None,
    ) -> None:
        self.samples, self.interpolation, self.centre, self.walk = samples, interpolation, centre, walk
        self.path, self.batch, self.size = path, len(samples), free.shape[1] // len(samples)
        self.dtype, self.device = free.dtype, free.device
        self.numbers, self.times = samples.to(self.device), path.times.to(self.device)
        self.acting = Acting(self._matrix(path.response.flatten(0, 1)))
        reference = path if reference is None else reference
        # What residuals are relative to, ``g_ref``, ``G_ref`` and ``G``: one table, of which a round takes its rows.
        self.affine = self._matrix(torch.stack([reference.constants, reference.slopes, path.slopes]))
        self.left = None if interpolation is None else self._matrix(interpolation.rows)
        self.turns, self.free, self.shaken = 0, free, False
        self.reference_size = rms(free.view(-1, path.components, self.batch, self.size)[-1, 0])
        self.deviation = deviation
        self.usual = self.reference_size.clamp(min=deviation)
        self.state = self.free.clone()
        self.residual = torch.zeros(path.count, self.batch * self.size, dtype=self.dtype, device=self.device)
        self.local = None if learning is None else LocalModel(learning, path.slopes, self.nodes)
        self.resolution = np.full(self.batch, 0.0 if learning is None else learning.resolution)
        self.asked = np.zeros(self.batch, np.bool_)
        own = self.local is not None and self.local.own
        self.sweeps = SWEEPS if own or path.response[:-1, 0].triu(1).any() else 0
        self.outlook = Outlook(np.ones(path.count) if learning is None else learning.rate.numpy(), self.batch)
        nothing = torch.zeros(path.count, dtype=torch.float64, device="cpu")
        alpha, clock = (nothing, nothing) if learning is None else (learning.alpha, learning.clock)
        self.amplification = Amplification(alpha.numpy(), clock.numpy(), path.slopes.numpy(), self.batch)

    def _matrix(self, matrix: Tensor) -> Tensor:
        return matrix.to(self.device, self.dtype)

    @property
    def half_precision(self) -> Flags:
        """Of which samples the network computes with numbers of sixteen bits, shape ``(B,)``."""
        found: Flags = self.resolution > HALF
        return found

    @property
    def nodes(self) -> Tensor:
        """What the network reads at the nodes, a view of shape ``(n, B, d)``."""
        return self._first_component(self.state)

    @property
    def end(self) -> Tensor:
        """The state at the end of the path, shape ``(B, s, d)``."""
        return self.state.view(-1, self.path.components, self.batch, self.size)[-1].transpose(0, 1)

    def read(self, states: Tensor, node: Tensor, number: Tensor) -> Tensor:
        """What the network reads there at some rows, of nodes and numbers ``node B + sample``, shape ``(r, d)``."""
        beyond = self.path.components - 1
        stored = number + node * (beyond * self.batch) if beyond else number
        return states.view(-1, self.size).index_select(0, stored)

    def _first_component(self, states: Tensor) -> Tensor:
        return states.view(-1, self.path.components, self.batch, self.size)[:-1, 0]

    @property
    def rows(self) -> Tensor:
        """The node states as rows, a view of shape ``(n B, d)``; of paths with one state component."""
        return self.state[:-1].view(-1, self.size)

    def solve(self) -> None:
        """The recurrence of constant residuals: ``x <- q + P R``."""
        if self.walk is not None:
            self._walk(self.walk, self.residual.new_zeros(self.path.count, self.batch, 1))
            return
        with full_precision(self.device):
            torch.addmm(self.free, self.acting.whole, self.residual, out=self.state)

    def interpolate(self, weights: Tensor, residual: Tensor) -> None:
        """The recurrence of what lies between the residuals ``(n', B d)`` at other nodes, by weights ``(n, n')``."""
        with full_precision(self.device):
            torch.mm(self._matrix(weights), residual, out=self.residual)
        self.solve()

    def follow(self, places: Tensor, innovation: Tensor, first: int = 0) -> None:
        """The recurrence ``x <- q + P R(x)``, after evaluations with innovations ``s`` (``LocalModel.follow``).

        What neither the ``first`` node evaluated nor the sweeps reach stays as it is.
        """
        if self.local is None or not self.local.learns:
            self.solve()
            return
        if self.walk is not None:
            self._walk(self.walk, self.local.excess.view(self.path.count, self.batch, -1))
            return
        outputs, residual = (table.view(-1, self.batch, self.size) for table in (self.state, self.residual))
        onward = self._onward(first)
        with full_precision(self.device):
            self.local.follow(self.acting, places, innovation, outputs, residual, self.sweeps, onward)
        self.turns += 1
        if self.turns % ANCHOR == 0 or self.shaken:
            self.solve()

    def _walk(self, walk: ClippedWalk, slopes: Tensor) -> None:
        """The recurrence of steps that clip, by residuals of slopes ``(n, B, d)`` or ``(n, B, 1)``."""
        state, free = (table.view(-1, self.batch, self.size) for table in (self.state, self.free))
        residual, present = self.residual.view(-1, self.batch, self.size), state[:-1] - free[:-1]
        with full_precision(self.device):
            moved = walk(residual, slopes, present)
        torch.add(free, moved, out=state)
        residual.addcmul_(slopes, moved[:-1].sub_(present))

    def _onward(self, first: int) -> tuple[int, int]:
        """The first nodes whose residual and whose state change: each sweep reaches as far back as a residual does."""
        for _ in range(1 + self.sweeps):
            first = self.path.first_moved[first]
        return first, self.path.first_moved[first]

    def take_over(self, coarse: ParallelPath, keep: Tensor | slice, old: Tensor, weights: Tensor) -> None:
        """Start from what a coarser node set of the same path has found.

        Args:
            coarse: the path on those nodes.
            keep: which of its samples go on, shape ``(B',)`` bool on the device, or all of them.
            old: which nodes are the coarse ones, shape ``(n,)`` bool on the CPU.
            weights: interpolation from them to all nodes, shape ``(n, n')``.
        """
        assert self.local is not None and coarse.local is not None
        n, count, residual = len(old), coarse.path.count, self.residual.view(len(old), self.batch, -1)
        self.interpolate(weights, coarse.residual.view(count, coarse.batch, -1)[:, keep].flatten(1))
        places = old.nonzero().squeeze(1).to(self.device)
        with full_precision(self.device):
            self.local.inherit(places, coarse.local, keep, self._matrix(weights), self.nodes)
        # What is read at the coarse nodes has moved, and their local models with it.
        innovation = self.nodes[places].sub_(coarse.nodes[:, keep])
        innovation.mul_(self.local.excess.view(n, self.batch, -1)[places])
        residual.index_add_(0, places, innovation)
        self.follow(places.expand(self.batch, -1), innovation.transpose(0, 1))
        self.usual = torch.maximum(self.usual, coarse.usual[keep])
        kept = keep.cpu().numpy() if isinstance(keep, Tensor) else keep
        self.resolve(coarse.resolution[kept])
        self.asked = coarse.asked[kept].copy()
        self.outlook.inherit(old.numpy(), coarse.outlook, kept)
        self.amplification.inherit(old.numpy(), coarse.amplification, kept)
        self.outlook.look(np.sqrt(host(self.local.drift(self.rows).view(len(old), self.batch))))

    def resolve(self, found: Table) -> None:
        """Take in what the network was found not to resolve, ``(B,)``; what such small moves have taught is forgotten.

        The slopes stay: they are a guess, and within their bounds.
        """
        coarser: Flags = found > self.resolution
        if self.local is None or not coarser.any():
            return
        self.resolution = np.maximum(self.resolution, found)
        self.local.resolution.view(-1, self.batch)[:] = torch.from_numpy(self.resolution).to(self.device, self.dtype)
        self.outlook.distrust(coarser)

    def unlearn(self) -> None:
        """Keep states, residuals and slopes as a guess: no row counts as evaluated, and the absurd is forgotten."""
        assert self.local is not None
        state, free = (table.view(-1, self.batch, self.size) for table in (self.state, self.free))
        largest = free.abs().amax((0, 2)).clamp(min=self.deviation)
        lost = ~(state.abs().amax((0, 2)) <= ABSURD * largest)  # or not finite
        state[:, lost] = free[:, lost]
        self.residual.view(-1, self.batch, self.size)[:, lost] = 0
        self.local.forget(lost, self.nodes)
        self.outlook = Outlook(self.outlook.assumed[:, 0], self.batch)
        self.amplification.forget()
