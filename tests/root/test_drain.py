"""Fifty snapshots that came and went leave an attached volume with its head, and with no more space than it needs."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from installation import Installation, installation
from test_depth import CHUNK, CHUNKS, History, read

from ebsd.store.layers import parse_segment_name

SNAPSHOTS = 50


@pytest.fixture
def ebsd(tmp_path: Path) -> Iterator[Installation]:
    memory = Path("/dev/shm")  # as in test_depth: nothing here is about power cuts
    place = memory if memory.is_dir() else tmp_path
    with tempfile.TemporaryDirectory(dir=place) as root, installation(Path(root)) as made:
        yield made


def layers(ebsd: Installation) -> set[int]:
    names = [parse_segment_name(path.name) for path in (ebsd.state / "layers").glob("*/*")]
    return {parsed[0] for parsed in names if parsed is not None}


def open_but_removed(ebsd: Installation) -> list[str]:
    """Return the layers that a volume process keeps alive after their removal."""
    found = []
    for pid in ebsd.processes()["volumes"]:
        links = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
        found += [link for link in links if "/layers/" in link and link.endswith(" (deleted)")]
    return found


@pytest.mark.timeout(300)
def test_layers_of_deleted_snapshots_go_while_the_volume_is_attached(ebsd: Installation) -> None:
    history = History(ebsd)
    history.call("CreateVolume", Name="data", SizeBytes=CHUNKS * CHUNK)
    path = history.attach("data")
    history.write(path, list(range(CHUNKS)))
    for _ in range(SNAPSHOTS):
        history.write(path, history.dice.sample(range(CHUNKS), 2))
        history.snapshot("data")
    kept = history.dice.choice(list(history.snapshots))
    for snapshot in history.dice.sample(list(history.snapshots), SNAPSHOTS):
        if snapshot != kept:
            history.delete(snapshot)
    history.write(path, [0, 1])
    ebsd.kill()  # what it had told the volume process of, and what it had not, is found again
    ebsd.start()
    history = _again(ebsd, history)
    shared = {chunk for chunk in range(CHUNKS) if history.snapshots[kept][chunk] == history.now[chunk]}
    _until(lambda: history.space() == (2 * CHUNKS - len(shared)) * CHUNK and not open_but_removed(ebsd))
    history.check(kept)
    history.delete(kept)
    deadline = time.monotonic() + 60
    while len(layers(ebsd)) > 1 and time.monotonic() < deadline:
        history.write(path, [history.dice.randrange(CHUNKS)])
        time.sleep(0.2)
    assert len(layers(ebsd)) == 1
    assert read(path) == history.now
    _until(lambda: history.space() == CHUNKS * CHUNK and not open_but_removed(ebsd))
    history.call("DetachVolume", VolumeId="data")
    assert ebsd.ctl_json("verify", "data")["DamagedChunks"] == 0
    path = history.attach("data")
    assert read(path) == history.now
    history.call("DetachVolume", VolumeId="data")
    assert ebsd.ctl_json("check")["Findings"] == []


def _again(ebsd: Installation, before: History) -> History:
    history = History(ebsd)
    history.dice, history.now, history.snapshots = before.dice, before.now, before.snapshots
    history.written = before.written
    return history


def _until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not come to that"
        time.sleep(0.2)
