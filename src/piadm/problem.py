"""The sampling problem: the checked arguments that all samplers share, as one object."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from piadm._checks import caller_level, described, optional_int, positive_int, shown
from piadm.conditions import as_tensor, with_rows
from piadm.denoiser import Denoiser
from piadm.executor import Executor, Team
from piadm.grid import TimeGrid
from piadm.memory import refuse_excess
from piadm.network import module, network_device, network_dtype
from piadm.noise import GivenNoise, NoiseSource, Seed, SeededNoise, given_array, seed_keys
from piadm.schedule import NoiseSchedule
from piadm.solution import RoundInfo

Callback = Callable[[RoundInfo], Any]

#: How much log-SNR may fall from one step to the next before it is an error: rounding of float32 levels, with a margin.
ROUNDING = 1e-4

#: Factor between the size of a drawn first state and that of noised data from which a warning is due: the ODE's samples
#: of Gaussian data are wrong in size by the same factor.
OFF = 2.0


@dataclass(frozen=True)
class Problem:
    """The arguments of one call of a sampler, checked: whoever has a ``Problem`` need not check its input.

    Attributes:
        denoiser: the denoiser.
        shape: ``(B, *sample_shape)``.
        grid: all times, noise first.
        start: state at the first time, shape ``(B, d)``, in the state's dtype and on its device.
        noise: the standard normals.
        executor: evaluates and counts network rows.
    """

    denoiser: Denoiser
    shape: tuple[int, ...]
    grid: TimeGrid
    start: Tensor
    noise: NoiseSource
    executor: Executor

    @property
    def batch(self) -> int:
        """Number of samples ``B``."""
        return self.shape[0]


def make_problem(
    denoiser: Denoiser,
    shape: tuple[int, ...],
    grid: TimeGrid,
    *,
    seed: Seed,
    initial: Tensor | None,
    noise: Tensor | None,
    noise_count: int,
    condition: Mapping[str, Any] | None,
    max_batch: int | None,
    callback: Callback | None,
    workers: object = None,
    nodes: int = 1,
    kept: int = 0,
) -> Problem:
    """Check the arguments that all samplers share, and set up the initial state, the noise and the executor.

    The arguments are those of ``piadm.sample``; ``noise_count`` is the number of standard normals per coordinate,
    the leading size of ``noise``, and 0 if none may be given; ``workers`` is a running ``Team`` or None; ``nodes`` and
    ``kept`` are the numbers of states that will be held, as for ``refuse_excess``.

    Raises:
        TypeError, ValueError: naming the argument, what was received and what is accepted.
    """
    check_denoiser(denoiser)
    _warn_of_chance(denoiser.network)
    shape = check_shape(shape)
    _check_times(denoiser, grid)
    optional_int("max_batch", max_batch, minimum=denoiser.rows_per_call)
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be callable or None, got {type(callback).__name__}")
    given = None if initial is None else given_array("initial", initial, shape)
    if noise is not None and noise_count == 0:
        raise ValueError("noise must be None where no noise is drawn (no corrector), got an array")
    drawn = None if noise is None else given_array("noise", noise, (noise_count, *shape))
    device, dtype = _place(denoiser, given, drawn)
    refuse_excess(shape, device, dtype, nodes, kept)
    keys = seed_keys(seed, shape[0])
    condition = check_condition(condition, shape[0], device)
    elements = torch.Size(shape[1:]).numel()
    seeded = SeededNoise(keys, elements, dtype, device)
    source: NoiseSource = seeded
    if drawn is not None:
        source = GivenNoise(drawn, seeded, (noise_count, *shape))
    if given is not None:
        start = given.reshape(shape[0], -1).to(device, dtype)
    else:
        start = source.initial() * _prior_scale(denoiser, grid)
    team = workers if isinstance(workers, Team) else None
    return Problem(denoiser, shape, grid, start, source, Executor(denoiser, shape, condition, max_batch, team))


def check_denoiser(denoiser: object) -> Denoiser:
    """Return the denoiser.

    Raises:
        TypeError: if it is not a ``Denoiser``.
    """
    if not isinstance(denoiser, Denoiser):
        raise TypeError(
            f"denoiser must be a piadm.Denoiser, got {type(denoiser).__name__}; "
            "wrap a network as piadm.Denoiser(network, schedule, prediction)"
        )
    return denoiser


def check_grid(grid: object, schedule: NoiseSchedule) -> TimeGrid:
    """Return the grid.

    Raises:
        TypeError: if it is not a ``TimeGrid``.
        ValueError: if it leaves the schedule's range.
    """
    if not isinstance(grid, TimeGrid):
        raise TypeError(f"grid must be a piadm.TimeGrid or None, got {type(grid).__name__}")
    low, high = schedule.t_range
    first, last = grid.times[0].item(), grid.times[-1].item()
    if first > high or last < low:
        raise ValueError(
            f"grid must lie in [{low:g}, {high:g}], the range of the denoiser's schedule"
            f", got times {first:g} to {last:g}"
        )
    return grid


def grid_of(grid: object, schedule: NoiseSchedule, steps: int) -> TimeGrid:
    """Return the grid, or the default one if it is None, after checking the schedule's levels on it.

    Raises:
        TypeError, ValueError: if it is not a grid, leaves the schedule's range, or the schedule's levels are not
            finite, not of one per time, or of a log-SNR that does not rise towards the data.
    """
    times = TimeGrid.default(schedule, steps) if grid is None else check_grid(grid, schedule)
    alpha, sigma = schedule.levels(times.times)
    log_snr = schedule.log_snr(times.times)
    for name, level in (("alpha", alpha), ("sigma", sigma), ("log_snr", log_snr)):
        if level.shape != times.times.shape:
            raise ValueError(f"schedule must give one {name} for every time, got shape {tuple(level.shape)}")
        wrong = level.isnan() if name == "log_snr" else ~(level.isfinite() & (level >= 0))
        if bool(wrong.any()):
            accepted = "a number" if name == "log_snr" else "finite and >= 0"
            at = int(wrong.nonzero()[0])
            raise ValueError(
                f"schedule must give a {name} that is {accepted}, got {level[at].item()} at time {times.times[at]:g}"
            )
    # Some schedulers have the same level twice, up to rounding.
    if bool((falls := log_snr[1:] < log_snr[:-1] - ROUNDING).any()):
        at = int(falls.nonzero()[0])
        raise ValueError(
            f"schedule must have a log_snr that rises towards the data, got {log_snr[at].item():g} at time "
            f"{times.times[at]:g} and {log_snr[at + 1].item():g} at {times.times[at + 1]:g}"
        )
    return times


def check_shape(shape: object) -> tuple[int, ...]:
    """Return the shape ``(B, *sample_shape)`` as a tuple of ints.

    Raises:
        TypeError, ValueError: if it is not a tuple of at least two positive ints.
    """
    if not isinstance(shape, (tuple, list, torch.Size)):
        raise TypeError(f"shape must be a tuple (B, *sample_shape), got {described(shape)}")
    if len(shape) < 2:
        raise ValueError(f"shape must be (B, *sample_shape) with at least two entries, got {tuple(shape)}")
    return tuple(positive_int(f"shape[{i}]", size) for i, size in enumerate(shape))


def _warn_of_chance(network: object) -> None:
    """Warn of layers that draw random numbers or mix rows: then there is no well-defined sample to converge to."""
    inner = module(network)
    for name, layer in inner.named_modules() if isinstance(inner, nn.Module) else ():
        # Only these are asked: frozen modules, as of torch.jit.freeze, have no attribute ``training``.
        if (isinstance(layer, _BatchNorm) or (isinstance(layer, _DropoutNd) and layer.p > 0)) and layer.training:
            warnings.warn(
                f"the network's {name or type(layer).__name__} is in training mode, in which its output depends on "
                "chance or on other rows, so that errors mean nothing; call network.eval()",
                RuntimeWarning,
                stacklevel=caller_level(),
            )
            return


def _check_times(denoiser: Denoiser, grid: TimeGrid) -> None:
    """Every step's coefficients must be finite before the network is called once."""
    p, q = denoiser.coefficients(grid.times[:-1])
    bad = ~(p.isfinite() & q.isfinite())
    if bad.any():
        first, last = grid.times[0].item(), grid.times[-1].item()
        raise ValueError(
            f"grid must avoid times where prediction {denoiser.prediction!r} says nothing of the data (alpha = 0), "
            f"got time {grid.times[:-1][bad][0].item():g}; start a little later, such as grid=piadm.TimeGrid.uniform("
            f"schedule, steps, start={first + 1e-3 * (last - first):g})"
        )


