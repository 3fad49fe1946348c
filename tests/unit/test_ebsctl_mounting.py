"""Mounts, mkfs and the host's programs: parsing and choosing are pure, running is tried with small scripts."""

from __future__ import annotations

from pathlib import Path

import pytest

from ebsctl.mounting import (
    Mount,
    Programs,
    growth_commands,
    is_mount_point,
    mkfs_command,
    mount_command,
    mounts_to_end,
    parse_mountinfo,
    read_mounts,
    usable_mount,
)
from ebsd.domain.errors import CommandFailed, HostUnsupported, InvalidParameterValue, VolumeBusy

MOUNTINFO = r"""22 27 0:20 / /sys rw,nosuid,nodev,noexec,relatime shared:7 - sysfs sysfs rw
27 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw,errors=remount-ro
40 27 7:5001 / /srv/data rw,relatime shared:9 master:2 propagate_from:3 - ext4 /dev/loop5001 rw
41 27 7:5002 / /srv/with\040blank\011tab\134backslash rw,relatime - xfs /dev/loop5002 rw,attr2
43 27 0:39 / /srv/tree rw,relatime - btrfs /dev/loop5003 rw,discard=async,subvolid=5,subvol=/
44 27 0:40 / /srv/other rw,relatime - btrfs /dev/loop5004 rw
45 27 7:5001 / /srv/data rw,relatime - ext4 /dev/loop5001 rw
46 27 7:5001 /sub /srv/bind rw,relatime - ext4 /dev/loop5001 rw
47 27 0:41 / /srv/empty-source rw - tmpfs  rw
48 27 0:42 / /run/ebsd/volumes/vol-1 rw - fuse.ebsd - rw
49 27 0:43 / /srv/tree rw - tmpfs /dev/loop5003 rw
"""
MOUNTS = parse_mountinfo(MOUNTINFO)


@pytest.mark.parametrize(
    ("index", "mount"),
    [
        (0, Mount("0:20", "/sys", "sysfs", "sysfs")),
        (2, Mount("7:5001", "/srv/data", "ext4", "/dev/loop5001")),
        (3, Mount("7:5002", "/srv/with blank\ttab\\backslash", "xfs", "/dev/loop5002")),
        (4, Mount("0:39", "/srv/tree", "btrfs", "/dev/loop5003")),
        (8, Mount("0:41", "/srv/empty-source", "tmpfs", "")),
        (9, Mount("0:42", "/run/ebsd/volumes/vol-1", "fuse.ebsd", "-")),
    ],
)
def test_mountinfo_lines_are_read(index: int, mount: Mount) -> None:
    assert MOUNTS[index] == mount


@pytest.mark.parametrize("line", ["", "1", "1 2 3:4 / /x rw", "1 2 3:4 / /x rw shared:1 -", "1 2 3:4 / /x rw - ext4"])
def test_malformed_lines_are_left_out(line: str) -> None:
    assert parse_mountinfo(line + "\n") == []


@pytest.mark.parametrize(
    ("number", "device", "recorded", "expected"),
    [
        # Two mounts, one over the other; the bind mount elsewhere stays.
        ("7:5001", "/dev/loop5001", "/srv/data", [MOUNTS[6], MOUNTS[2]]),
        ("7:5002", "/dev/loop5002", "/srv/with blank\ttab\\backslash", [MOUNTS[3]]),
        # btrfs, found by its source; the tmpfs of the same name there is not ours.
        ("7:5003", "/dev/loop5003", "/srv/tree", [MOUNTS[4]]),
        ("7:5003", "/dev/loop5003", "/srv/other", []),
        # The recorded place is somebody else's by now.
        ("7:5001", "/dev/loop5001", "/", []),
        # It is mounted, but not where ebsctl did it.
        ("7:5001", "/dev/loop5001", "/mnt", []),
        ("7:5001", "/dev/loop5001", None, []),
        # A block file has no device.
        (None, None, "/srv/data", []),
    ],
)
def test_only_this_device_at_the_recorded_place_is_unmounted(
    number: str | None, device: str | None, recorded: str | None, expected: list[Mount]
) -> None:
    assert mounts_to_end(MOUNTS, device_number=number, device=device, recorded=recorded) == expected


