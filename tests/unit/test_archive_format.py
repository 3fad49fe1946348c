"""Archives: what was written reads back; every byte that was changed, cut, moved or added is found; golden bytes."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ebsd.crypto.secret import Secret
from ebsd.domain.errors import ArchiveDamaged, UnsupportedFormat
from ebsd.domain.model import Cipher
from ebsd.domain.units import CHUNK, MIB
from ebsd.store.archive import (
    FRAME_CHUNKS,
    FRAME_HEADER,
    FRAME_RUNS,
    PRELUDE_BYTES,
    Base,
    ChunkRun,
    Manifest,
    archive_context,
    encode_manifest,
    encode_runs,
    manifest_length,
    parse_manifest,
    parse_runs,
    planned_frames,
)
from ebsd.volume.archivestream import ArchiveReader, ArchiveWriter

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "archive-1.ebsd"
GOLDEN_SHA256 = "3c4f3be771ab5a6ec50f81bea7b085a3efc24462da38bbdb88e20387dc18c538"
ARCHIVE = "00112233-4455-4677-8899-aabbccddeeff"
SNAPSHOT = "snap-0123456789abcdef0"
KEY = bytes(range(64))


def manifest(
    *, data: int = 5, holes: int = 2, size: int = 8 * MIB, incremental: bool = True, **changes: object
) -> Manifest:
    members: dict[str, object] = {
        "archive": ARCHIVE,
        "snapshot": SNAPSHOT,
        "volume": "vol-0123456789abcdef0",
        "account": "000000001000",
        "owner": "ada",
        "name": "monday",
        "description": "für später",
        "started": "2026-11-20T10:00:00.000Z",
        "created": "2026-11-21T10:00:00.000Z",
        "size": size,
        "cipher": Cipher.AES_256_XTS,
        "content": bytes(range(32)),
        "base": Base("snap-0123456789abcdef1", bytes(range(32, 64))) if incremental else None,
        "data_chunks": data,
        "hole_chunks": holes if incremental else 0,
        "key_arn": "arn:aws:kms:local:000000001000:key/0f1e2d3c-0000-4000-8000-000000000000",
        "blob": bytes(range(200)),
        "context": archive_context(ARCHIVE, SNAPSHOT),
        **changes,
    }
    return Manifest(**members)  # type: ignore[arg-type]


RUNS = [ChunkRun(0, 2, False), ChunkRun(3, 2, True), ChunkRun(10, 3, False)]


def salts() -> Iterator[bytes]:
    number = 0
    while True:
        yield bytes([0xA0 + number]) * 16
        number += 1


def chunk_of(number: int) -> bytes:
    return (b"%016d" % number) * (CHUNK // 16)


def written(path: Path, told: Manifest, frames: list[list[ChunkRun]], key: bytes = KEY) -> bytes:
    """Write an archive and return its bytes."""
    stream = salts()
    with path.open("wb", buffering=0) as file, Secret.from_buffer(key) as secret:
        writer = ArchiveWriter(file.fileno(), secret, told, lambda _: next(stream))
        writer.begin()
        for runs in frames:

            def fill(view: memoryview, runs: list[ChunkRun] = runs) -> None:
                view[:] = b"".join(
                    chunk_of(number)
                    for run in runs
                    if not run.is_hole
                    for number in range(run.first, run.first + run.chunks)
                )

            writer.add(runs, fill)
        digest = writer.finish()
        writer.close()
    raw = path.read_bytes()
    assert raw[-32:] == digest
    return raw


def read(raw: bytes, key: bytes | None = KEY) -> tuple[Manifest, dict[int, bytes], list[ChunkRun]]:
    """Return manifest, chunks with data, and all runs, of an archive in memory."""
    fd = os.memfd_create("archive")
    try:
        with os.fdopen(os.dup(fd), "wb") as file:
            file.write(raw)
        os.lseek(fd, 0, os.SEEK_SET)
        reader = ArchiveReader(fd)
        told = reader.read_header()
        if key is not None:
            secret = Secret.from_buffer(key)  # borrowed until the last frame
            reader.unlock(secret)
        chunks: dict[int, bytes] = {}
        seen: list[ChunkRun] = []
        for frame in reader.frames():
            at = 0
            for run in frame.runs:
                seen.append(run)
                for number in range(run.first, run.first + run.chunks) if not run.is_hole else ():
                    chunks[number] = bytes(frame.data[at : at + CHUNK])
                    at += CHUNK
        assert reader.ended
        reader.close()
        return told, chunks, seen
    finally:
        os.close(fd)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An archive with one frame of holes alone, so that every byte of it can be flipped."""
    place = tmp_path_factory.mktemp("archive") / "small"
    return written(place, manifest(data=0), [[ChunkRun(3, 2, True)]])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return written(tmp_path_factory.mktemp("archive") / "whole", manifest(), [RUNS[:2], RUNS[2:]])


