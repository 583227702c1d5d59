"""Who evaluates the network rows of a pipeline's rounds: the pipeline's own networks, or several workers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from piadm.executor import Executor, Team, name_rows
from piadm.interop.diffusers.arguments import Rows, Slot

#: Calls a network, or its stand-in with a copy of it, with arguments by name.
Network = Callable[..., Any]


@dataclass(frozen=True)
class Call:
    """A network call of a round.

    Attributes:
        slot: the network's place in the loop.
        run: calls the network.
        arguments: what the pipeline hands it now.
        rows: the rows that it is to evaluate.
        steps: their steps, numbered among all, shape ``(r,)``.
        spare: an output like those of the network, for the pipeline's batch.
    """

    slot: Slot
    run: Network
    arguments: dict[str, Any]
    rows: Rows
    steps: Tensor
    spare: Any

    def named(self, share: slice = slice(None)) -> str:
        """Samples and steps of some of the rows, for a message."""
        return name_rows(self.rows.samples[share], self.steps[share]).replace("time", "step")


class PipelineCrew(Team):
    """Who evaluates the network rows of a pipeline's rounds.

    Attributes:
        shows: whether this process shows the progress.
        largest: most network rows in one call, where the crew splits calls.
    """

    first = 0
    shows = True
    largest = 0

    @final
    def answer(self, executor: Executor, x: Tensor, samples: Tensor, times: Tensor) -> Tensor:
        """Never: the pipeline's loop answers in its place."""
        raise AssertionError("the pipeline calls its networks itself")

    @abstractmethod
    def at_work(self) -> AbstractContextManager[None]:
        """What a call of the pipeline runs within."""

    @abstractmethod
    def agree(self, own: Mapping[str, Any], advice: str = "") -> None:
        """Go on only if all processes that make the call have the same values, by name.

        Raises:
            ValueError: naming the first one that differs; the advice follows.
        """

    @abstractmethod
    def begin(self, stop: bool) -> bool:
        """A pass of the loop begins: whether it is to be the end, since this process or another one was asked to stop.

        Args:
            stop: whether this one was.
        """

    @abstractmethod
    def run(self, call: Call) -> Any:  # noqa: ANN401 - a network's output
        """The output of a network for the rows of a round."""


class OneProcess(PipelineCrew):
    """A crew that has nobody to agree with."""

    @final
    def agree(self, own: Mapping[str, Any], advice: str = "") -> None:
        """As it is."""

    @final
    def begin(self, stop: bool) -> bool:
        """As this process was asked to."""
        return stop


@final
class Alone(OneProcess):
    """The pipeline's own networks."""

    count = 1

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Nothing."""
        yield

    def run(self, call: Call) -> Any:  # noqa: ANN401 - a network's output
        """The output of the pipeline's own network."""
        return run_here(call.slot, call.run, call.arguments, call.rows)


def run_here(slot: Slot, run: Network, arguments: dict[str, Any], rows: Rows) -> Any:  # noqa: ANN401 - a network's output
    """The output of the pipeline's own network for the rows of a round.

    Args:
        slot: the network's place in the loop.
        run: calls it.
        arguments: what the pipeline hands it now.
        rows: the rows.
    """
    pieces = slot.pieces(arguments, rows)
    return slot.joined(pieces, [run(piece.arguments) for piece in pieces])
