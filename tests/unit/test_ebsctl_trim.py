"""``ebsctl trim``: what a mounted file system has freed comes back, or it is said why it cannot."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ebsctl_fakes import GIB, Bench, attachment, volume, volume_id

VOL = volume_id(1)
DEVICE = "/dev/loop5001"


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.server.close()


def attached(bench: Bench, **members: Any) -> None:
    bench.world.add(volume(State="in-use", Attachments=[attachment(**members)]))


@pytest.mark.parametrize("file_system", ["ext4", "xfs", "btrfs"])
def test_trim_prints_what_came_back(bench: Bench, file_system: str) -> None:
    attached(bench)
    bench.programs.add_mount("/srv/a tree", DEVICE, "0:39" if file_system == "btrfs" else "7:5001", file_system)
    result = bench.run("trim", "data")
    assert (result.exit_code, result.stdout) == (0, f"{GIB}\n")
    assert "3 GiB discarded, 1 GiB given back" in result.stderr
    assert bench.programs.commands == [["fstrim", "/srv/a tree"]]
    assert bench.server.parameters("Control.ReclaimVolume") == {"VolumeId": VOL}
    document = bench.document("trim", "data")
    assert document == {"VolumeId": VOL, "TrimmedBytes": 3 * GIB, "ReclaimedBytes": GIB}


def test_a_volume_that_is_not_attached(bench: Bench) -> None:
    bench.world.add(volume())
    assert "--mount" in bench.error(4, "trim", "data")["Hint"]


def test_a_volume_that_is_not_mounted(bench: Bench) -> None:
    attached(bench)
    error = bench.error(4, "trim", "data")
    assert "not mounted" in error["Message"]
    assert DEVICE in error["Hint"]
    assert bench.programs.commands == []


def test_a_volume_attached_as_a_file(bench: Bench) -> None:
    attached(bench, Device=None, DeviceNumber=None)
    assert "fallocate -p" in bench.error(4, "trim", "data")["Hint"]


def test_a_device_that_does_not_discard(bench: Bench) -> None:
    attached(bench)
    bench.programs.add_mount("/srv/data", DEVICE, "7:5001")
    bench.programs.failures["fstrim"] = (1, "/srv/data cannot be trimmed")
    error = bench.error(4, "trim", "data")
    assert "cannot be trimmed" in error["Message"]
    assert 'transport = "native"' in error["Hint"]


def test_only_root_trims(bench: Bench) -> None:
    attached(bench)
    bench.programs.add_mount("/srv/data", DEVICE, "7:5001")
    bench.uid = 1000
    assert bench.run("trim", "data").exit_code == 5
    assert bench.programs.commands == []
