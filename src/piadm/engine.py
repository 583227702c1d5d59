"""The engine of ``sample``: the loop over rounds, with samples on levels of finer and finer nodes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from piadm.activity import SlidingWindow
from piadm.builder import Builder
from piadm.draft import start_from_draft
from piadm.executor import Asking, drive
from piadm.iteration import iterate, one_round
from piadm.level import Level, take_over
from piadm.memory import fitting
from piadm.nodes import NodeSet
from piadm.numerics import Flags
from piadm.path import ParallelPath
from piadm.problem import Problem
from piadm.settings import SampleSettings
from piadm.stopping import CarriedResidual, FixedIterations, Verdict
from piadm.tally import Tally

#: Copies of the states at every step that are held if the caller asks for them: the caller's, and of a path on every
#: step its reference states, states and residuals.
STATE_COPIES = 4


@torch.no_grad()
def run(settings: SampleSettings, problem: Problem, tally: Tally, limit: int, return_states: bool) -> Tensor | None:
    """Run ``rounds`` with the problem's network; returns the states at every step if asked for, else None."""
    return drive(rounds(settings, problem, tally, limit, return_states), problem.executor.answer)


@torch.no_grad()
def rounds(
    settings: SampleSettings, problem: Problem, tally: Tally, limit: int, return_states: bool
) -> Asking[Tensor | None]:
    """All rounds of a run, as a generator of requests to the network; returns what ``run`` does."""
    states = None
    if return_states:
        states = problem.start.new_full((settings.steps.count + 1, *problem.start.shape), math.nan)
    batch = _Batch(Builder(settings, problem), tally, limit, states)
    with tally.running():
        levels = [(yield from batch.first())]
        while levels:
            going = [level.run for level in levels if level.going]
            if going and not batch.over:
                with tally.stoppable():
                    yield from one_round(tally, going, limit)
            levels = batch.onward(levels)
    return None if states is None else states.reshape(-1, *problem.shape)


@dataclass(frozen=True)
class _Batch:
    """All samples of a run, each on one level: the first node set or a finer one.

    Attributes:
        builder: builds the levels.
        tally: counts, and collects the results.
        limit: number of rounds after which to give up.
        states: to be filled with the states at every step, shape ``(J + 1, B, d)``; None: they are not wanted.
    """

    builder: Builder
    tally: Tally
    limit: int
    states: Tensor | None

    @property
    def over(self) -> bool:
        """Whether there are to be no more rounds."""
        return self.tally.over(self.limit)

    def first(self) -> Asking[Level]:
        """All samples on the first node set, started from the draft or from the first rounds on few nodes."""
        builder, settings, problem = self.builder, self.builder.settings, self.builder.problem
        nodes, samples = settings.nodes, torch.arange(problem.batch, device="cpu")
        opening = () if problem.denoiser.draft is not None else settings.opening
        references = [builder.reference(one) for one in (*opening, nodes)]
        free = builder.free(samples, references)
        rule = builder.rule(nodes, references[-1], np.full(problem.batch, settings.aim))
        opened: tuple[NodeSet, ParallelPath] | None = None
        for few, reference in zip(opening, references, strict=False):
            path = builder.guess(few, samples, reference, free.pop(0))
            if opened is not None:
                take_over(path, few, *opened)
            yield from self._open(few, path, rule)
            opened = few, path
        judged = builder.interpolation(nodes, samples, references[-1])
        path = builder.guess(nodes, samples, references[-1], free.pop(), judged)
        if opened is not None:
            take_over(path, nodes, *opened)
            self.tally.end[path.numbers] = path.end[:, 0]
        elif problem.denoiser.draft is not None:
            self.tally.draft = start_from_draft(problem, path, rule)
        return Level(builder, nodes, path, rule, self.tally.failed)

    def _open(self, nodes: NodeSet, path: ParallelPath, rule: CarriedResidual) -> Asking[None]:
        """One round on few of the nodes, which serves as a draft made by the network itself."""
        settings = self.builder.settings
        size = settings.rows(nodes.count, narrow=True)
        size = min(size, settings.window) if isinstance(settings.window, int) else size
        rows = SlidingWindow(size, rule.threshold[torch.isin(settings.nodes.indices, nodes.indices).numpy()])
        yield from iterate(self.tally, path, rows, FixedIterations(1, estimate=math.inf), self.limit)

    def onward(self, levels: Sequence[Level]) -> list[Level]:
        """The levels of the next round: those that are not finished, and finer ones of samples that need more nodes."""
        following, busy = [], any(level.going for level in levels)
        for level in levels:
            moves = self._next(level, busy)
            following += [level.finer(nodes, part) for nodes, part in moves]
            busy |= bool(moves)
            if not self.over and (level.going or level.waiting.any()):
                following.append(level)
            else:
                self._close(level)
        return following

    def _next(self, level: Level, busy: bool) -> list[tuple[NodeSet, Flags]]:
        """Finer nodes, and who moves on to them now: as many as fit into memory; at least one if no level is busy."""
        waiting, path = level.waiting, level.path
        if self.over or not waiting.any():
            return []
        moves = level.next_nodes(waiting)
        if self.builder.problem.executor.team.lockstep:  # others may have less room
            return moves
        nodes = max(nodes.count for nodes, _ in moves)
        most = fitting(int(waiting.sum()), path.device, path.dtype, nodes, path.size)
        now = waiting.cumsum() <= (most if busy else max(1, most))
        return [(nodes, part & now) for nodes, part in moves if (part & now).any()]

    def _close(self, level: Level) -> None:
        """Record the results of the samples of a level that have not been handed on to another."""
        tally, path, own = self.tally, level.path, ~level.run.handed
        kept = torch.from_numpy(own)
        if self.states is not None and own.any():
            numbers = path.numbers[kept.to(path.device)]
            self.states[:-1, numbers], self.states[-1, numbers] = level.states(kept)
            if tally.mid_round:  # the path may contain a part of a round
                tally.end[numbers] = self.states[-1, numbers]
        if tally.nodes is None or level.nodes.count >= tally.nodes:
            tally.nodes, tally.window = level.nodes.count, min(level.rows.size or level.nodes.count, level.nodes.count)
        tally.close(path.samples[kept], level.run.verdict[own] == Verdict.DONE)
