"""``piadm sample`` into a folder: whatever stops it, the same command ends with the same bytes."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import torch
from _ranks import SERVER
from safetensors.torch import load_file
from torch import Tensor

import piadm
from piadm.cli import app, long_run
from piadm.cli.given import Conditions
from piadm.cli.model import ModelName
from piadm.shards import opened

SCHEDULE = piadm.VPSchedule()
SETTINGS = ["--method", "sde", "--steps", "12", "--tol", "1e-2", "--seed", "5", "--threads", "1"]
SMALL = [*SETTINGS, "--num", "22", "--shard", "4", "--batch", "2"]


def two_point(x: Tensor, t: Tensor) -> Tensor:
    """The exact denoised estimate of pixels that are 0.8 or -0.8."""
    alpha, sigma = (c.to(x.dtype).view(-1, 1, 1, 1) for c in (SCHEDULE.alpha(t), SCHEDULE.sigma(t)))
    return 0.8 * torch.tanh(0.8 * alpha * x / sigma.square())


def serve(pause: float) -> piadm.Denoiser:
    """Put a cheap network in the place of the shipped one, as slow as wanted."""

    def network(x: Tensor, t: Tensor) -> Tensor:
        time.sleep(pause)
        return two_point(x, t)

    denoiser = piadm.Denoiser(network, SCHEDULE, "sample")
    piadm.load = lambda name, device: denoiser
    return denoiser


def command(words: list[str], rank: int, ranks: int, pause: float, file_size: int) -> None:
    """One process of the command, as torchrun starts it, on a disk that takes no larger files."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks))
    serve(pause)
    sys.stderr = open(f"{words[-1]}.err", "w", buffering=1, encoding="utf-8")
    if file_size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    os._exit(app.main(["sample", *words]))


def start(folder: Path, rank: int = 0, ranks: int = 1, pause: float = 0.004, file_size: int = 0) -> ForkServerProcess:
    words = [*SMALL, "--out", str(folder)]
    process = SERVER.Process(target=command, args=(words, rank, ranks, pause, file_size))
    process.start()
    return process


def finish(*processes: ForkServerProcess) -> list[int | None]:
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def until_a_shard(folder: Path, *processes: ForkServerProcess) -> None:
    """Wait for the first shard that one of the running processes writes."""
    deadline = time.monotonic() + 60
    while not folder.exists() or not list(folder.glob("shard-*")):
        assert {process.exitcode for process in processes} == {None}, "ended before it wrote a shard"
        assert time.monotonic() < deadline, "no shard after a minute"
        time.sleep(0.01)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert finish(start(folder, pause=0.0)) == [0]
    return folder


def test_a_shard_holds_the_samples_of_its_numbers(whole: Path) -> None:
    denoiser = piadm.Denoiser(two_point, SCHEDULE, "sample")
    names = sorted(path.name for path in whole.glob("shard-*"))
    assert len(names) == 6 and {path.name for path in whole.iterdir()} == {*names, "index.json"}
    alone = piadm.sample(denoiser, (22, 1, 28, 28), method="sde", steps=12, tol=1e-2, seed=5)
    found = {name: torch.cat([load_file(whole / shard)[name] for shard in names]) for name in ("sample", "status")}
    assert (found["sample"] - alone.sample).abs().max() <= 1e-5  # other batches, other kernels
    assert [long_run.STATUSES[code] for code in found["status"]] == list(alone.status)


def test_twenty_kills_at_random_moments_change_no_bit(whole: Path, tmp_path: Path) -> None:
    folder, chance, kills = tmp_path / "killed", random.Random(0), 0
    for _ in range(100):
        process = start(folder)
        process.join(chance.uniform(0.05, 0.35))  # a run alone takes about two seconds
        if process.exitcode is not None:
            assert process.exitcode == 0
            for path in folder.glob("shard-*"):  # it was done: start again, so that each of the twenty hits a run
                path.unlink()
            (folder / "index.json").unlink()
            continue
        os.kill(process.pid or 0, signal.SIGKILL)
        kills += finish(process) == [-signal.SIGKILL]
        if kills == 20:
            break
    assert kills == 20, "most runs had ended before they were killed"
    assert finish(start(folder)) == [0]
    assert contents(folder) == contents(whole)