def test_mount_points_are_recognized() -> None:
    assert is_mount_point(MOUNTS, "/srv/data")
    assert not is_mount_point(MOUNTS, "/srv")


def test_the_mounts_of_this_process_are_read() -> None:
    assert is_mount_point(read_mounts(), "/")


@pytest.mark.parametrize(
    ("file_system", "regular_file", "command"),
    [
        ("ext4", False, ["mkfs.ext4", "-q", "/dev/x"]),
        ("ext4", True, ["mkfs.ext4", "-q", "-F", "/dev/x"]),
        ("xfs", False, ["mkfs.xfs", "-q", "/dev/x"]),
        ("xfs", True, ["mkfs.xfs", "-q", "/dev/x"]),
        ("btrfs", True, ["mkfs.btrfs", "-q", "/dev/x"]),
    ],
)
def test_mkfs_forces_only_where_a_regular_file_needs_it(
    file_system: str, regular_file: bool, command: list[str]
) -> None:
    assert mkfs_command(file_system, "/dev/x", regular_file=regular_file) == command


def test_mount_names_the_type_and_read_only() -> None:
    assert mount_command("ext4", "/dev/x", "/m", read_only=False) == ["mount", "-t", "ext4", "/dev/x", "/m"]
    assert mount_command("ext4", "/dev/x", "/m", read_only=True) == ["mount", "-t", "ext4", "-o", "ro", "/dev/x", "/m"]
    # A restored snapshot has the UUID of its source, which XFS mounts only if told so.
    xfs = ["mount", "-t", "xfs", "-o", "ro,nouuid", "/dev/x", "/m"]
    assert mount_command("xfs", "/dev/x", "/m", read_only=True) == xfs


@pytest.mark.parametrize(
    ("file_system", "mount_point", "commands"),
    [
        ("ext4", "/m", [["resize2fs", "/dev/x"]]),
        ("ext4", None, [["e2fsck", "-f", "-p", "/dev/x"], ["resize2fs", "/dev/x"]]),
        ("xfs", "/m", [["xfs_growfs", "/m"]]),
        ("xfs", None, []),
        ("btrfs", "/m", [["btrfs", "filesystem", "resize", "max", "/m"]]),
        ("btrfs", None, []),
    ],
)
def test_a_file_system_grows_as_it_can(file_system: str, mount_point: str | None, commands: list[list[str]]) -> None:
    assert growth_commands(file_system, "/dev/x", mount_point) == commands


@pytest.mark.parametrize(
    ("number", "device", "expected"),
    [
        ("7:5001", "/dev/loop5001", MOUNTS[2]),
        ("7:5002", "/dev/loop5002", MOUNTS[3]),
        # A tmpfs lies over the btrfs: its path would lead there.
        ("7:5003", "/dev/loop5003", None),
        ("7:5009", "/dev/loop5009", None),
    ],
)
def test_a_mount_is_usable_when_its_path_leads_to_it(number: str, device: str, expected: Mount | None) -> None:
    assert usable_mount(MOUNTS, device=device, device_number=number) == expected


# --- running programs -------------------------------------------------------------------------------------


def programs(directory: Path, **scripts: str) -> Programs:
    for name, body in scripts.items():
        path = directory / name.replace("_", ".")
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)
    return Programs(str(directory))


def test_output_is_returned_and_the_language_is_fixed(tmp_path: Path) -> None:
    assert programs(tmp_path, umount='echo "$LC_ALL $1"').run(["umount", "a b"]) == "C a b\n"


def test_a_failure_carries_all_that_was_written_on_one_line(tmp_path: Path) -> None:
    with pytest.raises(CommandFailed) as caught:
        programs(tmp_path, mkfs_xfs="echo out; echo err >&2; exit 3").run(["mkfs.xfs", "/dev/x"])
    assert caught.value.message == "`mkfs.xfs /dev/x` failed with exit status 3: err out"


