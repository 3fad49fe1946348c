"""An older signed record of a source, put into what was made from it, is refused; the source may go on meanwhile."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from installation import Installation

from ebsd.store.disk import RealDisk
from ebsd.store.record import Record, parse_record, write_record

TOO_OLD = (7, "Ebsd.RecordTooOld")


def record_of(ebsd: Installation, resource: str) -> tuple[Path, Record]:
    path = ebsd.state / "records" / resource
    return path, parse_record(path.read_bytes(), file=resource)


def written(ebsd: Installation, content: bytes) -> None:
    with open(ebsd.ok("attach", "data", "--file"), "r+b", buffering=0) as file:
        file.write(content * 65536)
        os.fsync(file)
    ebsd.ok("detach", "data")


def content_of(ebsd: Installation, volume: str) -> bytes:
    with open(ebsd.ok("attach", volume, "--file"), "rb", buffering=0) as file:
        found = file.read(65536)
    ebsd.ok("detach", volume)
    assert len(set(found)) == 1
    return found[:1]


def refused(ebsd: Installation, *arguments: str) -> tuple[int, str]:
    status, error = ebsd.refused(*arguments)
    return status, error["Code"]


def test_an_older_record_of_the_source_as_authority_is_refused(ebsd: Installation) -> None:
    ebsd.ok("key", "create", "other")
    ebsd.ok("create", "data", "--size", "64M")
    source = ebsd.ctl_json("show", "data")["VolumeId"]
    written(ebsd, b"1")
    old = record_of(ebsd, source)[1].signed
    old_map = (ebsd.state / "maps" / source).read_bytes()
    written(ebsd, b"2")
    ebsd.ok("snapshot", "data", "--name", "s")  # detached: it carries the volume's signed record
    for name in ("early", "restored"):
        ebsd.ok("create", name, "--from", "s")
    for content in (b"3", b"4"):
        written(ebsd, content)  # the source goes on, and its floor rises: what was made from it stays good
    assert content_of(ebsd, "early") == b"2"
    ebsd.ok("create", "late", "--from", "s")
    assert content_of(ebsd, "late") == b"2"

    disk = RealDisk()
    restored, snapshot = (ebsd.ctl_json("show", name) for name in ("restored", "s"))
    for resource in (restored["VolumeId"], snapshot["SnapshotId"]):
        path, record = record_of(ebsd, resource)
        assert record.authority is not None
        original, map_path = path.read_bytes(), ebsd.state / "maps" / resource
        original_map = map_path.read_bytes()
        write_record(disk, path, replace(record, authority=old))
        if resource == restored["VolumeId"]:
            header = len(original_map) - len(old_map)
            assert header == 0, "maps of one size"
            map_path.write_bytes(original_map[:4096] + old_map[4096:])
            assert refused(ebsd, "attach", "restored", "--file") == TOO_OLD
            map_path.write_bytes(original_map)
        else:
            ebsd.ok("create", "from-older", "--from", "s")
            assert refused(ebsd, "attach", "from-older", "--file") == TOO_OLD
            assert refused(ebsd, "copy", "s", "--encrypted", "--key", "other") == TOO_OLD
        path.write_bytes(original)
    assert content_of(ebsd, "restored") == b"2"
    ebsd.ok("copy", "s", "--name", "copied", "--encrypted", "--key", "other")
    ebsd.ok("create", "from-copy", "--from", "copied")
    assert content_of(ebsd, "from-copy") == b"2"
