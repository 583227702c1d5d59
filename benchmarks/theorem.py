"""The theorem, measured: every term of the bound, and the growth with the dimension.

    python benchmarks/theorem.py [--tables terms,growth,...] [--json FILE]

Tables, each about Gaussian data of variances 0.05, 0.3, 1 and 3 in equal shares unless it says otherwise:

terms      exponents of the bound's four terms: of the horizon, the step, the iterations and the score's error, for
           what the theorem bounds (the whole path) and for the law of the samples.
iterations what each Picard iteration takes off, beside the bound's factor e.
growth     fewest rounds with KL <= 0.1 for d = 10^2 ... 10^8, and the fits.
prototype  the rows of the prototype, and the fewest rounds at the same dimensions.
quarter    rounds of the fast engine and of the paper's algorithms at d = 10^6, on three spectra.
mixture    a product of two-mode mixtures: the step's exponent by quadrature, iterations by sampling.
planner    seconds that ``plan`` takes with KL <= 0.1, over both methods, these variances, 0.2 and 1, and bounds alone,
           and limits of memory from none to 100 states.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch
from _common import Row, options, print_table, write_json

import piadm
from piadm import theory
from piadm.theory.families import FastEngine, PaperODE, PaperSDE, Target
from piadm.theory.scaling import searches
from piadm.theory.search import best, candidates, evaluated, shortest_horizon
from piadm.timing import seconds

OU = piadm.OUSchedule()
VARIANCES, STOP, KL = [0.05, 0.3, 1.0, 3.0], 0.01, 0.1
LIMITS = (None, 3000, 1000, 300, 100)
ONE = theory.Spectrum.repeated(VARIANCES, 1)
SHIFTED = theory.Spectrum.repeated(VARIANCES, 1, [1.0] * 4)
SPECTRA = {
    "0.05, 0.3, 1, 3": VARIANCES,
    "0.1 and 1": [0.1, 1.0],
    "power law, 1 to 1/32": theory.Spectrum.power_law(2.0, 24, ratio=32.0).variances.tolist(),
}


def exponent(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Exponent of a power law, and its standard error."""
    fit = theory.power_fit(x, y)
    return fit.coefficients[1], fit.errors[1]


def result(modes: theory.Spectrum, family: PaperSDE | PaperODE, horizon: float, step: float) -> float:
    """Divergence of the settled law per coordinate."""
    target = Target(modes, STOP)
    return float(target.kl(family.settled(target, horizon, math.ceil(horizon), step)))


def path(modes: theory.Spectrum, horizon: float, step: float, bias: float = 0.0) -> tuple[float, float]:
    """Divergence of whole paths per coordinate: at the start and on the way."""
    grid = Target(modes, STOP).blocks(horizon, 1, step).grid(OU)
    parts = theory.path_kl(modes, "paper-sde", grid, error=theory.ScoreError(bias=bias))
    return float(modes.total(parts[0])), float(modes.total(parts[1]))


def biased(family: str, bias: float) -> float:
    """Divergence per coordinate that a biased score adds, after many iterations."""
    target, settings, found = Target(ONE, STOP), (10.0, 10, 0.01), []
    blocks = target.blocks(*settings)
    for error in (theory.ScoreError(bias=bias), None):
        if family == "sde":
            law = theory.piadm_sde_law(ONE, blocks, 20, error=error)[-1]
        else:
            law = theory.piadm_ode_law(ONE, blocks, 20, PaperODE(5).corrector(target, *settings), error=error)[-1]
        found.append(float(target.kl(law)))
    return found[0] - found[1]


