"""Sealed maps: complete or refused, and never inflated beyond what their chunk count allows."""

from __future__ import annotations

import hashlib
import random
import struct
import zlib

import pytest

from ebsd.domain.errors import StoreDamaged, UnsupportedFormat
from ebsd.domain.ids import LineageId, SnapshotId
from ebsd.store.disk import RealDisk
from ebsd.store.entries import map_hash
from ebsd.store.mapframes import FRAME
from ebsd.store.sealedmap import (
    BLOCK,
    SealedMapReader,
    encode_sealed_map,
    parse_sealed_map,
    read_sealed_map,
    write_sealed_map,
)

LINEAGE = LineageId("6ba7b810-9dad-41d1-80b4-00c04fd430c8")
SNAPSHOT = SnapshotId("snap-0123456789abcdef0")
REFUSED = (StoreDamaged, UnsupportedFormat)


def entries(chunks: int, seed: int = 1) -> memoryview:
    dice = random.Random(seed)
    view = memoryview(bytearray(chunks * 4)).cast("I")
    for chunk in range(0, chunks, 3):
        view[chunk] = dice.randrange(1, 9)
    return view


@pytest.mark.parametrize("chunks", [1, 16_383, 16_384, 16_385, 50_000])
def test_a_sealed_map_reads_back(tmp_path, chunks):
    view = entries(chunks)
    digest = write_sealed_map(RealDisk(), tmp_path / "m", SNAPSHOT, LINEAGE, view, chunks)
    found = read_sealed_map(RealDisk(), tmp_path / "m", SNAPSHOT, most_chunks=chunks)
    assert (found.snapshot, found.lineage, found.chunks) == (SNAPSHOT, LINEAGE, chunks)
    assert found.entries == view
    assert found.hash() == digest == map_hash(view, chunks)
    if chunks > 1:
        with pytest.raises(StoreDamaged):
            read_sealed_map(RealDisk(), tmp_path / "m", SNAPSHOT, most_chunks=chunks - 1)


def test_entries_that_do_not_compress_fit_too():
    view = memoryview(bytearray(random.Random(1).randbytes(3 * FRAME + 4))).cast("I")
    assert parse_sealed_map(encode_sealed_map(SNAPSHOT, LINEAGE, view, len(view)), SNAPSHOT, file="f").entries == view


def test_every_changed_byte_and_every_cut_of_a_sealed_map_is_refused():
    raw = encode_sealed_map(SNAPSHOT, LINEAGE, entries(400), 400)
    for at in range(len(raw)):
        changed = bytearray(raw)
        changed[at] ^= 0x20
        with pytest.raises(REFUSED):
            parse_sealed_map(changed, SNAPSHOT, file="f")
        with pytest.raises(REFUSED):
            parse_sealed_map(raw[:at], SNAPSHOT, file="f")
    with pytest.raises(StoreDamaged):
        parse_sealed_map(raw, SnapshotId("snap-0123456789abcdef1"), file="f")


def with_frames(frames: list[bytes], chunks: int, *, version: int = 1, **over: object) -> bytes:
    """A sealed map of these frames. Version 1, which is read and not written any more: each is one zlib stream."""
    front = bytearray(encode_sealed_map(SNAPSHOT, LINEAGE, entries(chunks), chunks)[:480])
    front[8:12] = struct.pack("<I", version)
    raw = bytes(front) + hashlib.sha256(front).digest()
    index = [512]
    for frame in frames:
        index.append(index[-1] + len(frame))
    index = over.get("index", index)  # type: ignore[assignment]
    body = raw + b"".join(frames) + bytes(over.get("gap", 0)) + b"".join(struct.pack("<Q", at) for at in index)
    trailer = struct.pack("<8s24sQ", b"EBSDMEND", SNAPSHOT.encode(), len(body) + 72)
    return body + trailer + hashlib.sha256(body).digest()


def version_1(view: memoryview) -> bytes:
    raw = view.cast("B")
    return with_frames([zlib.compress(raw[at : at + BLOCK]) for at in range(0, len(raw), BLOCK)], len(view))


@pytest.mark.parametrize("chunks", [1, 16_383, 16_384, 16_385, 300_000])
@pytest.mark.parametrize("version", [1, 2])
def test_maps_of_both_versions_are_read_in_whole_and_in_blocks(tmp_path, chunks, version):
    view = entries(chunks)
    raw = version_1(view) if version == 1 else encode_sealed_map(SNAPSHOT, LINEAGE, view, chunks)
    assert int.from_bytes(raw[8:12], "little") == version
    (tmp_path / "m").write_bytes(raw)
    assert read_sealed_map(RealDisk(), tmp_path / "m", SNAPSHOT, most_chunks=chunks).entries == view
    reader = SealedMapReader(RealDisk(), tmp_path / "m", SNAPSHOT)
    blocks = [reader.block(number) for number in range(-(-chunks * 4 // BLOCK))]
    reader.close()
    assert {len(block) for block in blocks[:-1]} <= {BLOCK}
    assert b"".join(blocks) == view.cast("B")


def test_a_version_of_later_is_named():
    with pytest.raises(UnsupportedFormat, match="version 3"):
        parse_sealed_map(with_frames([b"x"], 100, version=3), SNAPSHOT, file="f")


def test_a_damaged_frame_is_named_by_its_number(tmp_path):
    good = struct.pack("<II", 1, 0)
    raw = with_frames([good, struct.pack("<II", 7, 0)], 300_000, version=2)
    with pytest.raises(StoreDamaged, match="frame 1 is of kind 7"):
        parse_sealed_map(raw, SNAPSHOT, file="f")
    (tmp_path / "m").write_bytes(raw)
    reader = SealedMapReader(RealDisk(), tmp_path / "m", SNAPSHOT)
    assert reader.block(15) == bytes(BLOCK)
    with pytest.raises(StoreDamaged, match="frame 1 is of kind 7"):
        reader.block(16)
    reader.close()


def test_a_frame_that_is_longer_than_any_has_an_impossible_place():
    for version, most in ((1, BLOCK + 1024), (2, FRAME + 1024)):
        with pytest.raises(StoreDamaged, match="impossible place"):
            parse_sealed_map(with_frames([bytes(most + 1)], 100, version=version), SNAPSHOT, file="f")


def test_a_frame_that_inflates_to_too_much_or_too_little_is_refused_with_little_memory():
    import tracemalloc

    good = zlib.compress(bytes(400))
    assert parse_sealed_map(with_frames([good], 100), SNAPSHOT, file="f").chunks == 100
    bomb = zlib.compress(bytes(50_000_000))
    tracemalloc.start()
    for frame in (bomb, zlib.compress(bytes(401)), zlib.compress(bytes(399)), good + b"x", good[:-1], b"x", b""):
        with pytest.raises(StoreDamaged):
            parse_sealed_map(with_frames([frame], 100), SNAPSHOT, file="f")
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()


def test_frames_must_follow_each_other_without_gaps():
    good = zlib.compress(bytes(400))
    for over in ({"gap": 8}, {"index": [511, 512 + len(good)]}, {"index": [512, 2**63]}, {"index": [512, 512]}):
        with pytest.raises(StoreDamaged):
            parse_sealed_map(with_frames([good], 100, **over), SNAPSHOT, file="f")
