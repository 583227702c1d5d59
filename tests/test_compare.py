"""``piadm compare``: what it prints and writes is what the study found, and every failure is one clear line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import piadm
from piadm.cli import app, compare
from piadm.cli.model import ModelName, mixture
from piadm.network import network_device
from piadm.rivals import NAMES, chosen, prepare, study

SMALL = ["compare", "--model", "mixture", "--steps", "24", "--num", "2", "--errors", "5e-2,1e-2", "--seed", "3"]
SHAPE = (2, 1, 8, 8)


def run(folder: Path, *more: str) -> int:
    """Run a small ``piadm compare`` that writes ``out.png`` and ``out.json`` into ``folder``."""
    return app.main([*SMALL, "--out", str(folder / "out.png"), "--json", str(folder / "out.json"), *more])


def figures(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "out.json").read_text()))


def test_help_has_examples_every_option_and_every_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["compare", "--help"]) == 0
    text = capsys.readouterr().out
    assert text.count("piadm compare --") >= 4
    for option in "model shape condition method steps errors num seed device max-batch threads only out json".split():
        assert f"--{option}" in text
    for name in NAMES:
        assert name in text


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--errors", "0"], "--errors"),
        (["--errors", "1e-2,nan"], "--errors"),
        (["--errors", "small"], "--errors"),
        (["--errors", ""], "--errors"),
        (["--num", "0"], "--num"),
        (["--steps", "1"], "--steps"),
        (["--steps", "many"], "--steps"),
        (["--seed", "-1"], "--seed"),
        (["--method", "euler"], "--method"),
        (["--max-batch", "0"], "--max-batch"),
        (["--threads", "0"], "--threads"),
        (["--device", "abacus"], "--device"),
        (["--model", "mixture", "--device", "meta"], "--device"),
        (["--model", "mnist"], "--model"),
        (["--model", "torch:nothing"], "--shape"),
        (["--model", "torch:nothing", "--shape", "3,x"], "--shape"),
        (["--shape", "3,32,32"], "--shape"),
        (["--only", "srds,anderson"], "anderson"),
        (["--only", ","], "--only"),
        (["--out", "picture.jpg"], "--out"),
        (["--out", "missing/picture.png"], "missing"),
        (["--json", "figures.txt"], "--json"),
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
    monkeypatch.setattr(ModelName, "load", lambda _: pytest.fail("the model was loaded"))
    assert app.main(["compare", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert named in captured.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["ode", "sde"])
def test_figures_are_those_of_the_study(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--method", method, "--steps", "10") == 0
    text, found = capsys.readouterr().out, figures(tmp_path)
    assert [entry["name"] for entry in found["rivals"]] == list(NAMES)
    on = prepare(mixture(), SHAPE, method=method, steps=10, seed=3)
    for result, entry in zip(study(on, chosen(None), (5e-2, 1e-2)), found["rivals"], strict=True):
        assert entry["reason"] == result.reason
        # The same deterministic computation twice; seconds are not.
        assert [run | {"seconds": 0} for run in entry["runs"]] == [
            {
                "setting": run.setting,
                "rounds": run.rounds,
                "evaluations": run.evaluations,
                "seconds": 0,
                "worst": max(run.errors),
                "median": run.median,
                "errors": list(run.errors),
            }
            for run in result.runs
        ]
        for best in entry["best"]:
            within = [run for run in entry["runs"] if run[best["statistic"]] <= best["target"]]
            fewest = min((run[best["fewest"]] for run in within), default=None)
            assert (best["run"] or {}).get(best["fewest"]) == fewest
        for target in (5e-2, 1e-2):
            first = result.best(target)
            lines = text.split(f"every sample within {target:g} ")[1].split("every sample")[0].splitlines()
            cells = next(line for line in lines if line.strip().startswith(f"{entry['title']}  ")).split()
            start = cells[len(entry["title"].split()) :]
            assert start[0] == ("-" if first is None else str(first.rounds))
            assert start[1] == ("-" if first is None else f"{first.evaluations:.0f}")
    sequential = found["rivals"][0]["runs"][0]
    assert (sequential["rounds"], sequential["evaluations"], sequential["worst"]) == (10, 10, 0)


def test_a_rival_that_cannot_run_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--method", "sde", "--only", "unipc,few-steps") == 0
    assert "UniPC solves the ODE only" in capsys.readouterr().out
    assert run(tmp_path, "--method", "sde", "--only", "unipc") == 1
    error = capsys.readouterr().err
    assert error.startswith("piadm: error: none of the chosen rivals can run: unipc: ")
    assert error.count("\n") == 1


def test_in_a_pipe_there_are_the_tables_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert run(tmp_path, "--only", "few-steps,dpm-solver,sample") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", captured.out)


def test_on_a_terminal_there_is_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert run(tmp_path, "--only", "srds") == 0
    shown = capsys.readouterr().err
    assert "sequential reference" in shown
    assert "SRDS" in shown


def test_the_figure_is_a_whole_png_and_no_temporary_file_stays(tmp_path: Path) -> None:
    assert run(tmp_path, "--only", "sample,sequential") == 0
    with Image.open(tmp_path / "out.png") as picture:
        picture.load()
        assert picture.width > 1000
    assert {path.name for path in tmp_path.iterdir()} == {"out.png", "out.json"}


def own(monkeypatch: pytest.MonkeyPatch, folder: Path, source: str) -> None:
    """A user's module ``own_model.py`` in the working folder."""
    head = "import torch, piadm\nfrom piadm.cli.model import mixture\n"
    (folder / "own_model.py").write_text(head + source)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "own_model", raising=False)


OWN = ["compare", "--model", "own_model:make", "--shape", "1,8,8", "--steps", "12", "--num", "1", "--only", "few-steps"]


