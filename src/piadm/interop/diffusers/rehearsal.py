"""The rehearsal: the pipeline's own loop over all its steps, with stand-ins for its networks.

It runs at the speed of the pipeline's Python code and yields everything that a round will need: the arguments of every
network call, the noise that the scheduler draws, in the sequential order, and what the pipeline does to the state
between two steps.  What cannot be run in parallel shows here, before any round.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from piadm.integrators import Steps
from piadm.interop.diffusers.arguments import Slot, copied, leaves, rebuilt, same
from piadm.interop.diffusers.levels import CallLevels, Estimate, estimate, levels, steps
from piadm.interop.diffusers.probe import UnsupportedError, probe, rebound
from piadm.interop.diffusers.proxies import given_back

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

    def put(self, state: Tensor, samples: Tensor, calls: Tensor) -> None:
        """Set them in rows ``(r, *shape)`` of states, in place."""
        for call in sorted(set(calls.tolist()) - {0}):
            at = (calls == call).nonzero().squeeze(1)
            whole = state.new_zeros(self.mask.shape)
            whole[self.mask] = self.values[call - 1].to(state)
            state[at] = torch.where(self.mask[samples[at]], whole[samples[at]], state[at])


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


def replaced(result: Any, state: Tensor) -> Any:  # noqa: ANN401 - a scheduler's output
    """A scheduler's output, tuple or object, with another state; what else it holds is not known then, and NaN."""
    old = result[0]
    return _with_tensors(result, lambda leaf: state if same(leaf, old) else torch.full_like(leaf, torch.nan))


