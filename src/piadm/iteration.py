"""The loop: round after round on paths, until a stopping rule has judged every sample."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch

from piadm.activity import ActiveRows
from piadm.executor import Asking, drive
from piadm.numerics import Flags, Table, host
from piadm.path import ParallelPath
from piadm.ripple_probe import RippleProbe
from piadm.sharing import Sharing
from piadm.stopping import StoppingRule, Verdict
from piadm.tally import Tally
from piadm.turn import Movement, Turn
from piadm.witness import Witness

#: Rows after a sample's first lost one that the next round may evaluate: the states there follow from no answer.  Where
#: a network grows without bound off its data, the samples of 1000 steps took 6 to 17 times fewer evaluations with it
#: than without, and as many rounds; with 4 or 64 up to twice or three times as many evaluations.
AHEAD = 16

#: A sample of which the last round has left settled rows alone, though it is not within the tolerance, is given a round
#: of those that would not have settled at this part of their thresholds: where so much moves, what they leave may grow.
#: With five steps 32 of 1024 samples of 200 narrow Gaussians ended outside the tolerance, by up to 3.9 times, with 2
#: still 18, with this none, for 0.7 rounds; with 32 it was the same.  With 20 and more steps it is seldom needed.
CLOSER = 4


class PathRun:
    """One path while it is iterated: its active rows, its stopping rule and the verdict on each of its samples.

    Args:
        path: the path, its node states set to the starting guess.
        rows: chooses the rows of every round.
        rule: judges every sample after every round.
        failed: which of the samples had failed before, shape ``(B,)``.
        probe: rows of its first round beside those of the path; None: there are none.
        sharing: chooses which of the rows take the innovation of their neighbours; None: no row does.
        witness: asks slow samples about a row of theirs; None: nobody does.

    Attributes:
        samples: number of each sample in the whole batch, shape ``(B,)``.
        verdict: the last ``Verdict`` of every sample, shape ``(B,)``; GO_ON for those that were cut off.
        handed: which of them have been handed on to another path, shape ``(B,)``.
        rounds: number of rounds so far.
        spent: whether the last round found no row to evaluate.
        lost: which rows it lost, shape ``(n, B)``.
    """

    def __init__(
        self,
        path: ParallelPath,
        rows: ActiveRows,
        rule: StoppingRule,
        failed: Flags,
        probe: RippleProbe | None = None,
        sharing: Sharing | None = None,
        witness: Witness | None = None,
    ) -> None:
        self.path, self.rows, self.rule, self.probe, self.sharing = path, rows, rule, probe, sharing
        self.witness = witness
        self.rounds = 0
        self.samples = path.samples.numpy()
        self.verdict = np.where(failed, Verdict.NONFINITE, Verdict.GO_ON)
        self.handed = np.zeros_like(failed)
        self.spent = False
        self.lost: Flags = np.zeros((path.path.count, path.batch), np.bool_)

    @property
    def going(self) -> Flags:
        """Which samples take part in the next round, shape ``(B,)``."""
        found: Flags = (self.verdict == Verdict.GO_ON) & (not self.spent)
        return found

    def turn(self, *, last: bool) -> Turn:
        """The next round: its rows, and those that take the innovation of their neighbours.

        In the ``last`` one that is allowed none does, since none could be evaluated later.
        """
        outlook = self.path.outlook
        matter = outlook.expected * self.path.amplification.factor * self.rule.growth
        chosen: Flags = self.rows.choose(matter, self.rounds) & self.going
        idle = self.going & ~chosen.any(0) & ~self.path.half_precision  # there rounding keeps rows from settling
        if idle.any() and self.rounds < len(matter):
            chosen |= self.rows.choose(CLOSER * matter, self.rounds) & idle
        if self.path.local is not None and self.lost.any():  # not where a number of rounds is asked for
            first = np.where(self.lost.any(0), self.lost.argmax(0), len(chosen))
            chosen &= np.arange(len(chosen))[:, None] <= first + AHEAD
        shared: Flags = np.zeros_like(chosen)
        if self.sharing is not None and not last:
            apart = self.rule.leaving | self.path.half_precision  # rounding is rough from step to step
            shared = self.sharing.choose(chosen, outlook, self.rounds) & ~apart
        return Turn(self.path, chosen & ~shared, shared)

    def question(self) -> Witness | None:
        """The witness, if it has a question in this round."""
        if self.witness is None or not self.witness.due(self.rounds):
            return None
        self.witness.choose(torch.from_numpy(self.going))
        return self.witness

    def judge(self, tally: Tally, active: Flags, movement: Movement) -> None:
        """Judge a round, and hand errors, ends and failures to the tally."""
        going = self.going
        error, judged = self.rule.judge(movement, self.path.outlook.expected)
        self.verdict = np.where(going, judged, self.verdict)
        self.rounds, self.lost = self.rounds + 1, movement.lost
        if self.witness is not None:
            self.path.resolve(self.witness.resolution)
            tally.apart = max(tally.apart, self.witness.apart)
        self.spent = not active.any()  # nothing left to evaluate: the rule has judged all there is
        tally.error.numpy()[self.samples[going]] = error[going]
        self._record_ends(tally)
        for sample in (going & (self.verdict == Verdict.NONFINITE)).nonzero()[0]:
            tally.fail(int(self.samples[sample]), self._where(movement, sample))

    def _record_ends(self, tally: Tally) -> None:
        """Copy the ends of all samples that have not been handed on to the tally."""
        if not self.handed.any():
            tally.end.index_copy_(0, self.path.numbers, self.path.end[:, 0])
        else:
            kept = torch.from_numpy((~self.handed).nonzero()[0]).to(self.path.device, non_blocking=True)
            tally.end.index_copy_(0, self.path.numbers[kept], self.path.end[kept, 0])

    def _where(self, movement: Movement, sample: int) -> str:
        """Where a sample's values first stopped being finite."""
        bad = movement.lost[:, sample].nonzero()[0]
        if len(bad) == 0:
            return "the states overflowed although the network's values were finite"
        return f"the network returned a value that is not finite at time {self.path.path.times[bad[0]]:g}"


