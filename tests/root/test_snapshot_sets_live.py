"""Snapshots of several volumes at one moment, of real volumes that are written to all the while.

A writer writes a counter to A, then to B, then to C, each write answered before the next begins. At every moment
A >= B >= C >= A - 1, so that holds in every set, and in no other way would it: single snapshots show the difference.
"""

from __future__ import annotations

import os
import signal
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from installation import Installation, Outcome, _listeners_of, holder_of

NAMES = ("a", "b", "c")
SECTOR = 4096


class Writer:
    """Three attached volumes, and a thread that writes increasing numbers to them in turn."""

    def __init__(self, ebsd: Installation, *names: str) -> None:
        self.ebsd = ebsd
        self.names = names
        self.fds: list[int] = []
        self.written = 0
        self.longest = 0.0
        """Seconds that the slowest write took."""
        self.error: OSError | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        for name in names:
            ebsd.ok("create", name, "--size", "64M", "--tag", "app=db")
            self.fds.append(os.open(ebsd.ok("attach", name, "--file"), os.O_RDWR))

    def start(self) -> None:
        self._thread.start()
        while self.written < 10:
            time.sleep(0.01)

    def _run(self) -> None:
        number = 0
        while not self._stop.is_set():
            number += 1
            for fd in self.fds:
                began = time.monotonic()
                try:
                    # Not in one place: chunks of old heads and of the new one are read together afterwards.
                    os.pwrite(fd, struct.pack("<Q", number) * (SECTOR // 8), number % 7 * SECTOR)
                except OSError as exc:
                    self.error = exc
                    return
                self.longest = max(self.longest, time.monotonic() - began)
            self.written = number

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(60)
        assert not self._thread.is_alive()

    def close(self) -> None:
        if self._thread.is_alive():
            self.stop()
        for fd in self.fds:
            os.close(fd)


@contextmanager
def writing(ebsd: Installation, *names: str) -> Iterator[Writer]:
    writer = Writer(ebsd, *names)
    writer.start()
    try:
        yield writer
    finally:
        writer.close()


def counter(ebsd: Installation, snapshot: str) -> int:
    """Return the number that a snapshot holds, by way of a volume restored from it."""
    volume = "restored"
    ebsd.ok("create", volume, "--from", snapshot)
    path = Path(ebsd.ok("attach", volume, "--file", "--read-only"))
    with path.open("rb", buffering=0) as file:
        data = file.read(7 * SECTOR)
    ebsd.ok("detach", volume)
    ebsd.ok("delete", volume, "--yes")
    for at in range(0, 7 * SECTOR, SECTOR):
        assert len(set(struct.unpack(f"<{SECTOR // 8}Q", data[at : at + SECTOR]))) == 1, "a torn sector"
    return max(struct.unpack(f"<{7 * SECTOR // 8}Q", data))


def process_of(ebsd: Installation, volume: str) -> int:
    ident = ebsd.ctl_json("show", volume)["VolumeId"]
    pids = _listeners_of(ebsd.runtime / "control" / f"{ident}.sock")
    (pid,) = [pid for pid in pids if pid != ebsd.ctl_json("status")["Pid"]]
    return pid


def check_sets(ebsd: Installation, prefixes: list[str]) -> list[str]:
    """See that of each prefix all three snapshots are there or none, and that each set is of one moment."""
    found = {s["Name"]: s for s in ebsd.ctl_json("list", "snapshots")["Snapshots"]}
    complete = []
    for prefix in prefixes:
        members = [found.pop(f"{prefix}-{name}", None) for name in NAMES]
        if not any(members):
            continue
        assert all(members), f"a part of the set {prefix} is there: {members}"
        assert {m["State"] for m in members if m} == {"completed"}
        assert len({m["StartTime"] for m in members if m}) == 1
        a, b, c = (counter(ebsd, m["SnapshotId"]) for m in members if m)
        assert a >= b >= c >= a - 1, (prefix, a, b, c)
        complete.append(prefix)
    assert not found, found
    return complete


def test_a_set_is_of_one_moment_and_single_snapshots_are_not(ebsd: Installation) -> None:
    with writing(ebsd, *NAMES) as writer:
        ways = (("c", "a", "b"), ("--all-attached",))
        for number, way in enumerate(ways):
            assert len(ebsd.ok("snapshot", *way, "--name", f"set{number}").splitlines()) == 3
        first = ebsd.ok("snapshot", "a")
        last = ebsd.ok("snapshot", "c")
        writer.stop()
    assert counter(ebsd, last) > counter(ebsd, first), "the writer would not have shown a set of two moments"
    ebsd.ok("delete", first, "--yes")
    ebsd.ok("delete", last, "--yes")
    sets = ebsd.ctl_json("list", "snapshots")["Snapshots"]
    pauses = [s["PauseMicroseconds"] for s in sets]
    print(
        f"\npauses of 2 sets of 3 volumes: {sorted(pauses)} us; the slowest write took {writer.longest * 1000:.1f} ms"
    )
    assert max(pauses) / 1e6 <= writer.longest + 1, "a pause that no write noticed"
    assert check_sets(ebsd, ["set0", "set1"]) == ["set0", "set1"]


def test_a_killed_ebsd_leaves_all_of_a_set_or_nothing_and_freezes_no_volume(ebsd: Installation) -> None:
    taken = []
    with writing(ebsd, *NAMES) as writer, ThreadPoolExecutor(1) as pool:
        for number in range(4):
            asked = pool.submit(ebsd.ctl, "snapshot", *NAMES, "--name", f"set{number}")
            time.sleep(0.15 + 0.08 * number)
            ebsd.kill()
            answer: Outcome = asked.result()
            if answer.status == 0:
                taken.append(f"set{number}")
            before = writer.written
            ebsd.start()
            assert writer.written > before, "the volumes stand still"
        writer.stop()
        assert writer.error is None
    assert writer.longest < 5, "requests were held for somebody who is gone"
    complete = check_sets(ebsd, [f"set{n}" for n in range(4)])
    print(f"\nanswered: {taken}, found: {complete}; the slowest write took {writer.longest * 1000:.1f} ms")
    assert set(taken) <= set(complete), "a set that was answered is gone"
    assert {finding["Severity"] for finding in ebsd.ctl_json("check")["Findings"]} <= {"note"}


def test_a_killed_volume_process_fails_the_whole_set_and_nobody_else(ebsd: Installation) -> None:
    """It is stopped first, so that all wait for it when it dies."""
    with writing(ebsd, "a", "c") as writer, ThreadPoolExecutor(1) as pool:
        ebsd.ok("create", "b", "--size", "64M")
        with open(ebsd.ok("attach", "b", "--file"), "r+b", buffering=0) as file:
            file.write(b"b" * SECTOR)
        pid = process_of(ebsd, "b")
        os.kill(pid, signal.SIGSTOP)
        asked = pool.submit(ebsd.ctl, "--json", "snapshot", *NAMES, "--name", "set")
        time.sleep(1)
        os.kill(holder_of(pid), signal.SIGKILL)
        answer: Outcome = asked.result()
        before = writer.written
        assert answer.status == 1, answer
        assert ebsd.ctl_json("list", "snapshots")["Snapshots"] == []
        ebsd.ok("detach", "b", "--force")
        ebsd.ok("attach", "b", "--file")
        again = ebsd.ok("snapshot", *NAMES, "--name", "again").splitlines()
        assert len(again) == 3
        assert writer.written > before
        writer.stop()
        assert writer.error is None
        assert writer.longest < 5
    a, c = counter(ebsd, again[0]), counter(ebsd, again[2])
    assert a >= c >= a - 1
