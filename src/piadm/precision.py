"""How finely a network computes, as far as its tensors and PyTorch's settings tell."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from piadm.network import module, network_device, network_dtype
from piadm.numerics import autocast_dtype

#: Relative spacing of numbers from which on they count as half precision: float16 and TF32 have 1e-3, float32 1e-7.
HALF = 1e-4

#: Relative spacing of TF32, which has the range of float32 and the digits of float16.
TF32 = 2.0**-10

CONVOLUTIONS: tuple[type[nn.Module], ...] = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)


def resolution(network: object) -> float:
    """Relative spacing of the numbers that a network computes with, as far as its tensors and settings tell.

    It is that of its dtype, of a surrounding autocast, or of the TF32 in which its layers multiply, if coarser.  What a
    network does inside, such as an autocast of its own, is measured where it matters (``Witness``).
    """
    device, dtype = network_device(network) or torch.device("cpu"), network_dtype(network, torch.float32)
    found = max(torch.finfo(one).eps for one in (dtype, autocast_dtype(device) or torch.float32))
    return max(found, TF32) if dtype == torch.float32 and _multiplies_in_tf32(network, device) else found


def _multiplies_in_tf32(network: object, device: torch.device) -> bool:
    """Whether some layers of a network take TF32 for float32 on a device; convolutions on GPUs do by default."""
    parts, kinds = getattr(module(network), "modules", None), tf32_layers(device)
    found = parts() if kinds and callable(parts) else ()
    return any(isinstance(layer, kinds) for layer in (found if isinstance(found, Iterable) else ()))


def tf32_layers(device: torch.device) -> tuple[type[nn.Module], ...]:
    """The layers that multiply numbers of float32 as TF32 on a device, as PyTorch is set; none but on recent GPUs."""
    # PyTorch 2.4 cannot say; the same GPUs have both.
    supported = getattr(torch.cuda, "is_tf32_supported", torch.cuda.is_bf16_supported)
    if device.type != "cuda" or not supported():
        return ()
    backends = torch.backends
    convolutions = _allows_tf32(getattr(backends.cudnn, "conv", None), backends.cudnn)
    products = _allows_tf32(backends.cuda.matmul, backends.cuda.matmul)
    return CONVOLUTIONS * convolutions + (nn.Linear, nn.MultiheadAttention) * products


def _allows_tf32(backend: object, before: object) -> bool:
    """Whether a backend may multiply in TF32; ``before`` PyTorch 2.9 another one, with another switch, said so."""
    found = getattr(backend, "fp32_precision", None)
    return found == "tf32" if found is not None else bool(getattr(before, "allow_tf32", False))