def test_the_number_of_ranks_may_change_and_a_dead_one_is_made_up_for(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "ranks"
    three = [start(folder, rank, 3, pause=0.02) for rank in range(3)]
    until_a_shard(folder, *three)
    for process in three:
        process.kill()
    assert finish(*three) == [-signal.SIGKILL] * 3
    assert opened(folder).missing()
    two = [start(folder, rank, 2, pause=0.01) for rank in range(2)]
    two[1].kill()  # the other one does its shards
    assert finish(*two) == [0, -signal.SIGKILL]
    assert contents(folder) == contents(whole)


def test_a_full_disk_leaves_whole_shards_only_and_the_run_goes_on(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "full"
    assert finish(start(folder, file_size=1000)) == [1]  # room for the index, and for no shard
    assert [path.name for path in folder.iterdir()] == ["index.json"]
    error = folder.with_suffix(".err").read_text()
    assert error.startswith("piadm: error: ") and error.count("\n") == 1
    assert "File too large" in error and "shard-00000.safetensors" in error
    assert finish(start(folder, pause=0.0)) == [0]
    assert contents(folder) == contents(whole)


def test_ctrl_c_ends_with_130_and_the_run_goes_on(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "interrupted"
    process = start(folder, pause=0.02)
    until_a_shard(folder, process)
    os.kill(process.pid or 0, signal.SIGINT)
    assert finish(process) == [130]
    assert opened(folder).missing()
    assert finish(start(folder, pause=0.0)) == [0]
    assert contents(folder) == contents(whole)


@pytest.mark.parametrize(
    "words, named",
    [
        (["--tol", "1e-3"], "tol = 0.01, not 0.001"),
        (["--num", "23"], "num = 22, not 23"),
        (["--shard", "5"], "size = 4, not 5"),
        (["--batch", "4"], "batch = 2, not 4"),
        (["--threads", "2"], "threads = 1, not 2"),
    ],
)
def test_a_folder_of_other_settings_is_refused(
    words: list[str],
    named: str,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(piadm, "load", piadm.load)  # put back afterwards
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    serve(0.0)
    before = contents(whole)
    assert app.main(["sample", *SMALL, *words, "--out", str(whole)]) == 1
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1
    assert contents(whole) == before


@pytest.mark.parametrize("words, named", [(["--window", "auto"], "--window"), (["--out", "a/b/many"], "a/b")])
def test_what_cannot_be_repeated_or_written_is_refused(
    words: list[str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert app.main(["sample", "--out", "many", *words]) == 2
    assert named in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "many").write_text("notes")
    assert app.main(["sample", "--out", str(tmp_path / "many")]) == 2
    assert "--out must name a .png file or a folder" in capsys.readouterr().err


def damaged(folder: Path, whole: Path, damage: str) -> None:
    folder.mkdir()
    for name, data in contents(whole).items():
        (folder / name).write_bytes(data)
    second, third = folder / "shard-00001.safetensors", folder / "shard-00002.safetensors"
    data = bytearray(second.read_bytes())
    if damage == "a bit":
        data[-1] ^= 1
    if damage == "half":
        del data[len(data) // 2 :]
    second.write_bytes(third.read_bytes() if damage == "another" else data)
    if damage == "gone":
        second.unlink()
    if damage == "a copy":
        shutil.copy(third, folder / "shard-00001 (copy).safetensors")


@pytest.mark.parametrize(
    "damage, said",
    [
        ("gone", "is missing"),
        ("a bit", "checksum differs"),
        ("half", "cannot be read"),
        ("another", "other samples"),
        ("a copy", "does not belong to these 22 samples; remove it"),
    ],
)
def test_verify_names_the_shard_that_is_wrong(
    damage: str, said: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged(tmp_path / "run", whole, damage)
    assert app.main(["verify", str(tmp_path / "run"), "--json", str(tmp_path / "found.json")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and "shard-00001" in lines[0] and said in lines[0]
    assert json.loads((tmp_path / "found.json").read_text())["wrong"] == lines


def test_verify_is_content_with_a_whole_folder(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["verify", str(whole)]) == 0
    assert capsys.readouterr().out.startswith("complete: 22 samples in 6 shards")


def test_an_index_that_does_not_say_its_threads_is_one_of_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(piadm, "load", None)
    denoiser, folder = serve(0), tmp_path / "run"
    folder.mkdir()
    settings = {"method": "ode", "steps": 12, "tol": 1e-2, "window": None, "max_batch": None}
    layout, model = long_run.Layout(256, 64), ModelName("fashion", None, None)
    begun = long_run.LongRun(folder, 2, 0, layout, model, Conditions(None, 2), None, settings)
    begun.shards(denoiser, torch.get_num_threads()).begin()
    index = json.loads((folder / "index.json").read_text())
    del index["settings"]["threads"]
    (folder / "index.json").write_text(json.dumps(index))
    assert app.main(["sample", "--num", "2", "--steps", "12", "--out", str(folder)]) == 1
    assert "was begun with threads = None, not" in capsys.readouterr().err


def test_verify_refuses_what_is_no_folder_of_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["verify", str(tmp_path)]) == 2
    assert "index.json" in capsys.readouterr().err


def test_the_same_command_twice_at_once_doubles_no_sample_and_changes_no_bit(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "twice"
    assert finish(start(folder), start(folder)) == [0, 0]
    assert contents(folder) == contents(whole)


@pytest.mark.parametrize("told", [{"RANK": "2"}, {"RANK": "4", "WORLD_SIZE": "4"}, {"RANK": ""}, {"WORLD_SIZE": "0"}])
def test_a_place_that_is_none_is_refused_before_shards_are_left_out(
    told: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, number in told.items():
        monkeypatch.setenv(name, number)
    assert app.main(["sample", "--num", "6", "--out", str(tmp_path / "many")]) == 1
    assert "the environment must say 0 <= RANK < WORLD_SIZE" in capsys.readouterr().err
    assert not (tmp_path / "many").exists()
