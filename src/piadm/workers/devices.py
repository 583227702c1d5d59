"""Several devices of this process, each with a copy of the network and a thread that calls it."""

from __future__ import annotations

import copy
import functools
import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any, TypeVar, final

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

Given = TypeVar("Given")
Found = TypeVar("Found")


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
        with closing(Crew(self)) as crew:
            team = _Devices(crew, [replica(denoiser, place) for place in crew.places])
            return sampler(**arguments | {"workers": team})


@final
class _Devices(Team):
    """The devices during one run.

    Args:
        crew: works on them.
        denoisers: a copy of the denoiser on every device.
    """

    first = 0

    def __init__(self, crew: Crew, denoisers: Sequence[Denoiser]) -> None:
        self.crew, self.denoisers, self.count = crew, denoisers, len(denoisers)
        self.executors: list[Executor] = []

    def answer(self, executor: Executor, x: Tensor, samples: Tensor, times: Tensor) -> Tensor:
        """The denoised estimates of rows, each device's share by its own executor."""
        if not self.executors:
            pairs = zip(self.denoisers, self.crew.places, strict=True)
            self.executors = [executor.alone(denoiser, place) for denoiser, place in pairs]
        tables = x, samples, times
        found = self.crew.work(len(samples), lambda part, to: [to(table[part]) for table in tables], self._work)
        executor.peak_batch = max(executor.peak_batch, *(one.peak_batch for one in self.executors))
        return torch.cat([part.to(x.device) for part in found])

    def _work(self, worker: int, rows: Sequence[Tensor]) -> Tensor:
        """A worker's share."""
        try:
            return self.executors[worker].whole(*rows)
        except NetworkError as error:
            raise NetworkError(f"device {worker} ({self.crew.places[worker]}): {error}") from error


class Crew:
    """Workers on several devices, each in a thread of its own: PyTorch keeps handles and recorded graphs by thread.

    Args:
        devices: on which.

    Attributes:
        places: the devices with their numbers: which one "cuda" is differs from thread to thread.
    """

    def __init__(self, devices: Devices) -> None:
        self.places = [device_here("devices", name) for name in devices.devices]
        self.threads = [ThreadPoolExecutor(1, f"piadm-{place}") for place in self.places]
        self.shares = Shares(len(self.places))

    def work(
        self,
        rows: int,
        given: Callable[[slice, Callable[[Tensor], Tensor]], Given],
        work: Callable[[int, Given], Found],
    ) -> list[Found]:
        """Do some work on rows, every worker on its share of them.

        Args:
            rows: number of rows.
            given: what a worker is given for a share of the rows, which may be empty, moved by the function to its
                device.
            work: what a worker, by its number, makes of it, in its thread.
        """
        shares, started = self.shares.cut(rows), []
        # All rows first: on a device that holds the state they would have to wait for the network's work there.
        moved = [
            given(part, lambda table, place=place: table.to(place))  # type: ignore[misc]
            for part, place in zip(shares, self.places, strict=True)
        ]
        for worker, (thread, place) in enumerate(zip(self.threads, self.places, strict=True)):
            started.append(thread.submit(self._timed, work, worker, moved[worker], Surroundings.of(place)))
        found, seconds = zip(*[one.result() for one in started], strict=True)
        self.shares.learn(shares, seconds)
        return list(found)

    @staticmethod
    def _timed(
        work: Callable[[int, Given], Found], worker: int, given: Given, surroundings: Surroundings
    ) -> tuple[Found, float]:
        """What a worker makes of its share, and how long that took."""
        began = time.perf_counter()
        with surroundings.entered():
            found = work(worker, given)
            if surroundings.stream is not None:
                surroundings.stream.synchronize()  # for the clock: what has been launched is not done
        return found, time.perf_counter() - began

    def close(self) -> None:
        """Wait for the threads, and end them."""
        for thread in self.threads:
            thread.shutdown()


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
    return replace(denoiser, network=copied_to(denoiser.network, device), draft=draft)


def copied_to(network: Any, device: torch.device) -> Any:  # noqa: ANN401 - any callable
    """A copy of a network on a device.

    Raises:
        TypeError: as ``replica``.
    """
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
        object.__setattr__(wrapper, "network", copied_to(inner, device))  # it may be a frozen dataclass
        return wrapper
    if isinstance(network, functools.partial):
        return functools.partial(copied_to(network.func, device), *network.args, **network.keywords)
    if isinstance(network, MethodType) and not isinstance(network.__self__, type):
        return MethodType(network.__func__, copied_to(network.__self__, device))
    if network_device(network) not in (None, device):
        kind = type(network).__name__
        raise TypeError(f"network must have a method .to(device) to be copied to {device}, got {kind}")
    return network
