"""A bare diffusers network and its scheduler as a ``Denoiser``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from piadm._checks import described
from piadm.denoiser import Denoiser, unwrap
from piadm.interop.diffusers._version import pipeline_class
from piadm.interop.diffusers.levels import PREDICTIONS
from piadm.interop.diffusers.proxies import is_denoiser
from piadm.schedule import DiscreteSchedule, FlowSchedule, NoiseSchedule, VESchedule


@dataclass(frozen=True)
class TimedNetwork:
    """A diffusers network called as ``network(x, t, **condition)`` with a schedule's own times.

    Attributes:
        network: the network; of an output with a learned variance the first half of the channels is taken.
        timestep: schedule times to the network's, both of shape ``(R,)``.
    """

    network: nn.Module
    timestep: Callable[[Tensor], Tensor]

    def parameters(self) -> Iterator[nn.Parameter]:
        """The network's, for its type and device."""
        return self.network.parameters()

    def __call__(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:  # noqa: ANN401 - the network's own
        """Prediction for rows ``x (R, *shape)`` at times ``t (R,)``."""
        return unwrap(self.network(x, timestep=self.timestep(t), **condition))[:, : x.shape[1]]


@dataclass(frozen=True)
class PreconditionedNetwork:
    """A network with the scheduler's preconditioning about it, ``D = c_skip x + c_out F(c_in x, c_noise)``.

    Attributes:
        network: the network ``F``.
        scheduler: an EDM scheduler.

    Reference: Karras et al. 2022 (arXiv 2206.00364, eq. 7).
    """

    network: nn.Module
    scheduler: Any

    def parameters(self) -> Iterator[nn.Parameter]:
        """The network's, for its type and device."""
        return self.network.parameters()

    def __call__(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:  # noqa: ANN401 - the network's own
        """Denoised estimate of rows ``x (R, *shape)`` at noise levels ``t (R,)``."""
        sigma = t.reshape(-1, *[1] * (x.ndim - 1))
        inputs = self.scheduler.precondition_inputs(x, sigma).to(x.dtype)
        noise = self.scheduler.precondition_noise(t).to(x.dtype)
        output: Tensor = unwrap(self.network(inputs, timestep=noise, **condition))
        return self.scheduler.precondition_outputs(x, output, sigma).to(x.dtype)  # type: ignore[no-any-return]


def denoiser(network: object, scheduler: Any, data_mean: float, data_variance: float) -> Denoiser:  # noqa: ANN401
    """See ``piadm.Denoiser.from_diffusers``."""
    pipeline_class()
    if not isinstance(network, nn.Module) or not is_denoiser(network):
        raise TypeError(f"network must be a diffusers model that reads a timestep, got {described(network)}")
    if isinstance(scheduler, type) or not hasattr(scheduler, "config") or not hasattr(scheduler, "step"):
        raise TypeError(f"scheduler must be a diffusers scheduler, got {described(scheduler)}")
    schedule: NoiseSchedule
    if hasattr(scheduler, "precondition_inputs"):
        schedule = VESchedule(scheduler.config.sigma_min, scheduler.config.sigma_max)
        return Denoiser(PreconditionedNetwork(network, scheduler), schedule, "sample", data_mean, data_variance)
    if hasattr(scheduler, "scale_noise"):
        count = scheduler.config.num_train_timesteps
        flow = TimedNetwork(network, lambda t: t * count)
        return Denoiser(flow, FlowSchedule(), "velocity", data_mean, data_variance)
    prediction, table = scheduler.config.get("prediction_type"), getattr(scheduler, "alphas_cumprod", None)
    if prediction not in PREDICTIONS or not isinstance(table, torch.Tensor):
        raise ValueError(
            "scheduler must have a table alphas_cumprod and one of the prediction types "
            f"{', '.join(PREDICTIONS)}, or be an EDM or a flow-matching scheduler, got {type(scheduler).__name__}"
        )
    if not bool((table > 0).all()):
        raise ValueError(
            "scheduler must leave something of the data at its last time: without rescale_betas_zero_snr, "
            f"got {type(scheduler).__name__} with alphas_cumprod down to {float(table.min()):g}"
        )
    schedule = DiscreteSchedule(table)
    return Denoiser(TimedNetwork(network, lambda t: t), schedule, PREDICTIONS[prediction], data_mean, data_variance)
