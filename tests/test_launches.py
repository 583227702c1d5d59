"""What a round asks of the device: few operations, however many rows and samples, as an accelerator pays for each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import piadm
from piadm import reference
from piadm.models import MixtureDenoiser
from piadm.noise import SeededNoise, normals, seed_keys

# These only describe what is there, or reserve room.
FREE = {
    "view", "t", "transpose", "select", "slice", "expand", "unsqueeze", "squeeze", "detach", "alias", "_unsafe_view",
    "as_strided", "permute", "diagonal", "split", "unbind", "_reshape_alias", "empty", "lift_fresh",
}  # fmt: skip
# An operation takes the host of an accelerator some 6 us: a millisecond a round.  150 are; each is there for a
# reason, and another has to have one as well.
MOST = 150
# Waits for the device: a number that the host reads.
WAITS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero"}


class Operations(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        name = function.__name__.split(".")[0]
        if name not in FREE:
            self.seen[name] += 1
        return function(*args, **(kwargs or {}))


def of_each_round(batch: int, method: str, denoiser: piadm.Denoiser) -> list[Counter[str]]:
    """Operations between the network calls of a sample, whose rounds fit into one call each."""
    mode, rounds = Operations(), []

    def network(x: Tensor, t: Tensor) -> Tensor:
        rounds.append(Counter(mode.seen))
        output: Tensor = denoiser.network(x, t)
        mode.seen.clear()
        return output

    with mode:
        piadm.sample(replace(denoiser, network=network), (batch, 3, 4), method=method, max_batch=10_000)
    return rounds[4:]  # the first ones, the opening, change paths


@pytest.fixture(scope="module")
def mixture() -> piadm.Denoiser:
    modes = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
    return MixtureDenoiser(piadm.DiscreteSchedule.ddpm(), modes, 0.1)


@pytest.mark.parametrize("method", ["ode", "sde"])
def test_a_round_takes_few_operations_whatever_the_batch(mixture: piadm.Denoiser, method: str) -> None:
    one, many = (of_each_round(batch, method, mixture)[0] for batch in (1, 16))
    assert one.total() == many.total() <= MOST


@pytest.mark.parametrize("method", ["ode", "sde"])
def test_a_round_reads_nothing_from_the_device_but_its_verdict(mixture: piadm.Denoiser, method: str) -> None:
    # The range of the times is read on a CPU alone (``NoiseSchedule``): two numbers, the least and the largest.
    waits = {name: count for name, count in of_each_round(4, method, mixture)[0].items() if name in WAITS}
    assert waits == {"_local_scalar_dense": 2}


def counted(draw: Callable[[], object]) -> int:
    with Operations() as mode:
        draw()
    return mode.seen.total()


def test_an_accelerator_draws_the_noise_of_many_steps_at_once() -> None:
    keys = seed_keys(0, 1)
    few, many = (counted(lambda n=n: normals(keys, 0, range(n), 784, device="meta")) for n in (10, 1000))
    assert few == many
    # And the path asks for all of it: a thousand steps of an image.
    assert reference.noise_rows(torch.device("meta"), 784) >= 1000
    # It is never stored whole: of large samples no more at once than on a CPU.
    assert reference.noise_rows(torch.device("meta"), 10**6) == reference.noise_rows(torch.device("cpu"), 1)
    assert SeededNoise(keys, 784, device="meta").path(0, 1000).shape == (1000, 1, 784)
