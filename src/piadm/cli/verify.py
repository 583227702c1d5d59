"""``piadm verify``: whether a folder of samples is complete, and what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from piadm.cli import files, options, progress
from piadm.shards import Shards, opened

EXAMPLES = """[bold]Examples[/bold]

piadm verify many                      a folder that piadm sample --out many has written

piadm verify many --json found.json    what is wrong, as JSON
"""


def verify(
    folder: Annotated[Path, typer.Argument(help="The folder.")],
    json: options.Json = None,
) -> None:
    """Check a folder of samples: every shard there, every checksum right. The exit code is 1 if not."""
    try:
        if json is not None:
            files.check_writable("--json", json, ".json")
        shards = opened(folder)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if run(shards, json):
        raise typer.Exit(1)


def run(shards: Shards, path: Path | None) -> list[str]:
    """Write, print and return what is wrong; the file first, since a pipe may be closed."""
    with progress.bar("verify") as update:
        found = shards.verify(lambda shard: update((shard + 1) / shards.count, f"{shard + 1} of {shards.count} shards"))
    if path is not None:
        files.write_json(path, {"samples": shards.num, "shards": shards.count, "wrong": found})
    screen = progress.console()
    for line in found:
        screen.print(line, soft_wrap=True, markup=False)
    if not found:
        words = f"complete: {shards.num} samples in {shards.count} shards, every checksum right"
        screen.print(words, soft_wrap=True, markup=False)
    return found
