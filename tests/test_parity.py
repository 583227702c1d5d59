"""Parity with diffusers' own schedulers, and of parallel with sequential sampling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

import piadm
from piadm.models import MixtureDenoiser

SHAPE = (2, 1, 28, 28)
TABLE = dict(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False)
THEIR_NAME = {"v": "v_prediction", "sample": "sample"}
# diffusers keeps its table in float32, which leaves 1 - alpha_bar near clean data with a relative error of 6e-4, and
# both sides round a thousand float32 states; 1e-6 (50 steps, ODE) to 8e-6 (1000 steps, SDE) was reached.
PARITY = 1e-4
# float32 rounding of the states, answered by the network; at most 6e-7 was reached.
SINGLE = 1e-5


@pytest.fixture(scope="module")
def denoiser() -> piadm.Denoiser:
    return piadm.load("fashion")


@pytest.fixture(scope="module")
def mixture(denoiser: piadm.Denoiser) -> piadm.Denoiser:
    """Thirty modes in closed form, whose output is read as that of a diffusers network is."""
    closed = MixtureDenoiser(denoiser.schedule, normals(5, 30, *SHAPE[1:]), 0.05)
    return replace(closed, network=lambda x, t: SimpleNamespace(sample=closed.network(x, t.expand(len(x)))))


def normals(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def apart(a: Tensor, b: Tensor) -> float:
    """Largest RMS difference of a sample."""
    return float((a - b).flatten(1).square().mean(1).sqrt().max())


@torch.no_grad()
def walk(
    scheduler: DDPMScheduler | DDIMScheduler, network: Callable[..., Any], x: Tensor, steps: int, **more: object
) -> Tensor:
    """The scheduler's own sampling loop."""
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t).sample, t, x, **more).prev_sample
    return x


@pytest.mark.parametrize(("name", "steps"), [("mixture", 1000), ("denoiser", 50)])
def test_sde_is_ddpm_ancestral_sampling(name: str, steps: int, request: pytest.FixtureRequest) -> None:
    denoiser = request.getfixturevalue(name)
    predicted = THEIR_NAME[denoiser.prediction]
    scheduler = DDPMScheduler(**TABLE, variance_type="fixed_small", prediction_type=predicted)
    initial = normals(1, *SHAPE)
    # The scheduler draws one tensor per step but the last from its generator, as ``noise`` is drawn here.
    want = walk(scheduler, denoiser.network, initial, steps, generator=torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(2)
    noise = torch.stack([torch.randn(SHAPE, generator=generator) for _ in range(steps)])
    got = piadm.sample_sequential(denoiser, SHAPE, method="sde", steps=steps, initial=initial, noise=noise)
    assert apart(got.sample, want) <= PARITY


@pytest.mark.parametrize(("name", "steps"), [("mixture", 1000), ("denoiser", 50)])
def test_ode_is_ddim(name: str, steps: int, request: pytest.FixtureRequest) -> None:
    denoiser = request.getfixturevalue(name)
    predicted = THEIR_NAME[denoiser.prediction]
    scheduler = DDIMScheduler(**TABLE, prediction_type=predicted, set_alpha_to_one=True)
    initial = normals(3, *SHAPE)
    want = walk(scheduler, denoiser.network, initial, steps, eta=0.0)
    got = piadm.sample_sequential(denoiser, SHAPE, method="ode", steps=steps, initial=initial)
    assert apart(got.sample, want) <= PARITY


@pytest.mark.parametrize("guess", ["gaussian", "score", "identity", "data"])
@pytest.mark.parametrize("method", ["sde", "ode", "paper-sde", "paper-ode"])
def test_all_rounds_are_the_sequential_sampler(denoiser: piadm.Denoiser, method: str, guess: str) -> None:
    run = dict(method=method, steps=10, seed=4)
    # A tolerance below rounding: every row is evaluated in every round until the iteration must be exact.
    got = piadm.sample(denoiser, SHAPE, nodes="all", linearization=guess, tol=1e-30, **run)
    want = piadm.sample_sequential(denoiser, SHAPE, **run)
    assert apart(got.sample, want.sample) <= SINGLE


@pytest.mark.parametrize("method", ["sde", "ode"])
def test_a_sample_alone_and_among_eight_is_the_same(denoiser: piadm.Denoiser, method: str) -> None:
    run = dict(method=method, steps=6, nodes="all", tol=1e-30)
    many = piadm.sample(denoiser, (8, *SHAPE[1:]), seed=6, **run).sample
    one = piadm.sample(denoiser, (1, *SHAPE[1:]), seed=[(6, 5)], **run).sample
    assert apart(one, many[5:6]) <= SINGLE


def test_the_tolerance_is_kept_on_the_network(denoiser: piadm.Denoiser) -> None:
    run = dict(method="ode", steps=120, seed=7)
    got = piadm.sample(denoiser, SHAPE, tol=2e-2, **run)
    want = piadm.sample_sequential(denoiser, SHAPE, **run)
    assert got.converged
    assert apart(got.sample, want.sample) <= 2e-2
    assert got.stats.rounds < 30
