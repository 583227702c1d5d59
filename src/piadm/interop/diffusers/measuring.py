"""Passes of a pipeline's loop that measure what its code makes of its networks' outputs and the state.

The rehearsal is over, and the loop makes each of its steps a few times more: with nothing for every input, with one of
them after the other, and once more through all steps with all of them, where what was measured has to hold.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from piadm.interop.diffusers.arguments import Slot
from piadm.interop.diffusers.blend import CANCELLED, ROUNDING, factor, pieces, stacked_blend
from piadm.interop.diffusers.layout import rounding_of
from piadm.interop.diffusers.nested import copied, leaves, with_tensors
from piadm.interop.diffusers.phases import Phase, forms, unit
from piadm.interop.diffusers.probe import RowsError, UnsupportedError
from piadm.interop.diffusers.proxies import NetworkProxy

if TYPE_CHECKING:
    from piadm.interop.diffusers.rehearsal import Rehearsal

#: The kinds of passes: no input, the input of number ``kind - 1`` alone, the first one the state, and all of them, as
#: large numbers or as small ones.
NONE, STATE, LARGE, SMALL = 0, 1, -1, -2

#: Roundings of the coarsest type that code makes of one number, at most.
ROUNDINGS = 8

#: What all inputs together are multiplied by: code that cuts off large numbers shows, or leaves out small ones.
SIZES = {LARGE: -64.0, SMALL: 1 / 64}

KEEPS = (
    "the pipeline keeps something from one step for another, such as a network's output in guidance with momentum, or "
    "draws random numbers at every step"
)
OTHERWISE = (
    "the pipeline calls other networks when it makes a step again: it decides by the state, or keeps something from "
    "one pass of its loop to the next"
)
NO_SUM = "nor is what its code computes a sum of the state and the networks' outputs, each times a factor"


class Measuring:
    """Inputs and a record of what the pipeline makes of them.

    Args:
        rehearsal: the rehearsal, all steps of which are made; its phases are given their ``blend``.

    Raises:
        RowsError: if a network is for another network.
    """

    def __init__(self, rehearsal: Rehearsal) -> None:
        self.rehearsal, self.estimate = rehearsal, rehearsal.estimate
        self.phases = {step: phase for phase in rehearsal.phases for step in phase.steps}
        if others := sorted({slot.name for phase in rehearsal.phases for slot in phase.slots if not slot.denoises}):
            raise RowsError(f"nor can be measured what its code computes, as {others[0]} is for another network")
        steps = range(len(rehearsal.timesteps))
        single = [(step, kind) for step in steps for kind in range(self._inputs(step) + 1)]
        # The first pass is given the rehearsal's last state, and does not count.
        whole = [(step, kind) for step in steps for kind in (LARGE, LARGE, SMALL)]
        self.passes = deque([(steps[-1], NONE), *single, *whole])
        self.patterns: dict[Any, Tensor] = {}
        self.factors: dict[int, list[Tensor]] = {}
        self.sums = True

    def _inputs(self, step: int) -> int:
        """Number of inputs at a step: the state, and every copy of the batch in every network call."""
        return 1 + self.phases[step].rows_per_call

    def repeated(self) -> int | None:
        """The step that the next pass repeats; None: all is measured.

        Raises:
            RowsError: if what the code computes is no sum.
        """
        if self.passes:
            (self.step_now, self.kind), self.calls, self.given = self.passes[0], 0, list[Tensor]()
            self.read: list[tuple[Slot, Tensor]] = []
            return self.step_now
        if not self.sums:
            raise RowsError(NO_SUM)
        for phase in self.rehearsal.phases:
            phase.blend = stacked_blend([self.factors[step] for step in phase.steps])
        for kept in (self.rehearsal.made, self.patterns, self.factors):
            kept.clear()
        return None

    def network(self, proxy: NetworkProxy, arguments: dict[str, Any]) -> Any:  # noqa: ANN401 - the network's own
        """An output that is the input of this pass."""
        phase, number = self.phases[self.step_now], self.calls
        self.calls += 1
        if forms([(proxy._name, arguments)]) != phase.forms[number : self.calls]:
            raise UnsupportedError(OTHERWISE)
        phase.check_again(number, arguments, self.step_now)
        slot = phase.slots[number]
        chunks, first = slot.state.chunks, 1 + len(self.given)
        self.read.append((slot, leaves(arguments)[slot.state.path].clone()))

        def fed(leaf: Tensor) -> Tensor:
            parts = leaf.chunk(chunks)
            return torch.cat([self._input(first + k, part, self.step_now, self.kind) for k, part in enumerate(parts)])

        output = with_tensors(phase.spares[number], fed)
        self.given += [one.float() for one in pieces(copied(output), chunks, self.rehearsal.state)]
        return output

    def step(self, output: Tensor, sample: Tensor) -> Tensor:
        """Take in what the pipeline has made of the inputs; the state that the next pass is given."""
        phase = self.phases[self.step_now]
        if self.calls != len(phase.forms):
            raise UnsupportedError(OTHERWISE)
        if output.shape != self.rehearsal.state.shape or sample.shape != output.shape:
            raise RowsError(NO_SUM)
        if self.kind == STATE or self.kind in SIZES:
            self._reread(phase.steps.index(self.step_now), sample)
        self._learn(phase, self._denoised(self.step_now, output, sample), [sample.float(), *self.given])
        self.passes.popleft()
        following = self.passes[0] if self.passes else (self.step_now, NONE)
        return self._input(0, sample, *following)

    def scaled(self, state: Tensor) -> Tensor:
        """The state as the scheduler scales it."""
        return (float(self.rehearsal.probed.scales[self.step_now]) * state).to(state)

    def _reread(self, number: int, state: Tensor) -> None:
        """What the networks were given of the state: the factor must not go by that.

        It is taken anew: the states of a rehearsal are few numbers, which half precision rounds all alike.

        Args:
            number: of the step in its phase.
            state: the state, shape ``(L, *shape)``.
        """
        state = state if self.rehearsal.scaled is None else self.scaled(state)
        for slot, leaf in self.read:
            found, known = slot.state.factor(leaf, state), slot.factors[number]
            if found is None or abs(found / known - 1) > rounding_of(leaf):
                what = "the scheduler's state changed in a way that goes by the state"
                raise UnsupportedError(f"{slot.name} reads {what}")
            slot.factors[number] = found

    def _denoised(self, step: int, output: Tensor, sample: Tensor) -> Tensor:
        """The estimate, which is of the size of the data however little noise there is."""
        return float(self.estimate.p[step]) * sample.float() + float(self.estimate.q[step]) * output.float()

    def _input(self, number: int, like: Tensor, step: int, kind: int) -> Tensor:
        """An input of a pass: none, or numbers of either sign between 1 and 2; with all others, other ones."""
        if kind not in SIZES and kind != number + 1:
            return torch.zeros_like(like)
        key = number, like.shape, like.dtype
        if key not in self.patterns:
            drawn = torch.rand(2, *like.shape, generator=torch.Generator().manual_seed(number), device="cpu")
            self.patterns[key] = ((1 + drawn[0]) * (drawn[1] - 0.5).sign()).to(like)
        pattern = self.patterns[key]
        return (SIZES[kind] * pattern.flatten().roll(step + 1)).view(like.shape) if kind in SIZES else pattern.clone()

    def _learn(self, phase: Phase, found: Tensor, given: list[Tensor]) -> None:
        """What a pass shows."""
        step, kind = self.step_now, self.kind
        if kind == NONE:
            self.none, self.factors[step] = (found, given), []
        elif kind not in SIZES:
            before, others = self.none
            moved = [one - other for one, other in zip(given, others, strict=True)]  # more than one: parts that are set
            known = sum(each * one for each, one in zip(self.factors[step], moved, strict=False))
            self.factors[step].append(factor(found - before - known, moved[kind - 1], self._rounding(phase)))
            if kind == len(given):
                rest = before - sum(each * one for each, one in zip(self.factors[step], others, strict=True))
                self.factors[step].insert(0, rest if bool(rest.any()) else rest.flatten()[:1].reshape([1] * rest.ndim))
                self._check_rehearsed(phase)
        else:
            left, bound = self._left(phase, found, given)
            self.sums &= bool((left.abs() <= bound).all())
            if kind == LARGE and self.passes[1][1] == LARGE:  # the first of two
                self.once = left
            elif kind == LARGE and bool(((left - self.once).abs() > bound).any()):
                raise UnsupportedError(KEEPS)

    def _check_rehearsed(self, phase: Phase) -> None:
        """What was measured holds of the rehearsal, too, whose states are far larger."""
        state, shown, output = self.rehearsal.made[self.step_now]
        given = [state.float()]
        for slot, spare in zip(phase.slots, shown, strict=True):
            given += [one.float() for one in pieces(spare, slot.state.chunks, state)]
        left, bound = self._left(phase, self._denoised(self.step_now, output, state), given)
        self.sums &= bool((left.abs() <= bound).all())

    def _left(self, phase: Phase, found: Tensor, given: list[Tensor]) -> tuple[Tensor, Tensor]:
        """What an estimate has beside the sum, and what rounding may leave of that."""
        rest, *factors = self.factors[self.step_now]
        terms = [rest, *(each * one for each, one in zip(factors, given, strict=True))]
        size = torch.stack([term.abs().max() for term in terms]).sum()
        return found - sum(terms), self._rounding(phase) * size + CANCELLED * given[0].abs().max()

    @staticmethod
    def _rounding(phase: Phase) -> float:
        """What rounding leaves of a factor: pipelines compute in the types of what networks read and return."""
        return max(ROUNDING, ROUNDINGS * unit([phase.spares, [slot.state_argument for slot in phase.slots]]))
