"""Bare flow networks, used as their own pipelines use them; and the noise levels of single steps."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import diffusers as df
import pytest
import torch
from tiny import CONDITIONAL, SQUARE, TEXTS, XL, built, flux, masks, normals, prompts, quiet
from tiny import stable_diffusion as sd
from tiny import stable_diffusion_3 as sd3
from torch import Tensor, nn

import piadm
from piadm.interop.diffusers import parallelize
from piadm.interop.diffusers.levels import estimate, levels
from piadm.interop.diffusers.probe import UnsupportedError, probe
from piadm.interop.diffusers.proxies import signature

FLOW = dict(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
HIDDEN = dict(num_layers=1, num_attention_heads=2)
EULER = df.FlowMatchEulerDiscreteScheduler


def bare(kind: type, network: nn.Module, *, without: tuple[str, ...] = TEXTS[:2], **config: Any) -> Any:  # noqa: ANN401
    """A pipeline that needs no autoencoder for latents."""
    return quiet(kind, "vae", *without, transformer=network, scheduler=EULER(shift=3.0, **config))


def aura_flow() -> Any:  # noqa: ANN401 - a pipeline
    network = built(
        df.AuraFlowTransformer2DModel, sample_size=8, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16, pos_embed_max_size=64,
    )  # fmt: skip
    return bare(df.AuraFlowPipeline, network)


def lumina() -> Any:  # noqa: ANN401 - a pipeline
    network = built(
        df.Lumina2Transformer2DModel, sample_size=8, in_channels=4, hidden_size=24, num_refiner_layers=1,
        num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 4, 4), axes_lens=(16, 16, 16), cap_feat_dim=16, **HIDDEN,
    )  # fmt: skip
    return bare(df.Lumina2Pipeline, network)


WAN = dict(
    attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=8, ffn_dim=16, rope_max_seq_len=16,
    **HIDDEN,
)  # fmt: skip


def wan() -> Any:  # noqa: ANN401 - a pipeline
    return bare(df.WanPipeline, built(df.WanTransformer3DModel, **WAN))


def sana(scale: float = 1.0) -> Any:  # noqa: ANN401 - a pipeline
    network = built(
        df.SanaTransformer2DModel, in_channels=4, out_channels=4, attention_head_dim=8, num_cross_attention_heads=2,
        cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=16, sample_size=8, timestep_scale=scale,
        **HIDDEN,
    )  # fmt: skip
    return bare(df.SanaPipeline, network)


def mochi() -> Any:  # noqa: ANN401 - a pipeline
    network = built(
        df.MochiTransformer3DModel, attention_head_dim=8, pooled_projection_dim=8, in_channels=4, text_embed_dim=16,
        time_embed_dim=8, **HIDDEN,
    )  # fmt: skip
    return bare(df.MochiPipeline, network, invert_sigmas=True)


ONE = dict(guidance_scale=1.0)
PLAIN = dict(prompt_embeds=prompts()["prompt_embeds"], **ONE)
MASKED = PLAIN | dict(prompt_attention_mask=masks(2)["prompt_attention_mask"])
OWN: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "Flux": (flux, CONDITIONAL),
    "SD3": (sd3, SQUARE | XL | ONE),
    "AuraFlow": (aura_flow, SQUARE | MASKED),
    "Lumina 2": (lumina, SQUARE | MASKED),
    "Wan": (wan, SQUARE | PLAIN | dict(num_frames=5)),
    "Sana": (sana, dict(height=64, width=64, use_resolution_binning=False, **MASKED)),
    "Sana, scaled": (lambda: sana(0.25), dict(height=64, width=64, use_resolution_binning=False, **MASKED)),
    "Mochi": (mochi, SQUARE | MASKED | dict(num_frames=7)),
}


@pytest.mark.parametrize("name", OWN)
def test_a_bare_flow_network_is_used_as_its_own_pipeline_uses_it(name: str) -> None:
    build, call = OWN[name]
    pipe, asked, stepped = build(), [], []
    step = pipe.scheduler.step

    @functools.wraps(step)
    def spied(output: Tensor, t: Tensor, sample: Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        stepped.append((output, sample))
        return step(output, t, sample, *args, **kwargs)

    pipe.scheduler.step = spied
    names = signature(pipe.transformer)
    hook = pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: asked.append(dict(names.bind(*args, **kwargs).arguments)), with_kwargs=True
    )
    pipe(**call, num_inference_steps=3, output_type="latent")
    hook.remove()
    denoiser = piadm.Denoiser.from_diffusers(pipe.transformer, pipe.scheduler)
    inverted = pipe.scheduler.config.invert_sigmas
    assert len(asked) == len(stepped) == 3
    for given, (output, sample), sigma in zip(asked, stepped, pipe.scheduler.sigmas, strict=False):
        x = given.pop("hidden_states").float()
        del given["timestep"]
        t = 1 - sigma if inverted else sigma
        want = sample + t * output if inverted else sample - t * output
        with torch.no_grad():
            got = denoiser(x, t.expand(len(x)), **given)
        # The pipeline's timestep is rounded to single precision before the sines of it are taken.
        assert torch.allclose(got, want.float(), rtol=1e-3, atol=1e-3)


class Recorder(nn.Module):
    """A network that keeps the times it is given."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        self.seen.append(timestep)
        return self.output


