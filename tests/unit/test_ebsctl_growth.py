"""``ebsctl resize``: the volume grows, and the file system on it where that is possible."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ebsctl_fakes import GIB, Bench, attachment, volume, volume_id

from ebsd.domain.errors import RemoteError

VOL = volume_id(1)
DEVICE = "/dev/loop5001"
FILE = f"/run/ebsd/volumes/{VOL}"


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.server.close()


def attached(bench: Bench, **members: Any) -> None:
    bench.world.add(volume(State="in-use", Attachments=[attachment(**members)]))


def mounted(bench: Bench, file_system: str, place: str = "/srv/data") -> None:
    attached(bench)
    bench.programs.add_mount(place, DEVICE, "0:39" if file_system == "btrfs" else "7:5001", file_system)


def size_of(bench: Bench) -> int:
    size: int = bench.world.volumes[VOL]["SizeBytes"]
    return size


@pytest.mark.parametrize(("size", "wanted"), [("20G", 20 * GIB), ("+5G", 15 * GIB), (str(11 * GIB), 11 * GIB)])
def test_resize_prints_nothing_but_a_note(bench: Bench, size: str, wanted: int) -> None:
    bench.world.add(volume())
    result = bench.run("resize", "data", size)
    assert (result.exit_code, result.stdout) == (0, "")
    assert f"{VOL} grew from 10 GiB to {wanted // GIB} GiB" in result.stderr
    assert bench.server.parameters("EC2.ModifyVolume") == {"VolumeId": VOL, "SizeBytes": wanted}
    assert bench.programs.commands == []


def test_resize_json_is_the_volume(bench: Bench) -> None:
    attached(bench)
    assert bench.document("resize", "data", "20G")["SizeBytes"] == 20 * GIB


def test_an_attached_volume_brings_the_advice_to_grow_its_file_system(bench: Bench) -> None:
    attached(bench)
    assert f"ebsctl resize {VOL} {20 * GIB} --grow-fs" in bench.run("resize", "data", "20G").stderr


@pytest.mark.parametrize("size", ["", "+", "++5G", "10X", "1.5G", "0", "4097", "65T", "+-5G"])
def test_a_bad_size_is_a_usage_error_and_asks_nobody(bench: Bench, size: str) -> None:
    assert bench.error(2, "resize", "data", size)["Code"] == "InvalidParameterValue"
    assert bench.server.calls == []


@pytest.mark.parametrize("size", ["+64T", "+1"])
def test_a_sum_that_no_volume_can_have(bench: Bench, size: str) -> None:
    bench.world.add(volume())
    assert bench.error(2, "resize", "data", size)["Code"] == "InvalidParameterValue"
    assert "EC2.ModifyVolume" not in bench.server.methods


def test_the_server_refuses_to_shrink(bench: Bench) -> None:
    bench.world.add(volume())
    assert "smaller than existing" in bench.error(2, "resize", "data", "5G")["Message"]
    assert "smaller than existing" in bench.error(2, "resize", "data", "5G", "--grow-fs")["Message"]


def test_resize_of_nothing_known(bench: Bench) -> None:
    assert bench.error(3, "resize", "nothing", "5G")["Code"] == "InvalidVolume.NotFound"


@pytest.mark.parametrize(
    ("file_system", "command"),
    [
        ("ext4", ["resize2fs", DEVICE]),
        ("xfs", ["xfs_growfs", "/srv/a tree"]),
        ("btrfs", ["btrfs", "filesystem", "resize", "max", "/srv/a tree"]),
    ],
)
def test_a_mounted_file_system_grows(bench: Bench, file_system: str, command: list[str]) -> None:
    mounted(bench, file_system, "/srv/a tree")
    result = bench.run("resize", "data", "20G", "--grow-fs")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "its file system fills it" in result.stderr
    assert bench.programs.commands == [command]
    assert bench.document("resize", "data", "+1G", "--grow-fs")["SizeBytes"] == 21 * GIB


def test_an_ext4_that_is_not_mounted_is_checked_first(bench: Bench) -> None:
    attached(bench)
    bench.ok("resize", "data", "20G", "--grow-fs")
    assert [command[0] for command in bench.programs.commands] == ["blkid", "e2fsck", "resize2fs"]
    assert bench.programs.commands[1:] == [["e2fsck", "-f", "-p", DEVICE], ["resize2fs", DEVICE]]
    bench.programs.failures["e2fsck"] = (1, "FILE SYSTEM WAS MODIFIED")
    bench.ok("resize", "data", "+1G", "--grow-fs")


def test_a_volume_of_that_size_already_lets_only_the_file_system_grow(bench: Bench) -> None:
    mounted(bench, "xfs")
    for size in ("10G", "+0"):
        result = bench.run("resize", "data", size, "--grow-fs")
        assert result.exit_code == 0
        assert "grew from" not in result.stderr
    assert "EC2.ModifyVolume" not in bench.server.methods
    assert len(bench.programs.commands) == 2


def refused(bench: Bench, *, uid: int = 0) -> dict[str, str]:
    """Demand that the volume grows, the file system does not, exit status 4, and that the way to go on is named."""
    bench.uid = uid
    result = bench.run("resize", "data", "20G", "--grow-fs", "--json")
    assert (result.exit_code, result.stdout, size_of(bench)) == (4, "", 20 * GIB)
    error: dict[str, str] = json.loads(result.stderr)
    assert "was not grown" in error["Message"]
    assert "The volume has 20 GiB" in error["Hint"]
    assert f"ebsctl resize {VOL} {20 * GIB} --grow-fs" in error["Hint"]
    assert {command[0] for command in bench.programs.commands} <= {"blkid"}
    return error


@pytest.mark.parametrize("file_system", ["xfs", "btrfs"])
def test_xfs_and_btrfs_must_be_mounted(bench: Bench, file_system: str) -> None:
    attached(bench)
    bench.programs.detected = f"{file_system}\n"
    error = refused(bench)
    assert f"{file_system} grows only while it is mounted" in error["Message"]
    assert f"Mount {DEVICE} first." in error["Hint"]


def test_a_volume_that_is_not_attached_has_no_file_system_to_see(bench: Bench) -> None:
    bench.world.add(volume())
    assert f"ebsctl attach {VOL}" in refused(bench)["Hint"]


@pytest.mark.parametrize("uid", [0, 1000])
def test_a_block_file_may_be_in_use_by_anybody(bench: Bench, uid: int) -> None:
    attached(bench, Path=FILE, Device=None, DeviceNumber=None)
    assert f"e2fsck -f -p {FILE} && resize2fs {FILE}" in refused(bench, uid=uid)["Hint"]


def test_a_read_only_attachment_does_not_grow_its_file_system(bench: Bench) -> None:
    attached(bench, ReadOnly=True)
    assert "read-only" in refused(bench)["Message"]


@pytest.mark.parametrize("detected", ["swap\n", ""])
def test_other_contents_do_not_grow(bench: Bench, detected: str) -> None:
    attached(bench)
    bench.programs.detected = detected
    assert "holds no ext4, xfs, btrfs" in refused(bench)["Message"]


def test_another_file_system_that_is_mounted_does_not_grow(bench: Bench) -> None:
    mounted(bench, "vfat")
    assert "holds no ext4, xfs, btrfs" in refused(bench)["Message"]


def test_a_mount_of_another_device_is_none_of_ours(bench: Bench) -> None:
    attached(bench)
    bench.programs.add_mount("/srv/other", DEVICE, "8:17", "xfs")
    bench.ok("resize", "data", "20G", "--grow-fs")
    assert bench.programs.commands[-1] == ["resize2fs", DEVICE]


def test_growing_a_mounted_file_system_needs_root(bench: Bench) -> None:
    mounted(bench, "ext4")
    bench.uid = 1000
    assert bench.error(5, "resize", "data", "20G", "--grow-fs")["Code"] == "UnauthorizedOperation"
    assert size_of(bench) == 10 * GIB


@pytest.mark.parametrize(("file_system", "program"), [("ext4", "resize2fs"), ("xfs", "xfs_growfs"), ("btrfs", "btrfs")])
def test_a_missing_program_is_found_before_anything_grows(bench: Bench, file_system: str, program: str) -> None:
    mounted(bench, file_system)
    bench.programs.missing = {program}
    assert program in bench.error(1, "resize", "data", "20G", "--grow-fs")["Message"]
    assert size_of(bench) == 10 * GIB


@pytest.mark.parametrize(("program", "status"), [("e2fsck", 4), ("e2fsck", 8), ("resize2fs", 1)])
def test_when_a_program_fails_the_volume_has_grown(bench: Bench, program: str, status: int) -> None:
    attached(bench)
    bench.programs.failures[program] = (status, "it said why")
    error = bench.error(1, "resize", "data", "20G", "--grow-fs")
    assert "it said why" in error["Message"]
    assert f"ebsctl resize {VOL} {20 * GIB} --grow-fs" in error["Hint"]
    assert size_of(bench) == 20 * GIB


def test_an_interrupt_says_how_to_go_on(bench: Bench) -> None:
    mounted(bench, "xfs")
    bench.programs.interrupt = "xfs_growfs"
    assert "--grow-fs" in bench.error(130, "resize", "data", "20G", "--grow-fs")["Hint"]


def test_when_the_volume_cannot_grow_its_file_system_is_left(bench: Bench) -> None:
    mounted(bench, "xfs")
    bench.server.fail("EC2.ModifyVolume", RemoteError("Ebsd.NoSpace", "full"))
    bench.error(10, "resize", "data", "20G", "--grow-fs")
    assert bench.programs.commands == []
