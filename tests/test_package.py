"""The package as a whole: its public names, what importing it costs, what it asks for, and the size of its files."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import importlib.metadata
import inspect
import math
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import piadm
from piadm import models, theory

ROOT = Path(__file__).parents[1]
PACKAGE = Path(piadm.__file__).parent
KEYWORD = inspect.Parameter.KEYWORD_ONLY


def python(code: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that finds the package where this one did."""
    path = f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r})\n"
    command = [sys.executable, "-c", path + code]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def test_import_adds_little_to_torch(tmp_path: Path) -> None:
    code = """
from time import thread_time
import torch
begin = thread_time()  # not the time that other processes take
import piadm
extras = {"typer", "rich", "matplotlib", "diffusers", "scipy"}
print(thread_time() - begin, sorted(extras & set(sys.modules)))
"""
    # Compiled files are kept, as on a user's machine: without them most of the time is Python's compiler.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(tmp_path)
    seconds = []
    for _ in range(3):
        duration, extras = python(code, environment).stdout.split(" ", 1)
        assert extras.strip() == "[]"
        seconds.append(float(duration))
    assert statistics.median(seconds) < 0.3  # the project's budget; 0.07 s was measured, beside 1 s for torch


def core_files() -> list[Path]:
    extras = {PACKAGE / "cli", PACKAGE / "interop"}
    return [path for path in PACKAGE.rglob("*.py") if not extras & set(path.parents)]


