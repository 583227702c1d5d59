"""Gaussian laws mode by mode, how affine maps with noise carry them, and the distances between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Law:
    """Independent Gaussian modes, float64 on the CPU.

    Attributes:
        mean: mean of each mode, ``(..., m)``; leading dimensions count settings, such as the iterations done.
        variance: variance of each mode, ``(..., m)``.
    """

    mean: Tensor
    variance: Tensor

    def __getitem__(self, index: int | slice | tuple[slice, None]) -> Law:
        """The law of one setting, of some, or of all with one more dimension."""
        return Law(self.mean[index], self.variance[index])


@dataclass(frozen=True)
class AffineMap:
    """``y = gain x + shift + noise`` with independent noise, mode by mode, float64 on the CPU.

    Attributes:
        gain: ``(..., m)``.
        shift: ``(..., m)``.
        variance: variance of the noise, ``(..., m)``.
    """

    gain: Tensor
    shift: Tensor
    variance: Tensor

    def __call__(self, law: Law) -> Law:
        """Law of ``y`` for a law of ``x``."""
        return Law(self.gain * law.mean + self.shift, self.gain.square() * law.variance + self.variance)

    def after(self, first: AffineMap) -> AffineMap:
        """This map applied to what ``first`` gives, their noises independent."""
        shift, variance = self.gain * first.shift + self.shift, self.gain.square() * first.variance + self.variance
        return AffineMap(self.gain * first.gain, shift, variance)

    def __getitem__(self, index: int | slice | tuple[slice, slice | None]) -> AffineMap:
        """One of several maps, some of them, or all with one more dimension."""
        return AffineMap(self.gain[index], self.shift[index], self.variance[index])

    @staticmethod
    def joined(maps: Sequence[AffineMap]) -> AffineMap:
        """Several maps after several others, along the first dimension."""
        return AffineMap(*(torch.cat([getattr(one, field.name) for one in maps]) for field in fields(AffineMap)))

    def chained(self) -> AffineMap:
        """All maps ``(N, ...)`` one after the other, ``(...)``: by pairs, and pairs of pairs."""
        maps = self
        while (count := len(maps.gain)) > 1:
            pairs = maps[1::2].after(maps[: count - 1 : 2])
            maps = AffineMap.joined([pairs, maps[count - 1 :]]) if count % 2 else pairs
        return maps[0]


def kl(law: Law, target: Law) -> Tensor:
    """``KL(law || target)`` of each mode, ``(r - 1 - ln r)/2 + (difference of means)^2/(2 target variance)``.

    ``r`` is the ratio of the variances.  ``r - 1`` is what is computed, and its logarithm by ``log1p``: a divergence
    of 1e-10 per mode keeps its digits.

    Args:
        law: ``(..., m)``.
        target: ``(m,)``.

    Returns:
        ``(..., m)``, in nats.
    """
    excess = (law.variance - target.variance) / target.variance
    shift = (law.mean - target.mean).square() / target.variance
    return 0.5 * ((excess - torch.log1p(excess)) + shift)


def affinity_loss(law: Law, target: Law) -> Tensor:
    """``-ln`` of the Bhattacharyya coefficient ``int sqrt(p q)`` of each mode, ``(..., m)``; it adds over modes."""
    total = law.variance + target.variance
    spread = (law.variance - target.variance).square() / (4 * law.variance * target.variance)
    return 0.25 * torch.log1p(spread) + 0.25 * (law.mean - target.mean).square() / total


def squared_distance(law: Law, target: Law) -> Tensor:
    """Square of the 2-Wasserstein distance of each mode: difference of means and of standard deviations squared."""
    return (law.mean - target.mean).square() + (law.variance.sqrt() - target.variance.sqrt()).square()


def pinsker(divergence: Tensor) -> Tensor:
    """Upper bound of the total variation distance from ``KL``: ``min(1, sqrt(KL/2))``."""
    return (divergence / 2).sqrt().clamp(max=1.0)


def hellinger_bounds(loss: Tensor) -> tuple[Tensor, Tensor]:
    """Lower and upper bound of the total variation distance: ``1 - B <= TV <= sqrt(1 - B^2)``, ``B = e^-loss``.

    The upper bound is below Pinsker's where that is useless, and the same to first order where it is good.

    Args:
        loss: ``-ln B`` over all modes, the sum of ``affinity_loss``.

    Reference: Tsybakov 2009, Introduction to Nonparametric Estimation, lemma 2.3.
    """
    return -torch.expm1(-loss), (-torch.expm1(-2 * loss)).sqrt()
