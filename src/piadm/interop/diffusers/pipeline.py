"""``parallelize``: any diffusers pipeline, parallel in time, by its own code."""

from __future__ import annotations

import builtins
import copy
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from piadm._checks import described
from piadm.interop.diffusers._version import pipeline_class
from piadm.interop.diffusers.loop import Loop
from piadm.interop.diffusers.options import Options
from piadm.interop.diffusers.probe import UnsupportedError, rebound
from piadm.interop.diffusers.proxies import NetworkProxy, is_denoiser, take_over
from piadm.interop.diffusers.rehearsal import Rehearsal, replaced
from piadm.interop.diffusers.rounds import Rounds
from piadm.interop.diffusers.screen import check_network, check_scheduler
from piadm.interop.diffusers.sequential import own_error
from piadm.interop.diffusers.standins import StandIns
from piadm.interop.diffusers.watch import Callback
from piadm.linearization import Linearization
from piadm.solution import NetworkError, NotConvergedError, RoundInfo, Solution, timed


class Run:
    """One call of a parallel pipeline, on a shallow copy of the pipeline with stand-ins for scheduler and networks.

    Args:
        parallel: the parallel pipeline.
        args: positional arguments of the call.
        kwargs: the others.
    """

    def __init__(self, parallel: ParallelPipeline, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.parallel, self.pipe, self.name = parallel, parallel.pipe, type(parallel.pipe).__name__
        self.args, self.kwargs, self.began = args, kwargs, time.perf_counter()
        check_scheduler(self.pipe.scheduler)
        self.scheduler = copy.deepcopy(self.pipe.scheduler)
        self.rehearsal: Rehearsal | None = None
        self.rounds: Rounds | None = None
        self.solution: Solution | None = None
        self.rehearsing = self.ended_round = False
        self.heard: Callback | None = None  # the user's, where there is one
        self.networks: dict[str, nn.Module] = {}
        self.stage = self._staged()

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

    def __call__(self) -> Any:  # noqa: ANN401 - the pipeline's own
        """The pipeline's output."""
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
            raise UnsupportedError(what) from error
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
        number = len(self.rehearsal.noise)
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
            return self.rehearsal.network(proxy, arguments)
        return self.rounds.network(name, proxy.run, arguments)

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **more: Any) -> Any:  # noqa: ANN401
        """The scheduler's step."""
        if self.rehearsal is None:
            raise UnsupportedError(f"{self.name} does not loop over scheduler.timesteps")
        if self.rounds is None:
            return self.rehearsal.step(model_output, timestep, sample, *args, **more)
        self.ended_round = self.rounds.step(model_output)
        self.rehearsal.again(sample)
        return replaced(self.rehearsal.result, self.rounds.end().to(self.rehearsal.result[0].dtype))

    def scale(self, sample: Tensor) -> Tensor:
        """The scheduler's ``scale_model_input``: rows are scaled when the network is called, each by its own factor."""
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
        self.rehearsal = Rehearsal(self.scheduler, timesteps, self.parallel._outputs, (self.args, self.kwargs))
        self.rehearsing = True

    def turn_to_rounds(self) -> None:
        """All steps are rehearsed."""
        assert self.rehearsal is not None
        self.rehearsing = False
        progress = not getattr(self.pipe, "_progress_bar_config", {}).get("disable", False)
        score = self.rehearsal.score()
        self.rounds = Rounds(score, self.parallel.options, self.rehearsal.evaluated, progress)

    def repeated(self) -> int | None:
        """The step that the next pass repeats, None: none; the engine stops where the pipeline was interrupted."""
        assert self.rounds is not None
        if getattr(self.stage, "_interrupt", False):
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


