"""The engine of ``sample``: which nodes, which starting guess, and when to refine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

from piadm._checks import described, finite_float, positive_int, shown
from piadm.activity import SlidingWindow
from piadm.condense import CondensedPath, condense
from piadm.grid import TimeGrid
from piadm.integrators import AffineSteps, Integrator, integrator
from piadm.iteration import solve
from piadm.linearization import Gaussian, Linearization, check_slopes, linearization
from piadm.nodes import NodeSet, every_step, refine, spread, thin
from piadm.path import Interpolation, ParallelPath
from piadm.problem import Problem, check_denoiser, check_grid
from piadm.stopping import SETTLED_SHARE, CarriedResidual, Verdict
from piadm.tally import Tally

#: Nodes of the first, coarsest node set that the library chooses for the ODE; grids of fewer than twice as many
#: steps are solved with every step a node.
FIRST_NODES = 33

#: Estimated interpolation error per RMS of the probe, the change of the end when half the nodes are left out.  For
#: smooth residuals (ODE) the change is 3 times the error, for rough ones (SDE) once, but it leaves out how the network
#: answers, which on a trained network made errors of up to 3 times the change.
PROBE_SHARE = 4.0

#: With fewer nodes the probe means nothing and the error counts as unknown: for the ODE, and for the SDE.
FEWEST_SMOOTH, FEWEST_ROUGH = 9, 24

#: Estimated error per distance from the end on half the nodes, where both sets are solved: all of the distance, as
#: if each doubling only halved the error.
COARSE_SHARE = 1.0

#: Rounds on a finer node set before that distance, which starts at zero, is believed.
FINER_ROUNDS = 3


@dataclass(frozen=True)
class Engine:
    """The settings of one run of ``sample``, in the terms of the loop.

    Attributes:
        grid: all times.
        steps: coefficients of every step.
        slopes: Jacobian guess ``G_j`` of every step.
        prior: slopes and constants of the Gaussian reference model, whose path is the starting guess, each ``(J,)``.
        clock: log-SNR at the start of every step, on which residuals are interpolated.
        nodes: the first node set.
        refinable: whether finer node sets may follow.
        fewest: fewer nodes than these cannot be judged.
        window: rows per sample and round that are evaluated; None: all that have not settled.
        tol: tolerance.
    """

    grid: TimeGrid
    steps: AffineSteps
    slopes: Tensor
    prior: tuple[Tensor, Tensor]
    clock: Tensor
    nodes: NodeSet
    refinable: bool
    fewest: int
    window: int | None
    tol: float

    @property
    def turns_per_node(self) -> int:
        """Rounds in which one more state is exact: one, or two where a window must move on before it is used."""
        return 1 if self.window is None else 2


def settle(
    denoiser: object,
    *,
    method: str | Integrator,
    grid: object,
    steps: int,
    tol: object,
    nodes: object,
    window: object,
    guess: str | Linearization | None,
) -> Engine:
    """Check the arguments that are the engine's own and turn them into coefficients.

    Raises:
        TypeError, ValueError: naming the argument, what was received and what is accepted.
    """
    checked = check_denoiser(denoiser)
    schedule = checked.schedule
    tolerance = finite_float("tol", tol, low=0.0)
    times = TimeGrid.default(schedule, steps) if grid is None else check_grid(grid, schedule)
    scheme = integrator(method).steps(schedule, times)
    slopes = check_slopes(linearization(guess, checked).slopes(schedule, scheme), scheme.count)
    jacobian = Gaussian(checked.data_variance).slopes(schedule, scheme)
    clock = schedule.log_snr(scheme.times)
    first, refinable = _first_nodes(nodes, clock, noisy=scheme.normals > 0)
    return Engine(
        grid=times,
        steps=scheme,
        slopes=slopes,
        prior=(jacobian, (1 - jacobian * schedule.alpha(scheme.times)) * checked.data_mean),
        clock=clock,
        nodes=first,
        refinable=refinable,
        fewest=FEWEST_ROUGH if scheme.normals else FEWEST_SMOOTH,
        window=None if window is None else min(positive_int("window", window, minimum=2), scheme.count),
        tol=tolerance,
    )


def _first_nodes(nodes: object, clock: Tensor, *, noisy: bool) -> tuple[NodeSet, bool]:
    """The first node set and whether finer ones may follow.

    With noise every step is a node: what finer nodes add to a solved noisy path acts like new noise, which takes as
    many rounds to settle as a path from scratch, so going from coarse to fine would cost more than it saves.
    """
    count = len(clock)
    if isinstance(nodes, str) and nodes == "all":
        return every_step(count), False
    if nodes is None:
        fine = noisy or count < 2 * FIRST_NODES
        return (every_step(count), False) if fine else (spread(clock, FIRST_NODES), True)
    accepted = "'all', an integer >= 2 or None"
    if isinstance(nodes, bool) or not isinstance(nodes, (str, Integral)):
        raise TypeError(f"nodes must be {accepted}, got {described(nodes)}")
    if isinstance(nodes, str) or nodes < 2:
        raise ValueError(f"nodes must be {accepted}, got {shown(nodes)}")
    return spread(clock, int(nodes)), False


@torch.no_grad()
def run(engine: Engine, problem: Problem, tally: Tally, limit: int, return_states: bool) -> Tensor | None:
    """Solve on one node set after the other; a sample stays in the batch until it is judged."""
    nodes, left, coarse = engine.nodes, torch.arange(problem.batch), None
    states = problem.start.new_empty(engine.steps.count + 1, *problem.start.shape) if return_states else None
    with tally.running():
        while len(left):
            path = _path(engine, problem, nodes, left, coarse)
            refinable = engine.refinable and nodes.count < engine.steps.count
            rows, rule = _rules(engine, path, refinable, coarse)
            verdict = solve(tally, path, rows, rule, limit)
            if states is not None:
                states[:, path.numbers] = _all_states(engine, problem, nodes, path)
            go_on = refinable and not tally.interrupted and tally.rounds < limit
            again = (verdict == Verdict.REFINE) & go_on
            tally.close(left[~again], verdict[~again] == Verdict.DONE)
            coarse, left = _Coarse(nodes, path, rule, again), left[again]
            nodes = refine(nodes, engine.clock)
    return None if states is None else states.reshape(-1, *problem.shape)


@dataclass(frozen=True)
class _Coarse:
    """A solved path on a coarser node set, and which of its samples go on."""

    nodes: NodeSet
    path: ParallelPath
    rule: CarriedResidual
    again: Tensor


def _rules(
    engine: Engine, path: ParallelPath, refinable: bool, coarse: _Coarse | None
) -> tuple[SlidingWindow, CarriedResidual]:
    """Which rows are evaluated, and when a sample is finished."""
    known = None if coarse is None or coarse.rule.contraction is None else coarse.rule.contraction[coarse.again]
    count = path.path.count
    # Rows that have settled may together leave this share of the tolerance.
    threshold = SETTLED_SHARE * engine.tol / count / path.influence
    rule = CarriedResidual(
        path.influence,
        engine.tol,
        refinable=refinable,
        earliest=1 if coarse is None else FINER_ROUNDS,
        exact_after=count * engine.turns_per_node,
        contraction=known,
    )
    return SlidingWindow(engine.window or count, threshold), rule


def _path(engine: Engine, problem: Problem, nodes: NodeSet, samples: Tensor, coarse: _Coarse | None) -> ParallelPath:
    """The path of some samples on a node set, at its starting guess: the reference's, or the coarser set's."""
    if coarse is None:
        return _bare_path(engine, problem, nodes, samples)
    keep = coarse.again.to(coarse.path.device)
    path = _bare_path(engine, problem, nodes, samples, coarse.path.end[keep, 0])
    old = coarse.path.residual.view(coarse.nodes.count, len(keep), -1)[:, keep].flatten(1)
    path.residual.copy_(coarse.nodes.weights[nodes.indices].to(old) @ old)
    path.solve()
    return path


def _bare_path(
    engine: Engine, problem: Problem, nodes: NodeSet, samples: Tensor, coarse_end: Tensor | None = None
) -> ParallelPath:
    """The path of some samples, at the reference model's own solution."""
    reference = condense(engine.steps, engine.prior[0], nodes, engine.prior[1])
    condensed = reference
    if not torch.equal(engine.slopes, engine.prior[0]):
        condensed = condense(engine.steps, engine.slopes, nodes)
    numbers = samples.to(problem.start.device)
    return ParallelPath(
        condensed,
        problem.start[numbers][:, None],
        lambda first, last: problem.noise.path(first, last)[:, numbers],
        samples,
        reference,
        _interpolation(engine, nodes, reference, coarse_end),
    )


def _interpolation(
    engine: Engine, nodes: NodeSet, reference: CondensedPath, coarse_end: Tensor | None
) -> Interpolation | None:
    """How to estimate what interpolation leaves, carried to the end by the reference; None: every step is a node."""
    if nodes.count == engine.steps.count:
        return None
    fewer = thin(nodes, engine.clock)
    probe = reference.response[-1, 0].clone()
    probe[torch.isin(nodes.indices, fewer.indices)] -= condense(engine.steps, engine.prior[0], fewer).response[-1, 0]
    share = PROBE_SHARE if nodes.count >= engine.fewest else math.inf
    return Interpolation(probe, share, coarse_end, COARSE_SHARE)


def _all_states(engine: Engine, problem: Problem, nodes: NodeSet, path: ParallelPath) -> Tensor:
    """The states at every step, ``(J + 1, B, d)``, from the residuals at the nodes."""
    if nodes.count < engine.steps.count:
        fine = _bare_path(engine, problem, every_step(engine.steps.count), path.samples)
        fine.residual.copy_(nodes.weights.to(path.residual) @ path.residual)
        fine.solve()
        path = fine
    return torch.cat([path.nodes, path.end[None, :, 0]])