def terms() -> list[Row]:
    late, early, steps, biases = (
        [6.0, 8.0, 10.0, 12.0],
        [3.0, 4.0, 5.0, 6.0],
        [0.02, 0.01, 5e-3, 2.5e-3],
        [0.01, 0.02, 0.04],
    )
    decay = [math.exp(-t) for t in late]
    sde, ode = PaperSDE(), PaperODE(1)
    longest = [10.0, 20.0, 30.0, 40.0]
    measured: list[tuple[str, str, str, tuple[float, float]]] = [
        ("horizon, e^-T", "path, data of mean 1", "1", exponent(decay, [path(SHIFTED, t, 0.02)[0] for t in late])),
        ("horizon, e^-T", "path, data of mean 0", "1", exponent(decay, [path(ONE, t, 0.02)[0] for t in late])),
        (
            "horizon, e^-T",
            "samples of the SDE, mean 1",
            "1",
            exponent([math.exp(-t) for t in early], [result(SHIFTED, sde, t, 2e-4) for t in early]),
        ),
        (
            "horizon, e^-T",
            "samples of the ODE, no corrector, mean 1",
            "1",
            exponent([math.exp(-t) for t in early], [plain_ode(SHIFTED, t, 1e-3) for t in early]),
        ),
        ("step, eps", "path", "1", exponent(steps, [path(ONE, 10.0, e)[1] for e in steps])),
        ("step: eps T", "path, in T", "1", exponent(longest, [path(ONE, t, 0.01)[1] for t in longest])),
        ("step, eps", "samples of the SDE", "1", exponent(steps, [result(ONE, sde, 14.0, e) for e in steps])),
        (
            "step, eps",
            "samples of the ODE with corrector",
            "2",
            exponent(steps, [result(ONE, ode, 20.0, e) for e in steps]),
        ),
        (
            "step, eps",
            "samples of the ODE, no corrector",
            "2",
            exponent(steps, [plain_ode(ONE, 20.0, e) for e in steps]),
        ),
        (
            "score, delta",
            "path",
            "2",
            exponent(biases, [path(ONE, 10.0, 0.01, b)[1] - path(ONE, 10.0, 0.01)[1] for b in biases]),
        ),
        ("score, delta", "samples of the SDE", "2", exponent(biases, [biased("sde", b) for b in biases])),
        (
            "score, delta",
            "samples of the ODE with corrector",
            "2",
            exponent(biases, [biased("ode", b) for b in biases]),
        ),
    ]
    return [
        {"term": term, "of": of, "bound": bound, "measured": round(fit[0], 3), "error": round(fit[1], 3)}
        for term, of, bound, fit in measured
    ]


def plain_ode(modes: theory.Spectrum, horizon: float, step: float) -> float:
    """Divergence per coordinate of the probability-flow ODE without its corrector."""
    target = Target(modes, STOP)
    return float(target.kl(theory.sequential_ode_law(modes, target.blocks(horizon, 1, step), None)))


def iterations() -> list[Row]:
    """What Picard iterations leave against the law that they settle to, and the factor from one to the next."""
    rows: list[Row] = []
    for length in (0.5, 1.0, 2.0):
        target = Target(ONE, STOP)
        blocks = target.blocks(8.0, math.ceil(8.0 / length), 0.01)
        law = theory.piadm_sde_law(ONE, blocks, 40)
        left = ONE.total(theory.kl(law, law[-1]))
        shown = range(3, 16, 2)
        row: Row = {"block": length}
        for k in shown:
            row[f"K={k}"] = f"{float(left[k - 1]):.1e}"
        first, last = (float(left[k - 1]) for k in (shown[0], shown[-1]))
        row["mean factor"] = math.exp(math.log(first / last) / (shown[-1] - shown[0]))
        row["bound's"] = math.e
        rows.append(row)
    return rows


def growth() -> list[Row]:
    dimensions = [round(10 ** (k / 2)) for k in range(4, 17)]
    elapsed, curves = seconds(lambda: theory.scaling(VARIANCES, dimensions, kl=KL))
    print(f"13 dimensions, {len(curves)} samplers: {elapsed:.0f} s")
    rows: list[Row] = []
    for curve in curves:
        power, fit = curve.power(), curve.polynomial()
        d, rounds = curve.numbers()
        logged = exponent(d, [y / math.log(x / KL) for x, y in zip(d, rounds, strict=True)])
        whole = theory.log_polynomial_fit(d, [float(point.found.rounds) for point in curve.points])
        parallel = not curve.name.startswith("sequential")
        rows.append({
            "sampler": curve.name,
            **{f"1e{k}": curve.points[2 * (k - 2)].found.rounds for k in (2, 4, 6, 8)},
            "power": f"{power.coefficients[1]:.3f}+-{power.errors[1]:.3f}",
            "over ln d": None if parallel else f"{logged[0]:.3f}+-{logged[1]:.3f}",
            "power's R2": round(power.r_squared, 4),
            "quadratic's R2": round(fit.r_squared, 4) if parallel else None,
            "of whole rounds": round(whole.r_squared, 4) if parallel else None,
            "end exponent": round(curve.end_exponent(), 3) if parallel else None,
            "errors to a + b d^0.1": round(curve.against_power(0.1), 1) if parallel else None,
            "states, 1e8": curve.points[-1].states,
            "exact": all(point.found.exact for point in curve.points),
        })  # fmt: skip
    return rows


def prototype() -> list[Row]:
    rows: list[Row] = []
    for dimension, count, inner, step, rounds in (
        (10**2, 9, 8, 0.1, 72),
        (10**4, 14, 12, 0.01, 168),
        (10**6, 18, 13, 2e-3, 240),
    ):
        target = Target(theory.Spectrum.repeated(VARIANCES, dimension), STOP)
        horizon = math.log(10 * dimension) + 1.5
        law = theory.piadm_sde_law(target.modes, target.blocks(horizon, count, step), inner)[-1]
        row: Row = {"d": dimension, "prototype": rounds, "its KL": float(target.kl(law))}
        allowed = min(KL, float(target.kl(law)))
        for curve in theory.scaling(VARIANCES, [dimension], kl=allowed, names=["piadm-sde-blocks", "piadm-sde"]):
            row |= {curve.name: curve.points[0].found.rounds, f"{curve.name} KL": curve.points[0].found.kl}
        rows.append(row)
    return rows