TOLD = [
    df.DPMSolverMultistepScheduler, df.UniPCMultistepScheduler, df.DEISMultistepScheduler,
    df.DPMSolverSinglestepScheduler,
]  # fmt: skip


@pytest.mark.parametrize("kind", TOLD)
def test_a_scheduler_that_is_told_of_flows_is_a_flow(kind: type) -> None:
    more = {} if kind is not df.DEISMultistepScheduler else dict(solver_type="logrho")
    scheduler, network = kind(**FLOW, **more), Recorder(normals(2, 1, 3, 4, 4))
    denoiser = piadm.Denoiser.from_diffusers(network, scheduler)
    scheduler.set_timesteps(7)
    x = normals(1, 1, 3, 4, 4)
    for index, timestep in enumerate(scheduler.timesteps):
        t = scheduler.sigmas[index : index + 1]
        got = denoiser(x, t)
        # These schedulers cut their times to whole numbers; the product may be rounded across one.
        assert -1e-3 < float(network.seen[-1]) - float(timestep) < 1
        scheduler._step_index = index
        if kind is not df.DEISMultistepScheduler:  # whose formulas are of the noise
            assert torch.allclose(got, scheduler.convert_model_output(network.output, sample=x), atol=1e-5)
        assert torch.allclose(got, x - t * network.output, atol=1e-5)


def named(name: str, **config: Any) -> nn.Module:  # noqa: ANN401 - a network's own
    """A network of a class of this name, of which only the name is known here."""
    network = type(name, (Recorder,), {})(normals(2, 2, 3, 4, 4))
    network.config = df.configuration_utils.FrozenDict(config)
    return network


#: Time at noise level 0.3, and sign of the velocity, in the loops of diffusers' pipelines.
CONVENTIONS = [
    *[(f"{name}Transformer2DModel", 0.3, 1) for name in ("Flux2", "Chroma", "LongCatImage", "OvisImage", "QwenImage")],
    ("Krea2Transformer2DModel", 0.3, 1),
    ("CosmosTransformer3DModel", 0.3, 1),
    ("LuminaNextDiT2DModel", 0.7, -1),
    ("Ideogram4Transformer2DModel", 0.7, -1),
    ("NucleusMoEImageTransformer2DModel", 0.3, -1),
    ("HiDreamImageTransformer2DModel", 300, -1),
    ("HunyuanVideoTransformer3DModel", 300, 1),
    ("MyOwnTransformer", 300, 1),
]


@pytest.mark.parametrize("name, time, sign", CONVENTIONS)
def test_times_and_signs_by_name(name: str, time: float, sign: int) -> None:
    network, x, t = named(name), normals(1, 2, 3, 4, 4), torch.full((2,), 0.3)
    got = piadm.Denoiser.from_diffusers(network, EULER())(x, t)
    assert torch.allclose(network.seen[0], torch.full((2,), float(time)), rtol=1e-6)
    assert torch.allclose(got, x - 0.3 * sign * network.output, atol=1e-6)


def test_a_time_of_another_name_is_found() -> None:
    class Plural(Recorder):
        def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
            return super().forward(x, timesteps)

    network = Plural(normals(2, 2, 3, 4, 4))
    piadm.Denoiser.from_diffusers(network, EULER())(normals(1, 2, 3, 4, 4), torch.full((2,), 0.3))
    assert torch.allclose(network.seen[0], torch.full((2,), 300.0))


