"""Files of a run folder: whole or not there at all, so that an interrupted run can continue."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a file of a temporary name, then move it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(path.suffix + ".part")
    write(part)
    os.replace(part, path)
