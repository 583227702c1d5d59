"""What must stay as it is while a pipeline runs: settings of its networks, and all that a callback gets hold of."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from operator import itemgetter
from typing import Any

from torch import Tensor, nn

from piadm.interop.diffusers.nested import Path, copied, leaves, rebuilt, same
from piadm.interop.diffusers.probe import UnsupportedError

#: Types of values that are settings, and of what holds some.
PLAIN, NESTS = (bool, int, float, str, type(None)), (list, tuple, dict)

#: What every module has and no pipeline sets.
OWN = frozenset(vars(nn.Module())) - {"training"}


def altered(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape differ; NaN is as NaN."""
    return not bool(((one == other) | (one != one) & (other != other)).all())


class Settings:
    """Plain attributes of all modules of a network, as they are now.

    They are compared at every step: a module costs half a microsecond there, a thousandth of what it takes to run it.

    Args:
        name: of the network, for messages.
        network: the network.
    """

    def __init__(self, name: str, network: nn.Module) -> None:
        self.name, self.network, self.names = name, network, _named(network)
        self.renew()

    def renew(self) -> None:
        """Take them as they are now."""
        try:
            self.values = [_fresh(get(own)) for _, own, get, _ in self.names]
        except KeyError:  # one is gone
            self.names = _named(self.network)
            self.values = [_fresh(get(own)) for _, own, get, _ in self.names]

    def change(self) -> str | None:
        """The first one that has changed since, in words; all are put back.  None: none has."""
        found = None
        for (number, own, get, names), values in zip(self.names, self.values, strict=True):
            try:
                if get(own) == values:
                    continue
            except (KeyError, ValueError, RuntimeError):  # one is gone, or a tensor by now
                pass
            for name, value in zip(names, values, strict=True):
                if name not in own or not same(own[name], value):
                    own[name] = value
                    found = found or f"{name} of {self._called(number)}"
        return found

    def _called(self, number: int) -> str:
        """A module's name."""
        path = next(islice(self.network.named_modules(), number, None))[0]
        return f"{self.name}.{path}" if path else self.name


def _named(network: nn.Module) -> list[tuple[int, dict[str, Any], Callable[[Any], tuple[Any, ...]], list[str]]]:
    """Number, attributes and plain ones of them of every module that has any."""
    found: list[tuple[int, dict[str, Any], Callable[[Any], tuple[Any, ...]], list[str]]] = []
    for number, module in enumerate(network.modules()):
        own = vars(module)
        if names := [name for name, value in own.items() if name not in OWN and _plain(value)]:
            names += names[: len(names) == 1]  # of a single one itemgetter makes no tuple
            found.append((number, own, itemgetter(*names), names))
    return found


def _plain(value: object) -> bool:
    """Whether a value is a setting, or a list or dict of settings."""
    if type(value) in NESTS:
        return all(type(leaf) in PLAIN for leaf in leaves(value).values())
    return type(value) in PLAIN


