"""One round of one path: the rows that the network is asked for, and what follows from its answer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from piadm.executor import Request
from piadm.numerics import Flags, Table, full_precision, rms
from piadm.path import ParallelPath

#: Relative roundings of the end that two ways of computing it may be apart: up to 5 were seen on a trained network.
ROUNDINGS = 5


@dataclass(frozen=True)
class Movement:
    """What one round changed, on the CPU.

    Attributes:
        surprise: RMS difference of every row's residual from what its local model had said, shape ``(n, B)``;
            0 where not evaluated, or lost.
        end: RMS change of the end of the path, shape ``(B,)``.
        interpolation: estimated RMS error at the end of the path that interpolation between the nodes leaves,
            shape ``(B,)``.
        remains: what twice as many nodes would leave of it, as a factor, shape ``(B,)``.
        rounding: what rounding of the states may leave at the end of the path, shape ``(B,)``.
        amplification: factor by which errors of the iteration and of the interpolation may grow on their way to the
            end, beyond what their influence says, shape ``(B,)``.
        size: RMS distance of the end from the mean that ``data_mean`` gives, shape ``(B,)``.
        lost: which rows the network answered with a value that is not finite, shape ``(n, B)``.
        failed: samples whose end is not finite, or whose first row of the round was lost: all rows before it had
            settled, so that the sequential sampler would evaluate it there, too; shape ``(B,)``.
    """

    surprise: Table
    end: Table
    interpolation: Table
    remains: Table
    rounding: Table
    amplification: Table
    size: Table
    lost: Flags
    failed: Flags


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


class Turn:
    """A round of one path: first ``request`` is answered, then ``follow`` called, then ``finish``.

    Args:
        path: the path.
        active: which rows to evaluate, shape ``(n, B)``.
    """

    def __init__(self, path: ParallelPath, active: Flags) -> None:
        self.path, self.active = path, active
        self.rows = rows = _Rows.of(active, path.device)
        self.numbers = rows.node * path.batch + rows.sample
        # The innovations, as in ``LocalModel.follow``; and what ``LocalModel.observe`` returns of every row.
        self.innovation = path.state.new_zeros(*rows.places.shape, path.size)
        self.measured = path.state.new_zeros(3, path.path.count * path.batch)

    @property
    def request(self) -> Request:
        """The rows, for the executor.  Made when asked for: kept here, it and the turn would hold each other."""
        path, rows = self.path, self.rows
        return Request(path.numbers[rows.sample], path.times[rows.node], self._fetch, self._store)

    def _fetch(self, part: slice) -> Tensor:
        return self.path.nodes[self.rows.node[part], self.rows.sample[part]]

    def _store(self, part: slice, estimate: Tensor) -> None:
        # In place: on an accelerator a part is the whole round, and six copies of it must do.
        path, at, sample, row = self.path, self.rows.node[part], self.rows.sample[part], self.numbers[part]
        x, model, residual = self._fetch(part), path.reference_nodes[at, sample], path.residual.view(-1, path.size)
        constant, prior, slope = path.affine[:, at, None]
        evaluated = estimate.sub_(constant).addcmul_(prior, model, value=-1).addcmul_(slope, model.sub_(x))
        del model
        old = residual[row]
        innovation = evaluated.sub_(old)
        if path.local is None:
            self.measured[0, row] = rms(innovation)
        else:
            self.measured[:, row] = path.local.observe(row, x, innovation)
        residual[row], self.innovation[sample, self.rows.place[part]] = old.add_(innovation), innovation

    def follow(self) -> Tensor:
        """Solve for the path; returns all that the host needs to know of it, one row of numbers on the device."""
        path = self.path
        before = path.end.clone()
        if self.active.any():  # else nothing is new, and the path stays as it is to the last digit
            path.follow(self.rows.places, self.innovation, int(self.active.any(1).argmax()))
        del self.innovation
        end = path.end[:, 0]
        moved, length, size = torch.stack([end - before[:, 0], end, end - path.centre]).square_().mean(2).sqrt_()
        # Where the reference is far off, by a wrong mean, states are small differences of large numbers.
        rounding = ROUNDINGS * torch.finfo(path.dtype).eps * length.maximum(path.reference_size)
        drift = self.measured[1] if path.local is None else path.local.drift(path.rows)
        return torch.cat([*self.measured, drift, moved, rounding, size, *self._left(end)])

    def _left(self, end: Tensor) -> list[Tensor]:
        """For the interpolation error: the sizes of its rows, ``(m B,)``, and the distance of two ends, ``(B,)``."""
        path = self.path
        if path.interpolation is None or path.left is None:
            return []
        with full_precision(path.device):
            rows = path.left @ path.residual
        coarse = path.interpolation.coarse_end
        sizes = rows.view(-1, path.size).square_().mean(1).sqrt_()  # in place: there are twice as many as nodes
        return [sizes, torch.zeros_like(end[:, 0]) if coarse is None else rms(end - coarse)]

    def finish(self, numbers: Table) -> Movement:
        """Update the outlook by the numbers of ``follow``, copied to the host, and return what the round changed."""
        path = self.path
        of_rows, of_end, left = np.split(numbers, np.cumsum([4 * self.active.size, 3 * path.batch]))
        surprise, stride, excess, distance = of_rows.reshape(4, path.path.count, path.batch)
        lost: Flags = self.active & ~np.isfinite(surprise)
        path.outlook.learn(self.active, surprise, stride)
        path.amplification.learn(excess)
        path.outlook.look(distance)
        moved, rounding, size = of_end.reshape(3, path.batch)
        sizes, apart = np.split(left.reshape(-1, path.batch), [-1])
        exact = np.zeros_like(moved), np.ones_like(moved)
        error, remains = exact if path.interpolation is None else path.interpolation.error(sizes, apart[0])
        first = self.active.argmax(0)[None]
        failed: Flags = ~np.isfinite(moved) | np.take_along_axis(lost, first, 0)[0]
        amplification = path.amplification.factor.max(0)
        surprise = np.where(lost, 0.0, surprise)
        return Movement(surprise, moved, error, remains, rounding, amplification, size, lost, failed)
