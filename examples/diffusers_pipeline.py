"""A diffusers pipeline, parallel in time: the same prompt and generator, in sequence and in rounds.

    python examples/diffusers_pipeline.py

It needs ``piadm[diffusers]`` and takes some seconds.  The pipeline is a tiny Stable Diffusion with random weights, so
that nothing is downloaded; put ``StableDiffusionPipeline.from_pretrained(...)`` in its place and a prompt in that of
the embeddings.
"""

import diffusers
import torch

from piadm.interop.diffusers import parallelize

torch.manual_seed(0)
unet = diffusers.UNet2DConditionModel(
    sample_size=8,
    block_out_channels=(8, 16),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=16,
    norm_num_groups=4,
    attention_head_dim=4,
)
vae = diffusers.AutoencoderKL(
    block_out_channels=[8, 8],
    down_block_types=["DownEncoderBlock2D"] * 2,
    up_block_types=["UpDecoderBlock2D"] * 2,
    latent_channels=4,
    norm_num_groups=4,
)
pipe = diffusers.StableDiffusionPipeline(
    vae=vae.eval(),
    unet=unet.eval(),
    scheduler=diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    ),
    text_encoder=None,
    tokenizer=None,
    safety_checker=None,
    feature_extractor=None,
    requires_safety_checker=False,
)
pipe.set_progress_bar_config(disable=True)
prompt = dict(prompt_embeds=torch.randn(1, 5, 16), negative_prompt_embeds=torch.randn(1, 5, 16))
given = dict(num_inference_steps=50, guidance_scale=7.5, output_type="latent", **prompt)

wanted = pipe(**given, generator=torch.Generator().manual_seed(0)).images

fast = parallelize(pipe, tol=1e-2)  # pipe itself stays as it is
found = fast(**given, generator=torch.Generator().manual_seed(0)).images
stats, status = fast.last_solution.stats, fast.last_solution.status[0].name
error = (found - wanted).square().mean().sqrt()
print(f"{status} in {stats.rounds} rounds instead of 50; {stats.evaluations:.0f} rows of the network instead of 100")
print(f"RMS difference of the latents from the sequential pipeline's: {error:.1e}")
