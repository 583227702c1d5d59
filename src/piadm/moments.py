"""Mean and variance of the data, from the network itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from piadm.denoiser import Denoiser
from piadm.executor import Executor
from piadm.network import network_device
from piadm.problem import check_condition, check_denoiser, check_shape
from piadm.schedule import NoiseSchedule

#: The lowest and the highest log-SNR at which the network is asked, and pairs of inputs at each level.
LOWEST, HIGHEST, PAIRS = -9.0, 5.0, 8

#: Levels in a row that must tell of one variance, to this factor.  Where data are faint beside the noise the response
#: is that of white data, whatever they are: its trace is that of their covariance, the same at all such levels.  But
#: there a trained network's own error may be larger than its response, and grows by ``e`` from level to level.
AGREEING, FACTOR = 3, 1.5

#: Seed of the inputs.
SEED = 0x5EED


@torch.no_grad()
def measure_moments(
    denoiser: Denoiser, shape: tuple[int, ...], *, condition: Mapping[str, Any] | None = None
) -> Denoiser:
    """The denoiser with ``data_mean`` and ``data_variance`` measured from its network, by at most 240 rows at once.

    From pairs of inputs that are noise alone, ``x = sigma n``, so noisy that data would hardly be seen in them,

        G = <dx, dD> / <dx, dx> = alpha v/(alpha^2 v + sigma^2),      D = (1 - alpha G) m    on average

    for the variance ``v`` and the mean ``m``.  It is worth its calls where the data's scale is unknown: a variance
    that is wrong by a factor of 100 costs three or four rounds in every run, and one within a factor of three none.

    Args:
        denoiser: the denoiser; what it says of its data is not read.
        shape: ``(B, *sample_shape)``, as for ``sample``; ``B`` matters for conditions only.
        condition: the network's other keyword arguments, as for ``sample``; of tensors, the first sample's row.

    Returns:
        A copy of the denoiser.

    Raises:
        TypeError, ValueError: for bad input, before any network call; or if the network's response tells of no variance
            on which neighbouring levels of noise agree.
        NetworkError: if the network raises or returns the wrong shape.
    """
    check_denoiser(denoiser)
    size, schedule = check_shape(shape)[1:], denoiser.schedule
    device = network_device(denoiser.network) or torch.device("cpu")
    given = check_condition(condition, shape[0], device)
    times = schedule.time(_levels(schedule))
    alpha, sigma = schedule.levels(times)

    generator = torch.Generator().manual_seed(SEED)
    inputs = sigma.float()[:, None, None, None] * torch.randn(
        PAIRS, 2, math.prod(size), dtype=torch.float32, generator=generator, device="cpu"
    )
    rows = inputs.flatten(0, 2).to(device)
    first = torch.zeros(len(rows), dtype=torch.int64, device=device)  # every row has the first sample's condition
    found = Executor(denoiser, (1, *size), given).whole(rows, first, times.repeat_interleave(2 * PAIRS).to(device))
    outputs = found.view_as(inputs).cpu().double()

    dx, dd = inputs.double().diff(dim=2), outputs.diff(dim=2)
    slope = (dx * dd).sum((1, 2, 3)) / dx.square().sum((1, 2, 3))
    variance = slope * sigma.square() / (alpha * (1 - alpha * slope))
    mean = outputs.mean((1, 2, 3)) / (1 - alpha * slope)
    chosen = _faintest(variance, mean)
    if chosen is None:
        told = ", ".join(f"{one:.2g}" for one in variance.tolist())
        raise ValueError(
            f"the network's response to noise gives a data variance of {told} from much noise to little; it must be "
            f"positive, finite and much the same at {AGREEING} levels in a row: give data_mean and data_variance to "
            "piadm.Denoiser"
        )
    return replace(denoiser, data_mean=float(mean[chosen]), data_variance=float(variance[chosen]))


def _levels(schedule: NoiseSchedule) -> Tensor:
    """Levels of log-SNR within the schedule, a unit apart or more: neighbours that are nearly the same agree anyway."""
    ends = torch.tensor([schedule.t_start, schedule.t_end], dtype=torch.float64, device="cpu")
    first, last = schedule.log_snr(ends).clamp(LOWEST, HIGHEST).tolist()
    return torch.linspace(first, last, max(AGREEING, int(last - first) + 1), dtype=torch.float64, device="cpu")


def _faintest(variance: Tensor, mean: Tensor) -> int | None:
    """The middle one of the noisiest levels in a row that tell the same variance; None: there are none."""
    sound = (variance > 0) & variance.isfinite() & mean.isfinite()
    for first in range(len(variance) - AGREEING + 1):
        some = variance[first : first + AGREEING]
        if bool(sound[first : first + AGREEING].all()) and float(some.max() / some.min()) <= FACTOR:
            return first + AGREEING // 2
    return None
