"""Whether two processes were given the same: a short text for every argument."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from piadm._checks import shown
from piadm.conditions import as_tensor, has_rows
from piadm.network import module, tensors, wrapped

#: Entries of every parameter that are read: enough to tell two sets of weights apart, few enough for any network.
PEEK = 64


def fingerprint(value: Any) -> str:  # noqa: ANN401 - any argument
    """A text that is the same for equal values in any process.

    Arrays count by shape, type and contents; networks by the first entries of every parameter and buffer; a wrapper by
    its settings and its network; generators by what they will draw; other functions and objects by their name alone.
    """
    if isinstance(value, np.ndarray) and not has_rows(value):  # of words or other objects
        return fingerprint(value.tolist())
    if isinstance(value, (Tensor, np.ndarray)):
        return f"{shown(value)} {_checksum(value):08x}"
    if isinstance(value, torch.Generator):
        return f"a generator of seed {value.initial_seed()}, at {_checksum(value.get_state()):08x}"
    if value is None or isinstance(value, (str, bytes, int, float, torch.dtype, torch.device)):
        return shown(value)
    if isinstance(value, Mapping):
        return f"{{{', '.join(sorted(f'{name}: {fingerprint(item)}' for name, item in value.items()))}}}"
    if isinstance(value, Sequence):
        return f"[{', '.join(map(fingerprint, value))}]"
    name = getattr(value, "__qualname__", type(value).__qualname__)
    if is_dataclass(value) and not isinstance(value, type):
        return f"{name}({', '.join(fingerprint(getattr(value, field.name)) for field in fields(value))})"
    if isinstance(value, functools.partial):
        return f"partial({fingerprint([value.func, *value.args])}, {fingerprint(value.keywords)})"
    if module(value) is not value:  # a wrapper
        settings = {key: item for key, item in getattr(value, "__dict__", {}).items() if not key.startswith("_")}
        if isinstance(value, (FunctionType, MethodType)):
            settings["of"] = wrapped(value)
        return f"{name}({fingerprint(settings)})"
    return name + _weights(value)


def _weights(network: Any) -> str:  # noqa: ANN401 - any callable
    """The first entries of every tensor of a network, as a checksum; nothing where it has none."""
    sums = [f"{tuple(one.shape)}{_checksum(one.flatten()[:PEEK])}" for one in tensors(network)]
    return f" {zlib.crc32(' '.join(sums).encode()):08x}" if sums else ""


def _checksum(array: Tensor | NDArray[Any]) -> int:
    if isinstance(array, Tensor) and array.is_meta:  # of a network whose weights are elsewhere: there are no numbers
        return 0
    host = (array if isinstance(array, Tensor) else as_tensor(array)).detach().to("cpu").to_dense().resolve_conj()
    return zlib.crc32(host.contiguous().flatten().view(torch.uint8).numpy().tobytes())
