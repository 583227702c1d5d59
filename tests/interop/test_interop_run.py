"""What a parallel pipeline does around its rounds: callbacks, interruption, memory, threads, what it refuses."""

from __future__ import annotations

import copy
import gc
import json
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers as df
import pytest
import torch
from tiny import CASES, SCALED, SD, SQUARE, normals, pixels, stable_diffusion
from torch import Tensor, nn

import piadm
from piadm.interop.diffusers import ParallelPipeline, UnsupportedError, parallelize

CALL = dict(SD, num_inference_steps=12, output_type="latent", latents=normals(7, 2, 4, 8, 8))
# float32 roundings of latents of size ten, and the tolerance of the runs below.
CLOSE = 1e-4


@pytest.fixture(scope="module")
def pipe() -> Any:  # noqa: ANN401 - a pipeline
    return stable_diffusion()


@pytest.fixture(scope="module")
def want(pipe: Any) -> Tensor:  # noqa: ANN401 - a pipeline
    return pipe(**CALL).images


def fast(pipe: Any, **options: Any) -> ParallelPipeline:  # noqa: ANN401 - a pipeline
    return parallelize(pipe, **dict(tol=CLOSE, nodes="all") | options)


def apart(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).square().mean().sqrt())


@pytest.fixture
def forward(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Tensor], None]], None]:
    """Lets something happen in the forward pass of every U-Net; it is given the network's input."""
    old = df.UNet2DConditionModel.forward

    def happen(what: Callable[[Tensor], None]) -> None:
        def new(self: nn.Module, sample: Tensor, timestep: Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            what(sample)
            return old(self, sample, timestep, *args, **kwargs)

        new.__wrapped__ = old  # type: ignore[attr-defined]
        monkeypatch.setattr(df.UNet2DConditionModel, "forward", new)

    return happen


def test_one_generator_per_sample(pipe: Any) -> None:  # noqa: ANN401
    def run(which: Any) -> Tensor:  # noqa: ANN401
        seeds = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        return which(**CALL | dict(latents=None, generator=seeds, eta=0.5))[0]

    assert apart(run(fast(pipe)), run(pipe)) <= CLOSE


def test_the_callback_sees_every_round_and_a_preview(pipe: Any, want: Tensor) -> None:  # noqa: ANN401
    parallel, seen = fast(pipe), []

    def callback(stage: Any, number: int, t: Tensor, values: dict[str, Any]) -> dict[str, Any]:  # noqa: ANN401
        seen.append((number, apart(values["latents"], want), parallel.last_round.round))
        return values

    parallel(**CALL, callback_on_step_end=callback)
    rounds = parallel.last_solution.stats.rounds
    # A first use evaluates the network once more, to learn the shape of its output.  Other steps' numbers follow.
    wanted = [(k - 1, k) for k in range(2, rounds + 1)] + [(k, rounds) for k in (0, *range(rounds, 12))]
    assert [(number, told) for number, _, told in seen] == wanted
    assert seen[-1][1] <= CLOSE < seen[0][1]
    parallel(**CALL)
    assert parallel.last_solution.stats.rounds == rounds - 1


@pytest.mark.parametrize("how", ["pipeline", "keyboard"])
def test_an_interrupted_run_returns_what_it_has(pipe: Any, want: Tensor, forward: Any, how: str) -> None:  # noqa: ANN401
    parallel, calls = fast(pipe), []

    def callback(stage: Any, number: int, t: Tensor, values: dict[str, Any]) -> dict[str, Any]:  # noqa: ANN401
        stage._interrupt = how == "pipeline" and number == 4
        return {}

    def press(sample: Tensor) -> None:
        calls.append(len(sample))
        if how == "keyboard" and len(calls) == 5:
            raise KeyboardInterrupt

    forward(press)
    got = parallel(**CALL, callback_on_step_end=callback).images
    assert set(parallel.last_solution.status) == {piadm.Status.INTERRUPTED}
    assert 0 < apart(got, want) < 0.1 * apart(want, torch.zeros_like(want))
    assert not getattr(pipe, "_interrupt", False)


def test_rows_are_halved_when_memory_runs_out(pipe: Any, want: Tensor, forward: Any) -> None:  # noqa: ANN401
    def fill(sample: Tensor) -> None:
        if len(sample) > 10:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    unbounded = fast(pipe)
    unbounded(**CALL)
    forward(fill)
    parallel = fast(pipe)
    assert apart(parallel(**CALL).images, want) <= CLOSE
    assert parallel.last_solution.stats.peak_batch <= 10
    assert parallel.last_solution.stats.rounds == unbounded.last_solution.stats.rounds


def test_max_batch_bounds_the_rows_of_a_call(pipe: Any, want: Tensor, forward: Any) -> None:  # noqa: ANN401
    sizes: list[int] = []
    forward(lambda sample: sizes.append(len(sample)))
    assert apart(fast(pipe, max_batch=8)(**CALL).images, want) <= CLOSE
    assert max(sizes) == 8  # two rows per sample and step: guidance


@pytest.mark.parametrize("window", [4, "auto"])
def test_windows(pipe: Any, want: Tensor, window: int | str) -> None:  # noqa: ANN401
    assert apart(fast(pipe, window=window)(**CALL).images, want) <= CLOSE


def test_the_original_is_the_same_before_during_and_after(pipe: Any, want: Tensor) -> None:  # noqa: ANN401
    before = {name: dict(vars(part)) for name, part in pipe.components.items() if part is not None}
    results: list[Tensor] = []
    threads = [threading.Thread(target=lambda: results.append(fast(pipe)(**CALL).images)) for _ in range(2)]
    for thread in threads:
        thread.start()
    during = copy.copy(pipe)(**CALL).images
    for thread in threads:
        thread.join()
    assert torch.equal(during, want) and torch.equal(pipe(**CALL).images, want)
    assert len(results) == 2 and max(apart(result, want) for result in results) <= CLOSE
    del before["scheduler"]  # its own run has set its timesteps
    assert all(dict(vars(getattr(pipe, name))) == values for name, values in before.items())


def test_an_error_in_the_network_is_told_with_its_rows(pipe: Any, want: Tensor) -> None:  # noqa: ANN401
    parallel = fast(pipe)
    parallel(**CALL)
    with pytest.MonkeyPatch.context() as patch:

        def fail(*args: Any, **kwargs: Any) -> None:  # noqa: ANN401
            raise RuntimeError("no such luck")

        patch.setattr(pipe.unet.conv_in, "forward", fail)
        with pytest.raises(piadm.NetworkError, match=r"unet failed on samples 0\.\.1 at steps 0\.\.11: RuntimeError:"):
            parallel(**CALL)
    assert torch.equal(pipe(**CALL).images, want)


def test_nothing_is_left_when_it_is_gone() -> None:
    pipe = stable_diffusion()
    parallel = fast(pipe)
    parallel(**CALL)
    alive = weakref.ref(pipe.unet)
    assert "forward" not in vars(pipe.unet) and not pipe.unet._forward_pre_hooks
    del pipe, parallel
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("dtype, bound", [(torch.float16, 2e-2), (torch.bfloat16, 1e-1)])
def test_half_precision_networks_have_a_float32_state(dtype: torch.dtype, bound: float) -> None:
    # The sequential pipeline rounds its latents to half precision, 2^-11 or 2^-8, at every step; here they never are.
    call = CALL | {name: value.to(dtype) for name, value in CALL.items() if isinstance(value, Tensor)}
    exact, half = stable_diffusion()(**CALL).images, stable_diffusion().to(dtype)
    parallel = parallelize(half, tol=1e-2, nodes="all")
    got = parallel(**call).images
    assert got.dtype == dtype and parallel.last_solution.sample.dtype == torch.float32
    assert apart(got, exact) <= bound * apart(exact, torch.zeros_like(exact))


def test_lora() -> None:
    peft = pytest.importorskip("peft")
    pipe = stable_diffusion()
    parallel, plain = fast(pipe), pipe(**CALL).images
    pipe.unet.add_adapter(peft.LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
    want = pipe(**CALL).images
    assert apart(want, plain) > 100 * CLOSE  # the adapter does something
    assert apart(parallel(**CALL).images, want) <= CLOSE


def test_prompts_and_images(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokens = ["<|startoftext|>", "<|endoftext|>", "a", "red</w>", "bicycle</w>", "a</w>"]
    words = {token: number for number, token in enumerate(tokens)}
    (tmp_path / "vocab.json").write_text(json.dumps(words))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    files = [str(tmp_path / name) for name in ("vocab.json", "merges.txt")]
    tokenizer = transformers.CLIPTokenizer(*files, model_max_length=8)
    sizes = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1)
    config = transformers.CLIPTextConfig(vocab_size=50, max_position_embeddings=8, **sizes)
    torch.manual_seed(0)
    pipe = stable_diffusion()
    pipe.register_modules(text_encoder=transformers.CLIPTextModel(config).eval(), tokenizer=tokenizer)
    call = dict(prompt=["a red bicycle", "a bicycle"], num_images_per_prompt=2, num_inference_steps=12, **SQUARE)

    def pixels_of(which: Any) -> Tensor:  # noqa: ANN401 - a pipeline
        return torch.tensor(which(**call, output_type="np", generator=torch.Generator().manual_seed(1)).images)

    got = pixels_of(fast(pipe))
    assert got.shape == (4, 16, 16, 3) and apart(got, pixels_of(pipe)) <= CLOSE



def replaced(pipe: Any, scheduler: Any) -> Any:  # noqa: ANN401 - a pipeline with another scheduler
    pipe.scheduler = scheduler
    return pipe


class Blending(df.StableDiffusionPipeline):
    """A pipeline that mixes its state with something else after every step."""

    def __call__(self, latents: Tensor, prompt_embeds: Tensor, num_inference_steps: int, **ignored: Any) -> Tensor:  # noqa: ANN401
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.progress_bar(self.scheduler.timesteps):
            output = self.unet(latents, t, encoder_hidden_states=prompt_embeds).sample
            latents = 0.9 * self.scheduler.step(output, t, latents).prev_sample + 0.1
        return latents


REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "a scheduler that is not affine": (
        lambda: stable_diffusion(scheduler=df.DPMSolverSDEScheduler(**SCALED)), CALL, "DPMSolverSDE.*what works",
    ),
    "a learned variance": (
        lambda: pixels(df.DDPMPipeline, df.DDPMScheduler(variance_type="learned_range"), out_channels=6),
        dict(num_inference_steps=12), "DDPMScheduler.*what works",
    ),
    "a step from a scaled state": (
        lambda: replaced(CASES["DiT"].build(), df.EulerDiscreteScheduler()),
        CASES["DiT"].call | dict(num_inference_steps=12), "steps from the scaled state.*such as DDIM",
    ),
    "soft blending": (
        lambda: stable_diffusion(Blending), CALL, "more than setting parts of it",
    ),
    "a callback of old": (stable_diffusion, CALL | dict(callback=print), "use callback_on_step_end"),
    "a callback that changes": (
        stable_diffusion,
        CALL | dict(callback_on_step_end=lambda pipe, i, t, values: {"latents": values["latents"] + 1}),
        "not change latents",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_run_is_named(what: str) -> None:
    build, call, message = REFUSED[what]
    with pytest.raises(UnsupportedError, match=message):
        fast(build())(**call)


def test_schedulers_are_refused_before_the_network_runs(forward: Any) -> None:  # noqa: ANN401
    calls: list[Tensor] = []
    forward(calls.append)
    with pytest.raises(UnsupportedError, match="DPMSolverSDEScheduler is not affine.*what works: DDPM, DDIM"):
        fast(stable_diffusion(scheduler=df.DPMSolverSDEScheduler(**SCALED)))(**CALL)
    assert not calls


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    (dict(tol=-1.0), ValueError, "tol must be"),
    (dict(nodes=1.5), TypeError, "nodes must be"),
    (dict(window=1), ValueError, "window must be"),
    (dict(max_batch=0), ValueError, "max_batch must be"),
    (dict(max_rounds="all"), TypeError, "max_rounds must be"),
    (dict(data_variance=0.0), ValueError, "data_variance must be"),
    (dict(linearization="newton"), ValueError, "linearization must be"),
]


@pytest.mark.parametrize("options, kind, message", BAD)
def test_bad_options_are_refused_at_once(pipe: Any, options: dict[str, Any], kind: Any, message: str) -> None:  # noqa: ANN401
    with pytest.raises(kind, match=message):
        parallelize(pipe, **options)


def test_what_is_no_pipeline_is_refused() -> None:
    with pytest.raises(TypeError, match="pipe must be a diffusers.DiffusionPipeline, got"):
        parallelize(nn.Linear(1, 1))


def test_an_old_diffusers_is_refused(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ANN401
    monkeypatch.setattr(df, "__version__", "0.29.2")
    with pytest.raises(ImportError, match="0.32 or newer, found 0.29.2"):
        parallelize(pipe)


def test_raise_on_failure(pipe: Any) -> None:  # noqa: ANN401
    parallel = fast(pipe, max_rounds=3, raise_on_failure=True)
    with pytest.raises(piadm.NotConvergedError, match="2 MAX_ROUNDS"):
        parallel(**CALL)
