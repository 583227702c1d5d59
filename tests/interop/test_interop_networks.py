"""Bare networks of diffusers: times, signs and clipping as their pipelines and schedulers have them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import diffusers as df
import pytest
import torch
from tiny import built, flux, normals, pixels, z_image

import piadm
from piadm.workers.fingerprint import fingerprint


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_a_bare_network_samples_as_its_pipeline(prediction: str) -> None:
    scheduler = df.DDIMScheduler(prediction_type=prediction, clip_sample=False)
    pipe = pixels(df.DDIMPipeline, scheduler)
    x = normals(1, 1, 3, 8, 8)
    scheduler.set_timesteps(20)
    denoiser = piadm.Denoiser.from_diffusers(pipe.unet, scheduler)
    grid = piadm.TimeGrid([*scheduler.timesteps.tolist(), -1.0])
    got = piadm.sample_sequential(denoiser, x.shape, method="ode", grid=grid, initial=x).sample
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(pipe.unet(x, t).sample, t, x).prev_sample
    # diffusers' table is single precision: see the parity of the shipped model.
    assert float((got - x).square().mean().sqrt()) <= 1e-3 * float(x.square().mean().sqrt())


CLIPS = pytest.mark.parametrize("how", [{"clip_sample_range": 0.5}, {"thresholding": True}], ids=["clip", "threshold"])


@CLIPS
def test_a_bare_networks_estimate_is_clipped_as_its_scheduler_says(how: dict[str, Any]) -> None:
    # Unlike DDIM's, the step of DDPM reads the estimate and the state alone: clipping the one is all there is to it.
    scheduler = df.DDPMScheduler(beta_schedule="squaredcos_cap_v2", num_train_timesteps=100, **how)
    network, x = pixels(df.DDPMPipeline, scheduler).unet, normals(1, 2, 3, 8, 8)
    denoiser = piadm.Denoiser.from_diffusers(network, scheduler)
    with torch.no_grad():
        got = denoiser(x, torch.tensor([90.0, 10.0]))
        for row, t in ((0, 90), (1, 10)):
            x0 = scheduler.step(network(x[row : row + 1], t).sample, t, x[row : row + 1]).pred_original_sample
            assert float((got[row] - x0[0]).abs().max()) <= 1e-4
            assert float(x0.abs().max()) <= 1


@CLIPS
def test_a_guided_estimate_is_clipped_after_guidance(how: dict[str, Any]) -> None:
    scheduler = df.DDPMScheduler(num_train_timesteps=100, **how)
    network = built(
        df.UNet2DModel, sample_size=8, block_out_channels=(32,), down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",), num_class_embeds=2, norm_num_groups=4,
    )  # fmt: skip
    denoiser = piadm.Denoiser.from_diffusers(network, scheduler)
    guidance = piadm.GuidedNetwork(denoiser.network, 3.0, {"class_labels": 0})
    x, t, label = normals(1, 1, 3, 8, 8), torch.tensor([60.0]), torch.tensor([1])
    with torch.no_grad():
        got = replace(denoiser, network=guidance)(x, t, class_labels=label)
        null, given = (network(x, 60, class_labels=label - away).sample for away in (1, 0))
        want = scheduler.step(null + 3.0 * (given - null), 60, x).pred_original_sample
        apart = denoiser(x, t, class_labels=label - 1)
        apart = apart + 3.0 * (denoiser(x, t, class_labels=label) - apart)
    assert float((got - want).abs().max()) <= 1e-4
    assert float((apart - want).abs().max()) >= 1e-2  # clipped one by one, estimates are others


def test_ranges_of_clipping_are_told_apart() -> None:
    network = pixels(df.DDPMPipeline, df.DDPMScheduler()).unet
    ways = [{"clip_sample_range": 0.5}, {}, {"thresholding": True}, {"thresholding": True, "sample_max_value": 1.5}]
    ways += [{"thresholding": True, "dynamic_thresholding_ratio": 0.9}, {"clip_sample": False}]
    told = [fingerprint(piadm.Denoiser.from_diffusers(network, df.DDPMScheduler(**how))) for how in ways]
    again = [fingerprint(piadm.Denoiser.from_diffusers(network, df.DDPMScheduler(**how))) for how in ways]
    assert len(set(told)) == len(ways) and told == again


def test_a_bare_flow_network_and_a_preconditioned_one() -> None:
    transformer, x, t = flux().transformer, normals(1, 2, 4, 4), torch.tensor([0.7, 0.2])
    condition = dict(encoder_hidden_states=normals(2, 2, 5, 16), pooled_projections=normals(3, 2, 16))
    condition |= dict(img_ids=torch.zeros(4, 3), txt_ids=torch.zeros(5, 3))
    denoiser = piadm.Denoiser.from_diffusers(transformer, df.FlowMatchEulerDiscreteScheduler())
    velocity = transformer(x, timestep=t, **condition).sample  # the transformer multiplies by 1000 itself
    assert torch.allclose(denoiser(x, t, **condition), x - t[:, None, None] * velocity, atol=1e-5)

    scheduler, network = df.EDMEulerScheduler(sigma_data=0.5), pixels(df.DDPMPipeline, df.DDPMScheduler()).unet
    x, t = normals(4, 2, 3, 8, 8), torch.tensor([2.0, 0.3])
    sigma = t[:, None, None, None]
    inner = network(x / (sigma**2 + 0.25).sqrt(), 0.25 * t.log()).sample
    want = 0.25 / (sigma**2 + 0.25) * x + 0.5 * sigma / (sigma**2 + 0.25).sqrt() * inner
    assert torch.allclose(piadm.Denoiser.from_diffusers(network, scheduler)(x, t), want, atol=1e-5)


@pytest.mark.parametrize(
    "kind, how",
    [
        (df.DDPMScheduler, {}),  # it clips
        (df.DDPMScheduler, {"thresholding": True}),
        (df.DDPMScheduler, {"clip_sample": False}),
        (df.EDMEulerScheduler, {}),
        (df.FlowMatchEulerDiscreteScheduler, {}),
    ],
)
def test_what_calls_a_bare_network_compiles_as_one_graph(kind: type, how: dict[str, Any]) -> None:
    torch._dynamo.reset()
    unet = pixels(df.DDPMPipeline, df.DDPMScheduler()).unet
    denoiser = piadm.Denoiser.from_diffusers(unet, kind(**how))
    compiled = replace(denoiser, network=piadm.CompiledNetwork(denoiser.network, backend="eager"))
    x, t = normals(1, 2, 3, 8, 8), torch.tensor([0.3, 0.5])
    with torch.no_grad():
        # Padded to another number of rows, kernels round otherwise.
        assert torch.allclose(compiled(x, t), denoiser(x, t), atol=1e-5)


def test_a_bare_network_that_takes_lists_is_refused() -> None:
    with pytest.raises(TypeError, match="rows as one tensor, got a ZImageTransformer2DModel, which takes lists"):
        piadm.Denoiser.from_diffusers(z_image().transformer, df.FlowMatchEulerDiscreteScheduler())


def test_from_diffusers_names_what_it_cannot_use() -> None:
    network = pixels(df.DDPMPipeline, df.DDPMScheduler()).unet
    with pytest.raises(TypeError, match="network must be a diffusers model that reads a timestep"):
        piadm.Denoiser.from_diffusers(torch.nn.Linear(1, 1), df.DDPMScheduler())
    with pytest.raises(TypeError, match="scheduler must be a diffusers scheduler"):
        piadm.Denoiser.from_diffusers(network, "ddpm")
    with pytest.raises(TypeError, match="scheduler must be a diffusers scheduler, got <class"):
        piadm.Denoiser.from_diffusers(network, df.DDPMScheduler)
    with pytest.raises(ValueError, match="rescale_betas_zero_snr, got DDIMScheduler with .* down to 0"):
        piadm.Denoiser.from_diffusers(network, df.DDIMScheduler(rescale_betas_zero_snr=True))
    with pytest.raises(ValueError, match="table alphas_cumprod"):
        piadm.Denoiser.from_diffusers(network, df.IPNDMScheduler())
