"""The default device is the user's own: networks see it, and no result depends on it.

Here it is "meta", which holds no numbers: what lands on it by mistake fails there, or shows in the result.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._device import _device_constructors

import piadm
from piadm import memo, theory
from piadm.models import GaussianDenoiser, GaussianNetwork, MixtureDenoiser, MixtureNetwork
from piadm.rivals import Rival, Unavailable, chosen, prepare
from piadm.rivals.drive import Budget

PACKAGE = Path(piadm.__file__).parent
TABLE, VP, OU = piadm.DiscreteSchedule.ddpm(), piadm.VPSchedule(), piadm.OUSchedule()
SHAPE = (3, 6)
DATA = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
LABEL = torch.tensor([0.5, -0.5, 0.1])


def without_device(code: str) -> Iterator[int]:
    """Lines on which one of torch's factories is called without a device."""
    for call in ast.walk(ast.parse(code)):
        if isinstance(call, ast.Call) and not any(keyword.arg == "device" for keyword in call.keywords):
            first, *names = ast.unparse(call.func).split(".")
            found = reduce(lambda owner, name: getattr(owner, name, None), names, torch if first == "torch" else None)
            if found in _device_constructors():
                yield call.lineno


def test_every_factory_call_names_its_device() -> None:
    assert list(without_device("torch.zeros(2)\ntorch.fft.rfftfreq(3)\ntorch.ones(1, device=x.device)")) == [1, 2]
    paths = sorted(PACKAGE.rglob("*.py"))
    assert [f"{path}:{line}" for path in paths for line in without_device(path.read_text(encoding="utf-8"))] == []


class Network:
    """Denoised estimates for data near -1 and 1, and which default devices they were made under."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def __call__(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        self.seen.add(torch.empty(0).device.type)
        return torch.tanh(x if label is None else x + label[:, None])


def on_meta(make: Callable[[], Any]) -> Any:  # noqa: ANN401 - any result
    """What is made under the default device "meta", afresh."""
    memo._store.clear()
    with torch.device("meta"):
        return make()


def assert_same(found: Any, wanted: Any) -> None:  # noqa: ANN401 - any results
    """Equal numbers of the same types on the same devices."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


def check(make: Callable[[], Any]) -> None:
    """The result is the same without a default device."""
    assert_same(on_meta(make), make())


def told(solution: piadm.Solution) -> tuple[Any, ...]:
    """All that a solution holds, times excepted."""
    stats = vars(solution.stats) | {"wall_time": 0.0}
    return solution.sample, solution.converged, solution.error_estimate, solution.states, stats


