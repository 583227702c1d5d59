"""``piadm sample``: the same samples twice, sequentially and in parallel, side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer

import piadm
from piadm._checks import finite_float, optional_int, positive_int
from piadm.cli import files, long_run, options, progress
from piadm.cli.device import resolve_device
from piadm.cli.given import Conditions
from piadm.cli.interrupts import INTERRUPTED
from piadm.cli.model import FASHION, ModelName
from piadm.cli.numbers import check_seed, check_threads, window_rows
from piadm.cli.report import Report, RunFigures, Spread, Trace, rms_difference, warnings_of
from piadm.cli.written import written
from piadm.network import network_device
from piadm.solution import Status

if TYPE_CHECKING:
    from piadm.denoiser import Denoiser
    from piadm.solution import RoundInfo, Solution

# A paragraph each: the help screen joins the lines of a paragraph.
EXAMPLES = """[bold]Examples[/bold]

piadm sample                           16 garments, 1000 ODE steps, both ways

piadm sample --tol 1e-3                to a smaller error

piadm sample --method sde --steps 100  the SDE: noise in every step, more rounds

piadm sample --num 4 --json out.json   4 garments; every figure as JSON

piadm sample --window auto             the window that is fastest on this machine

piadm sample --no-reference            in parallel only: no true error

piadm sample --num 50000 --out many    a folder of shards, in parallel only; the same command goes on after a stop

torchrun --nproc-per-node 8 -m -- piadm sample --num 50000 --out many --device cuda

piadm sample --model my_package.models:denoiser --shape 3,32,32   your own model; also with a folder

piadm sample --model my_package.models:denoiser --shape 3,32,32 --condition labels.safetensors   a row per sample
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
    num: int
    seed: int
    condition: Conditions
    window: str | None
    max_batch: int | None
    threads: int | None
    reference: bool
    out: Path
    layout: long_run.Layout
    json: Path | None

    def __post_init__(self) -> None:
        positive_int("--steps", self.steps)
        finite_float("--tol", self.tol, low=0.0)
        positive_int("--num", self.num)
        check_seed("--seed", self.seed)
        self.rows()
        check_threads("--threads", self.threads)
        optional_int("--max-batch", self.max_batch)
        if self.long:
            long_run.check_folder("--out", self.out)
            if self.window == "auto":
                raise ValueError("--window must be all or a number with a folder as --out: auto depends on the clock")
        elif self.out.suffix.lower() != ".png":
            raise ValueError(
                "--out must name a .png file or a folder (one with a dot in its name must exist), "
                f"got {str(self.out)!r}"
            )
        else:
            files.check_writable("--out", self.out, ".png")
        if self.json is not None:
            files.check_writable("--json", self.json, ".json")

    @property
    def long(self) -> bool:
        """Whether ``--out`` names a folder."""
        return self.out.suffix == "" or self.out.is_dir()

    def part(self) -> long_run.LongRun:
        """The long run that these options ask for."""
        arguments = {"method": self.method, "steps": self.steps, "tol": self.tol, "window": self.rows()}
        arguments |= {"max_batch": self.max_batch}
        return long_run.LongRun(
            self.out, self.num, self.seed, self.layout, self.model, self.condition, self.threads, arguments
        )

    def given(self, sampler: Callable[..., Solution], denoiser: Denoiser, **more: object) -> Solution:
        """Call one of the two samplers with what both are given."""
        shape = (self.num, *self.model.sample_shape())
        return sampler(
            denoiser, shape, method=self.method, steps=self.steps, seed=self.seed,
            condition=self.condition.rows(range(self.num)), max_batch=self.max_batch, **more,
        )  # fmt: skip

    def rows(self) -> int | str | None:
        """The window, as ``piadm.sample`` takes it.

        Raises:
            ValueError: If it is neither "all" nor "auto" nor a number of at least 2.
        """
        return None if self.window is None else window_rows("--window", self.window)