def frames_of(raw: bytes) -> list[tuple[int, int]]:
    """Return (start, end) of every frame."""
    at = PRELUDE_BYTES + manifest_length(raw[:PRELUDE_BYTES]) + 96
    places = []
    while at < len(raw):
        end = at + FRAME_HEADER + int.from_bytes(raw[at + 16 : at + 20], "little") + 16 + 32
        places.append((at, end))
        at = end
    return places


def refused(raw: bytes, key: bytes | None = KEY) -> str:
    with pytest.raises((ArchiveDamaged, UnsupportedFormat)) as caught:
        read(raw, key)
    assert caught.value.exit_status == 7
    return caught.value.message


def test_what_was_written_reads_back(whole: bytes) -> None:
    told, chunks, runs = read(whole)
    assert told == manifest()
    assert runs == RUNS
    assert chunks == {number: chunk_of(number) for number in (0, 1, 10, 11, 12)}


def test_without_a_key_only_checksums_are_looked_at(whole: bytes) -> None:
    told, chunks, runs = read(whole, None)
    assert (told, chunks, runs) == (manifest(), {}, [])


def test_nothing_of_the_plaintext_is_in_an_archive(whole: bytes) -> None:
    assert b"%016d" % 10 not in whole


def test_every_flipped_byte_of_a_small_archive_is_found_with_its_key_and_by_its_checksums(small: bytes) -> None:
    for at in range(len(small)):
        for flip in (0x01, 0x80):
            changed = bytearray(small)
            changed[at] ^= flip
            refused(bytes(changed))
            refused(bytes(changed), None)


def test_random_flipped_bits_of_an_archive_with_data_are_found(whole: bytes) -> None:
    dice = random.Random(17)
    for _ in range(200):
        changed = bytearray(whole)
        changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
        refused(bytes(changed))


def with_checksums(raw: bytes) -> bytes:
    """Return an archive whose checksums are right: what somebody without the key can make."""
    from ebsd.store.archive import frame_digest, header_digest

    signed = PRELUDE_BYTES + manifest_length(raw[:PRELUDE_BYTES])
    digest = header_digest(raw[:signed], raw[signed : signed + 64])
    out = bytearray(raw[: signed + 64] + digest)
    for start, end in frames_of(raw):
        header, sealed = raw[start : start + FRAME_HEADER], raw[start + FRAME_HEADER : end - 32]
        digest = frame_digest(digest, header, memoryview(sealed))
        out += header + sealed + digest
    return bytes(out)


def test_right_checksums_help_nobody_who_lacks_the_key(small: bytes) -> None:
    """Every byte of what an attacker can change, with all checksums made right again."""
    frames = frames_of(small)
    signed = PRELUDE_BYTES + manifest_length(small[:PRELUDE_BYTES])
    places = [*range(PRELUDE_BYTES, signed + 64)]
    for start, end in frames:
        places += [*range(start + 20, end - 32)]
    unkeyed = 0
    for at in places:
        changed = bytearray(small)
        changed[at] ^= 0x01
        fixed = with_checksums(bytes(changed))
        refused(fixed)
        try:
            read(fixed, None)
            unkeyed += 1
        except (ArchiveDamaged, UnsupportedFormat):
            pass
    assert unkeyed > 100, "the checksums were right, so it was the key that found it"


def test_truncation_is_found_at_every_frame_and_within(whole: bytes) -> None:
    for cut in [
        0,
        1,
        PRELUDE_BYTES,
        *(place for span in frames_of(whole) for place in (span[0], span[0] + 60, span[1] - 1)),
    ]:
        assert refused(whole[:cut])
        assert refused(whole[:cut], None)


def test_what_follows_the_end_is_found(whole: bytes) -> None:
    assert "follows" in refused(whole + b"\0")
    start, end = frames_of(whole)[-1]
    assert "follows" in refused(whole + whole[start:end])


