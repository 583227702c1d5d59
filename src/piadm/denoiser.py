"""The denoiser: one adapter between a user's network and every sampler.

Whatever a network predicts, the samplers see one function, the denoised estimate

    x0_hat(x, t) = p(t) x + q(t) F(x, t),

with two scalars per time that follow from ``x_t = alpha x_0 + sigma eps``, and clipped where the denoiser says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from piadm._checks import choice, described, finite_float, float_field
from piadm.conditions import parts, rebuilt
from piadm.network import Network, check_network, network_dtype, rows_per_call, unwrap
from piadm.schedule import NoiseSchedule

#: Variances from here on are slips: their products would leave the range of floating-point numbers.
WIDEST = 1e100

PREDICTIONS = ("epsilon", "score", "sample", "v", "velocity")


@dataclass(frozen=True)
class Denoiser:
    """A network, the schedule it was trained on, and what it predicts.

    Calling it gives ``x0_hat(x, t) = clip(p(t) x + q(t) F(x, t))``:

    ========== ====================================== ======================================
    prediction the network F returns                  denoised estimate, before ``clip``
    ========== ====================================== ======================================
    epsilon    the noise ``eps``                      ``(x - sigma F) / alpha``
    score      ``grad log p_t(x)``                    ``(x + sigma^2 F) / alpha``
    sample     ``x_0``                                ``F``
    v          ``alpha eps - sigma x_0``              ``(alpha x - sigma F)/(alpha^2+sigma^2)``
    velocity   ``dx/dt = alpha' x_0 + sigma' eps``    ``(sigma' x - sigma F)/(alpha sigma' - alpha' sigma)``
    ========== ====================================== ======================================

    A flow ``v`` with its data at time 1, as that of torchcfm, is ``F = -v(x, 1 - t)`` on a ``FlowSchedule``.

    Args:
        network: callable ``network(x, t, **condition)`` with ``x`` of shape ``(R, *shape)`` and one schedule
            time per row, ``t`` of shape ``(R,)`` (float32, of half-precision networks, too; float64 of float64 ones).
            It returns a tensor of the shape of ``x``, a tuple that starts with one, or an object with one as
            ``.sample``.  Each row of the output must depend on its own row of the arguments alone: a network that
            draws random numbers or mixes rows has no well-defined sample to converge to, and is warned of where samples
            take many rounds.  It is called under ``torch.no_grad``; guidance that needs gradients can turn them on with
            ``torch.enable_grad``.  Where the sampler is called under ``torch.inference_mode``, it has to leave that by
            ``torch.inference_mode(False)`` and clone its arguments.
        schedule: the noise schedule of the network, which is called with the schedule's times.
        prediction: one of "epsilon", "score", "sample", "v", "velocity".
        data_mean: mean of the data over all coordinates, in the network's units.  Only the starting guess and
            the Gaussian linearization use it: a wrong value costs rounds.
        data_variance: variance of the data about ``data_mean``, over all coordinates, in squared units.  Besides, the
            number of nodes of ``sample`` and the estimate of their error depend on it.  Samples that turn out wider or
            narrower are detected and take more rounds; but if it is wrong by a factor of ten or more, a few in a
            hundred may end outside the tolerance (hardly any with ``nodes="all"``).  ``measure_moments`` measures both.
        draft: a much cheaper denoiser of about the same data, with the same schedule and conditions, from whose path
            ``sample`` starts; None: no draft.  A bad draft costs rounds, never accuracy.  ``fit_draft`` fits one to
            samples.  If its network has an integer ``coordinates_per_row``, samples of another size are refused.
        clip: what becomes of denoised estimates ``(R, *shape)``, row by row, such as ``partial(torch.clamp, min=-1,
            max=1)``; None: they stay as they are.

    Raises:
        TypeError: if the network or the clip is not callable, the schedule is no ``NoiseSchedule`` or the draft no
            ``Denoiser``.
        ValueError: if the prediction is unknown, the mean is not finite, the variance not finite and positive, or the
            draft's schedule is a different one.

    Reference: Salimans & Ho 2022 (arXiv 2202.00512, appendix D) for v; Lipman et al. 2023
        (arXiv 2210.02747) for velocity.
    """

    network: Network
    schedule: NoiseSchedule
    prediction: str
    data_mean: float = 0.0
    data_variance: float = 1.0
    draft: Denoiser | None = None
    clip: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        check_network(self.network)
        if not isinstance(self.schedule, NoiseSchedule):
            raise TypeError(f"schedule must be a piadm.NoiseSchedule, got {described(self.schedule)}")
        choice("prediction", self.prediction, PREDICTIONS)
        if self.clip is not None and not callable(self.clip):
            raise TypeError(f"clip must be callable on denoised estimates, or None, got {described(self.clip)}")
        float_field(self, "data_mean")
        float_field(self, "data_variance", low=0.0, high=WIDEST)
        if self.draft is not None and not isinstance(self.draft, Denoiser):
            raise TypeError(f"draft must be a piadm.Denoiser or None, got {described(self.draft)}")
        if self.draft is not None and not _agree(self.schedule, self.draft.schedule):
            raise ValueError(
                f"draft must have the schedule of the denoiser, {self.schedule}, got one with {self.draft.schedule}"
            )

    @classmethod
    def from_diffusers(
        cls,
        network: object,
        scheduler: object,
        *,
        data_mean: float = 0.0,
        data_variance: float = 1.0,
    ) -> Denoiser:
        """A denoiser from a diffusers network, with the noise levels, prediction type and clipping of its scheduler.

        Args:
            network: a diffusers model called as ``network(x, timestep=t, **condition)``.  Its other arguments are
                conditions for ``sample``; of an output with a learned variance the first half of the channels is used.
                A flow network of diffusers is called with the time convention of its own pipeline, and its output has
                that pipeline's sign; a module of any other class is called with the scheduler's time,
                ``num_train_timesteps`` times the noise level.
            scheduler: a diffusers scheduler with a table ``alphas_cumprod``, or one of the EDM or the flow-matching
                schedulers, or with ``use_flow_sigmas=True`` and flow prediction; its steps are not used.  With
                ``clip_sample`` or ``thresholding`` the denoised estimate is clipped as it says.
            data_mean: as above.
            data_variance: as above.

        Raises:
            TypeError, ValueError: naming the argument, what was received and what is accepted.
            ImportError: if diffusers is missing or too old.
        """
        from piadm.interop.diffusers.bare import denoiser

        return denoiser(network, scheduler, data_mean, data_variance)

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The scalars ``(p, q)`` of ``x0_hat = p x + q F`` at times ``t``, float64, of the shape of ``t``."""
        alpha, sigma = self.schedule.levels(t)
        if self.prediction == "sample":
            return torch.zeros_like(alpha), torch.ones_like(alpha)
        if self.prediction == "epsilon":
            return 1 / alpha, -sigma / alpha
        if self.prediction == "score":
            return 1 / alpha, sigma.square() / alpha
        if self.prediction == "v":
            total = alpha.square() + sigma.square()
            return alpha / total, -sigma / total
        alpha_dot, sigma_dot = schedule_slopes(self.schedule, t)
        wronskian = alpha * sigma_dot - alpha_dot * sigma
        return sigma_dot / wronskian, -sigma / wronskian

    def __call__(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:  # noqa: ANN401 - the network's own
        """Denoised estimate of rows ``x (R, *shape)`` at schedule times ``t (R,)``, in the dtype of ``x``.

        Raises:
            ValueError: if the network or the clip returns another shape than that of ``x``.
            TypeError: if it does not return real floating-point numbers.
        """
        dtype = network_dtype(self.network, x.dtype)
        # Copies: the network may work in place on what it is given.
        given = x.to(dtype, copy=True), t.to(torch.promote_types(dtype, torch.float32), copy=True)
        output = unwrap(self.network(*given, **condition))
        if output.shape != x.shape:
            raise ValueError(
                f"network returned shape {tuple(output.shape)} for rows of shape {tuple(x.shape)}; "
                "it must return the shape of its input (a learned variance must be split off first)"
            )
        if not output.is_floating_point():
            raise TypeError(f"network returned {output.dtype}; it must return floating-point numbers")
        p, q = (c.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1)) for c in self.coefficients(t.double()))
        estimate = (p * x).addcmul_(q, output.to(x.dtype))
        if self.clip is None:
            return estimate
        clipped = self.clip(estimate)
        if not isinstance(clipped, Tensor) or clipped.shape != x.shape:
            raise ValueError(f"clip must return denoised estimates of shape {tuple(x.shape)}, got {described(clipped)}")
        return clipped.to(x.dtype)

    @property
    def rows_per_call(self) -> int:
        """Network rows per row handed in: two under classifier-free guidance, else one."""
        return rows_per_call(self.network)


