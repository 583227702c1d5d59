"""Files that are written whole or not at all, whatever ends the process."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

#: Ending of a file's temporary name, which begins with a dot.
PART = ".part"


def write_atomically(path: Path, write: Callable[[BinaryIO], object], *, replace: bool = True) -> None:
    """Write a file under another name, and give it its own once it is on the disk.

    Args:
        path: the file.
        write: called with the open temporary file.
        replace: whether a file of this name is replaced; if not, the first of several processes wins.

    Raises:
        FileExistsError: if there is one that is not to be replaced.
        OSError: if it cannot be written; ``path`` is then as it was.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}{PART}")
    try:
        with part.open("xb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, path) if replace else _claim(part, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        part.unlink(missing_ok=True)
    with contextlib.suppress(OSError, AttributeError):  # not every system can do that to a folder
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _claim(part: Path, path: Path) -> None:
    """Give a file the name if no other has it: one system call, so that only one process can be the first."""
    try:
        os.link(part, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links: another process can only come between these two calls
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
        os.replace(part, path)
