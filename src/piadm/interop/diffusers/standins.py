"""Stand-ins for what networks return, known from earlier runs: outputs of the right shape that no network has made."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from piadm.interop.diffusers.nested import leaves, same, with_tensors

#: Most kinds of arguments of one network whose outputs are kept: a few sizes of images or prompts that take turns.
MOST = 8

Key = tuple[Any, ...]


class StandIns:
    """Outputs by network and kind of arguments; a network that is replaced or gone takes its own with it."""

    def __init__(self) -> None:
        self.known: WeakKeyDictionary[nn.Module, dict[Key, Any]] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[type[StandIns], tuple[()]]:
        return StandIns, ()  # a copy is for other networks

    def find(self, network: nn.Module, key: Key) -> Any:  # noqa: ANN401 - a network's output
        """The stand-in for a network's output; None: not known."""
        return self.known.get(network, {}).get(key)

    def keep(self, network: nn.Module, key: Key, output: Any) -> Any:  # noqa: ANN401 - a network's output
        """The stand-in for an output like this one, from now on; the oldest ones go."""
        known = self.known.setdefault(network, {})
        known[key] = stand_in(output)
        for old in list(known)[:-MOST]:
            known.pop(old, None)
        return known[key]

    def blot_out(self, names: set[str]) -> None:
        """What networks of these names return is for another network."""
        for known in list(self.known.values()):
            known.update({key: unknown(value) for key, value in list(known.items()) if key[0] in names})


def kind(name: str, arguments: dict[str, Any]) -> Key:
    """What the shape of a network's output may depend on, its name first."""
    return (name, *((path, _kind(value)) for path, value in leaves(arguments).items()))


def _kind(value: object) -> object:
    return (value.shape, value.dtype, value.device) if isinstance(value, Tensor) else type(value)


def stand_in(output: Any) -> Any:  # noqa: ANN401 - a network's output
    """Random numbers for one tensor; several are for another network."""
    tensors = [leaf for leaf in leaves(output).values() if isinstance(leaf, Tensor)]
    if len(tensors) > 1:
        return unknown(output)
    noise = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(0), device="cpu").to(tensors[0])
    return with_tensors(output, lambda leaf: noise)


def varied(output: Any, place: int) -> Any:  # noqa: ANN401 - a network's output
    """A copy of a stand-in for a call at some place in the step: guidance between two equal ones would not show."""
    return with_tensors(output, lambda leaf: leaf.flatten().roll(place).view(leaf.shape) if place else leaf.clone())


def unknown(output: Any) -> Any:  # noqa: ANN401 - a network's output
    """NaN for every tensor, in no memory: it marks what another network is given."""
    return with_tensors(output, lambda leaf: leaf.new_full((), torch.nan).expand(leaf.shape))


def denoises(output: Any) -> bool:  # noqa: ANN401 - a network's output
    """Whether an output is the model output."""
    return not any(isinstance(leaf, Tensor) and bool(leaf.isnan().any()) for leaf in leaves(output).values())


def replaced(result: Any, state: Tensor) -> Any:  # noqa: ANN401 - a scheduler's output
    """A scheduler's output, tuple or object, with copies of another state; what else it holds is not known, and NaN."""
    old = result[0]
    return with_tensors(result, lambda leaf: state.clone() if same(leaf, old) else torch.full_like(leaf, torch.nan))