@pytest.mark.parametrize(
    "name, why", [("CogView4Transformer2DModel", "before the shift"), ("AnyFlowTransformer3DModel", "a second time")]
)
def test_a_time_that_does_not_follow_from_the_level_is_refused(name: str, why: str) -> None:
    with pytest.raises(ValueError, match=f"{name} does not: .*{why}.* module around it"):
        piadm.Denoiser.from_diffusers(named(name), EULER())


def test_networks_and_schedulers_that_contradict_a_flow_are_refused() -> None:
    with pytest.raises(ValueError, match="PRXTransformer2DModel of pixels, which predicts x_0"):
        piadm.Denoiser.from_diffusers(named("PRXTransformer2DModel", in_channels=3), EULER())
    assert piadm.Denoiser.from_diffusers(named("PRXTransformer2DModel", in_channels=16), EULER())
    mixed = df.DPMSolverMultistepScheduler(use_flow_sigmas=True)
    with pytest.raises(ValueError, match="prediction_type 'flow_prediction' where it has use_flow_sigmas=True, got"):
        piadm.Denoiser.from_diffusers(named("Any"), mixed)
    with pytest.raises(ValueError, match="use_flow_sigmas=True and flow_prediction, or .* with 'flow_prediction'"):
        piadm.Denoiser.from_diffusers(named("Any"), df.UniPCMultistepScheduler(prediction_type="flow_prediction"))


@pytest.mark.parametrize("kind", [df.DPMSolverMultistepScheduler, df.SASolverScheduler])
def test_steps_of_one_timestep_have_their_own_levels(kind: type) -> None:
    scheduler = kind(beta_schedule="linear", use_exponential_sigmas=True, thresholding=True)
    scheduler.set_timesteps(100)
    times = scheduler.timesteps
    assert len(set(times.tolist())) < len(times)
    found = levels(scheduler, times, torch.ones(100))
    sigmas = scheduler.sigmas[:-1].double()
    # The schedule's own level of every step, in float64.
    assert torch.allclose(found.sigmas[:-1] / found.alphas[:-1], sigmas, rtol=1e-12)
    scheduler.set_begin_index(30)
    late = levels(scheduler, times[30:], torch.ones(70))
    assert torch.equal(late.sigmas[:-1], found.sigmas[30:-1])


def test_steps_of_one_timestep_clip_their_own_estimates() -> None:
    few = dict(num_train_timesteps=30, beta_schedule="linear", beta_end=0.6)
    scheduler = df.DPMSolverMultistepScheduler(**few, use_exponential_sigmas=True, thresholding=True)
    pipe = sd(scheduler=scheduler)
    call = SQUARE | PLAIN | dict(num_inference_steps=20, output_type="latent", latents=normals(3, 2, 4, 8, 8))
    want, got = pipe(**call).images, parallelize(pipe, tol=1e-4, nodes="all")(**call).images
    assert len(set(pipe.scheduler.timesteps.tolist())) < 20
    assert float((got - want).square().mean().sqrt()) <= 1e-4  # what was asked for


def test_a_level_that_says_nothing_of_the_data_is_named() -> None:
    scheduler = EULER()
    scheduler.set_timesteps(sigmas=[1.0, 0.5, 0.0])
    probed = probe(scheduler, scheduler.timesteps, [{}] * len(scheduler.timesteps))
    at = levels(scheduler, scheduler.timesteps, probed.scales)
    with pytest.raises(UnsupportedError, match=r"flow_prediction says nothing of the data at timestep 0 \(sigma = 0\)"):
        estimate(scheduler, scheduler.timesteps, at, probed, [{}] * len(scheduler.timesteps))


def test_a_flow_whose_levels_are_those_of_the_data_is_its_sequential_self() -> None:
    pipe = mochi()
    call = SQUARE | prompts() | masks(2) | dict(num_frames=7, num_inference_steps=12, output_type="latent")
    want = pipe(**call, generator=torch.Generator().manual_seed(0))[0]
    fast = parallelize(pipe, tol=1e-4, nodes="all")
    got = fast(**call, generator=torch.Generator().manual_seed(0))[0]
    assert float((got - want).square().mean().sqrt()) <= 1e-4  # what was asked for
    # The other way round the state would say nothing of the data at the end; as many rounds as for other flows.
    assert fast.last_solution is not None and fast.last_solution.stats.rounds <= 9
