"""``piadm.sample`` against its rivals at equal true error, seed by seed.

    python benchmarks/rivals.py [--num 16] [--trained 4] [--methods ode sde] [--threads 2] [--json rivals.json]

Every seed is a course of its own with one sample: same initial state, same noise, and each rival with the best of its
settings for that seed (``piadm compare`` looks for one setting that serves all samples of a batch).  Printed are
medians over the seeds of rounds and evaluations, each rival's ratio of ``sample``'s to its own, and what was aimed at.

Networks: "mixture", the ten narrow Gaussians of ``piadm compare``; "fashion", the shipped U-Net, with fewer seeds
(``--trained``), since it takes ten minutes (ODE) to twenty (SDE) each.  A line per finished seed goes to standard
error.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator

import torch
from _common import Row, options, print_table, write_json

import piadm
from piadm.cli.model import mixture
from piadm.rivals import Result, chosen, prepare, study

NETWORKS = {"mixture": (mixture, (1, 8, 8)), "fashion": (lambda: piadm.load("fashion"), (1, 28, 28))}

# (method, errors, rivals), and the ratios of rounds (and evaluations) aimed at for (method, error).
RACES = (("ode", (1e-2, 3e-3), ("dpm-solver", "unipc")), ("sde", (1e-2,), ("paradigms",)))
AIMS = {("ode", 1e-2): "1/3", ("ode", 3e-3): "1/4", ("sde", 1e-2): "0.4, 0.35"}


def race(name: str, method: str, errors: tuple[float, ...], names: tuple[str, ...], num: int) -> Iterator[Row]:
    """One row per error and rival."""
    build, shape = NETWORKS[name]
    denoiser, rivals = build(), [rival for one in ("sample", *names) for rival in chosen((one,))]
    found: list[tuple[Result, ...]] = []
    for seed in range(num):
        course = prepare(denoiser, (1, *shape), method=method, steps=1000, seed=seed)
        found.append(study(course, rivals, errors))
        print(f"{name} {method} seed {seed}: {_told(found[-1], errors)}", file=sys.stderr, flush=True)
    for error in errors:
        for place in range(1, len(rivals)):
            cells: Row = {"network": name, "method": method, "error": error, "seeds": num}
            for cost in ("rounds", "evaluations"):
                pairs = [[each[at].best(error, cost=cost) for at in (0, place)] for each in found]
                costs = [[getattr(run, cost) for run in pair if run is not None] for pair in pairs]
                ours, theirs = zip(*[pair for pair in costs if len(pair) == 2], strict=True)
                cells |= {
                    f"{cost}": statistics.median(ours),
                    f"rival's {cost}": statistics.median(theirs),
                    f"{cost} ratio": statistics.median(a / b for a, b in zip(ours, theirs, strict=True)),
                }
            yield {"rival": rivals[place].title(method), **cells, "aim": AIMS[method, error]}


def _told(results: tuple[Result, ...], errors: tuple[float, ...]) -> str:
    """The fewest rounds of each at each error, with their evaluations."""
    best = [(each.rival.name, error, each.best(error)) for error in errors for each in results]
    return ", ".join(f"{who} {error:g} {run.rounds}/{run.evaluations:g}" for who, error, run in best if run)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--num", type=int, default=16, help="seeds of the mixture (default %(default)s)")
    parser.add_argument("--trained", type=int, default=4, help="seeds of the shipped U-Net (default %(default)s)")
    parser.add_argument("--methods", nargs="+", choices=("ode", "sde"), default=["ode", "sde"])
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows: list[Row] = []
    for name, num in (("mixture", given.num), ("fashion", given.trained)):
        for method, errors, names in RACES:
            rows += race(name, method, errors, names, num) if num and method in given.methods else ()
    print_table(rows)
    write_json(given.json, given, rivals=rows)


if __name__ == "__main__":
    main()
