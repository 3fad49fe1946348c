"""Detaching by force what is in use: its users get errors, and once they are gone nothing of the device is left."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest
from installation import Installation, installation, run


def wait_until_gone(device: str, seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while (Path("/sys/block") / Path(device).name).exists():
        assert time.monotonic() < deadline, f"{device} is still there"
        time.sleep(0.1)


def test_the_number_of_a_device_goes_when_its_last_user_has_closed_it(ebsd: Installation) -> None:
    ebsd.ok("create", "data", "--size", "16M")
    device = ebsd.ok("attach", "data")
    fd = os.open(device, os.O_RDWR)
    try:
        ebsd.ok("detach", "data", "--force")
        with pytest.raises(OSError) as caught:
            os.pread(fd, 4096, 0)
        assert caught.value.errno == errno.EIO
        again = ebsd.ok("attach", "data")
        assert again != device
    finally:
        os.close(fd)
    wait_until_gone(device)
    with open(again, "rb", buffering=0) as file:
        assert file.read(4096) == bytes(4096)


def test_a_file_system_may_be_unmounted_after_its_device_was_taken(ebsd: Installation, tmp_path: Path) -> None:
    ebsd.ok("create", "data", "--size", "64M")
    device = ebsd.ok("attach", "data")
    run("mkfs.ext4", "-q", device)
    target = tmp_path / "mounted"
    target.mkdir()
    run("mount", device, target)
    ebsd.ok("detach", "data", "--force")
    run("umount", target)
    wait_until_gone(device)


def test_a_daemon_that_ends_takes_what_is_closed_by_then_along(tmp_path: Path) -> None:
    with installation(tmp_path) as ebsd:
        ebsd.ok("create", "data", "--size", "16M")
        device = ebsd.ok("attach", "data")
        fd = os.open(device, os.O_RDWR)
        ebsd.ok("detach", "data", "--force")
        os.close(fd)
    assert not (Path("/sys/block") / Path(device).name).exists()
