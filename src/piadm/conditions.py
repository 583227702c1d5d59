"""Conditions, the network's arguments beside state and time: which of their values have one row per sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def has_rows(value: object) -> bool:
    """Whether a value has one row per sample: tensors and arrays of numbers have."""
    return isinstance(value, Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind in "biuf")


def parts(value: object) -> dict[Any, Any] | None:
    """The items of a mapping, list or tuple by key or index; None for any other value."""
    if isinstance(value, (list, tuple)):
        return dict(enumerate(value))
    return dict(value) if isinstance(value, Mapping) else None


def rebuilt(value: Any, inside: Mapping[Any, Any], fresh: Sequence[Any]) -> Any:  # noqa: ANN401 - any of these
    """A dict, list or tuple with the structure of ``value`` and new parts; ``value`` itself if no part has changed.

    Args:
        value: the mapping, list or tuple.
        inside: its ``parts``.
        fresh: those that take their place, in the same order.
    """
    if all(new is old for new, old in zip(fresh, inside.values(), strict=True)):
        return value
    if isinstance(value, Mapping):
        return dict(zip(inside, fresh, strict=True))
    if hasattr(value, "_make"):  # a named tuple
        return value._make(fresh)
    return list(fresh) if isinstance(value, list) else tuple(fresh)


def with_rows(value: Any, change: Callable[[Any, str], Any], name: str = "condition") -> Any:  # noqa: ANN401
    """A condition with ``change(it, name)`` in place of every value with rows, also in mappings, lists and tuples.

    Args:
        value: the condition, or all of them by name.
        change: called with a tensor or array and its name, such as ``condition['obs']['image']``.
        name: the condition's own name.
    """
    if has_rows(value):
        return change(value, name)
    if (inside := parts(value)) is None:
        return value
    return rebuilt(value, inside, [with_rows(item, change, f"{name}[{key!r}]") for key, item in inside.items()])


def as_tensor(array: NDArray[Any]) -> Tensor:
    """A copy of an array as a tensor; unsigned integers of more than a byte become int64, longer floats float64."""
    near = array.dtype.newbyteorder("=")
    if near.kind == "u" and near.itemsize > 1:
        near = np.dtype(np.int64)
    elif near.kind == "f" and near.itemsize > 8:
        near = np.dtype(np.float64)
    return torch.from_numpy(array.astype(near, order="C"))
