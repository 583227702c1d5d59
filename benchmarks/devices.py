"""What this device makes of rounds and evaluations: one script, for a CPU or a GPU.

    python benchmarks/devices.py [--device cpu] [--tables latency overhead samplers sizes] [--batches 1 16]
                                 [--networks shipped 1M 30M 400M] [--modes eager compiled] [--steps 1000] [--error 1e-2]
                                 [--samplers sequential dpm-solver paradigms sample] [--methods ode sde]
                                 [--figure devices.png] [--json devices.json]

latency   Time of one network call against its number of rows.  The shipped U-Net is trained; the others, of 1, 30 and
          400 million parameters, have random weights: of them only the time means anything.
samplers  The shipped U-Net: the sequential sampler, DPM-Solver++ 2M, ParaDiGMS's rule and piadm.sample, each with the
          setting of fewest rounds whose samples are all within ``--error`` of the sequential ones, for every batch.
overhead  What a round of piadm.sample takes beside the network: the shipped U-Net, one sample, window 16.  Aim: at most
          5 % of the time on a CPU, 1 ms a round on a GPU.
sizes     The same as samplers for the other networks, computed: their latency at the rows that a round has, times the
          rounds that the *shipped* network took.  A trained network of that size would take rounds of its own.

"compiled" is ``piadm.CompiledNetwork``, on a GPU with CUDA graphs.  The first call of each kind is not timed.  On a CPU
compiling takes minutes for every number of rows: ``--modes eager`` leaves it out.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from _common import Row, options, print_table, write_json
from _networks import SHAPE, SIZES, unet

import piadm
from piadm.cost import Latency
from piadm.rivals import chosen, prepare, study
from piadm.rivals.course import Course
from piadm.rivals.drive import Budget
from piadm.rivals.rival import Rival
from piadm.timing import median_seconds, seconds

ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 256]
RIVALS = {"ode": ("sequential", "dpm-solver", "paradigms", "sample"), "sde": ("sequential", "paradigms", "sample")}
LONGEST = 60.0  # seconds of one call, after which larger ones are left out
Network = Callable[..., object]


def network(name: str, mode: str, device: str) -> tuple[Network, tuple[int, ...]]:
    """A network and the shape of its samples."""
    if name == "shipped":
        found, shape = piadm.load("fashion", device=device).network, (1, 28, 28)
    else:
        found, shape = unet(name, device), SHAPE
    return wrapped(found, mode, device), shape


def wrapped(found: Network, mode: str, device: str) -> Network:
    """The network as the mode has it."""
    return found if mode == "eager" else piadm.CompiledNetwork(found, cuda_graph=device != "cpu")


@torch.no_grad()
def latencies(name: str, mode: str, device: str, sizes: list[int]) -> list[Row]:
    """Seconds of a call, by its rows."""
    found, shape = network(name, mode, device)
    table: list[Row] = []
    for rows in sizes:
        x, t = torch.randn(rows, *shape, device=device), torch.full((rows,), 500.0, device=device)
        took = median_seconds(lambda x=x, t=t: found(x, t), device)
        table.append({"network": name, "mode": mode, "rows": rows, "ms": 1e3 * took, "rows/s": rows / took})
        if took > LONGEST:
            break
    return table


def samplers(
    names: list[str], method: str, batch: int, mode: str, device: str, steps: int, error: float
) -> list[Row]:
    """Every one of the samplers at its best on the shipped network."""
    denoiser = piadm.load("fashion", device=device)
    denoiser = replace(denoiser, network=wrapped(denoiser.network, mode, device))
    course = prepare(denoiser, (batch, 1, 28, 28), method=method, steps=steps)
    rivals = [rival for name in RIVALS[method] if name in names for rival in chosen((name,))]
    table: list[Row] = []
    for result in study(course, rivals, (error,)):
        best = result.best(error)
        row: Row = {"method": method, "batch": batch, "mode": mode, "sampler": result.rival.title(method)}
        row |= {"setting": None, "rounds": None, "evaluations": None, "worst error": None, "seconds": None}
        if best is not None:
            took = again(course, result.rival, best.setting, device)
            row |= {"setting": best.setting, "rounds": best.rounds, "evaluations": best.evaluations}
            row |= {"worst error": best.worst, "seconds": took}
        table.append(row)
    slow = table[0]["seconds"]
    return [row | {"times faster": slow / row["seconds"] if slow and row["seconds"] else None} for row in table]


def again(course: Course, rival: Rival, label: str, device: str) -> float:
    """Time of a setting once everything is warm; the sequential sampler's, which the course keeps, anew."""
    rung = next(rung for ladder in rival.ladders(course) for rung in ladder if rung.label == label)

    def run() -> None:
        if rival.name == "sequential":
            piadm.sample_sequential(
                course.denoiser, course.shape, method=course.method, grid=course.grid, seed=course.seed
            )
        else:
            rung.run(course, Budget())

    return seconds(run, device)[0]


