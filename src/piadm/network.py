"""What is needed of a network besides calling it: its tensors, their dtype and device, the tensor in its output."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from numbers import Integral
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from piadm._checks import described

Network = Callable[..., Any]

#: Most wrappers around a network that are followed: objects that invent attributes seem to have no end of them.
DEEPEST = 32


def check_network(network: object) -> None:
    """Refuse what is no network.

    Raises:
        TypeError: if it cannot be called.
    """
    if not callable(network):
        raise TypeError(f"network must be callable as network(x, t, **condition), got {described(network)}")


def unwrap(output: Any) -> Tensor:  # noqa: ANN401 - anything a network may return
    """The tensor in a network's output: itself, the first of a tuple, or its ``.sample``.

    Raises:
        TypeError: if there is none.
    """
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    found = output if isinstance(output, Tensor) else getattr(output, "sample", None)
    if not isinstance(found, Tensor):
        raise TypeError(
            "network must return a tensor, a tuple that starts with one, or an object with one as .sample, "
            f"got {type(output).__name__}"
        )
    return found


def wrapped(network: object) -> object:
    """The callable that a network wraps, or None.

    It is the ``network`` of a wrapper such as ``GuidedNetwork``, the function of a ``functools.partial``, the object of
    a bound method, or the function that a decorator has wrapped.
    """
    if callable(inner := getattr(network, "network", None)):
        return inner
    if isinstance(network, functools.partial):
        return network.func
    if isinstance(network, MethodType):
        return None if isinstance(network.__self__, type) else network.__self__
    return getattr(network, "__wrapped__", None)


def layers(network: object) -> Iterator[object]:
    """A network, what it wraps, what that wraps, and so on: each once."""
    found: list[object] = []
    while network is not None and len(found) < DEEPEST and all(network is not one for one in found):
        found.append(network)
        yield network
        network = wrapped(network)


def module(network: object) -> object:
    """The first module among a network's layers, else the innermost."""
    found = list(layers(network))
    return next((one for one in found if isinstance(one, nn.Module)), found[-1])


def tensors(network: object) -> Iterator[Tensor]:
    """The parameters of a network, then its buffers, or those of the network that it wraps; nothing for a function."""
    owner = network if hasattr(network, "parameters") else module(network)
    for kind in ("parameters", "buffers"):
        listed = getattr(owner, kind, None)
        found = listed() if callable(listed) else ()
        yield from (one for one in (found if isinstance(found, Iterable) else ()) if isinstance(one, Tensor))


def network_dtype(network: object, default: torch.dtype) -> torch.dtype:
    """Dtype of the network's first floating-point tensor; ``default`` where it has none.

    Types of one byte store weights; nothing is computed in them.
    """
    wide = (one.dtype for one in tensors(network) if one.is_floating_point() and one.dtype.itemsize > 1)
    return next(wide, default)


def network_device(network: object) -> torch.device | None:
    """Device of the network's first tensor; None where it has none."""
    return next((one.device for one in tensors(network)), None)


def rows_per_call(network: object) -> int:
    """Rows that are evaluated per row handed to a network, by its ``rows_per_call``: two under guidance, else one."""
    stated = _stated(network, "rows_per_call")
    return 1 if stated is None else stated


def coordinates_per_row(network: object) -> int | None:
    """Coordinates of the rows that a network is made for, by its ``coordinates_per_row``; None where it has none."""
    return _stated(network, "coordinates_per_row")


def _stated(network: object, name: str) -> int | None:
    """The first whole number of that name among the attributes of a network's layers."""
    stated = (getattr(one, name, None) for one in layers(network))
    return next((int(number) for number in stated if isinstance(number, Integral)), None)
