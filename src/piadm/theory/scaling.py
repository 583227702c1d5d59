"""How rounds, steps and memory grow with the dimension, sampler by sampler, at one divergence from the target."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

from piadm._checks import finite_float, positive_int
from piadm.theory.families import Family, FastEngine, PaperODE, PaperSDE, Target
from piadm.theory.fits import Fit, against_power, last_exponent, log_polynomial_fit, power_fit
from piadm.theory.pathwise import path_kl
from piadm.theory.search import (
    Found,
    best,
    candidates,
    evaluated,
    fewest_steps,
    past_the_best,
    shortest_horizon,
)
from piadm.theory.spectrum import OU, Spectrum

#: The paper's blocks have length Theta(1): here 1.
BLOCK = 1.0

#: Horizons tried beyond the shortest that will do, and numbers of blocks, where both are free.
SPACING, HORIZONS, COUNTS = 0.25, 5, (1, 2)

#: Most iterations tried.  (At d = 10^8 Algorithm 1 takes 28 in one block, the engine 12.)
MOST_PAPER, MOST_ENGINE = 45, 16

#: Iterations of the corrector: the first of these that will do.
INNER = (4, 5, 6, 8)

#: Settings that are evaluated exactly, the most promising ones by their coarse grids.
PROMISING = 3

#: Steps beyond which the secant's law, which is walked step by step, is carried over from a coarse grid.
LONGEST_WALK = 20_000

#: Steps of the coarse grids for the divergence of paths.
PATH_STEPS = (0.02, 0.01)


@dataclass(frozen=True)
class Point:
    """One sampler at one dimension.

    Attributes:
        dimension: ``d``.
        found: its settings, rounds and divergence.
        inner: Picard iterations of its corrector; None: it has none.
        states: states per sample held at once.
    """

    dimension: int
    found: Found
    inner: int | None
    states: float


@dataclass(frozen=True)
class Curve:
    """One sampler over all dimensions.

    Attributes:
        name: a word.
        title: what it is.
        points: one per dimension, ascending; dimensions that no settings were found for are left out.
    """

    name: str
    title: str
    points: tuple[Point, ...]

    def numbers(self) -> tuple[list[float], list[float]]:
        """Dimensions, and rounds with their fraction of an iteration."""
        return [float(point.dimension) for point in self.points], [point.found.crossing for point in self.points]

    def power(self) -> Fit:
        """Rounds as a power of d."""
        return power_fit(*self.numbers())

    def polynomial(self) -> Fit:
        """Rounds as a polynomial of degree two in ln d."""
        return log_polynomial_fit(*self.numbers())

    def end_exponent(self) -> float:
        """Exponent of d at the largest dimension, by the polynomial."""
        return last_exponent(self.numbers()[0], self.polynomial())

    def against_power(self, power: float = 0.1) -> float:
        """Standard errors between the rounds and the nearest ``a + b d^p`` with an exponent of ``power`` or more."""
        return against_power(*self.numbers(), power)


#: From the target and the divergence to the best settings, and the iterations of the corrector.
Search: TypeAlias = Callable[[Target, float], "tuple[Found, int | None, float] | None"]


def searches() -> dict[str, tuple[str, Search]]:
    """Every sampler that is compared: its name, its title and how its settings are searched."""
    engines = {
        f"engine-{method}-{guess}": (
            f"fast engine, {method.upper()}, {guess}", partial(_engine, FastEngine(method, guess))
        )
        for method in ("sde", "ode")
        for guess in ("gaussian", "secant")
    }
    return {
        "sequential-sde-path": ("sequential SDE, whole path (the bound)", _sequential_paths),
        "sequential-sde": ("sequential SDE", partial(_sequential, PaperSDE())),
        "sequential-ode": ("sequential ODE with corrector", partial(_sequential, PaperODE(1))),
        "piadm-sde-blocks": ("PIADM-SDE, the theorem's blocks", partial(_blocks, [PaperSDE()])),
        "piadm-sde": ("PIADM-SDE, any blocks", partial(_paper, [PaperSDE()])),
        "piadm-ode-blocks": ("PIADM-ODE, the theorem's blocks", partial(_blocks, _with_correctors())),
        "piadm-ode": ("PIADM-ODE, any blocks", partial(_paper, _with_correctors())),
        **engines,
    }


def scaling(
    values: Sequence[float],
    dimensions: Sequence[int],
    *,
    kl: float = 0.1,
    early_stop: float = 1e-2,
    names: Sequence[str] | None = None,
    progress: Callable[[float, str], None] | None = None,
) -> tuple[Curve, ...]:
    """The fewest rounds of every sampler with a divergence of at most ``kl`` from the early-stopped target.

    Searched over horizon, step, iterations and, except for the theorem's blocks, the number of blocks.

    Args:
        values: eigenvalues of the data's covariance, each for an equal share of the coordinates.
        dimensions: ``d``, ascending.
        kl: divergence allowed, in nats, > 0.
        early_stop: OU time at which sampling ends, > 0.
        names: which of ``searches()``; None: all.
        progress: called with the share of the work that is done, and a few words.

    Returns:
        A curve per sampler.

    Raises:
        TypeError, ValueError: for arguments out of bounds, or an unknown name.
    """
    known = searches()
    allowed = finite_float("kl", kl, low=0.0)
    chosen = tuple(known) if names is None else tuple(names)
    if unknown := [name for name in chosen if name not in known]:
        raise ValueError(f"names must be among {', '.join(known)}, got {unknown[0]!r}")
    sizes = [positive_int("dimensions", dimension) for dimension in dimensions]
    targets = [Target(Spectrum.repeated(values, size), early_stop) for size in sizes]
    curves = []
    for number, name in enumerate(chosen):
        title, search = known[name]
        points = []
        for i, target in enumerate(targets):
            if progress is not None:
                progress((number + i / len(targets)) / len(chosen), f"{title}, d = {target.modes.dimension:.0e}")
            result = search(target, allowed)
            if result is not None:
                points.append(Point(sizes[i], *result))
        curves.append(Curve(name, title, tuple(points)))
    return tuple(curves)


def theorem_horizon(target: Target, allowed: float) -> float:
    """``T = ln(d/delta^2)``, with the divergence for ``delta^2``; at least 2."""
    return max(2.0, math.log(target.modes.dimension / allowed))


def _with_correctors() -> list[Family]:
    return [PaperODE(inner) for inner in INNER]


def _horizons(family: Family, target: Target, allowed: float) -> list[float]:
    first = shortest_horizon(family, target, allowed, SPACING)
    return [first + SPACING * i for i in range(HORIZONS)]


def _paper(families: Sequence[Family], target: Target, allowed: float) -> tuple[Found, int | None, float] | None:
    """Algorithm 1 or 2 with every setting free."""
    horizons = _horizons(families[0], target, allowed)
    return _best_of(families, target, allowed, horizons, lambda _: COUNTS, MOST_PAPER)


def _blocks(families: Sequence[Family], target: Target, allowed: float) -> tuple[Found, int | None, float] | None:
    """Algorithm 1 or 2 as the theorem orders it: ``T = ln(d/delta^2)`` and blocks of length one at most."""
    horizon = theorem_horizon(target, allowed)
    return _best_of(families, target, allowed, [horizon], lambda _: [math.ceil(horizon / BLOCK)], MOST_PAPER)


def _engine(family: Family, target: Target, allowed: float) -> tuple[Found, int | None, float] | None:
    """The fast engine: one window."""
    return _best_of([family], target, allowed, _horizons(family, target, allowed), lambda _: [1], MOST_ENGINE)


def _best_of(
    families: Sequence[Family],
    target: Target,
    allowed: float,
    horizons: Sequence[float],
    counts: Callable[[float], Sequence[int]],
    most: int,
) -> tuple[Found, int | None, float] | None:
    """The best settings of the first family that will do, evaluated exactly unless the grid is too long to walk."""
    found: Found | None
    for family in families:
        promising = sorted(candidates(family, target, allowed, horizons, counts, most), key=lambda one: one.crossing)
        walked = isinstance(family, FastEngine) and family.linearization == "secant"
        if walked and promising and family.steps(target, *promising[0].settings) > LONGEST_WALK:
            found = promising[0]
        else:
            exact = (evaluated(family, target, one, allowed) for one in promising[:PROMISING])
            found = best(one for one in exact if one is not None)
        if found is not None:
            return found, getattr(family, "inner", None), family.states(target, *found.settings)
    return None


def _sequential(family: Family, target: Target, allowed: float) -> tuple[Found, int | None, float] | None:
    """Every step in turn, blocks of length one where a corrector runs at their ends."""
    first = shortest_horizon(family, target, 2 * allowed, SPACING)
    found = fewest_steps(family, target, allowed, itertools.count(first, 2 * SPACING), BLOCK)
    return None if found is None else (found, None, 1.0)


def _sequential_paths(target: Target, allowed: float) -> tuple[Found, int | None, float]:
    """Every step in turn, judged by the divergence of whole paths, which is what the theorem bounds.

    It is ``start + linear eps + quadratic eps^2``: the horizon leaves the first term and the steps the others.
    """
    found: list[Found] = []
    for horizon in itertools.count(2.0, 2 * SPACING):
        parts = [path_kl(target.modes, "paper-sde", target.blocks(horizon, 1, step).grid(OU)) for step in PATH_STEPS]
        start = float(target.modes.total(parts[0][0]))
        ways = [float(target.modes.total(way)) / step for (_, way), step in zip(parts, PATH_STEPS, strict=True)]
        slope = (ways[0] - ways[1]) / (PATH_STEPS[0] - PATH_STEPS[1])
        linear = ways[1] - slope * PATH_STEPS[1]
        left = allowed - start
        if left > 0:
            root = math.sqrt(max(0.0, linear**2 + 4 * slope * left))
            step = min(PATH_STEPS[0], 2 * left / (linear + root))
            steps = round(target.steps(horizon, step))
            found.append(Found(horizon, 1, step, 1, steps, float(steps), allowed, exact=False))
        if past_the_best(found):
            break
    return min(found, key=lambda one: one.rounds), None, 1.0
