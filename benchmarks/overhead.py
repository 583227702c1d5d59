"""What everything but the network costs: time per round, time to set up, and memory in copies of the node states.

    python benchmarks/overhead.py [--repeats 5] [--memory 1000 32 3072] [--threads 2] [--json overhead.json]

Time.  The network is free and never settles, so that every round evaluates nearly all rows, samples x nodes (of the
SDE on few nodes four fifths, since rows share innovations).  What ten more rounds add to a run of one, over ten, is
what a round costs apart from the network; the rest of the run of one is the set-up: coefficients, condensed path and
noise; "the first" with settings of which no path is kept.  With nodes=None the network returns its input and a run goes
on to a tolerance of 1e-2, so its rounds differ: their mean is shown, and the set-up of further node sets is part of it.

A round should take at most 30 ms, or at most 3 % of the time that the shipped U-Net takes for the same rows (timed
here, in batches of 128); "within" says which of the two holds.

Again and again.  One sample of ten narrow Gaussians in 32 coordinates in closed form, a network as small as a policy's,
in milliseconds: with settings of which nothing is kept, with the same once more (median), and sequentially.

Memory.  A fresh process samples with a free network, and the growth of its peak resident memory over what it held
before is divided by the size of the node states, n x B x d x 4 bytes; one micro-batch of network input and output is
in it.  It should be at most 7 copies, and 10.5 where the first rounds are on few of the nodes, and beside them 70 MB of
temporaries whose size does not depend on the run's.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import torch
from _common import Row, options, print_table, write_json
from torch import Tensor

import piadm
from piadm.memory import COPIES
from piadm.models import MixtureDenoiser
from piadm.timing import seconds

BATCH, SIZE, MICRO = 16, 784, 128  # samples, coordinates, and network rows per call
EXTRA = 10  # rounds between the short and the long run
#: Share of the rows at least: the first state never moves, and its row is never evaluated twice; and where the SDE's
#: rows share innovations, on fewer nodes than steps, of which a fifth were not evaluated.
WHOLE, SHARING = 0.9, 0.75
MOST_SECONDS, MOST_SHARE, BESIDE_MB = 0.03, 0.03, 70.0
TINY, USUAL = 1e-30, 1e-2  # a tolerance that nothing meets, and one that is met
CASES: list[tuple[int, int | str | None]] = [(1000, "all"), (1000, 33), (1000, None), (100, 33)]


@dataclass
class Restless:
    """A network for free whose every output differs from the last one for the same row, so that no row settles."""

    rows_per_round: int
    seen: int = 0
    outputs: Tensor = field(default_factory=lambda: torch.linspace(-1.0, 1.0, 2 * MICRO * SIZE).view(2, MICRO, SIZE))

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        output = self.outputs[self.seen // self.rows_per_round % 2, : len(x)]
        self.seen += len(x)
        return output


def itself(x: Tensor, t: Tensor) -> Tensor:
    """The other network for free."""
    return x


def timed(method: str, steps: int, nodes: int | str | None, rounds: int | None) -> tuple[float, piadm.Stats]:
    """Wall time and counts of a run of so many rounds; None goes on to the tolerance."""
    rows = BATCH * (steps if isinstance(nodes, str) else nodes or 0)
    denoiser = piadm.Denoiser(Restless(rows) if rows else itself, piadm.VPSchedule(), "sample")
    shape, tol = (BATCH, SIZE), TINY if rows else USUAL
    taken, solution = seconds(
        lambda: piadm.sample(
            denoiser, shape, method=method, steps=steps, nodes=nodes, window=None if nodes is None else "all", tol=tol,
            max_rounds=rounds, max_batch=MICRO,
        )
    )  # fmt: skip
    stats = solution.stats
    least = SHARING if method == "sde" and nodes != "all" else WHOLE
    if rows and rounds is not None and (stats.rounds != rounds or stats.evaluations * BATCH < least * rounds * rows):
        raise RuntimeError(f"{rounds} rounds of {rows} rows were wanted, got {stats.rounds}, not all of them whole")
    return taken, stats


def time_case(method: str, steps: int, nodes: int | str | None, repeats: int, unet: float) -> Row:
    """The figures of one case; short and long runs take turns, so that a busy moment hits both."""
    per_round, set_up, first = [], [], []
    for repeat in range(repeats):
        new, _ = timed(method, steps - 1 - repeat, nodes, 1)  # settings that were not there before: nothing is kept
        short, one = timed(method, steps, nodes, 1)
        long, many = timed(method, steps, nodes, None if nodes is None else 1 + EXTRA)
        per_round.append((long - short) / (many.rounds - 1))
        set_up.append(short - per_round[-1])
        first.append(new - per_round[-1])
    rows = BATCH * (many.evaluations - one.evaluations) / (many.rounds - 1)
    took = statistics.median(per_round)
    share = took / (unet * rows)
    held = [name for name, good in (("30 ms", took <= MOST_SECONDS), ("3 %", share <= MOST_SHARE)) if good]
    return {
        "steps": steps,
        "nodes": str(nodes),
        "method": method,
        "rows": round(rows),
        "round, ms": 1e3 * took,
        "% of U-Net": 100 * share,
        "within": " and ".join(held) or "NEITHER",
        "set-up, ms": None if nodes is None else 1e3 * statistics.median(set_up),
        "the first, ms": None if nodes is None else 1e3 * statistics.median(first),
    }


@torch.no_grad()
def unet_seconds_per_row(calls: int = 5) -> float:
    """Median time of the shipped U-Net per row, in batches of 128."""
    network = piadm.load("fashion").network
    x, t = torch.randn(MICRO, 1, 28, 28), torch.linspace(0.0, 999.0, MICRO)
    network(x, t)
    return statistics.median(seconds(lambda: network(x, t))[0] for _ in range(calls)) / len(x)


def again(method: str, steps: int, repeats: int) -> Row:
    """Wall time of a small network's sample, the first and the next ones, and of the sequential sampler's."""
    centres = torch.randn(10, 32, generator=torch.Generator().manual_seed(0))
    denoiser = MixtureDenoiser(piadm.DiscreteSchedule.ddpm(), centres, 0.01)

    def run(count: int, sampler: Callable[..., piadm.Solution] = piadm.sample) -> tuple[float, piadm.Solution]:
        return seconds(lambda: sampler(denoiser, (1, 32), method=method, steps=count, seed=0))

    new, runs = [run(count)[0] for count in range(steps - repeats, steps)], [run(steps) for _ in range(1 + 2 * repeats)]
    took, stats = statistics.median(one for one, _ in runs[1:]), runs[0][1].stats
    row: Row = {"steps": steps, "method": method, "rounds": stats.rounds, "evaluations": stats.evaluations}
    in_turn, _ = run(steps, piadm.sample_sequential)
    return row | {"the first": 1e3 * statistics.median(new), "again": 1e3 * took, "in turn": 1e3 * in_turn}


def resident(entry: str) -> int:
    """Bytes of resident memory of this process: ``VmRSS`` now, ``VmHWM`` at most so far."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(entry))


