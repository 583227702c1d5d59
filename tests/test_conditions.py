"""Conditions in nested mappings, lists and tuples: what has rows there is handed over as it is on its own."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import piadm
from piadm.conditions import parts, with_rows
from piadm.workers.merge import part_of

VP = piadm.VPSchedule()
NONE = torch.zeros(1, 4)


class Observation(NamedTuple):
    image: Tensor
    state: Tensor


class Whole:
    """No mapping, list or tuple."""

    def __init__(self, table: Tensor) -> None:
        self.table = table


class Net(nn.Module):
    """A network on two tensors, however they are nested."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:  # noqa: ANN401 - any nesting
        image, state = flat(condition)
        return torch.tanh(x @ self.weight + image.mean(1) + state * t[:, None].to(x))


def flat(condition: object) -> list[Tensor]:
    """The tensors within."""
    if isinstance(condition, Tensor):
        return [condition]
    return [tensor for item in (parts(condition) or {}).values() for tensor in flat(item)]


def tensors(batch: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, 4, generator=draw), torch.randn(batch, 4, generator=draw)


NESTED: dict[str, Callable[[Tensor, Tensor], dict[str, Any]]] = {
    "dict": lambda image, state: {"obs": {"image": image, "state": state, "task": "pour", "rate": 2.0}},
    "deep": lambda image, state: {"obs": {"cameras": [{"left": image}], "arm": (state, None)}},
    "list": lambda image, state: {"obs": [image, state]},
    "tuple": lambda image, state: {"obs": (image, state)},
    "named tuple": lambda image, state: {"obs": Observation(image, state)},
    "mapping": lambda image, state: {"obs": MappingProxyType({"image": image, "state": state})},
    "arrays": lambda image, state: {"obs": [image.numpy(), state.numpy()]},
}
RUNS: dict[str, dict[str, Any]] = {
    "sample": dict(method="ode", steps=60),
    "sample_sequential": dict(method="sde", steps=10),
}
each_run = pytest.mark.parametrize("sampler", RUNS)


@each_run
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("nest", NESTED.values(), ids=NESTED)
def test_nested_conditions_sample_as_flat_ones(sampler: str, batch: int, nest: Any) -> None:  # noqa: ANN401
    def run(condition: Mapping[str, Any], **more: object) -> piadm.Solution:
        given = RUNS[sampler] | {"condition": condition} | more
        return getattr(piadm, sampler)(piadm.Denoiser(Net(), VP, "sample"), (batch, 4), **given)

    image, state = tensors(batch)
    want, found = run({"image": image, "state": state}), run(nest(image, state))
    assert torch.equal(found.sample, want.sample) and found.stats.rounds == want.stats.rounds
    shared = run(nest(image, state), workers=piadm.Devices(["cpu", "cpu"]))
    assert (shared.sample - want.sample).abs().max() <= 1e-6


def test_containers_keep_their_kind_and_the_rest_goes_whole() -> None:
    seen: list[dict[str, Any]] = []

    def network(x: Tensor, t: Tensor, **condition: Any) -> Tensor:  # noqa: ANN401 - any nesting
        seen.append(condition)
        return torch.zeros_like(x)

    image, state = tensors(2)
    same = {"words": ["pour", "tea"], "box": Whole(torch.zeros(5)), "sizes": MappingProxyType({"height": 3})}
    given = same | {
        "named": Observation(image, state), "list": [image], "tuple": (image, 3), "dict": OrderedDict(image=image),
        "mapping": MappingProxyType({"image": image}), "empty": [],
    }  # fmt: skip
    piadm.sample_sequential(piadm.Denoiser(network, VP, "sample"), (2, 4), steps=1, condition=given)
    got = seen[0]
    assert all(got[name] is value for name, value in same.items())
    kinds = {"named": Observation, "list": list, "tuple": tuple, "dict": dict, "mapping": dict, "empty": list}
    assert {name: type(got[name]) for name in kinds} == kinds
    assert torch.equal(got["named"].state, state) and got["tuple"][1] == 3
    got["list"][0].zero_()  # what a network does to its rows is no concern of the caller
    assert torch.equal(given["list"][0], image) and bool(image.any())


