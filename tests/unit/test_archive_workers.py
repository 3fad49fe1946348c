"""What the archive workers move, on real files: full and incremental, holes, growth, odd sizes, and every cut."""

from __future__ import annotations

import base64
import contextlib
import os
import random
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ebsd.crypto import record_mac
from ebsd.crypto.codec import CodecFactory
from ebsd.crypto.secret import Secret
from ebsd.domain.errors import ArchiveDamaged, NoSpace
from ebsd.domain.geometry import chunk_count
from ebsd.domain.ids import SnapshotId
from ebsd.domain.model import Cipher
from ebsd.domain.units import CHUNK, MIB, SECTOR
from ebsd.store.archive import Base, ChunkRun, Manifest, archive_context
from ebsd.store.disk import RealDisk
from ebsd.store.entries import map_hash
from ebsd.store.layers import create_layer, open_layer
from ebsd.store.layertable import LayerEntry, LayerTable, append_layer, create_layer_table, read_layer_table
from ebsd.store.leaftable import leaf_root, read_slots
from ebsd.store.sealedmap import SealedMap, parse_sealed_map
from ebsd.store.signedrecord import NO_HASH, RecordState, SignedBody, parse_signed
from ebsd.volume.archive_exporter import ArchiveExport, Output, changed_runs
from ebsd.volume.archive_importer import ArchiveImport, Target
from ebsd.volume.archivestream import ArchiveReader
from ebsd.volume.copier import SourceFiles, runs
from ebsd.volume.sources import SourceSnapshot
from ebsd.volume.verify import Claim

DISK = RealDisk()
OWNER = "000000001000"
NAMES = ["snap-0123456789abcdef0", "snap-0123456789abcdef1"]
MADE = ["snap-0fedcba987654321a", "snap-0fedcba987654321b"]
ARN = "arn:aws:kms:local:000000001000:key/6ba7b810-9dad-41d1-80b4-00c04fd430c8"
ARCHIVE = "00112233-4455-4677-8899-aabbccddeeff"
SECTORS = CHUNK // SECTOR


@dataclass
class Store:
    """One lineage on the disk."""

    root: Path
    cipher: Cipher = Cipher.AES_256_XTS
    lineage: str = field(default_factory=lambda: str(uuid.uuid4()))
    key: Secret = field(default_factory=lambda: Secret.random(64))

    def __post_init__(self) -> None:
        self.root.mkdir()
        create_layer_table(DISK, self.root / "table", self.lineage, self.cipher)  # type: ignore[arg-type]
        self.fd = os.open(self.root, os.O_RDONLY)

    def add_layer(self, size: int, owner: str) -> list[int]:
        """Make a further layer; return its segments, opened for writing."""
        number, name = len(self.table().layers) + 1, os.urandom(16)
        append_layer(DISK, self.root / "table", LayerEntry(number, name, SnapshotId(owner)))
        create_layer(DISK, self.fd, number, name, size)
        return list(open_layer(DISK, self.fd, number, name, size, writable=True))

    def table(self) -> LayerTable:
        return read_layer_table(DISK, self.root / "table")

    def codecs(self) -> CodecFactory:
        return CodecFactory(None if self.cipher is Cipher.NONE else self.key, cipher=self.cipher)

    def claim(self, name: str, size: int) -> Claim:
        return Claim(name, OWNER, self.lineage, size, 0, self.cipher, ARN)

    def source(self, name: str, size: int, entries: memoryview, covering: SignedBody | None = None) -> SourceSnapshot:
        sealed = SealedMap(SnapshotId(name), self.lineage, chunk_count(size), entries)  # type: ignore[arg-type]
        return SourceSnapshot(self.claim(name, size), self.table(), sealed, covering, unverified=False)

    def content(self, entries: memoryview, size: int) -> dict[int, bytes]:
        """Return what each stored chunk holds, up to the end."""
        found, table = {}, self.table()
        with contextlib.closing(SourceFiles(DISK, self.fd, table)) as files, self.codecs() as codecs:
            for run in runs(entries, 0):
                view = memoryview(bytearray(run.chunks * CHUNK))
                files.read(run, view)
                codecs.codec(table.uuid_of(run.layer)).decrypt_into(view, view, run.first * SECTORS)
                for at in range(run.chunks):
                    end = min(CHUNK, size - (run.first + at) * CHUNK)
                    found[run.first + at] = bytes(view[at * CHUNK : at * CHUNK + end])
        return found


