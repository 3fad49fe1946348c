"""Clones of real volumes: content of the moment, attached or not; nothing is shared later, nothing is left behind."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from installation import Installation, installation

MIB = 1 << 20


def write(path: str, data: bytes, offset: int = 0) -> None:
    with open(path, "r+b", buffering=0) as file:
        file.seek(offset)
        file.write(data)


def read(ebsd: Installation, volume: str) -> bytes:
    path = Path(ebsd.ok("attach", volume, "--file", "--read-only"))
    with path.open("rb", buffering=0) as file:
        data = file.read(MIB)
    ebsd.ok("detach", volume)
    return data


def test_a_clone_has_the_moment_and_a_life_of_its_own(ebsd: Installation) -> None:
    first, second = os.urandom(MIB), os.urandom(MIB)
    source = ebsd.ok("create", "source", "--size", "64M", "--tag", "env=lab")
    path = ebsd.ok("attach", "source", "--file")
    write(path, first)
    ident = ebsd.ok("clone", "source", "now")
    write(path, second)
    assert ebsd.ok("clone", "source", "later", "--size", "128M", "--copy-tags", "--client-token", "once")
    again = ebsd.ok("clone", "source", "later", "--size", "128M", "--copy-tags", "--client-token", "once")
    assert ebsd.ctl_json("list", "snapshots")["Snapshots"] == []
    assert read(ebsd, "now") == first
    assert read(ebsd, "later") == second
    now, later, of = (ebsd.ctl_json("show", name) for name in ("now", "later", "source"))
    assert (now["VolumeId"], later["VolumeId"]) == (ident, again)
    assert now["SourceVolumeId"] == later["SourceVolumeId"] == source
    assert now["DataEncryptionKeyId"] == later["DataEncryptionKeyId"] == of["DataEncryptionKeyId"]
    assert "SnapshotId" not in now
    assert (now["Tags"], later["Tags"]) == ([], [{"Key": "env", "Value": "lab"}])
    assert (now["SizeBytes"], later["SizeBytes"]) == (64 * MIB, 128 * MIB)
    status, error = ebsd.refused("clone", "source", "small", "--size", "32M")
    assert (status, error["Code"]) == (2, "InvalidParameterValue")
    ebsd.ok("detach", "source")
    ebsd.ok("clone", "source", "detached")
    ebsd.ok("delete", "source", "--yes")
    write(ebsd.ok("attach", "now", "--file"), b"x" * 4096)
    ebsd.ok("detach", "now")
    assert read(ebsd, "detached") == second
    assert read(ebsd, "now") == b"x" * 4096 + first[4096:]
    key = ebsd.ok("key", "create")
    other = ebsd.ok("clone", "detached", "other", "--key", key)
    assert ebsd.ctl_json("show", other)["KmsKeyId"].endswith(key.rpartition("/")[2])
    assert read(ebsd, "other") == second
    assert ebsd.ctl_json("list", "snapshots")["Snapshots"] == []
    deadline = time.monotonic() + 20
    while list((ebsd.state / "records").glob("snap-*")):
        assert time.monotonic() < deadline, "the snapshot that was re-encrypted stays"
        time.sleep(0.2)


def test_a_clone_that_is_killed_leaves_nothing_or_a_clone(ebsd: Installation) -> None:
    data = os.urandom(MIB)
    ebsd.ok("create", "source", "--size", "64M")
    write(ebsd.ok("attach", "source", "--file"), data)
    with ThreadPoolExecutor(1) as pool:
        for number in range(3):
            asked = pool.submit(ebsd.ctl, "clone", "source", f"clone{number}")
            time.sleep(0.15 + 0.1 * number)
            ebsd.kill()
            answered = asked.result().status == 0
            ebsd.start()
            there = [v["Name"] for v in ebsd.ctl_json("list")["Volumes"] if v["Name"] != "source"]
            assert there in ([], ["clone" + str(number)])
            assert there or not answered
            assert list((ebsd.state / "records").glob("snap-*")) == []
            assert ebsd.ctl_json("list", "snapshots")["Snapshots"] == []
            for name in there:
                assert read(ebsd, name) == data
                ebsd.ok("delete", name, "--yes")


def test_an_unencrypted_volume_is_cloned_only_where_there_may_be_such(tmp_path: Path) -> None:
    with installation(tmp_path, "allow_unencrypted = true") as ebsd:
        ebsd.ok("defaults", "disable-encryption")
        ebsd.ok("create", "plain", "--size", "64M")
        ebsd.ok("clone", "plain", "copy")
        assert ebsd.ctl_json("show", "copy")["Encrypted"] is False
        ebsd.stop()
        ebsd.settings = ""
        ebsd.start()
        status, error = ebsd.refused("clone", "plain", "again")
        assert (status, error["Code"]) == (4, "OperationNotPermitted")
