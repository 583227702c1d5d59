"""What the benchmarks share: options, tables, and a file of figures that is written whole or not at all."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

Row = dict[str, object]


def options(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure to this file")
    return parser


def print_table(rows: Sequence[Mapping[str, object]]) -> None:
    """Print rows of the same keys as aligned columns."""
    cells = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)), flush=True)


def write_json(path: Path | None, options_used: argparse.Namespace, **tables: Sequence[Row]) -> None:
    """Write every figure, with the options and the machine; an existing file is replaced only by a whole one."""
    if path is None:
        return
    machine = {"torch": torch.__version__, "machine": platform.machine(), "cores": os.cpu_count()}
    figures = {"options": vars(options_used), **machine, **tables}
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(figures, indent=2, default=str) + "\n", encoding="utf-8")
    part.replace(path)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
