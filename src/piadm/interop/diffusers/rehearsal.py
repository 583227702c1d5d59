"""The rehearsal: the pipeline's own loop over all its steps, with stand-ins for its networks.

It runs at the speed of the pipeline's Python code and yields everything that a round will need: the arguments of every
network call, the noise that the scheduler draws, in the sequential order, and what the pipeline does to the state
between two steps.  What cannot be run in parallel shows here, before any round.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from piadm.interop.diffusers.arguments import Slot, leaves, rebuilt
from piadm.interop.diffusers.levels import CallLevels, Estimate, estimate, levels, steps
from piadm.interop.diffusers.probe import UnsupportedError, probe, rebound
from piadm.integrators import Steps

#: States of the rehearsal lie between this and twice this, in steps that every floating-point type holds: what a
#: pipeline puts in their place is far smaller.
LARGE, STEPS = 8192.0, 128

#: Relative difference of guided outputs that rounding may leave.
ROUNDING = 1e-2


@dataclass(frozen=True)
class Fixed:
    """Coordinates that the pipeline sets itself after every step, as in inpainting.

    Attributes:
        mask: which, shape ``(L, *shape)`` bool.
        values: what they are when the network reads them, at each call from the second on, each ``(count,)``.
    """

    mask: Tensor
    values: list[Tensor]


@dataclass(frozen=True)
class Score:
    """What a rehearsal has found.

    Attributes:
        initial: state at the first call, shape ``(L, *shape)``; ``L`` is the number of samples.
        sources: which sample each of the scheduler's rows is, shape ``(N,)``.
        noise: standard normals of every step, ``(J, L, *shape)``; None: none are taken.
        steps: coefficients of every step.
        levels: noise levels of every call.
        estimate: model output to denoised estimate.
        scales: factor on the state before a network reads it, shape ``(J,)``.
        slots: the network calls of one step, in order.
        fixed: coordinates that are not the scheduler's; None: all are.
        result: what the scheduler's last step returned.
    """

    initial: Tensor
    sources: Tensor
    noise: Tensor | None
    steps: Steps
    levels: CallLevels
    estimate: Estimate
    scales: Tensor
    slots: list[Slot]
    fixed: Fixed | None
    result: Any

    def answer(self, state: Tensor, like: Tensor) -> Any:  # noqa: ANN401 - the scheduler's output
        """The scheduler's output with another state, shape ``(N, *shape)``."""
        return replaced(self.result, state.to(like.device, self.dtype))

    @property
    def dtype(self) -> torch.dtype:
        """Type of the states that the scheduler returns."""
        first = self.result[0]
        return first.dtype  # type: ignore[no-any-return]


def replaced(result: Any, state: Tensor) -> Any:  # noqa: ANN401 - a scheduler's output
    """A scheduler's output, tuple or object, with another state."""
    return (state, *result[1:]) if type(result) is tuple else dataclasses.replace(result, prev_sample=state)


