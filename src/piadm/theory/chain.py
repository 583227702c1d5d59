"""The exact law of Picard iterations on a chain of affine steps, for Gaussian modes, without walking the chain.

For a mode on which the denoiser is ``D(x) = J x + g``, iteration ``k`` of a parallel sampler with slopes ``G`` runs

    x^k_{j+1} = p_j x^k_j + r_j x^{k-1}_j + b_j g_j + c_j xi_j,      p = a + b G,   r = b (J - G)

What enters iterate ``k - i`` at step ``j`` reaches the end of iterate ``k`` multiplied by the coefficient of ``z^i`` in

    Q_j(z) = prod_{l > j} (p_l + r_l z)

and what enters all iterates alike, as the noise does, by a partial sum of these.  The coefficients of all ``j`` follow,
order by order, from one cumulative sum: the law after every number of iterations costs O(K J).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from piadm._checks import finite_float
from piadm.integrators import AffineSteps
from piadm.linearization import Gaussian
from piadm.schedule import NoiseSchedule
from piadm.theory.law import AffineMap
from piadm.theory.spectrum import Modes


@dataclass(frozen=True)
class ScoreError:
    """How a score differs from the exact one, ``s + bias + noise zeta_t`` in every coordinate.

    Args:
        bias: constant error, in the units of the score (one over those of the state).
        noise: standard deviation of an error that is independent from step to step, and the same in all iterations.

    Raises:
        TypeError, ValueError: if one is no finite number, or the noise is negative.
    """

    bias: float = 0.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        finite_float("bias", self.bias)
        finite_float("noise", self.noise, low=0.0, low_open=False)


@dataclass(frozen=True)
class Chain:
    """Affine steps together with the exact denoiser of Gaussian modes, every array ``(J, m)`` float64.

    Attributes:
        steps: coefficients ``a, b, c``.
        jacobian: ``J`` of the denoiser.
        shift: ``b g``, what its constant part adds.
        variance: ``c^2``, and what a noisy score adds.
    """

    steps: AffineSteps
    jacobian: Tensor
    shift: Tensor
    variance: Tensor

    @property
    def factor(self) -> Tensor:
        """``a + b J``: a step of the sequential sampler."""
        return self.steps.a[:, :1, 0] + self.steps.b[:, :1] * self.jacobian

    def part(self, first: int, last: int) -> Chain:
        """Steps ``first .. last - 1``."""
        arrays = (array[first:last] for array in (self.jacobian, self.shift, self.variance))
        return Chain(self.steps.part(first, last), *arrays)


def chain(modes: Modes, schedule: NoiseSchedule, steps: AffineSteps, error: ScoreError | None = None) -> Chain:
    """The chain of a sampler's own steps for the exact denoiser of Gaussian modes.

    Args:
        modes: variances and means of the data.
        schedule: the schedule of the steps.
        steps: coefficients of a one-component state.
        error: what is wrong with the score; None: nothing.
    """
    jacobian = jacobians(modes, schedule, steps)
    alpha, sigma = (level(steps.times)[:, None] for level in (schedule.alpha, schedule.sigma))
    shift = steps.b * (1 - alpha * jacobian) * modes.means
    variance = steps.c.square().sum((1, 2))[:, None].expand_as(jacobian)
    if error is not None:
        strength = steps.b * sigma.square() / alpha  # D = (x + sigma^2 s)/alpha
        shift, variance = shift + strength * error.bias, variance + (strength * error.noise).square()
    return Chain(steps, jacobian, shift, variance)


def jacobians(modes: Modes, schedule: NoiseSchedule, steps: AffineSteps) -> Tensor:
    """Slope of the exact denoiser at every step for each mode, ``(J, m)``."""
    slopes = [Gaussian(variance).slopes(schedule, steps) for variance in modes.variances.tolist()]
    return torch.stack(slopes, dim=1)


def sequential_maps(chain: Chain, blocks: int = 1) -> AffineMap:
    """Blocks of as many steps each, as the sequential sampler walks them: gain, shift and variance ``(N, m)``."""
    factor, added, noise = (side_by_side(array, blocks) for array in (chain.factor, chain.shift, chain.variance))
    products = suffix_products(factor)
    after = products[1:]
    maps = (products[0], (added * after).sum(0), (noise * after.square()).sum(0))
    return AffineMap(*(array.view(blocks, -1) for array in maps))


def constant_start_maps(chain: Chain, slopes: Tensor, scale: Tensor, iterations: int, blocks: int) -> AffineMap:
    """Blocks after 1 .. K iterations, each from states that all start as its first, ``x^0_j = scale_j/scale_0 x_0``.

    Args:
        chain: steps and exact denoiser of the blocks, one after the other.
        slopes: ``G`` of the iteration, ``(J,)``.
        scale: ``(J,)``, ones on a variance-preserving schedule.
        iterations: ``K``.
        blocks: their number ``N``; all have as many steps.

    Returns:
        Gain, shift and variance, each ``(N, K, m)``.
    """
    per_mode = kept(chain, slopes), missing(chain, slopes), chain.shift, chain.variance, scale[:, None]
    own, rest, added, noise, scales = (side_by_side(array.expand_as(chain.jacobian), blocks) for array in per_mode)
    start, rows, below = rest * (scales / scales[:1]), [], torch.zeros(())
    for order in orders(own, rest, iterations):
        below = below + order
        after = below[1:]
        gain = below[0] + (start * order[1:]).sum(0)
        rows.append((gain, (added * after).sum(0), (noise * after.square()).sum(0)))
    columns = (torch.stack(column).view(iterations, blocks, -1).transpose(0, 1) for column in zip(*rows, strict=True))
    return AffineMap(*columns)


def reference_start_map(chain: Chain, slopes: Tensor, constants: Tensor, iterations: int) -> AffineMap:
    """The chain after 1 .. K iterations from the path of the reference model ``D = G x + constants``.

    Args:
        chain: steps and exact denoiser.
        slopes: ``G`` of the iteration and of the reference, ``(J,)``.
        constants: ``(J,)``.
        iterations: ``K``.

    Returns:
        Gain, shift and variance, each ``(K, m)``.
    """
    first = chain.steps.b * constants[:, None]
    rows, below = [], torch.zeros(())
    for order in orders(kept(chain, slopes), missing(chain, slopes), iterations + 1):
        reached = below
        below = below + order
        if reached.ndim:
            shift = (chain.shift * reached[1:] + first * order[1:]).sum(0)
            rows.append((below[0], shift, (chain.variance * below[1:].square()).sum(0)))
    return AffineMap(*(torch.stack(column) for column in zip(*rows, strict=True)))


def kept(chain: Chain, slopes: Tensor) -> Tensor:
    """``p = a + b G``, what an iterate makes of its own state, ``(J, 1)``.

    Raises:
        ValueError: if a step is so long that one is not positive.
    """
    own = chain.steps.a[:, :1, 0] + chain.steps.b * slopes[:, None]
    if bool((own <= 0).any()):
        time = float(chain.steps.times[int((own <= 0).nonzero()[0, 0])])
        raise ValueError(f"steps must be short enough that a + b G > 0, got {float(own.min()):g} at time {time:g}")
    return own


def missing(chain: Chain, slopes: Tensor) -> Tensor:
    """``r = b (J - G)``, what it makes of the iterate before, ``(J, m)``."""
    return chain.steps.b * (chain.jacobian - slopes[:, None])


def side_by_side(array: Tensor, blocks: int) -> Tensor:
    """Blocks of as many steps each, ``(J, m)``, as more modes: ``(J/N, N m)``."""
    return array.reshape(blocks, -1, array.shape[1]).transpose(0, 1).flatten(1)


def orders(kept: Tensor, missing: Tensor, count: int) -> Iterator[Tensor]:
    """Coefficients of ``z^0, z^1, ..`` in ``prod_{l >= j} (p_l + r_l z)``, each ``(J + 1, m)``.

    With ``R = r/p`` and the products ``P_j`` of the ``p``, ``e_k(j) = P_j sum_{l >= j} R_l e_{k-1}(l+1)/P_{l+1}``.
    """
    ratio, products = missing / kept, suffix_products(kept)
    relative = torch.ones(len(ratio) + 1, ratio.shape[1], dtype=ratio.dtype)
    for _ in range(count):
        yield products * relative
        following = torch.zeros_like(relative)
        following[:-1] = suffix_sums(ratio * relative[1:])
        relative = following


def suffix_products(factors: Tensor) -> Tensor:
    """``prod_{l >= j} factors_l`` for ``j = 0 .. J``, ``(J + 1, m)``; the last is the empty product."""
    return torch.cat([factors.flip(0).cumprod(0).flip(0), torch.ones_like(factors[:1])])


def suffix_sums(terms: Tensor) -> Tensor:
    """``sum_{l >= j} terms_l`` for ``j = 0 .. J - 1``."""
    return terms.flip(0).cumsum(0).flip(0)
