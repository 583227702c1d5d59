"""Results of pure functions of tensors, kept from call to call and found again by what went in."""

from __future__ import annotations

import functools
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import ParamSpec, TypeVar

from torch import Tensor

_P = ParamSpec("_P")
_T = TypeVar("_T")

#: Bytes of results that a function keeps at most, those asked for last: some twenty settings of a thousand steps.
MOST_BYTES = 1 << 26


def kept(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Let a function keep its results, by the content of its arguments and not by who they are.

    For functions of float64 tensors on the CPU and of frozen dataclasses of them whose result nobody writes to.
    Threads may call it; two that ask for the same at once may both compute it.
    """
    store, lock = OrderedDict[bytes, tuple[_T, int]](), threading.Lock()

    @functools.wraps(function)
    def found(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        digest = hashlib.blake2b(digest_size=32)
        for part in _parts((args, sorted(kwargs.items()))):
            digest.update(part)
        key = digest.digest()
        with lock:
            if key in store:
                store.move_to_end(key)
                return store[key][0]
        result = function(*args, **kwargs)
        size = sum(len(part) for part in _parts(result))
        with lock:
            store[key] = result, size
            while sum(one for _, one in store.values()) > MOST_BYTES:
                store.popitem(last=False)
        return result

    return found


def _parts(value: object) -> Iterator[bytes]:
    """Everything that a value holds, in order: names, shapes and the bytes of tensors."""
    if isinstance(value, Tensor):
        yield f"{value.dtype}{tuple(value.shape)}".encode()
        yield value.detach().numpy().tobytes()
    elif is_dataclass(value):
        yield type(value).__qualname__.encode()
        for field in fields(value):
            yield from _parts(getattr(value, field.name))
    elif isinstance(value, (tuple, list)):
        yield f"{len(value)}".encode()
        for one in value:
            yield from _parts(one)
    else:
        yield repr(value).encode()
