"""Noise levels at which a diffusers scheduler calls the network, and what the model output says of the data there.

The choice of what is iterated on depends on this file, and there a wrong level would cost rounds, not exactness.  Of a
scheduler that clips, so does what is clipped, and the levels have to be its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from piadm.clipped import Excess
from piadm.denoiser import Denoiser
from piadm.grid import TimeGrid
from piadm.integrators import AffineSteps, MultistepSteps, Steps
from piadm.interop.diffusers.clipping import Clipping, clipping
from piadm.interop.diffusers.probe import WORKS, Probe, UnsupportedError, unclipped
from piadm.problem import grid_of
from piadm.schedule import NoiseSchedule

#: diffusers' names of what a network predicts, in this library's words.
PREDICTIONS = {"epsilon": "epsilon", "sample": "sample", "v_prediction": "v", "flow_prediction": "velocity"}

#: What networks predict for schedulers that do not say it.
PLAIN = {"DDPMWuerstchenScheduler": "epsilon"}

#: Roundings of single precision by which the squares of two equal levels may be apart, relative to ``1 + sigma^2``: 24
#: were seen of a level that a scheduler interpolates between logarithms, on some CPUs, and 2 on others.
LEVEL_ROUNDINGS = 64


@dataclass(frozen=True, eq=False)
class CallLevels(NoiseSchedule):
    """Levels of ``J`` network calls: call ``j`` is at time ``J - j``, clean data at time 0.

    Attributes:
        alphas: factor on the data at each call, and 1 at the end, shape ``(J + 1,)``.
        sigmas: standard deviation of the noise, and 0 at the end, likewise.
    """

    alphas: Tensor
    sigmas: Tensor
    t_end = 0.0

    @property
    def count(self) -> int:
        """Number of calls ``J``."""
        return len(self.alphas) - 1

    @property
    def t_range(self) -> tuple[float, float]:
        """From clean data to the first call."""
        return 0.0, float(self.count)

    @property
    def t_start(self) -> float:
        """Time of the first call."""
        return float(self.count)

    def calls(self, t: Tensor) -> Tensor:
        """Numbers of the calls at times ``t``, int64."""
        return self.count - t.round().long()

    def _alpha(self, t: Tensor) -> Tensor:
        return self.alphas.to(t.device)[self.calls(t)]

    def _sigma(self, t: Tensor) -> Tensor:
        return self.sigmas.to(t.device)[self.calls(t)]

    def _log_snr(self, t: Tensor) -> Tensor:
        return 2 * (self._alpha(t) / self._sigma(t)).log()

    def _time(self, log_snr: Tensor) -> Tensor:
        # A table has no times in between: the last call that is no cleaner.
        clock = self._log_snr(torch.arange(self.count, -1, -1, dtype=torch.float64, device=log_snr.device))
        return self.count - (torch.searchsorted(clock, log_snr, right=True) - 1).clamp(min=0).double()


@dataclass(frozen=True)
class Estimate:
    """The denoised estimate that a scheduler steps with, ``D = D_0 + share (clip(D_0) - D_0)``, ``D_0 = p x + q m``.

    A scheduler that clips uses the clipped estimate in all of its step or in a share of it.  One that keeps the noise
    of the unclipped estimate has shares above 1; then ``D_0`` is the estimate, and the rest a part of the steps.

    Attributes:
        p, q: coefficients of the state and of the model output at each call, each ``(J,)`` float64.
        clipping: how the scheduler clips; None: it does not.
    """

    p: Tensor
    q: Tensor
    clipping: Clipping | None

    def to(self, state: Tensor) -> Estimate:
        """The same with its tables in the type of a state, where that is."""
        if self.p.dtype == state.dtype and self.p.device == state.device:
            return self
        clipping = self.clipping and replace(self.clipping, share=self.clipping.share.to(state))
        return Estimate(self.p.to(state), self.q.to(state), clipping)

    def __call__(self, output: Tensor, state: Tensor, calls: Tensor) -> Tensor:
        """Denoised estimates of rows of model outputs and states ``(r, *shape)`` at calls ``(r,)``."""
        p, q = (_of_rows(table, calls, state) for table in (self.p, self.q))
        return self.clipped((p * state).addcmul_(q, output.to(state)), calls)

    def clipped(self, estimate: Tensor, calls: Tensor) -> Tensor:
        """What the scheduler makes of estimates ``D_0`` of rows ``(r, *shape)`` at calls ``(r,)``."""
        if self.clipping is None or self.clipping.apart:
            return estimate
        return estimate.lerp(self.clipping.clip(estimate), _of_rows(self.clipping.share, calls, estimate))

    def excess(self, steps: Steps) -> Excess | None:
        """What clipping adds to the steps; None: nothing, or it is a part of the estimate."""
        if self.clipping is None or not self.clipping.apart:
            return None
        clip = self.clipping.clip
        return Excess(lambda rows: clip(rows[..., None, None]).flatten(1), steps.own()[1] * self.clipping.share)


def _of_rows(table: Tensor, calls: Tensor, like: Tensor) -> Tensor:
    """Of a table of all calls the entries of rows ``(r, *shape)``."""
    return table.to(like)[calls].reshape(-1, *[1] * (like.ndim - 1))


def levels(scheduler: Any, times: Tensor, scales: Tensor) -> CallLevels:  # noqa: ANN401 - any scheduler
    """Levels at timesteps ``(J,)``, from what the scheduler makes of data alone and of noise alone.

    A scheduler of variance-exploding states scales them by ``1/sqrt(1 + sigma^2)``: this factor is the surer source,
    for it knows of calls between two levels of the schedule.

    Raises:
        UnsupportedError: if it cannot add noise, or its levels are none that lead from noise to data.
    """
    name = type(scheduler).__name__
    found = torch.tensor([[1.0], [0.0]], dtype=torch.float64, device="cpu").repeat(1, len(times) + 1)
    twin = unclipped(scheduler)
    try:
        first = _first_index(twin, times.cpu())
        for j, t in enumerate(times.cpu()):
            found[0, j], found[1, j] = _level(twin, t, None if first is None else first + j)
    except (AttributeError, TypeError, ValueError, RuntimeError, IndexError) as error:
        raise UnsupportedError(f"{name} tells no noise levels ({error}); what works: {WORKS}") from error
    exploding = bool((found[0] == 1).all() and (scales < 1).all()) and not hasattr(scheduler, "precondition_outputs")
    if hasattr(scheduler, "scale_noise") and bool((found[0] < 0).any()):  # levels above 1: states of exploding variance
        found[0] = 1.0
    if scheduler.config.get("invert_sigmas"):  # its levels are those of the data
        found[:, :-1] = found[:, :-1].flip(0)
    if exploding:
        found[1, :-1] = (scales.pow(-2) - 1).sqrt()
        # Near the data, single precision leaves little of the difference: of two equal levels the later may be larger.
        rounding = LEVEL_ROUNDINGS * torch.finfo(torch.float32).eps * scales.pow(-2)
        least = found[1, :-1].cummin(0).values
        equal = found[1, :-1].square() - least.square() <= rounding
        found[1, :-1] = torch.where(equal, least, found[1, :-1])
    at = CallLevels(*found)
    try:
        grid_of(TimeGrid(range(at.count, -1, -1)), at, at.count)
    except ValueError as error:
        raise UnsupportedError(f"{name} does not go from noise to data: {error}; what works: {WORKS}") from error
    return at


def _first_index(scheduler: Any, times: Tensor) -> int | None:  # noqa: ANN401 - any scheduler
    """Number of the scheduler's step at its first call; None: it does not number them."""
    if not hasattr(scheduler, "_init_step_index") or not len(times):
        return None
    if scheduler.step_index is None:
        scheduler._init_step_index(times[0])
    return int(scheduler.step_index)


