"""Measure the shipped network: Fréchet distance of its samples to the Fashion-MNIST test images.

    python training/quality.py --run runs/quality --num 2000

Features are the last hidden layer of ``classifier.py``.  Beside the samples stand real training images, once
all of them and once as many as there are samples, because a finite sample biases the distance upwards.
Samples are kept in chunks: the same command continues an interrupted run.  ``--bf16 --compile`` run the
network faster; the output says so.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from classifier import NAMES, Classifier, accuracy, embed, load_or_train
from fashion_data import FOLDER, load_images, load_labels
from PIL import Image
from run_files import write_whole
from torch import Tensor, nn

import piadm
from piadm.models import load_folder

WEIGHTS = Path(__file__).parents[1] / "src" / "piadm" / "models" / "fashion"
REPEATS = 10  # random subsets and halves of real images, for a mean and a spread


@dataclass(frozen=True)
class Moments:
    """Mean ``(d,)`` and covariance ``(d, d)`` in float64."""

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Moments of the rows of ``(n, d)``."""
        rows = features.double()
        return cls(rows.mean(0), torch.cov(rows.T))


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared 2-Wasserstein distance of the Gaussians with these moments.

    ``|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a^1/2 S_b S_a^1/2)^1/2)``; the trace of the root is the sum of the
    roots of the eigenvalues, and the matrix is symmetric.

    Reference: Heusel et al. 2017 (arXiv 1706.08500, eq. 6).
    """
    values, vectors = torch.linalg.eigh(a.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    inner = root @ b.covariance @ root
    overlap = torch.linalg.eigvalsh((inner + inner.T) / 2).clamp(min=0).sqrt().sum()
    spread = a.covariance.trace() + b.covariance.trace() - 2 * overlap
    return ((a.mean - b.mean).square().sum() + spread).item()


class FasterNetwork(nn.Module):
    """A network in bfloat16 autocast, compiled, or both; float32 in and out."""

    def __init__(self, network: nn.Module, bf16: bool, compiled: bool) -> None:
        """Wrap ``network``."""
        super().__init__()
        self.network = torch.compile(network) if compiled else network
        self.bf16 = bf16

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Output ``(R, 1, 28, 28)`` at ``x (R, 1, 28, 28)`` and times ``t (R,)``."""
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            return self.network(x, t).sample.float()


def generate(denoiser: piadm.Denoiser, num: int, batch: int, steps: int, folder: Path) -> Tensor:
    """Bytes ``(num, 1, 28, 28)`` from ``steps`` sequential SDE steps; sample i has seed i, made only once."""
    chunks = []
    for seeds in torch.arange(num).split(batch):
        path, start = folder / f"{int(seeds[0]):06d}-{len(seeds)}.pt", time.time()
        if not path.exists():
            shape, own = (len(seeds), 1, 28, 28), seeds.tolist()
            # An interrupted sampler returns what it has; raising keeps that from being stored as a sample.
            solution = piadm.sample_sequential(
                denoiser, shape, method="sde", steps=steps, seed=own, max_batch=batch, raise_on_failure=True
            )
            images = solution.sample.add(1).mul(127.5).round().clamp(0, 255).byte().cpu()
            write_whole(path, lambda part, images=images: torch.save(images, part))
            print(f"samples: {own[-1] + 1} of {num}, {time.time() - start:.0f} s for this chunk", flush=True)
        chunks.append(torch.load(path, weights_only=True))
    return torch.cat(chunks)


def mean_and_spread(values: list[float]) -> dict[str, float]:
    """Mean and standard deviation."""
    column = torch.tensor(values, dtype=torch.float64)
    return {"mean": column.mean().item(), "sd": column.std().item()}


def distances(test: Tensor, train: Tensor, generated: Tensor) -> dict[str, object]:
    """Fréchet distances between sets of features ``(n, 64)``; the subsets of real images are random."""
    generator, reference = torch.Generator().manual_seed(0), Moments.of(test)
    orders = [torch.randperm(len(train), generator=generator)[: len(generated)] for _ in range(REPEATS)]
    halves = [test[torch.randperm(len(test), generator=generator)].chunk(2) for _ in range(REPEATS)]
    return {
        "generated": frechet_distance(reference, Moments.of(generated)),
        "train": frechet_distance(reference, Moments.of(train)),
        "train_subset": mean_and_spread([frechet_distance(reference, Moments.of(train[o])) for o in orders]),
        "test_halves": mean_and_spread([frechet_distance(Moments.of(a), Moments.of(b)) for a, b in halves]),
    }


