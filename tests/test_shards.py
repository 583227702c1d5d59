"""Shards of a set of samples: who makes which, and which belong to it."""

from __future__ import annotations

import json
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from piadm.cli import app
from piadm.shards import BrokenShard, Shards, opened


def begun(folder: Path, tol: int) -> Shards:
    """Two shards of a sample each, none of which is there yet."""
    folder.mkdir(exist_ok=True)
    shards = Shards(folder, 2, 1, {"tol": tol})
    shards.begin()
    return shards


def write(shards: Shards, *which: int) -> None:
    """Write some of them; what is in them depends on their numbers alone."""
    for shard in which:
        shards.write(shard, {"sample": torch.full((1, 3), float(shard))})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_every_rank_would_do_every_shard_but_begins_with_its_own(ranks: int, tmp_path: Path) -> None:
    shards = Shards(tmp_path, 19, 2, {})
    orders = [list(shards.order(rank, ranks)) for rank in range(ranks)]
    assert all(sorted(order) == list(range(10)) for order in orders)
    own = [order[: len(range(rank, 10, ranks))] for rank, order in enumerate(orders)]
    assert sorted(shard for part in own for shard in part) == list(range(10))


@pytest.mark.parametrize(
    "entry", [{"format": 9}, {"num": "4"}, {"size": None}, {"settings": 5}, {"shards": 5}, {"shards": [{"file": "a"}]}]
)
def test_an_index_whose_entries_are_of_other_kinds_is_named(
    entry: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Shards(tmp_path, 4, 2, {}).begin()
    index = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(index | entry))
    assert app.main(["verify", str(tmp_path)]) == 2
    assert "must hold a readable index.json: not an index of format 1" in capsys.readouterr().err
    with pytest.raises(ValueError, match="not an index of format 1"):
        Shards(tmp_path, 4, 2, {}).begin()


@pytest.mark.parametrize("name", ["thesis.tex", "shard-00000.safetensors"])  # of which nobody knows the settings
def test_a_folder_of_something_else_is_left_alone(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("x")
    with pytest.raises(ValueError, match=f"must be empty or hold an index.json, but it holds '{name}'"):
        Shards(tmp_path, 4, 2, {}).begin()


@pytest.mark.parametrize("attempt", range(5))
def test_of_processes_that_begin_a_folder_at_once_the_first_has_its_settings(attempt: int, tmp_path: Path) -> None:
    ready, refused = threading.Barrier(8), []

    def begin(tol: int) -> None:
        ready.wait()
        try:
            Shards(tmp_path, 4, 2, {"tol": tol}).begin()
        except ValueError as error:
            refused.append((tol, str(error)))

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(begin, range(8)))
    won = opened(tmp_path).settings["tol"]
    assert sorted(tol for tol, _ in refused) == [tol for tol in range(8) if tol != won]
    assert all(f"was begun with tol = {won}, not {tol}" in said for tol, said in refused)
    assert [path.name for path in tmp_path.iterdir()] == ["index.json"]


def test_a_broken_shard_is_an_error_of_its_own_kind(tmp_path: Path) -> None:
    shards = begun(tmp_path, 1)
    write(shards, 0, 1)
    shards.path(0).write_bytes(b"no")
    for go_on in (shards.begin, shards.finish):
        with pytest.raises(BrokenShard, match="shard-00000.*delete it"):
            go_on()


