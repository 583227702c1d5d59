"""The settings of one run of ``sample``: its arguments, checked and turned into coefficients."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from numbers import Integral

from torch import Tensor

from piadm._checks import choice, described, finite_float, positive_int, shown
from piadm.activity import NARROW, ROUGH, WIDE
from piadm.clipped import Excess
from piadm.condense import weights_on_end
from piadm.denoiser import Denoiser
from piadm.grid import TimeGrid
from piadm.integrators import Integrator, Steps, steps_of
from piadm.linearization import DiagonalSecant, Gaussian, LearnedSlopes, Linearization, check_slopes, linearization
from piadm.local_model import Learning
from piadm.nodes import GOLDEN, MIDDLE, NodeSet, averaged, every_step, refine, spread, strided
from piadm.numerics import TINY
from piadm.precision import HALF, resolution
from piadm.problem import check_denoiser, grid_of
from piadm.stopping import LOOSEST

#: Degree of the interpolation between nodes, for the ODE and for the SDE, whose residuals are as rough as its noise.
SMOOTH_ORDER, ROUGH_ORDER = 3, 1

#: Number of nodes of the first node set if the library chooses it: ``factor (std of the data/aim)^power``, such that
#: few samples need a second one.  With a fifth fewer for the SDE at 1e-2, eleven networks took a fifth fewer
#: evaluations and as many rounds, but some samples near borders between two outcomes ended on the wrong side, and two
#: of 32 of a U-Net were outside instead of one; with a quarter fewer one of 16 was 48 tolerances away, and said to have
#: converged.  With a power of 1 every step was a node for the SDE at 3e-3: samples of eight networks took 3000
#: evaluations instead of 1600 and half a round less, and ended with a tenth of the error allowed.  ODE: with a tenth
#: more, nine networks took 7 % more evaluations, but none of 32 of the U-Net's samples was outside instead of one of
#: 16; with a fifth fewer four took a round or more longer.
FACTOR_SMOOTH, FACTOR_ROUGH, POWER = 1.5, 6.4, 0.75

#: With fewer steps than this many times the nodes, every step is a node.  The factor is larger for the ODE, whose
#: ripples may go unnoticed if nodes alternate with steps that are none; averages over a gap (SDE) have no such problem.
ROOM_SMOOTH, ROOM_ROUGH = 2.0, 1.5

#: A sample keeps its nodes as long as they are at least this share of those that data of its size would take.
CONTENT = 0.7

#: Least ratio of the nodes of a finer set to those of the coarser (SDE); below it every step becomes a node.  Without
#: it a U-Net's slowest sample of 32 went through 156, 293, 512, 799, 979 and 1000 nodes, of which those with 979 took
#: 16 rounds and 7000 of its 30000 evaluations.
WORTHWHILE = 1.5

#: The first round uses one in this many of the nodes that the library chooses, if at least so few remain.  The first
#: rounds only determine which sample the path leads to, which takes few nodes.  One on a quarter of them and one on
#: half saved mixtures, an MLP and a U-Net 10 to 30 % of the evaluations and cost a quarter of a round on average; two
#: on the quarter saved as much and cost a little more, two on each saved a few per cent more and cost up to a round.
OPENING_SHARE, OPENING_FEWEST = 4, 6

#: Aim, relative to the data, for which the rounds of slow samples were calibrated.  Every halving of a smaller aim
#: takes about one round more: of eight samples of a U-Net's SDE at 3e-3 that counted as slow after as many rounds as at
#: 1e-2, three moved on to finer nodes and took 20 rounds where now 16 are enough.
USUAL_AIM = 0.01

#: Surprise per drift that is assumed at least, relative to the geometric mean of two bounds (``_learning``).  In most
#: rows trained networks showed 0.3 to 0.5 of that mean; with 1 here rounds were 5 % more, and of 5932 samples 0.2 %
#: were outside the tolerance instead of 0.4 %.
ASSUMED = 0.5

#: Rounds after which one more state is certainly exact: the window has to move on before the next state is evaluated.
TURNS_PER_NODE = 2

#: Least slope where steps clip, relative to the linearization's: what hardly acts on an estimate would be moved far to
#: bring it back to where it is not clipped.
LEAST_CLIPPED = 0.25


@dataclass(frozen=True)
class SampleSettings:
    """The settings of one run of ``sample``, in the terms of the loop.

    Attributes:
        grid: all times.
        steps: coefficients of every step.
        slopes: Jacobian guess ``G_j`` of every step.
        prior: slopes and constants of the Gaussian reference model, whose path is the starting guess, each ``(J,)``.
        learning: what local models may learn at every step.
        clock: log-SNR at the start of every step, on which residuals are interpolated.
        importance: influence of every step's residual on the end, by which the averages of states about a node are
            weighted (SDE); None: the network reads the states themselves.
        nodes: the first node set.
        opening: for each of the first rounds, the few of these nodes that it uses.
        refinable: whether finer node sets may follow.
        noisy: whether the steps take noise.
        window: rows per sample and round that are evaluated; None: a share of the nodes, or all where every
            step is one; "auto": as many as take the least time.
        tol: tolerance.
        aim: what the errors of the iteration and of the interpolation are brought below: the tolerance, but no more
            than ``LOOSEST`` standard deviations of the data.
        later: rounds that the aim is expected to take beyond those at ``USUAL_AIM``.
        excess: what steps that clip add to theirs; None: nothing.
    """

    grid: TimeGrid
    steps: Steps
    slopes: Tensor
    prior: tuple[Tensor, Tensor]
    learning: Learning
    clock: Tensor
    importance: Tensor | None
    nodes: NodeSet
    opening: tuple[NodeSet, ...]
    refinable: bool
    noisy: bool
    window: int | str | None
    tol: float
    aim: float
    later: float
    excess: Excess | None = None

    @property
    def order(self) -> int:
        """Degree of the interpolation between nodes."""
        return ROUGH_ORDER if self.noisy else SMOOTH_ORDER

    def finer(self, nodes: NodeSet) -> NodeSet:
        """A node set with one more node in every gap, or every step.

        It is every step for the ODE if more than half of the steps would be nodes (``ROOM_SMOOTH``); for the SDE if
        hardly any nodes would be added (``WORTHWHILE``), as most gaps have no step left; and always for half precision,
        since rounding differs from node set to node set, and with every step it is the sequential sampler's.
        """
        finer = refine(nodes, self.clock, self.order, MIDDLE if self.noisy else GOLDEN)
        few = finer.count < WORTHWHILE * nodes.count if self.noisy else 2 * finer.count > self.steps.count
        if self.half_precision or few:
            return every_step(self.steps.count)
        return with_readings(finer, self.importance)

    def refines(self, nodes: NodeSet) -> bool:
        """Whether samples that need it go on from these nodes to finer ones."""
        return self.refinable and nodes.count < self.steps.count

    def widest(self, nodes: NodeSet) -> float:
        """RMS distance from ``data_mean`` up to which these nodes are enough for a sample."""
        return self.tol * _size(nodes.count / CONTENT, noisy=self.noisy) if self.refines(nodes) else math.inf

    @property
    def half_precision(self) -> bool:
        """Whether the network is known to compute with numbers of sixteen bits, or TF32."""
        return self.learning.resolution > HALF

    def rows(self, nodes: int, *, narrow: bool) -> int:
        """Default window on so many nodes; for the ODE there is a narrow and a wide one."""
        if nodes == self.steps.count:
            return nodes
        return math.ceil((ROUGH if self.noisy else NARROW if narrow else WIDE) * nodes)

    @property
    def held(self) -> int:
        """Most nodes held at once: those of the path of a first round are there while that on all nodes is built."""
        return self.nodes.count + max((few.count for few in self.opening), default=0)

    @property
    def most_rounds(self) -> int:
        """Default round limit: by then a window of any width has passed over the whole path."""
        return TURNS_PER_NODE * (self.steps.count if self.refinable else self.nodes.count)


def resolve(
    denoiser: object,
    *,
    method: str | Integrator,
    grid: object,
    steps: int,
    tol: object,
    nodes: object,
    window: object,
    guess: str | Linearization | None,
) -> SampleSettings:
    """Check the arguments that only ``sample`` takes and turn them into coefficients.

    Raises:
        TypeError, ValueError: naming the argument, what was received and what is accepted.
    """
    checked = check_denoiser(denoiser)
    schedule, deviation = checked.schedule, math.sqrt(checked.data_variance)
    tolerance = finite_float("tol", tol, low=0.0)
    aim = min(tolerance, LOOSEST * deviation)
    relative = max(aim / deviation, TINY)
    times = grid_of(grid, schedule, steps)
    scheme = steps_of(method, schedule, times)
    chosen = linearization(guess, checked)
    slopes = check_slopes(chosen.slopes(schedule, scheme), scheme.count)
    jacobian = Gaussian(checked.data_variance).slopes(schedule, scheme)
    clock = schedule.log_snr(scheme.times)
    noisy = scheme.normals > 0
    first, refinable = _first_nodes(nodes, clock, deviation, relative, noisy=noisy)
    importance = _importance(scheme, jacobian) if noisy else None
    opening = _opening(first, clock, relative, noisy=noisy) if nodes is None else ()
    learning = _learning(checked, scheme, chosen, slopes, clock)
    return SampleSettings(
        grid=times,
        steps=scheme,
        slopes=slopes,
        prior=(jacobian, (1 - jacobian * learning.alpha) * checked.data_mean),
        learning=learning,
        clock=clock,
        importance=importance,
        nodes=with_readings(first, importance),
        opening=tuple(with_readings(few, importance) for few in opening),
        refinable=refinable,
        noisy=noisy,
        window=_window(window, scheme.count),
        tol=tolerance,
        aim=aim,
        later=max(0.0, math.log2(USUAL_AIM / relative)),
    )


def _learning(denoiser: Denoiser, steps: Steps, chosen: Linearization, slopes: Tensor, clock: Tensor) -> Learning:
    """What local models may learn at every step, about the linearization's own slopes."""
    schedule, variance = denoiser.schedule, denoiser.data_variance
    least, most = chosen.bounds(schedule, steps) if isinstance(chosen, LearnedSlopes) else (slopes, slopes)
    alpha, sigma = schedule.levels(steps.times)
    # The geometric mean of the slope for Gaussian data and the bound 1/alpha: sqrt(G/alpha), finite where alpha is 0.
    mean = (variance / (alpha.square() * variance + sigma.square())).sqrt()
    return Learning(
        least=least,
        most=most,
        rate=ASSUMED * mean,
        alpha=alpha,
        clock=clock if steps.normals > 0 else 0.5 * clock,  # of the log-SNR, twice ln(alpha/sigma)
        own=isinstance(chosen, DiagonalSecant),
        resolution=resolution(denoiser.network),
    )


