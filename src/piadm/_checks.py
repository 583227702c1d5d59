"""Checks of arguments, shared by the whole package."""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Sequence
from numbers import Integral, Real
from typing import Any, TypeGuard, TypeVar

import numpy as np
import torch
from torch import Tensor

_T = TypeVar("_T")


_WIDEST = 80  # characters of a value in a message


def shown(value: object) -> str:
    """Return a value for a message: its ``repr`` on one line, cut in the middle if long; an array's type and shape."""
    if isinstance(value, (Tensor, np.ndarray)):
        return f"{value.dtype} {tuple(value.shape)}"
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # an int of thousands of digits has no repr
        text = "a very long number"
    return text if len(text) <= _WIDEST else f"{text[:50]} ... {text[-20:]}"


def listed(lines: Sequence[str], most: int = 3) -> str:
    """Return the first few of several messages as one, and how many more there are."""
    more = [f"and {len(lines) - most} more"] if len(lines) > most else []
    return "; ".join([*lines[:most], *more])


def described(value: object) -> str:
    """Return a value and its type for a message."""
    return f"{shown(value)} of type {type(value).__name__}"


def device_here(name: str, value: Any) -> torch.device:  # noqa: ANN401 - whatever the user gives
    """Return the device of this machine that ``value`` means, with its number: the current one of its kind if none.

    Raises:
        ValueError: If there is none, or torch cannot compute there.
    """
    try:
        one = torch.ones(1, device=torch.device(value))  # None alone would be torch's default
        one.add(1).item()  # there may be memory where nothing can be computed
    except (RuntimeError, AssertionError, ImportError, TypeError) as error:  # each kind of device has its own
        reason = str(error).partition("\n")[0][:100]
        refused = f"{name} must be a device of this machine, got {str(value)!r}"
        raise ValueError(f"{refused}: torch cannot use it here ({reason})") from error
    return one.device


