"""``piadm bench``: how much faster it is here, with one's own network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import piadm
from piadm._checks import finite_float, positive_int
from piadm.cli import files, options, progress
from piadm.cli.bench_measure import Curve, Lap, latencies, race, timings
from piadm.cli.bench_report import Report
from piadm.cli.device import resolve_device
from piadm.cli.given import Conditions
from piadm.cli.interrupts import INTERRUPTED, interrupts
from piadm.cli.model import FASHION, ModelName
from piadm.cli.numbers import check_seed, check_threads, window_rows, words
from piadm.cli.written import written
from piadm.denoiser import Denoiser
from piadm.problem import Problem, grid_of, make_problem
from piadm.solution import Solution

# A paragraph each: the help screen joins the lines of a paragraph.
EXAMPLES = """[bold]Examples[/bold]

piadm bench                                  the shipped model, one sample, 1000 ODE steps

piadm bench --method sde --batch 4           the SDE, four samples at once

piadm bench --device cuda --rows 1024 --json bench.json --figure bench.png

piadm bench --steps 100 --repeats 1          a slow network: fewer steps, less repetition

piadm bench --model my_package.models:denoiser --shape 3,32,32   your own model
"""


@dataclass(frozen=True)
class Settings:
    """The options of one run.

    Raises:
        ValueError: If an option is out of its range or an output file cannot be written.
    """

    model: ModelName
    method: str
    steps: int
    tol: float
    batch: int
    windows: tuple[int | str, ...]
    rows: int
    repeats: int
    seed: int
    condition: Conditions
    threads: int | None
    json: Path | None
    figure: Path | None

    def __post_init__(self) -> None:
        for name, value in (("--steps", self.steps), ("--batch", self.batch), ("--rows", self.rows)):
            positive_int(name, value)
        positive_int("--repeats", self.repeats)
        finite_float("--tol", self.tol, low=0.0)
        check_seed("--seed", self.seed)
        check_threads("--threads", self.threads)
        for option, path, suffix in (("--json", self.json, ".json"), ("--figure", self.figure, ".png")):
            if path is not None:
                files.check_writable(option, path, suffix)

    def shape(self, batch: int) -> tuple[int, ...]:
        """The shape of so many samples."""
        return (batch, *self.model.sample_shape())

    def sizes(self) -> list[int]:
        """Rows of the calls that are timed: powers of two, and ``--rows`` itself."""
        return sorted({self.rows, *(1 << k for k in range(self.rows.bit_length()))})

    def samplers(self, denoiser: Denoiser) -> dict[str, Callable[[], Solution]]:
        """The samplers by name, the sequential one first."""
        shared: dict[str, Any] = {"method": self.method, "steps": self.steps, "seed": self.seed}
        shared["condition"] = self.condition.rows(range(self.batch))

        def run(sampler: Callable[..., Solution], **own: object) -> Callable[[], Solution]:
            return partial(sampler, denoiser, self.shape(self.batch), **shared, **own)

        found = {"sequential": run(piadm.sample_sequential), "sample": run(piadm.sample, tol=self.tol)}
        named = {f"sample (window {window})": window for window in self.windows}
        return found | {name: run(piadm.sample, tol=self.tol, window=window) for name, window in named.items()}


def bench(
    model: options.Model = FASHION,
    shape: options.Shape = None,
    condition: options.Condition = None,
    method: options.Method = options.Process.ODE,
    steps: options.Steps = 1000,
    tol: Annotated[float, typer.Option(help="RMS error per coordinate that ends a parallel sample.")] = 1e-2,
    batch: Annotated[int, typer.Option(help="Samples at once.")] = 1,
    windows: Annotated[
        str, typer.Option(help="Windows to try beside sample's own, with commas: all, auto or numbers.")
    ] = "auto,4,16,all",
    rows: Annotated[int, typer.Option(help="Most rows of the network calls that are timed.")] = 256,
    repeats: Annotated[int, typer.Option(help="Timed runs of everything, after a first one.")] = 3,
    seed: options.Seed = 0,
    device: options.Device = None,
    threads: options.Threads = None,
    json: options.Json = None,
    figure: Annotated[Path | None, typer.Option(help="Draw latency and times to this file (PNG).")] = None,
) -> None:
    """Measure how much faster parallel sampling is on this device, with this network.

    Times one network call against its number of rows, then the sequential sampler and sample with several windows, in
    turns and from the same noise, and says in words what comes of it.  Nothing is subtracted from any time.
    """
    try:
        settings = Settings(
            model=ModelName(model, shape, resolve_device(device)), method=method.value, steps=steps, tol=tol,
            batch=batch, windows=tuple(window_rows("--windows", word) for word in words(windows)), rows=rows,
            repeats=repeats, seed=seed, condition=Conditions(condition, batch), threads=threads, json=json,
            figure=figure,
        )  # fmt: skip
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if run(settings):
        raise typer.Exit(INTERRUPTED)


def run(settings: Settings) -> bool:
    """Measure, then print and write what was found.

    Returns:
        Whether Ctrl-C cut the samplers short; those that were timed by then are printed and written all the same.

    Raises:
        ImportError: If matplotlib, where there is to be a figure, or diffusers is not installed.
        KeyboardInterrupt: If Ctrl-C came before any sampler was timed.
        NetworkError: If the network fails.
        ValueError: If the model cannot be loaded or sampled.
    """
    drawing = None if settings.figure is None else files.drawing("bench_figure")
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    denoiser = settings.model.load()
    with progress.quiet():
        problem = _problem(settings, denoiser)
        curve = _latencies(settings, problem)
        laps, interrupted = _race(settings, problem)
    report = _report(settings, problem, curve, laps)
    if not report.timings:
        raise KeyboardInterrupt
    if drawing is not None and settings.figure is not None:
        files.write_figure(settings.figure, drawing.draw(report))
    if settings.json is not None:
        report.write_json(settings.json)
    _print(settings, report)
    return interrupted


def _problem(settings: Settings, denoiser: Denoiser) -> Problem:
    """One sample, whose state the timed calls are given."""
    grid = grid_of(None, denoiser.schedule, settings.steps)
    return make_problem(
        denoiser, settings.shape(1), grid, seed=settings.seed, initial=None, noise=None, noise_count=1,
        condition=settings.condition.rows(range(1)), max_batch=None, callback=None,
    )  # fmt: skip


def _latencies(settings: Settings, problem: Problem) -> Curve:
    sizes = settings.sizes()
    with progress.bar("network calls") as update:

        def before(rows: int) -> None:
            update(sizes.index(rows) / len(sizes), f"{rows} rows")

        return latencies(problem, sizes, settings.repeats, before)


def _race(settings: Settings, problem: Problem) -> tuple[list[Lap], bool]:
    samplers = settings.samplers(problem.denoiser)
    runs = len(samplers) * (settings.repeats + 1)
    laps: list[Lap] = []
    with interrupts() as check, progress.bar("samplers") as update:

        def before(number: int, note: str) -> None:
            check()
            update(number / runs, note)

        try:
            for lap in race(samplers, settings.repeats, problem.start.device, before):
                laps.append(lap)
        except KeyboardInterrupt:
            pass
    return laps, len(laps) < runs


def _report(settings: Settings, problem: Problem, curve: Curve, laps: list[Lap]) -> Report:
    return Report(
        settings=written(settings, problem.start.device),
        versions={"piadm": piadm.__version__, "torch": str(torch.__version__)},
        curve=curve,
        timings=timings(laps, problem.denoiser.rows_per_call),
    )


def _print(settings: Settings, report: Report) -> None:
    screen = progress.console(wide=True)
    screen.print(report.headline(), style="bold", soft_wrap=True)
    screen.print(report.latency())
    for line in report.remarks():
        screen.print(line, soft_wrap=True, markup=False)
    screen.print(report.samplers())
    for line in report.verdict():
        screen.print(line, soft_wrap=True, markup=False)
    if settings.figure is not None:
        screen.print(f"figure: {settings.figure}", soft_wrap=True, markup=False)