def clipped(settings: SampleSettings, excess: Excess) -> SampleSettings:
    """The settings of steps that clip as well.

    Which coordinates are clipped changes from step to step, so that interpolation would miss it: where the library
    chooses, every step is a node.  A path like this is found from its start on, and rows far ahead are of no use yet.
    """
    few, learning, count = settings.refinable, settings.learning, settings.steps.count
    nodes = every_step(count) if few else settings.nodes
    return replace(
        settings,
        excess=excess,
        nodes=nodes,
        refinable=False,
        window=math.ceil(NARROW * nodes.count) if settings.window is None else settings.window,
        learning=replace(learning, least=(LEAST_CLIPPED * settings.slopes).clamp(learning.least, learning.most)),
    )


def _window(window: object, steps: int) -> int | str | None:
    """The argument ``window``, checked."""
    if isinstance(window, str):
        return steps if choice("window", window, ["all", "auto"]) == "all" else "auto"
    return None if window is None else min(positive_int("window", window, minimum=2), steps)


def _first_nodes(nodes: object, clock: Tensor, deviation: float, aim: float, *, noisy: bool) -> tuple[NodeSet, bool]:
    """The first node set for an aim relative to the data, and whether finer ones may follow."""
    count, (order, crowding) = len(clock), (ROUGH_ORDER, deviation) if noisy else (SMOOTH_ORDER, None)
    if isinstance(nodes, str) and nodes == "all":
        return every_step(count), False
    distinct = bool((clock.diff() > 0).all())
    if nodes is None:
        first = math.ceil(min(_enough(aim, noisy=noisy), count))
        few = distinct and count >= (ROOM_ROUGH if noisy else ROOM_SMOOTH) * first
        return (spread(clock, first, order, crowding), True) if few else (every_step(count), False)
    accepted = "'all', an integer >= 2 or None"
    if isinstance(nodes, bool) or not isinstance(nodes, (str, Integral)):
        raise TypeError(f"nodes must be {accepted}, got {described(nodes)}")
    if isinstance(nodes, str) or nodes < 2:
        raise ValueError(f"nodes must be {accepted}, got {shown(nodes)}")
    if not distinct:
        raise ValueError(f"nodes must be 'all' or None where two steps have one noise level, got {shown(nodes)}")
    return spread(clock, int(nodes), order, crowding), False


