"""The copier and the leaves: a damaged source chunk fails the copy by name, tampered leaves are refused before it."""

from __future__ import annotations

import errno
import os

import pytest
import trio
from test_copier_copying import DISK, FROM, SNAPSHOT, XTS, Rig, opened, wait_until_ended, worker, worker_process
from test_copier_refusals import clean_body, source_record

from ebsd.domain.errors import RemoteError
from ebsd.domain.units import CHUNK, MIB
from ebsd.store.disk import RealDisk
from ebsd.store.layers import segment_name
from ebsd.store.leaftable import LeafSlot, encode_slot, leaf_root, read_slots
from ebsd.store.leaves import Runs, leaf_file_name, named_ranges
from ebsd.volume.copier import LOOK, Run, SourceFiles
from ebsd.volume.hashing import hash_layer

pytestmark = pytest.mark.trio


def hashed(rig: Rig, layers=None, *, signed=True) -> None:
    """Hash layers of the source (all that its map names), and sign it with their root."""
    table = rig.source.table()
    with opened(rig.source.directory) as fd:
        named = sorted({layer for layer in rig.entries if layer})
        for layer in named if layers is None else layers:
            runs = Runs(named_ranges(rig.entries, layer))
            hash_layer(DISK, fd, FROM, layer, table.uuid_of(layer), runs)
        slots = read_slots(DISK, fd, FROM, {layer: table.uuid_of(layer) for layer in named})
    if signed:
        source_record(rig, rig.source.sign(clean_body(rig, generation=2, leaf_root=leaf_root(slots.values()))))


def damage(rig: Rig, chunk: int, at: int = 0) -> str:
    """Flip a bit of a stored chunk; returns the name of its file."""
    layer = rig.entries[chunk]
    name = segment_name(layer, rig.source.table().uuid_of(layer), 0)
    with opened(rig.source.directory / name, os.O_RDWR) as fd:
        byte = os.pread(fd, 1, chunk * CHUNK + at)
        os.pwrite(fd, bytes([byte[0] ^ 1]), chunk * CHUNK + at)
    return name


@pytest.mark.parametrize("kind", ["snapshot", "volume"])
async def test_a_hashed_source_is_copied_as_ever(tmp_path, kind):
    rig = Rig(tmp_path, kind=kind)
    hashed(rig)
    async with worker() as (channel, _):
        rig.check(await rig.copy(channel))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("at", [0, CHUNK - 1])
async def test_a_damaged_chunk_fails_the_copy_and_is_named(tmp_path, signed, at):
    rig = Rig(tmp_path, density=1.0)
    hashed(rig, signed=signed)
    name = damage(rig, 77, at)
    async with worker() as (channel, _):
        await rig.start(channel)
        last = await wait_until_ended(channel)
    assert (last["State"], last["Error"]["Code"]) == ("failed", "Ebsd.StoreDamaged")
    layer = rig.entries[77]
    assert last["Error"]["Message"].startswith(f"{name} is damaged: chunk 77 of layer {layer} has changed")
    assert not [found for found in os.listdir(rig.target.directory) if "leaves" in found]


async def test_what_was_not_hashed_is_copied_as_it_is(tmp_path):
    rig = Rig(tmp_path, density=1.0)
    first = rig.entries[77]
    hashed(rig, [layer for layer in (1, 2, 3) if layer != first], signed=False)
    damage(rig, 77)
    async with worker() as (channel, _):
        await rig.copy(channel)


async def test_a_damaged_leaf_file_fails_the_copy_and_is_named(tmp_path):
    rig = Rig(tmp_path, density=1.0)
    hashed(rig)
    layer = rig.entries[0]
    name = leaf_file_name(layer, rig.source.table().uuid_of(layer))
    (rig.source.directory / name).unlink()
    async with worker() as (channel, _):
        await rig.start(channel)
        last = await wait_until_ended(channel)
    assert last["Error"]["Message"] == f"{name} is damaged: it is missing."


async def refused(rig: Rig, words: str) -> None:
    async with worker() as (channel, _):
        with pytest.raises(RemoteError) as caught:
            await rig.start(channel)
    assert caught.value.code == "Ebsd.IntegrityFailure"
    assert words in caught.value.message
    assert SNAPSHOT in caught.value.message


async def test_a_leaf_table_that_lacks_a_signed_layer_is_refused(tmp_path):
    rig = Rig(tmp_path, density=1.0)
    hashed(rig)
    (rig.source.directory / "leaves").unlink()
    await refused(rig, "its leaf table lacks layer 1, which its record was signed over")


