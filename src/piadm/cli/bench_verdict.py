"""What the figures of ``piadm bench`` mean, in plain words: whether it pays, how much, and why."""

from __future__ import annotations

from collections.abc import Sequence

from piadm.cli.bench_measure import Curve, Timing
from piadm.cost import INDIFFERENT


def capacity(curve: Curve) -> str:
    """How many rows the device has room for."""
    latency = curve.latency()
    width, most = latency.width(), max(curve.seconds)
    if most == 1:
        return f"one row takes {duration(latency.of(1))}"
    if width == 1:
        return "a row takes as long in a large call as alone: one fills the device"
    times = f"a call of {width} rows takes {short(latency.of(width) / latency.of(1))} times as long as one of 1 row"
    more = "time per row still falls there" if width == most else "with more rows time per row hardly falls"
    return f"{times}; {more}"


def verdict(curve: Curve, timings: Sequence[Timing], tol: float) -> tuple[str, ...]:
    """A line on the fastest setting whose samples all converged, and on why it is as fast as that; none of no settings.

    The reasons are those of the cost model: a sampler takes ``rounds x latency of a round's rows``, and what it does
    beside the network.  Of the latencies only ratios are used, for a machine may be slower at one time than at another.

    Args:
        curve: the network's latency.
        timings: the sequential sampler's, and those of the others.
        tol: the tolerance of the others.
    """
    if len(timings) < 2:
        return ()
    sequential, *others = timings
    through = [timing for timing in others if timing.complete]
    if not through:
        return (f"No setting had every sample within {tol:g}, so that none of them is an answer to compare.",)
    fastest = min(through, key=lambda timing: timing.figures.seconds)
    return _outcome(sequential, fastest), *_reasons(curve, sequential, fastest)


def _outcome(sequential: Timing, fastest: Timing) -> str:
    slow, fast = sequential.figures.seconds, fastest.figures.seconds
    if fast > slow:
        return (
            f"It does not pay here: the fastest setting, {fastest.name}, takes {duration(fast)}, "
            f"{short(fast / slow)} times as long as the sequential sampler."
        )
    return (
        f"It pays here: the fastest setting, {fastest.name}, takes {duration(fast)} instead of {duration(slow)} and is "
        f"{short(slow / fast)} times faster."
    )


def _reasons(curve: Curve, sequential: Timing, fastest: Timing) -> tuple[str, ...]:
    latency, run, steps = curve.latency(), fastest.figures, sequential.figures.rounds
    ratio = latency.of(fastest.rows) / latency.of(sequential.rows)
    alone = run.rounds * ratio * sequential.figures.seconds / steps
    calls = (
        f"A round's call, of {_rows(fastest.rows)}, takes {short(ratio)} times as long as a step's, of "
        f"{_rows(sequential.rows)}: {run.rounds} of them are as long as {run.rounds * ratio:.0f} of {steps} steps."
    )
    time = f"At the pace of the steps these calls come to {duration(alone)}; the run takes {duration(run.seconds)}."
    if alone < run.seconds / 2:
        time += " Most of that is what rounds do beside the network, and their set-up; a slower network hides it."
    return calls, time, _what_counts(ratio, max(curve.seconds), sequential, fastest)


def _what_counts(ratio: float, most: int, sequential: Timing, fastest: Timing) -> str:
    """Rounds or evaluations, by the ratio of a round's call to a step's, if neither is beyond the most rows timed."""
    work = f"{fastest.figures.evaluations_per_sample:.0f} instead of {sequential.figures.evaluations_per_sample:.0f}"
    if max(fastest.rows, sequential.rows) > most:
        known = f"Calls of more than {_rows(most)} were not timed and are taken to be in proportion"
        return f"{known}: if so, evaluations count, {work}."
    if ratio <= INDIFFERENT:
        depth = f"{fastest.figures.rounds} instead of {sequential.figures.rounds}"
        return f"The device has room for all of these rows: only rounds count, {depth}."
    if ratio * INDIFFERENT >= fastest.rows / sequential.rows:
        return f"Time is in proportion to the rows: the device is full, and only evaluations count, {work}."
    return f"The device has room for some of these rows: rounds count, and so do evaluations, {work}."


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    return f"{short(seconds)} s" if seconds >= 1 else f"{short(1e3 * seconds)} ms"


def short(number: float) -> str:
    """A number of three digits, or whole if it has more."""
    return f"{number:.3g}" if abs(number) < 1000 else f"{number:.0f}"


def _rows(rows: float) -> str:
    return "1 row" if rows == 1 else f"{short(rows)} rows"
