"""A schedule of one's own: it works like the library's, and what is wrong with it is said before any network call."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import piadm


class Own(piadm.NoiseSchedule):
    """``x_t = x_0 + s(t) eps`` with the levels of a popular tutorial, ``s^2 = (25^{2t} - 1)/(2 ln 25)``."""

    t_range, t_start, t_end = (1e-5, 1.0), 1.0, 1e-3
    rate = 2 * math.log(25.0)

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def _sigma(self, t: Tensor) -> Tensor:
        return (torch.expm1(self.rate * t) / self.rate).sqrt()

    def _log_snr(self, t: Tensor) -> Tensor:
        return -2 * self._sigma(t).log()

    def _time(self, log_snr: Tensor) -> Tensor:
        return torch.log1p(torch.exp(-log_snr) * self.rate) / self.rate


def altered(**methods: Callable[[Tensor], Tensor]) -> piadm.NoiseSchedule:
    members = {name: (lambda self, t, method=method: method(t)) for name, method in methods.items()}
    return type("Altered", (Own,), members)()


def never(x: Tensor, t: Tensor) -> Tensor:
    raise AssertionError("the network was called")


@pytest.mark.parametrize("method", ["sde", "ode"])
@pytest.mark.parametrize("prediction", ["score", "velocity"])
def test_it_works_as_the_librarys(method: str, prediction: str) -> None:
    def score(x: Tensor, t: Tensor) -> Tensor:  # of data of variance one
        return -x / (1 + Own().sigma(t.double()).square().float())[:, None]

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        sigma = Own().sigma(t.double())
        slope = (1 / (2 * sigma) + sigma * Own.rate / 2).float()[:, None]  # s' = 25^{2t}/(2 s)
        return -slope * sigma.float()[:, None] * score(x, t)

    network = {"score": score, "velocity": velocity}[prediction]
    denoiser, given = piadm.Denoiser(network, Own(), prediction), dict(method=method, steps=200)
    found, exact = piadm.sample(denoiser, (4, 8), **given), piadm.sample_sequential(denoiser, (4, 8), **given)
    assert found.converged and float((found.sample - exact.sample).abs().max()) < 1e-2
    assert 0.5 < float(exact.sample.std()) < 2  # of 32 normals


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(_sigma=lambda t: torch.where(t < 0.5, torch.nan, t)), "a sigma that is finite and >= 0, got nan"),
        (dict(_sigma=lambda t: -t), "a sigma that is finite and >= 0, got -1"),
        (dict(_alpha=lambda t: torch.ones(())), r"one alpha for every time, got shape \(\)"),
        (dict(_log_snr=lambda t: t.log()), "a log_snr that rises towards the data, got 0 at time 1 and"),
        (dict(_log_snr=lambda t: t * torch.nan), "a log_snr that is a number, got nan at time 1"),
    ],
    ids=["nan", "negative", "scalar", "rising", "no number"],
)
@pytest.mark.parametrize("sampler", [piadm.sample, piadm.sample_sequential])
def test_what_is_wrong_is_said(sampler: Callable[..., object], wrong: dict[str, object], message: str) -> None:
    schedule = altered(**wrong)
    with pytest.raises(ValueError, match=f"schedule must (have|give) {message}"):
        sampler(piadm.Denoiser(never, schedule, "score"), (2, 3), grid=piadm.TimeGrid(torch.linspace(1, 1e-3, 50)))


def test_velocity_needs_levels_that_torch_can_differentiate() -> None:
    schedule = altered(_sigma=lambda t: Own()._sigma(t.detach()))
    with pytest.raises(ValueError, match="schedule must compute alpha and sigma by torch"):
        piadm.sample(piadm.Denoiser(never, schedule, "velocity"), (2, 3), steps=50)


class Learnt(Own):
    """The same with a rate that can be trained."""

    def __init__(self) -> None:
        self.rate = torch.nn.Parameter(torch.tensor(Own.rate, dtype=torch.float64))


@pytest.mark.parametrize("sampler", [piadm.sample, piadm.sample_sequential])
@pytest.mark.parametrize("method", ["sde", "ode"])
def test_its_levels_may_be_parameters(sampler: Callable[..., piadm.Solution], method: str) -> None:
    def score(x: Tensor, t: Tensor) -> Tensor:
        return -x / (1 + Own().sigma(t.double()).square().float())[:, None]

    learnt, plain = (
        sampler(piadm.Denoiser(score, schedule, "score"), (2, 8), method=method, steps=100)
        for schedule in (Learnt(), Own())
    )
    assert torch.equal(learnt.sample, plain.sample) and not learnt.sample.requires_grad


def _table(value: object, name: str = "a") -> object:
    """An integrator whose steps have a wrong table."""

    class Method:
        def steps(self, schedule: piadm.NoiseSchedule, grid: piadm.TimeGrid) -> piadm.AffineSteps:
            tables = {each: torch.ones(grid.steps, 1, 1, dtype=torch.float64) for each in ("a", "b", "c")}
            return piadm.AffineSteps(**{"times": grid.times[:-1], **tables, name: value})

    return Method()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("a", np.ones((50, 1, 1)), "a = .*ndarray"),
        ("b", [[1.0]] * 50, "b = .*list"),
        ("c", torch.ones(()), "c = "),
        ("times", torch.ones(()), "times = "),
        ("a", torch.ones(50, 1, 1, dtype=torch.complex64), "a = .*complex64"),
    ],
)
@pytest.mark.parametrize("sampler", [piadm.sample, piadm.sample_sequential])
def test_a_wrong_table_of_an_integrator_is_named(
    sampler: Callable[..., piadm.Solution], name: str, value: object, said: str
) -> None:
    with pytest.raises(TypeError, match=r"method.steps\(.*\) must return tensors of real numbers, got " + said):
        sampler(piadm.Denoiser(never, piadm.VPSchedule(), "sample"), (2, 3), method=_table(value, name), steps=50)
