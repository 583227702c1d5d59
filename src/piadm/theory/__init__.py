"""The theorem, measured: exact laws of the samplers' results, their distance from the target, plans and growth.

For Gaussian data every step of every sampler here is linear, mode by mode, and the law of its result is computed
without sampling, from the very coefficients that the sampler runs on.
"""

from piadm.theory.chain import ScoreError
from piadm.theory.engine import engine_law, gaussian_law, secant_law
from piadm.theory.fits import Fit, against_power, last_exponent, log_polynomial_fit, power_fit
from piadm.theory.law import Law, affinity_loss, hellinger_bounds, kl, pinsker, squared_distance
from piadm.theory.laws import piadm_ode_law, piadm_sde_law, sequential_law, sequential_ode_law
from piadm.theory.pathwise import path_kl
from piadm.theory.planner import Plan, plan
from piadm.theory.products import MixtureProduct
from piadm.theory.scaling import Curve, Point, scaling
from piadm.theory.search import Found
from piadm.theory.spectrum import Spectrum, VarianceBounds, noised

__all__ = [
    "Curve",
    "Fit",
    "Found",
    "Law",
    "MixtureProduct",
    "Plan",
    "Point",
    "ScoreError",
    "Spectrum",
    "VarianceBounds",
    "affinity_loss",
    "against_power",
    "engine_law",
    "gaussian_law",
    "hellinger_bounds",
    "kl",
    "last_exponent",
    "log_polynomial_fit",
    "noised",
    "path_kl",
    "piadm_ode_law",
    "piadm_sde_law",
    "pinsker",
    "plan",
    "power_fit",
    "scaling",
    "secant_law",
    "sequential_law",
    "sequential_ode_law",
    "squared_distance",
]
