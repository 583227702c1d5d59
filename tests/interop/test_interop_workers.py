"""Pipelines whose network rows are split among several devices."""

from __future__ import annotations

import threading
from typing import Any

import diffusers as df
import pytest
import torch
from test_interop_phases import PHASED
from tiny import SD, SQUARE, XL, Case, controlnet, image, normals, stable_diffusion, stable_diffusion_xl, z_image
from torch import Tensor, nn

import piadm
from piadm.interop.diffusers import UnsupportedError, parallelize

TWO, THREE = (piadm.Devices(["cpu"] * count) for count in (2, 3))
RUN = dict(num_inference_steps=8, output_type="latent")


def guided_controlnet() -> Any:  # noqa: ANN401 - a pipeline
    return stable_diffusion(df.StableDiffusionControlNetPipeline, controlnet=controlnet())


SPLIT = {
    "SD": Case(stable_diffusion, SD),
    "SD, ControlNet": Case(guided_controlnet, dict(SD, image=image(32), guidance_scale=4.0)),
    "SDXL": Case(stable_diffusion_xl, XL),
    "Z-Image": Case(z_image, dict(SQUARE, prompt_embeds=[normals(1, 5, 16), normals(2, 7, 16)], guidance_scale=0.0)),
} | {name: case for name, case in PHASED.items() if not name.endswith("scales")}


def latents(pipe: Any, call: dict[str, Any]) -> Tensor:  # noqa: ANN401 - a pipeline
    found: Tensor = pipe(**call, **RUN, generator=torch.Generator().manual_seed(5), return_dict=False)[0]
    return found.float()


@pytest.mark.parametrize("name", SPLIT)
def test_the_result_is_that_of_one_device(name: str) -> None:
    pipe, call = SPLIT[name].build(), SPLIT[name].call
    alone, several = parallelize(pipe, tol=1e-5), parallelize(pipe, tol=1e-5, workers=THREE)
    want = latents(alone, call)
    for _ in range(2):  # the shapes of outputs are known the second time
        got = latents(several, call)
        # The tolerance twice: rows of smaller batches are rounded otherwise.
        assert float((got - want).square().mean().sqrt() / want.square().mean().sqrt()) <= 3e-5
    one, other = alone.last_solution.stats, several.last_solution.stats
    assert other.rounds <= one.rounds + 1 and other.peak_batch < one.peak_batch


def test_every_device_takes_part_with_a_copy_of_its_own() -> None:
    pipe, seen = stable_diffusion(), []
    forward = type(pipe.unet).forward

    def noted(self: nn.Module, sample: Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - the network's own
        seen.append((id(self), threading.current_thread().name, len(sample)))
        return forward(self, sample, *args, **kwargs)

    noted.__wrapped__ = forward
    fast = parallelize(pipe, workers=THREE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(pipe.unet), "forward", noted)
        latents(fast, SD)
        threads = {name for _, name, _ in seen if name.startswith("piadm")}
        networks = {network for network, name, _ in seen if name.startswith("piadm")}
    assert len(networks) == 3 and id(pipe.unet) in networks
    assert threads and not {one.name for one in threading.enumerate()} & threads  # gone afterwards
    assert max(rows for _, _, rows in seen) == fast.last_solution.stats.peak_batch


def test_max_batch_holds_for_each_device() -> None:
    fast = parallelize(stable_diffusion(), workers=TWO, max_batch=4)
    latents(fast, SD)
    assert fast.last_solution.converged and fast.last_solution.stats.peak_batch == 4


def test_a_network_that_fails_on_a_device_is_named_with_it() -> None:
    pipe = stable_diffusion()
    fast = parallelize(pipe, workers=TWO)
    latents(fast, SD)
    forward = type(pipe.unet).forward

    def failing(self: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - the network's own
        if self is not pipe.unet:
            raise ValueError("no luck")
        return forward(self, *args, **kwargs)

    failing.__wrapped__ = forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(pipe.unet), "forward", failing)
        with pytest.raises(piadm.NetworkError, match=r"unet failed on samples .* at steps .*device 1 \(cpu.*no luck"):
            latents(fast, SD)
    assert not [one for one in threading.enumerate() if one.name.startswith("piadm-cpu")]


def test_memory_that_runs_out_on_a_device_shrinks_the_calls() -> None:
    pipe = stable_diffusion()
    fast, forward, most = parallelize(pipe, workers=TWO), type(pipe.unet).forward, 6
    want = latents(parallelize(pipe), SD)

    def small(self: nn.Module, sample: Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - the network's own
        if len(sample) > most and self is not pipe.unet:
            raise RuntimeError("CUDA out of memory")
        return forward(self, sample, *args, **kwargs)

    small.__wrapped__ = forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(pipe.unet), "forward", small)
        got = latents(fast, SD)
        assert fast.last_solution.converged and float((got - want).square().mean().sqrt()) <= 2e-2
        fast, most = parallelize(pipe, workers=TWO), 0
        with pytest.raises(piadm.NetworkError, match="out of memory"):  # of a single row, too
            latents(fast, SD)


def test_networks_that_accelerate_moves_are_refused() -> None:
    accelerate = pytest.importorskip("accelerate")
    pipe = stable_diffusion()
    accelerate.cpu_offload_with_hook(pipe.unet, "cpu")
    with pytest.raises(UnsupportedError, match="unet is offloaded by accelerate"):
        latents(parallelize(pipe, workers=TWO), SD)


@pytest.mark.parametrize("workers", [2, ["cpu", "cpu"]])
def test_other_workers_are_refused(workers: Any) -> None:  # noqa: ANN401 - whatever a user gives
    with pytest.raises(TypeError, match=r"workers must be a piadm.Devices, a piadm.Ranks or None, got"):
        parallelize(stable_diffusion(), workers=workers)


@pytest.mark.parametrize(
    "ranks, window, message",
    [
        (piadm.Ranks(split="samples"), None, r"workers must split rows, got Ranks\(split='samples'\)"),
        (piadm.Ranks(), "auto", "window must be None or an integer where ranks share out rows"),
    ],
)
def test_what_ranks_cannot_share_out_is_refused(ranks: piadm.Ranks, window: Any, message: str) -> None:  # noqa: ANN401
    with pytest.raises(ValueError, match=message):
        parallelize(stable_diffusion(), workers=ranks, window=window)


def test_ranks_without_a_group_are_told_to_make_one() -> None:
    with pytest.raises(RuntimeError, match="init_process_group first"):
        latents(parallelize(stable_diffusion(), workers=piadm.Ranks()), SD)