def quarter() -> list[Row]:
    rows: list[Row] = []
    for name, values in SPECTRA.items():
        row: Row = {"spectrum": name}
        chosen = [name for name in searches() if not name.startswith("sequential")]
        for curve in theory.scaling(values, [10**6], kl=KL, names=chosen):
            row[curve.name] = curve.points[0].found.rounds if curve.points else None
        row["engine-ode-secant, told the geometric mean"] = told_geometric_mean(values)
        rounds = {key: value for key, value in row.items() if isinstance(value, int)}
        best = min(value for key, value in rounds.items() if key.startswith("engine"))
        row |= {
            "best engine / theorem's blocks": best / min(rounds["piadm-sde-blocks"], rounds["piadm-ode-blocks"]),
            "best engine / any blocks, SDE": best / rounds["piadm-sde"],
        }
        rows.append(row)
    return [{"": key, **{str(row["spectrum"]): row[key] for row in rows}} for key in list(rows[0])[1:]]


def told_geometric_mean(values: Sequence[float]) -> int:
    """Rounds at d = 10^6 of an engine that is told another single variance than the average."""
    target, told = Target(theory.Spectrum.repeated(values, 10**6), STOP), torch.tensor(values).log().mean().exp()
    family = FastEngine("ode", "secant", float(told))
    first = shortest_horizon(family, target, KL, 0.25)
    found = best(candidates(family, target, KL, [first + 0.25 * i for i in range(5)], lambda _: [1], 16))
    return evaluated(family, target, found, KL).rounds


def mixture() -> list[Row]:
    line, rows = theory.MixtureProduct([-1.0, 1.5], 0.15, [0.3, 0.7], 1), []
    steps, found = [0.2, 0.1, 0.05], []
    for step in steps:
        times = piadm.Blocks.paper(8.0, 0.01, 1.0, step).grid(OU).times
        grid = piadm.TimeGrid(times[times >= 0.02])  # without the last step, which is cut to fit
        found.append(line.sequential_kl("paper-sde", grid))
        rows.append({"": f"sequential, eps = {step}", "KL": found[-1], "error": None})
    fit = exponent(steps, found)
    rows.append({"": "exponent of eps", "KL": fit[0], "error": fit[1]})
    blocks = piadm.Blocks.paper(8.0, 0.02, 1.0, 0.1)
    for count in (2, 4, 6, 8):
        value, error = line.parallel_kl(blocks, count, samples=100_000)
        rows.append({"": f"parallel, eps = 0.1, K = {count}", "KL": value, "error": error})
    return rows


def planner() -> list[Row]:
    piadm.plan(100, kl=KL)  # the first call of all pays for what is imported and set up
    return [planned(10**power) for power in range(2, 9)]


def planned(dimension: int) -> Row:
    found = []
    for method, spectrum, limit in itertools.product(("sde", "ode"), (None, [0.2, 1.0], VARIANCES), LIMITS):
        took, plan = seconds(partial(asked, dimension, method, spectrum, limit))
        found.append((took, plan is None, f"{method}, {spectrum or 'bounds'}, {limit or 'no'} states"))
    took, _, request = max(found)
    middle, refused = statistics.median(one[0] for one in found), sum(one[1] for one in found)
    return {
        "d": dimension,
        "requests": len(found),
        "refused": refused,
        "median": middle,
        "worst": took,
        "it is": request,
    }


def asked(dimension: int, method: str, spectrum: Sequence[float] | None, limit: int | None) -> piadm.Plan | None:
    """None: the limit of memory is refused."""
    try:
        return piadm.plan(dimension, kl=KL, method=method, spectrum=spectrum, memory_limit=limit)
    except ValueError:
        return None


TABLES: dict[str, Callable[[], list[Row]]] = {
    "terms": terms,
    "iterations": iterations,
    "growth": growth,
    "prototype": prototype,
    "quarter": quarter,
    "mixture": mixture,
    "planner": planner,
}


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--tables", default=",".join(TABLES), help="which, with commas (default: all)")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    tables: dict[str, list[Row]] = {}
    for name in given.tables.split(","):
        print(f"\n{name}", flush=True)
        tables[name] = TABLES[name]()
        print_table(tables[name])
    write_json(given.json, given, **tables)


if __name__ == "__main__":
    main()