def _prior_scale(denoiser: Denoiser, grid: TimeGrid) -> float:
    """Standard deviation of the starting noise, ``sqrt(alpha^2 + sigma^2)``: 1 for variance-preserving kinds.

    Warns if data of the denoiser's own mean and variance are of another size there, ``sqrt(alpha^2 (v + m^2) +
    sigma^2)``: then their signal is no small part of the first state.
    """
    alpha, sigma = (float(level) for level in denoiser.schedule.levels(grid.times[0]))
    drawn = math.hypot(alpha, sigma)
    told = math.hypot(alpha * math.sqrt(denoiser.data_variance), alpha * denoiser.data_mean, sigma)
    if not 1 / OFF <= told / drawn <= OFF:
        warnings.warn(
            f"the first state is drawn from N(0, {drawn:.3g}^2), but data of data_mean={denoiser.data_mean:g} and "
            f"data_variance={denoiser.data_variance:g} are of size {told:.3g} at time {float(grid.times[0]):g}; give "
            "initial, or start where there is more noise",
            RuntimeWarning,
            stacklevel=caller_level(),
        )
    return drawn


def _place(denoiser: Denoiser, initial: Tensor | None, noise: Tensor | None) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of the state: the network's device, the arrays' or the CPU; float32 or the widest type."""
    given = [array for array in (initial, noise) if array is not None]
    device = network_device(denoiser.network) or (given[0].device if given else torch.device("cpu"))
    if device.type == "mps":
        raise ValueError(f"denoiser must have its network where there are float64 numbers (CPU, CUDA), got {device}")
    dtype = network_dtype(denoiser.network, torch.float32)
    for array in given:
        dtype = torch.promote_types(dtype, array.dtype)
    return device, torch.promote_types(dtype, torch.float32)


def check_condition(condition: object, batch: int, device: torch.device) -> dict[str, Any]:
    """Conditions by name; tensors and arrays, nested too, have one row per sample and live, as tensors, with the state.

    Raises:
        TypeError, ValueError: if a name is not accepted, or a tensor does not have one row per sample.
    """
    if condition is None:
        return {}
    if not isinstance(condition, Mapping):
        raise TypeError(f"condition must be a mapping from names to values, got {type(condition).__name__}")
    for name in condition:
        if not isinstance(name, str) or name in ("x", "t"):
            raise ValueError(f"condition must have strings other than 'x' and 't' as names, got {shown(name)}")

    def placed(value: Tensor | NDArray[Any], name: str) -> Tensor:
        tensor = value if isinstance(value, Tensor) else as_tensor(value)
        if tensor.is_nested:
            raise TypeError(f"{name} must have rows of one shape, got a nested tensor; pad it, with a mask beside it")
        if tensor.is_meta:
            raise TypeError(f"{name} must hold numbers, got a tensor without any, on the device 'meta'")
        if tensor.ndim == 0 or len(tensor) != batch:
            shape = tuple(tensor.shape)
            raise ValueError(f"{name} must have one row per sample, ({batch}, ...), got shape {shape}")
        return tensor.to(device)

    return dict(with_rows(condition, placed))
