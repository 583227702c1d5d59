"""One round of one path: the rows that the network is asked for, and what follows from its answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from piadm.executor import Request
from piadm.numerics import Flags, Table, full_precision, rms
from piadm.path import ParallelPath
from piadm.sharing import Between

#: Surprises beyond this many times the usual size of a sample are those of states that only the iteration visits.  They
#: count as lost, like those that are not finite: where a network grows without bound off its data, states that follow
#: from them would overflow.  Not so the first row of a sample: all before it have settled, and the sequential sampler
#: comes there, too.  Changes like these, added and taken back, leave a rounding of a thousandth of the data: the states
#: are computed anew, and the row is in doubt.
OUTLANDISH = 1e4

#: Relative roundings of the end that two ways of computing it may be apart: up to 5 were seen on a trained network.
ROUNDINGS = 5

#: Numbers held at once, some eight times, while local models learn: many at a time, for speed, but not all.
OBSERVED_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Movement:
    """What one round changed, on the CPU.

    Attributes:
        surprise: RMS difference of every row's residual from what its local model had said, shape ``(n, B)``;
            0 where neither evaluated nor shared, or lost.
        doubt: what shared or large innovations may have missed of every row's residual (``Outlook``), likewise.
        end: RMS change of the end of the path, shape ``(B,)``.
        interpolation: estimated RMS error at the end of the path that interpolation between the nodes leaves,
            shape ``(B,)``.
        remains: what twice as many nodes would leave of it, as a factor, shape ``(B,)``.
        rounding: what rounding of the states may leave at the end of the path, shape ``(B,)``.
        amplification: factor by which errors of the iteration and of the interpolation may grow on their way to the
            end, beyond what their influence says, shape ``(B,)``.
        size: RMS distance of the end from the mean that ``data_mean`` gives, shape ``(B,)``.
        lost: which rows the network answered with a value that is not finite, or outlandish, shape ``(n, B)``.
        failed: samples whose end is not finite, or whose first row of the round was lost: all rows before it had
            settled, so that the sequential sampler would evaluate it there, too; shape ``(B,)``.
        half_precision: of which samples the network computes with numbers of sixteen bits, shape ``(B,)``.
    """

    surprise: Table
    doubt: Table
    end: Table
    interpolation: Table
    remains: Table
    rounding: Table
    amplification: Table
    size: Table
    lost: Flags
    failed: Flags
    half_precision: Flags


@dataclass(frozen=True)
class _Rows:
    """Some rows of a round, in the order of the nodes, and their places in a table of as many for every sample.

    Attributes:
        node: their nodes, shape ``(r,)``.
        sample: their samples, shape ``(r,)``.
        number: their numbers, ``node B + sample``, shape ``(r,)``.
        place: their places in the table of innovations, ``sample a + order``, shape ``(r,)``.
    """

    node: Tensor
    sample: Tensor
    number: Tensor
    place: Tensor

    @staticmethod
    def of(some: Flags, place: NDArray[np.int64], device: torch.device) -> _Rows:
        """Those that are true in a table ``(n, B)``, with the places of all."""
        return _Rows(*_moved(np.stack([*some.nonzero(), np.flatnonzero(some), place[some]]), device))

    def __getitem__(self, part: slice) -> _Rows:
        return _Rows(self.node[part], self.sample[part], self.number[part], self.place[part])


def _places(among: Flags, device: torch.device) -> Tensor:
    """The nodes of every sample's rows, and where these are fewer some that are no rows, shape ``(B, a)``."""
    return _moved((~among).argsort(axis=0, kind="stable")[: among.sum(0).max()].T, device)


def _moved(table: NDArray[Any], device: torch.device) -> Tensor:
    """A table on the device; a blocking copy would wait for it once more."""
    return torch.from_numpy(table).to(device, non_blocking=True)


