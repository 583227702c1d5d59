"""``parallelize``: any diffusers pipeline, parallel in time, by its own code."""

from __future__ import annotations

from typing import Any

from piadm._checks import described
from piadm.interop.diffusers._version import pipeline_class
from piadm.interop.diffusers.draws import Draws
from piadm.interop.diffusers.options import Options
from piadm.interop.diffusers.probe import RowsError, UnsupportedError
from piadm.interop.diffusers.proxies import is_denoiser
from piadm.interop.diffusers.run import Run
from piadm.interop.diffusers.standins import StandIns
from piadm.linearization import Linearization
from piadm.solution import RoundInfo, Solution
from piadm.workers.devices import Devices
from piadm.workers.ranks import Ranks


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
            NetworkError: if a network fails, naming the samples and steps of the rows it was given, or another rank,
                naming it.
            ValueError: if ranks were not given the same, or have not drawn the same, naming what differs.
            NotConvergedError: with ``raise_on_failure``, if a sample is not CONVERGED.
        """
        run, draws = Run(self, args, kwargs), Draws((args, kwargs))
        draws.keep()
        try:
            try:
                return run()
            except RowsError as error:
                why = str(error)  # without its traceback, which holds all that this run has
            # Once more from the start, now to measure what the code computes that these rows do not pass through.
            draws.put_back()
            run = Run(self, args, kwargs, run.evaluated)
            try:
                return run()
            except RowsError as error:
                raise UnsupportedError(why if str(error) == why else f"{why}; {error}") from error
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
    workers: Devices | Ranks | None = None,
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
        workers: who evaluates the network rows of every round; None: the pipeline's own networks.  ``Devices`` of this
            machine get a copy each of the networks that read a timestep, made anew in every call of the pipeline.
            ``Ranks``: every process calls the pipeline with the same arguments, generators included, and gets the same
            output; each evaluates its share of the rows with its own pipeline.  ``max_batch`` holds for each of them.

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
        tol, max_batch, nodes, window, linearization, max_rounds, data_mean, data_variance, raise_on_failure,
        workers,
    )
    return ParallelPipeline(pipe, options)