PAPER = dict(horizon=3.0, early_stop=0.05, length=1.0, step=0.1)
BLOCKS = piadm.Blocks.paper(**PAPER)
CORRECTOR = piadm.Corrector(duration=0.5, length=0.25, step=0.05, iterations=3)
SAMPLERS: dict[str, Callable[[piadm.Denoiser], piadm.Solution]] = {
    "sde": lambda it: piadm.sample(it, SHAPE, method="sde", steps=60),
    "ode": lambda it: piadm.sample(it, SHAPE, method="ode", steps=60, max_batch=16),
    "sde, every node": lambda it: piadm.sample(it, SHAPE, method="sde", steps=60, nodes="all", return_states=True),
    "ode, every node": lambda it: piadm.sample(it, SHAPE, method="ode", steps=60, nodes="all", window="all"),
    "finer nodes": lambda it: piadm.sample(it, SHAPE, steps=200, nodes=8, tol=1e-3, return_states=True),
    "condition": lambda it: piadm.sample(it, SHAPE, steps=60, seed=[3, 4, 5], condition={"label": LABEL}),
    "given arrays": lambda it: piadm.sample(
        it, SHAPE, method="sde", steps=40, initial=DATA[:3], noise=DATA.expand(3, 40, 6).transpose(0, 1)
    ),
    "draft": lambda it: piadm.sample(replace(it, draft=MixtureDenoiser(VP, DATA[:4], 0.1)), SHAPE, steps=60),
    "measured": lambda it: piadm.sample(piadm.measure_moments(it, SHAPE), SHAPE, steps=60),
    "sequential sde": lambda it: piadm.sample_sequential(it, SHAPE, method="sde", steps=60, return_states=True),
    "sequential ode": lambda it: piadm.sample_sequential(it, SHAPE, method="paper-ode", steps=60),
    "piadm_sde": lambda it: piadm.piadm_sde(it, SHAPE, blocks=BLOCKS, iterations=4, return_states=True),
    "piadm_ode": lambda it: piadm.piadm_ode(
        it, SHAPE, blocks=piadm.Blocks.paper(**PAPER), iterations=4, corrector=CORRECTOR
    ),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers(name: str) -> None:
    network = Network()
    found = on_meta(lambda: SAMPLERS[name](piadm.Denoiser(network, VP, "sample")))
    assert network.seen == {"meta"}
    wanted = SAMPLERS[name](piadm.Denoiser(network, VP, "sample"))
    assert_same(told(found), told(wanted))


def test_windows_by_the_clock() -> None:
    denoiser = piadm.Denoiser(Network(), VP, "sample")
    found = on_meta(lambda: piadm.sample(denoiser, SHAPE, steps=60, window="auto"))
    assert found.converged and denoiser.network.seen == {"meta"}
    # Windows depend on what a call takes: two samples within the tolerance.
    assert (found.sample - piadm.sample_sequential(denoiser, SHAPE, steps=60).sample).square().mean().sqrt() <= 1e-2


SCHEDULES: tuple[Callable[[], piadm.NoiseSchedule], ...] = (
    piadm.OUSchedule, piadm.VPSchedule, piadm.CosineSchedule, piadm.VESchedule, piadm.FlowSchedule,
    piadm.DiscreteSchedule.ddpm, lambda: piadm.DiscreteSchedule([0.9, 0.5, 0.1]),
)  # fmt: skip


@pytest.mark.parametrize("make", SCHEDULES)
def test_schedules_and_grids(make: Callable[[], piadm.NoiseSchedule]) -> None:
    def values() -> list[Tensor]:
        schedule = make()
        grids = [kind(schedule, 2) for kind in (piadm.TimeGrid.default, piadm.TimeGrid.uniform, piadm.TimeGrid.log_snr)]
        levels = [schedule.alpha(0.3), schedule.sigma(0.3), schedule.log_snr(0.3), schedule.time(0.5)]
        with pytest.raises(ValueError, match="log_snr must lie in"):
            schedule.time(torch.nan)
        return levels + [grid.times for grid in grids]

    check(values)


def test_blocks() -> None:
    check(lambda: (piadm.TimeGrid([3, 2, 1]).times, piadm.Blocks([[3, 2], [2, 1]]).times))
    check(lambda: (piadm.Blocks.paper(**PAPER).times, piadm.Blocks.paper(**PAPER).grid(VP).times))


def test_models() -> None:
    covariance, times = DATA.T.cov(), torch.full((len(DATA),), 0.5)
    check(lambda: GaussianNetwork(VP)(DATA, times))
    check(lambda: GaussianNetwork(VP, DATA[0], covariance)(DATA, times))
    check(lambda: MixtureNetwork(VP, DATA, 0.1)(DATA, times))
    check(lambda: MixtureNetwork(VP, DATA, DATA[:, 0].abs(), DATA[:, 1].abs())(DATA, times))
    check(lambda: piadm.sample(GaussianDenoiser(VP, 0.0, covariance), SHAPE, steps=30).sample)


def test_fit_draft() -> None:
    pytest.importorskip("sklearn")
    denoiser = piadm.Denoiser(Network(), VP, "sample")
    check(lambda: piadm.fit_draft(denoiser, DATA, components=3, rank=2).draft.network.state_dict())


def test_the_shipped_network() -> None:
    pytest.importorskip("diffusers")

    def values() -> tuple[Any, ...]:
        denoiser = piadm.load("fashion")
        x, t = torch.zeros(1, 1, 28, 28, device="cpu"), torch.full((1,), 500.0, device="cpu")
        outputs = denoiser.network(x, t), denoiser.draft.network(x, t)
        return denoiser.network.state_dict(), denoiser.draft.network.state_dict(), outputs

    check(values)


SPECTRUM = ([0.05, 0.3, 1.0, 3.0], [1.0, 2.0, 3.0, 4.0], [0.5, -1.0, 0.0, 2.0])
GRID = piadm.TimeGrid.uniform(OU, 20, 3.0, 0.05)
PLANS = {
    "sde": lambda: piadm.plan(64, kl=0.1, spectrum=[0.1, 1.0, 2.0, 3.0]),
    "ode": lambda: piadm.plan(64, kl=0.1, spectrum=theory.Spectrum.power_law(1.5, 64, ratio=50.0), method="ode"),
    "bounds": lambda: piadm.plan(64, kl=0.1, lipschitz=5.0),
}


@pytest.mark.parametrize("name", PLANS)
def test_plans(name: str) -> None:
    def values() -> tuple[Any, ...]:
        plan = PLANS[name]()
        return plan.blocks.times, plan.iterations, plan.kl, plan.tv, plan.kl_data, plan.states

    check(values)


def test_laws() -> None:
    def values() -> list[Any]:
        spectrum = theory.Spectrum(*SPECTRUM)
        centred = theory.Spectrum(*SPECTRUM[:2])
        laws = [
            theory.noised(spectrum, OU, 0.3),
            theory.sequential_law(spectrum, "sde", GRID),
            theory.piadm_sde_law(spectrum, BLOCKS, 4),
            theory.piadm_ode_law(spectrum, BLOCKS, 4, corrector=CORRECTOR),
            theory.engine_law(spectrum, "sde", GRID, 3, variance=1.0),
            theory.gaussian_law(spectrum, "sde", GRID, 3, variance=1.0),
            theory.secant_law(centred, "sde", GRID, 3, variance=1.0),
        ]
        mixture = theory.MixtureProduct([-1.0, 1.0], 0.2, [1.0, 2.0], 8)
        figures = [mixture.sequential_kl("sde", GRID), mixture.parallel_kl(BLOCKS, 3, samples=200, bins=8)]
        fit = theory.log_polynomial_fit([10, 100, 1e3, 1e4], [1, 2, 4, 7])
        power = theory.against_power([10, 100, 1e3, 1e4], [1, 2, 4, 7], 0.5)
        return [(law.mean, law.variance) for law in laws] + figures + [fit.coefficients, fit.errors, power]

    check(values)


@pytest.mark.parametrize("rival", chosen(None), ids=lambda rival: rival.name)
@pytest.mark.parametrize("method", ["sde", "ode"])
def test_rivals(method: str, rival: Rival) -> None:
    network = Network()

    def sample() -> Tensor | None:
        course = prepare(piadm.Denoiser(network, TABLE, "sample"), SHAPE, method=method, steps=20)
        try:
            return rival.ladders(course)[0][0].run(course, Budget()).sample
        except Unavailable:
            return None

    found = on_meta(sample)
    assert network.seen == {"meta"}
    assert_same(found, sample())
