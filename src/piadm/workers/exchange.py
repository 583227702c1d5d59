"""What ranks send each other: a short header each, by which faults are known, and then the data."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from piadm.executor import error_text
from piadm.solution import NetworkError
from piadm.workers.fingerprint import fingerprint
from piadm.workers.heartbeat import Heartbeat

#: Bytes of a header, and its layout: seconds, rows, digest, size of the data, flags, length of the text; then the text.
HEADER, LAYOUT = 1024, "<dqIqBH"


@dataclass(frozen=True)
class Header:
    """What a rank says of a call before it sends its data.

    Attributes:
        seconds: how long its own part took.
        rows: number of rows that the call has on all ranks.
        digest: checksum of which these are.
        size: bytes of data that follow.
        failed: it has failed; the text says how.
        stop: it was asked to stop.
        text: a message.
    """

    seconds: float = 0.0
    rows: int = 0
    digest: int = 0
    size: int = 0
    failed: bool = False
    stop: bool = False
    text: str = ""

    def pack(self) -> bytes:
        """As ``HEADER`` bytes; a long text loses its end."""
        text = self.text.encode()[: HEADER - struct.calcsize(LAYOUT)]
        flags = self.failed + 2 * self.stop
        fixed = struct.pack(LAYOUT, self.seconds, self.rows, self.digest, self.size, flags, len(text))
        return (fixed + text).ljust(HEADER, b"\0")

    @classmethod
    def unpack(cls, data: bytes) -> Header:
        """From ``pack``."""
        seconds, rows, digest, size, flags, length = struct.unpack_from(LAYOUT, data)
        first = struct.calcsize(LAYOUT)
        text = data[first : first + length].decode(errors="ignore")
        return cls(seconds, rows, digest, size, bool(flags & 1), bool(flags & 2), text)


class Exchange:
    """The collectives of a group: all of them gathers to all, each with a time limit.

    Headers go first, on their own.  Data whose sizes differ would abort a process in the middle of a collective, and
    those of a rank that has failed are not worth sending: after the headers every rank knows that all data will come,
    and how large they are.

    Args:
        control: a gloo group with a time limit, for headers and for data on the CPU.
        data: the group for data on an accelerator; None: there is none, data go by ``control``.
        heartbeat: tells which rank has failed.

    Attributes:
        listening: whether the others will hear what this rank says in its next header; false where the data come first,
            and once all have heard of a failure.
    """

    def __init__(self, control: dist.ProcessGroup, data: dist.ProcessGroup | None, heartbeat: Heartbeat) -> None:
        self.control, self.data, self.heartbeat = control, data, heartbeat
        self.count, self.listening = control.size(), True

    def headers(self, mine: Header) -> list[Header]:
        """Every rank's header.

        Raises:
            NetworkError: if a rank has died, hangs, has left, or is at another call; it is named.
        """
        self.heartbeat.wait()
        own = torch.frombuffer(bytearray(mine.pack()), dtype=torch.uint8)
        return [Header.unpack(part.numpy().tobytes()) for part in self._gather(own, self.control)]

    def check(self, headers: Sequence[Header], failure: Exception | None = None, advice: str = "") -> None:
        """Refuse to go on after a failure on any rank, or where the ranks have come apart.

        Args:
            headers: of all ranks.
            failure: that of this rank.
            advice: what may be done where they have come apart.

        Raises:
            NetworkError: on all ranks alike.
        """
        said = [f"rank {rank}: {header.text}" for rank, header in enumerate(headers) if header.failed]
        first = headers[0]
        for rank, header in enumerate(headers):
            if (header.rows, header.digest) != (first.rows, first.digest) and not said:
                said = [
                    f"the ranks have come apart: rank {rank} asks for {header.rows} rows where rank 0 asks for "
                    f"{first.rows}, or for others; their machines round differently{advice}"
                ]
        self.listening = not said and first.rows == 0  # the rows come next
        if said:
            raise NetworkError("; ".join(said)) from failure

    def tell(self, failure: str) -> None:
        """Tell the others, with this rank's next header, that it ends, and why."""
        if self.listening and not self.heartbeat.verdict:
            self.listening = False
            self.heartbeat.leave(failure)  # known as well if one of the others does not come
            self.headers(Header(failed=True, text=failure))

    @contextmanager
    def lockstep(self) -> Iterator[None]:
        """All ranks do the same here: whoever fails tells the others, and nobody leaves before all are done.

        Whoever leaves may take the group's store away.

        Raises:
            NetworkError: if another rank has failed, naming it; if it is this one, its own exception.
        """
        try:
            yield
            self.check(self.headers(Header()))
        except NetworkError as error:
            if not self.listening or self.heartbeat.verdict:
                raise
            self.tell(str(error))
            raise NetworkError(f"rank {self.heartbeat.rank}: {error}") from error
        except Exception as error:
            self.tell(error_text(error))
            raise

    def agree(self, own: Mapping[str, Any], advice: str = "") -> None:
        """Go on only if all ranks have the same values.

        Args:
            own: those of this rank, by name.
            advice: what may be done where they differ.

        Raises:
            ValueError: naming the first one that differs.
        """
        mine = {name: fingerprint(value) for name, value in own.items()}
        told = [json.loads(text) for text in self.texts(json.dumps(mine).encode())]
        self.heartbeat.go_on()
        for rank, other in enumerate(told):
            for name in {**told[0], **other}:
                one, another = (values.get(name, "nothing") for values in (told[0], other))
                if one != another:
                    raise ValueError(
                        f"{name} must be the same on every rank, got {one} on rank 0 and {another} on rank {rank}"
                        f"{advice}"
                    )

    def rows(self, found: Tensor, shares: Sequence[slice]) -> Tensor:
        """All rows of a table, from every rank's share ``(r, d)`` of them."""
        largest = max(share.stop - share.start for share in shares)
        by_control = self.data is None
        own = found.new_zeros(largest, found.shape[1], device="cpu" if by_control else found.device)
        own[: len(found)] = found
        parts = self._gather(own, self.control if self.data is None else self.data)
        used = [part[: share.stop - share.start] for part, share in zip(parts, shares, strict=True)]
        whole = torch.cat(used).to(found.device)
        self.listening = True
        return whole

    def texts(self, data: bytes) -> list[bytes]:
        """Every rank's bytes, of any length."""
        headers = self.headers(Header(size=len(data)))
        self.check(headers)
        sizes = [header.size for header in headers]
        own = torch.frombuffer(bytearray(data.ljust(max(1, *sizes), b"\0")), dtype=torch.uint8)
        parts = self._gather(own, self.control)
        return [part[:size].numpy().tobytes() for part, size in zip(parts, sizes, strict=True)]

    def _gather(self, own: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
        parts = list(own.new_empty(self.count, *own.shape))
        try:
            group.allgather([parts], [own]).wait()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise NetworkError(self.heartbeat.judge(f"the connection between the ranks was lost: {reason}")) from error
        return parts


def digest(*tables: Tensor) -> int:
    """Checksum of some tensors."""
    found = 0
    for table in tables:
        found = zlib.crc32(table.cpu().numpy().tobytes(), found)
    return found
