"""What is refused on sight, before anything runs: parts of a pipeline that somebody has changed in place."""

from __future__ import annotations

from collections.abc import Iterator
from types import MethodType
from typing import Any

from torch import Tensor, nn

from piadm.interop.diffusers.nested import leaves
from piadm.interop.diffusers.probe import UnsupportedError
from piadm.interop.diffusers.proxies import METHODS


def check_network(name: str, network: object) -> None:
    """Refuse a network that keeps something of one step for the next.

    Raises:
        UnsupportedError: saying what to remove.
    """
    if getattr(network, "is_cache_enabled", False):
        raise UnsupportedError(f"{name} has a cache of earlier steps; disable_cache() first")
    if isinstance(network, nn.Module) and (found := _caches(network)):
        names = ", ".join(found)
        raise UnsupportedError(
            f"{name} keeps something from one step to the next in its hooks {names}, as caches do; remove each first: "
            "diffusers.hooks.HookRegistry.check_if_exists_or_initialize(network).remove_hook(name)"
        )


def _caches(network: nn.Module) -> list[str]:
    """Names of diffusers' hooks that have a state, and of those that are installed with them and read it."""
    hooks = dict(_hooks(network))
    sources = {type(hook).__module__ for hook in hooks.values() if getattr(hook, "_is_stateful", False)}
    return sorted({repr(name) for (_, name), hook in hooks.items() if type(hook).__module__ in sources})


def _hooks(network: nn.Module) -> Iterator[tuple[tuple[int, str], Any]]:
    for number, module in enumerate(network.modules()):
        for name, hook in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).items():
            yield (number, name), hook


def check_scheduler(scheduler: Any) -> None:  # noqa: ANN401 - any scheduler
    """Refuse a scheduler with methods of its own: they would go to the original, not to the copies that run.

    Raises:
        UnsupportedError: naming them.
    """
    kind = type(scheduler)
    for name, value in vars(scheduler).items():
        if not callable(value) or not callable(getattr(kind, name, None)):
            continue
        if name in METHODS or not isinstance(value, MethodType) or value.__self__ is not scheduler:
            raise UnsupportedError(
                f"{name} of this {kind.__name__} has been replaced by another function, which copies of the scheduler "
                "cannot use; define it in a subclass"
            )


def check_arguments(name: str, arguments: dict[str, Any]) -> None:
    """Refuse arguments that carry something from step to step, or that name rows by their numbers.

    Raises:
        UnsupportedError: naming the network and the argument.
    """
    if numbered := [key for key, value in arguments.items() if _has_numbers(value)]:
        raise UnsupportedError(
            f"{name} is told by numbers which of its rows {numbered[0]} belongs to, and a round has other rows"
        )
    for path, leaf in leaves(arguments).items():
        if "cache" in str(path[-1]) and hasattr(leaf, "__dict__") and not isinstance(leaf, Tensor):
            what = f"{name} is handed a cache ({path[-1]}) that it fills at one step and reads at others"
            raise UnsupportedError(f"{what}; switch it off")


def _has_numbers(tree: Any) -> bool:  # noqa: ANN401 - any argument
    """Whether a dict in nested dicts, lists and tuples goes by numbers, and not to tensors, as those of layers do."""
    if isinstance(tree, dict):
        plain = [key for key, value in tree.items() if not all(isinstance(x, Tensor) for x in leaves(value).values())]
        return any(type(key) is int for key in plain) or any(map(_has_numbers, tree.values()))
    return isinstance(tree, (list, tuple)) and any(map(_has_numbers, tree))
