"""The loop: turn after turn on one path, until a stopping rule has judged every sample."""

from __future__ import annotations

import time

import numpy as np
import torch

from piadm.activity import ActiveRows
from piadm.executor import Asking, drive
from piadm.numerics import Flags, Table
from piadm.path import Movement, ParallelPath
from piadm.stopping import StoppingRule, Verdict, Verdicts
from piadm.tally import Tally


def solve(tally: Tally, path: ParallelPath, rows: ActiveRows, rule: StoppingRule, limit: int) -> Verdicts:
    """Iterate a path with the problem's network: ``turns``, answered by it."""
    return drive(turns(tally, path, rows, rule, limit), tally.problem.executor.answer)


def turns(tally: Tally, path: ParallelPath, rows: ActiveRows, rule: StoppingRule, limit: int) -> Asking[Verdicts]:
    """Iterate a path; every sample leaves the batch as soon as it is judged.

    Args:
        tally: counts the rounds and holds the errors and the current end of every sample.
        path: the path, its node states set to the starting guess.
        rows: chooses the rows of every round.
        rule: judges every sample after every round.
        limit: number of rounds, of the whole run, after which to give up.

    Returns:
        The last ``Verdict`` of every sample of the path, shape ``(B,)``; GO_ON where the limit or an interrupt
        cut it off, NONFINITE for one that had failed before.
    """
    samples, count = path.samples.numpy(), path.path.count
    verdict = np.where(tally.failed[samples], Verdict.NONFINITE, Verdict.GO_ON)
    tally.peak_states = max(tally.peak_states, count * len(samples))
    before = tally.rounds
    with tally.stoppable():
        while not tally.interrupted and tally.rounds < limit and (going := verdict == Verdict.GO_ON).any():
            active = rows.choose(path.outlook.expected * rule.growth, tally.rounds - before) & going
            began = time.perf_counter()
            movement = yield from path.turn(tally.problem.executor, active)  # ends with the round's synchronisation
            seconds = time.perf_counter() - began
            error, judged = rule.judge(movement, path.outlook.expected)
            verdict = np.where(going, judged, verdict)
            _record(tally, path, movement, error, going, verdict)
            if not active.any():
                break  # nothing left to evaluate: the rule has judged all there is
            rows.took(int(active.sum()), seconds)
            tally.residuals.append(tally.error.clone())
            evaluated = np.broadcast_to(samples, active.shape)[active]
            tally.round(torch.from_numpy(samples[active.any(0)]), torch.from_numpy(evaluated))
    return verdict


def _record(
    tally: Tally, path: ParallelPath, movement: Movement, error: Table, going: Flags, verdict: Verdicts
) -> None:
    """Hand the errors, the ends and the failures of a round to the tally."""
    samples = path.samples.numpy()
    tally.error.numpy()[samples[going]] = error[going]
    tally.end[path.numbers] = path.end[:, 0]
    for sample in (going & (verdict == Verdict.NONFINITE)).nonzero()[0]:
        tally.fail(int(samples[sample]), _where(movement, path, sample))


def _where(movement: Movement, path: ParallelPath, sample: int) -> str:
    """Where a sample's values first stopped being finite."""
    bad = (~np.isfinite(movement.surprise[:, sample])).nonzero()[0]
    if len(bad) == 0:
        return "the states overflowed although the network's values were finite"
    return f"the network returned a value that is not finite at time {path.path.times[bad[0]]:g}"
