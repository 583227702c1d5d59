"""Schedulers as data: coefficients read by probing, and multistep recurrences condensed."""

from __future__ import annotations

import copy
from typing import Any

import diffusers as df
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CASES, SCALED, SD, normals, pixels, stable_diffusion
from torch import Tensor

from piadm.condense import condense
from piadm.integrators import AffineSteps, MultistepSteps
from piadm.interop.diffusers import parallelize
from piadm.interop.diffusers.levels import estimate, levels, steps
from piadm.interop.diffusers.probe import UnsupportedError, probe
from piadm.nodes import every_step, spread

EPS = float(np.finfo(np.float64).eps)


def triangular(rng: np.random.Generator, count: int) -> Tensor:
    """Rows whose magnitudes add up to at most one: nothing grows."""
    return torch.tensor(np.tril(rng.uniform(-1, 1, (count, count))) / np.arange(1, count + 1)[:, None])


@settings(max_examples=40, deadline=None)
@given(count=st.integers(2, 30), seed=st.integers(0, 2**32 - 1), few=st.booleans())
def test_a_condensed_multistep_path_is_the_recurrence(count: int, seed: int, few: bool) -> None:
    rng = np.random.default_rng(seed)
    clock = torch.tensor(rng.uniform(0.1, 1.0, count)).cumsum(0)
    nodes = spread(clock, max(2, count // 3)) if few else every_step(count)
    multi = MultistepSteps(clock, *(triangular(rng, count) for _ in range(2)), triangular(rng, count)[..., None])
    slopes, constants = torch.tensor(rng.uniform(-0.5, 0.5, count)), torch.tensor(rng.normal(size=count))
    start, residuals = float(rng.normal()), torch.tensor(rng.normal(size=nodes.count))
    noise = torch.tensor(rng.normal(size=count))

    x, told = [torch.tensor(start, dtype=torch.float64)], constants + nodes.weights @ residuals
    for j in range(count):
        known = torch.stack(x)
        estimates = slopes[: j + 1] * known + told[: j + 1]
        own = slice(0, j + 1)
        x.append(multi.a[j, own] @ known + multi.b[j, own] @ estimates + multi.c[j, own, 0] @ noise[own])

    path = condense(multi, slopes, nodes, constants)
    known = path.start[:, 0, 0] * start + path.offset[:, 0]
    got = known + path.response[:, 0] @ residuals + path.noise[:, 0, :, 0] @ noise
    wanted = torch.stack([x[j] for j in [*nodes.indices.tolist(), count]])
    # Some thirty steps, of at most ninety products each, of numbers below 1.5^30 where slopes make states grow.
    assert torch.allclose(got, wanted, rtol=1e4 * EPS, atol=1e4 * EPS * float(torch.stack(x).abs().max()))


def test_one_step_is_the_diagonal_case() -> None:
    rng = np.random.default_rng(0)
    a, b, c, slopes = (torch.tensor(rng.uniform(0.1, 0.9, 20)) for _ in range(4))
    times = torch.arange(20, 0, -1, dtype=torch.float64)
    one = AffineSteps(times, a[:, None, None], b[:, None], c[:, None, None])
    many = MultistepSteps(times, a.diag(), b.diag(), c.diag()[..., None])
    nodes = every_step(20)
    paths = [vars(condense(given, slopes, nodes)).values() for given in (one, many)]
    assert all(torch.allclose(*pair, rtol=1e-12, atol=1e-300) for pair in zip(*paths, strict=True))
    assert all(torch.equal(*pair) for pair in zip(one.own(), many.own(), strict=True))


PROBED: list[tuple[type, dict[str, Any]]] = [
    (df.DDPMScheduler, dict(clip_sample=False)),
    (df.DDIMScheduler, dict(clip_sample=False)),
    (df.PNDMScheduler, {}),
    (df.HeunDiscreteScheduler, {}),
    (df.EulerAncestralDiscreteScheduler, {}),
    (df.DPMSolverMultistepScheduler, dict(solver_order=3)),
    (df.DPMSolverMultistepScheduler, dict(algorithm_type="sde-dpmsolver++")),
    (df.DEISMultistepScheduler, {}),
    (df.UniPCMultistepScheduler, dict(solver_order=3)),
]


@pytest.mark.parametrize("kind, more", PROBED, ids=lambda value: getattr(value, "__name__", ""))
def test_a_probed_scheduler_walks_as_the_scheduler_does(kind: type, more: dict[str, Any]) -> None:
    scheduler = kind(**SCALED, **more)
    scheduler.set_timesteps(10)
    times = scheduler.timesteps
    probed = probe(scheduler, times, [{}] * len(times))
    of = estimate(scheduler, times, levels(scheduler, times, probed.scales), probed, [{}] * len(times))
    recurrence = steps(probed, of)
    if isinstance(recurrence, AffineSteps):
        a, b, c = (getattr(recurrence, name).reshape(len(times), -1) for name in "abc")
        c = c.reshape(-1).diag() if c.numel() else torch.zeros(len(times), len(times))
        a, b = a[:, 0].diag(), b[:, 0].diag()
    else:
        a, b, c = recurrence.a, recurrence.b, recurrence.c.reshape(len(times), len(times), -1).sum(2)

    outputs = normals(1, len(times), 1, 3).double()  # a network's answers, whatever they are
    walker, generator, x = copy.deepcopy(scheduler), torch.Generator().manual_seed(2), normals(3, 1, 3).double()
    drawn = torch.Generator().manual_seed(2)
    noisy = "generator" in kind.step.__code__.co_varnames and bool(c.any())
    dtype = torch.float32 if kind is df.DPMSolverMultistepScheduler else torch.float64  # what it draws in
    noise = [torch.randn(1, 3, generator=drawn, dtype=dtype).double() for _ in times]
    states, estimates = [x], []
    for j, t in enumerate(times):
        options = dict(generator=generator) if noisy else {}
        if hasattr(walker, "scale_model_input"):
            walker.scale_model_input(x, t)
        estimates.append(of(outputs[j], x, torch.tensor([j])))
        x = walker.step(outputs[j], t, x, **options).prev_sample.double()
        mine = sum(a[j, i] * states[i] + b[j, i] * estimates[i] + c[j, i] * noise[i] for i in range(j + 1))
        # Some schedulers compute in single precision; sums of terms of up to ten states.
        assert torch.allclose(mine, x, rtol=1e-4, atol=1e-4 * float(torch.stack(states).abs().max()))
        states.append(x)


# Almost no data in the first state: its estimate is some 2e4 times as large.
FAINT = dict(beta_schedule="squaredcos_cap_v2", thresholding=True)
CLIPPING = [df.DPMSolverMultistepScheduler, df.UniPCMultistepScheduler]


def test_the_response_to_a_state_of_almost_no_data_is_exact() -> None:
    scheduler = df.DPMSolverMultistepScheduler(**FAINT, solver_order=1)
    scheduler.set_timesteps(12)
    probed = probe(scheduler, scheduler.timesteps, [{}] * len(scheduler.timesteps))
    at = levels(scheduler, scheduler.timesteps, probed.scales)
    of = estimate(scheduler, scheduler.timesteps, at, probed, [{}] * len(scheduler.timesteps))
    ratio = scheduler.sigmas.double()
    sigma = ratio / (1 + ratio**2).sqrt()
    # x' = sigma'/sigma x + (alpha' - alpha sigma'/sigma) D.  The scheduler steps in single precision.
    assert torch.allclose(steps(probed, of).a.flatten(), sigma[1:] / sigma[:-1], rtol=0, atol=1e-7)


@pytest.mark.parametrize("kind", CLIPPING)
def test_a_clipping_scheduler_of_almost_no_data_has_the_fixed_point_of_the_pipeline(kind: type) -> None:
    pipe = stable_diffusion(scheduler=kind(**FAINT))
    call = dict(SD, num_inference_steps=12, output_type="latent", latents=normals(7, 2, 4, 8, 8))
    want = pipe(**call).images
    got = parallelize(pipe, tol=1e-5, nodes="all")(**call).images
    assert float((got - want).square().mean((1, 2, 3)).sqrt().max()) <= 1e-5  # what was asked for


def test_rounds_of_a_chaotic_chain_that_clips_stay_finite() -> None:
    pipe = pixels(df.DDIMPipeline, df.DDIMScheduler())
    fast = parallelize(pipe, tol=1e-2)
    fast(batch_size=1, generator=torch.Generator().manual_seed(6), num_inference_steps=100, output_type="pt")
    assert fast.last_solution is not None and fast.last_solution.failures == ()  # surprises grew to 1e18


class ClipsInPart(df.DDIMScheduler):
    """Several steps, which clip what they make of the data but not of the noise."""

    last: Tensor | None = None

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True) -> Any:  # noqa: ANN401
        last, self.last = self.last, sample
        new = super().step(model_output, timestep, sample, return_dict=False)[0]
        return (new if last is None else new + 0.1 * last,)


def test_steps_of_several_outputs_that_clip_in_part_are_refused() -> None:
    scheduler = ClipsInPart(**SCALED)
    scheduler.set_timesteps(6)
    probed = probe(scheduler, scheduler.timesteps, [{}] * len(scheduler.timesteps))
    at = levels(scheduler, scheduler.timesteps, probed.scales)
    with pytest.raises(UnsupportedError, match="ClipsInPart clips the denoised estimate in a part of its steps only"):
        estimate(scheduler, scheduler.timesteps, at, probed, [{}] * len(scheduler.timesteps))


class HandsOver(df.EulerAncestralDiscreteScheduler):
    """A stochastic scheduler of one's own, which lets its parent step."""

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Any = None, **more: Any) -> Any:  # noqa: ANN401
        return super().step(0.5 * model_output, timestep, sample, generator=generator, **more)


