"""The import worker: read an image that a client passed, and write it encrypted into a new volume.

1. Nothing is read before the destination was verified: it is born, signed by nobody, and of exactly one layer.
2. Chunks that are holes of the image stay holes; so do chunks of zeros, but only when that was asked for: written
   zeros are data.
3. At a sync the data is made durable first, the map that names it second, ``DoneThrough`` moves last. The volume is
   ``creating`` all the while, so that nobody can use what the map names.
4. A run that goes on has an image that is what it was. Of a device nothing says so: what was imported of it is
   compared, byte for byte. No digest of plaintext is kept anywhere, as it would tell of it.
"""

from __future__ import annotations

import base64
import os
import stat
import threading
from dataclasses import dataclass
from typing import Any, Final

from ebsd.crypto.codec import CodecFactory
from ebsd.crypto.secret import Secret
from ebsd.domain.errors import ImageChanged, ImageUnusable, IncorrectState, IntegrityFailure, NoSpace, StoreDamaged
from ebsd.domain.geometry import chunk_count, chunk_place, segment_count, segment_size
from ebsd.domain.units import CHUNK, SECTOR
from ebsd.store.disk import Disk, RealDisk, pread_into_all, pwrite_all
from ebsd.store.durablemap import DurableMap
from ebsd.store.entries import ENTRY, HOLE, PAGE, map_hash
from ebsd.store.layertable import LayerTable
from ebsd.store.signedrecord import RecordState, SignedBody
from ebsd.volume.copier import STEP
from ebsd.volume.image_source import FILE, ImageSource, Span, image_of, look_at
from ebsd.volume.inputs import claim_of, found_in, record_of, table_of
from ebsd.volume.nbd import NbdClient, NbdSource
from ebsd.volume.transfer import Holdings, Transfer, aligned_buffer, main, writing
from ebsd.volume.verify import Claim, next_body, sign
from ebsd.volume.verify_snapshot import check_destination

THREADS: Final = min(4, max(2, os.cpu_count() or 1))

_ZEROS: Final = bytes(CHUNK)
_SECTORS_PER_CHUNK: Final = CHUNK // SECTOR
_PER_PAGE: Final = PAGE // ENTRY


def is_zero(chunk: memoryview) -> bool:
    """Say whether a chunk holds only zeros; what does not mostly shows that in its first bytes."""
    return bytes(chunk[:64]) == _ZEROS[:64] and bytes(chunk) == _ZEROS


@dataclass(frozen=True, slots=True)
class Target:
    """The new volume: its verified claim and born body, its one layer, its map."""

    claim: Claim
    body: SignedBody
    table: LayerTable
    layer: int
    key: Secret | None
    segments: list[int]
    map: DurableMap
    codecs: CodecFactory


