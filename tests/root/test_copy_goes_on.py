"""A long copy that is killed in the middle goes on from the last point that was made durable, not from the start."""

from __future__ import annotations

import hashlib
import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from installation import Installation, installation

MIB = 1024**2
SIZE = 768 * MIB
KILL_AFTER = 300 * MIB
"""Done by then: the worker syncs, and says so, every 256 MiB."""


def fill(device: str) -> str:
    """Fill the device with blocks that are all different; return the digest of what it then holds."""
    block, digest = random.Random(11).randbytes(16 * MIB), hashlib.sha256()
    with open(device, "r+b", buffering=0) as raw:
        for number in range(SIZE // len(block)):
            piece = number.to_bytes(8, "little") + block[8:]
            raw.write(piece)
            digest.update(piece)
        os.fsync(raw)
    return digest.hexdigest()


def digest_of(device: str) -> str:
    digest = hashlib.sha256()
    with open(device, "rb", buffering=0) as raw:
        while piece := raw.read(4 * MIB):
            digest.update(piece)
    return digest.hexdigest()


def worker_of(ebsd: Installation) -> int:
    """Return the pid of the only copy worker that logs into this installation's log."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            ours = os.readlink(process / "fd" / "2") == str(ebsd.log)
            if ours and b"ebsd.volume.copier" in (process / "cmdline").read_bytes():
                return int(process.name)
        except OSError:
            continue
    raise AssertionError("there is no worker")


def kill_worker(ebsd: Installation) -> None:
    os.kill(worker_of(ebsd), signal.SIGKILL)


def kill_ebsd(ebsd: Installation) -> None:
    ebsd.kill()
    ebsd.start()


@pytest.mark.parametrize("kill", [kill_worker, kill_ebsd], ids=["worker", "ebsd"])
def test_a_killed_copy_goes_on_from_its_last_durable_point(
    tmp_path: Path, kill: Callable[[Installation], None]
) -> None:
    with installation(tmp_path) as ebsd:
        ebsd.ok("create", "data", "--size", "768M")
        ebsd.ok("key", "create", "second")
        device = ebsd.ok("attach", "data", "--file")
        content = fill(device)
        ebsd.ok("snapshot", "data", "--name", "s1")
        ebsd.ok("copy", "s1", "--name", "s2", "--encrypted", "--key", "second", "--no-wait")
        while True:
            (job,) = ebsd.ctl_json("job", "list")["Jobs"]
            assert job["State"] == "running", job
            if job["Done"] >= KILL_AFTER:
                break
            time.sleep(0.02)
        kill(ebsd)
        ebsd.ok("wait", "s2", "--for", "completed")
        (chunk,) = re.findall(rf"{job['JobId']} goes on from chunk (\d+)", ebsd.log.read_text())
        assert int(chunk) > 0
        ebsd.ok("create", "restored", "--from", "s2")
        assert digest_of(ebsd.ok("attach", "restored", "--file")) == content
