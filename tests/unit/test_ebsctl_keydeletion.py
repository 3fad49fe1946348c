"""`ebsctl key schedule-deletion` and `cancel-deletion`: what is lost is told first, and nothing happens unconfirmed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from ebsctl_fakes import KEY_1, OWN, TIME, Bench, job, job_id, key, snapshot, snapshot_id, volume, volume_id

from ebsctl import terminal
from ebsctl.commands.keydeletion import MAX_NAMED, MAX_SHOWN
from ebsd.domain.errors import KmsInvalidState

ARN = f"arn:aws:kms:local:{OWN}:key/{KEY_1}"


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    made.world.keys = {KEY_1: key()}
    made.world.aliases = {"alias/old": KEY_1}
    yield made
    made.server.close()


def in_use(bench: Bench) -> None:
    bench.world.add(volume(1, "data"))
    bench.world.add_snapshots(snapshot(1, "monday"))
    bench.world.add_jobs(job(1), job(2, State="completed"))
    bench.world.key_resources = [snapshot_id(1), volume_id(1), volume_id(9)]


def test_an_unused_key_is_scheduled_without_a_question(bench: Bench) -> None:
    result = bench.run("key", "schedule-deletion", "old")
    assert (result.exit_code, result.stdout) == (0, f"{TIME}\n")
    assert f"ebsctl key cancel-deletion {KEY_1}" in result.stderr
    assert bench.server.parameters("KMS.ScheduleKeyDeletion") == {"KeyId": ARN}
    assert "EC2.DescribeVolumes" not in bench.server.methods
    assert f"DeletionDate\t{TIME}" in bench.ok("key", "show", "old")


def test_days_and_json(bench: Bench) -> None:
    document = bench.document("key", "schedule-deletion", "old", "--days", "7")
    assert document == {
        "KeyId": ARN,
        "DeletionDate": TIME,
        "KeyState": "PendingDeletion",
        "PendingWindowInDays": 7,
    }


def test_what_is_lost_is_named_before_the_refusal(bench: Bench) -> None:
    in_use(bench)
    result = bench.run("key", "schedule-deletion", "old")
    assert (result.exit_code, result.stdout) == (4, "")
    lines = [line.strip() for line in result.stderr.splitlines()]
    assert lines[:4] == [
        f"Without {ARN} nobody can read:",
        f"{snapshot_id(1)} monday completed {job_id(1)}",
        f"{volume_id(1)} data available",
        f"{volume_id(9)} of account {OWN}",
    ]
    assert "[Ebsd.KeyStillUsed]" in lines[4]
    assert "--yes" in lines[5]
    assert bench.world.keys[KEY_1]["KeyState"] == "Enabled"
    error = bench.error(4, "key", "schedule-deletion", "old")
    assert error["Code"] == "Ebsd.KeyStillUsed"
    for name in (snapshot_id(1), "monday", volume_id(1), "data", volume_id(9)):
        assert name in error["Message"]
    assert "KMS.ScheduleKeyDeletion" not in bench.server.methods


def test_yes_accepts_the_loss_and_still_names_it(bench: Bench) -> None:
    in_use(bench)
    result = bench.run("key", "schedule-deletion", "old", "--yes")
    assert (result.exit_code, result.stdout) == (0, f"{TIME}\n")
    assert f"{volume_id(1)} data available" in result.stderr
    assert bench.server.parameters("KMS.ScheduleKeyDeletion") == {"KeyId": ARN, "AcceptDataLoss": True}


@pytest.mark.parametrize(("answer", "status", "state"), [(True, 0, "PendingDeletion"), (False, 1, "Enabled")])
def test_a_person_is_asked(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, answer: bool, status: int, state: str
) -> None:
    in_use(bench)
    asked: list[str] = []
    monkeypatch.setattr(terminal, "is_interactive", lambda: True)
    monkeypatch.setattr(terminal, "confirm", lambda question: asked.append(question) or answer)
    result = bench.run("key", "schedule-deletion", "old")
    assert result.exit_code == status
    assert asked == ["Delete the key, and with it the data of these 3?"]
    assert bench.world.keys[KEY_1]["KeyState"] == state


def test_a_volume_made_meanwhile_is_not_lost_unasked(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key service refuses what was not accepted: here it knows of a volume that the list did not have."""
    bench.world.key_resources = [volume_id(1)]
    monkeypatch.setattr(bench.world, "KeyService_ListKeyResources", lambda _p, _fds: {"Resources": [], "Total": 0})
    error = bench.error(4, "key", "schedule-deletion", "old", "--yes")
    assert error["Code"] == "Ebsd.KeyStillUsed"
    assert bench.world.keys[KEY_1]["KeyState"] == "Enabled"


def test_a_key_that_waits_already_is_not_asked_about(bench: Bench) -> None:
    in_use(bench)
    bench.world.keys[KEY_1] |= {"KeyState": "PendingDeletion", "DeletionDate": TIME}
    bench.server.fail("KMS.ScheduleKeyDeletion", KmsInvalidState(key=ARN, state="pending deletion"))
    assert bench.error(6, "key", "schedule-deletion", "old")["Code"] == "KMSInvalidStateException"
    assert "KeyService.ListKeyResources" not in bench.server.methods


def test_a_long_list_is_cut(bench: Bench) -> None:
    bench.world.key_resources = [volume_id(number) for number in range(1, 131)]
    result = bench.run("key", "schedule-deletion", "old")
    assert result.exit_code == 4
    assert f"  and {130 - MAX_SHOWN} more" in result.stderr.splitlines()
    assert f"and {130 - MAX_NAMED} more" in bench.error(4, "key", "schedule-deletion", "old")["Message"]


def test_cancelling_leaves_the_key_disabled(bench: Bench) -> None:
    bench.ok("key", "schedule-deletion", "old")
    result = bench.run("key", "cancel-deletion", "old")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "ebsctl key enable old" in result.stderr
    assert bench.server.parameters("KMS.CancelKeyDeletion") == {"KeyId": "alias/old"}
    assert bench.world.keys[KEY_1]["KeyState"] == "Disabled"


@pytest.mark.parametrize("days", ["6", "31"])
def test_a_period_that_is_refused_is_refused_before_the_question(bench: Bench, days: str) -> None:
    in_use(bench)
    error = bench.error(2, "key", "schedule-deletion", "old", "--days", days)
    assert error["Code"] == "ValidationException"
    assert "between 7 and 30" in error["Message"]
    assert bench.server.calls == []
