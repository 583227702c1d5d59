"""``--condition FILE``: tensors of a safetensors file as the network's arguments, a row for every sample."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

#: Bytes of the file that are hashed at once.
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Conditions:
    """Conditions by name, of which only the rows that are sampled at once are read.

    Args:
        path: The file; None: there are no conditions.
        num: Number of samples.

    Raises:
        ValueError: If it cannot be read, or a tensor in it has not one row for each sample.
    """

    path: Path | None
    num: int

    def __post_init__(self) -> None:
        if self.path is None:
            return
        try:
            with safe_open(self.path, framework="pt") as stored:
                shapes = {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"--condition must name a safetensors file, got {str(self.path)!r}: {error}") from error
        if not shapes:
            raise ValueError(f"--condition: {str(self.path)!r} holds no tensor")
        for name, shape in shapes.items():
            if shape[:1] != (self.num,):
                raise ValueError(
                    f"--condition: {name!r} in {str(self.path)!r} must have a row for each of the {self.num} samples, "
                    f"got shape {shape}"
                )

    def rows(self, samples: range) -> dict[str, Tensor]:
        """Those of some samples."""
        if self.path is None:
            return {}
        with safe_open(self.path, framework="pt") as stored:
            return {name: stored.get_slice(name)[samples.start : samples.stop] for name in stored.keys()}  # noqa: SIM118

    @property
    def name(self) -> str | None:
        """The file's name, as figures have it."""
        return None if self.path is None else str(self.path)

    def digest(self) -> str | None:
        """A checksum of the file."""
        if self.path is None:
            return None
        found = hashlib.sha256()
        with open(self.path, "rb") as stream:
            while block := stream.read(_BLOCK):
                found.update(block)
        return found.hexdigest()
