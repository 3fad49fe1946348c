"""A copy that is killed again and again goes on from the last point that was made durable, not from the start.

By default a small one, slowed down. EBSD_COPY_GOES_ON=4G copies so much, and kills ten workers at random. Either way
everything that belongs to ebsd is killed once: daemon, key service, worker.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from installation import Installation, installation

from ebsctl.client import Client
from ebsd.domain.units import parse_size

MIB = 1024**2
LONG = os.environ.get("EBSD_COPY_GOES_ON")
SIZE = parse_size(LONG) if LONG else 192 * MIB
KILLS = 10 if LONG else 3
RATE = "96M" if LONG else "6M"
PATIENCE = 600 if LONG else 60
SEED = int(os.environ.get("EBSD_COPY_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 32)
STARTING = 24 * MIB
"""What a worker reads at most before it copies: its own modules."""

pytestmark = pytest.mark.timeout(1800 if LONG else 180)


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


def workers_of(ebsd: Installation) -> list[int]:
    """Return the pids of the copy workers that log into this installation's log."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            ours = os.readlink(process / "fd" / "2") == str(ebsd.log)
            if ours and b"ebsd.volume.copier" in (process / "cmdline").read_bytes():
                found.append(int(process.name))
    return found


def bytes_read(pid: int) -> int:
    """Return how many bytes a process has asked read(2) and the like for, from wherever they came."""
    return int(re.findall(r"rchar: (\d+)", Path(f"/proc/{pid}/io").read_text())[0])


def kill_worker(ebsd: Installation) -> int:
    """Kill the worker; return what it had read, or 0 when there is none at the moment."""
    for pid in workers_of(ebsd):
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGSTOP)
            read = bytes_read(pid)
            os.kill(pid, signal.SIGKILL)
            return read
    return 0


def kill_everything(ebsd: Installation) -> int:
    """Kill daemon, key service and worker at once, and start ebsd again; return what the worker had read."""
    pids = [pid for pids in ebsd.processes().values() for pid in pids]
    read = kill_worker(ebsd)
    assert ebsd.daemon is not None
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    ebsd.daemon.wait(30)
    ebsd.daemon = None
    ebsd.start()
    return read


def resumed(ebsd: Installation, job: str) -> list[int]:
    """Return the chunks from which workers of the job went on, in order."""
    return [int(chunk) for chunk in re.findall(rf"{job} goes on from chunk (\d+)", ebsd.log.read_text())]


def wait_for(what: str) -> Iterator[None]:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        yield
        time.sleep(0.05)
    raise AssertionError(f"this did not happen in {PATIENCE} s: {what}")


def done_of(ebsd: Installation, job: str) -> int:
    """Return how many bytes of a running job are done."""
    (found,) = Client(str(ebsd.socket)).control("DescribeJobs", JobIds=[job])["Jobs"]
    assert found["State"] == "running", found
    return int(found["Done"])


def test_a_copy_that_is_killed_again_and_again_goes_on(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    dice = random.Random(SEED)
    print(f"EBSD_COPY_SEED={SEED}")
    with installation(tmp_path) as ebsd:
        ebsd.ok("create", "data", "--size", str(SIZE))
        ebsd.ok("key", "create", "second")
        content = fill(ebsd.ok("attach", "data", "--file"))
        ebsd.ok("snapshot", "data", "--name", "s1")
        ebsd.ok("detach", "data")
        begin = time.monotonic()
        copy = ("copy", "s1", "--name", "s2", "--encrypted", "--key", "second", "--no-wait", "--rate", RATE)
        ebsd.ok(*copy)
        (job,) = (each["JobId"] for each in ebsd.ctl_json("job", "list", "--active")["Jobs"])
        read = reached = 0
        everything_at = dice.randrange(1, KILLS)
        for number in range(KILLS + 1):
            # As far as the worker before, and more: one that died at once each time would be given up.
            for _ in wait_for("a worker comes further"):
                done = done_of(ebsd, job)
                if done > reached + 2 * MIB:
                    break
            time.sleep(1.1 + dice.random() * (2.0 if LONG else 0.5))
            # Nobody can use half a copy.
            status, error = ebsd.refused("create", "early", "--from", "s2")
            assert (status, error["Code"]) == (4, "IncorrectState"), error
            reached = done_of(ebsd, job)
            read += (kill_everything if number == everything_at else kill_worker)(ebsd)
            for _ in wait_for("another worker goes on"):
                if len(resumed(ebsd, job)) > number:
                    break
        ebsd.ok("job", "limit", job, "0")
        last: dict[int, int] = {}
        for _ in wait_for("the copy ends"):
            for pid in workers_of(ebsd):
                with contextlib.suppress(OSError, IndexError):
                    last[pid] = bytes_read(pid)
            if Client(str(ebsd.socket)).control("DescribeJobs", JobIds=[job])["Jobs"][0]["State"] != "running":
                break
        took = time.monotonic() - begin
        shown = ebsd.ctl_json("job", "show", job)
        assert shown["State"] == "completed", shown
        read += sum(last.values())
        starts = resumed(ebsd, job)
        assert len(starts) == KILLS + 1
        assert all(chunk > 0 for chunk in starts), "each went on from somewhere"
        assert starts == sorted(starts), "none went back"
        assert starts[-1] > starts[0]
        assert read < 2 * SIZE + STARTING * (KILLS + 2), f"{read} bytes were read to copy {SIZE}"
        ebsd.ok("create", "restored", "--from", "s2")
        assert digest_of(ebsd.ok("attach", "restored", "--file")) == content
        assert ebsd.ctl("verify", "s2").status == 0, "leaves that were taken over are those of what was written"
        if LONG:
            capturing = request.config.pluginmanager.getplugin("capturemanager")
            with capturing.global_and_fixture_disabled() if capturing else contextlib.nullcontext():
                goes_on = ", ".join(f"{chunk * 65536 / SIZE:.0%}" for chunk in starts)
                print(f"\n{SIZE // MIB} MiB in {took:.0f} s, {KILLS} workers killed and everything once; went on from")
                print(f"{goes_on}; {read / SIZE:.2f} times as much was read as copied")
