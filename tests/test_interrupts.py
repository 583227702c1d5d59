"""Ctrl-C in commands that make many runs."""

from __future__ import annotations

import contextlib
import signal
from functools import partial
from pathlib import Path

import pytest

import piadm
from piadm.cli import app
from piadm.solution import Solution


@pytest.mark.parametrize("words", [["bench", "--repeats", "9"], ["compare", "--only", "sequential,sample"]])
def test_one_that_a_sampler_has_taken_in_ends_the_command(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[tuple[int, ...]] = []

    def deaf(real: partial[Solution], denoiser: piadm.Denoiser, shape: tuple[int, ...], **named: object) -> Solution:
        runs.append(shape)
        with contextlib.suppress(KeyboardInterrupt):
            if len(runs) == 3:
                signal.raise_signal(signal.SIGINT)
        return real(denoiser, shape, **named)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(piadm, "sample", partial(deaf, partial(piadm.sample)))
    before = signal.getsignal(signal.SIGINT)
    assert app.main([*words, "--model", "mixture", "--steps", "20", "--threads", "1"]) == 130
    assert len(runs) == 3
    assert signal.getsignal(signal.SIGINT) is before
