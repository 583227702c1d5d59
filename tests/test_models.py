"""The shipped network: what it is, that it is deterministic by row, and what loading it refuses."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

import piadm
from piadm._checks import device_here
from piadm.models import load_folder, shipped

pytest.importorskip("diffusers")
FOLDER = Path(shipped.__file__).parent / "fashion"


@pytest.fixture(scope="module")
def denoiser() -> piadm.Denoiser:
    return piadm.load("fashion")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FOLDER, tmp_path / "fashion"))


def test_network_is_as_small_as_promised(denoiser: piadm.Denoiser) -> None:
    parameters = list(denoiser.network.parameters())
    assert sum(p.numel() for p in parameters) <= 2_200_000  # "up to about 2 M"
    assert (FOLDER / "weights.safetensors").stat().st_size <= 6e6
    assert all(p.dtype == torch.float32 and p.isfinite().all() and not p.requires_grad for p in parameters)
    assert not any(module.training for module in denoiser.network.modules())


def test_model_card_states_the_number_of_parameters(denoiser: piadm.Denoiser) -> None:
    count = sum(p.numel() for p in denoiser.network.parameters())
    assert f"{count:,}".replace(",", " ") in (FOLDER / "MODEL_CARD.md").read_text()


def test_schedule_is_the_linear_ddpm_table(denoiser: piadm.Denoiser) -> None:
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    expected = (1 - betas).cumprod(0)
    # Rounding of a product of 1000 factors: 1000 units in the last place.
    torch.testing.assert_close(
        denoiser.schedule.alpha(torch.arange(1000.0)).square(), expected, rtol=1000 * 2.3e-16, atol=0
    )


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_a_row_has_the_same_output_alone_and_in_a_batch(denoiser: piadm.Denoiser, rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(16, 1, 28, 28, generator=generator), torch.linspace(0, 999, 16)
    with torch.inference_mode():
        whole = denoiser.network(x, t).sample
        parts = [denoiser.network(*part).sample for part in zip(x.split(rows), t.split(rows), strict=True)]
    # Eight units of float32 rounding of the largest output: kernels may sum in another order, nothing else.
    assert (torch.cat(parts) - whole).abs().max() <= 8 * 1.2e-7 * whole.abs().max()


def test_pure_noise_is_denoised_to_the_mean_of_the_data(denoiser: piadm.Denoiser) -> None:
    # At the noisiest time almost nothing is known of the image, so E[x0 | x] averages to E[x0].  A wrong sign
    # or prediction type, or a wrong time convention, is off by the network's output, of order one.
    x = torch.randn(64, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        estimate = denoiser(x, torch.full((64,), 999.0))
    standard_error = estimate.mean((1, 2, 3)).std() / 8
    network_error = 0.02
    assert abs(estimate.mean() - denoiser.data_mean) <= 4 * standard_error + network_error


def test_loading_draws_no_random_numbers() -> None:
    state = torch.get_rng_state()
    piadm.load("fashion")
    assert torch.equal(torch.get_rng_state(), state)


def test_dtype_is_that_asked_for() -> None:
    network = piadm.load("fashion", dtype=torch.float64).network
    assert {p.dtype for p in network.parameters()} == {torch.float64}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"name": "mnist"}, ValueError, "name must be one of 'fashion', got 'mnist'"),
        ({"name": 3}, TypeError, "name must be one of 'fashion', got 3"),
        ({"name": "../fashion"}, ValueError, "name must be one of 'fashion'"),
        ({"device": "abacus"}, ValueError, "device must be a device of this machine, got 'abacus'"),
        ({"device": "meta:x"}, ValueError, "device must be a device of this machine, got 'meta:x'"),
        ({"device": "meta"}, ValueError, "got 'meta': torch cannot use it here .*cannot be called on meta tensors"),
        ({"dtype": "float32"}, TypeError, "dtype must be a torch.dtype, got 'float32'"),
        ({"dtype": torch.int64}, ValueError, "dtype must be a floating-point type .*, got torch.int64"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        piadm.load(**{"name": "fashion", **arguments})


def test_a_device_that_has_memory_but_runs_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def add(*_: object) -> None:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nand much advice")

    monkeypatch.setattr(torch.Tensor, "add", add)
    with pytest.raises(ValueError, match=r"got 'cpu': torch cannot use it here \(CUDA error: .* on the device\)$"):
        piadm.load("fashion", device="cpu")


def test_to_check_the_cpu_no_other_device_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: pytest.fail("CUDA was started"))
    assert device_here("device", "cpu") == torch.device("cpu")


@pytest.mark.parametrize("file", ["config.json", "weights.safetensors"])
def test_a_missing_file_is_named(copy: Path, file: str) -> None:
    (copy / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"{file} is missing; reinstall piadm"):
        load_folder(copy)


@pytest.mark.parametrize("kept", [0, 7, 5000, 1_000_000])
def test_a_truncated_weights_file_is_named(copy: Path, kept: int) -> None:
    weights = copy / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(ValueError, match="weights.safetensors is not a readable safetensors file"):
        load_folder(copy)


def test_a_folder_may_have_no_draft_but_no_wrong_one(copy: Path) -> None:
    draft = copy / "draft.safetensors"
    assert load_folder(copy).draft is not None
    draft.write_bytes((copy / "weights.safetensors").read_bytes())
    with pytest.raises(ValueError, match="draft.safetensors is no mixture of low-rank Gaussians"):
        load_folder(copy)
    draft.unlink()
    assert load_folder(copy).draft is None


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "3"])
def test_a_broken_config_is_named(copy: Path, text: str) -> None:
    (copy / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json is not a JSON object"):
        load_folder(copy)


@pytest.mark.parametrize("key", ["network", "prediction", "betas", "data"])
def test_a_missing_config_entry_is_named(copy: Path, key: str) -> None:
    settings = json.loads((copy / "config.json").read_text())
    del settings[key]
    (copy / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=f"config.json lacks the entries {key}"):
        load_folder(copy)


@pytest.mark.parametrize(("key", "value"), [("block_out_channels", [32, 64, 128]), ("legs", 4)])
def test_a_network_that_does_not_fit_the_weights_is_refused(copy: Path, key: str, value: object) -> None:
    settings = json.loads((copy / "config.json").read_text())
    settings["network"][key] = value
    (copy / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="weights.safetensors and config.json do not fit each other"):
        load_folder(copy)


def test_missing_diffusers_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r'pip install "piadm\[diffusers\]"'):
        piadm.load("fashion")
