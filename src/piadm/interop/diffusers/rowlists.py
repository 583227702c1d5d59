"""Networks that take and return lists with one tensor per row: here their rows are those of tensors, as for all others.

Where the tensors of a list differ in shape, as captions of different lengths do, they stay apart, as one ``RowList``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: Arguments that may be lists with one tensor per row, of a network whose time is ``TIME``.
LISTED, TIME = ("x", "cap_feats"), "t"


class Stacked(list[Tensor]):
    """A list with one tensor per row as a list of one tensor with all of the rows."""


@dataclass(frozen=True, eq=False)
class RowList:
    """Tensors of different shapes, one per row.

    Attributes:
        items: the tensors.
    """

    items: tuple[Tensor, ...]

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, RowList)
            and [item.shape for item in self.items] == [item.shape for item in other.items]
            and all(map(torch.equal, self.items, other.items))
        )

    def __getitem__(self, rows: Tensor) -> RowList:
        return RowList(tuple(self.items[row] for row in rows.tolist()))


def is_time(name: str) -> bool:
    """Whether an argument of this name is a network's time."""
    return name == TIME or name.startswith("timestep")


def listed(arguments: dict[str, Any]) -> list[str]:
    """Which of a network's arguments are lists with one tensor per row."""
    return [name for name in LISTED if TIME in arguments and _is_list(arguments.get(name))]


def stacked(value: Any) -> Any:  # noqa: ANN401 - an argument or an output
    """Lists of tensors, also within tuples and dicts, as one ``Stacked`` or ``RowList`` each."""
    if _is_list(value):
        alike = len({item.shape for item in value}) == 1
        return Stacked([torch.stack(value)]) if alike else RowList(tuple(value))
    return _within(value, stacked)


def apart(value: Any) -> Any:  # noqa: ANN401 - an argument or an output
    """The lists again."""
    if isinstance(value, Stacked):
        return list(value[0].unbind())
    return list(value.items) if isinstance(value, RowList) else _within(value, apart)


def _is_list(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, Tensor) for item in value)


def _within(value: Any, change: Callable[[Any], Any]) -> Any:  # noqa: ANN401 - an argument or an output
    """A tuple or dict of changed parts; anything else as it is."""
    if isinstance(value, tuple):
        return tuple(map(change, value))
    if isinstance(value, dict):
        parts = {key: change(part) for key, part in value.items()}
        return parts if type(value) is dict else type(value)(**parts)  # diffusers' output objects are dicts
    return value
