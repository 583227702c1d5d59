"""The ranks of a group during one run."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor

from piadm.executor import Executor, Team, error_text, name_rows
from piadm.solution import NetworkError
from piadm.workers.exchange import Exchange, Header, digest
from piadm.workers.shares import Shares

#: Where ranks have come apart.
APART = ": use split='samples'"


@final
class RowTeam(Team):
    """The ranks of a group at work on one run, of which each evaluates a share of the rows."""

    first = 0
    lockstep = True

    def __init__(self, exchange: Exchange) -> None:
        self.exchange, self.rank, self.count = exchange, exchange.heartbeat.rank, exchange.count
        self.shares = Shares(self.count)
        self.own: Executor | None = None
        self.stop = False

    def answer(self, executor: Executor, x: Tensor, samples: Tensor, times: Tensor) -> Tensor:
        """The denoised estimates of rows, this rank's by its own network."""
        self.own = self.own or executor.alone()
        shares = self.shares.cut(len(samples))
        mine, failure, found = shares[self.rank], None, x[:0]

        def named(rank: int) -> str:
            return briefly(samples[shares[rank]], times[shares[rank]])

        self.exchange.heartbeat.work(named(self.rank), named)
        began = time.perf_counter()
        try:
            if mine.stop > mine.start:
                found = self.own.whole(x[mine], samples[mine], times[mine])
                if x.is_cuda:
                    torch.cuda.current_stream(x.device).synchronize()
        except NetworkError as error:
            failure = error
        header = Header(
            time.perf_counter() - began, len(samples), digest(samples, times), 0, failure is not None, self.stop,
            str(failure or ""),
        )  # fmt: skip
        headers = self.exchange.headers(header)
        self.exchange.check(headers, failure, APART)
        if any(one.stop for one in headers):
            raise KeyboardInterrupt
        found = self.exchange.rows(found, shares)
        self.exchange.heartbeat.go_on()
        self.shares.learn(shares, [one.seconds for one in headers])
        executor.peak_batch = max(executor.peak_batch, self.own.peak_batch)
        return found

    def agreed(self, callback: Callable[[Any], Any]) -> Callable[[Any], bool]:
        """The callback, whose request to stop on any rank holds for all."""

        def call(info: object) -> bool:
            try:
                wanted = bool(callback(info))
            except Exception as error:
                self.exchange.tell(f"its callback raised {error_text(error)}")
                raise
            headers = self.exchange.headers(Header(stop=wanted))
            self.exchange.heartbeat.go_on()
            self.exchange.check(headers, advice=APART)
            return any(header.stop for header in headers)

        return call


@final
class SampleTeam(Team):
    """One rank at work on its own samples, of which it tells the others only that it goes on."""

    count = 1

    def __init__(self, exchange: Exchange, first: int) -> None:
        self.heartbeat, self.first = exchange.heartbeat, first

    def answer(self, executor: Executor, x: Tensor, samples: Tensor, times: Tensor) -> Tensor | None:
        """Those of the executor's own network."""
        self.heartbeat.work(briefly(samples + self.first, times))
        try:
            return executor.evaluate(x, samples, times)
        finally:
            self.heartbeat.go_on()


def briefly(samples: Tensor, times: Tensor) -> str:
    """The rows, for a message; only counted where their names would have to be fetched from an accelerator."""
    return f"{len(samples)} rows" if samples.is_cuda or not len(samples) else name_rows(samples, times)
