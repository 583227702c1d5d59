"""Models that come with the package: a trained network and exactly solvable ones."""

from __future__ import annotations

from piadm.models.analytic import GaussianDenoiser, GaussianNetwork, MixtureDenoiser, MixtureNetwork
from piadm.models.lowrank import LowRankMixtureNetwork, fit_draft
from piadm.models.shipped import load, load_folder

__all__ = [
    "GaussianDenoiser",
    "GaussianNetwork",
    "LowRankMixtureNetwork",
    "MixtureDenoiser",
    "MixtureNetwork",
    "fit_draft",
    "load",
    "load_folder",
]
