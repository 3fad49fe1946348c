"""Leaf files, the leaf table and the root: what was written reads back, and every changed byte is refused."""

from __future__ import annotations

import fcntl
import hashlib
import os
import random
import struct
import subprocess
import threading
from pathlib import Path

import pytest
from engine_rig import LINEAGE, VOLUME, Died, FakeDisk
from hypothesis import given, settings
from hypothesis import strategies as st
from test_store_formats import documented
from test_store_sweep import Memory

from ebsd.domain.errors import StoreDamaged, UnsupportedFormat
from ebsd.domain.ids import LineageId, SnapshotId
from ebsd.domain.model import Cipher
from ebsd.domain.units import CHUNK, CHUNKS_PER_SEGMENT, SECTOR, SEGMENT
from ebsd.store.disk import RealDisk
from ebsd.store.entries import MAX_CHUNKS
from ebsd.store.layers import create_layer, segment_name
from ebsd.store.layertable import LayerEntry, LayerTable
from ebsd.store.layout import StateLayout
from ebsd.store.leaftable import LeafSlot, encode_leaf_table_header, encode_slot, leaf_root, publish, read_slots
from ebsd.store.leaves import (
    DIGEST,
    HEADER_BYTES,
    LeafFile,
    LeafWriter,
    Runs,
    encode_leaf_header,
    leaf_digest,
    leaf_file_name,
    merged_ranges,
    named_ranges,
    parse_leaf_file_name,
    remove_unfinished,
    stored_ranges,
)
from ebsd.store.sweep import Known, find_orphans, remove_orphans, sweep
from ebsd.volume.leafdigests import hash_chunks

DISK = RealDisk()
UUID = bytes(range(16))
OTHER = LineageId("00000000-9dad-41d1-80b4-00c04fd430c8")
REFUSED = (StoreDamaged, UnsupportedFormat)


@pytest.fixture
def directory(tmp_path):
    fd = os.open(tmp_path, os.O_RDONLY)
    yield tmp_path, fd
    os.close(fd)


@pytest.fixture(autouse=True, params=["in memory", "by descriptor"])
def small(request, monkeypatch):
    """How leaf files are read: small ones with one call, large ones piece by piece."""
    if request.param == "by descriptor":
        monkeypatch.setattr("ebsd.store.leaves.SMALL", 0)


def digest_for(chunk: int) -> bytes:
    return hashlib.sha256(chunk.to_bytes(8, "little")).digest()


def written(fd: int, ranges: list[tuple[int, int]], number: int = 1, uuid: bytes = UUID, disk=DISK) -> LeafSlot:
    """Publish a leaf file whose leaves tell their chunks."""
    writer = LeafWriter(disk, fd, LINEAGE, number, uuid, Runs(ranges))
    for first, end in Runs(ranges):
        for chunk in range(first, end):
            writer.add(digest_for(chunk))
    return publish(disk, fd, LINEAGE, number, uuid, writer)


def opened(fd: int, digest: bytes | None = None) -> LeafFile:
    return LeafFile.open(DISK, fd, LINEAGE, 1, UUID, digest)


def test_a_leaf_is_what_the_documentation_says():
    data = os.urandom(CHUNK)
    wanted = hashlib.sha256(b"ebsd/1/leaf\0" + UUID + struct.pack("<Q", 7) + data).digest()
    assert leaf_digest(UUID, 7, data) == wanted
    assert len({wanted, leaf_digest(UUID, 8, data), leaf_digest(bytes(16), 7, data)}) == 3
    with pytest.raises(ValueError, match="65536"):
        leaf_digest(UUID, 7, data[:-1])


