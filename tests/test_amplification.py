"""Errors near a border between two outcomes: they grow by more than linear models say, and samples take more rounds."""

from __future__ import annotations

import math

import numpy as np
import pytest

import piadm
from piadm.amplification import LEAST_AMPLIFICATION, MOST_AMPLIFICATION, Amplification
from piadm.cli.model import mixture
from piadm.numerics import Table

CLOCK = np.linspace(-2.0, 2.0, 9)
SLOPES = np.full(9, 0.25)


def learnt(*slopes: float) -> Amplification:
    """Of nine nodes half a unit of the clock apart; ``alpha J`` at each, of one sample."""
    found = Amplification(np.full(9, 0.5), CLOCK, SLOPES, 1)
    found.learn(np.array(slopes)[:, None] / 0.5 - SLOPES[:, None])
    return found


def test_errors_grow_exponentially_where_slopes_exceed_those_of_unbounded_data() -> None:
    nothing = 0.5 * SLOPES[0]  # no more than the linearization says
    factor = learnt(1, 1, 3, 3, 3, 1, 0, 0, 0).factor[:, 0]
    # Three gaps of 1/2 in which alpha J - 1 is 2; what is below LEAST_AMPLIFICATION is one.
    assert factor == pytest.approx([math.e**3, math.e**3, math.e**3, math.e**2, 1, 1, 1, 1, 1])
    assert LEAST_AMPLIFICATION > math.e
    assert learnt(*[9.0] * 9).factor.max() == pytest.approx(MOST_AMPLIFICATION)
    assert (learnt(*[1.0] * 9).factor == 1).all() and (learnt(*[nothing] * 9).factor == 1).all()
    # An error that has grown has chosen: contraction after it, or before it, changes nothing.
    assert learnt(-9, -9, 5, 0.125, -9, -9, -9, -9, -9).factor[2] == pytest.approx(math.e**2)


def test_a_gap_without_end_is_left_out_and_a_slope_that_is_not_measured_is_kept() -> None:
    found = Amplification(np.full(3, 0.5), np.array([-np.inf, 0.0, 1.0]), SLOPES[:3], 1)
    high = np.full((3, 1), 8.0) - SLOPES[:3, None]  # alpha J - 1 is 3
    found.learn(high)
    assert found.factor[:, 0] == pytest.approx([math.e**3, math.e**3, 1])
    found.learn(np.zeros((3, 1)))
    assert found.factor[0, 0] == pytest.approx(math.e**3)
    found.forget()
    assert (found.factor == 1).all()


def test_a_factor_counts_for_another_round_where_samples_are_judged() -> None:
    found, high = Amplification(np.full(3, 0.5), np.array([-1.0, 0.0, 1.0]), SLOPES[:3], 1), np.full((3, 1), 5.0)
    factors = []
    for slope in (high, 0.1 * high, 0.1 * high):
        found.learn(slope - SLOPES[:3, None])
        factors.append((found.factor[0, 0], found.recent[0, 0]))
    assert factors == [(pytest.approx(math.e**3),) * 2, (1, pytest.approx(math.e**3)), (1, 1)]


def test_a_sample_is_judged_as_in_a_batch_when_a_round_measures_nothing_of_it() -> None:
    clock = np.array([-1.0, 0.0, 1.0])
    both, alone = (Amplification(np.full(3, 0.5), clock, SLOPES[:3], batch) for batch in (2, 1))
    for first, second in ((5.0, 5.0), (0.5, 5.0), (0.0, 0.5)):
        excess = np.array([[first, second]] * 3)
        both.learn(excess)
        alone.learn(excess[:, :1])
        assert (both.recent[:, :1] == alone.recent).all()


def test_finer_nodes_start_from_the_factors_of_the_coarser() -> None:
    coarse = learnt(1, 1, 3, 3, 3, 1, 0, 0, 0)
    fine = Amplification(np.full(17, 0.5), np.linspace(-2, 2, 17), np.full(17, 0.25), 1)
    old = np.arange(17) % 2 == 0
    fine.inherit(old, coarse, slice(None))
    want: Table = coarse.factor.repeat(2, 0)[:17]
    assert (fine.factor == want).all()
    fine.learn(np.full((17, 1), -0.25))  # a path that hardly moves shows nothing, and is no less in doubt
    assert (fine.factor == want).all()


def test_samples_near_a_border_take_more_rounds_instead_of_the_wrong_side() -> None:
    # Of the first 768 samples of two seeds each, these nine ended 55 to 78 times outside, CONVERGED.
    seeds = [(11, k) for k in (66, 220, 260, 743)] + [(12, k) for k in (6, 9, 147, 617, 748)]
    shape = (len(seeds), 1, 8, 8)
    found, exact = (run(mixture(), shape, method="sde", seed=seeds) for run in (piadm.sample, piadm.sample_sequential))
    errors = (found.sample - exact.sample).flatten(1).square().mean(1).sqrt()
    assert found.converged and float(errors.max()) <= 1e-2
    assert found.stats.rounds < 100


