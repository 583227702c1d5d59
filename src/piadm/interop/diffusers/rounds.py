"""Rounds of the engine, answered by the pipeline's own loop: one pass of its body is one network call of many rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from piadm._checks import positive_int
from piadm.denoiser import Denoiser
from piadm.engine import rounds
from piadm.executor import name_rows, out_of_memory
from piadm.grid import TimeGrid
from piadm.interop.diffusers.arguments import Rows
from piadm.interop.diffusers.probe import UnsupportedError
from piadm.interop.diffusers.rehearsal import Score
from piadm.linearization import Linearization
from piadm.problem import pose
from piadm.settings import TURNS_PER_NODE, settle
from piadm.solution import NetworkError, RoundInfo, Solution
from piadm.tally import Interrupted, Tally


@dataclass(frozen=True)
class Options:
    """How ``parallelize`` samples; the arguments of ``piadm.sample``."""

    tol: float = 1e-2
    max_batch: int | None = None
    nodes: str | int | None = None
    window: int | str | None = None
    linearization: str | Linearization | None = None
    max_rounds: int | None = None
    data_mean: float = 0.0
    data_variance: float = 1.0
    raise_on_failure: bool = False


class PipelineNetwork:
    """What the engine knows of networks that the pipeline calls.

    Attributes:
        rows_per_call: network rows per row of the engine: several under guidance.
    """

    def __init__(self, rows_per_call: int) -> None:
        self.rows_per_call = rows_per_call

    def __call__(self, *args: object, **kwargs: object) -> Tensor:
        """Never: the pipeline's loop answers in its place."""
        raise AssertionError("the pipeline calls its networks itself")


class Rounds:
    """The engine's requests for rows, and the pipeline's answers.

    Args:
        score: the rehearsal.
        options: how to sample.
        evaluated: network rows that the rehearsal has evaluated, per sample; 0: none.
        progress: show a progress bar.
    """

    def __init__(self, score: Score, options: Options, evaluated: int, progress: bool) -> None:
        self.score, self.options = score, options
        schedule, count = score.levels, score.levels.count
        network = PipelineNetwork(sum(slot.state.chunks for slot in score.slots if slot.denoises))
        denoiser = Denoiser(network, schedule, "sample", options.data_mean, options.data_variance)
        engine = settle(
            denoiser, method=_Given(score.steps), grid=TimeGrid(torch.arange(count, -1.0, -1)), steps=count,  # type: ignore[arg-type]
            tol=options.tol, nodes=options.nodes, window=options.window, guess=options.linearization,
        )  # fmt: skip
        problem = pose(
            denoiser, tuple(score.initial.shape), engine.grid, seed=0, initial=score.initial, noise=score.noise,
            noise_count=count, condition=None, max_batch=options.max_batch, callback=None,
        )  # fmt: skip
        self.info: RoundInfo | None = None
        self.tally = Tally(problem, None, self._heard, progress)
        if evaluated:
            self.tally.rounds = 1
            problem.executor.evaluations += evaluated
        limit = TURNS_PER_NODE * count if options.max_rounds is None else positive_int("max_rounds", options.max_rounds)
        self.asking = rounds(engine, problem, self.tally, limit, False)
        self.going, self.starved, self.place = True, False, 0
        self._resume(lambda: next(self.asking))

    def _heard(self, info: RoundInfo) -> None:
        self.info = info

    def _resume(self, go_on: Callable[[], tuple[Tensor, Tensor, Tensor]]) -> None:
        """Let the engine go on to its next request, or to its end."""
        self.place, self.starved = 0, False
        try:
            states, samples, times = go_on()
        except StopIteration:
            self.going = False
            return
        score = self.score
        calls = score.levels.calls(times)
        state = states.reshape(-1, *score.initial.shape[1:])
        if score.fixed is not None:
            for number in calls.unique().tolist():
                if number:
                    at = calls == number
                    whole = score.initial.new_zeros(score.initial.shape, dtype=state.dtype)
                    whole[score.fixed.mask] = score.fixed.values[number - 1].to(state)
                    state[at] = torch.where(score.fixed.mask[samples[at]], whole[samples[at]], state[at])
        scales = score.scales.to(state)[calls].reshape(-1, *[1] * (state.ndim - 1))
        self.state, self.rows, self.times = state, Rows(state * scales, samples, calls), times

    def stop(self) -> None:
        """End early, with what there is."""
        if self.going:
            self._resume(lambda: self.asking.throw(Interrupted()))

    def network(self, name: str, run: Callable[[dict[str, Any]], Any], arguments: dict[str, Any], spare: Any) -> Any:  # noqa: ANN401
        """The network's output for the rows that the engine has asked for; ``spare`` where memory runs out."""
        slot = self.score.slots[self.place]
        self.place += 1
        if slot.name != name:
            raise UnsupportedError(f"the pipeline calls {name} where it called {slot.name} before")
        if self.starved or not self.going:
            return spare
        try:
            return slot.call(run, arguments, self.rows)
        except KeyboardInterrupt:
            self._resume(lambda: self.asking.throw(KeyboardInterrupt()))
            return spare
        except Exception as error:
            if out_of_memory(error) and len(self.rows.samples) > 1:
                self.starved = True
                if self.rows.state.is_cuda:
                    torch.cuda.empty_cache()
                return spare
            if isinstance(error, UnsupportedError):
                raise
            raise NetworkError(f"{name} failed on {name_rows(self.rows.samples, self.rows.calls)}: {error}") from error

    def step(self, output: Tensor) -> bool:
        """Hand the engine the guided model output; whether that ended a round."""
        before = self.tally.rounds
        if self.starved:
            self._resume(lambda: self.asking.send(None))
        elif self.going:
            count = len(self.rows.samples)
            if output.shape[1:] != self.state.shape[1:] or len(output) % count:
                raise UnsupportedError(
                    f"the pipeline made model outputs of shape {tuple(output.shape)} of {count} rows of shape "
                    f"{tuple(self.state.shape[1:])}"
                )
            found = self.score.estimate(output[:count], self.state, self.rows.calls)
            if self.score.fixed is not None:
                found = torch.where(self.score.fixed.mask[self.rows.samples], self.score.initial[:1].mean().to(found), found)
            self._resume(lambda: self.asking.send(found.flatten(1)))
        return self.tally.rounds > before

    @property
    def state(self) -> Tensor:
        """States that the engine has asked about, shape ``(r, *shape)``."""
        return self._state

    @state.setter
    def state(self, value: Tensor) -> None:
        self._state = value

    def end(self) -> Tensor:
        """The current final state of all the scheduler's rows, shape ``(N, *shape)``."""
        end = self.tally.end.reshape(self.tally.problem.shape)
        return end[self.score.sources.to(end.device)]

    def solution(self) -> Solution:
        """The result of the run."""
        return self.tally.solution(None, raise_on_failure=self.options.raise_on_failure)

    def close(self) -> None:
        """Give up: the progress bar goes."""
        self.asking.close()


@dataclass(frozen=True)
class _Given:
    """An integrator whose steps are known."""

    given: Any

    def steps(self, schedule: object, grid: object) -> Any:  # noqa: ANN401 - steps
        """The steps."""
        return self.given
