"""Denoisers that clip their estimates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

import piadm
from piadm.denoiser import PREDICTIONS
from piadm.models import MixtureDenoiser

VP = piadm.VPSchedule()
EXACT = MixtureDenoiser(VP, torch.randn(5, 4, generator=torch.Generator().manual_seed(1)), 0.3)
CLIP = partial(torch.clamp, min=-0.4, max=0.3)


def predicting(kind: str) -> piadm.Denoiser:
    """The exact denoiser by a network that predicts something else."""

    def network(x: Tensor, t: Tensor) -> Tensor:
        p, q = (c[:, None] for c in denoiser.coefficients(t.double()))
        return ((EXACT(x, t).double() - p * x) / q).to(x)

    denoiser = replace(EXACT, network=network, prediction=kind)
    return denoiser


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_the_estimate_is_clipped_and_not_what_the_network_predicts(kind: str) -> None:
    x, t = torch.randn(8, 4, generator=torch.Generator().manual_seed(2)), torch.linspace(0.1, 0.9, 8)
    got, want = replace(predicting(kind), clip=CLIP)(x, t), CLIP(EXACT(x, t))
    assert torch.allclose(got, want, atol=1e-4)  # of the noise, float32 keeps few digits of the data
    assert (got == -0.4).any() and (got == 0.3).any()


@pytest.mark.parametrize("method", ["sde", "ode"])
def test_sample_agrees_with_the_sequential_sampler(method: str) -> None:
    denoiser = replace(EXACT, clip=CLIP)
    run = dict(shape=(6, 4), method=method, steps=100, seed=3)
    one, other = piadm.sample(denoiser, tol=1e-3, **run), piadm.sample_sequential(denoiser, **run)
    assert one.converged and one.stats.rounds < 50
    assert float((one.sample - other.sample).square().mean(1).sqrt().max()) <= 1e-3
    free = piadm.sample_sequential(EXACT, **run)
    assert float((other.sample - free.sample).abs().max()) > 0.1


@pytest.mark.parametrize(
    "clip, message",
    [
        (lambda rows: rows[:, :1], r"clip must return .* of shape \(\d+, 4\), got torch.float32 \(\d+, 1\)"),
        (lambda rows: rows.numpy(), "clip must return denoised estimates of shape .* got .*ndarray"),
        (lambda rows: None, "clip must return denoised estimates of shape .* got None"),
    ],
)
def test_a_clip_that_returns_something_else_is_named(clip: Callable[[Tensor], object], message: str) -> None:
    with pytest.raises(piadm.NetworkError, match=message):
        piadm.sample_sequential(replace(EXACT, clip=clip), (2, 4), steps=5)
    with pytest.raises(TypeError, match="clip must be callable on denoised estimates, or None, got 1.0 of type float"):
        replace(EXACT, clip=1.0)
