"""Networks and what they are given: predictions at the noise end, guidance, conditions, chance."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import piadm
from piadm.models import MixtureNetwork

VP = piadm.VPSchedule()
MEANS = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([3, 0, 4])


def pick(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
    """The mean with a row's label, approached as data of variance 1/10 are."""
    alpha, sigma = (c.to(x)[:, None] for c in (VP.alpha(t), VP.sigma(t)))
    gain = 0.1 * alpha / (0.1 * alpha.square() + sigma.square())
    return MEANS[label] + gain * (x - alpha * MEANS[label])


@pytest.mark.parametrize("offset", [0.0, 0.008, 0.4])
def test_velocity_is_known_where_nothing_is_left_of_the_data(offset: float) -> None:
    schedule = piadm.CosineSchedule(offset)  # alpha(1) = 0
    exact = MixtureNetwork(schedule, MEANS, 0.3)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        flow = piadm.Denoiser(exact, schedule, "velocity")
        p, q = (c[:, None] for c in flow.coefficients(t.double()))
        return ((exact(x, t).double() - p * x) / q).to(x)

    settings = dict(shape=(3, 4), steps=50, method="ode")
    told = piadm.sample_sequential(piadm.Denoiser(velocity, schedule, "velocity"), **settings)
    want = piadm.sample_sequential(piadm.Denoiser(exact, schedule, "sample"), **settings)
    assert torch.allclose(told.sample, want.sample, atol=1e-4)  # velocities are told in float32


@pytest.mark.parametrize("prediction", ["epsilon", "score"])
def test_a_prediction_that_says_nothing_there_is_told_the_remedy(prediction: str) -> None:
    denoiser = piadm.Denoiser(lambda x, t: x, piadm.CosineSchedule(), prediction)
    with pytest.raises(ValueError, match="alpha = 0.*start=0.999001") as caught:
        piadm.sample(denoiser, (1, 2), steps=10)
    remedy = str(caught.value).split("such as grid=")[1]
    grid = eval(remedy, {"piadm": piadm, "schedule": denoiser.schedule, "steps": 10})
    assert piadm.sample_sequential(denoiser, (1, 2), grid=grid).converged


@pytest.mark.parametrize("null", [0, torch.tensor(0), torch.tensor([0]), np.array([0])], ids=repr)
def test_a_null_serves_every_row(null: Any) -> None:  # noqa: ANN401 - any condition
    guided = piadm.GuidedNetwork(pick, 2.0, {"label": null})
    x, t = torch.randn(3, 4), torch.full((3,), 0.3)
    none = pick(x, t, torch.zeros(3, dtype=torch.long))
    assert torch.equal(guided(x, t, label=LABELS), none + 2.0 * (pick(x, t, LABELS) - none))


