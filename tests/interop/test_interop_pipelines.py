"""Parallel pipelines against the unmodified ones: the same output from the same generator."""

from __future__ import annotations

import re
from typing import Any

import diffusers as df
import pytest
import torch
from tiny import CASES, SCALED, Case
from torch import Tensor

from piadm.interop.diffusers import ParallelPipeline, parallelize
from piadm.interop.diffusers.probe import WORKS

STEPS = 12


def output(pipe: Any, case: Case, steps: int = STEPS, **more: Any) -> Tensor:  # noqa: ANN401 - a pipeline
    """What a pipeline makes from seeds of its generator and, for pipelines that draw from it, of the global one."""
    torch.manual_seed(5)
    generator = torch.Generator().manual_seed(6)
    call = dict(case.call, num_inference_steps=steps, output_type=case.output, return_dict=False) | more
    return torch.as_tensor(pipe(generator=generator, **call)[0], device="cpu").float()


def apart(got: Tensor, want: Tensor) -> float:
    """RMS difference relative to the RMS of the result."""
    return float((got - want).square().mean().sqrt() / want.square().mean().sqrt())


def both(pipe: Any, case: Case, **more: Any) -> tuple[ParallelPipeline, float]:  # noqa: ANN401 - a pipeline
    """The pipeline in parallel with every step a node, and how far it is from the sequential one."""
    want = output(pipe, case, **more)
    fast = parallelize(pipe, tol=1e-3, nodes="all")
    return fast, apart(output(fast, case, **more), want)


@pytest.mark.parametrize("name", CASES)
def test_a_pipeline_is_its_sequential_self(name: str) -> None:
    fast, error = both(CASES[name].build(), CASES[name])
    assert fast.last_solution is not None and fast.last_solution.converged
    # The aim; at most 7e-5 was reached.  The networks are random and small, not trained: they may need many rounds.
    assert error <= 1e-3
    assert fast.last_solution.stats.rounds <= STEPS - 1


@pytest.mark.parametrize("name", ["DDIM", "SD, guidance", "SD, ControlNet", "SD3", "PixArt", "LTX-Video"])
def test_the_default_device_makes_no_difference(name: str) -> None:
    fast = parallelize(CASES[name].build(), nodes="all")
    with torch.device("meta"):  # holds no numbers; these pipelines name the devices of their own tensors
        got = output(fast, CASES[name])
    assert torch.equal(got, output(fast, CASES[name]))


SD_CASE, XL_CASE, SD3_CASE = CASES["SD, guidance"], CASES["SDXL"], CASES["SD3"]
FLOW = dict(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
SCHEDULERS: dict[str, tuple[type, dict[str, Any], Case]] = {
    "DDPM": (df.DDPMScheduler, SCALED, SD_CASE),
    "DDPM, no clipping": (df.DDPMScheduler, SCALED | dict(clip_sample=False), SD_CASE),
    "DDPM, thresholding": (df.DDPMScheduler, SCALED | dict(thresholding=True), SD_CASE),
    "DDIM": (df.DDIMScheduler, SCALED | dict(clip_sample=False), SD_CASE),
    "DDIM, clipping": (df.DDIMScheduler, SCALED | dict(prediction_type="v_prediction"), SD_CASE),
    "DDIM, v, zero terminal SNR": (
        df.DDIMScheduler,
        SCALED | dict(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"),
        SD_CASE,
    ),
    "PNDM": (df.PNDMScheduler, SCALED | dict(skip_prk_steps=True), SD_CASE),
    "PNDM, Runge-Kutta start": (df.PNDMScheduler, SCALED, SD_CASE),
    "LMS": (df.LMSDiscreteScheduler, SCALED, SD_CASE),
    "Euler": (df.EulerDiscreteScheduler, SCALED, SD_CASE),
    "Euler, v, Karras": (
        df.EulerDiscreteScheduler, SCALED | dict(prediction_type="v_prediction", use_karras_sigmas=True), SD_CASE,
    ),
    "Euler ancestral": (df.EulerAncestralDiscreteScheduler, SCALED, SD_CASE),
    "Heun": (df.HeunDiscreteScheduler, SCALED, SD_CASE),
    "KDPM2": (df.KDPM2DiscreteScheduler, SCALED, SD_CASE),
    "KDPM2 ancestral": (df.KDPM2AncestralDiscreteScheduler, SCALED, SD_CASE),
    "DPM-Solver++ 1": (df.DPMSolverMultistepScheduler, SCALED | dict(solver_order=1), SD_CASE),
    "DPM-Solver++ 2": (df.DPMSolverMultistepScheduler, SCALED, SD_CASE),
    "DPM-Solver++ 3": (df.DPMSolverMultistepScheduler, SCALED | dict(solver_order=3), SD_CASE),
    "DPM-Solver++ 2, thresholding": (df.DPMSolverMultistepScheduler, SCALED | dict(thresholding=True), SD_CASE),
    "DPM-Solver++ 2, SDE": (df.DPMSolverMultistepScheduler, SCALED | dict(algorithm_type="sde-dpmsolver++"), SD_CASE),
    "DPM-Solver++, single step": (df.DPMSolverSinglestepScheduler, SCALED | dict(lower_order_final=True), SD_CASE),
    "DEIS": (df.DEISMultistepScheduler, SCALED, SD_CASE),
    "UniPC": (df.UniPCMultistepScheduler, SCALED, SD_CASE),
    "UniPC 3": (df.UniPCMultistepScheduler, SCALED | dict(solver_order=3), SD_CASE),
    "SA-Solver": (df.SASolverScheduler, SCALED, SD_CASE),
    "LCM": (df.LCMScheduler, SCALED, SD_CASE),
    "TCD": (df.TCDScheduler, SCALED, SD_CASE),
    "EDM Euler": (df.EDMEulerScheduler, {}, XL_CASE),
    "EDM DPM-Solver++": (df.EDMDPMSolverMultistepScheduler, {}, XL_CASE),
    "Flow Euler": (df.FlowMatchEulerDiscreteScheduler, dict(shift=3.0), SD3_CASE),
    "Flow Heun": (df.FlowMatchHeunDiscreteScheduler, {}, SD3_CASE),
    "Flow UniPC": (df.UniPCMultistepScheduler, FLOW, SD3_CASE),
    "Flow DPM-Solver++": (df.DPMSolverMultistepScheduler, FLOW, SD3_CASE),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_is_its_sequential_self(name: str) -> None:
    kind, settings, case = SCHEDULERS[name]
    pipe = case.build()
    pipe.scheduler = kind(**settings)
    fast, error = both(pipe, case)
    assert fast.last_solution is not None and fast.last_solution.converged
    assert error <= 1e-3
    # The aim again; 3e-4 at most.  Schedulers of second order call the network twice per step.
    pipe.scheduler.set_timesteps(STEPS)
    assert fast.last_solution.stats.rounds <= len(pipe.scheduler.timesteps) - 1


def test_messages_name_all_schedulers_that_work() -> None:
    run = {kind.__name__.removesuffix("Scheduler") for kind, _, _ in SCHEDULERS.values()}
    assert run <= {*re.findall(r"\w+", WORKS)}
