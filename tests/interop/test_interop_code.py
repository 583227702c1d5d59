"""Pipelines whose own code is unusual: what they may do, and what is refused by name."""

from __future__ import annotations

import copy
import gc
from typing import Any

import diffusers as df
import pytest
import torch
from diffusers.models.attention_processor import Attention
from tiny import CASES, SD, built, latent_consistency, normals, stable_diffusion, unet
from torch import Tensor

from piadm.interop.diffusers import UnsupportedError, parallelize, run
from piadm.interop.diffusers.measuring import Measuring
from piadm.interop.diffusers.standins import MOST

CALL = dict(latents=normals(7, 2, 4, 8, 8), prompt_embeds=SD["prompt_embeds"])


class Plain(df.StableDiffusionPipeline):
    """A pipeline with a loop of its own."""

    @torch.no_grad()
    def __call__(self, latents: Tensor, prompt_embeds: Tensor) -> Tensor:
        self.scheduler.set_timesteps(8)
        for t in self.progress_bar(self.scheduler.timesteps):
            output = self.changed(self.unet(latents, t, encoder_hidden_states=prompt_embeds).sample)
            latents = self.scheduler.step(output, t, latents).prev_sample
        return latents

    def changed(self, output: Tensor) -> Tensor:
        return output


class AsksForTheType(Plain):
    """Some pipelines treat one scheduler differently, and compare its type."""

    def changed(self, output: Tensor) -> Tensor:
        return output if type(self.scheduler) is df.DDIMScheduler else 2 * output


class CopiesItsScheduler(Plain):
    """Some pipelines copy their scheduler, for several states or to look ahead."""

    def changed(self, output: Tensor) -> Tensor:
        return output * copy.deepcopy(self.scheduler).init_noise_sigma


class KeepsTheLastOutput(Plain):
    """Guidance with momentum: a buffer that waits for its first use, and goes into the output or not."""

    last: Tensor | None = None
    share = 0.0

    def changed(self, output: Tensor) -> Tensor:
        self.last = output if self.last is None else output + 0.5 * self.last
        return output.lerp(self.last, self.share)


class Nothing(Plain):
    """A pipeline of pipelines has no loop itself."""

    def __call__(self) -> None:
        return None


@pytest.mark.parametrize("kind", [AsksForTheType, CopiesItsScheduler])
def test_the_scheduler_is_what_it_was(kind: type[Plain]) -> None:
    pipe = stable_diffusion(kind)
    # Tolerance below, and latents of size ten in float32.
    assert torch.allclose(parallelize(pipe, tol=1e-4, nodes="all")(**CALL), pipe(**CALL), atol=1e-3)


def test_what_a_step_returns_beside_the_state_is_its_own() -> None:
    # The pipeline of latent consistency models decodes the second thing that the last step returns.
    pipe = latent_consistency()
    call = dict(prompt_embeds=SD["prompt_embeds"], height=16, width=16, num_inference_steps=4, output_type="latent")
    want = pipe(**call, generator=torch.Generator().manual_seed(0)).images
    got = parallelize(pipe, tol=1e-4, nodes="all")(**call, generator=torch.Generator().manual_seed(0)).images
    assert torch.allclose(got, want, atol=1e-3)


def test_what_is_set_is_the_pipelines_own() -> None:
    pipe = stable_diffusion()
    fast = parallelize(pipe)
    fast.scheduler = df.EulerDiscreteScheduler()
    assert pipe.scheduler is fast.scheduler and type(pipe.scheduler) is df.EulerDiscreteScheduler
    assert fast.to(torch.float64) is fast and pipe.unet.dtype == torch.float64


def test_one_step_is_enough_to_converge() -> None:
    # The call that tells the shape of the network's output is a round, but not one of those that the step needs.
    fast = parallelize(stable_diffusion())
    fast(**SD, num_inference_steps=1, output_type="latent")
    assert fast.last_solution is not None and fast.last_solution.converged


def test_code_that_keeps_an_output_is_told_from_code_that_takes_no_other_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = parallelize(stable_diffusion(KeepsTheLastOutput), tol=1e-4, nodes="all")
    assert torch.allclose(fast(**CALL), fast.pipe(**CALL), atol=1e-3)  # as above
    monkeypatch.setattr(KeepsTheLastOutput, "share", 0.1)
    with pytest.raises(UnsupportedError, match="keeps something from one step .* momentum"):
        parallelize(stable_diffusion(KeepsTheLastOutput), nodes="all")(**CALL)


