"""Node sets: the steps at which the network is called, and how residuals reach the steps in between."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from piadm._checks import positive_int
from piadm.memo import memoized

#: Rate of the clock of ``crowded`` far from where noise and data are alike, and how far "there" reaches in log-SNR.
#: With nodes evenly in log-SNR a unit of it at the centre added 3 to 20 times as much to the end's error as one four
#: units away, on mixtures, MLPs and a U-Net.  So placed, half of the nodes leave about the same error of trained
#: networks.  With a smaller floor or reach the far nodes are felt: little is missed there, but networks make it grow.
FLOOR, REACH = 0.1, 3.0

#: Where in a gap a finer node set has its new node, for the SDE, whose noise hides ripples, and for the ODE: at the
#: golden section.  A ripple with two periods in a gap, as from the sines of a time embedding, has one phase at both
#: ends and in the middle: node sets that halve the gaps agree on it, and on what they miss.  Of 328 samples of four
#: small trained networks 28 had ended outside the tolerance with the middle, 15 of 24 of one of them, and 12 do with
#: this (11 with 0.4, 13 with 0.42), after as many rounds; of Gaussian data with one sine of the time 39 of 256, and 9
#: (16 with 0.4).  Mixtures took as many evaluations.
MIDDLE, GOLDEN = 0.5, 0.382

#: How far on the noisy side of there the clock runs fastest, in log-SNR: of 32 samples of the U-Net 29 were within the
#: tolerance with it, and 25 without.
NOISY_SIDE = 0.348


@dataclass(frozen=True)
class NodeSet:
    """Steps that call the network, what it reads there, and the interpolation from them to every step.

    ``R_j = sum_i W[j, i] R_{node i}``, float64 on the CPU.

    Attributes:
        indices: step numbers, ascending, starting with 0, shape ``(n,)`` int64.
        weights: interpolation matrix ``W``, shape ``(J, n)``.
        readings: the network reads ``sum_j readings[i, j] x_j`` at node ``i``, shape ``(n, J)``; None: the state
            ``x_{node i}`` itself.
    """

    indices: Tensor
    weights: Tensor
    readings: Tensor | None = None

    @property
    def count(self) -> int:
        """Number of nodes ``n``."""
        return len(self.indices)

    def reading_matrix(self) -> Tensor:
        """``readings``, with ones at the nodes where there are none, shape ``(n, J)``."""
        if self.readings is not None:
            return self.readings
        return torch.zeros_like(self.weights.T).scatter_(1, self.indices[:, None], 1.0)


@memoized
def every_step(steps: int) -> NodeSet:
    """Every step is a node: the fixed point is then exactly the sequential sampler's."""
    return NodeSet(torch.arange(steps, device="cpu"), torch.eye(steps, dtype=torch.float64, device="cpu"))


@memoized
def spread(log_snr: Tensor, count: int, order: int = 1, deviation: float | None = None) -> NodeSet:
    """About ``count`` steps, spread in log-SNR evenly or as ``crowded`` says, residuals interpolated in log-SNR.

    Args:
        log_snr: log-SNR at the start of every step, ascending, shape ``(J,)``; the first may be -inf.
        count: number of nodes, at least 2 and at most ``J`` (more is cut to ``J``).
        order: degree of the interpolation: 1 for residuals that are rough (SDE), 3 for smooth ones (ODE).
        deviation: standard deviation of the data, about whose log-SNR nodes are to crowd; None: evenly in log-SNR.
    """
    clock = finite_log_snr(log_snr)
    steps = len(clock)
    count = min(positive_int("nodes", count, minimum=2), steps)
    if count == steps:
        return every_step(steps)
    indices = evenly(clock if deviation is None else crowded(clock, deviation), count)
    return NodeSet(indices, weights(clock, indices, order))


def crowded(log_snr: Tensor, deviation: float) -> Tensor:
    """A clock that runs faster where noise and data are alike: nodes that are even on it crowd there.

        u = f l + 2 r atan(tanh(l/(2 r))),    du/dl = f + sech(l/r),    l = log_snr + log(deviation^2) + s

    Far from there the estimate hardly depends on the state (noise) or is nearly the state (data), and little is missed
    between nodes.

    Args:
        log_snr: as for ``spread``.
        deviation: standard deviation of the data.
    """
    level = finite_log_snr(log_snr) + 2 * math.log(deviation) + NOISY_SIDE
    return FLOOR * level + 2 * REACH * torch.atan(torch.tanh(level / (2 * REACH)))


def evenly(clock: Tensor, count: int) -> Tensor:
    """The ``count`` distinct entries nearest to an even spacing of an ascending clock, both ends included."""
    order = torch.arange(count, device="cpu")
    wanted = torch.linspace(0, 1, count, dtype=torch.float64, device="cpu").mul(clock[-1] - clock[0]).add(clock[0])
    nearest = torch.searchsorted((clock[1:] + clock[:-1]) / 2, wanted)
    # Distinct entries: push collisions forwards, then keep room for those that follow.
    pushed = torch.cummax(nearest - order, 0).values + order
    return torch.minimum(pushed, len(clock) - count + order)