class Stopwatch:
    """A network, and the seconds that it has taken."""

    def __init__(self, inner: Network, device: str) -> None:
        self.inner, self.device, self.seconds = inner, device, 0.0

    def parameters(self) -> object:
        return self.inner.parameters()

    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> object:
        took, output = seconds(lambda: self.inner(x, t), self.device)
        self.seconds += took
        return output


def overhead(method: str, mode: str, device: str, steps: int) -> Row:
    """What rounds take beside the network, from callback to callback, and the rest: setting up node sets."""
    denoiser = piadm.load("fashion", device=device)
    found, rounds, whole = wrapped(denoiser.network, mode, device), [], []
    for seed in range(4):  # the first one is warm-up
        watch, seen = Stopwatch(found, device), []
        stats = piadm.sample(
            replace(denoiser, network=watch), (1, 1, 28, 28), method=method, steps=steps, window=16, seed=seed,
            callback=lambda info, watch=watch, seen=seen: seen.append((time.perf_counter(), watch.seconds)),
        ).stats  # fmt: skip
        if seed:
            rounds += [(end - begin, network - before) for (begin, before), (end, network) in pairwise(seen)]
            whole.append(1 - watch.seconds / stats.wall_time)
    beside = statistics.median(took - network for took, network in rounds)
    part = statistics.median(1 - network / took for took, network in rounds)
    good = beside <= 1e-3 if device != "cpu" else part <= 0.05
    row: Row = {"method": method, "mode": mode, "nodes": stats.nodes, "rounds": stats.rounds}
    row |= {"beside the network, ms a round": 1e3 * beside, "% of a round": 100 * part, "within": good}
    return row | {"% of the run, set-up included": 100 * statistics.median(whole)}


def computed(measured: list[Row], calls: list[Row], names: list[str]) -> list[Row]:
    """What the samplers' rounds would take on the other networks."""
    table: list[Row] = []
    for name in names:
        for row in measured:
            known = Latency()
            for one in calls:
                if (one["network"], one["mode"]) == (name, row["mode"]):
                    known.add(one["rows"], one["ms"] / 1e3)
            if row["rounds"] is None or not known.seconds:
                continue
            took = row["rounds"] * known.of(row["batch"] * row["evaluations"] / row["rounds"])
            kept = {key: row[key] for key in ("method", "batch", "mode", "sampler", "rounds", "evaluations")}
            table.append({"network": f"{name} (rounds of the shipped)", **kept, "network seconds": took})
    return table


def draw(path: Path, calls: list[Row], title: str) -> None:
    """Latency against rows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, mode in dict.fromkeys((row["network"], row["mode"]) for row in calls):
        line = [row for row in calls if (row["network"], row["mode"]) == (name, mode)]
        axes.loglog([row["rows"] for row in line], [row["ms"] for row in line], "o-", label=f"{name}, {mode}")
    axes.set(xlabel="rows of a call", ylabel="milliseconds", title=title)
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tables", nargs="+", default=["latency", "overhead", "samplers", "sizes"])
    parser.add_argument("--networks", nargs="+", choices=["shipped", *SIZES], default=["shipped", *SIZES])
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS, help="rows of the calls that are timed")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--modes", nargs="+", choices=["eager", "compiled"], default=["eager", "compiled"])
    parser.add_argument("--samplers", nargs="+", choices=RIVALS["ode"], default=RIVALS["ode"])
    parser.add_argument("--methods", nargs="+", choices=list(RIVALS), default=list(RIVALS))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--error", type=float, default=1e-2)
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw the latencies here")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    on_gpu = given.device != "cpu"
    title = torch.cuda.get_device_name(given.device) if on_gpu else f"CPU, {given.threads} threads"
    print(f"{title}, {time.strftime('%Y-%m-%d')}, torch {torch.__version__}")
    calls: list[Row] = []
    if "latency" in given.tables:
        for name in given.networks:
            for mode in given.modes:
                calls += latencies(name, mode, given.device, sorted(given.rows))
                print_table(calls[-len(given.rows) :])
    beside: list[Row] = []
    if "overhead" in given.tables:
        beside = [overhead(method, mode, given.device, given.steps) for method in given.methods for mode in given.modes]
        print_table(beside)
    measured: list[Row] = []
    if "samplers" in given.tables:
        for method in given.methods:
            for batch in given.batches:
                for mode in given.modes:
                    names = ["sequential", *given.samplers]  # the first one is what times are compared with
                    measured += samplers(names, method, batch, mode, given.device, given.steps, given.error)
        print_table(measured)
    sizes = computed(measured, calls, [name for name in given.networks if name != "shipped"])
    if "sizes" in given.tables and sizes:
        print_table(sizes)
    if given.figure is not None and calls:
        draw(given.figure, calls, title)
    tables = {"latency": calls, "overhead": beside, "samplers": measured, "sizes": sizes}
    write_json(given.json, given, device=[{"name": title}], **tables)


if __name__ == "__main__":
    main()
