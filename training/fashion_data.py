"""Fashion-MNIST from the Debian package ``dataset-fashion-mnist`` (idx files, gzip)."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch

FOLDER = Path("/usr/share/datasets/fashion-mnist")
_HINT = "install it with: apt-get install dataset-fashion-mnist (or give --data FOLDER)"


def _read_idx(path: Path) -> np.ndarray:
    """Read one idx file: a magic number, the dimensions as big-endian int32, then bytes."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found; {_HINT}")
    raw = gzip.decompress(path.read_bytes())
    dims = raw[3]
    shape = np.frombuffer(raw, ">i4", count=dims, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape)


def load_images(split: str, folder: Path = FOLDER) -> torch.Tensor:
    """Images of ``split`` ("train" or "t10k") as bytes, shape ``(n, 1, 28, 28)``."""
    return torch.from_numpy(_read_idx(folder / f"{split}-images-idx3-ubyte.gz").copy()).unsqueeze(1)


def load_labels(split: str, folder: Path = FOLDER) -> torch.Tensor:
    """Labels of ``split``, int64 of shape ``(n,)``."""
    return torch.from_numpy(_read_idx(folder / f"{split}-labels-idx1-ubyte.gz").astype(np.int64))


def to_unit(images: torch.Tensor) -> torch.Tensor:
    """Bytes in 0..255 to float32 in [-1, 1], the range that the network works in."""
    return images.float().div_(127.5).sub_(1.0)
