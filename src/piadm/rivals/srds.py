"""SRDS: parareal iterations, a coarse sweep corrected by fine solves of all blocks at once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from piadm.rivals.course import Course, Lane
from piadm.rivals.drive import Solver
from piadm.rivals.rival import TOLERANCES, Ladder, Rival, Setting, at_most, setting
from piadm.rivals.spacing import borders


def srds(lane: Lane, blocks: Tensor, tolerance: float, pipelined: bool) -> Solver:
    """Parareal: a coarse sweep over the blocks, corrected by fine solves of all of them at once.

    With ``G`` one coarse step over a block and ``F`` its fine steps,

        U_{k+1}^{n+1} = G(U_{k+1}^n) + F(U_k^n) - G(U_k^n),      U_0 a coarse sweep

    until the final state's mean absolute change is at most ``tolerance``; after ``k`` iterations the first ``k``
    blocks are exact, and are not solved again.  ``G`` reads the estimate that is also the first fine step's, so one
    row serves both.

    Args:
        lane: the sample.
        blocks: fine steps at which blocks begin, then ``J``, ``(N + 1,)``.
        tolerance: the rule's; a negative one goes on to the sequential sample.
        pipelined: whether fine solves begin as soon as their start is known, before the sweep is through: fewer
            rounds, and rows that are evaluated in vain once the last sweep has settled.

    Reference: Selvam, Merchant & Ermon 2024 (arXiv 2412.08292), Algorithm 1 and its pipelined form.
    """
    work = _Parareal(lane, blocks)
    sweep = 0
    work.start(0, 0, lane.start)
    while True:
        rows = [solve for solve in work.solves.values() if solve.done == 0 or pipelined or work.swept(solve.sweep)]
        states = torch.stack([solve.x for solve in rows])
        estimates = yield states, torch.tensor([solve.at for solve in rows], device="cpu")
        for solve, estimate in zip(rows, estimates, strict=True):
            work.advance(solve, estimate)
        while work.swept(sweep):
            end = work.states[sweep, work.count]
            if sweep == work.count:
                return end
            if sweep and float((end - work.states[sweep - 1, work.count]).abs().mean()) <= tolerance:
                return end
            sweep += 1


class _Solve:
    """The fine solve of one block in one sweep, as far as it has come: in state ``x`` at a step."""

    def __init__(self, sweep: int, block: int, x: Tensor, at: int) -> None:
        self.sweep, self.block, self.x, self.at, self.done = sweep, block, x, at, 0


class _Parareal:
    """What is known: states ``U_k^n``, coarse steps ``G(U_k^n)``, fine solves ``F(U_k^n)``, by ``(k, n)``."""

    def __init__(self, lane: Lane, blocks: Tensor) -> None:
        self.lane = lane
        self.begins: list[int] = blocks.tolist()
        self.count = len(self.begins) - 1
        self.factor, self.pull, _, self.kicks = lane.coarsen(blocks)
        self.states: dict[tuple[int, int], Tensor] = {}
        self.coarse: dict[tuple[int, int], Tensor] = {}
        self.fine: dict[tuple[int, int], Tensor] = {}
        self.solves: dict[tuple[int, int], _Solve] = {}

    def swept(self, sweep: int) -> bool:
        """Whether the final state of a sweep is known."""
        return (sweep, self.count) in self.states

    def start(self, sweep: int, block: int, x: Tensor) -> None:
        """A state has become known: its block can be solved."""
        self.states[sweep, block] = x
        if block < self.count:
            self.solves[sweep, block] = _Solve(sweep, block, x, self.begins[block])

    def advance(self, solve: _Solve, estimate: Tensor) -> None:
        """Use an estimate: for the coarse step too if it is a solve's first."""
        key = (solve.sweep, solve.block)
        if solve.done == 0:
            n = solve.block
            self.coarse[key] = self.factor[n] * solve.x + self.pull[n] * estimate + self.kicks[n]
        solve.x = self.lane.step(solve.at, solve.at + 1, solve.x[None], estimate[None])[0]
        solve.at, solve.done = solve.at + 1, solve.done + 1
        if solve.at == self.begins[solve.block + 1]:
            self.fine[key] = self.solves.pop(key).x
        self._follow(*key)
        self._follow(solve.sweep + 1, solve.block)

    def _follow(self, sweep: int, block: int) -> None:
        """Start what has become known: the state after a block, in a sweep."""
        before = (sweep - 1, block)
        if (sweep, block + 1) in self.states:
            return
        if sweep == block + 1 and before in self.fine:
            self.start(sweep, block + 1, self.fine[before])  # exact: everything before it was
        elif (sweep, block) in self.coarse:
            if sweep == 0:
                self.start(0, block + 1, self.coarse[0, block])
            elif before in self.fine:
                correction = self.fine[before] - self.coarse[before]
                self.start(sweep, block + 1, self.coarse[sweep, block] + correction)


def _ladders(course: Course) -> list[Ladder]:
    """A ladder of tolerances per number of blocks, about the square root of the steps, and spacing."""

    def rung(blocks: Tensor, spacing: str, tolerance: float, pipelined: bool) -> Setting:
        label = f"{len(blocks) - 1} blocks, {spacing}{', pipelined' * pipelined}, tolerance {tolerance:.1e}"
        return setting(label, lambda lane: srds(lane, blocks, tolerance, pipelined))

    root = max(1, round(math.sqrt(course.count)))
    shapes = [
        (borders(course, count, spacing), spacing, pipelined)
        for pipelined in (True, False)
        for spacing in ("log-snr", "grid")
        for count in at_most((root, max(1, root // 2), 2 * root), course.count)
    ]
    return [
        [rung(blocks, spacing, tolerance, pipelined) for tolerance in TOLERANCES[6:]]
        for blocks, spacing, pipelined in shapes
    ]


SRDS = Rival("srds", lambda method: "SRDS", _ladders, "Selvam et al. 2024 (arXiv 2412.08292)")
