"""Preallocated layers: made whole or refused, written without the gate, kept over discards, given back by the map."""

from __future__ import annotations

import errno
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_rig import LINEAGE, VOLUME, Rig, engine_kind  # noqa: F401 - runs everything over both engines
from test_spacegate import FLOOR, SHM, World
from test_store_sweep import DISK, Lineage, Memory, uuid_of

from ebsd.control.volume_files import VolumeFiles
from ebsd.domain.errors import NoSpace, StoreDamaged
from ebsd.domain.ids import AccountId
from ebsd.domain.model import Cipher, Integrity, Volume
from ebsd.domain.states import VolumeState
from ebsd.domain.units import CHUNK, MIB
from ebsd.store.ballast import Ballast
from ebsd.store.disk import RealDisk
from ebsd.store.layers import create_layer, seal_layer
from ebsd.store.layout import LiveLayout, StateLayout
from ebsd.store.sweep import PUNCH_STEP, give_back, sweep
from ebsd.volume.scheduling import run_sync

SIZE = 20 * CHUNK


@pytest.fixture
def rig() -> Iterator[Rig]:
    with tempfile.TemporaryDirectory(dir=SHM) as directory:
        rig = Rig(Path(directory), SIZE)
        yield rig
        rig.close()


# --- the engine -------------------------------------------------------------------------------------------


def test_writes_into_what_is_preallocated_pass_a_full_gate_and_others_do_not(rig: Rig) -> None:
    world = World(FLOOR - MIB, patience=0)
    engine = rig.start(space=world.gate, preallocated=10 * CHUNK)
    assert run_sync(engine.write(9 * CHUNK + 5, b"x" * 100)) == 100
    assert run_sync(engine.write(0, b"y" * (4 * CHUNK))) == 4 * CHUNK
    assert world.disk.looks == 0
    for offset, length in ((10 * CHUNK, 1), (9 * CHUNK, 2 * CHUNK)):
        with pytest.raises(OSError, match="no space") as caught:
            run_sync(engine.write(offset, b"z" * length))
        assert caught.value.errno == errno.ENOSPC
    assert rig.read(9 * CHUNK, 200) == bytes(5) + b"x" * 100 + bytes(95)


def test_a_seal_ends_it(rig: Rig) -> None:
    world = World(FLOOR - MIB, patience=0)
    engine = rig.start(space=world.gate, preallocated=SIZE)
    run_sync(engine.write(0, b"y" * CHUNK))
    run_sync(engine.seal(rig.announce_head(), rig.table))
    with pytest.raises(OSError, match="no space"):
        run_sync(engine.write(0, b"z"))
    world.disk.free = FLOOR + MIB
    world.clock.now += 1
    run_sync(engine.write(0, b"z" * CHUNK))
    run_sync(engine.discard(0, CHUNK))
    run_sync(engine.flush())
    assert run_sync(engine.reclaim()) == 1


def test_discards_keep_the_blocks_of_what_is_preallocated(rig: Rig) -> None:
    engine = rig.start(preallocated=10 * CHUNK)
    rig.write(0, b"x" * SIZE)
    run_sync(engine.discard(0, SIZE))
    rig.flush()
    assert run_sync(engine.reclaim()) == 10
    assert os.fstat(rig.head_fds[0]).st_blocks * 512 == 10 * CHUNK
    assert run_sync(engine.find_leaks()) == 0
    assert rig.read(0, SIZE) == bytes(SIZE)
    rig.write(3 * CHUNK + 1, b"new")  # what was there before must not show around it
    assert rig.read(3 * CHUNK, CHUNK) == b"\0new".ljust(CHUNK, b"\0")


# --- making it --------------------------------------------------------------------------------------------


