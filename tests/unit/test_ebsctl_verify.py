"""``ebsctl verify``: what it prints, with which status it ends, and where its result is shown and obeyed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ebsctl_fakes import Bench, snapshot, snapshot_id, volume

from ebsd.domain.errors import IncorrectState, SnapshotDamaged

SNAP = snapshot_id(1)
DAMAGE = {
    "Chunk": 3, "Chunks": 2, "Offset": 196608, "Length": 131072, "Layer": 7, "File": "0000000007-ab.000",
    "Reason": "it has changed since it was hashed",
}  # fmt: skip
FILE = {"Layer": 7, "File": "0000000007-ab.leaves", "Reason": "its checksum is wrong"}
FOUND = {"Time": "2026-01-02T03:04:05Z", "Kind": "authenticity", "Chunks": 4, "DamagedChunks": 2, "DamagedFiles": 0}


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    made.world.add(volume())
    made.world.add_snapshots(snapshot())
    yield made
    made.server.close()


def test_what_is_whole_ends_with_status_0_and_says_how_it_was_compared(bench: Bench) -> None:
    lines = bench.ok("verify", SNAP).splitlines()
    assert lines[:3] == [f"ResourceId\t{SNAP}", "Kind\tauthenticity", "Chunks\t4"]
    assert "DamagedChunks\t0" in lines
    assert bench.server.parameters("Control.Verify") == {"Resource": SNAP}
    assert bench.document("verify", "data")["Kind"] == "authenticity"


def test_a_scrub_asks_for_no_key_and_says_so(bench: Bench) -> None:
    lines = bench.ok("verify", SNAP, "--scrub").splitlines()
    assert bench.server.parameters("Control.Verify") == {"Resource": SNAP, "Scrub": True}
    assert lines[1:3] == ["Kind\tintegrity", "Note\tno key was used, as was asked for"]


@pytest.mark.parametrize("damage", [[DAMAGE], [FILE], [DAMAGE, FILE]])
def test_damage_ends_with_status_7_and_a_line_for_each(bench: Bench, damage: list[dict[str, Any]]) -> None:
    bench.world.verification = {"Damage": damage, "DamagedChunks": sum(d.get("Chunks", 0) for d in damage)}
    result = bench.run("verify", SNAP)
    assert result.exit_code == 7
    assert f"error: {SNAP} is damaged" in result.stderr
    rows = [line for line in result.stdout.splitlines() if line.count("\t") == 6]
    assert len(rows) == len(damage)
    if damage[0] is DAMAGE:
        assert rows[0] == "3\t2\t196608\t131072\t7\t0000000007-ab.000\tit has changed since it was hashed"
    else:
        assert rows[0] == "-\t-\t-\t-\t7\t0000000007-ab.leaves\tits checksum is wrong"
    result = bench.run("verify", SNAP, "--json")
    assert (result.exit_code, json.loads(result.stdout)["Damage"], result.stderr) == (7, damage, "")


def test_what_was_not_compared_is_told(bench: Bench) -> None:
    bench.world.verification = {"WithoutLeaf": 3, "HashedNow": 1, "Damage": [DAMAGE], "Complete": False}
    result = bench.run("verify", "data")
    assert "3 chunks have no digest" in result.stderr
    assert "1 chunks were hashed only now" in result.stderr
    assert "further damage is not listed" in result.stdout


def test_a_refusal_is_the_command_s(bench: Bench) -> None:
    def refuse(p: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        error = IncorrectState(reason="Volume vol-1 is attached, so it cannot be verified")
        error.hint = "Verify a snapshot of it."
        raise error

    bench.server.overrides["Control.Verify"] = refuse
    assert bench.error(4, "verify", "data")["Hint"] == "Verify a snapshot of it."


def test_nothing_is_verified_that_is_not_there(bench: Bench) -> None:
    assert bench.error(3, "verify", snapshot_id(9))["Code"] == "InvalidSnapshot.NotFound"


def test_show_tells_of_the_last_verification(bench: Bench) -> None:
    assert "LastVerification" not in bench.ok("show", SNAP)
    for changes, words in (
        ({}, "2 of 4 chunks damaged"),
        ({"DamagedFiles": 1}, "2 of 4 chunks damaged, 1 other files damaged"),
        ({"DamagedChunks": 0}, "no damage in 4 chunks"),
    ):
        found = {**FOUND, **changes}
        bench.world.add(volume(LastVerification=found))
        bench.world.add_snapshots(snapshot(LastVerification=found))
        for name in ("data", SNAP):
            assert (
                f"LastVerification\t2026-01-02T03:04:05Z, authenticity: {words}" in bench.ok("show", name).splitlines()
            )


def test_a_damaged_snapshot_is_used_only_when_that_is_said(bench: Bench) -> None:
    def refuse(p: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        raise SnapshotDamaged(snapshot=SNAP, chunks=2, files=0)

    bench.server.overrides["EC2.CreateVolume"] = bench.server.overrides["EC2.CopySnapshot"] = refuse
    for words in (("create", "again", "--from", SNAP), ("copy", SNAP)):
        error = bench.error(7, *words)
        assert error["Code"] == "Ebsd.SnapshotDamaged"
        assert "--allow-damaged" in error["Hint"]
    bench.server.overrides.clear()
    bench.ok("create", "again", "--from", SNAP, "--allow-damaged")
    assert bench.server.parameters("EC2.CreateVolume")["AllowDamaged"] is True
    bench.ok("copy", SNAP, "--allow-damaged")
    assert bench.server.parameters("EC2.CopySnapshot")["AllowDamaged"] is True
    bench.ok("copy", SNAP)
    assert "AllowDamaged" not in bench.server.parameters("EC2.CopySnapshot")
