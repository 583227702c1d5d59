"""The diffusers that is installed, if it is one that this package knows."""

from __future__ import annotations

import re
from typing import Any

#: The oldest release that the tests were run with.
OLDEST = (0, 32)

_HINT = 'pip install "piadm[diffusers]"'


def pipeline_class() -> Any:  # noqa: ANN401 - a class of an optional package
    """``diffusers.DiffusionPipeline``.

    Raises:
        ImportError: if diffusers is missing or too old.
    """
    try:
        import diffusers
    except ImportError as error:
        raise ImportError(f"piadm.interop.diffusers needs diffusers: {_HINT}") from error
    found = tuple(map(int, re.findall(r"\d+", diffusers.__version__)[:2]))
    if found < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise ImportError(f"piadm needs diffusers {oldest} or newer, found {diffusers.__version__}: {_HINT}")
    return diffusers.DiffusionPipeline
