"""``piadm sample``: what it prints and writes is what was computed, and every failure is one clear line."""

from __future__ import annotations

import functools
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import piadm
from piadm.cli import app, progress
from piadm.shards import Shards

SHAPE = (2, 1, 28, 28)
SCHEDULE = piadm.VPSchedule()


def two_point(x: Tensor, t: Tensor) -> Tensor:
    """The exact denoised estimate of pixels that are 0.8 or -0.8: not linear, and free of cost."""
    alpha, sigma = (c.to(x.dtype).view(-1, 1, 1, 1) for c in (SCHEDULE.alpha(t), SCHEDULE.sigma(t)))
    return 0.8 * torch.tanh(0.8 * alpha * x / sigma.square())


def serve(monkeypatch: pytest.MonkeyPatch, network: Callable[..., Tensor] = two_point) -> piadm.Denoiser:
    """Put a cheap denoiser in the place of the shipped one."""
    denoiser = piadm.Denoiser(network, SCHEDULE, "sample")
    monkeypatch.setattr(piadm, "load", lambda name, device: denoiser)
    return denoiser


def run(folder: Path, *more: str) -> int:
    """Run a small ``piadm sample`` that writes ``out.png`` and ``out.json`` into ``folder``."""
    small = ["sample", "--num", "2", "--steps", "24", "--tol", "1e-3", "--seed", "5"]
    return app.main([*small, "--out", str(folder / "out.png"), "--json", str(folder / "out.json"), *more])


def figures(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "out.json").read_text()))


def test_help_has_examples_and_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["sample", "--help"]) == 0
    text = capsys.readouterr().out
    assert text.count("piadm sample --") >= 3
    for option in "model shape condition method steps tol num seed device max-batch threads out json".split():
        assert f"--{option}" in text


def test_version_is_that_of_the_library(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["--version"]) == 0
    assert capsys.readouterr().out == f"piadm {piadm.__version__}\n"


