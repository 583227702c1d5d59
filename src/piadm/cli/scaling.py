"""``piadm scaling``: how rounds, steps and memory grow with the dimension, by exact laws."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Annotated

import typer

import piadm
from piadm._checks import finite_float, positive_int
from piadm.cli import files, options, progress
from piadm.cli.numbers import check_names, positives, whole, words
from piadm.cli.scaling_report import Report
from piadm.theory.scaling import scaling as measure
from piadm.theory.scaling import searches

NAMES = tuple(searches())

# A paragraph each: the help screen joins the lines of a paragraph.
EXAMPLES = f"""[bold]Examples[/bold]

piadm scaling                                  d from 10 to 10^8, every sampler: less than a minute

piadm scaling --kl 0.01 --spectrum 0.1,1       another divergence, other data

piadm scaling --largest 1e6 --per-decade 1 --json scaling.json   fewer points; every figure as JSON

piadm scaling --only piadm-sde,engine-sde-secant   two of them

[bold]Names for --only[/bold]

{", ".join(NAMES)}
"""


@dataclass(frozen=True)
class Settings:
    """The options of one run.

    Raises:
        ValueError: If an option is out of its range or an output file cannot be written.
    """

    spectrum: tuple[float, ...]
    kl: float
    smallest: int
    largest: int
    per_decade: int
    early_stop: float
    only: tuple[str, ...] | None
    out: Path
    json: Path | None

    def __post_init__(self) -> None:
        for option, value in (("--kl", self.kl), ("--early-stop", self.early_stop)):
            finite_float(option, value, low=0.0)
        positive_int("--per-decade", self.per_decade, maximum=20)
        if len(self.dimensions()) < 4:
            raise ValueError(f"--largest must leave at least four dimensions to fit, got {self.largest:g}")
        check_names("--only", self.only, NAMES)
        files.check_writable("--out", self.out, ".png")
        if self.json is not None:
            files.check_writable("--json", self.json, ".json")

    def dimensions(self) -> list[int]:
        """Dimensions evenly in their logarithm, both ends included."""
        if self.largest <= self.smallest:
            return []
        decades = math.log10(self.largest / self.smallest)
        count = max(1, round(decades * self.per_decade))
        return [round(self.smallest * 10 ** (decades * i / count)) for i in range(count + 1)]


def scaling(
    spectrum: Annotated[
        str, typer.Option(help="Eigenvalues of the data's covariance, with commas, equally frequent.")
    ] = "0.05,0.3,1,3",
    kl: Annotated[float, typer.Option(help="Divergence from the early-stopped data, in nats.")] = 0.1,
    smallest: Annotated[str, typer.Option(help="Smallest dimension.")] = "10",
    largest: Annotated[str, typer.Option(help="Largest dimension.")] = "1e8",
    per_decade: Annotated[int, typer.Option(help="Dimensions per decade.")] = 2,
    early_stop: Annotated[float, typer.Option(help="OU time at which sampling ends.")] = 1e-2,
    only: Annotated[str | None, typer.Option(help="Names of samplers, with commas; all by default.")] = None,
    out: Annotated[Path, typer.Option(help="The figure (PNG).")] = Path("piadm-scaling.png"),
    json: options.Json = None,
) -> None:
    """Show how the rounds of parallel samplers and the steps of sequential ones grow with the dimension.

    For every sampler and dimension: the fewest rounds with a divergence of at most --kl from the data, noised up to
    the early-stopping time.  Exact for Gaussian data: nothing is sampled.
    """
    try:
        settings = Settings(
            spectrum=positives("--spectrum", spectrum), kl=kl, smallest=whole("--smallest", smallest),
            largest=whole("--largest", largest), per_decade=per_decade, early_stop=early_stop,
            only=None if only is None else words(only), out=out, json=json,
        )  # fmt: skip
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    run(settings)


def run(settings: Settings) -> None:
    """Search, then print and write what was found.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If no sampler reaches the divergence.
    """
    figure = files.drawing("scaling_figure")
    began = perf_counter()
    with progress.bar("scaling") as update:
        curves = measure(
            settings.spectrum, settings.dimensions(), kl=settings.kl, early_stop=settings.early_stop,
            names=settings.only, progress=update,
        )  # fmt: skip
    if not any(curve.points for curve in curves):
        raise ValueError(f"no sampler reaches a divergence of {settings.kl:g} here")
    paths = {"out": str(settings.out), "json": None if settings.json is None else str(settings.json)}
    report = Report(
        settings=asdict(settings) | paths,
        versions={"piadm": piadm.__version__},
        seconds=perf_counter() - began,
        curves=curves,
    )
    drawing = figure.draw(report)
    files.write_figure(settings.out, drawing)
    if settings.json is not None:
        report.write_json(settings.json)
    screen = progress.console(wide=True)
    screen.print(report.headline(), style="bold", soft_wrap=True)
    screen.print(report.table())
    screen.print(report.growth())
    screen.print(f"figure: {settings.out}", soft_wrap=True, markup=False)
