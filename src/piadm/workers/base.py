"""The argument ``workers`` of every sampler: who evaluates the rows that the sampler requests."""

from __future__ import annotations

import functools
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ParamSpec

from piadm._checks import described, switch
from piadm.solution import Solution, timed

P = ParamSpec("P")

#: The boolean arguments of the samplers.
SWITCHES = {"progress", "return_states", "raise_on_failure"}


class Workers(ABC):
    """Where a sampler's network calls run: the argument ``workers`` of every sampler."""

    @abstractmethod
    def run(self, sampler: Callable[..., Solution], *args: Any, **kwargs: Any) -> Solution:  # noqa: ANN401
        """Call the sampler with these arguments and with a ``Team`` of these workers as ``workers``."""


def on_workers(sampler: Callable[P, Solution]) -> Callable[P, Solution]:
    """Decorate a sampler so that its argument ``workers`` runs it; None: it runs in this process."""

    @functools.wraps(sampler)
    def call(*args: P.args, **kwargs: P.kwargs) -> Solution:
        workers, began = kwargs.get("workers"), time.perf_counter()
        for name in SWITCHES & kwargs.keys():
            if name != "progress" or kwargs[name] is not None:
                switch(name, kwargs[name])
        if workers is None:
            return timed(lambda: sampler(*args, **kwargs), began)
        if not isinstance(workers, Workers):
            raise TypeError(f"workers must be a piadm.Devices, a piadm.Ranks or None, got {described(workers)}")
        return timed(lambda: workers.run(sampler, *args, **kwargs), began)

    return call
