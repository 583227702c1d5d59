"""The network rows of a pipeline's rounds shared out among the processes of a group, all of which run the pipeline."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor

from piadm._checks import shown
from piadm.executor import error_text, out_of_memory
from piadm.interop.diffusers.crew import Call, PipelineCrew
from piadm.interop.diffusers.nested import leaves, with_tensors
from piadm.interop.diffusers.probe import UnsupportedError
from piadm.solution import NetworkError
from piadm.workers.exchange import Header, digest
from piadm.workers.ranks import Ranks, interrupts
from piadm.workers.shares import Shares
from piadm.workers.teams import briefly


@final
class RankCrew(PipelineCrew):
    """The ranks of a group, each with its own pipeline, at work on one call of it.

    Every rank evaluates its share of the rows, with its own networks, and gathers the model outputs of all.  What a
    network says to another one stays on its rank: the shares are the same all through a pass of the loop.

    Args:
        ranks: the group.
        max_batch: most network rows in one call; None: as many as memory holds.

    Attributes:
        stop: whether this rank was asked to stop.
    """

    lockstep = True

    def __init__(self, ranks: Ranks, max_batch: int | None) -> None:
        self.ranks, self.max_batch, self.stop = ranks, max_batch, False
        self.passes = 0
        self.room: dict[str, int] = {}  # rows in one call of a network, where memory has run out
        self.seconds = 0.0
        self.measured: list[tuple[list[slice], list[float]]] = []

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """The ranks in touch with each other, from before the rehearsal to the pipeline's output."""
        with self.ranks.joined() as self.exchange:
            self.heartbeat, self.count = self.exchange.heartbeat, self.exchange.count
            self.rank, self.shares = self.heartbeat.rank, Shares(self.count)
            self.shows = self.rank == 0
            with interrupts(self.heartbeat, self), self.exchange.lockstep():
                yield

    def agree(self, own: Mapping[str, Any], advice: str = "") -> None:
        """All ranks must have the same."""
        self.exchange.agree(own, advice)

    def begin(self, stop: bool) -> bool:
        """One rank that was asked to stop stops all; what was measured in the pass before counts from now on."""
        for one in self.measured:
            self.shares.learn(*one)
        self.measured, self.passes = [], self.passes + 1
        headers = self.exchange.headers(Header(digest=self.passes, stop=stop or self.stop))
        self.heartbeat.go_on()
        self.exchange.check(headers)
        return any(header.stop for header in headers)

    def run(self, call: Call) -> Any:  # noqa: ANN401 - a network's output
        """The output of a network: for another network, of this rank's rows alone; a model output of all rows."""
        shares = self.shares.cut(len(call.rows))
        mine = shares[self.rank]

        def named(rank: int) -> str:
            return briefly(call.rows.samples[shares[rank]], call.steps[shares[rank]]).replace("time", "step")

        self.heartbeat.work(named(self.rank), named)
        began = time.perf_counter()
        try:
            found = self._own(call, mine)
        except KeyboardInterrupt:
            if self.heartbeat.verdict:
                raise NetworkError(self.heartbeat.verdict) from None
            raise
        self.seconds += time.perf_counter() - began
        if call.slot.denoises:
            self._gather(call, shares, found)
        self.heartbeat.go_on()
        return found

    def _own(self, call: Call, share: slice) -> Any:  # noqa: ANN401 - a network's output
        """An output for all rows of a call, of which those of a share are evaluated.

        Raises:
            NetworkError: if the network fails, naming samples and steps.
        """
        whole = with_tensors(call.slot.picked(call.spare, call.rows.samples), Tensor.contiguous)
        first = share.start
        while first < share.stop:
            part = slice(first, min(share.stop, first + self._room(call, share)))
            if (output := self._evaluated(call, part)) is not None:
                self._put(call, whole, output, part)
                first = part.stop
        if call.rows.state.is_cuda:
            torch.cuda.current_stream(call.rows.state.device).synchronize()  # for the clock
        return whole

    def _room(self, call: Call, share: slice) -> int:
        """How many rows one call of a network may have."""
        most = share.stop - share.start if self.max_batch is None else self.max_batch // call.slot.state.chunks
        return max(1, min(most, self.room.get(call.slot.name, most)))

    def _evaluated(self, call: Call, part: slice) -> Any:  # noqa: ANN401 - a network's output
        """The network's output for some rows; None if memory ran out, whereupon there is less room."""
        try:
            pieces = call.slot.pieces(call.arguments, call.rows, part)
            output = call.slot.joined(pieces, [call.run(piece.arguments) for piece in pieces])
        except UnsupportedError:
            raise
        except Exception as error:
            if not out_of_memory(error) or part.stop - part.start == 1:
                raise NetworkError(f"{call.slot.name} failed on {call.named(part)}: {error_text(error)}") from error
        else:
            self.largest = max(self.largest, *(piece.size for piece in pieces))
            return output
        # Not before the exception is gone: its traceback holds the activations.
        self.room[call.slot.name] = (part.stop - part.start) // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None

    @staticmethod
    def _put(call: Call, whole: Any, output: Any, part: slice) -> None:  # noqa: ANN401 - outputs of a network
        """Write the output for some rows of a call into that for all, whose kind is known from the first call.

        Raises:
            NetworkError: if it is of another kind.
        """
        rows, own = len(call.rows), leaves(output)
        for path, leaf in leaves(whole).items():
            if not isinstance(leaf, Tensor) or (table := by_row(leaf, call.slot.state.chunks, rows)) is None:
                continue
            found = by_row(own[path], call.slot.state.chunks, part.stop - part.start)
            if found is None or found.dtype != leaf.dtype or own[path].shape[1:] != leaf.shape[1:]:
                what = f"{shown(own[path])} for {part.stop - part.start} rows, where {shown(leaf)} for {rows} was due"
                raise NetworkError(f"{call.slot.name} returned {what}")
            table[:, part] = found

    def _gather(self, call: Call, shares: list[slice], found: Any) -> None:  # noqa: ANN401 - a network's output
        """Fill in the rows of the other ranks.

        Raises:
            NetworkError: if one of them has failed, naming it.
        """
        chunks, rows, mine = call.slot.state.chunks, call.rows, shares[self.rank]
        headers = self.exchange.headers(Header(self.seconds, len(rows), digest(rows.samples, call.steps)))
        self.exchange.check(headers)
        self.measured.append((shares, [header.seconds for header in headers]))
        self.seconds = 0.0
        for leaf in leaves(found).values():
            if isinstance(leaf, Tensor) and (table := by_row(leaf, chunks, len(rows))) is not None:
                # As bytes: not every backend knows all types.
                own = table[:, mine].transpose(0, 1).flatten(1).contiguous().view(torch.uint8)
                whole = self.exchange.rows(own, shares).view(leaf.dtype)
                table.copy_(whole.reshape(len(rows), chunks, -1).transpose(0, 1))


def by_row(leaf: Tensor, chunks: int, rows: int) -> Tensor | None:
    """An output as ``(chunks, rows, numbers)``, a view of a contiguous one; None: it has no rows.

    What belongs to one network row may be several rows of the output, as of the frames of a video.
    """
    if not leaf.ndim or not len(leaf) or len(leaf) % (chunks * rows):
        return None
    return leaf.reshape(chunks, rows, -1)