def entries_of(chunks: int, layers: dict[int, int]) -> memoryview:
    entries = memoryview(bytearray(chunks * 4)).cast("I")
    for chunk, layer in layers.items():
        entries[chunk] = layer
    return entries


class Lineage:
    """Two snapshots of one volume, made at random: the second with writes, discards and growth."""

    def __init__(self, root: Path, dice: random.Random, cipher: Cipher = Cipher.AES_256_XTS) -> None:
        self.store = Store(root, cipher)
        self.sizes = [3 * MIB + dice.randrange(0, 40) * SECTOR]
        self.sizes.append(self.sizes[0] + dice.choice([0, SECTOR, 2 * MIB]))
        self.maps: list[memoryview] = []
        layers: dict[int, int] = {}
        for number, size in enumerate(self.sizes, 1):
            segments = self.store.add_layer(size, f"vol-{number:017x}")
            chunks = chunk_count(size)
            uuid_of = self.store.table().uuid_of(number)
            with self.store.codecs() as codecs:
                for chunk in range(chunks):
                    deed = dice.random()
                    if deed < (0.6 if number == 1 else 0.3):
                        data = bytearray(dice.randbytes(CHUNK))
                        beyond = (chunk + 1) * CHUNK - size
                        data[CHUNK - max(beyond, 0) :] = bytes(max(beyond, 0))  # nobody could write there
                        codecs.codec(uuid_of).encrypt_into(data, data, chunk * SECTORS)
                        os.pwrite(segments[0], data, chunk * CHUNK)
                        layers[chunk] = number
                    elif deed > 0.8:
                        layers.pop(chunk, None)
            for fd in segments:
                os.close(fd)
            self.maps.append(entries_of(chunks, layers))

    def snapshot(self, which: int) -> SourceSnapshot:
        return self.store.source(NAMES[which], self.sizes[which], self.maps[which])

    def expected(self, which: int) -> dict[int, bytes]:
        return self.store.content(self.maps[which], self.sizes[which])


def manifest_of(source: SourceSnapshot, base: SourceSnapshot | None) -> Manifest:
    runs = list(changed_runs(source.entries, None if base is None else base.entries, 0))
    return Manifest(
        archive=ARCHIVE, snapshot=source.claim.volume, volume="vol-0123456789abcdef0", account=OWNER, owner="ada",
        name="monday", description="", started="2026-11-20T10:00:00Z", created="2026-11-21T10:00:00Z",
        size=source.claim.size, cipher=source.claim.cipher, content=source.content(),
        base=None if base is None else Base(base.claim.volume, base.content()),
        data_chunks=sum(run.chunks for run in runs if not run.is_hole),
        hole_chunks=sum(run.chunks for run in runs if run.is_hole),
        key_arn=ARN, blob=b"blob", context=archive_context(ARCHIVE, source.claim.volume),
    )  # fmt: skip


def exported(lineage: Lineage, which: int, since: int | None, file: Path, key: Secret, *, stop_after: int = 0) -> None:
    """Export into a file, or what it lacks; ``stop_after``: as many frames, as if killed then."""
    source = lineage.snapshot(which)
    base = None if since is None else lineage.snapshot(since)
    fd = os.open(file, os.O_RDWR | os.O_CREAT)
    try:
        output = Output.of(fd)
        reader = None
        if not output.is_empty:
            reader = ArchiveReader(fd)
            reader.read_header()
            reader.unlock(key)
        made = ArchiveExport(
            source=source,
            files=SourceFiles(DISK, lineage.store.fd, source.table),
            codecs=lineage.store.codecs(),
            base=None if base is None else base.entries,
            output=output,
            key=key,
            manifest=manifest_of(source, base),
            reader=reader,
        )
        made.run()
        assert made.error is None, made.error
        assert made.state == "done"
        assert made.done == made.total
        made.finish()
    finally:
        os.close(fd)


