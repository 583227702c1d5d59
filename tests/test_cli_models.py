"""``piadm sample`` with a model of one's own: its samples are the library's, with their conditions, and can be seen."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import piadm
from piadm.cli import app, portraits

SCHEDULE = piadm.VPSchedule()
SHAPE, LABELS = (3, 4, 4), 5


def labelled(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
    """The exact denoised estimate of pixels that are plus or minus a fifth of the label."""
    edges = (len(x), *[1] * (x.ndim - 1))
    alpha, sigma = (c.to(x.dtype).view(edges) for c in (SCHEDULE.alpha(t), SCHEDULE.sigma(t)))
    size = 0.2 * (label.to(x.dtype).view(edges) + 1)
    return size * torch.tanh(size * alpha * x / sigma.square())


def plain(x: Tensor, t: Tensor) -> Tensor:
    return labelled(x, t, 4 * torch.ones_like(t))


DENOISER = piadm.Denoiser(labelled, SCHEDULE, "sample")
PLAIN = piadm.Denoiser(plain, SCHEDULE, "sample")


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    """A file of conditions for seven samples."""
    path = tmp_path / "labels.safetensors"
    save_file({"label": torch.arange(7) % LABELS}, path)
    return path


def words(name: str, shape: tuple[int, ...], *more: str) -> list[str]:
    sizes = ",".join(map(str, shape))
    small = ["--steps", "20", "--tol", "1e-3", "--seed", "3", "--num", "7"]
    return ["sample", "--model", f"test_cli_models:{name}", "--shape", sizes, *small, *more]


def alone(**more: object) -> piadm.Solution:
    condition = {"label": torch.arange(7) % LABELS}
    return piadm.sample(DENOISER, (7, *SHAPE), method="ode", steps=20, tol=1e-3, seed=3, condition=condition)


def test_a_folder_holds_the_samples_of_the_library(tmp_path: Path, labels: Path) -> None:
    folder = tmp_path / "many"
    asked = words("DENOISER", SHAPE, "--condition", str(labels), "--shard", "3", "--batch", "2", "--out", str(folder))
    assert app.main(asked) == 0 and app.main(["verify", str(folder)]) == 0
    found = torch.cat([load_file(path)["sample"] for path in sorted(folder.glob("shard-*"))])
    assert (found - alone().sample).abs().max() <= 1e-5  # other batches, other kernels


@pytest.mark.parametrize("changed", ["condition", "shape"])
def test_a_folder_goes_on_with_the_same_samples_only(
    changed: str, tmp_path: Path, labels: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = ["--condition", str(labels), "--out", str(tmp_path / "many")]
    assert app.main(words("DENOISER", SHAPE, *folder)) == 0
    if changed == "condition":
        save_file({"label": torch.zeros(7, dtype=torch.int64)}, labels)
    assert app.main(words("DENOISER", (3, 4, 5) if changed == "shape" else SHAPE, *folder)) == 1
    assert f"was begun with {changed} = " in capsys.readouterr().err


def test_a_picture_comes_with_the_figures_of_the_library(tmp_path: Path, labels: Path) -> None:
    files = ["--out", str(tmp_path / "out.png"), "--json", str(tmp_path / "out.json")]
    assert app.main(words("DENOISER", SHAPE, "--condition", str(labels), *files)) == 0
    figures, want = json.loads((tmp_path / "out.json").read_text()), alone()
    assert figures["parallel"]["rounds"] == want.stats.rounds
    assert figures["parallel"]["evaluations_per_sample"] == want.stats.evaluations
    assert figures["rms_difference"]["worst"] <= 1e-3  # the tolerance
    assert (figures["counted"], figures["settings"]["shape"]) == ("7 samples", list(SHAPE))
    with Image.open(tmp_path / "out.png") as picture:
        picture.verify()


@pytest.mark.parametrize("command", [["compare", "--only", "sequential,sample,picard"], ["bench", "--rows", "2"]])
def test_other_commands_take_conditions(command: list[str], tmp_path: Path, labels: Path) -> None:
    """With other labels than the reference's no error could be this small."""
    size = {"compare": ["--num", "7", "--out", str(tmp_path / "out.png")], "bench": ["--batch", "7", "--repeats", "1"]}
    asked = [*command, *size[command[0]], "--model", "test_cli_models:DENOISER", "--shape", "3,4,4", "--steps", "12"]
    assert app.main([*asked, "--condition", str(labels), "--json", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    errors = [entry["worst"] for entry in found.get("samplers", [])[1:]]
    errors += [min(run["worst"] for run in rival["runs"]) for rival in found.get("rivals", [])]
    assert len(errors) >= 3 and max(errors) <= 1e-2  # the tolerance


@pytest.mark.parametrize("shape", [(2,), (1,), (9,), (16, 7), (4, 6, 6), (3, 2, 6, 6)])
def test_samples_of_any_shape_can_be_seen(shape: tuple[int, ...], tmp_path: Path) -> None:
    assert app.main(words("PLAIN", shape, "--out", str(tmp_path / "out.png"))) == 0
    with Image.open(tmp_path / "out.png") as picture:
        assert min(picture.size) > 100


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({"label": torch.zeros(6)}, "'label' in 'wrong.safetensors' must have a row for each of the 7 samples"),
        ({"label": torch.tensor(1.0)}, "got shape ()"),
        ({}, "holds no tensor"),
    ],
)
def test_wrong_conditions_are_one_line_before_any_work(
    tensors: dict[str, Tensor],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    save_file(tensors, tmp_path / "wrong.safetensors")
    assert app.main(words("DENOISER", SHAPE, "--condition", "wrong.safetensors", "--out", "many")) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and named in captured.err
    assert not (tmp_path / "many").exists()


def test_a_model_that_cannot_be_loaded_leaves_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "many"
    assert app.main(words("MISSING", SHAPE, "--out", str(folder))) == 1
    assert "'test_cli_models:MISSING' could not be loaded" in capsys.readouterr().err
    assert not folder.exists()


def test_a_link_to_nothing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "many").symlink_to(tmp_path / "nowhere")
    assert app.main(words("PLAIN", SHAPE, "--out", str(tmp_path / "many"))) == 2
    assert "is a link to nothing" in capsys.readouterr().err


@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_a_mosaic_holds_every_image_unchanged(count: int) -> None:
    images = np.random.default_rng(0).random((count, 6, 4, 1))
    page = portraits.mosaic(images)
    np.testing.assert_array_equal(np.sort(page[~np.isnan(page)]), np.sort(images.ravel()))
    np.testing.assert_array_equal(page[:6, :4], images[0])


def test_black_and_white_are_those_of_images_unless_values_lie_beyond() -> None:
    usual = np.linspace(-1, 1, 1000)
    assert portraits.limits(usual) == portraits.limits(np.append(usual, np.nan)) == (-1.0, 1.0)
    low, high = portraits.limits(255 * usual)
    assert -255 < low < -200 and 200 < high < 255
    low, high = portraits.limits(np.full(9, 7.0))
    assert low == 7.0 < high
