"""Pipelines that draw noise themselves between steps, and those that leave the state alone after the last one."""

from __future__ import annotations

from typing import Any

import diffusers as df
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from tiny import SD, normals, stable_diffusion
from torch import Generator, Tensor

from piadm.interop.diffusers import UnsupportedError, parallelize

CALL = dict(latents=normals(7, 2, 4, 8, 8), prompt_embeds=SD["prompt_embeds"], known=normals(8, 2, 4, 8, 8))


class Fresh(df.StableDiffusionPipeline):
    """Inpainting with fresh noise on the known part after every step, and noise drawn once the loop is over."""

    @torch.no_grad()
    def __call__(
        self, latents: Tensor, prompt_embeds: Tensor, known: Tensor, generator: list[Generator] | None, last: int = 8
    ) -> tuple[Tensor, Tensor]:
        self.scheduler.set_timesteps(8)
        for i, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            output = self.unet(latents, t, encoder_hidden_states=prompt_embeds).sample
            latents = self.scheduler.step(output, t, latents, return_dict=False)[0].clone()
            if i < last:
                noise = randn_tensor(latents.shape, generator=generator)
                latents[:, :, :4] = self.scheduler.add_noise(known, noise, t[None])[:, :, :4]
        return latents, randn_tensor(latents.shape, generator=generator)


@pytest.mark.parametrize("kind", ["own", "global"])
def test_what_a_pipeline_draws_itself_is_drawn_once(kind: str) -> None:
    def seeded() -> list[Generator] | None:
        torch.manual_seed(1)
        return None if kind == "global" else [Generator().manual_seed(k) for k in (3, 4)]

    pipe = stable_diffusion(Fresh)
    fast = parallelize(pipe, tol=1e-4, nodes="all")
    (want, after), (got, after_too) = (run(**CALL, generator=seeded()) for run in (pipe, fast))
    assert torch.allclose(got, want, atol=1e-3)  # tolerance, and latents of size ten in float32
    assert torch.equal(got[:, :, :4], want[:, :, :4]) and torch.equal(after_too, after)


def test_a_part_that_is_not_set_after_the_last_step_is_named() -> None:
    # What the network says of the known part is not listened to, and would show in the result.
    pipe, ran = stable_diffusion(Fresh), 0

    def count(*ignored: Any) -> None:  # noqa: ANN401 - a module and its arguments
        nonlocal ran
        ran += 1

    pipe.unet.register_forward_hook(count)
    with pytest.raises(UnsupportedError, match="parts of the state after the other steps, not after the last"):
        parallelize(pipe, nodes="all")(**CALL, last=7, generator=None)
    assert ran == 1  # for the shape of its output
