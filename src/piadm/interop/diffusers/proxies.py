"""Stand-ins for a pipeline's scheduler and networks: the pipeline cannot tell, and the originals are never touched."""

from __future__ import annotations

import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class Proxy:
    """Everything of another object, its class included, but for what a subclass defines."""

    def __init__(self, target: Any) -> None:  # noqa: ANN401 - any object
        object.__setattr__(self, "_target", target)

    # Pipelines ask with isinstance.
    __class__ = property(lambda self: type(self._target))

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - the target's own
        return getattr(self._target, name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self._target, name, value)


class NetworkProxy(Proxy):
    """A network whose calls go to ``answer(network, arguments by name)``."""

    def __init__(self, target: nn.Module, name: str, answer: Callable[[NetworkProxy, dict[str, Any]], Any]) -> None:
        super().__init__(target)
        object.__setattr__(self, "_name", name)
        object.__setattr__(self, "_answer", answer)
        object.__setattr__(self, "_signature", signature(target))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - the network's own
        """Hand over the arguments."""
        return self._answer(self, self._signature.bind(*args, **kwargs).arguments)

    def run(self, arguments: dict[str, Any]) -> Any:  # noqa: ANN401 - the network's own
        """Call the network itself."""
        bound = inspect.BoundArguments(self._signature, OrderedDict(arguments))
        return self._target(*bound.args, **bound.kwargs)


class SchedulerProxy(Proxy):
    """A scheduler whose steps are taken by ``step``; ``scaled`` hears of what it should have scaled, and answers."""

    def __init__(self, target: Any, step: Callable[..., Any], scaled: Callable[[Tensor], Tensor]) -> None:  # noqa: ANN401
        super().__init__(target)
        wrapped = functools.wraps(target.step)(lambda *args, **kwargs: step(*args, **kwargs))
        object.__setattr__(self, "step", wrapped)  # pipelines read its signature
        object.__setattr__(self, "_scaled", scaled)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - the target's own
        value = super().__getattr__(name)
        if name != "scale_model_input":
            return value

        @functools.wraps(value)
        def unscaled(sample: Tensor, *args: object, **kwargs: object) -> Tensor:
            shown: Tensor = self._scaled(sample)
            return shown

        return unscaled


def signature(network: nn.Module) -> inspect.Signature:
    """The arguments of a network's ``forward``, also where it is compiled or offloaded."""
    plain = getattr(network, "_orig_mod", network)
    whole = inspect.signature(type(plain).forward)
    return whole.replace(parameters=list(whole.parameters.values())[1:])


def is_denoiser(component: object) -> bool:
    """Whether a component of a pipeline is a network that reads a time."""
    names = signature(component).parameters if isinstance(component, nn.Module) else ()
    return any(name.startswith("timestep") for name in names)
