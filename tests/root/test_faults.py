"""Faults that a whole installation stands: processes that hang, connections without end, no descriptors left.

``tests/FAULTS.md`` says which test has which row of the fault matrix.
"""

from __future__ import annotations

import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from installation import Installation, installation, stopped

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="attaches loop devices, and is other users"),
]

FLOODER: Final = 4243

FLOOD: Final = """
import socket, sys
path, total, kept, refused = sys.argv[1], int(sys.argv[2]), [], 0
for _ in range(total):
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.connect(path)
        kept.append(sock)
    except OSError:
        refused += 1
    if len(kept) > 500:  # the oldest, of which most were told that they are too many
        kept.pop(0).close()
for sock in kept:
    try:
        sock.send(b'{"method":')
    except OSError:
        pass  # it was told that it is one too many, and closed
print(total - refused, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def ebsd() -> Iterator[Installation]:
    root = Path(tempfile.mkdtemp(prefix="ebsd-faults-"))
    root.chmod(0o711)
    try:
        with installation(root) as made:
            made.ok("create", "data", "--size", "64M")
            made.ok("attach", "data")
            yield made
    finally:
        shutil.rmtree(root, ignore_errors=True)


def device_of(ebsd: Installation, name: str = "data") -> str:
    return str(ebsd.ctl_json("show", name)["Attachments"][0]["Path"])


def wrote(device: str, marker: bytes) -> bool:
    """Write a sector, durably, and read it again, past the cache."""
    with subprocess.Popen(
        ["dd", f"of={device}", "bs=4096", "count=1", "oflag=direct", "conv=notrunc,fsync", "status=none"],
        stdin=subprocess.PIPE,
    ) as writer:
        writer.communicate(marker.ljust(4096, b"."), timeout=60)
    read = subprocess.run(
        ["dd", f"if={device}", "bs=4096", "count=1", "iflag=direct", "status=none"], capture_output=True, timeout=60
    )
    return read.stdout.startswith(marker)


@pytest.mark.parametrize("role", ["volumes", "holders", "broker"])
def test_a_process_that_hangs_freezes_neither_ebsd_nor_its_clients(ebsd: Installation, role: str) -> None:
    """Row 3: they answer what they can without it, and refuse the rest in time; then everything goes on."""
    (pid,) = ebsd.processes()[role]
    with stopped(pid):
        assert len(ebsd.ctl_json("list")["Volumes"]) == 1
        assert ebsd.ctl_json("show", "data")["State"] == "in-use"
        status = ebsd.ctl_json("status")
        assert status["State"] == "running"
        if role == "broker":
            assert status["KeyService"]["State"] == "unreachable"
            assert wrote(device_of(ebsd), b"without the key service")
        assert ebsd.ctl("doctor").status in (0, 1)
    assert wrote(device_of(ebsd), role.encode())
    assert ebsd.ctl_json("status")["KeyService"]["State"] == "running"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ebsd.sock", "keys.sock"])
def test_ten_thousand_connections_of_one_user_keep_nobody_else_out(ebsd: Installation, name: str) -> None:
    """Row 25: and those that he keeps, begun and never ended, neither."""
    with subprocess.Popen(
        ["setpriv", f"--reuid={FLOODER}", f"--regid={FLOODER}", "--clear-groups", sys.executable, "-I", "-c", FLOOD,
         str(ebsd.runtime / name), "10000"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/",
    ) as flood:  # fmt: skip
        assert flood.stdout is not None
        answered = 0
        while flood.poll() is None and not _is_readable(flood.stdout.fileno()):
            ebsd.ok("list") if name == "ebsd.sock" else ebsd.ok("key", "list")
            answered += 1
        assert int(flood.stdout.readline()) >= 9000
        assert answered >= 2
        assert len(ebsd.ctl_json("list")["Volumes"]) == 1
        assert wrote(device_of(ebsd), b"in the flood")
        flood.communicate(b"")
    assert ebsd.ctl_json("status")["State"] == "running"


def _is_readable(fd: int) -> bool:
    import select

    return bool(select.select([fd], [], [], 0)[0])


def test_an_ebsd_without_descriptors_serves_again_when_there_are_some(ebsd: Installation) -> None:
    """Row 26: what runs goes on meanwhile."""
    pid = ebsd.daemon_pid()
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    in_use = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    clients = []
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (in_use + 8, hard))
    try:
        for _ in range(40):
            clients.append(socket.socket(socket.AF_UNIX))
            clients[-1].connect(str(ebsd.socket))
        time.sleep(1)
        assert wrote(device_of_without_ebsd(ebsd), b"no descriptors")
        for client in clients[8:]:
            client.close()
        for client in clients[:8]:
            client.close()
        assert len(ebsd.ctl_json("list")["Volumes"]) == 1
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
    ebsd.ok("snapshot", "data", "--name", "after")


def device_of_without_ebsd(ebsd: Installation) -> str:
    """Return the device by what the kernel says of it."""
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        if str(ebsd.root) in backing.read_text():
            return f"/dev/{backing.parts[3]}"
    raise AssertionError("no device")
