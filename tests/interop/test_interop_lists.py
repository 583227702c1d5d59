"""Networks that take and return lists with one tensor per row, and pipelines that walk these lists."""

from __future__ import annotations

from typing import Any

import diffusers as df
import pytest
import torch
from tiny import CASES, SHIFTED, image, normals, quiet, vae, z_image
from torch import Tensor, nn

from piadm.interop.diffusers import UnsupportedError, parallelize
from piadm.interop.diffusers.arguments import Rows, Slot
from piadm.interop.diffusers.crew import run_here
from piadm.interop.diffusers.proxies import NetworkProxy

FEW = dict(num_inference_steps=8, output_type="latent")


def images(pipe: Any, **call: Any) -> Tensor:  # noqa: ANN401 - a pipeline
    return pipe(**call, generator=torch.Generator().manual_seed(1))[0]


def test_lists_reach_a_network_and_come_back_as_lists() -> None:
    captions = [normals(seed, length, 16) for seed, length in enumerate((2, 3, 5))]
    given = dict(x=[normals(seed, 4, 1, 8, 8) for seed in range(3)], t=torch.ones(3), cap_feats=captions)
    seen: list[dict[str, Any]] = []

    class Lists(nn.Module):
        def forward(self, x: list[Tensor], t: Tensor, cap_feats: list[Tensor]) -> tuple[list[Tensor]]:
            seen.append(dict(x=x, t=t, cap_feats=cap_feats))
            return ([one * two.mean() for one, two in zip(x, cap_feats, strict=True)],)

    def answer(proxy: NetworkProxy, arguments: dict[str, Any]) -> Any:  # noqa: ANN401 - a network's output
        states = torch.stack(given["x"]).squeeze(2)
        slot = Slot("network", arguments, states, denoises=True)
        slot.learn(arguments, states)
        samples = torch.tensor([2, 0, 2, 1])
        state = slot.state.of(arguments["x"][0])[samples] + 1
        return run_here(slot, proxy.run, arguments, Rows(state, samples, torch.zeros(4, dtype=torch.int64)))

    (found,) = NetworkProxy(Lists(), "network", answer)(**given)
    assert [list(one.shape) for one in seen[0]["cap_feats"]] == [[5, 16], [2, 16], [5, 16], [3, 16]]
    for one, sample in zip(found, (2, 0, 2, 1), strict=True):
        assert torch.equal(one, (given["x"][sample] + 1) * captions[sample].mean())


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("more", [{}, dict(cfg_truncation=0.5)])
def test_guidance_that_counts_its_samples_is_given_several_rows_in_one(more: dict[str, Any], batch: int) -> None:
    texts = dict(prompt_embeds=[normals(3, 5, 16)] * batch, negative_prompt_embeds=[torch.zeros(3, 16)] * batch)
    call = CASES["Z-Image"].call | FEW | texts | dict(guidance_scale=3.0, **more)
    pipe = CASES["Z-Image"].build()
    fast = parallelize(pipe, tol=1e-5)
    got, want = images(fast, **call), images(pipe, **call)
    assert fast.last_solution.converged
    assert float((got - want).square().mean().sqrt()) <= 2e-5  # the tolerance, and rounding of states of size one


def test_guidance_that_measures_whole_samples_is_refused_in_lists() -> None:
    guided = CASES["Z-Image"].call | FEW | dict(guidance_scale=3.0, negative_prompt_embeds=[torch.zeros(3, 16)] * 2)
    with pytest.raises(UnsupportedError, match="treats the samples of a batch differently"):
        images(parallelize(CASES["Z-Image"].build(), nodes="all"), **guided, cfg_normalization=True)


def test_a_control_network_that_takes_lists_feeds_the_rows_of_a_round() -> None:
    plain = z_image()
    control = df.ZImageControlNetModel(
        control_layers_places=[0], control_refiner_layers_places=[0], control_in_dim=4, dim=32, n_refiner_layers=1,
        n_heads=2, n_kv_heads=2,
    )  # fmt: skip
    for parameter in control.parameters():  # outputs start at zero
        nn.init.normal_(parameter, std=0.1)
    control = df.ZImageControlNetModel.from_transformer(control.eval(), plain.transformer)
    parts = dict(transformer=plain.transformer, vae=vae(**SHIFTED), scheduler=plain.scheduler, controlnet=control)
    pipe = quiet(df.ZImageControlNetPipeline, "text_encoder", "tokenizer", **parts)
    texts = dict(prompt_embeds=[normals(3, 5, 16)] * 2, negative_prompt_embeds=[torch.zeros(3, 16)] * 2)
    call = CASES["Z-Image"].call | FEW | texts | dict(guidance_scale=3.0)
    fast = parallelize(pipe, tol=1e-5)
    got, want = (images(one, **call, control_image=image(32)) for one in (fast, pipe))
    other = images(pipe, **call, control_image=1 - image(32))
    assert float((got - want).square().mean().sqrt()) <= 2e-5 < 1e-2 < float((other - want).square().mean().sqrt())
