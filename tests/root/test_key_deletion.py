"""The deletion of a key as its users meet it: told what is lost, refused, confirmed, cancelled, and used again."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trio
from installation import Installation, installation

from ebsd.kms.broker import Broker, Settings
from ebsd.kms.rootkey import KeyFile
from ebsd.kms.rotation import format_time

TEXT = b"what was written before" + bytes(4096 - 23)


@pytest.fixture(scope="module")
def ebsd() -> Iterator[Installation]:
    root = Path(tempfile.mkdtemp(prefix="ebsd-deletion-"))
    try:
        with installation(root) as made:
            yield made
    finally:
        shutil.rmtree(root)


def write(path: Path, offset: int, content: bytes) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.pwrite(descriptor, content, offset)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: Path, offset: int, length: int = 4096) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.pread(descriptor, length, offset)
    finally:
        os.close(descriptor)


def test_the_story_of_a_key_that_was_nearly_deleted(ebsd: Installation) -> None:
    key = ebsd.ok("key", "create", "old")
    for name in ("data", "spare"):
        ebsd.ok("create", name, "--size", "8M", "--encrypted", "--key", "old")
    device = Path(ebsd.ok("attach", "data", "--file"))
    write(device, 0, TEXT)
    ebsd.ok("snapshot", "data", "--name", "monday")

    # It says what is lost, and does nothing.
    outcome = ebsd.ctl("key", "schedule-deletion", "old")
    assert (outcome.status, outcome.stdout) == (4, "")
    for name in ("data in-use", "spare available", "monday completed"):
        assert name in outcome.stderr
    assert "Ebsd.KeyStillUsed" in outcome.stderr
    assert "--yes" in outcome.stderr
    assert ebsd.ctl_json("key", "show", "old")["KeyState"] == "Enabled"

    outcome = ebsd.ctl("key", "schedule-deletion", "old", "--days", "7", "--yes")
    assert outcome.status == 0, outcome.stderr
    assert "data in-use" in outcome.stderr
    assert "cancel-deletion" in outcome.stderr
    shown = ebsd.ctl_json("key", "show", "old")
    assert (shown["KeyState"], shown["DeletionDate"]) == ("PendingDeletion", outcome.stdout.strip())
    assert f"DeletionDate\t{shown['DeletionDate']}" in ebsd.ok("key", "show", key)
    arn = shown["Arn"]

    findings = {finding["Check"]: finding for finding in ebsd.ctl("--json", "doctor").json["Findings"]}
    assert findings["keys"]["Level"] == "warning"
    assert f"until {shown['DeletionDate']}; 3 volumes and snapshots" in findings["keys"]["Message"]

    # What is attached goes on; its snapshots need no key.
    write(device, 4096, TEXT)
    assert read(device, 0) == read(device, 4096) == TEXT
    ebsd.ok("snapshot", "data", "--name", "tuesday")

    pending = f"{arn} is pending deletion."
    revoked = (6, "CustomerKeyHasBeenRevoked")
    refused = (6, "KMSInvalidStateException")
    for arguments, expected in (
        (("attach", "spare", "--file"), revoked),
        (("create", "new", "--size", "8M", "--encrypted", "--key", "old"), refused),
        (("create", "new", "--from", "monday"), refused),
        (("copy", "monday"), refused),
        (("key", "enable", "old"), refused),
        (("key", "schedule-deletion", "old", "--yes"), refused),
        (("key", "alias", "create", "another", "old"), refused),
    ):
        status, error = ebsd.refused(*arguments)
        assert (status, error["Code"]) == expected, arguments
        assert pending in error["Message"], arguments
    ebsd.ok("detach", "data")
    assert ebsd.refused("attach", "data", "--file")[0] == 6

    # Kept: disabled at first, and then as it was.
    ebsd.ok("key", "cancel-deletion", "old")
    assert ebsd.ctl_json("key", "show", "old")["KeyState"] == "Disabled"
    status, error = ebsd.refused("attach", "data", "--file")
    assert (status, error["Code"]) == revoked
    assert "is disabled" in error["Message"]
    status, error = ebsd.refused("key", "cancel-deletion", "old")
    assert (status, error["Code"]) == refused
    assert "is not pending deletion" in error["Message"]
    ebsd.ok("key", "enable", "old")
    device = Path(ebsd.ok("attach", "data", "--file"))
    assert read(device, 0) == read(device, 4096) == TEXT
    ebsd.ok("attach", "spare", "--file")
    for name in ("data", "spare"):
        ebsd.ok("detach", name)
    for name in ("monday", "tuesday", "spare", "data"):
        ebsd.ok("delete", name, "--yes")
    assert ebsd.ctl("key", "schedule-deletion", "old").status == 0


def pass_the_deadline(ebsd: Installation, days: int) -> list[str]:
    """Do, while nobody serves the keys, what a broker does at its start that many days later; what was deleted."""

    async def later() -> list[str]:
        settings = Settings(ebsd.kms_state, KeyFile(ebsd.root / "root.key"), may_create=False)
        broker = Broker(settings, clock=lambda: format_time(datetime.now(UTC) + timedelta(days=days)))
        broker.open()
        try:
            return [key.arn for key in await broker.destroy_due()]
        finally:
            await broker.close()

    return trio.run(later)


def test_the_end_of_a_key(ebsd: Installation) -> None:
    ebsd.ok("key", "create", "gone")
    arn = ebsd.ctl_json("key", "show", "gone")["Arn"]
    for name in ("lost", "alone"):
        ebsd.ok("create", name, "--size", "8M", "--encrypted", "--key", "gone")
    ebsd.ok("create", "other", "--size", "8M", "--encrypted")
    device = Path(ebsd.ok("attach", "lost", "--file"))
    write(device, 0, TEXT)
    ebsd.ok("snapshot", "lost", "--name", "friday")
    ebsd.ok("key", "schedule-deletion", "gone", "--days", "7", "--yes")
    ebsd.stop()
    assert pass_the_deadline(ebsd, 6) == []
    assert pass_the_deadline(ebsd, 8) == [arn]
    ebsd.start()

    # The volume is attached, and its process has what it needs; detaching ends that for ever.
    write(device, 4096, TEXT)
    assert read(device, 0) == read(device, 4096) == TEXT
    ebsd.ok("snapshot", "lost", "--name", "saturday")
    ebsd.ok("detach", "lost")
    missing = f"Key '{arn}' does not exist."
    for arguments, expected in (
        (("attach", "lost", "--file"), (6, "CustomerKeyHasBeenRevoked")),
        (("attach", "alone", "--file"), (6, "CustomerKeyHasBeenRevoked")),
        (("create", "new", "--from", "friday"), (3, "NotFoundException")),
        (("copy", "friday"), (3, "NotFoundException")),
        (("verify", "friday"), (3, "NotFoundException")),
        (("key", "show", arn), (3, "NotFoundException")),
        (("key", "cancel-deletion", arn), (3, "NotFoundException")),
    ):
        status, error = ebsd.refused(*arguments)
        assert ((status, error["Code"]), arguments) == (expected, arguments)
        assert missing in error["Message"], arguments
    assert "key restore" in ebsd.refused("attach", "lost")[1]["Hint"]
    assert ebsd.refused("key", "show", "gone")[1]["Code"] == "NotFoundException"
    assert ebsd.ctl_json("show", "lost")["KmsKeyId"] == arn
    ebsd.ok("verify", "friday", "--scrub")
    other = Path(ebsd.ok("attach", "other", "--file"))
    write(other, 0, TEXT)
    ebsd.ok("detach", "other")
    for name in ("friday", "saturday", "lost", "alone", "other"):
        ebsd.ok("delete", name, "--yes")
    kept = sorted(path.name for path in ebsd.kms_state.iterdir() if path.is_file() and "-" not in path.name)
    assert kept == ["epoch", "keys.sqlite", "lock"]


@pytest.mark.parametrize(
    ("arguments", "status", "code"),
    [
        (("key", "schedule-deletion", "alias/aws/ebs", "--yes"), 5, "AccessDeniedException"),
        (("key", "cancel-deletion", "alias/aws/ebs"), 5, "AccessDeniedException"),
        (("key", "schedule-deletion", "nowhere"), 3, "NotFoundException"),
        (("key", "cancel-deletion", "nowhere"), 3, "NotFoundException"),
        (("key", "schedule-deletion", "wrong", "--days", "6"), 2, "ValidationException"),
        (("key", "schedule-deletion", "wrong", "--days", "31"), 2, "ValidationException"),
        (("key", "schedule-deletion", "wrong", "--days", "soon"), 2, "Usage"),
        (("key", "cancel-deletion", "wrong"), 6, "KMSInvalidStateException"),
    ],
)
def test_wrong_commands(ebsd: Installation, arguments: tuple[str, ...], status: int, code: str) -> None:
    if "alias/wrong" not in ebsd.ok("key", "alias", "list"):
        ebsd.ok("key", "create", "wrong")
    refused, error = ebsd.refused(*arguments)
    assert (refused, error["Code"]) == (status, code)
