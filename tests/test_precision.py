"""Networks in half precision: what their rounding brings is not taken for news, round after round."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import piadm
from piadm.models import MixtureDenoiser
from piadm.precision import HALF, resolution
from piadm.settings import resolve
from piadm.stopping import LAPS_HALF
from piadm.witness import MOVES, SLOW, Witness, roundings

# Stable Diffusion's levels: at the noisiest, an error of epsilon is fifteen times as large in the denoised estimate.
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
SCHEDULE = piadm.DiscreteSchedule(torch.cumprod(1 - BETAS, 0))
MODES = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))


class Rounded(nn.Module):
    """Epsilon of a mixture in closed form, its input and output rounded to the dtype of its parameter."""

    def __init__(self, dtype: torch.dtype, modes: Tensor = MODES, schedule: piadm.NoiseSchedule = SCHEDULE) -> None:
        super().__init__()
        self.schedule, self.exact = schedule, MixtureDenoiser(schedule, modes, 0.05)
        self.anchor = nn.Parameter(torch.zeros(1, dtype=dtype))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (level[:, None] for level in self.schedule.levels(t.double()))
        x = x.double()
        return ((x - alpha * self.exact.network(x, t)) / sigma).to(self.anchor.dtype)


class Deep(nn.Module):
    """Layers of random weights, of which the denoised estimate depends on the state as strongly as a trained one's."""

    def __init__(self, size: int = 64, width: int = 256) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(size + 1, width), nn.Linear(width, size)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        generator = torch.Generator().manual_seed(0)
        for weight in self.parameters():
            gain = 1.5 / weight.shape[1] ** 0.5 if weight.ndim == 2 else 0.1
            weight.data = gain * torch.randn(weight.shape, generator=generator)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.first(torch.cat([x, torch.log1p(t)[:, None].to(x) / 5], 1))
        for block in self.blocks:
            h = h + 0.5 * block(nn.functional.silu(h))
        return 0.3 * self.last(nn.functional.silu(h))


