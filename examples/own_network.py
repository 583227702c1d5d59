"""A network of your own: an MLP is trained on two moons, then sampled in sequence and in parallel from the same noise.

    python examples/own_network.py

It needs the core package only and takes about a minute on an idle CPU core, most of it for the training.
"""

import math

import torch
from torch import Tensor, nn

import piadm

torch.manual_seed(0)
schedule = piadm.VPSchedule(beta_min=0.1, beta_max=20.0)


def two_moons(count: int) -> Tensor:
    angle, upper = math.pi * torch.rand(count), torch.rand(count) < 0.5
    across = torch.where(upper, angle.cos(), 1 - angle.cos()) - 0.5
    up = torch.where(upper, angle.sin(), 0.5 - angle.sin()) - 0.25
    return 1.4 * torch.stack([across, up], 1) + 0.05 * torch.randn(count, 2)


class Network(nn.Module):
    """Predicts the noise in ``x (rows, 2)`` at times ``t (rows,)``, of which it sees the log-SNR."""

    def __init__(self) -> None:
        super().__init__()
        hidden = nn.Linear(3, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU()
        self.layers = nn.Sequential(*hidden, nn.Linear(128, 2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        level = schedule.log_snr(t).to(x.dtype) / 5
        return self.layers(torch.cat([x, level[:, None]], 1))


network = Network()
optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6000)
for _ in range(6000):
    data, noise, t = two_moons(512), torch.randn(512, 2), 1e-3 + (1 - 1e-3) * torch.rand(512)
    alpha, sigma = (level.float()[:, None] for level in (schedule.alpha(t), schedule.sigma(t)))
    loss = (network(alpha * data + sigma * noise, t) - noise).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    decay.step()
print(f"trained: the loss of the last batch is {loss.item():.3f}")

denoiser = piadm.Denoiser(network.eval(), schedule, "epsilon")
for method in ("ode", "sde"):
    given = dict(method=method, steps=1000, seed=0)
    sequential = piadm.sample_sequential(denoiser, (64, 2), **given)
    parallel = piadm.sample(denoiser, (64, 2), tol=1e-2, **given)
    error, stats = (parallel.sample - sequential.sample).square().mean(1).sqrt(), parallel.stats
    print(f"{method}: {stats.rounds} rounds, {stats.evaluations:.0f} evaluations per sample instead of 1000")
    print(f"     CONVERGED: {parallel.converged}; RMS error: median {error.median():.1e}, largest {error.max():.1e}")
