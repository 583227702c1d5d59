"""Values in nested dicts, lists and tuples: the arguments of networks, and what these return."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: The way to a value.
Path = tuple[Any, ...]


def leaves(tree: Any, path: Path = ()) -> dict[Path, Any]:  # noqa: ANN401 - any arguments
    """The values in nested dicts, lists and tuples, by the way to them."""
    if isinstance(tree, dict):
        parts = list(tree.items())
    elif isinstance(tree, (list, tuple)):
        parts = list(enumerate(tree))
    else:
        return {path: tree}
    return {at: leaf for key, part in parts for at, leaf in leaves(part, (*path, key)).items()}


def rebuilt(tree: Any, fresh: Callable[[Path], Any], path: Path = ()) -> Any:  # noqa: ANN401 - any arguments
    """The same nesting with other values, ``fresh(path)``."""
    if isinstance(tree, dict):
        parts = {key: rebuilt(part, fresh, (*path, key)) for key, part in tree.items()}
        return parts if type(tree) is dict else type(tree)(**parts)  # diffusers' output objects are dicts
    if isinstance(tree, (list, tuple)):
        return type(tree)([rebuilt(part, fresh, (*path, key)) for key, part in enumerate(tree)])
    return fresh(path)


def with_tensors(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:  # noqa: ANN401 - any nesting
    """The same nesting with other tensors."""
    flat = leaves(tree)
    return rebuilt(tree, lambda path: change(flat[path]) if isinstance(flat[path], Tensor) else flat[path])


def copied(tree: Any) -> Any:  # noqa: ANN401 - any arguments
    """The same values in lists, dicts and tensors of their own: networks use them up, pipelines write into them."""
    return with_tensors(tree, Tensor.clone)


def same(one: Any, other: Any) -> bool:  # noqa: ANN401 - any values
    """Whether two arguments are equal."""
    if one is other or type(one) is not type(other):
        return one is other
    if isinstance(one, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    try:
        return bool(one == other)
    except (ValueError, RuntimeError, TypeError):  # objects that cannot be compared
        return False
