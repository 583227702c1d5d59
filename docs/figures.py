"""The figures of ``docs/method.md``, drawn from runs on a closed-form network: ten narrow Gaussians in 64 dimensions.

    python docs/figures.py [--out docs/assets] [--num 16]

Needs ``piadm[cli,plots]``; about a minute on two cores.  Every error is the RMS difference per coordinate from the
sequential sampler's result on the same grid of 1000 steps and the same noise.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from torch import Tensor

import piadm
from piadm.cli.model import mixture
from piadm.engine import run
from piadm.problem import make_problem
from piadm.settings import SampleSettings, resolve
from piadm.tally import Tally

SHAPE, STEPS = (1, 8, 8), 1000
GUESSES = {
    "score": "score frozen (the paper)",
    "identity": "identity (ParaDiGMS)",
    "data": "denoised estimate frozen",
    "gaussian": "Gaussian data",
    "secant": "secant",
    "diagonal": "diagonal (default)",
}
SETTLED = 40  # rounds after which every path of the second figure stands still
NAMES = {"ode": "ODE", "sde": "SDE"}


def exact(method: str, num: int) -> Tensor:
    """The sequential sampler's result."""
    return piadm.sample_sequential(mixture(), (num, *SHAPE), method=method, steps=STEPS).sample


def rms(difference: Tensor) -> Tensor:
    """RMS per coordinate, per sample."""
    return difference.flatten(1).square().mean(1).sqrt()


def rounds(axes: Axes, method: str, num: int) -> None:
    """True error after every round, for each linearization, every row evaluated in every round."""
    whole = exact(method, num)
    for guess, label in GUESSES.items():
        errors: list[float] = []
        piadm.sample(
            mixture(), (num, *SHAPE), method=method, steps=STEPS, nodes=128, tol=1e-9, max_rounds=20,
            linearization=guess, callback=lambda info: errors.append(float(rms(info.sample - whole).median())) or None,  # noqa: B023
        )  # fmt: skip
        axes.semilogy(range(1, len(errors) + 1), errors, marker=".", label=label)
    axes.set(title=NAMES[method], xlabel="rounds", ylim=(1e-5, 3), xticks=range(0, 21, 4))
    axes.axhline(1e-2, color="0.7", linewidth=0.8)


def solved(engine: SampleSettings, num: int) -> Tensor:
    """The sample that an engine ends with when it goes on until everything stands still."""
    problem = make_problem(
        mixture(), (num, *SHAPE), engine.grid, seed=0, initial=None, noise=None, noise_count=STEPS, condition=None,
        max_batch=None, callback=None,
    )  # fmt: skip
    tally = Tally(problem)
    run(engine, problem, tally, SETTLED, False)
    return tally.end.reshape(num, *SHAPE)


def readings(axes: Axes, num: int) -> None:
    """True error against the number of nodes, with the network reading states or averages of them."""
    whole, counts = exact("sde", num), (24, 32, 48, 64, 96, 128, 192, 256)
    errors: dict[str, list[float]] = {"the states": [], "averages about them (default)": []}
    for count in counts:
        given = resolve(mixture(), method="sde", grid=None, steps=STEPS, tol=1e-9, nodes=count, window=None, guess=None)
        plain = replace(given, importance=None, nodes=replace(given.nodes, readings=None))
        for engine, found in zip((plain, given), errors.values(), strict=True):
            found.append(float(rms(solved(engine, num) - whole).median()))
    for label, found in errors.items():
        axes.loglog(counts, found, marker="o", label=f"the network reads {label}")
    axes.set(title="SDE", xlabel="nodes", ylabel="median true error")
    axes.set_xticks(counts, map(str, counts), minor=False)
    axes.minorticks_off()


def estimates(axes: Axes, method: str, num: int) -> None:
    """True error against the estimate, sample by sample."""
    whole = exact(method, num)
    for tol, marker in ((3e-2, "o"), (1e-2, "s"), (3e-3, "^")):
        found = piadm.sample(mixture(), (num, *SHAPE), method=method, steps=STEPS, tol=tol)
        axes.loglog(found.error_estimate, rms(found.sample - whole), marker, markersize=3, label=f"tol {tol:g}")
    line = [1e-6, 1e-1]
    axes.loglog(line, line, color="0.7", linewidth=0.8)
    axes.set(title=NAMES[method], xlabel="estimate", xlim=(1e-4, 1e-1), ylim=(1e-6, 1e-1))


def save(figure: plt.Figure, path: Path) -> None:
    """Write a figure whole."""
    figure.tight_layout()
    part = path.with_suffix(".part.png")
    figure.savefig(part, dpi=110)
    part.replace(path)
    plt.close(figure)


def main() -> None:
    """Draw all three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "assets")
    parser.add_argument("--num", type=int, default=16, help="samples (default %(default)s)")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True)
    rounds(left, "ode", given.num)
    rounds(right, "sde", given.num)
    left.set_ylabel("median true error")
    right.legend(fontsize=8)
    save(figure, given.out / "rounds.png")

    figure, axes = plt.subplots(figsize=(5, 3.8))
    readings(axes, given.num)
    axes.legend(fontsize=8)
    save(figure, given.out / "nodes.png")

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True)
    estimates(left, "ode", 4 * given.num)
    estimates(right, "sde", 4 * given.num)
    left.set_ylabel("true error")
    right.legend(fontsize=8)
    save(figure, given.out / "estimates.png")


if __name__ == "__main__":
    main()
