"""Volume processes that stall: stopped by a signal, as a host that hangs would stop them.

Every command on such a volume is refused after a while; when the process goes on, or has died, everything works again
with the same ebsd, and nothing is left half done. The volumes stall at the same time, as each waits for time-outs.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from installation import Installation, _listeners_of, holder_of

MIB = 1 << 20
NOT_ANSWERING = (8, "Ebsd.VolumeNotAnswering")


class Stalling:
    """One attached volume with data of its own, and its process, which can be stopped."""

    def __init__(self, ebsd: Installation, name: str, *flags: str) -> None:
        self.ebsd = ebsd
        self.name = name
        self.flags = flags
        ebsd.ok("create", name, "--size", "64M")
        self.id = ebsd.ctl_json("show", name)["VolumeId"]
        self.data = os.urandom(3 * MIB)
        with open(self.attach(), "r+b", buffering=0) as file:
            file.write(self.data)
            os.fsync(file)
        self.written = time.monotonic()

    def attach(self) -> str:
        path = self.ebsd.ok("attach", self.name, *self.flags)
        pids = _listeners_of(self.ebsd.runtime / "control" / f"{self.id}.sock")
        (self.pid,) = [pid for pid in pids if pid != self.ebsd.ctl_json("status")["Pid"]]
        self.path = Path(path)
        return path

    def stall(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)
        wait_for(lambda: Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")

    def go_on(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        os.kill(holder_of(self.pid), signal.SIGKILL)

    def refused(self, *arguments: str) -> tuple[int, str]:
        status, error = self.ebsd.refused(*arguments)
        return status, error["Code"]

    def show(self) -> dict[str, Any]:
        return self.ebsd.ctl_json("show", self.name)

    def snapshots(self) -> list[tuple[str, str]]:
        found = self.ebsd.ctl_json("list", "snapshots")["Snapshots"]
        return [(s["Name"], s["State"]) for s in found if s["VolumeId"] == self.id]

    def check(self, path: str | Path | None = None) -> None:
        with open(path or self.path, "rb", buffering=0) as file:
            assert file.read(len(self.data)) == self.data

    def works(self) -> None:
        """Snapshot, growth, restore, detach and attach: whatever happened before, all of it works and is right."""
        ebsd, name = self.ebsd, self.name
        self.check()
        wait_for(lambda: not any(state == "pending" for _, state in self.snapshots()))
        before = self.snapshots()
        ebsd.ok("snapshot", name, "--name", f"{name}-after")
        ebsd.ok("resize", name, str(self.show()["SizeBytes"] + 64 * MIB))
        self.data = os.urandom(MIB) + self.data[MIB:]
        with open(self.path, "r+b", buffering=0) as file:
            file.write(self.data[:MIB])
            file.seek(-MIB, os.SEEK_END)
            file.write(self.data[:MIB])  # in what was added
            os.fsync(file)
        ebsd.ok("detach", name)
        volume = self.show()
        assert (volume["State"], volume["Integrity"]) == ("available", "verified")
        self.attach()
        self.check()
        with open(self.path, "rb", buffering=0) as file:
            file.seek(-MIB, os.SEEK_END)
            assert file.read(MIB) == self.data[:MIB]
        for snapshot, state in [*before, (f"{name}-after", "completed")]:
            assert state == "completed"
            ebsd.ok("create", f"{snapshot}-restored", "--from", snapshot)
            with open(ebsd.ok("attach", f"{snapshot}-restored", "--file"), "rb", buffering=0) as file:
                file.seek(MIB)
                assert file.read(2 * MIB) == self.data[MIB:]
        ebsd.ok("detach", name)
        assert self.show()["Integrity"] == "verified"


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def snapshot_while_stalled(volume: Stalling) -> None:
    volume.stall()
    assert volume.refused("snapshot", volume.name, "--name", f"{volume.name}-never") == NOT_ANSWERING
    assert volume.snapshots() == [(f"{volume.name}-never", "pending")]
    assert volume.refused("snapshot", volume.name) == (4, "ConcurrentSnapshotLimitExceeded")


def snapshot_and_go_on(ebsd: Installation) -> None:
    volume = Stalling(ebsd, "snapshot-cont", "--file")
    snapshot_while_stalled(volume)
    volume.go_on()
    volume.works()
    assert f"{volume.name}-never" not in [name for name, _ in volume.snapshots()]


def snapshot_and_die(ebsd: Installation) -> None:
    volume = Stalling(ebsd, "snapshot-kill", "--file")
    snapshot_while_stalled(volume)
    volume.kill()
    wait_for(lambda: not volume.snapshots())
    wait_for(lambda: volume.show()["State"] == "error")
    ebsd.ok("detach", volume.name)
    volume.attach()
    volume.works()


def snapshot_after_the_head_was_announced(ebsd: Installation) -> None:
    """The process stalls when it has signed for the new head, or in the seal: then the call waits for it."""
    volume = Stalling(ebsd, "snapshot-late", "--file")
    maps = ebsd.state / "maps"
    with ThreadPoolExecutor(1) as pool:
        before = set(os.listdir(maps))
        call = pool.submit(ebsd.ctl, "--json", "snapshot", volume.name, "--name", "late")
        while not set(os.listdir(maps)) - before and not call.done():
            pass  # its map comes into being between the two requests to the process
        volume.stall()
        time.sleep(1)
        volume.go_on()
        assert call.result().status == 0, call.result().stderr
    volume.works()


def growth_and_go_on(ebsd: Installation) -> None:
    volume = Stalling(ebsd, "growth-cont")
    volume.stall()
    assert volume.refused("resize", volume.name, "128M") == NOT_ANSWERING
    assert volume.refused("resize", volume.name, "192M") == NOT_ANSWERING
    assert volume.show()["SizeBytes"] == 64 * MIB
    volume.go_on()
    volume.works()


def growth_and_die(ebsd: Installation) -> None:
    volume = Stalling(ebsd, "growth-kill", "--file")
    volume.stall()
    assert volume.refused("resize", volume.name, "128M") == NOT_ANSWERING
    volume.kill()
    wait_for(lambda: volume.show()["State"] == "error")
    ebsd.ok("detach", volume.name)
    volume.attach()
    volume.works()


def detach_of_a_loop_device_and_go_on(ebsd: Installation) -> None:
    volume = Stalling(ebsd, "detach-loop")
    volume.stall()
    assert volume.refused("detach", volume.name)[0] != 0
    assert volume.show()["State"] == "in-use"
    volume.go_on()
    volume.works()


def detach_of_a_file_and_go_on(ebsd: Installation) -> None:
    volume = Stalling(ebsd, "detach-file", "--file")
    volume.stall()
    assert volume.refused("detach", volume.name)[0] != 0
    volume.go_on()
    ebsd.ok("detach", volume.name)
    assert volume.show()["Integrity"] == "verified"
    volume.attach()
    volume.works()


def forced_detach(ebsd: Installation) -> None:
    volume = Stalling(ebsd, "detach-force")
    volume.stall()
    ebsd.ok("detach", "--force", volume.name)
    assert volume.show()["State"] == "available"
    wait_for(lambda: not Path(f"/proc/{volume.pid}").exists())
    volume.attach()
    volume.works()


def told(story: Callable[[Installation], None], ebsd: Installation) -> None:
    """Run a story; when it fails, its process must not stay stopped, or the end of the test would wait for it."""
    try:
        story(ebsd)
    except BaseException:
        for pid in ebsd.processes()["volumes"]:
            os.kill(pid, signal.SIGCONT)
        raise


STORIES = [
    snapshot_and_go_on,
    snapshot_and_die,
    snapshot_after_the_head_was_announced,
    growth_and_go_on,
    growth_and_die,
    detach_of_a_loop_device_and_go_on,
    detach_of_a_file_and_go_on,
    forced_detach,
]


@pytest.mark.timeout(300)
def test_processes_that_stall_and_go_on_or_die_leave_nothing_half_done(ebsd: Installation) -> None:
    daemon = ebsd.daemon_pid()
    with ThreadPoolExecutor(len(STORIES)) as pool:
        calls = {story.__name__: pool.submit(told, story, ebsd) for story in STORIES}
    failures = {name: call.exception() for name, call in calls.items() if call.exception() is not None}
    log = ebsd.log.read_text()
    for name, failure in failures.items():
        print(f"--- {name}: {failure!r}")
    assert not failures, log[-6000:]
    assert ebsd.daemon_pid() == daemon, "the same ebsd all the time"
    assert not [s for s in ebsd.ctl_json("list", "snapshots")["Snapshots"] if s["State"] != "completed"]
    assert "incident" not in log, log[-6000:]
