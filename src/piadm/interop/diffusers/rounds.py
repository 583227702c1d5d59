"""Rounds of the engine, answered by the pipeline's own loop: one pass of its body is one network call of many rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from piadm._checks import optional_int
from piadm.denoiser import Denoiser
from piadm.engine import rounds
from piadm.executor import error_text, name_rows, out_of_memory
from piadm.grid import TimeGrid
from piadm.integrators import Integrator
from piadm.interop.diffusers.arguments import Rows, copied, leaves
from piadm.interop.diffusers.probe import UnsupportedError
from piadm.interop.diffusers.rehearsal import ROUNDING, Score, alike
from piadm.linearization import Linearization
from piadm.problem import make_problem
from piadm.schedule import VPSchedule
from piadm.settings import TURNS_PER_NODE, SampleSettings, clipped, resolve
from piadm.solution import NetworkError, RoundInfo, Solution
from piadm.tally import Interrupted, Tally


@dataclass(frozen=True)
class Options:
    """How a parallel pipeline samples; the arguments of ``parallelize``."""

    tol: float = 1e-2
    max_batch: int | None = None
    nodes: str | int | None = None
    window: int | str | None = None
    linearization: str | Linearization | None = None
    max_rounds: int | None = None
    data_mean: float = 0.0
    data_variance: float = 1.0
    raise_on_failure: bool = False

    def __post_init__(self) -> None:
        optional_int("max_batch", self.max_batch)
        optional_int("max_rounds", self.max_rounds)
        # A schedule that allows everything: what the pipeline's own one does not shows when it is known.
        anything = Denoiser(PipelineNetwork(1), VPSchedule(), "sample", self.data_mean, self.data_variance)
        self.engine(anything, "ode", None)

    def engine(self, denoiser: Denoiser, method: str | Integrator, grid: TimeGrid | None) -> SampleSettings:
        """The engine's settings for a denoiser; checks what it is given."""
        return resolve(
            denoiser, method=method, grid=grid, steps=1000, tol=self.tol, nodes=self.nodes, window=self.window,
            guess=self.linearization,
        )  # fmt: skip


#: A network of the pipeline, called with its arguments by name.
Network = Callable[[dict[str, Any]], Any]


