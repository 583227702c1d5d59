"""A diffusers scheduler as data: the coefficients of its steps, read off its own ``step``.

Every sampler whose step is affine in the sample, the model outputs so far and its noise makes, of readings ``x_j``,

    x_{j+1} = sum_{i<=j} A_ji x_i + B_ji m_i + C_ji xi_i

Feed it unit vectors, one coordinate for every ``x_i``, ``m_i`` and ``xi_i``, and one pass of its own loop writes the
rows of ``A``, ``B`` and ``C``.  No formula of any scheduler is repeated here.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

#: Schedulers that the tests run, for messages.
WORKS = (
    "DDPM, DDIM, PNDM, LMSDiscrete, EulerDiscrete, EulerAncestralDiscrete, HeunDiscrete, KDPM2Discrete, "
    "KDPM2AncestralDiscrete, DPMSolverMultistep (ODE and SDE), DPMSolverSinglestep, DEISMultistep, UniPCMultistep, "
    "SASolver, LCM, TCD, SCM, UnCLIP, EDMEuler, EDMDPMSolverMultistep, FlowMatchEulerDiscrete, FlowMatchHeunDiscrete"
)

#: Decorators that only switch gradients.
GRADIENTS = (torch.no_grad, torch.inference_mode, torch.set_grad_enabled)

#: Random experiments beside the unit vectors that show whether a step is affine, and the relative error that rounding
#: may leave: some schedulers compute in single precision.
EXPERIMENTS, ROUNDING = 4, 1e-4


class UnsupportedError(ValueError):
    """The pipeline or its scheduler does something that cannot be run in parallel; the message says what."""


class RowsError(UnsupportedError):
    """The code between the calls does not do for rows of several steps; measuring what it computes may do instead."""


@dataclass(frozen=True)
class Probe:
    """What a scheduler does in ``J`` calls of ``step``, float64 on the CPU.

    Attributes:
        states: ``A``, shape ``(J, J)``, lower triangular.
        outputs: ``B``, likewise.
        noises: ``C``, likewise.
        scales: factor on the state before the network reads it, shape ``(J,)``.
    """

    states: Tensor
    outputs: Tensor
    noises: Tensor
    scales: Tensor

    @property
    def one_step(self) -> bool:
        """Whether every step sees only its own state, output and noise."""
        return not any(matrix.tril(-1).any() for matrix in (self.states, self.outputs, self.noises))


def undecorated(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function without PyTorch's decorators for gradients, which change no numbers.

    Raises:
        UnsupportedError: if there are others.
    """
    while (inner := getattr(function, "__wrapped__", None)) is not None:
        cells = inspect.getclosurevars(function).nonlocals if isinstance(function, FunctionType) else {}
        if not isinstance(getattr(cells.get("ctx_factory"), "__self__", None), GRADIENTS):
            layer = getattr(getattr(function, "__code__", None), "co_name", type(function).__name__)
            raise UnsupportedError(
                f"{inner.__qualname__} has a decorator ({layer}) that is not torch.no_grad or torch.inference_mode: "
                "what it does cannot be kept; use the function without it, or do the same around the parallel call"
            )
        function = inner
    return function


def rebound(function: Callable[..., Any], **names: object) -> Callable[..., Any]:
    """A copy of a function that sees other globals: what others call at the same time stays as it is."""
    plain = undecorated(function)
    if not isinstance(plain, FunctionType):
        raise UnsupportedError(f"{function!r} is not a plain Python function")
    twin = FunctionType(
        plain.__code__, {**plain.__globals__, **names}, plain.__name__, plain.__defaults__, plain.__closure__
    )
    twin.__kwdefaults__ = plain.__kwdefaults__
    return twin


#: What takes the place of ``randn_tensor``, given what it was there.
Draw = Callable[[Any], Callable[..., Tensor]]


