"""``piadm sample --out FOLDER``: as many samples as wanted, in shards, by any number of processes and starts."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import piadm
from piadm._checks import positive_int
from piadm.cli import files, progress
from piadm.cli.given import Conditions
from piadm.cli.interrupts import interrupts
from piadm.cli.model import ModelName
from piadm.network import network_device
from piadm.shards import Shards, read_index
from piadm.solution import Status
from piadm.workers.fingerprint import fingerprint

if TYPE_CHECKING:
    from piadm.denoiser import Denoiser

#: Statuses as they are stored: their places in this tuple.
STATUSES = tuple(Status)


@dataclass(frozen=True)
class Layout:
    """How samples are stored and batched; what they are depends on it to rounding.

    Raises:
        ValueError: If a number is not positive.
    """

    shard: int
    batch: int

    def __post_init__(self) -> None:
        positive_int("--shard", self.shard)
        positive_int("--batch", self.batch)


@dataclass(frozen=True)
class LongRun:
    """One process's part of a long run.

    Attributes:
        out: The folder.
        num: Number of samples.
        seed: Seed; sample ``i`` has the noise of (seed, i), wherever it is computed.
        layout: Shards and batches.
        model: The model, and where it is to be.
        condition: The network's conditions.
        threads: CPU threads; None: as the folder was begun, or torch's own choice.
        arguments: The other arguments of ``piadm.sample``.
    """

    out: Path
    num: int
    seed: int
    layout: Layout
    model: ModelName
    condition: Conditions
    threads: int | None
    arguments: dict[str, Any]

    def shards(self, denoiser: Denoiser, threads: int) -> Shards:
        """The folder's shards, with all that their bits depend on."""
        device = network_device(denoiser.network) or torch.device("cpu")
        settings = {"seed": self.seed, "batch": self.layout.batch, **self.arguments}
        settings |= {"device": device.type, "threads": threads, "model": fingerprint(denoiser)}
        settings |= {"shape": list(self.model.sample_shape()), "condition": self.condition.digest()}
        settings |= {"piadm": piadm.__version__, "torch": str(torch.__version__)}
        return Shards(self.out, self.num, self.layout.shard, settings)


def check_folder(option: str, path: Path) -> None:
    """Check that a folder is there or can be made, and be written to.

    Raises:
        ValueError: If not.
    """
    if path.is_file() or path.is_symlink() and not path.exists():
        other = "another file" if path.is_file() else "a link to nothing"
        raise ValueError(f"{option} must name a .png file or a folder, but {str(path)!r} is {other}")
    if path.exists():
        files.check_writable(option, path / "index.json", ".json")
    elif not path.parent.is_dir():
        raise ValueError(f"{option} must lie in an existing folder, but {str(path.parent)!r} is none")


def place() -> tuple[int, int, int]:
    """This process's rank, the number of ranks and its number on this machine, as torchrun says; alone: 0, 1, 0.

    Raises:
        ValueError: If what the environment says is none: such a process would leave shards out, or share none.
    """
    names = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    told = {name: os.environ.get(name, alone) for name, alone in names.items()}
    rank, ranks, local = (int(number) if number.isdecimal() else -1 for number in told.values())
    if not (0 <= rank < ranks and local >= 0):
        said = ", ".join(f"{name}={number!r}" for name, number in told.items())
        raise ValueError(f"the environment must say 0 <= RANK < WORLD_SIZE, as torchrun does, or nothing, got {said}")
    return rank, ranks, local


