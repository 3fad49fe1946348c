"""Commands on what exists: list, show, delete, rename, tag, for volumes and snapshots; completion of their names."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from ebsctl_fakes import (
    FAILURE,
    GIB,
    KEY_1,
    OWN,
    TIME,
    Bench,
    attachment,
    job,
    job_id,
    snapshot,
    snapshot_id,
    volume,
    volume_id,
)

from ebsctl import lookup
from ebsctl.app import App
from ebsctl.commands import resources as commands
from ebsd.domain.errors import RemoteError, SnapshotInUse, VolumeInUse

VOL = volume_id(1)
SNAP = snapshot_id(1)
JOB = job_id(1)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.server.close()


def for_people(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(App, "for_people", True)


# --- list and show ----------------------------------------------------------------------------------------


def test_list_in_a_pipe_is_tab_separated_without_header(bench: Bench) -> None:
    bench.world.add(volume(), volume(2, "more", Encrypted=False, KmsKeyId=None, Attachments=[attachment(2)]))
    first, second = bench.ok("list").splitlines()
    assert first.split("\t")[:4] == ["data", VOL, str(10 * GIB), "available"]
    assert second.split("\t")[4:8] == ["-", "/dev/loop5002", "-", OWN]
    assert bench.server.parameters("EC2.DescribeVolumes") == {}
    assert bench.ok("list", "volumes") == bench.ok("list")


def test_list_on_a_terminal_has_a_header(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    for_people(monkeypatch)
    bench.world.add(volume())
    header, row = bench.ok("list").splitlines()
    assert header.split()[:3] == ["NAME", "ID", "SIZE"]
    assert "10 GiB" in row


def test_list_of_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bench.ok("list") == ""
    assert bench.document("list") == {"Volumes": []}
    for_people(monkeypatch)
    result = bench.run("list")
    assert result.stdout == ""
    assert "ebsctl create NAME" in result.stderr


def test_list_json(bench: Bench) -> None:
    bench.world.add(volume())
    assert bench.document("list") == {"Volumes": [volume()]}


def test_filters_of_one_name_are_alternatives(bench: Bench) -> None:
    bench.ok("list", "--filter", "status=available", "--filter", "tag:a=b=c", "--filter", "status=error")
    assert bench.server.parameters("EC2.DescribeVolumes")["Filters"] == [
        {"Name": "status", "Values": ["available", "error"]},
        {"Name": "tag:a", "Values": ["b=c"]},
    ]


@pytest.mark.parametrize("text", ["status", "=x", ""])
def test_a_filter_without_equals_is_a_usage_error(bench: Bench, text: str) -> None:
    assert bench.error(2, "list", "--filter", text)["Code"] == "InvalidParameterValue"


def test_list_of_an_unknown_kind(bench: Bench) -> None:
    assert bench.error(2, "list", "grants")["Code"] == "Usage"


def test_show_prints_fields_or_the_volume(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.world.add(volume(Attachments=[attachment(MountPoint="/srv/x")]))
    lines = bench.ok("show", "data").splitlines()
    assert f"VolumeId\t{VOL}" in lines
    assert "MountPoint\t/srv/x" in lines
    assert bench.document("show", VOL) == bench.world.volumes[VOL]
    for_people(monkeypatch)
    assert "Size:" in bench.ok("show", "data")


def test_show_of_nothing_known(bench: Bench) -> None:
    assert bench.error(3, "show", "nothing")["Code"] == "InvalidID"


# --- delete, rename, tag ----------------------------------------------------------------------------------


def answer(monkeypatch: pytest.MonkeyPatch, text: str) -> list[str]:
    """Pretend a terminal on which a person types ``text``; return the questions asked."""
    asked: list[str] = []
    monkeypatch.setattr(commands, "is_interactive", lambda: True)
    monkeypatch.setattr(commands, "confirm", lambda question: asked.append(question) or text == "y")
    return asked


def test_delete_without_a_terminal_wants_yes(bench: Bench) -> None:
    bench.world.add(volume())
    error = bench.error(2, "delete", "data")
    assert (error["Code"], error["Hint"]) == ("Usage", "Add --yes.")
    assert bench.server.calls == []


def test_delete_with_yes_names_the_volume_by_id(bench: Bench) -> None:
    bench.world.add(volume())
    assert bench.ok("delete", "data", "--yes") == ""
    assert bench.server.parameters("EC2.DeleteVolume") == {"VolumeId": VOL}
    assert bench.world.volumes == {}


def test_delete_json_names_what_is_gone(bench: Bench) -> None:
    bench.world.add(volume())
    assert bench.document("delete", "data", "--yes") == {"VolumeId": VOL}


def test_delete_asks_with_name_id_and_size(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.world.add(volume())
    asked = answer(monkeypatch, "n")
    assert bench.run("delete", "data").exit_code == 1
    assert asked == [f"Delete volume data ({VOL}, 10 GiB)? Its data cannot be recovered."]
    assert "EC2.DeleteVolume" not in bench.server.methods
    answer(monkeypatch, "y")
    assert bench.run("delete", "data").exit_code == 0
    assert bench.world.volumes == {}


def test_delete_of_an_attached_volume_is_a_conflict(bench: Bench) -> None:
    bench.world.add(volume())
    bench.server.fail("EC2.DeleteVolume", VolumeInUse(volume=VOL, state="attached"))
    assert bench.error(4, "delete", "data", "--yes")["Code"] == "VolumeInUse"


def test_delete_of_nothing_known(bench: Bench) -> None:
    assert bench.error(3, "delete", "nothing", "--yes")["Code"] == "InvalidID"


def test_rename(bench: Bench) -> None:
    bench.world.add(volume())
    assert bench.ok("rename", "data", "new") == ""
    assert bench.server.parameters("Control.Rename") == {"Resource": "data", "Name": "new"}
    assert bench.document("rename", "new", "newer")["Name"] == "newer"
    assert bench.error(3, "rename", "data", "x")["Code"] == "InvalidID"


def test_tags_are_set_and_removed(bench: Bench) -> None:
    bench.world.add(volume(Tags=[{"Key": "old", "Value": "1"}, {"Key": "kept", "Value": "2"}]))
    assert bench.ok("tag", "data", "env=lab", "old-", "dash=-", "x-y=z") == ""
    assert bench.world.volumes[VOL]["Tags"] == [
        {"Key": "kept", "Value": "2"},
        {"Key": "env", "Value": "lab"},
        {"Key": "dash", "Value": "-"},
        {"Key": "x-y", "Value": "z"},
    ]
    assert bench.server.parameters("EC2.CreateTags")["Resources"] == [VOL]
    assert bench.document("tag", "data", "kept-")["Tags"][0]["Key"] == "env"


@pytest.mark.parametrize("changes", [["novalue"], ["-"], ["a=1", "a-"], ["a=1", "a=2"], ["aws:x=1"], ["aws:x-"]])
def test_bad_tags_are_usage_errors(bench: Bench, changes: list[str]) -> None:
    bench.world.add(volume())
    assert bench.error(2, "tag", "data", *changes)["Code"] == "InvalidParameterValue"
    assert bench.server.calls == []


def test_tag_wants_a_change_and_something_known(bench: Bench) -> None:
    assert bench.error(2, "tag", "data")["Code"] == "Usage"
    assert bench.error(3, "tag", "nothing", "a=1")["Code"] == "InvalidID"


# --- words for the shell ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "expected"),
    [("", ["data", "other"]), ("da", ["data"]), ("vol-", [VOL, volume_id(2)]), ("x", [])],
)
def test_names_are_completed(bench: Bench, word: str, expected: list[str]) -> None:
    from click.shell_completion import ShellComplete

    from ebsctl.cli import cli

    bench.world.add(volume(), volume(2, "other"))
    complete = ShellComplete(cli, {"obj": App()}, "ebsctl", "_EBSCTL_COMPLETE")
    found = complete.get_completions(["--socket", bench.server.path, "attach"], word)
    assert [item.value for item in found] == expected


def test_completion_without_ebsd_is_empty(tmp_path: Path) -> None:
    from click.shell_completion import ShellComplete

    from ebsctl.cli import cli

    complete = ShellComplete(cli, {"obj": App()}, "ebsctl", "_EBSCTL_COMPLETE")
    assert complete.get_completions(["--socket", str(tmp_path / "none"), "attach"], "") == []


def test_completion_does_not_wait_for_a_server_that_hangs(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "COMPLETION_SECONDS", 0.02)
    bench.server.hang("EC2.DescribeVolumes")
    from click.shell_completion import ShellComplete

    from ebsctl.cli import cli

    complete = ShellComplete(cli, {"obj": App()}, "ebsctl", "_EBSCTL_COMPLETE")
    done = threading.Event()
    assert complete.get_completions(["--socket", bench.server.path, "show"], "") == []
    done.set()


@pytest.mark.parametrize(
    ("command", "word", "expected"),
    [
        (["copy"], "mon", ["monday"]),
        (["copy"], "snap-", [SNAP]),
        (["copy"], "vol-", []),
        (["create", "x", "--from"], "", ["monday"]),
        (["snapshot"], "", ["data"]),
        (["resize"], "vol-", [VOL]),
        (["show"], "", ["data", "monday"]),
        (["delete"], "snap-", [SNAP]),
        (["wait"], "job-", [JOB]),
        (["job", "cancel"], "", [JOB]),
        (["job", "wait"], "snap-", []),
    ],
)
def test_each_command_completes_what_it_takes(bench: Bench, command: list[str], word: str, expected: list[str]) -> None:
    from click.shell_completion import ShellComplete

    from ebsctl.cli import cli

    bench.world.add(volume())
    bench.world.add_snapshots(snapshot())
    bench.world.add_jobs(job())
    complete = ShellComplete(cli, {"obj": App()}, "ebsctl", "_EBSCTL_COMPLETE")
    found = complete.get_completions(["--socket", bench.server.path, *command], word)
    assert [item.value for item in found] == expected


# --- snapshots and jobs -----------------------------------------------------------------------------------


def test_list_snapshots(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.world.add_snapshots(snapshot(), snapshot(2, "tuesday", State="pending", Progress="42%", KmsKeyId=None))
    first, second = bench.ok("list", "snapshots").splitlines()
    assert first.split("\t")[:8] == ["monday", SNAP, str(10 * GIB), "completed", "100%", VOL, KEY_1, TIME]
    assert second.split("\t")[3:7] == ["pending", "42%", VOL, "-"]
    assert bench.document("list", "snapshots") == {"Snapshots": list(bench.world.snapshots.values())}
    assert bench.server.parameters("EC2.DescribeSnapshots") == {}
    bench.ok("list", "snapshots", "--filter", "status=pending")
    sent = bench.server.parameters("EC2.DescribeSnapshots")
    assert sent == {"Filters": [{"Name": "status", "Values": ["pending"]}]}
    for_people(monkeypatch)
    header = bench.ok("list", "snapshots").splitlines()[0]
    assert header.split()[:8] == ["NAME", "ID", "SIZE", "STATE", "PROGRESS", "VOLUME", "KEY", "START"]
    assert header.split()[8:] == ["ALLOCATED", "UNIQUE"]


@pytest.mark.parametrize(("kind", "text"), [("snapshots", "No snapshots yet"), ("jobs", "No jobs.")])
def test_lists_of_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch, kind: str, text: str) -> None:
    assert bench.ok("list", kind) == ""
    for_people(monkeypatch)
    assert text in bench.run("list", kind).stderr
    assert "matches" in bench.run("list", kind, "--filter", "State=x").stderr


def test_list_jobs(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.world.add_jobs(job(Done=GIB), job(2, State="failed", Error=FAILURE))
    first, second = bench.ok("list", "jobs").splitlines()
    assert first.split("\t")[:5] == [JOB, "copy-snapshot", "running", "25%", str(4 * GIB)]
    assert second.split("\t")[5:] == [SNAP, snapshot_id(2), TIME]
    assert bench.document("list", "jobs") == {"Jobs": list(bench.world.jobs.values())}
    bench.document("list", "jobs", "--filter", "state=failed", "--filter", "state=cancelled")
    assert bench.server.calls[-1] == (
        "Control.DescribeJobs",
        {"Filters": [{"Name": "state", "Values": ["failed", "cancelled"]}]},
    )
    for_people(monkeypatch)
    assert bench.ok("list", "jobs").startswith("ID ")


def test_job_list_has_what_runs_first_and_then_what_ended_last(bench: Bench) -> None:
    bench.world.add_jobs(
        job(1, State="completed", EndTime="2026-01-01T00:00:00Z"),
        job(2, State="failed", EndTime="2026-02-01T00:00:00Z", Error=FAILURE),
        job(3, State="interrupted"),
        job(4),
    )
    listed = [each["JobId"] for each in bench.document("job", "list")["Jobs"]]
    assert listed == [job_id(3), job_id(4), job_id(2), job_id(1)]
    bench.document("job", "list", "--active", "--filter", "kind=copy-snapshot")
    assert bench.server.calls[-1][1]["Filters"] == [
        {"Name": "kind", "Values": ["copy-snapshot"]},
        {"Name": "state", "Values": ["interrupted", "running"]},
    ]


def test_the_limit_of_a_job(bench: Bench) -> None:
    bench.world.add_jobs(job())
    assert bench.document("job", "limit", JOB, "50M")["RateLimit"] == 50 << 20
    assert bench.document("job", "limit", JOB, "0")["RateLimit"] == 0
    assert bench.document("job", "limit", JOB, "default")["RateLimit"] == 7
    assert bench.run("job", "limit", JOB, "fast").exit_code == 2


def test_a_job_shows_how_fast_it_goes(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.world.add_jobs(job(BytesPerSecond=3 << 20, SecondsLeft=12, RateLimit=50 << 20))
    assert {f"BytesPerSecond\t{3 << 20}", "SecondsLeft\t12"} <= set(bench.ok("job", "show", JOB).splitlines())
    for_people(monkeypatch)
    assert "3 MiB/s" in bench.ok("job", "show", JOB)


def test_show_a_snapshot_by_name_and_id(bench: Bench) -> None:
    bench.world.add_snapshots(snapshot(Tags=[{"Key": "env", "Value": "lab"}]))
    for word in ("monday", SNAP):
        lines = bench.ok("show", word).splitlines()
        assert f"SnapshotId\t{SNAP}" in lines
        assert "Tag env\tlab" in lines
        assert bench.document("show", word) == bench.world.snapshots[SNAP]


def test_show_a_job(bench: Bench) -> None:
    bench.world.add_jobs(job(State="failed", Error=FAILURE))
    assert "Error.Code\tEbsd.IntegrityFailure" in bench.ok("show", JOB).splitlines()
    assert bench.document("show", JOB) == bench.world.jobs[JOB]


@pytest.mark.parametrize(
    ("word", "code"),
    [
        (volume_id(9), "InvalidVolume.NotFound"),
        (snapshot_id(9), "InvalidSnapshot.NotFound"),
        (job_id(9), "Ebsd.JobNotFound"),
        ("nothing", "InvalidID"),
    ],
)
def test_what_is_not_there_has_the_code_of_its_kind(bench: Bench, word: str, code: str) -> None:
    assert bench.error(3, "show", word)["Code"] == code


def test_an_empty_answer_is_not_found(bench: Bench) -> None:
    bench.server.overrides["EC2.DescribeSnapshots"] = lambda _p, _fds: {"Snapshots": []}
    bench.server.overrides["Control.DescribeJobs"] = lambda _p, _fds: {"Jobs": []}
    assert bench.error(3, "show", SNAP)["Code"] == "InvalidSnapshot.NotFound"
    assert bench.error(3, "show", JOB)["Code"] == "Ebsd.JobNotFound"


def test_an_unknown_kind_is_a_protocol_error(bench: Bench) -> None:
    bench.server.overrides["Control.Identify"] = lambda _p, _fds: {"Kind": "fleet", "ResourceId": "fleet-1"}
    assert bench.error(1, "show", "x")["Code"] == "Ebsd.Protocol"


def test_delete_a_snapshot(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.world.add_snapshots(snapshot(), snapshot(2, "tuesday"))
    assert bench.ok("delete", "monday", "--yes") == ""
    assert bench.server.parameters("EC2.DeleteSnapshot") == {"SnapshotId": SNAP}
    asked = answer(monkeypatch, "n")
    assert bench.run("delete", "tuesday").exit_code == 1
    assert asked == [f"Delete snapshot tuesday ({snapshot_id(2)}, 10 GiB)? Its data cannot be recovered."]
    assert bench.document("delete", snapshot_id(2), "--yes") == {"SnapshotId": snapshot_id(2)}
    assert bench.world.snapshots == {}


def test_delete_of_a_snapshot_in_use_is_a_conflict(bench: Bench) -> None:
    bench.world.add_snapshots(snapshot())
    bench.server.fail("EC2.DeleteSnapshot", SnapshotInUse(snapshot=SNAP, user=JOB))
    assert bench.error(4, "delete", "monday", "--yes")["Code"] == "InvalidSnapshot.InUse"


def test_a_failing_lookup_deletes_nothing(bench: Bench) -> None:
    bench.world.add_snapshots(snapshot())
    bench.server.fail("EC2.DescribeSnapshots", RemoteError("UnauthorizedOperation", "no"))
    bench.error(5, "delete", "monday", "--yes")
    assert "EC2.DeleteSnapshot" not in bench.server.methods


def test_rename_and_tag_a_snapshot(bench: Bench) -> None:
    bench.world.add_snapshots(snapshot())
    assert bench.document("rename", "monday", "first")["Name"] == "first"
    assert bench.document("tag", "first", "env=lab")["Tags"] == [{"Key": "env", "Value": "lab"}]
    assert bench.ok("tag", SNAP, "env-") == ""
    assert bench.world.snapshots[SNAP]["Tags"] == []


@pytest.mark.parametrize("words", [["delete", JOB, "--yes"], ["rename", JOB, "x"], ["tag", JOB, "a=b"]])
def test_jobs_are_only_cancelled(bench: Bench, words: list[str]) -> None:
    assert f"ebsctl job cancel {JOB}" in bench.error(2, *words)["Hint"]
    assert bench.server.calls == []