def _enough(aim: float, *, noisy: bool) -> float:
    """Number of nodes for an aim relative to the standard deviation of the data: ``factor aim^-power``."""
    return (FACTOR_ROUGH if noisy else FACTOR_SMOOTH) * math.pow(aim, -POWER)


def _size(count: float, *, noisy: bool) -> float:
    """Standard deviation of the data, relative to the aim, for which so many nodes are enough: inverts ``_enough``."""
    return math.pow(count / (FACTOR_ROUGH if noisy else FACTOR_SMOOTH), 1 / POWER)


def _opening(nodes: NodeSet, clock: Tensor, aim: float, *, noisy: bool) -> tuple[NodeSet, ...]:
    """The node sets of the first rounds, each a subset of the next; none if they would have too few nodes."""
    stride = int(OPENING_SHARE * nodes.count / _enough(aim, noisy=noisy) + 0.5)
    half = stride // 2
    if half < 1 or nodes.count < OPENING_FEWEST * stride or not bool((clock.diff() > 0).all()):
        return ()
    order = ROUGH_ORDER if noisy else SMOOTH_ORDER
    return tuple(strided(nodes, clock, one, order) for one in ((2 * half, half) if half > 1 else (stride,)))


def _importance(steps: Steps, jacobian: Tensor) -> Tensor:
    """How strongly every step's residual acts on the end, for Gaussian data."""
    return weights_on_end(steps, jacobian).abs().clamp(min=TINY)


def with_readings(nodes: NodeSet, importance: Tensor | None) -> NodeSet:
    """A node set with what the network reads there."""
    return nodes if importance is None or nodes.count == len(importance) else averaged(nodes, importance)
