"""Several devices of one process, and how rows are dealt out."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import piadm
from piadm.workers import devices
from piadm.workers.shares import Shares

SHAPE = (3, 8)


class Net(nn.Module):
    """A small network of whose copies each keeps count of its rows; there is a count for every thread, too."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(0.3 * torch.randn(8, 8, generator=generator))
        self.seen, self.threads = {}, {}

    def __deepcopy__(self, memo: dict[int, object]) -> Net:
        copied = Net()
        copied.seen, copied.threads = self.seen, self.threads  # shared, to be looked at from outside
        copied.weight = nn.Parameter(self.weight.detach().clone())
        return copied

    def forward(self, x: Tensor, t: Tensor, shift: Tensor | None = None) -> Tensor:
        for counts, name in ((self.seen, id(self)), (self.threads, threading.get_ident())):
            counts[name] = counts.get(name, 0) + len(x)
        return torch.tanh(x @ self.weight) if shift is None else torch.tanh(x @ self.weight + shift)


class RowClock:
    """Stands for ``time``: every row that a network has seen in a thread takes a millisecond there."""

    def __init__(self, network: Net) -> None:
        self.network = network

    def perf_counter(self) -> float:
        return 1e-3 * self.network.threads.get(threading.get_ident(), 0)


def denoiser(network: Callable[..., Tensor]) -> piadm.Denoiser:
    return piadm.Denoiser(network, piadm.VPSchedule(), "sample")


