"""The paper's Picard iteration, block by block with the score frozen: as published, and on this course's own steps."""

from __future__ import annotations

import torch
from torch import Tensor

import piadm
from piadm.grid import Blocks
from piadm.rivals.course import Course, Lane
from piadm.rivals.drive import Budget, GaveUp, Outcome, Solver
from piadm.rivals.rival import Ladder, Rival, Setting, Unavailable, at_most, setting
from piadm.rivals.spacing import borders

#: Blocks that are tried; the paper's guarantee has blocks of unit length, about ten.
BLOCKS = (1, 2, 4, 10)

#: Iterations per block that are tried.
ITERATIONS = (2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 36, 40, 44, 48, 56, 64, 80, 96)


def picard(lane: Lane, blocks: Tensor, iterations: int) -> Solver:
    """On each block so many rounds of ``y_j <- y_0 + sum_{i<j} g_i``, ``y = x/alpha``: the score is frozen.

    All states start as the block's first, constant on the scale of variance-preserving states; the last one starts
    the next block.  As many iterations as a block has steps give the sequential sample.

    Args:
        lane: the sample.
        blocks: fine steps at which blocks begin, then ``J``, ``(N + 1,)``.
        iterations: rounds per block.

    Reference: Chen et al. 2024 (arXiv 2405.15986), Algorithm 1; here on the course's own steps.
    """
    course = lane.course
    alpha, scale = course.alpha[:, None], torch.hypot(course.alpha, course.sigma)[:, None]
    x = lane.start.repeat(course.count + 1, 1)
    for first, last in zip(blocks.tolist(), blocks[1:].tolist(), strict=False):
        x[first : last + 1] = scale[first : last + 1] / scale[first] * x[first]
        for _ in range(min(iterations, last - first)):
            estimate = yield x[first:last], torch.arange(first, last, device="cpu")
            sums = frozen_score_increments(lane, first, last, x, estimate).cumsum(0)
            x[first + 1 : last + 1] = alpha[first + 1 : last + 1] * (x[first] / alpha[first] + sums)
    return x[course.count]


def frozen_score_increments(lane: Lane, first: int, last: int, x: Tensor, estimate: Tensor) -> Tensor:
    """What steps ``first .. last - 1`` add to ``x/alpha`` while the score stays the same, ``(n, d)``.

    With ``S = D - x/alpha``, which is ``sigma^2/alpha`` times the score, and ``a_j + b_j/alpha_j =
    alpha_{j+1}/alpha_j`` for both samplers, step ``j`` reads

        x_{j+1}/alpha_{j+1} = x_j/alpha_j + (b_j S_j + c_j xi_j)/alpha_{j+1}

    Args:
        lane: the sample.
        first: first step.
        last: end of the steps.
        x: states, ``(J + 1, d)``.
        estimate: denoised estimates of those at the steps, ``(n, d)``.
    """
    course, alpha = lane.course, lane.course.alpha[:, None]
    score = estimate - x[first:last] / alpha[first:last]
    return (course.b[first:last, None] * score + lane.kicks(first, last)) / alpha[first + 1 : last + 1]


def _ladders(course: Course) -> list[Ladder]:
    """A ladder of iterations per number of blocks."""
    check_frozen_score(course)

    def rung(blocks: Tensor, iterations: int) -> Setting:
        return setting(_label(len(blocks) - 1, iterations), lambda lane: picard(lane, blocks, iterations))

    cuts = [borders(course, count, "ou") for count in at_most(BLOCKS, course.count)]
    return [[rung(blocks, iterations) for iterations in ITERATIONS] for blocks in cuts]


def _published_ladders(course: Course) -> list[Ladder]:
    check_frozen_score(course)
    log_snr = course.log_snr
    clock = torch.logaddexp(torch.zeros_like(log_snr), -log_snr)  # the paper's time, -ln alpha_bar

    def rung(blocks: Blocks, iterations: int) -> Setting:
        def run(course: Course, budget: Budget) -> Outcome:
            if iterations * blocks.count > budget.rounds and iterations * blocks.steps > budget.evaluations:
                raise GaveUp("over budget from the start")
            return _published(course, blocks, iterations)

        return Setting(_label(blocks.count, iterations), run)

    cuts = [borders(course, count, "ou").tolist() for count in at_most(BLOCKS, course.count)]
    blocks = [Blocks([clock[i : j + 1] for i, j in zip(cut, cut[1:], strict=False)]) for cut in cuts]
    return [[rung(blocks_, iterations) for iterations in ITERATIONS] for blocks_ in blocks]


def _published(course: Course, blocks: Blocks, iterations: int) -> Outcome:
    """The library's own ``piadm_sde``, or ``piadm_ode`` without corrector, whose noise has no counterpart here."""
    given = {"blocks": blocks, "iterations": iterations, "seed": course.seed, "condition": course.condition}
    given["max_batch"] = course.max_batch
    if course.method == "sde":
        solution = piadm.piadm_sde(course.denoiser, course.shape, **given)  # type: ignore[arg-type]
    else:
        solution = piadm.piadm_ode(course.denoiser, course.shape, corrector=None, **given)  # type: ignore[arg-type]
    return Outcome.of(solution)


def _label(blocks: int, iterations: int) -> str:
    return f"{blocks} block{'s' * (blocks != 1)}, {iterations} iterations"


def check_frozen_score(course: Course) -> None:
    """Refuse a course on which a frozen score has no meaning.

    Raises:
        Unavailable: if alpha is 0 somewhere.
    """
    if not bool(course.alpha[0] > 0):
        raise Unavailable("needs alpha > 0 on the whole grid: it freezes the score")


_REFERENCE = "Chen et al. 2024 (arXiv 2405.15986)"
PICARD = Rival("picard", lambda method: "PIADM blocks, same steps", _ladders, _REFERENCE)
PIADM = Rival("piadm", lambda method: f"PIADM-{method.upper()}, as published", _published_ladders, _REFERENCE)
