"""Commands on volumes, as scripts meet them: output, exit status, what is sent, and what is undone."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from ebsctl_fakes import GIB, Bench, attachment, volume, volume_id

from ebsd.domain.errors import (
    CommandFailed,
    InvalidName,
    NeedsRoot,
    NoSpace,
    RemoteError,
    UnauthorizedOperation,
    VolumeBusy,
)

VOL = volume_id(1)
DEVICE = "/dev/loop5001"


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.server.close()


@pytest.fixture
def target(tmp_path: Path) -> str:
    return os.path.realpath(tmp_path / "mnt")


# --- create -----------------------------------------------------------------------------------------------


def test_create_prints_the_id_and_nothing_else(bench: Bench) -> None:
    result = bench.run("create", "data", "--size", "10G")
    assert (result.exit_code, result.stdout) == (0, VOL + "\n")
    assert bench.server.parameters("EC2.CreateVolume") == {"Name": "data", "SizeBytes": 10 * GIB}


def test_create_sends_every_option(bench: Bench) -> None:
    words = ["--size", "1M", "--encrypted", "--key", "backup", "--tag", "env=lab", "--tag", "empty="]
    bench.ok("create", "data", *words, "--context", "project=a=b")
    assert bench.server.parameters("EC2.CreateVolume") == {
        "Name": "data",
        "SizeBytes": 1 << 20,
        "Encrypted": True,
        "KmsKeyId": "backup",
        "EncryptionContext": {"project": "a=b"},
        "Tags": [{"Key": "env", "Value": "lab"}, {"Key": "empty", "Value": ""}],
    }


def test_create_json_is_the_volume(bench: Bench) -> None:
    bench.world.note = "something a person would read"
    document = bench.document("create", "data", "--size", "10G")
    assert (document["VolumeId"], document["SizeBytes"]) == (VOL, 10 * GIB)


def test_create_shows_the_servers_note(bench: Bench) -> None:
    bench.world.note = "encryption by default is on"
    result = bench.run("create", "data", "--size", "10G", "--no-encrypted")
    assert "note: encryption by default is on" in result.stderr
    assert bench.server.parameters("EC2.CreateVolume")["Encrypted"] is False


def test_only_the_first_encrypted_volume_brings_the_advice_to_back_up(bench: Bench) -> None:
    assert "ebsctl key backup FILE" in bench.run("create", "one", "--size", "1G").stderr
    assert bench.run("create", "two", "--size", "1G").stderr == ""


@pytest.mark.parametrize(("uid", "advised"), [(0, True), (1000, False)])
def test_only_administrators_get_the_advice_to_back_up(bench: Bench, uid: int, advised: bool) -> None:
    bench.uid = uid
    assert bool(bench.run("create", "one", "--size", "1G").stderr) is advised
    assert bool(bench.run("key", "create").stderr) is advised


def test_who_runs_ebsd_himself_is_its_administrator(bench: Bench) -> None:
    bench.uid = 1000
    status = bench.world.Control_GetStatus({}, [])
    bench.server.overrides["Control.GetStatus"] = lambda _p, _fds: {**status, "Uid": 1000}
    assert "ebsctl key backup" in bench.run("key", "create").stderr
    bench.server.fail("Control.GetStatus", RemoteError("InternalFailure", "no"))
    assert bench.run("key", "create").stderr == ""


def test_an_unencrypted_first_volume_brings_no_advice(bench: Bench) -> None:
    bench.world.by_default = False
    assert bench.run("create", "one", "--size", "1G").stderr == ""


def test_the_advice_is_not_worth_an_error(bench: Bench) -> None:
    bench.server.fail("Control.GetStatus", RemoteError("InternalFailure", "no"))
    assert bench.ok("create", "one", "--size", "1G") == VOL + "\n"


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ("0", "positive"),
        ("-1", "not a number of bytes"),
        ("10X", "not a number of bytes"),
        ("1.5G", "not a number of bytes"),
        ("", "not a number of bytes"),
        ("512K", "smallest"),
        ("65T", "largest"),
        ("1048577", "multiple of the sector"),
    ],
)
def test_a_bad_size_is_a_usage_error_and_asks_nobody(bench: Bench, size: str, reason: str) -> None:
    for words in (["--size", size], [f"--size={size}"]):
        error = bench.error(2, "create", "data", *words)
        assert error["Code"] == "InvalidParameterValue"
        assert reason in error["Message"]
        assert "10G" in error["Hint"]
    assert bench.server.calls == []


@pytest.mark.parametrize(
    "words",
    [
        ["--tag", "novalue"],
        ["--tag", "=v"],
        ["--tag", "aws:x=1"],
        ["--tag", "a=1", "--tag", "a=2"],
        ["--context", "novalue"],
        ["--context", "a=1", "--context", "a=1"],
    ],
)
def test_bad_pairs_are_usage_errors(bench: Bench, words: list[str]) -> None:
    assert bench.error(2, "create", "data", "--size", "1G", *words)["Code"] == "InvalidParameterValue"
    assert bench.server.calls == []


def test_a_size_is_required(bench: Bench) -> None:
    error = bench.error(2, "create", "data")
    assert error["Code"] == "Usage"
    assert "--size" in error["Message"]


@pytest.mark.parametrize(
    ("raised", "status"),
    [
        (InvalidName(name="vol-1", reason="it reads like an id"), 2),
        (UnauthorizedOperation(reason="no"), 5),
        (RemoteError("DisabledException", "The key is disabled."), 6),
        (RemoteError("InvalidCiphertextException", "damaged"), 7),
        (RemoteError("Ebsd.Timeout", "too slow"), 8),
        (NoSpace(where="in /var/lib/ebsd"), 10),
        (RemoteError("NotFoundException", "Alias alias/x is not found."), 3),
        (RemoteError("Ebsd.NameInUse", "in use"), 4),
        (RemoteError("SomethingNew", "from a newer server"), 1),
    ],
)
def test_the_exit_status_follows_the_code(bench: Bench, raised: Any, status: int) -> None:
    bench.server.fail("EC2.CreateVolume", raised)
    error = bench.error(status, "create", "data", "--size", "1G")
    assert error == {"Code": raised.code, "Message": raised.message, "Hint": raised.hint}


# --- attach -----------------------------------------------------------------------------------------------


def test_attach_prints_exactly_the_device(bench: Bench) -> None:
    bench.world.add(volume())
    result = bench.run("attach", "data")
    assert (result.exit_code, result.stdout, result.stderr) == (0, DEVICE + "\n", "")
    assert bench.server.parameters("EC2.AttachVolume") == {"VolumeId": "data"}


def test_attach_of_the_file_prints_the_block_file(bench: Bench) -> None:
    bench.world.add(volume())
    assert bench.ok("attach", VOL, "--file", "--read-only") == f"/run/ebsd/volumes/{VOL}\n"
    sent = {"VolumeId": VOL, "ReadOnly": True, "ExposeAs": "file"}
    assert bench.server.parameters("EC2.AttachVolume") == sent


def test_attach_json_is_the_volume_with_its_attachment(bench: Bench) -> None:
    bench.world.add(volume())
    document = bench.document("attach", "data")
    assert document["VolumeId"] == VOL
    assert document["Attachments"][0]["Path"] == DEVICE


def test_attach_formats_and_mounts_in_this_order(bench: Bench, target: str) -> None:
    bench.world.add(volume())
    result = bench.run("attach", "data", "--mkfs", "xfs", "--mount", target)
    assert (result.exit_code, result.stdout) == (0, DEVICE + "\n")
    assert f"made the directory {target}" in result.stderr
    assert bench.programs.commands == [
        ["mkfs.xfs", "-q", DEVICE],
        ["mount", "-t", "xfs", "-o", "nouuid", DEVICE, target],
    ]
    assert bench.server.parameters("Control.RecordMount") == {"VolumeId": VOL, "MountPoint": target}
    assert os.path.isdir(target)


def test_attach_json_with_mount_shows_the_mount_point(bench: Bench, target: str) -> None:
    bench.world.add(volume())
    document = bench.document("attach", "data", "--mkfs", "ext4", "--mount", target)
    assert document["Attachments"][0]["MountPoint"] == target


def test_attach_mounts_what_it_finds(bench: Bench, target: str) -> None:
    bench.world.add(volume())
    os.mkdir(target)
    bench.programs.detected = "btrfs\n"
    result = bench.run("attach", "data", "--read-only", "--mount", target)
    assert result.stderr == ""
    assert bench.programs.commands[-1] == ["mount", "-t", "btrfs", "-o", "ro", DEVICE, target]


def test_the_mount_point_is_recorded_without_symbolic_links(bench: Bench, tmp_path: Path, target: str) -> None:
    bench.world.add(volume())
    os.mkdir(target)
    (tmp_path / "link").symlink_to(target)
    bench.ok("attach", "data", "--mount", str(tmp_path / "link"))
    assert bench.server.parameters("Control.RecordMount")["MountPoint"] == target


@pytest.mark.parametrize(("file_system", "force"), [("ext4", ["-F"]), ("xfs", []), ("btrfs", [])])
def test_mkfs_works_on_the_block_file(bench: Bench, file_system: str, force: list[str]) -> None:
    bench.world.add(volume())
    path = bench.ok("attach", "data", "--file", "--mkfs", file_system).strip()
    assert bench.programs.commands == [[f"mkfs.{file_system}", "-q", *force, path]]


def test_mkfs_never_touches_a_volume_with_data(bench: Bench, target: str) -> None:
    bench.world.add(volume())
    bench.world.blank = False
    error = bench.error(4, "attach", "data", "--mkfs", "ext4", "--mount", target)
    assert error["Code"] == "Ebsd.NotBlank"
    assert "It was detached again." in error["Hint"]
    assert bench.programs.commands == []
    assert bench.world.volumes[VOL]["Attachments"] == []
    assert not os.path.exists(target)


def test_a_volume_that_is_attached_already_stays_attached(bench: Bench) -> None:
    bench.world.add(volume(Attachments=[attachment()]))
    error = bench.error(4, "attach", "data", "--mkfs", "ext4")
    assert error["Code"] == "VolumeInUse"
    assert DEVICE in error["Hint"]
    assert "EC2.DetachVolume" not in bench.server.methods


def test_attach_if_needed_attaches_or_finds_attached(bench: Bench) -> None:
    bench.world.add(volume())
    first = bench.ok("attach", "data", "--if-needed")
    assert bench.ok("attach", "data", "--if-needed") == first
    assert bench.document("attach", "data", "--if-needed")["Attachments"][0]["Path"] == first.strip()
    assert "EC2.DetachVolume" not in bench.server.methods


@pytest.mark.parametrize(
    ("members", "state", "words"),
    [
        ({"ReadOnly": True}, "in-use", []),
        ({}, "in-use", ["--read-only"]),
        ({"Device": None}, "in-use", []),
        ({"State": "detaching"}, "in-use", []),
        ({}, "error", []),
    ],
    ids=["read-only", "writable", "block file", "on its way out", "in error"],
)
def test_attach_if_needed_takes_nothing_for_what_it_is_not(
    bench: Bench, members: dict[str, Any], state: str, words: list[str]
) -> None:
    bench.world.add(volume(State=state, Attachments=[attachment(**members)]))
    assert bench.error(4, "attach", "data", "--if-needed", *words)["Code"] == "VolumeInUse"


def test_attach_persist_enables_the_unit_of_the_volume(bench: Bench) -> None:
    bench.world.add(volume())
    result = bench.run("attach", "data", "--persist")
    assert (result.exit_code, result.stdout) == (0, f"{DEVICE}\n")
    unit = f"ebsd-volume@{VOL}.service"
    assert bench.programs.commands[-1] == ["systemctl", "enable", "--quiet", "--now", unit]
    assert f"systemctl disable {unit}" in result.stderr
    bench.programs.commands.clear()
    assert bench.ok("attach", "data", "--persist", "--if-needed") == f"{DEVICE}\n"
    assert bench.programs.commands[-1][-1] == unit


def test_a_volume_that_is_deleted_is_attached_at_boot_no_more(bench: Bench) -> None:
    unit = f"ebsd-volume@{VOL}.service"
    bench.world.add(volume())
    bench.ok("attach", "data", "--persist")
    assert bench.programs.enabled == {unit}
    bench.ok("detach", "data")
    assert bench.programs.enabled == {unit}, "the unit itself detaches when the host goes down"
    bench.programs.commands.clear()
    result = bench.run("delete", "data", "--yes")
    assert (result.exit_code, bench.programs.enabled) == (0, set()), result.stderr
    assert bench.programs.commands[-1] == ["systemctl", "disable", "--quiet", unit]
    assert "at boot no more" in result.stderr


def test_a_unit_that_cannot_be_disabled_is_told(bench: Bench) -> None:
    unit = f"ebsd-volume@{VOL}.service"
    bench.world.add(volume())
    bench.programs.enabled.add(unit)
    bench.uid = 1000
    result = bench.run("delete", "data", "--yes")
    assert result.exit_code == 0
    assert f"root can end that: systemctl disable {unit}" in result.stderr
    assert bench.programs.enabled == {unit}


def test_a_deletion_asks_nothing_where_there_is_no_systemd(bench: Bench) -> None:
    bench.world.add(volume())
    bench.programs.missing.add("systemctl")
    assert bench.ok("delete", "data", "--yes") == ""
    assert bench.programs.commands == []


def test_attach_persist_that_cannot_be_leaves_nothing(bench: Bench) -> None:
    bench.world.add(volume())
    bench.programs.failures["systemctl"] = (1, "no files found")
    assert "not a service of systemd" in bench.error(1, "attach", "data", "--persist")["Message"]
    assert "EC2.AttachVolume" not in bench.server.methods
    bench.programs.failures.clear()
    bench.programs.missing.add("systemctl")
    assert bench.error(1, "attach", "data", "--persist")["Code"] == "Ebsd.HostUnsupported"
    bench.uid = 1000
    assert bench.error(5, "attach", "data", "--persist")["Code"] == NeedsRoot.code
    for word in ("--file", "--read-only"):
        assert bench.run("attach", "data", "--persist", word).exit_code == 2
    assert "EC2.AttachVolume" not in bench.server.methods


def test_a_unit_that_cannot_be_enabled_takes_the_attachment_back(bench: Bench) -> None:
    bench.world.add(volume())
    run = bench.programs.run

    def refuse(command: Sequence[str]) -> str:
        if command[:2] == ["systemctl", "enable"]:
            raise CommandFailed(command="systemctl enable", status=1, output="read-only file system")
        return run(command)

    bench.programs.run = refuse  # type: ignore[method-assign]
    assert "detached again" in bench.error(1, "attach", "data", "--persist")["Hint"]
    assert bench.world.volumes[VOL]["Attachments"] == []


def test_attach_if_needed_does_nothing_else(bench: Bench, target: str) -> None:
    bench.world.add(volume())
    for words in (["--mkfs", "ext4"], ["--mount", target], ["--accept-rollback"]):
        assert bench.run("attach", "data", "--if-needed", *words).exit_code == 2
    assert "EC2.AttachVolume" not in bench.server.methods


@pytest.mark.parametrize(
    ("words", "failing", "code"),
    [
        (["--mkfs", "ext4"], "mkfs.ext4", "Ebsd.AttachFailed"),
        (["--mkfs", "ext4"], "mount", "Ebsd.AttachFailed"),
        ([], "blkid", "Ebsd.AttachFailed"),
        ([], "mount", "Ebsd.AttachFailed"),
    ],
)
def test_when_a_program_fails_everything_is_undone(
    bench: Bench, target: str, words: list[str], failing: str, code: str
) -> None:
    bench.world.add(volume())
    bench.programs.failures[failing] = (7, "it said why")
    parent = os.path.join(target, "a")
    error = bench.error(1, "attach", "data", *words, "--mount", os.path.join(parent, "b"))
    assert error["Code"] == code
    assert "it said why" in error["Message"]
    assert error["Hint"] == "It was detached again."
    assert bench.world.volumes[VOL]["Attachments"] == []
    assert not os.path.exists(target)


def test_when_the_mount_cannot_be_recorded_it_is_undone(bench: Bench, target: str) -> None:
    bench.world.add(volume())
    bench.server.fail("Control.RecordMount", UnauthorizedOperation(reason="no"))
    bench.error(5, "attach", "data", "--mount", target)
    assert bench.programs.commands[-1] == ["umount", target]
    assert bench.world.volumes[VOL]["Attachments"] == []


def test_what_cannot_be_undone_is_said(bench: Bench, target: str) -> None:
    bench.world.add(volume())
    bench.programs.failures["mkfs.ext4"] = (1, "bad luck")
    bench.server.fail("EC2.DetachVolume", VolumeBusy(volume=VOL, reason="udev has it open", path=DEVICE))
    result = bench.run("attach", "data", "--mkfs", "ext4")
    assert result.exit_code == 1
    assert f"Undoing failed, {VOL} stays attached" in result.stderr
    assert "udev has it open" in result.stderr


def test_an_interrupt_undoes_everything(bench: Bench, target: str) -> None:
    bench.world.add(volume())
    bench.programs.interrupt = "mkfs.ext4"
    error = bench.error(130, "attach", "data", "--mkfs", "ext4", "--mount", target)
    assert error["Code"] == "Interrupted"
    assert bench.world.volumes[VOL]["Attachments"] == []
    assert not os.path.exists(target)


def test_an_interrupt_before_the_answer_says_that_it_may_still_happen(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_args: object, **_members: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ebsctl.client.Client.ec2", interrupted)
    result = bench.run("attach", "data")
    assert result.exit_code == 130
    assert "`ebsctl show data` tells" in result.stderr


def test_a_missing_program_is_found_before_anything_happens(bench: Bench) -> None:
    bench.world.add(volume())
    bench.programs.missing = {"mkfs.btrfs"}
    assert "mkfs.btrfs" in bench.error(1, "attach", "data", "--mkfs", "btrfs")["Message"]
    assert bench.server.calls == []


@pytest.mark.parametrize(
    ("blank", "hint"), [(True, "It is blank: add --mkfs ext4."), (False, "Attach it without --mount")]
)
def test_nothing_to_mount(bench: Bench, target: str, blank: bool, hint: str) -> None:
    bench.world.add(volume())
    bench.world.blank = blank
    bench.programs.detected = "swap\n"
    error = bench.error(1, "attach", "data", "--mount", target)
    assert error["Code"] == "Ebsd.AttachFailed"
    assert hint in error["Hint"]


def test_a_volume_without_a_device_cannot_be_mounted(bench: Bench, target: str) -> None:
    bench.world.add(volume())
    attach = bench.world.EC2_AttachVolume
    bench.server.overrides["EC2.AttachVolume"] = lambda p, fds: attach({**p, "ExposeAs": "file"}, fds)
    assert "no device" in bench.error(1, "attach", "data", "--mount", target)["Message"]
    assert bench.world.volumes[VOL]["Attachments"] == []


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["--mount", "/x", "--file"], "fuse2fs"),
        (["--mkfs", "ext4", "--read-only"], "without --read-only"),
        (["--mkfs", "ntfs"], "--help"),
    ],
)
def test_options_that_exclude_each_other(bench: Bench, words: list[str], hint: str) -> None:
    error = bench.error(2, "attach", "data", *words)
    assert error["Code"] == "Usage"
    assert hint in error["Hint"]
    assert bench.server.calls == []


def test_the_mount_point_must_be_a_free_directory(bench: Bench, tmp_path: Path, target: str) -> None:
    bench.world.add(volume())
    file = tmp_path / "file"
    file.write_bytes(b"")
    assert "not a directory" in bench.error(2, "attach", "data", "--mount", str(file))["Message"]
    assert "Not a directory" in bench.error(2, "attach", "data", "--mount", str(file / "below"))["Message"]
    assert "unprintable" in bench.error(2, "attach", "data", "--mount", "/a\nb")["Message"]
    os.mkdir(target)
    bench.programs.add_mount(target, "/dev/sdb1", "8:17")
    assert "mounted on" in bench.error(4, "attach", "data", "--mount", target)["Message"]
    assert bench.server.calls == []


def test_mounting_without_root_is_refused_with_the_other_way(bench: Bench, target: str) -> None:
    bench.uid = 1000
    error = bench.error(5, "attach", "data", "--mount", target)
    assert f'fuse2fs "$(ebsctl attach data --file)" {target}' in error["Hint"]
    assert bench.server.calls == []


def test_the_servers_advice_to_users_without_root_is_shown(bench: Bench) -> None:
    bench.world.add(volume())
    denied = NeedsRoot(operation="A loop device", remedy="Add --file to get the block file.")
    bench.server.fail("EC2.AttachVolume", denied)
    assert bench.error(5, "attach", "data")["Hint"] == "Add --file to get the block file."


def test_everything_done_counts_even_when_the_last_look_fails(bench: Bench, target: str) -> None:
    bench.world.add(volume())
    bench.server.fail("EC2.DescribeVolumes", RemoteError("InternalFailure", "no"))
    assert bench.ok("attach", "data", "--mount", target) == DEVICE + "\n"


# --- detach -----------------------------------------------------------------------------------------------


def test_detach_unmounts_the_recorded_mount_and_prints_nothing(bench: Bench, target: str) -> None:
    bench.world.add(volume())
    bench.ok("attach", "data", "--mount", target)
    result = bench.run("detach", "data")
    assert (result.exit_code, result.stdout) == (0, "")
    assert f"unmounted {target}" in result.stderr
    assert bench.programs.commands[-1] == ["umount", target]
    assert bench.server.methods[-2:] == ["Control.RecordMount", "EC2.DetachVolume"]
    assert bench.server.parameters("Control.RecordMount") == {"VolumeId": VOL}
    assert bench.server.parameters("EC2.DetachVolume") == {"VolumeId": VOL}


def test_detach_json_is_the_volume(bench: Bench) -> None:
    bench.world.add(volume(Attachments=[attachment()]))
    assert bench.document("detach", VOL)["State"] == "available"


def test_detach_finds_btrfs_by_its_source(bench: Bench) -> None:
    bench.world.add(volume(Attachments=[attachment(RecordedMountPoint="/srv/a tree")]))
    bench.programs.add_mount("/srv/a tree", DEVICE, "0:39", "btrfs")
    bench.ok("detach", "data")
    assert bench.programs.commands == [["umount", "/srv/a tree"]]


@pytest.mark.parametrize(
    ("recorded", "mounted_at", "number"),
    [(None, "/srv/x", "7:5001"), ("/srv/x", "/srv/elsewhere", "7:5001"), ("/srv/x", "/srv/x", "8:17")],
)
def test_detach_leaves_other_mounts_alone(bench: Bench, recorded: str | None, mounted_at: str, number: str) -> None:
    bench.world.add(volume(Attachments=[attachment(RecordedMountPoint=recorded)]))
    bench.programs.add_mount(mounted_at, DEVICE, number)
    bench.ok("detach", "data")
    assert bench.programs.commands == []


def test_a_busy_mount_changes_nothing(bench: Bench) -> None:
    bench.world.add(volume(Attachments=[attachment(RecordedMountPoint="/srv/x")]))
    bench.programs.add_mount("/srv/x", DEVICE, "7:5001")
    bench.programs.failures["umount"] = (32, "umount: /srv/x: target is busy.")
    error = bench.error(4, "detach", "data")
    assert error["Code"] == "Ebsd.VolumeBusy"
    assert "/srv/x" in error["Message"]
    assert "fuser -vm /srv/x" in error["Hint"]
    assert set(bench.server.methods) == {"EC2.DescribeVolumes"}


def test_a_failing_umount_is_a_failure(bench: Bench) -> None:
    bench.world.add(volume(Attachments=[attachment(RecordedMountPoint="/srv/x")]))
    bench.programs.add_mount("/srv/x", DEVICE, "7:5001")
    bench.programs.failures["umount"] = (32, "umount: /srv/x: must be superuser to unmount.")
    assert bench.error(1, "detach", "data")["Code"] == "Ebsd.CommandFailed"


def test_a_device_that_is_busy_after_the_unmount_says_so(bench: Bench) -> None:
    bench.world.add(volume(Attachments=[attachment(RecordedMountPoint="/srv/x")]))
    bench.programs.add_mount("/srv/x", DEVICE, "7:5001")
    bench.server.fail("EC2.DetachVolume", VolumeBusy(volume=VOL, reason="somebody has it open", path=DEVICE))
    result = bench.run("detach", "data")
    assert result.exit_code == 4
    assert "/srv/x was unmounted before this." in result.stderr


def test_force_unmounts_lazily_and_passes_force(bench: Bench) -> None:
    bench.world.add(volume(Attachments=[attachment(RecordedMountPoint="/srv/x")]))
    bench.programs.add_mount("/srv/x", DEVICE, "7:5001")
    bench.ok("detach", "data", "--force")
    assert bench.programs.commands == [["umount", "-l", "/srv/x"]]
    assert bench.server.parameters("EC2.DetachVolume") == {"VolumeId": VOL, "Force": True}


def test_detach_of_what_is_not_attached_is_a_conflict(bench: Bench) -> None:
    bench.world.add(volume())
    assert bench.error(4, "detach", "data")["Code"] == "IncorrectState"


def test_detach_of_nothing_known_is_not_found(bench: Bench) -> None:
    assert bench.error(3, "detach", "nothing")["Code"] == "InvalidVolume.NotFound"
    bench.server.overrides["EC2.DescribeVolumes"] = lambda _p, _fds: {"Volumes": []}
    assert bench.error(3, "detach", "nothing")["Code"] == "InvalidVolume.NotFound"


@pytest.mark.parametrize("words", [[], ["data", "--all"]])
def test_detach_wants_one_volume_or_all(bench: Bench, words: list[str]) -> None:
    assert bench.error(2, "detach", *words)["Code"] == "Usage"


def fill_for_all(bench: Bench) -> None:
    other = "000000099999"
    bench.world.add(
        volume(1, "one", Attachments=[attachment(1)]),
        volume(2, "two", Attachments=[attachment(2, RecordedMountPoint="/srv/two")]),
        volume(3, "three", Attachments=[attachment(3)]),
        volume(4, "four"),
        volume(5, "five", OwnerId=other, Attachments=[attachment(5)]),
    )


def test_detach_all_takes_the_callers_attached_volumes(bench: Bench) -> None:
    fill_for_all(bench)
    result = bench.run("detach", "--all")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "volumes of other users stay attached: 1" in result.stderr
    sent = [p["VolumeId"] for method, p in bench.server.calls if method == "EC2.DetachVolume"]
    assert sent == [volume_id(1), volume_id(2), volume_id(3)]


def test_detach_all_goes_on_and_ends_with_the_first_failure(bench: Bench) -> None:
    fill_for_all(bench)
    bench.programs.add_mount("/srv/two", "/dev/loop5002", "7:5002")
    bench.programs.failures["umount"] = (32, "target is busy")
    result = bench.run("detach", "--all", "--json")
    assert result.exit_code == 4
    document = json.loads(result.stdout)
    assert [item["Name"] for item in document["Volumes"]] == ["one", "three"]
    assert [item["ResourceId"] for item in document["Unsuccessful"]] == [volume_id(2)]
    assert document["Unsuccessful"][0]["Error"]["Code"] == "Ebsd.VolumeBusy"
    assert json.loads(result.stderr)["Code"] == "Ebsd.VolumeBusy"
    plain = bench.run("detach", "--all")
    assert (plain.exit_code, plain.stdout) == (4, "")
    assert "/srv/two is in use" in plain.stderr


def test_detach_all_of_nothing_is_done(bench: Bench) -> None:
    assert bench.document("detach", "--all") == {"Volumes": [], "Unsuccessful": []}