class Grandchild(HandsOver):
    """Another one, with a step in between; it asks for its own type."""

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Any = None, **more: Any) -> Any:  # noqa: ANN401
        assert isinstance(self, Grandchild)
        return super().step(1.5 * model_output, timestep, sample, generator=generator, **more)


class Heir(HandsOver):
    """One that has nothing of its own."""


class ByName(HandsOver):
    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Any = None, **more: Any) -> Any:  # noqa: ANN401
        return HandsOver.step(self, 1.5 * model_output, timestep, sample, generator=generator, **more)


class ByWay(df.EulerAncestralDiscreteScheduler):
    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **more: Any) -> Any:  # noqa: ANN401
        return df.EulerAncestralDiscreteScheduler.step(self, model_output, timestep, sample, **more)


def test_a_stochastic_step_that_cannot_be_followed_to_a_parent_is_named() -> None:
    scheduler = ByWay(**SCALED)
    scheduler.set_timesteps(4)
    with pytest.raises(UnsupportedError, match="ByWay is not affine .*; a parent's step must be called by super()"):
        probe(scheduler, scheduler.timesteps, [{}] * len(scheduler.timesteps))


@pytest.mark.parametrize("kind", [HandsOver, Grandchild, Heir, ByName])
def test_a_stochastic_step_may_be_handed_over_to_a_parent(kind: type) -> None:
    pipe = stable_diffusion(scheduler=kind(**SCALED))
    call = dict(SD, num_inference_steps=12, output_type="latent")
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    want = pipe(**call, generator=generators[0]).images
    got = parallelize(pipe, tol=1e-4, nodes="all")(**call, generator=generators[1]).images
    assert float((got - want).square().mean().sqrt()) <= 1e-4  # what was asked for
    assert torch.equal(generators[0].get_state(), generators[1].get_state()) and type(pipe.scheduler) is kind


