"""Pipelines whose networks are moved to the device only while they are called."""

from __future__ import annotations

import pytest
import torch
from tiny import SD, normals, stable_diffusion

from piadm.interop.diffusers import parallelize


def test_offload_hooks_keep_working() -> None:
    accelerate = pytest.importorskip("accelerate")
    call = dict(SD, num_inference_steps=12, output_type="latent", latents=normals(7, 2, 4, 8, 8))
    pipe, calls = stable_diffusion(), []
    want = pipe(**call).images
    _, hook = accelerate.cpu_offload_with_hook(pipe.unet, "cpu")
    moved = pipe.unet._hf_hook.pre_forward
    pipe.unet._hf_hook.pre_forward = lambda *args, **kwargs: calls.append(args) or moved(*args, **kwargs)
    found = parallelize(pipe, tol=1e-4, nodes="all")(**call).images
    # The tolerance, with room for float32 roundings of latents of size ten.
    assert float((found - want).square().mean().sqrt()) < 2e-4
    assert calls and pipe.unet._hf_hook is hook.hook
    assert torch.equal(pipe(**call).images, want)