def one_round(tally: Tally, runs: Sequence[PathRun], limit: int) -> Asking[None]:
    """One round of several paths at once: the network is called on the rows of all of them in one batch.

    Args:
        tally: counts it, and holds the errors and the current end of every sample.
        runs: the paths, no sample of which takes part in two of them.
        limit: number of rounds, of all that the tally counts, after which to give up.
    """
    began = time.perf_counter()
    turns = [run.turn(last=tally.rounds + 1 >= limit) for run in runs]
    tally.peak_states = max(tally.peak_states, sum(turn.active.size for turn in turns))
    witnesses = [witness for run in runs if (witness := run.question()) is not None]
    probes: list[RippleProbe | Witness] = [run.probe for run in runs if run.probe is not None]
    probes += witnesses
    # A witness is asked before the other rows the second time.
    again = [witness for witness in witnesses if witness.again]
    asked: list[Turn | RippleProbe | Witness] = [*again, *turns, *(probe for probe in probes if probe not in again)]
    yield from tally.problem.executor.ask([one.request for one in asked])
    tables = dict(zip(asked, _to_host(asked), strict=True))
    seconds = time.perf_counter() - began
    for probe in probes:
        probe.finish(tables[probe])
    samples, rows = [], [probe.samples.numpy() for probe in probes]
    for run, turn in zip(runs, turns, strict=True):
        run.judge(tally, turn.active, turn.finish(tables[turn]))
        run.probe = None
        samples.append(run.samples[turn.active.any(0)])
        rows.append(np.broadcast_to(run.samples, turn.active.shape)[turn.active])
    evaluated = torch.from_numpy(np.concatenate(rows))
    if len(evaluated) == 0:
        return
    for run in runs:
        run.rows.took(len(evaluated), seconds)
    tally.residuals.append(tally.error.clone())
    tally.round(torch.from_numpy(np.concatenate(samples)), evaluated)


def _to_host(asked: Sequence[Turn | RippleProbe | Witness]) -> list[Table]:
    """Solve for all paths and copy their numbers to the host, in the round's only synchronisation."""
    found = [one.follow() for one in asked]
    return np.split(host(torch.cat(found)), np.cumsum([len(numbers) for numbers in found[:-1]]))


def iterate(tally: Tally, path: ParallelPath, rows: ActiveRows, rule: StoppingRule, limit: int) -> Asking[PathRun]:
    """Iterate one path until every sample is judged, the run has had ``limit`` rounds, or it is interrupted."""
    run = PathRun(path, rows, rule, tally.failed[path.samples.numpy()])
    with tally.stoppable():
        while run.going.any() and not tally.over(limit):
            yield from one_round(tally, [run], limit)
    return run


def solve(tally: Tally, path: ParallelPath, rows: ActiveRows, rule: StoppingRule, limit: int) -> PathRun:
    """Iterate a path with the problem's network: ``iterate``, answered by it."""
    return drive(iterate(tally, path, rows, rule, limit), tally.problem.executor.answer)
