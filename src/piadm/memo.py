"""A process-wide cache of pure functions of tensors, keyed by the content of their arguments."""

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

#: Most bytes of cached results, the least recently used leaving first: some twenty settings of a thousand steps.
MOST_BYTES = 1 << 27

_functions = itertools.count()
_store, _lock = OrderedDict[bytes, tuple[object, int]](), threading.Lock()

#: Results that are too large to be kept, for as long as somebody holds them: a run of thousands of steps asks several
#: times for one of hundreds of megabytes.
_held = weakref.WeakValueDictionary[bytes, object]()

#: The key of every live dataclass that a memoized function returned, by its ``id``: it stands for the content.
_origins: dict[int, tuple[weakref.ref[object], bytes]] = {}


def memoized(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Cache a function's results by the content of its arguments, whichever objects hold it.

    For functions of float64 tensors on the CPU and of frozen dataclasses of them, whose results nobody writes to.
    A dataclass that a memoized function has returned is hashed by the key that it was made from, so that large
    matrices are not read again.  Safe to call from threads; two that ask for the same result at once may both
    compute it.
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
            if (held := _held.get(key)) is not None:
                return cast(_T, held)
        result = function(*args, **kwargs)
        _remember(result, key)
        _keep(key, result)
        return result

    return found


def _keep(key: bytes, result: object) -> None:
    """Store a result, one too large by itself weakly, and drop the least recently used ones beyond ``MOST_BYTES``."""
    size = _size(result)
    with _lock:
        if size <= MOST_BYTES:
            _store[key] = result, size
        elif is_dataclass(result):
            _held[key] = result
        while sum(one for _, one in _store.values()) > MOST_BYTES:
            _store.popitem(last=False)


def _remember(result: object, key: bytes) -> None:
    """Note the key of a dataclass, or of each of several, unless it is an argument that was returned as it is."""
    for place, one in enumerate(result if isinstance(result, (tuple, list)) else [result]):
        if is_dataclass(one) and _origin(one) is None:
            weakref.finalize(one, _origins.pop, id(one), None).atexit = False
            _origins[id(one)] = weakref.ref(one), key + bytes([place])


def _origin(value: object) -> bytes | None:
    known = _origins.get(id(value))
    return known[1] if known is not None and known[0]() is value else None


def _parts(value: object) -> Iterator[bytes]:
    """The content of a value as bytes: type names, shapes and the numbers of tensors, in order."""
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
