"""Commands that make snapshots, volumes from them, and wait for the jobs behind them."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ebsctl_fakes import (
    FAILURE,
    GIB,
    Bench,
    attachment,
    job,
    job_id,
    snapshot,
    snapshot_id,
    volume,
    volume_id,
)

from ebsd.domain.errors import RemoteError

VOL = volume_id(1)
SNAP = snapshot_id(1)
COPY = snapshot_id(2)
JOB = job_id(1)
DEVICE = "/dev/loop5001"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.server.close()


@pytest.fixture
def target(tmp_path: Path) -> str:
    return os.path.realpath(tmp_path / "mnt")


@pytest.fixture
def source(bench: Bench) -> Bench:
    """One snapshot whose copies and restores need a job."""
    bench.world.add_snapshots(snapshot())
    bench.world.reencrypts = True
    return bench


# --- snapshot ---------------------------------------------------------------------------------------------


def test_snapshot_prints_the_id(bench: Bench) -> None:
    bench.world.add(volume())
    result = bench.run("snapshot", "data")
    assert (result.exit_code, result.stdout, result.stderr) == (0, SNAP + "\n", "")
    assert bench.server.parameters("EC2.CreateSnapshot") == {"VolumeId": "data"}


def test_snapshot_sends_every_option(bench: Bench) -> None:
    bench.world.add(volume())
    words = ["--name", "monday", "--description", "before the update", "--tag", "env=lab", "--tag", "empty="]
    document = bench.document("snapshot", VOL, *words)
    assert document == bench.world.snapshots[SNAP]
    assert bench.server.parameters("EC2.CreateSnapshot") == {
        "VolumeId": VOL,
        "Name": "monday",
        "Description": "before the update",
        "Tags": [{"Key": "env", "Value": "lab"}, {"Key": "empty", "Value": ""}],
    }


def test_the_pause_of_an_attached_volume_is_told(bench: Bench) -> None:
    bench.world.add(volume(Attachments=[attachment()], State="in-use", Integrity="unverified"))
    result = bench.run("snapshot", "data")
    assert result.stdout == SNAP + "\n"
    assert "held for 2.35 ms" in result.stderr
    assert "not verified since an unclean stop" in result.stderr
    bench.document("snapshot", "data")


def test_snapshots_of_several_volumes_are_one_call(bench: Bench) -> None:
    bench.world.add(volume(), volume(2, "log", Attachments=[attachment()], State="in-use"))
    result = bench.run("snapshot", "data", "log", "--name", "monday", "--copy-tags", "--tag", "a=b")
    assert (result.exit_code, len(result.stdout.splitlines())) == (0, 2)
    assert "I/O on vol-00000000000000002 was held for 2.35 ms" in result.stderr
    assert bench.server.parameters("EC2.CreateSnapshots") == {
        "VolumeIds": ["data", "log"],
        "NamePrefix": "monday",
        "Tags": [{"Key": "a", "Value": "b"}],
        "CopyTagsFromSource": "volume",
    }
    document = bench.document("snapshot", "--all-attached", "--exclude", "data")
    assert [s["VolumeId"] for s in document["Snapshots"]] == ["vol-00000000000000002"]
    assert bench.server.parameters("EC2.CreateSnapshots") == {"AllAttached": True, "ExcludeVolumeIds": ["data"]}
    bench.document("snapshot", "--tagged", "env=lab")
    assert bench.server.parameters("EC2.CreateSnapshots") == {"TargetTags": [{"Key": "env", "Value": "lab"}]}


@pytest.mark.parametrize(
    "words", [[], ["a", "--all-attached"], ["--all-attached", "--tagged", "a=b"], ["a", "b", "--client-token", "x"]]
)
def test_volumes_are_named_in_one_way(bench: Bench, words: list[str]) -> None:
    bench.error(2, "snapshot", *words)
    assert bench.server.calls == []


@pytest.mark.parametrize("command", ["snapshot", "copy"])
@pytest.mark.parametrize("tags", [["novalue"], ["=v"], ["aws:x=1"], ["a=1", "a=2"]])
def test_bad_tags_are_usage_errors(bench: Bench, command: str, tags: list[str]) -> None:
    words = [word for tag in tags for word in ("--tag", tag)]
    assert bench.error(2, command, "x", *words)["Code"] == "InvalidParameterValue"
    assert bench.server.calls == []


def test_snapshot_and_copy_of_nothing_known(bench: Bench) -> None:
    assert bench.error(3, "snapshot", "nothing")["Code"] == "InvalidVolume.NotFound"
    assert bench.error(3, "copy", "nothing")["Code"] == "InvalidSnapshot.NotFound"


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("ConcurrentSnapshotLimitExceeded", 4),
        ("UnauthorizedOperation", 5),
        ("DisabledException", 6),
        ("Ebsd.IntegrityFailure", 7),
        ("Ebsd.NoSpace", 10),
    ],
)
def test_the_exit_status_follows_the_code(bench: Bench, code: str, status: int) -> None:
    for action, command in (("CreateSnapshot", "snapshot"), ("CopySnapshot", "copy")):
        bench.server.fail(f"EC2.{action}", RemoteError(code, "no", "why"))
        assert bench.error(status, command, "x") == {"Code": code, "Message": "no", "Hint": "why"}


# --- copy -------------------------------------------------------------------------------------------------


def test_a_copy_under_the_same_key_is_instant(bench: Bench) -> None:
    bench.world.add_snapshots(snapshot())
    result = bench.run("copy", "monday")
    assert (result.exit_code, result.stdout, result.stderr) == (0, COPY + "\n", "")
    assert bench.server.parameters("EC2.CopySnapshot") == {"SourceSnapshotId": "monday"}
    assert "Control.WaitJob" not in bench.server.methods


def test_copy_sends_every_option(bench: Bench) -> None:
    bench.world.add_snapshots(snapshot())
    words = ["--name", "off-site", "--description", "x", "--encrypted", "--key", "backup", "--tag", "a=b"]
    assert bench.document("copy", SNAP, *words)["SnapshotId"] == COPY
    assert bench.server.parameters("EC2.CopySnapshot") == {
        "SourceSnapshotId": SNAP,
        "Name": "off-site",
        "Description": "x",
        "Encrypted": True,
        "KmsKeyId": "backup",
        "Tags": [{"Key": "a", "Value": "b"}],
    }


def test_a_key_without_encrypted_is_judged_by_the_server_as_for_create(bench: Bench) -> None:
    bench.world.add_snapshots(snapshot())
    bench.ok("copy", "monday", "--key", "backup")
    assert bench.server.parameters("EC2.CopySnapshot") == {"SourceSnapshotId": "monday", "KmsKeyId": "backup"}


def test_a_copy_that_re_encrypts_says_so_and_waits(source: Bench) -> None:
    source.world.note = "The data is re-encrypted under x; --key y --encrypted is instant"
    result = source.run("copy", "monday")
    assert (result.exit_code, result.stdout) == (0, COPY + "\n")
    assert "note: The data is re-encrypted under x; --key y --encrypted is instant" in result.stderr
    assert f"{JOB} re-encrypts up to 10 GiB" in result.stderr
    assert source.server.streamed == ["Control.WaitJob"]
    assert source.server.parameters("Control.WaitJob") == {"JobId": JOB}


def test_copy_json_is_the_snapshot_after_the_job(source: Bench) -> None:
    source.world.note = "for people"
    document = source.document("copy", "monday")
    assert (document["SnapshotId"], document["State"]) == (COPY, "completed")


def test_copy_without_waiting(source: Bench) -> None:
    result = source.run("copy", "monday", "--no-wait")
    assert (result.exit_code, result.stdout) == (0, COPY + "\n")
    assert f"ebsctl job wait {JOB}" in result.stderr
    assert source.server.streamed == []
    assert source.document("copy", "monday", "--no-wait")["State"] == "pending"


def test_a_failed_job_gives_its_own_error_and_the_copy_stays(source: Bench) -> None:
    source.world.job_end = {"State": "failed", "Error": FAILURE}
    error = source.error(7, "copy", "monday")
    assert (error["Code"], error["Message"]) == (FAILURE["Code"], FAILURE["Message"])
    assert error["Hint"].startswith(FAILURE["Hint"])
    assert "stays, in state error; `ebsctl delete snap-" in error["Hint"]
    assert "EC2.DeleteSnapshot" not in source.server.methods


def test_a_job_that_failed_without_a_reason(source: Bench) -> None:
    source.world.job_end = {"State": "failed"}
    assert source.error(1, "copy", "monday")["Code"] == "InternalFailure"


@pytest.mark.parametrize("failure", [None, {"Code": "Ebsd.JobCancelled", "Message": "It was cancelled.", "Hint": ""}])
def test_a_job_that_somebody_cancelled(source: Bench, failure: dict[str, str] | None) -> None:
    source.world.job_end = {"State": "cancelled", "Error": failure}
    error = source.error(1, "copy", "monday")
    assert error["Code"] == "Ebsd.JobCancelled"
    assert "is gone" in error["Hint"]


def test_when_nobody_can_tell_what_is_left_the_way_to_ask_is_named(source: Bench) -> None:
    source.world.job_end = {"State": "failed", "Error": FAILURE}
    source.server.fail("EC2.DescribeSnapshots", RemoteError("InternalFailure", "no"))
    assert "`ebsctl show snap-" in source.error(7, "copy", "monday")["Hint"]


def test_everything_done_counts_even_when_the_last_look_fails(source: Bench) -> None:
    source.server.fail("EC2.DescribeSnapshots", RemoteError("InternalFailure", "no"))
    assert source.ok("copy", "monday") == COPY + "\n"


def test_a_job_whose_end_is_not_told_is_a_protocol_error(source: Bench) -> None:
    source.server.overrides["Control.WaitJob"] = lambda _p, _fds: [{"Job": job()}]
    assert source.error(1, "copy", "monday")["Code"] == "Ebsd.Protocol"


def test_a_daemon_that_ends_meanwhile_is_unreachable(source: Bench) -> None:
    source.server.breaks = True
    error = source.error(9, "copy", "monday")
    assert error["Code"] == "Ebsd.DaemonUnreachable"
    assert "`ebsctl job show job-" in error["Hint"]


def interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Ctrl-C come while a job is waited for."""

    def interrupted(*_args: object, **_members: object) -> Iterator[dict[str, Any]]:
        raise KeyboardInterrupt
        yield {}

    monkeypatch.setattr("ebsctl.client.Client.control_stream", interrupted)


