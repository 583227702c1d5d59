"""``piadm plan``: the settings of the paper's algorithms for a dimension and a divergence."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

import piadm
from piadm._checks import finite_float
from piadm.cli import files, options, progress
from piadm.cli.numbers import positives, whole
from piadm.theory import Plan

# A paragraph each: the help screen joins the lines of a paragraph.
EXAMPLES = """[bold]Examples[/bold]

piadm plan --dimension 3072                              only bounds of the score are known

piadm plan --dimension 1e6 --spectrum 0.05,0.3,1,3       the eigenvalues of the data's covariance

piadm plan --dimension 1e6 --method ode --kl 0.01        Algorithm 2, a smaller divergence

piadm plan --dimension 1e6 --memory-limit 500            at most 500 states per sample at once

piadm plan --dimension 1e6 --json plan.json              every figure as JSON
"""


@dataclass(frozen=True)
class Settings:
    """The options of one run, in the terms of ``piadm.plan``.

    Raises:
        ValueError: If an option is out of its range or the file cannot be written.
    """

    dimension: int
    kl: float
    spectrum: tuple[float, ...] | None
    lipschitz: float
    method: str
    memory_limit: int | None
    early_stop: float
    longest_block: float
    json: Path | None

    def __post_init__(self) -> None:
        for option, value in (("--kl", self.kl), ("--early-stop", self.early_stop)):
            finite_float(option, value, low=0.0)
        finite_float("--longest-block", self.longest_block, low=0.0)
        if self.json is not None:
            files.check_writable("--json", self.json, ".json")

    def arguments(self) -> dict[str, Any]:
        """The arguments of ``piadm.plan`` that matter."""
        shared = dict(kl=self.kl, method=self.method, early_stop=self.early_stop, longest_block=self.longest_block)
        known = dict(lipschitz=self.lipschitz) if self.spectrum is None else dict(spectrum=list(self.spectrum))
        limit = {} if self.memory_limit is None else dict(memory_limit=self.memory_limit)
        return {**shared, **known, **limit}

    def call(self) -> str:
        """The call of the library that gives the plan."""
        words = ", ".join(f"{name}={value!r}" for name, value in self.arguments().items())
        return f"piadm.plan({self.dimension}, {words})"


def plan(
    dimension: Annotated[str, typer.Option(help="Number of coordinates of a sample, such as 3072 or 1e6.")],
    kl: Annotated[float, typer.Option(help="Divergence from the early-stopped data, in nats.")] = 0.1,
    spectrum: Annotated[
        str | None, typer.Option(help="Eigenvalues of the data's covariance, with commas, equally frequent.")
    ] = None,
    lipschitz: Annotated[
        float, typer.Option(help="Without a spectrum: variances from 1/L to L, the worst of them everywhere.")
    ] = 20.0,
    method: Annotated[options.Process, typer.Option(help="Algorithm 1 (sde) or 2 (ode).")] = options.Process.SDE,
    memory_limit: Annotated[int | None, typer.Option(help="Most states per sample held at once.")] = None,
    early_stop: Annotated[float, typer.Option(help="OU time at which sampling ends.")] = 1e-2,
    longest_block: Annotated[float, typer.Option(help="Longest block, in OU time.")] = 1.0,
    json: options.Json = None,
) -> None:
    """Plan PIADM-SDE or PIADM-ODE: blocks, steps, iterations and what they come to, by the exact Gaussian law.

    The orders are the theorems', the constants those that Gaussian data of the given variances need.
    """
    try:
        settings = Settings(
            dimension=whole("--dimension", dimension), kl=kl,
            spectrum=None if spectrum is None else positives("--spectrum", spectrum), lipschitz=lipschitz,
            method=method.value, memory_limit=memory_limit, early_stop=early_stop, longest_block=longest_block,
            json=json,
        )  # fmt: skip
        found = piadm.plan(settings.dimension, **settings.arguments())
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if settings.json is not None:
        files.write_json(settings.json, {"call": settings.call(), "plan": figures(found)})
    _print(settings, found)


def figures(found: Plan) -> dict[str, Any]:
    """Every figure of a plan."""
    corrector = found.corrector
    return {
        "method": found.method,
        "dimension": found.dimension,
        "horizon": found.horizon,
        "early_stop": found.early_stop,
        "blocks": found.blocks.count,
        "steps": found.blocks.steps,
        "longest_step": found.step,
        "iterations": found.iterations,
        "corrector": None if corrector is None else {
            "duration": corrector.duration,
            "friction": corrector.friction,
            "step": corrector.step,
            "blocks": corrector.blocks,
            "iterations": corrector.iterations,
        },
        "rounds": found.rounds,
        "evaluations": found.evaluations,
        "states": found.states,
        "kl": found.kl,
        "tv": found.tv,
        "kl_data": found.kl_data,
        "forbidden": None if found.forbidden is None else figures(found.forbidden),
    }  # fmt: skip


def _print(settings: Settings, found: Plan) -> None:
    screen = progress.console()
    name = {"sde": "PIADM-SDE", "ode": "PIADM-ODE"}[found.method]
    screen.print(f"{name}, d = {found.dimension:,}, KL <= {settings.kl:g}", style="bold", soft_wrap=True)
    if found.forbidden is not None:
        free = found.forbidden
        screen.print(
            f"{settings.memory_limit} states forbid the plan of {free.rounds} rounds with {free.states} states; "
            "the best found within them:", style="yellow", soft_wrap=True,
        )  # fmt: skip
    table = Table(box=box.SIMPLE_HEAD, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for label, value in _rows(found):
        table.add_row(label, value)
    screen.print(table)
    screen.print(f"plan = {settings.call()}", soft_wrap=True, markup=False)
    corrector = ", corrector=plan.corrector" if found.method == "ode" else ""
    arguments = f"blocks=plan.blocks, iterations=plan.iterations{corrector}"
    screen.print(f"piadm.piadm_{found.method}(denoiser, shape, {arguments})", soft_wrap=True, markup=False)


def _rows(found: Plan) -> list[tuple[str, str]]:
    rows = [
        ("horizon T", f"{found.horizon:g}"),
        ("early stopping", f"{found.early_stop:g}"),
        ("blocks N", f"{found.blocks.count}"),
        ("longest step", f"{found.step:.3g}"),
        ("steps, all blocks", f"{found.blocks.steps}"),
        ("iterations per block K", f"{found.iterations}"),
    ]
    if found.corrector is not None:
        c = found.corrector
        rows.append(("corrector", f"time {c.duration:.3g}, friction {c.friction:.3g}, step {c.step:.3g}"))
        rows.append(("its blocks and iterations", f"{c.blocks} x {c.iterations}"))
    return [
        *rows,
        ("rounds", f"{found.rounds}"),
        ("evaluations per sample", f"{found.evaluations}"),
        ("states per sample at once", f"{found.states}"),
        ("KL to the early-stopped data", f"{found.kl:.3g}"),
        ("total variation, at most", f"{found.tv:.3g}"),
        ("KL to the data", f"{found.kl_data:.3g}"),
    ]
