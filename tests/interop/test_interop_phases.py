"""Loops whose body does other things at some steps: two networks that take turns, guidance that comes and goes."""

from __future__ import annotations

from typing import Any

import diffusers as df
import pytest
import torch
from test_interop_flow import EULER, WAN, lumina
from tiny import SD, SQUARE, TEXTS, XL, Case, built, masks, normals, prompts, quiet, stable_diffusion
from tiny import stable_diffusion_3 as sd3
from torch import Tensor

from piadm.interop.diffusers import parallelize
from piadm.interop.diffusers.probe import UnsupportedError

STEPS = 10
RUN = dict(num_inference_steps=STEPS, output_type="latent")


def wan(**config: Any) -> Any:  # noqa: ANN401 - a pipeline
    first, second = (built(df.WanTransformer3DModel, **WAN) for _ in range(2))
    for parameter in second.parameters():
        parameter.data.mul_(1.2)
    parts = dict(transformer=first, transformer_2=second, scheduler=EULER(shift=3.0))
    return quiet(df.WanPipeline, "vae", *TEXTS[:2], **parts, boundary_ratio=0.7, **config)


VIDEO = dict(SQUARE, **prompts(), num_frames=5)
PHASED = {
    "Wan, two transformers": Case(wan, VIDEO),
    "Wan, two transformers and scales": Case(wan, VIDEO | dict(guidance_scale=4.0, guidance_scale_2=2.0)),
    "SD3, skipped layers": Case(sd3, dict(SQUARE, **XL, skip_guidance_layers=[0])),
    "Lumina 2, guidance that ends": Case(lumina, dict(SQUARE, **prompts(), **masks(2), cfg_trunc_ratio=0.5)),
}


def latents(pipe: Any, call: dict[str, Any]) -> Tensor:  # noqa: ANN401 - a pipeline
    found: Tensor = pipe(**call, **RUN, generator=torch.Generator().manual_seed(5), return_dict=False)[0]
    return found.float()


def apart(got: Tensor, want: Tensor) -> float:
    return float((got - want).square().mean().sqrt() / want.square().mean().sqrt())


@pytest.mark.parametrize("name", PHASED)
def test_such_a_pipeline_is_its_sequential_self(name: str) -> None:
    pipe, call = PHASED[name].build(), PHASED[name].call
    fast, want = parallelize(pipe, tol=1e-5), latents(pipe, call)
    for _ in range(2):  # the shapes of outputs are known the second time
        # The tolerance, and what rounding leaves of states of size one in ten steps.
        assert apart(latents(fast, call), want) <= 3e-5
        assert fast.last_solution.converged
        assert fast.last_solution.stats.nodes == STEPS  # between the phases there is nothing to interpolate
    assert fast.last_solution.stats.rounds <= STEPS


def test_each_network_is_given_the_rows_of_its_own_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, seen = wan(), {"transformer": [], "transformer_2": []}
    for name, rows in seen.items():
        getattr(pipe, name).register_forward_pre_hook(
            lambda network, args, kwargs, rows=rows: rows.append(kwargs["timestep"]), with_kwargs=True
        )
    latents(pipe, VIDEO)
    own = {name: set(torch.cat(rows).tolist()) for name, rows in seen.items()}
    fast = parallelize(pipe, tol=1e-5)
    latents(fast, VIDEO)  # one call of each network for its shapes, every round one call of each and two for guidance
    for rows in seen.values():
        rows.clear()
    latents(fast, VIDEO)
    assert {name: set(torch.cat(rows).tolist()) for name, rows in seen.items()} == own
    assert all(len(rows) <= 2 * fast.last_solution.stats.rounds for rows in seen.values())
    assert sum(len(row) for rows in seen.values() for row in rows) == 2 * fast.last_solution.stats.evaluations


class Guided(df.StableDiffusionPipeline):
    """A pipeline with guidance of its own scale at every step; 0: none, and no second call."""

    scales: tuple[float, ...] = ()
    inserts = reads = False

    @torch.no_grad()
    def __call__(self, latents: Tensor, prompt_embeds: Tensor) -> Tensor:
        self.scheduler.set_timesteps(len(self.scales))
        known = torch.zeros_like(latents[..., :2])
        for i, t in enumerate(self.scheduler.timesteps):
            output = self.unet(latents, t, prompt_embeds).sample
            if self.scales[i]:
                other = self.unet(latents, t, -prompt_embeds).sample
                output = output + self.scales[i] * (output - other)
            if self.reads:
                output = output * latents.std()
            latents = self.scheduler.step(output, t, latents).prev_sample
            if self.inserts:
                latents[..., :2] = known + i
        return latents


GIVEN = dict(latents=normals(7, 2, 4, 8, 8), prompt_embeds=SD["prompt_embeds"])


def guided(**settings: Any) -> Any:  # noqa: ANN401 - a pipeline
    pipe = stable_diffusion(type("Guided", (Guided,), {**settings, "__call__": Guided.__call__}))
    pipe.scheduler = df.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    return pipe


