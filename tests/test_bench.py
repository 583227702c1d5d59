"""``piadm bench``: what it prints and writes is what was measured, by a clock that no other process disturbs."""

from __future__ import annotations

import json
import re
import statistics
import sys
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import piadm
from piadm.cli import app
from piadm.cli.bench_measure import LONGEST
from piadm.cli.model import ModelName, mixture

SHAPE = (2, 1, 8, 8)
SMALL = ["bench", "--model", "mixture", "--steps", "24", "--batch", "2", "--seed", "3", "--rows", "6"]
SMALL += ["--repeats", "2", "--windows", "auto,4,all"]
NAMES = ["sequential", "sample", "sample (window auto)", "sample (window 4)", "sample (window all)"]


class Clocked:
    """The mixture as a network that takes ``fixed + rows * per_row`` seconds by its own clock, and has room for few."""

    def __init__(self, fixed: float, per_row: float, room: int = 1000) -> None:
        self.exact, self.fixed, self.per_row, self.room = mixture(), fixed, per_row, room
        self.calls, self.now = 0, 0.0

    def perf_counter(self) -> float:
        return self.now

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        if len(x) > self.room:
            raise RuntimeError("out of memory: no room for so many")
        self.calls += 1
        self.now += self.fixed + self.per_row * len(x)
        return torch.as_tensor(self.exact.network(x, t))


def serve(monkeypatch: pytest.MonkeyPatch, network: Clocked) -> piadm.Denoiser:
    """Put such a network in the place of the mixture, and its clock in that of the machine's."""
    denoiser = piadm.Denoiser(network, network.exact.schedule, "sample", data_variance=network.exact.data_variance)
    monkeypatch.setattr(ModelName, "load", lambda _: denoiser)
    for module in ("timing", "iteration"):
        monkeypatch.setattr(f"piadm.{module}.time", network)
    return denoiser


def run(folder: Path, *more: str) -> int:
    """Run a small ``piadm bench`` that writes ``out.json`` into ``folder``."""
    return app.main([*SMALL, "--json", str(folder / "out.json"), *more])


def figures(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "out.json").read_text()))


def test_help_has_examples_and_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["bench", "--help"]) == 0
    text = capsys.readouterr().out
    assert text.count("piadm bench --") >= 3
    for option in "model shape condition method steps tol batch windows rows repeats seed device json figure".split():
        assert f"--{option}" in text


