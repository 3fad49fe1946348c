"""What every module of these tests is held to: it leaves no loop device behind, not even an empty number."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ebsd.volume.host import FIRST_MINOR, LAST_MINOR

PATIENCE = 5.0
"""Seconds: another ebsd of this host has its devices empty for a moment when it makes or removes them."""


def _empty_loop_devices() -> set[str]:
    names = {f"loop{minor}" for minor in range(FIRST_MINOR, LAST_MINOR + 1)}
    return {
        path.name
        for path in Path("/sys/block").iterdir()
        if path.name in names and not (path / "loop" / "backing_file").exists()
    }


@pytest.fixture(scope="module", autouse=True)
def no_empty_loop_device_is_left() -> Iterator[None]:
    """Before the fixtures of a module are made and after all of them are gone. Bound ones may be others'."""
    before = _empty_loop_devices()
    yield
    deadline = time.monotonic() + PATIENCE
    while left := _empty_loop_devices() - before:
        assert time.monotonic() < deadline, f"left empty: {left}"
        time.sleep(0.1)