def test_every_network_row_is_counted_once() -> None:
    pipe, seen = guided(scales=(0, 0, 2, 2, 2, 0, 0, 0)), []
    pipe.unet.register_forward_pre_hook(lambda network, args: seen.append(len(args[0])))
    fast = parallelize(pipe, tol=1e-5)
    fast(**GIVEN)
    assert 2 * fast.last_solution.stats.evaluations == sum(seen)
    assert fast.last_solution.stats.evaluations_per_sample.sum() == sum(seen)


@pytest.mark.parametrize("inserts", [False, True])
@pytest.mark.parametrize(
    "scales", [(2, 2, 2, 2, 0, 0, 0, 0), (0, 0, 2, 2, 2, 0, 0, 0), (2, 0, 0, 0, 0, 0, 0, 1), (0, 1, 2, 3, 0, 1, 2, 3)]
)
def test_guidance_may_come_and_go(scales: tuple[float, ...], inserts: bool) -> None:
    pipe = guided(scales=scales, inserts=inserts)
    got, want = parallelize(pipe, tol=1e-5)(**GIVEN), pipe(**GIVEN)
    assert apart(got, want) <= 3e-5
    if inserts:  # the code after the last step has the last word
        assert torch.equal(got[..., :2], want[..., :2]) and bool((got[..., :2] == len(scales) - 1).all())


class Remembers(df.StableDiffusionPipeline):
    """A pipeline that keeps something from one step to the next, or decides by its state."""

    how = ""

    @torch.no_grad()
    def __call__(self, latents: Tensor, prompt_embeds: Tensor, steps: int = 6) -> Tensor:
        self.scheduler.set_timesteps(steps)
        count, other = 0, None
        for i, t in enumerate(self.scheduler.timesteps):
            output = self.unet(latents, t, prompt_embeds).sample
            other = None if self.how == "other form" else other
            if self.how == "output" and i % 2 == 0 or self.how == "other form" and i >= 3:
                other = self.unet(latents, t, -prompt_embeds[:, : None if self.how == "output" else 3]).sample
            counted = self.how == "count" and count % 3 == 0
            if counted:
                other = self.unet(latents, t, -prompt_embeds).sample
            if other is not None and (self.how != "count" or counted):
                output = output + 2 * (output - other)
            if self.how == "threshold":
                output = output * (3.0 if latents.std() > 5 else 1.0)
            latents, count = self.scheduler.step(output, t, latents).prev_sample, count + 1
        return latents


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("steps", [4, 6])
@pytest.mark.parametrize("how", ["output", "count", "threshold"])
def test_what_is_kept_from_step_to_step_or_read_of_the_state_is_refused(how: str, steps: int, batch: int) -> None:
    # Converged 0.01 to 0.19 away: the stand-ins of one pass were those of the others, their states all large.
    pipe = stable_diffusion(type("Remembers", (Remembers,), {"how": how, "__call__": Remembers.__call__}))
    with pytest.raises(UnsupportedError, match="keeps something from one|in more than 4 ways|several steps"):
        parallelize(pipe, tol=1e-5, max_batch=4)(**{name: value[:batch] for name, value in GIVEN.items()}, steps=steps)


def test_a_call_of_another_form_at_some_steps_is_a_phase() -> None:
    pipe = stable_diffusion(type("Remembers", (Remembers,), {"how": "other form", "__call__": Remembers.__call__}))
    assert apart(parallelize(pipe, tol=1e-5)(**GIVEN), pipe(**GIVEN)) <= 3e-5


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_few_rounds_return_an_estimate(limit: int) -> None:
    pipe = wan()
    found = latents(parallelize(pipe, tol=1e-5, max_rounds=limit), VIDEO)
    assert float(found.abs().max()) < 100  # not the states of the rehearsal, of 8192 and more


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError("out of memory"), KeyboardInterrupt()])
def test_a_network_may_fail_in_the_second_call_of_a_pass(error: BaseException) -> None:
    pipe, calls = wan(), []

    def hook(network: Any, args: Any, kwargs: Any) -> None:  # noqa: ANN401 - torch's own
        calls.append(len(kwargs["timestep"]))
        if len(calls) == 12 and calls[-1] > 1:  # the second of a pass
            raise error

    fast = parallelize(pipe, tol=1e-5)
    latents(fast, VIDEO)
    want = latents(pipe, VIDEO)
    pipe.transformer_2.register_forward_pre_hook(hook, with_kwargs=True)
    got = latents(fast, VIDEO)
    assert len(calls) >= 12 and got.isfinite().all()
    if isinstance(error, KeyboardInterrupt):
        assert fast.last_solution.status[0].name == "INTERRUPTED"
    else:
        assert apart(got, want) <= 3e-5


@pytest.mark.parametrize("inserts", [False, True])
def test_guidance_may_have_another_scale_at_every_step(inserts: bool) -> None:
    pipe = guided(scales=(1, 2, 3, 4, 5, 4, 3), inserts=inserts)
    assert apart(parallelize(pipe, tol=1e-5)(**GIVEN), pipe(**GIVEN)) <= 3e-5


@pytest.mark.parametrize("steps", [1, 2, 4, 5])
def test_guidance_that_reads_the_state_is_refused_for_few_steps_too(steps: int) -> None:
    with pytest.raises(UnsupportedError, match="reads the state|treats the samples|does not work with rows"):
        parallelize(guided(scales=(1,) * steps, reads=True))(**GIVEN)
