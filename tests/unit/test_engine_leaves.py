"""The engine and the leaves: what is copied out of a sealed layer is what was sealed, or the write fails."""

from __future__ import annotations

import os
import random
import threading

import pytest
import trio
from engine_rig import LINEAGE, Rig, engine_kind  # noqa: F401 - runs everything over both engines

from ebsd.domain.errors import StoreDamaged
from ebsd.domain.units import CHUNK, MIB, SECTOR
from ebsd.store.disk import RealDisk
from ebsd.store.layers import segment_name
from ebsd.store.leaftable import LeafSlot, leaf_root, read_slots
from ebsd.store.leaves import LeafFile, Runs, leaf_digest, leaf_file_name
from ebsd.volume.hashing import ENTRY_BYTES, LeafChecks, hash_layer, hash_layer_gently, late_runs, steps
from ebsd.volume.leafwork import LeafWork
from ebsd.volume.scheduling import run_sync
from ebsd.volume.trio_scheduling import TrioScheduler

SIZE = 20 * CHUNK + 3 * SECTOR
LAYER = 1
UUID = bytes([LAYER]) * 16
DISK = RealDisk()
PLAN = {0: 1, 1: 1, 2: 2, 5: 1, 20: 1}


@pytest.fixture
def rig(tmp_path):
    rig = Rig(tmp_path, SIZE)
    yield rig
    rig.close()


@pytest.fixture
def checks(rig):
    checks = LeafChecks(DISK, rig.dirfd, LINEAGE)
    yield checks
    checks.close()


def sealed(rig: Rig) -> bytearray:
    """Fill two sealed layers and hash the first one."""
    content = rig.seal_content(PLAN, 7)
    hash_layer(DISK, rig.dirfd, LINEAGE, LAYER, UUID, late_runs(DISK, rig.dirfd, LAYER, UUID, []))
    return content


def damage(rig: Rig, chunk: int, at: int = 0, layer: int = LAYER) -> None:
    with (rig.directory / segment_name(layer, bytes([layer]) * 16, 0)).open("r+b") as file:
        file.seek(chunk * CHUNK + at)
        (value,) = file.read(1)
        file.seek(chunk * CHUNK + at)
        file.write(bytes([value ^ 4]))


def test_what_is_whole_is_copied_as_ever(rig, checks):
    content = sealed(rig)
    rig.start(leaves=checks)
    for offset, data in ((10, b"a"), (CHUNK - 1, b"bcd"), (5 * CHUNK + 4096, bytes(4096)), (SIZE - 1, b"z")):
        rig.write(offset, data)
        content[offset : offset + len(data)] = data
    assert rig.read(0, SIZE) == content
    assert rig.engine.statistics().copied_chunks == 4


def test_what_a_volume_shows_behind_its_old_end_is_zeros_after_a_checked_copy(rig, checks):
    sealed(rig)
    rig.start(leaves=checks)
    rig.write(20 * CHUNK, b"x")
    run_sync(rig.grow(22 * CHUNK))
    assert rig.read(SIZE, 2 * CHUNK - 3 * SECTOR) == bytes(2 * CHUNK - 3 * SECTOR)


@pytest.mark.parametrize("at", [0, 4095, 4096, CHUNK - 1])
def test_a_flipped_bit_fails_the_write_of_a_part_and_the_entry_stays(rig, checks, at):
    content = sealed(rig)
    damage(rig, 1, at)
    rig.start(leaves=checks)
    name = segment_name(LAYER, UUID, 0)
    for _ in range(2):  # it stays so
        with pytest.raises(StoreDamaged, match=f"{name} is damaged: chunk 1 of layer 1 has changed"):
            rig.write(CHUNK + 100, b"part")
        assert list(rig.live.entries[:3]) == [1, 1, 2]
    # Neighbours, other layers and the damaged chunk itself, when all of it is replaced, can be written.
    rig.write(100, b"part")
    content[100:104] = b"part"
    fresh = random.Random(1).randbytes(CHUNK)
    rig.write(CHUNK, fresh)
    content[CHUNK : 2 * CHUNK] = fresh
    rig.write(2 * CHUNK, b"q")
    content[2 * CHUNK] = ord("q")
    assert rig.read(0, SIZE) == content
    assert not rig.engine.failed


