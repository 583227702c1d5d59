"""The arguments of a network in a pipeline's loop: learnt step by step in a rehearsal, served row by row in a round.

A pipeline hands its network the state, perhaps repeated for guidance and beside other channels, the time, and
conditions: tensors with one row per network row, and values that all rows share.  Which argument is what shows in the
rehearsal: the state is known, what changes with the steps belongs to a step, and what came from another network is NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from piadm.interop.diffusers.layout import CHANGING, find_state
from piadm.interop.diffusers.nested import Path, leaves, rebuilt, same, with_tensors
from piadm.interop.diffusers.probe import UnsupportedError
from piadm.interop.diffusers.rowlists import RowList, Stacked, is_time, packed

#: All that is known of single networks, by the names of their arguments.  Positions and scales, of up to two axes,
#: that all rows share even where the first happens to be as long as the batch; what has one row for all, of any axes;
#: conditions with several rows per network row, one per frame; and those of several layers, whose second axis has the
#: rows.
SHARED = (
    "img_ids", "txt_ids", "image_rotary_emb", "freqs_cis", "img_shapes", "txt_seq_lens", "control_hidden_states_scale",
    "visual_rope_pos", "text_rope_pos", "rotary_embedding", "image_cond_ids", "indices_latents",
    "indices_latents_clean", "indices_latents_history_2x", "indices_latents_history_4x",
)  # fmt: skip
SINGLE = ("padding_mask",)
PER_FRAME = ("encoder_hidden_states", "encoder_hidden_states_image")
PER_LAYER = ("encoder_hidden_states_llama3",)


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

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, at: Tensor | slice) -> Rows:
        return Rows(self.state[at], self.samples[at], self.calls[at])


@dataclass(frozen=True)
class Piece:
    """One network call for some rows of a round.

    Attributes:
        places: their places among all of the network's rows of the round, every copy of the batch; None: they are all.
        arguments: by name.
    """

    places: Tensor | None
    arguments: dict[str, Any]

    @property
    def size(self) -> int:
        """Number of its rows, where it has a share of the round's."""
        return 0 if self.places is None else len(self.places)


