"""Results kept from call to call: found again by what went in, never stale, never written to, never too many."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import piadm
from piadm import memo
from piadm.condense import condense, weights_on_end
from piadm.integrators import integrator
from piadm.models import GaussianDenoiser
from piadm.nodes import averaged, every_step, spread, thin

SCHEDULE = piadm.CosineSchedule()
STEPS = integrator("sde").steps(SCHEDULE, piadm.TimeGrid.default(SCHEDULE, 30))
SLOPES = torch.full((30,), 0.3, dtype=torch.float64)


def test_a_result_is_found_again_by_the_content_of_its_arguments() -> None:
    found = condense(STEPS, SLOPES, every_step(30))
    again = condense(replace(STEPS, a=STEPS.a.clone()), SLOPES.clone(), nodes=every_step(30))
    by_name = condense(replace(STEPS, a=STEPS.a.clone()), SLOPES.clone(), every_step(30))
    assert by_name is found
    assert torch.equal(again.noise, found.noise)  # named arguments are another key, with an equal result
    changed = SLOPES.clone()
    changed[17] += 1e-12
    other = condense(STEPS, changed, every_step(30))
    assert other is not found and not torch.equal(other.response, found.response)


def test_what_is_kept_is_what_would_be_computed() -> None:
    raw = weights_on_end.__wrapped__
    for _ in range(2):
        assert torch.equal(weights_on_end(STEPS, SLOPES), raw(STEPS, SLOPES))


def test_arguments_of_one_content_and_another_shape_differ() -> None:
    calls = []

    @memo.memoized
    def shape(x: Tensor, more: object = None) -> Tensor:
        calls.append(x)
        return torch.tensor(x.shape)

    flat = torch.arange(6.0)
    assert shape(flat).tolist() == [6] and shape(flat.view(2, 3)).tolist() == [2, 3]
    assert shape(flat.view(2, 3).T).tolist() == [3, 2]
    assert shape(flat.double()).tolist() == shape(flat, None).tolist() == [6]
    assert len(calls) == 5  # the last one has another number of arguments


def test_arguments_whose_digits_run_together_differ() -> None:
    log_snr = torch.linspace(-5, 5, 300, dtype=torch.float64)
    assert spread(log_snr, 21, 1, 1.5).count == 21
    assert spread(log_snr, 2, 1, 11.5).count == 2


def test_no_more_is_kept_than_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    @memo.memoized
    def ones(size: int) -> Tensor:
        calls.append(size)
        return torch.ones(size, dtype=torch.float64)

    monkeypatch.setattr(memo, "MOST_BYTES", 1000)
    for size in (50, 60, 50, 70, 50, 60):  # 400, 480 and 560 bytes: two fit, and the one asked for last stays
        assert len(ones(size)) == size
    assert calls == [50, 60, 70, 60]
    assert len(ones(200)) == len(ones(200)) == 200 and calls[-2:] == [200, 200]  # too large to be kept


def test_a_result_too_large_to_be_kept_is_found_while_somebody_holds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memo, "MOST_BYTES", 1000)
    steps = integrator("ode").steps(SCHEDULE, piadm.TimeGrid.default(SCHEDULE, 29))
    held, kept = condense(steps, SLOPES[:29], every_step(29)), len(memo._store)
    assert condense(steps, SLOPES[:29], every_step(29)) is held and len(memo._store) == kept
    gone = weakref.ref(held)
    del held
    assert gone() is None


def test_a_result_stands_for_what_it_was_made_from_and_a_changed_copy_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = torch.linspace(-5, 5, 30, dtype=torch.float64)
    nodes = averaged(spread(clock, 10), torch.ones(30, dtype=torch.float64))
    found = condense(STEPS, SLOPES, nodes)
    changed = condense(STEPS, SLOPES, replace(nodes, readings=nodes.reading_matrix() * 0.5))
    assert not torch.equal(changed.response, found.response)
    by_content = condense(STEPS, SLOPES, replace(nodes))
    assert by_content is not found and torch.equal(by_content.response, found.response)
    read: list[tuple[int, ...]] = []
    numpy = Tensor.numpy
    monkeypatch.setattr(Tensor, "numpy", lambda x: (read.append(tuple(x.shape)), numpy(x))[1])
    assert condense(STEPS, SLOPES, averaged(spread(clock, 10), torch.ones(30, dtype=torch.float64))) is found
    assert (30, 10) not in read and (10, 30) not in read  # no matrix, only what they were made from


def test_nothing_is_remembered_of_results_that_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memo, "MOST_BYTES", 0)
    clock = torch.linspace(-5, 5, 41, dtype=torch.float64)
    spread(clock, 20)  # what was kept before makes room
    gc.collect()
    before = len(memo._origins)
    several = thin(spread(clock, 20), clock)
    assert len(several) == 2 and len(memo._origins) == before + 2  # the set that they are of is gone already
    del several
    gc.collect()
    assert len(memo._origins) == before


def test_threads_find_the_same() -> None:
    slopes = [torch.full((30,), 0.01 * i, dtype=torch.float64) for i in range(8)] * 8
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda one: condense(STEPS, one, every_step(30)).response, slopes))
    for i in range(8):
        assert all(torch.equal(found[i], found[i + 8 * k]) for k in range(8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["sde", "ode"])
def test_a_call_is_not_touched_by_those_before_it(method: str, dtype: torch.dtype) -> None:
    """The second call finds what the first one kept, made in inference mode; nothing of it may have been written to."""
    denoiser = GaussianDenoiser(SCHEDULE, 0.5, torch.tensor([0.2, 1.5]))
    given = dict(method=method, steps=200, seed=3)
    with torch.inference_mode():
        first = piadm.sample(denoiser, (3, 2), **given).sample
    assert torch.equal(piadm.sample(denoiser, (3, 2), **given).sample, first)
    with torch.inference_mode():
        assert torch.equal(piadm.sample(denoiser, (3, 2), **given).sample, first)


def test_a_schedule_that_changes_is_not_confused_with_what_it_was() -> None:
    class Stretched(piadm.OUSchedule):
        factor = 1.0

        def _from(self, t: Tensor) -> Tensor:
            return t * self.factor

        def _alpha(self, t: Tensor) -> Tensor:
            return super()._alpha(self._from(t))

        def _sigma(self, t: Tensor) -> Tensor:
            return super()._sigma(self._from(t))

        def _log_snr(self, t: Tensor) -> Tensor:
            return super()._log_snr(self._from(t))

    schedule = Stretched()
    steps = [integrator("ode").steps(schedule, piadm.TimeGrid.uniform(schedule, 30))]
    found = [condense(steps[0], SLOPES, every_step(30))]
    Stretched.factor = 0.9
    steps.append(integrator("ode").steps(schedule, piadm.TimeGrid.uniform(schedule, 30)))
    found.append(condense(steps[1], SLOPES, every_step(30)))
    assert not torch.equal(found[0].start, found[1].start)
