"""Files that are written whole or not at all, and by the first of several processes."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import BinaryIO

import pytest

from piadm.atomic import write_atomically


def new(stream: BinaryIO) -> None:
    stream.write(b"new")


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    path.write_bytes(b"old")
    write_atomically(path, new)
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("when", ["while it is written", "when it is to be on the disk"])
def test_a_file_that_cannot_be_written_is_as_it_was(when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "figures.json"
    path.write_bytes(b"old")

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def half(stream: BinaryIO) -> None:
        stream.write(b"ne")
        full(0)

    if when != "while it is written":
        monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*figures\.json'"):
        write_atomically(path, half if when == "while it is written" else new)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("links", [True, False])
def test_of_two_that_do_not_replace_the_first_wins(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(part: Path, path: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", without)
    path = tmp_path / "index.json"
    write_atomically(path, lambda stream: stream.write(b"first"), replace=False)
    with pytest.raises(FileExistsError, match=r"index\.json"):
        write_atomically(path, new, replace=False)
    assert path.read_bytes() == b"first" and list(tmp_path.iterdir()) == [path]