def test_zeros_into_a_part_of_a_damaged_chunk_fail_and_a_discard_of_all_of_it_does_not(rig, checks):
    content = sealed(rig)
    damage(rig, 5)
    rig.start(leaves=checks)
    with pytest.raises(StoreDamaged, match="chunk 5"):
        run_sync(rig.engine.write_zeroes(5 * CHUNK, 4096))
    run_sync(rig.engine.write_zeroes(5 * CHUNK, CHUNK))
    content[5 * CHUNK : 6 * CHUNK] = bytes(CHUNK)
    assert rig.read(0, SIZE) == content


def test_damage_behind_the_end_of_the_volume_counts_too(rig, checks):
    sealed(rig)
    damage(rig, 20, CHUNK - 1)
    rig.start(leaves=checks)
    with pytest.raises(StoreDamaged, match="chunk 20"):
        rig.write(20 * CHUNK, b"x")
    rig.write(20 * CHUNK, bytes(3 * SECTOR))  # all of it that lies in the volume


def test_plain_reads_are_not_compared_and_a_layer_without_leaves_is_not_either(rig, checks):
    content = sealed(rig)
    damage(rig, 0)
    damage(rig, 2, layer=2)
    rig.start(leaves=checks)
    assert rig.read(CHUNK, CHUNK) == content[CHUNK : 2 * CHUNK]
    assert rig.read(0, CHUNK) != content[:CHUNK]
    rig.write(2 * CHUNK + 8192, b"x")


@pytest.mark.parametrize("what", ["flip", "truncate", "remove"])
def test_a_damaged_leaf_file_fails_the_writes_that_need_it_and_names_itself(rig, checks, what):
    sealed(rig)
    path = rig.directory / leaf_file_name(LAYER, UUID)
    path.chmod(0o600)
    if what == "flip":
        raw = bytearray(path.read_bytes())
        raw[-40] ^= 1
        path.write_bytes(raw)
    elif what == "truncate":
        os.truncate(path, 100)
    else:
        path.unlink()
    rig.start(leaves=checks)
    for _ in range(2):
        with pytest.raises(StoreDamaged, match=r"\.leaves is damaged"):
            rig.write(1, b"x")
    rig.write(2 * CHUNK + 1, b"x")
    rig.write(0, bytes(CHUNK))


def test_a_layer_that_is_hashed_later_is_compared_from_then_on(rig, checks):
    sealed(rig)
    rig.start(leaves=checks)
    rig.write(2 * CHUNK, b"x")  # looked up: not hashed
    assert checks.leaf(2, 2) is None
    hash_layer(DISK, rig.dirfd, LINEAGE, 2, bytes([2]) * 16, Runs([(2, 3)]))
    assert checks.leaf(2, 2) is None
    checks.forget(2)
    checks.check(2, bytes([2]) * 16, 2, memoryview(segment_bytes(rig, 2)))
    with pytest.raises(StoreDamaged, match="chunk 2 of layer 2"):
        checks.check(2, bytes([2]) * 16, 2, memoryview(bytearray(CHUNK)))


def segment_bytes(rig: Rig, chunk: int) -> bytearray:
    with (rig.directory / segment_name(2, bytes([2]) * 16, 0)).open("rb") as file:
        file.seek(chunk * CHUNK)
        return bytearray(file.read(CHUNK))


def hashed_layers(rig: Rig, layers: int) -> bytearray:
    """Fill and hash layers 1 .. ``layers``; layer n holds chunk n - 1."""
    content = rig.seal_content({layer - 1: layer for layer in range(1, layers + 1)}, 4)
    for layer in range(1, layers + 1):
        uuid = bytes([layer]) * 16
        hash_layer(DISK, rig.dirfd, LINEAGE, layer, uuid, late_runs(DISK, rig.dirfd, layer, uuid, []))
    return content


