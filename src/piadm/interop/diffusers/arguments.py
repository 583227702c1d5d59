"""The arguments of a network in a pipeline's loop, recorded step by step, and served row by row.

A pipeline hands its network the state, perhaps doubled for guidance and beside other channels, the time, and conditions:
tensors with one row per network row, and values that all rows share.  Which argument is what shows in a rehearsal: the
state is known, what changes with the steps belongs to a step, and what came from another network is marked by NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from piadm.interop.diffusers.probe import UnsupportedError

#: Arguments that all rows share even where their first axis happens to be as long as the batch: positions.
SHARED = ("img_ids", "txt_ids", "image_rotary_emb", "rotary_embedding", "freqs_cis")

#: Arguments that may have several rows per network row, one per frame.
PER_FRAME = ("encoder_hidden_states",)


def leaves(tree: Any, path: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], Any]:  # noqa: ANN401 - any arguments
    """The values in nested dicts, lists and tuples, by the way to them."""
    if isinstance(tree, dict):
        pairs: Any = tree.items()
    elif isinstance(tree, (list, tuple)):
        pairs = enumerate(tree)
    else:
        return {path: tree}
    return {at: leaf for key, part in pairs for at, leaf in leaves(part, (*path, key)).items()}


def rebuilt(tree: Any, fresh: Callable[[tuple[Any, ...]], Any], path: tuple[Any, ...] = ()) -> Any:  # noqa: ANN401
    """The same nesting with other values, ``fresh(path)``."""
    if isinstance(tree, dict):
        parts = {key: rebuilt(part, fresh, (*path, key)) for key, part in tree.items()}
        return type(tree)(**parts) if type(tree) is not dict else parts  # an output object of diffusers is a dict
    if isinstance(tree, (list, tuple)):
        return type(tree)([rebuilt(part, fresh, (*path, key)) for key, part in enumerate(tree)])
    return fresh(path)


@dataclass(frozen=True)
class Rows:
    """Rows that a round evaluates.

    Attributes:
        state: what the network is to read, scaled, shape ``(r, *shape)``.
        samples: sample of every row, shape ``(r,)`` int64.
        calls: step of every row, shape ``(r,)`` int64.
    """

    state: Tensor
    samples: Tensor
    calls: Tensor

    def __getitem__(self, at: Tensor) -> Rows:
        return Rows(self.state[at], self.samples[at], self.calls[at])


@dataclass(frozen=True)
class StateAt:
    """The state within an argument: ``chunks`` copies of the batch, entries ``first .. last - 1`` of ``axis``."""

    path: tuple[Any, ...]
    chunks: int
    axis: int
    first: int
    last: int

    def of(self, leaf: Tensor) -> Tensor:
        """The state's part of the argument, a view."""
        return leaf.narrow(self.axis, self.first, self.last - self.first)


