"""Samples split among ranks: the arguments for some samples, and the solution of all from those of the parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from piadm.conditions import with_rows
from piadm.noise import given_array, seed_keys
from piadm.problem import check_condition, check_shape
from piadm.solution import Solution, Stats


def part_of(arguments: Mapping[str, Any], first: int, last: int) -> dict[str, Any]:
    """The arguments of a sampler for its samples ``first .. last - 1`` alone, whose noise they keep.

    Raises:
        TypeError, ValueError: for arguments that have not one entry per sample.
    """
    shape = check_shape(arguments["shape"])
    given = dict(arguments) | {"shape": (last - first, *shape[1:])}
    seed = given["seed"]
    check_condition(given["condition"], shape[0], torch.device("cpu"))
    seed_keys(seed, shape[0])
    given["seed"] = [(seed, b) for b in range(first, last)] if isinstance(seed, Integral) else seed[first:last]
    given["condition"] = with_rows(given["condition"], lambda rows, name: rows[first:last])
    if given["initial"] is not None:
        given["initial"] = given_array("initial", given["initial"], shape)[first:last]
    if given["noise"] is not None:
        given["noise"] = given_array("noise", given["noise"], (len(given["noise"]), *shape))[:, first:last]
    return given


def merged(parts: Sequence[Solution]) -> Solution:
    """The solution of all samples; counts add up, what went on at the same time counts once."""
    stats = [part.stats for part in parts]
    counts = torch.cat([one.evaluations_per_sample for one in stats])
    kept = [part.states for part in parts if part.states is not None]
    reached = min(map(len, kept), default=0)  # interrupted runs keep fewer
    return Solution(
        sample=torch.cat([part.sample for part in parts]),
        status=tuple(status for part in parts for status in part.status),
        error_estimate=torch.cat([part.error_estimate for part in parts]),
        stats=Stats(
            rounds=max(one.rounds for one in stats),
            evaluations=int(counts.sum()) / len(counts),
            rounds_per_sample=torch.cat([one.rounds_per_sample for one in stats]),
            evaluations_per_sample=counts,
            peak_batch=max(one.peak_batch for one in stats),
            peak_states=max(one.peak_states for one in stats),
            nodes=max((one.nodes for one in stats if one.nodes is not None), default=None),
            window=max((one.window for one in stats if one.window is not None), default=None),
            wall_time=max(one.wall_time for one in stats),
            residuals=_side_by_side([one.residuals for one in stats]),
            draft_rounds=max(one.draft_rounds for one in stats),
            draft_evaluations=sum(one.draft_evaluations * len(one.rounds_per_sample) for one in stats) / len(counts),
        ),
        states=torch.cat([states[:reached] for states in kept], dim=1) if kept else None,
        failures=tuple(failure for part in parts for failure in part.failures),
    )


def _side_by_side(tables: Sequence[Tensor]) -> Tensor:
    """Tables ``(rounds, B)`` beside each other; after its last round a sample's error stays what it was."""
    rounds = max(map(len, tables))
    longer = [
        torch.cat([table, table[-1:].expand(rounds - len(table), -1)]) if len(table) else table.new_zeros(rounds, 0)
        for table in tables
    ]
    return torch.cat(longer, dim=1)
