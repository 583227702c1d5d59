"""Several devices of this process, each with a copy of the network and a thread that calls it."""

from __future__ import annotations

import copy
import functools
import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any, final

import torch
from torch import Tensor

from piadm._checks import described, device_here, shown
from piadm.denoiser import Denoiser
from piadm.executor import Executor, Team, out_of_memory
from piadm.network import network_device
from piadm.numerics import autocast_dtype
from piadm.problem import check_denoiser
from piadm.solution import NetworkError, Solution
from piadm.workers.base import Workers
from piadm.workers.shares import Shares


@final
@dataclass(frozen=True)
class Devices(Workers):
    """Several devices of one machine, in one process: the rows of every network call are split among them.

    Shares are proportional to the measured speeds of the devices.  The state, which is small, stays on the device of
    the denoiser's network; every device gets a copy of the network, made at the start of each run.

    Args:
        devices: two or more torch devices, such as ``["cuda:0", "cuda:1"]``.  A device may come twice, as
            ``["cpu", "cpu"]`` for two threads with a copy each.

    Raises:
        TypeError, ValueError: if they are none of this machine's devices, or fewer than two.
    """

    devices: Sequence[str | torch.device]

    def __post_init__(self) -> None:
        accepted = "a list of at least two torch devices"
        if isinstance(self.devices, str) or not isinstance(self.devices, Sequence):
            raise TypeError(f"devices must be {accepted}, got {described(self.devices)}")
        if len(self.devices) < 2:
            raise ValueError(f"devices must be {accepted}, got {shown(list(self.devices))}")
        for number, name in enumerate(self.devices):
            device_here(f"devices[{number}]", name)

    def run(self, sampler: Callable[..., Solution], *args: Any, **kwargs: Any) -> Solution:  # noqa: ANN401
        """Run a sampler with its network copied to every device."""
        arguments = inspect.signature(sampler).bind(*args, **kwargs).arguments
        denoiser = check_denoiser(arguments["denoiser"])
        # With their numbers: which one "cuda" is differs from thread to thread.
        places = [device_here("devices", name) for name in self.devices]
        with ExitStack() as stack:
            threads = [stack.enter_context(ThreadPoolExecutor(1, f"piadm-{place}")) for place in places]
            team = _Devices([(place, replica(denoiser, place)) for place in places], threads)
            return sampler(**arguments | {"workers": team})


@final
class _Devices(Team):
    """The devices during one run.

    Args:
        places: every device and its copy of the denoiser.
        threads: one for each: PyTorch keeps handles and recorded graphs by thread.
    """

    first = 0

    def __init__(self, places: Sequence[tuple[torch.device, Denoiser]], threads: Sequence[ThreadPoolExecutor]) -> None:
        self.places, self.threads, self.count = places, threads, len(places)
        self.shares = Shares(self.count)
        self.executors: list[Executor] = []

    def answer(self, executor: Executor, x: Tensor, samples: Tensor, times: Tensor) -> Tensor:
        """The denoised estimates of rows, each device's share by its own executor."""
        if not self.executors:
            self.executors = [executor.alone(denoiser, place) for place, denoiser in self.places]
        places, tables = [place for place, _ in self.places], (x, samples, times)
        shares, started = self.shares.cut(len(samples)), []
        # All rows first: on a device that holds the state they would have to wait for the network's work there.
        given = [[table[part].to(place) for table in tables] for part, place in zip(shares, places, strict=True)]
        for worker, (thread, place) in enumerate(zip(self.threads, places, strict=True)):
            started.append(thread.submit(self._work, worker, given[worker], Surroundings.of(place)))
        found, seconds = zip(*[one.result() for one in started], strict=True)
        self.shares.learn(shares, seconds)
        executor.peak_batch = max(executor.peak_batch, *(one.peak_batch for one in self.executors))
        return torch.cat([part.to(x.device) for part in found])

    def _work(self, worker: int, rows: Sequence[Tensor], surroundings: Surroundings) -> tuple[Tensor, float]:
        """A worker's share, in its own thread, and how long it took."""
        began = time.perf_counter()
        with surroundings.entered():
            try:
                found = self.executors[worker].whole(*rows)
            except NetworkError as error:
                raise NetworkError(f"device {worker} ({surroundings.device}): {error}") from error
            if surroundings.stream is not None:
                surroundings.stream.synchronize()  # for the clock: what has been launched is not done
        return found, time.perf_counter() - began


@dataclass(frozen=True)
class Surroundings:
    """What PyTorch keeps for every thread anew, and a worker takes over from the thread that asks for rows.

    Among them is the current stream of a CUDA device, which is the default one in a new thread: that does not wait for
    what a caller has put on a stream of his own, nor he for it.

    Attributes:
        device: where the worker works.
        stream: its current stream, if it is a CUDA device.
        inference: whether inference mode is on.
        cast: what an autocast computes in; None: there is none.
    """

    device: torch.device
    stream: torch.cuda.Stream | None
    inference: bool
    cast: torch.dtype | None

    @classmethod
    def of(cls, device: torch.device) -> Surroundings:
        """Those of the calling thread."""
        stream = torch.cuda.current_stream(device) if has_streams(device) else None
        return cls(device, stream, torch.is_inference_mode_enabled(), autocast_dtype(device))

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Enter them, without gradients; a CUDA device becomes the current one, too."""
        stream = nullcontext() if self.stream is None else torch.cuda.stream(self.stream)
        cast = torch.autocast(self.device.type, self.cast, enabled=self.cast is not None)
        with stream, torch.inference_mode(self.inference), torch.no_grad(), cast:
            yield


def has_streams(device: torch.device) -> bool:
    """Whether a device works on streams, of which every thread has a current one."""
    return device.type == "cuda"


def replica(denoiser: Denoiser, device: torch.device) -> Denoiser:
    """The denoiser with a copy of its network, and of its draft's, on a device.

    Raises:
        TypeError: if the network cannot be copied, or has parameters elsewhere and cannot be moved.
    """
    draft = None if denoiser.draft is None else replica(denoiser.draft, device)
    return replace(denoiser, network=_copied(denoiser.network, device), draft=draft)


def _copied(network: Any, device: torch.device) -> Any:  # noqa: ANN401 - any callable
    if callable(getattr(network, "to", None)):
        try:
            twin = copy.deepcopy(network)
        except (TypeError, RuntimeError) as error:  # it holds a lock, or a tensor that was computed with gradients
            if out_of_memory(error):
                raise
            kind, reason = type(network).__name__, str(error).partition("\n")[0]
            raise TypeError(f"network must be one that copy.deepcopy copies, got {kind}: {reason}") from error
        return twin.to(device)
    if callable(inner := getattr(network, "network", None)) and inner is not network:  # a wrapper such as GuidedNetwork
        wrapper = copy.copy(network)
        object.__setattr__(wrapper, "network", _copied(inner, device))  # it may be a frozen dataclass
        return wrapper
    if isinstance(network, functools.partial):
        return functools.partial(_copied(network.func, device), *network.args, **network.keywords)
    if isinstance(network, MethodType) and not isinstance(network.__self__, type):
        return MethodType(network.__func__, _copied(network.__self__, device))
    if network_device(network) not in (None, device):
        kind = type(network).__name__
        raise TypeError(f"network must have a method .to(device) to be copied to {device}, got {kind}")
    return network
