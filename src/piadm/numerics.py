"""Arithmetic on the states of a path, the RMS of rows and matrix products that lose no digits; the host's tables."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from threading import Lock
from typing import TypeVar, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

#: What the host decides by: a number or a flag for every row or sample.  On so few numbers numpy's calls take a third
#: of the time that torch's do.
Table = NDArray[np.float64]
Flags = NDArray[np.bool_]
Kind = TypeVar("Kind", bound=np.generic)

#: Replaces divisors of zero.
TINY = float(np.finfo(np.float64).tiny)


def rms(rows: Tensor) -> Tensor:
    """Root mean square over the coordinates of rows ``(B, d)``, shape ``(B,)``."""
    return rows.square().mean(1).sqrt()


def joined(parts: list[Tensor]) -> Tensor:
    """Rows one after the other; the only part as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def host(numbers: Tensor) -> Table:
    """Numbers on the host."""
    found: Table = numbers.cpu().double().numpy()
    return found


def beside(table: NDArray[Kind]) -> tuple[NDArray[Kind], NDArray[Kind]]:
    """A table ``(n, ...)`` at the rows before and after every row; zero where there is none."""
    padded = np.zeros((len(table) + 2, *table.shape[1:]), table.dtype)  # np.pad takes ten times as long
    padded[1:-1] = table
    return padded[:-2], padded[2:]


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What an autocast around the caller computes in on a device; None: there is none."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Matrix products in full float32: shorter numbers inside them, or an autocast around the sampler, lose digits."""
    surrounded = torch.is_autocast_enabled(device.type)
    without = torch.autocast(device.type, enabled=False) if surrounded else nullcontext()
    with _ON_CPU if device.type == "cpu" else _ELSEWHERE, without:
        yield


@final
class _InFull:
    """Products of float32 in float32 while anybody is inside; the last one to leave puts back what the first one found.

    The switch is one for the whole process: if each of two threads put back what it had found, the one that came
    second would put back the other's "off" for ever.

    Args:
        backend: what multiplies on a device, TF32 or bfloat16 inside where that is allowed.  PyTorch before 2.9 has one
            switch for all, which cannot be read any more where the new ones were used.
    """

    _backend: object
    _off: object

    def __init__(self, backend: object) -> None:
        self._backend, self._switch, self._off = torch.backends.cuda.matmul, "allow_tf32", False
        if hasattr(backend, "fp32_precision"):
            self._backend, self._switch, self._off = backend, "fp32_precision", "ieee"
        self._lock, self._inside, self._found = Lock(), 0, self._off

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._found = getattr(self._backend, self._switch)
                setattr(self._backend, self._switch, self._off)
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                setattr(self._backend, self._switch, self._found)


_ELSEWHERE = _InFull(torch.backends.cuda.matmul)
_ON_CPU = _InFull(torch.backends.mkldnn.matmul) if hasattr(torch.backends.mkldnn, "matmul") else _ELSEWHERE
