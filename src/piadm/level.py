"""Levels: samples on one node set, with their path, active rows and stopping rule, and the transfer to finer nodes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from piadm.builder import Builder
from piadm.interpolation import LEFT
from piadm.iteration import PathRun
from piadm.nodes import NodeSet, every_step
from piadm.numerics import Flags
from piadm.path import ParallelPath
from piadm.ripple_probe import RippleProbe
from piadm.stopping import CarriedResidual, Verdict
from piadm.witness import Witness

#: Ripples from step to step may leave this share of a sample's aim on the node set that it goes on to: squares add, so
#: that 0.87 of it are there for all other errors.
RIPPLED = 0.5

#: ODE: where twice as many nodes would leave more than this of the interpolation error, it is due to independent
#: ripples, and a sample goes on to as many nodes as are expected to bring it below so many times the aim: on finer
#: nodes it is estimated at about half.  An undertrained network took 8 rounds instead of 11.
RIPPLY, FAR = 0.6, 2.0

#: A sample that oscillated is close to a border between two outcomes, where small errors decide: on finer nodes its aim
#: is divided by this.  Of two such samples one ended on the wrong side with the common aim, none with a quarter of it.
#: Not so in half precision, where it is rounding that keeps rows from settling, and no aim below it is ever met: a
#: small network in bfloat16 took 122 rounds for 100 steps, and 18 with the common aim.
CARE = 16

#: All samples of a path.
ALL = slice(None)


class Level:
    """Some samples on one node set.

    Args:
        builder: of this run.
        nodes: the node set.
        path: their path on it.
        rule: judges them.
        failed: which of them have failed already, shape ``(B,)``.
        earlier: rounds that they have had on coarser nodes.
    """

    def __init__(
        self,
        builder: Builder,
        nodes: NodeSet,
        path: ParallelPath,
        rule: CarriedResidual,
        failed: Flags,
        earlier: int = 0,
    ) -> None:
        self.builder, self.nodes, self.path, self.rule, self.earlier = builder, nodes, path, rule, earlier
        self.rows = builder.active_rows(nodes.count, rule)
        ripples, probe = builder.ripples, None
        if ripples is not None and ripples.wanted(nodes, path.samples):
            probe = RippleProbe(ripples, path, nodes)
        witness = Witness(path, builder.settings.learning.resolution, earlier)
        self.run = PathRun(path, self.rows, rule, failed, probe, builder.sharing(path, rule), witness)

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
        """Finer nodes for some of them ``(B,)``: twice as many, or more where these would not be enough.

        Samples that leave these nodes early are apart from the others, since ``finer`` judges them anew.  No node
        set is made that is not on somebody's way: those of 5000 steps of the SDE took 23 s and 2 GB.
        """
        settings, nodes, doublings = self.builder.settings, self.nodes, 0
        parts, left, at_once = [], some, self._at_once
        while left.any():
            climbs, doublings = (left & ~at_once).any(), doublings + 1
            nodes = settings.finer(nodes) if climbs else every_step(settings.steps.count)
            here = left & self._enough(nodes, doublings, at_once)
            parts += [(nodes, here & (self.rule.leaving == early)) for early in (False, True)]
            left = left & ~here
        return [(nodes, part) for nodes, part in parts if part.any()]

    @property
    def _at_once(self) -> Flags:
        """Which of them go on to every step at once, shape ``(B,)``: those of the SDE near a border between outcomes.

        These are amplified, and twice as many nodes would not do: by way of several node sets, the slowest of a
        mixture's took 63 rounds instead of 39, and all together as many evaluations.  The ODE's errors fall faster; its
        samples took twice as many evaluations at every step.  And those in half precision (``SampleSettings.finer``).
        """
        amplified = self.builder.settings.noisy & (self.path.amplification.factor > 1).any(0)
        found: Flags = amplified & (LEFT * self.rule.interpolation > self.rule.aim)
        return found | self.path.half_precision

    def _enough(self, nodes: NodeSet, doublings: int, at_once: Flags) -> Flags:
        """For which of them a node set is fine enough, after so many doublings, shape ``(B,)``."""
        rule, ripples = self.rule, self.builder.ripples
        if nodes.count == self.builder.settings.steps.count:
            return np.ones_like(at_once)
        few = at_once | (rule.width > self.builder.widest(nodes))
        if ripples is not None:
            few |= ripples.on(nodes, self.path.samples)() > RIPPLED * rule.aim
        few |= (rule.remains > RIPPLY) & (rule.remains**doublings * rule.interpolation > FAR * rule.aim)
        return ~few

    def finer(self, nodes: NodeSet, again: Flags) -> Level:
        """Some of them that have not failed, ``again (B,)``, on finer nodes, from where they are on these.

        Some leave before their iteration has converged.  Where they end on these nodes says nothing then, and they are
        judged as on a first node set.  How much their errors grow is measured anew, too, for the ODE: of a trained
        network's 32 samples two took 9500 evaluations otherwise, and 3800 with it.  One of 512 of the SDE of each of
        two mixtures, whose next nodes are all steps, ended on the wrong side with it.
        """
        builder, keep, path = self.builder, torch.from_numpy(again), self.path
        samples, reference = path.samples[keep], builder.reference(nodes)
        careful = self.rule.circling & ~path.half_precision
        aim = np.where(careful, builder.settings.aim / CARE, self.rule.aim)[again]
        there, anew = keep.to(path.device), bool(self.rule.leaving[again].all())
        rule = builder.rule(nodes, reference, aim, None if anew else self.rule.record(again))
        coarse = None if anew else (path.end[there, 0], self.nodes.count)
        judged = builder.interpolation(nodes, samples, reference, coarse)
        free = builder.free(samples, [reference]).pop()
        fine = builder.guess(nodes, samples, reference, free, judged)
        take_over(fine, nodes, self.nodes, path, there)
        if anew and not builder.settings.noisy:
            fine.amplification.forget()
        self.run.handed |= again
        earlier = self.earlier + self.run.rounds
        return Level(builder, nodes, fine, rule, np.zeros(len(samples), np.bool_), earlier)

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
    keep: Tensor | slice = ALL,
) -> None:
    """Bring a path to where one of the same samples, or of more of which some are kept, is on some of its nodes."""
    old = torch.isin(nodes.indices, coarse_nodes.indices)
    path.take_over(coarse, keep, old, coarse_nodes.weights[nodes.indices])
