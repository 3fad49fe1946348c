"""Leaf files: a digest of each chunk of a sealed layer, in one immutable file per layer.

1. A leaf is SHA-256("ebsd/1/leaf\\0" || layer uuid || u64 chunk || ciphertext of the whole 64 KiB chunk). No key goes
   in, so whoever reads the store can check it; the root in a signed record makes it authentic (``leaftable.py``).
2. The chunks stand in runs, sorted, none touching another; the digests follow in the same order. A run costs 8 bytes
   and a digest 32, so a layer written in one go costs 32 bytes per chunk and one written at random 40 at most.
3. A file is written under a temporary name, made durable, and renamed by ``leaftable.publish``; it never changes.
4. No count in a file is believed before it was compared with the length of the file. A small file is read at once and
   kept; of a larger one nothing is kept that grows with the digests: a look-up reads one page of runs and one digest.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import struct
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from typing import Final, NamedTuple

from ebsd.domain.errors import StoreDamaged, UnsupportedFormat
from ebsd.domain.ids import LineageId, format_uuid, parse_uuid
from ebsd.domain.units import CHUNK, CHUNKS_PER_SEGMENT
from ebsd.store.disk import Disk, open_present, pread_all, pwrite_all
from ebsd.store.entries import ENTRY, FIRST_RESERVED, MAX_CHUNKS
from ebsd.store.layers import MAX_SEGMENTS, chunks_with_data, segment_name

MAGIC: Final = b"EBSDLEF1"
VERSION: Final = 1
HEADER_BYTES: Final = 128
RUN_BYTES: Final = 8
DIGEST: Final = 32
TRAILER_BYTES: Final = 32

_LABEL: Final = b"ebsd/1/leaf\0"
_CHUNK_NUMBER = struct.Struct("<Q")
_HEADER = struct.Struct("<8sII16sII16sQQ24s")
_SUMMED: Final = HEADER_BYTES - 32
_PAGE_RUNS: Final = 512
"""Runs that a look-up reads: one page of the file."""
_STEP: Final = 64 * 1024
SMALL: Final = 16 * 1024
"""Bytes of a leaf file that is read with one call and kept in memory: of at least 400 chunks, 25 MiB of a layer."""

_Read = Callable[[int, int], bytes | bytearray]
"""Returns so many bytes from an offset; raises StoreDamaged, OSError."""

_TEMPORARY = re.compile(r"\.[0-9]{10}-[0-9a-f]{32}\.leaves\.([0-9]+)\.tmp")
_NAME = re.compile(r"([0-9]{10})-([0-9a-f]{32})\.leaves")


def leaf_prefix(uuid: bytes) -> bytes:
    """Return what goes before the number of a chunk, for those who compute many leaves at once."""
    return _LABEL + uuid


def leaf_digest(uuid: bytes, chunk: int, ciphertext: bytes | bytearray | memoryview) -> bytes:
    """Return the leaf of a chunk, by its number in the volume; ``ciphertext`` is all of it, CHUNK bytes."""
    if len(ciphertext) != CHUNK:
        raise ValueError(f"a leaf covers {CHUNK} bytes, not {len(ciphertext)}")
    digest = hashlib.sha256(_LABEL + uuid + _CHUNK_NUMBER.pack(chunk))
    digest.update(ciphertext)
    return digest.digest()


def leaf_file_name(number: int, uuid: bytes) -> str:
    """Return the name of a layer's leaf file, beside its segments.

    ``<number, 10 digits>-<uuid, 32 hex digits>.leaves``: as for segments, so that the directory tells all.
    """
    if not 0 < number < FIRST_RESERVED or len(uuid) != 16:
        raise ValueError(f"no layer: {number}, uuid {uuid.hex()}")
    return f"{number:010d}-{uuid.hex()}.leaves"


def parse_leaf_file_name(name: str) -> tuple[int, bytes] | None:
    """Return (layer number, uuid) of a leaf file's name, None for any other name."""
    match = _NAME.fullmatch(name)
    if match is None or not 0 < int(match[1]) < FIRST_RESERVED:
        return None
    return int(match[1]), bytes.fromhex(match[2])


# --- which chunks


