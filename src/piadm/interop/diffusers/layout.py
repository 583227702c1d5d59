"""Where the scheduler's state stands among the arguments of a network, as it is or within something longer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from piadm.interop.diffusers.nested import Path
from piadm.interop.diffusers.probe import RowsError, UnsupportedError

#: States of a rehearsal lie between this and twice this: what a pipeline puts in their place is far smaller.
LARGE = 8192.0

#: As many numbers each of them has to choose from: every floating-point type holds them.
STEPS = 128

#: Most axes along which an argument is longer than the state: further channels, and a frame that is known.
MOST_LONGER = 2

#: What a multiple of the state may be off by: roundings of its own type, and those of means over millions of numbers in
#: single precision, relative to it; and the entries that show it to be one.
ROUNDINGS, MEANS, SHOWN = 2, 1e-6, 8

#: Of a network.
CHANGING = "{} reads the scheduler's state as it is at some steps, and something else at others"


@dataclass(frozen=True)
class StateAt:
    """The state within an argument: ``chunks`` copies of the batch in a block of it.

    Attributes:
        blocks: of every axis along which the argument is longer: the axis, and the first and last entry of the state's,
            the last one exclusive.
        frame: an axis of one entry that the argument has beside those of the state; None: there is none.
        tokens: whether it has the state's places along one axis and its channels along the last one.
        mask: which entries of the block are the state's, one row per network row; None: all are.
    """

    path: Path
    chunks: int
    blocks: tuple[tuple[int, int, int], ...]
    frame: int | None = None
    tokens: bool = False
    mask: Tensor | None = None

    def of(self, leaf: Tensor) -> Tensor:
        """The state's block of the argument, a view."""
        leaf = leaf if self.frame is None else leaf.squeeze(self.frame)
        for axis, first, last in self.blocks:
            leaf = leaf.narrow(axis, first, last - first)
        return leaf

    def factor(self, leaf: Tensor, state: Tensor) -> float | None:
        """What copies of this state ``(L, *shape)`` are multiplied by in the state's place; None: there are none."""
        block = self.of(leaf)
        wanted = _copies(self.laid(state), self.chunks, block)
        if block.shape != wanted.shape:
            return None
        if self.mask is not None:
            block, wanted = block.masked_fill(~self.mask, 0), wanted.masked_fill(~self.mask, 0)
        if torch.equal(block, wanted):
            return 1.0
        if not block.is_floating_point():
            return None
        factor = float((block.float() * wanted).sum() / wanted.float().square().sum())
        return factor if factor and bool(_multiple(block, wanted, factor).all()) else None

    def put(self, leaf: Tensor, state: Tensor, numbers: Tensor) -> None:
        """Write rows of states into an argument, in place.

        Args:
            leaf: the argument.
            state: the states, shape ``(r, *shape)``, the same for every chunk.
            numbers: which of the network's rows each row of the argument stands for, shape ``(chunks r,)``.
        """
        block = self.of(leaf)
        state = _copies(self.laid(state), self.chunks, block)
        block.copy_(state if self.mask is None else torch.where(self.mask[numbers], state, block))

    def without(self, leaf: Tensor) -> Tensor:
        """A copy of the argument with zeros in the place of the state."""
        rest = leaf.clone()
        block = self.of(rest)
        block.zero_() if self.mask is None else block.masked_fill_(self.mask, 0)
        return rest

    def laid(self, state: Tensor) -> Tensor:
        """States as the argument has them."""
        return tokens(state) if self.tokens else state


def marker(state: Tensor, generator: torch.Generator) -> Tensor:
    """A state like this one of large random numbers, by which it is recognised within the next step's arguments."""
    steps = torch.randint(STEPS, state.shape, generator=generator, device="cpu")
    signs = torch.randint(2, state.shape, generator=generator, device="cpu") * 2 - 1
    return (signs * (LARGE + steps * (LARGE / STEPS))).to(state)


def sources(sample: Tensor, marker: Tensor) -> Tensor:
    """Which row of the last step's result each row is: a pipeline may keep copies of its rows.

    Raises:
        UnsupportedError: if the rows are not copies of the first ones, in their order.
    """
    equal = torch.stack([(sample == row).flatten(1).sum(1) for row in marker], 1)
    own = equal.diagonal()
    rows = torch.arange(len(sample), device="cpu")
    sources = torch.where((own == equal.max(1).values).cpu(), rows, equal.argmax(1).cpu())
    batch = int(sources.max()) + 1
    if not torch.equal(sources, rows % batch):
        raise UnsupportedError("the pipeline mixes the rows of its state between two steps")
    return sources


