"""Heartbeats: every rank regularly publishes what it is doing, so that the one that failed can be named."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from piadm.solution import NetworkError

#: Beats between two looks at the others: whoever has not changed in between has died.
LOOK = 3

#: Beats that go by, at most, from when waiting is given up until every rank has been told why: noticing, two looks, a
#: verdict that the hanging rank hears with its next beat, and staying until it has.
SPENT = 9

_STORE_GONE = "rank 0 or its launcher, which keeps the group's store, is gone: "

#: What a rank is doing when it is neither in the network nor waiting.
BETWEEN = "what comes between two network calls"


@dataclass(frozen=True)
class Sign:
    """What one rank tells of itself.

    Attributes:
        beat: grows as long as the process lives.
        call: number of network calls that it has begun.
        doing: what it is in the middle of; empty: it waits for the others.
        left: why it has left the run; empty: it has not.
        done: it has finished its own part.
        run: number of the run that it is in.
    """

    beat: int = 0
    call: int = 0
    doing: str = ""
    left: str = ""
    done: bool = False
    run: int = 0


class Heartbeat:
    """The heartbeat of one rank of a group, a thread beside the run.

    What goes wrong is established once: the first rank that notices looks at all the signs and writes down the verdict,
    which every other then repeats.  A rank in the middle of a network call while a verdict is written is
    interrupted, by the signal of Ctrl-C.

    Args:
        store: the group's key-value store.
        rank: this rank.
        count: number of ranks.
        interval: seconds between two beats.
        run: number of the run in this group: signs of earlier ones say nothing.
    """

    def __init__(self, store: Any, rank: int, count: int, interval: float, run: int) -> None:  # noqa: ANN401 - a Store
        self.store, self.rank, self.count, self.interval = store, rank, count, interval
        self.sign = Sign(doing=BETWEEN, run=run)
        self.verdict = ""
        self.others: Callable[[int], str] | None = None
        self._beats = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="piadm-heartbeat", daemon=True)
        # Python gives signals to the main thread: only a run in it can be interrupted.
        runs_in_main = threading.current_thread() is threading.main_thread()
        self._runner = threading.get_ident() if runs_in_main and hasattr(signal, "pthread_kill") else None

    def start(self) -> None:
        """Begin to beat."""
        self._tell()
        self._thread.start()

    def stop(self, left: str = "") -> None:
        """End, and say why if it is before the run is over."""
        if self.verdict:
            time.sleep(2 * self.interval)  # the store may go with this process: those who hang are to hear before
        self._over.set()
        self._thread.join()
        if not left:
            return
        self.leave(left)
        try:
            self._tell()
        except RuntimeError:
            return  # the store has gone with its host: nobody is left to tell

    def work(self, doing: str, others: Callable[[int], str] | None = None) -> None:
        """Begin a network call.

        Args:
            doing: which rows this rank evaluates.
            others: which rows every rank does, where that is known: a sign is as old as the last beat.
        """
        self.others = others
        self.sign = replace(self.sign, call=self.sign.call + 1, doing=f"evaluating {doing}")

    def wait(self) -> None:
        """Begin to wait for the others."""
        self.sign = replace(self.sign, doing="")

    def go_on(self) -> None:
        """Begin what comes between two calls."""
        self.others = None
        self.sign = replace(self.sign, doing=BETWEEN)

    def leave(self, why: str) -> None:
        """Begin to leave the run before it is over."""
        self.sign = replace(self.sign, doing="", left=why)

    def meet(self, timeout: float) -> None:
        """Wait until every rank has finished its own part, however long it takes, while each of them goes on.

        Args:
            timeout: seconds that a rank may take for one network call.

        Raises:
            NetworkError: if one has failed; it is named.
        """
        self.sign = replace(self.sign, doing="", done=True)
        seen: dict[int, tuple[int, float]] = {}
        heard: dict[int, tuple[int, float]] = {}
        while waited_for := [(rank, sign) for rank, sign in enumerate(self._signs()) if not sign.done]:
            for rank, sign in waited_for:
                late = _seconds_since(seen, rank, sign.call) > timeout
                silent = _seconds_since(heard, rank, sign.beat) > 2 * LOOK * self.interval
                if late or silent or sign.left or self.verdict:
                    raise NetworkError(self.judge(f"rank {rank} has not finished its samples"))
            time.sleep(self.interval / 2)

    def _beat(self) -> None:
        while not self._over.wait(self.interval):
            try:
                self._tell()
                self._hear()
            except RuntimeError as error:
                # The others wait for this rank as long as it evaluates rows: one of them has not ended in peace.
                if not self.verdict and self.sign.doing not in ("", BETWEEN):
                    self.verdict = _STORE_GONE + str(error).partition("\n")[0]
            if self.verdict and self.sign.doing and self._runner is not None:
                signal.pthread_kill(self._runner, signal.SIGINT)
                self._runner = None

    def _tell(self) -> None:
        self._beats += 1
        self.store.set(f"sign/{self.rank}", json.dumps(asdict(replace(self.sign, beat=self._beats))))

    def _hear(self) -> None:
        if not self.verdict and self.store.check(["verdict"]):
            self.verdict = self.store.get("verdict").decode()

    def _signs(self) -> list[Sign]:
        """What every rank has told last, the empty sign of one that has told nothing in this run."""
        keys = [f"sign/{rank}" for rank in range(self.count)]
        told = [Sign(**json.loads(self.store.get(key))) if self.store.check([key]) else Sign() for key in keys]
        return [sign if sign.run == self.sign.run else Sign() for sign in told]

    def judge(self, complaint: str) -> str:
        """Which rank has failed, and why: a sentence, the same on every rank.

        Args:
            complaint: what this rank has seen of it.
        """
        found: list[str] = []

        def look() -> None:
            found.append(self._judge(complaint))

        # A thread: the store's host may be the one that failed, and would be waited for without end.
        helper = threading.Thread(target=look, daemon=True)
        helper.start()
        helper.join((LOOK + 2) * self.interval)
        self.verdict = found[0] if found else _STORE_GONE + complaint
        return self.verdict

    def _judge(self, complaint: str) -> str:
        try:
            self._hear()
            if self.verdict:
                return self.verdict
            before = self._signs()
            time.sleep(LOOK * self.interval)
            verdict = self._blame(before, self._signs()) or complaint
            return str(self.store.compare_set("verdict", "", verdict).decode())
        except RuntimeError:
            return _STORE_GONE + complaint

    def _blame(self, before: list[Sign], now: list[Sign]) -> str:
        """What the signs say, between two looks at them."""
        gone, late = [], []
        for rank, (old, new) in enumerate(zip(before, now, strict=True)):
            doing = f"evaluating {self.others(rank)}" if self.others is not None else new.doing
            if new.beat == 0:
                gone.append(f"rank {rank} has not joined")
            elif new.left:
                gone.append(f"rank {rank} left the run: {new.left}")
            elif rank != self.rank and old.beat == new.beat and not new.done:
                gone.append(f"rank {rank} died, last seen {doing or 'waiting for the others'}")
            elif rank != self.rank and new.doing and old.call == new.call:
                late.append(f"rank {rank} has not finished {doing}")
        return "; ".join(gone or late)


def _seconds_since(seen: dict[int, tuple[int, float]], rank: int, number: int) -> float:
    """Seconds for which a rank's number has been the same; remembers it."""
    now = time.monotonic()
    if rank not in seen or seen[rank][0] != number:
        seen[rank] = (number, now)
    return now - seen[rank][1]
