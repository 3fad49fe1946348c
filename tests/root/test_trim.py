"""What is deleted or discarded comes back to the host, and reads as zeros.

EBSD_TRIM_MIB: how much is written and deleted; 1024 for the whole trial.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from installation import Installation, installation

MIB = 1 << 20
AMOUNT = int(os.environ.get("EBSD_TRIM_MIB", "48")) * MIB
SIZE = 2 * AMOUNT + 512 * MIB
PATIENCE = 30.0
"""Seconds until the background has given back what a device was told to discard."""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    with installation(tmp_path_factory.mktemp("trim")) as made:
        yield made


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """With the transport that does not discard."""
    with installation(tmp_path_factory.mktemp("trim"), 'transport = "pyfuse3"') as made:
        yield made


def stored(ebsd: Installation) -> int:
    """Bytes that the layers take on the host."""
    return sum(path.stat().st_blocks * 512 for path in (ebsd.state / "layers").rglob("*") if path.is_file())


def expect_stored(ebsd: Installation, most: int, mount: Path | None = None) -> None:
    deadline = time.monotonic() + PATIENCE
    while stored(ebsd) > most:
        assert time.monotonic() < deadline, f"{stored(ebsd)} bytes are stored, {most} were expected"
        if mount is not None:  # xfs frees what was removed behind our back, and tells its log of it after 30 s
            subprocess.run(["sync", "-f", mount], check=True)
        time.sleep(0.1)


def fill(tree: Path) -> None:
    tree.mkdir()
    for number in range(8):
        with (tree / str(number)).open("wb") as file:
            left = AMOUNT // 8
            while left:
                left -= file.write(os.urandom(min(left, 4 * MIB)))
    subprocess.run(["sync", "-f", tree], check=True)


@pytest.fixture
def device(running: Installation) -> Iterator[str]:
    """A new device; nothing was written to it, nor discarded."""
    name = "raw"
    running.ok("create", name, "--size", str(SIZE))
    yield running.ok("attach", name)
    running.ok("detach", name)
    running.ok("delete", name, "--yes")


@pytest.mark.parametrize("file_system", ["ext4", "xfs", "btrfs"])
def test_the_space_of_deleted_files_comes_back(running: Installation, tmp_path: Path, file_system: str) -> None:
    mount = tmp_path / "mnt"
    mount.mkdir()
    running.ok("create", file_system, "--size", str(SIZE))
    running.ok("attach", file_system, "--mkfs", file_system, "--mount", mount)
    empty = stored(running)
    fill(mount / "tree")
    full = stored(running)
    assert full - empty >= AMOUNT
    shutil.rmtree(mount / "tree")
    done = running.ctl_json("trim", file_system)
    assert done["TrimmedBytes"] >= AMOUNT
    assert done["ReclaimedBytes"] >= 0.95 * AMOUNT
    assert full - stored(running) >= 0.95 * AMOUNT
    (mount / "again").write_bytes(b"the file system is sound")
    running.ok("detach", file_system)
    running.ok("attach", file_system, "--mount", mount)
    assert (mount / "again").read_bytes() == b"the file system is sound"
    running.ok("detach", file_system)
    running.ok("delete", file_system, "--yes")


@pytest.mark.parametrize("file_system", ["ext4", "xfs", "btrfs"])
def test_a_mount_that_discards_gives_back_by_itself(running: Installation, tmp_path: Path, file_system: str) -> None:
    mount = tmp_path / "mnt"
    mount.mkdir()
    running.ok("create", file_system, "--size", str(SIZE))
    device = running.ok("attach", file_system, "--mkfs", file_system)
    option = "discard=sync" if file_system == "btrfs" else "discard"
    subprocess.run(["mount", "-t", file_system, "-o", option, device, mount], check=True)
    try:
        empty = stored(running)
        fill(mount / "tree")
        shutil.rmtree(mount / "tree")
        expect_stored(running, empty + AMOUNT // 10, mount)
    finally:
        subprocess.run(["umount", mount], check=True)
    running.ok("detach", file_system)
    running.ok("delete", file_system, "--yes")


def pattern(device: str) -> None:
    with open(device, "r+b", buffering=0) as file:
        block = os.urandom(MIB)
        for at in range(0, 64 * MIB, MIB):
            os.pwrite(file.fileno(), block, at)
        os.fsync(file.fileno())


def read_back(device: str) -> bytes:
    done = subprocess.run(
        ["dd", f"if={device}", "bs=1M", "count=64", "iflag=direct", "status=none"], check=True, capture_output=True
    )
    return done.stdout


@pytest.mark.parametrize("command", [["blkdiscard"], ["blkdiscard", "-z"]], ids=" ".join)
def test_the_first_discard_of_a_device_is_no_lie(running: Installation, device: str, command: list[str]) -> None:
    empty = stored(running)
    pattern(device)
    assert stored(running) >= empty + 64 * MIB
    assert any(read_back(device))
    subprocess.run([*command, device], check=True)
    assert not any(read_back(device))
    expect_stored(running, empty + 4 * MIB)


def test_a_part_is_discarded_exactly(device: str) -> None:
    pattern(device)
    before = read_back(device)
    # Not on borders of chunks: the kernel keeps to the granularity for a discard, and not for zeros.
    subprocess.run(["blkdiscard", "-o", str(MIB + 4096), "-l", str(3 * MIB), device], check=True)
    after = read_back(device)
    assert before[: MIB + 4096] == after[: MIB + 4096]
    assert before[4 * MIB + 4096 :] == after[4 * MIB + 4096 :]
    assert not any(after[2 * MIB : 4 * MIB])
    subprocess.run(["blkdiscard", "-z", "-o", str(8 * MIB + 4096), "-l", str(MIB), device], check=True)
    zeroed = read_back(device)
    assert zeroed == after[: 8 * MIB + 4096] + bytes(MIB) + after[9 * MIB + 4096 :]


def test_making_a_file_system_discards_what_was_there(running: Installation, device: str) -> None:
    empty = stored(running)
    pattern(device)
    subprocess.run(["mkfs.ext4", "-q", "-F", device], check=True)
    expect_stored(running, empty + 48 * MIB)


def test_what_was_zero_stays_zero_over_a_detach(running: Installation) -> None:
    running.ok("create", "kept", "--size", "128M")
    device = running.ok("attach", "kept")
    pattern(device)
    subprocess.run(["blkdiscard", "-l", str(32 * MIB), device], check=True)
    running.ok("detach", "kept")
    device = running.ok("attach", "kept")
    content = read_back(device)
    assert not any(content[: 32 * MIB])
    assert any(content[32 * MIB :])
    running.ok("detach", "kept")
    running.ok("delete", "kept", "--yes")


def test_a_snapshot_keeps_what_is_discarded_later(running: Installation) -> None:
    running.ok("create", "source", "--size", "128M")
    device = running.ok("attach", "source")
    pattern(device)
    before = read_back(device)
    running.ok("snapshot", "source", "--name", "then")
    subprocess.run(["blkdiscard", device], check=True)
    assert not any(read_back(device))
    running.ok("detach", "source")
    running.ok("create", "restored", "--from", "then")
    device = running.ok("attach", "restored")
    assert read_back(device) == before
    running.ok("detach", "restored")
    for name in ("source", "restored", "then"):
        running.ok("delete", name, "--yes")


def test_a_volume_without_a_mount_cannot_be_trimmed(running: Installation, device: str) -> None:
    status, error = running.refused("trim", "raw")
    assert status == 4
    assert "not mounted" in error["Message"]
    assert device in error["Hint"]


def test_pyfuse3_offers_no_discard_and_says_so(without: Installation, tmp_path: Path) -> None:
    without.ok("create", "old", "--size", "64M")
    device = without.ok("attach", "old", "--mkfs", "ext4", "--mount", tmp_path)
    queue = Path("/sys/block", Path(device).name, "queue/discard_max_bytes")
    assert queue.read_text().strip() == "0"
    assert queue.with_name("read_ahead_kb").read_text().strip() == "512"  # not reset by that
    status, error = without.refused("trim", "old")
    assert status == 4
    assert 'transport = "native"' in error["Hint"]
    without.ok("detach", "old")
    device = without.ok("attach", "old")
    done = subprocess.run(["blkdiscard", "-f", device], capture_output=True, text=True)
    assert done.returncode != 0
    assert "Operation not supported" in done.stderr
    without.ok("detach", "old")