def sample(
    model: options.Model = FASHION,
    shape: options.Shape = None,
    condition: options.Condition = None,
    method: options.Method = options.Process.ODE,
    steps: options.Steps = 1000,
    tol: Annotated[float, typer.Option(help="RMS error per coordinate that ends a parallel sample.")] = 1e-2,
    num: Annotated[int, typer.Option(help="Number of samples.")] = 16,
    seed: options.Seed = 0,
    device: options.Device = None,
    window: Annotated[
        str | None, typer.Option(help="Rows per sample and round: all, auto (fastest), N; else a part of them.")
    ] = None,
    max_batch: options.MaxBatch = None,
    threads: options.Threads = None,
    reference: Annotated[bool, typer.Option(help="Run the sequential sampler too.")] = True,
    out: Annotated[Path, typer.Option(help="The picture (PNG); or a folder, for many samples in shards.")] = Path(
        "piadm-sample.png"
    ),
    shard: Annotated[int, typer.Option(help="Samples per file in a folder.")] = 256,
    batch: Annotated[int, typer.Option(help="Samples at once for a folder.")] = 64,
    json: options.Json = None,
) -> None:
    """Sample the shipped model or your own, sequentially and in parallel, from the same noise.

    Writes one picture with both sets of samples and the convergence per round, and prints what each run cost.
    If --out names a folder, writes the parallel samples alone, in shards: a run that was stopped, by whatever, goes
    on when the same command is started again, on any number of processes.
    """
    try:
        settings = Settings(
            model=ModelName(model, shape, resolve_device(device)), method=method.value, steps=steps, tol=tol,
            num=num, seed=seed, condition=Conditions(condition, num), window=window, max_batch=max_batch,
            threads=threads, reference=reference, out=out, layout=long_run.Layout(shard, batch), json=json,
        )  # fmt: skip
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if settings.long:
        long_run.run(settings.part(), settings.json)
    elif run(settings):
        raise typer.Exit(INTERRUPTED)


def run(settings: Settings) -> bool:
    """Sample, then print and write what was found.

    Returns:
        Whether Ctrl-C cut the run short; what had been reached by then is printed and written all the same.

    Raises:
        ImportError: If matplotlib or diffusers is not installed.
        ValueError: If the model cannot be loaded or sampled.
    """
    figure = files.drawing("figure")
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    denoiser = settings.model.load()
    trace = Trace()
    # In this order the picture has something to show when the long sequential run is interrupted.
    parallel = _run_parallel(denoiser, settings, trace)
    interrupted = _was_interrupted(parallel)
    sequential = None
    if settings.reference and not interrupted:
        sequential = _run_sequential(denoiser, settings)
        interrupted = _was_interrupted(sequential)
        sequential = None if interrupted else sequential
    report = _report(settings, denoiser, trace, parallel, sequential)
    drawing = figure.draw(report, parallel.sample, None if sequential is None else sequential.sample)
    files.write_figure(settings.out, drawing)
    if settings.json is not None:
        report.write_json(settings.json)
    _print(settings, report)
    return interrupted


def _run_parallel(denoiser: Denoiser, settings: Settings, trace: Trace) -> Solution:
    with progress.quiet(), progress.bar("parallel") as update:

        def after_round(info: RoundInfo) -> None:
            trace.record(info)
            worst = [float(estimate.max()) for _, _, estimate in trace.rounds]
            done = progress.fraction_converged(worst[0], worst[-1], settings.tol)
            update(done, f"round {info.round}, error {worst[-1]:.1e}")

        return settings.given(piadm.sample, denoiser, tol=settings.tol, window=settings.rows(), callback=after_round)


def _run_sequential(denoiser: Denoiser, settings: Settings) -> Solution:
    with progress.quiet(), progress.bar("sequential reference") as update:

        def after_step(info: RoundInfo) -> None:
            update(info.round / settings.steps, f"step {info.round} of {settings.steps}")

        return settings.given(piadm.sample_sequential, denoiser, callback=after_step)


def _report(
    settings: Settings, denoiser: Denoiser, trace: Trace, parallel: Solution, sequential: Solution | None
) -> Report:
    runs = {"parallel": RunFigures.of(parallel)}
    target = None
    if sequential is not None:
        runs["sequential"], target = RunFigures.of(sequential), sequential.sample
    return Report(
        settings=written(settings, network_device(denoiser.network) or parallel.sample.device),
        counted=settings.model.counted(settings.num),
        versions={"piadm": piadm.__version__, "torch": str(torch.__version__)},
        parallel=runs["parallel"],
        sequential=runs.get("sequential"),
        error_estimate=Spread.of(parallel.error_estimate),
        rms_difference=None if target is None else Spread.of(rms_difference(parallel.sample, target)),
        convergence=trace.convergence(target),
        warnings=warnings_of(runs),
    )


def _print(settings: Settings, report: Report) -> None:
    screen, errors = progress.console(), progress.console(stderr=True)
    screen.print(report.headline(), style="bold", soft_wrap=True)
    screen.print(report.table())
    screen.print(f"picture: {settings.out}", soft_wrap=True, markup=False)
    for line in report.warnings:
        errors.print(f"warning: {line}", style="yellow", soft_wrap=True, markup=False)


def _was_interrupted(solution: Solution) -> bool:
    return Status.INTERRUPTED in solution.status
