"""The corrector's exact step against matrix exponentials, and its stationary law."""

from __future__ import annotations

import mpmath
import pytest
import torch

import piadm


def exact_step(gamma: float, eps: float) -> tuple[list[float], list[list[float]]]:
    """Score weights (u, v) and covariance of one step with s frozen, by 50-digit Van Loan exponentials."""
    with mpmath.workdps(50):
        g, e = mpmath.mpf(gamma), mpmath.mpf(eps)
        drift = mpmath.matrix([[0, 1, 0], [0, -g, 1], [0, 0, 0]])  # d(u, v, s)
        weights = mpmath.expm(drift * e)
        a = mpmath.matrix([[0, 1], [0, -g]])
        q = mpmath.matrix([[0, 0], [0, 2 * g]])
        big = mpmath.zeros(4, 4)
        big[:2, :2], big[:2, 2:], big[2:, 2:] = -a, q, a.T
        f = mpmath.expm(big * e)
        cov = f[2:, 2:].T * f[:2, 2:]
        return [float(weights[0, 2]), float(weights[1, 2])], [[float(cov[i, j]) for j in range(2)] for i in range(2)]


@pytest.mark.parametrize("eps", [1e-6, 1e-3, 0.03, 0.3, 1.0])
@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_step_is_exact_for_a_frozen_score(gamma: float, eps: float) -> None:
    schedule, time = piadm.OUSchedule(), 0.7
    corrector = piadm.Corrector(duration=eps, length=eps, step=eps, iterations=1, friction=gamma)
    steps = corrector.steps(schedule, time)
    alpha, variance = schedule.alpha(time).item(), schedule.sigma(time).item() ** 2
    weights, cov = exact_step(gamma, eps)
    gain = steps.b[0] * variance / alpha  # b = (weight of s) alpha / sigma^2
    # Relative 1e-9: what is left of float64 after the one unavoidable difference in the position's own noise.
    torch.testing.assert_close(gain, torch.tensor(weights, dtype=torch.float64), rtol=1e-9, atol=0)
    got = steps.c[0] @ steps.c[0].T
    torch.testing.assert_close(got, torch.tensor(cov, dtype=torch.float64), rtol=1e-9, atol=0)


def test_stationary_law_is_the_target_up_to_the_step() -> None:
    """For Gaussian data the corrector leaves the marginal law at its time invariant, with first-order bias in eps."""
    schedule, time, variance = piadm.OUSchedule(), 0.5, 0.4
    alpha, sigma = schedule.alpha(time).item(), schedule.sigma(time).item()
    target = alpha**2 * variance + sigma**2
    jacobian = alpha * variance / target  # D(u) = jacobian * u
    biases = []
    for eps in (0.02, 0.01):
        steps = piadm.Corrector(duration=eps, length=eps, step=eps, iterations=1, friction=1.5).steps(schedule, time)
        a = steps.a[0].clone()
        a[:, 0] += steps.b[0] * jacobian
        law = torch.diag(torch.tensor([target, 1.0], dtype=torch.float64))
        noise = steps.c[0] @ steps.c[0].T
        for _ in range(20_000):
            law = a @ law @ a.T + noise
        biases.append(abs(law[0, 0].item() - target) / target)
    assert biases[1] < 0.02
    # First order in eps or better: 2 up to the next order's share.
    assert biases[0] / biases[1] > 1.85
