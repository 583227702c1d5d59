"""Full precision: the process's TF32 switch is off inside, whoever else is, and as it was when the last one leaves."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from piadm.numerics import full_precision

CPU = torch.device("cpu")
MATMUL = torch.backends.cuda.matmul
NEW = hasattr(MATMUL, "fp32_precision")
WAYS = {"allow_tf32": True} | ({"fp32_precision": "tf32"} if NEW else {})


@pytest.fixture(params=WAYS)
def switch(request: pytest.FixtureRequest) -> Iterator[str]:
    """TF32 on, by the old or the new name of the switch."""
    name = "fp32_precision" if NEW else "allow_tf32"
    before = getattr(MATMUL, name)
    setattr(MATMUL, request.param, WAYS[request.param])
    yield name
    setattr(MATMUL, name, before)


def test_the_last_one_to_leave_restores_the_switch(switch: str) -> None:
    on, off = getattr(MATMUL, switch), "ieee" if NEW else False
    first, second = full_precision(CPU), full_precision(CPU)
    with first:
        assert getattr(MATMUL, switch) == off
        second.__enter__()
    assert getattr(MATMUL, switch) == off  # the second, as in another thread, is still at work
    second.__exit__(None, None, None)
    assert getattr(MATMUL, switch) == on


def test_an_error_inside_restores_the_switch_and_autocast(switch: str) -> None:
    on, ones = getattr(MATMUL, switch), torch.ones(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(KeyError), full_precision(CPU), full_precision(CPU):
            assert (ones @ ones).dtype == torch.float32
            raise KeyError
        assert getattr(MATMUL, switch) == on
        assert (ones @ ones).dtype == torch.bfloat16
