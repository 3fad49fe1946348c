"""What is kept although somebody deletes it, on a real ebsd: locks, the recycle bin, and requests sent twice."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from installation import Installation, installation

pytestmark = pytest.mark.timeout(180)


def written(ebsd: Installation, name: str, data: bytes) -> str:
    """Make a volume that holds these bytes; returns its id."""
    volume = ebsd.ok("create", name, "--size", "64M", "--encrypted")
    path = Path(ebsd.ok("attach", name, "--file"))
    with path.open("r+b") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    ebsd.ok("detach", name)
    return volume


def read(ebsd: Installation, name: str, length: int) -> bytes:
    path = Path(ebsd.ok("attach", name, "--file", "--read-only"))
    try:
        with path.open("rb") as file:
            return file.read(length)
    finally:
        ebsd.ok("detach", name)


def table(text: str) -> list[list[str]]:
    return [line.split("\t") for line in text.splitlines()]


def test_deleted_locked_and_killed(tmp_path: Path) -> None:
    data = os.urandom(300_000)
    with installation(tmp_path) as ebsd:
        for kind in ("volume", "snapshot"):
            ebsd.ok("recycle-bin", "rule", "create", "--type", kind, "--days", "3", "--exclude-tag", "scratch")
        volume = written(ebsd, "data", data)
        snapshot = ebsd.ok("snapshot", "data", "--name", "monday", "--client-token", "night-1")
        ebsd.ok("lock", "monday", "--days", "2")
        status, error = ebsd.refused("delete", "monday", "--yes")
        assert (status, error["Code"]) == (4, "Ebsd.SnapshotLocked")
        assert ebsd.refused("delete", "monday", "--yes", "--permanently")[0] == 4
        ebsd.ok("unlock", "monday")
        assert ebsd.ctl_json("delete", "monday", "--yes") == {"SnapshotId": snapshot, "InRecycleBin": True}
        ebsd.ok("delete", "data", "--yes")
        assert ebsd.ok("list") == ""
        assert ebsd.ok("list", "snapshots") == ""
        status, error = ebsd.refused("attach", "data", "--file")
        assert (status, error["Code"]) == (3, "InvalidVolume.NotFound")
        assert f"ebsctl undelete {volume}" in ebsd.refused("attach", volume, "--file")[1]["Hint"]
        assert ebsd.ctl_json("status")["RecycleBin"] == {"Snapshots": 1, "Volumes": 1}
        assert ebsd.ctl_json("check")["Findings"] == []

        ebsd.kill()
        ebsd.start()
        assert [row[:3] for row in table(ebsd.ok("recycle-bin", "list"))] == [
            ["data", volume, "volume"],
            ["monday", snapshot, "snapshot"],
        ]
        assert ebsd.ok("undelete", "monday") == snapshot
        assert ebsd.ok("undelete", volume) == volume
        assert read(ebsd, "data", len(data)) == data
        ebsd.ok("create", "again", "--from", "monday")
        assert read(ebsd, "again", len(data)) == data
        # The request that made it, once more: nothing new.
        again = ebsd.ok("snapshot", "data", "--name", "monday", "--client-token", "night-1")
        assert again == snapshot
        status, error = ebsd.refused("snapshot", "data", "--name", "tuesday", "--client-token", "night-1")
        assert (status, error["Code"]) == (4, "IdempotentParameterMismatch")

        ebsd.ok("tag", "again", "scratch=1")
        assert "InRecycleBin" not in ebsd.ctl_json("delete", "again", "--yes")
        ebsd.ok("delete", "data", "--yes")
        ebsd.ok("delete", volume, "--yes", "--permanently")
        ebsd.ok("delete", snapshot, "--yes", "--permanently")
        assert ebsd.ok("recycle-bin", "list") == ""
        assert not any((ebsd.state / "layers").iterdir())
        assert ebsd.ctl_json("check")["Findings"] == []
        assert "RecycleBin" not in ebsd.ctl_json("status")


def test_a_rebuilt_catalog_says_what_it_lost(tmp_path: Path) -> None:
    """What lay in the bin is there again as any other; locks and rules are named among what is lost."""
    with installation(tmp_path) as ebsd:
        ebsd.ok("recycle-bin", "rule", "create", "--type", "volume", "--days", "3")
        volume = written(ebsd, "data", b"x" * 4096)
        ebsd.ok("delete", "data", "--yes")
        ebsd.stop()
        (ebsd.state / "catalog.sqlite").write_bytes(b"no catalog")
        for leftover in ("catalog.sqlite-wal", "catalog.sqlite-shm"):
            (ebsd.state / leftover).unlink(missing_ok=True)
        ebsd.start()
        report: dict[str, Any] = ebsd.ctl_json("check", "--rebuild-catalog", "--yes")
        assert any("recycle bin" in text for text in report["Lost"])
        assert any("locks" in text for text in report["Lost"])
        assert [row[1] for row in table(ebsd.ok("list"))] == [volume]
