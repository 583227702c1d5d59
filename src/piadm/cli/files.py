"""Output files: checked before the work starts; the packages that draw figures, likewise."""

from __future__ import annotations

import json
import math
import tempfile
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from piadm.atomic import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def check_writable(option: str, path: Path, suffix: str) -> None:
    """Check that a file can be written later; nothing is left behind.

    Args:
        option: The option that named the file, for the message.
        path: The file.
        suffix: The ending that its name must have, such as ``.png``.

    Raises:
        ValueError: If the name has another ending, is a folder's, or lies in a folder that is missing or
            cannot be written to.
    """
    if path.suffix.lower() != suffix:
        raise ValueError(f"{option} must name a {suffix} file, got {str(path)!r}")
    if path.is_dir():
        raise ValueError(f"{option} must name a file, but {str(path)!r} is a folder")
    if not path.parent.is_dir():
        raise ValueError(f"{option} must lie in an existing folder, but {str(path.parent)!r} is none")
    try:
        # Permission bits alone mislead (root, read-only mounts, full disks), so a file is really opened.
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        folder = str(path.parent)
        raise ValueError(f"{option}: no file can be written to {folder!r} ({error.strerror})") from error


def write_figure(path: Path, figure: Figure) -> None:
    """Write a figure as PNG, whole or not at all."""
    write_atomically(path, lambda stream: figure.savefig(stream, format="png", metadata={"Software": "piadm"}))


def write_json(path: Path, figures: object) -> None:
    """Write figures as JSON, whole or not at all; one that is not finite becomes null: JSON has no such number."""
    text = json.dumps(_finite(figures), indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda stream: stream.write(text.encode()))


def _finite(value: Any) -> Any:  # noqa: ANN401 - JSON has no narrower type
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def drawing(module: str) -> ModuleType:
    """Import a drawing module of this package first of all: an hour of sampling must not end in a missing package.

    Raises:
        ImportError: If matplotlib is missing.
    """
    try:
        return import_module(f"piadm.cli.{module}")
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("matplotlib"):
            raise
        raise ImportError("the figure needs matplotlib: pip install 'piadm[plots]'") from error