def test_a_silent_failure_says_that_it_was_silent(tmp_path: Path) -> None:
    with pytest.raises(CommandFailed, match="it printed nothing"):
        programs(tmp_path, mount="exit 32").run(["mount"])


@pytest.mark.parametrize(
    ("program", "package"),
    [
        ("mkfs.ext4", "e2fsprogs"),
        ("mkfs.xfs", "xfsprogs"),
        ("mkfs.btrfs", "btrfs-progs"),
        ("e2fsck", "e2fsprogs"),
        ("resize2fs", "e2fsprogs"),
        ("xfs_growfs", "xfsprogs"),
        ("btrfs", "btrfs-progs"),
    ],
)
def test_a_missing_program_names_its_package(tmp_path: Path, program: str, package: str) -> None:
    with pytest.raises(HostUnsupported) as caught:
        programs(tmp_path).run([program, "/dev/x"])
    assert program in caught.value.message
    assert f"apt install {package}" in caught.value.hint
    assert not programs(tmp_path).is_installed(program)


@pytest.mark.parametrize(
    ("blkid", "found"),
    [("echo ext4", "ext4"), ("echo btrfs", "btrfs"), ("echo crypto_LUKS", None), ("exit 2", None), ("true", None)],
)
def test_a_file_system_is_found_or_not(tmp_path: Path, blkid: str, found: str | None) -> None:
    assert programs(tmp_path, blkid=blkid).file_system_of("/dev/x") == found


def test_an_ambiguous_device_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CommandFailed, match="ambivalent"):
        programs(tmp_path, blkid="echo ambivalent >&2; exit 8").file_system_of("/dev/x")


def test_a_busy_mount_is_a_conflict_and_other_failures_are_not(tmp_path: Path) -> None:
    busy = programs(tmp_path, umount='echo "umount: $1: target is busy." >&2; exit 32')
    with pytest.raises(VolumeBusy) as caught:
        busy.unmount("vol-1", "/m")
    assert "/m is in use" in caught.value.message
    with pytest.raises(CommandFailed, match="not mounted"):
        programs(tmp_path, umount="echo not mounted >&2; exit 32").unmount("vol-1", "/m")


def test_a_lazy_unmount_says_so_to_umount(tmp_path: Path) -> None:
    programs(tmp_path, umount='[ "$1 $2" = "-l /m" ]').unmount("vol-1", "/m", lazily=True)


@pytest.mark.parametrize("status", [0, 1])
def test_what_e2fsck_mended_is_no_failure(tmp_path: Path, status: int) -> None:
    programs(tmp_path, e2fsck=f"exit {status}").check_ext4(["e2fsck", "-f", "-p", "/dev/x"])


@pytest.mark.parametrize("status", [2, 4, 8, 12])
def test_what_e2fsck_cannot_mend_is_a_failure(tmp_path: Path, status: int) -> None:
    with pytest.raises(CommandFailed, match="is in use"):
        programs(tmp_path, e2fsck=f"echo it is in use; exit {status}").check_ext4(["e2fsck", "/dev/x"])


def test_a_mount_goes_to_the_directory_that_was_seen(tmp_path: Path) -> None:
    """By its descriptor: who may rename it meanwhile sends nobody elsewhere."""
    (tmp_path / "there").mkdir()
    said = tmp_path / "said"
    host = programs(tmp_path, mount=f'/usr/bin/readlink "/proc/$$/fd/${{5##*/}}" > {said}; echo "$@" >> {said}')
    host.mount(mount_command("ext4", "/dev/x", f"{tmp_path}/there", read_only=False))
    place, words = said.read_text().splitlines()
    assert place == f"{tmp_path}/there"
    assert words.startswith("--no-canonicalize -t ext4 /dev/x /proc/self/fd/")


def test_a_mount_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "last").symlink_to("elsewhere")
    (tmp_path / "first").symlink_to("elsewhere")
    host = programs(tmp_path, mount="exit 0")
    for target in ("last", "first/deep", "nothing", "last/deep"):
        with pytest.raises(InvalidParameterValue):
            host.mount(["mount", "-t", "ext4", "/dev/x", f"{tmp_path}/{target}"])
