"""A bare diffusers network and its scheduler as a ``Denoiser``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from piadm._checks import described
from piadm.denoiser import Denoiser
from piadm.interop.diffusers._version import pipeline_class
from piadm.interop.diffusers.clipping import clip_of
from piadm.interop.diffusers.clocks import Clock, flow_clock
from piadm.interop.diffusers.levels import PREDICTIONS
from piadm.interop.diffusers.proxies import is_denoiser, time_argument
from piadm.interop.diffusers.rowlists import TIME
from piadm.network import unwrap
from piadm.schedule import DiscreteSchedule, FlowSchedule, VESchedule


@dataclass(frozen=True)
class TimedNetwork:
    """A diffusers network called as ``network(x, t, **condition)`` with a schedule's own times.

    Attributes:
        network: the network; of an output with a learned variance the first half of the channels is taken.
        clock: from schedule times to the network's, and from its output to the prediction.
    """

    network: nn.Module
    clock: Clock
    _time: str = field(init=False)  # what the network calls its time: asked here, where no code is compiled

    def __post_init__(self) -> None:
        object.__setattr__(self, "_time", time_argument(self.network) or "timestep")

    def __call__(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:  # noqa: ANN401 - the network's own
        """Prediction for rows ``x (R, *shape)`` at times ``t (R,)``."""
        output = unwrap(self.network(x, **{self._time: self.clock.time(t)}, **condition))
        return self.clock.prediction(output[:, : x.shape[1]])


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
    if time_argument(network) == TIME:
        kind = type(network).__name__
        raise TypeError(f"network must take its rows as one tensor, got a {kind}, which takes lists: see parallelize")
    if isinstance(scheduler, type) or not hasattr(scheduler, "config") or not hasattr(scheduler, "step"):
        raise TypeError(f"scheduler must be a diffusers scheduler, got {described(scheduler)}")
    if hasattr(scheduler, "precondition_inputs"):
        schedule = VESchedule(scheduler.config.sigma_min, scheduler.config.sigma_max)
        return Denoiser(PreconditionedNetwork(network, scheduler), schedule, "sample", data_mean, data_variance)
    prediction, table = scheduler.config.get("prediction_type"), getattr(scheduler, "alphas_cumprod", None)
    if _flows(scheduler):
        if not hasattr(scheduler, "scale_noise") and prediction != "flow_prediction":
            raise ValueError(
                "scheduler must have prediction_type 'flow_prediction' where it has use_flow_sigmas=True, got "
                f"{type(scheduler).__name__} with {prediction!r}"
            )
        flow = TimedNetwork(network, flow_clock(network, scheduler))
        return Denoiser(flow, FlowSchedule(), "velocity", data_mean, data_variance)
    tabled = {name: kind for name, kind in PREDICTIONS.items() if kind != "velocity"}
    if prediction not in tabled or not isinstance(table, torch.Tensor):
        raise ValueError(
            f"scheduler must have a table alphas_cumprod and one of the prediction types {', '.join(tabled)}, or "
            "use_flow_sigmas=True and flow_prediction, or be an EDM or a flow-matching scheduler, got "
            f"{type(scheduler).__name__} with {prediction!r}"
        )
    if not bool((table > 0).all()):
        raise ValueError(
            "scheduler must leave something of the data at its last time: without rescale_betas_zero_snr, "
            f"got {type(scheduler).__name__} with alphas_cumprod down to {float(table.min()):g}"
        )
    what = TimedNetwork(network, Clock()), DiscreteSchedule(table), tabled[prediction]
    return Denoiser(*what, data_mean, data_variance, clip=clip_of(scheduler))


def _flows(scheduler: Any) -> bool:  # noqa: ANN401 - any scheduler
    """Whether the scheduler's states are ``(1 - t) x_0 + t eps``, with a time that is a multiple of ``t``."""
    told = bool(scheduler.config.get("use_flow_sigmas")) and hasattr(scheduler, "_sigma_to_alpha_sigma_t")
    return "num_train_timesteps" in scheduler.config and (told or hasattr(scheduler, "scale_noise"))
