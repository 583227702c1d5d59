"""What the library asks of a network beside calling it: its tensors, their dtype and device, and what it returned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from piadm.numerics import autocast_dtype

Network = Callable[..., Any]


def unwrap(output: Any) -> Tensor:  # noqa: ANN401 - anything a network may return
    """The tensor in a network's output: itself, the first of a tuple, or its ``.sample``.

    Raises:
        TypeError: if there is none.
    """
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    output = output if isinstance(output, Tensor) else getattr(output, "sample", output)
    if not isinstance(output, Tensor):
        raise TypeError(
            "network must return a tensor, a tuple that starts with one, or an object with .sample, "
            f"got {type(output).__name__}"
        )
    return output


def layers(network: object) -> Iterator[object]:
    """A network and, where it wraps one as ``GuidedNetwork`` does, its ``network``, and so on."""
    yield network
    while callable(network := getattr(network, "network", None)):
        yield network


def module(network: object) -> object:
    """The first module among a network's layers, else the innermost."""
    found = list(layers(network))
    return next((one for one in found if isinstance(one, nn.Module)), found[-1])


def tensors(network: object) -> Iterator[Tensor]:
    """The parameters of a network, then its buffers, or those of the network in a wrapper; none of a function."""
    owner = network if hasattr(network, "parameters") else module(network)
    for kind in ("parameters", "buffers"):
        listed = getattr(owner, kind, None)
        yield from (one for one in (listed() if callable(listed) else ()) if isinstance(one, Tensor))


def network_dtype(network: object, default: torch.dtype) -> torch.dtype:
    """Dtype of the network's first floating-point tensor; ``default`` where it has none."""
    return next((one.dtype for one in tensors(network) if one.is_floating_point()), default)


def network_device(network: object) -> torch.device | None:
    """Device of the network's first tensor; None where it has none."""
    return next((one.device for one in tensors(network)), None)


def rows_per_call(network: object) -> int:
    """Rows that a network makes of one that it is given, as a wrapper says: two under guidance, else one."""
    return next((int(one.rows_per_call) for one in layers(network) if hasattr(one, "rows_per_call")), 1)


def resolution(network: object) -> float:
    """Relative spacing of the numbers that a network computes with, those of a surrounding autocast if coarser."""
    device = network_device(network) or torch.device("cpu")
    dtypes = network_dtype(network, torch.float32), autocast_dtype(device) or torch.float32
    return max(torch.finfo(dtype).eps for dtype in dtypes)
