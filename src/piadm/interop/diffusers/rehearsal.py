"""The rehearsal: the pipeline's own loop over all its steps, with stand-ins for its networks.

It runs at the speed of the pipeline's Python code and yields everything that a round will need: the arguments of every
network call, the noise that the scheduler draws, in the sequential order, and what the pipeline does to the state
between two steps.  What cannot be run in parallel shows here, before any round.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from piadm.integrators import Steps
from piadm.interop.diffusers.draws import Draws
from piadm.interop.diffusers.fixed import Fixed
from piadm.interop.diffusers.layout import LARGE, marker, sources
from piadm.interop.diffusers.levels import CallLevels, Estimate, estimate, levels, steps
from piadm.interop.diffusers.nested import copied, leaves
from piadm.interop.diffusers.phases import MOST, Calls, Phase, forms
from piadm.interop.diffusers.probe import RowsError, UnsupportedError, probe, stepper
from piadm.interop.diffusers.proxies import NetworkProxy, given_back
from piadm.interop.diffusers.screen import check_arguments
from piadm.interop.diffusers.standins import StandIns, denoises, kind, replaced, unknown, varied
from piadm.interop.diffusers.watch import Held, Settings, changed, is_number

#: Standard deviations by which values that the pipeline sets may go along with the random state that they replace.
CHANCE = 8


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
        phases: the ways in which the body of the loop runs.
        fixed: coordinates that are not the scheduler's; None: all are.
    """

    initial: Tensor
    sources: Tensor
    noise: Tensor | None
    steps: Steps
    levels: CallLevels
    estimate: Estimate
    scales: Tensor
    phases: list[Phase]
    fixed: Fixed | None


