"""Other ways to the same sample, on the same grid and noise: what ``piadm compare`` runs beside ``piadm.sample``.

A rival is written for one sample, as a generator: it yields the states and steps at which it wants the network, is
sent the denoised estimates, and returns its final state.  ``drive`` runs all samples together and counts.
"""

from piadm.rivals.course import Course, Lane, prepare
from piadm.rivals.drive import Outcome, drive
from piadm.rivals.registry import NAMES, RIVALS, chosen
from piadm.rivals.rival import Rival, Setting, Unavailable
from piadm.rivals.study import Result, Run, study

__all__ = [
    "NAMES",
    "RIVALS",
    "Course",
    "Lane",
    "Outcome",
    "Result",
    "Rival",
    "Run",
    "Setting",
    "Unavailable",
    "chosen",
    "drive",
    "prepare",
    "study",
]
