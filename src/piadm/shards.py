"""Many samples as a folder: shards that are written whole, and an index; a run that can be killed and started again.

A folder of ``num`` samples holds

    index.json                    layout and settings, from the first start on; the checksums once it is complete
    shard-00000.safetensors ...   samples ``k size .. (k + 1) size - 1`` each

Shard ``k`` depends on the settings and ``k`` alone, so it does not matter who computes it, when, or how often: it is
there, under its name, or it is not.  It carries a checksum of the settings, which tells it from shards of other runs.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from piadm._checks import positive_int
from piadm.atomic import PART, write_atomically

INDEX, FORMAT = "index.json", 1

#: Name of a shard: its number in five digits, or ``*`` for all that a reader would collect.
_NAME = "shard-{}.safetensors"

#: The one entry of a shard's metadata: JSON, since the order of several would not be reproducible.
ABOUT = "piadm"

#: What that must say; "settings", which the first versions did not write, comes beside it.
_SAYS = ("shard", "first", "count", "sha256")


class BrokenShard(ValueError):  # noqa: N818 - what was found, not what went wrong
    """A shard that cannot be read, or is not what its name says."""

    def __init__(self, found: str) -> None:
        super().__init__(f"{found}; delete it, and the same command makes it again")


@dataclass(frozen=True)
class Shards:
    """The shards of one set of samples.

    Args:
        folder: the folder, which exists.
        num: number of samples.
        size: samples per shard, the last one excepted.
        settings: all that the samples depend on, as JSON has it.

    Raises:
        TypeError, ValueError: if a number is none, or not positive.
    """

    folder: Path
    num: int
    size: int
    settings: Mapping[str, Any]

    def __post_init__(self) -> None:
        positive_int("num", self.num)
        positive_int("size", self.size)

    @property
    def count(self) -> int:
        """Number of shards."""
        return -(-self.num // self.size)

    def path(self, shard: int) -> Path:
        """The file of a shard."""
        return self.folder / _NAME.format(f"{shard:05d}")

    def samples(self, shard: int) -> range:
        """Numbers of its samples."""
        return range(shard * self.size, min(self.num, (shard + 1) * self.size))

    def present(self) -> list[int]:
        """Shards that are there."""
        there = {entry.name for entry in self.folder.iterdir()}
        return [shard for shard in range(self.count) if self.path(shard).name in there]

    def missing(self) -> list[int]:
        """Shards that are not there yet."""
        return sorted(set(range(self.count)) - set(self.present()))

    def _foreign(self) -> list[str]:
        """Files that are named like a shard, so that a reader would collect them, but that are none."""
        own = {self.path(shard).name for shard in range(self.count)}
        return sorted({path.name for path in self.folder.glob(_NAME.format("*"))} - own)

    def order(self, rank: int, ranks: int) -> Iterator[int]:
        """The shards in the order in which one of several ranks takes care of them, those passed over that are there.

        First its own, every ``ranks``-th.  Then, from behind, those of its neighbours: a rank that is slow or dead
        holds nothing up, and if two ranks happen to compute the same shard, they write the same bytes.
        """
        others = [range(at, self.count, ranks)[::-1] for at in ((rank + k) % ranks for k in range(1, ranks))]
        for part in (range(rank, self.count, ranks), *others):
            yield from (shard for shard in part if not self.path(shard).exists())

    def begin(self) -> None:
        """Start the folder, or go on with one of the same settings; of several processes at once the first starts it.

        Raises:
            ValueError: if it was started with others, naming the first that differs, or holds something else.
            BrokenShard: if a shard in it cannot be read, or was made with others.
        """
        own = self._index()
        if not (self.folder / INDEX).exists():
            names = {entry.name for entry in self.folder.iterdir() if not entry.name.startswith(".")}
            if names and INDEX not in names:
                raise ValueError(f"{str(self.folder)!r} must be empty or hold an {INDEX}, but it holds {min(names)!r}")
            with contextlib.suppress(FileExistsError):
                self._put(self.folder / INDEX, _json(own), replace=False)
        begun = read_index(self.folder)
        for name, value in _flat(own).items():
            if (before := _flat(begun).get(name)) != value:
                raise ValueError(
                    f"{str(self.folder)!r} was begun with {name} = {before}, not {value}; go on with that, or take "
                    "another folder"
                )
        listed = _checksums(begun)
        for shard in self.present():
            self._about(shard, listed)

    def write(self, shard: int, tensors: Mapping[str, Tensor]) -> None:
        """Write one shard, whole or not at all.

        Raises:
            OSError: if it cannot be written, as on a full disk; nothing of it is left.
        """
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
        samples = self.samples(shard)
        about: dict[str, object] = {"shard": shard, "first": samples.start, "count": len(samples)}
        about |= {"settings": self._settings, "sha256": _digest(whole)}
        self._put(self.path(shard), save(whole, {ABOUT: json.dumps(about)}))

    def finish(self) -> bool:
        """If every shard is there, add their checksums to the index and remove what killed runs have left.

        Raises:
            BrokenShard: if one cannot be read, or was made with other settings.
        """
        if self.missing():
            return False
        listed = _checksums(read_index(self.folder))
        found = [self._about(shard, listed) | {"file": self.path(shard).name} for shard in range(self.count)]
        self._put(self.folder / INDEX, _json(self._index() | {"complete": True, "shards": found}))
        for part in self.folder.glob(f".*{PART}"):
            part.unlink(missing_ok=True)
        return True

    def _put(self, path: Path, data: bytes, replace: bool = True) -> None:
        try:
            write_atomically(path, lambda stream: stream.write(data), replace=replace)
        except FileNotFoundError:
            if not path.exists():  # else another rank has finished the set, and removed what this one was writing
                raise

    def column(self, name: str) -> Iterator[Tensor]:
        """One tensor of every shard, in order.

        Raises:
            BrokenShard: if one of them cannot be read, or has no such tensor.
        """
        for shard in range(self.count):
            with self._opened(shard) as stored:
                tensor: Tensor = stored.get_tensor(name)
            yield tensor

    @contextlib.contextmanager
    def _opened(self, shard: int) -> Iterator[Any]:
        """The file of a shard, to be read.

        Raises:
            BrokenShard: if that fails.
        """
        try:
            with safe_open(self.path(shard), framework="pt") as stored:
                yield stored
        except (SafetensorError, OSError, ValueError) as error:
            raise BrokenShard(f"{self.path(shard).name} cannot be read: {error}") from error

    def verify(self, progress: Callable[[int], None] = lambda shard: None) -> list[str]:
        """What is wrong, a line each: shards that are missing, too many, or not what they were when written."""
        found = [f"{self.path(shard).name} is missing" for shard in self.missing()]
        found += [f"{name} does not belong to these {self.num} samples; remove it" for name in self._foreign()]
        index = read_index(self.folder)
        listed = _checksums(index)
        for shard in self.present():
            try:
                self._check(shard, listed)
            except BrokenShard as error:
                found.append(str(error))
            progress(shard)
        if not found and not index.get("complete"):
            found.append(f"{INDEX} does not say that the set is complete; start the same command again")
        return found

    def _check(self, shard: int, listed: Mapping[str, str]) -> None:
        """Read a shard and compare it with what it says of itself, and with the index.

        Raises:
            BrokenShard: if it differs.
        """
        name, about, samples = self.path(shard).name, self._about(shard, listed), self.samples(shard)
        with self._opened(shard) as stored:
            tensors = {key: stored.get_tensor(key) for key in sorted(stored.keys())}
        if any(tensor.shape[:1] != (len(samples),) for tensor in tensors.values()):
            raise BrokenShard(f"{name} does not hold {len(samples)} samples")
        if _digest(tensors) != about["sha256"] or listed.get(name) not in (None, about["sha256"]):
            raise BrokenShard(f"{name} is not what was written: its checksum differs")

    def _about(self, shard: int, listed: Mapping[str, str]) -> dict[str, Any]:
        """What a shard says of itself.

        Shards of earlier versions do not say their settings: such a one belongs here only if the index lists it.

        Raises:
            BrokenShard: if it cannot be read, lacks an entry, was made with other settings, or holds other samples.
        """
        name, samples = self.path(shard).name, self.samples(shard)
        with self._opened(shard) as stored:
            read = json.loads((stored.metadata() or {}).get(ABOUT, "{}"))
        about: dict[str, Any] = read if isinstance(read, dict) else {}
        if missing := [entry for entry in _SAYS if entry not in about]:
            raise BrokenShard(f"{name} lacks {', '.join(missing)} in the entry {ABOUT!r} of its metadata")
        known = about["settings"] == self._settings if "settings" in about else about["sha256"] == listed.get(name)
        if not known:
            raise BrokenShard(f"{name} was made with other settings, or by an earlier version")
        if (about["shard"], about["first"], about["count"]) != (shard, samples.start, len(samples)):
            raise BrokenShard(f"{name} holds other samples than {samples.start}..{samples.stop - 1}")
        return about

    @functools.cached_property
    def _settings(self) -> str:
        """Checksum of all that the samples depend on."""
        return hashlib.sha256(json.dumps(_flat(self._index()), sort_keys=True).encode()).hexdigest()

    def _index(self) -> dict[str, Any]:
        own = {"format": FORMAT, "num": self.num, "size": self.size, "settings": dict(self.settings), "complete": False}
        return dict(json.loads(_json(own)))  # as it comes back from the file


def opened(folder: Path) -> Shards:
    """The shards of a folder that was begun.

    Raises:
        ValueError: if it is none, or its index cannot be read.
    """
    index = read_index(folder)
    return Shards(folder, index["num"], index["size"], index["settings"])


def read_index(folder: Path) -> dict[str, Any]:
    """What the index says.

    Raises:
        ValueError: if there is none, or it cannot be read.
    """
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        if not _is_index(index):
            raise ValueError(f"not an index of format {FORMAT}")
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(folder)!r} must hold a readable {INDEX}: {error}") from error
    return dict(index)


def _is_index(index: Any) -> bool:  # noqa: ANN401 - whatever JSON holds
    """Whether an index has its entries, each of its kind."""
    entries: dict[str, Any] = {"shards": []} | index if isinstance(index, dict) else {}
    kinds = {"num": int, "size": int, "settings": dict, "shards": list}
    return (
        entries.get("format") == FORMAT
        and all(isinstance(entries.get(name), kind) for name, kind in kinds.items())
        and all(isinstance(shard, dict) and {"file", "sha256"} <= set(shard) for shard in entries["shards"])
    )


def _checksums(index: Mapping[str, Any]) -> dict[str, str]:
    """The checksum of every file that an index lists."""
    return {entry["file"]: entry["sha256"] for entry in index.get("shards", [])}


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Checksum of names, types, shapes and contents."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())  # NumPy has not all of torch's types
    return found.hexdigest()


def _flat(index: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of an index that a run must share with it."""
    return {"num": index["num"], "size": index["size"]} | dict(index["settings"])


def _json(value: object) -> bytes:
    return json.dumps(value, indent=1).encode() + b"\n"
