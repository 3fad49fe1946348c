"""A schedule over a real volume: what its runs take, skip and delete, also by the daemon itself and over a restart."""

from __future__ import annotations

import os
import time

from installation import Installation


def test_runs_take_what_changed_keep_what_they_should_and_go_on_after_a_kill(ebsd: Installation) -> None:
    ebsd.ok("create", "data", "--size", "64M", "--tag", "app=db")
    ident = ebsd.ok("schedule", "create", "often", "data", "--every", "1m", "--keep", "2")
    ebsd.ok("schedule", "pause", "often")
    path = ebsd.ok("attach", "data", "--file")
    made = []
    for number in range(3):
        with open(path, "r+b", buffering=0) as file:
            file.write(bytes([number + 1]) * 4096)
            os.fsync(file)
        shown = ebsd.ctl_json("schedule", "run", "often")
        assert shown["LastRunState"] == "completed", shown
        made.append(shown["SnapshotIds"][-1])
        time.sleep(1.1)  # names have seconds
    assert ebsd.ctl_json("schedule", "run", "often")["LastRunState"] == "skipped", "nothing was written"
    assert ebsd.ctl_json("schedule", "show", ident)["SnapshotIds"] == made[1:]
    names = sorted(s["Name"] for s in ebsd.ctl_json("list", "snapshots")["Snapshots"])
    assert len(names) == 2
    assert all(name.startswith("data-20") and name.endswith("Z") for name in names)
    with open(path, "r+b", buffering=0) as file:
        file.write(b"x" * 4096)
    ebsd.ok("schedule", "resume", "often")
    ebsd.kill()
    ebsd.start()
    deadline = time.monotonic() + 100
    while (shown := ebsd.ctl_json("schedule", "show", "often"))["SnapshotIds"][0] != made[2]:
        assert time.monotonic() < deadline, shown
        time.sleep(1)
    assert len(shown["SnapshotIds"]) == 2, "the one that the retention keeps, and the one that ebsd took by itself"
    table = ebsd.ok("schedule", "list")
    assert "often" in table
    assert "every 1m" in table
    ebsd.ok("schedule", "delete", "often", "--yes")
    assert len(ebsd.ctl_json("list", "snapshots")["Snapshots"]) == 2
    assert ebsd.refused("schedule", "show", "often")[0] == 3
