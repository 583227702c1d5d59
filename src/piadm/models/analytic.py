"""Denoisers known in closed form: Gaussian and Gaussian-mixture data, under any schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor

from piadm._checks import instance, shown
from piadm.denoiser import Denoiser
from piadm.schedule import NoiseSchedule

# Stands in for sigma^2 = 0: quotients then reach their limits instead of 0/0. Far below any sigma^2 in use,
# and far enough above the smallest float64 that squared distances over it stay finite.
_LEAST_VARIANCE = 1e-200


@final
@dataclass(frozen=True, eq=False, init=False)
class GaussianNetwork:
    r"""Posterior mean and probability flow of Gaussian data ``x_0 ~ N(m, C)``.

    Along each eigendirection of ``C``, with eigenvalue ``lam``, the noised data has variance
    ``s^2 = alpha^2 lam + sigma^2`` and

        E[x_0 | x_t = x] = m + (alpha lam / s^2) (x - alpha m).

    Args:
        schedule: Noise schedule, ``x_t = alpha x_0 + sigma eps``.
        mean: ``m``, a number or a tensor ``(*shape,)``.
        covariance: ``C``: a number (one variance for all coordinates), the variances ``(*shape,)``, or the
            full positive semidefinite matrix ``(d, d)`` over the flattened coordinates. Beside a mean that is
            a number, a square matrix is read as full, for rows ``(R, d)``.

    Attributes:
        eigenvalues: Float64, ``()`` for one variance, else ``(d,)`` over the flattened coordinates.
        basis: Float64 ``(d, d)``, eigenvectors in columns; None where they are the coordinate axes.
        shape: Shape of a row; None where the arguments leave it open.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If one is not finite, the shapes do not fit, or ``C`` is no covariance.
    """

    schedule: NoiseSchedule
    mean: Tensor
    eigenvalues: Tensor
    basis: Tensor | None
    shape: tuple[int, ...] | None

    def __init__(self, schedule: NoiseSchedule, mean: Tensor | float = 0.0, covariance: Tensor | float = 1.0) -> None:
        """Check the arguments and diagonalise the covariance, once, in float64."""
        centre, spread = _real_tensor("mean", mean), _real_tensor("covariance", covariance)
        d = centre.numel() if centre.ndim else len(spread) if spread.ndim else 1
        full = spread.shape == (d, d) != centre.shape
        if not full and centre.ndim and spread.ndim and spread.shape != centre.shape:
            raise ValueError(
                f"covariance must be a number, variances of the shape {tuple(centre.shape)} of mean, or a "
                f"({d}, {d}) matrix, got shape {tuple(spread.shape)}"
            )
        eigenvalues, basis = _eigen(spread) if full else (spread, None)
        if bool((eigenvalues < 0).any()):
            raise ValueError(f"covariance must have no negative variance, got {float(eigenvalues.min()):g}")
        _freeze(
            self,
            schedule=instance("schedule", schedule, NoiseSchedule),
            mean=centre,
            eigenvalues=eigenvalues.flatten() if eigenvalues.ndim else eigenvalues,
            basis=basis,
            shape=tuple(centre.shape or spread.shape[: 1 if full else None]) or None,
        )

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Posterior mean of rows ``x (R, *shape)`` at their times ``t (R,)``, in the dtype of ``x``."""
        alpha, variance = self._levels(t, x)
        gain = alpha * self.eigenvalues.to(x.device) / variance
        return self._map(x, alpha, gain, torch.ones_like(alpha))

    def flow(self, x: Tensor, t: float | Tensor, s: float | Tensor) -> Tensor:
        r"""Carry states along the probability-flow ODE from time ``t`` to time ``s``, exactly.

            x_s = alpha_s m + (std_s / std_t) (x_t - alpha_t m),   std^2 = alpha^2 lam + sigma^2

        Args:
            x: States at time ``t``, ``(R, *shape)``.
            t: Their time: a number, or one per row ``(R,)``.
            s: The time wanted, later or earlier, likewise.

        Returns:
            The states at time ``s``, in the shape and dtype of ``x``.

        Raises:
            TypeError: If ``x`` is not floating-point.
            ValueError: If a shape does not fit.

        Reference:
            Song et al., "Score-based generative modeling through SDEs" (arXiv 2011.13456), eq. 13, solved
            for the score of a Gaussian.
        """
        (alpha, before), (alpha_s, after) = self._levels(t, x), self._levels(s, x)
        return self._map(x, alpha, (after / before).sqrt(), alpha_s)

    def _levels(self, t: float | Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``alpha (R, 1)`` and the variance of ``x_t`` per eigendirection ``(R, 1 or d)``, float64."""
        alpha, noise = levels(self.schedule, t, x, self.shape)
        return alpha, alpha.square() * self.eigenvalues.to(x.device) + noise

    def _map(self, x: Tensor, alpha: Tensor, gain: Tensor, scale: Tensor) -> Tensor:
        """Return ``scale m + C^(gain) (x - alpha m)``, the gain acting per eigendirection."""
        work = torch.promote_types(x.dtype, torch.float32)
        mean, gain = self.mean.flatten().to(x.device, work), gain.to(work)
        moved = _flat(x).to(work) - alpha.to(work) * mean
        if self.basis is None:
            moved = gain * moved
        else:
            basis = self.basis.to(x.device, work)
            moved = (gain * (moved @ basis)) @ basis.mT
        return (scale.to(work) * mean + moved).reshape(x.shape).to(x.dtype)


@final
@dataclass(frozen=True, eq=False, init=False)
class MixtureNetwork:
    r"""Posterior mean of a mixture of isotropic Gaussians, ``x_0 ~ sum_k w_k N(m_k, v_k I)``.

    With ``s_k^2 = alpha^2 v_k + sigma^2`` and the responsibilities
    ``r_k ~ w_k s_k^{-d} exp(-|x - alpha m_k|^2 / (2 s_k^2))``, which sum to one,

        E[x_0 | x_t = x] = sum_k r_k (alpha v_k x + sigma^2 m_k) / s_k^2.

    Args:
        schedule: Noise schedule, ``x_t = alpha x_0 + sigma eps``.
        means: ``m``, ``(K, *shape)``.
        variances: ``v``, a number or ``(K,)``, not negative; zero makes a component a point.
        weights: ``w``, ``(K,)``, positive; they are divided by their sum. Uniform by default.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If one is not finite, has the wrong shape or is out of range.
    """

    schedule: NoiseSchedule
    means: Tensor
    variances: Tensor
    weights: Tensor

    def __init__(
        self,
        schedule: NoiseSchedule,
        means: Tensor,
        variances: Tensor | float,
        weights: Tensor | None = None,
    ) -> None:
        """Check the arguments; keep them as float64 tensors, one variance for all as ``(1,)``."""
        centres, spread = _real_tensor("means", means), _real_tensor("variances", variances)
        if centres.ndim < 1 or centres.numel() == 0:
            raise ValueError(f"means must have shape (K, *shape) with K >= 1, got {tuple(centres.shape)}")
        count = len(centres)
        shares = centres.new_ones(count) if weights is None else weights
        shares = _real_tensor("weights", shares).to(centres.device)
        if spread.shape not in ((), (count,)) or bool((spread < 0).any()):
            raise ValueError(f"variances must be one number or {count}, none negative, got {_brief(spread)}")
        if shares.shape != (count,) or bool((shares <= 0).any()):
            raise ValueError(f"weights must be {count} positive numbers, got {_brief(shares)}")
        _freeze(
            self,
            schedule=instance("schedule", schedule, NoiseSchedule),
            means=centres,
            variances=spread.to(centres.device).reshape(-1),
            weights=shares / shares.sum(),
        )

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Posterior mean of rows ``x (R, *shape)`` at their times ``t (R,)``, in the dtype of ``x``."""
        alpha, noise = levels(self.schedule, t, x, tuple(self.means.shape[1:]))
        work = torch.promote_types(x.dtype, torch.float32)
        # Everything is measured from the mean of the means: less is lost where |x - alpha m|^2 is expanded.
        means = _flat(self.means).to(x.device)
        centre = self.weights.to(x.device) @ means
        offsets = (means - centre).to(work)
        y = _flat(x).to(work) - alpha.to(work) * centre.to(work)

        v = self.variances.to(x.device)
        variance = alpha.square() * v + noise
        distance = (
            y.square().sum(1, keepdim=True)
            - 2 * alpha * (y @ offsets.mT)
            + alpha.square() * offsets.double().square().sum(1)
        )
        logits = self.weights.to(x.device).log() - 0.5 * (y.shape[1] * variance.log() + distance / variance)
        share = logits.softmax(1)
        gain = (share * (alpha * v / variance)).sum(1, keepdim=True)
        pull = share * (noise / variance)  # 1 - alpha gain, per component and without cancellation
        estimate = centre.to(work) + gain.to(work) * y + pull.to(work) @ offsets
        return estimate.reshape(x.shape).to(x.dtype)


def GaussianDenoiser(  # noqa: N802 - reads as the class of denoiser it makes
    schedule: NoiseSchedule, mean: Tensor | float = 0.0, covariance: Tensor | float = 1.0
) -> Denoiser:
    """Build the exact denoiser of Gaussian data; arguments as :class:`GaussianNetwork`."""
    network = GaussianNetwork(schedule, mean, covariance)
    centre = float(network.mean.mean())
    variance = float(network.eigenvalues.mean() + (network.mean - centre).square().mean())
    return Denoiser(network, schedule, "sample", data_mean=centre, data_variance=variance)


def MixtureDenoiser(  # noqa: N802 - reads as the class of denoiser it makes
    schedule: NoiseSchedule, means: Tensor, variances: Tensor | float, weights: Tensor | None = None
) -> Denoiser:
    """Build the exact denoiser of a Gaussian mixture; arguments as :class:`MixtureNetwork`."""
    network = MixtureNetwork(schedule, means, variances, weights)
    rows = _flat(network.means)
    centre = float(network.weights @ rows.mean(1))
    variance = float(network.weights @ (network.variances + (rows - centre).square().mean(1)))
    return Denoiser(network, schedule, "sample", data_mean=centre, data_variance=variance)


def _real_tensor(name: str, value: object) -> Tensor:
    """Return a number, array or tensor as a finite float64 tensor of its own."""
    if not isinstance(value, Tensor):
        try:
            array = np.asarray(value)
        except ValueError as error:
            raise ValueError(f"{name} must be a number or a tensor of real numbers, got {shown(value)}") from error
        # keeps the digits of Python numbers, where torch would make them float32
        tensor = torch.from_numpy(array) if array.dtype.kind in "biuf" else None
    else:
        tensor = value.detach()
    if tensor is None or tensor.is_complex() or tensor.dtype == torch.bool:
        described = f"dtype {tensor.dtype}" if tensor is not None else shown(value)
        raise TypeError(f"{name} must be a number or a tensor of real numbers, got {described}")
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{name} must be finite, got {_brief(tensor)}")
    return tensor.to(torch.float64, copy=True)


def _freeze(record: object, **values: object) -> None:
    """Set the fields of a frozen record, from its own ``__init__``."""
    for name, value in values.items():
        object.__setattr__(record, name, value)


def _flat(rows: Tensor) -> Tensor:
    """View ``(R, *shape)`` as ``(R, d)``, for rows of shape ``()`` and no rows too."""
    return rows.reshape(len(rows), math.prod(rows.shape[1:]))


def _brief(tensor: Tensor) -> str:
    """Describe a tensor in a message: its value if short, else its shape and range."""
    if tensor.numel() <= 4:
        return str(tensor.tolist())
    bounds = f"{float(tensor.min()):g} to {float(tensor.max()):g}"
    return f"shape {tuple(tensor.shape)} with values from {bounds}"


def _eigen(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Diagonalise a covariance matrix; asymmetry and negative eigenvalues of float32 rounding are removed."""
    slack = 1e-6 * float(covariance.abs().max())
    if float((covariance - covariance.mT).abs().max()) > slack:
        raise ValueError("covariance must be a symmetric matrix, got one that is not")
    eigenvalues, basis = torch.linalg.eigh((covariance + covariance.mT) / 2)
    if (least := float(eigenvalues[0])) < -slack:
        raise ValueError(f"covariance must be positive semidefinite, got an eigenvalue {least:g}")
    return eigenvalues.clamp(min=0.0), basis


def levels(
    schedule: NoiseSchedule, t: float | Tensor, x: Tensor, shape: tuple[int, ...] | None
) -> tuple[Tensor, Tensor]:
    """Check rows and their times; return ``alpha`` and ``sigma^2``, float64 ``(R, 1)``."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.ndim < 1 or (shape is not None and tuple(x.shape[1:]) != shape):
        wanted = "*shape" if shape is None else ", ".join(map(str, shape))
        raise ValueError(f"x must have shape (R, {wanted}), got {tuple(x.shape)}")
    times = torch.as_tensor(t, dtype=torch.float64, device=x.device)
    if times.shape not in ((), (len(x),)):
        raise ValueError(f"t must be a number or one per row, ({len(x)},), got shape {tuple(times.shape)}")
    rows = times.expand(len(x))[:, None]
    alpha, sigma = schedule.levels(rows)
    return alpha, sigma.square().clamp(min=_LEAST_VARIANCE)