def test_times_of_tokens_are_named() -> None:
    # LTX with conditions gives every token of its state a time of its own.
    scheduler = df.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    with pytest.raises(UnsupportedError, match="gives FlowMatchEuler.*step other per_token_timesteps for other parts"):
        probe(scheduler, scheduler.timesteps, [dict(per_token_timesteps=torch.full((1, 6), 500.0))] * 6)


def test_a_prediction_that_says_nothing_of_the_data_is_refused() -> None:
    scheduler = df.DDIMScheduler(**SCALED, rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False)
    scheduler.set_timesteps(5)  # noise predicted where there is nothing but noise
    with pytest.raises(UnsupportedError, match="DDIMScheduler steps by numbers that are not finite at timestep 999"):
        probe(scheduler, scheduler.timesteps, [{}] * len(scheduler.timesteps))


def test_a_scheduler_that_goes_from_data_to_noise_is_named() -> None:
    pipe = stable_diffusion(scheduler=df.DPMSolverMultistepInverseScheduler(**SCALED))
    with pytest.raises(UnsupportedError, match="DPMSolverMultistepInverseScheduler does not go from noise to data"):
        parallelize(pipe)(**SD, num_inference_steps=12)


def test_the_score_may_be_frozen_where_something_is_left_of_the_data() -> None:
    call = dict(SD, num_inference_steps=8, output_type="latent", latents=normals(7, 2, 4, 8, 8))
    fast = parallelize(stable_diffusion(), tol=1e-4, linearization="score")
    assert float((fast(**call).images - stable_diffusion()(**call).images).square().mean().sqrt()) <= 1e-4
    with pytest.raises(ValueError, match="linearization 'score' needs alpha > 0 .*, got alpha = 0"):
        parallelize(CASES["SD3"].build(), linearization="score")(**CASES["SD3"].call, num_inference_steps=4)


@pytest.mark.parametrize("count", [3, 4, 5, 6])
def test_equal_levels_are_equal_whatever_their_rounding(count: int) -> None:
    # The last two calls are at one level, of which single precision leaves four digits.
    scheduler = df.KDPM2AncestralDiscreteScheduler(**SCALED)
    scheduler.set_timesteps(count)
    times = scheduler.timesteps
    found = levels(scheduler, times, probe(scheduler, times, [{}] * len(times)).scales).sigmas
    assert bool((found.diff() <= 0).all()) and float(found[-2]) == pytest.approx(0.0292, rel=1e-2)


def test_first_calls_of_midpoint_steps_are_made_again() -> None:
    # They act only through the second ones: by a network that answers as it did, not at all.
    pipe = stable_diffusion(scheduler=df.KDPM2AncestralDiscreteScheduler(**SCALED, use_karras_sigmas=True))
    call = dict(SD, num_inference_steps=50, output_type="latent", guidance_scale=1.0, latents=normals(7, 2, 4, 8, 8))
    want = pipe(**call, generator=torch.Generator().manual_seed(0)).images
    found = parallelize(pipe, tol=1e-2)(**call, generator=torch.Generator().manual_seed(0)).images
    # Of twelve images all were 3 to 5 times outside.
    assert float((found - want).square().flatten(1).mean(1).sqrt().max()) <= 1e-2
