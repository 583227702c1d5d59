"""``piadm compare``: this library beside its rivals, on one model, from the same noise."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated

import torch
import typer

import piadm
from piadm._checks import optional_int, positive_int
from piadm.cli import files, options, progress
from piadm.cli.compare_report import Report
from piadm.cli.device import resolve_device
from piadm.cli.given import Conditions
from piadm.cli.interrupts import INTERRUPTED, interrupts
from piadm.cli.model import FASHION, ModelName
from piadm.cli.numbers import check_names, check_seed, check_threads, positives, words
from piadm.cli.written import written
from piadm.network import network_device
from piadm.rivals import NAMES, Course, Result, Rival, chosen, prepare, study
from piadm.solution import RoundInfo

# A paragraph each: the help screen joins the lines of a paragraph.
EXAMPLES = f"""[bold]Examples[/bold]

piadm compare --model mixture               a closed-form model: a quick look

piadm compare --method sde --errors 3e-2    the shipped model, the SDE, another error

piadm compare --errors 1e-2,3e-3 --json c.json   two errors; every figure as JSON

piadm compare --only sample,paradigms,dpm-solver   three of them

piadm compare --model my_package.models:denoiser --shape 3,32,32   your own model

[bold]Names for --only[/bold]

{", ".join(NAMES)}
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
    errors: tuple[float, ...]
    num: int
    seed: int
    condition: Conditions
    max_batch: int | None
    threads: int | None
    only: tuple[str, ...] | None
    out: Path
    json: Path | None

    def __post_init__(self) -> None:
        positive_int("--steps", self.steps, minimum=2)
        positive_int("--num", self.num)
        check_seed("--seed", self.seed)
        check_threads("--threads", self.threads)
        optional_int("--max-batch", self.max_batch)
        check_names("--only", self.only, NAMES)
        files.check_writable("--out", self.out, ".png")
        if self.json is not None:
            files.check_writable("--json", self.json, ".json")


def compare(
    model: options.Model = FASHION,
    shape: options.Shape = None,
    condition: options.Condition = None,
    method: options.Method = options.Process.ODE,
    steps: options.Steps = 1000,
    errors: Annotated[str, typer.Option(help="RMS errors per coordinate to tune for, with commas.")] = "1e-2",
    num: Annotated[int, typer.Option(help="Number of samples.")] = 4,
    seed: options.Seed = 0,
    device: options.Device = None,
    max_batch: options.MaxBatch = None,
    threads: options.Threads = None,
    only: Annotated[str | None, typer.Option(help="Names of rivals, with commas; all by default.")] = None,
    out: Annotated[Path, typer.Option(help="The figure (PNG).")] = Path("piadm-compare.png"),
    json: options.Json = None,
) -> None:
    """Compare samplers: how many network calls in a row, and how much work, an error takes.

    Every rival starts from the same state and noise, and is tried with settings of its own until all samples are
    within the error of the sequential sampler's.  All network calls count, and all of the time.
    """
    try:
        settings = Settings(
            model=ModelName(model, shape, resolve_device(device)), method=method.value, steps=steps,
            errors=tuple(sorted(set(positives("--errors", errors)), reverse=True)),
            num=num, seed=seed, condition=Conditions(condition, num), max_batch=max_batch, threads=threads,
            only=None if only is None else words(only), out=out, json=json,
        )  # fmt: skip
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if run(settings):
        raise typer.Exit(INTERRUPTED)


def run(settings: Settings) -> bool:
    """Compare, then print and write what was found.

    Returns:
        Whether Ctrl-C cut the run short; the rivals that were through by then are printed and written all the same.

    Raises:
        ImportError: If matplotlib or diffusers is not installed.
        KeyboardInterrupt: If Ctrl-C came before there was anything to show.
        ValueError: If the model cannot be loaded or sampled, or none of the rivals can run it.
    """
    figure = files.drawing("compare_figure")
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    rivals = chosen(settings.only)
    course = _prepare(settings)
    results = _study(settings, course, rivals)
    interrupted = len(results) < len(rivals)
    if not results:
        raise KeyboardInterrupt
    if not interrupted and not any(result.runs for result in results):
        raise ValueError("none of the chosen rivals can run: " + "; ".join(_reason(result) for result in results))
    report = _report(settings, course, results)
    drawing = figure.draw(report)
    files.write_figure(settings.out, drawing)
    if settings.json is not None:
        report.write_json(settings.json)
    _print(settings, report)
    return interrupted


def _prepare(settings: Settings) -> Course:
    with progress.bar("sequential reference") as update, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # failed samples are an error of their own here

        def after_step(info: RoundInfo) -> None:
            update(info.round / settings.steps, f"step {info.round} of {settings.steps}")

        return prepare(
            settings.model.load(), (settings.num, *settings.model.sample_shape()), method=settings.method,
            steps=settings.steps, seed=settings.seed, condition=settings.condition.rows(range(settings.num)),
            max_batch=settings.max_batch, callback=after_step,
        )  # fmt: skip


def _study(settings: Settings, course: Course, rivals: tuple[Rival, ...]) -> tuple[Result, ...]:
    with interrupts() as check, progress.bar("rivals") as update, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)

        def before_run(number: int, setting: str) -> None:
            check()
            update(number / len(rivals), f"{rivals[number].title(settings.method)}: {setting}")

        return study(course, rivals, settings.errors, before_run)


def _report(settings: Settings, course: Course, results: tuple[Result, ...]) -> Report:
    device = network_device(course.denoiser.network) or course.start.device
    return Report(
        settings=written(settings, device),
        versions={"piadm": piadm.__version__, "torch": str(torch.__version__)} | _diffusers_version(),
        targets=settings.errors,
        results=results,
    )


def _print(settings: Settings, report: Report) -> None:
    screen = progress.console(wide=True)
    screen.print(report.headline(), style="bold", soft_wrap=True)
    for target in report.targets:
        screen.print(report.table(target))
    screen.print(f"figure: {settings.out}", soft_wrap=True, markup=False)


def _reason(result: Result) -> str:
    return f"{result.rival.name}: {result.reason}"


def _diffusers_version() -> dict[str, str]:
    try:
        return {"diffusers": str(import_module("diffusers").__version__)}
    except ImportError:
        return {}
