"""Arithmetic on the states of a path, the RMS of rows and matrix products that lose no digits; the host's tables."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

#: What the host decides by: a number or a flag for every row or sample.  On so few numbers numpy's calls take a third
#: of the time that torch's do.
Table = NDArray[np.float64]
Flags = NDArray[np.bool_]


def rms(rows: Tensor) -> Tensor:
    """Root mean square over the coordinates of rows ``(B, d)``, shape ``(B,)``."""
    return rows.square().mean(1).sqrt()


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What an autocast around the caller computes in on a device; None: there is none, or PyTorch is older than 2.4."""
    if not hasattr(torch, "get_autocast_dtype") or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Matrix products in full float32: TF32, or an autocast around the sampler, would lose digits of a long sum."""
    with _without_tf32, torch.autocast(device.type, enabled=False):
        yield


@final
class _WithoutTF32:
    """TF32 off while anybody is inside; the last one to leave puts back what the first one found.

    The switch is one for the whole process: if each of two threads put back what it had found, the one that came
    second would put back the other's "off" for ever.
    """

    def __init__(self) -> None:
        # Since PyTorch 2.9 the old switch cannot be read where the new one was used.
        new = hasattr(torch.backends.cuda.matmul, "fp32_precision")
        self._switch = "fp32_precision" if new else "allow_tf32"
        self._off: object = "ieee" if new else False
        self._lock, self._inside, self._found = Lock(), 0, self._off

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._found = getattr(torch.backends.cuda.matmul, self._switch)
                setattr(torch.backends.cuda.matmul, self._switch, self._off)
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                setattr(torch.backends.cuda.matmul, self._switch, self._found)


_without_tf32 = _WithoutTF32()
