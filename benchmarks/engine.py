"""What ``piadm.sample`` costs and how true it is, line by line against what it was built for.

    python benchmarks/engine.py [--tables targets truth windows short time]
                                [--networks mixture digits fashion wide table] [--methods ode sde]
                                [--num 16] [--threads 2] [--json engine.json]

Every error is the RMS difference per coordinate from the sequential sampler's result on the same grid and noise, sample
by sample.  Rounds are sequential batched network calls and evaluations network rows, all of them; medians are over
samples.  Networks: "fashion", the shipped U-Net; "mixture", the ten narrow Gaussians of ``piadm compare``; "digits", a
Gaussian of standard deviation 0.1 about each of scikit-learn's 1797 images of 8 x 8 pixels, the hardest of the three:
its paths run along borders between hundreds of components.  "wide", a mixture three times as wide as is told, and
"table", which adds a vector of its own at every time step, as a table of times does, are studied if they are named.

targets   1000 steps, tol 1e-2: rounds, evaluations and true errors, beside what was aimed at.
truth     Of samples reported CONVERGED, how many are within the tolerance, the worst and the median error over it.
windows   Rounds against evaluations, for several windows.
short     50 and 100 steps.
time      One sample of the shipped U-Net: wall time against the sequential sampler's, in the same run.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from _common import Row, options, print_table, write_json
from torch import Tensor

import piadm
from piadm.cli.model import mixture
from piadm.models import MixtureDenoiser
from piadm.timing import seconds

TARGETS = {  # (method, nodes): rounds, evaluations aimed at
    ("ode", None): (6, 70),
    ("sde", None): (11, 650),
    ("sde", "all"): (11, 6000),
}
TOLERANCES = (3e-2, 1e-2, 3e-3)
WINDOWS: tuple[int | str | None, ...] = (None, 64, 32, 16, 8, 4)
ALL_NODES = 4  # samples of the U-Net with every step a node, which takes long


def digits() -> piadm.Denoiser:
    """A Gaussian about each of scikit-learn's digits, scaled to [-1, 1]."""
    from sklearn.datasets import load_digits

    images = torch.tensor(load_digits().images.reshape(-1, 64)) / 8 - 1
    return MixtureDenoiser(piadm.DiscreteSchedule.ddpm(), images, 0.01)


def wide() -> piadm.Denoiser:
    """Narrow Gaussians with three times the standard deviation that is told."""
    means = 3 * torch.randn(10, 16, generator=torch.Generator().manual_seed(0)).double()
    exact = MixtureDenoiser(piadm.DiscreteSchedule.ddpm(), means, 0.04)
    return replace(exact, data_mean=0.0, data_variance=1.0)


def table() -> piadm.Denoiser:
    """Six Gaussians, and a vector of 0.02 that is drawn for every time step."""
    means = torch.randn(6, 4, generator=torch.Generator().manual_seed(3))
    added = 0.02 * torch.randn(1000, 4, generator=torch.Generator().manual_seed(4))
    exact = MixtureDenoiser(piadm.DiscreteSchedule.ddpm(), means, 0.3)
    return replace(exact, network=lambda x, t: exact.network(x, t) + added[t.long()].to(x))


NETWORKS: dict[str, Callable[[], piadm.Denoiser]] = {
    "mixture": mixture,
    "digits": digits,
    "fashion": lambda: piadm.load("fashion"),
    "wide": wide,
    "table": table,
}
SHAPES = {"mixture": (1, 8, 8), "digits": (64,), "fashion": (1, 28, 28), "wide": (16,), "table": (4,)}
USUAL = ("mixture", "digits", "fashion")


class Truth:
    """Networks and their sequential samples, each drawn once and kept.

    Args:
        names: of the networks that tables are about.
        methods: that tables are about.
    """

    def __init__(self, names: Sequence[str], methods: Sequence[str]) -> None:
        self.names, self.methods = names, methods
        self.networks: dict[str, piadm.Denoiser] = {}
        self.kept: dict[tuple[str, str, int, int], Tensor] = {}

    def network(self, name: str) -> piadm.Denoiser:
        if name not in self.networks:
            self.networks[name] = NETWORKS[name]()
        return self.networks[name]

    def sequential(self, name: str, method: str, steps: int, num: int) -> Tensor:
        key = (name, method, steps, num)
        if key not in self.kept:
            shape = (num, *SHAPES[name])
            found = piadm.sample_sequential(self.network(name), shape, method=method, steps=steps)
            self.kept[key] = found.sample
        return self.kept[key]

    def judged(self, name: str, method: str, steps: int, num: int, **given: object) -> tuple[piadm.Solution, Tensor]:
        """A solution and its true errors, ``(B,)``."""
        shape = (num, *SHAPES[name])
        found = piadm.sample(self.network(name), shape, method=method, steps=steps, **given)
        whole = self.sequential(name, method, steps, num)
        return found, (found.sample - whole).flatten(1).square().mean(1).sqrt()


