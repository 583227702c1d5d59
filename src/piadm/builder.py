"""What a level is made of: paths on a node set, their active rows, their stopping rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from piadm.activity import PATIENCE, SlidingWindow
from piadm.caution import FINER_ROUGH, FINER_SMOOTH, FIRST_ROUGH, FIRST_SMOOTH, CoarseRecord
from piadm.clipped import ClippedWalk
from piadm.condense import CondensedPath, condense, weights_on_end
from piadm.cost import TimedWindow, latency
from piadm.integrators import AffineSteps
from piadm.interpolation import (
    Interpolation,
    RoughInterpolation,
    SmoothInterpolation,
    rough_rows,
    share_of_distance,
    smooth_rows,
)
from piadm.linearization import Gaussian
from piadm.nodes import NodeSet
from piadm.numerics import Table, beside
from piadm.path import ParallelPath
from piadm.problem import Problem
from piadm.reference import free_states
from piadm.ripples import Ripples, no_ripples
from piadm.settings import TURNS_PER_NODE, SampleSettings
from piadm.sharing import Sharing
from piadm.stopping import CarriedResidual

#: Least influence of a node, so that one without any, where a step does not move the state, is still evaluated once.
FAINTEST = 1e-9

#: Least influence of a node, relative to its neighbours'.  If a step calls the network twice, as a midpoint rule does,
#: the first output may act on the end only through the second call, which the models of ``_influence`` do not see: its
#: row was never evaluated again, and twelve of twelve samples of such a scheduler ended at 3 to 5 times the tolerance.
BESIDE = 0.1

#: Stands for an unbounded data variance, relative to ``data_variance``.
BOUNDLESS = 1e12


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
        start, noise = self._drawn(samples)
        return free_states(references, start[:, None], noise)

    def _drawn(self, samples: Tensor) -> tuple[Tensor, Callable[[int, int], Tensor]]:
        """What was drawn for some samples: their first states, and their noise from one step to another."""
        problem = self.problem
        some = None if len(samples) == problem.batch else samples
        return problem.start[samples.to(problem.start.device)], lambda a, b: problem.noise.path(a, b, some)

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
        deviation, walk = self.ending[1] * math.sqrt(self.problem.denoiser.data_variance), self._walk(nodes, samples)
        return ParallelPath(path, free, samples, reference, interpolation, learning, centre, deviation, walk)

    def _walk(self, nodes: NodeSet, samples: Tensor) -> ClippedWalk | None:
        """Follows the steps of some samples if they clip."""
        settings = self.settings
        if settings.excess is None:
            return None
        assert isinstance(settings.steps, AffineSteps)  # in others clipping is a part of the estimate
        drawn = self._drawn(samples)
        return ClippedWalk(settings.excess, settings.steps, settings.slopes, settings.prior, nodes, *drawn)

    @cached_property
    def ending(self) -> tuple[float, float]:
        """``alpha`` at the last time, and the deviation there relative to the data's: a grid may end among noise."""
        denoiser = self.problem.denoiser
        alpha, sigma = (float(level) for level in denoiser.schedule.levels(self.settings.grid.times[-1:]))
        return alpha, math.hypot(alpha, sigma / math.sqrt(denoiser.data_variance))

    @cached_property
    def ripples(self) -> Ripples | None:
        """Those of all samples from step to step; None: nodes were asked for, or every step is one.

        They are measured on the first node set of the SDE, whose noise hides them, and on the first finer one that a
        sample of the ODE comes to, as those with ripples do.
        """
        settings, denoiser = self.settings, self.problem.denoiser
        nodes = settings.nodes if settings.noisy else settings.finer(settings.nodes)
        if not settings.refinable or nodes.count == settings.steps.count:
            return None
        scale = denoiser.coefficients(settings.steps.times)[1].abs()
        on_end = weights_on_end(settings.steps, settings.prior[0])
        return Ripples(nodes, settings.steps.times, settings.clock, scale, on_end, self.problem.batch)

    def interpolation(
        self, nodes: NodeSet, samples: Tensor, reference: CondensedPath, coarse: tuple[Tensor, int] | None = None
    ) -> Interpolation | None:
        """Estimates the interpolation error, propagated to the end by the reference; None: all steps are nodes.

        ``coarse`` is where the path ends on a coarser node set, and how many nodes that has.
        """
        settings = self.settings
        if nodes.count == settings.steps.count:
            return None
        acting, on_end = reference.response[-1, 0], weights_on_end(settings.steps, settings.prior[0])
        ripples = no_ripples if self.ripples is None else self.ripples.on(nodes, samples)
        coarse_end, share = (None, 1.0) if coarse is None else (coarse[0], share_of_distance(nodes.count / coarse[1]))
        given = nodes, settings.clock, settings.order, acting, on_end
        if settings.noisy:
            return RoughInterpolation(rough_rows(*given), coarse_end, share, ripples)
        return SmoothInterpolation(smooth_rows(*given), coarse_end, share, ripples)

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
            widest=self.widest(nodes),
            caution=caution,
            exact_after=TURNS_PER_NODE * count if count == settings.steps.count else math.inf,
            coarse=coarse,
        )

    def widest(self, nodes: NodeSet) -> float:
        """Size of samples, as RMS distance from ``data_mean``, for which there are nodes enough."""
        return self.settings.widest(nodes) * self.ending[1]

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
        return np.maximum(influence, BESIDE * np.maximum(*beside(influence)))

    def sharing(self, path: ParallelPath, rule: CarriedResidual) -> Sharing | None:
        """Which rows of a path take the innovation of their neighbours; None: no row does.

        None does where the first nodes are all steps, nor where steps clip, which is rough from step to step, as is
        half precision (``PathRun``).  The ODE's samples have few rounds in which they could.
        """
        settings, local = self.settings, path.local
        if settings.nodes.count == settings.steps.count or not settings.noisy:
            return None
        if settings.excess is not None or local is None or not local.learns:
            return None
        response = path.path.response[:-1, 0].abs().tril(-1).numpy()
        drafted = self.problem.denoiser.draft is not None and not rule.begun
        return Sharing(response, drafted)

    def active_rows(self, count: int, rule: CarriedResidual) -> SlidingWindow | TimedWindow:
        """Which rows of a path on so many nodes are evaluated.

        Where the library chooses, there is no limit for samples from coarser nodes, whose states are nearly final, but
        for those that are judged anew.
        """
        settings, denoiser, executor = self.settings, self.problem.denoiser, self.problem.executor
        patience = PATIENCE + settings.later
        if settings.window == "auto":
            known = latency(denoiser.network, self.problem.start.device, self.problem.shape[1:])
            most = executor.given_max_batch
            room = None if most is None else most // denoiser.rows_per_call
            return TimedWindow(rule.threshold, known, room, patience)
        size = settings.window
        if size is None:
            size = count if rule.begun else settings.rows(count, narrow=denoiser.draft is not None)
        return SlidingWindow(int(size), rule.threshold, patience)
