"""Analytic denoisers: Tweedie's identity, limits, agreement of their forms, the exact flow, and bad input."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal

from piadm.denoiser import Denoiser
from piadm.models import GaussianDenoiser, GaussianNetwork, MixtureDenoiser, MixtureNetwork
from piadm.schedule import (
    CosineSchedule,
    DiscreteSchedule,
    FlowSchedule,
    NoiseSchedule,
    OUSchedule,
    VESchedule,
    VPSchedule,
)

TABLE = DiscreteSchedule.ddpm()
SCHEDULES = [OUSchedule(), VPSchedule(), CosineSchedule(), VESchedule(), FlowSchedule(), TABLE]
OU, FLOW = OUSchedule(), FlowSchedule()
EXACT = 1e-11  # a few hundred roundings of float64, of quantities of order one
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def covariance(d: int) -> Tensor:
    root = normal(d, d, seed=7)
    return root @ root.T / d + 0.1 * torch.eye(d, dtype=torch.float64)


def noised(schedule: NoiseSchedule, rows: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Rows of the scale that the schedule gives them, at times spread over the log-SNR range [-8, 8]."""
    t = schedule.time(torch.linspace(-8.0, 8.0, rows, dtype=torch.float64))
    scale = (schedule.alpha(t).square() + schedule.sigma(t).square()).sqrt()
    return normal(rows, *shape) * scale.reshape(-1, *[1] * len(shape)), t


def tweedie(schedule: NoiseSchedule, x: Tensor, t: Tensor, log_density: Callable[..., Tensor]) -> Tensor:
    """``(x + sigma^2 grad log p_t(x)) / alpha``, the gradient by automatic differentiation."""
    rows = []
    for row, time in zip(x, t, strict=True):
        alpha, sigma, point = schedule.alpha(time), schedule.sigma(time), row.clone().requires_grad_()
        (score,) = torch.autograd.grad(log_density(point, alpha, sigma), point)
        rows.append((row + sigma.square() * score) / alpha)
    return torch.stack(rows)


def relative(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).abs().max() / expected.abs().max().clamp(min=1.0))


