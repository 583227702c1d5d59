"""``parallelize`` beside diffusers' own ParaDiGMS pipeline and the sequential one, on the shipped network.

    python benchmarks/diffusers_paradigms.py [--num 2] [--long] [--threads 2] [--json paradigms.json]

All three are Stable Diffusion pipelines around the shipped U-Net, which ignores the prompt, without guidance, with
the same scheduler, initial latents and noise.  Rounds are calls of the network in a row and evaluations its rows per
sample, counted in the network itself; the error is the worst sample's RMS difference from the sequential pipeline.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from _common import Row, options, print_table, write_json
from diffusers import AutoencoderKL, DDIMParallelScheduler, DDPMParallelScheduler, StableDiffusionPipeline, UNet2DModel
from torch import Tensor

import piadm
from piadm.interop.diffusers import parallelize
from piadm.timing import seconds

TABLE = dict(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", prediction_type="v_prediction", clip_sample=False)
RUNS = {"DDIM": (DDIMParallelScheduler, (50, 200)), "DDPM": (DDPMParallelScheduler, (200, 1000))}
#: ParaDiGMS' tolerances; 0.1 is its default.
TOLERANCES = (0.1, 0.03, 0.01)
#: Rows per round of ParaDiGMS.
WINDOWS = (50, 200)


class Unconditional(UNet2DModel):
    """The shipped U-Net with a text-conditional one's arguments; counts its calls."""

    calls, rows = 0, 0

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        return_dict: bool = True,
        **ignored: Any,  # noqa: ANN401 - whatever the pipeline has
    ) -> Any:  # noqa: ANN401 - as the network returns it
        self.calls, self.rows = self.calls + 1, self.rows + len(sample)
        return super().forward(sample, timestep, return_dict=return_dict)


def pipelines() -> tuple[Any, Any, piadm.Denoiser]:
    """The sequential pipeline and ParaDiGMS, on one network."""
    from diffusers import StableDiffusionParadigmsPipeline

    denoiser = piadm.load("fashion")
    network = Unconditional(**dict(denoiser.network.config))
    network.register_to_config(time_cond_proj_dim=None)  # the pipeline asks for it
    network.load_state_dict(denoiser.network.state_dict())
    codec = AutoencoderKL(
        block_out_channels=[8, 8], down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=1, norm_num_groups=4,
    )  # fmt: skip
    parts = dict(vae=codec, unet=network.eval(), scheduler=DDIMParallelScheduler(**TABLE))
    parts |= dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    parts |= dict(requires_safety_checker=False)
    both = [kind(**parts) for kind in (StableDiffusionPipeline, StableDiffusionParadigmsPipeline)]
    for pipe in both:
        pipe.set_progress_bar_config(disable=True)
    return both[0], both[1], denoiser


def compare(name: str, steps: int, num: int) -> Iterator[Row]:
    """One scheduler and number of steps: the sequential pipeline, this library, and ParaDiGMS with several settings."""
    slow, paradigms, denoiser = pipelines()
    network = slow.unet
    for pipe in (slow, paradigms):
        pipe.scheduler = RUNS[name][0](**TABLE)
    want: Tensor | None = None
    data = dict(data_mean=denoiser.data_mean, data_variance=denoiser.data_variance)
    ways = [("sequential", "", slow, {})]
    ways += [("parallelize", f"tol {tol:g}", parallelize(slow, tol=tol, **data), {}) for tol in (3e-2, 1e-2, 1e-3)]
    for window in WINDOWS:
        for tolerance in TOLERANCES:
            setting = dict(parallel=window, tolerance=tolerance)
            ways.append(("ParaDiGMS", f"window {window}, tolerance {tolerance:g}", paradigms, setting))
    for way, setting, pipe, more in ways:
        network.calls = network.rows = 0
        call = dict(
            prompt_embeds=torch.zeros(num, 1, 1), height=56, width=56, num_inference_steps=steps, guidance_scale=1.0,
            output_type="latent", generator=torch.Generator().manual_seed(0), **more,
        )  # fmt: skip
        took, got = seconds(lambda pipe=pipe, call=call: pipe(**call).images)
        want = got if want is None else want
        yield {
            "scheduler": name, "steps": steps, "way": way, "setting": setting, "rounds": network.calls,
            "evaluations": network.rows / num, "error": float((got - want).flatten(1).square().mean(1).sqrt().max()),
            "seconds": took,
        }  # fmt: skip


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--num", type=int, default=2, help="samples (default %(default)s)")
    parser.add_argument("--long", action="store_true", help="200 steps of DDIM and 1000 of DDPM too; takes long")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    warnings.simplefilter("ignore")
    rows: list[Row] = []
    for name, (_, counts) in RUNS.items():
        for steps in counts if given.long else counts[:1]:
            rows += compare(name, steps, given.num)
    print_table(rows)
    write_json(given.json, given, comparison=rows)


if __name__ == "__main__":
    main()
