"""Trained models as a folder: ``config.json``, ``weights.safetensors`` and, of a draft, ``draft.safetensors``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_of
from torch import Tensor, nn

from piadm._checks import choice, device_here
from piadm.denoiser import Denoiser
from piadm.models.lowrank import drafted
from piadm.schedule import DiscreteSchedule

SHIPPED = ("fashion",)
_HERE = Path(__file__).parent
_REMEDY = "reinstall piadm, or write the folder anew with training/train_fashion.py"


def load(name: str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Denoiser:
    """Load a model that comes with the package.

    Args:
        name: ``"fashion"``: 28 x 28 grey garments, ``x`` of shape ``(R, 1, 28, 28)`` in [-1, 1], times on the
            1000-step linear DDPM table, prediction v (see the model card beside the weights).
        device: Where the network lives.
        dtype: Floating-point type of the network (the weights are stored in half precision).

    Returns:
        The denoiser, in evaluation mode and without gradients for its weights, with a draft.

    Raises:
        TypeError: If ``name`` is not a string or ``dtype`` not a ``torch.dtype``.
        ValueError: If ``name`` is unknown, ``device`` is not available or ``dtype`` not floating point.
        ImportError: If diffusers, which defines the network, is not installed.
        FileNotFoundError: If a file of the model is missing.
    """
    return load_folder(_HERE / choice("name", name, SHIPPED), device=device, dtype=dtype)


def load_folder(
    folder: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Denoiser:
    """Load a model from a folder written by ``training/train_fashion.py``.

    Args:
        folder: Holds ``config.json`` (network, prediction, betas, data), ``weights.safetensors`` and, if there is to be
            a draft, ``draft.safetensors`` (a ``LowRankMixtureNetwork``, written by ``training/fit_draft.py``).
        device: Where the network lives.
        dtype: Floating-point type of the network.

    Returns:
        The denoiser, in evaluation mode and without gradients for its weights.

    Raises:
        TypeError: If ``dtype`` is not a ``torch.dtype``.
        ValueError: If a file cannot be read, the files do not fit each other, ``device`` is not available
            or ``dtype`` is not floating point.
        ImportError: If diffusers, which defines the network, is not installed.
        FileNotFoundError: If a file of the model is missing.
    """
    _check_target(device, dtype)
    settings = _read_settings(Path(folder) / "config.json")
    network = _build_network(settings["network"], _read_weights(Path(folder) / "weights.safetensors", device, dtype))
    betas, data = settings["betas"], settings["data"]
    schedule = DiscreteSchedule.ddpm(betas["timesteps"], beta_start=betas["start"], beta_end=betas["end"])
    plain = Denoiser(network, schedule, settings["prediction"], data_mean=data["mean"], data_variance=data["variance"])
    file = Path(folder) / "draft.safetensors"
    return _with_draft(plain, _read_weights(file, device, dtype)) if file.is_file() else plain


def _check_target(device: torch.device | str, dtype: torch.dtype) -> None:
    """Refuse a device that this machine lacks and a type that is not floating point."""
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype, got {dtype!r} of type {type(dtype).__name__}")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point type such as torch.float32, got {dtype}")
    device_here("device", device)


def _present(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; {_REMEDY}")
    return path


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(_present(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON object ({error}); {_REMEDY}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is not a JSON object but a {type(settings).__name__}; {_REMEDY}")
    missing = [key for key in ("network", "prediction", "betas", "data") if key not in settings]
    if missing:
        raise ValueError(f"{path} lacks the entries {', '.join(missing)}; {_REMEDY}")
    return settings


def _read_weights(path: Path, device: torch.device | str, dtype: torch.dtype) -> dict[str, Tensor]:
    try:
        # Not load_file: older releases of safetensors let it put them on the default device.
        stored = tensors_of(_present(path).read_bytes())
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}); {_REMEDY}") from error
    return {name: tensor.to(device, dtype) for name, tensor in stored.items()}


def _build_network(settings: dict[str, Any], weights: dict[str, Tensor]) -> nn.Module:
    """Build the U-Net around the stored weights, without drawing a single random number."""
    try:
        from diffusers import UNet2DModel
    except ImportError as error:
        raise ImportError('this model needs diffusers: pip install "piadm[diffusers]"') from error
    try:
        # On the meta device nothing is initialised: no time spent, and the global generator stays as it was.
        with torch.device("meta"):
            network: nn.Module = UNet2DModel(**settings)
        network.load_state_dict(weights, assign=True)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"weights.safetensors and config.json do not fit each other ({error}); {_REMEDY}") from error
    network.eval().requires_grad_(False)
    if all(tensor.device.type == "cpu" for tensor in weights.values()):
        # Convolutions in this layout are 5 to 15 % faster on CPUs, and equal to rounding.
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


def _with_draft(denoiser: Denoiser, parts: dict[str, Tensor]) -> Denoiser:
    try:
        return drafted(denoiser, parts)
    except TypeError as error:
        raise ValueError(f"draft.safetensors is no mixture of low-rank Gaussians ({error}); {_REMEDY}") from error
