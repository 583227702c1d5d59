"""Parts that somebody has changed in place: refused on sight where copies of them would do something else."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from types import MethodType
from typing import Any

import diffusers as df
import pytest
import torch
from tiny import CASES, SD, ddim, normals, stable_diffusion
from torch import Tensor, nn

from piadm.interop.diffusers import UnsupportedError, parallelize

FLUX = CASES["Flux"]
FEW = dict(num_inference_steps=6, output_type="latent")
CALL = dict(SD, **FEW, latents=normals(7, 2, 4, 8, 8))
# The tolerance of the runs below, and float32 roundings of latents of size ten.
CLOSE = 1e-4


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean().sqrt())


def flux_latents(pipe: Any) -> Tensor:  # noqa: ANN401 - a pipeline
    return pipe(**FLUX.call, **FEW, generator=torch.Generator().manual_seed(0))[0]


def first_block(network: nn.Module) -> None:
    hooks = pytest.importorskip("diffusers.hooks")
    hooks.apply_first_block_cache(network, hooks.FirstBlockCacheConfig(threshold=0.5))


def magnitudes(network: nn.Module) -> None:
    hooks = pytest.importorskip("diffusers.hooks")
    hooks.apply_mag_cache(network, hooks.MagCacheConfig(num_inference_steps=6, mag_ratios=[1.0] * 6))


def taylor(network: nn.Module) -> None:
    hooks = pytest.importorskip("diffusers.hooks")
    hooks.apply_taylorseer_cache(network, hooks.TaylorSeerCacheConfig(cache_interval=3, max_order=1))


def broadcast(network: nn.Module) -> None:
    hooks = pytest.importorskip("diffusers.hooks")
    hooks.apply_pyramid_attention_broadcast(
        network,
        hooks.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(100, 800),
            current_timestep_callback=lambda: 500, spatial_attention_block_identifiers=["transformer_blocks"],
        ),
    )  # fmt: skip


CACHES: dict[str, tuple[Callable[[nn.Module], None], tuple[str, ...]]] = {
    "first block": (first_block, ("FirstBlockCacheConfig", "apply_first_block_cache")),
    "magnitudes": (magnitudes, ("MagCacheConfig", "apply_mag_cache")),
    "Taylor": (taylor, ("TaylorSeerCacheConfig", "apply_taylorseer_cache")),
    "broadcast": (broadcast, ("PyramidAttentionBroadcastConfig", "apply_pyramid_attention_broadcast")),
}


@pytest.mark.parametrize("what", CACHES)
def test_a_cache_in_the_hooks_of_a_network_is_named_and_can_be_removed(what: str) -> None:
    install, needed = CACHES[what]
    hooks = pytest.importorskip("diffusers.hooks")
    if not all(hasattr(hooks, name) for name in needed):
        pytest.skip(f"this diffusers has no {needed[0]}")
    from diffusers.hooks.hooks import HookRegistry

    pipe = FLUX.build()
    plain = flux_latents(pipe)
    install(pipe.transformer)
    with pytest.raises(UnsupportedError, match=r"FluxPipeline\.transformer keeps .* remove each first") as refused:
        flux_latents(parallelize(pipe))
    for name in re.findall(r"'(\w+)'", str(refused.value)):
        HookRegistry.check_if_exists_or_initialize(pipe.transformer).remove_hook(name)
    assert apart(flux_latents(parallelize(pipe, tol=CLOSE, nodes="all")), plain) <= CLOSE


def cast(network: Any) -> None:  # noqa: ANN401 - a network
    network.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


def offload(network: Any) -> None:  # noqa: ANN401 - a network
    device = torch.device("cpu")
    network.enable_group_offload(onload_device=device, offload_device=device, offload_type="leaf_level")


@pytest.mark.parametrize("install", [cast, offload])
def test_hooks_without_a_memory_keep_working(install: Callable[[Any], None]) -> None:
    pipe = FLUX.build()
    if not hasattr(pipe.transformer, "enable_group_offload"):
        pytest.skip("this diffusers has no such hooks")
    install(pipe.transformer)
    want = flux_latents(pipe)
    assert apart(flux_latents(parallelize(pipe, tol=CLOSE, nodes="all")), want) <= CLOSE


def replaced_step(scheduler: Any) -> None:  # noqa: ANN401 - a scheduler
    own = scheduler.step
    scheduler.step = lambda output, timestep, sample, **more: own(0.5 * output, timestep, sample, **more)


def replaced_scaling(scheduler: Any) -> None:  # noqa: ANN401 - a scheduler
    scheduler.scale_model_input = lambda sample, timestep=None: 0.7 * sample


def replaced_times(scheduler: Any) -> None:  # noqa: ANN401 - a scheduler
    own = scheduler.set_timesteps
    scheduler.set_timesteps = lambda num_inference_steps, **more: own(2 * num_inference_steps, **more)


PATCHES = [(replaced_step, "step"), (replaced_scaling, "scale_model_input"), (replaced_times, "set_timesteps")]


@pytest.mark.parametrize("patch, name", PATCHES)
def test_a_method_that_is_replaced_on_the_scheduler_itself_is_named(patch: Callable[[Any], None], name: str) -> None:
    pipe = stable_diffusion()
    patch(pipe.scheduler)
    with pytest.raises(UnsupportedError, match=f"^{name} of this DDIMScheduler has been replaced .* in a subclass"):
        parallelize(pipe)(**CALL)


def test_a_bound_method_goes_with_the_copies() -> None:
    pipe = stable_diffusion()

    def later(self: Any, num_inference_steps: int, **more: Any) -> None:  # noqa: ANN401 - a scheduler
        type(self).set_timesteps(self, num_inference_steps + 2, **more)

    pipe.scheduler.set_timesteps = MethodType(later, pipe.scheduler)
    fast = parallelize(pipe, tol=CLOSE, nodes="all")
    assert apart(fast(**CALL).images, pipe(**CALL).images) <= CLOSE
    assert fast.last_solution is not None and fast.last_solution.stats.nodes == 8


def halves(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def halved(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - the function's own
        return function(self, *args, **{**kwargs, "guidance_scale": 2.0})

    return halved


DECORATORS = {
    "halved": halves,
    "decorate_autocast": torch.autocast("cpu", dtype=torch.bfloat16),
}


@pytest.mark.parametrize("name", DECORATORS)
def test_a_decorated_call_is_refused(name: str) -> None:
    call = DECORATORS[name](df.StableDiffusionPipeline.__call__)
    kind = type("Decorated", (df.StableDiffusionPipeline,), {"__call__": call})
    with pytest.raises(UnsupportedError, match=rf"__call__ has a decorator \({name}\) that is not torch\.no_grad"):
        parallelize(stable_diffusion(kind))(**CALL)


def test_a_decorated_step_is_refused() -> None:
    kind = type("Decorated", (df.DDIMScheduler,), {"step": halves(df.DDIMScheduler.step)})
    with pytest.raises(UnsupportedError, match=r"step has a decorator \(halved\)"):
        parallelize(stable_diffusion(scheduler=kind.from_config(ddim().config)))(**CALL)


@pytest.mark.parametrize("switch", [torch.inference_mode, torch.no_grad, lambda: torch.set_grad_enabled(False)])
def test_switches_of_gradients_are_no_matter(switch: Callable[[], Any]) -> None:
    call = switch()(df.StableDiffusionPipeline.__call__)
    pipe = stable_diffusion(type("Decorated", (df.StableDiffusionPipeline,), {"__call__": call}))
    assert apart(parallelize(pipe, tol=CLOSE, nodes="all")(**CALL).images, pipe(**CALL).images) <= CLOSE


class Looks(df.StableDiffusionPipeline):
    """A pipeline that looks at what its network has left behind, as self-attention guidance does."""

    @torch.no_grad()
    def __call__(self, latents: Tensor, prompt_embeds: Tensor, factors: Any = (1.0,) * 5, at: int = 1) -> Tensor:  # noqa: ANN401
        self.scheduler.set_timesteps(5)
        seen: list[Tensor] = []
        hook = self.unet.conv_out.register_forward_hook(lambda _, given, output: seen.append(output))
        for i, t in enumerate(self.scheduler.timesteps):
            output = self.unet(latents, t, encoder_hidden_states=prompt_embeds).sample * factors[i]
            output = output + 0 * seen[i] if i >= at else output
            latents = self.scheduler.step(output, t, latents).prev_sample
        hook.remove()
        return latents


OWN = dict(latents=normals(7, 2, 4, 8, 8), prompt_embeds=SD["prompt_embeds"])


def test_what_only_a_rehearsal_fails_in_is_refused() -> None:
    pipe = stable_diffusion(Looks)
    pipe(**OWN)
    with pytest.raises(UnsupportedError, match=r"Looks looks .* at step 1, .* \(IndexError: list") as refused:
        parallelize(pipe)(**OWN)
    assert isinstance(refused.value.__cause__, IndexError)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "wrong, kind",
    [
        (dict(factors=(1.0, 1.0)), IndexError),  # shows at the third step
        (dict(factors=("1",) * 5), TypeError),
        (dict(prompt_embeds=torch.ones(2, 5, 3)), RuntimeError),  # which the network finds
    ],
)
def test_what_the_pipeline_itself_fails_in_is_its_own_error(wrong: Any, kind: type, first: bool) -> None:  # noqa: ANN401
    pipe = stable_diffusion(Looks)
    call = dict(OWN, at=99)
    with pytest.raises(kind) as own:
        pipe(**call | wrong)
    fast = parallelize(pipe, tol=1.0)
    if not first:
        fast(**call)
    with pytest.raises(kind) as found:
        fast(**call | wrong)
    assert type(found.value) is kind and str(found.value) == str(own.value)