def schedule_slopes(schedule: NoiseSchedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """``(d alpha/dt, d sigma/dt)`` at ``t``, by differentiating the schedule itself.

    Works under ``no_grad`` and ``inference_mode``, where samplers usually run.
    """
    with torch.inference_mode(False), torch.enable_grad():
        times = t.detach().double().clone().requires_grad_()
        return _slope(schedule.alpha(times), times), _slope(schedule.sigma(times), times)


def _slope(value: Tensor, times: Tensor) -> Tensor:
    """Derivative of each entry of ``value`` with respect to its own time; zero for a constant.

    Raises:
        ValueError: if it is no constant, and torch cannot differentiate it.
    """
    if not value.requires_grad:
        if value.device.type == "cpu" and bool((value != value.flatten()[:1]).any()):
            raise ValueError("schedule must compute alpha and sigma by torch: prediction 'velocity' needs their slopes")
        return torch.zeros_like(times).detach()
    return torch.autograd.grad(value.sum(), times)[0]


def _agree(one: NoiseSchedule, other: NoiseSchedule) -> bool:
    """Whether two schedules are the same, at all of some times."""
    if one is other:
        return True
    times = torch.linspace(one.t_start, one.t_end, 9, dtype=torch.float64, device="cpu")
    return one.t_range == other.t_range and all(
        torch.allclose(mine(times), theirs(times), rtol=1e-6, atol=1e-9)
        for mine, theirs in ((one.alpha, other.alpha), (one.sigma, other.sigma))
    )


class GuidedNetwork:
    """Classifier-free guidance: ``F = F(null) + scale (F(condition) - F(null))``, in one doubled batch.

    The guided output is affine in the two predictions, so it can be wrapped before the conversion to the
    denoised estimate, whatever the network predicts.

    Args:
        network: the conditional network ``network(x, t, **condition)``.
        scale: guidance scale; 1 is the conditional network, 0 the unconditional one.
        null: the condition that stands for "none", one entry per condition that is given at the call: a tensor of one
            row, ``(1, ...)``, or without a leading dimension, which is used for every row.  For a condition that is a
            mapping, list or tuple, one with the same entries.

    Raises:
        TypeError: if the network is not callable or ``null`` is no mapping.
        ValueError: if the scale is not finite; at the call, if ``null`` and the condition do not have the same entries,
            or an entry of ``null`` has several rows.

    Reference: Ho & Salimans 2022 (arXiv 2207.12598, eq. 6).
    """

    def __init__(self, network: Network, scale: float, null: Mapping[str, Any]) -> None:
        check_network(network)
        if not isinstance(null, Mapping):
            raise TypeError(f"null must be a mapping from condition names to values, got {described(null)}")
        self.network, self.scale, self.null = network, finite_float("scale", scale), dict(null)

    @property
    def rows_per_call(self) -> int:
        """Network rows per row handed in: two, or twice as many as the network itself makes of one."""
        return 2 * rows_per_call(self.network)

    def __call__(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:  # noqa: ANN401 - the network's own
        """Guided prediction of rows ``x (R, *shape)`` at times ``t (R,)``."""
        if different := sorted(set(condition) ^ set(self.null)):
            raise ValueError(f"null and condition must have the same entries, one of them lacks {', '.join(different)}")
        both = {name: _stack(f"[{name!r}]", value, self.null[name], len(x)) for name, value in condition.items()}
        output = unwrap(self.network(torch.cat([x, x]), torch.cat([t, t]), **both))
        given, null = output.chunk(2)
        return null + self.scale * (given - null)


def _stack(name: str, given: Any, null: Any, rows: int) -> Any:  # noqa: ANN401 - any condition
    """The condition of the doubled batch: given rows first, null rows second; what is nested, part by part."""
    inside, others = (None, None) if given is null else (parts(given), parts(null))
    if inside is not None and others is not None and inside.keys() == others.keys():
        stacked = [_stack(f"{name}[{key!r}]", part, others[key], rows) for key, part in inside.items()]
        return rebuilt(given, inside, stacked)
    if not isinstance(given, Tensor):
        if not _same(given, null):
            raise ValueError(
                f"condition{name}, which guidance varies, must be a tensor with one row per sample, or null{name} must "
                "have the same entries"
            )
        return given
    accepted = f"null{name} must be a number or a tensor of one row, {(1, *given.shape[1:])}"
    try:
        null = null if isinstance(null, Tensor) else torch.as_tensor(null, device="cpu")
        # A blocking copy to an accelerator would wait for it; one from there to the host has to.
        null = null.to(given.device, given.dtype, non_blocking=given.device.type != "cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{accepted}, got {described(null)}") from error
    if null.ndim == given.ndim and len(null) != 1:
        raise ValueError(f"{accepted}, got shape {tuple(null.shape)}")
    return torch.cat([given, null.expand(rows, *given.shape[1:])])


def _same(one: Any, other: Any) -> bool:  # noqa: ANN401 - any condition
    """Whether two conditions are one and the same, or equal; of those that hold tensors equality says nothing."""
    try:
        return one is other or bool(one == other)
    except (RuntimeError, ValueError):
        return False