@pytest.mark.parametrize(
    "about, said",
    [
        ({"shard": None}, "lacks shard in the entry 'piadm' of its metadata"),
        ({"first": None, "count": None}, "lacks first, count in the entry"),
        ({"sha256": None}, "lacks sha256 in the entry"),
        ({"settings": None, "sha256": None}, "lacks sha256 in the entry"),
        (None, "lacks shard, first, count, sha256 in the entry"),
        (5, "lacks shard, first, count, sha256 in the entry"),
    ],
)
def test_a_shard_that_does_not_say_what_it_is_is_named(
    about: object, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = begun(tmp_path, 1)
    write(shards, 0, 1)
    assert shards.finish()
    if isinstance(about, dict):
        with safe_open(shards.path(1), framework="pt") as stored:
            whole = json.loads(stored.metadata()["piadm"])
        about = {name: value for name, value in whole.items() if name not in about}
    metadata = None if about is None else {"piadm": json.dumps(about)}
    save_file(load_file(shards.path(1)), shards.path(1), metadata)
    named = f"shard-00001.safetensors {said}"
    for go_on in (shards.begin, shards.finish):
        with pytest.raises(BrokenShard, match=f"{re.escape(named)}.*; delete it, and the same command makes it again"):
            go_on()
    assert app.main(["verify", str(tmp_path)]) == 1 and named in capsys.readouterr().out


def test_a_shard_without_a_tensor_that_is_read_or_with_one_of_no_rows_is_named(tmp_path: Path) -> None:
    shards = begun(tmp_path, 1)
    write(shards, 0, 1)
    with pytest.raises(BrokenShard, match="shard-00000.safetensors cannot be read: .*status"):
        list(shards.column("status"))
    shards.write(1, {"sample": torch.tensor(1.0)})
    assert "shard-00001.safetensors does not hold 1 samples" in shards.verify()[0]


def test_a_shard_of_a_run_with_other_settings_is_named_until_it_is_made_again(tmp_path: Path) -> None:
    ours, theirs, same = (begun(tmp_path / name, tol) for name, tol in (("ours", 1), ("theirs", 2), ("same", 1)))
    for shards in (ours, theirs, same):
        write(shards, 0, 1)
    before = contents(ours.folder)
    shutil.copy(theirs.path(1), ours.path(1))  # it differs in its digest alone
    named = "shard-00001.safetensors was made with other settings"
    for go_on in (ours.begin, ours.finish):
        with pytest.raises(BrokenShard, match=named):
            go_on()
    assert [named in line for line in ours.verify()] == [True]
    shutil.copy(same.path(1), ours.path(1))
    ours.begin()
    assert contents(ours.folder) == before and ours.finish() and ours.verify() == []


def test_a_shard_that_says_no_settings_belongs_to_the_set_that_lists_it(tmp_path: Path) -> None:
    shards, listed = begun(tmp_path, 1), []
    write(shards, 0, 1)
    for shard in range(2):
        with safe_open(shards.path(shard), framework="pt") as stored:
            about = json.loads(stored.metadata()["piadm"])
        del about["settings"]  # as the first versions wrote it
        save_file(load_file(shards.path(shard)), shards.path(shard), {"piadm": json.dumps(about)})
        listed.append({"file": shards.path(shard).name, "sha256": about["sha256"]})
    with pytest.raises(BrokenShard, match="shard-00000.safetensors was made with other settings, or by an earlier"):
        shards.begin()
    assert len(shards.verify()) == 2
    index = json.loads((tmp_path / "index.json").read_text()) | {"complete": True, "shards": listed}
    (tmp_path / "index.json").write_text(json.dumps(index))
    shards.begin()
    assert shards.finish() and shards.verify() == []


def test_a_shard_under_the_name_of_another_is_named_before_the_set_is_called_complete(tmp_path: Path) -> None:
    shards = begun(tmp_path, tol=1)
    write(shards, *range(shards.count))
    shards.path(1).write_bytes(shards.path(0).read_bytes())
    for check in (shards.begin, shards.finish):
        with pytest.raises(BrokenShard, match="shard-00001.safetensors holds other samples"):
            check()


def test_numbers_that_numpy_lacks_are_written_and_verified(tmp_path: Path) -> None:
    shards = Shards(tmp_path, 2, 2, {})
    shards.begin()
    shards.write(0, {"sample": torch.ones(2, 3, dtype=torch.bfloat16)})
    assert shards.finish() and not shards.verify()
