"""Fixtures for all tests, and what is skipped where: a folder per privilege, the reason said."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from installation import Installation, installation


def _missing_for_root_tests() -> str:
    """Return why the tests in tests/root cannot run here; empty when they can."""
    if os.geteuid() != 0:
        return "they need uid 0"
    for device in ("/dev/fuse", "/dev/loop-control"):
        if not os.path.exists(device):
            return f"there is no {device}"
    for program in ("mkfs.ext4", "mkfs.xfs", "mkfs.btrfs", "qemu-img"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    return ""


def _closed_to_others() -> Path | None:
    """Return the directory that keeps other users out of this checkout, as /root does; None when they may pass."""
    for directory in (Path(__file__).resolve(), *Path(__file__).resolve().parents):
        if not directory.stat().st_mode & 0o001 and directory.is_dir():
            return directory
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reason = _missing_for_root_tests()
    closed = _closed_to_others()
    for item in items:
        if closed is not None and item.get_closest_marker("other_user"):
            text = f"runs programs of this checkout as another user, who cannot enter {closed}: clone it elsewhere"
            item.add_marker(pytest.mark.skip(reason=text))
        if "root" in Path(item.path).relative_to(Path(__file__).parent).parts:
            item.add_marker(pytest.mark.root)
            if reason:
                item.add_marker(pytest.mark.skip(reason=f"tests/root: {reason}"))


@pytest.fixture
def ebsd(tmp_path: Path) -> Iterator[Installation]:
    """A fresh installation, running."""
    with installation(tmp_path) as running:
        yield running


@pytest.fixture(scope="module")
def shared_ebsd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """One running installation for all tests of a module; each makes volumes of its own."""
    with installation(tmp_path_factory.mktemp("ebsd")) as running:
        yield running
