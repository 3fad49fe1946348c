"""A key service that hangs: stopped by a signal, as a host that hangs would stop it.

What needs no key goes on, the rest is refused in some seconds; when the key service goes on, everything works again
with the same ebsd, nothing that was refused happens after all, and what had to wait is done.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from installation import Installation, installation, stopped

from ebsctl.client import Client

pytestmark = [
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="attaches loop devices"),
]

MIB: Final = 1 << 20
LIMIT: Final = 30.0
"""Seconds for a command of which nothing but the key service keeps anybody; it took 75 and more without an end."""
REFUSED: Final = (6, "KMSInternalException")


@pytest.fixture
def ebsd() -> Iterator[Installation]:
    root = Path(tempfile.mkdtemp(prefix="ebsd-hung-"))
    root.chmod(0o711)
    try:
        with installation(root) as made:
            for name in ("data", "other", "away", "gone"):
                made.ok("create", name, "--size", "64M", "--encrypted")
            for name in ("data", "other"):
                made.ok("attach", name)
            yield made
    finally:
        shutil.rmtree(root, ignore_errors=True)


def broker_of(ebsd: Installation) -> int:
    (pid,) = ebsd.processes()["broker"]
    return pid


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def quickly(run: Callable[..., Any], *arguments: str) -> Any:
    begun = time.monotonic()
    result = run(*arguments)
    assert time.monotonic() - begun < LIMIT, arguments
    return result


def refused(ebsd: Installation, *arguments: str) -> None:
    status, error = quickly(ebsd.refused, *arguments)
    assert (status, error["Code"]) == REFUSED, error
    assert "systemctl restart ebsd-kms" in error["Hint"]


def rewrite(ebsd: Installation, name: str, byte: bytes) -> None:
    with open(ebsd.ctl_json("show", name)["Attachments"][0]["Path"], "r+b", buffering=0) as device:
        device.write(byte * MIB)
        os.fsync(device)
        os.posix_fadvise(device.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        device.seek(0)
        assert device.read(MIB) == byte * MIB


def snapshots(ebsd: Installation) -> list[str]:
    return [found["Name"] for found in ebsd.ctl_json("list", "snapshots")["Snapshots"]]


def done(ebsd: Installation) -> Counter[str]:
    """How often the key service did what: its audit log."""
    records = ebsd.ctl_json("audit", "--since", "1h")["Records"]
    return Counter(record["eventName"] for record in records if "errorCode" not in record)


def floor(ebsd: Installation, volume: str) -> int:
    """Return the lowest generation of a volume's record that the key service accepts."""
    path = str(ebsd.runtime / "kms.sock")
    reply = Client().call(path, "io.ebsd.Broker.DescribeAnchor", {"ResourceId": volume})
    return int(reply.parameters["Anchor"]["Floor"])


def grants_of(ebsd: Installation) -> list[str]:
    return [grant["GrantId"] for grant in ebsd.ctl_json("key", "grants", "alias/aws/ebs")["Grants"]]


def test_what_is_refused_is_refused_soon_and_does_not_happen_afterwards(ebsd: Installation) -> None:
    before, grants = done(ebsd), grants_of(ebsd)
    keys = ebsd.ctl_json("key", "list")
    with stopped(broker_of(ebsd)):
        refused(ebsd, "snapshot", "data", "--name", "never")
        rewrite(ebsd, "data", b"1")
        refused(ebsd, "key", "create", "never")
        refused(ebsd, "create", "never", "--size", "64M")
        refused(ebsd, "attach", "away")
        refused(ebsd, "delete", "gone", "--yes")
        refused(ebsd, "snapshot", "other", "away", "--name", "never-both")
    wait_for(lambda: not [name for name in snapshots(ebsd) if name.startswith("never")])
    wait_for(lambda: "gone" not in [volume["Name"] for volume in ebsd.ctl_json("list")["Volumes"]])
    wait_for(lambda: grants_of(ebsd) == grants)
    assert ebsd.ctl_json("key", "list") == keys
    happened = done(ebsd) - before
    # Of the snapshot nothing, and of the volume that was refused as little: what is undone was not done, or once each.
    assert happened["CreateAnchor"] == 0
    assert happened["GenerateDataKeyWithoutPlaintext"] == 0
    assert happened["CreateKey"] == 0
    assert happened["CreateGrant"] == happened["RetireGrant"]
    for name in ("data", "away"):
        if name == "away":
            ebsd.ok("attach", name)
        ebsd.ok("snapshot", name, "--name", f"{name}-after")
        rewrite(ebsd, name, b"2")
    ebsd.ok("create", "never", "--size", "64M")
    ebsd.ok("create", "restored", "--from", "data-after")
    with open(ebsd.ok("attach", "restored", "--read-only"), "rb", buffering=0) as device:
        assert device.read(MIB) == b"1" * MIB
    assert len(grants_of(ebsd)) == 4
    assert ebsd.ctl("check").status == 0


def test_what_needs_no_key_goes_on(ebsd: Installation) -> None:
    """A detach, too: the floor of its record and its grant follow when the key service answers."""
    other = ebsd.ctl_json("show", "other")["VolumeId"]
    raised = floor(ebsd, other)
    with stopped(broker_of(ebsd)):
        refused(ebsd, "key", "list")
        assert len(quickly(ebsd.ctl_json, "list")["Volumes"]) == 4
        assert quickly(ebsd.ctl_json, "show", "data")["State"] == "in-use"
        assert quickly(ebsd.ctl_json, "status")["KeyService"]["State"] == "unreachable"
        assert quickly(ebsd.ctl_json, "list", "snapshots")["Snapshots"] == []
        rewrite(ebsd, "other", b"3")
        quickly(ebsd.ok, "detach", "other")
        shown = ebsd.ctl_json("show", "other")
        assert (shown["State"], shown["Integrity"]) == ("available", "verified")
    wait_for(lambda: floor(ebsd, other) == raised + 1)
    wait_for(lambda: len(grants_of(ebsd)) == 1)
    ebsd.ok("attach", "other")
    with open(ebsd.ctl_json("show", "other")["Attachments"][0]["Path"], "rb", buffering=0) as device:
        assert device.read(MIB) == b"3" * MIB


def test_a_floor_that_is_due_outlives_ebsd(ebsd: Installation) -> None:
    broker, daemon, other = broker_of(ebsd), ebsd.daemon_pid(), ebsd.ctl_json("show", "other")["VolumeId"]
    raised = floor(ebsd, other)
    with stopped(broker):
        quickly(ebsd.ok, "detach", "other")
        assert f"the floor of {other} is raised when the key service answers" in ebsd.log.read_text()
        os.kill(daemon, signal.SIGKILL)  # before it could tell
        assert ebsd.daemon is not None
        ebsd.daemon.wait(30)
    assert floor(ebsd, other) == raised
    ebsd.start()
    wait_for(lambda: floor(ebsd, other) == raised + 1)
    ebsd.ok("attach", "other")


def test_a_broker_of_ebsd_that_hangs_is_replaced(ebsd: Installation) -> None:
    """After a minute. Attached volumes do not notice, and nobody has to do anything."""
    broker = broker_of(ebsd)
    os.kill(broker, signal.SIGSTOP)
    wait_for(lambda: ebsd.processes()["broker"] not in ([], [broker]), 180)
    assert not Path(f"/proc/{broker}").exists()
    rewrite(ebsd, "data", b"4")
    ebsd.ok("snapshot", "data", "--name", "after")
    assert ebsd.log.read_text().count("does not answer; ending it") == 1
