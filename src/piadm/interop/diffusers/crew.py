"""Who evaluates the network rows of a pipeline's round: the pipeline's own networks, or copies on several devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

from torch import Tensor, nn

from piadm.executor import Executor, Team, error_text, out_of_memory
from piadm.interop.diffusers.arguments import Piece, Rows, Slot, leaves, rebuilt, with_tensors
from piadm.interop.diffusers.probe import UnsupportedError
from piadm.interop.diffusers.rowlists import RowList
from piadm.network import network_device
from piadm.workers.devices import Crew, Devices, copied_to

#: Calls a network, or its stand-in with a copy of it, with arguments by name.
Network = Callable[..., Any]


def run_here(slot: Slot, run: Network, arguments: dict[str, Any], rows: Rows) -> Any:  # noqa: ANN401 - a network's output
    """The output of the pipeline's own network for the rows of a round.

    Args:
        slot: the network's place in the loop.
        run: calls it.
        arguments: what the pipeline hands it now.
        rows: the rows.
    """
    pieces = slot.pieces(arguments, rows)
    return slot.joined(pieces, [run(piece.arguments) for piece in pieces])


@final
class PipelineCrew(Team):
    """Several devices with copies of the pipeline's networks, made when they are first called.

    Args:
        devices: the devices.
        networks: the pipeline's networks, by name.

    Raises:
        UnsupportedError: if one of them is moved between devices while it runs.
    """

    first = 0

    def __init__(self, devices: Devices, networks: dict[str, nn.Module]) -> None:
        for name, network in networks.items():
            if any(hasattr(part, "_hf_hook") for part in network.modules()):
                raise UnsupportedError(f"{name} is offloaded by accelerate; workers need it to stay on its device")
        self.crew, self.networks = Crew(devices), networks
        self.count, self.largest = len(self.crew.places), 0
        self.copies: dict[str, list[nn.Module]] = {}

    def answer(self, executor: Executor, x: Tensor, samples: Tensor, times: Tensor) -> Tensor:
        """Never: the pipeline's loop answers in its place."""
        raise AssertionError("the pipeline calls its networks itself")

    def run(self, slot: Slot, run: Network, arguments: dict[str, Any], rows: Rows) -> Any:  # noqa: ANN401
        """As ``run_here``, every device with its share of the rows."""
        copies, home = self._copies(slot.name), rows.state.device
        pieces: list[Piece] = []

        def given(share: slice, to: Callable[[Tensor], Tensor]) -> list[dict[str, Any]]:
            own = slot.pieces(arguments, rows, share)
            pieces.extend(own)
            return [_moved(piece.arguments, to) for piece in own]

        def work(worker: int, calls: list[dict[str, Any]]) -> list[Any]:
            try:
                return [run(own, copies[worker]) for own in calls]
            except Exception as error:
                if out_of_memory(error):
                    raise
                raise RuntimeError(f"device {worker} ({self.crew.places[worker]}): {error_text(error)}") from error

        found = self.crew.work(len(rows), given, work)
        self.largest = max(self.largest, *(len(piece.places) for piece in pieces if piece.places is not None))
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

    def close(self) -> None:
        """End the threads, and let the copies go."""
        self.crew.close()
        self.copies.clear()


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
