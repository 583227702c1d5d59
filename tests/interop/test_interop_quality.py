"""Networks that know their data as a pipeline: rounds and true errors with the library's own choices."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers as df
import pytest
import torch
from tiny import SD, stable_diffusion
from torch import Tensor, nn

import piadm
from piadm.interop.diffusers import parallelize
from piadm.models import GaussianDenoiser, MixtureDenoiser
from piadm.precision import resolution
from piadm.settings import resolve

TABLE = dict(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")


class Closed(df.UNet2DModel):
    """A U-Net in name: the posterior mean of thirty modes."""

    def __init__(self) -> None:
        channels = dict(in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=8, layers_per_block=1)
        super().__init__(sample_size=28, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), **channels)
        modes = 0.5 * torch.randn(30, 1, 28, 28, generator=torch.Generator().manual_seed(5))
        self.denoiser = MixtureDenoiser(piadm.DiscreteSchedule.ddpm(), modes, 0.02)

    def forward(self, sample: Tensor, timestep: Tensor | int, return_dict: bool = True) -> Any:  # noqa: ANN401 - theirs
        times = torch.as_tensor(timestep).expand(len(sample))
        return df.models.unets.unet_2d.UNet2DOutput(sample=self.denoiser.network(sample, times))


@pytest.fixture(scope="module")
def trained() -> piadm.Denoiser:
    return piadm.load("fashion")


@pytest.fixture(scope="module")
def closed() -> piadm.Denoiser:
    """The mixture, with the settings that its pipeline is given."""
    network = Closed()
    return replace(network.denoiser, network=network)


def as_pipeline(denoiser: piadm.Denoiser, kind: type, **config: Any) -> Any:  # noqa: ANN401 - a scheduler's, a pipeline
    predicted = {"v": "v_prediction", "sample": "sample"}[denoiser.prediction]
    pipe = df.DDPMPipeline(denoiser.network, kind(**TABLE, prediction_type=predicted, **config))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe: Any, steps: int, num: int) -> Tensor:  # noqa: ANN401 - a pipeline
    """Pixels in [-1, 1], as the network knows them."""
    generator = torch.Generator().manual_seed(3)
    found = pipe(batch_size=num, generator=generator, num_inference_steps=steps, output_type="np").images
    return 2 * torch.from_numpy(found).permute(0, 3, 1, 2) - 1


@pytest.mark.parametrize(
    "name, kind, steps, num, most, bound",
    [
        # Rounds of ``piadm.sample`` on the same steps (9 to 11), one more where the shape of the output is learnt, and
        # a third of reserve for samples near a border.
        ("trained", df.DDIMScheduler, 50, 4, 15, 1e-2),
        ("trained", df.DPMSolverMultistepScheduler, 50, 4, 15, 1e-2),
        # An estimate is no bound: samples near a border between two outcomes were off by up to 7e-2 (of
        # ``piadm.sample`` as well), at 25 rounds; a wrong recurrence or other noise leaves an error of order one.
        ("trained", df.DDPMScheduler, 200, 1, 33, 1e-1),
        # The U-Net's thousand steps: benchmarks/diffusers_paradigms.py --long.
        ("closed", df.DDPMScheduler, 1000, 4, 33, 1e-1),
    ],
    ids=["DDIM-50", "DPM-Solver++-50", "DDPM-200", "DDPM-1000"],
)
def test_rounds_and_errors(
    name: str, kind: type, steps: int, num: int, most: int, bound: float, request: pytest.FixtureRequest
) -> None:
    denoiser = request.getfixturevalue(name)
    pipe = as_pipeline(denoiser, kind, **({} if kind is df.DPMSolverMultistepScheduler else {"clip_sample": False}))
    fast = parallelize(pipe, tol=1e-2, data_mean=denoiser.data_mean, data_variance=denoiser.data_variance)
    got, want = images(fast, steps, num), images(pipe, steps, num)
    assert fast.last_solution is not None and fast.last_solution.converged
    assert float((got - want).flatten(1).square().mean(1).sqrt().max()) <= bound
    assert fast.last_solution.stats.rounds <= most
    # Of 1000 steps few are evaluated: 156, or for a slow sample, which goes on with finer nodes, up to four times that.
    assert fast.last_solution.stats.nodes <= min(steps, 4 * 156)


@pytest.mark.parametrize("kind", ["clip_sample", "thresholding"])
def test_what_clipping_takes_off_the_state_is_followed_step_by_step(kind: str, closed: piadm.Denoiser) -> None:
    # DDIM as diffusers ships it takes the same excess off the state however short the step is.  As a part of the
    # network's answer, with slopes of -200 that come and go, it took 55 rounds and 3517 evaluations.
    pipe = as_pipeline(closed, df.DDIMScheduler, **{"clip_sample": False, kind: True})
    fast = parallelize(pipe, tol=1e-2, data_mean=closed.data_mean, data_variance=closed.data_variance)
    got, want = images(fast, 200, 1), images(pipe, 200, 1)
    assert fast.last_solution is not None and fast.last_solution.converged
    assert float((got - want).square().mean().sqrt()) <= 1e-2
    assert fast.last_solution.stats.rounds <= 20
    assert fast.last_solution.stats.evaluations <= 1500


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_every_step_evaluated_ends_where_a_clipping_pipeline_does(eta: float, closed: piadm.Denoiser) -> None:
    scheduler = df.DDIMScheduler(**TABLE, prediction_type="sample")
    pipe = df.DDIMPipeline(closed.network, scheduler)
    pipe.set_progress_bar_config(disable=True)
    ends = []
    for each in (pipe, parallelize(pipe, tol=1e-5, nodes="all")):
        generator = torch.Generator().manual_seed(3)
        found = each(batch_size=2, generator=generator, num_inference_steps=20, eta=eta, output_type="pt")
        ends.append(torch.as_tensor(found.images))
    assert float((ends[1] - ends[0]).square().mean().sqrt()) <= 1e-5


def test_a_pipeline_samples_as_the_library_does(trained: piadm.Denoiser) -> None:
    # One recurrence, read off diffusers' scheduler and computed by this library: the same rounds lead to the same end.
    pipe = as_pipeline(trained, df.DDIMScheduler, clip_sample=False)
    initial = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(3))
    data = dict(data_mean=trained.data_mean, data_variance=trained.data_variance)
    fast = parallelize(pipe, tol=1e-4, nodes="all", **data)
    got = images(fast, 25, 2)
    own = piadm.sample(trained, (2, 1, 28, 28), method="ode", steps=25, tol=1e-4, nodes="all", initial=initial)
    # The parity of the schedulers themselves is 2e-6 (tests/test_parity.py), tolerances add; the pipeline clamps.
    assert float((got - own.sample.clamp(-1, 1)).square().mean().sqrt()) <= 3e-4
    assert abs(fast.last_solution.stats.rounds - 1 - own.stats.rounds) <= 1  # it has learnt the output's shape


def test_every_step_is_evaluated_of_as_many_as_is_said() -> None:
    denoiser, page = GaussianDenoiser(piadm.VPSchedule()), Path(__file__).parents[2] / "docs" / "diffusers.md"

    def every_step(method: str, steps: int) -> bool:
        given = dict(grid=None, tol=1e-2, nodes=None, window=None, guess=None)
        return resolve(denoiser, method=method, steps=steps, **given).nodes.count == steps

    ode, sde = (max(steps for steps in range(50, 400) if every_step(method, steps)) for method in ("ode", "sde"))
    assert f"every step of up to {ode}, of a stochastic scheduler up to {sde};" in " ".join(parallelize.__doc__.split())
    assert f"every step is evaluated of up to {ode} ({sde} for stochastic" in page.read_text(encoding="utf-8")


def test_the_engine_knows_of_layers_that_multiply_in_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    monkeypatch.setattr("piadm.settings.resolution", lambda network: seen.append(resolution(network)) or seen[-1])
    monkeypatch.setattr("piadm.precision.tf32_layers", lambda device: (nn.Conv2d,))  # as on a GPU
    parallelize(stable_diffusion())(**SD, num_inference_steps=4, output_type="latent")
    assert seen[-1] == 2.0**-10
