"""Processes for tests of ranks: forked from a server that has imported everything, so that a group starts at once."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch.distributed", "torch.testing", "pytest", "piadm.cli.app"])

#: Seconds after which a rank that has not ended counts as hanging; the tests' own time limits are far below.
PATIENCE = 60.0


@dataclass(frozen=True)
class Ended:
    """How a rank ended: what it returned or raised (None if it was killed), its exit code, and after how long."""

    value: Any
    error: str | None
    code: int | None
    seconds: float


def group(count: int, program: Callable[..., Any], *given: object, patience: float = PATIENCE) -> list[Ended]:
    """Run ``program(rank, *given)`` on every rank of a new gloo group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    began, pipes, processes = time.monotonic(), [], []
    for rank in range(count):
        ours, theirs = SERVER.Pipe()
        process = SERVER.Process(target=_work, args=(theirs, rank, count, port, program, given))
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    ended = [_end(pipe, began, patience) for pipe in pipes]
    for process in processes:
        process.join(5)
    codes = [process.exitcode for process in processes]
    for process in processes:
        if process.is_alive():
            process.kill()
    return [Ended(*one[:2], code, one[2]) for one, code in zip(ended, codes, strict=True)]


def values(ended: Sequence[Ended]) -> list[Any]:
    """What the ranks returned; none of them may have failed."""
    assert [one.error for one in ended] == [None] * len(ended)
    return [one.value for one in ended]


def _end(pipe: Connection, began: float, patience: float) -> tuple[Any, str | None, float]:
    value, error = None, "it was killed or hangs"
    try:
        if pipe.poll(max(0.0, patience - (time.monotonic() - began))):
            value, error = pickle.loads(pipe.recv_bytes())
    except EOFError:
        pass
    return value, error, time.monotonic() - began


def _work(pipe: Connection, rank: int, count: int, port: int, program: Callable[..., Any], given: tuple[Any]) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=count, timeout=timedelta(seconds=30))
    dist.barrier()  # a rank that is done at once would break the connections of those that still connect
    try:
        said: tuple[Any, str | None] = program(rank, *given), None
    except BaseException as error:
        said = None, f"{type(error).__name__}: {error}"
    pipe.send_bytes(pickle.dumps(said))  # whole: tensors are otherwise sent as handles, which end with the process
    pipe.close()
    os._exit(0)  # a rank that was told of a fault need not tidy up
