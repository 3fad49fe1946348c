"""Rotate and rewrap: other wrappings of the same data keys, no byte of data, records and floors as they were."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import time
from contextlib import closing
from typing import Any

import pytest
from installation import Installation

from ebsd.store.record import Record, parse_record


def segments(ebsd: Installation) -> dict[str, str]:
    """Return the hash of every file of every layer."""
    found = (path for path in (ebsd.state / "layers").rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def record_of(ebsd: Installation, resource: str) -> Record:
    return parse_record((ebsd.state / "records" / resource).read_bytes(), file=resource)


def blob_of(ebsd: Installation, resource: str) -> bytes:
    wrapped = record_of(ebsd, resource).wrapped_key
    assert wrapped is not None
    return wrapped.blob


def table_of(resource: str) -> str:
    return "snapshot" if resource.startswith("snap-") else "volume"


def catalog_blob(ebsd: Installation, resource: str) -> bytes:
    """Return the wrapped key in the catalog of a stopped ebsd."""
    with closing(sqlite3.connect(ebsd.state / "catalog.sqlite")) as db:
        (row,) = db.execute(f"SELECT wrapped_key FROM {table_of(resource)} WHERE id=?", (resource,)).fetchall()
        return bytes(row[0])


def put_into_catalog(ebsd: Installation, resource: str, blob: bytes, *, noted: bool) -> None:
    """Leave the catalog of a stopped ebsd as a cut does, with or without the note that rewrapping was under way."""
    with closing(sqlite3.connect(ebsd.state / "catalog.sqlite")) as db, db:
        table = table_of(resource)
        db.execute(f"UPDATE {table} SET wrapped_key=? WHERE id=?", (blob, resource))
        if noted:
            db.execute(
                f"INSERT OR REPLACE INTO setting SELECT 'rewrapping', key_arn FROM {table} WHERE id=?", (resource,)
            )


def material(ebsd: Installation, name: str) -> tuple[str, str]:
    shown: dict[str, Any] = ebsd.ctl_json("show", name)
    assert len(shown["DataKeyCreationDate"]) == len(shown["KeyMaterialCreationDate"]) == 24
    return shown["KeyMaterialId"], shown["KeyMaterialState"]


def write(ebsd: Installation, path: str, content: bytes) -> None:
    with open(path, "r+b", buffering=0) as file:
        file.write(content * 65536)
        os.fsync(file)


@pytest.fixture(scope="module")
def store(shared_ebsd: Installation) -> dict[str, str]:
    """An attached volume, one that is not, a restored one, two snapshots and a volume under another key."""
    ebsd = shared_ebsd
    for key in ("mine", "other"):
        ebsd.ok("key", "create", key)
    for name, key in (("live", "mine"), ("idle", "mine"), ("foreign", "other")):
        ebsd.ok("create", name, "--size", "1M", "--key", key, "--encrypted")
    write(ebsd, ebsd.ok("attach", "live", "--file"), b"1")
    ebsd.ok("snapshot", "live", "--name", "hot")
    write(ebsd, ebsd.ok("attach", "idle", "--file"), b"2")
    ebsd.ok("detach", "idle")
    ebsd.ok("snapshot", "idle", "--name", "cold")
    ebsd.ok("create", "again", "--from", "hot")
    found = {}
    for name in (*MINE, "foreign"):
        shown = ebsd.ctl_json("show", name)
        found[name] = str(shown["SnapshotId"] if name in ("hot", "cold") else shown["VolumeId"])
    return found


MINE = ("live", "idle", "again", "hot", "cold")


def test_rotation_and_rewrap_never_rewrite_data(shared_ebsd: Installation, store: dict[str, str]) -> None:
    ebsd = shared_ebsd
    path = ebsd.ctl_json("show", "live")["Attachments"][0]["Path"]
    while ebsd.ctl_json("show", "hot")["Integrity"] != "verified" or not leaves_are_done(ebsd):
        time.sleep(0.1)
    before, signed = segments(ebsd), {name: record_of(ebsd, store[name]).signed for name in store}
    blobs = {name: blob_of(ebsd, store[name]) for name in store}
    assert {material(ebsd, name)[1] for name in store} == {"CURRENT"}
    first = material(ebsd, "live")[0]
    ebsd.ok("key", "rotation", "mine", "--now")
    assert {material(ebsd, name) for name in MINE} == {(first, "NON_CURRENT")}

    report = ebsd.ctl_json("key", "rewrap", "mine")
    assert (report["Rewrapped"], report["Current"], report["Failed"], report["Total"]) == (5, 0, 0, 5)
    newest = ebsd.ctl_json("key", "rotation", "mine")["Rotations"][-1]["KeyMaterialId"]
    assert {material(ebsd, name) for name in MINE} == {(newest, "CURRENT")}
    assert all(blob_of(ebsd, store[name]) != blobs[name] for name in MINE)
    assert blob_of(ebsd, store["foreign"]) == blobs["foreign"]
    assert segments(ebsd) == before, "no byte of data, digest or layer table"
    assert {name: record_of(ebsd, store[name]).signed for name in store} == signed, "generations stay"
    again = ebsd.ctl_json("key", "rewrap", "mine")
    assert (again["Rewrapped"], again["Current"]) == (0, 5)

    write(ebsd, path, b"3")  # what is attached did not notice
    ebsd.ok("snapshot", "live", "--name", "later")
    assert material(ebsd, "later")[1] == "CURRENT", "a snapshot takes over the new wrapping"
    ebsd.ok("detach", "live")
    assert ebsd.ctl("check").status == 0
    for name, content in (("live", b"3"), ("idle", b"2"), ("again", b"1")):
        with open(ebsd.ok("attach", name, "--file"), "rb", buffering=0) as file:
            assert file.read(1) == content
    ebsd.ok("detach", "--all")
    assert ebsd.ctl_json("verify", "later")["Kind"] == "authenticity"
    ebsd.ok("delete", "later", "--yes")


def leaves_are_done(ebsd: Installation) -> bool:
    """Say whether the layer that the snapshot of the attached volume sealed was hashed, and its record signed anew."""
    live = ebsd.ctl_json("show", "hot")["SnapshotId"]
    return record_of(ebsd, live).body().generation == 2


def test_what_is_refused(shared_ebsd: Installation, store: dict[str, str]) -> None:
    ebsd = shared_ebsd
    status, error = ebsd.refused("key", "rewrap", "mine", "--to", "other")
    assert (status, error["Code"]) == (1, "UnsupportedOperation")
    assert "ebsctl copy" in error["Hint"]
    assert ebsd.ctl_json("key", "rewrap", "mine", "--to", "mine")["Failed"] == 0
    status, error = ebsd.refused("key", "rewrap", "mine", "foreign")
    assert (status, error["Code"]) == (2, "InvalidParameterValue")
    status, error = ebsd.refused("key", "rewrap", "none")
    assert (status, error["Code"]) == (3, "NotFoundException")
    assert ebsd.ctl_json("key", "rewrap", "mine", "hot", "idle", "hot")["Total"] == 2
    ebsd.ok("key", "rotation", "mine", "--now")
    ebsd.ok("key", "disable", "mine")
    outcome = ebsd.ctl("--json", "key", "rewrap", "mine")
    assert outcome.status == 6, "a disabled key wraps nothing"
    assert outcome.json["Failed"] == 5
    ebsd.ok("key", "enable", "mine")
    path = ebsd.state / "records" / store["idle"]
    whole = path.read_bytes()
    path.write_bytes(b"damaged")
    outcome = ebsd.ctl("--json", "key", "rewrap", "mine")
    assert (outcome.status, outcome.json["Rewrapped"], outcome.json["Failed"]) == (7, 4, 1)
    assert outcome.json["Failures"][0]["ResourceId"] == store["idle"]
    path.write_bytes(whole)
    assert ebsd.ctl_json("key", "rewrap", "mine")["Rewrapped"] == 1


@pytest.mark.parametrize("mended_by", ["start", "rewrap"])
def test_a_rewrap_that_was_cut_between_record_and_catalog(
    shared_ebsd: Installation, store: dict[str, str], mended_by: str
) -> None:
    ebsd = shared_ebsd
    old = {name: blob_of(ebsd, store[name]) for name in MINE}
    ebsd.ok("key", "rotation", "mine", "--now")
    assert ebsd.ctl_json("key", "rewrap", "mine")["Rewrapped"] == 5
    ebsd.ctl("detach", "--all")
    ebsd.stop()
    for name in ("idle", "hot"):
        put_into_catalog(ebsd, store[name], old[name], noted=mended_by == "start")
    ebsd.start()
    if mended_by == "rewrap":
        assert ebsd.ctl("check").status == 7, "check tells the two apart"
        assert ebsd.ctl_json("key", "rewrap", "mine")["Rewrapped"] == 0
    assert ebsd.ctl("check").status == 0
    ebsd.stop()
    assert {name: catalog_blob(ebsd, store[name]) for name in MINE} == {
        name: blob_of(ebsd, store[name]) for name in MINE
    }
    ebsd.start()
    ebsd.ok("attach", "idle", "--file")
