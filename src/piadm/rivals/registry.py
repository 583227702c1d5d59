"""All rivals, in the order of a table."""

from __future__ import annotations

from collections.abc import Iterable

from piadm._checks import choice
from piadm.rivals.few_steps import FEW_STEPS
from piadm.rivals.library import SAMPLE, SEQUENTIAL
from piadm.rivals.multistep import DPM_SOLVER, UNIPC
from piadm.rivals.paradigms import PARADIGMS, PARADIGMS_DIFFUSERS
from piadm.rivals.parataa import PARATAA
from piadm.rivals.picard import PIADM, PICARD
from piadm.rivals.rival import Rival
from piadm.rivals.srds import SRDS

RIVALS: tuple[Rival, ...] = (
    SEQUENTIAL,
    FEW_STEPS,
    DPM_SOLVER,
    UNIPC,
    PARADIGMS,
    PARADIGMS_DIFFUSERS,
    PIADM,
    PICARD,
    PARATAA,
    SRDS,
    SAMPLE,
)

NAMES = tuple(rival.name for rival in RIVALS)


def chosen(names: Iterable[str] | None) -> tuple[Rival, ...]:
    """The rivals of these names in the table's order; None: all.

    Raises:
        TypeError, ValueError: for a name that none has.
    """
    if names is None:
        return RIVALS
    wanted = [choice("only", name, NAMES) for name in names]
    return tuple(rival for rival in RIVALS if rival.name in wanted)
