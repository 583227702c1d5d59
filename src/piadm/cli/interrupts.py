"""Ctrl-C in a command that makes many runs: one that a run takes in as it ends must not be lost."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: Exit code of a command that Ctrl-C has cut short, as shells have it.
INTERRUPTED = 130


@contextmanager
def interrupts() -> Iterator[Callable[[], None]]:
    """Hear every Ctrl-C while the block runs.

    Yields:
        A function that raises ``KeyboardInterrupt`` if there was one: a sampler that is about to end takes it in
        without a trace.
    """
    heard: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        heard.append(number)
        raise KeyboardInterrupt

    def check() -> None:
        if heard:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)
