"""Spectra: what they add up to, what is named, and that few modes stand for many."""

from __future__ import annotations

import math

import pytest
import torch

import piadm
from piadm import theory
from piadm.theory.families import PaperODE, PaperSDE, Target

GENERATOR = torch.Generator().manual_seed(0)
MANY = {
    "power law": [10 / rank**0.5 for rank in range(1, 3073)],
    "principal components": [1e-3 + 300 / rank**1.5 for rank in range(1, 785)],
    "lognormal": torch.randn(500, generator=GENERATOR, dtype=torch.float64).exp().tolist(),
    "an outlier": [1.0] * 3071 + [1e-3],
    "eight decades": torch.logspace(-5, 3, 1000, dtype=torch.float64).tolist(),
}


@pytest.mark.parametrize("name", MANY)
@pytest.mark.parametrize("method", ["sde", "ode"])
def test_few_modes_stand_for_many(name: str, method: str) -> None:
    family = PaperSDE(1.0) if method == "sde" else PaperODE(3, 0.7, 1.0)
    many = theory.Spectrum.repeated(MANY[name], 10**5)
    few = many.condensed()
    assert len(few.variances) <= 75 and few.dimension == many.dimension
    assert float(few.average) == pytest.approx(many.average, rel=1e-8)
    settings = (9.0, 12, 5e-3)
    corrector = family.corrector(Target(many), *settings)
    found = []
    for spectrum in (many, few):
        target = Target(spectrum)
        predictor = family.predictor(target, *settings)
        found.append(target.kl(predictor.followed(predictor.picard(6), corrector)))
    # The nodes are chosen for an error of 1e-8; on divergences of thousands it is a hundred times more.
    assert torch.allclose(found[1], found[0], rtol=1e-5, atol=0)
    small = found[0] < 1
    assert torch.allclose(found[1][small], found[0][small], rtol=1e-8, atol=0)


def test_few_modes_and_those_with_means_stay() -> None:
    few = theory.Spectrum([0.05, 3.0, 1.0, 0.3], [1, 2, 3, 4]).condensed()
    assert torch.allclose(few.variances, torch.tensor([0.05, 0.3, 1.0, 3.0], dtype=torch.float64), rtol=1e-14)
    assert few.counts.tolist() == [1, 4, 3, 2]
    equal = theory.Spectrum.repeated([2.0] * 3000, 3000).condensed()
    assert equal.variances.tolist() == pytest.approx([2.0]) and equal.counts.tolist() == pytest.approx([3000])
    shifted = theory.Spectrum.repeated(MANY["lognormal"], 500, [1.0] * 500)
    assert shifted.condensed() is shifted


def test_a_plan_for_thousands_of_eigenvalues_is_that_of_their_law() -> None:
    values = MANY["principal components"]
    plan, spectrum = piadm.plan(784, kl=0.1, spectrum=values), theory.Spectrum.repeated(values, 784)
    law = theory.piadm_sde_law(spectrum, plan.blocks, plan.iterations)[-1]
    noised = theory.noised(spectrum, piadm.OUSchedule(), plan.early_stop)
    assert float(spectrum.total(theory.kl(law, noised))) == pytest.approx(plan.kl, rel=1e-8)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: theory.Spectrum([1.0], [1.0, 2.0]), "counts"),
        (lambda: theory.Spectrum([1.0], [-1.0]), "counts"),
        (lambda: theory.Spectrum([1.0], [1.0], [0.0, 1.0]), "means"),
        (lambda: theory.Spectrum([1.0], [1e16]), "counts"),
        (lambda: theory.Spectrum.two_level(0.1, 1.0, 1.5, 10), "share"),
        (lambda: theory.Spectrum.power_law(-1.0, 10), "power"),
        (lambda: theory.VarianceBounds(2.0, 1.0, 10), "high"),
    ],
)
def test_wrong_spectra_are_named(call: object, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        call()


def test_spectra_add_up() -> None:
    power = theory.Spectrum.power_law(2.0, 10**6, top=4.0, ratio=100.0)
    assert power.dimension == 10**6 and float(power.variances.max()) < 4.0 and float(power.variances.min()) > 0.04
    # The ranks' continuum from 1 to 10: the mean of 4/q^2 is 4/10, by 24 midpoints within a few percent.
    assert power.average == pytest.approx(0.4, rel=0.03)
    two = theory.Spectrum.two_level(0.1, 2.0, 0.25, 1000)
    assert two.dimension == 1000 and two.average == pytest.approx(0.575)
    assert math.isclose(float(two.total(torch.ones(2, dtype=torch.float64))), 1000)
