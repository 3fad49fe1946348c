"""The main job on real file systems: thousands of real files survive every kind of stop and start, byte for byte."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from installation import Installation, installation
from real_files import FILES, Fingerprint, archive_real_files, fingerprint

FILE_SYSTEMS = ("ext4", "xfs", "btrfs")


@pytest.fixture(scope="module")
def real_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return archive_real_files(tmp_path_factory.mktemp("source") / "files.tar")


@pytest.fixture(scope="module", params=FILE_SYSTEMS)
def filled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, real_files: Path
) -> Iterator[tuple[Installation, Path, Fingerprint]]:
    """An installation whose volume ``data`` holds the files, attached and mounted; yields the fingerprint too."""
    root = tmp_path_factory.mktemp(request.param)
    mount = root / "mnt"
    with installation(root) as ebsd:
        ebsd.ok("create", "data", "--size", "2G")
        ebsd.ok("attach", "data", "--mkfs", request.param, "--mount", mount)
        subprocess.run(["tar", "-xf", real_files, "-C", mount], check=True)
        os.sync()
        before = fingerprint(mount)
        assert sum(1 for path in before if path.startswith("usr/")) == FILES
        yield ebsd, mount, before


def test_files_survive_detach_and_attach(filled: tuple[Installation, Path, Fingerprint]) -> None:
    ebsd, mount, before = filled
    ebsd.ok("detach", "data")
    assert not any(mount.iterdir())
    ebsd.ok("attach", "data", "--mount", mount)
    assert fingerprint(mount) == before
    assert ebsd.ctl_json("show", "data")["Integrity"] == "verified"


def test_files_survive_a_restart_of_ebsd_while_detached(
    filled: tuple[Installation, Path, Fingerprint],
) -> None:
    ebsd, mount, before = filled
    ebsd.ok("detach", "data")
    ebsd.stop()
    ebsd.start()
    ebsd.ok("attach", "data", "--mount", mount)
    assert fingerprint(mount) == before


def test_files_survive_a_restart_of_ebsd_while_attached(
    filled: tuple[Installation, Path, Fingerprint],
) -> None:
    ebsd, mount, before = filled
    volume_process = ebsd.processes()["volumes"]
    ebsd.stop()
    (mount / "written-without-ebsd").write_text("the volume goes on")
    ebsd.start()
    assert ebsd.processes()["volumes"] == volume_process, "the volume process must have gone on"
    subprocess.run(["sh", "-c", "echo 3 >/proc/sys/vm/drop_caches"], check=True)
    (mount / "written-without-ebsd").unlink()
    assert fingerprint(mount) == before
    volume = ebsd.ctl_json("show", "data")
    assert (volume["State"], volume["Attachments"][0]["State"]) == ("in-use", "attached")
    ebsd.ok("detach", "data")
    ebsd.ok("attach", "data", "--mount", mount)
    assert fingerprint(mount) == before


def test_files_survive_a_kill_of_ebsd_while_attached(
    filled: tuple[Installation, Path, Fingerprint],
) -> None:
    ebsd, mount, before = filled
    volume_process = ebsd.processes()["volumes"]
    ebsd.kill()
    (mount / "written-without-ebsd").write_text("the volume goes on")
    os.sync()
    ebsd.start()
    assert ebsd.processes()["volumes"] == volume_process
    assert (mount / "written-without-ebsd").read_text() == "the volume goes on"
    (mount / "written-without-ebsd").unlink()
    assert fingerprint(mount) == before
    ebsd.ok("detach", "data")
    ebsd.ok("attach", "data", "--mount", mount)
    assert fingerprint(mount) == before


def test_files_survive_a_kill_of_the_volume_process(
    filled: tuple[Installation, Path, Fingerprint],
) -> None:
    """The holder's death is an I/O error to the file system; what was synced must be there afterwards."""
    ebsd, mount, before = filled
    (mount / "synced").write_text("synced before the kill")
    os.sync()
    (pid,) = ebsd.processes()["holders"]
    os.kill(pid, 9)
    deadline = time.monotonic() + 20
    while ebsd.ctl_json("show", "data")["State"] != "error":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    status, error = ebsd.refused("attach", "data")
    assert (status, error["Code"]) == (4, "IncorrectState")
    ebsd.ok("detach", "data")
    assert ebsd.ctl_json("show", "data")["State"] == "available"
    ebsd.ok("attach", "data", "--mount", mount)
    assert (mount / "synced").read_text() == "synced before the kill"
    (mount / "synced").unlink()
    assert fingerprint(mount) == before
    assert ebsd.ctl_json("show", "data")["Integrity"] == "unverified"
    ebsd.ok("detach", "data")
    ebsd.ok("attach", "data", "--mount", mount)
    assert ebsd.ctl_json("show", "data")["Integrity"] == "verified"


def test_the_key_service_may_die_and_is_started_again(ebsd: Installation, tmp_path: Path) -> None:
    mount = tmp_path / "mnt"
    ebsd.ok("create", "data", "--size", "64M")
    ebsd.ok("attach", "data", "--mkfs", "ext4", "--mount", mount)
    (broker,) = ebsd.processes()["broker"]
    os.kill(broker, 9)
    (mount / "while-away").write_text("attached volumes do not notice")
    deadline = time.monotonic() + 20
    while ebsd.ctl_json("status")["KeyService"]["State"] != "running":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    ebsd.ok("detach", "data")
    ebsd.ok("attach", "data", "--mount", mount)
    assert (mount / "while-away").read_text() == "attached volumes do not notice"


def test_a_volume_process_asked_to_end_flushes_and_stays(ebsd: Installation, tmp_path: Path) -> None:
    mount = tmp_path / "mnt"
    ebsd.ok("create", "data", "--size", "64M")
    ebsd.ok("attach", "data", "--mkfs", "ext4", "--mount", mount)
    (pid,) = ebsd.processes()["volumes"]
    os.kill(pid, 15)
    (mount / "file").write_text("still here")
    os.sync()
    assert ebsd.processes()["volumes"] == [pid]
    assert (mount / "file").read_text() == "still here"
