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


def packed(output: Any, chunks: int, batch: int) -> Any:  # noqa: ANN401 - a network's output
    """Rows of an output as ``batch`` of every chunk, several in one, side by side along the last axis but one.

    Pipelines walk such lists with the number of their samples in mind, not that of a round's rows.

    Args:
        output: tensors in ``Stacked`` lists, with ``chunks`` times as many rows as a round has.
        chunks: number of copies of the round's rows.
        batch: number of samples.
    """
    if not isinstance(output, Stacked):
        return _within(output, lambda part: packed(part, chunks, batch))
    own = output[0].shape[1:]
    rows = output[0].reshape(chunks, -1, *own)
    several = -(-rows.shape[1] // batch)
    rest = rows[:, -1:].expand(-1, several * batch - rows.shape[1], *own)
    rows = torch.cat([rows, rest], 1).reshape(chunks * batch, several, *own)
    return Stacked([rows.movedim(1, -3).flatten(-3, -2)])


def unpacked(output: Tensor, height: int, copies: int, count: int) -> Tensor:
    """What a pipeline has made of ``packed`` outputs, with ``copies`` of ``count`` rows of this height."""
    several = output.shape[-2] // height
    rows = output.reshape(*output.shape[:-2], several, height, output.shape[-1]).movedim(-3, 1)
    return rows.reshape(copies, -1, *rows.shape[2:])[:, :count].flatten(0, 1)


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
