"""Options that several commands share."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Process(str, Enum):
    """The process that is solved from noise to data."""

    SDE = "sde"
    ODE = "ode"


Model = Annotated[str, typer.Option(help="fashion, mixture, or module:attribute of a Denoiser.")]
Shape = Annotated[str | None, typer.Option(help="One sample of your own model, such as 3,32,32.")]
Condition = Annotated[
    Path | None, typer.Option(help="A .safetensors file: the network's arguments by name, a row per sample.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... or auto; default: the model's.")]
Method = Annotated[Process, typer.Option(help="Stochastic or deterministic sampler.")]
Steps = Annotated[int, typer.Option(help="Steps of the sequential sampler, the right answer.")]
Seed = Annotated[int, typer.Option(help="Seed of the noise, shared by all.")]
MaxBatch = Annotated[int | None, typer.Option(help="Most rows handed to the network at once.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; torch's own choice by default.")]
Json = Annotated[Path | None, typer.Option(help="Write every figure to this file.")]
