"""States that are a part of what the network reads, laid out otherwise, or changed on the way at some steps."""

from __future__ import annotations

from typing import Any

import diffusers as df
import pytest
import torch
from torch import Tensor, nn

from piadm.interop.diffusers import UnsupportedError, parallelize

SHAPE = (3, 4, 2, 2)  # channels, frames, height, width


class Mixer(nn.Module):
    """A network that mixes all entries of a row."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3 * 4 * 4, 3 * 4 * 4)

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        flat = hidden_states.flatten(1)
        mixed = self.layer(nn.functional.pad(flat, (0, 48 - flat.shape[1])) if flat.shape[1] < 48 else flat[:, -48:])
        return torch.tanh(mixed + timestep.reshape(-1, 1) / 1000)


class Video(df.DiffusionPipeline):
    """A loop whose first frame is known, as those of image-to-video pipelines are."""

    def __init__(self, transformer: nn.Module, scheduler: Any) -> None:  # noqa: ANN401 - any scheduler
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, how: str, at: int = -1, batch: int = 2, generator: Any = None) -> Tensor:  # noqa: ANN401
        latents = torch.randn(batch, *SHAPE, generator=generator)
        known = torch.linspace(-1, 1, 12).reshape(1, 3, 1, 2, 2).expand(batch, -1, -1, -1, -1)
        mask = torch.ones(1, 1, 4, 1, 1)
        mask[:, :, 0] = 0
        self.scheduler.set_timesteps(6)
        for i, t in enumerate(self.scheduler.timesteps):
            whole, state = latents, latents
            if how == "mask":  # Wan 2.2, 5B
                whole = torch.cat([known, latents[:, :, 1:]], 2) if i != at else latents
            elif how == "tokens":  # LTX
                state = latents[:, :, 1:]
                whole = torch.cat([known, state], 2).flatten(2).transpose(1, 2)
            elif how == "block":  # Kandinsky 5
                state = latents[:, :, 1:]
                whole = torch.cat([torch.cat([known, state], 2), mask.expand(batch, 1, 4, 2, 2)], 1)
            if how == "half" and i == at:
                whole = whole / 2
            if how == "shifted" and i == at:
                whole = whole + 1
            output = self.transformer(whole, t)
            output = output.reshape(len(output), *SHAPE)[:, :, -state.shape[2] :]
            state = self.scheduler.step(output, t, state, return_dict=False)[0]
            latents = torch.cat([latents[:, :, : 4 - state.shape[2]], state], 2)
        return latents


def video() -> Video:
    return Video(Mixer().eval(), df.FlowMatchEulerDiscreteScheduler())


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("how", ["plain", "mask", "tokens", "block"])
def test_a_state_is_found_within_what_the_network_reads(how: str, batch: int) -> None:
    pipe = video()
    want = pipe(how, batch=batch, generator=torch.Generator().manual_seed(0))
    fast = parallelize(pipe, tol=1e-4, nodes="all")
    got = fast(how, batch=batch, generator=torch.Generator().manual_seed(0))
    assert fast.last_solution.status[0].name == "CONVERGED"
    assert torch.allclose(got, want, atol=1e-3)


@pytest.mark.parametrize("at", range(6))
@pytest.mark.parametrize("how", ["half", "shifted", "mask"])
def test_a_network_that_reads_something_else_at_some_steps_is_refused(how: str, at: int) -> None:
    with pytest.raises(UnsupportedError, match="read"):
        parallelize(video(), tol=1e-3)(how, at=at, generator=torch.Generator().manual_seed(0))


class Numbered(Mixer):
    """Reads conditions of rows by their numbers, as OmniGen reads images."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, images: dict[int, float]) -> Tensor:
        hidden_states = hidden_states.clone()
        for row, image in images.items():
            hidden_states[row] += image
        return super().forward(hidden_states, timestep)


class Edit(df.DDIMPipeline):
    def __init__(self, unet: nn.Module, scheduler: Any) -> None:  # noqa: ANN401 - any scheduler
        df.DiffusionPipeline.__init__(self)
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, images: dict[int, float]) -> Tensor:
        latents = torch.zeros(2, *SHAPE)
        self.scheduler.set_timesteps(4)
        for t in self.progress_bar(self.scheduler.timesteps):
            output = self.unet(latents, t, images).reshape(-1, *SHAPE)
            latents = self.scheduler.step(output, t, latents, return_dict=False)[0]
        return latents


def test_conditions_by_number_of_the_row_are_refused() -> None:
    fast = parallelize(Edit(Numbered().eval(), df.FlowMatchEulerDiscreteScheduler()))
    fast({})
    with pytest.raises(UnsupportedError, match="numbers which of its rows images belongs to"):
        fast({0: 1.0, 1: -1.0})


class Plain(Edit):
    """A loop with a scheduler of its own, and as many states as the scheduler's steps per timestep."""

    def __init__(self, unet: nn.Module, scheduler: Any = None) -> None:  # noqa: ANN401 - any scheduler
        super().__init__(unet, df.FlowMatchEulerDiscreteScheduler() if scheduler is None else scheduler)

    @torch.no_grad()
    def __call__(self, states: int = 1, generator: Any = None, **times: Any) -> Tensor:  # noqa: ANN401
        latents = [torch.randn(2, *SHAPE, generator=generator) * 80 ** bool(times)] * states
        self.scheduler.set_timesteps(**times or dict(num_inference_steps=6))
        wuerstchen = isinstance(self.scheduler, df.DDPMWuerstchenScheduler)
        timesteps = self.scheduler.timesteps[: -1 if wuerstchen else None]
        for _, t in enumerate(timesteps):
            output = self.unet(latents[0], t).reshape(-1, *SHAPE)
            stamp = t.expand(len(output)) if wuerstchen else t
            more = dict(generator=generator) if wuerstchen else {}
            latents = [self.scheduler.step(output, stamp, own, **more).prev_sample for own in latents]
        return latents[0]


@pytest.mark.parametrize(
    "scheduler, times",
    [
        (None, {}),  # LongCat's audio pipeline: no component, but there
        (df.FlowMatchEulerDiscreteScheduler(), dict(sigmas=[80.0, 40.0, 10.0, 2.0, 0.5, 0.1])),  # Cosmos 2
        (df.DDPMWuerstchenScheduler(), {}),  # Stable Cascade
    ],
)
def test_schedulers_of_single_pipelines(scheduler: Any, times: dict[str, Any]) -> None:  # noqa: ANN401
    pipe = Plain(Mixer().eval(), *[] if scheduler is None else [scheduler])
    want = pipe(generator=torch.Generator().manual_seed(0), **times)
    fast = parallelize(pipe, tol=1e-4, nodes="all")
    got = fast(generator=torch.Generator().manual_seed(0), **times)
    assert fast.last_solution.status[0].name == "CONVERGED"
    assert torch.allclose(got, want, atol=1e-3)


def test_several_states_are_refused() -> None:
    # LTX 2's, of video and sound.
    with pytest.raises(UnsupportedError, match="several steps of a scheduler per timestep"):
        parallelize(Plain(Mixer().eval()))(states=2)