def test_ctrl_c_never_cancels(source: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(monkeypatch)
    result = source.run("copy", "monday", "--json")
    assert (result.exit_code, result.stdout) == (130, "")
    document = json.loads(result.stderr)
    assert document["Code"] == "Interrupted"
    assert f"`ebsctl job cancel {JOB}`" in document["Hint"]
    assert COPY in document["Hint"]
    assert "Control.CancelJob" not in source.server.methods
    assert f"hint: The job {job_id(2)} goes on" in source.run("copy", "monday").stderr


# --- create from a snapshot, with mkfs, with mount --------------------------------------------------------


def test_create_from_a_snapshot(bench: Bench) -> None:
    bench.world.add_snapshots(snapshot())
    assert bench.ok("create", "again", "--from", "monday") == VOL + "\n"
    assert bench.server.parameters("EC2.CreateVolume") == {"Name": "again", "SnapshotId": "monday"}
    bench.ok("create", "larger", "--from", "monday", "--size", "20G")
    assert bench.server.parameters("EC2.CreateVolume")["SizeBytes"] == 20 * GIB
    assert bench.error(3, "create", "x", "--from", "nothing")["Code"] == "InvalidSnapshot.NotFound"


def test_create_from_a_snapshot_waits_for_the_job(source: Bench) -> None:
    source.world.note = "The data is re-encrypted"
    result = source.run("create", "again", "--from", "monday")
    assert (result.exit_code, result.stdout) == (0, VOL + "\n")
    assert "note: The data is re-encrypted" in result.stderr
    assert source.server.streamed == ["Control.WaitJob"]
    document = source.document("create", "more", "--from", "monday")
    assert (document["State"], document["SnapshotId"]) == ("available", SNAP)


def test_create_without_waiting(source: Bench) -> None:
    result = source.run("create", "again", "--from", "monday", "--no-wait")
    assert (result.exit_code, result.stdout) == (0, VOL + "\n")
    assert f"{VOL} is creating until {JOB} has ended: ebsctl job wait {JOB}" in result.stderr
    assert source.server.streamed == []
    assert source.document("create", "more", "--from", "monday", "--no-wait")["State"] == "creating"


def test_create_whose_job_fails_names_the_volume(source: Bench, target: str) -> None:
    source.world.job_end = {"State": "failed", "Error": FAILURE}
    error = source.error(7, "create", "again", "--from", "monday", "--mount", target)
    assert error["Code"] == FAILURE["Code"]
    assert "The new volume vol-" in error["Hint"]
    assert "stays, in state error" in error["Hint"]
    assert "EC2.AttachVolume" not in source.server.methods
    assert "EC2.DeleteVolume" not in source.server.methods


def test_create_formats_and_mounts(bench: Bench, target: str) -> None:
    result = bench.run("create", "data", "--size", "10G", "--mkfs", "xfs", "--mount", target)
    assert (result.exit_code, result.stdout) == (0, VOL + "\n")
    assert f"note: attached as {DEVICE} and mounted on {target}" in result.stderr
    assert bench.programs.commands == [
        ["mkfs.xfs", "-q", DEVICE],
        ["mount", "-t", "xfs", "-o", "nouuid", DEVICE, target],
    ]
    assert bench.server.parameters("Control.RecordMount") == {"VolumeId": VOL, "MountPoint": target}


def test_create_json_with_mount_is_the_attached_volume(bench: Bench, target: str) -> None:
    document = bench.document("create", "data", "--size", "10G", "--mkfs", "ext4", "--mount", target)
    assert document["Attachments"][0]["MountPoint"] == target


def test_create_from_a_snapshot_mounts_what_it_holds(source: Bench, target: str) -> None:
    assert source.ok("create", "again", "--from", "monday", "--mount", target) == VOL + "\n"
    assert source.programs.commands[-1] == ["mount", "-t", "ext4", DEVICE, target]


def test_create_with_mkfs_without_root_takes_the_block_file(bench: Bench) -> None:
    bench.uid = 1000
    result = bench.run("create", "data", "--size", "1G", "--mkfs", "ext4")
    assert (result.exit_code, result.stdout) == (0, VOL + "\n")
    assert bench.server.parameters("EC2.AttachVolume")["ExposeAs"] == "file"
    assert bench.programs.commands == [["mkfs.ext4", "-q", "-F", f"/run/ebsd/volumes/{VOL}"]]


@pytest.mark.parametrize("failing", ["mkfs.ext4", "mount"])
def test_when_a_later_step_fails_the_volume_stays_and_is_named(bench: Bench, target: str, failing: str) -> None:
    bench.programs.failures[failing] = (1, "it said why")
    words = ["--size", "1G", "--mkfs", "ext4", "--mount", target]
    error = bench.error(1, "create", "data", *words)
    assert "it said why" in error["Message"]
    assert "It was detached again. The new volume vol-" in error["Hint"]
    assert "stays, in state available; `ebsctl delete vol-" in error["Hint"]
    assert "EC2.DeleteVolume" not in bench.server.methods
    assert not os.path.exists(target)


def test_when_attaching_is_refused_the_volume_stays(bench: Bench) -> None:
    bench.server.fail("EC2.AttachVolume", RemoteError("CustomerKeyHasBeenRevoked", "the key is disabled"))
    assert "The new volume vol-" in bench.error(6, "create", "data", "--size", "1G", "--mkfs", "ext4")["Hint"]


def test_an_interrupt_after_creation_names_the_volume(bench: Bench) -> None:
    bench.programs.interrupt = "mkfs.ext4"
    result = bench.run("create", "data", "--size", "1G", "--mkfs", "ext4")
    assert (result.exit_code, result.stdout) == (130, "")
    assert f"hint: The new volume {VOL} stays, in state available" in result.stderr


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "--from"),
        (["--from", "monday", "--mkfs", "ext4"], "--mkfs cannot be used with --from"),
        (["--from", "monday", "--mount", "/x", "--no-wait"], "--no-wait"),
        (["--size", "1G", "--mkfs", "ext4", "--no-wait"], "--no-wait"),
        (["--size", "1G", "--mkfs", "ntfs"], "ntfs"),
    ],
)
def test_options_of_create_that_do_not_go_together(bench: Bench, words: list[str], text: str) -> None:
    error = bench.error(2, "create", "data", *words)
    assert (error["Code"], text in error["Message"]) == ("Usage", True)
    assert bench.server.calls == []


