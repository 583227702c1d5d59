"""Levels: samples on one node set, with their path, active rows and stopping rule, and the transfer to finer nodes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from piadm.activity import PATIENCE, SlidingWindow
from piadm.clipped import ClippedWalk
from piadm.condense import CondensedPath, condense, weights_on_end
from piadm.cost import TimedWindow, latency
from piadm.integrators import AffineSteps
from piadm.interpolation import Interpolation, RoughInterpolation, SmoothInterpolation, rough_rows, smooth_rows
from piadm.iteration import PathRun
from piadm.linearization import Gaussian
from piadm.nodes import NodeSet, every_step
from piadm.numerics import Flags, Table
from piadm.path import ParallelPath
from piadm.problem import Problem
from piadm.reference import free_states
from piadm.ripple_probe import RippleProbe
from piadm.ripples import Ripples, no_ripples
from piadm.settings import TURNS_PER_NODE, SampleSettings
from piadm.stopping import (
    FINER_ROUGH,
    FINER_SMOOTH,
    FIRST_ROUGH,
    FIRST_SMOOTH,
    LAPS,
    LAPS_HALF,
    LEFT,
    CarriedResidual,
    CoarseRecord,
    Verdict,
)

#: Least influence of a node, so that one without any, where a step does not move the state, is still evaluated once.
FAINTEST = 1e-9

#: Least influence of a node, relative to its neighbours'.  If a step calls the network twice, as a midpoint rule does,
#: the first output may act on the end only through the second call, which the models of ``_influence`` do not see: its
#: row was never evaluated again, and twelve of twelve samples of such a scheduler ended at 3 to 5 times the tolerance.
BESIDE = 0.1

#: Stands for an unbounded data variance, relative to ``data_variance``.
BOUNDLESS = 1e12

#: A sample goes on to every step where ripples would leave more than this share of its aim on the next node set: with
#: twice as many nodes independent ones leave 0.7 of what they left.
RIPPLED = 0.5

#: A sample that oscillated is close to a border between two outcomes, where small errors decide: on finer nodes its aim
#: is divided by this.  Of two such samples one ended on the wrong side with the common aim, none with a quarter of it.
CARE = 16


@dataclass(frozen=True)
class Builder:
    """Builds what a level is made of: paths on a node set, their active rows, their stopping rule.

    Attributes:
        settings: of the run.
        problem: what is sampled.
    """

    settings: SampleSettings
    problem: Problem

    def reference(self, nodes: NodeSet) -> CondensedPath:
        """The path of the reference model, noise included."""
        return condense(self.settings.steps, self.settings.prior[0], nodes, self.settings.prior[1])

    def condensed(self, nodes: NodeSet, reference: CondensedPath) -> CondensedPath:
        """The path with the iteration's own linearization; often that is the reference's."""
        if torch.equal(self.settings.slopes, self.settings.prior[0]):
            return reference
        return condense(self.settings.steps.silent(), self.settings.slopes, nodes)

    def free(self, samples: Tensor, references: Sequence[CondensedPath]) -> list[Tensor]:
        """The reference model's own states of some samples."""
        problem = self.problem
        start = problem.start[samples.to(problem.start.device)][:, None]
        some = None if len(samples) == problem.batch else samples
        return free_states(references, start, lambda first, last: problem.noise.path(first, last, some))

    def guess(
        self,
        nodes: NodeSet,
        samples: Tensor,
        reference: CondensedPath,
        free: Tensor,
        interpolation: Interpolation | None = None,
        *,
        learns: bool = True,
    ) -> ParallelPath:
        """The path of some samples, at the reference model's own solution."""
        learning = self.settings.learning.at(nodes.indices) if learns else None
        path, centre = self.condensed(nodes, reference), self.ending[0] * self.problem.denoiser.data_mean
        return ParallelPath(path, free, samples, reference, interpolation, learning, centre, self._walk(nodes, samples))

    def _walk(self, nodes: NodeSet, samples: Tensor) -> ClippedWalk | None:
        """Follows the steps of some samples if they clip."""
        settings, problem = self.settings, self.problem
        if settings.excess is None:
            return None
        assert isinstance(settings.steps, AffineSteps)  # in others clipping is a part of the estimate
        start = problem.start[samples.to(problem.start.device)]
        some = None if len(samples) == problem.batch else samples
        return ClippedWalk(
            settings.excess, settings.steps, settings.slopes, settings.prior, nodes, start,
            lambda first, last: problem.noise.path(first, last, some),
        )  # fmt: skip

    @cached_property
    def ending(self) -> tuple[float, float]:
        """``alpha`` at the last time, and the deviation there relative to the data's: a grid may end among noise."""
        denoiser = self.problem.denoiser
        alpha, sigma = (float(level) for level in denoiser.schedule.levels(self.settings.grid.times[-1:]))
        return alpha, math.hypot(alpha, sigma / math.sqrt(denoiser.data_variance))

    @cached_property
    def ripples(self) -> Ripples | None:
        """Those of all samples from step to step; None: nodes were asked for, or every step is one.

        They are measured on the first node set of the SDE, where noise hides them, and on the first finer one of the
        ODE, where samples that show ripples go on to.
        """
        settings, denoiser = self.settings, self.problem.denoiser
        nodes = settings.nodes if settings.noisy else settings.finer(settings.nodes)
        if not settings.refinable or nodes.count == settings.steps.count:
            return None
        scale = denoiser.coefficients(settings.steps.times)[1].abs()
        on_end = weights_on_end(settings.steps, settings.prior[0])
        return Ripples(nodes, settings.steps.times, settings.clock, scale, on_end, self.problem.batch)

    def interpolation(
        self, nodes: NodeSet, samples: Tensor, reference: CondensedPath, coarse_end: Tensor | None = None
    ) -> Interpolation | None:
        """Estimates the interpolation error, propagated to the end by the reference; None: all steps are nodes."""
        settings = self.settings
        if nodes.count == settings.steps.count:
            return None
        acting, on_end = reference.response[-1, 0], weights_on_end(settings.steps, settings.prior[0])
        ripples = no_ripples if self.ripples is None else self.ripples.on(nodes, samples)
        given = nodes, settings.clock, settings.order, acting, on_end
        if settings.noisy:
            return RoughInterpolation(rough_rows(*given), coarse_end, ripples)
        return SmoothInterpolation(smooth_rows(*given), coarse_end, ripples)

    def rule(
        self, nodes: NodeSet, reference: CondensedPath, aim: Table, coarse: CoarseRecord | None = None
    ) -> CarriedResidual:
        """The stopping rule for samples with aims ``(B,)``; ``coarse`` is what coarser nodes have shown of them."""
        settings, count = self.settings, nodes.count
        influence = self._influence(nodes, reference)
        first, finer = (FIRST_ROUGH, FINER_ROUGH) if settings.noisy else (FIRST_SMOOTH, FINER_SMOOTH)
        caution = replace(first, calm=first.calm + settings.later) if coarse is None else finer
        return CarriedResidual(
            influence,
            caution.settled * aim / count / influence[:, None],
            settings.tol,
            aim=aim,
            refinable=settings.refines(nodes),
            widest=settings.widest(nodes) * self.ending[1],
            caution=caution,
            exact_after=TURNS_PER_NODE * count if count == settings.steps.count else math.inf,
            most_laps=LAPS_HALF if settings.half_precision else LAPS,
            coarse=coarse,
        )

    def _influence(self, nodes: NodeSet, reference: CondensedPath) -> Table:
        """How strongly each node's residual acts on the end, shape ``(n,)``: the larger of two models' values.

        One is the iteration's own linearization.  It may underestimate the influence of early residuals: with the
        denoised estimate frozen it is zero, and a network's Jacobian may be larger than ``data_variance`` implies, so
        that perturbations are damped less.  The other is the model for data of unbounded variance, which damps nothing.
        The result is at least ``BESIDE`` times that of a neighbour.
        """
        steps, denoiser = self.settings.steps, self.problem.denoiser
        leading = weights_on_end(steps, Gaussian(BOUNDLESS * denoiser.data_variance).slopes(denoiser.schedule, steps))
        own = self.condensed(nodes, reference).response[-1, 0].abs()
        influence: Table = torch.maximum(own, (leading @ nodes.weights).abs()).clamp(min=FAINTEST).numpy()
        beside = np.pad(influence, 1)
        return np.maximum(influence, BESIDE * np.maximum(beside[:-2], beside[2:]))

    def active_rows(self, count: int, threshold: Table) -> SlidingWindow | TimedWindow:
        """Which rows of a path on so many nodes are evaluated."""
        settings, denoiser, executor = self.settings, self.problem.denoiser, self.problem.executor
        patience = PATIENCE + settings.later
        if settings.window == "auto":
            known = latency(denoiser.network, self.problem.start.device, self.problem.shape[1:])
            most = executor.given_max_batch
            return TimedWindow(threshold, known, None if most is None else most // denoiser.rows_per_call, patience)
        size = settings.window
        if size is None:
            size = settings.rows(count, narrow=denoiser.draft is not None)
        return SlidingWindow(int(size), threshold, patience)


class Level:
    """Some samples on one node set.

    Args:
        builder: of this run.
        nodes: the node set.
        path: their path on it.
        rule: judges them.
        failed: which of them have failed already, shape ``(B,)``.
    """

    def __init__(
        self, builder: Builder, nodes: NodeSet, path: ParallelPath, rule: CarriedResidual, failed: Flags
    ) -> None:
        self.builder, self.nodes, self.path, self.rule = builder, nodes, path, rule
        self.rows = builder.active_rows(nodes.count, rule.threshold)
        ripples = builder.ripples
        probe = RippleProbe(ripples, path) if ripples is not None and ripples.wanted(nodes, path.samples) else None
        self.run = PathRun(path, self.rows, rule, failed, probe)

    @property
    def going(self) -> bool:
        """Whether any of them take part in the next round."""
        return bool(self.run.going.any())

    @property
    def waiting(self) -> Flags:
        """Which of them are to go on with finer nodes, shape ``(B,)``."""
        refines, run = self.builder.settings.refines(self.nodes), self.run
        found: Flags = (run.verdict == Verdict.REFINE) & ~run.handed & refines
        return found

    def next_nodes(self, some: Flags) -> list[tuple[NodeSet, Flags]]:
        """Finer nodes for some of them ``(B,)``: twice as many, or every step where that would not be enough.

        That is so of ripples, and of an amplified sample of the SDE: by way of several node sets, the slowest of a
        mixture's took 63 rounds instead of 39, and all together as many evaluations.  The ODE's errors fall faster, and
        it took twice as many.
        """
        settings, ripples, rule = self.builder.settings, self.builder.ripples, self.rule
        finer, steps = settings.finer(self.nodes), every_step(settings.steps.count)
        amplified = (self.path.amplification.factor > 1).any(0)
        hopeless = settings.noisy & amplified & (LEFT * rule.interpolation > rule.aim)
        if ripples is not None and finer.count < steps.count:
            hopeless |= ripples.on(finer, self.path.samples)() > RIPPLED * rule.aim
        parts = (finer, some & ~hopeless), (steps, some & hopeless)
        return [(nodes, part) for nodes, part in parts if part.any()]

    def finer(self, nodes: NodeSet, again: Flags) -> Level:
        """Some of them that have not failed, ``again (B,)``, on finer nodes, from where they are on these."""
        builder, keep, path = self.builder, torch.from_numpy(again), self.path
        samples, reference = path.samples[keep], builder.reference(nodes)
        aim = np.where(self.rule.circling, builder.settings.aim / CARE, self.rule.aim)[again]
        rule = builder.rule(nodes, reference, aim, self.rule.record(again))
        there = keep.to(path.device)
        judged = builder.interpolation(nodes, samples, reference, path.end[there, 0])
        free = builder.free(samples, [reference]).pop()
        fine = builder.guess(nodes, samples, reference, free, judged)
        take_over(fine, nodes, self.nodes, path, there)
        self.run.handed |= again
        return Level(builder, nodes, fine, rule, np.zeros(len(samples), np.bool_))

    def states(self, own: Tensor) -> tuple[Tensor, Tensor]:
        """States of some of them, ``own (B,)``, at every step and at the end, ``(J, B', d)`` and ``(B', d)``."""
        path, builder, there = self.path, self.builder, own.to(self.path.device)
        if self.nodes.count == builder.settings.steps.count:
            return path.nodes[:, there], path.end[there, 0]
        steps, samples = every_step(builder.settings.steps.count), path.samples[own]
        reference = builder.reference(steps)
        fine = builder.guess(steps, samples, reference, builder.free(samples, [reference]).pop(), learns=False)
        residual = path.residual.view(self.nodes.count, path.batch, path.size)[:, there]
        fine.interpolate(self.nodes.weights, residual.flatten(1))
        return fine.nodes, fine.end[:, 0]


def take_over(
    path: ParallelPath,
    nodes: NodeSet,
    coarse_nodes: NodeSet,
    coarse: ParallelPath,
    keep: Tensor | slice = slice(None),  # noqa: B008
) -> None:
    """Bring a path to where one of the same samples, or of more of which some are kept, is on some of its nodes."""
    old = torch.isin(nodes.indices, coarse_nodes.indices)
    path.take_over(coarse, keep, old, coarse_nodes.weights[nodes.indices])
