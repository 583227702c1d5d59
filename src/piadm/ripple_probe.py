"""The rows that measure ripples from step to step: one state at three neighbouring times."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from piadm.executor import Request
from piadm.nodes import NodeSet
from piadm.numerics import Table
from piadm.path import ParallelPath
from piadm.ripples import PLACES, Ripples


class RippleProbe:
    """Three rows per place and sample: ``request`` is to be answered, then ``follow`` called, then ``finish``.

    Args:
        ripples: where they are noted.
        path: the path, on the node set on which they are measured.
        nodes: that node set.

    Attributes:
        samples: the sample of every row, on the CPU.
    """

    def __init__(self, ripples: Ripples, path: ParallelPath, nodes: NodeSet) -> None:
        self.ripples, self.path = ripples, path
        self.samples = path.samples.repeat(3 * PLACES)
        self.places = torch.searchsorted(nodes.indices, ripples.steps).to(path.device)
        self.rows = torch.arange(len(self.samples), device=path.device)
        self.found = path.state.new_empty(len(self.samples), path.size)

    @property
    def request(self) -> Request:
        """The rows, for the executor; made when asked for, as that of a ``Turn``."""
        path, ripples = self.path, self.ripples
        near = (ripples.steps + torch.arange(-1, 2, device="cpu")[:, None]).flatten()  # (3, K)
        times = ripples.times[near].repeat_interleave(path.batch).to(path.device)
        return Request(path.numbers.repeat(3 * PLACES), times, self._fetch, self.found.__setitem__)

    def _fetch(self, part: slice) -> Tensor:
        row = self.rows[part]
        place = (row // self.path.batch) % PLACES
        return self.path.nodes[self.places[place], row % self.path.batch]

    def follow(self) -> Tensor:
        """The sizes ``r``, on the device, shape ``(K B,)``."""
        before, here, after = self.found.view(3, PLACES, self.path.batch, -1)
        clock, at = self.ripples.clock, self.ripples.steps
        ahead, width = clock[at + 1] - clock[at], clock[at + 1] - clock[at - 1]
        u = torch.where((width > 0) & width.isfinite(), ahead / width, 0.5)
        norm = self.ripples.scale[at] * (1 + u.square() + (1 - u).square()).sqrt()
        u, norm = u.to(here)[:, None, None], norm.to(here)[:, None, None]
        ripple = here - u * before - (1 - u) * after
        sizes: Tensor = (ripple / norm).square_().mean(2).sqrt_().flatten()
        return sizes

    def finish(self, numbers: Table) -> None:
        """Note the sizes, copied to the host; a row that is not finite has told nothing."""
        sizes = numbers.reshape(PLACES, -1)
        self.ripples.sizes[:, self.path.samples.numpy()] = np.where(np.isfinite(sizes), sizes, 0.0)
