"""The options of a run as figures have them, in the JSON file and in headlines."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from piadm.cli.given import Conditions
    from piadm.cli.model import ModelName


class OfModel(Protocol):
    """Options, as a dataclass, of a command that takes a model."""

    @property
    def model(self) -> ModelName:
        """The model."""

    @property
    def condition(self) -> Conditions:
        """Its conditions."""


def written(settings: OfModel, device: torch.device) -> dict[str, Any]:
    """All options by name, files and the model by theirs, with the device and the threads that were used."""
    options = asdict(settings)  # type: ignore[call-overload]
    options |= {
        "model": settings.model.name,
        "shape": list(settings.model.sample_shape()),
        "condition": settings.condition.name,
        "device": str(device),
        "threads": torch.get_num_threads(),
    }
    return {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