@memoized
def refine(nodes: NodeSet, log_snr: Tensor, order: int = 1, share: float = MIDDLE) -> NodeSet:
    """Node set with one more node between every two neighbours, ``share`` of the gap in log-SNR after the first.

    The old nodes stay, so residuals interpolated to the new set describe the very same path.
    """
    clock, old = finite_log_snr(log_snr), nodes.indices
    fresh = torch.searchsorted(clock, torch.lerp(clock[old[:-1]], clock[old[1:]], share))
    fresh = torch.maximum(torch.minimum(fresh, old[1:] - 1), old[:-1] + 1)
    indices = torch.unique(torch.cat([old, fresh[old[1:] - old[:-1] > 1]]))
    return every_step(len(clock)) if len(indices) == len(clock) else NodeSet(indices, weights(clock, indices, order))


@memoized
def averaged(nodes: NodeSet, importance: Tensor) -> NodeSet:
    """The same nodes, but the network reads an average of the states about each: for paths that are rough with noise.

    Interpolated residuals miss the effect of the noise between two nodes, ``J (x_j - (W x)_j)`` at every step ``j``.
    The weighted mean of that deviation about node ``i`` is added to the state that the network reads there, so that one
    call accounts for the steps around it:

        x_i + sum_j m_ij (x_j - (W x)_j),    m_ij = W[j, i] k_j / sum_j W[j, i] k_j

    If the denoised estimate is linear near the node, no error of first order is left.  The state that is read has a
    little more noise than its time says, a small fraction of a percent for a hundred nodes.

    Args:
        nodes: the node set.
        importance: ``k_j > 0``, the influence of every step's residual on the end, shape ``(J,)``.
    """
    share = nodes.weights * importance[:, None]
    readings = (share / share.sum(0)).T
    among_nodes = torch.eye(nodes.count, dtype=torch.float64, device="cpu") - readings @ nodes.weights
    readings[:, nodes.indices] += among_nodes
    return replace(nodes, readings=readings)


@memoized
def strided(nodes: NodeSet, log_snr: Tensor, stride: int, order: int = 1) -> NodeSet:
    """Every ``stride``-th node of a set, and the last one."""
    indices = torch.unique(torch.cat([nodes.indices[::stride], nodes.indices[-1:]]))
    return NodeSet(indices, weights(finite_log_snr(log_snr), indices, order))


@memoized
def thin(nodes: NodeSet, log_snr: Tensor, order: int = 1) -> list[NodeSet]:
    """Two sets of about half of the nodes, whose interpolation is compared with that of all to estimate its error.

    They leave out the odd and the even nodes, of those next to steps that are not nodes.  There are two, since with few
    coordinates a single one may agree by chance.
    """
    clock, apart = finite_log_snr(log_snr), nodes.indices.diff() > 1
    needed = torch.ones(nodes.count, dtype=torch.bool, device="cpu")
    needed[1:-1] = ~(apart[1:] | apart[:-1])
    halves = [nodes.indices[needed | (torch.arange(nodes.count, device="cpu") % 2 == first)] for first in (0, 1)]
    return [NodeSet(indices, weights(clock, indices, order)) for indices in halves]


@memoized
def left_out(nodes: NodeSet, log_snr: Tensor, order: int = 1) -> Tensor:
    """Residual at each node less its interpolation from the other nodes, ``(n, n)``; zero rows for the two ends."""
    knots, count = finite_log_snr(log_snr)[nodes.indices], nodes.count
    size, inner = min(order + 1, count - 1), torch.arange(1, count - 1, device="cpu")[:, None]
    others = (inner - size // 2).clamp(0, count - 1 - size) + torch.arange(size, device="cpu")
    others = others + (others >= inner).long()
    lacks = knots.new_zeros(count, count)
    lacks[1:-1] = knots.new_zeros(count - 2, count).scatter_(1, others, -_lagrange(knots[others], knots[inner]))
    return lacks + torch.diag(torch.nn.functional.pad(knots.new_ones(count - 2), (1, 1)))


def weights(clock: Tensor, indices: Tensor, order: int) -> Tensor:
    """Interpolation from ``clock[indices]`` to ``clock``, constant beyond the last, shape ``(J, n)``.

    Every point takes Lagrange's polynomial through the ``order + 1`` nodes about it (fewer where there are not so
    many), so that the matrix has few entries and no node acts far away.
    """
    knots = clock[indices]
    size = min(order + 1, len(indices))
    left = (torch.searchsorted(knots, clock, right=True) - 1).clamp(0, len(indices) - 2)
    columns = (left - (size // 2 - 1)).clamp(0, len(indices) - size)[:, None] + torch.arange(size, device="cpu")
    polynomials = _lagrange(knots[columns], clock.clamp(max=float(knots[-1]))[:, None])
    return clock.new_zeros(len(clock), len(indices)).scatter_(1, columns, polynomials)


def _lagrange(near: Tensor, at: Tensor) -> Tensor:
    """Lagrange's polynomials through knots ``(m, k)``, at points ``(m, 1)``, shape ``(m, k)``."""
    others, ones = ~torch.eye(near.shape[1], dtype=torch.bool, device="cpu"), near.new_ones(())
    factors = torch.where(others, (at - near)[:, None, :], ones) / torch.where(
        others, near[:, :, None] - near[:, None, :], ones
    )
    return factors.prod(2)


def finite_log_snr(log_snr: Tensor) -> Tensor:
    """Log-SNR with an infinite first entry (alpha = 0) moved to one spacing before the second."""
    if len(log_snr) < 3 or log_snr[0].isfinite():
        return log_snr
    clock = log_snr.clone()
    clock[0] = 2 * clock[1] - clock[2]
    return clock