class Short(RealDisk):
    """Allocates some of what it is asked for, and then has no space."""

    def fallocate(self, fd: int, offset: int, length: int) -> None:
        super().fallocate(fd, offset, length // 2)
        raise OSError(errno.ENOSPC, "full")


def test_an_allocation_that_fails_half_way_is_told_as_no_space_and_can_be_removed(tmp_path: Path) -> None:
    state, live = StateLayout(tmp_path / "state"), LiveLayout(tmp_path / "live")
    for directory in (state.root, state.layers, state.maps, state.records, tmp_path / "live"):
        directory.mkdir(exist_ok=True)
    volume = Volume(
        id=VOLUME, account=AccountId("000000001000"), owner="o", name="n", size=8 * MIB, state=VolumeState.CREATING,
        cipher=Cipher.NONE, key_arn=None, wrapped_key=None, context={}, lineage=LINEAGE, head=1, snapshot=None,
        attach_generation=0, integrity=Integrity.NEW, authority=None, created="2026-01-01T00:00:00Z", reason="",
    )  # fmt: skip
    short = Short()
    files = VolumeFiles(short, state, live, Ballast(short, state.root / "ballast", 0, 0))
    with pytest.raises(NoSpace):
        files.create(volume, uuid_of(1), None, None, preallocate=True)
    assert not state.record(VOLUME).exists()
    assert not state.map(VOLUME).exists()
    files = VolumeFiles(RealDisk(), state, live, Ballast(RealDisk(), state.root / "ballast", 0, 0))
    for path in state.lineage(LINEAGE).iterdir():
        path.unlink()
    state.lineage(LINEAGE).rmdir()
    files.create(volume, uuid_of(1), None, None, preallocate=True)
    assert sum(path.stat().st_blocks for path in state.lineage(LINEAGE).glob("*.000")) * 512 >= 8 * MIB
    status = state.map(VOLUME).stat()
    assert status.st_blocks * 512 >= status.st_size


# --- giving it back ---------------------------------------------------------------------------------------


def preallocated(lineage: Lineage, layer: int, chunks: int, holding: set[int]) -> None:
    """Make one more layer of the lineage a preallocated one with data in some chunks."""
    lineage.path(layer).unlink()
    create_layer(DISK, lineage.dirfd, layer, uuid_of(layer), chunks * CHUNK, preallocate=True)
    with lineage.path(layer).open("r+b") as file:
        for chunk in holding:
            file.seek(chunk * CHUNK)
            file.write(bytes([layer]) * CHUNK)
        file.flush()
        os.fsync(file.fileno())
    lineage.plan[layer] = holding
    seal_layer(DISK, lineage.dirfd, layer, uuid_of(layer), chunks * CHUNK)


def test_what_no_map_names_is_given_back_and_no_named_chunk_is_touched(tmp_path: Path) -> None:
    dice = random.Random(5)
    for turn in range(20):
        directory = tmp_path / str(turn)
        directory.mkdir()
        chunks = dice.choice((1, 7, 200))
        lineage = Lineage(directory, {1: set(), 2: set()}, size=chunks * CHUNK)
        holding = {chunk for chunk in range(chunks) if dice.random() < dice.choice((0.1, 0.5, 0.9))}
        preallocated(lineage, 1, chunks, holding)
        maps = [Memory([0] * chunks), Memory([0] * chunks)]
        for chunk in holding:  # some are named by one map, some by both, some were discarded
            for each in maps:
                each.entries[chunk] = dice.choice((0, 1))
        named = {chunk for chunk in holding if any(each.entries[chunk] for each in maps)}
        way = dice.choice(("give back", "sweep"))
        if way == "give back":
            report = give_back(DISK, lineage.dirfd, lineage.table, layers={1}, maps=maps)
            assert report.removed == ()
        else:
            sweep(DISK, lineage.dirfd, lineage.table, protected={2}, maps=maps)
        assert all(each.synced for each in maps)
        assert lineage.content()[1] == named
        if way == "give back" or named:
            status = lineage.path(1).stat()
            least = 0 if way == "give back" else CHUNK + CHUNK * len(named) // 64
            assert len(named) * CHUNK <= status.st_blocks * 512 <= len(named) * CHUNK + max(least, 8192)
            assert status.st_size == chunks * CHUNK
            assert status.st_mode & 0o777 == 0o440
        lineage.close()


def test_a_map_that_cannot_be_read_or_synced_keeps_everything(tmp_path: Path) -> None:
    lineage = Lineage(tmp_path, {1: set()}, size=8 * CHUNK)
    preallocated(lineage, 1, 8, {1, 2})

    class Unsynced(Memory):
        def sync(self) -> None:
            raise OSError(errno.EIO, "no sync")

    before = lineage.path(1).stat().st_blocks
    for broken, error in ((Memory([9] * 8), StoreDamaged), (Unsynced([0] * 8), OSError)):
        with pytest.raises(error):
            give_back(DISK, lineage.dirfd, lineage.table, layers={1}, maps=[Memory([0, 1] + [0] * 6), broken])
        assert lineage.path(1).stat().st_blocks == before
        assert lineage.content()[1] == {1, 2}
    lineage.close()


def test_long_ranges_are_punched_in_steps_across_blocks_of_the_map(tmp_path: Path) -> None:
    chunks = 3 * 16384 + 5
    lineage = Lineage(tmp_path, {1: {0, 16383, 16384, 40000}}, size=chunks * CHUNK)
    punched: list[tuple[int, int]] = []

    class Watched(RealDisk):
        def punch(self, fd: int, offset: int, length: int) -> None:
            punched.append((offset // CHUNK, (offset + length) // CHUNK))
            super().punch(fd, offset, length)

    entries = [0] * chunks
    for chunk in (0, 16384, 40000):
        entries[chunk] = 1
    give_back(Watched(), lineage.dirfd, lineage.table, layers={1}, maps=[Memory(entries)])
    assert lineage.content()[1] == {0, 16384, 40000}
    assert all(end - first <= PUNCH_STEP for first, end in punched)
    everything = [chunk for first, end in punched for chunk in range(first, end)]
    assert everything == [chunk for chunk in range(chunks) if not entries[chunk]]
    lineage.close()
