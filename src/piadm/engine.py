"""The engine of ``sample``: its samples on node sets, each with a path, its active rows and its stopping rule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from piadm.activity import SlidingWindow
from piadm.condense import CondensedPath, condense, weights_on_end
from piadm.cost import TimedWindow, latency
from piadm.draft import start_from_draft
from piadm.executor import Asking, drive
from piadm.interpolation import Interpolation, RoughInterpolation, SmoothInterpolation, rough_rows, smooth_rows
from piadm.iteration import Course, one_round, turns
from piadm.linearization import Gaussian
from piadm.nodes import NodeSet, every_step
from piadm.numerics import Flags, Table
from piadm.path import ParallelPath
from piadm.problem import Problem
from piadm.reference import free_states
from piadm.settings import TURNS_PER_NODE, Engine
from piadm.stopping import (
    FINER_ROUGH,
    FINER_SMOOTH,
    FIRST_ROUGH,
    FIRST_SMOOTH,
    LAPS,
    LAPS_HALF,
    SETTLED_SHARE,
    CarriedResidual,
    FixedIterations,
    Told,
    Verdict,
)
from piadm.tally import Tally

#: Least influence of a node: one that has none, where a step does not move the state, is still evaluated once.
FAINTEST = 1e-9

#: Variance, in that of the data, of data whose noise hides nothing of them.
BOUNDLESS = 1e12

#: A sample that went in circles is nearly undecided between two outcomes, and all but the smallest errors choose for
#: it: on finer nodes its aim is so many times smaller.  Of two such samples half ended on the wrong side with the aim
#: of all, none with a quarter of it.
CARE = 16

#: Copies of the states at every step that are held while they are found: those of the caller, and of a path its free
#: states, states and residuals.
KEPT = 4


@torch.no_grad()
def run(engine: Engine, problem: Problem, tally: Tally, limit: int, return_states: bool) -> Tensor | None:
    """Solve with the problem's network: ``rounds``, answered by it; the states at every step where asked for."""
    return drive(rounds(engine, problem, tally, limit, return_states), problem.executor.answer)


@torch.no_grad()
def rounds(engine: Engine, problem: Problem, tally: Tally, limit: int, return_states: bool) -> Asking[Tensor | None]:
    """Solve; a sample stays in the batch until it is judged, on the nodes that it needs."""
    states = None
    if return_states:
        states = problem.start.new_full((engine.steps.count + 1, *problem.start.shape), math.nan)
    batch = _Batch(engine, problem, tally, limit, states)
    with tally.running():
        levels = [(yield from batch.first())]
        while levels:
            if not batch.over:
                with tally.stoppable():
                    yield from one_round(tally, [level.course for level in levels])
            levels = batch.onward(levels)
    return None if states is None else states.reshape(-1, *problem.shape)


@dataclass(frozen=True)
class _Level:
    """Some samples on one node set."""

    nodes: NodeSet
    rows: SlidingWindow | TimedWindow
    rule: CarriedResidual
    course: Course

    @property
    def path(self) -> ParallelPath:
        """Their path."""
        return self.course.path