def test_frames_in_another_order_twice_or_left_out_are_found(whole: bytes) -> None:
    (a, b), (c, d), (e, f) = frames_of(whole)
    head, first, second, last = whole[:a], whole[a:b], whole[c:d], whole[e:f]
    for order in ([second, first, last], [first, first, second, last], [first, last], [last], [second, last]):
        joined = head + b"".join(order)
        refused(joined)
        refused(with_checksums(joined))
        renumbered = bytearray(head)
        for number, frame in enumerate(order):
            renumbered += frame[:8] + number.to_bytes(8, "little") + frame[16:]
        refused(with_checksums(bytes(renumbered)))


def test_frames_of_another_archive_under_the_same_key_are_found(whole: bytes, tmp_path: Path) -> None:
    other = written(tmp_path / "other", manifest(name="tuesday"), [RUNS[:2], RUNS[2:]])
    ours, theirs = frames_of(whole), frames_of(other)
    for number in range(3):
        spliced = whole[: ours[number][0]] + other[theirs[number][0] :]
        refused(spliced)
        refused(with_checksums(spliced))


def test_a_header_of_another_archive_is_found(whole: bytes, tmp_path: Path) -> None:
    other = written(tmp_path / "other", manifest(name="tuesday"), [RUNS[:2], RUNS[2:]])
    refused(with_checksums(other[: frames_of(other)[0][0]] + whole[frames_of(whole)[0][0] :]))


def test_another_key_opens_nothing(whole: bytes) -> None:
    assert "was not made with its key" in refused(whole, bytes(64))


def test_two_runs_of_a_writer_never_share_a_key_and_nonce(tmp_path: Path) -> None:
    """What an export that goes on writes anew is sealed under a salt of its own."""
    seen: list[bytes] = []

    def salt(length: int) -> bytes:
        seen.append(os.urandom(length))
        return seen[-1]

    path = tmp_path / "a"
    with path.open("w+b", buffering=0) as file, Secret.from_buffer(KEY) as key:
        for attempt in range(2):
            writer = ArchiveWriter(file.fileno(), key, manifest(), salt)
            if attempt == 0:
                writer.begin()
                start = writer.position
            else:
                file.seek(start.offset)
                writer.go_on(start)
            writer.add([RUNS[1]], lambda view: None)
        first, second = seen
    assert first != second


def test_a_continued_archive_is_as_good_as_one_of_a_piece(tmp_path: Path) -> None:
    path = tmp_path / "a"
    raw = written(path, manifest(), [RUNS[:2], RUNS[2:]])
    cut = frames_of(raw)[1][0]
    with path.open("r+b", buffering=0) as file, Secret.from_buffer(KEY) as key:
        file.truncate(cut + 1000)
        reader = ArchiveReader(file.fileno())
        told = reader.read_header()
        reader.unlock(key)
        with pytest.raises(ArchiveDamaged):
            for _ in reader.frames():
                pass
        at = reader.position
        assert (at.number, at.offset, at.after, at.data_chunks, at.hole_chunks) == (1, cut, 5, 2, 2)
        file.truncate(at.offset)
        file.seek(at.offset)
        writer = ArchiveWriter(file.fileno(), key, told)
        writer.go_on(at)
        writer.add(RUNS[2:], lambda view: view.__setitem__(slice(None), b"".join(map(chunk_of, (10, 11, 12)))))
        writer.finish()
    assert read(path.read_bytes()) == read(raw)


# --- the manifest and the tables


def test_a_manifest_has_one_encoding() -> None:
    raw = encode_manifest(manifest())
    assert parse_manifest(raw) == manifest()
    for changed in (raw + b" ", raw.replace(b'"size":', b'"size": '), b" " + raw):
        with pytest.raises(ArchiveDamaged):
            parse_manifest(changed)


@pytest.mark.parametrize(
    "changes",
    [
        {"archive": "x"},
        {"snapshot": "vol-0123456789abcdef0"},
        {"name": "../x"},
        {"name": "a\nb"},
        {"size": 4096},
        {"size": MIB + 1},
        {"size": 1 << 60},
        {"data_chunks": -1},
        {"data_chunks": 1000},
        {"account": "1"},
        {"started": "yesterday"},
        {"description": "x" * 9000},
        {"owner": "x" * 2000},
        {"key_arn": "alias/x"},
        {"blob": b""},
        {"blob": bytes(7000)},
        {"context": {}},
        {"context": {**archive_context(ARCHIVE, SNAPSHOT), "more": "x"}},
        {"context": archive_context(ARCHIVE, "snap-0123456789abcdef1")},
        {"base": None},
        {"content": bytes(31)},
    ],
)
def test_a_manifest_that_cannot_be_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="could not be read again"):
        encode_manifest(manifest(**changes))