def run(settings: LongRun, figures: Path | None) -> None:
    """Compute what is missing, shard by shard, and say what is there.

    Args:
        settings: What to sample.
        figures: Where to write every printed figure, as JSON.

    Raises:
        KeyboardInterrupt: If Ctrl-C cut it short; started again it goes on.
        ValueError: If the model cannot be loaded or sampled, or the folder was begun with other settings.
        OSError: If a shard cannot be written; the others stay.
    """
    rank, ranks, local = place()
    model = settings.model
    if model.device == "cuda" and ranks > 1:
        model = replace(model, device=f"cuda:{local}")
    threads = settings.threads or _begun_threads(settings.out) or torch.get_num_threads()
    torch.set_num_threads(threads)
    denoiser = model.load()
    settings.out.mkdir(exist_ok=True)
    shards = settings.shards(denoiser, threads)
    shards.begin()
    began, had = time.monotonic(), _present(shards)
    with interrupts() as check, progress.bar(f"{settings.num} samples", shown=rank == 0) as update:
        for shard in shards.order(rank, ranks):
            parts = []
            for batch in _batches(shards.samples(shard), settings.layout.batch):
                parts.append(_sample(denoiser, settings, batch))
                check()
                if rank == 0:
                    update(*_done(shards, had, time.monotonic() - began, sum(len(one["status"]) for one in parts)))
            shards.write(shard, {name: torch.cat([part[name] for part in parts]) for name in parts[0]})
    shards.finish()
    if rank == 0:
        _say(shards, time.monotonic() - began, had, figures)


def _begun_threads(folder: Path) -> int | None:
    """Threads with which the folder was begun, if it says: their number can change the last bit of a sample."""
    begun = read_index(folder)["settings"].get("threads") if (folder / "index.json").exists() else None
    return begun if isinstance(begun, int) else None


def _batches(samples: range, size: int) -> Iterator[range]:
    yield from (samples[first : first + size] for first in range(0, len(samples), size))


def _sample(denoiser: Denoiser, settings: LongRun, samples: range) -> dict[str, Tensor]:
    """One batch, as it is stored.

    Raises:
        KeyboardInterrupt: If it was interrupted.
    """
    seed = [(settings.seed, sample) for sample in samples]
    shape = (len(samples), *settings.model.sample_shape())
    with progress.quiet():
        found = piadm.sample(
            denoiser, shape, seed=seed, condition=settings.condition.rows(samples), **settings.arguments
        )
    if Status.INTERRUPTED in found.status:
        raise KeyboardInterrupt
    return {
        "sample": found.sample.cpu(),
        "status": torch.tensor([STATUSES.index(status) for status in found.status], dtype=torch.uint8, device="cpu"),
        "error_estimate": found.error_estimate,
        "rounds": found.stats.rounds_per_sample,
        "evaluations": found.stats.evaluations_per_sample,
    }


def _done(shards: Shards, had: int, seconds: float, at_work: int) -> tuple[float, str]:
    """How far the whole run is, on all ranks, and in words: the rate, and the time left at that rate."""
    done = min(shards.num, _present(shards) + at_work)
    rate = max(1, done - had) / seconds
    left = time.strftime("%H:%M:%S", time.gmtime((shards.num - done) / rate % 86400))
    days = int((shards.num - done) / rate // 86400)
    return done / shards.num, f"{done} done, {rate:.3g} a second, {f'{days} d ' if days else ''}{left} left"


def _present(shards: Shards) -> int:
    """Number of samples that are there."""
    return sum(len(shards.samples(shard)) for shard in shards.present())


def _say(shards: Shards, seconds: float, had: int, path: Path | None) -> None:
    """Write and print what the folder holds; the file first, since a pipe may be closed."""
    found: Counter[str] = Counter()
    for status in shards.column("status"):
        found.update(STATUSES[code].name for code in status.tolist())
    fresh = shards.num - had
    if path is not None:
        figures = {"folder": str(shards.folder), "samples": shards.num, "shards": shards.count, "new": fresh}
        files.write_json(path, figures | {"seconds": seconds, "status": found})
    screen = progress.console()
    screen.print(f"{shards.num} samples in {shards.count} shards: {shards.folder}", soft_wrap=True, markup=False)
    screen.print(f"{fresh} of them new, in {seconds:.1f} s, on all ranks", soft_wrap=True, markup=False)
    screen.print(", ".join(f"{count} {name}" for name, count in sorted(found.items())), markup=False)
