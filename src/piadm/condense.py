"""The condensed path: a linear recurrence over many steps as a few small matrices, once, in float64.

With the network frozen to ``D = G x[0] + g + R`` the affine step (1) is a linear recurrence with small
constant coefficients, whatever the data's dimension:

    x_{j+1} = (a_j + b_j G_j e_0^T) x_j + b_j (g_j + (W R)_j) + c_j xi_j

so the states at the nodes and at the end are

    x = start x_0 + offset + P R + N xi                                                            (2)

and likewise for a multistep recurrence, which is a triangular system instead of a walk.

A round of a parallel sampler is one network call on the nodes and one product with ``P``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from piadm.integrators import AffineSteps, MultistepSteps, Steps
from piadm.memo import memoized
from piadm.nodes import NodeSet

Array = NDArray[np.float64]


@dataclass(frozen=True)
class CondensedPath:
    """Equation (2) for ``n`` nodes and the end of the path, float64 on the CPU.

    Attributes:
        times: schedule times of the nodes, shape ``(n,)``.
        slopes: ``G`` at the nodes, shape ``(n,)``.
        constants: ``g`` at the nodes, shape ``(n,)``.
        start: initial state to outputs, shape ``(n + 1, s, s)``; output ``n`` is the end of the path.
        offset: what the constants ``g`` add to the outputs, shape ``(n + 1, s)``.
        response: ``P``, node residuals to outputs, shape ``(n + 1, s, n)``.
        noise: ``N``, step noises to outputs, shape ``(n + 1, s, J, r)``.
    """

    times: Tensor
    slopes: Tensor
    constants: Tensor
    start: Tensor
    offset: Tensor
    response: Tensor
    noise: Tensor

    @property
    def count(self) -> int:
        """Number of nodes ``n``."""
        return len(self.times)

    @property
    def components(self) -> int:
        """Number of state components ``s``."""
        return self.start.shape[1]

    @cached_property
    def first_moved(self) -> list[int]:
        """For each node the first one that its residual, or that of one after it, changes."""
        return first_moved(self.response[:, 0])


def first_moved(response: Tensor) -> list[int]:
    """The first node that the residual of each, or of one after it, changes, itself included: by ``P (n + 1, n)``."""
    acts, own = response.ne(0), torch.arange(response.shape[1], device="cpu")
    first = torch.where(acts.any(0), acts.byte().argmax(0), own).minimum(own)
    found: list[int] = first.flip(0).cummin(0).values.flip(0).tolist()
    return found


@memoized
def condense(steps: Steps, slopes: Tensor, nodes: NodeSet, constants: Tensor | None = None) -> CondensedPath:
    """Condense a path: carry the matrices through the recurrence, one step at a time.

    Every entry is a product of neighbouring factors, never a ratio of cumulative products, so growth and
    decay over many orders of magnitude are both exact to rounding.

    Args:
        steps: coefficients of the ``J`` steps.
        slopes: Jacobian guess ``G_j`` of every step, shape ``(J,)``.
        nodes: where the network is called, what it reads, and the interpolation ``W``.
        constants: constant part ``g_j`` of the denoised estimate at every step, shape ``(J,)``; None: zero.
    """
    s, r, count, n = steps.components, steps.normals, steps.count, nodes.count
    constants = torch.zeros_like(slopes) if constants is None else constants
    model = np.concatenate([constants.numpy()[:, None], nodes.weights.numpy()], axis=1)
    read = nodes.reading_matrix().numpy()
    # The columns of every output: start (s), offset (1), node residuals (n), noises of all steps (J r).
    if isinstance(steps, AffineSteps):
        whole = torch.from_numpy(_walk(steps, slopes.numpy(), model, read))
    else:
        whole = torch.from_numpy(_solve(steps, slopes.numpy(), model, read))
    start, offset, response, noises = torch.split(whole, [s, 1, n, count * r], dim=2)
    return CondensedPath(
        times=steps.times[nodes.indices],
        slopes=slopes[nodes.indices],
        constants=constants[nodes.indices],
        start=start,
        offset=offset.squeeze(2),
        response=response,
        noise=noises.reshape(n + 1, s, count, r),
    )


@memoized
def weights_on_end(steps: Steps, slopes: Tensor) -> Tensor:
    """How a residual at each step acts on the end: the last row of ``P`` for every step a node, shape ``(J,)``.

    The same recurrence, walked backwards by one row, so that no other row is computed.

    Args:
        steps: coefficients of the ``J`` steps.
        slopes: Jacobian guess ``G_j`` of every step, shape ``(J,)``.
    """
    b = steps.b.numpy()
    if not isinstance(steps, AffineSteps):
        last = np.eye(1, steps.count, steps.count - 1)[0][:, None]
        system = torch.from_numpy(_system(steps, slopes.numpy()).T.copy())
        row = torch.linalg.solve_triangular(system, torch.from_numpy(last), upper=True, unitriangular=True)
        return torch.from_numpy(row[:, 0].numpy() @ b)
    a = _with_slopes(steps, slopes.numpy())
    row, weights = np.eye(1, steps.components)[0], np.empty(steps.count)
    for j in range(steps.count - 1, -1, -1):
        weights[j] = row @ b[j]
        row = row @ a[j]
    return torch.from_numpy(weights)


def _with_slopes(steps: AffineSteps, slopes: Array) -> Array:
    """``a + b G``: the factor of each step, shape ``(J, s, s)``."""
    a = steps.a.numpy().copy()
    a[:, :, 0] += steps.b.numpy() * slopes[:, None]
    return a


def _system(steps: MultistepSteps, slopes: Array) -> Array:
    """The recurrence as a matrix: ``x - F x_before``, shape ``(J, J)``."""
    system = np.eye(steps.count)
    system[:, :-1] -= (steps.a.numpy() + steps.b.numpy() * slopes)[:, 1:]
    return system


def _walk(steps: AffineSteps, slopes: Array, model: Array, read: Array) -> Array:
    """The outputs' matrices ``(n + 1, s, columns)``, by the recurrence itself."""
    s, r, count = steps.components, steps.normals, steps.count
    a, b, c = _with_slopes(steps, slopes), steps.b.numpy(), steps.c.numpy()
    first = s + model.shape[1]
    state = np.zeros((s, first + count * r))
    state[:, :s] = np.eye(s)
    outputs = np.zeros((len(read) + 1, *state.shape))
    for j in range(count):
        for i in read[:, j].nonzero()[0]:
            outputs[i] += read[i, j] * state
        state = a[j] @ state
        state[:, s:first] += b[j][:, None] * model[j]
        state[:, first + j * r : first + (j + 1) * r] += c[j]
    outputs[-1] = state
    return outputs


def _solve(steps: MultistepSteps, slopes: Array, model: Array, read: Array) -> Array:
    """The outputs' matrices ``(n + 1, 1, columns)``: forward substitution in ``x = F x_before + known``."""
    b, count = steps.b.numpy(), steps.count
    first = (steps.a.numpy() + b * slopes)[:, :1]
    known = np.concatenate([first, b @ model, steps.c.numpy().reshape(count, -1)], axis=1)
    system = torch.from_numpy(_system(steps, slopes))
    states = torch.linalg.solve_triangular(system, torch.from_numpy(known), upper=False, unitriangular=True).numpy()
    initial = np.eye(1, known.shape[1])
    walked = np.concatenate([initial, states])
    return np.concatenate([read @ walked[:-1], walked[-1:]])[:, None]
