"""The training scripts: the noise levels trained on, what is exported, and the distance that is reported."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import piadm
from piadm.models import load_folder

pytest.importorskip("diffusers")
SCRIPTS = Path(__file__).parents[1] / "training"
FINE_ATTENTION = ("down_blocks.1.attentions", "up_blocks.1.attentions")


@pytest.fixture(scope="module", autouse=True)
def scripts() -> Iterator[None]:
    sys.path.insert(0, str(SCRIPTS))
    yield
    sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def training() -> ModuleType:
    return importlib.import_module("train_fashion")


@pytest.fixture(scope="module")
def quality() -> ModuleType:
    return importlib.import_module("quality")


def test_training_and_sampling_share_one_schedule(training: ModuleType) -> None:
    log_snr = piadm.load("fashion").schedule.log_snr(torch.arange(1000.0))
    torch.testing.assert_close(2 * training.half_log_snr_table(), log_snr, rtol=1e-12, atol=1e-12)


def test_trained_noise_levels_belong_to_their_times(training: ModuleType) -> None:
    schedule = piadm.load("fashion").schedule
    times, lam = training.draw_times(512, training.half_log_snr_table(), torch.Generator().manual_seed(0))
    assert times.min() >= 0
    assert times.max() <= 999
    # Both are float32: a rounded time moves log-SNR by its slope, at most 1.4 per step near t = 0.
    torch.testing.assert_close(2 * lam.double(), schedule.log_snr(times), rtol=2e-7, atol=1e-4)


def test_new_attention_layers_start_as_the_identity(training: ModuleType) -> None:
    """Weights of a network without attention at 14 x 14 give that network's output, with idle attention added."""
    full = piadm.load("fashion").network.state_dict()
    weights = {n: w for n, w in full.items() if not n.startswith(FINE_ATTENTION)}
    assert len(weights) < len(full)
    down, up = list(training.NETWORK["down_block_types"]), list(training.NETWORK["up_block_types"])
    down[1], up[1] = "DownBlock2D", "UpBlock2D"
    plain = training.UNet2DModel(**training.NETWORK | {"down_block_types": down, "up_block_types": up})
    plain.load_state_dict(weights)
    grown = training.UNet2DModel(**training.NETWORK)
    training.load_start(grown, weights)
    x, t = torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(0)), torch.tensor([1.0, 300.0, 990.0])
    with torch.no_grad():
        torch.testing.assert_close(grown(x, t).sample, plain(x, t).sample, rtol=0, atol=1e-5)


def test_starting_weights_of_another_network_are_refused(training: ModuleType) -> None:
    weights = piadm.load("fashion").network.state_dict()
    del weights["conv_in.weight"]
    with pytest.raises(ValueError, match=r"--start .*conv_in\.weight"):
        training.load_start(training.UNet2DModel(**training.NETWORK), weights)


def test_autoguidance_leads_on_from_the_bad_network_through_the_good_one(training: ModuleType, tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 1, 28, 28)
    networks = {}
    for name in ("good", "bad"):
        network = training.UNet2DModel(**training.NETWORK)
        training.export(network.state_dict(), tmp_path / name, images, 0)
        networks[name] = load_folder(tmp_path / name).network
    x, t = torch.randn(2, 1, 28, 28), torch.tensor([300.0, 700.0])
    good, bad = (networks[name](x, t).sample for name in ("good", "bad"))
    guided = training.Autoguidance(tmp_path / "good", tmp_path / "bad", 0.5, compiled=False)(x, t)
    # bfloat16 keeps 8 bits, and the two predictions enter with weights 1.5 and -0.5.  RMS, for the largest error
    # scatters: 0.013 to 0.021 of the prediction in ten draws, while guidance changes it by 0.57 and more.
    size = float(good.square().mean().sqrt())
    assert float((guided - good - 0.5 * (good - bad)).square().mean().sqrt()) < 2**-5 * size
    assert float((guided - good).square().mean().sqrt()) > 2**-2 * size