WRONG = ["--steps 0", "--tol 0", "--tol nan", "--batch 0", "--windows auto,1", "--windows wide", "--rows 0"]
WRONG += ["--repeats 0", "--seed -1", "--method euler", "--threads 0", "--device abacus", "--model mnist"]
WRONG += ["--shape 3,32,32", "--json figures.txt", "--json missing/out.json", "--figure out.jpg", "--colour red"]


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_option_is_one_line_before_any_work(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ModelName, "load", lambda _: pytest.fail("the model was loaded"))
    assert app.main(["bench", *words.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert words.split()[0] in captured.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["ode", "sde"])
def test_figures_are_those_of_the_library(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = serve(monkeypatch, Clocked(0.5, 0.25))
    assert run(tmp_path, "--method", method) == 0
    found = figures(tmp_path)
    # By the network's clock: 0.5 s a call and 0.25 s a row, of whatever size.
    assert found["latency"]["calls"] == [
        {"rows": n, "seconds": 0.5 + n / 4, "seconds_per_row": 0.5 / n + 0.25, "times_one_row": (2 + n) / 3}
        for n in (1, 2, 4, 6)
    ]
    shared: dict[str, Any] = {"method": method, "steps": 24, "seed": 3}
    truth = piadm.sample_sequential(denoiser, SHAPE, **shared)
    assert [entry["name"] for entry in found["samplers"]] == NAMES
    for entry, window in zip(found["samplers"], [None, None, "auto", 4, "all"], strict=True):
        solution = truth
        if entry["name"] != "sequential":
            solution = piadm.sample(denoiser, SHAPE, **shared, window=window)
        stats = solution.stats
        assert (entry["rounds"], entry["evaluations_per_sample"]) == (stats.rounds, stats.evaluations)
        assert entry["rows_per_round"] == pytest.approx(2 * stats.evaluations / stats.rounds)
        apart = (solution.sample - truth.sample).double().flatten(1).square().mean(1).sqrt()
        # The same deterministic computation twice; float32 rounding of the difference of two samples.
        assert entry["errors"] == pytest.approx(apart.tolist(), rel=1e-6, abs=1e-9)
        assert (entry["worst"], entry["converged"]) == (max(entry["errors"]), 2)
        assert entry["seconds"] == pytest.approx(0.5 * stats.rounds + 0.25 * 2 * stats.evaluations)


def test_seconds_are_the_median_without_the_first_run_and_speed_ups_their_ratio(tmp_path: Path) -> None:
    assert run(tmp_path, "--repeats", "3") == 0  # with the machine's clock, by which runs differ
    sequential, *others = figures(tmp_path)["samplers"]
    for entry in (sequential, *others):
        assert len(entry["times"]) == 3 and entry["first_seconds"] not in entry["times"]
        assert entry["seconds"] == statistics.median(entry["times"])
        assert entry["times_faster"] == sequential["seconds"] / entry["seconds"]


def test_tables_and_json_have_the_same_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    serve(monkeypatch, Clocked(0.03, 0.002))
    assert run(tmp_path) == 0
    text, found = capsys.readouterr().out, figures(tmp_path)
    lines = [line.split() for line in text.splitlines()]
    for call in found["latency"]["calls"]:
        figures_of_it = (1e3 * call["seconds"], 1e3 * call["seconds_per_row"], call["times_one_row"])
        assert [str(call["rows"]), *(f"{figure:.3g}" for figure in figures_of_it)] in lines
    for entry in found["samplers"]:
        cells = [f"{entry[name]:.0f}" for name in ("rounds", "evaluations_per_sample")]
        cells += [f"{entry[name]:.3g}" for name in ("rows_per_round", "seconds", "times_faster", "first_seconds")]
        cells += [f"{entry[name]:.1e}" for name in ("median", "worst")]
        assert [*entry["name"].split(), *cells, str(entry["converged"]), "of", "2"] in lines
    assert found["verdict"] and found["latency"]["remarks"]
    for line in (*found["verdict"], *found["latency"]["remarks"]):
        assert line in text


@pytest.mark.parametrize(
    ("fixed", "per_row", "outcome", "reason", "width"),
    [
        (1.0, 0.0, "It pays here", "only rounds count", 64),
        (0.0, 1.0, "It does not pay here", "the device is full, and only evaluations count", 1),
    ],
)
def test_whether_it_pays_is_said_with_the_reason(
    fixed: float, per_row: float, outcome: str, reason: str, width: int,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    serve(monkeypatch, Clocked(fixed, per_row))
    assert run(tmp_path, "--rows", "64") == 0
    said, found = capsys.readouterr().out.splitlines(), figures(tmp_path)
    sequential, *others = found["samplers"]
    fastest = min(others, key=lambda entry: entry["seconds"])
    assert (fastest["seconds"] < sequential["seconds"]) == (outcome == "It pays here")
    first, calls, time, why = found["verdict"]
    assert set(found["verdict"]) <= set(said)
    assert first.startswith(outcome) and fastest["name"] in first
    ratio = fixed + per_row * fastest["rows_per_round"] / 2  # to the step's two rows
    assert f"takes {ratio:.3g} times as long as a step's, of 2 rows" in calls
    assert f"{fastest['rounds']} of them are as long as {fastest['rounds'] * ratio:.0f} of 24 steps" in calls
    # By this clock nothing but the network takes time.
    assert f"these calls come to {fastest['seconds']:.3g} s; the run takes {fastest['seconds']:.3g} s." in time
    assert reason in why
    assert found["latency"]["width"] == width


def test_a_network_that_is_quicker_than_the_rounds_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = Clocked(0.0, 0.0)
    serve(monkeypatch, network)

    def ticking() -> float:  # every look at the clock takes a second, and the network nothing
        network.now += 1.0
        return network.now

    monkeypatch.setattr(network, "perf_counter", ticking)
    monkeypatch.setattr("piadm.cli.bench_measure.median_seconds", lambda *_, **__: 1e-3)
    assert run(tmp_path) == 0
    assert any("what rounds do beside the network" in line for line in figures(tmp_path)["verdict"])


@pytest.mark.parametrize(
    ("network", "ended"),
    [
        (Clocked(1.0, 0.0, room=2), "a call of 4 rows does not fit into memory; the largest that did has 2"),
        (Clocked(0.0, LONGEST / 1.9), f"a call of 2 rows takes {LONGEST / 0.95:.0f} s: larger ones were left out"),
    ],
)
def test_calls_that_are_too_large_or_slow_are_left_out_and_the_samplers_run_all_the_same(
    network: Clocked, ended: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    serve(monkeypatch, network)
    assert run(tmp_path) == 0
    text, found = capsys.readouterr().out, figures(tmp_path)
    assert [call["rows"] for call in found["latency"]["calls"]] == [1, 2]
    assert found["latency"]["ended"] == ended and ended in text
    assert "Calls of more than 2 rows were not timed" in text  # and rounds are larger
    assert [entry["converged"] for entry in found["samplers"]] == [2] * len(NAMES)


def test_samples_that_did_not_converge_are_counted_and_not_called_fast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inner = piadm.sample
    monkeypatch.setattr(piadm, "sample", lambda *given, **named: inner(*given, **named, max_rounds=1))
    assert run(tmp_path) == 0
    assert capsys.readouterr().out.count("0 of 2") == len(NAMES) - 1
    assert figures(tmp_path)["verdict"] == [
        "No setting had every sample within 0.01, so that none of them is an answer to compare."
    ]


def test_in_a_pipe_there_are_the_tables_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert run(tmp_path) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", captured.out)


def test_on_a_terminal_there_is_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert run(tmp_path) == 0
    shown = capsys.readouterr().err
    assert "network calls" in shown and "samplers" in shown


def test_the_figure_is_a_whole_png_and_no_temporary_file_stays(tmp_path: Path) -> None:
    assert run(tmp_path, "--figure", str(tmp_path / "out.png")) == 0
    with Image.open(tmp_path / "out.png") as picture:
        picture.load()
        assert picture.width > 1000
    assert {path.name for path in tmp_path.iterdir()} == {"out.png", "out.json"}


@pytest.mark.parametrize("words", ["--steps 1", "--steps 2", "--steps 2 --method sde --batch 1"])
def test_the_shortest_grids(words: str, tmp_path: Path) -> None:
    assert run(tmp_path, *words.split(), "--repeats", "1", "--rows", "1") == 0


HEAD = "import torch, piadm\nfrom piadm.cli.model import mixture\n"
OWN = ["bench", "--model", "own_bench:make", "--shape", "1,8,8", "--steps", "8", "--windows", "", "--rows", "2"]


def own(monkeypatch: pytest.MonkeyPatch, folder: Path, source: str) -> int:
    """Bench a user's module ``own_bench.py`` in the working folder."""
    (folder / "own_bench.py").write_text(HEAD + source)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "own_bench", raising=False)
    return app.main([*OWN, "--repeats", "1", "--json", "out.json"])


def test_a_model_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert own(monkeypatch, tmp_path, "make = mixture()") == 0
    found = figures(tmp_path)
    assert found["settings"]["model"] == "own_bench:make"
    assert [entry["name"] for entry in found["samplers"]] == NAMES[:2]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("make = 3", "must be a piadm.Denoiser, or a function"),
        ("make = piadm.Denoiser(lambda x, t: x[:, :, 1:], piadm.VPSchedule(), 'sample')", "returned shape"),
        ("make = piadm.Denoiser(lambda x, t: x * float('nan'), piadm.VPSchedule(), 'sample')", "must give finite"),
        ("def out_of_memory(x, t):\n    raise MemoryError('no room')\n"
         "make = piadm.Denoiser(out_of_memory, piadm.VPSchedule(), 'sample')", "no room"),
    ],
)  # fmt: skip
def test_a_model_that_does_not_work_is_one_line(
    source: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert own(monkeypatch, tmp_path, source) == 1
    error = capsys.readouterr().err
    assert error.startswith("piadm: error: ") and said in error and error.count("\n") == 1
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(("call", "kept"), [(1, 0), (4, 0), (5, 1), (7, 3)])
def test_ctrl_c_keeps_the_samplers_that_were_timed(
    call: int, kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inner, calls = piadm.sample, count(1)  # four in a turn, and the first turn is not counted

    def impatient(*given: object, **named: object) -> piadm.Solution:
        if next(calls) == call:
            raise KeyboardInterrupt
        return inner(*given, **named)

    monkeypatch.setattr(piadm, "sample", impatient)
    assert run(tmp_path) == 130
    assert "interrupted" in capsys.readouterr().err
    assert (tmp_path / "out.json").exists() == (kept > 0)
    found = figures(tmp_path)["samplers"] if kept else []
    assert [entry["name"] for entry in found] == NAMES[:kept]