class ChunkRun(NamedTuple):
    """Chunks [first, end) of the volume."""

    first: int
    end: int


class Runs:
    """Ascending runs of chunks as a leaf file has them: pairs (first chunk, number of its first digest)."""

    def __init__(self, ranges: Iterable[tuple[int, int]]) -> None:
        """``ranges``: [first, end), ascending, not overlapping; what touches is joined. Raises ValueError."""
        self.pairs = array("I")
        self.chunks = 0
        last = -1
        for first, end in ranges:
            if not max(last, 0) <= first < end <= MAX_CHUNKS:
                raise ValueError(f"the chunks [{first}, {end}) after {last}")
            if first != last:
                self.pairs.extend((first, self.chunks))
            self.chunks += end - first
            last = end

    def __len__(self) -> int:
        return len(self.pairs) // 2

    def __iter__(self) -> Iterator[ChunkRun]:
        pairs = self.pairs
        for at in range(0, len(pairs), 2):
            following = pairs[at + 3] if at + 3 < len(pairs) else self.chunks
            yield ChunkRun(pairs[at], pairs[at] + following - pairs[at + 1])


def named_ranges(entries: memoryview, layer: int) -> Iterator[tuple[int, int]]:
    """Yield (first, end) of the chunks that a map (format I or B) says ``layer`` holds, ascending."""
    view = entries.cast("I") if entries.format == "B" else entries
    step = _STEP // ENTRY
    wanted = layer.to_bytes(ENTRY, "little")
    for base in range(0, len(view), step):
        block = view[base : base + step].tobytes()
        if wanted not in block:
            continue
        if block == wanted * (len(block) // ENTRY):
            yield base, base + len(block) // ENTRY
            continue
        first = -1
        values = memoryview(block).cast("I").tolist()
        for at, value in enumerate(values):
            if (value == layer) is (first < 0):
                if first >= 0:
                    yield base + first, base + at
                    first = -1
                else:
                    first = at
        if first >= 0:
            yield base + first, base + len(values)


def stored_ranges(disk: Disk, dirfd: int, number: int, uuid: bytes) -> Iterator[tuple[int, int]]:
    """Yield (first, end) of the chunks of which the layer's segment files hold data, ascending.

    For a layer whose sealing map is not at hand any more: a chunk that some map names was written whole, so this is
    all of them, and what nobody names besides. Raises StoreDamaged when there is no segment, OSError.
    """
    for segment in range(MAX_SEGMENTS):
        name = segment_name(number, uuid, segment)
        try:
            fd = disk.open(name, os.O_RDONLY | os.O_NONBLOCK, dir_fd=dirfd)
        except FileNotFoundError:
            if segment == 0:
                raise StoreDamaged(file=name, reason="it is missing") from None
            return
        try:
            base, whole = segment * CHUNKS_PER_SEGMENT, disk.fstat(fd).st_size // CHUNK
            for first, end in chunks_with_data(disk, fd):
                if first < whole:
                    yield base + first, base + min(end, whole)
        finally:
            disk.close(fd)


def merged_ranges(one: Iterable[tuple[int, int]], other: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield the union of two ascending sequences of ranges, ascending and without overlaps."""
    first = end = -1
    for low, high in sorted([*one, *other]):
        if low > end:
            if first >= 0:
                yield first, end
            first, end = low, high
        else:
            end = max(end, high)
    if first >= 0:
        yield first, end


# --- writing


def encode_leaf_header(lineage: LineageId, number: int, uuid: bytes, runs: int, chunks: int) -> bytes:
    """Return the 128 bytes of the header."""
    front = _HEADER.pack(MAGIC, VERSION, 0, parse_uuid(lineage), number, 0, uuid, runs, chunks, bytes(24))
    return front + hashlib.sha256(front).digest()


class LeafWriter:
    """Writes the leaf file of one layer under a temporary name; digests come in the order of the runs.

    The name has the process in it: two processes that serve volumes of one lineage may hash the same layer.
    """

    def __init__(self, disk: Disk, dirfd: int, lineage: LineageId, number: int, uuid: bytes, runs: Runs) -> None:
        """Borrow ``dirfd``, the lineage directory. Raises OSError."""
        self.name = leaf_file_name(number, uuid)
        self.temporary = f".{self.name}.{os.getpid()}.tmp"
        self._disk = disk
        self._dirfd = dirfd
        self._left = runs.chunks
        self._at = 0
        self._pending = bytearray()
        self._digest = hashlib.sha256()
        self._fd = disk.open(self.temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600, dir_fd=dirfd)
        try:
            self._append(encode_leaf_header(lineage, number, uuid, len(runs), runs.chunks))
            table = memoryview(runs.pairs).cast("B")
            for at in range(0, len(table), _STEP):
                self._append(table[at : at + _STEP])
        except BaseException:
            self.abandon()
            raise

    def add(self, digest: bytes) -> None:
        """Add the leaf of the next chunk. Raises ValueError for one too many, OSError."""
        if self._left <= 0 or len(digest) != DIGEST:
            raise ValueError("a leaf too many, or of a wrong length")
        self._left -= 1
        self._append(digest)

    def _append(self, data: bytes | memoryview) -> None:
        self._pending += data
        if len(self._pending) >= _STEP:
            self._write_out()

    def _write_out(self) -> None:
        pwrite_all(self._disk, self._fd, self._pending, self._at)
        self._digest.update(self._pending)
        self._at += len(self._pending)
        self._pending = bytearray()

    def finish(self) -> bytes:
        """Make the whole file durable, read-only, under its temporary name; return its digest. Raises OSError."""
        if self._left:
            raise ValueError(f"{self._left} leaves are missing")
        self._write_out()
        digest = self._digest.digest()
        pwrite_all(self._disk, self._fd, digest, self._at)
        self._disk.fchmod(self._fd, 0o440)
        self._disk.fsync(self._fd)
        self._disk.close(self._fd)
        self._fd = -1
        return digest

    def abandon(self) -> None:
        """Close and remove what was not published; may be called at any time, and again."""
        if self._fd >= 0:
            self._disk.close(self._fd)
            self._fd = -1
        with contextlib.suppress(OSError):
            self._disk.unlink(f"/proc/self/fd/{self._dirfd}/{self.temporary}")


# --- reading


class SharedLeaves(NamedTuple):
    """What another reader needs of a leaf file that was checked as a whole; borrowed from its ``LeafFile``."""

    whole: bytes | None
    """The file, when it is kept in memory."""
    fd: int
    """Else the descriptor to read it from; -1 with ``whole``."""
    runs: int
    chunks: int
    pages: array[int]
    """First chunk of each page of runs."""


class LeafFile:
    """A leaf file that was checked as a whole; the caller closes it. A small one holds no descriptor."""

    def __init__(self, read: _Read, file: str, runs: int, chunks: int, index: array[int], source: bytes | int) -> None:
        """``source``: what ``read`` reads, the whole file or its descriptor."""
        self.file = file
        self._source = source
        self.chunks = chunks
        self.held = 0
        """Bytes that are kept in memory instead of a descriptor."""
        self._read = read
        self._release: Callable[[], None] = lambda: None
        self._runs = runs
        self._index = index
        """First chunk of each page of runs."""
        self._page = -1
        self._firsts: list[int] = []
        self._numbers: list[int] = []

    @classmethod
    def open(
        cls, disk: Disk, dirfd: int, lineage: LineageId, number: int, uuid: bytes, digest: bytes | None
    ) -> LeafFile:
        """Open and check all of a layer's leaf file against itself and, unless that is None, ``digest``.

        Reads the whole file: for a thread. Raises StoreDamaged (missing ones too), UnsupportedFormat, OSError.
        """
        found = cls._open(disk, dirfd, lineage, number, uuid, digest, only_small=False)
        assert found is not None
        return found

    @classmethod
    def open_small(
        cls, disk: Disk, dirfd: int, lineage: LineageId, number: int, uuid: bytes, digest: bytes
    ) -> LeafFile | None:
        """As ``open``, when the file has at most SMALL bytes, else None: reads less than a chunk, with one call."""
        return cls._open(disk, dirfd, lineage, number, uuid, digest, only_small=True)

    @classmethod
    def _open(
        cls,
        disk: Disk,
        dirfd: int,
        lineage: LineageId,
        number: int,
        uuid: bytes,
        digest: bytes | None,
        only_small: bool,
    ) -> LeafFile | None:
        name = leaf_file_name(number, uuid)
        fd, status = open_present(disk, name, os.O_RDONLY, dirfd)
        size = status.st_size
        keep = False
        try:
            if size > SMALL and only_small:
                return None
            read = _reader(disk, fd, size, name)
            header = bytes(read(min(HEADER_BYTES, size), 0))
            runs, chunks = _parse_header(header, lineage, number, uuid, name)
            if size != HEADER_BYTES + RUN_BYTES * runs + DIGEST * chunks + TRAILER_BYTES:
                raise StoreDamaged(file=name, reason=f"its {size} bytes do not fit {chunks} leaves")
            found, index = _check_body(read, header, runs, chunks, name)
            if digest is not None and found != digest:
                raise StoreDamaged(file=name, reason="it is not the leaf file that its layer was given")
            source = bytes(read(size, 0)) if size <= SMALL else fd
            leaves = cls(read, name, runs, chunks, index, source)
            if size <= SMALL:
                leaves.held = size
            else:
                leaves._release = lambda: disk.close(fd)
                keep = True
            return leaves
        finally:
            if not keep:
                disk.close(fd)

    def digest_of(self, chunk: int) -> bytes | None:
        """Return the leaf of a chunk, None when the file does not cover it. Raises StoreDamaged, OSError."""
        return self.digests_of(chunk, 1)[0]

    def digests_of(self, first: int, count: int) -> list[bytes | None]:
        """Return the leaves of consecutive chunks, those of one run with one read; else as ``digest_of``."""
        found: list[bytes | None] = []
        while len(found) < count:
            number, end = self._covered(first + len(found))
            if number == end:
                found.append(None)
                continue
            together = min(end - number, count - len(found))
            raw = self._read(DIGEST * together, HEADER_BYTES + RUN_BYTES * self._runs + DIGEST * number)
            found += [bytes(raw[at : at + DIGEST]) for at in range(0, DIGEST * together, DIGEST)]
        return found

    def _covered(self, chunk: int) -> tuple[int, int]:
        """Return the number of a chunk's digest and the one behind the last of its run; the same twice: none."""
        page = bisect_right(self._index, chunk) - 1
        if page < 0:
            return 0, 0
        if page != self._page:
            self._load(page)
        at = bisect_right(self._firsts, chunk) - 1
        if at < 0:
            raise StoreDamaged(file=self.file, reason="it has changed since it was opened")
        number, end = self._numbers[at] + chunk - self._firsts[at], self._numbers[at + 1]
        return (number, end) if number < end <= self.chunks else (end, end)

    def _load(self, page: int) -> None:
        first = page * _PAGE_RUNS
        count = min(_PAGE_RUNS, self._runs - first)
        more = first + count < self._runs  # the run behind the page says how long its last one is
        raw = self._read(RUN_BYTES * (count + more), HEADER_BYTES + RUN_BYTES * first)
        values = memoryview(raw).cast("I").tolist()
        self._firsts, self._numbers = values[0 : 2 * count : 2], values[1::2]
        if not more:
            self._numbers.append(self.chunks)
        self._page = page

    def shared(self) -> SharedLeaves:
        """Return what ``digest_of`` works on, for a reader that is not Python; valid until ``close``."""
        whole, fd = (None, self._source) if isinstance(self._source, int) else (self._source, -1)
        return SharedLeaves(whole, fd, self._runs, self.chunks, self._index)

    def close(self) -> None:
        self._release()


def _reader(disk: Disk, fd: int, size: int, file: str) -> _Read:
    """Return what gives (length, offset) of a file of ``size`` bytes; a small one is read here, once."""
    if size > SMALL:
        return lambda length, at: pread_all(disk, fd, length, at, file)
    whole = bytes(pread_all(disk, fd, size, 0, file))
    return lambda length, at: whole[at : at + length]


def _parse_header(header: bytes, lineage: LineageId, number: int, uuid: bytes, file: str) -> tuple[int, int]:
    if len(header) != HEADER_BYTES:
        raise StoreDamaged(file=file, reason="it is too short for a leaf file")
    if hashlib.sha256(header[:_SUMMED]).digest() != header[_SUMMED:]:
        raise StoreDamaged(file=file, reason="the checksum of its header is wrong")
    magic, version, flags, raw_lineage, layer, zero, raw_uuid, runs, chunks, zeros = _HEADER.unpack(header[:_SUMMED])
    if magic != MAGIC:
        raise StoreDamaged(file=file, reason="it is not a leaf file")
    if version != VERSION:
        raise UnsupportedFormat(file=file, what=f"version {version}")
    if flags:
        raise UnsupportedFormat(file=file, what=f"feature flags {flags:#x}")
    if zero or any(zeros):
        raise StoreDamaged(file=file, reason="reserved bytes of its header are not zero")
    if (format_uuid(raw_lineage), layer, raw_uuid) != (lineage, number, uuid):
        raise StoreDamaged(file=file, reason="it is that of another layer")
    if not runs <= chunks <= MAX_CHUNKS or (runs == 0) is not (chunks == 0):
        raise StoreDamaged(file=file, reason=f"it has {chunks} leaves in {runs} runs")
    return runs, chunks


def _check_body(read: _Read, header: bytes, runs: int, chunks: int, file: str) -> tuple[bytes, array[int]]:
    """Read everything behind the header; return (digest of the file, first chunk of each page of runs)."""
    total = hashlib.sha256(header)
    index = array("I")
    at, end = HEADER_BYTES, HEADER_BYTES + RUN_BYTES * runs
    position = 0
    first = number = -1
    while at < end:
        piece = read(min(_STEP, end - at), at)
        total.update(piece)
        values = memoryview(piece).cast("I").tolist()
        for low, following in zip(values[0::2], values[1::2], strict=True):
            # The run before ends where the next one's number says; there is a gap between the two.
            if (following != 0) if position == 0 else (following <= number or low <= first + following - number):
                raise StoreDamaged(file=file, reason=f"run {position} does not follow the one before it")
            if position % _PAGE_RUNS == 0:
                index.append(low)
            first, number = low, following
            position += 1
        at += len(piece)
    if runs and (number >= chunks or first + chunks - number > MAX_CHUNKS):
        raise StoreDamaged(file=file, reason="its runs and its leaves disagree")
    end += DIGEST * chunks
    while at < end:
        piece = read(min(_STEP, end - at), at)
        total.update(piece)
        at += len(piece)
    digest = total.digest()
    if read(TRAILER_BYTES, at) != digest:
        raise StoreDamaged(file=file, reason="its checksum is wrong")
    return digest, index


def is_being_written(name: str) -> bool:
    """Say whether this is the temporary name of a leaf file whose process is alive."""
    match = _TEMPORARY.fullmatch(name)
    if match is None:
        return False
    try:
        with open(f"/proc/{match[1]}/stat", "rb") as file:
            state = file.read().rpartition(b")")[2].split()[:1]
    except (FileNotFoundError, ProcessLookupError):
        return False
    except PermissionError:
        return True  # a confined process sees that it is there, and no more
    # A zombie has given back all it had. How long it stays is its host's affair: some an init never waits for.
    return state[0] not in (b"Z", b"X")


def remove_unfinished(disk: Disk, dirfd: int) -> None:
    """Unlink the temporary leaf files of a lineage that no other process writes: of dead ones, and this one's own.

    Raises OSError.
    """
    for name in disk.listdir(f"/proc/self/fd/{dirfd}"):
        match = _TEMPORARY.fullmatch(name)
        if match is not None and (int(match[1]) == os.getpid() or not is_being_written(name)):
            with contextlib.suppress(FileNotFoundError):  # an ebsd that starts tidies up, too
                disk.unlink(f"/proc/self/fd/{dirfd}/{name}")


def remove_leaf_file(disk: Disk, dirfd: int, number: int, uuid: bytes) -> bool:
    """Unlink a layer's leaf file; False when there is none. The caller syncs the directory. Raises OSError."""
    try:
        disk.unlink(f"/proc/self/fd/{dirfd}/{leaf_file_name(number, uuid)}")
    except FileNotFoundError:
        return False
    return True
