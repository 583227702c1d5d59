"""A small Fashion-MNIST classifier, whose last hidden layer is the feature space of ``quality.py``.

    python training/classifier.py --run runs/quality

Trains in a few minutes on two cores and keeps its weights in the run folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from fashion_data import FOLDER, load_images, load_labels, to_unit
from run_files import write_whole
from safetensors.torch import load_file, save
from torch import Tensor, nn

FEATURES, CLASSES, EPOCHS, BATCH, PEAK_RATE = 64, 10, 12, 128, 4e-3
NAMES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class Classifier(nn.Module):
    """Five convolutions, mean over space, 64 features, 10 logits."""

    def __init__(self) -> None:
        """Draw the initial weights from torch's global generator."""
        super().__init__()
        self.trunk = nn.Sequential(_conv(1, 32), _conv(32, 32, 2), _conv(32, 64), _conv(64, 64, 2), _conv(64, 128))
        self.features = nn.Linear(128, FEATURES)
        self.head = nn.Linear(FEATURES, CLASSES)

    def embed(self, images: Tensor) -> Tensor:
        """Features ``(R, 64)`` of images ``(R, 1, 28, 28)`` in [-1, 1]."""
        return nn.functional.gelu(self.features(self.trunk(images).mean((2, 3))))

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(R, 10)`` of images ``(R, 1, 28, 28)`` in [-1, 1]."""
        return self.head(self.embed(images))


def mirrored(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror a random half of the images left to right, the one change that leaves a garment a garment."""
    flip = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    return torch.where(flip, images.flip(3), images)


def train(images: Tensor, labels: Tensor, epochs: int, seed: int = 0) -> Classifier:
    """Train on bytes ``(n, 1, 28, 28)``: AdamW, one cycle, label smoothing; same seed, same weights."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Classifier().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, weight_decay=0.05)
    steps = len(images) // BATCH
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=epochs * steps, pct_start=0.2)
    for epoch in range(epochs):
        total = 0.0
        order = torch.randperm(len(images), generator=generator)
        for chosen in order[: steps * BATCH].split(BATCH):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = model(mirrored(to_unit(images[chosen]), generator))
            loss = nn.functional.cross_entropy(logits.float(), labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            cycle.step()
            total += loss.item()
        print(f"classifier: epoch {epoch + 1} of {epochs}, loss {total / steps:.4f}", flush=True)
    return model.eval().requires_grad_(False)


@torch.inference_mode()
def embed(model: Classifier, images: Tensor, batch: int = 1000) -> tuple[Tensor, Tensor]:
    """Features ``(n, 64)`` and class probabilities ``(n, 10)`` of bytes ``(n, 1, 28, 28)``, in float32."""
    features = torch.cat([model.embed(to_unit(part)) for part in images.split(batch)])
    return features, model.head(features).softmax(1)


def accuracy(model: Classifier, images: Tensor, labels: Tensor) -> float:
    """Share of images whose likeliest class is the label."""
    return (embed(model, images)[1].argmax(1) == labels).double().mean().item()


def load_or_train(path: Path, data: Path = FOLDER, epochs: int = EPOCHS, seed: int = 0) -> Classifier:
    """The classifier kept in ``path``; trained and kept there first if the file does not exist."""
    if not path.exists():
        model = train(load_images("train", data), load_labels("train", data), epochs, seed)
        weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        write_whole(path, lambda part: part.write_bytes(save(weights)))
    model = Classifier()
    model.load_state_dict(load_file(path))
    return model.to(memory_format=torch.channels_last).eval().requires_grad_(False)


def main() -> None:
    """Train (or load) the classifier and print its accuracy on the test images."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--run", type=Path, default=Path("runs/quality"))
    parser.add_argument("--data", type=Path, default=FOLDER)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load_or_train(args.run / "classifier.safetensors", args.data, args.epochs)
    share = accuracy(model, load_images("t10k", args.data), load_labels("t10k", args.data))
    print(f"test accuracy {100 * share:.2f} %")


if __name__ == "__main__":
    main()