class Rehearsal:
    """Stand-ins for networks and scheduler steps, and a record of what they are given.

    Args:
        scheduler: the pipeline's scheduler, a copy of its own.
        timesteps: the steps, shape ``(J,)``.
        outputs: stand-ins for network outputs, known from earlier runs by name and arguments; added to.

    Attributes:
        evaluated: rows of each network that were evaluated, to learn the shape of its output.
        spares: the latest stand-in of each network.
        result: what the scheduler's latest step returned.
    """

    def __init__(self, scheduler: Any, timesteps: Tensor, outputs: dict[tuple[object, ...], Any]) -> None:  # noqa: ANN401
        self.scheduler, self.timesteps, self.outputs = scheduler, timesteps, outputs
        self.unused = given_back(scheduler)
        self.generator = torch.Generator().manual_seed(0x5EED)
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.before: list[tuple[str, dict[str, Any]]] = []
        self.slots: list[Slot] = []
        self.noise: list[Tensor | None] = []
        self.fixed: Fixed | None = None
        self.scaled: Tensor | None = None
        self.evaluated: dict[str, int] = {}
        self.spares: dict[str, Any] = {}
        self._read({})  # what is not supported is refused before any network runs

    def network(self, name: str, run: Callable[[dict[str, Any]], Any], arguments: dict[str, Any]) -> Any:  # noqa: ANN401
        """An output of the right shape; the network itself runs only where that is not known yet."""
        self.calls.append((name, copied(arguments)))
        key = (name, *((path, _kind(value)) for path, value in leaves(arguments).items()))
        if key not in self.outputs:
            output = run(arguments)
            self.outputs[key] = _stand_in(output)
            rows = next(len(leaf) for leaf in leaves(output).values() if isinstance(leaf, Tensor))
            self.evaluated[name] = self.evaluated.get(name, 0) + rows
        self.spares[name] = self.outputs[key]
        return copied(self.outputs[key])

    def step(self, output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """The scheduler's own step, for the noise that it draws; returns a state that will be recognised."""
        number = len(self.noise)
        names = list(inspect.signature(self.scheduler.step).parameters)[3 : 3 + len(args)]
        options = dict(zip(names, args, strict=True)) | kwargs
        if number == 0:
            self._begin(output, sample, options)
        else:
            self._compare(output, sample, options, number)
        self._learn(number)
        self._step(output, timestep, sample, options)
        steps = torch.randint(STEPS, sample.shape, generator=self.generator)
        signs = torch.randint(2, sample.shape, generator=self.generator) * 2 - 1
        self.marker = (signs * (LARGE + steps * (LARGE / STEPS))).to(sample)
        return replaced(self.result, self.marker.to(self.result[0].dtype))

    def _step(self, output: Tensor, timestep: Any, sample: Tensor, options: dict[str, Any]) -> None:  # noqa: ANN401
        """Let the scheduler step, and keep what it draws."""
        drawn: list[Tensor] = []
        step = type(self.scheduler).step
        draw = inspect.unwrap(step).__globals__.get("randn_tensor")

        def kept(*given: Any, **more: Any) -> Tensor:  # noqa: ANN401 - randn_tensor's own
            drawn.append(draw(*given, **more))
            return drawn[-1]

        self.result = rebound(step, randn_tensor=kept)(self.scheduler, output, timestep, sample, **options)
        self.noise.append(drawn[0] if drawn else None)

    def _read(self, options: dict[str, Any]) -> None:
        """Read the scheduler, as it is with these options of ``step``."""
        self.probed = probe(self.unused, self.timesteps, options)
        self.levels = levels(self.unused, self.timesteps, self.probed.scales)
        self.estimate = estimate(self.unused, self.timesteps, self.levels, self.probed, options)

    def _begin(self, output: Tensor, sample: Tensor, options: dict[str, Any]) -> None:
        """The first step: keep the initial state."""
        self.output, self.options = output, options
        self._tell_apart()
        self.first = self.state = sample
        self.sources = torch.arange(len(sample))
        if options.keys() - {"generator", "return_dict"}:
            self._read(options)
        if sample is self.scaled and bool((self.probed.scales != 1).any()):
            raise UnsupportedError(
                "the pipeline steps from the scaled state; it needs a scheduler that does not scale, such as DDIM"
            )

    def _tell_apart(self) -> None:
        """Only the network that is called last says something of the state: what others say is for it, and NaN."""
        names = [name for name, _ in self.calls]
        unknown = {name for name in names if name != names[-1] and _denoises(self.spares[name])}
        if unknown and len(self.timesteps) == 1:
            raise UnsupportedError(f"what {', '.join(sorted(unknown))} is for does not show in one step; ask for two")
        self.spares.update({name: _unknown(self.spares[name]) for name in unknown})
        self.outputs.update({key: _unknown(value) for key, value in self.outputs.items() if key[0] in unknown})

    def _compare(self, output: Tensor, sample: Tensor, options: dict[str, Any], number: int) -> None:
        """A later step: it may differ from the first one only in ways in which rows can differ."""
        if options.keys() != self.options.keys() or not all(same(options[key], self.options[key]) for key in options):
            raise UnsupportedError("the pipeline gives the scheduler other arguments at some steps than at others")
        near = ROUNDING * float(self.output.abs().max())
        if output.shape != self.output.shape or not torch.allclose(output, self.output, rtol=ROUNDING, atol=near):
            raise UnsupportedError(
                "guidance changes with the steps or reads the state: the same network outputs were combined to "
                f"different model outputs at steps 0 and {number}"
            )
        if number == 1:
            self.sources = _sources(sample, self.marker)
        self.state, marker = sample[: self.batch], self.marker[self.sources][: self.batch]
        mask = self.state != marker
        if number == 1 and mask.any():
            self.fixed = Fixed(mask, [])
        if not torch.equal(mask, torch.zeros_like(mask) if self.fixed is None else self.fixed.mask):
            raise UnsupportedError("the pipeline changes other parts of the state after some steps than after others")
        if self.fixed is not None:
            self.fixed.values.append(self.state[mask].float())
            if not bool((self.fixed.values[-1].abs() < LARGE / 4).all()):
                raise UnsupportedError("the pipeline changes the state between steps by more than setting parts of it")

    def _learn(self, number: int) -> None:
        """Take in the network calls of a step; only from the second on are all rows of the state known to differ."""
        calls, self.calls = self.calls, []
        if number == 0 and len(self.timesteps) > 1:
            self.before = calls
            return
        if not self.slots:
            known = {name: _denoises(self.spares[name]) for name, _ in calls}
            self.slots = [Slot(name, given, self.state, denoises=known[name]) for name, given in calls]
        for step in (self.before, calls) if self.before else (calls,):
            if [name for name, _ in step] != [slot.name for slot in self.slots]:
                raise UnsupportedError("the pipeline calls other networks at some steps than at others")
            for slot, (_, given) in zip(self.slots, step, strict=True):
                slot.learn(given)
        self.before = []

    @property
    def batch(self) -> int:
        """Number of samples ``L``: the rows of the scheduler's state that a network reads."""
        return int(self.sources.max()) + 1

    def score(self) -> Score:
        """What was found.

        Raises:
            UnsupportedError: if the loop did not make one step per timestep, with a network.
        """
        if len(self.noise) != len(self.timesteps) or not self.slots:
            raise UnsupportedError("the pipeline does not call a network and the scheduler once per timestep")
        recurrence, noise = steps(self.probed, self.estimate), None
        if recurrence.normals:
            drawn = next(normals for normals in self.noise if normals is not None)
            kept = [torch.zeros_like(drawn) if normals is None else normals for normals in self.noise]
            noise = torch.stack(kept)[:, : self.batch]
        scales = torch.ones_like(self.probed.scales) if self.scaled is None else self.probed.scales
        return Score(
            self.first[: self.batch], self.sources, noise, recurrence, self.levels, self.estimate, scales, self.slots,
            self.fixed,
        )  # fmt: skip


def _sources(sample: Tensor, marker: Tensor) -> Tensor:
    """Which row of the last step's result each row is: a pipeline may keep copies of its rows.

    Raises:
        UnsupportedError: if the rows are not copies of the first ones, in their order.
    """
    equal = torch.stack([(sample == row).flatten(1).sum(1) for row in marker], 1)
    own = equal.diagonal()
    rows = torch.arange(len(sample))
    sources = torch.where((own == equal.max(1).values).cpu(), rows, equal.argmax(1).cpu())
    batch = int(sources.max()) + 1
    if not torch.equal(sources, rows % batch):
        raise UnsupportedError("the pipeline mixes the rows of its state between two steps")
    return sources


def _stand_in(output: Any) -> Any:  # noqa: ANN401 - a network's output
    """Random numbers for one tensor; several are for another network."""
    tensors = [leaf for leaf in leaves(output).values() if isinstance(leaf, Tensor)]
    if len(tensors) > 1:
        return _unknown(output)
    noise = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(0)).to(tensors[0])
    return _with_tensors(output, lambda leaf: noise)


def _unknown(output: Any) -> Any:  # noqa: ANN401 - a network's output
    """NaN for every tensor: it marks what another network is given."""
    return _with_tensors(output, lambda leaf: torch.full_like(leaf, torch.nan))


def _with_tensors(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:  # noqa: ANN401 - any nesting
    """The same nesting with other tensors."""
    flat = leaves(tree)
    return rebuilt(tree, lambda path: change(flat[path]) if isinstance(flat[path], Tensor) else flat[path])


def _denoises(stand_in: Any) -> bool:  # noqa: ANN401 - a network's output
    """Whether an output is the model output."""
    return not any(isinstance(leaf, Tensor) and bool(leaf.isnan().any()) for leaf in leaves(stand_in).values())


def _kind(value: object) -> object:
    """What the shape of a network's output may depend on."""
    return (value.shape, value.dtype, value.device) if isinstance(value, Tensor) else type(value)