def test_pipelines_of_pipelines_are_told_from_others() -> None:
    with pytest.raises(UnsupportedError, match="Nothing does not loop .* parallelize the one that does"):
        parallelize(stable_diffusion(Nothing))()


def test_what_a_callback_raises_is_handed_on() -> None:
    def callback(*args: object) -> dict[str, Any]:
        raise ValueError("the user's own")

    with pytest.raises(ValueError, match="^the user's own$"):
        parallelize(stable_diffusion())(**SD, num_inference_steps=5, callback_on_step_end=callback)


def unclip() -> Any:  # noqa: ANN401 - a pipeline
    """The prior of Kandinsky tells its scheduler the next timestep, another one at each step."""
    pipe = stable_diffusion(Unclip)
    pipe.scheduler = df.UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample")
    return pipe


class Unclip(df.StableDiffusionPipeline):
    """A loop that gives the scheduler an argument of its own at each step, which may go by the state."""

    looks = False

    @torch.no_grad()
    def __call__(self, latents: Tensor, prompt_embeds: Tensor) -> Tensor:
        self.scheduler.set_timesteps(5)
        times = self.scheduler.timesteps
        for i, t in enumerate(times):
            output = self.unet(latents, t, encoder_hidden_states=prompt_embeds).sample
            before = times[i + 1] if i + 1 < len(times) else None
            if self.looks and before is not None:
                before = before + int(latents.abs().max() > 3)
            latents = self.scheduler.step(output, t, latents, prev_timestep=before).prev_sample
        return latents


def learned() -> Any:  # noqa: ANN401 - a pipeline
    return stable_diffusion(Plain, scheduler=df.DDPMScheduler(variance_type="learned_range"))


def test_a_scheduler_may_be_given_another_number_at_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = parallelize(unclip(), tol=1e-4, nodes="all")
    found = [torch.manual_seed(0) and pipe(**CALL) for pipe in (fast.pipe, fast)]
    assert torch.allclose(*found, atol=1e-3)  # as above
    monkeypatch.setattr(Unclip, "looks", True)
    with pytest.raises(UnsupportedError, match="numbers that do not go by the step: prev_timestep"):
        fast(**CALL)


def test_schedulers_that_are_refused_are_told_why() -> None:
    with pytest.raises(UnsupportedError, match="takes its variance from the network"):
        parallelize(learned())(**CALL)


def test_a_feeder_shows_only_where_there_are_two_steps() -> None:
    case = CASES["SD3, ControlNet of one block"]
    with pytest.raises(UnsupportedError, match="controlnet .* one step; ask for more"):
        parallelize(case.build())(**case.call, num_inference_steps=1)


def test_another_network_has_other_outputs() -> None:
    # Neither the number of a ControlNet's outputs nor the shapes are those of the one before.
    case = CASES["SD3, ControlNet of one block"]
    pipe = case.build()
    call = dict(case.call, num_inference_steps=6, output_type="latent", latents=normals(7, 2, 4, 8, 8))

    def images(which: Any) -> Tensor:  # noqa: ANN401 - a pipeline
        torch.manual_seed(0)  # the encoder of the control image draws from it
        return which(**call).images

    fast = parallelize(pipe, tol=1e-4, nodes="all")
    images(fast)
    pipe.transformer = built(type(pipe.transformer), **{**pipe.transformer.config, "num_layers": 4})
    pipe.controlnet = built(type(pipe.controlnet), **{**pipe.controlnet.config, "num_layers": 2})
    assert torch.allclose(images(fast), images(pipe), atol=1e-3)  # as above


def test_what_is_known_of_networks_is_bounded_and_goes_with_them() -> None:
    pipe = stable_diffusion(Plain)
    fast = parallelize(pipe, tol=1.0)
    for length in range(1, MOST + 2):
        fast(CALL["latents"], normals(1, 2, length, 16))
    assert [len(known) for known in fast._outputs.known.values()] == [MOST]
    pipe.unet = unet()
    gc.collect()
    assert not fast._outputs.known


class Mixes(Plain):
    """A pipeline that lets the samples of a batch know of one another."""

    def changed(self, output: Tensor) -> Tensor:
        return output - output.mean(0)


@pytest.mark.parametrize("max_batch", [None, 1, 2])
def test_samples_that_are_not_alike_are_refused_whatever_the_rows(max_batch: int | None) -> None:
    with pytest.raises(UnsupportedError, match="or mixes them.*; nor is what its code computes a sum"):
        parallelize(stable_diffusion(Mixes), nodes="all", max_batch=max_batch)(**CALL)