class Rehearsal:
    """Stand-ins for networks and scheduler steps, and a record of what they are given.

    Args:
        scheduler: the pipeline's scheduler, a copy of its own.
        timesteps: the steps, shape ``(J,)``.
        outputs: stand-ins for network outputs, known from earlier runs; added to.
        given: the arguments of the pipeline's call.
        measured: what the pipeline makes of its networks' outputs is going to be measured, and need not be alike.

    Attributes:
        evaluated: step, network and rows of calls that were evaluated, to learn the shape of the output.
        spares: the latest stand-in of each network.
        settings: of the networks, by the place of the call in the step, and name.
        result: what the scheduler's latest step returned.
        made: of every step, where it is going to be measured: the state, the stand-ins, and what was made of them.
    """

    def __init__(
        self, scheduler: Any, timesteps: Tensor, outputs: StandIns, given: Any = (), measured: bool = False  # noqa: ANN401
    ) -> None:
        self.measured, self.made = measured, list[tuple[Tensor, list[Any], Tensor]]()
        self.draws, self.ended = Draws(given), False
        self.scheduler, self.timesteps, self.outputs = scheduler, timesteps, outputs
        self.unused = given_back(scheduler)
        self.generator = torch.Generator().manual_seed(0x5EED)
        self.calls: Calls = []
        self.shown: list[Any] = []  # what stood in for the outputs of these calls
        self.phases: list[Phase] = []
        self.noise: list[Tensor | None] = []
        self.fixed: Fixed | None = None
        self.leaning, self.power = 0.0, 0.0  # of the values that are set towards the state that they replace
        self.scaled: Tensor | None = None
        self.evaluated: list[tuple[int, str, int]] = []
        self.spares: dict[str, Any] = {}
        self.settings: dict[tuple[int, str], Settings] = {}
        self._read([{}] * len(timesteps))  # what is not supported is refused before any network runs

    def network(self, proxy: NetworkProxy, arguments: dict[str, Any]) -> Any:  # noqa: ANN401 - the network's own
        """An output of the right shape; the network itself runs only where that is not known yet."""
        name, target, place = proxy._name, proxy._target, (len(self.calls), proxy._name)
        check_arguments(name, arguments)
        self.calls.append((name, copied(arguments)))
        if place not in self.settings:
            self.settings[place] = Settings(name, target)
        elif found := self.settings[place].change():
            raise UnsupportedError(f"the pipeline changes {found} between steps: the network is another one then")
        key = kind(name, arguments)
        spare = self.outputs.find(target, key)
        if spare is None:
            output = proxy.run(arguments)
            spare = self.outputs.keep(target, key, output)
            rows = next(len(leaf) for leaf in leaves(output).values() if isinstance(leaf, Tensor))
            self.evaluated.append((len(self.noise), name, rows))
            # What the network has set itself while it ran says nothing.
            others = {at: settings for at, settings in self.settings.items() if settings.network is not target}
            self.settings = {**others, place: Settings(name, target)}
        self.spares[name] = spare
        self.shown.append(varied(spare, place[0]))
        return copied(self.shown[-1])

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **more: Any) -> Any:  # noqa: ANN401
        """The scheduler's own step, for the noise that it draws; returns a state that will be recognised."""
        number = len(self.noise)
        if number and not self.calls:
            raise UnsupportedError(
                "the pipeline makes several steps of a scheduler per timestep, as those do that sample several states "
                "at once, such as video and sound, or that read an estimate of the data off a step of its own"
            )
        options = self._named(args, more)
        if number == 0:
            self._begin(sample, options)
        else:
            self._compare(sample, options, number)
        self._learn(model_output, number)
        self._step(model_output, timestep, sample, options)
        self.marker = marker(sample, self.generator)
        return replaced(self.result, self.marker.to(self.result[0].dtype))

    def _step(self, output: Tensor, timestep: Any, sample: Tensor, options: dict[str, Any]) -> None:  # noqa: ANN401
        """Let the scheduler step, and keep what it draws."""
        drawn: list[Tensor] = []

        def keeping(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def kept(*given: Any, **more: Any) -> Tensor:  # noqa: ANN401 - randn_tensor's own
                drawn.append(draw(*given, **more))
                return drawn[-1].clone()

            return kept

        self.result = stepper(self.scheduler, keeping)(output, timestep, sample, **options)
        self.noise.append(drawn[0] if drawn else None)
        self.held = Held(self.scheduler, output, sample)
        self.draws.keep()

    def _named(self, args: tuple[Any, ...], more: dict[str, Any]) -> dict[str, Any]:
        """The further arguments of a step, by name."""
        names = list(inspect.signature(self.scheduler.step).parameters)[3 : 3 + len(args)]
        return copied(dict(zip(names, args, strict=True)) | more)  # type: ignore[no-any-return]

    def _read(self, options: Sequence[dict[str, Any]]) -> None:
        """Read the scheduler, as it is with these options of each ``step``."""
        self.probed = probe(self.unused, self.timesteps, options)
        self.levels = levels(self.unused, self.timesteps, self.probed.scales)
        self.estimate = estimate(self.unused, self.timesteps, self.levels, self.probed, options)

    def _begin(self, sample: Tensor, options: dict[str, Any]) -> None:
        """The first step: keep the initial state."""
        self.options = [options]
        self.first = self.state = sample.clone()
        self.sources = torch.arange(len(sample), device="cpu")
        if options.keys() - {"generator", "return_dict"}:
            self._read(self.options * len(self.timesteps))
        if sample is self.scaled and bool((self.probed.scales != 1).any()):
            raise UnsupportedError(
                "the pipeline steps from the scaled state; it needs a scheduler that does not scale, such as DDIM"
            )

    def _tell_apart(self) -> set[str]:
        """Only the network that is called last says something of the state: what others say is for it, and NaN.

        Returns:
            The others, of those that were not known as such.
        """
        names = [name for name, _ in self.calls]
        feeders = {name for name in names if name != names[-1] and denoises(self.spares[name])}
        self.spares.update({name: unknown(self.spares[name]) for name in feeders})
        self.outputs.blot_out(feeders)
        return feeders

    def _compare(self, sample: Tensor, options: dict[str, Any], number: int) -> None:
        """A later step: its state may differ from the first one's only in ways in which rows can differ."""
        if self.held.overwritten:
            raise UnsupportedError("the pipeline writes into a state or model output that its scheduler has kept")
        before, both = self.options[0], options | self.options[0]
        self.options.append(options)
        others = sorted(changed(options, before))
        numbers = all(is_number(both[key]) for key in others)  # whether by the step alone, measuring shows
        if others and not (numbers and self.measured):
            raise (RowsError if numbers else UnsupportedError)(
                f"the pipeline gives the scheduler other arguments at some steps than at others: {', '.join(others)}"
            )
        if number == 1:
            self.sources = sources(sample, self.marker)
        self.state, marker = sample[: self.batch], self.marker[self.sources][: self.batch]
        mask = self.state != marker
        if number == 1 and mask.any():
            self.fixed = Fixed(mask, [])
        if not torch.equal(mask, torch.zeros_like(mask) if self.fixed is None else self.fixed.mask):
            raise UnsupportedError("the pipeline changes other parts of the state after some steps than after others")
        if self.fixed is not None:
            self._set(self.fixed, marker[mask].float())

    def again(self, number: int, sample: Tensor, args: tuple[Any, ...], more: dict[str, Any]) -> None:
        """A step is made once more, the first time from what became of the rehearsal's last state.

        Raises:
            UnsupportedError: if the pipeline has left alone there what it sets after all other steps, or makes the step
                with other numbers.
        """
        if others := changed(self._named(args, more), self.options[number]):
            names = ", ".join(sorted(others))
            raise UnsupportedError(f"the pipeline gives the scheduler numbers that do not go by the step: {names}")
        if self.fixed is not None and not self.ended:
            left = sample[: self.batch] == self.marker[self.sources][: self.batch]
            if bool((left & self.fixed.mask).any()):
                raise UnsupportedError("the pipeline sets parts of the state after the other steps, not after the last")
        self.ended = True
        self.draws.put_back()

    def _set(self, fixed: Fixed, replaced: Tensor) -> None:
        """Keep the values that the pipeline has set, if they do not depend on the state that they replace."""
        values = self.state[fixed.mask].float()
        fixed.values.append(values)
        apart = values - values.mean()
        self.leaning += float((apart * (replaced / replaced.square().mean().sqrt())).sum())
        self.power += float(apart.square().sum())
        large = not bool((values.abs() < LARGE / 4).all())
        if large or self.leaning**2 > CHANCE**2 * self.power:  # the states are random: the sum has variance ``power``
            raise UnsupportedError("the pipeline changes the state between steps by more than setting parts of it")

    def _learn(self, output: Tensor, number: int) -> None:
        """Take in the network calls of a step; only from the second on are all rows of the state known to differ."""
        phase = self._phase(output, number)
        phase.add(number, self.calls, self.state)
        if self.measured:
            self.made.append((self.state, self.shown, output.clone()))
        self.calls, self.shown = [], []
        if number > 0 or len(self.timesteps) == 1:
            phase.learn(self.state, self._denoises)

    def _phase(self, output: Tensor, number: int) -> Phase:
        """The phase of a step, known or new.

        Args:
            output: what the pipeline has made of its networks' stand-ins.
            number: of the step.
        """
        made, names = forms(self.calls), sorted({name for name, _ in self.calls})
        if len(names) > 1 and bool(output.isnan().any()):
            raise UnsupportedError(f"the pipeline combines what {' and '.join(names)} return, which is not supported")
        for phase in self.phases:
            if phase.fits(made, None if self.measured else output):
                return phase
        if len(self.phases) == MOST:
            raise RowsError(
                "guidance changes with the steps or reads the state, or other networks are called: the same network "
                f"outputs were combined in more than {MOST} ways, up to step {number}"
            )
        self.phases.append(Phase(self.calls, self.shown, output.clone(), self._tell_apart()))
        return self.phases[-1]

    def _denoises(self, name: str) -> bool:
        """Whether a network's output is the model output."""
        return denoises(self.spares[name])

    @property
    def batch(self) -> int:
        """Number of samples ``L``: the rows of the scheduler's state that a network reads."""
        return int(self.sources.max()) + 1

    def score(self) -> Score:
        """What was found.

        Raises:
            UnsupportedError: if the loop did not make one step per timestep, with a network.
        """
        if len(self.noise) != len(self.timesteps) or not all(phase.names for phase in self.phases):
            raise UnsupportedError("the pipeline does not call a network and the scheduler once per timestep")
        for phase in self.phases:
            phase.learn(self.first[: self.batch], self._denoises)
            phase.check(self.measured)
        if any(changed(options, self.options[0]) for options in self.options):
            self._read(self.options)
        recurrence, noise = steps(self.probed, self.estimate), None
        if recurrence.normals:
            drawn = next(normals for normals in self.noise if normals is not None)
            kept = [torch.zeros_like(drawn) if normals is None else normals for normals in self.noise]
            noise = torch.stack(kept)[:, : self.batch]
        scales = torch.ones_like(self.probed.scales) if self.scaled is None else self.probed.scales
        return Score(
            self.first[: self.batch], self.sources, noise, recurrence, self.levels, self.estimate, scales, self.phases,
            self.fixed,
        )  # fmt: skip
