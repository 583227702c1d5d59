"""How a parallel pipeline samples, as the engine's own settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from piadm._checks import described, optional_int
from piadm.denoiser import Denoiser
from piadm.grid import TimeGrid
from piadm.integrators import Integrator
from piadm.linearization import Linearization
from piadm.schedule import VPSchedule
from piadm.settings import SampleSettings, resolve
from piadm.workers.devices import Devices
from piadm.workers.ranks import Ranks, refuse_clocks


@dataclass(frozen=True)
class Options:
    """How a parallel pipeline samples; the arguments of ``parallelize``."""

    tol: float = 1e-2
    max_batch: int | None = None
    nodes: str | int | None = None
    window: int | str | None = None
    linearization: str | Linearization | None = None
    max_rounds: int | None = None
    data_mean: float = 0.0
    data_variance: float = 1.0
    raise_on_failure: bool = False
    workers: Devices | Ranks | None = None

    def __post_init__(self) -> None:
        optional_int("max_batch", self.max_batch)
        optional_int("max_rounds", self.max_rounds)
        if not (self.workers is None or isinstance(self.workers, (Devices, Ranks))):
            raise TypeError(f"workers must be a piadm.Devices, a piadm.Ranks or None, got {described(self.workers)}")
        if isinstance(self.workers, Ranks):
            refuse_clocks(self.window)
            if self.workers.split == "samples":
                raise ValueError(
                    "workers must split rows, got Ranks(split='samples'): to split samples, let every rank run the "
                    "pipeline with prompts of its own, without workers"
                )
        # A schedule that allows everything: what the pipeline's own one does not shows when it is known.
        anything = Denoiser(PipelineNetwork(1), VPSchedule(), "sample", self.data_mean, self.data_variance)
        self.engine(anything, "ode", None)

    def engine(self, denoiser: Denoiser, method: str | Integrator, grid: TimeGrid | None) -> SampleSettings:
        """The engine's settings for a denoiser; checks what it is given."""
        return resolve(
            denoiser, method=method, grid=grid, steps=1000, tol=self.tol, nodes=self.nodes, window=self.window,
            guess=self.linearization,
        )  # fmt: skip


class PipelineNetwork:
    """What the engine knows of networks that the pipeline calls.

    Attributes:
        rows_per_call: network rows per row of the engine: several under guidance.
        kind: a tensor of the dtype that they return, where the states are; None: not known yet.
        networks: these networks.
    """

    def __init__(self, rows_per_call: int, kind: Tensor | None = None, networks: Sequence[nn.Module] = ()) -> None:
        self.rows_per_call, self.kind, self.networks = rows_per_call, kind, networks

    def parameters(self) -> Iterator[Tensor]:
        """What tells dtype and device."""
        return iter(() if self.kind is None else (self.kind,))

    def modules(self) -> Iterator[nn.Module]:
        """Their layers, which tell how they multiply."""
        return (layer for network in self.networks for layer in network.modules())

    def __call__(self, *args: object, **kwargs: object) -> Tensor:
        """Never: the pipeline's loop answers in its place."""
        raise AssertionError("the pipeline calls its networks itself")
