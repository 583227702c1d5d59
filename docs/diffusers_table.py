"""Run pipelines with schedulers, in parallel and sequentially, and write the table of docs/diffusers.md.

    python docs/diffusers_table.py [--steps 12] [--out docs/diffusers.md]

The pipelines are those of the tests: tiny, with random weights.  Each cell is the number of rounds, of as many network
calls as the sequential pipeline makes; where the unmodified pipeline does not run with a scheduler there is a dash.
The last column is the worst relative RMS difference of the row.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "interop"))

from test_interop_phases import PHASED  # noqa: E402
from test_interop_pipelines import SCHEDULERS, apart, output  # noqa: E402
from tiny import CASES, Case  # noqa: E402

from piadm.interop.diffusers import UnsupportedError, parallelize  # noqa: E402

MARKS = "<!-- table: written by docs/diffusers_table.py -->", "<!-- end of the table -->"
DIFFUSION = (
    "DDPM", "DDIM", "Euler", "Euler ancestral", "Heun", "LMS", "PNDM", "DPM-Solver++ 2", "DPM-Solver++ 2, SDE", "DEIS",
    "UniPC",
)  # fmt: skip
FLOW = ("Flow Euler", "Flow Heun", "Flow UniPC", "Flow DPM-Solver++")


def cell(case: Case, scheduler: Any, steps: int) -> tuple[str, float]:  # noqa: ANN401 - a scheduler
    """Rounds of calls, and the relative difference from the sequential pipeline."""
    pipe = case.build()
    vars(pipe)["scheduler"] = scheduler
    try:
        want = output(pipe, case, steps)
    except Exception:  # whatever the pipeline itself does not do
        return "–", 0.0
    calls = len(scheduler.timesteps)
    fast = parallelize(pipe, tol=1e-3, nodes="all")
    try:
        error = apart(output(fast, case, steps), want)
    except UnsupportedError:
        return "refused", 0.0
    assert fast.last_solution is not None
    status = "" if fast.last_solution.converged else " (not converged)"
    return f"{fast.last_solution.stats.rounds} of {calls}{status}", error


def table(columns: tuple[str, ...], cases: dict[str, Case], steps: int) -> list[str]:
    """A table in Markdown, a row per pipeline."""
    lines = [f"| pipeline | {' | '.join(columns)} | worst difference |", "|---" * (len(columns) + 2) + "|"]
    for name, case in cases.items():
        cells = []
        for column in columns:
            kind, settings, _ = SCHEDULERS[column]
            cells.append(cell(case, kind(**settings), steps))
        worst = max(error for _, error in cells)
        lines.append(f"| {name} | {' | '.join(text for text, _ in cells)} | {worst:.0e} |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    """Run everything and put the tables between the marks of the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "diffusers.md")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    cases = CASES | PHASED
    flows = {name: case for name, case in cases.items() if hasattr(case.build().scheduler, "scale_noise")}
    others = {name: case for name, case in cases.items() if name not in flows}
    lines = [*table(DIFFUSION, others, given.steps), "", *table(FLOW, flows, given.steps)]
    text = given.out.read_text(encoding="utf-8")
    before, after = text.split(MARKS[0])[0], text.split(MARKS[1])[1]
    given.out.write_text(before + "\n".join([MARKS[0], "", *lines, "", MARKS[1]]) + after, encoding="utf-8")


if __name__ == "__main__":
    main()