@pytest.mark.parametrize("source", ["make = mixture()", "def make():\n    return mixture()"])
def test_a_model_of_the_users_own(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own(monkeypatch, tmp_path, source)
    assert app.main([*OWN, "--json", "out.json"]) == 0
    found = figures(tmp_path)
    assert found["settings"]["model"] == "own_model:make"
    on = prepare(mixture(), (1, 1, 8, 8), steps=12)
    assert found["rivals"][0]["runs"][0]["worst"] == study(on, chosen(["few-steps"]), [1e-2])[0].runs[0].worst


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("", "could not be loaded"),
        ("raise SystemExit(0)", "'own_model:make' could not be loaded: SystemExit: 0"),
        ("make = torch.nn.Linear(8, 8)", "without arguments that returns one, got Linear"),
        ("def make(x, t):\n    return x", "without arguments that returns one, got function"),
        ("raise RuntimeError('at import')", "'own_model:make' could not be loaded: RuntimeError: at import"),
        ("make = 3", "must be a piadm.Denoiser, or a function"),
        ("def make():\n    return 3", "must be a piadm.Denoiser, or a function"),
        ("def make():\n    raise RuntimeError('first\\nsecond')", "first second"),
        ("make = piadm.Denoiser(lambda x, t: x[:, :, 1:], piadm.VPSchedule(), 'sample')", "returned shape"),
        ("make = piadm.Denoiser(lambda x, t: x * float('nan'), piadm.VPSchedule(), 'sample')", "must give finite"),
    ],
)
def test_a_model_that_does_not_work_is_one_line_and_leaves_the_old_figure(
    source: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own(monkeypatch, tmp_path, source)
    (tmp_path / "piadm-compare.png").write_text("old")
    assert app.main([*OWN, "--json", "out.json"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("piadm: error: ")
    assert said in error
    assert error.count("\n") == 1
    assert (tmp_path / "piadm-compare.png").read_text() == "old"
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("wrap", ["", "piadm.CompiledNetwork"])
def test_an_own_network_goes_to_the_device_that_was_asked_for_and_its_draft_with_it(
    wrap: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = "draft = piadm.Denoiser(torch.nn.Linear(8, 8), piadm.VPSchedule(), 'sample')"
    make = f"make = piadm.Denoiser({wrap}(torch.nn.Linear(8, 8)), piadm.VPSchedule(), 'sample', draft=draft)"
    own(monkeypatch, tmp_path, f"{draft}\n{make}")
    denoiser = ModelName("own_model:make", "1,8,8", "meta").load()
    assert denoiser.draft is not None
    places = [network_device(one.network) for one in (denoiser, denoiser.draft)]
    assert places == [torch.device("meta")] * 2


def test_an_own_function_cannot_be_moved_to_another_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own(monkeypatch, tmp_path, "make = piadm.Denoiser(lambda x, t: x, piadm.VPSchedule(), 'sample')")
    assert ModelName("own_model:make", "1,8,8", "cpu").load()
    with pytest.raises(ValueError, match="--device meta: the model is no torch module"):
        ModelName("own_model:make", "1,8,8", "meta").load()


def test_ctrl_c_keeps_the_rivals_that_are_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def impatient(*_: object, **__: object) -> piadm.Solution:
        raise KeyboardInterrupt

    monkeypatch.setattr(piadm, "sample", impatient)
    assert run(tmp_path, "--only", "few-steps,sample") == 130
    assert "interrupted" in capsys.readouterr().err
    assert [entry["name"] for entry in figures(tmp_path)["rivals"]] == ["few-steps"]
    assert (tmp_path / "out.png").stat().st_size > 0


def test_ctrl_c_inside_the_librarys_own_sampler_ends_the_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The samplers return what they have on Ctrl-C; here that must not pass for a finished run."""
    inner, seen = mixture(), []

    def impatient(x: Tensor, t: Tensor) -> Tensor:
        seen.append(len(x))
        if len(seen) > 30:  # 24 steps of the reference
            raise KeyboardInterrupt
        return torch.as_tensor(inner.network(x, t))

    monkeypatch.setattr(compare.ModelName, "load", lambda _: piadm.Denoiser(impatient, inner.schedule, "sample"))
    assert run(tmp_path, "--only", "sequential,sample") == 130
    assert [entry["name"] for entry in figures(tmp_path)["rivals"]] == ["sequential"]


@pytest.mark.parametrize("before", [0, 10])
def test_ctrl_c_before_there_is_anything_to_show(before: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner, seen = mixture(), []

    def impatient(x: Tensor, t: Tensor) -> Tensor:
        seen.append(len(x))
        if len(seen) > before:
            raise KeyboardInterrupt
        return torch.as_tensor(inner.network(x, t))

    monkeypatch.setattr(compare.ModelName, "load", lambda _: piadm.Denoiser(impatient, inner.schedule, "sample"))
    assert run(tmp_path, "--only", "sample") == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("steps", ["2", "5"])
@pytest.mark.parametrize("method", ["ode", "sde"])
def test_every_rival_takes_the_shortest_grids(method: str, steps: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert run(tmp_path, "--steps", steps, "--method", method) == 0


@pytest.mark.parametrize(
    ("name", "words"),
    [("matplotlib", []), ("typer", []), ("diffusers", ["--only", "dpm-solver"])],
)
def test_without_an_extra_the_remedy_is_named(name: str, words: list[str], tmp_path: Path) -> None:
    start = f"from piadm.cli.app import main; sys.exit(main({[*SMALL, *words]!r}))"
    code = [sys.executable, "-c", f"import sys; sys.modules[{name!r}] = None; {start}"]
    done = subprocess.run(code, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert f"needs {name}" in done.stderr
    assert re.search(r"pip install 'piadm\[", done.stderr)
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
