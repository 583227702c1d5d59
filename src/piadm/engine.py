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
from piadm.linearization import Gaussian, Linearization, Secant, check_slopes, linearization
from piadm.local_model import Learning
from piadm.nodes import NodeSet, averaged, every_step, refine, spread, thin
from piadm.path import Interpolation, ParallelPath
from piadm.problem import Problem, check_denoiser, check_grid
from piadm.stopping import SETTLED_SHARE, CarriedResidual, Verdict
from piadm.tally import Tally

#: Degree of the interpolation between nodes, for the ODE and for the SDE, whose residuals are as rough as its noise.
SMOOTH_ORDER, ROUGH_ORDER = 3, 1

#: Nodes of the first node set that the library chooses: at least so many, and ``factor (std of the data/tol)^power``, so
#: that few samples need a second one.  Grids of fewer than twice as many steps are solved with every step a node.
FEWEST_SMOOTH, FACTOR_SMOOTH, POWER_SMOOTH = 17, 3.9, 0.5
FEWEST_ROUGH, FACTOR_ROUGH, POWER_ROUGH = 64, 1.6, 1.0

#: Estimated interpolation error per RMS of the probe, the change of the end with a poorer interpolation: linear instead
#: of cubic (ODE), on half the nodes and without averages (SDE).  On a trained network the error was up to 4.5 times
#: the change for the ODE with up to 65 nodes, and 0.07 to 0.24 times for the SDE; on mixtures 0.2 and 0.04.
PROBE_SHARE_SMOOTH, PROBE_SHARE_ROUGH = 4.0, 0.2

#: With fewer nodes the probe means nothing and the error counts as unknown: for the ODE, and for the SDE.
UNKNOWN_SMOOTH, UNKNOWN_ROUGH = 9, 24

#: Rounds on a finer node set before the distance from the end on the coarser one, which starts at zero, is believed.
FINER_ROUNDS = 3


@dataclass(frozen=True)
class Engine:
    """The settings of one run of ``sample``, in the terms of the loop.

    Attributes:
        grid: all times.
        steps: coefficients of every step.
        slopes: Jacobian guess ``G_j`` of every step.
        prior: slopes and constants of the Gaussian reference model, whose path is the starting guess, each ``(J,)``.
        learning: what local models may learn at every step.
        clock: log-SNR at the start of every step, on which residuals are interpolated.
        importance: how strongly every step's residual acts on what follows, where the network is to read averages of
            the states about a node; None: where it reads the states.
        nodes: the first node set.
        refinable: whether finer node sets may follow.
        noisy: whether the steps take noise.
        window: rows per sample and round that are evaluated; None: all that have not settled.
        tol: tolerance.
    """

    grid: TimeGrid
    steps: AffineSteps
    slopes: Tensor
    prior: tuple[Tensor, Tensor]
    learning: Learning
    clock: Tensor
    importance: Tensor | None
    nodes: NodeSet
    refinable: bool
    noisy: bool
    window: int | None
    tol: float

    @property
    def turns_per_node(self) -> int:
        """Rounds in which one more state is exact: one, or two where a window must move on before it is used."""
        return 1 if self.window is None else 2

    @property
    def order(self) -> int:
        """Degree of the interpolation between nodes."""
        return ROUGH_ORDER if self.noisy else SMOOTH_ORDER


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
    chosen = linearization(guess, checked)
    slopes = check_slopes(chosen.slopes(schedule, scheme), scheme.count)
    jacobian = Gaussian(checked.data_variance).slopes(schedule, scheme)
    clock = schedule.log_snr(scheme.times)
    noisy = scheme.normals > 0
    first, refinable = _first_nodes(nodes, clock, tolerance / math.sqrt(checked.data_variance), noisy=noisy)
    importance = _importance(scheme, jacobian) if noisy else None
    bounds = chosen.bounds(schedule, scheme) if isinstance(chosen, Secant) else (slopes, slopes)
    # Between what Gaussian data answer and the bound 1/alpha: sqrt(G/alpha), finite where alpha is 0.
    rate = (checked.data_variance / (schedule.alpha(scheme.times).square() * checked.data_variance
        + schedule.sigma(scheme.times).square())).sqrt()
    return Engine(
        grid=times,
        steps=scheme,
        slopes=slopes,
        prior=(jacobian, (1 - jacobian * schedule.alpha(scheme.times)) * checked.data_mean),
        learning=Learning(*bounds, rate),
        clock=clock,
        importance=importance,
        nodes=_readings(first, importance),
        refinable=refinable,
        noisy=noisy,
        window=None if window is None else min(positive_int("window", window, minimum=2), scheme.count),
        tol=tolerance,
    )


