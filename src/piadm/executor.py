"""The executor: a flat batch of (sample, time) rows through the network, in micro-batches."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, TypeVar, final

import torch
from torch import Tensor

from piadm.conditions import with_rows
from piadm.denoiser import Denoiser
from piadm.numerics import joined
from piadm.solution import NetworkError

#: Rows per network call on a CPU if the caller sets no ``max_batch``: enough to use all cores, few enough that
#: activations stay in cache.  For samples of few coordinates there are more rows, up to ``CPU_NUMBERS`` numbers: their
#: networks are as fast with a thousand rows, and every call has an overhead of half a millisecond.  Accelerators get
#: the whole round, halved when memory runs out.
CPU_ROWS, MOST_CPU_ROWS, CPU_NUMBERS = 128, 1024, 1 << 16

_T = TypeVar("_T")

#: A generator that yields rows, ``(states (r, d), samples (r,), times (r,))``, and is sent their denoised estimates,
#: ``(r, d)``, or None if memory ran out, whereupon it yields fewer rows.
Asking = Generator[tuple[Tensor, Tensor, Tensor], Tensor | None, _T]


def drive(asking: Asking[_T], answer: Callable[[Tensor, Tensor, Tensor], Tensor | None]) -> _T:
    """Run such a generator to its end and return its result; exceptions of ``answer`` are raised at its ``yield``."""
    resume: Callable[[], tuple[Tensor, Tensor, Tensor]] = partial(next, asking)
    try:
        while True:
            try:
                rows = resume()
            except StopIteration as end:
                result: _T = end.value
                return result
            try:
                resume = partial(asking.send, answer(*rows))
            except BaseException as error:
                resume = partial(asking.throw, error)
    finally:
        del resume  # it may hold an exception, whose traceback holds this frame, and with it all states


@dataclass(frozen=True)
class Request:
    """Rows to be evaluated.

    Attributes:
        samples: sample number of every row, shape ``(R,)`` int64 on the state's device.
        times: schedule time of every row, shape ``(R,)`` float64 on the state's device.
        fetch: gives the states of a slice of the rows, shape ``(r, d)``.
        store: takes the denoised estimates of that slice, shape ``(r, d)``.
    """

    samples: Tensor
    times: Tensor
    fetch: Callable[[slice], Tensor]
    store: Callable[[slice, Tensor], None]


class Team(ABC):
    """Those who evaluate the rows of one run.

    Attributes:
        count: number of workers among whom the rows of a call are shared out.
        first: number of this run's first sample in the whole batch, for messages.
        lockstep: whether other processes run the same program on the same samples, and must decide alike.
    """

    count: int
    first: int
    lockstep: bool = False

    @abstractmethod
    def answer(self, executor: Executor, x: Tensor, samples: Tensor, times: Tensor) -> Tensor | None:
        """Denoised estimates ``(r, d)`` of some rows, or None if memory ran out."""


@final
class Here(Team):
    """One worker, this process, and the network as it was handed in."""

    count = 1

    def __init__(self, first: int = 0) -> None:
        self.first = first

    def answer(self, executor: Executor, x: Tensor, samples: Tensor, times: Tensor) -> Tensor | None:
        """Denoised estimates by the executor's own network."""
        return executor.evaluate(x, samples, times)


