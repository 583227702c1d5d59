"""Rounds of the engine, answered by the pipeline's own loop: one pass of its body is one network call of many rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from piadm.denoiser import Denoiser
from piadm.engine import rounds
from piadm.executor import error_text, out_of_memory
from piadm.grid import TimeGrid
from piadm.interop.diffusers.arguments import Rows, Slot
from piadm.interop.diffusers.blend import ROUNDING, pieces
from piadm.interop.diffusers.crew import Call, Network, PipelineCrew
from piadm.interop.diffusers.nested import copied, with_tensors
from piadm.interop.diffusers.options import Options, PipelineNetwork
from piadm.interop.diffusers.phases import Part, Phase, alike, numbered, trials, unit
from piadm.interop.diffusers.probe import RowsError, UnsupportedError
from piadm.interop.diffusers.rehearsal import Score
from piadm.interop.diffusers.rowlists import unpacked
from piadm.problem import make_problem
from piadm.settings import TURNS_PER_NODE, clipped
from piadm.solution import NetworkError, RoundInfo, Solution
from piadm.tally import Interrupted, Tally


class Rounds:
    """The engine's requests for rows, and the pipeline's answers.

    Args:
        score: the rehearsal.
        options: how to sample.
        evaluated: network calls that the rehearsal has evaluated: step, network and rows.
        progress: show a progress bar.
        networks: the pipeline's networks.
        crew: evaluates the rows.
    """

    def __init__(
        self,
        score: Score,
        options: Options,
        evaluated: Sequence[tuple[int, str, int]],
        progress: bool,
        networks: Sequence[nn.Module],
        crew: PipelineCrew,
    ) -> None:
        self.score, self.options, self.crew = score, options, crew
        self.scales, self.estimate, self.sources = score.scales, score.estimate, score.sources
        count = score.levels.count
        most = max(phase.rows_per_call for phase in score.phases)
        network = PipelineNetwork(most, score.initial.new_empty(0, dtype=score.phases[-1].output.dtype), networks)
        denoiser = Denoiser(network, score.levels, "sample", options.data_mean, options.data_variance)
        what = denoiser, _Known(score.steps), TimeGrid(range(count, -1, -1))
        engine = options.engine(*what)
        jumps = len(score.phases) > 1 or score.phases[0].jumps
        if options.nodes is None and engine.nodes.count < count and jumps:
            # Between nodes a condition that holds for a few steps would not be seen.
            engine = replace(options, nodes="all").engine(*what)
        if (excess := self.estimate.excess(score.steps)) is not None:
            engine = clipped(engine, excess)
        problem = make_problem(
            denoiser, tuple(score.initial.shape), engine.grid, seed=0, initial=score.initial, noise=score.noise,
            noise_count=count, condition=None, max_batch=options.max_batch, callback=None, workers=crew,
        )  # fmt: skip
        self.info: RoundInfo | None = None
        self.tally = Tally(problem, None, self._heard, progress)
        denoising = {phase.names[-1] for phase in score.phases}
        first = [(step, rows) for step, name, rows in evaluated if name in denoising]
        self.tally.rounds = len({step for step, _ in first})
        problem.executor.evaluations += sum(rows for _, rows in first) // len(score.initial)
        limit = options.max_rounds or TURNS_PER_NODE * count + self.tally.rounds
        self.asking = rounds(engine, problem, self.tally, limit, False)
        self.going = True
        # The phase of every step, and its number among the steps of that phase; the phase of the last step.
        self.phase, self.own = numbered(score.phases, count)
        self.last, self.final = count - 1, score.phases[int(self.phase[-1])]
        # The phase that the body is in, the place of the next network call in it, and the step that it makes.
        self.current, self.place, self.latest = self.final, 0, -1
        # A pass of every phase with one row more than the batch has, backwards: code that tells samples apart shows
        # before any network runs, also where the engine would happen to ask for rows in the order of the batch.
        batch = len(score.initial)
        self.rounding = ROUNDING  # means over each row, of more rows, may be rounded the other way: by the last digit
        self.trial, self.longer = (torch.arange(last, -2, -1, device="cpu") % batch for last in (batch - 1, batch))
        self.trials, self.blank = trials(score.phases), False
        # Samples of the rows of a pass in which a network has failed; and whether a round has ended at another step
        # than the last one, whose code its end has yet to see.
        self.left: Tensor | None = None
        self.owing = False
        self._resume(lambda: next(self.asking))

    def _heard(self, info: RoundInfo) -> None:
        self.info = info

    def _resume(self, go_on: Callable[[], tuple[Tensor, Tensor, Tensor]]) -> None:
        """Let the engine go on to its next request, or to its end."""
        self.starved = False
        self.parts: list[Part] = []
        self.done: list[tuple[Part, Tensor]] = []
        try:
            states, samples, times = go_on()
        except StopIteration:
            self.going = False
            return
        calls = self.score.levels.calls(times)
        self.state = states.reshape(-1, *self.score.initial.shape[1:])
        if self.score.fixed is not None:
            self.score.fixed.put(self.state, samples, calls)
        # Moved once: afterwards they are where the state is, and nothing waits for them.
        self.scales, self.estimate = self.scales.to(self.state), self.estimate.to(self.state)
        self.phase, self.own = self.phase.to(calls.device), self.own.to(calls.device)
        scales = self.scales[calls].reshape(-1, *[1] * (self.state.ndim - 1))
        self.rows = Rows(self.state * scales, samples, calls)
        self.parts = self._parts(self.rows)

    def _parts(self, rows: Rows) -> list[Part]:
        """The rows of every phase that has any."""
        phases = self.score.phases
        if len(phases) == 1:  # nothing is asked of the device, which may be at work yet
            return [Part(phases[0], slice(None), rows)]
        which, own = self.phase[rows.calls], replace(rows, calls=self.own[rows.calls])
        places = [(which == number).nonzero().squeeze(1) for number in range(len(phases))]
        return [Part(phase, at, own[at]) for phase, at in zip(phases, places, strict=True) if len(at)]

    def repeated(self) -> int | None:
        """The step that the next pass of the loop's body repeats; None: there is to be none.

        The last pass is at the last step, whose code is that of the end.
        """
        self.place, self.left, self.found = 0, None, list[Tensor]()
        if self.going and not self.owing:
            self.current = self.trials[0][0] if self.trials else self.parts[0].phase
            self.latest = self.current.repeated
        elif self.owing or self.latest != self.last:
            self.current, self.latest = self.final, self.last
        else:
            return None
        return self.latest

    def stop(self) -> None:
        """End early, with what there is."""
        if self.going:
            self._resume(lambda: self.asking.throw(Interrupted()))

    def network(self, name: str, run: Network, arguments: dict[str, Any]) -> Any:  # noqa: ANN401 - the network's own
        """A network's output for the rows that the engine has asked for; a stand-in where there is nothing to do.

        Raises:
            NetworkError: if the network fails, naming the samples and steps of the rows it was given.
        """
        number = self.place % len(self.current.slots)
        slot, spare = self.current.slots[number], self.current.spares[number]
        self.place += 1
        if self.starved or not self.going or self.owing:
            return self._spare(slot, spare)
        if slot.name != name:
            raise UnsupportedError(f"the pipeline calls {name} where it called {slot.name} before")
        if self.trials:
            self.current.check_again(number, arguments, self.latest)
            self.rounding = max(self.rounding, unit(spare))
            if self.trials[0][1]:  # blank, and of one row more: nothing that is kept of it fits the next pass
                return slot.handed(with_tensors(slot.picked(spare, self.longer), _otherwise))
            return slot.handed(slot.picked(spare, self.trial))
        rows = self.parts[0].rows
        call = Call(slot, run, arguments, rows, self.rows.calls[self.parts[0].at], spare)
        try:
            found = self.crew.run(call)
            if self.current.blend is None:
                return slot.handed(found)
            self.found += pieces(found, slot.state.chunks, self.state)
            return copied(spare)
        except (UnsupportedError, NetworkError):
            raise
        except KeyboardInterrupt:
            self.left = rows.samples
            self._resume(lambda: self.asking.throw(KeyboardInterrupt()))
        except Exception as error:
            # Ranks see to their own memory: the others would not ask for fewer rows.
            if not out_of_memory(error) or self.crew.lockstep or len(self.rows) <= self.crew.count:
                raise NetworkError(f"{name} failed on {call.named()}: {error_text(error)}") from error
            self.starved, self.left = True, rows.samples
        if self.starved and torch.cuda.is_available():
            torch.cuda.empty_cache()
        return self._spare(slot, spare)

    def _spare(self, slot: Slot, spare: Any) -> Any:  # noqa: ANN401 - a network's output
        """A stand-in for an output, with as many rows as the calls before it in this pass."""
        if self.left is None or self.current.blend is not None:
            return copied(spare)
        return slot.handed(slot.picked(spare, self.left))

    def step(self, output: Tensor) -> bool:
        """Hand the engine the guided model output; whether that ended a round."""
        before = self.tally.rounds
        if self.owing:
            self.owing = False
            return True
        if self.trials and self.going:
            phase, self.blank = self.trials.pop(0)
            if self.blank:
                return False
            output = self._rows(output, phase, len(self.trial))
            if not alike(output, self._answer(phase)[:, self.trial].flatten(0, 1), self.rounding):
                raise RowsError(
                    "the pipeline treats the samples of a batch differently, or mixes them, or keeps something from "
                    "one pass of its loop to the next"
                )
        elif self.starved:
            self._resume(lambda: self.asking.send(None))
        elif self.going:
            self._take(output)
        ended = self.tally.rounds > before
        self.owing = ended and self.going and self.latest != self.last
        return ended and not self.owing

    def _take(self, output: Tensor) -> None:
        """Take in the guided model output of a phase; with the last one the engine has what it has asked for."""
        part = self.parts.pop(0)
        rows = self.rows[part.at]
        state, blend = self.state[part.at], part.phase.blend
        if blend is None:
            output = self._rows(output, part.phase, len(rows))
            found = self.estimate(output[: len(rows)], state, rows.calls)
        else:
            found = self.estimate.clipped(blend([state, *self.found], part.rows), rows.calls)
        if self.score.fixed is not None:  # what the network says there is not listened to
            found.masked_fill_(self.score.fixed.mask[rows.samples], 0.0)
        self.done.append((part, found.flatten(1)))
        if not self.parts:
            self._count()
            answer = self._together()
            self._resume(lambda: self.asking.send(answer))

    def _together(self) -> Tensor:
        """What was found for the rows of all phases, in the order of the request."""
        if len(self.done) == 1:
            return self.done[0][1]
        answer = self.done[0][1].new_empty(len(self.rows), self.done[0][1].shape[1])
        for part, found in self.done:
            answer[part.at] = found
        return answer

    def _count(self) -> None:
        """Take back what the executor counts too much: it knows the phase only that has the most network rows."""
        executor = self.tally.problem.executor
        executor.peak_batch = max(executor.peak_batch, self.crew.largest)
        for part, _ in self.done:
            if saved := executor.rows_per_call - part.phase.rows_per_call:
                samples = part.rows.samples.cpu()
                executor.evaluations -= saved * torch.bincount(samples, minlength=len(executor.evaluations))

    def _answer(self, phase: Phase) -> Tensor:
        """The model output of a phase of the rehearsal, shape ``(copies, L, *shape)``."""
        return phase.output.reshape(-1, *self.score.initial.shape)

    def _rows(self, output: Tensor, phase: Phase, count: int) -> Tensor:
        """The model output of ``count`` rows, checked."""
        shape, copies = self.state.shape[1:], len(self._answer(phase))
        if phase.slots[-1].listed and output.shape[-2] % shape[-2] == 0:
            output = unpacked(output, shape[-2], copies, count)
        if output.shape != (copies * count, *shape):
            raise RowsError(
                f"the pipeline makes model outputs of shape {tuple(output.shape)} of {count} rows of shape "
                f"{tuple(shape)}"
            )
        return output

    def end(self) -> Tensor:
        """The current final state of all the scheduler's rows, shape ``(N, *shape)``."""
        end = self.tally.end.reshape(self.tally.problem.shape)
        if self.going and (self.blank or self.trials):  # between trials
            end = torch.full_like(end, torch.nan if self.blank else 0.0)
        self.sources = self.sources.to(end.device)
        return end[self.sources]

    def solution(self) -> Solution:
        """The result of the run."""
        return self.tally.solution(None, raise_on_failure=self.options.raise_on_failure)

    def close(self) -> None:
        """Give up: the progress bar goes."""
        self.asking.close()


def _otherwise(leaf: Tensor) -> Tensor:
    """Other numbers of the same kind."""
    return (-2 * leaf).flatten().roll(1).view(leaf.shape)


@dataclass(frozen=True)
class _Known:
    """An integrator whose steps are known already."""

    known: Any

    def steps(self, schedule: object, grid: object) -> Any:  # noqa: ANN401 - multistep recurrences are no public kind
        """The steps."""
        return self.known
