"""How near ``piadm.sample`` comes to Newton's method, which knows how the network responds to its input.

    python benchmarks/newton.py [--networks fashion digits mixture] [--methods ode sde] [--steps 100] [--num 8]
                                [--most 12] [--tol 1e-2] [--threads 2] [--json newton.json]

The engine guesses the Jacobians of the network from what it has seen.  Newton's method on the recurrence

    x[j+1] = a[j] x[j] + b[j] (D(y[j], t[j]) + J[j] (x[j] - y[j])) + c[j] xi[j]

about the path ``y`` of the round before takes them exactly, at every step, for nothing: a walk along the path that
calls the network two times more at every step, one step after the other, which is not counted.  It is no sampler; it
says what better guesses could gain.  It starts from the path that the engine starts from: the draft's, or that of
Gaussian data.  The responses ``J v`` are central differences.

Rounds: after which a sample is within ``--tol`` of the sequential one for good, and after which the engine stops.  The
median and the most of ``--num`` samples; every step is a node, so that there is nothing else to find out.
"""

from __future__ import annotations

import argparse

import torch
from _common import Row, options, print_table, write_json
from engine import NETWORKS, SHAPES
from torch import Tensor

import piadm
from piadm.integrators import steps_of
from piadm.models import GaussianDenoiser

#: RMS length of the steps by which the network's responses are measured, by central differences.
STEP = 1e-2


class Course:
    """One network's task: its steps, its noise, the path to start from and the samples to arrive at.

    Args:
        name: of the network, as in ``benchmarks/engine.py``.
        method: "ode" or "sde".
        steps: number of steps.
        num: number of samples.
    """

    def __init__(self, name: str, method: str, steps: int, num: int) -> None:
        self.denoiser, self.method, shape = NETWORKS[name](), method, (num, *SHAPES[name])
        self.grid = piadm.TimeGrid.ddpm(self.denoiser.schedule, steps)
        self.steps = steps_of(method, self.denoiser.schedule, self.grid)
        draws = torch.Generator().manual_seed(0)
        self.initial = torch.randn(shape, generator=draws)
        self.noise = torch.randn(steps, *shape, generator=draws)
        self.wanted = self.sequential(self.denoiser).sample
        start = self.sequential(start_of(self.denoiser), return_states=True).states
        assert start is not None
        self.start = start[:-1]

    @property
    def given(self) -> dict[str, object]:
        """Arguments that all samplers share."""
        noise = None if self.method == "ode" else self.noise
        return {"method": self.method, "grid": self.grid, "initial": self.initial, "noise": noise}

    def sequential(self, denoiser: piadm.Denoiser, **more: bool) -> piadm.Solution:
        """Step by step."""
        return piadm.sample_sequential(denoiser, self.initial.shape, **self.given, **more)

    def errors(self, sample: Tensor) -> Tensor:
        """RMS distance from the sequential samples, ``(B,)``."""
        return (sample - self.wanted).flatten(1).double().square().mean(1).sqrt()

    def responses(self, x: Tensor, move: Tensor, t: Tensor) -> Tensor:
        """``J v`` of rows ``x`` at a time, for moves ``v``, both ``(B, *shape)``."""
        size = move.flatten(1).square().mean(1).sqrt().clamp(min=1e-30).view(-1, *[1] * (x.ndim - 1))
        ahead, behind = self.denoiser(torch.cat([x + STEP / size * move, x - STEP / size * move]), t).chunk(2)
        return (ahead - behind) * (size / (2 * STEP))

    def newton(self, path: Tensor) -> tuple[Tensor, Tensor]:
        """One round of Newton's method from the states ``(J, B, *shape)``: the new ones, and the new samples."""
        steps, x, found = self.steps, self.initial, torch.empty_like(path)
        rows = 2 * len(x)
        for j, (t, a, b, c) in enumerate(zip(steps.times, steps.a[:, 0, 0], steps.b[:, 0], steps.c[:, 0], strict=True)):
            found[j], move = x, x - path[j]
            estimate = self.denoiser(path[j], t.expand(len(x))) + self.responses(path[j], move, t.expand(rows))
            x = float(a) * x + float(b) * estimate
            if self.method == "sde":
                x = x + float(c[0]) * self.noise[j]
        return found, x


def start_of(denoiser: piadm.Denoiser) -> piadm.Denoiser:
    """The denoiser whose path the engine starts from: the draft, or Gaussian data."""
    if denoiser.draft is not None:
        return denoiser.draft
    return GaussianDenoiser(denoiser.schedule, denoiser.data_mean, denoiser.data_variance)


def within(errors: Tensor, tol: float) -> Tensor:
    """The round after which each sample is within the tolerance for good, of errors ``(rounds, B)``; inf: never."""
    outside = (errors > tol) | errors.isnan()
    rounds = torch.arange(1, len(errors) + 1)[:, None]
    last: Tensor = (outside * rounds).amax(0).double()
    return torch.where(last == len(errors), torch.inf, last + 1)


def compared(name: str, method: str, given: argparse.Namespace) -> Row:
    """Newton's method and the engine on one network."""
    course = Course(name, method, given.steps, given.num)
    path, exact = course.start, []
    for _ in range(given.most):
        path, sample = course.newton(path)
        exact.append(course.errors(sample))
    seen: list[Tensor] = []
    stats = piadm.sample(
        course.denoiser, course.initial.shape, **course.given, tol=given.tol, nodes="all",
        callback=lambda info: seen.append(course.errors(info.sample)),
    ).stats  # fmt: skip
    newton, engine = within(torch.stack(exact), given.tol), within(torch.stack(seen), given.tol)
    row: Row = {"network": name, "method": method, "steps": given.steps}
    for title, rounds in (("Newton", newton), ("engine", engine), ("engine stops", stats.rounds_per_sample.double())):
        row |= {title: float(rounds.quantile(0.5, interpolation="higher")), f"{title}, most": float(rounds.max())}
    return row


@torch.no_grad()
def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--networks", nargs="+", default=["mixture", "digits", "fashion"], choices=NETWORKS)
    parser.add_argument("--methods", nargs="+", default=["ode", "sde"], choices=["ode", "sde"])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--num", type=int, default=8)
    parser.add_argument("--most", type=int, default=12, help="rounds of Newton's method (default %(default)s)")
    parser.add_argument("--tol", type=float, default=1e-2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows = [compared(name, method, given) for name in given.networks for method in given.methods]
    print_table(rows)
    write_json(given.json, given, rounds=rows)


if __name__ == "__main__":
    main()
