"""A group of processes: the same program on every rank, with the network rows or the samples split among them."""

from __future__ import annotations

import inspect
import io
import itertools
import math
import signal
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol, cast, final
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from piadm._checks import choice, described, finite_float
from piadm.network import network_device
from piadm.problem import check_denoiser, check_shape
from piadm.solution import NetworkError, NotConvergedError, Solution, demand
from piadm.workers.base import Workers
from piadm.workers.exchange import Exchange
from piadm.workers.heartbeat import SPENT, Heartbeat
from piadm.workers.merge import merged, part_of
from piadm.workers.teams import RowTeam, SampleTeam

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import PrefixStore

#: Seconds between two heartbeats: the most, and as a share of the time limit.
BEAT, BEATS = 1.0, 1 / 20

#: Samples are split, instead of rows, if the rank with most of them has at most this many times the average.
IDLE = 1.25

#: Arguments that may differ between ranks.
OWN = ("workers", "callback", "progress")


#: How many groups of a name have had runs, in this process as in the others of the group: names come back after
#: ``destroy_process_group``.
_namesakes: defaultdict[str, Iterator[int]] = defaultdict(itertools.count)


class _Ties:
    """What a process keeps of a group from run to run.

    Args:
        group: the group.

    Attributes:
        name: tells it from all groups that there have been, alike on every rank.
        control: the gloo group of every time limit: its sockets and threads live as long as the process group.
        runs: number of runs, the same on every rank.
        broken: why the group cannot go on; empty: it can.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.name = f"piadm/{group.group_name}/{next(_namesakes[group.group_name])}"
        self.control: dict[float, dist.ProcessGroup] = {}
        self.runs, self.broken = 0, ""


_TIES: WeakKeyDictionary[dist.ProcessGroup, _Ties] = WeakKeyDictionary()


@final
class Ranks(Workers):
    """The processes of a ``torch.distributed`` group, as torchrun starts them.

    Every rank calls the sampler with the same arguments and gets the same solution.  Either the rows of every network
    call are split among the ranks, which gather all denoised estimates and do everything else, which is little,
    redundantly; or the samples are split, and the solutions are gathered at the end.  The rows of a pipeline that was
    made parallel are always split.

    A rank that dies, hangs or meets an exception ends the run on all of them, with a ``NetworkError`` that names it.

    Args:
        group: the process group, gloo or NCCL; None: all processes.
        timeout: most seconds that a rank waits for the others, and that a network call may take longer on one rank than
            on another, > 0.
        split: "rows", "samples", or "auto": samples if every rank has about as many of them, else rows.

    Raises:
        TypeError, ValueError: for other arguments.
        RuntimeError: at the call, if ``torch.distributed`` has not been initialised.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, timeout: float = 30.0, split: str = "auto") -> None:
        if group is not None and not isinstance(group, dist.ProcessGroup):
            raise TypeError(f"group must be a torch.distributed process group or None, got {described(group)}")
        self.group, self.timeout = group, finite_float("timeout", timeout, low=0.0)
        self.split = choice("split", split, ("auto", "rows", "samples"))

    @property
    def _interval(self) -> float:
        """Seconds between two signs of life."""
        return min(BEAT, BEATS * self.timeout)

    @property
    def _patience(self) -> float:
        """Seconds to wait: the time limit less what it takes to find out who has failed."""
        return self.timeout - SPENT * self._interval

    def by_samples(self, batch: int) -> bool:
        """Whether a batch of so many samples is split by samples."""
        count = dist.get_world_size(self.group)
        return self.split == "samples" or (self.split == "auto" and math.ceil(batch / count) * count <= IDLE * batch)

    def run(self, sampler: Callable[..., Solution], *args: Any, **kwargs: Any) -> Solution:  # noqa: ANN401
        """Run a sampler on all ranks."""
        bound = inspect.signature(sampler).bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        check_denoiser(arguments["denoiser"])
        batch = check_shape(arguments["shape"])[0]
        with self.joined() as exchange:
            given = {name: value for name, value in arguments.items() if name not in OWN}
            exchange.agree({"sampler": sampler.__name__} | given)
            deal = self._samples if self.by_samples(batch) else self._rows
            return deal(exchange, sampler, arguments)

    def _rows(self, exchange: Exchange, sampler: Callable[..., Solution], arguments: dict[str, Any]) -> Solution:
        """Run it here as everywhere, with every network call shared out."""
        refuse_clocks(arguments.get("window"))
        team = RowTeam(exchange)
        arguments["progress"] = arguments["progress"] and exchange.heartbeat.rank == 0
        if callable(arguments["callback"]):
            arguments["callback"] = team.agreed(arguments["callback"])
        with interrupts(exchange.heartbeat, team), exchange.lockstep():
            return sampler(**arguments | {"workers": team})

    def _samples(self, exchange: Exchange, sampler: Callable[..., Solution], arguments: dict[str, Any]) -> Solution:
        """Run it here on some of the samples, and put all together."""
        rank, count, batch = exchange.heartbeat.rank, exchange.count, check_shape(arguments["shape"])[0]
        first, last = batch * rank // count, batch * (rank + 1) // count
        own = part_of(arguments, first, last) | {"raise_on_failure": False, "workers": SampleTeam(exchange, first)}
        own["progress"] = arguments["progress"] and rank == 0
        data = io.BytesIO()
        try:
            with interrupts(exchange.heartbeat, None):
                torch.save(sampler(**own) if last > first else None, data)
        except NetworkError as error:
            torch.save(str(error), data)
        exchange.heartbeat.meet(self._patience)
        place = network_device(arguments["denoiser"].network) or torch.device("cpu")
        # Written a moment ago by this very program.
        parts = [
            torch.load(io.BytesIO(text), map_location=place, weights_only=False)
            for text in exchange.texts(data.getvalue())
        ]
        if failed := [f"rank {number}: {part}" for number, part in enumerate(parts) if isinstance(part, str)]:
            raise NetworkError("; ".join(failed))
        whole = merged([part for part in parts if part is not None])
        return demand(whole) if arguments["raise_on_failure"] else whole

    @contextmanager
    def joined(self) -> Iterator[Exchange]:
        """The ranks of the group, in touch with each other; a fault is everyone's.

        Raises:
            RuntimeError: if ``torch.distributed`` has not been initialised.
            NetworkError: if a rank has failed, naming it.
        """
        group = (self.group or dist.group.WORLD) if dist.is_available() and dist.is_initialized() else None
        if group is None:
            raise RuntimeError("call torch.distributed.init_process_group first, in processes started by torchrun")
        if group not in _TIES:
            _TIES[group] = _Ties(group)
        if (ties := _TIES[group]).broken:
            raise NetworkError(f"the group cannot go on after a fault: {ties.broken}")
        # torch has no public way to the store of a group, and another one would need an address of its own.
        from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

        ties.runs += 1
        store = PrefixStore(ties.name, _get_default_store())
        heartbeat = Heartbeat(store, dist.get_rank(group), dist.get_world_size(group), self._interval, ties.runs)
        heartbeat.start()
        try:
            control = self._control(ties, PrefixStore(f"{self._patience}", store), heartbeat)
            yield Exchange(control, group if dist.get_backend(group) == "nccl" else None, heartbeat)
        except BaseException as error:
            ties.broken = heartbeat.verdict
            heartbeat.stop("" if isinstance(error, NotConvergedError) else f"{type(error).__name__}: {error}")
            if heartbeat.verdict and not isinstance(error, NetworkError):
                raise NetworkError(heartbeat.verdict) from error
            raise
        heartbeat.stop()
        if heartbeat.verdict:
            ties.broken = heartbeat.verdict
            raise NetworkError(heartbeat.verdict)

    def _control(self, ties: _Ties, store: PrefixStore, heartbeat: Heartbeat) -> dist.ProcessGroup:
        """The gloo group, made by all ranks at their first run.

        Not by ``torch.distributed.new_group``: that waits for processes which are not of the group, or takes a name
        that depends on how many groups a process is in, and so may differ between the ranks (PyTorch 2.13).

        Raises:
            NetworkError: if a rank does not come; it is named.
        """
        if self._patience not in ties.control:
            heartbeat.wait()
            limit = timedelta(seconds=self._patience)
            try:
                made = dist.ProcessGroupGloo(store, heartbeat.rank, heartbeat.count, limit)
            except RuntimeError as error:
                reason = str(error).partition("\n")[0]
                raise NetworkError(heartbeat.judge(f"the ranks could not be connected: {reason}")) from error
            ties.control[self._patience] = cast(dist.ProcessGroup, made)  # it has the same collectives
        return ties.control[self._patience]


def refuse_clocks(window: object) -> None:
    """Refuse a window that depends on times, which every rank measures for itself.

    Raises:
        ValueError: if it does.
    """
    if window == "auto":
        raise ValueError("window must be None or an integer where ranks share out rows, got 'auto': clocks differ")


class Stoppable(Protocol):
    """A team whose ranks stop together.

    Attributes:
        stop: whether this rank was asked to.
    """

    stop: bool


@contextmanager
def interrupts(heartbeat: Heartbeat, team: Stoppable | None) -> Iterator[None]:
    """Ctrl-C, once: ranks that share out rows stop together, after the call that they are at.

    Python gives signals to the main thread alone; a run in another one goes on to its end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def heard(number: int, frame: object) -> None:
        if heartbeat.verdict or team is None or team.stop:
            raise KeyboardInterrupt
        team.stop = True

    before = signal.signal(signal.SIGINT, heard)
    try:
        yield
    finally:
        heartbeat.wait()  # no signal from it any more
        signal.signal(signal.SIGINT, before)
