"""ebsctl recycle-bin, undelete, lock and unlock: what is sent, and what scripts and people see."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ebsctl_fakes import OWN, TIME, Bench, snapshot, snapshot_id, volume, volume_id

from ebsd.domain.errors import SnapshotNotFound, VolumeNotFound

UNTIL = "2026-01-09T03:04:05Z"


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.server.close()


def binned(**members: Any) -> dict[str, Any]:
    common = {"OwnerId": OWN, "State": "recoverable", "SizeBytes": 1 << 30}
    return {**common, "RecycleBinEnterTime": TIME, "RecycleBinExitTime": UNTIL, **members}


VOLUME = binned(VolumeId=volume_id(7), Name="old", Size=1, CreateTime=TIME)
SNAPSHOT = binned(SnapshotId=snapshot_id(7), VolumeId=volume_id(7), Name="monday", Description="")
RULE = {
    "Identifier": "0123456789a", "OwnerId": OWN, "ResourceType": "snapshot", "RetentionDays": 14,
    "ResourceTags": [{"Key": "env", "Value": "prod"}, {"Key": "keep"}], "ExcludeResourceTags": [], "Description": "",
    "CreationTime": TIME,
}  # fmt: skip


@pytest.fixture
def full(bench: Bench) -> Bench:
    """A volume and a snapshot lie in the bin."""

    def volumes(p: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        if p.get("VolumeIds", ["old"])[0] not in ("old", volume_id(7)):
            raise VolumeNotFound(volume=p["VolumeIds"][0])
        return {"Volumes": [VOLUME]}

    def snapshots(p: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        if p.get("SnapshotIds", ["monday"])[0] not in ("monday", snapshot_id(7)):
            raise SnapshotNotFound(snapshot=p["SnapshotIds"][0])
        return {"Snapshots": [SNAPSHOT]}

    bench.server.overrides["EC2.ListVolumesInRecycleBin"] = volumes
    bench.server.overrides["EC2.ListSnapshotsInRecycleBin"] = snapshots
    return bench


def test_the_list_has_both_kinds(full: Bench) -> None:
    assert full.ok("recycle-bin", "list").splitlines() == [
        f"old\t{volume_id(7)}\tvolume\t{1 << 30}\t{TIME}\t{UNTIL}\t{OWN}",
        f"monday\t{snapshot_id(7)}\tsnapshot\t{1 << 30}\t{TIME}\t{UNTIL}\t{OWN}",
    ]
    assert full.document("recycle-bin", "list") == {"Volumes": [VOLUME], "Snapshots": [SNAPSHOT]}


@pytest.mark.parametrize("word", ["monday", snapshot_id(7)])
def test_undelete_by_name_or_id(full: Bench, word: str) -> None:
    full.server.overrides["EC2.RestoreSnapshotFromRecycleBin"] = lambda _p, _f: {"Snapshot": snapshot(7, "monday")}
    assert full.ok("undelete", word).strip() == snapshot_id(7)
    assert full.server.parameters("EC2.RestoreSnapshotFromRecycleBin") == {"SnapshotId": snapshot_id(7)}


def test_undelete_says_that_the_name_is_taken(full: Bench) -> None:
    full.server.overrides["EC2.RestoreVolumeFromRecycleBin"] = lambda _p, _f: {"Volume": volume(7, volume_id(7))}
    result = full.run("undelete", "old")
    assert (result.exit_code, result.stdout.strip()) == (0, volume_id(7))
    assert "the name old is in use" in result.stderr


def test_undelete_of_what_is_not_there(full: Bench) -> None:
    assert full.error(3, "undelete", "nothing")["Code"] == "InvalidSnapshot.NotFound"
    assert full.error(3, "undelete", volume_id(9))["Code"] == "InvalidVolume.NotFound"


def test_a_deletion_tells_of_the_bin(bench: Bench) -> None:
    bench.server.overrides["EC2.DeleteVolume"] = lambda _p, _f: {"InRecycleBin": True}
    bench.world.volumes[volume_id(1)] = volume()
    result = bench.run("delete", "data", "--yes")
    assert (result.exit_code, result.stdout) == (0, "")
    assert f"ebsctl undelete {volume_id(1)}" in result.stderr
    assert bench.document("delete", "data", "--yes") == {"VolumeId": volume_id(1), "InRecycleBin": True}
    assert "Permanently" not in bench.server.parameters("EC2.DeleteVolume")


def test_deleting_permanently_finds_it_in_the_bin(full: Bench) -> None:
    full.server.overrides["EC2.DeleteSnapshot"] = lambda _p, _f: {}
    assert full.document("delete", snapshot_id(7), "--yes", "--permanently") == {"SnapshotId": snapshot_id(7)}
    assert full.server.parameters("EC2.DeleteSnapshot") == {"SnapshotId": snapshot_id(7), "Permanently": True}
    assert full.error(3, "delete", volume_id(9), "--yes", "--permanently")["Code"] == "InvalidVolume.NotFound"


def test_rules(bench: Bench) -> None:
    bench.server.overrides["Control.CreateRecycleBinRule"] = lambda _p, _f: {"Rule": RULE}
    bench.server.overrides["Control.ListRecycleBinRules"] = lambda _p, _f: {"Rules": [RULE]}
    bench.server.overrides["Control.DeleteRecycleBinRule"] = lambda _p, _f: {}
    create = ["recycle-bin", "rule", "create", "--type", "snapshot", "--days", "14"]
    assert bench.ok(*create, "--tag", "env=prod", "--tag", "keep").strip() == "0123456789a"
    assert bench.server.parameters("Control.CreateRecycleBinRule") == {
        "ResourceType": "snapshot",
        "RetentionDays": 14,
        "ResourceTags": [{"Key": "env", "Value": "prod"}, {"Key": "keep"}],
    }
    assert bench.error(2, *create, "--tag", "=x")["Code"] == "Usage"
    assert bench.ok("recycle-bin", "rule", "list").split("\t")[:5] == [
        "0123456789a", "snapshot", "14", "env=prod,keep", "-",
    ]  # fmt: skip
    assert bench.ok("recycle-bin", "rule", "delete", "0123456789a") == ""
    assert bench.server.parameters("Control.DeleteRecycleBinRule") == {"Identifier": "0123456789a"}


# --- locks --------------------------------------------------------------------------------------------------

LOCK = {
    "SnapshotId": snapshot_id(1), "LockState": "governance", "LockDuration": 30, "LockCreatedOn": TIME,
    "LockDurationStartTime": TIME, "LockExpiresOn": UNTIL,
}  # fmt: skip


@pytest.fixture
def lockable(bench: Bench) -> Bench:
    bench.world.add_snapshots(snapshot())
    bench.server.overrides["EC2.LockSnapshot"] = lambda _p, _f: LOCK
    bench.server.overrides["EC2.UnlockSnapshot"] = lambda _p, _f: {"SnapshotId": snapshot_id(1)}
    bench.server.overrides["EC2.DescribeLockedSnapshots"] = lambda _p, _f: {"Snapshots": [{"OwnerId": OWN, **LOCK}]}
    return bench


def test_lock_and_unlock(lockable: Bench) -> None:
    assert f"LockExpiresOn\t{UNTIL}" in lockable.ok("lock", "monday", "--days", "30")
    sent = lockable.server.parameters("EC2.LockSnapshot")
    assert sent == {"SnapshotId": "monday", "LockMode": "governance", "LockDuration": 30}
    assert lockable.ok("unlock", "monday") == ""
    assert lockable.ok("list", "locks").split("\t")[:4] == [snapshot_id(1), "governance", "30", UNTIL]
    assert lockable.error(2, "lock", "monday")["Code"] == "Usage"
    assert lockable.error(2, "lock", "monday", "--days", "1", "--until", "2030-01-01")["Code"] == "Usage"


def test_a_compliance_lock_is_confirmed(lockable: Bench) -> None:
    words = ("lock", "monday", "--mode", "compliance", "--until", "2030-01-01", "--cool-off", "24")
    assert "--yes" in lockable.error(2, *words)["Hint"]
    assert "EC2.LockSnapshot" not in lockable.server.methods
    lockable.ok(*words, "--yes")
    assert lockable.server.parameters("EC2.LockSnapshot") == {
        "SnapshotId": "monday", "LockMode": "compliance", "ExpirationDate": "2030-01-01", "CoolOffPeriod": 24,
    }  # fmt: skip