def stepper(scheduler: Any, draw: Draw) -> Callable[..., Any]:  # noqa: ANN401 - any scheduler
    """A scheduler's own ``step``, which draws its noise otherwise, also where it hands over to that of a parent."""
    kind, owners = type(scheduler), owners_of_step(scheduler)
    if len(owners) == 1:
        return partial(_redrawn(owners[0], draw, {}), scheduler)
    # Classes of the same order with other steps: in that order each comes before the one that it stands for.
    other: tuple[type, ...] = ()
    twins: dict[object, type] = {}
    for owner in reversed(owners if kind in owners else [kind, *owners]):
        own = {"step": _redrawn(owner, draw, twins)} if owner in owners else {}
        other = (type(owner.__name__, (owner, *other), own),)
        twins[owner] = other[0]

    def step(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - the scheduler's own
        scheduler.__class__ = other[0]
        try:
            return scheduler.__class__.step(scheduler, *args, **kwargs)
        finally:
            scheduler.__class__ = kind

    return step


def owners_of_step(scheduler: object) -> list[type]:
    """The classes of a scheduler that have a step of their own, in the order in which Python looks for one."""
    return [owner for owner in type(scheduler).__mro__ if "step" in vars(owner)]


def _redrawn(owner: type, draw: Draw, twins: Mapping[object, type]) -> Callable[..., Any]:
    """The step of a class, with another source of noise, and with ``twins`` of the classes that it calls by name."""
    step = undecorated(vars(owner)["step"])
    known = getattr(step, "__globals__", {})
    called = {name: twins[kind] for name, kind in known.items() if isinstance(kind, type) and kind in twins}
    return rebound(step, randn_tensor=draw(known.get("randn_tensor")), **called)


def on_host(scheduler: Any) -> Any:  # noqa: ANN401 - any scheduler
    """A copy whose tables are on the CPU, wherever the pipeline has put them."""
    twin = copy.deepcopy(scheduler)
    for name, value in vars(twin).items():
        if isinstance(value, Tensor):
            setattr(twin, name, value.cpu())
    return twin


def unclipped(scheduler: Any) -> Any:  # noqa: ANN401 - any scheduler
    """A copy on the CPU whose steps do not clip the denoised estimate."""
    twin = on_host(scheduler)
    flags = [flag for flag in ("clip_sample", "thresholding") if twin.config.get(flag)]
    twin.register_to_config(**dict.fromkeys(flags, False))
    return twin


def probe(scheduler: Any, times: Tensor, options: Sequence[Mapping[str, Any]]) -> Probe:  # noqa: ANN401 - any scheduler
    """Read the coefficients of the next ``J`` calls of ``step`` off a copy of the scheduler.

    Args:
        scheduler: a diffusers scheduler after ``set_timesteps``, before its first step; it is not changed.
        times: the timesteps that it will be called with, shape ``(J,)``.
        options: further arguments of each ``step``.

    Raises:
        UnsupportedError: if the step is not affine, or takes other arguments.
    """
    name, count = type(scheduler).__name__, len(times)
    if list(inspect.signature(scheduler.step).parameters)[:3] != ["model_output", "timestep", "sample"]:
        raise UnsupportedError(f"{name}.step does not take (model_output, timestep, sample); what works: {WORKS}")
    if str(scheduler.config.get("variance_type")).startswith("learned"):
        raise UnsupportedError(f"{name} takes its variance from the network, no affine step; what works: {WORKS}")
    twin, width = unclipped(scheduler), 3 * count + 1  # the last coordinate is never excited
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(3 * count, EXPERIMENTS, generator=generator, dtype=torch.float64, device="cpu")
    rows, scales = mixed.new_zeros(count, width), mixed.new_ones(count)
    drawn = 0

    def vector(number: int) -> Tensor:
        both = mixed.new_zeros(1, 1, 2, max(width, EXPERIMENTS))
        both[..., 0, number], both[..., 1, :EXPERIMENTS] = 1, mixed[number]
        return both

    def draw(*args: object, **kwargs: object) -> Tensor:
        nonlocal drawn
        drawn += 1
        return vector(2 * count + j)

    step = stepper(twin, lambda own: draw)
    for j, t in enumerate(_stamps(twin, times)):
        drawn = 0
        try:
            scales[j] = scale(twin, t)
            fresh = step(vector(count + j), t, vector(j), **{**options[j], "return_dict": False})[0].double()
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
            tables = [key for key, value in options[j].items() if isinstance(value, Tensor) and value.ndim]
            if tables:
                what = f"the pipeline gives {name}.step other {tables[0]} for other parts of the state"
                raise UnsupportedError(f"{what}, whose coefficients are then not one per step") from error
            raise UnsupportedError(f"{name}.step cannot be read ({error}); what works: {WORKS}") from error
        rows[j] = fresh[0, 0, 0, :width]
        known = rows[j, :-1, None] * mixed
        wrong = (fresh[0, 0, 1, :EXPERIMENTS] - known.sum(0)).abs() / (known.abs().sum(0) + 1e-12)
        if not rows[j].isfinite().all():
            raise UnsupportedError(f"{name} steps by numbers that are not finite at timestep {float(t):g}")
        if drawn > 1 or wrong.max() > ROUNDING or rows[j, -1].abs() > ROUNDING:
            parents = len(owners_of_step(twin)) > 1
            hint = "; a parent's step must be called by super() or by the class's own name" if parents else ""
            raise UnsupportedError(
                f"{name} is not affine in sample, model outputs and one noise per step{hint}; what works: {WORKS}"
            )
    states, outputs, noises = rows[:, :-1].reshape(count, 3, count).unbind(1)
    return Probe(states, outputs, noises, scales)


def _stamps(scheduler: Any, times: Tensor) -> Tensor:  # noqa: ANN401 - any scheduler
    """Times as ``step`` takes them: Wuerstchen's scheduler one per row, all others a number."""
    times = times.cpu()
    return times[:, None] if type(scheduler).__name__ == "DDPMWuerstchenScheduler" else times


def scale(scheduler: Any, t: Tensor) -> float:  # noqa: ANN401 - any scheduler
    """Factor of ``scale_model_input``."""
    if not hasattr(scheduler, "scale_model_input"):
        return 1.0
    none, one, two = scheduler.scale_model_input(torch.arange(3, dtype=torch.float64, device="cpu"), t).tolist()
    if none != 0 or abs(two - 2 * one) > ROUNDING * abs(two):
        raise ValueError("scale_model_input is not a factor")
    return float(one)
