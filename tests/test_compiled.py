"""Compiled networks: static shapes, and the same answers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, fx, nn

import piadm
from piadm.compiled import SIZES
from piadm.network import network_dtype


class Counter:
    """A compiler that keeps the shapes it was asked to compile for, and compiles nothing."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, graph: fx.GraphModule, inputs: list[Tensor]) -> object:
        self.rows.append(
            next(len(one) for one in inputs if isinstance(one, Tensor) and not isinstance(one, nn.Parameter))
        )
        return graph.forward


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        nn.init.normal_(self.layer.weight, std=0.3, generator=torch.Generator().manual_seed(1))
        nn.init.zeros_(self.layer.bias)

    def forward(self, x: Tensor, t: Tensor, shift: Tensor | None = None) -> Tensor:
        y = self.layer(x) * torch.cos(t.to(x.dtype))[:, None]
        return torch.tanh(y if shift is None else y + shift)


def denoiser(network: object) -> piadm.Denoiser:
    return piadm.Denoiser(network, piadm.VPSchedule(), "sample")


GIVEN = dict(method="sde", steps=150, seed=3)


def test_a_run_compiles_once_for_each_size_and_the_next_one_not_at_all() -> None:
    torch._dynamo.reset()
    counter, network = Counter(), Net()
    compiled = piadm.CompiledNetwork(network, backend=counter)
    alone = piadm.sample(denoiser(network), (3, 6), **GIVEN)
    for _ in range(2):
        found = piadm.sample(denoiser(compiled), (3, 6), **GIVEN)
        assert (found.sample - alone.sample).abs().max() <= 1e-6 * float(alone.sample.abs().max())
        assert found.stats.rounds == alone.stats.rounds and found.stats.evaluations == alone.stats.evaluations
    assert len(counter.rows) == len(set(counter.rows)) <= len(SIZES)
    assert found.stats.rounds > len(counter.rows)  # rounds of many numbers of rows shared them


def test_shapes_modes_and_copies_do_not_use_up_the_variants_of_one_network() -> None:
    # TorchDynamo keeps eight of a code and refuses the ninth: the sizes of one run alone are up to eight.
    torch._dynamo.reset()

    class Anything(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return torch.tanh(x * torch.cos(t).to(x).view(-1, *[1] * (x.ndim - 1)))

    compiled = piadm.CompiledNetwork(Anything(), backend=Counter())
    x = {shape: torch.ones(SIZES[-1], *shape) for shape in ((6,), (2, 3), (7,))}
    for rows in SIZES:
        for states in x.values():
            compiled(states[:rows], torch.ones(rows))
        with torch.inference_mode():
            compiled(x[6,][:rows], torch.ones(rows))
        copy.copy(compiled)(x[6,][:rows], torch.ones(rows))
    alone = piadm.sample(denoiser(compiled), (3, 6), **GIVEN)
    shared = piadm.sample(denoiser(compiled), (3, 6), workers=piadm.Devices(["cpu"] * 3), **GIVEN)
    assert torch.equal(alone.sample, shared.sample)


@pytest.mark.parametrize("rows", [1, 2, 8, 9, 511, 512, 513, 1100])
def test_padding_changes_no_row(rows: int) -> None:
    network = Net().double()
    padded = piadm.CompiledNetwork(network, compile=False)
    x, t, shift = torch.randn(rows, 6).double(), torch.rand(rows), torch.randn(rows, 6).double()
    torch.testing.assert_close(padded(x, t, shift=shift), network(x, t, shift), rtol=1e-13, atol=1e-13)


def test_conditions_of_any_number_of_shapes_and_values_are_served() -> None:
    torch._dynamo.reset()
    counter = Counter()

    def tell(x: Tensor, t: Tensor, words: Tensor, scale: float) -> Tensor:
        return scale * x * words.sum(1, keepdim=True)

    compiled = piadm.CompiledNetwork(tell, backend=counter)
    x, t = torch.randn(8, 6), torch.rand(8)
    cases = [(torch.randn(8, width), scale) for width in range(1, 11) for scale in (1.0, 2.5)]
    for words, scale in cases + cases:  # TorchDynamo alone gives up at the ninth
        torch.testing.assert_close(compiled(x, t, words=words, scale=scale), tell(x, t, words, scale))
    assert len(counter.rows) == len(cases)


def test_wrapper_and_copy_keep_what_the_network_is() -> None:
    guided = piadm.GuidedNetwork(Net().bfloat16(), 2.0, {"shift": torch.zeros(1, 6)})
    compiled = piadm.CompiledNetwork(guided, compile=False, cuda_graph=True)
    assert compiled.rows_per_call == 2
    assert network_dtype(compiled, torch.float32) is torch.bfloat16
    copied = copy.copy(compiled)
    assert (copied.network, copied.compile, copied.cuda_graph) == (guided, False, True)


def test_a_half_precision_network_keeps_the_state_in_float32() -> None:
    network = Net()
    exact = piadm.sample(denoiser(network), (2, 6), **GIVEN)
    half = piadm.sample(
        denoiser(piadm.CompiledNetwork(copy.deepcopy(network).bfloat16(), compile=False)), (2, 6), **GIVEN
    )
    assert half.sample.dtype is torch.float32
    # Eight bits of mantissa in the network's answers, about 0.4 %, on a path that contracts; not of the state.
    assert (half.sample - exact.sample).abs().max() <= 0.05
    assert not torch.equal(half.sample, half.sample.bfloat16().float())


@pytest.mark.parametrize(
    "given", [dict(network=3), dict(network=Net(), compile=1), dict(network=Net(), cuda_graph="yes")]
)
def test_what_is_no_network_or_switch_is_refused(given: dict[str, object]) -> None:
    with pytest.raises(TypeError, match=f"{list(given)[-1]} must be"):
        piadm.CompiledNetwork(**given)


@pytest.mark.parametrize(
    "schedule",
    [piadm.VPSchedule(), piadm.FlowSchedule(), piadm.DiscreteSchedule.ddpm(10)],
    ids=lambda it: type(it).__name__,
)
def test_a_network_may_ask_its_schedule_for_levels(schedule: piadm.NoiseSchedule) -> None:
    def network(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = schedule.levels(t.double())
        return (alpha / (alpha.square() + sigma.square()))[:, None].to(x) * x

    torch._dynamo.reset()
    x, t = torch.ones(2, 3), torch.tensor([0.3, 0.9])
    assert torch.equal(piadm.CompiledNetwork(network, backend="eager")(x, t), network(x, t))
    with pytest.raises(ValueError, match="t must lie in"):  # in other code times are checked
        schedule.levels(torch.tensor([99.0]))