def _first_nodes(nodes: object, clock: Tensor, tol: float, *, noisy: bool) -> tuple[NodeSet, bool]:
    """The first node set for a tolerance relative to the data, and whether finer ones may follow."""
    count, order = len(clock), ROUGH_ORDER if noisy else SMOOTH_ORDER
    if isinstance(nodes, str) and nodes == "all":
        return every_step(count), False
    if nodes is None:
        fewest, factor, power = (
            (FEWEST_ROUGH, FACTOR_ROUGH, POWER_ROUGH) if noisy else (FEWEST_SMOOTH, FACTOR_SMOOTH, POWER_SMOOTH)
        )
        first = max(fewest, math.ceil(min(factor * tol**-power, count)))
        return (every_step(count), False) if count < 2 * first else (spread(clock, first, order), True)
    accepted = "'all', an integer >= 2 or None"
    if isinstance(nodes, bool) or not isinstance(nodes, (str, Integral)):
        raise TypeError(f"nodes must be {accepted}, got {described(nodes)}")
    if isinstance(nodes, str) or nodes < 2:
        raise ValueError(f"nodes must be {accepted}, got {shown(nodes)}")
    return spread(clock, int(nodes), order), False


def _importance(steps: AffineSteps, jacobian: Tensor) -> Tensor:
    """How strongly every step's residual acts on the end, for Gaussian data: ``b_j prod_k>j (a_k + b_k G_k)``."""
    factors = (steps.a[:, 0, 0] + steps.b[:, 0] * jacobian).flip(0).cumprod(0).flip(0).roll(-1)
    factors[-1] = 1
    return (steps.b[:, 0] * factors).abs().clamp(min=torch.finfo(torch.float64).tiny)


def _readings(nodes: NodeSet, importance: Tensor | None) -> NodeSet:
    """A node set with what the network reads there."""
    return nodes if importance is None or nodes.count == len(importance) else averaged(nodes, importance)


@torch.no_grad()
def run(engine: Engine, problem: Problem, tally: Tally, limit: int, return_states: bool) -> Tensor | None:
    """Solve on one node set after the other; a sample stays in the batch until it is judged."""
    nodes, left, coarse = engine.nodes, torch.arange(problem.batch), None
    states = problem.start.new_empty(engine.steps.count + 1, *problem.start.shape) if return_states else None
    with tally.running():
        while len(left):
            path = _path(engine, problem, nodes, left, coarse)
            refinable = engine.refinable and nodes.count < engine.steps.count
            rows, rule = _rules(engine, problem, path, nodes, refinable, coarse)
            verdict = solve(tally, path, rows, rule, limit)
            if states is not None:
                states[:, path.numbers] = _all_states(engine, problem, nodes, path)
            go_on = refinable and not tally.interrupted and tally.rounds < limit
            again = (verdict == Verdict.REFINE) & go_on
            tally.close(left[~again], verdict[~again] == Verdict.DONE)
            coarse, left = _Coarse(nodes, path, rule, again), left[again]
            nodes = _readings(refine(nodes, engine.clock, engine.order), engine.importance)
    return None if states is None else states.reshape(-1, *problem.shape)


@dataclass(frozen=True)
class _Coarse:
    """A solved path on a coarser node set, and which of its samples go on."""

    nodes: NodeSet
    path: ParallelPath
    rule: CarriedResidual
    again: Tensor