async def test_leaves_made_anew_over_changed_data_are_refused(tmp_path):
    """What an attacker can do who has the directory and no key: change a chunk, and all digests up to the slot."""
    rig = Rig(tmp_path, density=1.0)
    hashed(rig)
    damage(rig, 0)
    layer = rig.entries[0]
    uuid = rig.source.table().uuid_of(layer)
    with opened(rig.source.directory / "leaves", os.O_RDWR) as table:
        os.pwrite(table, bytes(64), 64 * layer)
        hashed(rig, [layer], signed=False)
        assert os.pread(table, 64, 64 * layer)[:4] == layer.to_bytes(4, "little")
    await refused(rig, "the leaves of its layers are not those that its record was signed over")
    with opened(rig.source.directory / "leaves", os.O_RDWR) as table:
        os.pwrite(table, encode_slot(LeafSlot(layer, uuid, bytes(32))), 64 * layer)
    await refused(rig, "the leaves of its layers are not those that its record was signed over")
    with opened(rig.source.directory / "leaves", os.O_RDWR) as table:
        os.pwrite(table, b"x", 64 * layer)
    await refused(rig, f"the checksum of layer {layer} is wrong")


async def test_a_resumed_copy_hashes_what_an_earlier_worker_had_written(tmp_path):
    rig = Rig(tmp_path, size=24 * MIB, density=1.0)
    with worker_process("c.SYNC_BYTES = c.MIB") as (channel, child):
        async with channel:
            await rig.start(channel)
            while True:
                progress = (await channel.request("progress", {}, deadline=20)).message
                if progress["DoneThrough"] >= 64:
                    break
            child.kill()
    rig.done_through = 64
    rig.new_output()
    left = rig.target.directory / f".{leaf_file_name(1, rig.target_uuid)}.1234567.tmp"
    left.write_bytes(b"what a worker left that was killed")
    async with worker() as (channel, _):
        rig.check(await rig.copy(channel))
    assert rig.source.cipher is XTS


async def test_leaves_that_the_host_cannot_open_are_no_damage(tmp_path):
    class Few(RealDisk):
        def open(self, path, flags, mode=0o600, dir_fd=None):
            if str(path).endswith(".leaves"):
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return super().open(path, flags, mode, dir_fd=dir_fd)

    rig = Rig(tmp_path, density=1.0)
    hashed(rig)
    async with worker(Few()) as (channel, _):
        await rig.start(channel)
        last = await wait_until_ended(channel)
    assert (last["State"], last["Error"]["Code"]) == ("failed", "Ebsd.HostFailure")
    assert "the leaves of layer" in last["Error"]["Message"]


async def test_asking_what_is_cached_reads_nothing(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(4 * MIB))
    fd = os.open(path, os.O_RDWR)
    try:
        written = DISK.is_cached(fd, 0, MIB)
        os.fsync(fd)
        DISK.drop_cache(fd)
        for _ in range(3):  # a look that began to read would be answered otherwise soon
            assert not DISK.is_cached(fd, 0, MIB)
            await trio.sleep(0.01)
        os.pread(fd, CHUNK, 0)
        assert DISK.is_cached(fd, 0, CHUNK) is written, "only a kernel before 6.5 cannot say"
    finally:
        os.close(fd)


class Remembering(RealDisk):
    """A page cache that holds what a test says, and notes from where each piece was read."""

    def __init__(self, cached: set[int]) -> None:
        super().__init__()
        self._cached = cached
        self._direct: set[int] = set()
        self.reads: list[tuple[bool, int, int]] = []

    def is_cached(self, fd, offset, length):
        return all(at in self._cached for at in range(offset // LOOK, -(-(offset + length) // LOOK)))

    def make_direct(self, fd):
        self._direct.add(fd)
        return True

    def pread_into(self, fd, buffer, offset):
        self.reads.append((fd in self._direct, offset // LOOK, len(buffer) // LOOK))
        return super().pread_into(fd, buffer, offset)


@pytest.mark.parametrize(
    ("cached", "reads"),
    [
        (set(), [(True, 0, 8)]),
        (set(range(8)), [(False, 0, 8)]),
        ({0, 1, 5}, [(False, 0, 2), (True, 2, 3), (False, 5, 1), (True, 6, 2)]),
        ({7}, [(True, 0, 7), (False, 7, 1)]),
    ],
)
async def test_what_is_in_memory_is_taken_from_there_and_the_rest_from_the_disk(tmp_path, cached, reads):
    rig = Rig(tmp_path, layers=1, entries=[1] * (2 * MIB // CHUNK), size=2 * MIB)
    disk = Remembering(cached)
    with opened(rig.source.directory) as fd:
        files = SourceFiles(disk, fd, rig.source.table(), direct=True)
        buffer = memoryview(bytearray(2 * MIB))
        files.fetch(Run(0, 2 * MIB // CHUNK, 1), buffer)
        files.close()
    name = segment_name(1, rig.source.table().uuid_of(1), 0)
    assert buffer == (rig.source.directory / name).read_bytes()
    assert disk.reads == reads