def test_large_leaf_files_are_kept_open_up_to_a_limit(rig, monkeypatch):
    monkeypatch.setattr("ebsd.store.leaves.SMALL", 100)
    hashed_layers(rig, 2)
    checks = LeafChecks(DISK, rig.dirfd, LINEAGE, files=1)
    before = len(os.listdir("/proc/self/fd"))
    for layer in (1, 2, 1, 2):
        assert not checks.load_small(layer, bytes([layer]) * 16)
        checks.load(layer, bytes([layer]) * 16)()
        assert checks.leaf(layer, layer - 1) is not None
        assert not checks.knows(3 - layer)
        assert len(os.listdir("/proc/self/fd")) == before + 1
    checks.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_small_leaf_files_are_kept_in_memory_up_to_a_limit(tmp_path):
    rig = Rig(tmp_path, SIZE, layers=4)
    hashed_layers(rig, 3)
    one = ENTRY_BYTES + os.stat(rig.directory / leaf_file_name(1, bytes([1]) * 16)).st_size
    checks = LeafChecks(DISK, rig.dirfd, LINEAGE, files=0, memory=2 * one)
    before = len(os.listdir("/proc/self/fd"))
    for layer in (1, 2, 3):
        assert checks.load_small(layer, bytes([layer]) * 16)
        assert checks.leaf(layer, layer - 1) is not None
    assert [layer for layer in (1, 2, 3) if checks.knows(layer)] == [2, 3]
    checks.forget(2)
    assert checks.load_small(1, bytes([1]) * 16)
    assert [layer for layer in (1, 2, 3) if checks.knows(layer)] == [1, 3]
    assert len(os.listdir("/proc/self/fd")) == before
    rig.close()


class CountingDisk(RealDisk):
    def __init__(self) -> None:
        self.opened: list[str] = []

    def open(self, path, flags, mode=0o600, *, dir_fd=None):
        self.opened.append(os.fspath(path))
        return super().open(path, flags, mode, dir_fd=dir_fd)


def test_a_copy_out_of_yet_another_small_layer_opens_its_leaf_file_once_and_waits_for_no_thread(tmp_path):
    """What a write costs after thousands of snapshots: each of its first touches is of another layer."""
    rig = Rig(tmp_path, SIZE, layers=21)
    content = hashed_layers(rig, 20)
    disk = CountingDisk()
    uuids = {layer: bytes([layer]) * 16 for layer in range(1, 21)}
    checks = LeafChecks(disk, rig.dirfd, LINEAGE, read_slots(DISK, rig.dirfd, LINEAGE, uuids))

    def load(layer: int, uuid: bytes):
        raise AssertionError(f"layer {layer} was left to a thread")

    checks.load = load  # type: ignore[method-assign]
    rig.start(leaves=checks)
    for again in (0, 1):
        for chunk in range(20):
            rig.write(chunk * CHUNK + 5 + again, b"x")
            content[chunk * CHUNK + 5 + again] = ord("x")
    assert disk.opened == [leaf_file_name(layer, uuid) for layer, uuid in uuids.items()]
    assert rig.read(0, SIZE) == content
    checks.close()
    rig.close()


def test_slots_that_were_compared_with_a_root_are_not_read_again(rig):
    content = hashed_layers(rig, 1)
    slots = read_slots(DISK, rig.dirfd, LINEAGE, {1: UUID})
    damage(rig, 0)
    (rig.directory / leaf_file_name(1, UUID)).unlink()
    (rig.directory / "leaves").unlink()
    hash_layer(DISK, rig.dirfd, LINEAGE, 1, UUID, late_runs(DISK, rig.dirfd, 1, UUID, []))  # of the damaged chunk
    checks = LeafChecks(DISK, rig.dirfd, LINEAGE, slots)
    rig.start(leaves=checks)
    with pytest.raises(StoreDamaged, match="is not the leaf file that its layer was given"):
        rig.write(5, b"x")
    assert rig.read(CHUNK, CHUNK) == content[CHUNK : 2 * CHUNK]
    checks.close()


# --- hashing beside a device


def gently(rig: Rig, runs: Runs, requests, pauses: list[float]):
    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        await trio.sleep(0)

    return hash_layer_gently(
        DISK, TrioScheduler(), rig.dirfd, LINEAGE, LAYER, UUID, runs, requests=requests, sleep=sleep
    )


