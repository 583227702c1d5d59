"""What the processes must have alike that share out the rows of a pipeline's rounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import nn

from piadm.interop.diffusers.options import Options
from piadm.interop.diffusers.rehearsal import Score

#: Where what a rehearsal has found differs.
ADVICE = (
    "; every rank must draw the same numbers: give each a generator of the same seed, such as "
    "generator=torch.Generator().manual_seed(0), and torch.manual_seed(0) to pipelines that draw without it; what the "
    "machines compute with other roundings, compute once and hand over"
)


def given(pipe: Any, options: Options, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ANN401
    """What is known before a call: the pipeline, how to sample, and the arguments but for callbacks.

    Args:
        pipe: the pipeline.
        options: how to sample.
        args: positional arguments of the call.
        kwargs: the others.
    """
    config = getattr(pipe.scheduler, "config", {})
    plain = {name: value for name, value in config.items() if not name.startswith("_")}
    found: dict[str, Any] = {"pipe": type(pipe).__name__, "scheduler": [type(pipe.scheduler).__name__, plain]}
    found |= {f"pipe.{name}": part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    found |= {one.name: getattr(options, one.name) for one in fields(options) if one.name != "workers"}
    found |= {f"argument {number}": value for number, value in enumerate(args, start=1)}
    return found | {name: value for name, value in kwargs.items() if not name.startswith("callback")}


def rehearsed(score: Score) -> dict[str, Any]:
    """What a rehearsal has found: all that was drawn or computed before the first round."""
    found: dict[str, Any] = {"the initial latents": score.initial, "the scheduler's noise": score.noise}
    if score.fixed is not None:
        found |= {"which latents the pipeline sets": score.fixed.mask, "what it sets them to": score.fixed.values}
    for phase in score.phases:
        if phase.blend is not None:
            where = f"steps from {phase.steps[0]} on"
            found[f"what its code makes of the networks' outputs ({where})"] = [phase.blend.rest, *phase.blend.factors]
        for number, slot in enumerate(phase.slots):
            where = f"call {number} of steps from {phase.steps[0]} on"
            found |= {
                f"{'.'.join(map(str, path))} of {slot.name} ({where})": values for path, values in slot.values.items()
            }
    return found
