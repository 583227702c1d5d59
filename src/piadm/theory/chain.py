"""The exact law of Picard iterations on a chain of affine steps, for Gaussian modes, without walking the chain.

For a mode on which the denoiser is ``D(x) = J x + g``, iteration ``k`` of a parallel sampler with slopes ``G`` runs

    x^k_{j+1} = p_j x^k_j + r_j x^{k-1}_j + b_j g_j + c_j xi_j,      p = a + b G,   r = b (J - G)

Over the products ``P_j = prod_{l < j} p_l`` this is ``y^k_{j+1} = y^k_j + (r_j/p_j) y^{k-1}_j + ..``: each iterate of
the gain and of the mean is one cumulative sum of the one before.  The variance needs what the noise of every step comes
to at the end: what enters iterate ``k - i`` at step ``j`` reaches the end of iterate ``k`` multiplied by the
coefficient of ``z^i`` in

    Q_j(z) = prod_{l > j} (p_l + r_l z)

and what enters all iterates alike, as the noise does, by a partial sum of these.  The coefficients of all ``j`` follow,
order by order, from one cumulative sum too, from the last step to the first.  So the law after every number of
iterations costs O(K J).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from piadm._checks import float_field
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
        float_field(self, "bias")
        float_field(self, "noise", low=0.0, low_open=False)


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
    (alpha, sigma), b = schedule.levels(steps.times), steps.b[:, 0]
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
    own, ratio = kept_and_relative(chain, slopes, blocks)
    products, scales = own.cumprod(-1), in_blocks(scale, blocks)
    whole, before = products[:, -1, None, None], torch.cat([torch.ones_like(own[:, :1]), products[:, :-1]], dim=-1)
    gain = whole * _ends(ratio, scales / scales[:, :1] / before, 1.0, None, iterations)
    shift = torch.zeros_like(gain)
    if chain.shift is not None:
        shift = whole * _ends(ratio, torch.zeros_like(own), 0.0, in_blocks(chain.shift, blocks) / products, iterations)
    return AffineMap(gain, shift, whole.square() * _spread(chain, ratio, products, iterations))


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
    products = own.cumprod(-1)
    led_to = (in_blocks(chain.steps.b[:, 0] * constants, 1) / products).cumsum(-1)
    start = torch.cat([torch.zeros_like(led_to[:, :1]), led_to[:, :-1]], dim=-1)
    added = None if chain.shift is None else in_blocks(chain.shift, 1) / products
    whole = products[0, -1]
    gain = whole * _ends(ratio, torch.ones_like(start), 1.0, None, iterations)[0]
    shift = whole * _ends(ratio, start, 0.0, added, iterations)[0]
    # The noise is in the reference's path already, as if that were a first iterate.
    return AffineMap(gain, shift, whole.square() * _spread(chain, ratio, products, iterations + 1)[0, 1:])


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
    """``p``, ``(N, M)``, and ``R = r/p``, ``(m, N, M)``, where ``r = b (J - G)``."""
    own = kept(chain, slopes)
    return in_blocks(own, blocks), in_blocks(chain.steps.b[:, 0] / own * (chain.jacobian - slopes), blocks)


def in_blocks(array: Tensor, blocks: int) -> Tensor:
    """Blocks of as many steps each, ``(..., J)``, as ``(..., N, M)``."""
    return array.reshape(*array.shape[:-1], blocks, -1)


def backwards(array: Tensor, blocks: int) -> Tensor:
    """The same, the last step first."""
    return in_blocks(array, blocks).flip(-1)


def _ends(ratio: Tensor, start: Tensor, first: float, added: Tensor | None, count: int) -> Tensor:
    """Where iterates ``y^k_{j+1} = y^k_j + R_j y^{k-1}_j + s_j`` end: states over the products of ``p`` before them.

    Args:
        ratio: ``R``, ``(m, N, M)``.
        start: ``y^0`` where steps begin, ``(N, M)``.
        first: ``y_0`` of all iterates after that.
        added: ``s``, ``(m, N, M)``; None: nothing.
        count: ``K``.

    Returns:
        ``(N, K, m)``.
    """

    def ends(ratio: Tensor, start: Tensor, *added: Tensor) -> Tensor:
        found = ratio.new_empty(count, len(ratio))
        terms, path = (ratio.new_full((len(ratio), ratio.shape[1] + 1), first) for _ in range(2))
        entering, states = terms[:, 1:], path[:, :-1].copy_(start)
        for k in range(count):
            torch.mul(ratio, states, out=entering)
            for one in added:
                entering += one
            found[k] = torch.cumsum(terms, -1, out=path)[:, -1]
        return found

    return _by_rows(ends, ratio, start, *(() if added is None else (added,)))


def _spread(chain: Chain, ratio: Tensor, products: Tensor, count: int) -> Tensor:
    """``sum_j c_j^2 S_j^2`` over the squared products of ``p`` up to ``j``, after each iteration, ``(N, K, m)``.

    ``S_j`` is the sum of the orders ``z^0 .. z^{k-1}`` of ``prod_{l > j} (1 + R_l z)``.
    """
    if chain.variance is None:
        return ratio.new_zeros(ratio.shape[1], count, len(ratio))
    noise = in_blocks(chain.variance, ratio.shape[1]) / products.square()

    def spread(ratio: Tensor, noise: Tensor) -> Tensor:
        found, below, work = ratio.new_empty(count, len(ratio)), torch.zeros_like(ratio), torch.empty_like(ratio)
        for k, order in enumerate(orders(ratio, count)):
            below += order
            found[k] = torch.mul(below, below, out=work).mul_(noise).sum(-1)
        return found

    return _by_rows(spread, ratio.flip(-1), noise.flip(-1))


def _by_rows(function: Callable[..., Tensor], ratio: Tensor, *others: Tensor) -> Tensor:
    """A function of some rows ``(n, M)`` that gives ``(K, n)``, of as many as stay in the cache: ``(N, K, m)``."""
    rows, flat = max(1, CACHED // ratio.shape[-1]), [one.expand_as(ratio).flatten(0, 1) for one in (ratio, *others)]
    parts = [function(*(one[at : at + rows] for one in flat)) for at in range(0, len(flat[0]), rows)]
    return torch.cat(parts, dim=-1).view(-1, *ratio.shape[:2]).permute(2, 0, 1)


def orders(ratio: Tensor, count: int) -> Iterator[Tensor]:
    """Coefficients of ``z^0, z^1, ..`` in ``prod_{l > j} (1 + R_l z)``, ``(n, M)``.

    They are ``e_k(j) = sum_{l > j} R_l e_{k-1}(l)``; the last step comes first, as it does in ``R (n, M)``.  What is
    given holds until the next is asked for: fresh memory for each would take longer than the sums.
    """
    padded, terms = ratio.new_ones(len(ratio), ratio.shape[1] + 1), ratio.new_zeros(len(ratio), ratio.shape[1] + 1)
    order, entering = padded[:, :-1], terms[:, 1:]
    for k in range(count):
        if k:
            torch.mul(ratio, order, out=entering)
            torch.cumsum(terms, -1, out=padded)
        yield order
