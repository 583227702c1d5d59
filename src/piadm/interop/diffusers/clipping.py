"""Schedulers that clip the denoised estimate: what of their steps does, and how they respond to the state beside it.

Where there is next to no data in the state, a step's response to it is a difference of numbers some ten thousand times
as large, which schedulers that compute in single precision do not know to four digits.  Held where it is clipped, the
estimate takes no part in that, and the response shows by itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from piadm.interop.diffusers.probe import ROUNDING, Probe, UnsupportedError, on_host, scale, stepper

#: Shares this much above 1 are none that rounding has made of it.
SHARP = 1e-2

#: A denoised estimate that every scheduler clips, in standard deviations of the data.
FAR = 1e3


@dataclass(frozen=True)
class Clamp:
    """Denoised estimates held between ``-limit`` and ``limit``."""

    limit: float

    def __call__(self, estimate: Tensor) -> Tensor:
        """The clipped estimates."""
        return estimate.clamp(-self.limit, self.limit)


@dataclass(frozen=True)
class Threshold:
    """Denoised estimates held within a quantile of each row's sizes, and divided by it, as a scheduler does it.

    Attributes:
        ratio: which quantile.
        most: the largest limit.
        scheduler: does it, by these settings of its own.

    Reference: Saharia et al. 2022 (arXiv 2205.11487, section 2.3), dynamic thresholding.
    """

    ratio: float
    most: float
    scheduler: Any = field(repr=False)

    def __call__(self, estimate: Tensor) -> Tensor:
        """The clipped estimates."""
        return self.scheduler._threshold_sample(estimate)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Clipping:
    """How a scheduler clips.

    Attributes:
        clip: what it makes of denoised estimates ``(r, *shape)``.
        share: how much of a step's response to the estimate is clipped, shape ``(J,)`` float64.
        states: the steps' responses to the states while the estimates stay as they are, ``(J, J)`` likewise.
        apart: whether steps respond more to what clipping takes off than to the estimate (``piadm.clipped``).
    """

    clip: Callable[[Tensor], Tensor]
    share: Tensor
    states: Tensor
    apart: bool = False


def clipping(
    scheduler: Any,  # noqa: ANN401 - any scheduler
    times: Tensor,
    probed: Probe,
    p: Tensor,
    q: Tensor,
    options: Sequence[Mapping[str, Any]],
) -> Clipping | None:
    """How a scheduler clips; None: it does not.

    Args:
        scheduler: a diffusers scheduler before its first step; it is not changed.
        times: timesteps, shape ``(J,)``.
        probed: its steps without clipping.
        p: share of the state ``x`` in the denoised estimate ``p x + q m``, shape ``(J,)`` float64.
        q: share of the model output ``m``, likewise.
        options: further arguments of each ``step``.

    Raises:
        UnsupportedError: if a step of several outputs clips a part of them.
    """
    clip = clip_of(scheduler)
    if clip is None:
        return None
    states, still = _held(scheduler, times, p, q, options)
    far = torch.full((1, 1, 1, 1), FAR, dtype=torch.float64, device="cpu")
    cut, gains, share = (clip(far) - far).item(), probed.outputs / q, torch.ones_like(p)
    taken = still - gains.sum(1) * FAR  # what clipping takes off the steps
    if probed.one_step:
        moves = gains.diagonal() != 0
        share[moves] = taken[moves] / (gains.diagonal() * cut)[moves]
    elif bool(((taken - gains.sum(1) * cut).abs() > ROUNDING * FAR * gains.abs().sum(1)).any()):
        raise UnsupportedError(f"{type(scheduler).__name__} clips the denoised estimate in a part of its steps only")
    return Clipping(clip, share, states, bool((share > 1 + SHARP).any()))


def clip_of(scheduler: Any) -> Callable[[Tensor], Tensor] | None:  # noqa: ANN401 - any scheduler
    """The scheduler's clipping of denoised estimates ``(r, *shape)``; None: it does not."""
    config = scheduler.config
    if config.get("thresholding"):
        return Threshold(config.dynamic_thresholding_ratio, config.sample_max_value, copy.deepcopy(scheduler))
    return Clamp(config.get("clip_sample_range") or 1.0) if config.get("clip_sample") else None


def _held(
    scheduler: Any,  # noqa: ANN401 - any scheduler
    times: Tensor,
    p: Tensor,
    q: Tensor,
    options: Sequence[Mapping[str, Any]],
) -> tuple[Tensor, Tensor]:
    """Responses of the steps to the states ``(J, J)``, and what they make of none ``(J,)``, all estimates far off."""
    twin, count = on_host(scheduler), len(times)
    seen = p.new_zeros(count, count + 1)  # one coordinate for every state, and one for none
    step = stepper(twin, lambda own: lambda *args, **kwargs: p.new_zeros(1, 1, 1, count + 1))
    for j, t in enumerate(times.cpu()):
        scale(twin, t)
        state = p.new_zeros(1, 1, 1, count + 1)
        state[..., j] = 1
        output = (FAR - p[j] * state) / q[j]
        seen[j] = step(output, t, state, **{**options[j], "return_dict": False})[0].flatten()
    return seen[:, :-1] - seen[:, -1:], seen[:, -1]