def test_the_worked_examples_of_the_documentation_are_what_the_code_writes(directory):
    root, fd = directory
    writer = LeafWriter(DISK, fd, LINEAGE, 1, UUID, Runs([(0, 1), (2, 3)]))
    for chunk in (0, 2):
        writer.add(leaf_digest(UUID, chunk, bytes([chunk]) * CHUNK))
    slot = publish(DISK, fd, LINEAGE, 1, UUID, writer)
    assert (root / leaf_file_name(1, UUID)).read_bytes() == documented("leaves", 128 + 16 + 64 + 32)
    assert (root / "leaves").read_bytes() == documented("leaftable", 128)
    text = (Path(__file__).parents[2] / "ebsd/store/FORMAT.md").read_text()
    digits = leaf_root([slot]).hex()
    assert " ".join(digits[at : at + 8] for at in range(0, 64, 8)) in text


RANGES = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 700)), max_size=20)


def ranges_of(plan: list[tuple[int, int]]) -> list[tuple[int, int]]:
    ranges, at = [], 0
    for gap, length in plan:
        ranges.append((at + gap, at + gap + length))
        at += gap + length
    return ranges


@settings(max_examples=30, deadline=None)
@given(plan=RANGES)
def test_what_was_written_is_found_and_nothing_else(plan, tmp_path_factory):
    ranges = ranges_of(plan)
    root = tmp_path_factory.mktemp("leaves")
    fd = os.open(root, os.O_RDONLY)
    try:
        slot = written(fd, ranges)
        leaves = opened(fd, slot.digest)
        try:
            covered = {chunk for first, end in ranges for chunk in range(first, end)}
            assert leaves.chunks == len(covered)
            for chunk in {0, 1, MAX_CHUNKS - 1, *covered, *(end for _, end in ranges), *(f - 1 for f, _ in ranges)}:
                assert leaves.digest_of(chunk) == (digest_for(chunk) if chunk in covered else None)
        finally:
            leaves.close()
        assert sorted(os.listdir(root)) == [leaf_file_name(1, UUID), "leaves"]
    finally:
        os.close(fd)


def test_many_runs_are_looked_up_a_page_at_a_time(directory):
    root, fd = directory
    ranges = [(3 * at, 3 * at + 1 + at % 2) for at in range(3000)]
    leaves = opened(fd, written(fd, ranges).digest)
    dice = random.Random(1)
    covered = {chunk for first, end in ranges for chunk in range(first, end)}
    for chunk in [*range(1530, 1545), *dice.sample(range(9100), 2000), 0, 8998, 8999, 9000]:
        assert leaves.digest_of(chunk) == (digest_for(chunk) if chunk in covered else None)
    leaves.close()
    assert (root / leaf_file_name(1, UUID)).stat().st_size == 160 + 8 * 3000 + 32 * len(covered)
    assert (root / leaf_file_name(1, UUID)).stat().st_size < 40 * len(covered)


def test_runs_join_what_touches_and_refuse_what_overlaps():
    assert list(Runs([(0, 2), (2, 3), (5, 6)])) == [(0, 3), (5, 6)]
    assert list(Runs([])) == []
    for wrong in ([(0, 2), (1, 3)], [(3, 3)], [(5, 6), (0, 1)], [(0, MAX_CHUNKS + 1)], [(-1, 1)]):
        with pytest.raises(ValueError, match="chunks"):
            Runs(wrong)


@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.sampled_from([0, 1, 2, 0x0100]), min_size=1, max_size=60), repeat=st.integers(1, 900))
def test_the_chunks_of_a_layer_are_read_from_a_map(values, repeat):
    wide = [value for value in values for _ in range(repeat)]
    entries = memoryview(b"".join(value.to_bytes(4, "little") for value in wide)).cast("I")
    found = [chunk for first, end in Runs(named_ranges(entries, 1)) for chunk in range(first, end)]
    assert found == [chunk for chunk, value in enumerate(wide) if value == 1]


def test_ranges_are_merged():
    one, other = [(0, 2), (4, 6), (9, 10)], [(1, 3), (5, 9), (20, 21)]
    assert list(merged_ranges(one, other)) == [(0, 3), (4, 10), (20, 21)]
    assert list(merged_ranges([], [])) == []


