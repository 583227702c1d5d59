"""The start from a draft: the draft's own path on the same nodes, solved without calling the network."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace

from piadm._checks import caller_level, listed
from piadm.activity import SlidingWindow
from piadm.iteration import solve
from piadm.network import coordinates_per_row
from piadm.path import ParallelPath
from piadm.problem import Problem
from piadm.settings import TURNS_PER_NODE
from piadm.solution import NetworkError
from piadm.stopping import CarriedResidual
from piadm.tally import Tally


def start_from_draft(problem: Problem, path: ParallelPath, rule: CarriedResidual) -> Tally:
    """Solve a path with the denoiser's draft in the place of the network, and keep its states and slopes as a guess.

    The network's iteration starts from there.  Its fixed point is unchanged, and no row counts as evaluated, so the
    result does not rely on the draft.  For samples on which the draft fails, the path starts from the reference.

    Args:
        problem: what is being sampled.
        path: its path, at the reference's starting guess.
        rule: judges the network's samples, and a copy of it the draft's.

    Returns:
        The draft's rounds and evaluations.

    Raises:
        ValueError: if the draft's network says by ``coordinates_per_row`` that it is of samples of another size.
        NetworkError: if the draft raises or returns the wrong shape.
        KeyboardInterrupt: if it came from the keyboard in the meantime.
    """
    draft = problem.denoiser.draft
    assert draft is not None
    wanted, size = problem.start.shape[1], coordinates_per_row(draft.network)
    if size not in (None, wanted):
        raise ValueError(f"draft must be of samples of {wanted} coordinates, got one of {size}")
    tally = Tally(replace(problem, denoiser=draft, executor=problem.executor.alone(draft)))
    count = path.path.count
    try:
        solve(tally, path, SlidingWindow(count, rule.threshold), copy.copy(rule), TURNS_PER_NODE * count)
    except NetworkError as error:
        raise NetworkError(f"the draft failed: {error}") from error
    if tally.interrupted:
        raise KeyboardInterrupt
    if tally.failures:
        warnings.warn(f"the draft failed: {listed(tally.failures)}", RuntimeWarning, stacklevel=caller_level())
    path.unlearn()
    return tally