def finite_float(
    name: str,
    value: object,
    *,
    low: float | None = None,
    high: float | None = None,
    low_open: bool = True,
    high_open: bool = True,
) -> float:
    """Return ``value`` as a finite float inside the given bounds.

    Args:
        name: Argument name used in messages.
        value: A real number (Python or NumPy; not a bool).
        low: Lower bound, or None for no bound.
        high: Upper bound, or None for no bound.
        low_open: Whether ``low`` itself is refused.
        high_open: Whether ``high`` itself is refused.

    Returns:
        The value as a Python float.

    Raises:
        TypeError: If ``value`` is not a real number.
        ValueError: If it is not finite or lies outside the bounds.
    """
    bounds = []
    if low is not None:
        bounds.append(f"{'>' if low_open else '>='} {low:g}")
    if high is not None:
        bounds.append(f"{'<' if high_open else '<='} {high:g}")
    accepted = " ".join(["a finite number", " and ".join(bounds)]).rstrip()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {accepted}, got {described(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf  # an int beyond float64
    above = low is None or number > low or (number == low and not low_open)
    below = high is None or number < high or (number == high and not high_open)
    if not (math.isfinite(number) and above and below):
        raise ValueError(f"{name} must be {accepted}, got {shown(value)}")
    return number


def float_field(owner: object, name: str, **bounds: Any) -> None:  # noqa: ANN401 - those of ``finite_float``
    """Check a field of a frozen dataclass as ``finite_float`` does and keep it as a Python float."""
    object.__setattr__(owner, name, finite_float(name, getattr(owner, name), **bounds))


def positive_int(name: str, value: object, minimum: int = 1, maximum: int | None = None) -> int:
    """Return ``value`` as an int that is at least ``minimum``.

    Args:
        name: Argument name used in messages.
        value: An integer (Python or NumPy; not a bool).
        minimum: Smallest accepted value.
        maximum: Largest accepted value, or None for no bound.

    Returns:
        The value as a Python int.

    Raises:
        TypeError: If ``value`` is not an integer.
        ValueError: If it is out of bounds.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer >= {minimum}, got {described(value)}")
    number = int(value)
    if maximum is not None and number > maximum:
        raise ValueError(f"{name} must be an integer from {minimum} to {maximum}, got {shown(value)}")
    if number < minimum:
        raise ValueError(f"{name} must be an integer >= {minimum}, got {shown(value)}")
    return number


def optional_int(name: str, value: object, minimum: int = 1, maximum: int | None = None) -> int | None:
    """Return None, or ``value`` as ``positive_int`` does, which says what is raised."""
    return None if value is None else positive_int(name, value, minimum, maximum)


def switch(name: str, value: object) -> bool:
    """Return ``value`` if it is a bool (Python or NumPy).

    Raises:
        TypeError: If it is none.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {described(value)}")
    return bool(value)


def choice(name: str, value: _T, accepted: Collection[_T]) -> _T:
    """Return ``value`` if it is one of ``accepted``.

    Args:
        name: Argument name used in messages.
        value: The value to check.
        accepted: The values allowed; a value of a type found among none of them is a TypeError.

    Returns:
        The value itself.

    Raises:
        TypeError: If ``value`` has none of the types of the accepted values.
        ValueError: If it has such a type but is not among them.
    """
    names = ", ".join(map(repr, accepted))
    if not isinstance(value, tuple({type(item) for item in accepted})):
        raise TypeError(f"{name} must be one of {names}, got {described(value)}")
    if value not in accepted:
        raise ValueError(f"{name} must be one of {names}, got {shown(value)}")
    return value


def real_vector(name: str, value: object, minimum: int = 2) -> Tensor:
    """Return ``value`` as a new finite vector, float64 on the CPU.

    Args:
        name: Argument name used in messages.
        value: A one-dimensional list, tuple, NumPy array or tensor of real numbers.
        minimum: Smallest accepted number of entries.

    Returns:
        A copy, shape (n,) with n >= ``minimum``.

    Raises:
        TypeError: If ``value`` does not hold real numbers.
        ValueError: If it is not one-dimensional, too short or not finite.
    """
    accepted = f"a one-dimensional sequence of at least {minimum} finite real numbers"
    if isinstance(value, Tensor):
        real = not value.is_complex() and value.dtype != torch.bool
    else:
        try:
            array = np.asarray(value)
        except ValueError as error:
            raise ValueError(f"{name} must be {accepted}, got {shown(value)}") from error
        real = array.dtype.kind in "iuf"
    if not real:
        raise TypeError(f"{name} must be {accepted}, got {described(value)}")
    if isinstance(value, Tensor):
        vector = value.detach().to("cpu", torch.float64, copy=True)
    else:
        vector = torch.from_numpy(array.astype(np.float64))
    if vector.dim() != 1 or len(vector) < minimum:
        raise ValueError(f"{name} must be {accepted}, got shape {tuple(vector.shape)}")
    if not bool(vector.isfinite().all()):
        index = int((~vector.isfinite()).nonzero()[0])
        raise ValueError(f"{name} must be {accepted}, got {name}[{index}] = {vector[index].item()}")
    return vector


def decreasing_vector(name: str, value: object) -> Tensor:
    """Return ``value`` as a new strictly decreasing vector, float64 on the CPU.

    Args:
        name: Argument name used in messages.
        value: A one-dimensional list, tuple, NumPy array or tensor of at least two real numbers.

    Returns:
        A copy, shape (n,).

    Raises:
        TypeError: If ``value`` does not hold real numbers.
        ValueError: If it is not a finite vector of at least two entries, each less than the one before.
    """
    if _decreases(value):
        return value.detach().clone()
    vector = real_vector(name, value)
    rising = (vector.diff() >= 0.0).nonzero()
    if len(rising):
        i = int(rising[0])
        raise ValueError(
            f"{name} must be strictly decreasing, noise first"
            f", got {vector[i + 1].item()} at index {i + 1} after {vector[i].item()}"
        )
    return vector


def _decreases(value: object) -> TypeGuard[Tensor]:
    """Whether a value is already such a vector: if the ends are finite, all between them are.  False: perhaps not."""
    if not isinstance(value, Tensor) or value.dtype != torch.float64 or value.dim() != 1 or len(value) < 2:
        return False
    if value.device.type != "cpu" or not bool((value[1:] < value[:-1]).all()):
        return False
    return math.isfinite(value[0]) and math.isfinite(value[-1])


def instance(name: str, value: _T, kind: type) -> _T:
    """Return ``value`` if it is an instance of ``kind``.

    Args:
        name: Argument name used in messages.
        value: The value to check.
        kind: The class accepted, abstract or not.

    Returns:
        The value itself.

    Raises:
        TypeError: If it is not an instance.
    """
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be a {kind.__name__}, got {described(value)}")
    return value


def caller_level() -> int:
    """The ``stacklevel`` of the line outside this package, and torch's decorators, that called it."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("piadm", "torch"):
        level, frame = level + 1, frame.f_back
    return level