class Turn:
    """A round of one path: first ``request`` is answered, then ``follow`` called, then ``finish``.

    Args:
        path: the path.
        active: which rows to evaluate, shape ``(n, B)``.
        shared: which take the innovation of those before and after them, likewise.
    """

    def __init__(self, path: ParallelPath, active: Flags, shared: Flags) -> None:
        self.path, self.active, self.shared, among = path, active, shared, active | shared
        self.places = _places(among, path.device)
        self.place = among.cumsum(0) - 1 + self.places.shape[1] * np.arange(path.batch)
        self.rows = _Rows.of(among, self.place, path.device)
        self.asked = _Rows.of(active, self.place, path.device) if shared.any() else self.rows
        self.between = Between.of(shared, active)
        self.teaches = _moved(path.outlook.teaches(shared)[among], path.device)
        # The innovations, as in ``LocalModel.follow``; and what ``LocalModel.observe`` returns of every row.
        self.innovation = path.state.new_zeros(self.places.numel(), path.size)
        self.measured = path.state.new_zeros(3, path.path.count * path.batch)

    @property
    def request(self) -> Request:
        """The rows, for the executor.  Made when asked for: kept here, it and the turn would hold each other."""
        path, rows = self.path, self.asked
        return Request(path.numbers[rows.sample], path.times[rows.node], self._fetch, self._store)

    def _fetch(self, part: slice) -> Tensor:
        return self.path.read(self.path.state, self.asked.node[part], self.asked.number[part])

    def _store(self, part: slice, estimate: Tensor) -> None:
        # In place: on an accelerator a part is the whole round, and six copies of it must do.
        path, rows = self.path, self.asked[part]
        x, model = self._fetch(part), path.read(path.free, rows.node, rows.number)
        constant, prior, slope = path.affine.index_select(1, rows.node)[..., None]
        evaluated = estimate.sub_(constant).addcmul_(prior, model, value=-1).addcmul_(slope, model.sub_(x))
        known = path.residual.view(-1, path.size).index_select(0, rows.number)
        self.innovation.index_copy_(0, rows.place, evaluated.sub_(known))

    def follow(self) -> Tensor:
        """Solve for the path; returns all that the host needs to know of it, one row of numbers on the device."""
        path = self.path
        before, apart = path.end.clone(), self._share()
        self._observe()
        if self.active.any():  # else nothing is new, and the path stays as it is to the last digit
            table = (*self.places.shape, path.size)
            path.follow(self.places, self.innovation.view(table), int(self.active.any(1).argmax()))
        del self.innovation
        end = path.end[:, 0]
        squares = torch.stack([end - before[:, 0], end, end - path.centre]).square_().mean(2)
        drift = self.measured[1] if path.local is None else path.local.drift(path.rows)
        return torch.cat([*self.measured, drift, *apart, *squares, path.reference_size, path.usual, *self._left(end)])

    def _share(self) -> list[Tensor]:
        """Give every shared row an innovation between those of its neighbours.

        Returns:
            How far their neighbours' innovations are apart, mean squares, in parts of the shared rows.
        """
        if not self.shared.any():
            return []
        device, between, place = self.path.device, self.between, self.place[self.shared]
        before, after = place - between.node + between.before, place - between.node + between.after
        places = _moved(np.stack([place, before, after]), device)
        weight = torch.from_numpy(between.weight).to(device, self.path.dtype, non_blocking=True)
        apart = []
        for part in self._parts(len(place)):
            left, right = (self.innovation.index_select(0, beside) for beside in places[1:, part])
            apart.append(right.sub_(left).square().mean(1))
            self.innovation.index_copy_(0, places[0, part], left.addcmul_(right, weight[part, None]))
        return apart

    def _observe(self) -> None:
        """Add the innovations to the residuals, and learn from them; those that are lost are set to zero."""
        path, residual = self.path, self.path.residual.view(-1, self.path.size)
        if path.local is not None and not path.outlook.known.any():
            self._gauge()
        for part in self._parts(len(self.rows.node)):
            rows = self.rows[part]
            innovation = self.innovation.index_select(0, rows.place)
            if path.local is None:
                self.measured[0, rows.number] = innovation.square().mean(1)
            else:
                x, teaches = path.read(path.state, rows.node, rows.number), self.teaches[part]
                usual, later = path.usual[rows.sample], rows.place % self.places.shape[1] > 0
                limit = torch.where(later, (OUTLANDISH * usual).square(), torch.inf)
                self.measured[:, rows.number] = path.local.observe(rows.number, x, innovation, teaches, limit)
                self.innovation.index_copy_(0, rows.place, innovation)
            residual.index_add_(0, rows.number, innovation)

    def _gauge(self) -> None:
        """Take the smallest answer of every sample's first round for its size, if that is larger than what was told."""
        path = self.path
        sizes = path.state.new_full((path.path.count * path.batch,), torch.inf)
        for part in self._parts(len(self.rows.node)):
            rows = self.rows[part]
            sizes[rows.number] = rms(self.innovation.index_select(0, rows.place)).nan_to_num(torch.inf)
        least = sizes.view(-1, path.batch).amin(0)
        path.usual = torch.maximum(path.usual, torch.where(least.isfinite(), least, 0.0))

    def _parts(self, rows: int) -> Iterator[slice]:
        size = max(1, OBSERVED_ELEMENTS // self.path.size)
        return (slice(first, first + size) for first in range(0, rows, size))

    def _left(self, end: Tensor) -> list[Tensor]:
        """For the interpolation error: mean squares of its rows, ``(m B,)``, and of two ends' distance, ``(B,)``."""
        path = self.path
        if path.interpolation is None or path.left is None:
            return []
        with full_precision(path.device):
            rows = path.left @ path.residual
        coarse = path.interpolation.coarse_end
        sizes = rows.view(-1, path.size).square_().mean(1)  # in place: there are twice as many as nodes
        return [sizes, torch.zeros_like(end[:, 0]) if coarse is None else (end - coarse).square_().mean(1)]

    def finish(self, numbers: Table) -> Movement:
        """Update the outlook by the numbers of ``follow``, copied to the host, and return what the round changed."""
        path = self.path
        parts = 4 * self.active.size, self.shared.sum(), 5 * path.batch
        of_rows, gaps, of_end, left = np.split(numbers, np.cumsum(parts))
        surprise, stride, excess, distance = of_rows.reshape(4, path.path.count, path.batch)
        surprise, stride, excess = np.sqrt(surprise), stride / path.size**0.5, np.where(self.active, excess, 0.0)
        lost: Flags = self.active & ~np.isfinite(surprise)
        missed = np.zeros_like(surprise)
        missed[self.shared] = self.between.missed(np.sqrt(gaps), path.outlook.drifted)
        *squares, reference, usual = of_end.reshape(5, path.batch)
        moved, length, size = np.sqrt(squares)
        outlandish, unit = surprise > OUTLANDISH * usual, ROUNDINGS * torch.finfo(path.dtype).eps
        path.shaken, large = bool(outlandish.any()), outlandish & ~lost
        missed[large] = unit * surprise[large]
        path.outlook.learn(self.active, self.shared, surprise, stride, missed)
        path.amplification.learn(excess)
        path.outlook.look(np.sqrt(distance))
        # Where the reference is far off, by a wrong mean, states are small differences of large numbers.
        rounding = unit * np.maximum(length, reference)
        left = np.sqrt(left).reshape(-1, path.batch)
        exact = np.zeros_like(moved), np.ones_like(moved)
        error, remains = exact if path.interpolation is None else path.interpolation.error(left[:-1], left[-1])
        failed: Flags = ~np.isfinite(moved) | lost[self.active.argmax(0), np.arange(path.batch)]
        amplification, doubt = path.amplification.recent.max(0), path.outlook.doubt
        surprise = np.where(np.isfinite(surprise), surprise, 0.0)
        half = path.half_precision
        return Movement(surprise, doubt, moved, error, remains, rounding, amplification, size, lost, failed, half)