class ParallelPipeline:
    """A pipeline whose calls run parallel in time; everything else is the pipeline's, read or set.

    Attributes:
        pipe: the pipeline, never changed by a call; what is changed in it holds for the next call.
        options: how to sample.
        last_solution: the ``piadm.Solution`` of the last call: rounds, evaluations, status and error estimate per
            sample; its sample is the scheduler's final state.
        last_round: the ``piadm.RoundInfo`` of the latest round, for a ``callback_on_step_end``.
    """

    last_solution: Solution | None
    last_round: RoundInfo | None

    def __init__(self, pipe: Any, options: Options) -> None:  # noqa: ANN401 - any pipeline
        vars(self).update(pipe=pipe, options=options, last_solution=None, last_round=None, _outputs=StandIns())

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - the pipeline's own
        if name in ("pipe", "__setstate__"):  # not there yet while being copied
            raise AttributeError(name)
        return getattr(self.pipe, name)

    def __setattr__(self, name: str, value: object) -> None:
        if name in vars(self):
            vars(self)[name] = value
        else:
            setattr(self.pipe, name, value)

    def to(self, *args: Any, **kwargs: Any) -> ParallelPipeline:  # noqa: ANN401 - the pipeline's own
        """Move the pipeline to a device or type; this one goes with it."""
        self.pipe.to(*args, **kwargs)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - the pipeline's own
        """The pipeline's own call: its arguments, its output.

        ``callback_on_step_end`` is called once per round, with the number of the round for that of a step, and after
        the last round for the steps that are left; the ``latents`` that it is given are the current estimate of the
        final ones, a preview.  Setting ``pipe._interrupt`` there, or Ctrl-C, ends the run with the estimate so far.

        Raises:
            UnsupportedError: naming what cannot be run in parallel.
            NetworkError: if a network fails, naming the samples and steps of the rows it was given.
            NotConvergedError: with ``raise_on_failure``, if a sample is not CONVERGED.
        """
        run = Run(self, args, kwargs)
        try:
            return run()
        finally:
            self.last_solution = run.solution


def parallelize(
    pipe: Any,  # noqa: ANN401 - any pipeline
    *,
    tol: float = 1e-2,
    max_batch: int | None = None,
    nodes: str | int | None = None,
    window: int | str | None = None,
    linearization: str | Linearization | None = None,
    max_rounds: int | None = None,
    data_mean: float = 0.0,
    data_variance: float = 1.0,
    raise_on_failure: bool = False,
) -> ParallelPipeline:
    """A diffusers pipeline that runs parallel in time by its own code, with the same arguments, generator and output.

        x_{j+1} = sum_{i<=j} (a_ji x_i + b_ji D(x_i)) + c_j xi_j        solved for all j at once, in rounds

    with the coefficients of the pipeline's own scheduler and the noise that the pipeline would draw.

    Args:
        pipe: a ``DiffusionPipeline``.
        tol: RMS error per coordinate of the final latents (of pixels, without an autoencoder) against the sequential
            pipeline, > 0, judged per sample.
        max_batch: most network rows in one call, guidance included; None: 128 on a CPU, up to 1024
            for latents of few numbers; elsewhere what memory holds.
        nodes: steps at which the network is called, as for ``piadm.sample``: "all", a number, or None: as many as the
            tolerance needs.  At ``tol=1e-2`` that is every step of up to 95, of a stochastic scheduler up to 304; and
            always every step if arguments of a network other than the time change between steps.
        window: rows per sample evaluated in a round, as for ``piadm.sample``.
        linearization: as for ``piadm.sample``.
        max_rounds: most rounds; None: twice as many as steps.
        data_mean: mean of the latents over all coordinates, as for ``piadm.Denoiser``: a wrong value costs rounds.
        data_variance: variance of the latents about it, as there.
        raise_on_failure: raise ``NotConvergedError`` unless every sample is CONVERGED.

    Returns:
        A ``ParallelPipeline``.

    Raises:
        TypeError, ValueError: naming the argument, what was received and what is accepted.
        ImportError: if diffusers is missing or too old.
        UnsupportedError: a ``ValueError``, if the pipeline has no scheduler or no network that reads a timestep.

    Reference: Shih et al. 2023 (arXiv 2305.16317), whose ParaDiGMS pipelines were the first of their kind.
    """
    kind = pipeline_class()
    if not isinstance(pipe, kind):
        raise TypeError(f"pipe must be a diffusers.DiffusionPipeline, got {described(pipe)}")
    name, scheduler = type(pipe).__name__, getattr(pipe, "scheduler", None)  # no component where it is optional
    if not hasattr(scheduler, "step") or not any(map(is_denoiser, pipe.components.values())):
        raise UnsupportedError(f"{name} has no scheduler with steps, or no network that reads a timestep")
    options = Options(
        tol, max_batch, nodes, window, linearization, max_rounds, data_mean, data_variance, raise_on_failure
    )
    return ParallelPipeline(pipe, options)