def peak_copies(method: str, nodes: str | None, steps: int, batch: int, size: int, threads: int) -> tuple[int, float]:
    """Nodes of a run of four rounds, and its peak memory in copies of their states; run in a fresh process."""
    torch.set_num_threads(threads)
    denoiser = piadm.Denoiser(itself, piadm.VPSchedule(), "sample")
    given = dict(method=method, steps=steps, nodes=nodes, max_rounds=4, max_batch=MICRO)
    piadm.sample(denoiser, (1, 4), **given)  # loads what is loaded late, and keeps the path
    before = resident("VmRSS")
    held = piadm.sample(denoiser, (batch, size), **given).stats.nodes
    return held, (resident("VmHWM") - before) / (4 * held * batch * size)


def memory_case(method: str, nodes: str | None, steps: int, batch: int, size: int, threads: int) -> Row:
    """The figures of one case; the first rounds, on half of chosen nodes, may hold half as much again."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        held, copies = fresh.submit(peak_copies, method, nodes, steps, batch, size, threads).result()
    copy = 4e-6 * held * batch * size
    most = COPIES * (1.0 if nodes == "all" else 1.5) + BESIDE_MB / copy
    row: Row = {"n x B x d": f"{held} x {batch} x {size}", "method": method, "MB a copy": copy}
    return row | {"copies": copies, "at most": most, "held": copies <= most}


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="pairs of runs per case (default %(default)s)")
    parser.add_argument(
        "--memory", type=int, nargs=3, default=[1000, 32, 3072], metavar=("N", "B", "D"), help="nodes, batch, dimension"
    )
    given = parser.parse_args()
    torch.set_num_threads(given.threads)

    unet = unet_seconds_per_row()
    print(f"shipped U-Net: {1e3 * unet:.3g} ms per row\n")
    times = [time_case(m, steps, nodes, given.repeats, unet) for steps, nodes in CASES for m in ("sde", "ode")]
    print_table(times)
    print()
    small = [again(method, steps, given.repeats) for steps in (100, 1000) for method in ("sde", "ode")]
    print_table(small)
    memory = []
    if Path("/proc/self/status").exists():
        cases = [(method, nodes) for nodes in ("all", None) for method in ("sde", "ode")]
        memory = [memory_case(*case, *given.memory, given.threads) for case in cases]
        print()
        print_table(memory)
    else:
        print("\nmemory is measured on Linux only")
    write_json(given.json, given, unet=[{"ms per row": 1e3 * unet}], time=times, again=small, memory=memory)


if __name__ == "__main__":
    main()
