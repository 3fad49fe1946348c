"""A deep history: many snapshots of one volume and a long chain of restores, deleted in any order.

Content is compared with a model in between and at the end; then the layers hold exactly what the volume needs, and
nothing when it is gone. EBSD_DEPTH=N takes N snapshots and N / 10 restores instead of 100 and 10.
"""

from __future__ import annotations

import contextlib
import os
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from installation import Installation, _listeners_of, installation

from ebsctl.client import Client
from ebsd.store.layers import parse_segment_name
from ebsd.store.leaves import parse_leaf_file_name

CHUNK = 64 * 1024
MEMORY = Path("/dev/shm")
CHUNKS = 64
DEPTH = int(os.environ.get("EBSD_DEPTH", "100"))
CHAIN = DEPTH // 10 if "EBSD_DEPTH" in os.environ else 10


class History:
    """A volume, and what it and each snapshot of it must hold: a number per chunk, which its bytes are made of."""

    def __init__(self, ebsd: Installation) -> None:
        self.ebsd = ebsd
        self.client = Client(str(ebsd.runtime / "ebsd.sock"), timeout=600)
        self.dice = random.Random(7)
        self.now = [0] * CHUNKS
        self.snapshots: dict[str, list[int]] = {}
        self.written = 0
        self.made = 0
        """Layers that there ever were: each volume and each snapshot begins one."""

    def call(self, action: str, **members: object) -> dict[str, Any]:
        self.made += action in ("CreateVolume", "CreateSnapshot")
        return self.client.ec2(action, **members)

    def attach(self, volume: str) -> str:
        path: str = self.call("AttachVolume", VolumeId=volume, ExposeAs="file")["Attachment"]["Path"]
        return path

    def write(self, path: str, chunks: list[int]) -> None:
        with open(path, "r+b", buffering=0) as device:
            for chunk in chunks:
                self.written += 1
                self.now[chunk] = self.written
                device.seek(chunk * CHUNK)
                device.write(content(self.written))

    def snapshot(self, volume: str) -> str:
        ident: str = self.call("CreateSnapshot", VolumeId=volume)["Snapshot"]["SnapshotId"]
        self.snapshots[ident] = self.now.copy()
        return ident

    def check(self, snapshot: str) -> None:
        """Restore a snapshot and compare all of it."""
        self.call("CreateVolume", Name="look", SnapshotId=snapshot)
        assert read(self.attach("look")) == self.snapshots[snapshot]
        self.call("DetachVolume", VolumeId="look")
        self.call("DeleteVolume", VolumeId="look")

    def delete(self, snapshot: str) -> None:
        """Delete a snapshot, which gives back exactly what was announced."""
        announced = self.call("DescribeSnapshots", SnapshotIds=[snapshot])["Snapshots"][0]["UniqueBytes"]
        before = self.space()
        self.call("DeleteSnapshot", SnapshotId=snapshot)
        del self.snapshots[snapshot]
        assert before - self.space() == announced

    def space(self) -> int:
        """Return the bytes that the data of all layers takes."""
        if not self.ebsd.state.is_relative_to(MEMORY):
            os.sync()
        return sum(allocated(path) for path in self.files() if parse_segment_name(path.name) is not None)

    def files(self) -> list[Path]:
        """Return all files of layers, tables included."""
        return list((self.ebsd.state / "layers").glob("*/*"))

    def check_overhead(self) -> None:
        """Beside the data: a leaf file for each layer that is named, and 64 bytes in two tables for each ever made."""
        layers = {parsed[:2] for path in self.files() if (parsed := parse_segment_name(path.name)) is not None}
        leaf_files = [path for path in self.files() if parse_leaf_file_name(path.name) is not None]
        assert {parse_leaf_file_name(path.name) for path in leaf_files} <= layers
        assert all(allocated(path) == 4096 for path in leaf_files)
        tables = [path for path in self.files() if path.name in ("table", "leaves")]
        assert all(path.stat().st_size <= 64 * (1 + self.made) for path in tables)
        assert len(self.files()) == len(layers) + len(leaf_files) + len(tables)


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


