"""What ``--device`` means, and how a device is written."""

from __future__ import annotations

import torch

from piadm._checks import device_here


def resolve_device(name: str | None) -> str | None:
    """Return the torch device that ``--device`` means; None: the model's own.

    Raises:
        ValueError: If there is no such kind of device, or this machine has none that torch can use.
    """
    if name is None:
        return None
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError as error:
        raise ValueError(f"--device must be auto or a torch device such as cuda:0, got {name!r}") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: torch finds no CUDA device here; use cpu or auto")
    device_here("--device", name)
    return name


def device_text(device: str, threads: int) -> str:
    """A device in a headline: of a CPU the threads too."""
    return f"cpu x {threads}" if device == "cpu" else device
