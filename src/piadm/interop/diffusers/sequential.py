"""The pipeline itself, for the first few of its steps: whose fault an error in a rehearsal is."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

import torch
from tqdm.auto import tqdm

#: Arguments that are functions of the user's.
CALLBACKS = ("callback", "callback_on_step_end")


class _EnoughError(Exception):
    """The steps that were asked for are done."""


def own_error(pipe: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], steps: int) -> Exception | None:  # noqa: ANN401
    """What the pipeline itself raises with these arguments before its scheduler has made some steps; None: nothing.

    Args:
        pipe: a pipeline; a copy of it runs, with its own networks.
        args: positional arguments of its call.
        kwargs: the others; a callback is not called.
        steps: how many steps.
    """
    stage, scheduler, made = copy.copy(pipe), copy.deepcopy(pipe.scheduler), 0
    own = scheduler.step

    @functools.wraps(own)
    def step(*given: Any, **more: Any) -> Any:  # noqa: ANN401 - the scheduler's own
        nonlocal made
        result, made = own(*given, **more), made + 1
        if made == steps:
            raise _EnoughError
        return result

    vars(scheduler)["step"] = step
    parts = dict(progress_bar=_silent, maybe_free_model_hooks=pipe.maybe_free_model_hooks)
    vars(stage).update(parts, scheduler=scheduler)
    try:
        with torch.no_grad():
            type(pipe).__call__(stage, *args, **{name: None if name in CALLBACKS else kwargs[name] for name in kwargs})
    except _EnoughError:
        return None
    except Exception as error:
        return error
    return None


def _silent(iterable: Any = None, total: int | None = None, **looks: Any) -> Any:  # noqa: ANN401 - a progress bar
    return tqdm(iterable, total=total, disable=True)