@pytest.mark.parametrize("method", ["sde", "ode"])
def test_devices_share_out_the_rows_and_change_nothing(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, shift = Net(), torch.linspace(-1, 1, 24).view(3, 8)
    given = dict(method=method, steps=40, condition={"shift": shift}, max_batch=7)
    alone = piadm.sample(denoiser(Net()), SHAPE, **given)
    monkeypatch.setattr(devices, "time", RowClock(network))
    found = piadm.sample(denoiser(network), SHAPE, **given, workers=piadm.Devices(["cpu", "cpu"]))
    assert (found.sample - alone.sample).abs().max() <= 1e-6
    assert found.stats.evaluations == alone.stats.evaluations
    assert found.stats.peak_batch <= 7
    first, second = network.seen.values()
    assert sum(network.seen.values()) == found.stats.evaluations * SHAPE[0]
    assert abs(first - second) <= found.stats.rounds  # two threads of one speed: every round is halved to a row


def test_guided_networks_are_copied_through_their_wrapper() -> None:
    guided = piadm.GuidedNetwork(Net(), 2.0, {"shift": torch.zeros(1, 8)})
    given = dict(method="ode", steps=20, condition={"shift": torch.ones(3, 8)})
    alone = piadm.sample(denoiser(guided), SHAPE, **given)
    found = piadm.sample(denoiser(guided), SHAPE, **given, workers=piadm.Devices(["cpu", "cpu"]))
    assert (found.sample - alone.sample).abs().max() <= 1e-6


@dataclass(frozen=True)
class Frozen:
    """A wrapper that cannot be changed, such as those of ``Denoiser.from_diffusers``."""

    network: Net

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self.network(x, t)


@pytest.mark.parametrize(
    "wrap", [functools.partial, lambda network: network.forward, Frozen], ids=["partial", "method", "frozen"]
)
def test_networks_are_copied_within_what_holds_them(wrap: Callable[[Net], Callable[..., Tensor]]) -> None:
    network = Net()
    given = dict(method="ode", steps=20)
    alone = piadm.sample(denoiser(Net()), SHAPE, **given)
    found = piadm.sample(denoiser(wrap(network)), SHAPE, **given, workers=piadm.Devices(["cpu", "cpu"]))
    assert (found.sample - alone.sample).abs().max() <= 1e-6
    assert len(network.seen) == 2 and id(network) not in network.seen


def test_an_exception_on_one_device_names_it_with_sample_and_time() -> None:
    def broken(x: Tensor, t: Tensor) -> Tensor:
        raise RuntimeError("a bad layer")

    message = r"device [01] \(cpu\): the network failed on samples? \d.* at times? .*: a bad layer"
    with pytest.raises(piadm.NetworkError, match=message):
        piadm.sample(denoiser(broken), SHAPE, steps=20, workers=piadm.Devices(["cpu", "cpu"]))


def test_one_device_short_of_memory_takes_smaller_micro_batches() -> None:
    lock, largest = threading.Lock(), [0]

    def small(x: Tensor, t: Tensor) -> Tensor:
        if len(x) > 3:
            raise RuntimeError("out of memory")
        with lock:
            largest[0] = max(largest[0], len(x))
        return torch.tanh(x)

    given = dict(method="ode", steps=20)
    alone = piadm.sample(denoiser(lambda x, t: torch.tanh(x)), SHAPE, **given)
    found = piadm.sample(denoiser(small), SHAPE, **given, workers=piadm.Devices(["cpu", "cpu"]))
    assert torch.equal(found.sample, alone.sample)
    assert 1 < largest[0] <= 3


class OwnStream:
    """Stands for the stream that a thread has made current on a device; it is waited for."""

    def __init__(self, device: torch.device) -> None:
        self.thread, self.device, self.waits = threading.get_ident(), device, 0

    def synchronize(self) -> None:
        self.waits += 1


def test_workers_use_the_streams_of_the_thread_that_asks_and_their_time_is_the_devices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    current, seen, made = threading.local(), [], []

    def ask(device: torch.device) -> OwnStream:
        made.append(OwnStream(device))
        return made[-1]

    @contextmanager
    def enter(stream: OwnStream) -> Iterator[None]:
        current.stream = stream
        yield
        del current.stream

    def network(x: Tensor, t: Tensor) -> Tensor:
        seen.append((threading.get_ident(), current.stream))
        return torch.tanh(x)

    monkeypatch.setattr(torch.cuda, "current_stream", ask)
    monkeypatch.setattr(torch.cuda, "stream", enter)
    monkeypatch.setattr(devices, "has_streams", lambda device: True)
    found = piadm.sample(denoiser(network), SHAPE, method="ode", steps=20, workers=piadm.Devices(["cpu", "cpu"]))
    alone = piadm.sample(denoiser(lambda x, t: torch.tanh(x)), SHAPE, method="ode", steps=20)
    assert torch.equal(found.sample, alone.sample)
    assert {stream.thread for stream in made} == {threading.get_ident()}
    assert len({thread for thread, _ in seen} - {threading.get_ident()}) == 2
    assert {stream.waits for stream in made} == {1} and {stream for _, stream in seen} == set(made)


def test_a_network_that_cannot_be_copied_is_named() -> None:
    network = nn.Linear(4, 4)
    network.lock = threading.Lock()
    with pytest.raises(TypeError, match="network must be one that copy.deepcopy copies, got Linear: cannot pickle"):
        piadm.sample(denoiser(network), (1, 4), workers=piadm.Devices(["cpu", "cpu"]))


def test_every_device_keeps_its_thread() -> None:
    network = Net()
    threads: dict[int, set[int]] = {}

    def noted(module: Net, *given: object) -> None:
        threads.setdefault(id(module), set()).add(threading.get_ident())

    handle = nn.modules.module.register_module_forward_pre_hook(noted)
    try:
        piadm.sample(denoiser(network), SHAPE, steps=40, workers=piadm.Devices(["cpu"] * 3))
    finally:
        handle.remove()
    assert len(threads) == 3 and all(len(own) == 1 for own in threads.values())
    assert len(set.union(*threads.values())) == 3


@pytest.mark.parametrize(
    "devices, kind, message",
    [
        ("cpu", TypeError, "devices must be a list of at least two torch devices"),
        (["cpu"], ValueError, "at least two"),
        (["cpu", "abacus"], ValueError, r"devices\[1\] must be a device of this machine, got 'abacus'"),
        (["cpu", "meta"], ValueError, r"devices\[1\] must be .*, got 'meta': torch cannot use it here"),
        ([None, "cpu"], ValueError, r"devices\[0\] must be a device of this machine, got 'None'"),  # no default device
    ],
)
def test_what_are_no_devices_is_refused(devices: object, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        piadm.Devices(devices)


def sizes(shares: Shares, rows: int) -> list[int]:
    cut = shares.cut(rows)
    assert cut[0].start == 0 and cut[-1].stop == rows
    assert all(one.stop == other.start for one, other in zip(cut, cut[1:], strict=False))
    return [one.stop - one.start for one in cut]


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 64, 1001])
def test_equal_workers_get_equal_shares(rows: int) -> None:
    found = sizes(Shares(4), rows)
    assert sum(found) == rows and max(found) - min(found) <= 1


def test_shares_follow_the_speeds_and_scatter_does_not_count() -> None:
    shares = Shares(3)
    shares.learn(shares.cut(30), [1.0, 1.1, 0.95])
    assert sizes(shares, 30) == [10, 10, 10]
    for _ in range(12):  # the second worker has become four times as slow
        cut = shares.cut(90)
        shares.learn(cut, [(one.stop - one.start) * cost for one, cost in zip(cut, (1.0, 4.0, 1.0), strict=True)])
    assert sizes(shares, 90) == [40, 10, 40]  # one each, and 4 : 1 : 4 of the rest
    assert min(sizes(shares, 3)) == 1  # nobody is forgotten