def imported(nodes: list[ast.stmt]) -> Iterator[str]:
    """Top-level names of what these statements import; what stands under TYPE_CHECKING never runs."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "piadm" if node.level else (node.module or "").partition(".")[0]
        elif isinstance(node, (ast.If, ast.Try)):
            skipped = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            yield from imported([] if skipped else node.body)
            handlers = [part for handler in getattr(node, "handlers", []) for part in handler.body]
            yield from imported([*node.orelse, *handlers, *getattr(node, "finalbody", [])])
        elif isinstance(node, ast.ClassDef):
            yield from imported(node.body)


def test_core_imports_only_what_the_package_requires() -> None:
    allowed = sys.stdlib_module_names | {"torch", "numpy", "tqdm", "safetensors", "piadm"}
    found = {path: set(imported(ast.parse(path.read_text(encoding="utf-8")).body)) for path in core_files()}
    assert {path.name: names - allowed for path, names in found.items() if names - allowed} == {}
    assert set().union(*found.values()) >= {"torch", "numpy", "tqdm", "safetensors"}  # nothing required for nothing


def test_required_packages_are_the_four() -> None:
    names = re.findall(r'"([\w-]+)[><=~!]', re.search(r"^dependencies = (.*)$", pyproject(), re.MULTILINE)[1])
    assert sorted(names) == ["numpy", "safetensors", "torch", "tqdm"]


def pyproject() -> str:
    return (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_versions_agree() -> None:
    # By pattern: the parser of the standard library came with Python 3.11 only.
    assert piadm.__version__ == re.search(r'^version = "(.+)"$', pyproject(), re.MULTILINE)[1]
    try:
        assert piadm.__version__ == importlib.metadata.version("piadm")
    except importlib.metadata.PackageNotFoundError:
        assert PACKAGE.is_relative_to(ROOT)  # not installed: run from the source tree


@pytest.mark.parametrize("module", [piadm, models, theory], ids=lambda m: m.__name__)
def test_public_names_exist_and_are_described(module: object) -> None:
    names = module.__all__
    assert names == sorted(set(names))
    for name in names:
        described = getattr(module, name)
        own = vars(described).get("__doc__") if isinstance(described, type) else described.__doc__
        # A dataclass without a docstring gets its signature for one.
        assert own and not own.startswith(f"{name}("), f"{name} has no docstring"
        assert own.splitlines()[0].endswith((".", "::")), f"the first line of {name} is no sentence"
        for member, value in vars(described).items() if isinstance(described, type) else ():
            if callable(value) and not member.startswith("_"):
                assert inspect.getdoc(getattr(described, member)), f"{name}.{member} has no docstring"


def test_every_file_is_short() -> None:
    folders = ("src", "tests", "benchmarks", "training", "examples")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {name: length for name, length in lengths.items() if length > 310} == {}
    assert len(lengths) > 40


def test_settings_and_results_are_frozen() -> None:
    mutable = set()
    for path in core_files():
        name = ".".join(["piadm", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")
        for thing in vars(importlib.import_module(name)).values():
            if isinstance(thing, type) and thing.__module__.startswith("piadm") and dataclasses.is_dataclass(thing):
                mutable |= set() if thing.__dataclass_params__.frozen else {thing.__name__}
    # These are the state of a run, filled in as it goes, and no setting.
    assert mutable == {"Tally", "FixedIterations"}
    for setting in ("Blocks", "Corrector", "Denoiser", "RoundInfo", "Solution", "Stats", "TimeGrid", "VPSchedule"):
        assert getattr(piadm, setting).__dataclass_params__.frozen
    with pytest.raises(dataclasses.FrozenInstanceError):
        piadm.VPSchedule().beta_min = 1.0


def test_types_are_shipped() -> None:
    assert (PACKAGE / "py.typed").is_file()


SHARED = dict(seed=0, initial=None, noise=None, condition=None, max_batch=None, callback=None, progress=None)
LAST = dict(return_states=False, raise_on_failure=False, workers=None)
GRID = dict(method="sde", grid=None, steps=1000)
PARALLEL = dict(tol=1e-2, nodes=None, window=None, linearization=None, max_rounds=None)
NEEDED = inspect.Parameter.empty
BLOCKS = dict(blocks=NEEDED, iterations=NEEDED)
SIGNATURES: dict[str, dict[str, object]] = {
    "sample": GRID | PARALLEL | SHARED | LAST,
    "sample_sequential": GRID | SHARED | LAST,
    "piadm_sde": BLOCKS | SHARED | LAST,
    "piadm_ode": BLOCKS | dict(corrector=NEEDED) | SHARED | LAST,
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_samplers_have_the_agreed_arguments(name: str) -> None:
    parameters = inspect.signature(getattr(piadm, name)).parameters
    first, rest = list(parameters.values())[:2], list(parameters.values())[2:]
    assert [parameter.name for parameter in first] == ["denoiser", "shape"]
    assert all(parameter.default is NEEDED and parameter.kind is not KEYWORD for parameter in first)
    assert {parameter.name: parameter.default for parameter in rest} == SIGNATURES[name]
    assert {parameter.kind for parameter in rest} == {KEYWORD}


@pytest.mark.parametrize(
    "call, names, defaults",
    [
        (
            piadm.Denoiser,
            ["network", "schedule", "prediction", "data_mean", "data_variance", "draft", "clip"],
            (0.0, 1.0, None, None),
        ),
        (piadm.Blocks.paper, ["horizon", "early_stop", "length", "step"], ()),
        (piadm.Corrector, ["duration", "length", "step", "iterations", "friction"], (2.0,)),
        (piadm.VPSchedule, ["beta_min", "beta_max"], (0.1, 20.0)),
        (piadm.DiscreteSchedule, ["alphas_cumprod"], ()),
        (piadm.OUSchedule, [], ()),
        (piadm.FlowSchedule, [], ()),
        (piadm.TimeGrid, ["times"], ()),
        (piadm.TimeGrid.uniform, ["schedule", "steps", "start", "end"], (None, None)),
        (piadm.TimeGrid.log_snr, ["schedule", "steps", "start", "end"], (None, None)),
        (piadm.TimeGrid.ddpm, ["schedule", "steps"], ()),
    ],
    ids=lambda v: getattr(v, "__qualname__", ""),
)
def test_settings_have_the_agreed_arguments(
    call: Callable[..., object], names: list[str], defaults: tuple[object, ...]
) -> None:
    parameters = inspect.signature(call).parameters
    assert list(parameters) == names
    assert tuple(p.default for p in parameters.values() if p.default is not NEEDED) == defaults


def test_results_have_the_agreed_fields() -> None:
    def fields(kind: type) -> list[str]:
        return [field.name for field in dataclasses.fields(kind)]

    assert fields(piadm.Solution) == ["sample", "status", "error_estimate", "stats", "states", "failures"]
    counts = ["rounds", "evaluations", "rounds_per_sample", "evaluations_per_sample"]
    rest = ["peak_batch", "peak_states", "nodes", "window", "wall_time", "residuals"]
    assert fields(piadm.Stats) == [*counts, *rest, "draft_rounds", "draft_evaluations"]
    assert fields(piadm.RoundInfo) == ["round", "total", "sample", "denoised", "error_estimate", "active_rows"]
    assert [status.name for status in piadm.Status] == ["CONVERGED", "MAX_ROUNDS", "NONFINITE", "INTERRUPTED"]
    assert all(len(status.value.split()) > 4 for status in piadm.Status)  # the value is the message


@pytest.mark.parametrize(
    "missing, code, hint",
    [
        ("diffusers", "import piadm; piadm.load('fashion')", 'pip install "piadm[diffusers]"'),
        ("typer", "from piadm.cli.app import main; sys.exit(main(['sample']))", "pip install 'piadm[cli"),
        ("rich", "from piadm.cli.app import main; sys.exit(main(['sample']))", "pip install 'piadm[cli"),
    ],
    ids=["diffusers", "typer", "rich"],
)
def test_a_missing_extra_is_named_with_its_remedy(missing: str, code: str, hint: str) -> None:
    done = python(f"sys.modules[{missing!r}] = None\n{code}")
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and missing in last and hint in last
    if missing != "diffusers":  # the command line says just this; a library call has a traceback above it
        assert done.stderr.strip() == last and not done.stdout


@pytest.mark.parametrize("sampler", [piadm.sample, piadm.sample_sequential, piadm.piadm_sde, piadm.piadm_ode])
def test_a_warning_points_at_the_line_that_called(sampler: Callable[..., piadm.Solution]) -> None:
    blocks = piadm.Blocks.paper(horizon=4.0, early_stop=0.05, length=1.5, step=0.25)
    settings = dict(blocks=blocks, iterations=2) if "piadm_" in sampler.__name__ else dict(steps=10)
    settings |= dict(corrector=None) if sampler is piadm.piadm_ode else {}
    denoiser = piadm.Denoiser(lambda x, t: x * math.nan, piadm.VPSchedule(), "sample")
    call = functools.partial(sampler, denoiser, (1, 2), **settings)  # adds no frame of its own
    with pytest.warns(RuntimeWarning, match="not finite") as caught:
        eval(compile("call()", "caller.py", "eval"), {"call": call})
    assert caught[0].filename == "caller.py"


def test_scripts_beside_the_package_find_what_they_import_from_it() -> None:
    folders, missing = ("benchmarks", "docs", "examples", "training"), []
    for path in (path for folder in folders for path in (ROOT / folder).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "piadm":
                known, place = importlib.import_module(str(node.module)), Path(*str(node.module).split("."))
                missing += [
                    f"{path.name}: {name.name}" for name in node.names
                    if not hasattr(known, name.name) and not (PACKAGE.parent / place / f"{name.name}.py").exists()
                ]  # fmt: skip
    assert missing == []
