"""Memory that the states of a run will take, compared with what is free before the run starts."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from piadm.reference import NOISE_CHUNK

#: Most copies of the node states that a run holds: reference states, states, residuals and temporaries of a round;
#: measured by ``benchmarks/overhead.py``.
COPIES = 7


def needed(nodes: int, batch: int, size: int, itemsize: int, kept: int = 0) -> int:
    """Bytes that the states of a run take at most, ``(7 n + 64 + k) B d`` numbers.

    Args:
        nodes: nodes ``n`` of its path.
        batch: number of samples ``B``.
        size: coordinates ``d`` of a sample.
        itemsize: bytes of a number.
        kept: states ``k`` along the path that are kept for the caller.
    """
    return (COPIES * nodes + NOISE_CHUNK + kept) * batch * size * itemsize


def free(device: torch.device) -> int | None:
    """Bytes that are free on a device, or None if that is unknown."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    found = [_available(), _left_of_the_container()] if device.type == "cpu" else []
    return min((number for number in found if number is not None), default=None)


def fitting(samples: int, device: torch.device, dtype: torch.dtype, nodes: int, size: int) -> int:
    """How many of ``samples`` samples of ``size`` coordinates fit into the free memory, on ``nodes`` nodes."""
    room = free(device)
    return samples if room is None else min(samples, room // needed(nodes, 1, size, dtype.itemsize))


def refuse_excess(
    shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, nodes: int, kept: int = 0
) -> None:
    """Refuse a run whose states do not fit into memory.

    The memory of the network is not known and not counted, nor are the finer nodes that some samples may move on to:
    if these do not fit, such samples take turns.

    Args:
        shape: ``(B, *sample_shape)``.
        device: where the states are to be.
        dtype: their type.
        nodes: nodes of the longest path.
        kept: states along the path that are kept for the caller.

    Raises:
        ValueError: naming what is needed, what is free, and the largest batch, or number of nodes, that fits.
    """
    room, batch, size, itemsize = free(device), shape[0], math.prod(shape[1:]), dtype.itemsize
    wanted = needed(nodes, batch, size, itemsize, kept)
    if room is None or wanted <= room:
        return
    most = room // needed(nodes, 1, size, itemsize, kept)
    fits = f"at most shape[0] = {most} fits"
    if most == 0:
        left = room // (size * itemsize) - NOISE_CHUNK - kept
        fits = f"of one sample at most {max(0, left // COPIES)} nodes (or steps of a block) fit"
    raise ValueError(
        f"shape {shape} on {nodes} nodes needs about {_gigabytes(wanted)} for states, and {_gigabytes(room)} are free "
        f"on {device}: {fits}"
    )


def _available() -> int | None:
    """What the kernel could give without swapping; on Linux."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None


def _left_of_the_container() -> int | None:
    """What is left of the limit that a container or a batch job has; with control groups of version 2.

    The kernel counts cached pages of files as used and drops them when memory is short, the inactive ones first.
    """
    try:
        limit, used, stat = (
            Path(f"/sys/fs/cgroup/memory.{name}").read_text(encoding="ascii") for name in ("max", "current", "stat")
        )
        entries = dict(line.split() for line in stat.splitlines())
        return int(limit) - int(used) + int(entries.get("inactive_file", 0))
    except (OSError, ValueError):  # no such file, or "max": no limit
        return None


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB"