class Executor:
    """Evaluates denoised estimates of rows, each a (sample, time) pair.

    Rows go to the network in micro-batches of at most ``max_batch``; when memory runs out the size is halved
    and the micro-batch tried again.  Counts every row.

    Args:
        denoiser: the denoiser.
        shape: ``(B, *sample_shape)``.
        condition: tensors with one row per sample, in nested mappings, lists and tuples too, handed to the network row
            by row; any other value goes to every call as it is.
        max_batch: most rows in one network call of one worker; None chooses by the device.
        team: who evaluates the rows; None: this process.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        shape: tuple[int, ...],
        condition: Mapping[str, Any] | None = None,
        max_batch: int | None = None,
        team: Team | None = None,
    ) -> None:
        self.denoiser, self.shape, self.condition = denoiser, shape, dict(condition or {})
        self.rows_per_call = denoiser.rows_per_call
        # Searched once: nested conditions may be large.
        self.by_row = {
            name: value for name, value in self.condition.items() if with_rows(value, lambda *_: None) is not value
        }
        self.team = Here() if team is None else team
        self.max_batch = self.given_max_batch = max_batch
        self.peak_batch = 0
        self.evaluations = torch.zeros(shape[0], dtype=torch.int64, device="cpu")

    def ask(self, requests: Sequence[Request]) -> Asking[None]:
        """Ask for one round, the rows of all requests in one batch, micro-batch by micro-batch."""
        starts = [0, *accumulate(len(request.samples) for request in requests)]
        rows, first = starts[-1], 0
        usual = rows * self.rows_per_call
        if rows and requests[0].samples.device.type == "cpu":
            usual = min(max(CPU_ROWS, CPU_NUMBERS // math.prod(self.shape[1:])), MOST_CPU_ROWS)
        while first < rows:
            most = usual if self.max_batch is None else self.max_batch
            last = min(rows, first + self.team.count * max(1, most // self.rows_per_call))
            parts = [
                (request, slice(max(first, begin) - begin, min(last, end) - begin))
                for request, begin, end in zip(requests, starts, starts[1:], strict=False)
                if max(first, begin) < min(last, end)
            ]
            samples = joined([request.samples[part] for request, part in parts])
            times = joined([request.times[part] for request, part in parts])
            estimate = yield joined([request.fetch(part) for request, part in parts]), samples, times
            if estimate is None:
                self.max_batch = max(1, (last - first) * self.rows_per_call // (2 * self.team.count))
                continue
            if self.team.count == 1:  # with several, each records its own
                self.peak_batch = max(self.peak_batch, (last - first) * self.rows_per_call)
            found = torch.split(estimate, [part.stop - part.start for _, part in parts])
            for (request, part), own in zip(parts, found, strict=True):
                request.store(part, own)
            first = last

    def count(self, samples: Tensor) -> None:
        """Add one evaluation for every entry of ``samples`` (on the CPU)."""
        counted = torch.bincount(samples, minlength=self.shape[0])
        self.evaluations += counted * self.rows_per_call

    def answer(self, x: Tensor, samples: Tensor, times: Tensor) -> Tensor | None:
        """Denoised estimates ``(r, d)`` of some rows by the team, or None if memory ran out.

        Raises:
            NetworkError: if the network fails, naming the times and samples of the rows it was given.
        """
        return self.team.answer(self, x, samples, times)

    def alone(self, denoiser: Denoiser | None = None, device: torch.device | None = None) -> Executor:
        """One worker's own executor, in which memory that runs out shrinks its own micro-batches only.

        Args:
            denoiser: a copy of the denoiser on the worker's device; None: the same one.
            device: that device; None: where the conditions are.
        """
        condition = with_rows(self.condition, lambda tensor, name: tensor if device is None else tensor.to(device))
        return Executor(denoiser or self.denoiser, self.shape, condition, self.given_max_batch, Here(self.team.first))

    def whole(self, x: Tensor, samples: Tensor, times: Tensor) -> Tensor:
        """Denoised estimates ``(r, d)`` of all of some rows, in as many micro-batches as it takes.

        Raises:
            NetworkError: if the network fails, naming the times and samples of the rows it was given.
        """
        found = torch.empty_like(x)
        drive(self.ask([Request(samples, times, x.__getitem__, found.__setitem__)]), self.answer)
        return found

    def evaluate(self, x: Tensor, samples: Tensor, times: Tensor) -> Tensor | None:
        """Denoised estimates ``(r, d)`` of some rows by the network itself, or None if memory ran out.

        Raises:
            NetworkError: if the network fails, naming the times and samples of the rows it was given.
        """
        condition = self.condition | with_rows(self.by_row, lambda tensor, name: tensor.index_select(0, samples))
        try:
            return self.denoiser(x.reshape(-1, *self.shape[1:]), times, **condition).reshape(len(samples), -1)
        except Exception as error:
            if not out_of_memory(error) or len(samples) == 1:
                named = name_rows(samples + self.team.first, times)
                raise NetworkError(f"the network failed on {named}: {error_text(error)}") from error
        # Not before the exception is gone: its traceback holds the activations.
        if x.is_cuda:
            torch.cuda.empty_cache()
        return None


def out_of_memory(error: Exception) -> bool:
    """Whether an exception is the allocator's, on any device."""
    return (
        isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError))
        or "out of memory" in str(error).lower()
        or ("can't allocate memory" in str(error).lower())
    )


def error_text(error: Exception) -> str:
    """Type and message of an exception; many have no message, or one that says little without the type."""
    return f"{type(error).__name__}: {error}".removesuffix(": ")


def name_rows(samples: Tensor, times: Tensor) -> str:
    """The samples and times of some rows, for a message."""
    numbers = sorted(set(samples.tolist()))
    low, high = times.min().item(), times.max().item()
    who = f"sample {numbers[0]}" if len(numbers) == 1 else f"samples {numbers[0]}..{numbers[-1]}"
    return f"{who} at time {low:g}" if low == high else f"{who} at times {low:g}..{high:g}"
