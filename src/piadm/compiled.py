"""Networks compiled for a few fixed numbers of rows, so that rounds of other sizes do not recompile."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from types import FunctionType
from typing import Any, cast, final

import torch
from torch import Tensor

from piadm._checks import switch
from piadm.conditions import with_rows
from piadm.network import Network, check_network, rows_per_call, unwrap
from piadm.numerics import joined

#: Numbers of rows that calls are padded to: one, for the sequential sampler, and powers of two from where accelerators
#: begin to be busy; larger calls are cut.
SIZES = (1, 8, 16, 32, 64, 128, 256, 512)

_entries = itertools.count()


@final
class CompiledNetwork:
    """A network in static shapes: ``F(x, t)`` padded to the next of ``SIZES`` rows, compiled once for each.

    Padding repeats the last row, and its output is cut off.  A new shape of samples or of a condition, or a new value
    of a condition that is not a tensor, compiles again.

    Args:
        network: the network ``network(x, t, **condition)``; it must compile as one graph.
        compile: whether to compile; False only pads, for a network that is compiled already.
        cuda_graph: whether compiled code replays CUDA graphs (torch's mode "reduce-overhead"), which requires a network
            without work on the CPU and with fixed memory addresses, and under ``Devices`` a PyTorch that replays them
            in threads, as 2.13 does (its issue 123177); without effect on other devices.
        backend: the compiler, as for ``torch.compile``.

    Raises:
        TypeError: if the network is not callable, or a switch is no bool.
    """

    def __init__(
        self,
        network: Network,
        *,
        compile: bool = True,
        cuda_graph: bool = False,
        backend: str | Callable[..., Any] = "inductor",
    ) -> None:
        check_network(network)
        self.network, self.backend = network, backend
        self.compile, self.cuda_graph = switch("compile", compile), switch("cuda_graph", cuda_graph)
        self._variants: dict[tuple[object, ...], Network] = {}

    @property
    def rows_per_call(self) -> int:
        """Rows that the wrapped network makes of one."""
        return rows_per_call(self.network)

    def __copy__(self) -> CompiledNetwork:
        """The same settings, to be compiled for another network."""
        return CompiledNetwork(self.network, compile=self.compile, cuda_graph=self.cuda_graph, backend=self.backend)

    def __call__(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:  # noqa: ANN401 - the network's own
        """Prediction for rows ``x (R, *shape)`` at times ``t (R,)``."""
        parts = []
        for first in range(0, len(x), SIZES[-1]):
            part = slice(first, min(len(x), first + SIZES[-1]))
            rows = part.stop - part.start
            size = next(size for size in SIZES if size >= rows)
            state, time, given = with_rows((x, t, condition), partial(_padded, part, size, len(x)))
            output = unwrap(self._variant(size, x, given)(state, time, **given))
            # CUDA graphs write the next output where this one lies.
            parts.append(output[:rows].clone() if self.cuda_graph else output[:rows])
        return joined(parts)

    def _variant(self, size: int, x: Tensor, condition: Mapping[str, Any]) -> Network:
        """What runs such a number of such rows, compiled when it is first called."""
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        key = (size, x.shape[1:], x.dtype, x.device, *modes, _kind(condition))
        if key not in self._variants:
            self._variants[key] = self._compiled(x.is_cuda)
        return self._variants[key]

    def _compiled(self, on_cuda: bool) -> Network:
        if not self.compile:
            return self.network
        how: dict[str, Any] = {"mode": "reduce-overhead"} if self.cuda_graph and on_cuda else {}
        run: Network = torch.compile(_entry(self.network), fullgraph=True, dynamic=False, backend=self.backend, **how)
        return run


def _entry(network: Network) -> Network:
    """The network behind a function with a code of its own.

    TorchDynamo keeps eight variants of a code, wherever it was compiled, and refuses a ninth: sizes, shapes of samples,
    modes and copies on other devices would add up.
    """

    def run(x: Tensor, t: Tensor, **condition: Any) -> Any:  # noqa: ANN401 - the network's own
        return network(x, t, **condition)

    code = run.__code__.replace(co_name=f"run_{next(_entries)}")
    return cast(Network, FunctionType(code, run.__globals__, code.co_name, None, run.__closure__))


def _kind(value: Any) -> object:  # noqa: ANN401 - any condition
    """What compiled code takes for granted of a condition: of a tensor its type and shape, of others all of them."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype
    if isinstance(value, Mapping):
        return tuple((name, _kind(value[name])) for name in sorted(value, key=str))
    if isinstance(value, (list, tuple)):
        return tuple(map(_kind, value))
    return (type(value), value) if isinstance(value, Hashable) else type(value)


def _padded(part: slice, size: int, rows: int, value: Any, name: str) -> Any:  # noqa: ANN401 - any condition
    """A part of the rows and as many more of the last one as make ``size``; what has no rows as it is."""
    if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != rows:
        return value
    cut = value[part]
    return torch.cat([cut, cut[-1:].expand(size - len(cut), *cut.shape[1:])]) if len(cut) < size else cut
