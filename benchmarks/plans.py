"""Plans of ``piadm.plan`` run for real: the divergence of their samples beside the one that was predicted.

    python benchmarks/plans.py [--draws 20000] [--json FILE]

Data are Gaussian of variances 0.05, 0.3, 1 and 3 in equal shares, with at most 64 states at once.  Two estimates are
printed, each with its standard error:

plain    from the variance of the samples alone.  Its error is that of a variance, and grows with the dimension.
control  the same samples beside those that take every step in turn with the same noise.  The law of these is known
         exactly, so that only the difference is left to chance: some ten times less for the SDE and two hundred
         for the ODE at d = 10^3, and more the larger d is.
"""

from __future__ import annotations

import torch
from _common import Row, options, print_table, write_json
from torch import Tensor

import piadm
from piadm import theory
from piadm.models import GaussianDenoiser
from piadm.timing import seconds

OU, KL, LIMIT = piadm.OUSchedule(), 0.1, 64
VARIANCES = [0.05, 0.3, 1.0, 3.0]
EACH = 50  # coordinates of each variance in a sample: independent, so they are draws of it like any others
PART = 200  # samples at a time


def samples(plan: piadm.Plan, iterations: int, first: int) -> Tensor:
    """Squares of the coordinates of ``PART`` samples, ``(4, draws)`` float64."""
    denoiser = GaussianDenoiser(OU, 0.0, torch.tensor(VARIANCES, dtype=torch.float64).repeat_interleave(EACH))
    given = dict(blocks=plan.blocks, iterations=iterations, max_batch=8192, seed=[(0, first + i) for i in range(PART)])
    shape = (PART, 4 * EACH)
    if plan.corrector is None:
        found = piadm.piadm_sde(denoiser, shape, **given)
    else:
        found = piadm.piadm_ode(denoiser, shape, corrector=plan.corrector, **given)
    return found.sample.double().square().view(PART, 4, EACH).transpose(0, 1).flatten(1)


def estimate(spectrum: theory.Spectrum, ratio: Tensor, variance: Tensor) -> tuple[float, float]:
    """Divergence from ratios of variances that are known up to a variance of their own, and its standard error."""
    each = 0.5 * (ratio - 1 - ratio.log()) - variance / 4  # what chance alone adds is taken off
    error = ((ratio - 1).square() / 4 * variance + variance.square() / 8).sqrt()
    return float(spectrum.total(each)), float((spectrum.counts * error).square().sum().sqrt())


def row(dimension: int, method: str, draws: int) -> Row:
    took, plan = seconds(lambda: piadm.plan(dimension, kl=KL, spectrum=VARIANCES, method=method, memory_limit=LIMIT))
    spectrum = theory.Spectrum.repeated(VARIANCES, dimension)
    target = theory.noised(spectrum, OU, plan.early_stop).variance
    squares = torch.cat([samples(plan, plan.iterations, first) for first in range(0, draws // EACH, PART)], dim=1)
    plain = estimate(spectrum, squares.mean(1) / target, squares.var(1) / squares.shape[1] / target.square())
    # As many iterations as the longest block has steps take every step in turn; the corrector's own are few.
    longest = max(plan.blocks.sizes)
    exact = _law(spectrum, plan, longest).variance
    apart = squares[:, : PART * EACH] - samples(plan, longest, 0)
    known = (exact + apart.mean(1)) / target, apart.var(1) / apart.shape[1] / target.square()
    control = estimate(spectrum, *known)
    return {
        "d": dimension, "method": method, "rounds": plan.rounds, "states": plan.states, "predicted": plan.kl,
        "plain": plain[0], "its error": plain[1], "draws": squares.shape[1],
        "control": control[0], "error of it": control[1], "draws of it": apart.shape[1], "seconds to plan": took,
    }  # fmt: skip


def _law(spectrum: theory.Spectrum, plan: piadm.Plan, iterations: int) -> theory.Law:
    if plan.corrector is None:
        return theory.piadm_sde_law(spectrum, plan.blocks, iterations)[-1]
    return theory.piadm_ode_law(spectrum, plan.blocks, iterations, plan.corrector)[-1]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--draws", type=int, default=20_000, help="of each variance (default %(default)s)")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows = [row(dimension, method, given.draws) for dimension in (10**3, 10**4, 10**5) for method in ("sde", "ode")]
    print_table(rows)
    write_json(given.json, given, plans=rows)


if __name__ == "__main__":
    main()
