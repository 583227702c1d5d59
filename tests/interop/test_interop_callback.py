"""Step numbers and the user's callback: it hears of every step, may look and interrupt, and may change nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import SD, normals, stable_diffusion
from torch import Tensor

import piadm
from piadm.interop.diffusers import UnsupportedError, parallelize
from piadm.interop.diffusers.loop import Loop

CALL = dict(SD, num_inference_steps=12, output_type="latent", latents=normals(7, 2, 4, 8, 8))

#: What a callback does to the pipeline that it is given and to the values.
Change = Callable[[Any, dict[str, Any]], dict[str, Any] | None]


def guidance(pipe: Any, values: dict[str, Any]) -> None:  # noqa: ANN401 - a pipeline
    pipe._guidance_scale = 1.5


def in_place(pipe: Any, values: dict[str, Any]) -> None:  # noqa: ANN401 - a pipeline
    values["latents"].mul_(0.5)


def returned(pipe: Any, values: dict[str, Any]) -> dict[str, Any]:  # noqa: ANN401 - a pipeline
    values["latents"] = values["latents"] * 0.5
    return values


def in_the_network(pipe: Any, values: dict[str, Any]) -> None:  # noqa: ANN401 - a pipeline
    pipe.unet.down_blocks[1].attentions[0].transformer_blocks[0].attn2.scale = 0.0


CHANGES: dict[str, tuple[Change, str]] = {
    "guidance": (guidance, r"not change pipe\._guidance_scale"),
    "in place": (in_place, "not change latents"),
    "returned": (returned, "not change latents"),
    "in the network": (in_the_network, r"not change scale of unet\..*attn2"),
}


# Before the number of rounds, which are 8 at most, and after it; the very first step and the last.
@pytest.mark.parametrize("at", [0, 3, 11])
@pytest.mark.parametrize("what", CHANGES)
def test_what_changes_something_is_refused_at_whatever_step(what: str, at: int) -> None:
    change, message = CHANGES[what]

    def callback(pipe: Any, i: int, t: Tensor, values: dict[str, Any]) -> dict[str, Any]:  # noqa: ANN401
        return (change(pipe, values) or {}) if i == at else {}

    pipe = stable_diffusion()
    want = pipe(**CALL).images
    with pytest.raises(UnsupportedError, match=f"{message}.* \\(step {at}\\)"):
        parallelize(pipe, tol=1e-4, nodes="all")(**CALL, callback_on_step_end=callback)
    assert torch.equal(pipe(**CALL).images, want)  # what it did to the network is undone


def test_a_change_of_the_original_is_one() -> None:
    pipe = stable_diffusion()
    pipe(**CALL)

    def callback(stage: Any, i: int, t: Tensor, values: dict[str, Any]) -> dict[str, Any]:  # noqa: ANN401
        pipe._guidance_scale = 1.0 + i
        return values

    with pytest.raises(UnsupportedError, match=r"not change pipe\._guidance_scale"):
        parallelize(pipe)(**CALL, callback_on_step_end=callback)


def test_it_hears_of_every_step_at_its_time_and_may_take_notes() -> None:
    pipe, heard = stable_diffusion(), []
    fast = parallelize(pipe, tol=1e-4, nodes="all")
    fast(**CALL)

    def callback(stage: Any, i: int, t: Tensor, values: dict[str, Any]) -> dict[str, Any]:  # noqa: ANN401
        heard.append((i, int(t)))
        stage.notes = i
        return values

    got = fast(**CALL, callback_on_step_end=callback).images
    pipe.scheduler.set_timesteps(12)
    assert heard == list(enumerate(pipe.scheduler.timesteps.tolist()))
    assert torch.equal(got, fast(**CALL).images) and fast.last_solution.converged


@pytest.mark.parametrize("which", ["stage", "original"])
def test_it_may_interrupt_either_pipeline_and_hears_no_more(which: str) -> None:
    pipe, heard = stable_diffusion(), []
    fast = parallelize(pipe, tol=1e-4, nodes="all")

    def callback(stage: Any, i: int, t: Tensor, values: dict[str, Any]) -> dict[str, Any]:  # noqa: ANN401
        heard.append(i)
        if i == 4:
            (stage if which == "stage" else pipe)._interrupt = True
        return values

    fast(**CALL, callback_on_step_end=callback)
    assert set(fast.last_solution.status) == {piadm.Status.INTERRUPTED}
    assert heard[-1] == 4 and not getattr(pipe, "_interrupt", False)


def test_a_loop_that_counts_from_another_number_does_so_in_rounds_too() -> None:
    class Events:
        left = [2, 2]

        def begin(self, timesteps: torch.Tensor) -> None: ...

        def starts(self, step: int) -> None: ...

        def turn_to_rounds(self) -> None: ...

        def repeated(self) -> int | None:
            return self.left.pop() if self.left else None

        def finish(self) -> None: ...

    steps = Loop(Events(), torch.tensor([20, 10, 0])).numbered(1)
    assert [(i, int(t)) for i, t in steps] == [(1, 20), (2, 10), (3, 0), (3, 0), (3, 0)]
