"""Results of pure functions of tensors, kept from call to call and found again by what went in."""

from __future__ import annotations

import functools
import hashlib
import itertools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import ParamSpec, TypeVar, cast

from torch import Tensor

_P = ParamSpec("_P")
_T = TypeVar("_T")

#: Bytes of results that are kept at most, those asked for last: some twenty settings of a thousand steps.
MOST_BYTES = 1 << 27

_functions = itertools.count()
_store, _lock = OrderedDict[bytes, tuple[object, int]](), threading.Lock()

#: What the dataclasses among the results were made from, by their ``id`` while they live: as good as their content.
_origins: dict[int, tuple[weakref.ref[object], bytes]] = {}


def kept(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Let a function keep its results, by the content of its arguments and not by who they are.

    For functions of float64 tensors on the CPU and of frozen dataclasses of them whose result nobody writes to.
    A dataclass that such a function has returned stands for what it was made from, so that large matrices are not read
    again.  Threads may call it; two that ask for the same at once may both compute it.
    """
    number = next(_functions)

    @functools.wraps(function)
    def found(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        digest = hashlib.blake2b(digest_size=32)
        for part in _parts((number, args, sorted(kwargs.items()))):
            digest.update(len(part).to_bytes(8, "little"))  # else 2, 11.5 would be 21, 1.5
            digest.update(part)
        key = digest.digest()
        with _lock:
            if key in _store:
                _store.move_to_end(key)
                return cast(_T, _store[key][0])
        result = function(*args, **kwargs)
        _remember(result, key)
        _keep(key, result)
        return result

    return found


def _keep(key: bytes, result: object) -> None:
    """Have a result at hand, and those that were not asked for the longest no more; unless it is too large itself."""
    size = _size(result)
    with _lock:
        if size <= MOST_BYTES:
            _store[key] = result, size
        while sum(one for _, one in _store.values()) > MOST_BYTES:
            _store.popitem(last=False)


def _remember(result: object, key: bytes) -> None:
    """Note what a dataclass, or each of several, was made from, unless it is one that was handed through."""
    for place, one in enumerate(result if isinstance(result, (tuple, list)) else [result]):
        if is_dataclass(one) and _origin(one) is None:
            weakref.finalize(one, _origins.pop, id(one), None)
            _origins[id(one)] = weakref.ref(one), key + bytes([place])


def _origin(value: object) -> bytes | None:
    known = _origins.get(id(value))
    return known[1] if known is not None and known[0]() is value else None


def _parts(value: object) -> Iterator[bytes]:
    """Everything that a value holds, in order: names, shapes and the bytes of tensors."""
    if isinstance(value, Tensor):
        yield f"{value.dtype}{tuple(value.shape)}".encode()
        yield value.detach().numpy().tobytes()
    elif is_dataclass(value):
        yield type(value).__qualname__.encode()
        if (origin := _origin(value)) is not None:
            yield origin
            return
        for field in fields(value):
            yield from _parts(getattr(value, field.name))
    elif isinstance(value, (tuple, list)):
        yield f"{len(value)}".encode()
        for one in value:
            yield from _parts(one)
    else:
        yield repr(value).encode()


def _size(value: object) -> int:
    """Bytes of the tensors that a value holds."""
    if isinstance(value, Tensor):
        return value.nbytes
    if is_dataclass(value):
        return sum(_size(getattr(value, field.name)) for field in fields(value))
    return sum(map(_size, value)) if isinstance(value, (tuple, list)) else 0