class PipelineNetwork:
    """What the engine knows of networks that the pipeline calls.

    Attributes:
        rows_per_call: network rows per row of the engine: several under guidance.
        kind: a tensor of the dtype that they return, where the states are; None: not known yet.
    """

    def __init__(self, rows_per_call: int, kind: Tensor | None = None) -> None:
        self.rows_per_call, self.kind = rows_per_call, kind

    def parameters(self) -> Iterator[Tensor]:
        """What tells dtype and device."""
        return iter(() if self.kind is None else (self.kind,))

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
        self.scales, self.estimate, self.sources = score.scales, score.estimate, score.sources
        count = score.levels.count
        chunks = sum(slot.state.chunks for slot in score.slots if slot.denoises)
        network = PipelineNetwork(chunks, score.initial.new_empty(0, dtype=score.output.dtype))
        denoiser = Denoiser(network, score.levels, "sample", options.data_mean, options.data_variance)
        what = denoiser, _Known(score.steps), TimeGrid(range(count, -1, -1))
        engine = options.engine(*what)
        if options.nodes is None and engine.nodes.count < count and any(slot.jumps for slot in score.slots):
            # Between nodes a condition that holds for a few steps would not be seen.
            engine = replace(options, nodes="all").engine(*what)
        if (excess := self.estimate.excess(score.steps)) is not None:
            engine = clipped(engine, excess)
        problem = make_problem(
            denoiser, tuple(score.initial.shape), engine.grid, seed=0, initial=score.initial, noise=score.noise,
            noise_count=count, condition=None, max_batch=options.max_batch, callback=None,
        )  # fmt: skip
        self.info: RoundInfo | None = None
        self.tally = Tally(problem, None, self._heard, progress)
        if evaluated:
            self.tally.rounds = 1
            problem.executor.evaluations += evaluated
        limit = options.max_rounds or TURNS_PER_NODE * count + self.tally.rounds
        self.asking = rounds(engine, problem, self.tally, limit, False)
        self.going = True
        # A pass with one row more than the batch has, backwards: code that tells samples apart shows before any network
        # runs, also where the engine would happen to ask for rows in the order of the batch.
        batch = len(score.initial)
        self.rounding = ROUNDING  # means over each row, of more rows, may be rounded the other way: by the last digit
        self.trial: Tensor | None = torch.arange(batch - 1, -2, -1, device="cpu") % batch
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
        calls = self.score.levels.calls(times)
        self.state = states.reshape(-1, *self.score.initial.shape[1:])
        if self.score.fixed is not None:
            self.score.fixed.put(self.state, samples, calls)
        # Moved once: afterwards they are where the state is, and nothing waits for them.
        self.scales, self.estimate = self.scales.to(self.state), self.estimate.to(self.state)
        scales = self.scales[calls].reshape(-1, *[1] * (self.state.ndim - 1))
        self.rows = Rows(self.state * scales, samples, calls)

    def stop(self) -> None:
        """End early, with what there is."""
        if self.going:
            self._resume(lambda: self.asking.throw(Interrupted()))

    def network(self, name: str, run: Network, arguments: dict[str, Any], spare: Any) -> Any:  # noqa: ANN401
        """A network's output for the rows that the engine has asked for; ``spare`` where there is nothing to do.

        Raises:
            NetworkError: if the network fails, naming the samples and steps of the rows it was given.
        """
        if self.starved or not self.going:
            return copied(spare)
        slot = self.score.slots[self.place % len(self.score.slots)]
        self.place += 1
        if slot.name != name:
            raise UnsupportedError(f"the pipeline calls {name} where it called {slot.name} before")
        if self.trial is not None:
            self.rounding = max(self.rounding, _unit(spare))
            return slot.picked(spare, self.trial)
        try:
            return slot.call(run, arguments, self.rows)
        except UnsupportedError:
            raise
        except KeyboardInterrupt:
            self._resume(lambda: self.asking.throw(KeyboardInterrupt()))
        except Exception as error:
            if not out_of_memory(error) or len(self.rows) == 1:
                what = name_rows(self.rows.samples, self.rows.calls).replace("time", "step")
                raise NetworkError(f"{name} failed on {what}: {error_text(error)}") from error
            self.starved = True
        if self.starved and torch.cuda.is_available():
            torch.cuda.empty_cache()
        return copied(spare)

    def step(self, output: Tensor) -> bool:
        """Hand the engine the guided model output; whether that ended a round."""
        before = self.tally.rounds
        if self.trial is not None:
            self._check(output, len(self.trial))
            if not alike(output, self._answer()[:, self.trial].flatten(0, 1), self.rounding):
                raise UnsupportedError("the pipeline treats the samples of a batch differently, or mixes them")
            self.trial, self.place = None, 0
        elif self.starved:
            self._resume(lambda: self.asking.send(None))
        elif self.going:
            self._check(output, len(self.rows))
            found = self.estimate(output[: len(self.rows)], self.state, self.rows.calls)
            if self.score.fixed is not None:  # what the network says there is not listened to
                found.masked_fill_(self.score.fixed.mask[self.rows.samples], 0.0)
            self._resume(lambda: self.asking.send(found.flatten(1)))
        return self.tally.rounds > before

    def _answer(self) -> Tensor:
        """The model output of the rehearsal, shape ``(copies, L, *shape)``."""
        return self.score.output.reshape(-1, *self.score.initial.shape)

    def _check(self, output: Tensor, count: int) -> None:
        """Whether a model output is that of ``count`` rows."""
        wanted = (len(self._answer()) * count, *self.state.shape[1:])
        if output.shape != wanted:
            raise UnsupportedError(
                f"the pipeline makes model outputs of shape {tuple(output.shape)} of {count} rows of shape "
                f"{tuple(self.state.shape[1:])}"
            )

    def end(self) -> Tensor:
        """The current final state of all the scheduler's rows, shape ``(N, *shape)``."""
        end = self.tally.end.reshape(self.tally.problem.shape)
        self.sources = self.sources.to(end.device)
        return end[self.sources]

    def solution(self) -> Solution:
        """The result of the run."""
        return self.tally.solution(None, raise_on_failure=self.options.raise_on_failure)

    def close(self) -> None:
        """Give up: the progress bar goes."""
        self.asking.close()


def _unit(output: Any) -> float:  # noqa: ANN401 - a network's output
    """The last digit of numbers near one in the shortest of an output's types."""
    tensors = [leaf for leaf in leaves(output).values() if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return max((torch.finfo(leaf.dtype).eps for leaf in tensors), default=0.0)


@dataclass(frozen=True)
class _Known:
    """An integrator whose steps are known already."""

    known: Any

    def steps(self, schedule: object, grid: object) -> Any:  # noqa: ANN401 - multistep recurrences are no public kind
        """The steps."""
        return self.known
