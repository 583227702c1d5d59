"""Coarse grids: a few of the fine grid's times, so that the fine noise can be gathered into the coarse steps."""

from __future__ import annotations

import torch
from torch import Tensor

from piadm._checks import choice, positive_int
from piadm.nodes import evenly, finite_log_snr
from piadm.rivals.course import Course

SPACINGS = ("grid", "log-snr", "karras", "ou")

#: Numbers of steps that are tried, about a quarter apart.
COUNTS = tuple(sorted({round(2 ** (k / 3)) for k in range(6, 31)}))

_RHO = 7.0  # the exponent that Karras et al. recommend


def borders(course: Course, count: int, spacing: str) -> Tensor:
    """Fine steps at which ``count`` coarse ones begin, then ``J``.

    Args:
        course: the course.
        count: number of coarse steps, 1..J.
        spacing: "grid": as many fine steps to each; "log-snr": evenly in log-SNR; "karras": evenly in
            ``(sigma/alpha)^(1/7)``; "ou": evenly in ``-ln alpha_bar``, the paper's clock.  Where the grid ends with
            clean data, the second and third have their last but one time at the fine grid's.

    Returns:
        ``(count + 1,)`` int64 on the CPU, strictly ascending from 0 to ``J``.

    Raises:
        TypeError, ValueError: for a bad count or spacing.

    Reference: Lu et al. 2022 (arXiv 2206.00927) for log-SNR; Karras et al. 2022 (arXiv 2206.00364, eq. 5).
    """
    fine = course.count
    positive_int("count", count, maximum=fine)
    clock = _clock(course, choice("spacing", spacing, SPACINGS))
    clean = not bool(course.log_snr[-1].isfinite())
    if spacing in ("log-snr", "karras") and clean and count > 1:
        inner = evenly(clock[:-1], count)
        return torch.cat([inner, inner.new_tensor([fine])])
    if spacing == "log-snr" and clean:
        return torch.tensor([0, fine], device="cpu")
    return evenly(clock, count + 1)


def _clock(course: Course, spacing: str) -> Tensor:
    """What grows evenly from border to border, ``(J + 1,)``."""
    log_snr = finite_log_snr(course.log_snr)
    if spacing == "grid":
        return torch.arange(len(log_snr), dtype=torch.float64, device="cpu")
    if spacing == "log-snr":
        return log_snr
    if spacing == "karras":
        return -(-log_snr / 2 / _RHO).exp()
    return -torch.logaddexp(torch.zeros_like(log_snr), -log_snr)
