"""Bookkeeping of one run: rounds, verdicts, callback, interruption, and the Solution at the end."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from piadm._checks import caller_level, described, listed
from piadm.numerics import Flags
from piadm.problem import Callback, Problem
from piadm.solution import RoundInfo, Solution, Stats, Status, demand


class Interrupted(Exception):  # noqa: N818 - a request, not an error
    """The callback asked for the run to end."""


@dataclass
class Tally:
    """Counts and verdicts of a run, filled in as it goes.

    Args:
        problem: what is being sampled.
        total: rounds needed at most, where known.
        callback: called after each round; a true return value ends the run.
        progress: show a progress bar.

    Attributes:
        rounds, peak_states, nodes, window: as in ``Stats``, so far.
        draft: the tally of the draft's own path; None: there was none.
        residuals: error estimates after each round, each ``(B,)`` float64.
        failures: a line per sample that was given up.
        apart: by how much, relatively, the network has answered one row differently among others; 0: it has not.
        end: current final state of the whole batch, shape ``(B, d)``.
        error: error estimate of every sample, shape ``(B,)`` float64 on the CPU; inf: nothing is known yet.
        status: of every sample; INTERRUPTED until it is closed.
        rounds_per_sample: rounds in which each took part, shape ``(B,)`` int64.
        interrupted: whether the run was asked to end.
        mid_round: whether this was by Ctrl-C, perhaps within a round.
    """

    problem: Problem
    total: int | None = None
    callback: Callback | None = None
    progress: bool | None = None
    rounds: int = field(default=0, init=False)
    peak_states: int = field(default=0, init=False)
    nodes: int | None = field(default=None, init=False)
    window: int | None = field(default=None, init=False)
    draft: Tally | None = field(default=None, init=False)
    residuals: list[Tensor] = field(default_factory=list, init=False)
    failures: list[str] = field(default_factory=list, init=False)
    apart: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        batch, self.end = self.problem.batch, self.problem.start.clone()
        self.error = torch.full((batch,), torch.inf, dtype=torch.float64, device="cpu")
        self.status = [Status.INTERRUPTED] * batch
        self.rounds_per_sample = torch.zeros(batch, dtype=torch.int64, device="cpu")
        self.interrupted = self.mid_round = False
        self.bar = tqdm(total=self.total, unit="round", disable=not self.progress, leave=False)

    def round(self, samples: Tensor, rows: Tensor, denoised: Tensor | None = None) -> None:
        """Count one round and tell the callback.

        Args:
            samples: numbers of the samples that took part.
            rows: sample number of every row evaluated, on the CPU.
            denoised: best guess of the clean samples, ``(B, d)``; None is ``end``.

        Raises:
            Interrupted: if the callback returned a true value.
            TypeError: if it returned what is neither true nor false.
            RuntimeError: if it raised StopIteration, by which generators such as the rounds would end.
        """
        self.rounds += 1
        self.rounds_per_sample[samples] += 1
        self.problem.executor.count(rows)
        self.bar.update()
        if self.callback is None:
            return
        info = RoundInfo(
            round=self.rounds,
            total=self.total,
            sample=self.end.clone().reshape(self.problem.shape),
            denoised=(self.end if denoised is None else denoised).clone().reshape(self.problem.shape),
            error_estimate=self.error.clone(),
            active_rows=len(rows),
        )
        try:
            wanted = self.callback(info)
        except StopIteration as error:
            raise RuntimeError("callback raised StopIteration; to end the run, return a true value") from error
        try:
            stop = bool(wanted)
        except (RuntimeError, ValueError) as error:  # a tensor or an array of several
            raise TypeError(f"callback must return a true or false value, got {described(wanted)}") from error
        if stop:
            raise Interrupted

    def fail(self, sample: int, message: str) -> None:
        """Give up a sample, once: the network returned values that are not finite."""
        if self.status[sample] is Status.NONFINITE:
            return
        self.status[sample] = Status.NONFINITE
        self.error[sample] = torch.inf
        self.failures.append(f"sample {self.problem.executor.team.first + sample}: {message}")

    def over(self, limit: int) -> bool:
        """Whether a run of at most ``limit`` rounds is at its end, or was interrupted."""
        return self.interrupted or self.rounds >= limit

    @property
    def failed(self) -> Flags:
        """Which samples have been given up, shape ``(B,)``."""
        return np.array([status is Status.NONFINITE for status in self.status])

    def close(self, samples: Tensor, done: Flags) -> None:
        """Give samples their final status: CONVERGED where ``done``, else what has kept them from it."""
        unfinished = Status.INTERRUPTED if self.interrupted else Status.MAX_ROUNDS
        for sample, finished in zip(samples.tolist(), done.tolist(), strict=True):
            if self.status[sample] is not Status.NONFINITE:
                self.status[sample] = Status.CONVERGED if finished else unfinished

    def finish(self) -> None:
        """Close every sample of a run of a known number of rounds: CONVERGED if it had them all."""
        batch = self.problem.batch
        self.close(torch.arange(batch, device="cpu"), np.full(batch, self.rounds == self.total))

    @contextmanager
    def stoppable(self) -> Iterator[None]:
        """Turn an interrupt, by keyboard or callback, into an early end with the state so far."""
        try:
            yield
        except Interrupted:
            self.interrupted = True
        except KeyboardInterrupt:
            self.interrupted = self.mid_round = True

    @contextmanager
    def running(self) -> Iterator[None]:
        """The whole run: ``stoppable``, and the progress bar goes when it is over."""
        try:
            with self.stoppable():
                yield
        finally:
            self.bar.close()

    @property
    def evaluations(self) -> float:
        """Rows evaluated so far, per sample (mean over the batch)."""
        return int(self.problem.executor.evaluations.sum()) / self.problem.batch

    def solution(self, states: Tensor | None, *, raise_on_failure: bool) -> Solution:
        """The result; warns of samples that failed.

        Raises:
            NotConvergedError: with ``raise_on_failure``, if a sample is not CONVERGED.
        """
        batch, counts = self.problem.batch, self.problem.executor.evaluations
        stats = Stats(
            rounds=self.rounds,
            evaluations=self.evaluations,
            rounds_per_sample=self.rounds_per_sample,
            evaluations_per_sample=counts,
            peak_batch=self.problem.executor.peak_batch,
            peak_states=self.peak_states,
            nodes=self.nodes,
            window=self.window,
            wall_time=0.0,  # the sampler knows when it was called: ``timed``
            residuals=torch.stack(self.residuals) if self.residuals else self.error.new_zeros(0, batch),
            draft_rounds=0 if self.draft is None else self.draft.rounds,
            draft_evaluations=0.0 if self.draft is None else self.draft.evaluations,
        )
        sample = self.end.reshape(self.problem.shape)
        failed = torch.from_numpy(self.failed)
        sample[failed] = torch.nan  # not to be taken for a sample
        if states is not None:
            states[-1, failed] = torch.nan
        solution = Solution(sample, tuple(self.status), self.error, stats, states, tuple(self.failures))
        if self.failures:
            warnings.warn(listed(self.failures), RuntimeWarning, stacklevel=caller_level())
        if self.apart:
            warnings.warn(
                f"the network answered one row differently among other rows, by {self.apart:.2g} of its answer: its "
                "output depends on chance, on other rows or on a time that is not the row's own, so that errors mean "
                "nothing; it must treat every row alone, and alike every time",
                RuntimeWarning,
                stacklevel=caller_level(),
            )
        return demand(solution) if raise_on_failure else solution
