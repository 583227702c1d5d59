"""Pipelines that write into tensors in place: the same as their sequential selves, or refused as out of place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers as df
import pytest
import torch
from tiny import SD, normals, stable_diffusion
from torch import Tensor

from piadm.interop.diffusers import UnsupportedError, parallelize

CALL = dict(latents=normals(7, 2, 4, 8, 8), prompt_embeds=SD["prompt_embeds"])


class Edits(df.StableDiffusionPipeline):
    """A pipeline that does something with its state after every step; one tensor holds the time of all of them."""

    @torch.no_grad()
    def __call__(self, latents: Tensor, prompt_embeds: Tensor, edit: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        self.scheduler.set_timesteps(8)
        latents, time = latents.clone(), torch.zeros(())
        for t in self.progress_bar(self.scheduler.timesteps):
            read = self.scheduler.scale_model_input(latents, t)
            output = self.unet(read, time.copy_(t), encoder_hidden_states=prompt_embeds).sample.mul_(0.5)
            fresh = self.scheduler.step(model_output=output, timestep=t, sample=latents).prev_sample
            latents = edit(latents, fresh)
        return latents


def overwritten(old: Tensor, new: Tensor) -> Tensor:
    old[:] = new
    return old


def partly_set(old: Tensor, new: Tensor) -> Tensor:
    new[:, :, :4] = 0.5
    return new


EXACT: dict[str, tuple[Any, Callable[[Tensor, Tensor], Tensor]]] = {
    "overwritten": (df.DDIMScheduler(clip_sample=False), overwritten),
    "overwritten, scaled": (df.EulerDiscreteScheduler(), overwritten),
    "partly set": (df.DDIMScheduler(clip_sample=False), partly_set),
    "partly set, multistep": (df.DPMSolverMultistepScheduler(), partly_set),
}
REFUSED: dict[str, tuple[Any, Callable[[Tensor, Tensor], Tensor], str]] = {
    "clamped": (df.DDIMScheduler(clip_sample=False), lambda old, new: new.clamp(-1, 1), "more than setting parts"),
    "clamped in place": (df.DDIMScheduler(clip_sample=False), lambda old, new: new.clamp_(-1, 1), "more than setting"),
    "mixed": (df.DDIMScheduler(clip_sample=False), lambda old, new: 0.9 * new + 0.1, "more than setting parts"),
    "mixed in place": (df.DDIMScheduler(clip_sample=False), lambda old, new: new.mul_(0.9).add_(0.1), "more than set"),
    # Heun's second call goes back to the first one's state, which is not there any more.
    "overwritten, kept": (df.HeunDiscreteScheduler(), overwritten, "writes into a state .* its scheduler has kept"),
}


@pytest.mark.parametrize("what", EXACT)
def test_what_is_done_in_place_is_done(what: str) -> None:
    scheduler, edit = EXACT[what]
    pipe = stable_diffusion(Edits, scheduler=scheduler)
    fast = parallelize(pipe, tol=1e-4, nodes="all")
    # Tolerance, and latents of size ten in float32.
    assert torch.allclose(fast(**CALL, edit=edit), pipe(**CALL, edit=edit), atol=1e-3)
    assert fast.last_solution is not None and fast.last_solution.converged


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_is_refused_in_place(what: str) -> None:
    scheduler, edit, message = REFUSED[what]
    with pytest.raises(UnsupportedError, match=message):
        parallelize(stable_diffusion(Edits, scheduler=scheduler), nodes="all")(**CALL, edit=edit)
