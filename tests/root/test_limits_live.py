"""Limits of accounts on a real daemon: what is refused, also of many at once, what is left, and what is shown."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from installation import installation
from test_bad_input import World, _be_ebsctl

pytestmark = pytest.mark.timeout(180)

BOUND: Final = 23456
OUTSIDER: Final = 23457
SETTINGS: Final = f"""
[jobs]
rate = "256K"
[accounts]
create = [{BOUND}, 0]
[accounts.users.{BOUND}]
volumes = 5
volume_bytes = "32M"
snapshots = 3
jobs = 1
"""


ASK: Final = """
import socket, sys
with socket.socket(socket.AF_UNIX) as sock:
    sock.connect(sys.argv[1])
    sock.sendall(sys.argv[2].encode() + bytes(1))
    print(sock.recv(65536).rstrip(bytes(1)).decode())
"""


class Bound(World):
    def as_user(self, *arguments: str) -> Any:
        outcome = self.ctl_as(BOUND, "--json", *arguments)
        assert outcome.status == 0, (arguments, outcome)
        return outcome.json if outcome.stdout else None

    def refused(self, uid: int, *arguments: str) -> tuple[int, str]:
        before = self.everything()
        outcome = self.ctl_as(uid, "--json", *arguments)
        assert outcome.status != 0, outcome
        assert outcome.error["Hint"]
        assert self.everything() == before
        return outcome.status, outcome.error["Code"]

    def everything(self) -> list[str]:
        client = self.client
        files = [str(f) for place in ("layers", "maps", "records") for f in (self.ebsd.state / place).rglob("*")]
        return sorted(
            [v["VolumeId"] for v in client.ec2("DescribeVolumes")["Volumes"]]
            + [s["SnapshotId"] for s in client.ec2("DescribeSnapshots")["Snapshots"]]
            + [j["JobId"] for j in client.control("DescribeJobs")["Jobs"]]
            + files
        )

    def used(self) -> dict[str, int]:
        return {limit["Name"]: limit["Used"] for limit in self.as_user("defaults", "show")["Limits"]}

    def clear(self) -> None:
        for volume in self.as_user("list", "volumes")["Volumes"]:
            self.as_user("delete", volume["VolumeId"], "--yes")
        for snapshot in self.as_user("list", "snapshots")["Snapshots"]:
            self.as_user("delete", snapshot["SnapshotId"], "--yes")


@pytest.fixture(scope="module")
def module_world() -> Iterator[Bound]:
    # Not below pytest's own directory, which other users may not enter.
    root = Path(tempfile.mkdtemp(prefix="ebsd-limits-"))
    root.chmod(0o755)
    try:
        with installation(root, SETTINGS) as ebsd:
            yield Bound(ebsd)
    finally:
        shutil.rmtree(root)


@pytest.fixture
def world(module_world: Bound) -> Iterator[Bound]:
    yield module_world
    module_world.clear()


def at_once(world: Bound, commands: list[list[str]]) -> list[int]:
    """Run ebsctl several times at once, as the bound user; return the exit statuses."""
    pids = []
    for command in commands:
        pid = os.fork()
        if pid == 0:
            null = os.open("/dev/null", os.O_WRONLY)
            _be_ebsctl(BOUND, null, null, ["--socket", str(world.ebsd.socket), *command])
        pids.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def test_volumes_and_their_bytes(world: Bound) -> None:
    assert world.used() == {"Volumes": 0, "VolumeBytes": 0, "Snapshots": 0, "Jobs": 0}
    world.as_user("create", "a", "--size", "30M")
    assert world.refused(BOUND, "create", "b", "--size", "3M") == (4, "VolumeLimitExceeded")
    world.as_user("create", "b", "--size", "1M")
    assert world.refused(BOUND, "resize", "b", "3M") == (4, "VolumeLimitExceeded")
    world.as_user("resize", "b", "2M")
    assert world.used()["VolumeBytes"] == 32 << 20
    assert world.refused(BOUND, "create", "c", "--size", "1M") == (4, "VolumeLimitExceeded")
    # What does not take more is not refused, and root is bound by nothing.
    world.as_user("attach", "a", "--file")
    world.as_user("detach", "a")
    assert world.ctl_as(0, "--json", "create", "root", "--size", "100M").status == 0
    assert world.ctl_as(0, "delete", "root", "--yes").status == 0


def test_of_many_volumes_at_once_as_many_are_made_as_fit(world: Bound) -> None:
    statuses = at_once(world, [["create", f"v{n}", "--size", "1M"] for n in range(9)])
    assert sorted(statuses) == [0] * 5 + [4] * 4
    assert world.used()["Volumes"] == 5


def test_of_growths_at_once_as_many_begin_as_fit(world: Bound) -> None:
    for n in range(4):
        world.as_user("create", f"g{n}", "--size", "4M")
    statuses = at_once(world, [["resize", f"g{n}", "12M"] for n in range(4)])
    assert sorted(statuses) == [0] * 2 + [4] * 2
    assert world.used()["VolumeBytes"] == 32 << 20


def test_snapshots_and_copies_of_them(world: Bound) -> None:
    for n in range(5):
        world.as_user("create", f"s{n}", "--size", "1M")
    statuses = at_once(world, [["snapshot", f"s{n}"] for n in range(5)])
    assert sorted(statuses) == [0] * 3 + [4] * 2
    assert world.used()["Snapshots"] == 3
    assert world.refused(BOUND, "snapshot", "s0") == (4, "SnapshotLimitExceeded")
    (first, *_) = world.as_user("list", "snapshots")["Snapshots"]
    own = ["--encrypted", "--key", first["KmsKeyId"]]
    for command in (["--name", "t"], ["--name", "t", *own]):
        assert world.refused(BOUND, "copy", first["SnapshotId"], *command) == (4, "SnapshotLimitExceeded")
    world.as_user("delete", first["SnapshotId"], "--yes")
    world.as_user("snapshot", "s0")


def test_jobs_at_once(world: Bound) -> None:
    """One goes slowly ([jobs] rate); of others at once none begins, and nothing of them is left."""
    world.as_user("key", "create", "another")
    made = world.as_user("create", "j", "--size", "4M")
    client = world.client
    path = client.ec2("AttachVolume", VolumeId=made["VolumeId"], ExposeAs="file")["Attachment"]["BlockFile"]
    with open(path, "r+b", buffering=0) as file:
        file.write(random.Random(5).randbytes(4 << 20))
        os.fsync(file.fileno())
    client.ec2("DetachVolume", VolumeId=made["VolumeId"])
    world.as_user("snapshot", "j", "--name", "js")
    under = ["--from", "js", "--encrypted", "--key", "another", "--no-wait"]
    assert sorted(at_once(world, [["create", f"j{n}", *under] for n in range(3)])) == [0, 4, 4]
    assert world.used()["Jobs"] == 1
    assert world.refused(BOUND, "create", "j9", *under) == (4, "ResourceLimitExceeded")
    (job,) = [job for job in world.as_user("job", "list")["Jobs"] if job["State"] == "running"]
    world.as_user("job", "cancel", job["JobId"])
    assert world.used()["Jobs"] == 0
    world.as_user("create", "j9", *under)
    for job in world.as_user("job", "list")["Jobs"]:
        if job["State"] == "running":
            world.as_user("job", "cancel", job["JobId"])


def test_who_is_not_named_makes_nothing_and_sees_why(world: Bound) -> None:
    assert world.refused(OUTSIDER, "create", "x", "--size", "1M") == (5, "UnauthorizedOperation")
    shown = world.ctl_as(OUTSIDER, "defaults", "show")
    assert shown.status == 0
    assert world.ctl_as(OUTSIDER, "--json", "defaults", "show").json["MayCreate"] is False
    other = world.client.control("DescribeAccountLimits", AccountId=f"0000000{BOUND}")
    assert other["Limits"][0] == {"Name": "Volumes", "Used": 0, "Limit": 5}


def test_nobody_sees_the_limits_of_another_account(world: Bound) -> None:
    parameters = {"AccountId": f"0000000{BOUND}"}
    call = json.dumps({"method": "io.ebsd.Control.DescribeAccountLimits", "parameters": parameters})
    done = subprocess.run(
        ["/usr/bin/python3", "-c", ASK, str(world.ebsd.socket), call],
        capture_output=True, text=True, user=OUTSIDER, timeout=30,
    )  # fmt: skip
    assert "UnauthorizedOperation" in done.stdout, done
