"""The exact law of Picard iterations on a chain of affine steps, for Gaussian modes, without walking the chain.

For a mode on which the denoiser is ``D(x) = J x + g``, iteration ``k`` of a parallel sampler with slopes ``G`` runs

    x^k_{j+1} = p_j x^k_j + r_j x^{k-1}_j + b_j g_j + c_j xi_j,      p = a + b G,   r = b (J - G)

What enters iterate ``k - i`` at step ``j`` reaches the end of iterate ``k`` multiplied by the coefficient of ``z^i`` in

    Q_j(z) = prod_{l > j} (p_l + r_l z)

and what enters all iterates alike, as the noise does, by a partial sum of these.  The coefficients of all ``j`` follow,
order by order, from one cumulative sum: the law after every number of iterations costs O(K J).  Sums and products run
from the last step to the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from piadm._checks import finite_float
from piadm.integrators import AffineSteps
from piadm.linearization import gaussian_slopes
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


#: Numbers of an array that are worked on at a time: half a dozen such arrays stay in a processor's cache.
CACHED = 1 << 14


@dataclass(frozen=True)
class Chain:
    """Affine steps together with the exact denoiser of Gaussian modes, float64.

    Attributes:
        steps: coefficients ``a, b, c``.
        jacobian: ``J`` of the denoiser, ``(m, J)``.
        shift: ``b g``, what its constant part adds, ``(m, J)``; None: nothing.
        variance: ``c^2``, and what a noisy score adds, ``(J,)``; None: nothing.
    """

    steps: AffineSteps
    jacobian: Tensor
    shift: Tensor | None
    variance: Tensor | None

    @property
    def factor(self) -> Tensor:
        """``a + b J``: a step of the sequential sampler, ``(m, J)``."""
        return torch.addcmul(self.steps.a[:, 0, 0], self.steps.b[:, 0], self.jacobian)

    def part(self, first: int, last: int) -> Chain:
        """Steps ``first .. last - 1``."""
        shift = None if self.shift is None else self.shift[:, first:last]
        variance = None if self.variance is None else self.variance[first:last]
        return Chain(self.steps.part(first, last), self.jacobian[:, first:last], shift, variance)


def chain(modes: Modes, schedule: NoiseSchedule, steps: AffineSteps, error: ScoreError | None = None) -> Chain:
    """The chain of a sampler's own steps for the exact denoiser of Gaussian modes.

    Args:
        modes: variances and means of the data.
        schedule: the schedule of the steps.
        steps: coefficients of a one-component state.
        error: what is wrong with the score; None: nothing.
    """
    alpha, sigma, b = schedule.alpha(steps.times), schedule.sigma(steps.times), steps.b[:, 0]
    jacobian = gaussian_slopes(schedule, steps.times, modes.variances[:, None])
    shift = b * (1 - alpha * jacobian) * modes.means[:, None] if bool(modes.means.any()) else None
    variance = steps.c.square().sum((1, 2)) if steps.normals else None
    if error is not None:
        strength = b * sigma.square() / alpha  # D = (x + sigma^2 s)/alpha
        added, spread = (strength * error.bias).expand_as(jacobian), (strength * error.noise).square()
        shift = added if shift is None else shift + added
        variance = spread if variance is None else variance + spread
    return Chain(steps, jacobian, shift, variance)


def sequential_maps(chain: Chain, blocks: int = 1) -> AffineMap:
    """Blocks of as many steps each, as the sequential sampler walks them: gain, shift and variance ``(N, m)``."""
    products = backwards(chain.factor, blocks).cumprod(-1)
    shift = _led_on(chain.shift, products, blocks)
    variance = _led_on(chain.variance, products if chain.variance is None else products.square(), blocks)
    return AffineMap(products[..., -1].T, shift.T, variance.T)


def _led_on(terms: Tensor | None, products: Tensor, blocks: int) -> Tensor:
    """``sum_j terms_j prod_{l > j} f_l`` of each block, from the products of its last 1, 2, .. factors, ``(m, N)``."""
    if terms is None:
        return torch.zeros_like(products[..., 0])
    last_first = backwards(terms, blocks)
    return last_first[..., 0] + (last_first[..., 1:] * products[..., :-1]).sum(-1)


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
    scales, (own, ratio) = backwards(scale, blocks), kept_and_relative(chain, slopes, blocks)
    reached, begun, shift, variance = sums(chain, own, ratio, ratio * own * (scales / scales[:, -1:]), iterations)
    return AffineMap(reached + begun, shift, variance)


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
    own, ratio = kept_and_relative(chain, slopes, 1)
    first = backwards(chain.steps.b[:, 0] * constants, 1)
    reached, begun, shift, variance = sums(chain, own, ratio, first, iterations + 1)[:, 0]
    return AffineMap(reached[1:], shift[:-1] + begun[1:], variance[1:])


def kept(chain: Chain, slopes: Tensor) -> Tensor:
    """``p = a + b G``, what an iterate makes of its own state, ``(J,)``.

    Raises:
        ValueError: if a step is so long that one is not positive.
    """
    own = chain.steps.a[:, 0, 0] + chain.steps.b[:, 0] * slopes
    if bool((own <= 0).any()):
        time = float(chain.steps.times[int((own <= 0).nonzero()[0, 0])])
        raise ValueError(f"steps must be short enough that a + b G > 0, got {float(own.min()):g} at time {time:g}")
    return own


def kept_and_relative(chain: Chain, slopes: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """``p``, ``(N, M)``, and ``R = r/p``, ``(m, N, M)``, last step first.

    ``r = b (J - G)`` is what an iterate makes of the one before.
    """
    own = kept(chain, slopes)
    return backwards(own, blocks), backwards(chain.steps.b[:, 0] / own * (chain.jacobian - slopes), blocks)


def backwards(array: Tensor, blocks: int) -> Tensor:
    """Blocks of as many steps each, ``(..., J)``, as ``(..., N, M)``, the last step first."""
    return array.reshape(*array.shape[:-1], blocks, -1).flip(-1)


def sums(chain: Chain, own: Tensor, ratio: Tensor, start: Tensor, count: int) -> Tensor:
    """What each block's orders of ``z^0 .. z^{K-1}`` in ``Q_j(z)`` and their partial sums ``S_j`` come to.

    Args:
        chain: steps and exact denoiser of the blocks.
        own: ``p``, last step first, ``(N, M)``.
        ratio: ``r/p``, last step first, ``(m, N, M)``.
        start: what enters a single iterate, last step first, ``(N, M)`` or ``(m, N, M)``.
        count: ``K``.

    Returns:
        ``S`` of all steps; the sums over ``j`` of ``start_j Q_j``, of ``b g_j S_j`` and of ``c_j^2 S_j^2``:
        ``(4, N, K, m)``.
    """
    products, blocks = own.cumprod(-1), len(own)
    after = torch.cat([torch.ones_like(products[:, :1]), products[:, :-1]], dim=-1)
    added = None if chain.shift is None else backwards(chain.shift, blocks) * after
    noise = None if chain.variance is None else backwards(chain.variance, blocks) * after.square()
    rows, flat = max(1, CACHED // ratio.shape[-1]), ratio.flatten(0, 1)
    begun = (start * after).expand_as(ratio).flatten(0, 1)
    added, noise = (one if one is None else one.expand_as(ratio).flatten(0, 1) for one in (added, noise))
    parts = []
    for first in range(0, len(flat), rows):
        at = slice(first, first + rows)
        more = (one if one is None else one[at] for one in (added, noise))
        parts.append(_sums(flat[at], begun[at], *more, count=count))
    found = torch.cat(parts, dim=-1).view(4, count, *ratio.shape[:2]).permute(0, 3, 1, 2)
    found[0] *= products[:, -1, None, None]
    return found


def _sums(ratio: Tensor, start: Tensor, added: Tensor | None, noise: Tensor | None, *, count: int) -> Tensor:
    """These of rows ``(n, M)``, ``(4, K, n)``; the products of the ``p`` are in what is summed."""
    found, below, work = ratio.new_zeros(4, count, len(ratio)), torch.zeros_like(ratio), torch.empty_like(ratio)
    for k, (order, whole) in enumerate(orders(ratio, count)):
        found[0, k] = whole + found[0, k - 1] if k else whole
        found[1, k] = torch.mul(start, order, out=work).sum(-1)
        if added is not None or noise is not None:
            below += order
        if added is not None:
            found[2, k] = torch.mul(added, below, out=work).sum(-1)
        if noise is not None:
            found[3, k] = torch.mul(below, below, out=work).mul_(noise).sum(-1)
    return found


def orders(ratio: Tensor, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Coefficients of ``z^0, z^1, ..`` in ``prod_{l > j} (1 + R_l z)`` ``(n, M)`` and in that of all steps ``(n,)``.

    They are ``e_k(j) = sum_{l > j} R_l e_{k-1}(l)``; the last step comes first, as it does in ``R (n, M)``.  What is
    given holds until the next is asked for: fresh memory for each would take longer than the sums.
    """
    padded, terms = ratio.new_ones(len(ratio), ratio.shape[1] + 1), ratio.new_zeros(len(ratio), ratio.shape[1] + 1)
    for k in range(count):
        if k:
            torch.mul(ratio, padded[:, :-1], out=terms[:, 1:])
            torch.cumsum(terms, -1, out=padded)
        yield padded[:, :-1], padded[:, -1]
