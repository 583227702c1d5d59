"""The engine of ``sample``: node set after node set, each with its path, its active rows and its stopping rule."""

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
from piadm.iteration import turns
from piadm.linearization import Gaussian
from piadm.nodes import NodeSet, every_step
from piadm.numerics import Table
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
    """Solve on one node set after the other; a sample stays in the batch until it is judged."""
    nodes, left, coarse = engine.nodes, torch.arange(problem.batch, device="cpu"), None
    aim = np.full(problem.batch, engine.aim)
    states = None
    if return_states:
        states = problem.start.new_full((engine.steps.count + 1, *problem.start.shape), math.nan)
    with tally.running():
        while len(left):
            if coarse is not None:
                nodes = engine.finer(nodes)
            refinable = engine.refinable and nodes.count < engine.steps.count
            reference = condense(engine.steps, engine.prior[0], nodes, engine.prior[1])
            condensed = _condensed(engine, nodes, reference)
            rows, rule = _rules(engine, problem, condensed, nodes, refinable, coarse, aim[left.numpy()])
            path = yield from _path(engine, problem, nodes, left, coarse, reference, rule, tally, limit)
            coarse = None  # its states are not needed any more
            verdict = yield from turns(tally, path, rows, rule, limit)
            tally.nodes, tally.window = nodes.count, min(rows.size or nodes.count, nodes.count)
            if states is not None:
                _keep(states, engine, problem, nodes, path)
                if tally.torn:  # the path may have taken in a part of a round
                    tally.end[path.numbers] = states[-1, path.numbers]
            go_on = refinable and not tally.interrupted and tally.rounds < limit
            again = (verdict == Verdict.REFINE) & go_on
            aim[left.numpy()[rule.circling]] = engine.aim / CARE
            coarse = _Coarse(nodes, path, rule, torch.from_numpy(again))
            tally.close(left[~coarse.again], verdict[~again] == Verdict.DONE)
            left = left[coarse.again]
    return None if states is None else states.reshape(-1, *problem.shape)


@dataclass(frozen=True)
class _Coarse:
    """A solved path on a coarser node set, and which of its samples go on."""

    nodes: NodeSet
    path: ParallelPath
    rule: CarriedResidual
    again: Tensor


def _path(
    engine: Engine,
    problem: Problem,
    nodes: NodeSet,
    samples: Tensor,
    coarse: _Coarse | None,
    reference: CondensedPath,
    rule: CarriedResidual,
    tally: Tally,
    limit: int,
) -> Asking[ParallelPath]:
    """The path of some samples, from where the coarser node set, the draft or the first rounds have brought it."""
    opening = engine.opening if coarse is None and problem.denoiser.draft is None else ()
    few = [condense(engine.steps, engine.prior[0], one, engine.prior[1]) for one in opening]
    free = _free(problem, samples, [*few, reference])
    last = yield from _open(engine, few, free, samples, rule, tally, limit)
    keep = None if coarse is None else coarse.again.to(coarse.path.device)
    judged = _interpolation(engine, nodes, reference, None if coarse is None else coarse.path.end[keep, 0])
    path = _guess(engine, nodes, samples, reference, free.pop(), judged)
    if coarse is not None and keep is not None:
        _take_over(path, nodes, coarse.nodes, coarse.path, keep)
    elif last is not None:
        _take_over(path, nodes, *last)
        tally.end[path.numbers] = path.end[:, 0]
    elif problem.denoiser.draft is not None:
        tally.draft = start_from_draft(problem, path, rule)
    return path


def _open(
    engine: Engine,
    references: Sequence[CondensedPath],
    free: list[Tensor],
    samples: Tensor,
    rule: CarriedResidual,
    tally: Tally,
    limit: int,
) -> Asking[tuple[NodeSet, ParallelPath] | None]:
    """A round each on more and more of the nodes: a draft made by the network itself.  It uses up its free states."""
    last: tuple[NodeSet, ParallelPath] | None = None
    for nodes, reference in zip(engine.opening, references, strict=False):  # there may be none
        path = _guess(engine, nodes, samples, reference, free.pop(0))
        if last is not None:
            _take_over(path, nodes, *last)
        size = engine.rows(nodes.count, narrow=True)
        size = min(size, engine.window) if isinstance(engine.window, int) else size
        rows = SlidingWindow(size, rule.threshold[torch.isin(engine.nodes.indices, nodes.indices).numpy()])
        yield from turns(tally, path, rows, FixedIterations(1, estimate=math.inf), limit)
        last = nodes, path
    return last


def _rules(
    engine: Engine,
    problem: Problem,
    path: CondensedPath,
    nodes: NodeSet,
    refinable: bool,
    coarse: _Coarse | None,
    aim: Table,
) -> tuple[SlidingWindow | TimedWindow, CarriedResidual]:
    """Which rows are evaluated, and when a sample is finished, ``aim`` being that of each, shape ``(B,)``."""
    count = path.count
    influence = _influence(engine, problem, path, nodes)
    # Rows that have settled may together leave this share of the tolerance.
    threshold = SETTLED_SHARE * aim / count / influence[:, None]
    first, finer = (FIRST_ROUGH, FINER_ROUGH) if engine.noisy else (FIRST_SMOOTH, FINER_SMOOTH)
    rule = CarriedResidual(
        influence,
        threshold,
        engine.tol,
        aim=aim,
        refinable=refinable,
        caution=first if coarse is None else finer,
        exact_after=TURNS_PER_NODE * count if count == engine.steps.count else math.inf,
        most_laps=LAPS_HALF if engine.half_precision else LAPS,
        told=None if coarse is None else coarse.rule.tell(coarse.again.numpy()),
    )
    return _active_rows(engine, problem, count, threshold), rule


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
    numbers = samples.to(problem.start.device)
    start, noise = problem.start[numbers][:, None], problem.noise
    return free_states(references, start, lambda first, last: noise.path(first, last)[:, numbers])


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


def _keep(states: Tensor, engine: Engine, problem: Problem, nodes: NodeSet, path: ParallelPath) -> None:
    """Write the states of a path at every step into those of the batch, ``(J + 1, B, d)``."""
    if nodes.count < engine.steps.count:
        steps = every_step(engine.steps.count)
        reference = condense(engine.steps, engine.prior[0], steps, engine.prior[1])
        free = _free(problem, path.samples, [reference])[0]
        fine = _guess(engine, steps, path.samples, reference, free, learns=False)
        fine.interpolate(nodes.weights, path.residual)
        path = fine
    states[:-1, path.numbers], states[-1, path.numbers] = path.nodes, path.end[:, 0]
