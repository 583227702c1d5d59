"""Train the shipped Fashion-MNIST network: a small diffusers U-Net that predicts v.

    python training/train_fashion.py --minutes 250 --run runs/fashion

The time budget sets the learning-rate decay, so a longer run is a better network and nothing else
changes.  A checkpoint is written every two minutes; the same command continues from it.  A new run
may ``--start`` from the weights of an earlier export.  The last line of work exports the averaged
weights in half precision to ``--export``; ``--export-only`` does just that with the checkpoint of an
earlier or still running training.

    python training/train_fashion.py --minutes 70 --run runs/distilled --start GOOD --good GOOD --bad BAD

distils autoguidance: the network learns to predict in one call what a good network says, pushed away from
what a bad one says.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from diffusers import UNet2DModel
from fashion_data import FOLDER, load_images, to_unit
from run_files import write_whole
from safetensors.torch import load_file, save

from piadm.models.shipped import load_folder

TIMESTEPS, BETA_START, BETA_END = 1000, 1e-4, 0.02
BATCH, PEAK_RATE, WARMUP_ROWS, EMA_ROWS, GUIDANCE = 64, 1e-3, 20_000, 40_000, 1.0
NETWORK = {
    "sample_size": 28,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [32, 64, 96],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 8,
    "attention_head_dim": 32,
}


def half_log_snr_table() -> torch.Tensor:
    """ln(alpha / sigma) of the linear DDPM table at its integer times, shape ``(TIMESTEPS,)``."""
    beta = torch.linspace(BETA_START, BETA_END, TIMESTEPS, dtype=torch.float64)
    log_alpha_bar = torch.log1p(-beta).cumsum(0)
    return 0.5 * (log_alpha_bar - torch.log(-torch.expm1(log_alpha_bar)))


def draw_times(rows: int, table: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Continuous times and their half log-SNR: half of them uniform in time, half around ln(alpha/sigma) = 0.

    Uniform times (the DDPM choice) cover the long noisy end; the normal half spends the effort
    where garments take their shape and texture.  Both are stratified over the batch.
    """
    u = (torch.arange(rows, dtype=torch.float64) + torch.rand(rows, generator=generator, dtype=torch.float64)) / rows
    time_uniform = u[::2] * (TIMESTEPS - 1)
    wanted = torch.erfinv((2 * u[1::2] - 1).clamp(-0.999999, 0.999999)) * math.sqrt(2) * 1.5
    index = torch.searchsorted(-table, -wanted).clamp(1, TIMESTEPS - 1)
    high, low = table[index - 1], table[index]
    time_normal = (index - 1) + ((high - wanted) / (high - low)).clamp(0, 1)
    times = torch.cat([time_uniform, time_normal])
    base = times.floor().clamp(max=TIMESTEPS - 2).long()
    half_log_snr = torch.lerp(table[base], table[base + 1], times - base)
    return times.float(), half_log_snr.float()