def _rules(
    engine: Engine, problem: Problem, path: ParallelPath, nodes: NodeSet, refinable: bool, coarse: _Coarse | None
) -> tuple[SlidingWindow, CarriedResidual]:
    """Which rows are evaluated, and when a sample is finished."""
    known = None if coarse is None or coarse.rule.contraction is None else coarse.rule.contraction[coarse.again]
    count = path.path.count
    influence = _influence(engine, problem, path.path, nodes)
    # Rows that have settled may together leave this share of the tolerance.
    threshold = SETTLED_SHARE * engine.tol / count / influence
    rule = CarriedResidual(
        influence,
        threshold,
        engine.tol,
        refinable=refinable,
        earliest=1 if coarse is None else FINER_ROUNDS,
        exact_after=count * engine.turns_per_node if nodes.readings is None else math.inf,
        contraction=known,
    )
    return SlidingWindow(engine.window or count, threshold), rule


def _influence(engine: Engine, problem: Problem, path: CondensedPath, nodes: NodeSet) -> Tensor:
    """How strongly each node's residual acts on the end, shape ``(n,)``: the larger of two models' answers.

    One is the iteration's own.  It may see no way from an early residual to the end, as a frozen denoised estimate
    does, or a short-sighted one: white data forget what correlated data keep.  The other is that of Gaussian data along
    their leading directions, of which the variance is between ``v`` (white data) and ``d v`` (all in one direction).
    """
    steps, denoiser = engine.steps, problem.denoiser
    variance = denoiser.data_variance * math.sqrt(problem.start.shape[1])
    silent = AffineSteps(steps.times, steps.a, steps.b, steps.c[..., :0])
    leading = condense(silent, Gaussian(variance).slopes(denoiser.schedule, steps), nodes)
    return torch.maximum(path.response[-1, 0].abs(), leading.response[-1, 0].abs())


def _path(engine: Engine, problem: Problem, nodes: NodeSet, samples: Tensor, coarse: _Coarse | None) -> ParallelPath:
    """The path of some samples on a node set, at its starting guess: the reference's, or the coarser set's."""
    if coarse is None:
        return _bare_path(engine, problem, nodes, samples)
    keep = coarse.again.to(coarse.path.device)
    path = _bare_path(engine, problem, nodes, samples, coarse.path.end[keep, 0])
    path.take_over(coarse.path, keep, torch.isin(nodes.indices, coarse.nodes.indices), coarse.nodes.weights[nodes.indices])
    return path


def _bare_path(
    engine: Engine, problem: Problem, nodes: NodeSet, samples: Tensor, coarse_end: Tensor | None = None,
    *, learns: bool = True,
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
        engine.learning.at(nodes.indices) if learns else None,
    )


def _interpolation(
    engine: Engine, nodes: NodeSet, reference: CondensedPath, coarse_end: Tensor | None
) -> Interpolation | None:
    """How to estimate what interpolation leaves, carried to the end by the reference; None: every step is a node."""
    if nodes.count == engine.steps.count:
        return None
    fewest, share = (UNKNOWN_ROUGH, PROBE_SHARE_ROUGH) if engine.noisy else (UNKNOWN_SMOOTH, PROBE_SHARE_SMOOTH)
    if coarse_end is not None and not engine.noisy:
        return Interpolation(None, coarse_end)
    poorer = thin(nodes, engine.clock, engine.order)
    probe = reference.response[-1, 0].clone()
    probe[torch.isin(nodes.indices, poorer.indices)] -= condense(engine.steps, engine.prior[0], poorer).response[-1, 0]
    return Interpolation(share * probe, unknown=nodes.count < fewest)


def _all_states(engine: Engine, problem: Problem, nodes: NodeSet, path: ParallelPath) -> Tensor:
    """The states at every step, ``(J + 1, B, d)``, from the residuals at the nodes."""
    if nodes.count < engine.steps.count:
        fine = _bare_path(engine, problem, every_step(engine.steps.count), path.samples, learns=False)
        fine.residual.copy_(nodes.weights.to(path.residual) @ path.found)
        fine.solve()
        path = fine
    return torch.cat([path.nodes, path.end[None, :, 0]])
