"""Noise: the generator's known answers, independence of how it is drawn, its law, and what it refuses."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

import piadm.noise
from piadm.noise import GivenNoise, SeededNoise, Stream, given_array, normals, philox4x32, seed_keys

# Two-sided tail of 1e-9 of the normal law: with fixed seeds a test passes or fails for ever, and among the
# few dozen statistics of this file a correct generator would exceed this for one seed in ten million.
Z_LIMIT = float(stats.norm.isf(5e-10))


def draw(seed: int = 0, sample: int = 0, stream: int = Stream.PATH, step: int = 0, count: int = 1 << 17) -> Tensor:
    return normals(seed_keys([(seed, sample)], 1), stream, [step], count, dtype=torch.float64).flatten()


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter: str, key: str, words: str) -> None:
    parsed = [[torch.tensor(int(word, 16)) for word in text.split()] for text in (counter, key)]
    assert [f"{int(word):08x}" for word in philox4x32(*parsed)] == words.split()


def test_normals_are_box_muller_of_the_philox_words_of_their_counter() -> None:
    """The layout of key and counter is a promise: samples must not change from one release to the next."""
    seed, sample, stream, step, element = (7 << 32) + 5, 3, 9, 11, 6
    counter = [torch.tensor(word) for word in (element // 4, step, sample, stream)]
    words = philox4x32(counter, [torch.tensor(5), torch.tensor(7)])
    u1, u2 = ((int(word) + 0.5) / 2**32 for word in words[2:])
    expected = math.sqrt(-2 * math.log(u1)) * math.cos(2 * math.pi * u2)
    value = normals(seed_keys([(seed, sample)], 1), stream, [step], element + 1, dtype=torch.float64)[0, 0, -1]
    assert float(value) == pytest.approx(expected, rel=1e-14)  # a few roundings of float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sample_alone_is_bit_equal_to_itself_in_a_batch(dtype: torch.dtype) -> None:
    batch = normals(seed_keys(5, 8), Stream.PATH, range(20), 37, dtype=dtype)
    alone = [normals(seed_keys([(5, b)], 1), Stream.PATH, range(20), 37, dtype=dtype) for b in range(8)]
    assert torch.equal(batch, torch.cat(alone, 1))
    assert torch.equal(batch[:, [6, 2]], normals(seed_keys([(5, 6), (5, 2)], 2), 0, range(20), 37, dtype=dtype))


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, 50), max_size=4), order=st.permutations(range(6)))
def test_any_chunking_and_any_order_of_the_steps_is_bit_equal(cuts: list[int], order: list[int]) -> None:
    source = SeededNoise(seed_keys(1, 3), 21, torch.float64)
    edges = [0, *sorted(cuts), 50]
    pieces = [source.path(first, last) for first, last in itertools.pairwise(edges)]
    assert torch.equal(torch.cat(pieces), source.path(0, 50))
    shuffled = normals(source.keys, Stream.PATH, torch.tensor(order), 21, dtype=torch.float64)
    assert torch.equal(shuffled, source.path(0, 6)[order])


@pytest.mark.parametrize("limit", [1, 7, 64])
def test_working_in_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    whole = normals(seed_keys(2, 3), 0, range(5), 42, dtype=torch.float64)
    monkeypatch.setattr(piadm.noise, "_COUNTERS_AT_ONCE", limit)
    assert torch.equal(whole, normals(seed_keys(2, 3), 0, range(5), 42, dtype=torch.float64))


def test_more_elements_extend_a_row() -> None:
    longest = normals(seed_keys(3, 2), 0, range(4), 803, dtype=torch.float64)
    for count in (1, 2, 3, 4, 5, 33, 401, 802):
        assert torch.equal(longest[..., :count], normals(seed_keys(3, 2), 0, range(4), count, dtype=torch.float64))


def test_float32_is_the_rounding_of_float64_and_no_steps_are_an_empty_tensor() -> None:
    keys = seed_keys(0, 2)
    assert torch.equal(normals(keys, 0, [3], 9), normals(keys, 0, [3], 9, dtype=torch.float64).float())
    assert normals(keys, 0, [], 9).shape == normals(keys, 0, range(0), 9).shape == (0, 2, 9)


def test_seed_forms_agree() -> None:
    assert torch.equal(seed_keys(4, 3), seed_keys([(4, 0), (4, 1), (4, 2)], 3))
    assert torch.equal(seed_keys([8, 9], 2), seed_keys([(8, 0), (9, 0)], 2))
    assert torch.equal(seed_keys(np.array([8, 9]), 2), seed_keys(torch.tensor([8, 9]), 2))  # type: ignore[arg-type]
    assert torch.equal(seed_keys(np.int64(4), 3), seed_keys(4, 3))  # type: ignore[arg-type]


def test_every_bit_of_the_seed_counts() -> None:
    seeds = [0, *(1 << bit for bit in range(64)), 2**64 - 1]
    first = normals(seed_keys(seeds, len(seeds)), 0, [0], 4, dtype=torch.float64)[0]
    assert len(torch.unique(first, dim=0)) == len(seeds)


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"seed": 1 << 32},
        {"seed": 2**64 - 1},
        {"sample": 1},
        {"step": 1},
        {"stream": Stream.INITIAL},
        {"stream": Stream.CORRECTOR},
    ],
)
def test_other_seeds_samples_steps_and_streams_are_uncorrelated(other: dict[str, int]) -> None:
    x, y = draw(), draw(**other)
    for a, b in ((x, y), (x[1:], y[:-1]), (x.square() - 1, (y.square() - 1) / 2)):
        # Under independence each product has mean 0 and variance 1.
        assert abs(float((a * b).sum())) / math.sqrt(len(a)) < Z_LIMIT


def test_neighbouring_elements_are_uncorrelated() -> None:
    x = draw()
    for lag in range(1, 9):  # covers the pairs that share a Box-Muller radius and the four of one counter
        for y in (x, x.square().sub(1).div(math.sqrt(2))):
            assert abs(float((y[lag:] * y[:-lag]).sum())) / math.sqrt(len(y) - lag) < Z_LIMIT


@pytest.mark.parametrize("seed", [0, 2**63, 2**64 - 1])
def test_normals_have_the_normal_law(seed: int) -> None:
    z = draw(seed, count=1 << 18)
    n = len(z)
    variances = {1: 1.0, 2: 2.0, 3: 15.0, 4: 96.0}  # of z, z^2, z^3 and z^4
    for power, variance in variances.items():
        expected = {2: 1.0, 4: 3.0}.get(power, 0.0)
        assert abs(float(z.pow(power).mean()) - expected) * math.sqrt(n / variance) < Z_LIMIT
    assert stats.kstest(z.numpy(), "norm").pvalue > 1e-9


def test_the_law_holds_across_steps_and_samples_too() -> None:
    """Rows of two elements, so that counters differ almost only in step and sample."""
    z = normals(seed_keys(0, 64), Stream.PATH, range(1000), 2, dtype=torch.float64)
    assert stats.kstest(z.flatten().numpy(), "norm").pvalue > 1e-9
    for along in (z[1:] * z[:-1], z[:, 1:] * z[:, :-1]):
        assert abs(float(along.sum())) / math.sqrt(along.numel()) < Z_LIMIT


def test_streams_of_a_source_and_corrector_blocks_never_share_normals() -> None:
    source = SeededNoise(seed_keys(0, 1), 4, torch.float64)
    drawn = [source.path(0, 50), source.initial()[None], *(source.corrector(n, 0, 50) for n in range(5))]
    values = torch.cat([piece.flatten() for piece in drawn])
    assert len(torch.unique(values)) == values.numel()
    assert torch.equal(source.corrector(3, 10, 20), source.corrector(3, 0, 50)[10:20])


@pytest.mark.parametrize("convert", [Tensor.clone, Tensor.numpy, Tensor.half])
def test_given_noise_serves_the_callers_path_and_the_fallbacks_rest(
    convert: Callable[[Tensor], Tensor],
) -> None:
    fallback = SeededNoise(seed_keys(0, 2), 6, torch.float32)
    values = torch.arange(120, dtype=torch.float64).reshape(10, 2, 3, 2)  # exact in half precision too
    source = GivenNoise(convert(values), fallback, values.shape)
    assert torch.equal(source.path(3, 7), values[3:7].flatten(2).float()) and source.path(3, 7).dtype == torch.float32
    assert torch.equal(source.initial(), fallback.initial())
    assert torch.equal(source.corrector(1, 0, 3), fallback.corrector(1, 0, 3))


KEYS = seed_keys(0, 1)
FALLBACK = SeededNoise(KEYS, 2)
BAD: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: seed_keys(-1, 1), ValueError, "seed must be an integer >= 0, got -1"),
    (
        lambda: seed_keys(1 << 64, 1),
        ValueError,
        "seed must be an integer in [0, 2^64), got 18446744073709551616",
    ),
    (lambda: seed_keys(True, 1), TypeError, "seed must be an integer >= 0, got True"),
    (lambda: seed_keys([True], 1), TypeError, "seed must be an integer >= 0, got True"),
    (lambda: seed_keys(0.5, 1), TypeError, "seed must be an int or a sequence"),  # type: ignore[arg-type]
    (lambda: seed_keys("7", 1), TypeError, "seed must be an int or a sequence"),  # type: ignore[arg-type]
    (lambda: seed_keys([0.5], 1), TypeError, "got 0.5"),  # type: ignore[list-item]
    (lambda: seed_keys([0, 1, 2], 2), ValueError, "one entry per sample: got 3 for 2 samples"),
    (lambda: seed_keys([(0, 1, 2)], 1), ValueError, "a pair (seed, sample), got (0, 1, 2)"),  # type: ignore[list-item]
    (lambda: seed_keys([(0, -1)], 1), ValueError, "sample number in seed must be an integer >= 0, got -1"),
    (
        lambda: seed_keys([(0, 1 << 32)], 1),
        ValueError,
        "sample number in seed must be an integer in [0, 2^32)",
    ),
    (lambda: seed_keys(0, 0), ValueError, "batch must be an integer >= 1, got 0"),
    (lambda: normals(KEYS.int(), 0, [0], 4), TypeError, "keys must be an int64 tensor of shape (B, 2)"),
    (lambda: normals(KEYS[0], 0, [0], 4), TypeError, "keys must be an int64 tensor of shape (B, 2)"),
    (lambda: normals(KEYS, -1, [0], 4), ValueError, "stream must be an integer >= 0, got -1"),
    (lambda: normals(KEYS, 0, [-1, 5], 4), ValueError, "steps must lie in [0, 2^32), got -1 to 5"),
    (lambda: normals(KEYS, 0, [1 << 32], 4), ValueError, "steps must lie in [0, 2^32)"),
    (lambda: normals(KEYS, 0, [0.5], 4), TypeError, "steps must be"),  # type: ignore[list-item]
    (lambda: normals(KEYS, 0, torch.zeros(2, 2).long(), 4), TypeError, "one-dimensional"),
    (lambda: normals(KEYS, 0, [0], 0), ValueError, "elements must be an integer >= 1, got 0"),
    (lambda: normals(KEYS, 0, [0], 4, dtype=torch.int64), TypeError, "dtype must be a floating-point"),
    (lambda: FALLBACK.corrector(-1, 0, 1), ValueError, "block must be an integer >= 0, got -1"),
    (
        lambda: GivenNoise(torch.zeros(3, 2), FALLBACK, (5, 1, 2)),
        ValueError,
        "noise must have shape (5, 1, 2), got (3, 2)",
    ),
    (
        lambda: GivenNoise(torch.full((3, 1, 2), torch.nan), FALLBACK, (3, 1, 2)),
        ValueError,
        "noise must be finite, got 6 entries",
    ),
    (
        lambda: GivenNoise(torch.zeros(3, 1, 2).int(), FALLBACK, (3, 1, 2)),
        TypeError,
        "noise must be a floating-point tensor or array, got torch.int32 (3, 1, 2)",
    ),
    (
        lambda: GivenNoise(torch.zeros(3, 1, 2), FALLBACK, (3, 1, 2)).path(1, 4),
        ValueError,
        "noise holds 3 steps, got a request for 1 to 4",
    ),
    (
        lambda: given_array("initial", "zeros", (1,)),
        TypeError,
        "initial must be a floating-point tensor or array",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[message[:40] for *_, message in BAD])
def test_bad_input_is_named(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()