class Import(Transfer[Span]):
    """The data of one import."""

    def __init__(
        self,
        disk: Disk,
        source: ImageSource,
        target: Target,
        *,
        detect_zeros: bool,
        done_through: int,
        floor: int,
        rate: int,
    ) -> None:
        """``floor``: free bytes of the file system that are left alone; at the floor it fails with NoSpace."""
        super().__init__(THREADS, rate)
        self._disk = disk
        for fd in target.segments:
            disk.make_direct(fd)  # nobody reads it soon; through the page cache it would evict what others use
        self._source = source
        self._target = target
        self._detect_zeros = detect_zeros
        self._done_through = done_through
        self._floor = floor
        self._uuid = target.table.uuid_of(target.layer)
        self._entries = target.map.entries()
        self._pages: set[int] = set()
        self._unsynced: set[int] = set()
        self._through = 0
        self._noting = threading.Lock()
        self.total = source.total

    def cost(self, piece: Span) -> int:
        return piece.length

    def details(self) -> dict[str, Any]:
        return {"DoneThrough": self._done_through, "Checkpoint": self._source.identity}

    def transfer(self) -> bool:
        if self._done_through:
            if not self._compare_earlier():
                return False
            self._source.go_on_at(self._done_through * CHUNK)
        self._forget_later()
        self._through = self._done_through
        while self.batch(self._claim, self._step):
            self._sync()
            if self.stopping.is_set():
                return False
        if self.stopping.is_set():
            return False
        self._source.check_end()
        self._through = chunk_count(self._target.claim.size)
        self._sync()
        self.total = self.done
        return True

    def _claim(self, buffer: memoryview) -> Span | None:
        span = self._source.claim(buffer)
        if span is not None:
            self._through = chunk_count(span.end)
        return span

    def _step(self, thread: int, span: Span, buffer: memoryview) -> None:
        self._source.fill(span, buffer)
        chunks = chunk_count(span.length)
        view = buffer[: chunks * CHUNK]
        view[span.length :] = bytes(len(view) - span.length)
        first = span.start // CHUNK
        for begin, end in self._to_store(view, chunks):
            self._store(first + begin, view[begin * CHUNK : end * CHUNK])
        self.count(span.length)

    def _to_store(self, view: memoryview, chunks: int) -> list[tuple[int, int]]:
        if not self._detect_zeros:
            return [(0, chunks)]
        runs: list[tuple[int, int]] = []
        for at in range(chunks):
            if is_zero(view[at * CHUNK : (at + 1) * CHUNK]):
                continue
            if runs and runs[-1][1] == at:
                runs[-1] = (runs[-1][0], at + 1)
            else:
                runs.append((at, at + 1))
        return runs

    def _store(self, first: int, view: memoryview) -> None:
        self._check_room(len(view))
        target = self._target
        chunks = len(view) // CHUNK
        segment, place = chunk_place(first)
        target.codecs.codec(self._uuid).encrypt_into(view, view, first * _SECTORS_PER_CHUNK)
        with writing(f"for the data of {target.claim.volume}"):
            pwrite_all(self._disk, target.segments[segment], view, place)
        with self._noting:
            self._entries[first : first + chunks] = memoryview((target.layer).to_bytes(ENTRY, "little") * chunks).cast(
                "I"
            )
            self._pages.update(range(first // _PER_PAGE, (first + chunks - 1) // _PER_PAGE + 1))
            self._unsynced.add(segment)

    def _check_room(self, length: int) -> None:
        """Raise NoSpace at the floor: what lies below it is for volumes in use and for deletions."""
        try:
            usage = self._disk.statvfs(self._target.segments[0])
        except OSError:
            return  # what the disk says to the write counts
        if usage.f_bavail * usage.f_frsize - length < self._floor:
            raise NoSpace(where=f"for the data of {self._target.claim.volume}")

    def _sync(self) -> None:
        with writing(f"for the data of {self._target.claim.volume}"):
            for segment in sorted(self._unsynced):
                self._disk.fdatasync(self._target.segments[segment])
            self._unsynced.clear()
            if self._pages:
                entries = self._entries.cast("B")
                for page in sorted(self._pages):
                    self._target.map.write_out(page * _PER_PAGE, page * _PER_PAGE + 1)
                    self._target.map.write_page(page, bytes(entries[page * PAGE : (page + 1) * PAGE]))
                self._target.map.sync()
                self._pages.clear()
        self._done_through = self._through

    # --- going on

    def _forget_later(self) -> None:
        """Take back what a run that was killed had noted above what counts: a device may hold zeros there by now."""
        for page in range(self._done_through // _PER_PAGE, len(self._entries) // _PER_PAGE):
            start = max(page * _PER_PAGE, self._done_through)
            later = self._entries[start : (page + 1) * _PER_PAGE]
            if any(later):
                later[:] = memoryview(bytes(len(later) * ENTRY)).cast("I")
                self._pages.add(page)

    def _compare_earlier(self) -> bool:
        """Compare what an earlier run imported with the image, where its identity does not do; False when stopped."""
        self.done = min(self._done_through * CHUNK, self.total)
        if self._source.identity.get("Kind") == FILE:
            self.done = _bytes_named(self._entries, self._done_through)
            return True
        mine, theirs = aligned_buffer(), aligned_buffer()
        end = self._done_through * CHUNK
        image = int(self._source.identity["Size"])
        try:
            for start in range(0, min(end, image), STEP):
                if self.stopping.is_set():
                    return False
                length = min(STEP, end - start, image - start)
                self._source.fill(Span(start, length), mine)
                self._read_back(start, length, theirs)
                if bytes(mine[:length]) != bytes(theirs[:length]):
                    raise ImageChanged(reason=f"what was imported of it before byte {start + length} is not there")
        finally:
            mine[:] = theirs[:] = bytes(STEP)
        return True

    def _read_back(self, start: int, length: int, buffer: memoryview) -> None:
        target = self._target
        first = start // CHUNK
        for number in range(chunk_count(length)):
            view = buffer[number * CHUNK : (number + 1) * CHUNK]
            if self._entries[first + number] == HOLE:
                view[:] = _ZEROS
                continue
            segment, place = chunk_place(first + number)
            with writing(f"at the data of {target.claim.volume}"):
                pread_into_all(self._disk, target.segments[segment], view, place, target.claim.volume)
            target.codecs.codec(self._uuid).decrypt_into(view, view, (first + number) * _SECTORS_PER_CHUNK)

    # --- end

    def finish(self) -> dict[str, Any]:
        """Sign the record over the map, which is durable. {"Record", "Generation", "Stored": bytes that take space}."""
        target = self._target
        digest = map_hash(self._entries, chunk_count(target.claim.size))
        body = next_body(target.body, target.claim, target.table, RecordState.CLEAN, digest)
        return {
            "Record": base64.b64encode(sign(body, target.key)).decode(),
            "Generation": 1,
            "Stored": _chunks_named(self._entries) * CHUNK,
        }


def _chunks_named(entries: memoryview) -> int:
    return sum(len(block) - block.tolist().count(HOLE) for block in _blocks(entries))


def _bytes_named(entries: memoryview, through: int) -> int:
    return _chunks_named(entries[:through]) * CHUNK


def _blocks(entries: memoryview) -> list[memoryview]:
    return [entries[at : at + 65536] for at in range(0, len(entries), 65536)]


def prepare(params: dict[str, Any], holdings: Holdings) -> tuple[Import, dict[str, Any]]:
    """Verify the new volume, look at the image, and begin.

    {"Destination": {"ResourceId", "Owner", "Lineage", "Size", "Cipher", "KeyArn", "Layer"}, "DestinationRecord",
    "Image": {"Size", "DetectZeros", "Format": raw or nbd}, "DoneThrough", "Checkpoint": what ``progress`` told
    before, or {}, "SpaceReserve", "Rate"}. Descriptors: session, lineage directory, map and all
    segments (O_RDWR) of the volume; the image, and with nbd a connection to what serves it.

    {"Chunks", "Bytes"}. Raises what the verification raises, ImageUnusable, ImageChanged.
    """
    disk = RealDisk()
    if len(holdings.fds) < 5:
        raise IncorrectState(reason="Descriptors are missing")
    answer = holdings.ask()
    count = 2 if params["Image"].get("Format") == "nbd" else 1
    (lineage_fd, map_fd, *segments), images = holdings.fds[:-count], holdings.fds[-count:]
    layer = int(params["Destination"]["Layer"])
    claim = claim_of(params["Destination"], head=layer)
    with found_in(claim):
        record = record_of(params["DestinationRecord"])
        table = table_of(disk, lineage_fd, None)
        body = check_destination(claim, answer.anchor, answer.data_key, record, table, layer)
        _check_segments(disk, claim, segments)
        durable = DurableMap.from_fd(disk, map_fd, "map")
        done_through = int(params["DoneThrough"])
        _check_map(claim, durable, done_through)
    factory = CodecFactory(answer.data_key, cipher=claim.cipher)
    holdings.factories.append(factory)
    target = Target(claim, body, table, layer, answer.data_key, segments, durable, factory)
    image = params["Image"]
    stopping = threading.Event()
    if int(image["Size"]) > claim.size:
        raise IncorrectState(reason=f"An image of {image['Size']} bytes does not fit {claim.size}")
    source = _open_image(images, image, stopping)
    checkpoint = params.get("Checkpoint") or {}
    if done_through and not source.resumable:
        raise ImageChanged(reason="a stream cannot be read again")
    if checkpoint and checkpoint != source.identity:
        raise ImageChanged(reason="it is another file, or somebody wrote to it")
    made = Import(
        disk,
        source,
        target,
        detect_zeros=bool(image.get("DetectZeros")),
        done_through=done_through,
        floor=int(params.get("SpaceReserve", 0)),
        rate=int(params.get("Rate", 0)),
    )
    made.stopping = stopping
    return made, {"Chunks": chunk_count(claim.size), "Bytes": source.total}


def _open_image(fds: list[int], image: dict[str, Any], stopping: threading.Event) -> ImageSource:
    """Return the image: the first descriptor, or what is served on the second one, of which the first is the file."""
    size = int(image["Size"])
    if len(fds) == 1:
        return image_of(fds[0], size, stopping)
    identity = look_at(fds[0])
    try:
        client = NbdClient(fds[1], stopping)
    except OSError as exc:
        raise ImageUnusable(reason=exc.strerror or str(exc), remedy="Convert it to a raw image first.") from exc
    return NbdSource(client, identity, size, lambda: look_at(fds[0]))


def _check_segments(disk: Disk, claim: Claim, fds: list[int]) -> None:
    """Raise StoreDamaged unless these are all segments of the layer, with their lengths."""
    if len(fds) != segment_count(claim.size):
        raise StoreDamaged(file=claim.volume, reason=f"it cannot have {len(fds)} segments")
    for number, fd in enumerate(fds):
        status = disk.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size != segment_size(claim.size, number):
            raise StoreDamaged(file=claim.volume, reason=f"segment {number} of its layer has a wrong length")


def _check_map(claim: Claim, durable: DurableMap, done_through: int) -> None:
    """Refuse a map that an import cannot have left: of another volume, or naming another layer."""
    header = durable.header
    chunks = chunk_count(claim.size)
    if (header.volume, header.lineage, header.head, header.chunks) != (
        claim.volume, claim.lineage, claim.head, chunks
    ):  # fmt: skip
        raise StoreDamaged(file="map", reason="it is that of another volume")
    if not 0 <= done_through <= chunks:
        raise IncorrectState(reason=f"An import of {chunks} chunks cannot be done through {done_through}")
    for block in _blocks(durable.entries()):
        if set(block.tolist()) - {HOLE, claim.head}:
            raise IntegrityFailure(resource=claim.volume, reason="its map names data that no import writes")


if __name__ == "__main__":
    main(prepare, "ebsd-importer")
