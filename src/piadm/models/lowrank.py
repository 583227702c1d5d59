"""Mixtures of low-rank Gaussians: denoisers in closed form that are fitted to samples, as drafts of a network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import final

import torch
from torch import Tensor, nn

from piadm._checks import described, positive_int, shown
from piadm.denoiser import Denoiser
from piadm.models.analytic import levels
from piadm.network import network_device
from piadm.problem import check_denoiser
from piadm.schedule import NoiseSchedule

#: Least variance of a component in any direction, relative to the mean one of all samples: coordinates that never
#: change would make a component certain of itself at every noise level.
LEAST_SHARE = 1e-3

#: Seed of the clustering.
SEED = 0x5EED


@final
class LowRankMixtureNetwork(nn.Module):
    r"""Posterior mean of a mixture of Gaussians with few wide directions each.

        x_0 ~ sum_k w_k N(m_k, C_k),      C_k = U_k diag(l_k) U_k^T + v_k (I - U_k U_k^T)

    With ``y_k = x - alpha m_k``, ``s_k^2 = alpha^2 v_k + sigma^2``, ``s_ki^2 = alpha^2 l_ki + sigma^2`` and the
    responsibilities ``r_k ~ w_k N(x; alpha m_k, alpha^2 C_k + sigma^2 I)``, which sum to one,

        E[x_0 | x_t = x] = sum_k r_k (m_k + g_k y_k + U_k diag(g_ki - g_k) U_k^T y_k),
        g_k = alpha v_k/s_k^2,      g_ki = alpha l_ki/s_ki^2

    Args:
        schedule: noise schedule, ``x_t = alpha x_0 + sigma eps``.
        means: ``m``, shape ``(K, d)``.
        directions: ``U``, orthonormal columns, shape ``(K, d, r)``.
        wide: ``l``, the variances along them, shape ``(K, r)``.
        narrow: ``v``, the variance along all others, shape ``(K,)``.
        weights: ``w``, shape ``(K,)``; they are divided by their sum.

    Reference: Tipping & Bishop 1999 (Neural Computation 11, 443-482), mixtures of probabilistic principal components.
    """

    means: Tensor
    directions: Tensor
    wide: Tensor
    narrow: Tensor
    weights: Tensor

    def __init__(
        self, schedule: NoiseSchedule, means: Tensor, directions: Tensor, wide: Tensor, narrow: Tensor, weights: Tensor
    ) -> None:
        super().__init__()
        self.schedule = schedule
        # In memory as ``(d, K, r)``, in which all of them are one matrix.
        directions = directions.permute(1, 0, 2).contiguous().permute(1, 0, 2)
        for name, value in dict(means=means, directions=directions, wide=wide, narrow=narrow, weights=weights).items():
            self.register_buffer(name, value)

    @property
    def coordinates_per_row(self) -> int:
        """Coordinates of a sample, ``d``."""
        return self.means.shape[1]

    def forward(self, x: Tensor, t: Tensor, **condition: object) -> Tensor:
        """Posterior mean of rows ``x (R, *shape)`` at their times ``t (R,)``; it knows of no condition."""
        rows = x.flatten(1).to(self.means.dtype)
        if rows.shape[1] != self.coordinates_per_row:
            raise ValueError(f"x must have rows of {self.coordinates_per_row} coordinates, got {rows.shape[1]}")
        alpha, noise = (level.to(rows) for level in levels(self.schedule, t, x, None))
        power = alpha.square()
        components, size, rank = self.directions.shape
        flat = self.directions.permute(1, 0, 2).reshape(size, -1)
        centres = torch.einsum("kd,kdr->kr", self.means, self.directions)
        along = (rows @ flat).view(-1, components, rank) - alpha[..., None] * centres
        square = rows.square().sum(1, keepdim=True) - 2 * alpha * (rows @ self.means.T)
        square = square + power * self.means.square().sum(1)
        across = (square - along.square().sum(2)).clamp(min=0)
        wide, narrow = power[..., None] * self.wide + noise[..., None], power * self.narrow + noise
        likely = across / narrow + (size - rank) * narrow.log() + (along.square() / wide + wide.log()).sum(2)
        share = (self.weights.log() - 0.5 * likely).softmax(1)
        gain, gains = alpha * self.narrow / narrow, alpha[..., None] * self.wide / wide
        bent = (share[..., None] * (gains - gain[..., None]) * along).flatten(1)
        mean = (share * (1 - alpha * gain)) @ self.means + (share * gain).sum(1, keepdim=True) * rows + bent @ flat.T
        return mean.reshape(x.shape).to(x.dtype)


def fit_draft(denoiser: Denoiser, samples: Tensor, *, components: int = 16, rank: int = 12) -> Denoiser:
    """The denoiser with a draft fitted to samples: a mixture of low-rank Gaussians, in closed form.

    ``sample`` first solves for the draft's own path, which costs no call of the network, and starts from there.  It is
    worth doing for networks that take many rounds, the first of which only establish what a draft knows already.

    Args:
        denoiser: the denoiser.
        samples: data points or samples of the network, shape ``(S, *sample_shape)``; about a thousand are enough.
        components: number of Gaussians, at most ``S``.
        rank: number of principal directions of each; along all others its variance is one number.

    Returns:
        A copy of the denoiser with ``draft``, on the device of its network; its estimates are clipped as the
        denoiser's are.

    Raises:
        TypeError, ValueError: naming the argument, what was received and what is accepted.
        ImportError: if scikit-learn is missing.
    """
    check_denoiser(denoiser)
    if not isinstance(samples, Tensor) or not samples.is_floating_point():
        raise TypeError(f"samples must be a floating-point tensor (S, *sample_shape), got {described(samples)}")
    if samples.ndim < 2 or len(samples) < 2 or not samples.isfinite().all():
        raise ValueError(f"samples must be finite, of shape (S, *sample_shape) with S >= 2, got {shown(samples)}")
    if not samples.flatten(1).float().var(0).isfinite().all():
        most = float(samples.abs().max())
        raise ValueError(f"samples must have a variance that float32 can hold, got values up to {most:g}")
    count = min(positive_int("components", components), len(samples))
    parts = _fitted(samples.detach().flatten(1).float().cpu(), count, positive_int("rank", rank))
    place = network_device(denoiser.network) or samples.device
    return drafted(denoiser, {name: part.to(place) for name, part in parts.items()})


def drafted(denoiser: Denoiser, parts: Mapping[str, Tensor]) -> Denoiser:
    """The denoiser with a ``LowRankMixtureNetwork`` of these parts as its draft, where they lie.

    It is kept in single precision: its sums over directions are long.

    Raises:
        TypeError: if they are not the parts of one.
    """
    network = LowRankMixtureNetwork(denoiser.schedule, **{name: part.float() for name, part in parts.items()}).eval()
    return replace(denoiser, draft=replace(denoiser, network=network, prediction="sample", draft=None))


def _fitted(rows: Tensor, components: int, rank: int) -> dict[str, Tensor]:
    """The parts of a mixture with a component for each cluster of ``rows (S, d)``."""
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise ImportError('fit_draft needs scikit-learn: pip install "piadm[draft]"') from error
    cluster = torch.from_numpy(KMeans(components, n_init=1, random_state=SEED).fit_predict(rows.numpy()))
    least = LEAST_SHARE * float(rows.var(0).mean())
    sizes = torch.bincount(cluster)  # some are 0 where samples are equal
    found = [_component(rows[cluster == number], min(rank, rows.shape[1]), least) for number in sizes.nonzero()]
    means, directions, wide, narrow = (torch.stack(parts) for parts in zip(*found, strict=True))
    return dict(means=means, directions=directions, wide=wide, narrow=narrow, weights=sizes[sizes > 0])


def _component(members: Tensor, rank: int, least: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean, principal directions, variances along them and along all others, of the members of a cluster."""
    from sklearn.decomposition import PCA

    size = members.shape[1]
    directions, wide, narrow = members.new_zeros(size, rank), members.new_zeros(rank), 0.0
    kept = min(rank, len(members) - 1) if members.var(0, correction=0).any() else 0
    if kept > 0:
        fit = PCA(kept, random_state=SEED).fit(members.numpy())
        directions[:, :kept] = torch.from_numpy(fit.components_.T)
        wide[:kept], narrow = torch.from_numpy(fit.explained_variance_), float(fit.noise_variance_)
    narrow = max(narrow, least)
    return members.mean(0), directions, wide.clamp(min=narrow), members.new_tensor(narrow)