def test_exported_weights_come_back_rounded_to_half(training: ModuleType, tmp_path: Path) -> None:
    network = piadm.load("fashion").network
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(w.shape, generator=generator) for name, w in network.state_dict().items()}
    images = torch.tensor([-1.0, 0.5]).repeat(8)
    training.export(weights, tmp_path, images, rows=64)
    denoiser = load_folder(tmp_path)
    for name, back in denoiser.network.state_dict().items():
        torch.testing.assert_close(back, weights[name].half().float(), rtol=0, atol=0)
    assert (denoiser.data_mean, denoiser.data_variance) == (-0.25, 0.5625)


def test_distance_of_commuting_gaussians(quality: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64))[0]
    # Each spectrum has a null direction, as dead features give.
    a, b = torch.tensor([[0.0, 1, 2, 3, 4], [2.0, 1, 1, 0, 5]], dtype=torch.float64)
    shift = torch.randn(5, generator=generator, dtype=torch.float64)
    first = quality.Moments(torch.zeros(5, dtype=torch.float64), basis * a @ basis.T)
    second = quality.Moments(shift, basis * b @ basis.T)
    expected = shift.square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    # A null direction enters as the root of a rounding error, about 1e-8 per direction.
    assert quality.frechet_distance(first, second) == pytest.approx(expected.item(), abs=1e-6)
    assert quality.frechet_distance(second, first) == pytest.approx(expected.item(), abs=1e-6)


def test_distance_of_gaussians_that_do_not_commute(quality: ModuleType) -> None:
    first, second = torch.tensor([[[2.0, 0.5], [0.5, 1.0]], [[1.0, -0.7], [-0.7, 3.0]]], dtype=torch.float64)
    product = first @ second
    # The eigenvalues l of a 2 x 2 product satisfy (sum sqrt l)^2 = trace + 2 sqrt(determinant).
    overlap = math.sqrt(product.trace() + 2 * math.sqrt(torch.linalg.det(product)))
    expected = (first + second).trace() - 2 * overlap
    zero = torch.zeros(2, dtype=torch.float64)
    distance = quality.frechet_distance(quality.Moments(zero, first), quality.Moments(zero, second))
    assert distance == pytest.approx(expected.item(), rel=1e-12)


def test_a_set_has_no_distance_to_itself(quality: ModuleType) -> None:
    rows = torch.randn(200, 64, generator=torch.Generator().manual_seed(0)) * torch.linspace(0, 3, 64)
    moments = quality.Moments.of(rows)
    assert quality.frechet_distance(moments, moments) == pytest.approx(0, abs=1e-6)


def test_samples_are_made_once_and_do_not_depend_on_an_interruption(quality: ModuleType, tmp_path: Path) -> None:
    calls = []

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return 0.5 * x

    denoiser = piadm.Denoiser(network, piadm.DiscreteSchedule.ddpm(), "v")
    first = quality.generate(denoiser, 4, 2, 10, tmp_path / "a")
    assert first.shape == (4, 1, 28, 28)
    assert calls == [2] * 20
    (tmp_path / "a" / "000002-2.pt").unlink()
    again = quality.generate(denoiser, 4, 2, 10, tmp_path / "a")
    assert calls == [2] * 30
    assert torch.equal(first, again)
    assert torch.equal(first[:3], quality.generate(denoiser, 3, 3, 10, tmp_path / "b"))


def test_an_interrupted_chunk_is_not_kept(quality: ModuleType, tmp_path: Path) -> None:
    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if t[0] < 500:
            raise KeyboardInterrupt
        return 0.5 * x

    denoiser = piadm.Denoiser(network, piadm.DiscreteSchedule.ddpm(), "v")
    with pytest.raises((KeyboardInterrupt, piadm.NotConvergedError)):
        quality.generate(denoiser, 2, 2, 10, tmp_path)
    assert not list(tmp_path.iterdir())