class Autoguidance:
    """The prediction of a good network, pushed away from that of a bad one: ``good + weight (good - bad)``.

    What the bad network does worse than the good one, the good one does worse than a perfect one; the push
    leads on in that direction.  Reference: Karras et al. 2024 (arXiv 2406.02507, eq. 3 with w = 1 + weight).
    """

    def __init__(self, good: Path, bad: Path, weight: float, *, compiled: bool = True) -> None:
        networks = [load_folder(folder).network for folder in (good, bad)]
        self.good, self.bad = map(torch.compile, networks) if compiled else networks
        self.weight = weight

    @torch.no_grad()
    def __call__(self, x: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """Guided v, float32 of the shape of ``x``."""
        with torch.autocast("cpu", dtype=torch.bfloat16):
            good, bad = self.good(x, times).sample.float(), self.bad(x, times).sample.float()
        return torch.lerp(bad, good, 1 + self.weight)


def loss_of(
    network: torch.nn.Module,
    images: torch.Tensor,
    times: torch.Tensor,
    lam: torch.Tensor,
    teacher: Autoguidance | None = None,
) -> torch.Tensor:
    """Mean squared error of v = alpha eps - sigma x0 (Salimans & Ho 2022, arXiv 2202.00512, appendix D).

    With a ``teacher`` its prediction takes the place of that v, as in Meng et al. 2023 (arXiv 2210.03142, eq. 2).
    """
    alpha = torch.sigmoid(2 * lam).sqrt().view(-1, 1, 1, 1)
    sigma = torch.sigmoid(-2 * lam).sqrt().view(-1, 1, 1, 1)
    eps = torch.randn_like(images)
    x = alpha * images + sigma * eps
    target = alpha * eps - sigma * images if teacher is None else teacher(x, times)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        v = network(x, times).sample
    return (v.float() - target).square().mean()


def moments(images: torch.Tensor) -> dict[str, float]:
    """Mean and variance over all pixels of all images: the Gaussian that a sampler may start from."""
    mean = images.mean(dtype=torch.float64).item()
    variance = images.square().mean(dtype=torch.float64).item() - mean**2
    return {"mean": round(mean, 6), "variance": round(variance, 6)}


def load_start(network: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Begin from ``weights``; attention layers that they lack begin as the identity (output projection zero)."""
    missing, unexpected = network.load_state_dict({n: w.float() for n, w in weights.items()}, strict=False)
    strangers = [name for name in missing if ".attentions." not in name] + unexpected
    if strangers:
        raise ValueError(f"--start must hold this network's layers, attention apart; these differ: {strangers[:5]}")
    for name, parameter in network.named_parameters():
        if name in missing and ".to_out." in name:
            torch.nn.init.zeros_(parameter)


def export(weights: dict[str, torch.Tensor], folder: Path, images: torch.Tensor, rows: int) -> None:
    """Half-precision safetensors and the network's settings, as ``piadm.load`` reads them."""
    half = {name: tensor.half().contiguous() for name, tensor in weights.items()}
    write_whole(folder / "weights.safetensors", lambda part: part.write_bytes(save(half)))
    settings = {
        "network": NETWORK,
        "prediction": "v",
        "betas": {"start": BETA_START, "end": BETA_END, "timesteps": TIMESTEPS},
        "data": moments(images),
        "rows": rows,
    }
    write_whole(folder / "config.json", lambda part: part.write_text(json.dumps(settings, indent=2) + "\n"))


def main() -> None:
    """Train, checkpoint, export."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--minutes", type=float, default=100.0)
    parser.add_argument("--run", type=Path, default=Path("runs/fashion"))
    parser.add_argument("--export", type=Path, default=Path("src/piadm/models/fashion"))
    parser.add_argument("--data", type=Path, default=FOLDER)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peak-rate", type=float, default=PEAK_RATE)
    parser.add_argument("--start", type=Path, help="folder of exported weights to begin from, optimiser fresh")
    parser.add_argument("--good", type=Path, help="distil: folder of the good network")
    parser.add_argument("--bad", type=Path, help="distil: folder of a network with the same faults, but worse")
    parser.add_argument("--guidance", type=float, default=GUIDANCE, help="distil: weight of the push")
    parser.add_argument("--export-only", action="store_true", help="export the checkpoint, train nothing")
    args = parser.parse_args()
    if (args.good is None) != (args.bad is None):
        parser.error("--good and --bad belong together")

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.run.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(args.seed)
    images, table = to_unit(load_images("train", args.data)), half_log_snr_table()
    checkpoint = args.run / "checkpoint.pt"
    if args.export_only:
        saved = torch.load(checkpoint, weights_only=True)
        export(saved["ema"], args.export, images, saved["rows"])
        print(f"weights after {saved['rows']} rows in {args.export}")
        return
    network = UNet2DModel(**NETWORK)
    # The fused attention kernel's backward is slow on CPUs; plain matrix products take its place.
    from diffusers.models.attention_processor import AttnProcessor

    for module in network.modules():
        if hasattr(module, "set_processor"):
            module.set_processor(AttnProcessor())
    rows, spent = 0, 0.0
    if args.start is not None:
        load_start(network, load_file(args.start / "weights.safetensors"))
        rows = json.loads((args.start / "config.json").read_text())["rows"]
    first_row = rows
    ema = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
    rate = args.peak_rate
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        network.load_state_dict(saved["network"])
        optimizer.load_state_dict(saved["optimizer"])
        ema, rows, first_row, spent = saved["ema"], saved["rows"], saved["first_row"], saved["spent"]
    compiled = torch.compile(network)
    teacher = None if args.good is None else Autoguidance(args.good, args.bad, args.guidance)
    budget, start, last_save, mean_loss = args.minutes * 60, time.time() - spent, time.time(), None

    while (progress := (time.time() - start) / budget) < 1:
        order = torch.randperm(len(images), generator=generator)
        for chosen in order.split(BATCH):
            if len(chosen) < BATCH or (progress := (time.time() - start) / budget) >= 1:
                break
            warm = min(1, (rows - first_row + BATCH) / WARMUP_ROWS)
            rate = args.peak_rate * warm * 0.5 * (1 + math.cos(math.pi * progress))
            for group in optimizer.param_groups:
                group["lr"] = rate
            times, lam = draw_times(BATCH, table, generator)
            loss = loss_of(compiled, images[chosen], times, lam, teacher)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            rows += BATCH
            keep = min(math.exp(-BATCH / EMA_ROWS), rows / (rows + 10 * BATCH))
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.values()), list(network.state_dict().values()), 1 - keep)
            mean_loss = loss.item() if mean_loss is None else 0.99 * mean_loss + 0.01 * loss.item()
            if time.time() - last_save > 120:
                last_save = time.time()
                state = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema}
                state |= {"rows": rows, "first_row": first_row, "spent": time.time() - start}
                write_whole(checkpoint, lambda part, state=state: torch.save(state, part))
                print(f"{state['spent'] / 60:6.1f} min  {rows} rows  loss {mean_loss:.4f}", flush=True)
    export(ema, args.export, images, rows)
    print(f"done: {rows} rows, loss {mean_loss:.4f}, weights in {args.export}")


if __name__ == "__main__":
    main()
