"""Loops that scale the network's input and output themselves: what their code computes is measured."""

from __future__ import annotations

from typing import Any

import diffusers as df
import pytest
import torch
from tiny import TEXTS, built, normals, prompts, quiet
from torch import Tensor, nn

import piadm
from piadm.interop.diffusers import UnsupportedError, parallelize

SHAPE = (3, 4, 2, 2)


class Mixer(nn.Module):
    """Every output depends on the whole state, on the time, and on the condition; it has one channel too many."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(48, 64)

    @property
    def dtype(self) -> torch.dtype:
        return self.layer.weight.dtype

    def forward(self, hidden_states: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        mixed = self.layer(hidden_states.flatten(1)) + condition + timestep.reshape(-1, 1)
        return torch.tanh(mixed).reshape(-1, 4, *SHAPE[1:])


class Scales(df.DiffusionPipeline):
    """A loop that scales what its network reads and what it returns."""

    def __init__(self, transformer: nn.Module, scheduler: Any) -> None:  # noqa: ANN401 - any scheduler
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, how: str, steps: int = 8, batch: int = 2, generator: Any = None) -> Tensor:  # noqa: ANN401
        self.how, self.mean = how, 0.0
        latents = 80 * torch.randn(batch, *SHAPE, generator=generator)
        known = torch.linspace(-1, 1, batch * 48).reshape(batch, *SHAPE)
        self.scheduler.set_timesteps(sigmas=[80 * (1 - i / steps) ** 5 + 0.01 for i in range(steps)])
        given = normals(3, 2, 1, 64)
        for i, t in enumerate(self.scheduler.timesteps):
            sigma = self.scheduler.sigmas[i]
            share = sigma / (sigma + 1)
            frame = torch.zeros(1, 1, 4, 1, 1)
            frame[:, :, 0] = how == "frame"
            whole = frame * known + (1 - frame) * (latents * (1 - share))
            whole = whole / latents.std() if how == "normalized" else whole
            found = []
            for condition in given[: 1 if how == "begins" and i < 3 else 2]:
                time = share.expand(batch)
                output = self.transformer(whole.to(self.transformer.dtype), time, condition.expand(batch, -1))
                output = self.denoised(latents, output[:, :3].float(), share).to(self.transformer.dtype)
                found.append(frame * known + (1 - frame) * output)
            guided = found[0] + (3 if how != "scales" else 1 + i) * (found[0] - found[-1])
            latents = self.scheduler.step((latents - guided) / sigma, t, latents, return_dict=False)[0]
        return latents

    def denoised(self, latents: Tensor, output: Tensor, share: Tensor) -> Tensor:
        if self.how == "samples":
            output = output * torch.linspace(0.5, 1, len(latents)).reshape(-1, 1, 1, 1, 1)
        if self.how == "squares":
            output = output + 1e-2 * output.square()
        if self.how == "size":
            output = output * latents.std()
        if self.how == "rows":
            output = output + 1e-2 * output.mean(0)
        if self.how == "coordinates":
            output = output + 1e-2 * output.flip(-1)
        if self.how == "cut":
            output = output.clamp(-9, 9)
        if self.how == "momentum":
            output = self.mean = output + 1e-2 * self.mean
        return (1 - share) * latents - share * output


def scales() -> Scales:
    return Scales(Mixer().eval(), df.FlowMatchEulerDiscreteScheduler())


def seeded(pipe: Any, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401 - a pipeline
    found: Tensor = pipe(*args, **kwargs, generator=torch.Generator().manual_seed(5))
    return found.float()


def apart(got: Tensor, want: Tensor) -> float:
    return float((got - want).square().mean().sqrt() / want.square().mean().sqrt())


@pytest.mark.parametrize(
    "how, batch, steps",
    [
        ("plain", 1, 1), ("plain", 2, 2), ("plain", 2, 8), ("frame", 1, 3), ("frame", 2, 8), ("begins", 2, 4),
        ("begins", 1, 8), ("scales", 1, 3), ("scales", 2, 8), ("samples", 2, 3),
    ],
)  # fmt: skip
def test_such_a_loop_is_its_sequential_self(how: str, batch: int, steps: int) -> None:
    fast = parallelize(scales(), tol=1e-5)
    want = seeded(fast.pipe, how, steps, batch)
    for _ in range(2):  # the shapes of outputs are known the second time
        assert apart(seeded(fast, how, steps, batch), want) <= 3e-5  # the tolerance, and the rounding of ten steps
        assert fast.last_solution.converged and fast.last_solution.stats.rounds <= steps + 1


@pytest.mark.parametrize(
    "how, batch, steps", [("squares", 1, 8), ("cut", 2, 1), ("size", 2, 3), ("rows", 2, 8), ("coordinates", 1, 2)]
)
def test_what_is_no_sum_of_each_coordinate_is_refused(how: str, batch: int, steps: int) -> None:
    with pytest.raises(UnsupportedError, match="; nor is what its code computes a sum"):
        seeded(parallelize(scales()), how, steps, batch)


@pytest.mark.parametrize("steps", [2, 8])
def test_a_factor_on_what_is_read_that_goes_by_the_state_is_refused(steps: int) -> None:
    with pytest.raises(UnsupportedError, match="transformer reads the scheduler's state changed in a way that goes by"):
        seeded(parallelize(scales()), "normalized", steps)


@pytest.mark.parametrize("batch", [1, 2])
def test_guidance_with_momentum_is_named(batch: int) -> None:
    with pytest.raises(UnsupportedError, match="keeps something from one step for another.* momentum"):
        seeded(parallelize(scales()), "momentum", batch=batch)


def test_every_network_row_is_counted_once_and_generators_go_on_as_they_would() -> None:
    fast, seen, generators = parallelize(scales(), tol=1e-5), [], [torch.Generator().manual_seed(5) for _ in range(2)]
    fast.pipe("plain", generator=generators[0])
    fast.transformer.register_forward_pre_hook(lambda network, args: seen.append(len(args[0])))
    fast("plain", generator=generators[1])
    assert torch.equal(generators[0].get_state(), generators[1].get_state())
    assert 2 * fast.last_solution.stats.evaluations == sum(seen)
    assert max(seen) > 2  # rows of several steps, in one call


@pytest.mark.parametrize("how", ["max_batch", "workers", "memory", "interrupted"])
def test_rounds_of_measured_code_are_like_all_others(how: str) -> None:
    more = dict(max_batch=3) if how == "max_batch" else {}
    fast = parallelize(scales(), tol=1e-5, **more, workers=piadm.Devices(["cpu"] * 2) if how == "workers" else None)
    want, calls = seeded(fast.pipe, "plain"), []
    seeded(fast, "plain")

    def hook(network: nn.Module, args: tuple[Tensor, ...]) -> None:
        calls.append(len(args[0]))
        if len(calls) == 6 and how in ("memory", "interrupted"):  # the second of a pass
            raise torch.cuda.OutOfMemoryError("out of memory") if how == "memory" else KeyboardInterrupt

    if how != "workers":
        fast.transformer.register_forward_pre_hook(hook)
    got = seeded(fast, "plain")
    if how == "interrupted":
        assert fast.last_solution.status[0].name == "INTERRUPTED" and got.isfinite().all()
    else:
        assert apart(got, want) <= 3e-5
        assert how != "max_batch" or max(calls) <= 3


def test_factors_of_half_precision_are_means() -> None:
    # Each is rounded by one part in 256, and what the pipeline hands its scheduler at sigma 0.01 by a third of itself.
    pipe, exact = scales(), seeded(scales(), "plain")
    pipe.transformer.to(torch.bfloat16)
    error, own = (apart(seeded(which, "plain"), exact) for which in (parallelize(pipe, tol=1e-4), pipe))
    assert error <= 0.5 * own  # better than the pipeline's own rounding


class Checker:
    """Finds nothing."""

    def to(self, device: Any) -> None:  # noqa: ANN401 - any device
        """Stays where it is."""

    def check_text_safety(self, text: str) -> bool:
        return True


def cosmos() -> Any:  # noqa: ANN401 - a pipeline
    network = built(
        df.CosmosTransformer3DModel, in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16,
        num_layers=1, mlp_ratio=2, text_embed_dim=16, adaln_lora_dim=4, max_size=(4, 16, 16), patch_size=(1, 2, 2),
        rope_scale=(2.0, 1.0, 1.0), concat_padding_mask=False, extra_pos_embed_type="learnable",
    )  # fmt: skip
    scheduler = df.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    parts = dict(transformer=network, scheduler=scheduler, safety_checker=Checker())
    return quiet(df.Cosmos2TextToImagePipeline, *TEXTS[:2], "vae", **parts)


def sana_sprint() -> Any:  # noqa: ANN401 - a pipeline
    network = built(
        df.SanaTransformer2DModel, patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2,
        attention_head_dim=4, num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8,
        caption_channels=16, sample_size=8, qk_norm="rms_norm_across_heads", guidance_embeds=True,
    )  # fmt: skip
    return quiet(df.SanaSprintPipeline, *TEXTS[:2], "vae", transformer=network, scheduler=df.SCMScheduler())


SIZE = dict(height=64, width=64)
SPRINT = dict(intermediate_timesteps=None, prompt_attention_mask=torch.ones(2, 5), use_resolution_binning=False)
REAL = {
    "Cosmos 2": (cosmos, dict(SIZE, **prompts())),
    "Sana Sprint": (sana_sprint, dict(SIZE, **SPRINT, prompt_embeds=prompts()["prompt_embeds"])),
}


@pytest.mark.parametrize("name", REAL)
def test_pipelines_that_scale_are_their_sequential_selves(name: str) -> None:
    build, call = REAL[name]
    fast = parallelize(build(), tol=1e-4)
    call = dict(call, num_inference_steps=6, output_type="latent", return_dict=False)
    got, want = (
        which(**call, generator=torch.Generator().manual_seed(0))[0].float() for which in (fast, fast.pipe)
    )
    assert apart(got, want) <= 1e-4 and fast.last_solution.converged