def test_what_would_fail_later_is_found_before_anything_is_created(bench: Bench, tmp_path: Path, target: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    words = ["create", "data", "--size", "1G"]
    bench.error(2, *words, "--mkfs", "ext4", "--mount", str(tmp_path / "file"))
    bench.programs.missing = {"mkfs.btrfs"}
    bench.error(1, *words, "--mkfs", "btrfs")
    bench.uid = 1000
    assert "fuse2fs" in bench.error(5, *words, "--mkfs", "ext4", "--mount", target)["Hint"]
    assert bench.server.calls == []


# --- job --------------------------------------------------------------------------------------------------


def test_job_list_and_show(bench: Bench) -> None:
    bench.world.add_jobs(job(Done=GIB))
    assert bench.ok("job", "list").split("\t")[:4] == [JOB, "copy-snapshot", "running", "25%"]
    assert bench.document("job", "list") == {"Jobs": [job(Done=GIB)]}
    assert "Progress\t25%" in bench.ok("job", "show", JOB).splitlines()
    assert bench.document("job", "show", JOB) == job(Done=GIB)


@pytest.mark.parametrize("verb", ["show", "wait", "cancel"])
def test_a_job_that_is_not_there(bench: Bench, verb: str) -> None:
    assert bench.error(3, "job", verb, "job-x")["Code"] == "Ebsd.JobNotFound"


def test_job_wait(bench: Bench) -> None:
    bench.world.add_jobs(job())
    result = bench.run("job", "wait", JOB)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    document = bench.document("job", "wait", JOB)  # it has ended already
    assert (document["State"], document["Done"]) == ("completed", 4 * GIB)


def test_job_wait_for_a_failure_is_that_failure(bench: Bench) -> None:
    bench.world.add_jobs(job(State="failed", Error=FAILURE))
    assert bench.error(7, "job", "wait", JOB) == FAILURE


def test_job_wait_interrupted(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(monkeypatch)
    assert f"ebsctl job cancel {JOB}" in bench.error(130, "job", "wait", JOB)["Hint"]


def test_job_cancel(bench: Bench) -> None:
    bench.world.add_snapshots(snapshot(), snapshot(2, "copy", State="pending"))
    bench.world.add_jobs(job(), job(2))
    result = bench.run("job", "cancel", JOB)
    assert (result.exit_code, result.stdout) == (0, "")
    assert COPY in result.stderr
    assert COPY not in bench.world.snapshots
    assert bench.document("job", "cancel", job_id(2))["State"] == "cancelled"
    assert bench.error(4, "job", "cancel", JOB)["Code"] == "IncorrectState"


# --- the real process -------------------------------------------------------------------------------------


def run_on_a_terminal(bench: Bench, *words: str, interrupted: bool = False) -> tuple[int, bytes, bytes]:
    """Run with standard error on a terminal; return exit status, standard output, and what was on the terminal."""
    master, slave = pty.openpty()
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "ebsctl", "--socket", bench.server.path, *words]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=slave)
    os.close(slave)
    shown = b""
    if interrupted:
        while b"%" not in shown:
            shown += os.read(master, 4096)
        process.send_signal(signal.SIGINT)
    stdout = process.communicate(timeout=20)[0]
    try:
        while piece := os.read(master, 4096):
            shown += piece
    except OSError:
        pass  # the terminal is gone with its last user
    os.close(master)
    return process.returncode, stdout, shown