def tokens(state: Tensor) -> Tensor:
    """States ``(r, channels, *places)`` as ``(r, places, channels)``."""
    return state.flatten(2).transpose(1, 2)


def _copies(state: Tensor, chunks: int, like: Tensor) -> Tensor:
    """So many copies of states, one after the other, of the type and on the device of another tensor."""
    return state.to(like).repeat(chunks, *[1] * (state.ndim - 1))


def _multiple(leaf: Tensor, state: Tensor, factor: float) -> Tensor:
    """Which entries of an argument are those of a state times a factor, up to rounding."""
    wanted = state * factor
    return (leaf - wanted).abs() <= rounding_of(leaf) * (wanted.abs() + torch.finfo(leaf.dtype).tiny)


def rounding_of(leaf: Tensor) -> float:
    """What a multiple of the state may be off by in an argument of this type, relative to it."""
    return ROUNDINGS * torch.finfo(leaf.dtype).eps + MEANS


def find_state(name: str, arguments: dict[Path, Any], state: Tensor) -> StateAt:
    """Where the state stands among the arguments.

    Raises:
        UnsupportedError: if it does not stand there as it is.
    """
    tensors = {path: leaf for path, leaf in arguments.items() if isinstance(leaf, Tensor) and leaf.ndim > 1}
    for path, leaf in tensors.items():
        found = _block(path, leaf, state)
        if found is None and state.ndim > 3 and leaf.ndim == 3:
            found = _block(path, leaf, tokens(state))
            found = found and replace(found, tokens=True)
        if found is not None:
            return found
    for path, leaf in tensors.items():
        if (found := _masked(path, leaf, state)) is not None:
            return found
    raise RowsError(  # where all steps are one phase, the first one need not show it
        f"{name} does not read the scheduler's state as it is: the pipeline changes it in a way that is not known"
    )


def _block(path: Path, leaf: Tensor, state: Tensor) -> StateAt | None:
    """The block of an argument that is the state; None: none is."""
    frame = None
    if leaf.ndim == state.ndim + 1:
        frame = next((axis for axis in range(1, leaf.ndim) if leaf.shape[axis] == 1), None)
        leaf = leaf if frame is None else leaf.squeeze(frame)
    if leaf.ndim != state.ndim or len(leaf) % len(state):
        return None
    longer = [k for k in range(1, leaf.ndim) if leaf.shape[k] != state.shape[k]]
    if len(longer) > MOST_LONGER or any(leaf.shape[k] < state.shape[k] for k in longer):
        return None
    chunks = len(leaf) // len(state)
    wanted = _copies(state, chunks, leaf)
    corner = leaf[0]
    for k in range(1, leaf.ndim):
        corner = corner.narrow(k - 1, 0, leaf.shape[k] - state.shape[k] + 1)
    for firsts in (corner == wanted.flatten()[0]).nonzero().tolist():
        blocks = tuple((k, firsts[k - 1], firsts[k - 1] + state.shape[k]) for k in longer)
        found = StateAt(path, chunks, blocks)
        if torch.equal(found.of(leaf), wanted):
            return replace(found, frame=frame)
    return None


def _masked(path: Path, leaf: Tensor, state: Tensor) -> StateAt | None:
    """An argument that is a multiple of the state but for entries that are set, as a known frame is; None: it is not.

    Only the large states of a rehearsal tell what is set from what is made of the state.
    """
    if leaf.shape[1:] != state.shape[1:] or len(leaf) % len(state) or not leaf.is_floating_point():
        return None
    chunks = len(leaf) // len(state)
    wanted = _copies(state, chunks, leaf)
    ratios = (leaf / wanted).flatten()
    factor = float(ratios[ratios.abs().argmax()])
    mask = _multiple(leaf, wanted, factor)
    if bool(mask.all()):
        return StateAt(path, chunks, ())
    small = leaf.masked_fill(mask, 0).abs() < abs(factor) * LARGE / 4
    if bool((state.abs() < LARGE).any()) or int(mask.sum()) < SHOWN or not bool(small.all()):
        return None
    return StateAt(path, chunks, (), mask=mask)
