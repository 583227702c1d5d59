"""Seconds that work takes on a device: the clock runs from when the device is idle until it is so again."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TypeVar

import torch

#: Calls after which the median of quick ones is good enough.
MOST = 100

_T = TypeVar("_T")


def synchronise(device: torch.device | str) -> None:
    """Wait until a device has done all that it was asked to; a CPU always has."""
    place = torch.device(device)
    if place.type == "mps":
        torch.mps.synchronize()
    elif place.type != "cpu":
        getattr(torch, place.type).synchronize(place)


def seconds(call: Callable[[], _T], device: torch.device | str = "cpu") -> tuple[float, _T]:
    """Wall time of a call, the device's work included, and what it returned."""
    synchronise(device)
    began = time.perf_counter()
    result = call()
    synchronise(device)
    return time.perf_counter() - began, result


def median_seconds(
    call: Callable[[], object], device: torch.device | str, repeats: int = 3, *, at_least: float = 0.0
) -> float:
    """Median wall time of a call, after one that is not counted: it may have to warm up.

    Args:
        call: what is timed.
        device: where it works.
        repeats: calls that are timed at least.
        at_least: seconds that all of them are to take together; of a quick call there are then more, up to ``MOST``.
    """
    call()
    took: list[float] = []
    while len(took) < repeats or (len(took) < MOST and sum(took) < at_least):
        took.append(seconds(call, device)[0])
    return statistics.median(took)
