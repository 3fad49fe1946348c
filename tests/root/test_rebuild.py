"""A lost catalog: ebsd starts in rescue mode, rebuilds it from the other files, and all is there."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import apsw
import pytest
from installation import Installation

MIB = 1024 * 1024
RESCUE = 1
"""Exit status of what does not work in rescue mode."""


def write(path: str, offset: int, length: int = MIB) -> None:
    with open(path, "r+b", buffering=0) as file:
        os.pwrite(file.fileno(), secrets.token_bytes(length), offset)
        os.fsync(file.fileno())


def digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def zeros(size: int) -> str:
    return hashlib.sha256(bytes(size)).hexdigest()


@dataclass
class World:
    """Volumes and snapshots of every kind, and what each held and was before the loss."""

    ebsd: Installation
    contents: dict[str, str] = field(default_factory=dict)
    shown: dict[str, dict[str, Any]] = field(default_factory=dict)
    attached: str = ""

    def content_of(self, volume: str) -> str:
        """Attach a volume read-only and return the digest of all of it."""
        path = self.ebsd.ok("attach", volume, "--file", "--read-only")
        try:
            return digest(path)
        finally:
            self.ebsd.ok("detach", volume)

    def show_all(self) -> dict[str, dict[str, Any]]:
        found = {v["Name"]: v for v in self.ebsd.ctl_json("list")["Volumes"]}
        return found | {s["Name"]: s for s in self.ebsd.ctl_json("list", "snapshots")["Snapshots"]}


@pytest.fixture
def world(ebsd: Installation) -> World:
    made = World(ebsd)
    ebsd.ok("key", "create", "second")
    ebsd.ok("create", "chain", "--size", "8M")
    for turn in range(3):  # a chain of snapshots, attached and detached ones
        path = ebsd.ok("attach", "chain", "--file")
        write(path, turn * MIB)
        if turn < 2:
            ebsd.ok("snapshot", "chain", "--name", f"s{turn}", "--description", f"turn {turn}")
            made.contents[f"s{turn}"] = digest(path)
            write(path, (turn + 3) * MIB)
        made.contents["chain"] = digest(path)
        ebsd.ok("detach", "chain")
    ebsd.ok("snapshot", "chain", "--name", "s2")
    ebsd.ok("create", "restored", "--from", "s0")
    ebsd.ok("create", "untouched", "--from", "s2")
    path = ebsd.ok("attach", "restored", "--file")
    write(path, 5 * MIB)
    made.contents["restored"] = digest(path)
    ebsd.ok("detach", "restored")
    ebsd.ok("copy", "s0", "--name", "same-key")
    ebsd.ok("copy", "s1", "--name", "other-key", "--key", "second", "--encrypted")
    ebsd.ok("create", "foreign", "--from", "s1", "--key", "second", "--encrypted")
    ebsd.ok("create", "empty", "--size", "4M")
    ebsd.ok("delete", "s1", "--yes")
    ebsd.ok("create", "grown", "--size", "4M")
    ebsd.ok("resize", "grown", "6M")
    ebsd.ok("rename", "empty", "still-empty")
    ebsd.ok("create", "live", "--size", "8M")
    made.attached = ebsd.ok("attach", "live", "--file")
    write(made.attached, 0)
    ebsd.ok("snapshot", "live", "--name", "of-live")
    made.contents["of-live"] = digest(made.attached)
    with open(made.attached, "r+b", buffering=0) as file:  # no flush: only the live map knows of it
        os.pwrite(file.fileno(), secrets.token_bytes(MIB), 2 * MIB)
    of = made.contents
    of |= {
        "same-key": of["s0"],
        "other-key": of["s1"],
        "foreign": of["s1"],
        "s2": of["chain"],
        "untouched": of["chain"],
    }
    of |= {"still-empty": zeros(4 * MIB), "grown": zeros(6 * MIB)}
    made.contents["live"] = digest(made.attached)
    made.shown = made.show_all()
    return made


def restored_content(world: World, snapshot: str) -> str:
    world.ebsd.ok("create", "probe", "--from", snapshot)
    try:
        return world.content_of("probe")
    finally:
        world.ebsd.ok("delete", "probe", "--yes")


def delete_catalog(state: Path) -> None:
    for path in state.glob("catalog.sqlite*"):
        path.unlink()


def cut_catalog(state: Path) -> None:
    os.truncate(state / "catalog.sqlite", 0)


def overwrite_catalog(state: Path) -> None:
    with (state / "catalog.sqlite").open("r+b") as file:
        file.write(secrets.token_bytes(8192))


def impossible_state(state: Path) -> None:
    db = apsw.Connection(str(state / "catalog.sqlite"))
    db.execute("UPDATE volume SET state='half' WHERE rowid=1")
    db.close()


LOSSES: tuple[Callable[[Path], None], ...] = (delete_catalog, cut_catalog, overwrite_catalog, impossible_state)

SAME = ("VolumeId", "SnapshotId", "OwnerId", "SizeBytes", "State", "Encrypted", "KmsKeyId", "DataEncryptionKeyId",
        "Description", "Path")  # fmt: skip


def assert_rescue(ebsd: Installation) -> None:
    status = ebsd.ctl_json("status")
    assert status["State"] == "rescue"
    for words in (("list",), ("create", "x", "--size", "4M"), ("attach", "chain"), ("snapshot", "chain")):
        code, error = ebsd.refused(*words)
        assert (code, error["Code"]) == (RESCUE, "Ebsd.Rescue")
        assert "--rebuild-catalog" in error["Hint"]
    before = sorted(path for path in ebsd.state.rglob("*") if not path.name.startswith("catalog"))
    found = ebsd.ctl("--json", "check")
    assert not [f for f in found.json["Findings"] if f["Severity"] == "damage"], found.stdout
    assert before == sorted(path for path in ebsd.state.rglob("*") if not path.name.startswith("catalog"))


def assert_as_before(world: World) -> None:
    now = world.show_all()
    assert now.keys() == world.shown.keys()
    for name, before in world.shown.items():
        for member in SAME:
            assert now[name].get(member) == before.get(member), (name, member)
    assert now["s0"]["VolumeId"] == now["chain"]["VolumeId"]
    assert now["restored"]["SnapshotId"] == now["s0"]["SnapshotId"]
    for name in ("chain", "restored", "untouched", "foreign", "still-empty", "grown"):
        assert world.content_of(name) == world.contents[name], name
    for name in ("s0", "s2", "same-key", "other-key", "of-live"):
        assert restored_content(world, name) == world.contents[name], name


@pytest.mark.timeout(600)
def test_everything_is_there_again(world: World) -> None:
    ebsd = world.ebsd
    ebsd.stop()
    delete_catalog(ebsd.state)
    ebsd.start()
    made = ebsd.ctl_json("check", "--rebuild-catalog", "--yes")
    assert (made["Volumes"], made["Snapshots"], made["AttachedVolumes"], made["Left"]) == (7, 5, 1, [])
    assert ebsd.ctl_json("status")["State"] == "running"
    # The attached volume went on all the time, and is taken over.
    write(world.attached, 4 * MIB)
    world.contents["live"] = digest(world.attached)
    assert_as_before(world)
    ebsd.ok("detach", "live")
    assert world.content_of("live") == world.contents["live"]
    assert_clean(ebsd)
    # Numbers and names go on behind the old ones, and what is deleted is given back.
    path = ebsd.ok("attach", "chain", "--file")
    write(path, 0)
    ebsd.ok("snapshot", "chain", "--name", "s3")
    write(path, MIB)
    content = digest(path)
    ebsd.ok("detach", "chain")
    ebsd.ok("delete", "s0", "--yes")
    assert world.content_of("chain") == content
    assert_clean(ebsd)


def assert_clean(ebsd: Installation) -> None:
    outcome = ebsd.ctl("--json", "check")
    assert outcome.status == 0, outcome.stdout


@pytest.mark.parametrize("lose", LOSSES, ids=lambda lose: lose.__name__)
def test_however_the_catalog_was_lost_nothing_but_the_rebuild_works(
    ebsd: Installation, lose: Callable[[Path], None]
) -> None:
    ebsd.ok("create", "chain", "--size", "4M")
    path = ebsd.ok("attach", "chain", "--file")
    write(path, 0)
    ebsd.ok("snapshot", "chain", "--name", "s")
    write(path, MIB)
    content = digest(path)
    ebsd.ok("detach", "chain")
    ebsd.stop()
    lose(ebsd.state)
    ebsd.start()
    assert_rescue(ebsd)
    made = ebsd.ctl_json("check", "--rebuild-catalog", "--yes")
    assert ("Kept" in made) is (lose is not delete_catalog)
    assert World(ebsd).content_of("chain") == content
    assert_clean(ebsd)


def test_a_volume_whose_process_died_with_ebsd_is_salvaged_after_the_rebuild(ebsd: Installation) -> None:
    ebsd.ok("create", "live", "--size", "4M")
    path = ebsd.ok("attach", "live", "--file")
    write(path, 0)
    with open(path, "r+b", buffering=0) as file:  # no flush: only the live map knows of it
        os.pwrite(file.fileno(), secrets.token_bytes(MIB), 2 * MIB)
    content = digest(path)
    volumes = ebsd.processes()["holders"]
    ebsd.stop()
    for pid in volumes:
        os.kill(pid, signal.SIGKILL)
    delete_catalog(ebsd.state)
    ebsd.start()
    ebsd.ok("check", "--rebuild-catalog", "--yes")
    assert ebsd.ctl_json("show", "live")["State"] == "error"
    ebsd.ok("detach", "live")
    assert World(ebsd).content_of("live") == content
    assert_clean(ebsd)


def test_what_cannot_be_recovered_is_told_and_its_files_stay(ebsd: Installation) -> None:
    for name in ("one", "two", "three"):
        ebsd.ok("create", name, "--size", "4M")
    ebsd.ok("snapshot", "one", "--name", "s")
    ids = {name: ebsd.ctl_json("show", name) for name in ("one", "two", "three", "s")}
    ebsd.stop()
    delete_catalog(ebsd.state)
    (ebsd.state / "records" / ids["two"]["VolumeId"]).write_bytes(b"no record")
    shutil.rmtree(ebsd.state / "layers" / ids["three"]["DataEncryptionKeyId"])
    (ebsd.state / "maps" / ids["s"]["SnapshotId"]).unlink()
    ebsd.start()
    made = ebsd.ctl_json("check", "--rebuild-catalog", "--yes")
    left = {entry["ResourceId"]: entry["Reason"] for entry in made["Left"]}
    assert "record cannot be read" in left.pop(ids["two"]["VolumeId"])
    assert "layer table" in left.pop(ids["three"]["VolumeId"])
    assert "no map" in left.pop(ids["s"]["SnapshotId"])
    assert left == {ids["two"]["DataEncryptionKeyId"]: "a lineage that no readable record names"}
    assert [v["Name"] for v in ebsd.ctl_json("list")["Volumes"]] == ["one"]
    # Nothing is given back while the catalog does not know all.
    ebsd.stop()
    ebsd.start()
    assert (ebsd.state / "maps" / ids["two"]["VolumeId"]).exists()
    assert (ebsd.state / "layers" / ids["two"]["DataEncryptionKeyId"] / "table").exists()
    codes = {f["Code"] for f in ebsd.ctl("--json", "check").json["Findings"]}
    assert codes >= {"resource-unknown", "orphan"}


def test_a_usable_catalog_is_not_rebuilt(ebsd: Installation) -> None:
    status, error = ebsd.refused("check", "--rebuild-catalog", "--yes")
    assert (status, error["Code"]) == (4, "IncorrectState")
    assert "move" in error["Hint"]


def test_a_catalog_of_a_newer_ebsd_is_refused_and_not_rebuilt(ebsd: Installation) -> None:
    ebsd.ok("create", "one", "--size", "4M")
    ebsd.stop()
    db = apsw.Connection(str(ebsd.state / "catalog.sqlite"))
    (version,) = db.execute("PRAGMA user_version").fetchone() or (0,)
    db.execute("PRAGMA user_version=999")
    db.close()
    ebsd.start()
    assert "schema version 999" in ebsd.ctl_json("status")["Reason"]
    status, error = ebsd.refused("check", "--rebuild-catalog", "--yes")
    assert (status, error["Code"]) == (4, "IncorrectState")
    ebsd.stop()
    db = apsw.Connection(str(ebsd.state / "catalog.sqlite"))
    db.execute(f"PRAGMA user_version={version}")
    db.close()
    ebsd.start()
    assert ebsd.ctl_json("show", "one")["State"] == "available"


def test_an_empty_store_needs_no_catalog(ebsd: Installation) -> None:
    ebsd.stop()
    delete_catalog(ebsd.state)
    ebsd.start()
    assert ebsd.ctl_json("status")["State"] == "running"
