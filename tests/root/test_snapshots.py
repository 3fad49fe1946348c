"""Snapshots, restores, re-encrypting copies and growth on real file systems, compared file by file."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from installation import Installation, installation
from real_files import FILES, Fingerprint, archive_real_files, fingerprint

GIB = 1024**3

CAP_SYS_RESOURCE = 24

FSCK = {
    "ext4": ["e2fsck", "-f", "-n"],
    "xfs": ["xfs_repair", "-n"],
    "btrfs": ["btrfs", "check", "--readonly"],
}


@dataclass
class Filled:
    """An installation whose volume ``data`` holds the files, is mounted, and was snapshotted as ``s1`` like that."""

    ebsd: Installation
    root: Path
    mount: Path
    file_system: str
    at_snapshot: Fingerprint


@pytest.fixture(scope="module", params=FSCK)
def filled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Filled]:
    root = tmp_path_factory.mktemp(request.param)
    archive = archive_real_files(root / "files.tar")
    mount = root / "mnt"
    with installation(root) as ebsd:
        ebsd.ok("create", "data", "--size", "2G")
        ebsd.ok("key", "create", "second")
        ebsd.ok("attach", "data", "--mkfs", request.param, "--mount", mount)
        subprocess.run(["tar", "-xf", archive, "-C", mount], check=True)
        os.sync()
        at_snapshot = fingerprint(mount)
        assert sum(1 for path in at_snapshot if path.startswith("usr/")) == FILES
        ebsd.ok("snapshot", "data", "--name", "s1")
        # What happens after the point in time must not enter it.
        (mount / "later").write_bytes(b"written after the snapshot" * 10_000)
        subprocess.run(["rm", "-r", mount / "usr/share"], check=True)
        os.sync()
        yield Filled(ebsd, root, mount, request.param, at_snapshot)


def has_capability(number: int) -> bool:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff:")]
    return bool(int(line.split()[1], 16) >> number & 1)


def grow_mounted(filled: Filled, volume: str, size: str, mount: Path) -> None:
    """Grow a volume and its mounted file system; without the capability for ext4, by the way that the hint names."""
    ebsd = filled.ebsd
    if filled.file_system != "ext4" or has_capability(CAP_SYS_RESOURCE):
        ebsd.ok("resize", volume, size, "--grow-fs")
        return
    # The kernel lets only holders of that capability grow a mounted ext4; containers often have it not.
    status, error = ebsd.refused("resize", volume, size, "--grow-fs")
    assert (status, error["Code"]) == (1, "Ebsd.CommandFailed")
    assert "--grow-fs" in error["Hint"], "the volume has grown, and the hint says how to go on"
    ebsd.ok("detach", volume)
    ebsd.ok("attach", volume)
    ebsd.ok("resize", volume, size, "--grow-fs")
    ebsd.ok("detach", volume)
    ebsd.ok("attach", volume, "--mount", mount)


def check_file_system(device: str, file_system: str) -> None:
    """A snapshot of a mounted file system is what a power cut leaves: the journal is replayed, then all is clean."""
    place = Path(f"{device}-probe".replace("/dev/", "/var/tmp/"))
    place.mkdir()
    try:
        options = ["-o", "nouuid"] if file_system == "xfs" else []
        subprocess.run(["mount", "-t", file_system, *options, device, place], check=True)
        subprocess.run(["umount", place], check=True)
    finally:
        place.rmdir()
    done = subprocess.run([*FSCK[file_system], device], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_restore_of_a_snapshot_taken_while_mounted_has_exactly_the_files_of_its_moment(filled: Filled) -> None:
    ebsd = filled.ebsd
    ebsd.ok("create", "restored", "--from", "s1")
    source, restored = ebsd.ctl_json("show", "data"), ebsd.ctl_json("show", "restored")
    assert restored["DataEncryptionKeyId"] == source["DataEncryptionKeyId"]
    device = ebsd.ok("attach", "restored")
    check_file_system(device, filled.file_system)
    ebsd.ok("detach", "restored")
    ebsd.ok("attach", "restored", "--mount", filled.root / "restored")
    assert fingerprint(filled.root / "restored") == filled.at_snapshot
    # The two go separate ways from here.
    (filled.root / "restored" / "only-here").write_text("x")
    os.sync()
    assert not (filled.mount / "only-here").exists()
    ebsd.ok("detach", "restored")
    ebsd.ok("delete", "restored", "--yes")


def test_a_copy_under_another_key_has_the_same_files(filled: Filled) -> None:
    ebsd = filled.ebsd
    ebsd.ok("copy", "s1", "--name", "copied", "--encrypted", "--key", "second")
    original, copy = ebsd.ctl_json("show", "s1"), ebsd.ctl_json("show", "copied")
    assert copy["KmsKeyId"] != original["KmsKeyId"]
    assert copy["DataEncryptionKeyId"] != original["DataEncryptionKeyId"]
    ebsd.ok("create", "from-copy", "--from", "copied", "--mount", filled.root / "from-copy")
    assert ebsd.ctl_json("show", "from-copy")["KmsKeyId"] == copy["KmsKeyId"]
    assert fingerprint(filled.root / "from-copy") == filled.at_snapshot
    ebsd.ok("detach", "from-copy")
    ebsd.ok("delete", "from-copy", "--yes")
    ebsd.ok("delete", "copied", "--yes")


def test_a_restore_under_another_key_has_the_same_files(filled: Filled) -> None:
    ebsd = filled.ebsd
    ebsd.ok("create", "rekeyed", "--from", "s1", "--encrypted", "--key", "second")
    rekeyed = ebsd.ctl_json("show", "rekeyed")
    assert rekeyed["State"] == "available"
    assert rekeyed["DataEncryptionKeyId"] != ebsd.ctl_json("show", "data")["DataEncryptionKeyId"]
    ebsd.ok("attach", "rekeyed", "--mount", filled.root / "rekeyed")
    assert fingerprint(filled.root / "rekeyed") == filled.at_snapshot
    ebsd.ok("detach", "rekeyed")
    ebsd.ok("delete", "rekeyed", "--yes")


def test_a_mounted_volume_grows_by_half_with_its_file_system(filled: Filled) -> None:
    ebsd = filled.ebsd
    before = fingerprint(filled.mount)
    size = os.statvfs(filled.mount)
    grow_mounted(filled, "data", "3G", filled.mount)
    volume = ebsd.ctl_json("show", "data")
    assert volume["SizeBytes"] == 3 * GIB
    grown = os.statvfs(filled.mount)
    assert grown.f_blocks * grown.f_frsize > size.f_blocks * size.f_frsize + 900 * 1024**2
    assert fingerprint(filled.mount) == before
    # The new room is real: fill some of it, and find everything again after a detach.
    (filled.mount / "big").write_bytes(os.urandom(64 * 1024**2))
    os.sync()
    before = fingerprint(filled.mount)
    ebsd.ok("detach", "data")
    ebsd.ok("attach", "data", "--mount", filled.mount)
    assert fingerprint(filled.mount) == before
    assert ebsd.ctl_json("show", "data")["Integrity"] == "verified"


def test_a_detached_volume_is_snapshotted_restored_and_grown(filled: Filled) -> None:
    ebsd = filled.ebsd
    before = fingerprint(filled.mount)
    ebsd.ok("detach", "data")
    ebsd.ok("snapshot", "data", "--name", "s2")
    ebsd.ok("create", "bigger", "--from", "s2", "--size", "4G", "--mount", filled.root / "bigger")
    assert fingerprint(filled.root / "bigger") == before
    grow_mounted(filled, "bigger", "5G", filled.root / "bigger")
    assert fingerprint(filled.root / "bigger") == before
    ebsd.ok("detach", "bigger")
    ebsd.ok("attach", "data", "--mount", filled.mount)
    assert fingerprint(filled.mount) == before
    for name in ("bigger", "s2"):
        ebsd.ok("delete", name, "--yes")


def test_deletion_in_any_order_keeps_the_rest_and_gives_the_space_back(ebsd: Installation, tmp_path: Path) -> None:
    def used() -> int:
        data = (ebsd.state / name for name in ("layers", "maps", "records"))
        return sum(f.stat().st_blocks * 512 for top in data for f in top.rglob("*") if f.is_file())

    ebsd.ok("create", "data", "--size", "256M")
    device = ebsd.ok("attach", "data")
    baseline = used()
    for number in range(4):
        block = bytes([number + 1]) * (16 * 1024**2)
        with open(device, "r+b", buffering=0) as raw:
            raw.seek(number * 8 * 1024**2)  # each overwrites half of the one before
            raw.write(block)
            os.fsync(raw)
        ebsd.ok("snapshot", "data", "--name", f"s{number}")
    full = used()
    assert full > baseline + 60 * 1024**2
    for name in ("s2", "s0"):
        ebsd.ok("delete", name, "--yes")
    for number in (1, 3):
        ebsd.ok("create", f"r{number}", "--from", f"s{number}")
        with open(ebsd.ok("attach", f"r{number}"), "rb", buffering=0) as raw:
            raw.seek(number * 8 * 1024**2)
            assert raw.read(16 * 1024**2) == bytes([number + 1]) * (16 * 1024**2)
            raw.seek(0)
            assert raw.read(8 * 1024**2) == bytes([1]) * (8 * 1024**2)
        ebsd.ok("detach", f"r{number}")
        ebsd.ok("delete", f"r{number}", "--yes")
    for name in ("s1", "s3"):
        ebsd.ok("delete", name, "--yes")
    ebsd.ok("detach", "data")
    ebsd.ok("delete", "data", "--yes")
    assert used() == 0
    assert not list((ebsd.state / "layers").iterdir())


def test_the_key_of_an_attached_volume_is_disabled_and_enabled_again(ebsd: Installation, tmp_path: Path) -> None:
    """The story that EBS tells: what is attached goes on, everything that needs the key is refused until it is back."""
    mount = tmp_path / "mnt"
    key = ebsd.ok("key", "create", "mine")
    ebsd.ok("create", "data", "--size", "64M", "--encrypted", "--key", "mine")
    ebsd.ok("attach", "data", "--mkfs", "ext4", "--mount", mount)
    (mount / "file").write_text("before")
    os.sync()
    ebsd.ok("snapshot", "data", "--name", "s1")
    ebsd.ok("key", "disable", key)
    (mount / "file").write_text("attached volumes go on")
    os.sync()
    ebsd.ok("snapshot", "data", "--name", "s2")  # needs no key operation, as in EBS
    assert ebsd.refused("create", "again", "--from", "s1")[0] == 6
    assert ebsd.refused("copy", "s1", "--encrypted", "--key", "alias/aws/ebs")[0] == 6
    assert ebsd.refused("create", "other", "--size", "64M", "--encrypted", "--key", "mine")[0] == 6
    ebsd.ok("detach", "data")
    status, error = ebsd.refused("attach", "data")
    assert (status, error["Code"]) == (6, "CustomerKeyHasBeenRevoked")
    assert not list((ebsd.runtime / "volumes").iterdir())
    assert [v["Name"] for v in ebsd.ctl_json("list")["Volumes"]] == ["data"]
    ebsd.ok("key", "enable", key)
    ebsd.ok("attach", "data", "--mount", mount)
    assert (mount / "file").read_text() == "attached volumes go on"
    ebsd.ok("create", "again", "--from", "s1", "--mount", tmp_path / "again")
    assert (tmp_path / "again" / "file").read_text() == "before"
    ebsd.ok("create", "later", "--from", "s2", "--mount", tmp_path / "later")
    assert (tmp_path / "later" / "file").read_text() == "attached volumes go on"


def test_encrypted_and_unencrypted_live_side_by_side(tmp_path: Path) -> None:
    with installation(tmp_path, settings="allow_unencrypted = true") as ebsd:
        ebsd.ok("defaults", "disable-encryption")
        ebsd.ok("create", "plain", "--size", "64M")
        ebsd.ok("create", "secret", "--size", "64M", "--encrypted")
        assert ebsd.ctl_json("show", "plain")["Encrypted"] is False
        with open(ebsd.ok("attach", "plain"), "r+b", buffering=0) as raw:
            raw.write(b"p" * 65536)
            os.fsync(raw)
        ebsd.ok("snapshot", "plain", "--name", "sp")
        assert ebsd.ctl_json("show", "sp")["Encrypted"] is False
        ebsd.ok("create", "now-secret", "--from", "sp", "--encrypted")
        assert ebsd.ctl_json("show", "now-secret")["Encrypted"] is True
        with open(ebsd.ok("attach", "now-secret"), "rb", buffering=0) as raw:
            assert raw.read(65536) == b"p" * 65536
        ebsd.ok("snapshot", "secret", "--name", "ss")
        ebsd.ok("create", "still-secret", "--from", "ss", "--no-encrypted")
        assert ebsd.ctl_json("show", "still-secret")["Encrypted"] is True, (
            "no unencrypted volume from a secret snapshot"
        )
        ebsd.ok("copy", "sp", "--name", "cp")
        assert ebsd.ctl_json("show", "cp")["Encrypted"] is False
        ebsd.ok("defaults", "enable-encryption")
        ebsd.ok("copy", "sp", "--name", "ce")
        assert ebsd.ctl_json("show", "ce")["Encrypted"] is True
        status, error = ebsd.refused("create", "x", "--size", "64M", "--key", "alias/aws/ebs")
        assert (status, error["Code"]) == (2, "InvalidParameterDependency")
