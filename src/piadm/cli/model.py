"""The models of the commands: the shipped one, a mixture, or an object of the user's."""

from __future__ import annotations

import inspect
import os
import sys
from dataclasses import dataclass
from importlib import import_module
from operator import attrgetter
from typing import Any

import torch
from torch import nn

import piadm
from piadm.denoiser import Denoiser
from piadm.models import MixtureDenoiser
from piadm.network import module, network_device
from piadm.schedule import DiscreteSchedule

FASHION, MIXTURE = "fashion", "mixture"
FASHION_SHAPE = (1, 28, 28)
_MIXTURE_SHAPE, _COMPONENTS, _SPREAD, _VARIANCE = (1, 8, 8), 10, 0.5, 0.01


@dataclass(frozen=True)
class ModelName:
    """What ``--model``, ``--shape`` and ``--device`` say.

    Raises:
        ValueError: If the three do not fit together.
    """

    name: str
    shape: str | None
    device: str | None

    def __post_init__(self) -> None:
        own = self.name not in (FASHION, MIXTURE)
        source, _, attribute = self.name.partition(":")
        if own and not (source and attribute):
            raise ValueError(f"--model must be {FASHION}, {MIXTURE} or module:attribute, got {self.name!r}")
        if own and self.shape is None:
            raise ValueError(f"--shape must say what one sample of {self.name!r} looks like, such as 3,32,32")
        if not own and self.shape is not None:
            raise ValueError(f"--shape is for a model of your own; {self.name!r} has one")
        if self.name == MIXTURE and self.device not in (None, "cpu"):
            raise ValueError(f"--device must be cpu for the {MIXTURE}, got {self.device!r}")
        self.sample_shape()

    def sample_shape(self) -> tuple[int, ...]:
        """The shape of one sample.

        Raises:
            ValueError: If ``--shape`` is not a list of positive integers.
        """
        if self.shape is None:
            return FASHION_SHAPE if self.name == FASHION else _MIXTURE_SHAPE
        try:
            sizes = tuple(int(size) for size in self.shape.split(","))
        except ValueError:
            sizes = ()
        if not sizes or min(sizes) < 1:
            raise ValueError(f"--shape must be positive integers with commas, such as 3,32,32, got {self.shape!r}")
        return sizes

    def counted(self, number: int) -> str:
        """So many samples, in words."""
        return f"{number} {'garment' if self.name == FASHION else 'sample'}{'s' * (number != 1)}"

    def load(self) -> Denoiser:
        """The denoiser, on the device that was asked for.

        Raises:
            ValueError: If there is no such object, it is no denoiser, or it cannot be moved to the device.
            ImportError: If the shipped model lacks diffusers.
        """
        if self.name == FASHION:
            return piadm.load(FASHION, device=self.device or "cpu")
        if self.name == MIXTURE:
            return mixture()
        denoiser = _denoiser(self.name)
        if self.device is not None:
            _move(denoiser, self.device)
        return denoiser


def _move(denoiser: Denoiser, device: str) -> None:
    """Move a denoiser's network and its draft's, within wrappers too."""
    network = module(denoiser.network)
    if isinstance(network, nn.Module):
        network.to(device)
    elif (there := network_device(network) or torch.device("cpu")).type != torch.device(device).type:
        raise ValueError(f"--device {device}: the model is no torch module that could be moved there from {there}")
    if denoiser.draft is not None:
        _move(denoiser.draft, device)


def mixture() -> Denoiser:
    """Ten narrow Gaussians in 64 dimensions, on the table of DDPM: exact, and free of cost."""
    generator = torch.Generator().manual_seed(0)
    means = _SPREAD * torch.randn(_COMPONENTS, *_MIXTURE_SHAPE, generator=generator, dtype=torch.float32, device="cpu")
    return MixtureDenoiser(DiscreteSchedule.ddpm(), means, _VARIANCE)


def _denoiser(name: str) -> Denoiser:
    """The denoiser that ``module:attribute`` is, or that it returns when called without arguments."""
    source, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as python -m would: the module may lie here, not in site-packages
    try:
        found = attrgetter(attribute)(import_module(source))
        if not isinstance(found, Denoiser) and _is_factory(found):
            found = found()
    except (Exception, SystemExit) as error:  # whatever a user's module raises; a script ends with sys.exit()
        raise ValueError(f"--model {name!r} could not be loaded: {type(error).__name__}: {error}") from error
    if not isinstance(found, Denoiser):
        raise ValueError(
            f"--model {name!r} must be a piadm.Denoiser, or a function without arguments that returns one, "
            f"got {type(found).__name__}"
        )
    return found


def _is_factory(found: Any) -> bool:  # noqa: ANN401 - whatever the user's module has
    """Whether an object can be called without arguments: a network cannot, though every module takes any."""
    try:
        inspect.signature(getattr(found, "forward", found)).bind()
    except ValueError:  # some functions tell no signature
        return True
    except TypeError:
        return False
    return True