@dataclass(frozen=True)
class _Batch:
    """All samples of a run, each on a level: on the first node set, or beside the others on a finer one.

    Attributes:
        engine: the settings.
        problem: what is sampled.
        tally: counts, and takes the results.
        limit: number of rounds after which to give up.
        states: takes the states at every step, shape ``(J + 1, B, d)``; None: they are not asked for.
    """

    engine: Engine
    problem: Problem
    tally: Tally
    limit: int
    states: Tensor | None

    @property
    def over(self) -> bool:
        """Whether there are to be no more rounds."""
        return self.tally.interrupted or self.tally.rounds >= self.limit

    def first(self) -> Asking[_Level]:
        """All samples on the first node set, from where the draft or the first rounds have brought them."""
        engine, problem = self.engine, self.problem
        samples, drafted = torch.arange(problem.batch, device="cpu"), problem.denoiser.draft is not None
        opening = () if drafted else engine.opening
        few = [condense(engine.steps, engine.prior[0], one, engine.prior[1]) for one in opening]
        reference = condense(engine.steps, engine.prior[0], engine.nodes, engine.prior[1])
        free = _free(problem, samples, [*few, reference])
        rule = self._rule(engine.nodes, reference, None, np.full(problem.batch, engine.aim))
        opened = yield from self._open(few, free, samples, rule)
        judged = _interpolation(engine, engine.nodes, reference, None)
        path = _guess(engine, engine.nodes, samples, reference, free.pop(), judged)
        if opened is not None:
            _take_over(path, engine.nodes, *opened)
            self.tally.end[path.numbers] = path.end[:, 0]
        elif drafted:
            self.tally.draft = start_from_draft(problem, path, rule)
        return self._level(engine.nodes, path, rule)

    def _open(
        self, references: Sequence[CondensedPath], free: list[Tensor], samples: Tensor, rule: CarriedResidual
    ) -> Asking[tuple[NodeSet, ParallelPath] | None]:
        """A round each on more and more of the nodes: a draft by the network itself.  It uses up its free states."""
        engine, last = self.engine, None
        for nodes, reference in zip(engine.opening, references, strict=False):  # there may be none
            path = _guess(engine, nodes, samples, reference, free.pop(0))
            if last is not None:
                _take_over(path, nodes, *last)
            size = engine.rows(nodes.count, narrow=True)
            size = min(size, engine.window) if isinstance(engine.window, int) else size
            rows = SlidingWindow(size, rule.threshold[torch.isin(engine.nodes.indices, nodes.indices).numpy()])
            yield from turns(self.tally, path, rows, FixedIterations(1, estimate=math.inf), self.limit)
            last = nodes, path
        return last

    def onward(self, levels: Sequence[_Level]) -> list[_Level]:
        """The levels of the next round: those that are not finished, and finer ones of samples that need more nodes."""
        following = []
        for level in levels:
            again = (level.course.verdict == Verdict.REFINE) & ~level.course.handed
            if again.any() and not self.over and self._refinable(level.nodes):
                level.course.handed |= again
                following.append(self._finer(level, again))
            if level.course.going.any() and not self.over:
                following.append(level)
            else:
                self._close(level)
        return following

    def _refinable(self, nodes: NodeSet) -> bool:
        return self.engine.refinable and nodes.count < self.engine.steps.count

    def _finer(self, coarse: _Level, again: Flags) -> _Level:
        """Some samples of a level on finer nodes, ``again (B,)``, from where they are on its own."""
        engine, keep = self.engine, torch.from_numpy(again)
        nodes, samples = engine.finer(coarse.nodes), coarse.path.samples[keep]
        reference = condense(engine.steps, engine.prior[0], nodes, engine.prior[1])
        aim = np.where(coarse.rule.circling, engine.aim / CARE, coarse.rule.aim)[again]
        rule = self._rule(nodes, reference, coarse.rule.tell(again), aim)
        there = keep.to(coarse.path.device)
        judged = _interpolation(engine, nodes, reference, coarse.path.end[there, 0])
        free = _free(self.problem, samples, [reference])
        path = _guess(engine, nodes, samples, reference, free.pop(), judged)
        _take_over(path, nodes, coarse.nodes, coarse.path, there)
        return self._level(nodes, path, rule)

    def _rule(self, nodes: NodeSet, reference: CondensedPath, told: Told | None, aim: Table) -> CarriedResidual:
        """When a sample is finished, ``aim`` being that of each, ``(B,)``, and ``told`` from coarser nodes."""
        engine, count = self.engine, nodes.count
        influence = _influence(engine, self.problem, _condensed(engine, nodes, reference), nodes)
        first, finer = (FIRST_ROUGH, FINER_ROUGH) if engine.noisy else (FIRST_SMOOTH, FINER_SMOOTH)
        return CarriedResidual(
            influence,
            # Rows that have settled may together leave this share of the tolerance.
            SETTLED_SHARE * aim / count / influence[:, None],
            engine.tol,
            aim=aim,
            refinable=self._refinable(nodes),
            caution=first if told is None else finer,
            exact_after=TURNS_PER_NODE * count if count == engine.steps.count else math.inf,
            most_laps=LAPS_HALF if engine.half_precision else LAPS,
            told=told,
        )

    def _level(self, nodes: NodeSet, path: ParallelPath, rule: CarriedResidual) -> _Level:
        rows = _active_rows(self.engine, self.problem, nodes.count, rule.threshold)
        return _Level(nodes, rows, rule, Course(path, rows, rule, self.tally.failed[path.samples.numpy()]))

    def _close(self, level: _Level) -> None:
        """The results of the samples of a level that have not been handed on to another."""
        course, tally, own = level.course, self.tally, ~level.course.handed
        kept = torch.from_numpy(own)
        if self.states is not None and own.any():
            _keep(self.states, self.engine, self.problem, level, kept)
            if tally.torn:  # the path may have taken in a part of a round
                numbers = level.path.numbers[kept.to(level.path.device)]
                tally.end[numbers] = self.states[-1, numbers]
        if tally.nodes is None or level.nodes.count >= tally.nodes:
            tally.nodes, tally.window = level.nodes.count, min(level.rows.size or level.nodes.count, level.nodes.count)
        tally.close(level.path.samples[kept], course.verdict[own] == Verdict.DONE)


