"""Full precision: the process's switch is off inside, whoever else is, and as it was when the last one leaves."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from piadm.numerics import full_precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NEW = hasattr(torch.backends.cuda.matmul, "fp32_precision")
#: What multiplies on each device, and what in it allows shorter numbers.
BACKENDS = {CPU: torch.backends.mkldnn.matmul if NEW else torch.backends.cuda.matmul, CUDA: torch.backends.cuda.matmul}
SWITCH, OFF = ("fp32_precision", "ieee") if NEW else ("allow_tf32", False)
WAYS = ["medium", "high"] + (["allow_tf32"] if NEW else [])


@pytest.fixture(params=WAYS)
def allowed(request: pytest.FixtureRequest) -> Iterator[None]:
    """Shorter numbers allowed, globally or by the old name of the switch."""
    backends = list(BACKENDS.values())
    before = [getattr(backend, SWITCH) for backend in backends]
    if request.param == "allow_tf32":
        torch.backends.cuda.matmul.allow_tf32 = True
    else:
        torch.set_float32_matmul_precision(request.param)
    yield
    torch.set_float32_matmul_precision("highest")
    for backend, found in zip(backends, before, strict=True):
        setattr(backend, SWITCH, found)


@pytest.mark.usefixtures("allowed")
@pytest.mark.parametrize("device", BACKENDS, ids=str)
def test_the_last_one_to_leave_restores_the_switch(device: torch.device) -> None:
    backend = BACKENDS[device]
    on = getattr(backend, SWITCH)
    first, second = full_precision(device), full_precision(device)
    with first:
        assert getattr(backend, SWITCH) == OFF
        second.__enter__()
    assert getattr(backend, SWITCH) == OFF  # the second, as in another thread, is still at work
    second.__exit__(None, None, None)
    assert getattr(backend, SWITCH) == on


@pytest.mark.usefixtures("allowed")
def test_an_error_inside_restores_the_switch_and_autocast() -> None:
    on, ones = getattr(BACKENDS[CPU], SWITCH), torch.ones(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(KeyError), full_precision(CPU), full_precision(CPU):
            assert (ones @ ones).dtype == torch.float32
            raise KeyError
        assert getattr(BACKENDS[CPU], SWITCH) == on
        assert (ones @ ones).dtype == torch.bfloat16
