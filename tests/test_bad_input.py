"""Bad input is refused at once, before any network call, in one line: the argument, what is accepted, what was got."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import piadm
from piadm.models import GaussianDenoiser, GaussianNetwork, MixtureDenoiser, MixtureNetwork
from piadm.workers.base import SWITCHES

Call, Kind = Callable[[], object], type[Exception] | tuple[type[Exception], ...]
Refused = tuple[str, Any, Kind, str, str]  # argument, value, error, what is accepted, what was got

NAN, INF = math.nan, math.inf
SHAPE, STEPS = (2, 3), 1000
AT_ONCE = 1.0  # seconds of processor time: a check takes milliseconds, a first call into a library some tenths
LONGEST = 300  # characters of a message: a few lines of a terminal


def untouchable(x: Tensor, t: Tensor, **condition: object) -> Tensor:
    pytest.fail("the network was called")


def zeros(x: Tensor, t: Tensor, **condition: object) -> Tensor:
    return torch.zeros_like(x)


class Slopes:
    """A linearization that answers with whatever it is given."""

    def __init__(self, answer: object) -> None:
        self.answer = answer

    def slopes(self, schedule: object, steps: object) -> object:
        return self.answer


class Steps(Slopes):
    """An integrator that answers with whatever it is given."""

    def steps(self, schedule: object, grid: object) -> object:
        return self.answer


def affine(response: float, components: int = 1) -> piadm.AffineSteps:
    size, times = (4, components), torch.linspace(1, 0.1, 4)
    return piadm.AffineSteps(times, torch.ones(*size, components), torch.full(size, response), torch.ones(*size, 1))


VP, TABLE = piadm.VPSchedule(), piadm.DiscreteSchedule.ddpm()
DENOISER, WORKING = (piadm.Denoiser(network, VP, "epsilon") for network in (untouchable, zeros))
GUIDED = piadm.Denoiser(piadm.GuidedNetwork(untouchable, 2.0, {"y": 0}), VP, "epsilon")
BLOCKS = piadm.Blocks.paper(3.0, 0.5, 1.0, 0.5)
CORRECTOR = piadm.Corrector(duration=0.1, length=0.1, step=0.05, iterations=2)
GOOD: dict[str, dict[str, Any]] = {
    "sample": {"steps": STEPS, "nodes": "all"},
    "sample_sequential": {"steps": STEPS},
    "piadm_sde": {"blocks": BLOCKS, "iterations": 2},
    "piadm_ode": {"blocks": BLOCKS, "iterations": 2, "corrector": None},
}


def run(sampler: str, **changes: object) -> piadm.Solution:
    """A sampler with good arguments but for the changes, and a network that must not be called."""
    arguments: dict[str, Any] = {"denoiser": DENOISER, "shape": SHAPE, **GOOD[sampler], **changes}
    return getattr(piadm, sampler)(arguments.pop("denoiser"), arguments.pop("shape"), **arguments)


def one_line(error: BaseException, argument: str) -> str:
    """The message, once it is known to be short, of one line and about the argument."""
    message = str(error)
    assert len(message.splitlines()) == 1 and len(message) < LONGEST, f"{len(message)} characters: {message[:900]}"
    assert re.search(rf"\b({argument})\b", message), message
    return message


def assert_refused(call: Call, argument: str, error: Kind, accepted: str, got: str) -> None:
    began = time.process_time()
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    assert time.process_time() - began < AT_ONCE
    assert isinstance(caught.value, error), f"{caught.type.__name__}: {caught.value}"
    message = one_line(caught.value, argument)
    assert accepted in message and "got " in message and got in message.partition("got ")[2], message


MATRIX = torch.zeros(2, 3)
COUNT, NUMBER = "an integer >= 1", "a finite number > 0"
TUPLE, SEED = "a tuple (B, *sample_shape)", "an int or a sequence"
ARRAY, NODES, ROW = "floating-point tensor or array", "'all', an integer >= 2 or None", "one row per sample, (2, ...)"
EVERYWHERE: list[Refused] = [
    ("denoiser", untouchable, TypeError, "a piadm.Denoiser", "function"),
    ("denoiser", None, TypeError, "a piadm.Denoiser", "NoneType"),
    ("shape", 5, TypeError, TUPLE, "5 of type int"),
    ("shape", "ab", TypeError, TUPLE, "'ab' of type str"),
    ("shape", (3,), ValueError, "(B, *sample_shape)", "(3,)"),
    ("shape", (), ValueError, "(B, *sample_shape)", "()"),
    ("shape", (0, 3), ValueError, COUNT, "0"),
    ("shape", (2, -1), ValueError, COUNT, "-1"),
    ("shape", (2.0, 3), TypeError, COUNT, "2.0 of type float"),
    ("shape", (True, 3), TypeError, COUNT, "True of type bool"),
    ("shape", (2, None), TypeError, COUNT, "None of type NoneType"),
    ("seed", -1, ValueError, "an integer >= 0", "-1"),
    ("seed", 2**64, ValueError, "[0, 2^64)", str(2**64)),
    ("seed", 1.5, TypeError, SEED, "1.5 of type float"),
    ("seed", None, TypeError, SEED, "None"),
    ("seed", "12", TypeError, SEED, "'12' of type str"),
    ("seed", {1, 2}, TypeError, SEED, "set"),
    ("seed", True, TypeError, "an integer >= 0", "True of type bool"),
    ("seed", [0, True], TypeError, "an integer >= 0", "True of type bool"),
    ("seed", torch.zeros(2), TypeError, "an integer >= 0", "0.0 of type float"),
    ("seed", [0, 1, 2], ValueError, "one entry per sample", "3 for 2 samples"),
    ("seed", [(0, 1, 2), 0], ValueError, "an int or a pair", "(0, 1, 2)"),
    ("seed", [(0, 2**32), 0], ValueError, "[0, 2^32)", str(2**32)),
    ("initial", torch.zeros(2, 4), ValueError, "shape (2, 3)", "(2, 4)"),
    ("initial", MATRIX.long(), TypeError, ARRAY, "int64 (2, 3)"),
    ("initial", MATRIX.bool(), TypeError, ARRAY, "bool (2, 3)"),
    ("initial", MATRIX.cfloat(), TypeError, ARRAY, "complex64 (2, 3)"),
    ("initial", MATRIX.tolist(), TypeError, ARRAY, "list"),
    ("initial", 0.0, TypeError, ARRAY, "0.0 of type float"),
    ("initial", MATRIX + NAN, ValueError, "finite", "6 entries that are NaN or infinite"),
    ("condition", [1], TypeError, "a mapping", "list"),
    ("condition", {"y": torch.zeros(3)}, ValueError, ROW, "shape (3,)"),
    ("condition", {"y": torch.tensor(0.0)}, ValueError, ROW, "shape ()"),
    ("max_batch", 0, ValueError, COUNT, "0"),
    ("max_batch", 1.5, TypeError, COUNT, "1.5 of type float"),
    ("max_batch", True, TypeError, COUNT, "True of type bool"),
    ("callback", 5, TypeError, "callable or None", "int"),
    *((name, 1, TypeError, "True or False", "1 of type int") for name in sorted(SWITCHES)),
]
ON_A_GRID: list[Refused] = [
    ("method", "SDE", ValueError, "'sde', 'ode', 'paper-sde', 'paper-ode'", "'SDE'"),
    ("method", 3, TypeError, "'sde', 'ode'", "3 of type int"),
    ("method", None, TypeError, "'sde', 'ode'", "None"),
    ("method", Steps(None), TypeError, "return a piadm.AffineSteps", "None of type NoneType"),
    ("method", Steps(affine(NAN)), ValueError, "return finite b of shape (4, 1)", "4 entries that are NaN"),
    ("method", Steps(affine(0.5, components=2)), ValueError, "return finite a of shape (4, 1, 1)", "shape (4, 2, 2)"),
    ("steps", 0, ValueError, COUNT, "0"),
    ("steps", -4, ValueError, COUNT, "-4"),
    ("steps", 10.0, TypeError, COUNT, "10.0 of type float"),
    ("steps", True, TypeError, COUNT, "True of type bool"),
    ("steps", "10", TypeError, COUNT, "'10' of type str"),
    ("grid", [1.0, 0.5], TypeError, "a piadm.TimeGrid or None", "list"),
    ("grid", piadm.TimeGrid([2.0, 0.5]), ValueError, "[0, 1]", "2"),
    ("grid", piadm.TimeGrid([1.0, -0.1]), ValueError, "[0, 1]", "-0.1"),
    ("noise", torch.zeros(STEPS - 1, 2, 3), ValueError, "shape (1000, 2, 3)", "(999, 2, 3)"),
    ("noise", torch.full((STEPS, 2, 3), NAN), ValueError, "finite", "6000 entries"),
    ("noise", torch.zeros(STEPS, 2, 3).int(), TypeError, ARRAY, "int32"),
    ("noise", "normal", TypeError, ARRAY, "'normal' of type str"),
]
IN_PARALLEL: list[Refused] = [
    *[("tol", bad, ValueError, NUMBER, str(bad)) for bad in (0, -1e-2, NAN, INF)],
    ("tol", "1e-2", TypeError, NUMBER, "'1e-2' of type str"),
    ("tol", None, TypeError, NUMBER, "None"),
    ("tol", True, TypeError, NUMBER, "True of type bool"),
    *[("nodes", bad, ValueError, NODES, repr(bad)) for bad in (0, 1, -3, "some")],
    *[("nodes", bad, TypeError, NODES, repr(bad)) for bad in (2.5, True, [1, 2])],
    *[("window", bad, ValueError, "an integer >= 2", str(bad)) for bad in (0, 1, -5)],
    ("window", 2.5, TypeError, "an integer >= 2", "2.5 of type float"),
    ("max_rounds", 0, ValueError, COUNT, "0"),
    ("max_rounds", 1.5, TypeError, COUNT, "1.5 of type float"),
    ("linearization", "newton", ValueError, "'gaussian', 'score', 'identity', 'data'", "'newton'"),
    ("linearization", 3, TypeError, "'gaussian', 'score'", "3 of type int"),
    ("linearization", object(), TypeError, "'gaussian', 'score'", "object"),
]
OF_THE_PAPER: list[Refused] = [
    ("blocks", None, TypeError, "a piadm.Blocks", "NoneType"),
    ("blocks", [[1.0, 0.5]], TypeError, "a piadm.Blocks", "list"),
    ("iterations", 0, ValueError, COUNT, "0"),
    ("iterations", 1.5, TypeError, COUNT, "1.5 of type float"),
    ("iterations", True, TypeError, COUNT, "True of type bool"),
    ("noise", torch.zeros(1, 2, 3), ValueError, "must", "(1, 2, 3)"),
]


def cases() -> Iterator[Any]:
    tables = [EVERYWHERE + ON_A_GRID + IN_PARALLEL, EVERYWHERE + ON_A_GRID, EVERYWHERE + OF_THE_PAPER]
    corrector = ("corrector", 5, TypeError, "a piadm.Corrector or None", "int")
    for sampler, table in zip(GOOD, [*tables, [*EVERYWHERE, *OF_THE_PAPER[:-1], corrector]], strict=True):
        for i, case in enumerate(table):
            yield pytest.param(sampler, *case, id=f"{sampler}-{case[0]}-{i}")


@pytest.mark.parametrize(("sampler", "argument", "value", "error", "accepted", "got"), list(cases()))
def test_a_sampler_refuses(sampler: str, argument: str, value: object, error: Kind, accepted: str, got: str) -> None:
    assert_refused(lambda: run(sampler, **{argument: value}), argument, error, accepted, got)


GAUSS, MIX = GaussianNetwork(VP, torch.zeros(3)), MixtureNetwork(VP, torch.zeros(2, 3), 1.0)
PICK = "'epsilon', 'score', 'sample', 'v', 'velocity'"
CALLS: list[tuple[str, Call, Kind, str, str]] = [
    ("max_batch", lambda: run("sample", denoiser=GUIDED, max_batch=1), ValueError, "an integer >= 2", "1"),
    ("noise", lambda: run("piadm_ode", noise=torch.zeros(1, 2, 3)), ValueError, "None", "an array"),
    ("noise", lambda: run("piadm_ode", corrector=CORRECTOR, noise=MATRIX), ValueError, "(15, 2, 3)", "(2, 3)"),
    ("OU times", lambda: run("piadm_sde", blocks=piadm.Blocks([[30.0, 1.0]])), ValueError, "cover", "VPSchedule"),
    ("times", lambda: piadm.TimeGrid([0.5, 1.0]), ValueError, "strictly decreasing", "1.0 at index 1 after 0.5"),
    ("times", lambda: piadm.TimeGrid([1.0, 1.0]), ValueError, "strictly decreasing", "1.0 at index 1"),
    ("times", lambda: piadm.TimeGrid([1.0]), ValueError, "at least 2", "shape (1,)"),
    ("times", lambda: piadm.TimeGrid([[1.0, 0.5]]), ValueError, "one-dimensional", "shape (1, 2)"),
    ("times", lambda: piadm.TimeGrid([1.0, NAN]), ValueError, "finite", "times[1] = nan"),
    ("times", lambda: piadm.TimeGrid("ab"), TypeError, "real numbers", "'ab' of type str"),
    ("times", lambda: piadm.TimeGrid(torch.ones(2).cfloat()), TypeError, "real numbers", "complex64"),
    ("steps", lambda: piadm.TimeGrid.ddpm(TABLE, 1001), ValueError, "1 to 1000", "1001"),
    ("schedule", lambda: piadm.TimeGrid.ddpm(VP, 3), TypeError, "a DiscreteSchedule", "VPSchedule"),
    ("schedule", lambda: piadm.TimeGrid.uniform(5, 3), TypeError, "a NoiseSchedule", "5 of type int"),
    ("start", lambda: piadm.TimeGrid.uniform(VP, 3, 2.0), ValueError, "at most 1", "2.0"),
    ("end", lambda: piadm.TimeGrid.log_snr(VP, 3, 0.5, 0.7), ValueError, "less than start = 0.5", "0.7"),
    ("horizon", lambda: piadm.Blocks.paper(3, 3, 1, 0.5), ValueError, "> 3", "3"),
    ("early_stop", lambda: piadm.Blocks.paper(3, 0, 1, 0.5), ValueError, NUMBER, "0"),
    ("length", lambda: piadm.Blocks.paper(3, 0.5, NAN, 0.5), ValueError, NUMBER, "nan"),
    ("step", lambda: piadm.Blocks.paper(3, 0.5, 1, 0), ValueError, NUMBER, "0"),
    ("step", lambda: piadm.Blocks.paper(3, 0.5, 1, 1e-12), ValueError, "at least", "1e-12"),
    ("times", lambda: piadm.Blocks([[1.0, 0.5], [0.4, 0.1]]), ValueError, "start where times[0] ends, at 0.5", "0.4"),
    ("times", lambda: piadm.Blocks([]), ValueError, "at least one block", "none"),
    ("duration", lambda: piadm.Corrector(0, 0.1, 0.1, 1), ValueError, NUMBER, "0"),
    ("length", lambda: piadm.Corrector(1, -0.1, 0.1, 1), ValueError, NUMBER, "-0.1"),
    ("step", lambda: piadm.Corrector(1, 0.1, NAN, 1), ValueError, NUMBER, "nan"),
    ("iterations", lambda: piadm.Corrector(1, 0.1, 0.1, 1.5), TypeError, COUNT, "1.5 of type float"),
    ("friction", lambda: piadm.Corrector(1, 0.1, 0.1, 1, 0.0), ValueError, NUMBER, "0.0"),
    ("network", lambda: piadm.Denoiser(5, VP, "v"), TypeError, "callable as network(x, t", "int"),
    ("schedule", lambda: piadm.Denoiser(zeros, piadm.VPSchedule, "v"), TypeError, "a piadm.NoiseSchedule", "ABCMeta"),
    ("prediction", lambda: piadm.Denoiser(zeros, VP, "eps"), ValueError, PICK, "'eps'"),
    ("prediction", lambda: piadm.Denoiser(zeros, VP, None), TypeError, PICK, "None"),
    ("data_mean", lambda: piadm.Denoiser(zeros, VP, "v", NAN), ValueError, "a finite number", "nan"),
    ("data_variance", lambda: piadm.Denoiser(zeros, VP, "v", 0.0, 0.0), ValueError, NUMBER, "0.0"),
    ("data_variance", lambda: piadm.Denoiser(zeros, VP, "v", 0.0, 1e300), ValueError, NUMBER, "1e+300"),
    ("network", lambda: piadm.GuidedNetwork("net", 1.0, {}), TypeError, "callable as network(x, t", "str"),
    ("scale", lambda: piadm.GuidedNetwork(zeros, NAN, {}), ValueError, "a finite number", "nan"),
    ("null", lambda: piadm.GuidedNetwork(zeros, 1.0, None), TypeError, "a mapping", "NoneType"),
    ("beta_max", lambda: piadm.VPSchedule(20.0, 0.1), ValueError, ">= 20", "0.1"),
    ("beta_min", lambda: piadm.VPSchedule(-1, 1), ValueError, NUMBER, "-1"),
    ("beta_max", lambda: piadm.VPSchedule(0.1, NAN), ValueError, ">= 0.1", "nan"),
    ("sigma_max", lambda: piadm.VESchedule(1.0, 0.5), ValueError, "> 1", "0.5"),
    ("offset", lambda: piadm.CosineSchedule(1.0), ValueError, ">= 0 and < 1", "1.0"),
    ("alphas_cumprod", lambda: piadm.DiscreteSchedule([0.1, 0.5]), ValueError, "decreasing", "0.5 at index 1"),
    ("alphas_cumprod", lambda: piadm.DiscreteSchedule([1.5, 0.5]), ValueError, "between 0 and 1", "0.5 to 1.5"),
    ("alphas_cumprod", lambda: piadm.DiscreteSchedule([0.5, 0.0]), ValueError, "between 0 and 1", "0.0 to 0.5"),
    ("alphas_cumprod", lambda: piadm.DiscreteSchedule([0.5, NAN]), ValueError, "finite", "alphas_cumprod[1] = nan"),
    ("alphas_cumprod", lambda: piadm.DiscreteSchedule([]), ValueError, "at least 2", "shape (0,)"),
    ("alphas_cumprod", lambda: piadm.DiscreteSchedule([[0.5, 0.4]]), ValueError, "one-dimensional", "shape (1, 2)"),
    ("timesteps", lambda: piadm.DiscreteSchedule.ddpm(1), ValueError, "an integer >= 2", "1"),
    ("t", lambda: VP.alpha(1.5), ValueError, "[0, 1]", "1.5"),
    ("t", lambda: TABLE.sigma(torch.tensor([3.0, 1000.0])), ValueError, "[-1, 999]", "1000.0"),
    ("t", lambda: piadm.VESchedule().log_snr(NAN), ValueError, "[0, inf]", "nan"),
    ("t", lambda: piadm.FlowSchedule().alpha(1j), TypeError, "real numbers", "1j of type complex"),
    ("t", lambda: VP.alpha(torch.ones(1).cfloat()), TypeError, "real numbers", "complex64"),
    ("log_snr", lambda: TABLE.time(-20.0), ValueError, "[-10.1177, inf]", "-20.0"),
    ("name", lambda: piadm.load("mnist"), ValueError, "'fashion'", "'mnist'"),
    ("name", lambda: piadm.load(3), TypeError, "'fashion'", "3 of type int"),
    ("dtype", lambda: piadm.load("fashion", dtype=torch.int32), ValueError, "floating-point", "torch.int32"),
    ("device", lambda: piadm.load("fashion", device="nowhere"), ValueError, "a device of this machine", "'nowhere'"),
    ("mean", lambda: GaussianDenoiser(VP, NAN), ValueError, "finite", "nan"),
    ("covariance", lambda: GaussianDenoiser(VP, 0.0, -1.0), ValueError, "no negative variance", "-1"),
    ("covariance", lambda: GaussianDenoiser(VP, torch.zeros(3), torch.ones(2)), ValueError, "(3, 3)", "shape (2,)"),
    ("means", lambda: MixtureDenoiser(VP, [], 1.0), ValueError, "K >= 1", "(0,)"),
    ("variances", lambda: MixtureDenoiser(VP, MATRIX, -1.0), ValueError, "none negative", "-1.0"),
    ("weights", lambda: MixtureDenoiser(VP, MATRIX, 1.0, [1.0, 0.0]), ValueError, "2 positive numbers", "[1.0, 0.0]"),
    ("x", lambda: GAUSS(torch.zeros(2, 4), torch.zeros(2)), ValueError, "(R, 3)", "(2, 4)"),
    ("t", lambda: MIX(MATRIX, torch.zeros(3)), ValueError, "one per row, (2,)", "shape (3,)"),
]  # fmt: skip


@pytest.mark.parametrize(("argument", "call", "error", "accepted", "got"), CALLS)
def test_a_constructor_or_function_refuses(argument: str, call: Call, error: Kind, accepted: str, got: str) -> None:
    assert_refused(call, argument, error, accepted, got)


@pytest.mark.parametrize("sampler", GOOD)
@pytest.mark.parametrize("condition", [{"x": torch.zeros(2)}, {"t": 1.0}, {3: torch.zeros(2)}])
def test_a_condition_that_cannot_be_a_keyword_of_the_network_is_refused(sampler: str, condition: dict) -> None:
    assert_refused(lambda: run(sampler, condition=condition), "condition", (TypeError, ValueError), "", "")


@pytest.mark.parametrize(
    "slopes",
    [torch.zeros(STEPS - 1).double(), torch.zeros(STEPS, 1).double(), torch.full((STEPS,), NAN).double(), None],
    ids=["too short", "two-dimensional", "NaN", "None"],
)
def test_slopes_that_are_no_finite_number_per_step_are_refused(slopes: object) -> None:
    call = partial(run, "sample", linearization=Slopes(slopes))
    assert_refused(call, "linearization", (TypeError, ValueError), "", "")


@pytest.mark.parametrize(("argument", "kind"), [("method", piadm.DataExponential), ("linearization", piadm.DataFrozen)])
def test_a_class_in_place_of_its_instance_is_refused_by_the_arguments_name(argument: str, kind: type) -> None:
    assert_refused(lambda: run("sample", **{argument: kind}), argument, TypeError, "", kind.__name__)


def test_a_corrector_at_clean_data_is_refused_before_the_network_is_called() -> None:
    call = partial(run, "piadm_ode", blocks=piadm.Blocks([[1.0, 0.5, 0.0]]), corrector=CORRECTOR)
    assert_refused(call, "blocks|corrector", ValueError, "", "0")


@pytest.mark.parametrize(("duration", "length", "step"), [(1.0, 0.1, 1e-300), (1e300, 1e-300, 1.0)])
def test_a_corrector_of_more_steps_than_there_are_integers_is_refused(
    duration: float, length: float, step: float
) -> None:
    def call() -> None:
        run("piadm_ode", corrector=piadm.Corrector(duration, length, step, iterations=1))

    assert_refused(call, "step|length", ValueError, "", "1e-300")
