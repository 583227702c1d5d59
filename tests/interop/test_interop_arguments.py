"""What networks are given: every argument as the pipeline itself hands it over, by name, by row and by step."""

from __future__ import annotations

from typing import Any

import diffusers as df
import pytest
import torch
from tiny import CASES, normals, prompts, stable_diffusion
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from piadm.interop.diffusers import parallelize
from piadm.interop.diffusers.arguments import Rows, Slot
from piadm.interop.diffusers.clipping import Clipping
from piadm.interop.diffusers.crew import run_here
from piadm.interop.diffusers.fixed import Fixed
from piadm.interop.diffusers.levels import Estimate
from piadm.interop.diffusers.proxies import NetworkProxy

FEW = dict(num_inference_steps=8, output_type="latent")
# The tolerance of the runs below, and float32 roundings of latents of size ten.
CLOSE = 1e-4


def images(pipe: Any, **call: Any) -> Tensor:  # noqa: ANN401 - a pipeline
    torch.manual_seed(0)  # encoders of images draw from it
    return pipe(**call, generator=torch.Generator().manual_seed(1))[0]


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean().sqrt())


@pytest.mark.parametrize("name", ["Flux", "SD3, ControlNet of one block"])
def test_the_scale_of_an_adapter_is_that_of_the_call(name: str) -> None:
    # diffusers reads it in a decorator of ``forward``, among the arguments that are given by name.
    peft = pytest.importorskip("peft")
    pipe, call = CASES[name].build(), CASES[name].call | FEW
    layers = dict(target_modules=["to_q", "to_v"], init_lora_weights=False)
    torch.manual_seed(0)
    pipe.transformer.add_adapter(peft.LoraConfig(r=2, lora_alpha=4, **layers))
    scaled = call | dict(joint_attention_kwargs=dict(scale=0.1))
    want = images(pipe, **scaled)
    assert apart(want, images(pipe, **call)) > 100 * CLOSE
    assert apart(images(parallelize(pipe, tol=CLOSE, nodes="all"), **scaled), want) <= CLOSE


