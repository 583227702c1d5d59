"""One call of a parallel pipeline: its own code, on stand-ins for its scheduler and its networks."""

from __future__ import annotations

import builtins
import copy
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from piadm.interop.diffusers.accord import ADVICE, given, rehearsed
from piadm.interop.diffusers.crew import Alone, PipelineCrew
from piadm.interop.diffusers.device_crew import DeviceCrew
from piadm.interop.diffusers.loop import Loop
from piadm.interop.diffusers.measuring import Measuring
from piadm.interop.diffusers.probe import RowsError, UnsupportedError, rebound
from piadm.interop.diffusers.proxies import NetworkProxy, is_denoiser, take_over
from piadm.interop.diffusers.rank_crew import RankCrew
from piadm.interop.diffusers.rehearsal import Rehearsal
from piadm.interop.diffusers.rounds import Rounds
from piadm.interop.diffusers.screen import check_network, check_scheduler
from piadm.interop.diffusers.sequential import own_error
from piadm.interop.diffusers.standins import replaced
from piadm.interop.diffusers.watch import Callback
from piadm.solution import NetworkError, NotConvergedError, Solution, timed
from piadm.workers.devices import Devices
from piadm.workers.ranks import Ranks

if TYPE_CHECKING:
    from piadm.interop.diffusers.pipeline import ParallelPipeline


