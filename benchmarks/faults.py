"""How soon a fault on one of four ranks ends the run on all of them, with the default time limit, and what they say.

    python benchmarks/faults.py [--timeout 30] [--json faults.json]

In the fourth network call of rank 2 it is killed (SIGKILL), raises, or sleeps for ever; in runs that share out rows
and in runs that share out samples.  Aim: every rank ends within the time limit, and all name rank 2.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from _common import Row, options, print_table, write_json
from torch import Tensor

import piadm

RANKS, BAD, CALL = 4, 2, 4
FAULTS = ("killed", "raises", "sleeps")


class Faulty:
    """A network of which one call goes wrong, if there is a fault."""

    def __init__(self, fault: str | None, mark: Path) -> None:
        self.fault, self.mark, self.calls = fault, mark, 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        if self.fault is not None and self.calls == CALL:
            self.mark.write_text(str(time.time()))
            if self.fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.fault == "raises":
                raise RuntimeError("a bad layer")
            time.sleep(1e6)
        return torch.tanh(x)


def work(rank: int, folder: Path, fault: str, split: str, timeout: float) -> None:
    """One rank; what it was told goes to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    denoiser = piadm.Denoiser(Faulty(fault if rank == BAD else None, folder / "began"), piadm.VPSchedule(), "sample")
    given = dict(method="ode", steps=48, nodes=16, tol=1e-9, max_rounds=20)
    try:
        piadm.sample(denoiser, (RANKS, 8), **given, workers=piadm.Ranks(timeout=timeout, split=split))
    except piadm.NetworkError as error:
        (folder / f"told{rank}").write_text(f"{time.time()} {error}")
    os._exit(0)


def case(fault: str, split: str, timeout: float) -> Row:
    """One run."""
    with tempfile.TemporaryDirectory() as name:
        folder, context = Path(name), multiprocessing.get_context("spawn")
        ranks = [context.Process(target=work, args=(rank, folder, fault, split, timeout)) for rank in range(RANKS)]
        for one in ranks:
            one.start()
        for one in ranks:
            one.join(3 * timeout)
        hanging = sum(one.is_alive() for one in ranks)
        for one in ranks:
            one.kill()
        began = float((folder / "began").read_text())
        told = [path.read_text().split(" ", 1) for path in sorted(folder.glob("told*"))]
        last = max((float(when) for when, _ in told), default=began) - began
        said = {text for _, text in told}
        wanted = RANKS - (fault == "killed")
        good = not hanging and last <= timeout and len(told) == wanted and all(f"rank {BAD}" in text for text in said)
        return {"fault": fault, "shared out": split, "ended after, s": last, "told": len(told), "hanging": hanging,
                "within": good, "first message": min(said, default="")}  # fmt: skip


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--timeout", type=float, default=30.0, help="of piadm.Ranks (default %(default)s)")
    given = parser.parse_args()
    rows = [case(fault, split, given.timeout) for fault in FAULTS for split in ("rows", "samples")]
    print_table(rows)
    write_json(given.json, given, faults=rows)


if __name__ == "__main__":
    main()