def test_a_layer_is_hashed_in_steps_with_pauses_while_there_are_requests(tmp_path):
    rig = Rig(tmp_path, 64 * CHUNK)
    rig.seal_content(dict.fromkeys(range(0, 50), 1), 3)
    counts = iter([0, 1, 1, 1, 5, 6, 6, 6])
    pauses: list[float] = []
    slot = trio.run(gently, rig, Runs([(0, 50)]), lambda: next(counts), pauses)
    assert [pause > 0 for pause in pauses] == [True, False, True, False]
    leaves = LeafFile.open(DISK, rig.dirfd, LINEAGE, LAYER, UUID, slot.digest)
    raw = (rig.directory / segment_name(LAYER, UUID, 0)).read_bytes()
    for chunk in range(50):
        assert leaves.digest_of(chunk) == leaf_digest(UUID, chunk, raw[chunk * CHUNK : (chunk + 1) * CHUNK])
    leaves.close()
    rig.close()


def test_a_cancelled_hashing_leaves_nothing(rig):
    rig.seal_content(PLAN, 7)

    async def main() -> None:
        with trio.CancelScope() as scope:
            await gently(rig, Runs([(0, 21)]), lambda: scope.cancel() or 0, [])

    trio.run(main)
    assert not [name for name in os.listdir(rig.directory) if "leaves" in name]


def test_a_temporary_file_that_is_tidied_away_is_written_again(rig):
    rig.seal_content(PLAN, 7)
    removed = []

    def requests() -> int:
        for path in rig.directory.glob(".*.tmp"):
            if not removed:
                removed.append(path)
                path.unlink()
        return 0

    slot = trio.run(gently, rig, Runs([(0, 2), (5, 6)]), requests, [])
    assert removed
    assert read_slots(DISK, rig.dirfd, LINEAGE, {LAYER: UUID}) == {LAYER: slot}


def test_two_that_hash_one_layer_at_once_agree(rig):
    rig.seal_content(PLAN, 7)
    slots = []
    threads = [
        threading.Thread(target=lambda runs=runs: slots.append(hash_layer(DISK, rig.dirfd, LINEAGE, LAYER, UUID, runs)))
        for runs in (Runs([(0, 2)]), Runs([(0, 2), (5, 6), (20, 21)]))
    ]
    # One process has one temporary name; two processes have two.
    threads[0].start()
    threads[0].join()
    threads[1].start()
    threads[1].join()
    assert slots[0] == slots[1]
    LeafFile.open(DISK, rig.dirfd, LINEAGE, LAYER, UUID, slots[0].digest).close()


def test_steps_are_a_mebibyte_and_end_at_segments():
    segment = 1 << 24
    assert list(steps([(0, 40), (segment - 2, segment + 2)])) == [
        (0, 16), (16, 32), (32, 40), (segment - 2, segment), (segment, segment + 2)
    ]  # fmt: skip
    assert 16 * CHUNK == MIB


def test_leaf_work_looks_at_no_slot_again_that_a_signed_root_is_over(rig):
    """After thousands of snapshots there are thousands, at each attachment, and a look at one writes it anew."""
    rig.seal_content(PLAN, 7)
    hash_all = [hash_layer(rig.disk, rig.dirfd, LINEAGE, n, bytes([n]) * 16, Runs([(0, 21)])) for n in (1, 2)]
    checks = LeafChecks(rig.disk, rig.dirfd, LINEAGE)

    def work(known: list[LeafSlot]) -> LeafWork:
        return LeafWork(
            rig.disk, rig.dirfd, LINEAGE, table=lambda: rig.table, checks=checks, requests=lambda: 0,
            sign=lambda body: b"", slots={slot.number: slot for slot in known},
        )  # fmt: skip

    entries = memoryview(bytes([1, 0, 0, 0, 2, 0, 0, 0])).cast("I")
    for known, writes in (([], True), (hash_all, False)):
        rig.disk.reset()
        leaf_work = work(known)
        leaf_work.add_missing(entries, rig.head)
        assert leaf_work.root({1, 2}) == leaf_root(hash_all)
        assert ("pwrite" in rig.disk.calls) is writes
    checks.close()