class Importing:
    """A snapshot that is made of archives: a full one, perhaps a further one onto it."""

    def __init__(self, root: Path) -> None:
        self.store = Store(root)
        self.maps: dict[int, memoryview] = {}
        self.bodies: dict[int, SignedBody] = {}
        self.sizes: dict[int, int] = {}

    def take(self, which: int, file: Path, key: Secret, *, done_through: int = 0, floor: int = 0,
             layer: int = 0, segments: list[int] | None = None) -> ArchiveImport:  # fmt: skip
        fd = os.open(file, os.O_RDONLY)
        reader = ArchiveReader(fd)
        size = reader.read_header().size
        reader.unlock(key)
        self.sizes[which] = size
        segments = segments or self.store.add_layer(size, MADE[which])
        table = self.store.table()
        layer = layer or len(table.layers)
        count = len(table.layers)
        body = SignedBody(
            RecordState.BORN, SnapshotId(MADE[which]), self.store.lineage, OWNER, size, Cipher.AES_256_XTS, 0, 0,  # type: ignore[arg-type]
            count, table.prefix_hash(count),
        )  # fmt: skip
        claim = self.store.claim(MADE[which], size)
        map_fd = os.open(self.store.root / f"map-{which}", os.O_RDWR | os.O_CREAT)
        base = None
        if which:
            base = self.store.source(MADE[0], self.sizes[0], self.maps[0], self.bodies[0])
        target = Target(claim, self.store.key, body, table, layer, self.store.fd, map_fd, tuple(segments))
        made = ArchiveImport(
            disk=DISK, reader=reader, target=target, codecs=self.store.codecs(), base=base, done_through=done_through,
            floor=floor,
        )  # fmt: skip
        made.run()
        os.close(fd)
        return made

    def finish(self, which: int, made: ArchiveImport) -> dict[int, bytes]:
        """Sign, and return what the snapshot holds, by its own map and leaves."""
        assert made.error is None, made.error
        answer = made.finish()
        signed = base64.b64decode(answer["Record"])
        record_mac.verify(self.store.key, signed[:-64], signed[-64:])
        parsed = parse_signed(signed, file="record")
        sealed = parse_sealed_map((self.store.root / f"map-{which}").read_bytes(), SnapshotId(MADE[which]), file="map")
        assert parsed.map_hash == map_hash(sealed.entries, sealed.chunks)
        assert parsed.leaf_root != NO_HASH
        table = self.store.table()
        named = {value for value in sealed.entries if value}
        slots = read_slots(DISK, self.store.fd, table.lineage, {n: table.uuid_of(n) for n in named})
        assert parsed.leaf_root == leaf_root(slots.values())
        self.maps[which], self.bodies[which] = sealed.entries, parsed
        return self.store.content(sealed.entries, self.sizes[which])


@pytest.fixture
def key() -> Any:
    with Secret.from_buffer(bytes(range(64))) as secret:
        yield secret


@pytest.mark.parametrize("seed", range(12))
def test_what_was_exported_arrives_in_full_and_by_increment(tmp_path: Path, key: Secret, seed: int) -> None:
    dice = random.Random(seed)
    lineage = Lineage(tmp_path / "here", dice, Cipher.NONE if seed == 3 else Cipher.AES_256_XTS)
    there = Importing(tmp_path / "there")
    exported(lineage, 0, None, tmp_path / "full", key)
    exported(lineage, 1, 0, tmp_path / "part", key)
    assert there.finish(0, there.take(0, tmp_path / "full", key)) == lineage.expected(0)
    second = there.finish(1, there.take(1, tmp_path / "part", key))
    expected = lineage.expected(1)
    assert second == expected
    assert list(there.maps[1]) == [
        0 if not now else 2 if n >= len(lineage.maps[0]) or now != lineage.maps[0][n] else 1
        for n, now in enumerate(lineage.maps[1])
    ]
    assert any(run.is_hole for run in changed_runs(lineage.maps[1], lineage.maps[0], 0)), "discards are in it, too"


def frames_of(raw: bytes) -> list[int]:
    """Return where each frame ends, the header first."""
    at = 32 + int.from_bytes(raw[16:20], "little") + 96
    ends = [at]
    while at < len(raw):
        at += 48 + int.from_bytes(raw[at + 16 : at + 20], "little") + 16 + 32
        ends.append(at)
    return ends