def test_unknown_versions_features_and_units_are_refused_by_name(small: bytes) -> None:
    for at, value, what in ((8, 2, "version 2"), (12, 1, "feature flags 0x1")):
        raw = bytearray(small)
        raw[at] = value
        assert what in refused(bytes(raw))
    raw_manifest = encode_manifest(manifest())
    for member, what in ((b'"cipher":1', b'"cipher":9'), (b'"sector_size":4096', b'"sector_size":512')):
        with pytest.raises(UnsupportedFormat):
            parse_manifest(raw_manifest.replace(member, what))


def test_tables_of_chunks_that_cannot_be_are_refused() -> None:
    full, part = manifest(incremental=False), manifest()
    good = encode_runs([ChunkRun(3, 1, False)]) + bytes(CHUNK)
    assert parse_runs(memoryview(good), 0, full, 3)[0] == [ChunkRun(3, 1, False)]
    for payload, told, after in (
        (good, full, 4),
        (good[:-1], full, 0),
        (good + b"\0", full, 0),
        (encode_runs([ChunkRun(3, 1, True)]), full, 0),
        (encode_runs([ChunkRun(3, 0, True)]), part, 0),
        (encode_runs([ChunkRun(127, 2, True)]), part, 0),
        (encode_runs([ChunkRun(5, 2, True), ChunkRun(6, 1, True)]), part, 0),
        (encode_runs([ChunkRun(5, 1, True), ChunkRun(4, 1, True)]), part, 0),
        (encode_runs([ChunkRun(0, 17, False)]) + bytes(17 * CHUNK), full, 0),
        ((5000).to_bytes(4, "little") + bytes(8 * 5000), part, 0),
        (bytes(12), part, 0),
    ):
        with pytest.raises(ArchiveDamaged):
            parse_runs(memoryview(payload), 0, told, after)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 60), st.booleans()), max_size=40))
def test_frames_hold_all_runs_in_order_and_none_is_too_large(steps: list[tuple[int, int, bool]]) -> None:
    at, runs = 0, []
    for gap, chunks, is_hole in steps:
        runs.append(ChunkRun(at + gap, chunks, is_hole))
        at += gap + chunks
    frames = list(planned_frames(iter(runs)))

    def marks(of: list[ChunkRun]) -> list[tuple[int, bool]]:
        return [(number, run.is_hole) for run in of for number in range(run.first, run.first + run.chunks)]

    assert marks([run for frame in frames for run in frame]) == marks(runs)
    for frame in frames:
        assert frame
        assert len(frame) <= FRAME_RUNS
        assert sum(run.chunks for run in frame if not run.is_hole) <= FRAME_CHUNKS


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_hostile_bytes_are_refused_and_nothing_else_happens(small: bytes, data: st.DataObject) -> None:
    """Any edits of an archive, and any bytes: one of two errors, with a key and without."""
    raw = bytearray(small)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw)))
        raw[at : at + data.draw(st.integers(0, 40))] = data.draw(st.binary(max_size=40))
    if bytes(raw) == small:
        return
    for key in (KEY, None):
        try:
            read(bytes(raw), key)
        except (ArchiveDamaged, UnsupportedFormat):
            continue
        raise AssertionError("accepted")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_as_a_manifest_are_refused(raw: bytes) -> None:
    with pytest.raises((ArchiveDamaged, UnsupportedFormat)):
        parse_manifest(raw)


# --- version 1 for ever


def test_the_golden_archive_of_version_1_is_what_is_written_and_is_read(tmp_path: Path) -> None:
    golden = GOLDEN.read_bytes()
    assert hashlib.sha256(golden).hexdigest() == GOLDEN_SHA256
    frames = [[ChunkRun(0, 1, False), ChunkRun(3, 2, True)]]
    told = manifest(data=1)
    assert written(tmp_path / "again", told, frames) == golden
    assert read(golden) == (told, {0: chunk_of(0)}, frames[0])
