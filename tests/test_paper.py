"""PIADM-SDE and PIADM-ODE against a direct evaluation of the paper's formulas, written here with plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import piadm
from piadm.models import GaussianDenoiser, MixtureDenoiser

BATCH, DIM = 3, 6
# Rounding of a few hundred float64 operations on values of order one; what was reached is about 3e-15.
DIRECT = 1e-10
EXACT = 1e-12


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def means() -> Tensor:
    return torch.randn(5, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def denoiser(means: Tensor) -> piadm.Denoiser:
    return MixtureDenoiser(piadm.OUSchedule(), means, 0.1)


@pytest.fixture(scope="module")
def blocks() -> piadm.Blocks:
    return piadm.Blocks.paper(horizon=6.0, early_stop=0.02, length=1.0, step=0.1)


def normals(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def score(denoiser: piadm.Denoiser, x: Tensor, t: float) -> Tensor:
    times = torch.full((len(x),), t, dtype=torch.float64)
    alpha, sigma = math.exp(-t / 2), math.sqrt(-math.expm1(-t))
    return (alpha * denoiser(x, times) - x) / sigma**2


def predict_block(denoiser: piadm.Denoiser, start: Tensor, times: list[float], noise: Tensor | None, K: int) -> Tensor:
    """Algorithm 1's sum (with noise) or Algorithm 2's predictor (without), as printed."""
    tau = [times[0] - t for t in times]
    weight = 1 if noise is None else 2
    states = [start] * len(times)
    for _ in range(K):
        scores = [score(denoiser, y, t) for y, t in zip(states, times, strict=True)]
        fresh = []
        for m in range(len(times)):
            y = math.exp(tau[m] / 2) * start
            for j in range(m):
                step = tau[j + 1] - tau[j]
                term = weight * (math.exp(step / 2) - 1) * scores[j]
                if noise is not None:
                    term = term + math.sqrt(math.exp(step) - 1) * noise[j]
                y = y + math.exp((tau[m] - tau[j + 1]) / 2) * term
            fresh.append(y)
        states = fresh
    return states[-1]


def correct(denoiser: piadm.Denoiser, start: Tensor, t: float, z: Tensor, corrector: piadm.Corrector) -> Tensor:
    """Algorithm 2's corrector: Picard iterations of the exact underdamped step, block after block."""
    gamma, count = corrector.friction, math.ceil(corrector.duration / corrector.length)
    inner = math.ceil(corrector.duration / count / corrector.step)
    eps = corrector.duration / count / inner
    decay = math.exp(-gamma * eps)
    var_v = 1 - decay**2
    cov = (1 - decay) ** 2 / gamma
    var_u = 2 / gamma * (eps - 2 * (1 - decay) / gamma + (1 - decay**2) / (2 * gamma))
    u, v, used = start, z[0], 1
    for _ in range(count):
        us = [u] * (inner + 1)
        for _ in range(corrector.iterations):
            scores = [score(denoiser, w, t) for w in us]
            us, vs = [u], [v]
            for j in range(inner):
                z0, z1 = z[used + 2 * j], z[used + 2 * j + 1]
                xi_v = math.sqrt(var_v) * z0
                xi_u = cov / math.sqrt(var_v) * z0 + math.sqrt(var_u - cov**2 / var_v) * z1
                gain = (1 - decay) / gamma
                us.append(us[-1] + gain * vs[-1] + (eps - gain) / gamma * scores[j] + xi_u)
                vs.append(decay * vs[-1] + gain * scores[j] + xi_v)
        u, v, used = us[-1], vs[-1], used + 2 * inner
    return u


@pytest.mark.parametrize("iterations", [1, 3, 7])
def test_piadm_sde_is_algorithm_1(denoiser: piadm.Denoiser, blocks: piadm.Blocks, iterations: int) -> None:
    initial, noise = normals(2, BATCH, DIM), normals(3, blocks.steps, BATCH, DIM)
    got = piadm.piadm_sde(denoiser, (BATCH, DIM), blocks=blocks, iterations=iterations, initial=initial, noise=noise)
    y, first = initial, 0
    for block in blocks.times:
        size = len(block) - 1
        y = predict_block(denoiser, y, block.tolist(), noise[first : first + size], iterations)
        first += size
    assert relative(got.sample, y) <= DIRECT
    assert got.stats.rounds == blocks.count * iterations
    assert got.stats.evaluations == blocks.steps * iterations


def test_the_last_block_has_unequal_steps(blocks: piadm.Blocks) -> None:
    steps = -blocks.times[-1].diff()
    assert blocks.count > 3
    assert steps[0] > 10 * steps[-2]


def test_piadm_ode_is_algorithm_2(denoiser: piadm.Denoiser, blocks: piadm.Blocks) -> None:
    corrector = piadm.Corrector(duration=0.5, length=0.25, step=0.05, iterations=3, friction=1.5)
    initial, noise = normals(4, BATCH, DIM), normals(5, blocks.count * corrector.normals, BATCH, DIM)
    got = piadm.piadm_ode(
        denoiser, (BATCH, DIM), blocks=blocks, iterations=4, corrector=corrector, initial=initial, noise=noise
    )
    y = initial
    for block, z in zip(blocks.times, noise.view(blocks.count, -1, BATCH, DIM), strict=True):
        y = predict_block(denoiser, y, block.tolist(), None, 4)
        y = correct(denoiser, y, block[-1].item(), z, corrector)
    assert relative(got.sample, y) <= DIRECT
    assert got.stats.rounds == (4 + 3 * corrector.blocks) * blocks.count  # (K + K_dagger N_dagger) N


