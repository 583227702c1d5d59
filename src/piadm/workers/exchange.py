"""What ranks send each other: a short header each, by which faults are known, and then the data."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from piadm.solution import NetworkError
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
    """

    def __init__(self, control: dist.ProcessGroup, data: dist.ProcessGroup | None, heartbeat: Heartbeat) -> None:
        self.control, self.data, self.heartbeat = control, data, heartbeat
        self.count = dist.get_world_size(control)

    def headers(self, mine: Header) -> list[Header]:
        """Every rank's header.

        Raises:
            NetworkError: if a rank has died, hangs, has left, or is at another call; it is named.
        """
        self.heartbeat.wait()
        own = torch.frombuffer(bytearray(mine.pack()), dtype=torch.uint8)
        return [Header.unpack(part.numpy().tobytes()) for part in self._gather(own, self.control)]

    def rows(self, found: Tensor, shares: Sequence[slice]) -> Tensor:
        """The denoised estimates of all rows, from every rank's share ``(r, d)`` of them."""
        largest = max(share.stop - share.start for share in shares)
        by_control = self.data is None
        own = found.new_zeros(largest, found.shape[1], device="cpu" if by_control else found.device)
        own[: len(found)] = found
        parts = self._gather(own, self.control if self.data is None else self.data)
        used = [part[: share.stop - share.start] for part, share in zip(parts, shares, strict=True)]
        return torch.cat(used).to(found.device)

    def texts(self, data: bytes) -> list[bytes]:
        """Every rank's bytes, of any length."""
        sizes = [header.size for header in self.headers(Header(size=len(data)))]
        own = torch.frombuffer(bytearray(data.ljust(max(1, *sizes), b"\0")), dtype=torch.uint8)
        parts = self._gather(own, self.control)
        return [part[:size].numpy().tobytes() for part, size in zip(parts, sizes, strict=True)]

    def _gather(self, own: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
        parts = list(own.new_empty(self.count, *own.shape))
        try:
            dist.all_gather(parts, own, group=group)
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
