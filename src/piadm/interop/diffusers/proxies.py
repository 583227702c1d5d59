"""Stand-ins for a pipeline's scheduler and networks: the pipeline cannot tell, and the originals are never touched."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from piadm.interop.diffusers.rowlists import apart, is_time, listed, stacked

#: What is taken over of a scheduler.
METHODS = ("step", "scale_model_input")


class NetworkProxy:
    """A network's stand-in, its class included; calls go to ``answer(stand-in, arguments by name)``."""

    def __init__(self, target: nn.Module, name: str, answer: Callable[[NetworkProxy, dict[str, Any]], Any]) -> None:
        vars(self).update(_target=target, _name=name, _answer=answer, _signature=signature(target))
        vars(self).update(_positional=0, _listed=[])  # of the latest call

    # Pipelines ask with isinstance.
    __class__ = property(lambda self: type(self._target))

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - the target's own
        if name == "_target":  # not there yet while being copied
            raise AttributeError(name)
        return getattr(self._target, name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self._target, name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - the network's own
        """Hand over the arguments."""
        arguments = self._signature.bind(*args, **kwargs).arguments
        vars(self).update(_positional=len(args), _listed=listed(arguments))
        answer = self._answer(self, arguments | {name: stacked(arguments[name]) for name in self._listed})
        return apart(answer) if self._listed else answer

    def run(self, arguments: dict[str, Any], twin: nn.Module | None = None) -> Any:  # noqa: ANN401 - the network's own
        """Call the network itself, or a copy of it, as the pipeline does.

        By position and by name as it does: hooks and decorators look there.
        """
        arguments = arguments | {name: apart(arguments[name]) for name in self._listed}
        count, args, kwargs = self._positional, [], {}
        for name, parameter in self._signature.parameters.items():
            if name not in arguments:
                continue
            if parameter.kind is parameter.VAR_POSITIONAL:
                args += arguments[name]
            elif parameter.kind is parameter.VAR_KEYWORD:
                kwargs.update(arguments[name])
            elif len(args) < count and parameter.kind is not parameter.KEYWORD_ONLY:
                args.append(arguments[name])
            else:
                kwargs[name] = arguments[name]
        output = (twin or self._target)(*args, **kwargs)
        return stacked(output) if self._listed else output


def take_over(scheduler: Any, step: Callable[..., Any], scaled: Callable[[Tensor], Tensor]) -> None:  # noqa: ANN401
    """Let ``step`` take a scheduler's steps and ``scaled`` hear of what it should have scaled, and answer.

    The scheduler stays what it is: pipelines ask for its type, and read the signatures of its methods.
    """
    # Functions of their own, which belong to no object that would be copied along with them.
    others = (lambda *args, **kwargs: step(*args, **kwargs), lambda sample, *args, **kwargs: scaled(sample))
    for name, other in zip(METHODS, others, strict=True):
        if hasattr(scheduler, name):
            vars(scheduler)[name] = functools.wraps(getattr(scheduler, name))(other)


def given_back(scheduler: Any) -> Any:  # noqa: ANN401 - any scheduler
    """A copy of a scheduler that takes its own steps."""
    twin = copy.deepcopy(scheduler)
    for name in METHODS:
        vars(twin).pop(name, None)
    return twin


def signature(network: nn.Module) -> inspect.Signature:
    """The arguments of a network's ``forward``, also where it is compiled or offloaded."""
    plain = getattr(network, "_orig_mod", network)
    whole = inspect.signature(type(plain).forward)
    return whole.replace(parameters=list(whole.parameters.values())[1:])


def is_denoiser(component: object) -> bool:
    """Whether a component of a pipeline is a network that reads a time."""
    return isinstance(component, nn.Module) and time_argument(component) is not None


def time_argument(network: nn.Module) -> str | None:
    """What a network calls its time; None: it reads none."""
    return next(filter(is_time, signature(network).parameters), None)
