"""``parallelize``: any diffusers pipeline, parallel in time, by its own code."""

from __future__ import annotations

import builtins
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from piadm.interop.diffusers.probe import UnsupportedError, rebound
from piadm.interop.diffusers.proxies import NetworkProxy, SchedulerProxy, is_denoiser
from piadm.interop.diffusers.rehearsal import Rehearsal, Score
from piadm.interop.diffusers.rounds import Options, Rounds
from piadm.solution import RoundInfo, Solution


class Loop:
    """The pipeline's loop over timesteps: once through all of them, then round after round at the last one."""

    def __init__(self, run: Run, timesteps: Tensor) -> None:
        self.run, self.timesteps = run, timesteps

    def __len__(self) -> int:
        return len(self.timesteps)

    def __iter__(self) -> Iterator[Tensor]:
        return (t for _, t in self.numbered())

    def numbered(self) -> Iterator[tuple[int, Tensor]]:
        """Steps and their numbers; rounds have those of the last step, whose code is that of the end."""
        run = self.run
        run.begin(self.timesteps)
        yield from builtins.enumerate(self.timesteps)
        run.turn_to_rounds()
        last = len(self.timesteps) - 1
        while run.going():
            yield last, self.timesteps[last]
        run.finish()


class Run:
    """One call of a parallel pipeline, on a shallow copy of the pipeline with stand-ins for scheduler and networks.

    Args:
        pipe: the pipeline.
        options: how to sample.
        shapes: what is known of the networks' outputs; added to.
    """

    def __init__(self, pipe: Any, options: Options, shapes: dict[object, Any]) -> None:  # noqa: ANN401 - any pipeline
        self.pipe, self.options, self.shapes = pipe, options, shapes
        self.scheduler = copy.deepcopy(pipe.scheduler)
        self.rehearsal: Rehearsal | None = None
        self.score: Score | None = None
        self.rounds: Rounds | None = None
        self.solution: Solution | None = None
        self.ended_round = False
        self.stage = self._staged()

    def _staged(self) -> Any:  # noqa: ANN401 - a pipeline
        stage = copy.copy(self.pipe)
        parts: dict[str, Any] = {"scheduler": SchedulerProxy(self.scheduler, self.step, self._scaled)}
        for name, component in self.pipe.components.items():
            if is_denoiser(component):
                parts[name] = NetworkProxy(component, name, self.network)
        parts["progress_bar"] = self.progress_bar
        # Offloading moves the original's modules: it must put them back itself.
        parts["maybe_free_model_hooks"] = self.pipe.maybe_free_model_hooks
        vars(stage).update(parts)  # past __setattr__, which would write the stand-ins into the configuration
        return stage

    # -- what the pipeline calls -------------------------------------------------------------------------------------

    def enumerate(self, iterable: Any, start: int = 0) -> Iterator[tuple[int, Any]]:  # noqa: ANN401 - the builtin's
        """The pipeline's ``enumerate``: the loop over timesteps is this run's."""
        if isinstance(iterable, Tensor) and self._are_timesteps(iterable):
            iterable = Loop(self, iterable)
        return iterable.numbered() if isinstance(iterable, Loop) else builtins.enumerate(iterable, start)

    def progress_bar(self, iterable: Any = None, total: int | None = None, **looks: Any) -> Any:  # noqa: ANN401
        """No bar of the pipeline's own: the engine shows one of rounds."""
        if isinstance(iterable, Tensor) and self._are_timesteps(iterable):
            return Loop(self, iterable)
        return tqdm(iterable, total=total, disable=True)

    def _are_timesteps(self, values: Tensor) -> bool:
        own = self.scheduler.timesteps
        if values.ndim != 1 or not 0 < len(values) <= len(own):
            return False
        return bool((own.unfold(0, len(values), 1) == values.to(own)).all(1).any())

    def network(self, proxy: NetworkProxy, arguments: dict[str, Any]) -> Any:  # noqa: ANN401 - the network's own
        """A network call of the loop."""
        if self.rehearsal is None:
            raise UnsupportedError(
                f"{type(self.pipe).__name__} calls its {proxy._name} outside of a loop over scheduler.timesteps"
            )
        if self.rounds is None:
            return self.rehearsal.network(proxy._name, proxy.run, arguments)
        return self.rounds.network(proxy._name, proxy.run, arguments, self.rehearsal.spares[proxy._name])

    def step(self, output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """The scheduler's step."""
        if self.rehearsal is None:
            raise UnsupportedError(f"{type(self.pipe).__name__} does not loop over scheduler.timesteps")
        if self.rounds is None or self.score is None:
            return self.rehearsal.step(output, timestep, sample, *args, **kwargs)
        self.ended_round = self.rounds.step(output)
        return self.score.answer(self.rounds.end(), sample)

    def _scaled(self) -> None:
        if self.rehearsal is not None:
            self.rehearsal.scaled = True

    # -- the course of the loop --------------------------------------------------------------------------------------

    def begin(self, timesteps: Tensor) -> None:
        """The loop begins: rehearse."""
        if self.rehearsal is not None:
            raise UnsupportedError(f"{type(self.pipe).__name__} loops over scheduler.timesteps more than once")
        self.rehearsal = Rehearsal(self.scheduler, timesteps, self.shapes)

    def turn_to_rounds(self) -> None:
        """All steps are rehearsed."""
        assert self.rehearsal is not None
        self.score = self.rehearsal.score()
        progress = not getattr(self.pipe, "_progress_bar_config", {}).get("disable", False)
        evaluated = self.rehearsal.evaluated // self.rehearsal.batch
        self.rounds = Rounds(self.score, self.options, evaluated, progress)

    def going(self) -> bool:
        """Whether the engine asks for more rows; asks it to stop where the pipeline was interrupted."""
        assert self.rounds is not None
        if getattr(self.stage, "_interrupt", False):
            self.rounds.stop()
        return self.rounds.going

    def finish(self) -> None:
        """The engine is done."""
        assert self.rounds is not None
        self.solution = self.rounds.solution()

    def callback(self, theirs: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
        """The user's ``callback_on_step_end``, once per round."""

        def ours(stage: Any, i: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:  # noqa: ANN401
            if self.rounds is None or not self.ended_round:
                return {}
            changed = theirs(stage, self.rounds.tally.rounds - 1, t, dict(values)) or {}
            if bad := sorted(name for name, value in changed.items() if value is not values.get(name)):
                raise UnsupportedError(f"callback_on_step_end may look and interrupt, not change {', '.join(bad)}")
            return {}

        return ours

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - the pipeline's own
        """The pipeline's output."""
        if kwargs.get("callback") is not None:
            raise UnsupportedError("callback is not supported; use callback_on_step_end")
        if (theirs := kwargs.get("callback_on_step_end")) is not None:
            if not callable(theirs) or hasattr(theirs, "tensor_inputs"):
                raise UnsupportedError("callback_on_step_end must be a function: callback objects change the steps")
            kwargs["callback_on_step_end"] = self.callback(theirs)
        call = rebound(type(self.pipe).__call__, enumerate=self.enumerate)
        try:
            with torch.no_grad():
                return call(self.stage, *args, **kwargs)
        finally:
            if self.rounds is not None:
                self.rounds.close()

    @property
    def last_round(self) -> RoundInfo | None:
        """What is known after the latest round."""
        return None if self.rounds is None else self.rounds.info


class ParallelPipeline:
    """A pipeline whose calls run parallel in time; everything else is the pipeline's.

    Attributes:
        pipe: the pipeline, never changed.
        options: how to sample.
        last_solution: ``piadm.Solution`` of the last call: status and error estimate per sample, rounds, evaluations.
    """

    def __init__(self, pipe: Any, options: Options) -> None:  # noqa: ANN401 - any pipeline
        self.pipe, self.options = pipe, options
        self.last_solution: Solution | None = None
        self._shapes: dict[object, Any] = {}

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - the pipeline's own
        return getattr(self.pipe, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - the pipeline's own
        """The pipeline's own call, with its arguments and its output."""
        run = Run(self.pipe, self.options, self._shapes)
        self._run = run
        output = run(*args, **kwargs)
        self.last_solution = run.solution
        return output


def parallelize(pipe: Any, **options: Any) -> ParallelPipeline:  # noqa: ANN401 - any pipeline
    """x."""
    return ParallelPipeline(pipe, Options(**options))
