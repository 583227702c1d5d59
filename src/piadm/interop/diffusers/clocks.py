"""The time that a flow network is given and the sign of what it returns: what its own pipeline makes of them.

Schedulers know the time ``num_train_timesteps sigma``.  Most pipelines hand it on and take what the network returns for
``eps - x_0``.  No configuration tells which do not: hence tables, by the names of the networks' classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

#: Pipelines that divide the scheduler's time by 1000.
THOUSANDTHS = {
    "AuraFlowTransformer2DModel", "BriaFibo2Transformer2DModel", "ChromaTransformer2DModel", "Flux2Transformer2DModel",
    "Flux3Transformer2DModel", "FluxTransformer2DModel", "LongCatImageTransformer2DModel",
    "OvisImageTransformer2DModel", "QwenImage21Transformer2DModel", "QwenImageTransformer2DModel",
}  # fmt: skip

#: Pipelines that give the noise level itself, or one less it.
UNIT = {
    "CosmosTransformer3DModel", "Ideogram4Transformer2DModel", "Krea2Transformer2DModel", "LongCatAudioDiTTransformer",
    "Lumina2Transformer2DModel", "LuminaNextDiT2DModel", "NucleusMoEImageTransformer2DModel", "PRXTransformer2DModel",
}  # fmt: skip

#: Pipelines whose networks have noise at time 0 and data at time 1.
TOWARDS_DATA = {"Ideogram4Transformer2DModel", "Lumina2Transformer2DModel", "LuminaNextDiT2DModel"}

#: Pipelines whose networks return ``x_0 - eps``.
NEGATED = TOWARDS_DATA | {"HiDreamImageTransformer2DModel", "NucleusMoEImageTransformer2DModel"}

_UNSHIFTED = "its pipeline gives it a time before the shift that the noise level has undergone"
_SECOND = "it reads a second time, which changes with the steps"
_PER_FRAME = "it reads one time per frame"

#: Networks with a time that does not follow from the noise level alone, or that is of another shape.
REFUSED = {
    "CogView4Transformer2DModel": _UNSHIFTED,
    "GlmImageTransformer2DModel": _UNSHIFTED,
    "AceStepTransformer1DModel": _SECOND,
    "AnyFlowTransformer3DModel": _SECOND,
    "AnyFlowFARTransformer3DModel": _SECOND,
    "SanaWMTransformer3DModel": _PER_FRAME,
}


@dataclass(frozen=True)
class Clock:
    """From a schedule's times ``t`` to a network's, and from its output to the schedule's prediction.

    Attributes:
        scale: time of the network per time of the schedule.
        reverse: whether the network's time is ``scale (1 - t)``, not ``scale t``.
        negate: whether the prediction is the negative of the output.
    """

    scale: float = 1.0
    reverse: bool = False
    negate: bool = False

    def time(self, t: Tensor) -> Tensor:
        """The network's times."""
        return self.scale * (1 - t if self.reverse else t)

    def prediction(self, output: Tensor) -> Tensor:
        """What the output says, in the schedule's sense."""
        return -output if self.negate else output


def flow_clock(network: nn.Module, scheduler: Any) -> Clock:  # noqa: ANN401 - any scheduler
    """The clock of a network under a flow scheduler.

    Raises:
        ValueError: if its own pipeline does something else with it.
    """
    network = getattr(network, "_orig_mod", network)  # within a compiled one
    names = {kind.__name__ for kind in type(network).__mro__}
    for name in sorted(names & REFUSED.keys()):
        raise ValueError(
            f"network must take a time that follows from the noise level; {name} does not: {REFUSED[name]}.  "
            "A module around it may turn the scheduler's time into the network's own"
        )
    config: Any = getattr(network, "config", {})
    if "PRXTransformer2DModel" in names and config.in_channels == 3:  # PRXPixelPipeline
        raise ValueError("network must predict the velocity, got a PRXTransformer2DModel of pixels, which predicts x_0")
    scale = float(scheduler.config.num_train_timesteps)
    if names & THOUSANDTHS:
        scale /= 1000
    elif names & UNIT:
        scale = 1.0
    elif "SanaTransformer2DModel" in names:
        scale *= config.get("timestep_scale", 1.0)
    # Such a scheduler counts the share of the data in place of that of the noise, and its derivative along with it.
    inverted = bool(scheduler.config.get("invert_sigmas"))
    return Clock(scale, bool(names & TOWARDS_DATA) != inverted, bool(names & NEGATED) != inverted)
