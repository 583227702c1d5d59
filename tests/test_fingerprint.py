"""Fingerprints, by which ranks and restarted runs tell whether they were given the same."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import piadm
from piadm.models import LowRankMixtureNetwork
from piadm.workers.fingerprint import fingerprint

VP = piadm.VPSchedule()


def mixture(seed: int) -> LowRankMixtureNetwork:
    """A network of buffers alone."""
    draw = torch.Generator().manual_seed(seed)
    directions = torch.eye(4)[None, :, :1].repeat(2, 1, 1)
    means, ones = torch.randn(2, 4, generator=draw), torch.ones(2)
    return LowRankMixtureNetwork(VP, means, directions, 2 * torch.ones(2, 1), ones, ones)


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 4)


BARE = piadm.Denoiser(linear(), VP, "sample")
CLIPPED = replace(BARE, clip=functools.partial(torch.clamp, max=1.0))
GUIDED = piadm.GuidedNetwork(linear(), 2.0, {"label": torch.zeros(1, 3)})
DIFFERENT = {
    "weights": (BARE, replace(BARE, network=nn.Linear(4, 4))),
    "prediction": (BARE, replace(BARE, prediction="v")),
    "draft": (BARE, replace(BARE, draft=BARE)),
    "clip": (CLIPPED, replace(CLIPPED, clip=functools.partial(torch.clamp, max=2.0))),
    "buffers": (mixture(0), mixture(1)),
    "scale": (GUIDED, piadm.GuidedNetwork(GUIDED.network, 7.5, GUIDED.null)),
    "null": (GUIDED, piadm.GuidedNetwork(GUIDED.network, 2.0, {"label": torch.ones(1, 3)})),
    "partial": (functools.partial(linear(), bias=1.0), functools.partial(nn.Linear(4, 4), bias=1.0)),
    "keywords": (functools.partial(linear(), bias=1.0), functools.partial(linear(), bias=2.0)),
    "method": (linear().forward, nn.Linear(4, 4).forward),
    "seed": (torch.Generator(), torch.Generator().manual_seed(1)),
    "inside": (piadm.CompiledNetwork(GUIDED), piadm.CompiledNetwork(piadm.GuidedNetwork(linear(), 3.0, GUIDED.null))),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_what_differs_has_another_fingerprint(case: str) -> None:
    one, other = DIFFERENT[case]
    assert fingerprint(one) != fingerprint(other)
    assert fingerprint(one if isinstance(one, torch.Generator) else copy.deepcopy(one)) == fingerprint(one)


def test_a_generator_that_has_gone_on_has_another_fingerprint() -> None:
    one, other = torch.Generator(), torch.Generator()
    assert fingerprint(one) == fingerprint(other)
    torch.randn(1, generator=other)
    assert fingerprint(one) != fingerprint(other)


def test_weights_that_are_elsewhere_have_a_fingerprint() -> None:
    assert fingerprint(nn.Linear(4, 4, device="meta")) != fingerprint(nn.Linear(4, 5, device="meta"))


def test_the_order_of_conditions_does_not_matter() -> None:
    assert fingerprint({"a": 1, "b": {"c": 2, "d": 3}}) == fingerprint({"b": {"d": 3, "c": 2}, "a": 1})


#: What a sampler takes as a condition, and torch does not as it is.
CONDITIONS = {
    "reversed": lambda: np.arange(3)[::-1],
    "of the other byte order": lambda: np.arange(3, dtype=np.dtype(np.float32).newbyteorder()),
    "longer than double": lambda: np.arange(3, dtype=np.longdouble),
    "read-only": lambda: np.broadcast_to(np.arange(3.0), (3, 3)),
    "words": lambda: np.array(["a", "b", "c"]),
    "objects": lambda: np.array([1, "b", None], dtype=object),
    "conjugate": lambda: torch.arange(3).to(torch.complex64).conj(),
    "sparse": lambda: torch.eye(3).to_sparse(),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", CONDITIONS)
def test_every_condition_has_a_fingerprint(case: str) -> None:
    made = CONDITIONS[case]
    assert fingerprint(made()) == fingerprint(made())
    assert fingerprint(made()) != fingerprint(made()[:2] if case != "sparse" else 2 * made())
