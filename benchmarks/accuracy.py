"""How true the parallel sampler is to the sequential one, on the shipped U-Net with the same noise, and at what cost.

    python benchmarks/accuracy.py [--num 4] [--steps 1000] [--methods ode sde] [--tols 3e-2 1e-2]
                                  [--threads 2] [--json accuracy.json]

Per method one sequential run, then ``piadm.sample`` at each tolerance.  "error" is the RMS difference per coordinate of
the final samples (data lie in [-1, 1]), worst over the samples, "typical" their median; "estimate" and "typical est."
are what the sampler itself believed them to be.  Errors should be within the tolerance, and estimates not below them.
"evaluations" are network rows per sample, "nodes" the most steps at which the network was called in a round;
"speed-up" is the sequential run's time over this run's.

The exact solution would call the network at every step for as many rounds as there are steps.  No run should need
that: the last line says whether all were within the tolerance, and in fewer rounds.
"""

from __future__ import annotations

import statistics
from collections import Counter

import torch
from _common import Row, options, print_table, write_json

import piadm
from piadm.timing import seconds

TOLERANCES = {"ode": [3e-2, 1e-2], "sde": [1e-1, 3e-2]}


def sequential_row(method: str, taken: float, solution: piadm.Solution) -> Row:
    """Figures of the sequential run, in the columns of the others."""
    rounds = solution.stats.rounds
    none = dict.fromkeys(("error", "typical", "estimate", "typical est.", "within"))
    cost = {"rounds": rounds, "evaluations": solution.stats.evaluations, "nodes": rounds}
    return {"method": method, "tol": "sequential", **none, **cost, **speed(taken, taken), "status": statuses(solution)}


def parallel_row(method: str, tol: float, solution: piadm.Solution, truth: piadm.Solution, times: Row) -> Row:
    """Figures of one parallel run."""
    apart = (solution.sample - truth.sample).flatten(1).square().mean(1).sqrt().tolist()
    estimate, stats = solution.error_estimate.tolist(), solution.stats
    return {
        "method": method,
        "tol": tol,
        "error": max(apart),
        "typical": statistics.median(apart),
        "estimate": max(estimate),
        "typical est.": statistics.median(estimate),
        "within": max(apart) <= tol,
        "rounds": stats.rounds,
        "evaluations": stats.evaluations,
        "nodes": stats.peak_states // len(apart),
        **times,
        "status": statuses(solution),
    }


def speed(taken: float, sequential: float) -> Row:
    return {"seconds": taken, "speed-up": sequential / taken}


def statuses(solution: piadm.Solution) -> str:
    return ", ".join(f"{count} {name}" for name, count in Counter(status.name for status in solution.status).items())


def figures(method: str, tols: list[float], num: int, steps: int) -> list[Row]:
    """One sequential run and a parallel run per tolerance."""
    denoiser, shape = piadm.load("fashion"), (num, 1, 28, 28)
    piadm.sample_sequential(denoiser, shape, method=method, steps=2)  # the first calls of a network are slow
    walked, truth = seconds(lambda: piadm.sample_sequential(denoiser, shape, method=method, steps=steps))
    rows = [sequential_row(method, walked, truth)]
    for tol in tols:
        taken, solution = seconds(lambda tol=tol: piadm.sample(denoiser, shape, method=method, steps=steps, tol=tol))
        rows.append(parallel_row(method, tol, solution, truth, speed(taken, walked)))
    return rows


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--num", type=int, default=4, help="samples (default %(default)s)")
    parser.add_argument("--steps", type=int, default=1000, help="steps of the default grid (default %(default)s)")
    parser.add_argument("--methods", nargs="+", choices=sorted(TOLERANCES), default=["ode", "sde"])
    parser.add_argument("--tols", nargs="+", type=float, help="for every method (default: two of its own for each)")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)

    rows: list[Row] = []
    for method in given.methods:
        rows += figures(method, given.tols or TOLERANCES[method], given.num, given.steps)
    print_table(rows)
    good = all(row["within"] and row["rounds"] < given.steps for row in rows if row["tol"] != "sequential")
    print(f"\nevery run within its tolerance, in fewer rounds than the exact solution takes: {'yes' if good else 'NO'}")
    write_json(given.json, given, accuracy=rows)


if __name__ == "__main__":
    main()
