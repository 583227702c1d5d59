"""A network that does not treat every row alone has no well-defined sample: a warning says so."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import piadm
from piadm.models import MixtureNetwork

VP = piadm.VPSchedule()
exact = MixtureNetwork(VP, 1.3 * torch.randn(8, 16, generator=torch.Generator().manual_seed(1)).double(), 0.01)
ALONE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "plain": exact,
    "in place": lambda x, t: x.mul_(0.0).add_(exact(x.clone(), t)),
}
MIXED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "first time": lambda x, t: exact(x, t[:1].expand(len(x))),
    "last time": lambda x, t: exact(x, t[-1:].expand(len(x))),
    "mean time": lambda x, t: exact(x, t.mean().expand(len(x))),
    "mean of the batch": lambda x, t: exact(x - x.mean(0, keepdim=True), t),
    "dropout": lambda x, t: torch.nn.functional.dropout(exact(x, t), 0.1),
}


@pytest.mark.parametrize("method", ["ode", "sde"])
@pytest.mark.parametrize("name", MIXED)
def test_a_network_that_mixes_rows_is_warned_of(name: str, method: str) -> None:
    denoiser = piadm.Denoiser(MIXED[name], VP, "sample")
    with pytest.warns(RuntimeWarning, match="answered one row differently among other rows, by .* every row alone"):
        found = piadm.sample(denoiser, (16, 16), method=method, steps=100, max_rounds=30)
    truth = piadm.sample_sequential(denoiser, (16, 16), method=method, steps=100)
    assert float((found.sample - truth.sample).square().mean(1).sqrt().max()) > 1e-2  # not in vain


@pytest.mark.parametrize("name", ["plain", "in place"])
def test_one_that_treats_every_row_alone_is_not(name: str) -> None:
    denoiser = piadm.Denoiser(ALONE[name], VP, "sample")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = piadm.sample(denoiser, (16, 16), method="sde", steps=100, tol=1e-6)
    assert found.stats.rounds > 11  # it was asked


@pytest.mark.parametrize("method", ["ode", "sde"])
def test_the_questions_are_counted_and_cost_two_rows_of_slow_samples_only(method: str) -> None:
    seen: list[int] = []

    def counting(x: Tensor, t: Tensor) -> Tensor:
        seen.append(len(x))
        return exact(x, t)

    found = piadm.sample(piadm.Denoiser(counting, VP, "sample"), (4, 16), method=method, steps=100, tol=1e-5)
    assert sum(seen) == 4 * found.stats.evaluations == found.stats.evaluations_per_sample.sum()
    assert len(seen) == found.stats.rounds