class Autocast(nn.Module):
    """A network of float32, input and output included, that computes in bfloat16 inside."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.network(x, t).float()


def rounded(dtype: torch.dtype) -> piadm.Denoiser:
    return of(Rounded(dtype))


def of(network: Rounded) -> piadm.Denoiser:
    return replace(network.exact, network=network, prediction="epsilon")


@pytest.mark.parametrize("steps", [200, 1000])
@pytest.mark.parametrize("method", ["ode", "sde"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_costs_little_more(dtype: torch.dtype, method: str, steps: int) -> None:
    run = dict(method=method, steps=steps, seed=1)
    half, full = (piadm.sample(rounded(one), (2, 64), **run) for one in (dtype, torch.float32))
    want = piadm.sample_sequential(rounded(dtype), (2, 64), **run).sample
    assert half.converged and float((half.sample - want).square().mean(1).sqrt().max()) <= 1e-2
    # 98 000 evaluations for 137 were seen; with the rounding told from news at most 1.3 times as many.
    assert half.stats.evaluations <= 1.6 * full.stats.evaluations


@pytest.mark.parametrize("method", ["ode", "sde"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_finer_nodes_of_half_precision_are_all_steps(dtype: torch.dtype, method: str) -> None:
    # Of a rough trained network in bfloat16, 32 samples over 250 steps, 5 were outside the tolerance after 55 rounds
    # with twice as many nodes each time; with this none, after 24.
    given = dict(grid=None, steps=1000, tol=1e-2, nodes=None, window=None, guess=None)
    engine = resolve(rounded(dtype), method=method, **given)
    assert (engine.finer(engine.nodes).count == 1000) == (dtype is not torch.float32)


def test_rows_that_rounding_keeps_from_settling_are_not_evaluated_to_the_last() -> None:
    # Of a sample that moves on to every step since its rows never settle, the aim stays as it is: one that is below the
    # rounding took 43 rounds and 1820 evaluations, and left the same error.
    modes, schedule = 0.4 * torch.randn(16, 16, generator=torch.Generator().manual_seed(0)), piadm.CosineSchedule()
    half, full = (of(Rounded(dtype, modes, schedule)) for dtype in (torch.bfloat16, torch.float32))
    run = dict(method="ode", grid=piadm.TimeGrid.uniform(schedule, 100, start=0.995), seed=[(0, 13)])
    found, want = piadm.sample(half, (1, 16), tol=6e-3, **run), piadm.sample_sequential(half, (1, 16), **run).sample
    assert found.converged and float((found.sample - want).square().mean().sqrt()) <= 6e-3
    assert found.stats.nodes == 100
    # What it takes on the first nodes until it moves on, and on every step from the beginning.
    few = piadm.sample(full, (1, 16), tol=6e-3, **run).stats.nodes
    every = piadm.sample(half, (1, 16), tol=6e-3, nodes="all", **run).stats.evaluations
    assert found.stats.evaluations <= LAPS_HALF * few + every


@pytest.mark.parametrize("steps", [200, 1000])
@pytest.mark.parametrize("method", ["ode", "sde"])
def test_rounding_that_a_network_keeps_to_itself_is_found(method: str, steps: int) -> None:
    open_, run = piadm.Denoiser(Deep(), piadm.VPSchedule(), "sample"), dict(method=method, steps=steps, seed=1)
    hidden = replace(open_, network=Autocast(open_.network))
    found = piadm.sample(hidden, (2, 64), **run)
    want = piadm.sample_sequential(hidden, (2, 64), **run).sample
    assert found.converged and float((found.sample - want).square().mean(1).sqrt().max()) <= 1e-2
    # 98 to 300 rounds were seen; where it is known from the beginning they are 9 to 16.  It is asked about in the tenth
    # and the eleventh round; as many again are for what rounding has taught the local models by then.
    with torch.autocast("cpu", torch.bfloat16):
        known = piadm.sample(open_, (2, 64), **run)
    assert found.stats.rounds <= 2 * (SLOW + 2) + known.stats.rounds


def test_roundings_are_told_from_slopes() -> None:
    moves, slopes = np.array(MOVES)[:, None], np.array([0.0, 0.1, 1.0, 30.0])
    assert (roundings(slopes * moves) == 0).all() and (roundings(slopes * moves**0.8) == 0).all()
    noise = np.array([1e-4, 3e-4, 3e-3])
    assert np.allclose(roundings(np.hypot(noise, 0.7 * moves)), noise)
    # The smallest change was rounded away; an answer that is not finite says nothing.
    assert roundings(np.array([[0.0], [1e-4], [7e-3]])) == 7e-3
    assert (roundings(np.full((3, 1), np.nan)) == 0).all() and roundings(np.array([[0.0], [0.0], [np.nan]])) == 0


def test_networks_of_full_precision_are_found_to_have_it() -> None:
    seen: list[float] = []
    finish = Witness.finish

    def noted(self: Witness, numbers: np.ndarray) -> None:
        finish(self, numbers)
        seen.extend(self.resolution)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Witness, "finish", noted)
        for network, prediction in ((rounded(torch.float32).network, "epsilon"), (Deep(), "sample")):
            denoiser = replace(rounded(torch.float32), network=network, prediction=prediction)
            piadm.sample(denoiser, (16, 64), method="sde", steps=200, tol=1e-4)
    assert len(seen) >= 32 and max(seen) < HALF


@pytest.mark.parametrize(("convolutions", "products"), [(True, False), (False, True), (False, False)])
def test_layers_that_multiply_in_tf32_resolve_as_much(
    convolutions: bool, products: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What PyTorch says on a GPU; convolutions are in TF32 there unless it is told otherwise.
    monkeypatch.setattr(torch.cuda, "is_tf32_supported", lambda: True, raising=False)
    monkeypatch.setattr("piadm.precision.network_device", lambda network: torch.device("cuda"))
    allowed = {torch.backends.cuda.matmul: products, getattr(torch.backends.cudnn, "conv", None): convolutions}
    monkeypatch.setattr("piadm.precision._allows_tf32", lambda backend, before: allowed[backend])
    assert resolution(nn.Sequential(nn.Conv1d(1, 1, 3))) == (2.0**-10 if convolutions else 2.0**-23)
    assert resolution(nn.Linear(1, 1)) == (2.0**-10 if products else 2.0**-23)
    assert resolution(lambda x, t: x) == 2.0**-23


def test_the_resolution_is_that_of_the_coarsest_numbers() -> None:
    half, single = 2.0**-7, 2.0**-23
    assert resolution(Rounded(torch.bfloat16)) == half and resolution(Rounded(torch.float32)) == single
    assert resolution(lambda x, t: x) == single
    with torch.autocast("cpu", torch.bfloat16):
        assert resolution(Rounded(torch.float32)) == resolution(lambda x, t: x) == half


def test_kept_states_are_exact_under_an_autocast_too() -> None:
    run = dict(method="ode", steps=200, seed=1, return_states=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = piadm.sample(rounded(torch.float32), (2, 64), **run)
    # Both ways to the end round in float32: 3e-7 apart; a product in bfloat16 left 4e-4.
    assert found.states is not None and float((found.states[-1] - found.sample).abs().max()) <= 1e-5


def test_devices_compute_under_the_callers_autocast() -> None:
    class Line(nn.Linear):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return super().forward(x)

    run = dict(method="ode", steps=20, seed=1)
    denoiser = piadm.Denoiser(Line(64, 64), SCHEDULE, "epsilon")
    exact = piadm.sample_sequential(denoiser, (2, 64), **run).sample
    with torch.autocast("cpu", torch.bfloat16):
        alone = piadm.sample_sequential(denoiser, (2, 64), **run).sample
        shared = piadm.sample_sequential(denoiser, (2, 64), workers=piadm.Devices(["cpu"] * 2), **run).sample
    # One row instead of two rounds differently; the network's own rounding is a thousand times that.
    assert float((alone - shared).abs().max()) < 0.1 * float((alone - exact).abs().max())


@pytest.mark.filterwarnings("ignore:the first state is drawn")  # it is told, too
@pytest.mark.parametrize("nodes", [None, "all"])
def test_a_mean_told_far_off_is_no_excuse_for_convergence(nodes: str | None) -> None:
    # States are then differences of numbers of 1e5, whose rounding is 1e-2: errors of 2e-2 were CONVERGED at 1e-4.
    told = replace(rounded(torch.float32).network.exact, data_mean=1e5)
    run = dict(method="ode", steps=200, seed=1)
    found = piadm.sample(told, (3, 64), tol=1e-4, nodes=nodes, max_rounds=40, **run)
    assert not found.converged


def test_what_raise_on_failure_raises_goes_from_process_to_process() -> None:
    # By its message alone it could not be made again, and a pool of processes waited for ever.
    with pytest.raises(piadm.NotConvergedError) as caught:
        piadm.sample(rounded(torch.float32), (2, 64), max_rounds=1, raise_on_failure=True)
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value) and again.solution.status == caught.value.solution.status


@pytest.mark.parametrize("small", ["float8_e4m3fn", "float8_e5m2"])
def test_weights_kept_in_one_byte_say_nothing_of_what_is_computed_in(small: str) -> None:
    class Kept(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1).to(getattr(torch, small)), requires_grad=False)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return 0.5 * x * self.weight.to(x.dtype)

    found = piadm.sample(piadm.Denoiser(Kept(), piadm.VPSchedule(), "sample"), (2, 4), steps=20)
    assert found.converged and found.sample.dtype == torch.float32