@every_schedule
def test_gaussian_posterior_mean_is_tweedies(schedule: NoiseSchedule) -> None:
    mean, matrix = normal(5, seed=1), covariance(5)
    x, t = noised(schedule, 9, (5,))

    def log_density(y: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        noise = sigma.square() * torch.eye(5, dtype=torch.float64)
        return MultivariateNormal(alpha * mean, alpha.square() * matrix + noise).log_prob(y)

    value = GaussianNetwork(schedule, mean, matrix)(x, t)
    # The identity divides by alpha what cancels to its order: at log-SNR -8 that costs a factor e^4.
    assert relative(value, tweedie(schedule, x, t, log_density)) < EXACT


@every_schedule
@pytest.mark.parametrize("variances", [0.2, torch.tensor([0.05, 0.3, 1.0])])
def test_mixture_posterior_mean_is_tweedies(schedule: NoiseSchedule, variances: float | Tensor) -> None:
    means, weights = normal(3, 4, seed=2), torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    x, t = noised(schedule, 9, (4,))

    def log_density(y: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        variance = alpha.square() * torch.as_tensor(variances, dtype=torch.float64) + sigma.square()
        scale = variance.sqrt().expand(3)[:, None].expand(3, 4)
        parts = Independent(Normal(alpha * means, scale), 1)
        return MixtureSameFamily(Categorical(weights), parts).log_prob(y)

    value = MixtureNetwork(schedule, means, variances, weights)(x, t)
    assert relative(value, tweedie(schedule, x, t, log_density)) < EXACT  # as above


@every_schedule
def test_one_component_is_the_gaussian(schedule: NoiseSchedule) -> None:
    mean = normal(2, 3, seed=3)
    x, t = noised(schedule, 9, (2, 3))
    expected = GaussianNetwork(schedule, mean, 0.3)(x, t)
    assert relative(MixtureNetwork(schedule, mean[None], 0.3)(x, t), expected) < EXACT
    # Equal components are one component too, whatever their weights.
    thrice = MixtureNetwork(schedule, mean.expand(3, 2, 3), 0.3, torch.tensor([0.2, 0.3, 0.5]))
    assert relative(thrice(x, t), expected) < EXACT


@every_schedule
def test_forms_of_one_covariance_agree(schedule: NoiseSchedule) -> None:
    mean, variances = normal(2, 3, seed=3), normal(2, 3, seed=4).square() + 0.05
    x, t = noised(schedule, 9, (2, 3))
    diagonal = GaussianNetwork(schedule, mean, variances)(x, t)
    assert relative(GaussianNetwork(schedule, mean, variances.flatten().diag())(x, t), diagonal) < EXACT
    scalar = GaussianNetwork(schedule, mean, 0.3)(x, t)
    assert relative(GaussianNetwork(schedule, mean, torch.full((2, 3), 0.3, dtype=torch.float64))(x, t), scalar) < EXACT
    rotation = torch.linalg.qr(normal(6, 6, seed=5)).Q
    turned = GaussianNetwork(schedule, rotation @ mean.flatten(), rotation @ variances.flatten().diag() @ rotation.T)
    assert relative(turned(x.flatten(1) @ rotation.T, t), diagonal.flatten(1) @ rotation.T) < EXACT


@pytest.mark.parametrize("v", [0.2, torch.tensor([0.05, 0.3, 1.0])])
def test_limits_of_no_noise_and_no_signal_are_reached(v: float | Tensor) -> None:
    """Rectified flow has sigma = 0 at t = 0 and alpha = 0 at t = 1; OU time 2000 underflows alpha^2."""
    means, x = normal(3, 4, seed=2), normal(6, 4)
    weights = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    networks: list[tuple[GaussianNetwork | MixtureNetwork, GaussianNetwork | MixtureNetwork, Tensor]] = [
        (MixtureNetwork(FLOW, means, v, weights), MixtureNetwork(OU, means, v, weights), weights @ means),
        (GaussianNetwork(FLOW, means[0], 0.3), GaussianNetwork(OU, means[0], 0.3), means[0]),
        (
            GaussianNetwork(FLOW, means[0], covariance(4)),
            GaussianNetwork(OU, means[0], covariance(4)),
            means[0],
        ),
    ]
    for flow, ou, mean in networks:
        assert relative(flow(x, torch.zeros(6)), x) < EXACT
        assert relative(ou(x, torch.zeros(6)), x) < EXACT
        assert relative(flow(x, torch.ones(6)), mean.expand(6, 4)) < EXACT
        assert relative(ou(x, torch.full((6,), 2000.0)), mean.expand(6, 4)) < EXACT


def test_point_data_is_returned_as_it_is() -> None:
    points = normal(3, 4, seed=2)
    near = points[[2, 0, 1]] + 1e-3 * normal(3, 4)
    for t in (0.0, 1e-300, 1e-6):  # rectified flow: sigma = t
        times = torch.full((3,), t)
        assert relative(MixtureNetwork(FLOW, points, 0.0)(near, times), points[[2, 0, 1]]) < EXACT
        assert relative(GaussianNetwork(FLOW, points[0], 0.0)(near, times), points[0].expand(3, 4)) < EXACT


def test_far_away_rows_stay_finite() -> None:
    """All components underflow there: the logits must be normalised before they are exponentiated."""
    network = MixtureNetwork(OU, normal(3, 4, seed=2), torch.tensor([0.0, 0.1, 0.2]))
    for dtype in (torch.float32, torch.float64):
        x = 1e4 * normal(5, 4).to(dtype)
        assert bool(network(x, torch.full((5,), 1e-3)).isfinite().all())


@every_schedule
def test_flow_composes_inverts_and_solves_the_probability_flow_ode(schedule: NoiseSchedule) -> None:
    network = GaussianNetwork(schedule, normal(4, seed=1), covariance(4))
    x, _ = noised(schedule, 6, (4,))
    u, t, s = (schedule.time(torch.full((6,), lam, dtype=torch.float64)) for lam in (-3.0, 0.0, 3.0))
    assert relative(network.flow(x, t, t), x) < EXACT
    assert relative(network.flow(network.flow(x, u, t), t, s), network.flow(x, u, s)) < EXACT
    assert relative(network.flow(network.flow(x, u, s), s, u), x) < 10 * EXACT

    h = 1e-5 * t

    def slope(values: Callable[[Tensor], Tensor]) -> Tensor:
        change = values(t + h) - values(t - h)
        return change / (2 * h).reshape(-1, *[1] * (change.ndim - 1))

    alpha, sigma, estimate = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None], network(x, t)
    noise = (x - alpha * estimate) / sigma
    velocity = slope(schedule.alpha)[:, None] * estimate + slope(schedule.sigma)[:, None] * noise
    # dx/dt = alpha' x0 + sigma' eps; central differences err by (h/t)^2 = 1e-10 times a third derivative
    # and by 1e-16 / (h/t) = 1e-11 of rounding.
    assert (
        relative(
            slope(lambda time: network.flow(x, t, time)) / velocity.abs().max(),
            velocity / velocity.abs().max(),
        )
        < 1e-8
    )


def test_flow_takes_one_time_or_one_per_row_and_carries_the_law() -> None:
    network = GaussianNetwork(OU, 0.5, 0.2)
    x = normal(6, 4)
    rows = network.flow(x, torch.full((6,), 5.0), torch.full((6,), 0.5))
    assert torch.equal(network.flow(x, 5.0, 0.5), rows)
    # Monotone, it carries the quantiles of N(alpha m, alpha^2 lam + sigma^2) at t to those at s.
    ends = [Normal(0.5 * OU.alpha(t), (0.2 * OU.alpha(t).square() + OU.sigma(t).square()).sqrt()) for t in (5.0, 0.5)]
    levels = torch.linspace(0.01, 0.99, 9, dtype=torch.float64)[:, None]
    assert relative(network.flow(ends[0].icdf(levels), 5.0, 0.5), ends[1].icdf(levels)) < EXACT


MEANS = normal(4, 1, 8, 8, seed=6)
DENOISERS = {
    "number": lambda schedule: GaussianDenoiser(schedule, 0.2, 0.5),
    "diagonal": lambda schedule: GaussianDenoiser(schedule, MEANS[0], MEANS[1].square()),
    "matrix": lambda schedule: GaussianDenoiser(schedule, MEANS[0], covariance(64)),
    "mixture": lambda schedule: MixtureDenoiser(schedule, MEANS, 0.3),
}


@every_schedule
@pytest.mark.parametrize("name", DENOISERS)
def test_denoisers_run_in_both_precisions_and_row_by_row(schedule: NoiseSchedule, name: str) -> None:
    denoiser = DENOISERS[name](schedule)
    x, t = noised(schedule, 7, (1, 8, 8))
    t = t.float().double()  # float32 rows see float32 times: give both the same
    exact, single = denoiser(x, t), denoiser(x.float(), t)
    assert isinstance(denoiser, Denoiser) and exact.dtype == torch.float64 and single.dtype == torch.float32
    # 64 coordinates: logits of order 64 e^8 at most, but only their differences over the noise count; 1e-4
    # allows a thousand roundings of float32.
    assert relative(single.double(), exact) < 1e-4
    alone = torch.cat([denoiser(x[b : b + 1], t[b : b + 1]) for b in range(7)])
    assert relative(alone, exact) < EXACT


def test_half_precision_rows_keep_their_dtype_and_empty_batches_and_scalar_rows_work() -> None:
    mixture, gaussian = MixtureNetwork(OU, torch.tensor([-1.0, 1.0]), 0.1), GaussianNetwork(OU)
    for network in (mixture, gaussian):
        assert network(torch.zeros(3).half(), torch.ones(3)).dtype == torch.float16
        assert network(torch.zeros(0), torch.ones(0)).shape == (0,)
    assert float(mixture(torch.zeros(1), torch.ones(1))) == pytest.approx(0.0, abs=1e-7)  # by symmetry


def test_data_mean_and_variance_are_those_of_all_coordinates() -> None:
    mixture = MixtureDenoiser(OU, MEANS[:3], torch.tensor([0.1, 0.2, 0.3]), torch.tensor([1.0, 2.0, 3.0]))
    data = MEANS[:3].repeat_interleave(torch.tensor([1, 2, 3]), dim=0)
    within = (0.1 + 2 * 0.2 + 3 * 0.3) / 6
    assert mixture.data_mean == pytest.approx(float(data.mean()), rel=1e-7)  # the variances are float32
    assert mixture.data_variance == pytest.approx(float(data.var(correction=0)) + within, rel=1e-7)
    matrix = covariance(64)
    gaussian = GaussianDenoiser(OU, MEANS[0], matrix)
    assert gaussian.data_mean == pytest.approx(float(MEANS[0].mean()), rel=1e-12)
    expected = float(matrix.trace()) / 64 + float(MEANS[0].var(correction=0))
    assert gaussian.data_variance == pytest.approx(expected, rel=1e-12)


ROWS, ONES = torch.zeros(2, 4), torch.ones(2)
BAD: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: GaussianNetwork("ou"), TypeError, "schedule must be a NoiseSchedule, got 'ou'"),  # type: ignore[arg-type]
    (lambda: GaussianNetwork(OU, "x"), TypeError, "mean must be a number or a tensor"),  # type: ignore[arg-type]
    (lambda: GaussianNetwork(OU, float("nan")), ValueError, "mean must be finite, got nan"),
    (lambda: GaussianNetwork(OU, 0.0, -1.0), ValueError, "covariance must have no negative variance, got -1"),
    (lambda: GaussianNetwork(OU, 0.0, True), TypeError, "covariance must be a number"),
    (
        lambda: GaussianNetwork(OU, torch.zeros(3), torch.ones(4)),
        ValueError,
        "variances of the shape (3,) of mean, or a (3, 3) matrix, got shape (4,)",
    ),
    (
        lambda: GaussianNetwork(OU, torch.zeros(2), torch.tensor([[1.0, 0.5], [0.0, 1.0]])),
        ValueError,
        "covariance must be a symmetric matrix",
    ),
    (
        lambda: GaussianNetwork(OU, torch.zeros(2), torch.tensor([[1.0, 2.0], [2.0, 1.0]])),
        ValueError,
        "covariance must be positive semidefinite, got an eigenvalue -1",
    ),
    (
        lambda: GaussianNetwork(OU, torch.zeros(3))(ROWS, ONES),
        ValueError,
        "x must have shape (R, 3), got (2, 4)",
    ),
    (lambda: GaussianNetwork(OU)(ROWS.int(), ONES), TypeError, "x must be a floating-point tensor"),
    (lambda: GaussianNetwork(OU)(ROWS, torch.ones(3)), ValueError, "t must be a number or one per row, (2,)"),
    (
        lambda: GaussianNetwork(OU).flow(ROWS, 1.0, torch.ones(3)),
        ValueError,
        "t must be a number or one per row",
    ),
    (lambda: MixtureNetwork(None, ROWS, 1.0), TypeError, "schedule must be a NoiseSchedule"),  # type: ignore[arg-type]
    (lambda: MixtureNetwork(OU, torch.tensor(1.0), 1.0), ValueError, "means must have shape (K, *shape)"),
    (lambda: MixtureNetwork(OU, ROWS[:0], 1.0), ValueError, "means must have shape (K, *shape)"),
    (lambda: MixtureNetwork(OU, ROWS * torch.inf, 1.0), ValueError, "means must be finite"),
    (lambda: MixtureNetwork(OU, ROWS, -0.5), ValueError, "variances must be one number or 2, none negative"),
    (lambda: MixtureNetwork(OU, ROWS, torch.ones(3)), ValueError, "variances must be one number or 2"),
    (lambda: MixtureNetwork(OU, ROWS, 1.0, torch.ones(3)), ValueError, "weights must be 2 positive numbers"),
    (
        lambda: MixtureNetwork(OU, ROWS, 1.0, torch.tensor([1.0, 0.0])),
        ValueError,
        "weights must be 2 positive numbers, got [1.0, 0.0]",
    ),
    (
        lambda: MixtureNetwork(OU, ROWS, 1.0)(torch.zeros(2, 3), ONES),
        ValueError,
        "x must have shape (R, 4), got (2, 3)",
    ),
    (lambda: GaussianDenoiser(OU, 0.0, 0.0), ValueError, "data_variance must be"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[message[:40] for *_, message in BAD])
def test_bad_input_is_named(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()