class SwitchesOff(Plain):
    """A pipeline that sets something in its network after some steps, as GLIGEN does, or in the order of its calls."""

    name, values = "scale", (1.0, 1.0, 1.0, 0.5)

    @torch.no_grad()
    def __call__(self, latents: Tensor, prompt_embeds: Tensor) -> Tensor:
        self.scheduler.set_timesteps(8)
        for i, t in enumerate(self.scheduler.timesteps):
            for attention in self.unet.modules():
                if isinstance(attention, Attention):
                    setattr(attention, self.name, self.values[min(i, len(self.values) - 1)])
            output = self.unet(latents, t, encoder_hidden_states=prompt_embeds).sample
            latents = self.scheduler.step(output, t, latents).prev_sample
        return latents


@pytest.mark.parametrize("values", [(1.0, 1.0, 1.0, 0.5), (1.0, 0.5, 1.0), ([1.0], [1.0], [0.5])])
def test_a_network_that_is_set_otherwise_between_steps_is_named(
    values: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SwitchesOff, "values", values)
    pipe = stable_diffusion(SwitchesOff)
    message = r"changes scale of unet\.down_blocks\.1\.attentions\.0\.transformer_blocks\.0\.attn1 between steps"
    with pytest.raises(UnsupportedError, match=message):
        parallelize(pipe, nodes="all")(**CALL)
    found = {str(part.scale) for part in pipe.unet.modules() if isinstance(part, Attention)}
    assert found == {str(values[0])}  # as at the first step


class HandsOver(df.StableDiffusionPipeline):
    """A pipeline whose loop is its parent's."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - the parent's
        return super().__call__(*args, **kwargs)


class Walks(df.StableDiffusionPipeline):
    """A pipeline whose loop is over the timesteps as they are."""

    def __call__(self, prompt_embeds: Tensor, **others: object) -> object:
        return [self.unet(torch.zeros(2, 4, 8, 8), t, prompt_embeds) for t in self.scheduler.timesteps]


@pytest.mark.parametrize("kind", [HandsOver, Walks])
def test_a_loop_that_is_not_found_is_said_to_be_otherwise_or_elsewhere(kind: type) -> None:
    with pytest.raises(UnsupportedError, match="its unet outside .*enumerate.*progress_bar.*__call__.*a parent's"):
        parallelize(stable_diffusion(kind))(**SD)


class Drifts(df.StableDiffusionPipeline):
    """A pipeline whose guidance changes a little from step to step, or with the sample."""

    drift, per_sample = 0.0, 0.0

    @torch.no_grad()
    def __call__(self, latents: Tensor, prompt_embeds: Tensor) -> Tensor:
        self.scheduler.set_timesteps(8)
        for i, t in enumerate(self.scheduler.timesteps):
            output = self.unet(latents, t, encoder_hidden_states=prompt_embeds).sample
            others = output.mean(0, keepdim=True)
            output = output * (7.5 * (1 + self.drift * i)) + self.per_sample * others
            latents = self.scheduler.step(output, t, latents).prev_sample
        return latents


# In half precision a smaller change than that of the last digit, of one part in 128 or 1024, still rounds some numbers
# the other way.
DRIFTS = [(torch.float32, 1e-4), (torch.float16, 1e-4), (torch.bfloat16, 1e-3)]


@pytest.mark.parametrize("dtype, drift", DRIFTS)
def test_guidance_that_changes_little_is_measured(
    dtype: torch.dtype, drift: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, measured = {name: value.to(dtype) for name, value in CALL.items()}, []
    monkeypatch.setattr(run, "Measuring", lambda rehearsal: measured.append(1) or Measuring(rehearsal))
    pipe = stable_diffusion(Drifts).to(dtype)
    fast = parallelize(pipe, tol=1.0, nodes="all")
    assert fast(**call).dtype == dtype and fast.last_solution is not None and fast.last_solution.converged
    assert not measured
    monkeypatch.setattr(Drifts, "drift", drift)
    assert fast(**call).dtype == dtype and measured


def test_samples_that_know_little_of_one_another_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Drifts, "per_sample", 1e-2)
    with pytest.raises(UnsupportedError, match="or mixes them"):
        parallelize(stable_diffusion(Drifts), nodes="all")(**CALL)