def content(number: int) -> bytes:
    return number.to_bytes(8, "little") * (CHUNK // 8)


def read(path: str) -> list[int]:
    found = []
    with open(path, "rb") as device:
        for _ in range(CHUNKS):
            data = device.read(CHUNK)
            number = int.from_bytes(data[:8], "little")
            assert data == content(number)
            found.append(number)
    return found


DRAINLESS = "[space]\ndrain = false\n"


@pytest.fixture
def ebsd(tmp_path: Path) -> Iterator[Installation]:
    # Nothing here is about power cuts, and thousands of syncs take their time on a disk. Draining has a chunk in two
    # places for a moment.
    place = MEMORY if MEMORY.is_dir() else tmp_path
    with tempfile.TemporaryDirectory(dir=place) as root, installation(Path(root), DRAINLESS) as made:
        yield made


@pytest.mark.timeout(600 + DEPTH)
def test_a_deep_history_is_deleted_in_any_order(ebsd: Installation) -> None:
    history = History(ebsd)
    history.call("CreateVolume", Name="data", SizeBytes=CHUNKS * CHUNK)
    path = history.attach("data")
    history.write(path, list(range(CHUNKS)))
    for _ in range(DEPTH):
        history.write(path, [history.dice.randrange(CHUNKS)])
        history.snapshot("data")
    at_the_end = history.now.copy()
    assert len(history.client.snapshots()) == DEPTH
    pages = history.call("DescribeSnapshots", MaxResults=7)
    assert len(pages["Snapshots"]) == 7
    rest = history.call("DescribeSnapshots", NextToken=pages["NextToken"], MaxResults=7)
    assert not {s["SnapshotId"] for s in rest["Snapshots"]} & {s["SnapshotId"] for s in pages["Snapshots"]}

    source = history.dice.choice(list(history.snapshots))
    for at in range(CHAIN):
        history.now = history.snapshots[source].copy()
        history.call("CreateVolume", Name=f"link{at}", SnapshotId=source)
        link = history.attach(f"link{at}")
        history.write(link, [history.dice.randrange(CHUNKS)])
        source = history.snapshot(f"link{at}")
        if at == CHAIN - 1:
            assert read(link) == history.now
        history.call("DetachVolume", VolumeId=f"link{at}")
        history.call("DeleteVolume", VolumeId=f"link{at}")

    order = list(history.snapshots)
    history.dice.shuffle(order)
    for at, snapshot in enumerate(order):
        if at == len(order) // 2:
            # The rest while nothing is attached.
            history.call("DetachVolume", VolumeId="data")
            path = ""
        history.delete(snapshot)
        if at % (len(order) // 5) == 0 and history.snapshots:
            history.check(history.dice.choice(list(history.snapshots)))
            assert not path or read(path) == at_the_end
    assert history.call("DescribeSnapshots")["Snapshots"] == []
    history.write(history.attach("data"), [0, 1, 2])
    history.call("DetachVolume", VolumeId="data")
    # One place for each chunk of the volume, and nothing of what was overwritten in any layer.
    assert history.space() == CHUNKS * CHUNK
    history.check_overhead()
    at_the_end[:3] = history.now[:3]
    assert read(history.attach("data")) == at_the_end
    history.call("DetachVolume", VolumeId="data")
    assert ebsd.ok("check") is not None
    history.call("DeleteVolume", VolumeId="data")
    assert list((ebsd.state / "layers").iterdir()) == []
    assert list((ebsd.state / "maps").iterdir()) == []


def test_an_attached_volume_opens_the_layers_of_its_map_before_they_are_read(ebsd: Installation) -> None:
    history = History(ebsd)
    history.call("CreateVolume", Name="data", SizeBytes=CHUNKS * CHUNK)
    path = history.attach("data")
    history.write(path, list(range(CHUNKS)))
    for at in range(20):
        history.write(path, [at])
        history.snapshot("data")
    history.call("DetachVolume", VolumeId="data")
    path = history.attach("data")
    layers = {str(file) for file in history.files() if parse_segment_name(file.name) is not None}
    ident = history.call("DescribeVolumes", VolumeIds=["data"])["Volumes"][0]["VolumeId"]
    (engine,) = _listeners_of(ebsd.runtime / "control" / f"{ident}.sock")
    deadline = time.monotonic() + 30
    while len(layers & open_files(engine)) < len(layers):
        assert time.monotonic() < deadline, "the layers are not opened"
        time.sleep(0.01)
    assert read(path) == history.now
    history.call("DetachVolume", VolumeId="data")
    history.call("DeleteVolume", VolumeId="data")
    for snapshot in list(history.snapshots):
        history.call("DeleteSnapshot", SnapshotId=snapshot)


def open_files(pid: int) -> set[str]:
    found = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.add(os.readlink(fd))
    return found