def _active_rows(engine: Engine, problem: Problem, count: int, threshold: Table) -> SlidingWindow | TimedWindow:
    """Which of a path's rows are evaluated."""
    if engine.window == "auto":
        denoiser = problem.denoiser
        known = latency(denoiser.network, problem.start.device, problem.shape[1:])
        most = problem.executor.given_max_batch
        return TimedWindow(threshold, known, None if most is None else most // denoiser.rows_per_call)
    if engine.window is None:
        drafted = problem.denoiser.draft is not None
        size = count if count == engine.steps.count else engine.rows(count, narrow=drafted)
        return SlidingWindow(size, threshold)
    return SlidingWindow(int(engine.window), threshold)


def _influence(engine: Engine, problem: Problem, path: CondensedPath, nodes: NodeSet) -> Table:
    """How strongly each node's residual acts on the end, shape ``(n,)``: the larger of two models' answers.

    One is the iteration's own.  It may see no way from an early residual to the end, as a frozen denoised estimate
    does, or a short-sighted one: what the network answers may be wider than what is told of the data, or correlated,
    and forgets less.  The other is that of data without bounds, of which nothing is forgotten.
    """
    steps, denoiser = engine.steps, problem.denoiser
    leading = weights_on_end(steps, Gaussian(BOUNDLESS * denoiser.data_variance).slopes(denoiser.schedule, steps))
    found = torch.maximum(path.response[-1, 0].abs(), (leading @ nodes.weights).abs())
    influence: Table = found.clamp(min=FAINTEST).numpy()
    return influence


def _free(problem: Problem, samples: Tensor, references: Sequence[CondensedPath]) -> list[Tensor]:
    """The reference model's own states of some samples."""
    start = problem.start[samples.to(problem.start.device)][:, None]
    some = None if len(samples) == problem.batch else samples
    return free_states(references, start, lambda first, last: problem.noise.path(first, last, some))


def _condensed(engine: Engine, nodes: NodeSet, reference: CondensedPath) -> CondensedPath:
    """The path with the iteration's own linearization; often that is the reference's."""
    if torch.equal(engine.slopes, engine.prior[0]):
        return reference
    return condense(engine.steps.silent(), engine.slopes, nodes)


def _guess(
    engine: Engine,
    nodes: NodeSet,
    samples: Tensor,
    reference: CondensedPath,
    free: Tensor,
    interpolation: Interpolation | None = None,
    *,
    learns: bool = True,
) -> ParallelPath:
    """The path of some samples, at the reference model's own solution."""
    learning = engine.learning.at(nodes.indices) if learns else None
    condensed = _condensed(engine, nodes, reference)
    return ParallelPath(condensed, free, samples, reference, interpolation, learning)


def _take_over(
    path: ParallelPath,
    nodes: NodeSet,
    coarse_nodes: NodeSet,
    coarse: ParallelPath,
    keep: Tensor | slice = slice(None),  # noqa: B008
) -> None:
    """Bring a path to where one of the same samples, or of more of which some are kept, is on some of its nodes."""
    old = torch.isin(nodes.indices, coarse_nodes.indices)
    path.take_over(coarse, keep, old, coarse_nodes.weights[nodes.indices])


def _interpolation(
    engine: Engine, nodes: NodeSet, reference: CondensedPath, coarse_end: Tensor | None
) -> Interpolation | None:
    """How to estimate what interpolation leaves, carried to the end by the reference; None: every step is a node."""
    if nodes.count == engine.steps.count:
        return None
    acting, on_end = reference.response[-1, 0], weights_on_end(engine.steps, engine.prior[0])
    if engine.noisy:
        return RoughInterpolation(rough_rows(nodes, engine.clock, engine.order, acting, on_end), coarse_end)
    return SmoothInterpolation(smooth_rows(nodes, engine.clock, engine.order, acting, on_end), coarse_end)


def _keep(states: Tensor, engine: Engine, problem: Problem, level: _Level, own: Tensor) -> None:
    """Write the states at every step of some samples of a level, ``own (B,)``, into those of the batch."""
    path, there = level.path, own.to(level.path.device)
    nodes, end = path.nodes[:, there], path.end[there, 0]
    if level.nodes.count < engine.steps.count:
        steps, samples = every_step(engine.steps.count), path.samples[own]
        reference = condense(engine.steps, engine.prior[0], steps, engine.prior[1])
        fine = _guess(engine, steps, samples, reference, _free(problem, samples, [reference])[0], learns=False)
        residual = path.residual.view(level.nodes.count, path.batch, path.size)[:, there]
        fine.interpolate(level.nodes.weights, residual.flatten(1))
        nodes, end = fine.nodes, fine.end[:, 0]
    numbers = path.numbers[there]
    states[:-1, numbers], states[-1, numbers] = nodes, end