@pytest.mark.parametrize("kind", ["sde", "ode"])
def test_as_many_iterations_as_steps_are_the_sequential_sampler(
    denoiser: piadm.Denoiser, blocks: piadm.Blocks, kind: str
) -> None:
    initial = normals(6, BATCH, DIM)
    noise = normals(7, blocks.steps, BATCH, DIM) if kind == "sde" else None
    common = dict(initial=initial, noise=noise, return_states=True)
    iterations = max(blocks.sizes)
    if kind == "sde":
        got = piadm.piadm_sde(denoiser, (BATCH, DIM), blocks=blocks, iterations=iterations, **common)
    else:
        got = piadm.piadm_ode(denoiser, (BATCH, DIM), blocks=blocks, iterations=iterations, corrector=None, **common)
    want = piadm.sample_sequential(
        denoiser, (BATCH, DIM), method=f"paper-{kind}", grid=blocks.grid(denoiser.schedule), **common
    )
    assert relative(got.sample, want.sample) <= EXACT
    assert relative(got.states, want.states) <= EXACT


@pytest.mark.parametrize("k", [1, 4, 9])
def test_after_k_rounds_the_first_k_states_of_a_block_are_exact(denoiser: piadm.Denoiser, k: int) -> None:
    block = piadm.Blocks.paper(horizon=2.0, early_stop=0.5, length=2.0, step=0.1)
    initial, noise = normals(8, BATCH, DIM), normals(9, block.steps, BATCH, DIM)
    common = dict(initial=initial, noise=noise, return_states=True)
    got = piadm.piadm_sde(denoiser, (BATCH, DIM), blocks=block, iterations=k, **common)
    want = piadm.sample_sequential(
        denoiser, (BATCH, DIM), method="paper-sde", grid=block.grid(denoiser.schedule), **common
    )
    assert relative(got.states[: k + 1], want.states[: k + 1]) <= EXACT
    assert relative(got.states[k + 1], want.states[k + 1]) > EXACT  # and no more than that


def test_another_clock_of_the_same_process_gives_the_same_sample(means: Tensor, blocks: piadm.Blocks) -> None:
    schedule = piadm.VPSchedule(0.1, 20.0)
    initial, noise = normals(10, BATCH, DIM), normals(11, blocks.steps, BATCH, DIM)
    samples = [
        piadm.piadm_sde(
            MixtureDenoiser(kind, means, 0.1), (BATCH, DIM), blocks=blocks, iterations=5, initial=initial, noise=noise
        ).sample
        for kind in (piadm.OUSchedule(), schedule)
    ]
    # The clock is converted through log-SNR: rounding times the conditioning of its inverse.
    assert relative(samples[1], samples[0]) <= 1e-9


def test_another_scale_of_the_same_process_gives_the_same_sample(means: Tensor) -> None:
    blocks = piadm.Blocks.paper(horizon=5.0, early_stop=0.05, length=1.0, step=0.1)
    corrector = piadm.Corrector(duration=0.3, length=0.3, step=0.1, iterations=2)
    y0, noise = normals(12, BATCH, DIM), normals(13, blocks.count * corrector.normals, BATCH, DIM)
    ou, ve = piadm.OUSchedule(), piadm.VESchedule()
    run = dict(blocks=blocks, iterations=3, corrector=corrector, noise=noise)
    small = piadm.piadm_ode(MixtureDenoiser(ou, means, 0.1), (BATCH, DIM), initial=y0, **run).sample
    big = piadm.piadm_ode(MixtureDenoiser(ve, means, 0.1), (BATCH, DIM), initial=y0 * math.exp(2.5), **run).sample
    assert relative(big, small * math.exp(0.025)) <= 1e-9  # x = y / alpha where alpha = 1


def test_drawn_noise_is_laid_out_as_the_callers(denoiser: piadm.Denoiser) -> None:
    blocks = piadm.Blocks.paper(horizon=2.0, early_stop=0.2, length=1.0, step=0.2)
    keys = piadm.noise.seed_keys(5, BATCH)
    source = piadm.noise.SeededNoise(keys, DIM, torch.float64)
    corrector = piadm.Corrector(duration=0.2, length=0.1, step=0.05, iterations=2)
    draws = [source.corrector(n, 0, corrector.normals) for n in range(blocks.count)]
    initial = normals(14, BATCH, DIM)
    run = dict(blocks=blocks, iterations=3, corrector=corrector, initial=initial)
    drawn = piadm.piadm_ode(denoiser, (BATCH, DIM), seed=5, **run)
    given = piadm.piadm_ode(denoiser, (BATCH, DIM), noise=torch.cat(draws), **run)
    assert torch.equal(drawn.sample, given.sample)


@pytest.mark.parametrize("stopped", [2, 3, 24])
def test_states_of_an_interrupted_run_are_those_of_the_blocks_that_were_finished(stopped: int) -> None:
    blocks, denoiser = piadm.Blocks.paper(3.0, 0.1, 1.0, 0.2), GaussianDenoiser(piadm.OUSchedule())
    run = dict(blocks=blocks, iterations=2, return_states=True)
    whole = piadm.piadm_sde(denoiser, (2, 8), **run).states
    part = piadm.piadm_sde(denoiser, (2, 8), **run, callback=lambda info: info.round == stopped)
    steps = sum(blocks.sizes[: stopped // 2])
    assert part.states.shape[0] == steps + 1 and torch.equal(part.states, whole[: steps + 1])