@each_run
@pytest.mark.parametrize(
    "value, message",
    [
        ({"image": torch.zeros(4, 3)}, r"condition\['obs'\]\['image'\] must .* \(2, ...\), got shape \(4, 3\)"),
        ([{"a": (torch.tensor(1.0),)}], r"condition\['obs'\]\[0\]\['a'\]\[0\] must have one row .* got shape \(\)"),
        ((1, np.zeros(3)), r"condition\['obs'\]\[1\] must have one row per sample"),
    ],
    ids=["dict", "deep", "array"],
)
def test_rows_that_do_not_fit_are_named_by_the_way_to_them(sampler: str, value: object, message: str) -> None:
    denoiser = piadm.Denoiser(lambda x, t, obs: pytest.fail("called"), VP, "sample")
    with pytest.raises(ValueError, match=message):
        getattr(piadm, sampler)(denoiser, (2, 4), condition={"obs": value}, **RUNS[sampler])


def test_ranks_take_the_rows_of_their_samples() -> None:
    image, state = tensors(5)
    given = dict(shape=(5, 4), seed=0, initial=None, noise=None)
    own = part_of(given | {"condition": {"obs": {"image": image, "rest": [state, "tea"]}}}, 1, 3)["condition"]
    assert torch.equal(own["obs"]["image"], image[1:3]) and torch.equal(own["obs"]["rest"][0], state[1:3])
    assert own["obs"]["rest"][1] == "tea"
    assert part_of(given | {"condition": None}, 1, 3)["condition"] is None


@pytest.mark.parametrize("pad", [False, True], ids=["bare", "padded"])
def test_guidance_and_padding_reach_what_is_nested(pad: bool) -> None:
    network = piadm.CompiledNetwork(Net(), compile=False) if pad else Net()
    image, state = tensors(3)

    def run(null: dict[str, Any], condition: dict[str, Any]) -> Tensor:
        guided = piadm.GuidedNetwork(network, 2.0, null)
        return piadm.sample(piadm.Denoiser(guided, VP, "sample"), (3, 4), steps=20, condition=condition).sample

    want = run({"image": NONE, "state": 0.0}, {"image": image, "state": state})
    nested = {"obs": {"image": image, "task": ["pour"]}, "state": (state,)}
    assert torch.equal(run({"obs": {"image": NONE, "task": ["pour"]}, "state": [0.0]}, nested), want)
    with pytest.raises(piadm.NetworkError, match=r"condition\['obs'\]\['task'\]\[0\], which guidance varies"):
        run({"obs": {"image": NONE, "task": ["sweep"]}, "state": [0.0]}, nested)


def test_what_has_no_rows_is_itself() -> None:
    condition = {"a": [1, {"b": "c"}], "d": np.array(["e"])}
    assert with_rows(condition, lambda value, name: pytest.fail(name)) is condition


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_rows_of_several_shapes_are_refused(layout: torch.layout) -> None:
    ragged = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=layout)
    denoiser = piadm.Denoiser(lambda x, t, a: pytest.fail("the network was called"), VP, "sample")
    with pytest.raises(TypeError, match=r"condition\['a'\] must have rows of one shape, got a nested tensor"):
        piadm.sample(denoiser, (2, 4), condition={"a": ragged})


def test_a_tensor_without_numbers_is_refused() -> None:
    denoiser = piadm.Denoiser(lambda x, t, obs: pytest.fail("the network was called"), VP, "sample")
    with pytest.raises(TypeError, match=r"condition\['obs'\]\['a'\] must hold numbers, got .* 'meta'"):
        piadm.sample(denoiser, (2, 4), condition={"obs": {"a": torch.zeros(2, 3, device="meta")}})