class Slot:
    """One network call in the body of a pipeline's loop, over all ``J`` steps.

    Args:
        name: the network, for messages.
        calls: its arguments at each of the steps, by name.
        state: the state at step ``sure``, shape ``(L, *shape)``, no two rows of which are alike.
        sure: that step.

    Raises:
        UnsupportedError: if the state is not found among the arguments.
    """

    def __init__(self, name: str, calls: Sequence[dict[str, Any]], state: Tensor, sure: int, denoises: bool) -> None:
        self.name, self.batch, self.pattern = name, len(state), calls[-1]
        flat = [leaves(call) for call in calls]
        if any(step.keys() != flat[0].keys() for step in flat):
            raise UnsupportedError(f"{name} is called with other arguments at some steps than at others")
        self.state = _find_state(name, flat[sure], state)
        self.tables: dict[tuple[Any, ...], Tensor] = {}
        self.live: set[tuple[Any, ...]] = set()
        self.plain: dict[tuple[Any, ...], list[Any]] = {}
        for path in flat[0]:
            self._sort(path, [step[path] for step in flat])
        self.groups = self._groups(len(calls))
        self.denoises = denoises

    def _sort(self, path: tuple[Any, ...], values: list[Any]) -> None:
        """Say what an argument is, from its values at all steps."""
        timed = str(path[0]).startswith("timestep")
        if timed and isinstance(values[0], (int, float)):
            values = [torch.tensor(value) for value in values]
        tensors = all(isinstance(value, Tensor) for value in values)
        if path == self.state.path:
            values = [self._rest(value) for value in values]
        elif tensors and any(value.is_floating_point() and bool(value.isnan().any()) for value in values):
            self.live.add(path)
            return
        if not tensors:
            self.plain[path] = values
            return
        same = all(value is values[0] or _equal(value, values[0]) for value in values[1:])
        self.tables[path] = values[0][None] if same else torch.stack(values)

    def _rest(self, leaf: Tensor) -> Tensor:
        """The argument that holds the state, without it."""
        rest = leaf.clone()
        self.state.of(rest).zero_()
        return rest

    def _groups(self, count: int) -> Tensor:
        """Steps with equal values that all rows share have one number, shape ``(J,)``."""
        seen: list[list[Any]] = []
        numbers = []
        for j in range(count):
            own = [values[j] for values in self.plain.values()]
            number = next((k for k, other in enumerate(seen) if _all_same(own, other)), len(seen))
            seen += [own] if number == len(seen) else []
            numbers.append(number)
        return torch.tensor(numbers)

    def call(self, network: Callable[..., Any], arguments: dict[str, Any], rows: Rows) -> Any:  # noqa: ANN401
        """The network's output for some rows, ``chunks r`` of its rows.

        Args:
            network: takes arguments by name in a dict.
            arguments: what the pipeline hands it now; only what came from another network is read.
            rows: the rows.
        """
        now, count = leaves(arguments), len(rows.state)
        group = self.groups.to(rows.calls.device)[rows.calls]
        parts, order = [], []
        for number in group.unique().tolist():
            at = (group == number).nonzero().squeeze(1)
            chosen = (torch.arange(self.state.chunks, device=at.device)[:, None] * count + at).flatten()
            step, some = int(rows.calls[at[0]]), rows[at]

            def fresh(path: tuple[Any, ...], step: int = step, some: Rows = some, chosen: Tensor = chosen) -> Any:  # noqa: ANN401
                if path in self.live:
                    return now[path][chosen] if len(now[path]) == self.state.chunks * count else now[path]
                return self.plain[path][step] if path in self.plain else self._rows(path, some)

            parts.append(leaves(output := network(rebuilt(self.pattern, fresh))))
            order.append(chosen)
        if len(parts) == 1:
            return output
        back = torch.cat(order).argsort()
        return rebuilt(output, lambda path: torch.cat([part[path] for part in parts])[back])

    def _rows(self, path: tuple[Any, ...], rows: Rows) -> Tensor:
        """A tensor argument for some rows."""
        table, total = self.tables[path], self.state.chunks * self.batch
        chunk = torch.arange(self.state.chunks, device=rows.samples.device)[:, None] * self.batch
        row, step = (chunk + rows.samples).flatten(), rows.calls.repeat(self.state.chunks)
        steps = torch.zeros_like(step) if len(table) == 1 else step
        row, steps = row.to(table.device), steps.to(table.device)
        if path == self.state.path:
            whole = table[steps, row]
            state = rows.state.to(whole).repeat(self.state.chunks, *[1] * (whole.ndim - 1))
            self.state.of(whole).copy_(state)
            return whole
        if table[0].numel() == 1 and len(table) > 1:
            return table.flatten()[steps]
        shared = set(path) & set(SHARED)
        if table.ndim > 1 and not shared:
            if table.shape[1] == total:
                return table[steps, row]
            if table.shape[1] == self.batch:
                return table[steps[: len(rows.samples)], rows.samples.to(table.device)]
            if path[-1] in PER_FRAME and table.shape[1] % total == 0:
                return table.unflatten(1, (total, -1))[steps, row].flatten(0, 1)
        if len(table) > 1:
            raise UnsupportedError(f"argument {path[0]!r} of {self.name} changes with the steps, for all rows at once")
        return table[0]


def _find_state(name: str, arguments: dict[tuple[Any, ...], Any], state: Tensor) -> StateAt:
    """Where the state stands among the arguments."""
    for path, leaf in arguments.items():
        if not isinstance(leaf, Tensor) or leaf.ndim != state.ndim or len(leaf) % len(state):
            continue
        chunks = len(leaf) // len(state)
        longer = [k for k in range(1, leaf.ndim) if leaf.shape[k] != state.shape[k]]
        if len(longer) > 1 or any(leaf.shape[k] < state.shape[k] for k in longer):
            continue
        axis = longer[0] if longer else 1
        wanted = state.to(leaf).repeat(chunks, *[1] * (state.ndim - 1))
        for first in range(leaf.shape[axis] - state.shape[axis] + 1):
            found = StateAt(path, chunks, axis, first, first + state.shape[axis])
            if torch.equal(found.of(leaf), wanted):
                return found
    raise UnsupportedError(
        f"{name} does not read the scheduler's state as it is: the pipeline changes it in a way that is not known"
    )


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


def _all_same(some: list[Any], others: list[Any]) -> bool:
    """Whether two lists hold the same plain values."""
    return all(one is other or (type(one) is type(other) and _plainly(one, other)) for one, other in zip(some, others, strict=True))


def _plainly(one: Any, other: Any) -> bool:  # noqa: ANN401 - any value
    try:
        return bool(one == other)
    except (ValueError, RuntimeError, TypeError):
        return False
