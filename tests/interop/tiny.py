"""Pipelines of every architecture, tiny and randomly initialised, and what to call them with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers as df
import torch
from torch import Tensor, nn

SCALED = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
NO_CHECKER = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def normals(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def image(size: int, batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(9))


def mask(size: int) -> Tensor:
    return (image(size)[:, :1] > 0.5).float()


def prompts(batch: int = 2, length: int = 5, width: int = 16) -> dict[str, Tensor]:
    size = (batch, length, width)
    return dict(prompt_embeds=normals(1, *size), negative_prompt_embeds=normals(2, *size))


def masks(batch: int = 1, length: int = 5) -> dict[str, Tensor]:
    ones = torch.ones(batch, length, dtype=torch.long)
    return dict(prompt_attention_mask=ones, negative_prompt_attention_mask=ones)


def pooled(batch: int = 2) -> dict[str, Tensor]:
    return dict(pooled_prompt_embeds=normals(3, batch, 16), negative_pooled_prompt_embeds=normals(4, batch, 16))


def built(kind: type[nn.Module], **settings: Any) -> nn.Module:  # noqa: ANN401 - a network's own
    """A network with weights of its own seed; layers that start as zero, as adapters do, are given small ones."""
    torch.manual_seed(0)
    network = kind(**settings).eval()
    for parameter in network.parameters():
        if not parameter.any() and parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.05)
    return network


def quiet(kind: type, *without: str, **parts: Any) -> Any:  # noqa: ANN401 - a pipeline
    """A pipeline without a progress bar; ``without`` names components that it does not need."""
    pipe = kind(**dict.fromkeys(without), **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def vae(channels: int = 4, **more: Any) -> nn.Module:  # noqa: ANN401 - a network's own
    more |= dict(down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2)
    return built(df.AutoencoderKL, block_out_channels=[8, 8], latent_channels=channels, norm_num_groups=4, **more)


SHIFTED = dict(shift_factor=0.06, scaling_factor=1.5)
UNET = dict(
    block_out_channels=(8, 16), layers_per_block=1, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    cross_attention_dim=16, norm_num_groups=4, attention_head_dim=4,
)  # fmt: skip
UP = dict(sample_size=8, out_channels=4, up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))


def unet(channels: int = 4, **more: Any) -> nn.Module:  # noqa: ANN401 - a network's own
    return built(df.UNet2DConditionModel, in_channels=channels, **UNET | UP | more)


def stable_diffusion_adapter() -> Any:  # noqa: ANN401 - a pipeline
    network = unet(down_block_types=UNET["down_block_types"][::-1], up_block_types=UP["up_block_types"][::-1])
    adapter = built(df.T2IAdapter, in_channels=3, channels=[8, 16], num_res_blocks=1, downscale_factor=2)
    return stable_diffusion(df.StableDiffusionAdapterPipeline, unet=network, adapter=adapter)


def controlnet() -> nn.Module:
    return built(df.ControlNetModel, in_channels=4, conditioning_embedding_out_channels=(16, 32), **UNET)


def ddim(**more: Any) -> Any:  # noqa: ANN401 - a scheduler
    return df.DDIMScheduler(**SCALED, clip_sample=False, set_alpha_to_one=False, steps_offset=1, **more)


def stable_diffusion(kind: type = df.StableDiffusionPipeline, channels: int = 4, **parts: Any) -> Any:  # noqa: ANN401
    parts = dict(vae=vae(), unet=unet(channels), scheduler=ddim()) | parts
    return quiet(kind, "text_encoder", "tokenizer", **NO_CHECKER, **parts)


def latent_consistency() -> Any:  # noqa: ANN401 - a pipeline
    parts = dict(unet=unet(time_cond_proj_dim=8), scheduler=df.LCMScheduler(**SCALED), image_encoder=None)
    return stable_diffusion(df.LatentConsistencyModelPipeline, **parts)


def pixels(kind: type, scheduler: Any, **more: Any) -> Any:  # noqa: ANN401 - a pipeline
    blocks = dict(down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"))
    network = built(
        df.UNet2DModel, sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        attention_head_dim=4, **blocks, **more,
    )  # fmt: skip
    return quiet(kind, unet=network, scheduler=scheduler)


def stable_diffusion_xl(kind: type = df.StableDiffusionXLPipeline, **parts: Any) -> Any:  # noqa: ANN401 - a pipeline
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    sizes = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1, projection_dim=16)
    text = CLIPTextModelWithProjection(CLIPTextConfig(vocab_size=50, **sizes)).eval()
    added = dict(addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=64)
    parts = dict(vae=vae(), unet=unet(transformer_layers_per_block=1, **added), text_encoder_2=text) | parts
    scheduler = df.EulerDiscreteScheduler(**SCALED, timestep_spacing="leading", steps_offset=1)
    return quiet(kind, "text_encoder", "tokenizer", "tokenizer_2", **{"scheduler": scheduler, **parts})


TEXTS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")


SD3 = dict(
    sample_size=16, patch_size=1, in_channels=4, out_channels=4, attention_head_dim=8, num_attention_heads=2,
    caption_projection_dim=16, joint_attention_dim=16, pooled_projection_dim=16,
)  # fmt: skip


def stable_diffusion_3(kind: type = df.StableDiffusion3Pipeline, **parts: Any) -> Any:  # noqa: ANN401 - a pipeline
    parts |= dict(transformer=built(df.SD3Transformer2DModel, num_layers=2, **SD3), vae=vae(**SHIFTED))
    scheduler = df.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return quiet(kind, *TEXTS, "text_encoder_3", "tokenizer_3", scheduler=scheduler, **parts)


def stable_diffusion_3_controlnet() -> Any:  # noqa: ANN401 - a pipeline
    control = built(df.SD3ControlNetModel, num_layers=1, **SD3)
    return stable_diffusion_3(df.StableDiffusion3ControlNetPipeline, controlnet=control)


def flux(kind: type = df.FluxPipeline, channels: int = 4, **more: Any) -> Any:  # noqa: ANN401 - a pipeline
    network = built(
        df.FluxTransformer2DModel, patch_size=1, in_channels=channels, out_channels=4, num_layers=1,
        num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16,
        pooled_projection_dim=16, axes_dims_rope=[4, 4, 8], **more,
    )  # fmt: skip
    scheduler = df.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return quiet(kind, *TEXTS, transformer=network, vae=vae(1, **SHIFTED), scheduler=scheduler)


def z_image(kind: str = "ZImagePipeline") -> Any:  # noqa: ANN401 - a pipeline
    network = built(
        df.ZImageTransformer2DModel, in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
        cap_feat_dim=16, axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )  # fmt: skip
    parts = dict(transformer=network, vae=vae(1, **SHIFTED), scheduler=df.FlowMatchEulerDiscreteScheduler(shift=3.0))
    return quiet(getattr(df, kind), "text_encoder", "tokenizer", **parts)


def pixart() -> Any:  # noqa: ANN401 - a pipeline
    network = built(
        df.PixArtTransformer2DModel, sample_size=8, num_layers=1, attention_head_dim=8, num_attention_heads=3,
        in_channels=4, out_channels=8, caption_channels=16, cross_attention_dim=24,
    )  # fmt: skip
    scheduler = df.DPMSolverMultistepScheduler(beta_schedule="linear")
    parts = dict(vae=vae(), transformer=network, scheduler=scheduler)
    return quiet(df.PixArtAlphaPipeline, "text_encoder", "tokenizer", **parts)


def dit() -> Any:  # noqa: ANN401 - a pipeline
    network = built(
        df.DiTTransformer2DModel, sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8,
        num_attention_heads=2, in_channels=4, out_channels=8,
    )  # fmt: skip
    return quiet(df.DiTPipeline, transformer=network, vae=vae(), scheduler=df.DDIMScheduler(clip_sample=False))


def ltx_video() -> Any:  # noqa: ANN401 - a pipeline
    network = built(
        df.LTXVideoTransformer3DModel, in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8,
        cross_attention_dim=16, num_layers=1, caption_channels=16,
    )  # fmt: skip
    codec = built(
        df.AutoencoderKLLTXVideo, latent_channels=8, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5, patch_size=1, patch_size_t=1,
        spatio_temporal_scaling=(True, True, False, False), decoder_spatio_temporal_scaling=(True, True, False, False),
    )  # fmt: skip
    scheduler = df.FlowMatchEulerDiscreteScheduler()
    return quiet(df.LTXPipeline, "text_encoder", "tokenizer", transformer=network, vae=codec, scheduler=scheduler)


def animate_diff(kind: type = df.AnimateDiffPipeline, **more: nn.Module) -> Any:  # noqa: ANN401 - a pipeline
    motion = built(
        df.MotionAdapter, block_out_channels=(8, 16), motion_layers_per_block=1, motion_norm_num_groups=2,
        motion_num_attention_heads=4,
    )  # fmt: skip
    parts = dict(vae=vae(), unet=unet(), motion_adapter=motion, scheduler=ddim(), **more)
    pipe = quiet(kind, "text_encoder", "tokenizer", **parts)
    pipe.unet.eval()
    return pipe


def sparse_control() -> nn.Module:
    return built(
        df.SparseControlNetModel, block_out_channels=(8, 16), layers_per_block=1, conditioning_channels=3,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"), norm_num_groups=2, cross_attention_dim=16,
        attention_head_dim=2, motion_num_attention_heads=2, use_simplified_condition_embedding=False,
        conditioning_embedding_out_channels=(4, 8),
    )  # fmt: skip


def stable_audio() -> Any:  # noqa: ANN401 - a pipeline
    from diffusers.pipelines.stable_audio import StableAudioProjectionModel

    network = built(
        df.StableAudioDiTModel, sample_size=4, in_channels=3, out_channels=3, num_layers=1, attention_head_dim=4,
        num_attention_heads=2, num_key_value_attention_heads=2, cross_attention_dim=4, time_proj_dim=8,
        global_states_input_dim=8, cross_attention_input_dim=4,
    )  # fmt: skip
    codec = built(
        df.AutoencoderOobleck, encoder_hidden_size=6, downsampling_ratios=[1, 2], decoder_channels=3,
        decoder_input_channels=3, channel_multiples=[2, 4], sampling_rate=4,
    )  # fmt: skip
    projection = built(StableAudioProjectionModel, text_encoder_dim=4, conditioning_dim=4, min_value=0, max_value=32)
    scheduler = df.EDMDPMSolverMultistepScheduler(prediction_type="v_prediction", sigma_data=1.0)
    parts = dict(transformer=network, vae=codec, projection_model=projection, scheduler=scheduler)
    return quiet(df.StableAudioPipeline, "text_encoder", "tokenizer", **parts)


@dataclass(frozen=True)
class Case:
    """A pipeline and what to call it with."""

    build: Callable[[], Any]
    call: dict[str, Any] = field(default_factory=dict)
    output: str = "latent"


SQUARE = dict(height=16, width=16)
SD, XL = dict(**SQUARE, **prompts()), dict(**prompts(), **pooled())
FLUX = dict(height=8, width=8, **prompts(), **pooled())
CONDITIONAL = {name: value for name, value in FLUX.items() if not name.startswith("negative")}
IMAGE = dict(image=image(16))
INPAINT = dict(**IMAGE, mask_image=mask(16))
Z_IMAGE = dict(height=32, width=32, guidance_scale=0, prompt_embeds=list(prompts()["prompt_embeds"]))
AUDIO = prompts(1, width=4) | dict(audio_end_in_s=1.0)
AUDIO |= {name.removeprefix("prompt_").replace("prompt_", ""): value for name, value in masks().items()}
BARE = dict(image_encoder=None)

CASES: dict[str, Case] = {
    "DDPM": Case(lambda: pixels(df.DDPMPipeline, df.DDPMScheduler()), dict(batch_size=2), "pt"),
    "DDIM": Case(
        lambda: pixels(df.DDIMPipeline, df.DDIMScheduler(clip_sample=False)), dict(batch_size=2, eta=0.5), "pt"
    ),
    "SD": Case(stable_diffusion, SD | dict(guidance_scale=1.0)),
    "SD, guidance": Case(stable_diffusion, SD | dict(num_images_per_prompt=2)),
    "SD, rescaled guidance": Case(stable_diffusion, SD | dict(guidance_rescale=0.7)),
    "SD, img2img": Case(lambda: stable_diffusion(df.StableDiffusionImg2ImgPipeline, **BARE), prompts() | IMAGE),
    "SD, inpaint, 4 channels": Case(
        lambda: stable_diffusion(df.StableDiffusionInpaintPipeline, **BARE), SD | INPAINT
    ),
    "SD, inpaint, 9 channels": Case(
        lambda: stable_diffusion(df.StableDiffusionInpaintPipeline, 9, **BARE), SD | INPAINT
    ),
    "SD, ControlNet": Case(
        lambda: stable_diffusion(df.StableDiffusionControlNetPipeline, controlnet=controlnet(), **BARE),
        prompts() | IMAGE | dict(control_guidance_end=0.5),
    ),
    "SD, ControlNet, guess mode": Case(
        lambda: stable_diffusion(df.StableDiffusionControlNetPipeline, controlnet=controlnet(), **BARE),
        prompts() | IMAGE | dict(guess_mode=True),
    ),
    "SD, T2I adapter": Case(stable_diffusion_adapter, SD | IMAGE),
    "SD, perturbed attention": Case(lambda: stable_diffusion(df.StableDiffusionPAGPipeline, **BARE), SD),
    "SD, pix2pix": Case(
        lambda: stable_diffusion(df.StableDiffusionInstructPix2PixPipeline, 8, **BARE), prompts() | IMAGE
    ),
    "SDXL": Case(stable_diffusion_xl, SQUARE | XL),
    "SDXL, first of two stages": Case(stable_diffusion_xl, SQUARE | XL | dict(denoising_end=0.6)),
    "SDXL, inpaint": Case(lambda: stable_diffusion_xl(df.StableDiffusionXLInpaintPipeline), SQUARE | XL | INPAINT),
    "SD3": Case(stable_diffusion_3, dict(height=16, width=16, **XL)),
    "SD3, img2img": Case(
        lambda: stable_diffusion_3(df.StableDiffusion3Img2ImgPipeline), SQUARE | XL | IMAGE | dict(strength=0.7)
    ),
    "SD3, ControlNet of one block": Case(
        stable_diffusion_3_controlnet, dict(SQUARE, control_image=image(16), **XL)
    ),
    "Flux": Case(flux, CONDITIONAL),
    "Flux, true guidance": Case(lambda: flux(guidance_embeds=True), FLUX | dict(true_cfg_scale=3.0)),
    "Flux, fill": Case(
        lambda: flux(df.FluxFillPipeline, 24), CONDITIONAL | dict(image=image(8), mask_image=mask(8))
    ),
    "Flux, inpaint": Case(
        lambda: flux(df.FluxInpaintPipeline), CONDITIONAL | dict(image=image(8), mask_image=mask(8))
    ),
    "Z-Image": Case(z_image, Z_IMAGE | dict(prompt_embeds=[prompts()["prompt_embeds"][0], torch.ones(9, 16)])),
    "Z-Image, guided": Case(z_image, Z_IMAGE | dict(guidance_scale=3, negative_prompt_embeds=[normals(4, 3, 16)] * 2)),
    "Z-Image, inpaint": Case(
        lambda: z_image("ZImageInpaintPipeline"), Z_IMAGE | dict(image=image(32), mask_image=mask(32))
    ),
    "PixArt": Case(pixart, SD | masks(2) | dict(negative_prompt=None, use_resolution_binning=False)),
    "DiT": Case(dit, dict(class_labels=[3, 5]), "np"),
    "LTX-Video": Case(ltx_video, dict(height=32, width=32, num_frames=9, **prompts(1), **masks())),
    "AnimateDiff": Case(animate_diff, SD | dict(num_frames=3)),
    "AnimateDiff, SparseCtrl of one sample": Case(
        lambda: animate_diff(df.AnimateDiffSparseControlNetPipeline, controlnet=sparse_control()),
        SD | prompts(1) | dict(num_frames=3, conditioning_frames=image(16, 1), controlnet_frame_indices=[1])
    ),
    "Stable Audio": Case(stable_audio, AUDIO),
}