def test_no_command_shows_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main([]) == 0
    assert "Sample the shipped model or your own" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--tol", "0"], "--tol"),
        (["--tol", "nan"], "--tol"),
        (["--num", "0"], "--num"),
        (["--num", "many"], "--num"),
        (["--steps", "-3"], "--steps"),
        (["--seed", "-1"], "--seed"),
        (["--seed", str(2**64), "--out", "many"], "--seed must be an integer from 0 to 18446744073709551615"),
        (["--method", "euler"], "--method"),
        (["--max-batch", "0"], "--max-batch"),
        (["--threads", "0"], "--threads"),
        (["--threads", "100000"], "--threads must be an integer from 1 to 1024, got 100000"),
        (["--device", "abacus"], "--device"),
        (["--device", "meta"], "torch cannot use it here"),
        (["--device", "hpu"], "--device must be a device of this machine, got 'hpu'"),
        (["--out", "picture.jpg"], "--out must name a .png file or a folder"),
        (["--model", "torch:nothing"], "--shape"),
        (["--shape", "3,32,32"], "--shape"),
        (["--condition", "missing.safetensors"], "--condition must name a safetensors file"),
        (["--out", "missing/picture.png"], "missing"),
        (["--json", "figures.txt"], "--json"),
        (["--json", "missing/figures.json"], "missing"),
        (["--colour"], "--colour"),
    ],
)
def test_a_wrong_option_is_one_line_before_any_work(
    words: list[str],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(piadm, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    assert app.main(["sample", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert named in captured.err
    assert list(tmp_path.iterdir()) == []


def test_figures_are_those_of_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = serve(monkeypatch)
    assert run(tmp_path, "--method", "sde") == 0
    parallel = piadm.sample(denoiser, SHAPE, method="sde", steps=24, tol=1e-3, seed=5)
    sequential = piadm.sample_sequential(denoiser, SHAPE, method="sde", steps=24, seed=5)
    rms = (parallel.sample - sequential.sample).double().flatten(1).square().mean(1).sqrt()
    found = figures(tmp_path)
    # The same deterministic computation twice; float32 rounding of the difference of two samples.
    assert found["rms_difference"]["worst"] == pytest.approx(rms.max().item(), rel=1e-6, abs=1e-9)
    assert found["rms_difference"]["median"] == pytest.approx(rms.mean().item(), rel=1e-6, abs=1e-9)
    assert found["error_estimate"]["worst"] == pytest.approx(parallel.error_estimate.max().item())
    assert found["parallel"]["rounds"] == parallel.stats.rounds == len(found["convergence"])
    assert found["parallel"]["evaluations_per_sample"] == parallel.stats.evaluations
    assert found["sequential"]["rounds"] == found["sequential"]["evaluations_per_sample"] == 24
    assert found["convergence"][-1]["rms_difference"] == found["rms_difference"]
    assert found["warnings"] == []


def test_table_and_json_have_the_same_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    serve(monkeypatch)
    assert run(tmp_path, "--method", "ode") == 0
    text, found = capsys.readouterr().out, figures(tmp_path)

    def row(name: str) -> list[float]:
        line = next(line for line in text.splitlines() if line.strip().startswith(name))
        return [float(cell) for cell in line.split(name)[1].split(")")[-1].split()]

    runs = [found["sequential"], found["parallel"]]
    assert row("rounds") == [entry["rounds"] for entry in runs]
    assert row("evaluations per sample") == [round(entry["evaluations_per_sample"]) for entry in runs]
    assert row("seconds") == [float(f"{entry['seconds']:.1f}") for entry in runs]
    assert row("converged") == [2, 2]
    for name, key in (("RMS difference", "rms_difference"), ("error estimate", "error_estimate")):
        for which in ("median", "worst"):
            assert row(f"{name}, {which}") == [float(f"{found[key][which]:.2e}")]


def test_in_a_pipe_there_is_the_table_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    serve(monkeypatch)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert run(tmp_path) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", captured.out)


def test_on_a_terminal_both_runs_show_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    serve(monkeypatch)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert run(tmp_path) == 0
    shown = capsys.readouterr().err
    assert "parallel" in shown
    assert "sequential reference" in shown


def test_picture_is_a_whole_png_and_no_temporary_file_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch)
    assert run(tmp_path) == 0
    with Image.open(tmp_path / "out.png") as picture:
        picture.load()
        both = picture.width
    assert {path.name for path in tmp_path.iterdir()} == {"out.png", "out.json"}
    assert run(tmp_path, "--no-reference") == 0
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.width < both  # one grid less
    assert figures(tmp_path)["sequential"] is None
    assert figures(tmp_path)["rms_difference"] is None


def test_samples_that_did_not_converge_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    serve(monkeypatch)
    monkeypatch.setattr(piadm, "sample", functools.partial(piadm.sample, max_rounds=1))
    assert run(tmp_path, "--tol", "1e-9") == 0
    assert "warning: 2 of 2 parallel samples did not converge: 2 max rounds" in capsys.readouterr().err
    assert figures(tmp_path)["parallel"]["status"] == {"MAX_ROUNDS": 2}
    assert len(figures(tmp_path)["warnings"]) == 1


def test_a_failing_network_leaves_the_old_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(x: Tensor, t: Tensor) -> Tensor:
        raise RuntimeError("first line\nsecond line")

    serve(monkeypatch, broken)
    (tmp_path / "out.png").write_text("old")
    assert run(tmp_path) == 1
    error = capsys.readouterr().err
    assert error.startswith("piadm: error: ")
    assert error.count("\n") == 1
    assert "second line" in error
    assert (tmp_path / "out.png").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


def test_ctrl_c_in_the_reference_keeps_the_parallel_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first: list[float] = []

    def impatient(x: Tensor, t: Tensor) -> Tensor:
        first.append(float(t.max()))
        # Only the sequential sampler asks for the first time alone.
        if len(x) == SHAPE[0] and bool((t == first[0]).all()):
            raise KeyboardInterrupt
        return two_point(x, t)

    serve(monkeypatch, impatient)
    assert run(tmp_path) == 130
    assert "interrupted" in capsys.readouterr().err
    assert (tmp_path / "out.png").stat().st_size > 0
    assert figures(tmp_path)["parallel"]["status"] == {"CONVERGED": 2}
    assert figures(tmp_path)["sequential"] is None


def test_ctrl_c_before_there_is_anything_to_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(name: str, device: str) -> piadm.Denoiser:
        raise KeyboardInterrupt

    monkeypatch.setattr(piadm, "load", interrupt)
    assert run(tmp_path) == 130
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_the_commands_are_loaded_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(app, "build", interrupt)
    assert app.main(["sample"]) == 130
    assert capsys.readouterr().err == "piadm: interrupted\n"


def test_the_shipped_model_runs(tmp_path: Path) -> None:
    assert run(tmp_path, "--num", "1", "--steps", "8", "--tol", "1e-2") == 0
    assert figures(tmp_path)["rms_difference"]["worst"] <= 1e-2  # the tolerance


@pytest.mark.parametrize(("name", "extra"), [("typer", "cli"), ("rich", "cli"), ("matplotlib", "plots")])
def test_without_an_extra_the_remedy_is_named(name: str, extra: str, tmp_path: Path) -> None:
    start = "from piadm.cli.app import main; sys.exit(main(['sample']))"
    words = [sys.executable, "-c", f"import sys; sys.modules[{name!r}] = None; {start}"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert f"needs {name}" in done.stderr
    assert re.search(rf"pip install 'piadm\[.*\b{extra}\b", done.stderr)
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_progress_is_logarithmic_in_the_error() -> None:
    assert progress.fraction_converged(1.0, 0.1, 0.01) == pytest.approx(0.5)
    assert progress.fraction_converged(1.0, 1e-3, 0.01) == 1.0
    assert progress.fraction_converged(1.0, float("nan"), 0.01) == 0.0


def test_figures_are_written_where_nobody_reads_what_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, closed = tmp_path / "many", io.StringIO()
    folder.mkdir()
    shards = Shards(folder, 1, 1, {})
    shards.begin()
    shards.write(0, {"sample": torch.zeros(1, dtype=torch.float64, device="cpu")})
    shards.finish()
    closed.close()
    monkeypatch.setattr(sys, "stdout", closed)  # as a pipe to head is after the first lines
    assert app.main(["verify", str(folder), "--json", str(tmp_path / "found.json")]) == 1
    assert json.loads((tmp_path / "found.json").read_text()) == {"samples": 1, "shards": 1, "wrong": []}