@pytest.mark.parametrize("name", ["Flux", "SD3, ControlNet of one block"])
def test_hooks_of_a_network_see_its_arguments_by_name(name: str) -> None:
    pipe, call = CASES[name].build(), CASES[name].call | FEW
    plain = images(pipe, **call)

    def hook(network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401 - torch's own
        return args, kwargs | dict(pooled_projections=0 * kwargs["pooled_projections"])

    pipe.transformer.register_forward_pre_hook(hook, with_kwargs=True)
    want = images(pipe, **call)
    assert apart(want, plain) > 100 * CLOSE
    assert apart(images(parallelize(pipe, tol=CLOSE, nodes="all"), **call), want) <= CLOSE


class Takes(nn.Module):
    """A network with arguments of every kind; it returns what it was given."""

    def forward(self, sample: Any, timestep: Any, *rest: Any, flag: bool = False, **more: Any) -> Any:  # noqa: ANN401
        return sample, timestep, rest, flag, more


@pytest.mark.parametrize(
    "args, kwargs",
    [((1,), dict(timestep=2)), ((1, 2, 3, 4), dict(flag=True, other=5)), ((), dict(sample=1, timestep=2, other=3))],
)
def test_a_call_is_split_as_the_pipeline_splits_it(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    network, seen = Takes(), []
    network.register_forward_pre_hook(lambda _, *given: seen.append(given), with_kwargs=True)
    want = network(*args, **kwargs)
    assert NetworkProxy(network, "network", lambda proxy, given: proxy.run(given))(*args, **kwargs) == want
    assert seen[0] == seen[1]


class Briefly(df.StableDiffusionPipeline):
    """A pipeline with a condition that holds for a few of its steps, as ``control_guidance_start`` and ``end`` make."""

    holds = range(58, 61)

    @torch.no_grad()
    def __call__(self, latents: Tensor, prompt_embeds: Tensor) -> Tensor:
        self.scheduler.set_timesteps(120)
        for i, t in enumerate(self.scheduler.timesteps):
            known = prompt_embeds * (30.0 if i in self.holds else 1.0)
            output = self.unet(latents, t, encoder_hidden_states=known).sample
            latents = self.scheduler.step(output, t, latents).prev_sample
        return latents


def test_conditions_of_a_few_steps_are_not_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = stable_diffusion(Briefly)
    call = dict(latents=normals(7, 1, 4, 8, 8), prompt_embeds=prompts(1)["prompt_embeds"])
    fast, want = parallelize(pipe, tol=0.2), pipe(**call)
    assert apart(parallelize(pipe, tol=2e-3)(**call), want) <= 2e-3
    fast(**call)
    assert fast.last_solution is not None and fast.last_solution.stats.nodes == 120
    monkeypatch.setattr(Briefly, "holds", range(0))
    assert apart(pipe(**call), want) > 6e-3  # the condition matters
    fast(**call)
    assert fast.last_solution.stats.nodes < 120  # nothing but the time changes


@pytest.mark.parametrize("layers", [2, 3, 4])
@pytest.mark.parametrize("changes", [False, True])
def test_conditions_of_several_layers_go_with_their_row(layers: int, changes: bool) -> None:
    # HiDream's; two samples and guidance make four rows, as many as there may be layers.
    state = torch.tensor([[1.0], [2.0]])
    known = torch.arange(4.0 * layers).reshape(layers, 4, 1, 1).expand(layers, 4, 5, 3)
    slot = Slot("network", {"sample": state.repeat(2, 1), "encoder_hidden_states_llama3": known}, state, denoises=True)
    for k in range(3):
        own = known + 100 * k * changes
        slot.learn({"sample": state.repeat(2, 1), "encoder_hidden_states_llama3": own}, state)
    samples, calls = torch.tensor([1, 0, 1]), torch.tensor([2, 0, 0])
    given = run_here(slot, lambda arguments: arguments, {}, Rows(state[samples], samples, calls))
    rows = torch.tensor([1, 0, 1, 3, 2, 3])
    want = known[:, rows] + 100 * changes * calls.repeat(2)[:, None, None]
    assert torch.equal(given["encoder_hidden_states_llama3"], want)


@pytest.mark.parametrize("name", ["encoder_hidden_states", "encoder_hidden_states_image"])
def test_conditions_with_several_rows_per_sample_go_with_their_sample(name: str) -> None:
    state, each = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.arange(6.0)[:, None]  # two samples, three rows each
    slot = Slot("network", {"sample": state, name: each}, state, denoises=True)
    for _ in range(2):
        slot.learn({"sample": state, name: each}, state)
    samples = torch.tensor([1, 0, 1])
    rows = Rows(state[samples], samples, samples)
    given = run_here(slot, lambda arguments: arguments, {"sample": state, name: each}, rows)
    assert given[name].flatten().tolist() == [3, 4, 5, 0, 1, 2, 3, 4, 5]


def test_what_another_network_returns_is_split_and_joined_by_network_row() -> None:
    # Of each of two rows, in both chunks, it has two frames, and a second output that is None.
    state = torch.tensor([[1.0], [2.0]])
    asked = {"sample": state.repeat(2, 1), "residual": torch.full((8, 1), torch.nan)}
    slot = Slot("network", asked, state, denoises=True)
    for _ in range(2):
        slot.learn(asked, state)
    rows = Rows(state, torch.arange(2), torch.zeros(2, dtype=torch.long))
    live = dict(asked, residual=torch.arange(8.0)[:, None])
    pieces = [piece for part in (slice(1, 2), slice(0, 1)) for piece in slot.pieces(live, rows, part)]
    assert [piece.arguments["residual"].flatten().tolist() for piece in pieces] == [[2, 3, 6, 7], [0, 1, 4, 5]]
    whole, nothing = slot.joined(pieces, [(piece.arguments["residual"], None) for piece in pieces])
    assert torch.equal(whole, live["residual"]) and nothing is None


@pytest.mark.parametrize("scales", [torch.ones(1), torch.tensor([0.3, 1.7])])
@pytest.mark.parametrize("name", ["control_hidden_states_scale", "indices_latents_history_2x"])
def test_what_has_an_entry_per_layer_or_frame_is_shared_by_all_rows(scales: Tensor, name: str) -> None:
    # Wan-VACE's scales, of as many layers as there are rows; the numbers of HunyuanVideo-Framepack's frames.
    state = torch.arange(float(len(scales)))[:, None]
    arguments = {"hidden_states": state, name: scales}
    slot = Slot("network", arguments, state, denoises=True)
    for _ in range(3):
        slot.learn(arguments, state)
    samples = torch.zeros(5, dtype=torch.long)
    given = run_here(slot, lambda arguments: arguments, {}, Rows(state[samples], samples, samples))
    assert torch.equal(given[name], scales)


@pytest.mark.parametrize(
    "name, value",
    [
        ("visual_rope_pos", [torch.arange(1), torch.arange(3)]),  # Kandinsky 5's, of an image
        ("text_rope_pos", torch.arange(1)),
        ("padding_mask", torch.zeros(1, 1, 4, 4)),  # Cosmos'
    ],
)
def test_what_all_rows_share_is_not_multiplied_for_a_single_sample(name: str, value: Any) -> None:  # noqa: ANN401
    state = torch.ones(1, 1)
    arguments = {"hidden_states": state, name: value}
    slot = Slot("network", arguments, state, denoises=True)
    for _ in range(3):
        slot.learn(arguments, state)
    samples = torch.zeros(5, dtype=torch.long)
    given = run_here(slot, lambda arguments: arguments, {}, Rows(state[samples], samples, samples))
    for found, wanted in zip(given[name], value, strict=True):
        assert torch.equal(found, wanted)


def test_what_the_pipeline_sets_is_put_into_its_rows() -> None:
    mask = normals(1, 2, 3, 4) > 0.5
    values = [normals(k, int(mask.sum())) for k in range(2, 7)]  # calls 1 to 5
    samples, calls = torch.tensor([1, 0, 0, 1, 1]), torch.tensor([0, 0, 3, 5, 1])
    state = normals(9, 5, 3, 4)
    want = state.clone()
    for row, sample, call in zip(want, samples.tolist(), calls.tolist(), strict=True):
        if call:
            whole = torch.zeros(2, 3, 4)
            whole[mask] = values[call - 1]
            row[mask[sample]] = whole[sample][mask[sample]]
    Fixed(mask, values).put(state, samples, calls)
    assert torch.equal(state, want)


class Waits(TorchDispatchMode):
    """Notes what would make a host wait for its device, or a device for numbers of the host."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        if func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
            self.seen.append(str(func))
        return func(*args, **kwargs or {})


def test_a_round_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    state, known = normals(1, 2, 3), normals(2, 2, 5)
    arguments = {"sample": state, "timestep": torch.tensor(5.0), "known": known, "flag": True}
    slot = Slot("network", arguments, state, denoises=True)
    for k in range(4):
        slot.learn(arguments | {"timestep": torch.tensor(5.0 - k)}, state)
    share = torch.linspace(0.1, 0.4, 4, dtype=torch.float64)
    clipping = Clipping(lambda estimate: estimate.clamp(-1, 1), share, torch.eye(4, dtype=torch.float64))
    told = Estimate(share, share.flip(0), clipping)
    fixed = Fixed(state > 0, [state[state > 0]] * 3)
    samples, calls = torch.tensor([1, 0, 1]), torch.tensor([3, 0, 1])
    rows = Rows(state[samples], samples, calls)

    def round_() -> Tensor:
        fixed.put(rows.state, samples, calls)
        given = run_here(slot, lambda arguments: arguments, arguments, rows)
        return near(given["sample"], given["known"][:, :3], calls)

    near = told.to(state)
    want = round_()
    assert near.to(state) is near and torch.equal(want, told(rows.state, known[samples][:, :3], calls))
    monkeypatch.setattr(Tensor, "tolist", None)
    with Waits() as waits:
        assert torch.equal(round_(), want)
    assert not waits.seen
