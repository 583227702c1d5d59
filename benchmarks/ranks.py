"""What sharing out the rows of a round over ranks costs, and gains: gloo, on this machine.

    python benchmarks/ranks.py [--ranks 1 2 4] [--rows 32] [--row-ms MS] [--rounds 4] [--json ranks.json]

The network's compute is a sleep, so that a machine of few cores can show what one core per rank would: ``--row-ms`` per
row, by default what the U-Net of 30 million parameters takes here, in one thread and batches of 8.  One sample of
3 x 32 x 32 numbers, a path of ``--rows`` nodes that never settles, so that every round evaluates all but one of them.
What ``--rounds`` more rounds add to a run, over their number, is a round.

overhead   The part of a round that is not the sleep of the largest share: headers, gathering, what all rounds do.
           Aim: at most 10 % of the round with 8 rows per rank.
against 1  The round's time over that of one rank.  Aim: at most 0.35 with 4 ranks.
difference The largest difference of the samples from those of one rank.  Aim: at most 1e-6.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from _common import Row, options, print_table, write_json
from _networks import SHAPE, unet
from torch import Tensor

import piadm
from piadm.timing import seconds

MOST_OVERHEAD, MOST_OF_ONE, MOST_DIFFERENCE, BATCH, FEW = 0.10, 0.35, 1e-6, 8, 2


class Sleeper:
    """A network that takes its time and whose answers to the same row differ from call to call, as all ranks' do."""

    def __init__(self, per_row: float) -> None:
        self.per_row, self.calls = per_row, 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        time.sleep(self.per_row * len(x))
        return torch.tanh(x if self.calls % 2 else -x)


@torch.no_grad()
def seconds_per_row() -> float:
    """Of the U-Net of 30 million parameters, here."""
    network, x, t = unet("30M"), torch.randn(BATCH, *SHAPE), torch.zeros(BATCH)
    network(x, t)
    return statistics.median(seconds(lambda: network(x, t))[0] for _ in range(3)) / BATCH


def run(rank: int, count: int, folder: str, rows: int, per_row: float, rounds: int) -> None:
    """A short and a long run on one rank, after one that sets up what both find; rank 0 writes down what was found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet{count}", rank=rank, world_size=count)
    took, evaluated = [], []
    for length in (FEW, FEW, FEW + rounds):
        denoiser = piadm.Denoiser(Sleeper(per_row), piadm.VPSchedule(), "sample")
        given = dict(method="ode", steps=1000, nodes=rows, window="all", tol=1e-30, max_rounds=length)
        taken, found = seconds(lambda denoiser=denoiser, given=given: piadm.sample(
            denoiser, (1, *SHAPE), **given, workers=piadm.Ranks(timeout=120)))  # fmt: skip
        took.append(taken)
        evaluated.append(found.stats.evaluations)
    if rank == 0:
        more = (took[-1] - took[-2]) / rounds, (evaluated[-1] - evaluated[-2]) / rounds
        torch.save((*more, found.sample), Path(folder) / f"found{count}")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rows", type=int, default=32, help="nodes of the path (default %(default)s)")
    parser.add_argument("--row-ms", type=float, help="milliseconds of network time per row; by default measured")
    parser.add_argument("--rounds", type=int, default=4)
    given = parser.parse_args()
    torch.set_num_threads(1)
    per_row = seconds_per_row() if given.row_ms is None else given.row_ms / 1e3
    print(f"network: {1e3 * per_row:.3g} ms per row\n")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for count in given.ranks:
            mp.spawn(run, (count, folder, given.rows, per_row, given.rounds), nprocs=count)
            took, evaluated, sample = torch.load(Path(folder) / f"found{count}")
            if not rows:
                one, alone = took, sample
            asleep = per_row * math.ceil(evaluated / count)
            difference = float((sample - alone).abs().max())
            rows.append({
                "ranks": count, "rows a rank": evaluated / count, "round, ms": 1e3 * took,
                "asleep, ms": 1e3 * asleep, "overhead, ms": 1e3 * (took - asleep),
                "overhead, %": 100 * (took - asleep) / took, "against 1": took / one, "difference": difference,
                "within": took - asleep <= MOST_OVERHEAD * took and difference <= MOST_DIFFERENCE
                and (count != 4 or took <= MOST_OF_ONE * one),
            })  # fmt: skip
    print_table(rows)
    write_json(given.json, given, network=[{"ms per row": 1e3 * per_row}], ranks=rows)


if __name__ == "__main__":
    main()