def test_progress_is_shown_on_a_terminal_and_wiped_away(source: Bench) -> None:
    status, stdout, shown = run_on_a_terminal(source, "copy", "monday")
    assert (status, stdout) == (0, COPY.encode() + b"\n")
    assert b"25%  1 GiB of 4 GiB" in shown
    assert b"100%" in shown
    assert shown.endswith(b" \r")
    assert b"%" not in run_on_a_terminal(source, "copy", "monday", "--json")[2]


def test_a_real_ctrl_c_leaves_the_job(source: Bench) -> None:
    source.server.stays = True
    status, stdout, shown = run_on_a_terminal(source, "copy", "monday", interrupted=True)
    assert (status, stdout) == (130, b"")
    assert f"ebsctl job cancel {JOB}".encode() in shown
    assert "Control.CancelJob" not in source.server.methods


@pytest.mark.parametrize(
    ("words", "method"),
    [
        (["create", "x", "--size", "1G"], "EC2.CreateVolume"),
        (["snapshot", "data"], "EC2.CreateSnapshot"),
        (["copy", "monday"], "EC2.CopySnapshot"),
    ],
)
def test_a_client_token_is_sent_as_it_is(bench: Bench, words: list[str], method: str) -> None:
    bench.run(*words, "--client-token", "order-1")
    assert bench.server.parameters(method)["ClientToken"] == "order-1"
    bench.run(*words)
    assert "ClientToken" not in bench.server.parameters(method)
