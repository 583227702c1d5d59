"""Noise as data: counter-based normals, one independent stream per (seed, sample, step)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import product
from numbers import Integral
from typing import final

import numpy as np
import torch
from torch import Tensor

from piadm._checks import described, positive_int, shown

Seed = int | Sequence[int | tuple[int, int]]

_NUMPY_FLOATS = (np.float16, np.float32, np.float64)
_WORD = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_BUMPS = (0x9E3779B9, 0xBB67AE85)
_COUNTERS_AT_ONCE = 1 << 16  # 512 KiB per int64 temporary: the ten rounds stay in the cache
_ON_ACCELERATORS = 1 << 20  # 8 MiB: there it is the launch of each of the hundred operations that takes time


class Stream(IntEnum):
    """What a stream of normals is used for; the corrector after block ``n`` draws from ``CORRECTOR + n``."""

    PATH = 0
    INITIAL = 1
    CORRECTOR = 2


def philox4x32(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Philox-4x32-10: a bijection of 128-bit counters, chosen by a 64-bit key, that passes for random.

    One of the ten rounds, with ``hi`` and ``lo`` the two words of a 64-bit product, is

        (c0, c1, c2, c3) <- (hi(M1 c2) ^ c1 ^ k0,  lo(M1 c2),  hi(M0 c0) ^ c3 ^ k1,  lo(M0 c0))

    and adds the Weyl constants to the key.

    Args:
        counter: Four int64 tensors with values in ``[0, 2^32)``, of shapes that broadcast together.
        key: Two such tensors.

    Returns:
        Four int64 tensors of the broadcast shape: the random words, each in ``[0, 2^32)``.

    Reference:
        Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), section 3.3.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # Products wrap modulo 2^64, which keeps both words exact. Only words about to be multiplied need a
        # clean upper half, so the low words (c1, c3) and the keys carry theirs up to the mask after the xor.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = ((p1 >> 32) ^ c1 ^ k0) & _WORD, ((p0 >> 32) ^ c3 ^ k1) & _WORD
        c1, c3 = p1, p0
        k0, k1 = k0 + _KEY_BUMPS[0], k1 + _KEY_BUMPS[1]
    return c0, c1 & _WORD, c2, c3 & _WORD


def normals(
    keys: Tensor,
    stream: int,
    steps: Sequence[int] | Tensor,
    elements: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    r"""Draw the standard normals that belong to the given samples and steps.

    Element ``e`` of a row is number ``e mod 4`` of the four normals made of the Philox words with key
    ``seed`` and counter ``(e div 4, step, sample, stream)``; with ``u = (word + 1/2) / 2^32``, in float64,

        z = sqrt(-2 ln u_1) (cos 2 pi u_2, sin 2 pi u_2).

    So it does not depend on the batch, on which steps are drawn together, or on ``elements`` (more of them
    extend a row). The words are the same on every device; the normals to the rounding of its log and sine.

    Args:
        keys: ``(B, 2)`` int64, a row ``(seed, sample)`` per sample, from :func:`seed_keys`.
        stream: Stream number in ``[0, 2^32)``, see :class:`Stream`.
        steps: Step numbers in ``[0, 2^32)``: ``S`` integers, in any order.
        elements: Number of normals per sample and step.
        dtype: Floating-point type of the result.
        device: Device on which the normals are computed.

    Returns:
        ``(S, B, elements)`` standard normals; none exceeds 6.77 in magnitude.

    Raises:
        TypeError: If an argument has the wrong type, or ``keys`` the wrong shape.
        ValueError: If a number is out of range.
    """
    if not isinstance(keys, Tensor) or keys.dtype != torch.int64 or keys.shape[1:] != (2,):
        raise TypeError(f"keys must be an int64 tensor of shape (B, 2), got {described(keys)}")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point torch.dtype, got {dtype!r}")
    elements = positive_int("elements", elements)
    step = _steps(steps).to(device)[:, None, None]
    seed, sample = keys.to(device)[:, :, None].unbind(1)
    block = torch.arange(-(-elements // 4), device=device)
    last = torch.full((1,), _word("stream", stream), device=device)

    out = torch.empty(len(step), len(seed), elements, dtype=dtype, device=device)
    room = _COUNTERS_AT_ONCE if out.device.type == "cpu" else _ON_ACCELERATORS
    for s, b, e in _chunks(room, len(step), len(seed), len(block)):
        key = (seed[b] & _WORD, (seed[b] >> 32) & _WORD)
        w0, w1, w2, w3 = philox4x32((block[e], step[s], sample[b], last), key)
        four = torch.stack((*_box_muller(w0, w1), *_box_muller(w2, w3)), dim=-1).flatten(-2)
        end = min(4 * e.stop, elements)
        out[s, b, 4 * e.start : end] = four[..., : end - 4 * e.start]
    return out


def seed_keys(seed: Seed, batch: int) -> Tensor:
    """Give every sample of a batch its key ``(seed, sample)``.

    One int ``s`` gives sample ``b`` the key ``(s, b)``. A sequence gives each sample its own: an int ``s``
    stands for ``(s, 0)``, a pair ``(s, i)`` for sample ``i`` of seed ``s``, drawn again alone:

    >>> bool((seed_keys([(0, 3)], batch=1) == seed_keys(0, batch=8)[3]).all())
    True

    Args:
        seed: An int in ``[0, 2^64)``, or ``batch`` ints or pairs; sample numbers lie in ``[0, 2^32)``.
        batch: Number of samples ``B``.

    Returns:
        ``(B, 2)`` int64 on the CPU; seeds of 2^63 and above are stored as their two's complement.

    Raises:
        TypeError: If ``seed`` holds anything but ints (a bool is refused).
        ValueError: If a number is out of range or the sequence has another length than ``batch``.
    """
    batch = positive_int("batch", batch)
    entries: object = seed.tolist() if isinstance(seed, (np.ndarray, Tensor)) else seed
    if isinstance(entries, Integral):
        last = torch.tensor(_pair((entries, batch - 1)), dtype=torch.int64, device="cpu")
        return torch.stack([last[0].expand(batch), torch.arange(batch, device="cpu")], dim=1)
    if not isinstance(entries, Sequence) or isinstance(entries, (str, bytes)):
        accepted = "an int or a sequence of ints or (seed, sample) pairs"
        raise TypeError(f"seed must be {accepted}, got {described(seed)}")
    if len(entries) != batch:
        raise ValueError(f"seed must have one entry per sample: got {len(entries)} for {batch} samples")
    return torch.tensor([_pair(entry) for entry in entries], dtype=torch.int64, device="cpu")


class NoiseSource(ABC):
    """The standard normals of one run: fixed before it starts, served in pieces of any size."""

    @abstractmethod
    def path(self, first: int, last: int, samples: Tensor | None = None) -> Tensor:
        """Noise of the steps ``first .. last - 1``, of all samples or some: ``(last - first, B, elements)``."""

    @abstractmethod
    def initial(self) -> Tensor:
        """Noise of the starting state, before any scaling: ``(B, elements)``."""

    @abstractmethod
    def corrector(self, block: int, first: int, last: int) -> Tensor:
        """Draws ``first .. last - 1`` of the corrector after ``block``: ``(last - first, B, elements)``."""


@final
@dataclass(frozen=True, eq=False)
class SeededNoise(NoiseSource):
    """Noise computed by :func:`normals`, with the arguments it takes, whenever it is asked for."""

    keys: Tensor
    elements: int
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"

    def path(self, first: int, last: int, samples: Tensor | None = None) -> Tensor:
        """Noise of the steps ``first .. last - 1``, of all samples or some: ``(last - first, B, elements)``."""
        return self._draw(Stream.PATH, first, last, samples)

    def initial(self) -> Tensor:
        """Noise of the starting state, before any scaling: ``(B, elements)``."""
        return self._draw(Stream.INITIAL, 0, 1)[0]

    def corrector(self, block: int, first: int, last: int) -> Tensor:
        """Draws ``first .. last - 1`` of the corrector after ``block``: ``(last - first, B, elements)``."""
        return self._draw(Stream.CORRECTOR + positive_int("block", block, 0), first, last)

    def _draw(self, stream: int, first: int, last: int, samples: Tensor | None = None) -> Tensor:
        keys, steps = self.keys if samples is None else self.keys[samples], range(first, last)
        return normals(keys, stream, steps, self.elements, dtype=self.dtype, device=self.device)


@final
class GivenNoise(NoiseSource):
    """Path noise supplied by the caller; everything else comes from a seeded source."""

    def __init__(self, noise: Tensor, fallback: SeededNoise, shape: Sequence[int]) -> None:
        """Check the caller's noise; it is cast and moved piece by piece, as it is served.

        Args:
            noise: ``(J, B, *sample_shape)`` standard normals, a tensor or array of any floating-point type.
            fallback: Source of everything else; it sets the dtype and device of all noise.
            shape: The shape ``(J, B, *sample_shape)`` that ``noise`` must have.

        Raises:
            TypeError: If ``noise`` is no floating-point tensor or array.
            ValueError: If it has another shape or an entry that is not finite.
        """
        self._noise = given_array("noise", noise, shape).reshape(*shape[:2], fallback.elements)
        self._fallback = fallback

    def path(self, first: int, last: int, samples: Tensor | None = None) -> Tensor:
        """Noise of the steps ``first .. last - 1``, of all samples or some: ``(last - first, B, elements)``."""
        if not 0 <= first <= last <= len(self._noise):
            raise ValueError(f"noise holds {len(self._noise)} steps, got a request for {first} to {last}")
        part = self._noise[first:last]
        part = part if samples is None else part[:, samples.to(part.device)]
        return part.to(device=self._fallback.device, dtype=self._fallback.dtype)

    def initial(self) -> Tensor:
        """Noise of the starting state, before any scaling: ``(B, elements)``."""
        return self._fallback.initial()

    def corrector(self, block: int, first: int, last: int) -> Tensor:
        """Draws ``first .. last - 1`` of the corrector after ``block``: ``(last - first, B, elements)``."""
        return self._fallback.corrector(block, first, last)


def given_array(name: str, value: object, shape: Sequence[int]) -> Tensor:
    """Check an array the caller supplied, such as ``noise`` or ``initial``, and return it as a tensor.

    Args:
        name: Argument name used in messages.
        value: A tensor or NumPy array of any floating-point type, which it keeps, on any device.
        shape: The shape it must have.

    Raises:
        TypeError: If ``value`` is no tensor or array, or not of a real floating-point type.
        ValueError: If it has another shape or an entry that is not finite.
    """
    usable = value
    if isinstance(value, np.ndarray):
        usable = torch.from_numpy(np.ascontiguousarray(value)) if value.dtype in _NUMPY_FLOATS else None
    array = usable if isinstance(usable, Tensor) and usable.layout == torch.strided and not usable.is_meta else None
    if array is None or not array.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor or array, got {described(value)}")
    if tuple(array.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(array.shape)}")
    if bad := array.numel() - int(array.isfinite().sum()):
        raise ValueError(f"{name} must be finite, got {bad} entries that are NaN or infinite")
    return array.detach()


def _chunks(room: int, *sizes: int) -> product[tuple[slice, ...]]:
    """Cut a box of counters into boxes of at most ``room``, the last axis whole if it fits."""
    axes = []
    for size in reversed(sizes):
        length = max(1, min(size, room))
        axes.append([slice(start, min(start + length, size)) for start in range(0, size, length)])
        room //= length
    return product(*reversed(axes))


def _box_muller(radius_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    """Turn two words into two independent normals, in float64."""
    u = radius_word.to(torch.float64).add_(0.5).mul_(2.0**-32)
    radius = u.log_().mul_(-2.0).sqrt_()
    angle = angle_word.to(torch.float64).add_(0.5).mul_(2.0**-32 * 2.0 * math.pi)
    return angle.cos().mul_(radius), angle.sin_().mul_(radius)


def _steps(steps: Sequence[int] | Tensor) -> Tensor:
    """Check step numbers and return them as an int64 vector."""
    numbers = torch.as_tensor(steps, device="cpu")
    integers = not (numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool)
    if numbers.ndim != 1 or not (integers or numbers.numel() == 0):
        raise TypeError(f"steps must be one-dimensional and hold integers, got {shown(numbers)}")
    if numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) <= _WORD:
        raise ValueError(f"steps must lie in [0, 2^32), got {int(numbers.min())} to {int(numbers.max())}")
    return numbers.to(torch.int64)


def _word(name: str, value: object, bits: int = 32) -> int:
    """Check an unsigned integer of the given width."""
    number = positive_int(name, value, 0)
    if number >> bits:
        raise ValueError(f"{name} must be an integer in [0, 2^{bits}), got {shown(number)}")
    return number


def _pair(entry: object) -> tuple[int, int]:
    """Read one entry of ``seed`` as (seed in two's complement, sample number)."""
    pair = entry if isinstance(entry, (tuple, list)) else (entry, 0)
    if len(pair) != 2:
        raise ValueError(f"seed entries must be an int or a pair (seed, sample), got {shown(entry)}")
    seed, sample = _word("seed", pair[0], 64), _word("sample number in seed", pair[1])
    return seed - (1 << 64) if seed >> 63 else seed, sample