def test_guidance_of_guidance_counts_every_row() -> None:
    rows = []

    def network(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        rows.append(len(x))
        return pick(x, t, label)

    none = {"label": torch.zeros(1, dtype=torch.int64)}
    twice = piadm.GuidedNetwork(Wrapped(piadm.GuidedNetwork(network, 2.0, none)), 0.5, none)
    condition = {"label": LABELS}
    solution = piadm.sample(piadm.Denoiser(twice, VP, "sample"), (3, 4), steps=20, condition=condition, max_batch=16)
    assert 3 * solution.stats.evaluations == sum(rows)
    assert solution.stats.peak_batch == max(rows) <= 16


@pytest.mark.parametrize(
    ("null", "condition", "message"),
    [
        ({"label": torch.zeros(3)}, {"label": LABELS}, r"null\['label'\] must be a number or .* one row.*shape \(3,\)"),
        ({"label": None}, {"label": LABELS}, r"null\['label'\] must be .*None of type NoneType"),
        ({"label": {"a": None}}, {"label": {"a": LABELS}}, r"null\['label'\]\['a'\] must be .*None of type NoneType"),
        ({"label": 0}, {}, "same entries, one of them lacks label"),
        ({}, {"label": LABELS}, "same entries, one of them lacks label"),
        ({"label": 0}, {"label": [3, 0, 4]}, r"condition\['label'\], which guidance varies, must be a tensor"),
        ({"label": [LABELS]}, {"label": [LABELS + 0]}, r"null\['label'\]\[0\] must be .* one row.*shape \(3,\)"),
        ({"label": {}}, {"label": {"a": LABELS}}, r"\['label'\], which .*or null\['label'\] must have the same"),
    ],
    ids=["rows", "None", "nested None", "no condition", "no null", "list", "list of tensors", "dict"],
)
def test_guidance_names_what_does_not_fit(null: dict[str, Any], condition: dict[str, Any], message: str) -> None:
    denoiser = piadm.Denoiser(piadm.GuidedNetwork(pick, 2.0, null), VP, "sample")
    with pytest.raises(piadm.NetworkError, match=message):
        piadm.sample(denoiser, (3, 4), steps=10, condition=condition)


def test_numbers_about_the_data_are_kept_as_floats() -> None:
    denoiser = piadm.Denoiser(pick, VP, "sample", np.float16(0.5), np.float16(1.5))
    assert [type(number) for number in (denoiser.data_mean, denoiser.data_variance)] == [float, float]
    # In float16 what is computed from them would be infinite.
    piadm.sample(denoiser, (3, 4), steps=10, condition={"label": LABELS}, raise_on_failure=True)


def test_arrays_are_conditions_as_tensors_are() -> None:
    def run(label: object) -> Tensor:
        return piadm.sample(piadm.Denoiser(pick, VP, "sample"), (3, 4), steps=20, condition={"label": label}).sample

    for kind in (np.int64, ">i8", np.uint16, np.uint64):
        assert torch.equal(run(LABELS.numpy().astype(kind)), run(LABELS))
    with pytest.raises(ValueError, match=r"condition\['label'\] must have one row per sample"):
        run(LABELS.numpy()[:2])


class Wrapped:
    """A wrapper that holds its network by the usual name."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def __call__(self, x: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
        return self.network(x, t, **condition)


def decorated(network: nn.Module) -> Callable[..., Tensor]:
    """A function that says what it wraps, as those of ``functools.wraps`` do."""

    @functools.wraps(network.forward)
    def call(x: Tensor, t: Tensor) -> Tensor:
        return network(x, t)

    return call


WRAPS: dict[str, Callable[[nn.Module], Any]] = {
    "bare": lambda network: network,
    "wrapped": Wrapped,
    "partial": functools.partial,
    "method": lambda network: network.forward,
    "decorated": decorated,
    "partial of a method": lambda network: functools.partial(Wrapped(network).__call__),
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
@pytest.mark.parametrize("tensor", [nn.Parameter, lambda data: data], ids=["parameter", "buffer"])
def test_a_network_is_called_in_the_type_of_its_tensors(
    wrap: Callable[[nn.Module], Any], tensor: Callable[[Tensor], Tensor]
) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("steps", torch.zeros(3, dtype=torch.int64))
            register = self.register_parameter if isinstance(held, nn.Parameter) else self.register_buffer
            register("mean", held)

        def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
            kinds.add(x.dtype)
            return self.mean.expand_as(x)

    held, kinds = tensor(torch.ones(4, dtype=torch.float64)), set()
    piadm.sample_sequential(piadm.Denoiser(wrap(Net()), VP, "sample"), (1, 4), steps=2)
    assert kinds == {torch.float64}


def layers(layer: nn.Module) -> nn.Module:
    class Net(nn.Sequential):
        def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
            return super().forward(x)

    return Net(nn.Linear(4, 4), layer)


@pytest.mark.parametrize("layer", [lambda: nn.Dropout(0.1), lambda: nn.BatchNorm1d(4)], ids=["dropout", "batch norm"])
@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_layers_in_training_mode_are_warned_of(
    layer: Callable[[], nn.Module], wrap: Callable[[nn.Module], Any]
) -> None:
    network = layers(layer())
    denoiser = piadm.Denoiser(wrap(network), VP, "v")
    with pytest.warns(RuntimeWarning, match=r"the network's 1 is in training mode.*call network.eval\(\)") as caught:
        piadm.sample(denoiser, (2, 4), steps=2, max_rounds=1)
    assert caught[0].filename == __file__
    network.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        piadm.sample(denoiser, (2, 4), steps=2)


def test_layers_without_effect_are_not_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        piadm.sample(piadm.Denoiser(layers(nn.Dropout(0.0)), VP, "v"), (2, 4), steps=2)


def test_guidance_within_a_partial_counts_every_row() -> None:
    guided = functools.partial(piadm.GuidedNetwork(pick, 2.0, {"label": 0}), label=LABELS[:1])
    assert piadm.Denoiser(guided, VP, "sample").rows_per_call == 2


class Zero:
    """A network that says to wrap another one."""

    network: object = None

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.zeros_like(x)


@pytest.mark.parametrize("length", [0, 1, 2], ids=["a mock", "itself", "a ring of two"])
def test_wrappers_without_an_end_are_networks(length: int) -> None:
    ring = [Zero() for _ in range(length)]
    for number, one in enumerate(ring):
        one.network = ring[number - 1]
    network = ring[0] if ring else Mock(side_effect=Zero())
    assert piadm.sample(piadm.Denoiser(network, VP, "sample"), (2, 4), steps=10).converged


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_frozen_code_is_a_network() -> None:
    frozen = torch.jit.freeze(torch.jit.trace(layers(nn.Tanh()).eval(), (torch.zeros(2, 4), torch.zeros(2))))
    assert piadm.sample(piadm.Denoiser(frozen, VP, "sample"), (2, 4), steps=20).converged


def test_an_interrupted_sequential_sampler_knows_no_error() -> None:
    denoiser = piadm.Denoiser(pick, VP, "sample")
    settings = dict(steps=5, condition={"label": LABELS})
    stopped = piadm.sample_sequential(denoiser, (3, 4), callback=lambda info: info.round == 2, **settings)
    assert stopped.error_estimate.isposinf().all()
    assert not piadm.sample_sequential(denoiser, (3, 4), **settings).error_estimate.any()


def test_a_network_may_take_gradients_of_its_own() -> None:
    def pulled(x: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.requires_grad_()
            estimate = pick(x, t, torch.ones(len(x), dtype=torch.long))
            pull = torch.autograd.grad((estimate[:, 0] - 0.5).square().sum(), x)[0]
        return estimate.detach() - pull

    denoiser = piadm.Denoiser(pulled, VP, "sample")
    solution = piadm.sample(denoiser, (3, 4), steps=40, nodes="all")
    want = piadm.sample_sequential(denoiser, (3, 4), steps=40).sample
    assert solution.converged and float((solution.sample - want).square().mean().sqrt()) < 1e-2  # the tolerance


def test_a_network_may_leave_inference_mode_for_its_gradients() -> None:
    def pulled(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            x = x.clone().requires_grad_()
            pull = torch.autograd.grad((0.1 * (x - label.clone())).square().sum(), x)[0]
        return 0.5 * x.detach() - pull

    given = dict(steps=40, method="ode", condition={"label": torch.ones(3, 4)})
    want = piadm.sample(piadm.Denoiser(pulled, VP, "sample"), (3, 4), **given).sample
    with torch.inference_mode():
        assert torch.equal(piadm.sample(piadm.Denoiser(pulled, VP, "sample"), (3, 4), **given).sample, want)


def test_a_float64_network_may_work_in_place_on_its_times() -> None:
    class Halves(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.eye(3, dtype=torch.float64))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return (x @ self.weight) * t.mul_(0.5)[:, None]

    t = torch.tensor([0.3, 0.6], dtype=torch.float64)
    x = torch.ones(2, 3, dtype=torch.float64)
    got = piadm.Denoiser(Halves(), piadm.VPSchedule(), "sample")(x, t)
    assert torch.equal(t, torch.tensor([0.3, 0.6], dtype=torch.float64))
    assert torch.equal(got, x * (t * 0.5)[:, None])


def test_times_are_of_the_networks_type_whatever_the_states_are() -> None:
    linear = torch.nn.Linear(4, 3)

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = linear

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.linear(torch.cat([x, t[:, None]], dim=1))

    denoiser = piadm.Denoiser(Network(), piadm.VPSchedule(), "v")
    initial = np.random.default_rng(0).standard_normal((1, 3))  # float64, as NumPy makes it
    assert piadm.sample(denoiser, (1, 3), steps=20, initial=initial).converged


@pytest.mark.parametrize(
    "wrap",
    [lambda it: piadm.Denoiser(it, VP, "sample"), lambda it: piadm.GuidedNetwork(it, 2, {}), piadm.CompiledNetwork],
)
def test_what_is_no_network_is_named_with_its_value(wrap: Callable[[object], object]) -> None:
    with pytest.raises(TypeError, match=r"network must be callable as network\(x, t, .*\), got 5 of type int"):
        wrap(5)
