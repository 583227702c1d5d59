"""Bare networks of diffusers: times, signs and clipping as their pipelines and schedulers have them."""

from __future__ import annotations

from typing import Any

import diffusers as df
import pytest
import torch
from tiny import flux, normals, pixels

import piadm


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


@pytest.mark.parametrize("how", [{"clip_sample_range": 0.5}, {"thresholding": True}], ids=["clip", "threshold"])
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
        (df.DDPMScheduler, {"clip_sample": False}),
        (df.EDMEulerScheduler, {}),
        (df.FlowMatchEulerDiscreteScheduler, {}),
    ],
)
def test_what_calls_a_bare_network_compiles_as_one_graph(kind: type, how: dict[str, Any]) -> None:
    torch._dynamo.reset()
    unet = pixels(df.DDPMPipeline, df.DDPMScheduler()).unet
    network = piadm.Denoiser.from_diffusers(unet, kind(**how)).network
    x, t = normals(1, 2, 3, 8, 8), torch.tensor([0.3, 0.5])
    with torch.no_grad():
        # Padded to another number of rows, kernels round otherwise.
        assert torch.allclose(piadm.CompiledNetwork(network, backend="eager")(x, t), network(x, t), atol=1e-5)


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
