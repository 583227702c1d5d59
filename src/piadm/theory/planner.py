"""From a divergence to the settings of the paper's algorithms, with constants taken from the exact law."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from piadm._checks import choice, finite_float, optional_int, positive_int
from piadm.corrector import Corrector
from piadm.grid import Blocks
from piadm.theory.families import PaperODE, PaperSDE, Target
from piadm.theory.law import Law, pinsker
from piadm.theory.law import kl as mode_kl
from piadm.theory.proposals import MORE, MOST, MOST_BLOCKS, SHARES, Coarse, Search
from piadm.theory.search import BEYOND, Expansion, iterations_needed, shortest_horizon, stands_still
from piadm.theory.spectrum import Modes, Spectrum, VarianceBounds
from piadm.theory.stairs import Cost, Proposal, cost

#: Horizons tried beyond the shortest that will do.  The second is the better one where memory is short.
SPACING, HORIZONS = 1.0, 2

#: Least divergence per coordinate: it falls with the square of the step, which would be about 1e-6.
LEAST_PER_MODE = 1e-12

#: Most steps: with more, the exact law alone would take minutes, and nobody could hold the states.
MOST_STEPS = 3e6


@dataclass(frozen=True)
class Plan:
    """Settings for ``piadm_sde`` or ``piadm_ode``, and what they come to for Gaussian data, exactly.

    Attributes:
        method: "sde" or "ode".
        dimension: number of coordinates ``d``.
        blocks: partition of the OU horizon, for the argument of that name.
        iterations: Picard iterations ``K`` per block, for the argument of that name.
        corrector: of the ODE, for the argument of that name; None for the SDE.
        kl: divergence of the samples from the data noised up to the early-stopping time, in nats.
        tv: bound of the total variation distance that follows (Pinsker).
        kl_data: divergence from the data themselves.
        rounds: network calls in a row.
        evaluations: network rows per sample.
        states: states per sample held at once, ``d`` numbers each.
        forbidden: the plan that a limit of memory forbids, to which this is the best alternative found; None: the limit
            forbids nothing.
    """

    method: str
    dimension: int
    blocks: Blocks
    iterations: int
    corrector: Corrector | None
    kl: float
    tv: float
    kl_data: float
    rounds: int
    evaluations: int
    states: int
    forbidden: Plan | None = None

    @property
    def horizon(self) -> float:
        """OU time ``T`` of the first state."""
        return float(self.blocks.times[0][0])

    @property
    def early_stop(self) -> float:
        """OU time ``eta`` of the samples."""
        return float(self.blocks.times[-1][-1])

    @property
    def step(self) -> float:
        """Longest step ``eps``, in OU time."""
        return max(float(-block.diff().min()) for block in self.blocks.times)


def plan(
    dimension: int,
    *,
    kl: float,
    spectrum: Sequence[float] | Modes | None = None,
    lipschitz: float = 20.0,
    method: str = "sde",
    memory_limit: int | None = None,
    early_stop: float = 1e-2,
    longest_block: float = 1.0,
) -> Plan:
    """The settings of the paper's algorithms for a divergence, in few rounds.

    The orders are the theorems': ``T, K = O(log(d/kl))``, blocks of length Theta(1), and a step that falls with ``d``;
    the constants come from the exact law for Gaussian data.

    Args:
        dimension: number of coordinates ``d``.
        kl: divergence of the samples from the early-stopped data that is allowed, in nats, > 0.
        spectrum: eigenvalues of the data's covariance, each with multiplicity ``dimension/len``, or a ``Spectrum``;
            None: only bounds are known, and the worst case within them counts.
        lipschitz: where ``spectrum`` is None: Lipschitz constant ``L`` of the score, >= 1; the data's variance in every
            direction is taken to lie between ``1/L`` and ``L``.
        method: "sde" (Algorithm 1) or "ode" (Algorithm 2, with its corrector).
        memory_limit: most states per sample held at once; None: no limit.
        early_stop: OU time ``eta`` at which sampling ends, > 0.
        longest_block: longest block ``h``, in OU time, > 0.  Longer blocks take fewer rounds for Gaussian data, and
            are beyond what the theorems allow.

    Returns:
        A ``Plan``, to be used as ``piadm_sde(..., blocks=plan.blocks, iterations=plan.iterations)``.

    Raises:
        TypeError, ValueError: for arguments out of bounds, a divergence that no horizon reaches, or a limit of memory
            within which nothing parallel is left.

    Reference: Chen et al. 2024 (arXiv 2405.15986), theorems 3.3 and 3.5.
    """
    allowed = finite_float("kl", kl, low=0.0)
    choice("method", method, ("sde", "ode"))
    block = finite_float("longest_block", longest_block, low=0.0)
    limit = optional_int("memory_limit", memory_limit)
    target = Target(_modes(dimension, spectrum, lipschitz), early_stop)
    if allowed < (least := LEAST_PER_MODE * target.modes.dimension):
        raise ValueError(f"kl must be at least {least:g} here, got {allowed:g}: less takes over 1e7 steps")
    search = Search(method, target, allowed, block, _horizons(method, target, allowed, block))
    free = _best(search, math.inf)
    if free is None:
        raise ValueError(
            f"kl must be one that {MOST} iterations per block can reach, got {allowed:g}; a longer early_stop or a "
            "shorter longest_block may do"
        )
    if limit is None or free.states <= limit:
        return free
    found = _best(search, limit)
    if found is None:
        least = max(limit + 1, search.least_states() or 0)
        raise ValueError(
            f"memory_limit must be at least {least} states for this dimension and kl, got {limit}: "
            f"with fewer there are over {MOST_BLOCKS} blocks, and next to nothing runs in parallel"
        )
    return replace(found, forbidden=free)


def _horizons(method: str, target: Target, allowed: float, block: float) -> list[float]:
    """OU times to try.

    Raises:
        ValueError: if with all of them there are too many blocks or steps.
    """
    family = PaperSDE() if method == "sde" else PaperODE(MORE[-1])
    first = shortest_horizon(family, target, allowed, SPACING)
    if target.fewest_blocks(first, block) > MOST_BLOCKS:
        raise ValueError(
            f"longest_block must be at least {(first - target.early_stop) / MOST_BLOCKS:.3g} here, got {block:g}: with "
            f"shorter ones there are over {MOST_BLOCKS} blocks, and next to nothing runs in parallel"
        )
    step = Expansion.of(family, target, first, 1, allowed).longest_step(target, SHARES[-1] * allowed)
    steps = math.inf if step is None else target.steps(first, step)
    if steps > MOST_STEPS:
        raise ValueError(f"kl must be one that {MOST_STEPS:g} steps can reach, got one that needs {steps:.2g}")
    return [first + SPACING * i for i in range(HORIZONS)]


def _modes(dimension: int, spectrum: Sequence[float] | Modes | None, lipschitz: float) -> Modes:
    size = positive_int("dimension", dimension)
    most = finite_float("lipschitz", lipschitz, low=1.0, low_open=False)
    if spectrum is None:
        return VarianceBounds(1 / most, most, size)
    if isinstance(spectrum, (Spectrum, VarianceBounds)):
        if spectrum.dimension != size:
            raise ValueError(f"dimension must be that of the spectrum, {spectrum.dimension}, got {size}")
        return spectrum.condensed() if isinstance(spectrum, Spectrum) else spectrum
    return Spectrum.repeated(spectrum, size).condensed()


def _best(search: Search, limit: float) -> Plan | None:
    """The plan of least cost by the exact law.

    Proposals come in the order of what they may cost at best: once that is more than a plan costs, none is better.
    """
    best: Plan | None = None
    for proposal in search.proposals(limit):
        if best is not None and _cost(best) <= proposal.cost(proposal.least):
            break
        plan = _evaluate(search, proposal)
        if plan is not None and (best is None or _cost(plan) < _cost(best)):
            best = plan
    return best


def _cost(plan: Plan) -> Cost:
    return plan.rounds, plan.evaluations, plan.states


def _evaluate(search: Search, proposal: Proposal) -> Plan | None:
    """A plan with as many iterations as it needs by the exact law; None: a few more than expected are not enough."""
    target, family, most = search.target, proposal.family, proposal.most + BEYOND
    settings = (target, proposal.horizon, proposal.count, proposal.step)
    grid = Coarse(settings, family.predictor(*settings))
    for tried in sorted({min(proposal.least + more * BEYOND, most) for more in (1, 4)}):
        law = grid.iterates(family, tried)
        divergence = target.kl(law)
        iterations = iterations_needed(divergence, search.allowed)
        if iterations is not None and iterations < tried:
            return _plan(target, family.blocks(*settings).blocks(), iterations, proposal.corrector, law[iterations - 1])
        if stands_still(divergence):
            break
    return None


def _plan(target: Target, blocks: Blocks, iterations: int, corrector: Corrector | None, law: Law) -> Plan:
    """Settings with what they cost and what their law comes to."""
    rounds, evaluations, states = cost(blocks.sizes, corrector, iterations)
    divergence = target.kl(law)
    data = Law(target.modes.means, target.modes.variances)
    return Plan(
        method="sde" if corrector is None else "ode",
        dimension=target.modes.dimension,
        blocks=blocks,
        iterations=iterations,
        corrector=corrector,
        kl=float(divergence),
        tv=float(pinsker(divergence)),
        kl_data=float(target.modes.total(mode_kl(law, data))),
        rounds=rounds,
        evaluations=evaluations,
        states=states,
    )