def _fresh(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same values, in lists and dicts of their own."""
    if not any(type(value) in NESTS for value in values):
        return values
    return tuple(rebuilt(value, leaves(value).__getitem__) for value in values)


class Callback:
    """The user's ``callback_on_step_end``: it hears of every step's number once, and may look and interrupt.

    A step that it did not hear of is one at which it might have changed something.

    Args:
        theirs: the function.
        stage: the pipeline that runs.
        pipe: the original, which the function may know as well.
        networks: the networks of the loop, by name.

    Attributes:
        error: what it has raised.
    """

    def __init__(self, theirs: Callable[..., Any], stage: Any, pipe: Any, networks: dict[str, nn.Module]) -> None:  # noqa: ANN401
        self.theirs, self.stage, self.pipe, self.networks = theirs, stage, pipe, networks
        self.settings: list[Settings] = []
        self.heard: set[int] = set()
        self.error: Exception | None = None

    def hear(self, number: int, timesteps: Tensor, over: bool, values: dict[str, Any]) -> None:
        """Call it after a round, and after the last one for the steps that are left.

        Args:
            number: of the round.
            timesteps: of the steps, shape ``(J,)``.
            over: whether that was the last round.
            values: what the pipeline lets it see; it is given copies.

        Raises:
            UnsupportedError: if it changes something.
        """
        if not self.heard:
            self.settings = [Settings(*named) for named in self.networks.items()]
            self.known = [{*vars(pipe)} - {"_interrupt"} for pipe in (self.stage, self.pipe)]
        self.heard.add(number)
        left = sorted(set(range(len(timesteps))) - self.heard) if over else []
        for step in [number, *left]:
            self._call(step, timesteps[min(step, len(timesteps) - 1)], values)
            if getattr(self.stage, "_interrupt", False):
                return

    def _call(self, step: int, t: Tensor, values: dict[str, Any]) -> None:
        """Call it, and see what it has changed."""
        for settings in self.settings:
            settings.renew()  # networks may note something while they run
        given, before, asked = copied(values), self._attributes(), getattr(self.pipe, "_interrupt", False)
        try:
            returned = self.theirs(self.stage, step, t, dict(given)) or {}
        except Exception as error:
            self.error = error
            raise
        if getattr(self.pipe, "_interrupt", False) and not asked:  # it has asked the original, which does not run
            self.pipe._interrupt, self.stage._interrupt = False, True
        now = self._attributes()
        changed = {name for name, value in returned.items() if value is not given.get(name)}
        changed |= {name for name, value in values.items() if _differ(value, given[name])}
        changed |= {f"pipe.{path[1]}" for path in before if path not in now or not same(before[path], now[path])}
        changed |= {found for settings in self.settings if (found := settings.change())}
        if changed:
            names = ", ".join(sorted(changed))
            raise UnsupportedError(f"callback_on_step_end may look and interrupt, not change {names} (step {step})")

    def _attributes(self) -> dict[Path, Any]:
        """All that was set in the two pipelines before the first call: what it adds are its own notes."""
        pipes = zip((self.stage, self.pipe), self.known, strict=True)
        return leaves([{name: vars(pipe).get(name) for name in known} for pipe, known in pipes])


def _differ(one: Any, other: Any) -> bool:  # noqa: ANN401 - any values
    """Whether a callback has changed something in its copy of a value."""
    mine, theirs = leaves(one), leaves(other)
    return mine.keys() != theirs.keys() or any(_differs(leaf, theirs[path]) for path, leaf in mine.items())


def _differs(one: Any, other: Any) -> bool:  # noqa: ANN401 - any values
    if isinstance(one, Tensor) and isinstance(other, Tensor) and one.shape == other.shape:
        return altered(one, other)
    return not same(one, other)


class Held:
    """Tensors of the pipeline that its scheduler keeps from one step to the next, and what they were.

    Args:
        scheduler: the scheduler, after a step.
        given: what that step was given.
    """

    def __init__(self, scheduler: object, *given: Tensor) -> None:
        places = {tensor.untyped_storage().data_ptr() for tensor in given}
        kept = [leaf for leaf in leaves(dict(vars(scheduler))).values() if isinstance(leaf, Tensor)]
        self.pairs = [(leaf, leaf.clone()) for leaf in kept if leaf.untyped_storage().data_ptr() in places]

    @property
    def overwritten(self) -> bool:
        """Whether the pipeline has written into one of them."""
        return any(altered(*pair) for pair in self.pairs)


def changed(one: dict[str, Any], other: dict[str, Any]) -> set[str]:
    """Names of arguments that are not the same in both."""
    return {key for key in one | other if key not in one or key not in other or not same(one[key], other[key])}


def is_number(value: object) -> bool:
    """Whether an argument is a number, or None."""
    return value is None or isinstance(value, (int, float)) or isinstance(value, Tensor) and value.ndim == 0
