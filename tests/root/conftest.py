"""What every module of these tests is held to: it leaves no loop device behind, not even an empty number."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ebsd.volume.host import FIRST_MINOR, LAST_MINOR


def _loop_devices() -> set[str]:
    names = {f"loop{minor}" for minor in range(FIRST_MINOR, LAST_MINOR + 1)}
    return {path.name for path in Path("/sys/block").iterdir() if path.name in names}


@pytest.fixture(scope="module", autouse=True)
def no_loop_device_is_left() -> Iterator[None]:
    """Before the fixtures of a module are made and after all of them are gone."""
    before = _loop_devices()
    yield
    assert not _loop_devices() - before