def likeliest(probabilities: Tensor) -> dict[str, object]:
    """Share of every class and mean probability of the likeliest one."""
    confidence, label = probabilities.max(1)
    shares = torch.bincount(label, minlength=len(NAMES)).double() / len(label)
    return {
        "shares": dict(zip(NAMES, shares.tolist(), strict=True)),
        "confidence": confidence.double().mean().item(),
    }


def measure(model: Classifier, generated: Tensor, data: Path) -> dict[str, object]:
    """Every figure, from bytes ``(n, 1, 28, 28)``."""
    test = load_images("t10k", data)
    (test_features, test_classes), (own_features, own_classes) = embed(model, test), embed(model, generated)
    return {
        "classifier_test_accuracy": accuracy(model, test, load_labels("t10k", data)),
        "frechet": distances(test_features, embed(model, load_images("train", data))[0], own_features),
        "test": likeliest(test_classes),
        "generated": likeliest(own_classes),
    }


def save_grid(images: Tensor, path: Path, side: int = 8, zoom: int = 2) -> None:
    """Write the first ``side**2`` images as one PNG, dark on white."""
    tiles = torch.zeros(side * side, 28, 28, dtype=torch.uint8)
    tiles[: len(images)] = images[: side * side, 0]
    sheet = 255 - tiles.reshape(side, side, 28, 28).transpose(1, 2).reshape(side * 28, side * 28)
    sheet = sheet.repeat_interleave(zoom, 0).repeat_interleave(zoom, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet.numpy()).save(path)


def table(report: dict) -> str:
    """The report as text."""
    fd, num = report["frechet"], report["samples"]
    subset, halves = (
        f"{fd[key]['mean']:.4f} +- {fd[key]['sd']:.4f} ({REPEATS} draws)" for key in ("train_subset", "test_halves")
    )
    both = (report["test"], report["generated"])
    rows = [
        (f"{num} samples", f"{report['steps']} SDE steps, network in {report['network']}"),
        ("classifier", f"{100 * report['classifier_test_accuracy']:.2f} % of the test images right"),
        ("Fréchet distance", "to the 10000 test images, 64 features"),
        (f"  {num} generated", f"{fd['generated']:.4f}"),
        (f"  {num} training images", subset),
        ("  all training images", f"{fd['train']:.4f}"),
        ("  one half against the other", halves),
        ("share of every class in %", f"{'test':>6} {'generated':>10}"),
    ]
    rows += [(f"  {name}", "{:6.1f} {:10.1f}".format(*(100 * who["shares"][name] for who in both))) for name in NAMES]
    rows.append(("mean probability of it", "{:6.3f} {:10.3f}".format(*(who["confidence"] for who in both))))
    return "\n".join(f"{label:<30}{value}" for label, value in rows)


def arguments() -> argparse.Namespace:
    """Command-line options."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--run", type=Path, default=Path("runs/quality"))
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of the model")
    parser.add_argument("--data", type=Path, default=FOLDER)
    parser.add_argument("--num", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bf16", action="store_true", help="run the network in bfloat16 autocast")
    parser.add_argument("--compile", action="store_true", help="run the network through torch.compile")
    args = parser.parse_args()
    if args.num < 2 or args.batch < 1:
        parser.error("--num must be at least 2 and --batch at least 1")
    return args


def main() -> None:
    """Generate, measure, print the table, write JSON and PNG."""
    args = arguments()
    torch.set_num_threads(args.threads)
    model = load_or_train(args.run / "classifier.safetensors", args.data)
    denoiser, mode = load_folder(args.weights), "bfloat16 autocast" if args.bf16 else "float32"
    if args.bf16 or args.compile:
        faster = FasterNetwork(denoiser.network, args.bf16, args.compile)
        denoiser, mode = dataclasses.replace(denoiser, network=faster), mode + ", compiled" * args.compile
    # The samples' folder is named after the weights: another network never continues this one's run.
    digest = hashlib.sha256((args.weights / "weights.safetensors").read_bytes()).hexdigest()
    chunks = args.run / f"{digest[:12]}-{args.steps}-{mode.replace(', ', '-').replace(' ', '-')}"
    images = generate(denoiser, args.num, args.batch, args.steps, chunks)
    report = {"samples": args.num, "steps": args.steps, "network": mode, "weights_sha256": digest}
    report["training_rows"] = json.loads((args.weights / "config.json").read_text())["rows"]
    report |= measure(model, images, args.data)
    print(table(report))
    write_whole(args.run / "quality.json", lambda part: part.write_text(json.dumps(report, indent=2) + "\n"))
    save_grid(images, args.run / "samples.png")
    print(f"figures in {args.run / 'quality.json'}, the first 64 samples in {args.run / 'samples.png'}")


if __name__ == "__main__":
    main()