def test_the_chunks_that_hold_data_are_found_in_all_segments(directory):
    root, fd = directory
    create_layer(DISK, fd, 1, UUID, SEGMENT + 20 * CHUNK)
    for chunk in (0, 3, 4, CHUNKS_PER_SEGMENT - 1, CHUNKS_PER_SEGMENT, CHUNKS_PER_SEGMENT + 19):
        with (root / segment_name(1, UUID, chunk // CHUNKS_PER_SEGMENT)).open("r+b") as file:
            file.seek(chunk % CHUNKS_PER_SEGMENT * CHUNK)
            file.write(os.urandom(CHUNK))
    found = Runs(stored_ranges(DISK, fd, 1, UUID))
    border = CHUNKS_PER_SEGMENT
    assert list(found) == [(0, 1), (3, 5), (border - 1, border + 1), (border + 19, border + 20)]
    with pytest.raises(StoreDamaged, match="missing"):
        list(stored_ranges(DISK, fd, 2, UUID))
    (leaf,) = hash_chunks(DISK, fd, 1, UUID, 3, 4, memoryview(bytearray(CHUNK)))
    with (root / segment_name(1, UUID, 0)).open("rb") as file:
        file.seek(3 * CHUNK)
        assert leaf == leaf_digest(UUID, 3, file.read(CHUNK))


# --- damaged and hostile files


def test_every_flipped_bit_of_a_leaf_file_is_refused(directory):
    root, fd = directory
    slot = written(fd, [(0, 2), (5, 6)])
    path = root / leaf_file_name(1, UUID)
    raw = path.read_bytes()
    path.chmod(0o600)
    for at in range(len(raw)):
        changed = bytearray(raw)
        changed[at] ^= 1 << at % 8
        path.write_bytes(changed)
        with pytest.raises(REFUSED):
            opened(fd, slot.digest)
    for length in range(0, len(raw), 7):
        path.write_bytes(raw[:length])
        with pytest.raises(StoreDamaged):
            opened(fd)
    path.write_bytes(raw + b"\0")
    with pytest.raises(StoreDamaged):
        opened(fd)
    path.write_bytes(raw)
    opened(fd, slot.digest).close()


def hostile(header: bytes, pairs: list[tuple[int, int]], leaves: int) -> bytes:
    """A leaf file with right checksums and any contents."""
    body = header + b"".join(struct.pack("<II", *pair) for pair in pairs) + bytes(DIGEST * leaves)
    return body + hashlib.sha256(body).digest()


@pytest.mark.parametrize(
    ("runs", "chunks", "pairs", "leaves"),
    [
        (2**63, 2**63, [], 0),
        (2**64 - 1, 2**64 - 1, [(0, 0)], 1),
        (1, MAX_CHUNKS + 1, [(0, 0)], 1),
        (2, 1, [(0, 0), (5, 1)], 1),
        (0, 1, [], 1),
        (1, 0, [(0, 0)], 0),
        (1, 2, [(0, 1)], 2),
        (2, 2, [(0, 0), (0, 1)], 2),
        (2, 2, [(0, 0), (1, 1)], 2),
        (2, 3, [(0, 0), (5, 0)], 3),
        (2, 3, [(9, 0), (5, 1)], 3),
        (2, 2, [(0, 0), (5, 2)], 2),
        (2, 3, [(0, 0), (2, 2)], 3),
        (1, 2, [(MAX_CHUNKS - 1, 0)], 2),
        (1, 1, [(2**32 - 1, 0)], 1),
        (3, 3, [(0, 0), (9, 2**31), (20, 2)], 3),
    ],
)
def test_counts_and_runs_that_cannot_be_are_refused_before_they_are_used(directory, runs, chunks, pairs, leaves):
    root, fd = directory
    header = encode_leaf_header(LINEAGE, 1, UUID, runs, chunks)
    (root / leaf_file_name(1, UUID)).write_bytes(hostile(header, pairs, leaves))
    with pytest.raises(StoreDamaged):
        opened(fd)


def resummed(header: bytes, at: int, value: bytes) -> bytes:
    raw = bytearray(header)
    raw[at : at + len(value)] = value
    return bytes(raw[:96]) + hashlib.sha256(raw[:96]).digest()


@pytest.mark.parametrize(
    ("at", "value", "error", "words"),
    [
        (0, b"X", StoreDamaged, "not a leaf file"),
        (8, b"\2", UnsupportedFormat, "version 2"),
        (12, b"\1", UnsupportedFormat, "feature flags 0x1"),
        (16, b"\0", StoreDamaged, "another layer"),
        (32, b"\2", StoreDamaged, "another layer"),
        (36, b"\1", StoreDamaged, "reserved"),
        (40, b"\1", StoreDamaged, "another layer"),
        (95, b"\1", StoreDamaged, "reserved"),
    ],
)
def test_a_header_of_another_layer_or_version_is_refused_by_name(directory, at, value, error, words):
    root, fd = directory
    header = resummed(encode_leaf_header(LINEAGE, 1, UUID, 1, 1), at, value)
    (root / leaf_file_name(1, UUID)).write_bytes(hostile(header, [(0, 0)], 1))
    with pytest.raises(error, match=words):
        opened(fd)


def test_what_is_no_file_is_refused(directory):
    root, fd = directory
    path = root / leaf_file_name(1, UUID)
    with pytest.raises(StoreDamaged, match="missing"):
        opened(fd)
    path.symlink_to("/etc/passwd")
    with pytest.raises(StoreDamaged, match="regular"):
        opened(fd)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(StoreDamaged, match="regular"):
        opened(fd)
    path.unlink()
    path.mkdir()
    with pytest.raises(StoreDamaged, match="regular"):
        opened(fd)


def test_another_leaf_file_than_the_slot_says_is_refused(directory):
    root, fd = directory
    slot = written(fd, [(0, 2)])
    (root / leaf_file_name(1, UUID)).unlink()
    (root / "leaves").unlink()
    written(fd, [(0, 3)])
    with pytest.raises(StoreDamaged, match="not the leaf file"):
        opened(fd, slot.digest)


def test_names_of_leaf_files():
    assert parse_leaf_file_name(leaf_file_name(7, UUID)) == (7, UUID)
    for wrong in ("table", "leaves", segment_name(7, UUID, 0), f"0000000000-{UUID.hex()}.leaves", "x.leaves"):
        assert parse_leaf_file_name(wrong) is None
    with pytest.raises(ValueError, match="no layer"):
        leaf_file_name(0, UUID)


# --- the table


def test_slots_are_set_in_any_order_and_only_once(directory):
    root, fd = directory
    uuids = {n: bytes([n]) * 16 for n in range(1, 6)}
    assert read_slots(DISK, fd, LINEAGE, uuids) == {}
    third = written(fd, [(0, 1)], 3, uuids[3])
    first = written(fd, [(1, 2)], 1, uuids[1])
    assert read_slots(DISK, fd, LINEAGE, uuids) == {1: first, 3: third}
    # Another process hashed the same layer, and was slower.
    assert written(fd, [(0, 2)], 3, uuids[3]) == third
    LeafFile.open(DISK, fd, LINEAGE, 3, uuids[3], third.digest).close()
    assert not [name for name in os.listdir(root) if name.startswith(".")]
    with pytest.raises(StoreDamaged, match="another lineage"):
        read_slots(DISK, fd, OTHER, uuids)


def test_every_flipped_bit_of_the_table_is_refused(directory):
    root, fd = directory
    written(fd, [(0, 1)], 2)
    path = root / "leaves"
    raw = path.read_bytes()
    for at in [*range(64), *range(128, 192)]:
        changed = bytearray(raw)
        changed[at] ^= 1 << at % 8
        path.write_bytes(changed)
        with pytest.raises(REFUSED):
            read_slots(DISK, fd, LINEAGE, {2: UUID})
    path.write_bytes(raw[:-1])
    with pytest.raises(StoreDamaged):
        read_slots(DISK, fd, LINEAGE, {2: UUID})
    path.write_bytes(bytes(64) + raw[64:])
    with pytest.raises(StoreDamaged, match="no header"):
        read_slots(DISK, fd, LINEAGE, {2: UUID})
    path.write_bytes(raw)
    with pytest.raises(StoreDamaged, match="place of layer 2"):
        read_slots(DISK, fd, LINEAGE, {2: bytes(16)})
    slot = bytearray(encode_slot(LeafSlot(2, UUID, bytes(32))))
    slot[4] = 1
    path.write_bytes(raw[:128] + bytes(slot[:56]) + hashlib.sha256(slot[:56]).digest()[:8])
    with pytest.raises(UnsupportedFormat, match="flags"):
        read_slots(DISK, fd, LINEAGE, {2: UUID})
    path.unlink()
    path.symlink_to("/etc/passwd")
    with pytest.raises(StoreDamaged, match="regular"):
        read_slots(DISK, fd, LINEAGE, {2: UUID})


def test_a_table_that_a_power_cut_left_without_bytes_is_begun_anew(directory):
    root, fd = directory
    for left in (b"", bytes(64), bytes(192)):
        (root / "leaves").write_bytes(left)
        assert read_slots(DISK, fd, LINEAGE, {2: UUID}) == {}
    slot = written(fd, [(0, 1)], 2)
    assert read_slots(DISK, fd, LINEAGE, {2: UUID}) == {2: slot}
    assert (root / "leaves").read_bytes()[:64] == encode_leaf_table_header(LINEAGE)


def test_the_root_depends_on_every_layer_and_not_on_the_order():
    slots = [LeafSlot(n, bytes([n]) * 16, bytes([n]) * 32) for n in (1, 2, 200)]
    assert leaf_root(slots) == leaf_root(reversed(slots))
    assert len({leaf_root(slots), leaf_root(slots[:2]), leaf_root([]), leaf_root([slots[0]])}) == 4
    wanted = hashlib.sha256(
        b"ebsd/1/leaf-root\0" + b"".join(struct.pack("<I", s.number) + s.digest for s in slots)
    ).digest()
    assert leaf_root(slots) == wanted


def test_publishing_waits_for_the_lock_of_the_table(directory):
    root, fd = directory
    written(fd, [(0, 1)], 1)
    held = os.open(root / "leaves", os.O_RDWR)
    fcntl.flock(held, fcntl.LOCK_EX)
    thread = threading.Thread(target=written, args=(fd, [(0, 1)], 2))
    thread.start()
    thread.join(0.05)
    assert thread.is_alive()
    assert read_slots(DISK, fd, LINEAGE, {2: UUID}) == {}
    os.close(held)
    thread.join()
    assert set(read_slots(DISK, fd, LINEAGE, {2: UUID})) == {2}


def test_a_writer_whose_temporary_file_was_removed_fails_and_can_be_repeated(directory):
    root, fd = directory
    writer = LeafWriter(DISK, fd, LINEAGE, 1, UUID, Runs([(0, 1)]))
    writer.add(bytes(32))
    (root / writer.temporary).unlink()
    with pytest.raises(FileNotFoundError):
        publish(DISK, fd, LINEAGE, 1, UUID, writer)
    assert read_slots(DISK, fd, LINEAGE, {1: UUID}) == {}
    written(fd, [(0, 1)])


def test_a_writer_wants_exactly_its_leaves(directory):
    root, fd = directory
    writer = LeafWriter(DISK, fd, LINEAGE, 1, UUID, Runs([(0, 2)]))
    writer.add(bytes(32))
    with pytest.raises(ValueError, match="1 leaves are missing"):
        publish(DISK, fd, LINEAGE, 1, UUID, writer)
    writer = LeafWriter(DISK, fd, LINEAGE, 1, UUID, Runs([]))
    with pytest.raises(ValueError, match="too many"):
        writer.add(bytes(32))
    writer.abandon()
    assert os.listdir(root) == []


@pytest.mark.parametrize("cut_power", [False, True])
def test_a_death_at_any_call_leaves_no_slot_without_its_file(tmp_path, cut_power):
    for step in range(1, 60):
        root = tmp_path / str(step)
        root.mkdir()
        fd = os.open(root, os.O_RDONLY)
        disk = FakeDisk()
        disk.die_at = step
        died = False
        try:
            written(fd, [(0, 3), (9, 10)], disk=disk)
        except Died:
            died = True
        disk.reset()
        if cut_power:
            disk.cut_power(random.Random(step))
        slots = read_slots(DISK, fd, LINEAGE, {1: UUID})
        if slots:
            LeafFile.open(DISK, fd, LINEAGE, 1, UUID, slots[1].digest).close()
        slot = written(fd, [(0, 3), (9, 10)])  # the next process repeats it
        LeafFile.open(DISK, fd, LINEAGE, 1, UUID, slot.digest).close()
        os.close(fd)
        if not died:
            assert slots
            return
    raise AssertionError("it never ended")


# --- the sweep


def test_a_leaf_file_goes_with_its_layer_and_its_slot_stays(directory):
    root, fd = directory
    uuids = {n: bytes([n]) * 16 for n in (1, 2, 3)}
    table = LayerTable(LINEAGE, SECTOR, Cipher.AES_256_XTS, tuple(LayerEntry(n, u, VOLUME) for n, u in uuids.items()))
    for number, uuid in uuids.items():
        create_layer(DISK, fd, number, uuid, 4 * CHUNK)
        written(fd, [(0, 1)], number, uuid)
    # A death between the two removals, or a process that was still hashing a layer that is gone.
    (root / segment_name(3, uuids[3], 0)).unlink()
    report = sweep(DISK, fd, table, protected=(), maps=[Memory([0, 1, 0, 0])])
    assert set(report.removed) == {2, 3}
    assert sorted(os.listdir(root)) == [segment_name(1, uuids[1], 0), leaf_file_name(1, uuids[1]), "leaves"]
    assert set(read_slots(DISK, fd, LINEAGE, uuids)) == {1, 2, 3}


def test_leaf_files_that_no_row_names_are_orphans(tmp_path):
    layout = StateLayout(tmp_path / "state")
    layout.create(DISK)
    for lineage in (LINEAGE, OTHER):
        directory = layout.create_lineage(DISK, lineage)
        for name in ("table", "leaves", leaf_file_name(1, UUID), leaf_file_name(2, UUID)):
            (directory / name).write_bytes(b"x")
    known = Known({LINEAGE: [(1, UUID)]}, [SnapshotId("snap-0123456789abcdef0")])
    orphans = find_orphans(DISK, layout, lambda: known)
    remove_orphans(DISK, orphans)
    assert sorted(os.listdir(layout.lineage(LINEAGE))) == [leaf_file_name(1, UUID), "leaves", "table"]
    assert not layout.lineage(OTHER).exists()
    assert HEADER_BYTES == 128


@pytest.mark.parametrize("waited_for", [True, False], ids=["gone", "zombie"])
def test_what_a_dead_process_was_hashing_is_removed_and_what_a_living_one_hashes_stays(tmp_path, waited_for):
    dead = subprocess.Popen(["true"])
    os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)
    if waited_for:
        dead.wait()
    living = subprocess.Popen(["sleep", "60"])
    try:
        names = {pid: f".{leaf_file_name(1, bytes(range(16)))}.{pid}.tmp" for pid in (dead.pid, living.pid)}
        for name in (*names.values(), "table", ".other.tmp"):
            (tmp_path / name).touch()
        dirfd = os.open(tmp_path, os.O_RDONLY)
        try:
            remove_unfinished(RealDisk(), dirfd)
        finally:
            os.close(dirfd)
        assert sorted(os.listdir(tmp_path)) == sorted((names[living.pid], "table", ".other.tmp"))
    finally:
        living.kill()
        living.wait()
        dead.wait()
