"""The shipped, trained network as a pipeline: rounds and true errors with the library's own choices."""

from __future__ import annotations

from typing import Any

import diffusers as df
import pytest
import torch
from torch import Tensor

import piadm
from piadm.interop.diffusers import parallelize

TABLE = dict(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", prediction_type="v_prediction")


@pytest.fixture(scope="module")
def denoiser() -> piadm.Denoiser:
    return piadm.load("fashion")


def shipped(denoiser: piadm.Denoiser, scheduler: Any) -> Any:  # noqa: ANN401 - a pipeline
    pipe = df.DDPMPipeline(denoiser.network, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe: Any, steps: int, num: int) -> Tensor:  # noqa: ANN401 - a pipeline
    """Pixels in [-1, 1], as the network knows them."""
    generator = torch.Generator().manual_seed(3)
    return 2 * pipe(batch_size=num, generator=generator, num_inference_steps=steps, output_type="pt").images - 1


@pytest.mark.parametrize(
    "scheduler, steps, num, most, bound",
    [
        # Rounds of ``piadm.sample`` on the same steps (9 to 11), one more where the shape of the output is learnt, and
        # a third of reserve for samples near a border.
        (df.DDIMScheduler(**TABLE, clip_sample=False), 50, 4, 15, 1e-2),
        (df.DPMSolverMultistepScheduler(**TABLE), 50, 4, 15, 1e-2),
        # An estimate is no bound: samples near a border between two outcomes were off by up to 7e-2 (of
        # ``piadm.sample`` as well), at 25 rounds; a wrong recurrence or other noise leaves an error of order one.
        (df.DDPMScheduler(**TABLE), 1000, 1, 33, 1e-1),
    ],
    ids=["DDIM-50", "DPM-Solver++-50", "DDPM-1000"],
)
def test_rounds_and_errors_of_a_trained_network(
    denoiser: piadm.Denoiser,
    scheduler: Any,  # noqa: ANN401
    steps: int,
    num: int,
    most: int,
    bound: float,
) -> None:
    pipe = shipped(denoiser, scheduler)
    fast = parallelize(pipe, tol=1e-2, data_mean=denoiser.data_mean, data_variance=denoiser.data_variance)
    got, want = images(fast, steps, num), images(pipe, steps, num)
    assert fast.last_solution is not None and fast.last_solution.converged
    assert float((got - want).flatten(1).square().mean(1).sqrt().max()) <= bound
    assert fast.last_solution.stats.rounds <= most
    # Of 1000 steps few are evaluated: 156, or for a slow sample, which goes on with finer nodes, up to four times that.
    assert fast.last_solution.stats.nodes <= min(steps, 4 * 156)


def test_a_pipeline_samples_as_the_library_does(denoiser: piadm.Denoiser) -> None:
    # One recurrence, read off diffusers' scheduler and computed by this library: the same rounds lead to the same end.
    pipe = shipped(denoiser, df.DDIMScheduler(**TABLE, clip_sample=False))
    initial = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(3))
    data = dict(data_mean=denoiser.data_mean, data_variance=denoiser.data_variance)
    fast = parallelize(pipe, tol=1e-4, nodes="all", **data)
    got = images(fast, 25, 2)
    own = piadm.sample(denoiser, (2, 1, 28, 28), method="ode", steps=25, tol=1e-4, nodes="all", initial=initial)
    # The parity of the schedulers themselves is 2e-6 (tests/test_parity.py), tolerances add; the pipeline clamps.
    assert float((got - own.sample.clamp(-1, 1)).square().mean().sqrt()) <= 3e-4
    assert abs(fast.last_solution.stats.rounds - 1 - own.stats.rounds) <= 1  # it has learnt the output's shape
