"""The network rows of a pipeline's rounds on several devices of this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any, final

from torch import Tensor, nn

from piadm.executor import error_text, out_of_memory
from piadm.interop.diffusers.arguments import Piece
from piadm.interop.diffusers.crew import Call, OneProcess
from piadm.interop.diffusers.nested import leaves, rebuilt, with_tensors
from piadm.interop.diffusers.probe import UnsupportedError
from piadm.interop.diffusers.rowlists import RowList
from piadm.network import network_device
from piadm.workers.devices import Crew, Devices, copied_to


@final
class DeviceCrew(OneProcess):
    """Several devices with copies of the pipeline's networks, made when they are first called.

    Args:
        devices: the devices.
        networks: the pipeline's networks, by name.

    Raises:
        UnsupportedError: if one of them is moved between devices while it runs.
    """

    def __init__(self, devices: Devices, networks: dict[str, nn.Module]) -> None:
        for name, network in networks.items():
            if any(hasattr(part, "_hf_hook") for part in network.modules()):
                raise UnsupportedError(f"{name} is offloaded by accelerate; workers need it to stay on its device")
        self.devices, self.networks = devices, networks
        self.count = len(devices.devices)
        self.copies: dict[str, list[nn.Module]] = {}

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """The threads of the devices; they end, and the copies go."""
        try:
            with closing(Crew(self.devices)) as self.crew:
                yield
        finally:
            self.copies.clear()

    def run(self, call: Call) -> Any:  # noqa: ANN401 - a network's output
        """The output of a network, every device with its share of the rows."""
        slot, copies, home = call.slot, self._copies(call.slot.name), call.rows.state.device
        pieces: list[Piece] = []

        def given(share: slice, to: Callable[[Tensor], Tensor]) -> list[dict[str, Any]]:
            own = slot.pieces(call.arguments, call.rows, share)
            pieces.extend(own)
            return [_moved(piece.arguments, to) for piece in own]

        def work(worker: int, calls: list[dict[str, Any]]) -> list[Any]:
            try:
                return [call.run(own, copies[worker]) for own in calls]
            except Exception as error:
                if out_of_memory(error):
                    raise
                raise RuntimeError(f"device {worker} ({self.crew.places[worker]}): {error_text(error)}") from error

        found = self.crew.work(len(call.rows), given, work)
        self.largest = max(self.largest, *(piece.size for piece in pieces))
        return slot.joined(pieces, [with_tensors(one, lambda leaf: leaf.to(home)) for own in found for one in own])

    def _copies(self, name: str) -> list[nn.Module]:
        """The copies of a network; the first worker on its own device has the network itself."""
        if name not in self.copies:
            network, places = self.networks[name], self.crew.places
            device = network_device(network)
            own = places.index(device) if device in places else None
            self.copies[name] = [
                network if worker == own else copied_to(network, place) for worker, place in enumerate(places)
            ]
        return self.copies[name]


def _moved(arguments: dict[str, Any], to: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Arguments on a worker's device."""
    flat = leaves(arguments)

    def leaf(path: tuple[Any, ...]) -> Any:  # noqa: ANN401 - any value
        value = flat[path]
        if isinstance(value, RowList):
            return RowList(tuple(map(to, value.items)))
        return to(value) if isinstance(value, Tensor) else value

    found: dict[str, Any] = rebuilt(arguments, leaf)
    return found