class Rehearsal:
    """Stand-ins for networks and scheduler steps, and a record of what they are given.

    Args:
        scheduler: the pipeline's scheduler, a copy of its own.
        timesteps: the steps, shape ``(J,)``.
        shapes: outputs of the networks by what they were given, known from earlier runs; added to.
    """

    def __init__(self, scheduler: Any, timesteps: Tensor, shapes: dict[object, Any]) -> None:  # noqa: ANN401
        self.scheduler, self.timesteps, self.shapes = scheduler, timesteps, shapes
        self.plain = copy.deepcopy(scheduler)
        self.records: list[list[tuple[str, dict[str, Any]]]] = [[]]
        self.generator = torch.Generator().manual_seed(0x5EED)
        self.noise: list[Tensor | None] = []
        self.fixed: Fixed | None = None
        self.scaled = False
        self.evaluated: dict[str, int] = {}
        self.marker: Tensor | None = None
        self.feeding: set[str] = set()

    # -- what the pipeline calls -------------------------------------------------------------------------------------

    def network(self, name: str, run: Any, arguments: dict[str, Any]) -> Any:  # noqa: ANN401 - a network
        """An output of the right shape; the network itself runs only where that is not known yet."""
        self.records[-1].append((name, dict(arguments)))
        given = leaves(arguments)
        key = (name, *((path, _shape(value)) for path, value in given.items()))
        if key not in self.shapes:
            output = run(arguments)
            tensors = {path: leaf for path, leaf in leaves(output).items() if isinstance(leaf, Tensor)}
            self.evaluated[name] = max(len(leaf) for leaf in tensors.values())
            self.shapes[key] = _stand_in(output, single=len(tensors) == 1)
        if len([leaf for leaf in leaves(self.shapes[key]).values() if isinstance(leaf, Tensor)]) > 1:
            self.feeding.add(name)
        return self.shapes[key]

    def step(self, output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """The scheduler's own step, for the noise that it draws; returns a state that will be recognised."""
        drawn: list[Tensor] = []

        def draw(*given: Any, **options: Any) -> Tensor:  # noqa: ANN401 - randn_tensor's own
            drawn.append(original(*given, **options))
            return drawn[-1]

        original = type(self.scheduler).step.__globals__.get("randn_tensor")
        options = self._options(args, kwargs)
        if len(self.records) == 1:
            self._begin(output, sample, options)
        else:
            self._compare(output, sample, options)
        step = rebound(type(self.scheduler).step, randn_tensor=draw)
        self.result = step(self.scheduler, output, timestep, sample, **options)
        self.noise.append(drawn[0] if drawn else None)
        self.records.append([])
        state = self._fresh_marker(sample)
        return replaced(self.result, state.to(self.result[0].dtype))

    # -- what it means -----------------------------------------------------------------------------------------------

    def _options(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        names = list(_parameters(self.scheduler))[3 : 3 + len(args)]
        return dict(zip(names, args, strict=True)) | dict(kwargs)

    def _fresh_marker(self, sample: Tensor) -> Tensor:
        numbers = torch.randint(STEPS, sample.shape, generator=self.generator)
        signs = torch.randint(2, sample.shape, generator=self.generator) * 2 - 1
        self.marker = (signs * (LARGE + numbers * (LARGE / STEPS))).to(sample)
        return self.marker

    def _begin(self, output: Tensor, sample: Tensor, options: dict[str, Any]) -> None:
        """The first step: read the scheduler, keep the initial state."""
        self.options, self.output, self.first = options, output, sample
        self.probed = probe(self.plain, self.timesteps, options)
        self.levels = levels(self.plain, self.timesteps, self.probed.scales)
        self.estimate = estimate(self.plain, self.timesteps, self.levels, self.probed, options)
        self.sources = torch.arange(len(sample))
        self.sure: tuple[int, Tensor] = (0, sample)

    def _compare(self, output: Tensor, sample: Tensor, options: dict[str, Any]) -> None:
        """A later step: it may differ from the first one only in ways that rows can differ in."""
        marker = self.marker
        assert marker is not None
        j = len(self.records) - 1
        if options.keys() != self.options.keys() or any(not _same(options[key], self.options[key]) for key in options):
            raise UnsupportedError("the pipeline gives the scheduler other arguments at some steps than at others")
        if output.shape != self.output.shape or not torch.allclose(
            output.double(), self.output.double(), rtol=ROUNDING, atol=ROUNDING * float(output.abs().max())
        ):
            raise UnsupportedError(
                "guidance changes with the steps or reads the state (the same network outputs were combined to "
                f"different model outputs at steps 0 and {j})"
            )
        if j == 1:
            self.sources = _sources(sample, marker)
            self.sure = (1, sample[: self.batch])
        self._compare_states(sample[: self.batch], marker[self.sources][: self.batch], j)

    def _compare_states(self, state: Tensor, marker: Tensor, j: int) -> None:
        """Find the coordinates that are not as the last step left them."""
        mask = state != marker
        if j == 1 and mask.any():
            self.fixed = Fixed(mask, [])
        if self.fixed is None and not mask.any():
            return
        same = self.fixed is not None and torch.equal(mask, self.fixed.mask)
        if self.fixed is None or not same or bool((state[mask].abs() >= LARGE / 4).any()):
            raise UnsupportedError("the pipeline changes the state between two steps by more than setting parts of it")
        self.fixed.values.append(state[mask].float())

    @property
    def batch(self) -> int:
        """Number of samples ``L``: the rows of the scheduler that a network reads."""
        return int(self.sources.max()) + 1

    def score(self) -> Score:
        """What was found.

        Raises:
            UnsupportedError: if the steps do not call the same networks, or these do not read the state.
        """
        calls = self.records[: len(self.timesteps)]
        names = [name for name, _ in calls[0]]
        if not names or any([name for name, _ in call] != names for call in calls):
            raise UnsupportedError("the pipeline calls other networks at some steps than at others")
        sure, state = self.sure
        slots = [Slot(name, [call[k][1] for call in calls], state, sure, name not in self.feeding) for k, name in enumerate(names)]
        recurrence, noise = steps(self.probed, self.estimate), None
        if recurrence.normals:
            drawn = next(x for x in self.noise if x is not None)
            noise = torch.stack([torch.zeros_like(drawn) if x is None else x for x in self.noise])[:, : self.batch]
        scales = self.probed.scales if self.scaled else torch.ones_like(self.probed.scales)
        return Score(
            self.first[: self.batch], self.sources, noise, recurrence, self.levels, self.estimate, scales, slots,
            self.fixed, self.result,
        )  # fmt: skip


def _sources(sample: Tensor, marker: Tensor) -> Tensor:
    """Which row of the last step's result each row is: a pipeline may keep copies of its rows.

    Raises:
        UnsupportedError: if the rows are not copies of the first ones, in their order.
    """
    equal = torch.stack([(sample == row).flatten(1).sum(1) for row in marker], 1)
    own = equal.diagonal()
    sources = torch.where(own == equal.max(1).values, torch.arange(len(sample), device=own.device), equal.argmax(1)).cpu()
    batch = int(sources.max()) + 1
    if not torch.equal(sources, torch.arange(len(sample)) % batch):
        raise UnsupportedError("the pipeline mixes the rows of its state between two steps")
    return sources


def _stand_in(output: Any, *, single: bool) -> Any:  # noqa: ANN401 - a network's output
    """Random numbers like one tensor; NaN like several, which are for another network and mark what it is given."""
    flat = leaves(output)
    generator = torch.Generator().manual_seed(0)

    def fresh(path: tuple[Any, ...]) -> Any:  # noqa: ANN401 - any value
        leaf = flat[path]
        if not isinstance(leaf, Tensor):
            return leaf
        return torch.randn(leaf.shape, generator=generator).to(leaf) if single else torch.full_like(leaf, torch.nan)

    return rebuilt(output, fresh)


def _shape(value: object) -> object:
    return (value.shape, value.dtype, value.device) if isinstance(value, Tensor) else type(value)


def _same(one: Any, other: Any) -> bool:  # noqa: ANN401 - any value
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return one is other or (isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other))
    return one is other or bool(one == other)


def _parameters(scheduler: Any) -> Any:  # noqa: ANN401 - any scheduler
    return inspect.signature(scheduler.step).parameters
