"""The layer table under kills and power cuts: what ebsd has built on an entry never outlives it.

ebsd is killed at each disk call of an append, another one finds the entry and goes on, and the power is cut.
"""

from __future__ import annotations

import contextlib
import errno
import random

import pytest
from schedule_dice import Died
from schedule_disk import DiskPath, Files, ProcessDisk

from ebsd.control.lineage_files import LineageFiles
from ebsd.domain.errors import EbsdError
from ebsd.domain.ids import LineageId, VolumeId
from ebsd.domain.model import Cipher, Layer, LayerState
from ebsd.store.layertable import create_layer_table, extend_layer_table, read_durable_table, read_layer_table
from ebsd.store.layout import StateLayout

LINEAGE = LineageId("6ba7b810-9dad-41d1-80b4-00c04fd430c8")
VOLUMES = (VolumeId("vol-0123456789abcdef0"), VolumeId("vol-0123456789abcdef1"))
STATE = StateLayout(DiskPath("/state"))
TABLE = STATE.table(LINEAGE)
CUTS = 12


class Killed:
    """Kills at the disk call of this number."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, *_: object) -> None:
        self.left -= 1
        if self.left < 0:
            raise Died


def layers(count: int) -> list[Layer]:
    """Of two volumes in turn, as when both are snapshotted."""
    return [Layer(LINEAGE, n, bytes([n]) * 16, VOLUMES[n % 2], LayerState.CREATING, 4096) for n in range(1, count + 1)]


def extend(disk: ProcessDisk, count: int) -> None:
    extend_layer_table(disk, TABLE, read_layer_table(disk, TABLE), layers(count))


def machine(known: int) -> tuple[Files, ProcessDisk]:
    files = Files()
    files.directories |= {"/state", "/state/layers", str(STATE.lineage(LINEAGE))}
    disk = ProcessDisk(files, "ebsd", lambda *_: None)
    create_layer_table(disk, TABLE, LINEAGE, Cipher.NONE)
    extend(disk, known)
    return files, disk


@pytest.mark.parametrize("known", [0, 6, 7])
def test_an_entry_that_was_only_seen_is_durable_before_anything_is_built_on_it(known: int) -> None:
    # Seven entries fill the device's first block together with the header: a later one may survive without them.
    new, calls = known + 1, 0
    while True:
        for cut in range(CUTS):
            files, disk = machine(known)
            killed = Killed(calls)
            try:
                extend(ProcessDisk(files, "killed", killed), new)
                finished = True
            except Died:
                finished = False
            extend(disk, new)  # the next ebsd completes the head of a snapshot that was cut short
            files.cut_power(random.Random(cut))
            assert len(read_layer_table(disk, TABLE, count=new).layers) == new, f"killed at call {calls}"
        if finished:
            return
        calls += 1


@pytest.mark.parametrize("known", [0, 6, 7])
def test_what_a_record_counts_survives_whoever_was_making_the_last_entry(known: int) -> None:
    """One volume is attached while an entry for another one is being made: nobody has synced it yet."""
    seen = set()
    for calls in range(12):
        for cut in range(CUTS):
            files, disk = machine(known)
            with contextlib.suppress(Died):
                extend(ProcessDisk(files, "slow", Killed(calls)), known + 1)
            counted = read_durable_table(disk, TABLE).layers
            files.cut_power(random.Random(cut))
            assert read_layer_table(disk, TABLE, count=len(counted)).layers == counted
            seen.add(len(counted))
    assert seen == {known, known + 1}


@pytest.mark.parametrize("known", [0, 6, 7])
def test_a_cut_table_is_read_and_completed(known: int) -> None:
    """ebsd is killed in an append, the next one is in that of another volume when the power fails."""
    for first in range(12):
        for second in range(12):
            for cut in range(CUTS // 3):
                files, disk = machine(known)
                for count, at in ((known + 1, first), (known + 2, second)):
                    try:
                        extend(ProcessDisk(files, f"killed {count}", Killed(at)), count)
                    except Died:
                        continue
                files.cut_power(random.Random(cut))
                try:
                    extend(disk, known + 3)
                except EbsdError as error:
                    raise AssertionError(f"killed at calls {first} and {second}: {error}") from error
                assert read_layer_table(disk, TABLE).layers == read_layer_table(disk, TABLE, count=known + 3).layers


@pytest.mark.parametrize("known", [0, 6, 7])
def test_an_append_is_durable_at_return(known: int) -> None:
    for cut in range(CUTS):
        files, disk = machine(known)
        extend(disk, known + 2)
        files.cut_power(random.Random(cut))
        assert len(read_layer_table(disk, TABLE).layers) == known + 2


class Failing:
    """Fails the calls of one name."""

    def __init__(self, name: str, code: int) -> None:
        self.name, self.code = name, code

    def __call__(self, name: str, *_: object) -> None:
        if name == self.name:
            raise OSError(self.code, "the disk failed")


def test_a_sweep_goes_on_with_a_table_that_finds_no_space_and_ends_at_one_that_cannot_be_synced() -> None:
    files, _ = machine(3)
    full = LineageFiles(ProcessDisk(files, "full", Failing("pwrite", errno.ENOSPC)), STATE)
    assert len(full._complete_table(LINEAGE, layers(4)).layers) == 3
    # What was only seen may be gone after a power cut, and with its row nothing would say that the number was used.
    broken = LineageFiles(ProcessDisk(files, "broken", Failing("fdatasync", errno.EIO)), STATE)
    with pytest.raises(OSError, match="failed"):
        broken._complete_table(LINEAGE, layers(3))
