"""Steps that are made again: what goes by the state or is kept shows, and what is drawn is drawn again."""

from __future__ import annotations

from typing import Any

import diffusers as df
import pytest
import torch
from tiny import normals
from torch import Tensor, nn

from piadm.interop.diffusers import UnsupportedError, parallelize
from piadm.interop.diffusers.blend import factor

SHAPE = (2, 4, 6, 4)


class Conditioned(nn.Module):
    """A network that is told something of the state's shape beside the time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(96, 96)

    @property
    def dtype(self) -> torch.dtype:
        return self.layer.weight.dtype

    def forward(self, sample: Tensor, timestep: Tensor, own: Tensor) -> Tensor:
        mixed = self.layer((sample + 0.3 * own).flatten(1)) + timestep.reshape(-1, 1).to(sample)
        return torch.tanh(mixed).reshape(sample.shape)


class Told(df.DiffusionPipeline):
    """A loop that does one thing that others do not; its guidance may change from step to step."""

    def __init__(self, unet: nn.Module, scheduler: Any) -> None:  # noqa: ANN401 - any scheduler
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def __call__(self, how: str, change: float, generator: torch.Generator) -> Tensor:
        self.scheduler.set_timesteps(8)
        last = torch.zeros(SHAPE, dtype=self.unet.dtype)
        latents = torch.randn(SHAPE, generator=generator).to(last) * self.scheduler.init_noise_sigma
        known = normals(1, *SHAPE).to(last)
        for i, t in enumerate(self.scheduler.timesteps):
            read, time, own = self.scheduler.scale_model_input(latents, t), (t / 1000).expand(2), known
            own = last if how == "self-conditioning" else own
            own = latents.mean((2, 3), keepdim=True).expand(SHAPE) if how == "mean" else own
            time = time + 0.1 * latents.std((1, 2, 3)) if how == "time" else time
            own = torch.randn(SHAPE, generator=generator).to(last) if how == "drawn" else own
            last = output = self.unet(read, timestep=time, own=own)
            scale = 1 + change * i
            if how == "in place":
                output *= scale
            else:
                output = scale * output
            if how == "noise":
                output = output + 1e-2 * torch.randn(SHAPE, generator=generator).to(last)
            if how == "scaled":
                output = output + 0.1 * read
            if how == "samples":
                output = output * torch.tensor([3.0, 3.1]).reshape(2, 1, 1, 1).to(last)
            if how == "decides":
                output = output + 0.1 * latents * (latents.std() < 0.5)
            if how == "leaves out":
                output = output + 0.1 * latents * (latents.abs() > 0.5)
            latents = self.scheduler.step(output, t, latents, return_dict=False)[0]
        return latents


def told(**config: Any) -> Told:  # noqa: ANN401 - a scheduler's own
    return Told(Conditioned().eval(), df.DDIMScheduler(clip_sample=False, **config))


def seeded(pipe: Any, how: str, change: float) -> Tensor:  # noqa: ANN401 - a pipeline
    found: Tensor = pipe(how, change, torch.Generator().manual_seed(5))
    return found.float()


def apart(got: Tensor, want: Tensor) -> float:
    return float((got - want).square().mean().sqrt() / want.square().mean().sqrt())


# Measured where it changes; in rounds the pipeline's own code is at work where it does not.
CHANGES = pytest.mark.parametrize("change", [0.0, 0.1])


@CHANGES
@pytest.mark.parametrize("how", ["plain", "drawn", "noise", "in place"])
def test_what_is_drawn_or_written_in_place_is_as_in_the_pipeline(how: str, change: float) -> None:
    fast = parallelize(told(), tol=1e-3)  # of latents of size eighty
    assert apart(seeded(fast, how, change), seeded(fast.pipe, how, change)) <= 3e-5
    assert fast.last_solution.converged


@CHANGES
@pytest.mark.parametrize("how, name", [("self-conditioning", "own"), ("mean", "own"), ("time", "timestep")])
def test_what_a_network_is_told_of_the_state_or_of_an_output_is_refused(how: str, name: str, change: float) -> None:
    with pytest.raises(UnsupportedError, match=f"unet is given another {name} when .* makes a step again"):
        seeded(parallelize(told()), how, change)


@CHANGES
@pytest.mark.parametrize("how", ["decides", "leaves out"])
def test_code_that_minds_small_states_only_is_refused(how: str, change: float) -> None:
    with pytest.raises(UnsupportedError, match="nor is what its code computes a sum"):
        seeded(parallelize(told()), how, change)


@CHANGES
def test_code_that_reads_the_scaled_state_is_not_taken_for_code_that_reads_the_state(change: float) -> None:
    pipe = told()
    pipe.scheduler = df.EulerDiscreteScheduler()
    with pytest.raises(UnsupportedError, match="nor is what its code computes a sum"):
        seeded(parallelize(pipe), "scaled", change)


def test_scales_of_samples_that_are_alike_are_told_apart_in_half_precision() -> None:
    pipe, exact = told(), seeded(told(), "samples", 0.1)
    pipe.unet.to(torch.bfloat16)
    error, own = (apart(seeded(which, "samples", 0.1), exact) for which in (parallelize(pipe, tol=1e-4), pipe))
    assert error <= own


@pytest.mark.parametrize("dtype, rounding", [(torch.bfloat16, 2.0**-4), (torch.float32, 1e-5)])
def test_factors_are_numbers_along_axes_where_means_find_rounding_alone(dtype: torch.dtype, rounding: float) -> None:
    given = (1 + torch.rand(2, 4, 64, 64, generator=torch.Generator().manual_seed(0))).to(dtype)
    scales = torch.tensor([1.0, 1.02], dtype=torch.float64).reshape(2, 1, 1, 1)
    for scale, shape in ((scales, (2, 1, 1, 1)), (scales[:1], (1, 1, 1, 1))):
        found = factor((scale * given.double()).to(dtype).float(), given.float(), rounding)
        assert found.shape == shape
        assert torch.allclose(found.double(), scale, rtol=2.0**-10)  # half of the largest rounding