def cost(found: piadm.Solution, errors: Tensor) -> Row:
    """What a run has cost, per sample, and its true errors."""
    stats = found.stats
    return {
        "samples": len(errors),
        "rounds": statistics.median(stats.rounds_per_sample.tolist()),
        "most rounds": int(stats.rounds_per_sample.max()),
        "evaluations": statistics.median(stats.evaluations_per_sample.tolist()),
        "draft rounds": stats.draft_rounds,
        "draft evaluations": stats.draft_evaluations,
        "median error": statistics.median(errors.tolist()),
        "worst error": float(errors.max()),
        "CONVERGED": sum(status is piadm.Status.CONVERGED for status in found.status),
    }


def targets(truth: Truth, num: int) -> Iterator[Row]:
    for name in truth.names:
        for (method, nodes), (rounds, evaluations) in TARGETS.items():
            if method not in truth.methods:
                continue
            count = min(num, ALL_NODES) if name == "fashion" and nodes == "all" else num
            found, errors = truth.judged(name, method, 1000, count, tol=1e-2, nodes=nodes)
            row = cost(found, errors)
            met = row["rounds"] <= rounds, row["evaluations"] <= evaluations
            aim = {"aim": f"{rounds} / {evaluations}", "met": " and ".join(
                word for word, good in zip(("rounds", "evaluations"), met, strict=True) if good) or "-"}  # fmt: skip
            yield {"network": name, "method": method, "nodes": str(nodes), **row, **aim}


def truths(truth: Truth, num: int) -> Iterator[Row]:
    for name in truth.names:
        count = num // 2 if name == "fashion" else 8 * num
        for method in truth.methods:
            for tol in TOLERANCES:
                found, errors = truth.judged(name, method, 1000, count, tol=tol)
                said = torch.tensor([status is piadm.Status.CONVERGED for status in found.status])
                yield {
                    "network": name,
                    "method": method,
                    "tol": tol,
                    "CONVERGED": int(said.sum()),
                    "of": count,
                    "% within": 100 * float((errors[said] <= tol).double().mean()),
                    "worst/tol": float(errors[said].max()) / tol,
                    "median/tol": float(errors[said].median()) / tol,
                }


def windows(truth: Truth, num: int) -> Iterator[Row]:
    for name in truth.names:
        for method in truth.methods:
            for window in WINDOWS:
                found, errors = truth.judged(name, method, 1000, num, tol=1e-2, window=window)
                yield {"network": name, "method": method, "window": str(window), **cost(found, errors)}


def short(truth: Truth, num: int) -> Iterator[Row]:
    for name in truth.names:
        for method in truth.methods:
            for steps in (50, 100):
                found, errors = truth.judged(name, method, steps, num, tol=1e-2)
                yield {"network": name, "method": method, "steps": steps, **cost(found, errors)}


def times(truth: Truth, num: int, seeds: int = 3) -> Iterator[Row]:
    denoiser, shape = truth.network("fashion"), (1, *SHAPES["fashion"])
    piadm.sample(denoiser, shape, method="ode", window="auto")  # the first calls are slow, and the first run times
    for method in truth.methods:
        for window in (None, "auto"):
            walked, took, stats = [], [], []
            for seed in range(seeds):
                given = {"method": method, "seed": seed}
                slow, exact = seconds(lambda given=given: piadm.sample_sequential(denoiser, shape, **given))
                fast, found = seconds(lambda given=given, window=window: piadm.sample(
                    denoiser, shape, window=window, **given))  # fmt: skip
                walked.append(slow)
                took.append(fast)
                stats.append((found.stats, float((found.sample - exact.sample).square().mean().sqrt())))
            yield {
                "method": method,
                "window": str(window),
                "chosen": stats[-1][0].window,
                "sequential, s": statistics.median(walked),
                "parallel, s": statistics.median(took),
                "speed-up": statistics.median(slow / fast for slow, fast in zip(walked, took, strict=True)),
                "rounds": statistics.median(one.rounds for one, _ in stats),
                "evaluations": statistics.median(one.evaluations for one, _ in stats),
                "worst error": max(error for _, error in stats),
            }


TABLES = {"targets": targets, "truth": truths, "windows": windows, "short": short, "time": times}


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--num", type=int, default=16, help="samples (default %(default)s)")
    parser.add_argument("--tables", nargs="+", choices=list(TABLES), default=list(TABLES))
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=USUAL)
    parser.add_argument("--methods", nargs="+", choices=["ode", "sde"], default=["ode", "sde"])
    given: argparse.Namespace = parser.parse_args()
    torch.set_num_threads(given.threads)
    truth, printed = Truth(given.networks, given.methods), {}
    for name in given.tables:
        print(f"== {name}", flush=True)
        printed[name] = list(TABLES[name](truth, given.num))
        print_table(printed[name])
    write_json(given.json, given, **printed)


if __name__ == "__main__":
    main()
