"""``ebsctl wait``: what ends it, with which status, and how often it looks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ebsctl_fakes import FAILURE, Bench, job, job_id, snapshot, snapshot_id, volume, volume_id

from ebsctl.commands import waiting
from ebsd.domain.errors import InRescue

VOL = volume_id(1)
SNAP = snapshot_id(1)
JOB = job_id(1)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr(waiting, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(waiting, "LONGEST_PAUSE", 0.002)
    made = Bench(tmp_path)
    yield made
    made.server.close()


def becomes(bench: Bench, *states: str) -> None:
    """Let the volume `data` show one state after the other, and stay at the last."""
    bench.world.add(volume())
    coming = itertools.chain(states, itertools.repeat(states[-1]))

    def describe(p: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        state = next(coming)
        if state == "deleted":
            bench.world.volumes.clear()
        else:
            bench.world.volumes[VOL]["State"] = state
        return bench.world.EC2_DescribeVolumes(p, fds)

    bench.server.overrides["EC2.DescribeVolumes"] = describe


def test_the_pauses_grow_to_a_second() -> None:
    found = list(itertools.islice(waiting.pauses(), 8))
    assert found[0] == 0.2
    assert found == sorted(found)
    assert found[-1] == 1.0


def test_every_state_has_its_dead_ends() -> None:
    wanted = {(kind, state) for kind, states in waiting.STATES.items() if kind != "job" for state in states}
    assert set(waiting.DEAD_ENDS) == wanted
    assert all(state not in ends for (_, state), ends in waiting.DEAD_ENDS.items())


@pytest.mark.parametrize(
    ("states", "wanted"),
    [
        (["available"], "available"),
        (["creating", "creating", "available"], "available"),
        (["available", "in-use"], "in-use"),
        (["in-use", "error"], "error"),
    ],
)
def test_it_waits_for_a_volume(bench: Bench, states: list[str], wanted: str) -> None:
    becomes(bench, *states)
    result = bench.run("wait", "data", "--for", wanted)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    # By id: somebody may rename it meanwhile.
    asked = [p for method, p in bench.server.calls if method == "EC2.DescribeVolumes"]
    assert asked == [{"VolumeIds": [VOL]}] * len(states)
    assert bench.server.methods.count("Control.Identify") == 1


def test_json_is_the_resource(bench: Bench) -> None:
    bench.world.add(volume())
    bench.world.add_snapshots(snapshot())
    assert bench.document("wait", VOL, "--for", "available") == volume()
    assert bench.document("wait", "monday", "--for", "completed") == snapshot()


@pytest.mark.parametrize("word", ["data", VOL])
def test_it_waits_until_a_volume_is_gone(bench: Bench, word: str) -> None:
    becomes(bench, "deleting", "deleted")
    assert bench.document("wait", word, "--for", "deleted") == {"VolumeId": VOL}


def test_what_never_was_is_deleted_already(bench: Bench) -> None:
    assert bench.document("wait", VOL, "--for", "deleted") == {"VolumeId": VOL}
    assert bench.document("wait", "nothing", "--for", "deleted") == {"ResourceId": "nothing"}


@pytest.mark.parametrize(
    ("word", "code"),
    [("nothing", "InvalidID"), (VOL, "InvalidVolume.NotFound"), (SNAP, "InvalidSnapshot.NotFound")],
)
def test_what_never_was_becomes_nothing_else(bench: Bench, word: str, code: str) -> None:
    assert bench.error(3, "wait", word, "--for", "error")["Code"] == code


@pytest.mark.parametrize(
    ("state", "wanted"),
    [
        ("error", "available"),
        ("deleting", "available"),
        ("error", "in-use"),
        ("deleting", "in-use"),
        ("deleting", "error"),
    ],
)
def test_a_dead_end_is_a_conflict(bench: Bench, state: str, wanted: str) -> None:
    bench.world.add(volume(State=state, StateReason="the disk died"))
    error = bench.error(4, "wait", "data", "--for", wanted)
    assert error["Code"] == "IncorrectState"
    assert f"{VOL} is {state}" in error["Message"]
    assert "the disk died" in error["Hint"]


def test_what_is_deleted_meanwhile_is_a_dead_end(bench: Bench) -> None:
    becomes(bench, "creating", "deleted")
    result = bench.run("wait", "data", "--for", "available")
    assert result.exit_code == 4
    assert "is deleted" in result.stderr


@pytest.mark.parametrize(("state", "wanted"), [("error", "completed"), ("completed", "error")])
def test_dead_ends_of_snapshots(bench: Bench, state: str, wanted: str) -> None:
    bench.world.add_snapshots(snapshot(State=state))
    assert bench.error(4, "wait", SNAP, "--for", wanted)["Code"] == "IncorrectState"


@pytest.mark.parametrize("seconds", ["0", "0.02"])
def test_a_timeout_exits_8(bench: Bench, seconds: str) -> None:
    bench.world.add_snapshots(snapshot(State="pending"))
    error = bench.error(8, "wait", "monday", "--for", "completed", "--timeout", seconds)
    assert error["Code"] == "Ebsd.Timeout"
    assert f"Waiting for monday to be completed did not finish within {seconds} seconds" in error["Message"]


def test_a_daemon_that_hangs_is_a_timeout_too(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "LEAST_PATIENCE", 0.02)
    bench.server.hang("EC2.DescribeVolumes")
    error = bench.error(8, "wait", VOL, "--for", "available", "--timeout", "0.02")
    assert "Waiting for" in error["Message"]


def test_other_errors_end_it(bench: Bench) -> None:
    bench.server.fail("EC2.DescribeVolumes", InRescue(reason="the catalog is damaged"))
    assert bench.error(1, "wait", VOL, "--for", "deleted")["Code"] == "Ebsd.Rescue"
    bench.server.raw = b""
    assert bench.error(9, "wait", VOL, "--for", "available")["Code"] == "Ebsd.DaemonUnreachable"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([VOL, "--for", "completed"], "A volume is never completed"),
        ([SNAP, "--for", "available"], "A snapshot is never available"),
        ([JOB, "--for", "error"], "A job is never error"),
        ([VOL, "--for", "asleep"], "asleep"),
        ([VOL], "--for"),
        ([VOL, "--for", "error", "--timeout", "-1"], "--timeout"),
    ],
)
def test_wrong_states_are_usage_errors(bench: Bench, words: list[str], text: str) -> None:
    error = bench.error(2, "wait", *words)
    assert (error["Code"], text in error["Message"]) == ("Usage", True)
    assert bench.server.calls == []


def test_a_wrong_state_for_what_a_name_means(bench: Bench) -> None:
    bench.world.add(volume())
    assert bench.error(2, "wait", "data", "--for", "completed")["Code"] == "Usage"


# --- jobs -------------------------------------------------------------------------------------------------


def test_it_waits_for_a_job(bench: Bench) -> None:
    bench.world.add_jobs(job())
    assert bench.document("wait", JOB, "--for", "completed")["State"] == "completed"
    assert bench.server.streamed == ["Control.WaitJob"]
    assert bench.ok("wait", JOB, "--for", "completed") == ""


@pytest.mark.parametrize("wanted", ["failed", "cancelled"])
def test_jobs_end_in_three_ways(bench: Bench, wanted: str) -> None:
    bench.world.add_jobs(job(), job(2))
    bench.world.job_end = {"State": wanted, "Error": FAILURE}
    assert bench.document("wait", JOB, "--for", wanted)["State"] == wanted
    error = bench.error(4, "wait", job_id(2), "--for", "completed")
    assert f"has ended as {wanted}" in error["Message"]
    assert FAILURE["Message"] in error["Hint"]


def test_a_job_that_is_not_there(bench: Bench) -> None:
    assert bench.error(3, "wait", JOB, "--for", "completed")["Code"] == "Ebsd.JobNotFound"


def test_a_job_that_takes_too_long(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "LEAST_PATIENCE", 0.02)
    bench.server.hang("Control.WaitJob")
    error = bench.error(8, "wait", JOB, "--for", "completed", "--timeout", "0.05")
    assert f"Waiting for {JOB} to be completed" in error["Message"]
