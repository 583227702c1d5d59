"""Samples in a picture: images, points of the plane or curves, as their shape suggests."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SHOWN, _GAP = 64, 2  # images at most, pixels between them
_CURVES, _POINTS = 16, 4096  # curves and points at most
_WIDEST = 1024  # pixels of a page, about; of larger images every second or third is shown
_TICKS = 0.45  # inches for the numbers at an axis
#: Values are taken to be in [-1, 1], as images are, unless more than one in a hundred is further out than this.
_USUAL, _OUTER = 1.1, 0.01

Pixels = NDArray[np.float64]


def show(axes: Axes, samples: Tensor) -> int:
    """Show samples ``(B, *shape)``, as many as there is room for.

    Of videos the first frame is shown, of images with neither one nor three channels the first channel.

    Returns:
        How many are shown.
    """
    shape, values = tuple(samples.shape[1:]), samples.detach().cpu().double().numpy()
    if shape == (2,):
        return _points(axes, values[:_POINTS])
    if len(shape) == 1:
        return _curves(axes, values[:_CURVES])
    return _images(axes, images(values[:_SHOWN]))


def unit(samples: Tensor) -> str:
    """What one number of a sample is called."""
    return "pixel" if samples.ndim > 3 else "coordinate"


def images(values: Pixels) -> Pixels:
    """Samples of two dimensions or more as images ``(B, height, width, 1 or 3)``."""
    if values.ndim == 3:
        values = values[:, None]
    values = values.reshape(*values.shape[:2], -1, *values.shape[-2:])[:, :, 0]
    channels = values.shape[1] if values.shape[1] in (1, 3) else 1
    return np.moveaxis(values[:, :channels], 1, -1)


def mosaic(samples: Pixels) -> Pixels:
    """Lay images ``(B, height, width, c)`` out in a near-square grid, with NaN in the gaps."""
    count, height, width, channels = samples.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    page = np.full((rows * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, channels), np.nan)
    for index, image in enumerate(samples):
        top, left = (index // columns) * (height + _GAP), (index % columns) * (width + _GAP)
        page[top : top + height, left : left + width] = image
    return page


def limits(values: Pixels) -> tuple[float, float]:
    """The values that are black and white."""
    known = values[np.isfinite(values)]
    if known.size == 0 or np.mean(np.abs(known) > _USUAL) <= _OUTER:
        return -1.0, 1.0
    low, high = (float(edge) for edge in np.quantile(known, (_OUTER, 1 - _OUTER)))
    return low, max(high, math.nextafter(low, math.inf))


def _images(axes: Axes, found: Pixels) -> int:
    every = max(1, math.ceil(math.sqrt(len(found))) * max(found.shape[1:3]) // _WIDEST)
    found = found[:, ::every, ::every]
    low, high = limits(found)
    page = mosaic(found)
    if page.shape[-1] == 1:
        axes.imshow(page[..., 0], cmap="gray", vmin=low, vmax=high, interpolation="nearest")
    else:
        axes.imshow(np.nan_to_num((page - low) / (high - low), nan=1.0).clip(0, 1), interpolation="nearest")
    axes.set_anchor("NW")
    axes.set_axis_off()
    return len(found)


def _with_ticks(axes: Axes) -> None:
    """Make room for the numbers at the left, inside of what the axes take up."""
    left, bottom, width, height = axes.get_position().bounds
    room = _TICKS * width / axes.bbox.width * axes.figure.dpi
    axes.set_position((left + room, bottom, width - room, height))
    axes.tick_params(labelsize=8)


def _points(axes: Axes, values: Pixels) -> int:
    _with_ticks(axes)
    axes.plot(*values.T, ".", markersize=4, color="#222222")
    axes.set_aspect("equal", adjustable="datalim")
    return len(values)


def _curves(axes: Axes, values: Pixels) -> int:
    _with_ticks(axes)
    style: dict[str, Any] = {"linewidth": 1.2, "marker": "." if values.shape[1] < 50 else ""}
    axes.plot(values.T, **style)
    axes.set_xlabel("coordinate", fontsize=8)
    return len(values)
