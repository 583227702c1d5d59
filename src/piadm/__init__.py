"""Parallel-in-time sampling of diffusion and flow models."""

from piadm.compiled import CompiledNetwork
from piadm.corrector import Corrector
from piadm.denoiser import Denoiser, GuidedNetwork
from piadm.grid import Blocks, TimeGrid
from piadm.integrators import AffineSteps, DataExponential, Integrator, ScoreExponential
from piadm.linearization import DataFrozen, DiagonalSecant, Gaussian, Identity, Linearization, ScoreFrozen, Secant
from piadm.models import fit_draft, load
from piadm.moments import measure_moments
from piadm.paper import piadm_ode, piadm_sde
from piadm.samplers import sample
from piadm.schedule import (
    CosineSchedule,
    DiscreteSchedule,
    FlowSchedule,
    NoiseSchedule,
    OUSchedule,
    VESchedule,
    VPSchedule,
)
from piadm.sequential import sample_sequential
from piadm.solution import NetworkError, NotConvergedError, RoundInfo, Solution, Stats, Status
from piadm.theory import Plan, plan
from piadm.workers import Devices, Ranks, Workers

__version__ = "0.1.0"

__all__ = [
    "AffineSteps",
    "Blocks",
    "CompiledNetwork",
    "Corrector",
    "CosineSchedule",
    "DataExponential",
    "DataFrozen",
    "Denoiser",
    "Devices",
    "DiagonalSecant",
    "DiscreteSchedule",
    "FlowSchedule",
    "Gaussian",
    "GuidedNetwork",
    "Identity",
    "Integrator",
    "Linearization",
    "NetworkError",
    "NoiseSchedule",
    "NotConvergedError",
    "OUSchedule",
    "Plan",
    "Ranks",
    "RoundInfo",
    "ScoreExponential",
    "ScoreFrozen",
    "Secant",
    "Solution",
    "Stats",
    "Status",
    "TimeGrid",
    "VESchedule",
    "VPSchedule",
    "Workers",
    "fit_draft",
    "load",
    "measure_moments",
    "piadm_ode",
    "piadm_sde",
    "plan",
    "sample",
    "sample_sequential",
]
