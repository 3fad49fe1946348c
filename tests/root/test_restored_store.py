"""Backups that were restored: what is refused until an administrator accepts it, and the way back on a new host."""

from __future__ import annotations

import base64
import os
import shutil
from pathlib import Path

import pytest
from installation import Installation, installation

from ebsd.store.record import parse_record

TOO_OLD = (7, "Ebsd.RecordTooOld")


def refused(ebsd: Installation, *arguments: str | Path) -> tuple[int, str]:
    status, error = ebsd.refused(*arguments)
    return status, error["Code"]


def write(ebsd: Installation, volume: str, content: bytes) -> None:
    with open(ebsd.ok("attach", volume, "--file"), "r+b", buffering=0) as file:
        file.write(content * 4096)
        os.fsync(file)
    ebsd.ok("detach", volume)


def read(ebsd: Installation, volume: str, *options: str) -> bytes:
    with open(ebsd.ok("attach", volume, "--file", *options), "rb", buffering=0) as file:
        found = file.read(1)
    ebsd.ok("detach", volume)
    return found


def generation(ebsd: Installation, resource: str) -> int:
    return parse_record((ebsd.state / "records" / resource).read_bytes(), file=resource).body().generation


def put_back(ebsd: Installation, backup: Path) -> None:
    """Restore the state directory, as a backup program does; the key service is not concerned."""
    ebsd.stop()
    shutil.rmtree(ebsd.state)
    shutil.copytree(backup, ebsd.state)
    ebsd.start()


def test_a_restored_store_is_accepted_resource_by_resource(ebsd: Installation, tmp_path: Path) -> None:
    backup = tmp_path / "backup"
    for name in ("data", "second"):
        ebsd.ok("create", name, "--size", "1M")
        write(ebsd, name, b"1")
    ebsd.ok("snapshot", "second", "--name", "s")
    volume, second = (ebsd.ctl_json("show", name)["VolumeId"] for name in ("data", "second"))
    ebsd.stop()
    shutil.copytree(ebsd.state, backup)
    ebsd.start()
    for name in ("data", "second"):
        write(ebsd, name, b"2")
    ebsd.ok("verify", "s")  # which hashes and signs it
    reached, given_up = generation(ebsd, volume), (ebsd.state / "records" / volume).read_bytes()

    put_back(ebsd, backup)
    assert refused(ebsd, "attach", "data", "--file") == TOO_OLD
    status, error = ebsd.refused("attach", "data", "--file", "--accept-rollback")
    assert (status, error["Code"]) == (2, "Usage"), "without a terminal nobody can be asked"
    # Looking at it does not change what the key service remembers.
    assert read(ebsd, "data", "--read-only", "--accept-rollback", "--yes") == b"1"
    status, error = ebsd.refused("attach", "data", "--file")
    assert ((status, error["Code"]), "--accept-rollback" in error["Hint"]) == (TOO_OLD, True)
    outcome = ebsd.ctl("attach", "data", "--file", "--accept-rollback", "--yes")
    assert (outcome.status, f"generation {reached} was reached" in outcome.stderr) == (0, True)
    ebsd.ok("detach", "data")
    assert generation(ebsd, volume) > reached + 1, "above all that was given up"
    path = ebsd.state / "records" / volume
    ours = path.read_bytes()
    for older in (given_up, (backup / "records" / volume).read_bytes()):
        path.write_bytes(older)
        assert refused(ebsd, "attach", "data", "--file") == TOO_OLD, "what was given up does not come back"
    path.write_bytes(ours)

    assert refused(ebsd, "attach", "second", "--file") == TOO_OLD, "it was for one volume"
    path = ebsd.state / "maps" / second
    whole = path.read_bytes()
    path.write_bytes(whole[:4096] + bytes(len(whole) - 4096))
    assert refused(ebsd, "attach", "second", "--file", "--accept-rollback", "--yes") == (7, "Ebsd.IntegrityFailure")
    path.write_bytes(whole)
    assert refused(ebsd, "attach", "second", "--file") == TOO_OLD, "what did not attach was not accepted"
    assert refused(ebsd, "verify", "s") == TOO_OLD
    ebsd.ok("verify", "s", "--accept-rollback", "--yes")
    assert ebsd.ctl_json("verify", "s")["Kind"] == "authenticity"
    assert read(ebsd, "second", "--accept-rollback", "--yes") == b"1"
    outcome = ebsd.ctl("attach", "data", "--file", "--accept-rollback", "--yes")
    assert (outcome.status, "nothing to accept" in outcome.stderr) == (0, True)
    assert ebsd.ctl("check").status == 0


@pytest.fixture(scope="module")
def old_host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A host that is gone; of it there are ``saved``, its state directory, ``keys`` and their ``passphrase``."""
    root = tmp_path_factory.mktemp("old")
    (root / "passphrase").write_text("correct horse battery staple\n")
    with installation(root) as ebsd:
        ebsd.ok("key", "create", "mine")
        ebsd.ok("create", "data", "--size", "1M", "--encrypted", "--key", "mine")
        ebsd.ok("create", "managed", "--size", "1M")
        write(ebsd, "managed", b"1")
        ebsd.ok("snapshot", "managed", "--name", "s")
        ebsd.ok("key", "backup", root / "backup", "--passphrase-file", root / "passphrase")
        write(ebsd, "data", b"2")  # after the backup of the keys, which is no harm
        ebsd.stop()
        shutil.copytree(ebsd.state, root / "saved")
        ebsd.start()
    return root


@pytest.mark.parametrize("root_key", ["none", "new"])
def test_state_directory_and_key_backup_are_enough_for_a_new_host(
    old_host: Path, tmp_path: Path, root_key: str
) -> None:
    root = tmp_path
    shutil.copytree(old_host / "saved", root / "state")
    ours = b"ebsd-root-key-1 " + base64.b64encode(os.urandom(32)) + b"\n"
    if root_key == "new":
        (root / "root.key").write_bytes(ours)
        (root / "root.key").chmod(0o600)
    with installation(root) as ebsd:
        assert ebsd.ctl_json("status")["KeyService"]["State"] == "rescue"
        status, error = ebsd.refused("attach", "data", "--file")
        assert (status, error["Code"]) == (6, "Ebsd.KeysMissing")
        assert str(ebsd.kms_state) in error["Message"]
        assert str(root / "root.key") in error["Message"]
        assert "key restore" in error["Hint"]
        assert refused(ebsd, "create", "x", "--size", "1M") == (6, "Ebsd.KeysMissing")
        assert ebsd.ctl("doctor").status == 1
        assert (root / "root.key").exists() is (root_key == "new"), "none is made that would open nothing"
        ebsd.ok("key", "restore", old_host / "backup", "--passphrase-file", old_host / "passphrase")
        assert ((root / "root.key").read_bytes() == ours) is (root_key == "new")
        assert (read(ebsd, "data"), read(ebsd, "managed")) == (b"2", b"1")
        ebsd.ok("create", "again", "--from", "s")
        assert ebsd.ctl("check").status == 0