def test_an_export_goes_on_from_every_cut(tmp_path: Path, key: Secret) -> None:
    lineage = Lineage(tmp_path / "here", random.Random(7))
    whole = tmp_path / "whole"
    exported(lineage, 1, None, whole, key)
    raw = whole.read_bytes()
    ends = frames_of(raw)
    assert len(ends) >= 4
    for number, cut in enumerate(sorted({*ends, *(end + 60 for end in ends[:-1]), ends[2] - 1})):
        file = tmp_path / f"cut-{number}"
        file.write_bytes(raw[:cut] + (b"\xff" * 500 if number % 2 and cut not in ends else b""))
        exported(lineage, 1, None, file, key)
        good = max(end for end in ends if end <= cut)
        assert file.read_bytes()[:good] == raw[:good], "what was there stays"
        there = Importing(tmp_path / f"there-{number}")
        assert there.finish(0, there.take(0, file, key)) == lineage.expected(1)


@pytest.mark.parametrize("marked", [False, True])
def test_an_import_goes_on_from_what_was_durable_and_writes_nothing_below(
    tmp_path: Path, key: Secret, marked: bool
) -> None:
    lineage = Lineage(tmp_path / "here", random.Random(8))
    file = tmp_path / "full"
    exported(lineage, 1, None, file, key)
    raw = file.read_bytes()
    there = Importing(tmp_path / "there")
    file.write_bytes(raw[: frames_of(raw)[2]])
    cut = there.take(0, file, key)
    assert isinstance(cut.error, ArchiveDamaged)
    uuid_of = there.store.table().uuid_of(1)
    segments = list(open_layer(DISK, there.store.fd, 1, uuid_of, lineage.sizes[1], writable=True))
    file.write_bytes(raw)
    through = 16
    chunk = next(chunk for chunk in range(through) if lineage.maps[1][chunk])
    if marked:
        os.pwrite(segments[0], b"mark", chunk * CHUNK)
    made = there.take(0, file, key, done_through=through, layer=1, segments=segments)
    assert made.error is None
    if marked:
        assert os.pread(segments[0], 4, chunk * CHUNK) == b"mark"
    else:
        assert there.finish(0, made) == lineage.expected(1)


def test_what_is_damaged_in_the_store_does_not_become_an_authentic_archive(tmp_path: Path, key: Secret) -> None:
    """A layer that was imported has leaves: what differs from them fails the export of it."""
    lineage = Lineage(tmp_path / "here", random.Random(9))
    exported(lineage, 0, None, tmp_path / "full", key)
    there = Importing(tmp_path / "there")
    there.finish(0, there.take(0, tmp_path / "full", key))
    source = there.store.source(MADE[0], there.sizes[0], there.maps[0], there.bodies[0])
    chunk = next(n for n, layer in enumerate(there.maps[0]) if layer)
    segment = next(path for path in there.store.root.iterdir() if path.name.endswith(".000"))
    with segment.open("r+b") as data:
        data.seek(chunk * CHUNK)
        data.write(b"damage")
    fd = os.open(tmp_path / "again", os.O_RDWR | os.O_CREAT)
    made = ArchiveExport(
        source=source, files=SourceFiles(DISK, there.store.fd, source.table), codecs=there.store.codecs(), base=None,
        output=Output.of(fd), key=key, manifest=manifest_of(source, None), reader=None,
    )  # fmt: skip
    made.run()
    os.close(fd)
    assert made.state == "failed"
    assert made.error is not None
    assert made.error.code == "Ebsd.StoreDamaged"


def test_an_import_stops_at_the_reserve(tmp_path: Path, key: Secret) -> None:
    lineage = Lineage(tmp_path / "here", random.Random(10))
    exported(lineage, 0, None, tmp_path / "full", key)
    there = Importing(tmp_path / "there")
    made = there.take(0, tmp_path / "full", key, floor=1 << 60)
    assert isinstance(made.error, NoSpace)


@pytest.mark.parametrize("after", [0, 1, 5, 9])
def test_what_changed_is_told_from_any_chunk_on(after: int) -> None:
    now = entries_of(10, {0: 1, 1: 2, 2: 2, 5: 2, 8: 3})
    before = entries_of(9, {0: 1, 1: 1, 3: 1, 4: 1, 5: 2})
    told = [
        (chunk, run.is_hole)
        for run in changed_runs(now, before, after)
        for chunk in range(run.first, run.first + run.chunks)
    ]
    assert told == [each for each in [(1, False), (2, False), (3, True), (4, True), (8, False)] if each[0] >= after]
    assert list(changed_runs(now, None, 0)) == [ChunkRun(0, 3, False), ChunkRun(5, 1, False), ChunkRun(8, 1, False)]
