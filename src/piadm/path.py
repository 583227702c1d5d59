"""A path being solved: the node states of a batch, and one turn of the iteration on them.

A reference model ``D_ref(x) = G_ref x + g_ref`` has the path ``q = start x_0 + offset + N xi``, free of network
calls.  Everything is kept relative to it, so that large cancelling terms never meet in single precision.  A
turn is one network call on the active nodes and one product with the condensed path:

    R <- D(x) - D_ref(q) - G (x - q)   on the active rows,        x <- q + P R(x)

with ``R(x)`` what the last evaluations say of the residual at ``x`` (``LocalModel``): constant, or a line.  Only what
a round changes is computed, through small matrices.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from piadm.activity import Outlook
from piadm.condense import CondensedPath
from piadm.executor import Asking, Executor
from piadm.interpolation import Interpolation
from piadm.local_model import Learning, LocalModel
from piadm.numerics import Flags, Table, full_precision, rms

#: Sweeps in which the path follows an evaluation where nodes read ahead, or coordinates have slopes of their own.  What
#: they leave the next evaluations hear of: rounds were the same with one as with three, and hardly more with none.
SWEEPS = 1

#: Rounds after which the states are computed anew from the residuals: every change that is added leaves its rounding,
#: and the first ones are large where the data's mean and variance were told wrong.
ANCHOR = 4

#: Largest state that is worth starting from, relative to those of the reference: on others networks may fail.
ABSURD = 1e3

#: Relative roundings of the end that two ways of computing it may be apart: up to 5 were seen on a trained network.
ROUNDINGS = 5


@dataclass(frozen=True)
class Movement:
    """What one round changed, on the CPU: the only host synchronisation of the round.

    Attributes:
        surprise: RMS difference of every row's residual from what its local model had said, shape ``(n, B)``;
            0 where not evaluated.
        end: RMS change of the end of the path, shape ``(B,)``.
        interpolation: estimated RMS error at the end of the path that interpolation between the nodes leaves,
            shape ``(B,)``.
        rounding: what rounding of the states may leave at the end of the path, shape ``(B,)``.
    """

    surprise: Table
    end: Table
    interpolation: Table
    rounding: Table


@dataclass(frozen=True)
class _Rows:
    """The rows of a round, in the order of the nodes, and their places in a table of as many for every sample.

    Attributes:
        node: their nodes, shape ``(r,)``.
        sample: their samples, shape ``(r,)``.
        place: their places among those of their sample, shape ``(r,)``.
        places: the nodes of every sample's rows, and where these are fewer some that are no rows, shape ``(B, a)``.
    """

    node: Tensor
    sample: Tensor
    place: Tensor
    places: Tensor

    @staticmethod
    def of(active: Flags, device: torch.device) -> _Rows:
        """Those that are true in a table ``(n, B)``."""
        number = active.cumsum(0)
        rows = np.stack([*active.nonzero(), number[active] - 1])
        places = (~active).argsort(axis=0, kind="stable")[: number[-1].max()].T
        # A blocking copy would wait for the device once more.
        (node, sample, place), there = (torch.from_numpy(t).to(device, non_blocking=True) for t in (rows, places))
        return _Rows(node, sample, place, there)


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
    """

    def __init__(
        self,
        path: CondensedPath,
        free: Tensor,
        samples: Tensor,
        reference: CondensedPath | None = None,
        interpolation: Interpolation | None = None,
        learning: Learning | None = None,
    ) -> None:
        self.samples, self.interpolation = samples, interpolation
        self.path, self.batch, self.size = path, len(samples), free.shape[1] // len(samples)
        self.dtype, self.device = free.dtype, free.device
        self.numbers, self.times = samples.to(self.device), path.times.to(self.device)
        self.slopes, self.response = self._matrix(path.slopes), self._matrix(path.response.flatten(0, 1))
        reference = path if reference is None else reference
        self.reference_slopes, self.constants = self._matrix(reference.slopes), self._matrix(reference.constants)
        self.left = None if interpolation is None else self._matrix(interpolation.rows)
        self.turns, self.free = 0, free
        self.reference_size = rms(free.view(-1, path.components, self.batch, self.size)[-1, 0])
        self.state = self.free.clone()
        self.residual = torch.zeros(path.count, self.batch * self.size, dtype=self.dtype, device=self.device)
        self.local = None if learning is None else LocalModel(learning, path.slopes, self.nodes)
        own = self.local is not None and self.local.own
        self.sweeps = SWEEPS if own or path.response[:-1, 0].triu(1).any() else 0
        self.outlook = Outlook(np.ones(path.count) if learning is None else learning.rate.numpy(), self.batch)

    def _matrix(self, matrix: Tensor) -> Tensor:
        return matrix.to(self.device, self.dtype)

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

    @property
    def rows(self) -> Tensor:
        """The node states as rows, a view of shape ``(n B, d)``; of paths with one state component."""
        return self.state[:-1].view(-1, self.size)

    def solve(self) -> None:
        """The recurrence of constant residuals: ``x <- q + P R``."""
        with full_precision(self.device):
            torch.addmm(self.free, self.response, self.residual, out=self.state)

    def interpolate(self, weights: Tensor, residual: Tensor) -> None:
        """The recurrence of what lies between the residuals ``(n', B d)`` at other nodes, by weights ``(n, n')``."""
        with full_precision(self.device):
            torch.mm(self._matrix(weights), residual, out=self.residual)
        self.solve()

    def follow(self, places: Tensor, told: Tensor, first: int = 0) -> None:
        """The recurrence ``x <- q + P R(x)``, after evaluations that have told ``s`` (``LocalModel.follow``).

        What neither the ``first`` node evaluated nor the sweeps reach stays as it is.
        """
        if self.local is None or not self.local.learns:
            self.solve()
            return
        outputs, residual = (table.view(-1, self.batch, self.size) for table in (self.state, self.residual))
        onward = self._onward(first)
        with full_precision(self.device):
            self.local.follow(self.response, places, told, outputs, residual, self.sweeps, onward)
        self.turns += 1
        if self.turns % ANCHOR == 0:
            self.solve()

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
        told = self.nodes[places].sub_(coarse.nodes[:, keep])
        told.mul_(self.local.excess.view(n, self.batch, -1)[places])
        residual.index_add_(0, places, told)
        self.follow(places.expand(self.batch, -1), told.transpose(0, 1))
        self.outlook.inherit(old.numpy(), coarse.outlook, keep.cpu().numpy() if isinstance(keep, Tensor) else keep)
        self.outlook.look(_table(self.local.drift(self.rows).view(len(old), self.batch)))

    def unlearn(self) -> None:
        """Keep states, residuals and slopes as a guess: no row counts as evaluated, and the absurd is forgotten."""
        assert self.local is not None
        state, free = (table.view(-1, self.batch, self.size) for table in (self.state, self.free))
        lost = ~(state.abs().amax((0, 2)) <= ABSURD * free.abs().amax((0, 2)))  # or not finite
        state[:, lost] = free[:, lost]
        self.residual.view(-1, self.batch, self.size)[:, lost] = 0
        self.local.forget(lost, self.nodes)
        self.outlook = Outlook(self.outlook.assumed[:, 0], self.batch)

    def turn(self, executor: Executor, active: Flags) -> Asking[Movement]:
        """One round: ask for the estimates of the active rows, solve, and report what has moved.

        Args:
            executor: lays out the rows.
            active: which rows to evaluate, shape ``(n, B)``.
        """
        rows = _Rows.of(active, self.device)
        told, heard = yield from self._evaluate(executor, rows)
        before = self.end.clone()
        self.follow(rows.places, told, int(active.any(1).argmax()))
        del told
        return self._movement(active, heard, before)

    def _evaluate(self, executor: Executor, rows: _Rows) -> Asking[tuple[Tensor, Tensor]]:
        """Take in the residuals of some rows.

        Returns:
            What they told beyond ``R(x)``, ``(B, a, d)`` as in ``LocalModel.follow``, and the surprise and the stride
            of every row, ``(2, n B)``, 0 where not evaluated.
        """
        node, sample, numbers = rows.node, rows.sample, rows.node * self.batch + rows.sample
        states, free, residual = self.nodes, self._first_component(self.free), self.residual.view(-1, self.size)
        heard = self.state.new_zeros(2, len(residual))
        told = self.state.new_zeros(*rows.places.shape, self.size)

        def fetch(part: slice) -> Tensor:
            return states[node[part], sample[part]]

        def store(part: slice, estimate: Tensor) -> None:
            # In place: on an accelerator a part is the whole round, and six copies of it must do.
            at, row, x, model = node[part], numbers[part], fetch(part), free[node[part], sample[part]]
            fresh = estimate.sub_(self.constants[at, None]).addcmul_(self.reference_slopes[at, None], model, value=-1)
            fresh.addcmul_(self.slopes[at, None], model.sub_(x))
            del model
            beyond = fresh - residual[row]
            residual[row], told[sample[part], rows.place[part]] = fresh, beyond
            if self.local is None:
                heard[0, row] = rms(beyond)
            else:
                heard[:, row] = self.local.observe(row, x, beyond)

        yield from executor.ask(self.numbers[sample], self.times[node], fetch, store)
        return told, heard

    def _movement(self, active: Flags, heard: Tensor, before: Tensor) -> Movement:
        end = self.end[:, 0]
        moved, size = torch.stack([end - before[:, 0], end]).square_().mean(2).sqrt_()
        # Where the reference is far off, by a mean told wrong, states are small differences of large numbers.
        rounding = ROUNDINGS * torch.finfo(self.dtype).eps * size.maximum(self.reference_size)
        drift = heard[1] if self.local is None else self.local.drift(self.rows)
        parts = [*heard, drift, moved, rounding, *self._left(end)]
        of_rows, of_end, left = np.split(_table(torch.cat(parts)), np.cumsum([3 * len(drift), 2 * self.batch]))
        surprise, stride, distance = of_rows.reshape(3, self.path.count, self.batch)
        self.outlook.learn(active, surprise, stride)
        self.outlook.look(distance)
        moved, rounding = of_end.reshape(2, self.batch)
        sizes, apart = np.split(left.reshape(-1, self.batch), [-1])
        error = np.zeros_like(moved) if self.interpolation is None else self.interpolation.error(sizes, apart[0])
        return Movement(surprise, moved, error, rounding)

    def _left(self, end: Tensor) -> list[Tensor]:
        """What tells of the interpolation error: sizes of its rows ``(m B,)``, the distance of two ends ``(B,)``."""
        if self.interpolation is None or self.left is None:
            return []
        with full_precision(self.device):
            rows = self.left @ self.residual
        coarse = self.interpolation.coarse_end
        sizes = rows.view(-1, self.size).square_().mean(1).sqrt_()  # in place: there are twice as many as nodes
        return [sizes, torch.zeros_like(end[:, 0]) if coarse is None else rms(end - coarse)]


def _table(numbers: Tensor) -> Table:
    """Numbers on the host."""
    found: Table = numbers.cpu().double().numpy()
    return found
