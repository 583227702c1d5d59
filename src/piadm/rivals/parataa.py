"""ParaTAA: triangular Anderson acceleration of Picard iterations with the score frozen."""

from __future__ import annotations

import torch
from torch import Tensor

from piadm.numerics import rms
from piadm.rivals.course import Course, Lane
from piadm.rivals.drive import Solver
from piadm.rivals.picard import check_frozen_score, frozen_score_increments
from piadm.rivals.rival import TOLERANCES, Ladder, Rival, Setting, at_most, setting

#: Part of the least-squares matrix's mean diagonal that is added to it.
RIDGE = 1e-3


def parataa(lane: Lane, window: int, order: int, memory: int, tolerance: float) -> Solver:
    """Fixed-point iteration on equations of an order, each state extrapolated from its own past and that before it.

    In a window ``[p, p + w)``, with ``y = x/alpha`` and the score's part ``g_i`` of step ``i``, the equation of
    order ``k`` is ``y_j = y_i + sum_{l=i}^{j-1} g_l``, ``i = max(p, j - k)``.  With its residual ``f_j``, and
    ``Delta X, Delta F`` the last ``memory`` differences between rounds, a round is

        x_j <- x_j + f_j - (Delta X_j + Delta F_j) gamma_j,    gamma_j = argmin sum_{l<=j} |f_l - Delta F_l gamma|^2

    so that a state never depends on those after it.  The window moves on to the first state whose equation of order 1
    is off by more than ``tolerance`` times the noise of a step, in RMS per coordinate.  That state and those before
    it are not extrapolated: at least one more is exact after every round.

    Args:
        lane: the sample.
        window: rows evaluated in a round.
        order: of the equations, >= 1.
        memory: differences kept, >= 0; 0 is the plain iteration.
        tolerance: the rule's; 0 goes on to the sequential sample.

    Reference: Tang et al. 2024 (arXiv 2402.09970), Algorithm 1 and Theorem 3.6 (the safeguard).
    """
    course, alpha = lane.course, lane.course.alpha[:, None]
    x = lane.start.repeat(course.count + 1, 1)
    past = _Past(memory, x)
    first, last = 0, min(window, course.count)
    while first < course.count:
        here = slice(first + 1, last + 1)
        estimate = yield x[first:last], torch.arange(first, last, device="cpu")
        off = rms(lane.step(first, last, x[first:last], estimate) - x[here])
        settled = int((off <= tolerance * course.spread[here]).long().cumprod(0).sum())
        sums = torch.cat([torch.zeros_like(x[:1]), frozen_score_increments(lane, first, last, x, estimate).cumsum(0)])
        base = (torch.arange(1, last - first + 1, device=x.device) - order).clamp(min=0)
        fresh = alpha[here] * ((x / alpha)[first:last][base] + sums[1:] - sums[base])
        change = fresh - x[here]
        past.record(here, x[here], change)
        change[settled + 1 :] -= past.excess(here, change)[settled + 1 :]
        x[here] += change
        first, end = min(first + 1 + settled, last), last
        last = min(first + window, course.count)
        x[end + 1 : last + 1] = x[end]
    return x[course.count]


class _Past:
    """States and residuals of the last rounds, and what they say of the next."""

    def __init__(self, memory: int, x: Tensor) -> None:
        self.states = x.new_zeros(memory + 1, *x.shape)
        self.residuals = x.new_zeros(memory + 1, *x.shape)
        self.seen = torch.zeros(len(x), dtype=torch.int64, device=x.device)

    def record(self, here: slice, x: Tensor, residual: Tensor) -> None:
        """Keep a round; the newest is last."""
        for kept, value in ((self.states, x), (self.residuals, residual)):
            kept[:-1, here] = kept[1:, here].clone()
            kept[-1, here] = value
        self.seen[here] += 1

    def excess(self, here: slice, residual: Tensor) -> Tensor:
        """``(Delta X_j + Delta F_j) gamma_j`` for the states of a window, ``(n, d)``."""
        memory = len(self.states) - 1
        if memory == 0:
            return torch.zeros_like(residual)
        # A state that came in late has fewer differences: its oldest ones count for nothing, in its sums and others'.
        age = torch.arange(memory, 0, -1, device=residual.device)
        known = (age[:, None] < self.seen[here]).double()
        moved = self.states[:, here].diff(dim=0) * known[..., None]
        changed = self.residuals[:, here].diff(dim=0) * known[..., None]
        gram = torch.einsum("ind,jnd->nij", changed, changed).cumsum(0) * torch.einsum("in,jn->nij", known, known)
        right = torch.einsum("ind,nd->ni", changed, residual).cumsum(0) * known.T
        ridge = RIDGE * gram.diagonal(dim1=1, dim2=2).mean(1) + torch.finfo(gram.dtype).tiny
        # Differences that count for nothing have a zero row and right-hand side: the ridge makes their share zero.
        gamma = torch.linalg.solve(gram + ridge[:, None, None] * torch.eye(memory, device=gram.device), right)
        return torch.einsum("ind,ni->nd", moved + changed, gamma)


def _ladders(course: Course) -> list[Ladder]:
    """A ladder of tolerances per window, order and memory; the first are what the paper recommends."""
    check_frozen_score(course)

    def rung(window: int, order: int, memory: int, tolerance: float) -> Setting:
        label = f"window {window}, order {order}, memory {memory}, tolerance {tolerance:.1e}"
        return setting(label, lambda lane: parataa(lane, window, order, memory, tolerance))

    count = course.count
    shapes = [(w, k, m) for w in at_most((count, 100), count) for k in at_most((count, 8, 32), w) for m in (2, 4, 1)]
    return [[rung(*shape, tolerance) for tolerance in TOLERANCES] for shape in shapes]


PARATAA = Rival("parataa", lambda method: "ParaTAA", _ladders, "Tang et al. 2024 (arXiv 2402.09970)")
