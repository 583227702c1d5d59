"""Leaves out what an older diffusers does not have."""

from __future__ import annotations

from importlib.metadata import version

import pytest

#: The oldest release that all of these tests are for; the library itself asks for 0.32.
ALL = (0, 36)

#: What stands in the names of those that older ones do not have, or not without a text encoder.
NEWER = (
    "Z-Image", "counts_its_samples", "in_lists", "takes_lists", "Lumina 2", "Wan",
    "rows_of_its_own_steps", "few_rounds_return", "second_call_of_a_pass", "Sana", "SD3, img2img",
    "Cosmos",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if tuple(int(part) for part in version("diffusers").split(".")[:2]) >= ALL:
        return
    for item in items:
        if any(name in item.name for name in NEWER):
            item.add_marker(pytest.mark.skip(reason="this diffusers does not have it"))