class Run:
    """One call of a parallel pipeline, on a shallow copy of the pipeline with stand-ins for scheduler and networks.

    Args:
        parallel: the parallel pipeline.
        args: positional arguments of the call.
        kwargs: the others.
        evaluated: the rehearsal's ``evaluated`` of an earlier run of the same call, whose rows the pipeline's code does
            not do for: in this one what it computes is measured.  None: there was none.
    """

    def __init__(
        self,
        parallel: ParallelPipeline,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        evaluated: list[tuple[int, str, int]] | None = None,
    ) -> None:
        self.parallel, self.pipe, self.name = parallel, parallel.pipe, type(parallel.pipe).__name__
        self.args, self.kwargs, self.began = args, kwargs, time.perf_counter()
        check_scheduler(self.pipe.scheduler)
        self.scheduler = copy.deepcopy(self.pipe.scheduler)
        self.evaluated, self.measured = list(evaluated or []), evaluated is not None
        self.rehearsal: Rehearsal | None = None
        self.measuring: Measuring | None = None
        self.rounds: Rounds | None = None
        self.solution: Solution | None = None
        self.rehearsing = self.ended_round = False
        self.latest: int | None = None  # step that is repeated
        self.heard: Callback | None = None  # the user's, where there is one
        self.networks: dict[str, nn.Module] = {}
        self.stage, self.crew = self._staged(), self._crew()

    def _staged(self) -> Any:  # noqa: ANN401 - a pipeline
        stage = copy.copy(self.pipe)
        take_over(self.scheduler, self.step, self.scale)
        parts: dict[str, Any] = {"scheduler": self.scheduler}
        for name, component in self.pipe.components.items():
            check_network(f"{self.name}.{name}", component)
            if is_denoiser(component):
                parts[name], self.networks[name] = NetworkProxy(component, name, self.network), component
        parts["progress_bar"] = self.progress_bar
        # Offloading moves the modules of the original, which must put them back itself.
        parts["maybe_free_model_hooks"] = self.pipe.maybe_free_model_hooks
        vars(stage).update(parts)  # past __setattr__, which would write the stand-ins into the configuration
        return stage

    def _crew(self) -> PipelineCrew:
        workers = self.parallel.options.workers
        if isinstance(workers, Devices):
            return DeviceCrew(workers, self.networks)
        return RankCrew(workers, self.parallel.options.max_batch) if isinstance(workers, Ranks) else Alone()

    def __call__(self) -> Any:  # noqa: ANN401 - the pipeline's own
        """The pipeline's output."""
        with self.crew.at_work():
            self.crew.agree(given(self.pipe, self.parallel.options, self.args, self.kwargs))
            return self._called()

    def _called(self) -> Any:  # noqa: ANN401 - the pipeline's own
        kwargs = dict(self.kwargs)
        if kwargs.get("callback") is not None:
            raise UnsupportedError("callback is not supported; use callback_on_step_end")
        if (theirs := kwargs.get("callback_on_step_end")) is not None:
            if not callable(theirs) or hasattr(theirs, "tensor_inputs"):
                raise UnsupportedError("callback_on_step_end must be a function: callback objects change the steps")
            self.heard = Callback(theirs, self.stage, self.pipe, self.networks)
            kwargs["callback_on_step_end"] = self.callback
        # A copy of the pipeline's __call__ whose enumerate is this run's: nobody else's is touched.
        call = rebound(type(self.pipe).__call__, enumerate=self.enumerate)
        try:
            with torch.no_grad():
                output = call(self.stage, *self.args, **kwargs)
        except Exception as error:
            ours = isinstance(error, (NetworkError, UnsupportedError, NotConvergedError))
            if ours or (self.heard and error is self.heard.error):
                raise
            if self.rehearsing:
                self._judge(error)
            if self.rounds is None or not self.rounds.going:
                raise
            what = f"{self.name} does not work with rows of several steps: {error}"
            if self.rehearsal is not None and self.rehearsal.batch > 1:
                what += "; if it has a number of its own for each sample, as in guidance, one sample per call may do"
            raise (RowsError if self.rounds.trials else UnsupportedError)(what) from error
        finally:
            if self.rounds is not None:
                self.rounds.close()
        if self.rounds is None:
            raise UnsupportedError(
                f"{self.name} does not loop over scheduler.timesteps; of several pipelines in one, parallelize the one "
                "that does"
            )
        return output

    def _judge(self, error: Exception) -> None:
        """Tell the user's errors, which the pipeline itself raises as well, from those that stand-ins bring about."""
        assert self.rehearsal is not None
        number = len(self.rehearsal.noise) if self.measuring is None else self.measuring.step_now
        if (own := own_error(self.pipe, self.args, self.kwargs, number + 1)) is not None:
            raise own from None
        what = f"{type(error).__name__}: {error}"
        raise UnsupportedError(
            f"{self.name} looks at its networks, or into what they return: with stand-ins for them it fails at step "
            f"{number}, and not by itself ({what})"
        ) from error

    # -- what the pipeline calls -------------------------------------------------------------------------------------

    def enumerate(self, iterable: Any, start: int = 0) -> Iterator[tuple[int, Any]]:  # noqa: ANN401 - the builtin's
        """The pipeline's ``enumerate``: the loop over timesteps is this run's."""
        if isinstance(iterable, Tensor) and self._are_timesteps(iterable):
            iterable = Loop(self, iterable)
        return iterable.numbered(start) if isinstance(iterable, Loop) else builtins.enumerate(iterable, start)

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
        name = proxy._name
        if self.rehearsal is None:
            raise UnsupportedError(
                f"{self.name} calls its {name} outside of a loop over enumerate(scheduler.timesteps), or over "
                "its progress_bar of them, in its own __call__; one elsewhere, as in a parent's __call__, is not found"
            )
        if self.rounds is None:
            return (self.measuring or self.rehearsal).network(proxy, arguments)
        return self.rounds.network(name, proxy.run, arguments)

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **more: Any) -> Any:  # noqa: ANN401
        """The scheduler's step."""
        if self.rehearsal is None:
            raise UnsupportedError(f"{self.name} does not loop over scheduler.timesteps")
        if self.measuring is not None and self.rounds is None:
            state = self.measuring.step(model_output, sample)
        elif self.rounds is not None:
            self.ended_round = self.rounds.step(model_output)
            state = self.rounds.end()
        else:
            return self.rehearsal.step(model_output, timestep, sample, *args, **more)
        assert self.latest is not None
        self.rehearsal.again(self.latest, sample, args, more)
        return replaced(self.rehearsal.result, state.to(self.rehearsal.result[0].dtype))

    def scale(self, sample: Tensor) -> Tensor:
        """The scheduler's ``scale_model_input``: rows are scaled when the network is called, each by its own factor.

        A single number is no state, and scaled at once, as is a state of which code is measured that may read it.
        """
        if self.rehearsal is not None and sample.ndim == 0:
            step = len(self.rehearsal.noise) if self.latest is None else self.latest
            return sample * float(self.rehearsal.probed.scales[step])
        if self.measuring is not None and self.rounds is None:
            return self.measuring.scaled(sample)
        if self.rehearsal is not None:
            # Another object, to be recognised; in memory of its own where scaling makes a new tensor.
            scales = bool((self.rehearsal.probed.scales != 1).any())
            self.rehearsal.scaled = sample = sample.clone() if scales else sample.view_as(sample)
        return sample

    # -- the course of the loop --------------------------------------------------------------------------------------

    def begin(self, timesteps: Tensor) -> None:
        """The loop begins: rehearse."""
        if self.rehearsal is not None:
            raise UnsupportedError(f"{self.name} loops over scheduler.timesteps more than once")
        given = self.args, self.kwargs
        self.rehearsal = Rehearsal(self.scheduler, timesteps, self.parallel._outputs, given, self.measured)
        self.rehearsal.evaluated = self.evaluated
        self.rehearsing = True

    def starts(self, step: int) -> None:
        """A step is rehearsed."""
        assert self.rehearsal is not None
        self.rehearsal.draws.keep(step)

    def turn_to_rounds(self) -> None:
        """All steps are rehearsed."""
        assert self.rehearsal is not None
        self.score = self.rehearsal.score()
        if self.measured:
            self.measuring = Measuring(self.rehearsal)

    def _begin_rounds(self) -> Rounds:
        """All is known that rounds need."""
        assert self.rehearsal is not None
        self.rehearsing = False
        progress = self.crew.shows and not getattr(self.pipe, "_progress_bar_config", {}).get("disable", False)
        self.crew.agree(rehearsed(self.score), ADVICE)
        options, networks = self.parallel.options, list(self.networks.values())
        return Rounds(self.score, options, self.rehearsal.evaluated, progress, networks, self.crew)

    def repeated(self) -> int | None:
        """The step that the next pass repeats, with what it draws; None: none is."""
        if (step := self._next()) is not None:
            assert self.rehearsal is not None
            self.rehearsal.draws.put_back(step)
            self.latest = step
        return step

    def _next(self) -> int | None:
        """The step of the next pass; the engine stops where the pipeline was interrupted."""
        if self.rounds is None:
            if self.measuring is not None and (step := self.measuring.repeated()) is not None:
                return step
            self.rounds = self._begin_rounds()
        if self.rounds.going and self.crew.begin(bool(getattr(self.stage, "_interrupt", False))):
            self.rounds.stop()
        return self.rounds.repeated()

    def finish(self) -> None:
        """The engine is done."""
        assert self.rounds is not None
        self.solution = timed(self.rounds.solution, self.began)

    def callback(self, stage: Any, i: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:  # noqa: ANN401
        """Tell the user's ``callback_on_step_end`` of a round."""
        if self.rehearsal is not None and self.rounds is not None and self.heard is not None and self.ended_round:
            self.parallel.last_round, tally = self.rounds.info, self.rounds.tally
            over = not (self.rounds.going or tally.interrupted)
            self.heard.hear(tally.rounds - 1, self.rehearsal.timesteps, over, values)
        return {}