class Slot:
    """One network call in the body of a pipeline's loop.

    Args:
        name: the network, for messages.
        arguments: what it is given at some step, by name.
        state: the state at that step, shape ``(L, *shape)``, no two rows of which are alike.
        denoises: whether its output is the model output, not something for another network.

    Raises:
        UnsupportedError: if the state is not found among the arguments.
    """

    def __init__(self, name: str, arguments: dict[str, Any], state: Tensor, *, denoises: bool) -> None:
        self.name, self.pattern, self.batch, self.denoises = name, arguments, len(state), denoises
        self.state = find_state(name, leaves(arguments), state)
        self.listed = isinstance(arguments[self.state.path[0]], Stacked)
        self.count = 0
        self.factors: list[float] = []  # by which the state is multiplied, at every step
        self.values: dict[Path, list[Any]] = {}  # one entry where all steps have the same
        self.live: set[Path] = set()

    def learn(self, arguments: dict[str, Any], state: Tensor) -> None:
        """Take in the arguments of the next step, which are kept.

        Args:
            arguments: by name.
            state: the state at that step, shape ``(L, *shape)``.
        """
        flat = leaves(arguments)
        if flat.keys() != leaves(self.pattern).keys():
            raise UnsupportedError(f"{self.name} is called with other arguments at some steps than at others")
        if (factor := self.state.factor(flat[self.state.path], state)) is None:
            raise UnsupportedError(CHANGING.format(self.name))
        self.factors.append(factor)
        for path, value in flat.items():
            known = self.values.get(path, [])
            if len(known) == 1 and same(value, known[0]):
                continue
            if isinstance(value, Tensor) and value.is_floating_point() and bool(value.isnan().any()):
                self.live.add(path)
                continue
            value = self.kept(path, value)
            known = self.values.setdefault(path, [value])
            if self.count and (len(known) > 1 or not same(value, known[0])):
                if path == self.state.path and self.state.mask is not None:
                    raise UnsupportedError(CHANGING.format(self.name))
                known += [known[0]] * (self.count - len(known)) + [value]
        self.count += 1

    def kept(self, path: Path, value: Any) -> Any:  # noqa: ANN401 - any value
        """What is kept of an argument: of the one that holds the state, the rest; of a time, a tensor."""
        if path == self.state.path:
            return self.state.without(value)
        if _is_time(path) and isinstance(value, (int, float)):
            return torch.tensor(value, device="cpu")
        return value

    def value(self, path: Path, number: int) -> Any:  # noqa: ANN401 - any value
        """What is kept of an argument of the step of this number; None: nothing."""
        values = self.values.get(path, [None])
        return values[min(number, len(values) - 1)]

    @property
    def state_argument(self) -> Tensor:
        """The argument that holds the state, at the step that was learnt from first."""
        found: Tensor = leaves(self.pattern)[self.state.path]
        return found

    @property
    def jumps(self) -> bool:
        """Whether an argument changes between steps that is not the time: nobody knows how far, and for how long."""
        return any(len(values) > 1 for path, values in self.values.items() if not _is_time(path))

    @cached_property
    def tables(self) -> dict[Path, Tensor]:
        """Tensor arguments, one entry per step or one for all."""
        tensors = {path: values for path, values in self.values.items() if isinstance(values[0], Tensor)}
        return {path: torch.stack(values) for path, values in tensors.items()}

    @cached_property
    def groups(self) -> Tensor:
        """Steps with equal values of what all rows share have one number, shape ``(J,)``; ``(1,)`` for one group."""
        varying = [values for path, values in self.values.items() if path not in self.tables and len(values) > 1]
        seen: list[list[Any]] = []
        numbers = []
        for own in zip(*varying, strict=True):
            number = next((k for k, other in enumerate(seen) if all(map(same, own, other))), len(seen))
            seen += [list(own)] if number == len(seen) else []
            numbers.append(number)
        return torch.tensor(numbers or [0], device="cpu")

    def pieces(self, arguments: dict[str, Any], rows: Rows, share: slice | None = None) -> list[Piece]:
        """The network calls for some rows of a round: one per group.

        Args:
            arguments: what the pipeline hands it now, of which what came from another network is read.
            rows: all rows of the round.
            share: of which of them; None: of all.
        """
        now, count = leaves(arguments), len(rows)
        if share is None and len(self.groups) == 1:  # nothing is asked of the device, which may be at work yet
            return [Piece(None, rebuilt(self.pattern, self._server(rows, now, 0)))]
        some, found = torch.arange(count, device=rows.calls.device)[share or slice(None)], []
        parts = {0: some} if len(some) else {}
        if len(self.groups) > 1:
            group = self.groups.to(some.device)[rows.calls[some]]
            parts = {number: some[group == number] for number in sorted(set(group.tolist()))}
        for number, at in parts.items():
            step = int((self.groups == number).nonzero()[0])
            places = (torch.arange(self.state.chunks, device=at.device)[:, None] * count + at).flatten()
            own = {path: self._chosen(now[path], places, count) for path in self.live}
            found.append(Piece(places, rebuilt(self.pattern, self._server(rows[at], own, step))))
        return found

    @staticmethod
    def joined(pieces: Sequence[Piece], outputs: Sequence[Any]) -> Any:  # noqa: ANN401 - a network's output
        """The network's output for all rows of a round, from those of its pieces."""
        if len(outputs) == 1:
            return outputs[0]
        places = [piece.places for piece in pieces if piece.places is not None]
        back, parts = torch.cat(places).argsort(), [leaves(output) for output in outputs]

        def whole(path: Path) -> Any:  # noqa: ANN401 - any value
            if not isinstance(parts[0][path], Tensor):
                return parts[0][path]
            return _taken(torch.cat([part[path] for part in parts]), back, len(back))

        return rebuilt(outputs[0], whole)

    def _chosen(self, leaf: Tensor, chosen: Tensor, count: int) -> Tensor:
        """Some of a round's rows of what another network has returned."""
        total = self.state.chunks * count
        return leaf if len(leaf) % total else _taken(leaf, chosen, total)

    def _server(self, rows: Rows, live: dict[Path, Any], step: int) -> Callable[[Path], Any]:
        """Gives each argument for some of a round's rows, whose group is that of a step."""

        def serve(path: Path) -> Any:  # noqa: ANN401 - any value
            if path in self.live:
                return live[path]
            if path in self.tables:
                return self._rows(path, rows)
            value = self.value(path, step)
            return value[self._numbers(rows)] if isinstance(value, RowList) else value

        return serve

    def _rows(self, path: Path, rows: Rows) -> Tensor:
        """A tensor argument for some rows: each from its own step and sample."""
        table, chunks = self.tables[path], self.state.chunks
        total, device = chunks * self.batch, table.device
        samples, step = rows.samples.to(device), rows.calls.to(device).repeat(chunks)
        row = self._numbers(rows).to(device)
        step = step if len(table) > 1 else torch.zeros_like(step)
        if path == self.state.path:
            whole = table[step, row]
            self.state.put(whole, self._scaled(rows), row)
            return whole
        if len(table) > 1 and table[0].numel() == 1:
            return table.flatten()[step]
        if path[-1] in PER_LAYER and table.ndim > 2 and table.shape[2] == total:
            return table.transpose(1, 2)[step, row].transpose(0, 1).contiguous()
        shared = bool(set(path) & set(SHARED if table.ndim <= 3 else SINGLE))
        if table.ndim > 1 and not shared:
            if table.shape[1] == total:
                return table[step, row]
            if table.shape[1] == self.batch and (self.batch > 1 or len(table) > 1):  # networks spread a single row
                return table[step[: len(rows)], samples]
            if path[-1] in PER_FRAME and table.shape[1] % total == 0:
                return table.reshape(len(table), total, -1, *table.shape[2:])[step, row].flatten(0, 1)
        if len(table) > 1:
            raise UnsupportedError(f"argument {path[0]!r} of {self.name} changes with the steps, for all rows at once")
        return table[0].clone()

    def _scaled(self, rows: Rows) -> Tensor:
        """The states of some rows as the pipeline hands them to the network."""
        if all(factor == 1 for factor in self.factors):
            return rows.state
        factors = torch.tensor(self.factors, device=rows.state.device)[rows.calls]
        return rows.state * factors.reshape(-1, *[1] * (rows.state.ndim - 1))

    def _numbers(self, rows: Rows) -> Tensor:
        """The network's own rows of the same samples, those of all copies of the batch."""
        copies = torch.arange(self.state.chunks, device=rows.samples.device)
        return (copies[:, None] * self.batch + rows.samples).flatten()

    def handed(self, output: Any) -> Any:  # noqa: ANN401 - a network's output
        """An output for the rows of a round, as the pipeline is given it."""
        return packed(output, self.state.chunks, self.batch) if self.listed else output

    def picked(self, output: Any, samples: Tensor) -> Any:  # noqa: ANN401 - a network's output
        """Of an output for the batch, the rows of these samples, in the order of ``joined``."""
        total = self.state.chunks * self.batch

        def pick(leaf: Tensor) -> Tensor:
            if not leaf.ndim or len(leaf) % total:
                return leaf.clone()
            return leaf.reshape(self.state.chunks, self.batch, -1, *leaf.shape[1:])[:, samples].flatten(0, 2)

        return with_tensors(output, pick)


def _taken(leaf: Tensor, chosen: Tensor, count: int) -> Tensor:
    """Some rows of an output for so many network rows, of each of which it has one row or several."""
    return leaf.reshape(count, -1, *leaf.shape[1:])[chosen].flatten(0, 1)


def _is_time(path: Path) -> bool:
    return is_time(str(path[0]))
