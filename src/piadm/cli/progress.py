"""Progress on standard error: bars on a terminal, nothing in a pipe."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

_WIDE = 150  # columns of a table in a pipe or a file


def console(*, stderr: bool = False, wide: bool = False) -> Console:
    """Return a console on standard output or error that styles its text on a terminal only.

    Args:
        stderr: Whether it is on standard error.
        wide: Whether it is for a table of many columns, which is not folded where there is no terminal to fit.
    """
    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    width = _WIDE if wide and not terminal else None
    return Console(stderr=stderr, force_terminal=terminal, width=width, highlight=False, emoji=False)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the library's warnings of failed samples off the screen: reports have a line for each."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="sample ", category=RuntimeWarning)
        yield


@contextmanager
def bar(title: str, *, shown: bool = True) -> Iterator[Callable[[float, str], None]]:
    """Show a bar while the block runs.

    Args:
        title: What is being done.
        shown: Whether to show it, where there is a terminal.

    Yields:
        A function ``update(fraction, note)``: how much is done, in [0, 1], and a few words.
    """
    screen = console(stderr=True)
    if not (shown and screen.is_terminal):  # rich before 14.3 ends a bar that it does not show with an empty line
        yield lambda fraction, note: None
        return
    columns = (
        TextColumn(f"{title:<20}"),
        BarColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=screen, transient=True) as progress:
        task = progress.add_task(title, total=1.0, note="")
        yield lambda fraction, note: progress.update(task, completed=fraction, note=note)


def fraction_converged(first: float, now: float, tol: float) -> float:
    """Return how far an error has come from its first value to the tolerance, in [0, 1] on a log scale."""
    if not (math.isfinite(first) and math.isfinite(now) and first > tol and now > 0):
        return 0.0
    return min(1.0, max(0.0, math.log(first / now) / math.log(first / tol)))