def _level(scheduler: Any, t: Tensor, index: int | None) -> tuple[float, float]:  # noqa: ANN401 - any scheduler
    """``(alpha, sigma)`` of a call, by the number of its step where there is one: two steps may have one timestep."""
    if scheduler.config.get("prediction_type") == "trigflow":
        return float(t.double().cos().abs()), float(t.double().sin()) * scheduler.config.sigma_data
    if index is not None:
        if hasattr(scheduler, "_sigma_to_alpha_sigma_t"):
            alpha, sigma = scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[index].double())
            return float(alpha), float(sigma)
        scheduler._begin_index, scheduler._step_index = 0, index  # what ``add_noise`` of a started scheduler goes by
    one = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    none = torch.zeros_like(one)
    if hasattr(scheduler, "add_noise"):
        return scheduler.add_noise(one, none, t[None]).item(), scheduler.add_noise(none, one, t[None]).item()
    return scheduler.scale_noise(one, t[None], none).item(), scheduler.scale_noise(none, t[None], one).item()


def estimate(
    scheduler: Any,  # noqa: ANN401 - any scheduler
    times: Tensor,
    at: CallLevels,
    probed: Probe,
    options: Sequence[Mapping[str, Any]],
) -> Estimate:
    """What the model output says of the data, from the scheduler's prediction type.

    Raises:
        UnsupportedError: if that is unknown.
    """
    clock = torch.arange(len(times), 0, -1, dtype=torch.float64, device="cpu")
    usual = "flow_prediction" if hasattr(scheduler, "scale_noise") else PLAIN.get(type(scheduler).__name__)
    kind = scheduler.config.get("prediction_type", usual)
    sigma = at.sigma(clock)
    one, none = torch.ones_like(sigma), torch.zeros_like(sigma)
    if hasattr(scheduler, "precondition_outputs"):
        p, q = (scheduler.precondition_outputs(*x, sigma) for x in ((one, none), (none, one)))
    elif kind == "trigflow":
        p, q = at.alpha(clock), -sigma / scheduler.config.sigma_data
    elif kind not in PREDICTIONS:
        name = type(scheduler).__name__
        raise UnsupportedError(f"prediction_type of {name} must be one of {', '.join(PREDICTIONS)}, got {kind!r}")
    elif PREDICTIONS[kind] == "velocity":
        # Of a flow with its velocity, and of exploding variance with its noise: the same estimate x - sigma m.
        p, q = one, sigma if scheduler.config.get("invert_sigmas") else -sigma  # velocities towards the data, or from
    else:
        # diffusers' networks speak of states of unit variance, whatever the scheduler's own scale is.
        scale = torch.hypot(at.alphas, at.sigmas).reciprocal()
        unit = CallLevels(at.alphas * scale, at.sigmas * scale)
        p, q = Denoiser(torch.nn.Identity(), unit, PREDICTIONS[kind]).coefficients(clock)
        p = p * scale[:-1]
    bad = ~(p.isfinite() & q.isfinite() & (q != 0))
    if bad.any():
        t, level = times.cpu()[bad][0].item(), "alpha" if at.alphas[:-1][bad][0] == 0 else "sigma"
        raise UnsupportedError(f"the network's {kind} says nothing of the data at timestep {t:g} ({level} = 0)")
    return Estimate(p, q, clipping(scheduler, times, probed, p, q, options))


def steps(probed: Probe, of: Estimate) -> Steps:
    """The probed coefficients in terms of the denoised estimate: ``m = (D - p x)/q``."""
    count = len(of.p)
    times = torch.arange(count, 0, -1, dtype=torch.float64, device="cpu")
    b = probed.outputs / of.q
    a = probed.states - b * of.p if of.clipping is None else of.clipping.states
    c = probed.noises[..., None]
    c = c if c.any() else c[..., :0]
    if not probed.one_step:
        return MultistepSteps(times, a, b, c)
    a, b, c = a.diagonal(), b.diagonal(), c.diagonal().T
    return AffineSteps(times, a[:, None, None], b[:, None], c[:, None])
