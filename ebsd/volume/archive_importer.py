"""The worker that imports an archive: opens frame by frame, encrypts anew under the destination's own data key.

1. Nothing is believed before the header's MAC was right, and nothing written before its frame has opened in its place.
   The record is signed after the last frame: an archive that ends early or is followed by more becomes no snapshot.
2. Everything below ``DoneThrough`` is durable. A further run reads and opens the archive from its first byte again, as
   it is the whole that is authentic, and writes what lies above: same key, same place, same content.
3. An incremental archive goes onto a snapshot that was imported, whose content has the identity that the archive asks
   for; that it has is signed under its data key. Chunks that the archive does not name stay in the layers of the base.
4. Leaves are hashed from the disk when all was written.
"""

from __future__ import annotations

import base64
import contextlib
import os
import stat
from dataclasses import dataclass
from typing import Any, Final

from ebsd.crypto.archive import NotAuthentic, sign_import, verify_import
from ebsd.crypto.codec import CodecFactory
from ebsd.crypto.secret import Secret
from ebsd.domain.errors import (
    ArchiveDamaged,
    ArchiveNeedsBase,
    ArchiveOfAnother,
    HostFailure,
    IncorrectState,
    IntegrityFailure,
    NoSpace,
    StoreDamaged,
)
from ebsd.domain.geometry import chunk_count, chunk_place, segment_count, segment_size
from ebsd.domain.ids import LineageId, SnapshotId
from ebsd.domain.units import CHUNK, CHUNKS_PER_SEGMENT, SECTOR
from ebsd.store.archive import Manifest
from ebsd.store.disk import Disk, RealDisk, pwrite_all
from ebsd.store.entries import HOLE, entry_bytes, map_hash, named_layers
from ebsd.store.layertable import LayerTable
from ebsd.store.leaftable import leaf_root, read_slots
from ebsd.store.leaves import Runs, named_ranges, remove_unfinished
from ebsd.store.sealedmap import encode_sealed_map
from ebsd.store.signedrecord import NO_HASH, RecordState, SignedBody
from ebsd.volume.archivestream import ArchiveReader, OpenedFrame
from ebsd.volume.hashing import hash_layer
from ebsd.volume.inputs import claim_of, found_in, record_of, table_of
from ebsd.volume.keysession import Answer
from ebsd.volume.sources import SourceSnapshot, believed_source
from ebsd.volume.transfer import SYNC_BYTES, Holdings, Transfer, main, writing
from ebsd.volume.verify import Claim, next_body, sign
from ebsd.volume.verify_snapshot import check_destination, check_filled

_SECTORS_PER_CHUNK: Final = CHUNK // SECTOR


class _Stopped(Exception):
    """ebsd is gone."""


@dataclass(frozen=True, slots=True)
class Target:
    """The snapshot that is made: one new layer, and an empty map file."""

    claim: Claim
    key: Secret
    body: SignedBody
    """Of its born record."""
    table: LayerTable
    layer: int
    lineage_fd: int
    map_fd: int
    segments: tuple[int, ...]


class ArchiveImport(Transfer[None]):
    """The data of one import."""

    def __init__(
        self,
        *,
        disk: Disk,
        reader: ArchiveReader,
        target: Target,
        codecs: CodecFactory,
        base: SourceSnapshot | None,
        done_through: int,
        floor: int,
        rate: int = 0,
    ) -> None:
        """``reader`` is unlocked. ``floor``: free bytes of the file system that are left alone."""
        super().__init__(1, rate)
        self._disk = disk
        self._reader = reader
        self._manifest = reader.read_manifest
        self._target = target
        self._codecs = codecs
        self._base = base
        self._through = done_through
        self._floor = floor
        self._unsynced: set[int] = set()
        self._root = NO_HASH
        self._chunks = chunk_count(target.claim.size)
        self._entries = memoryview(bytearray(entry_bytes(self._chunks))).cast("I")
        if base is not None:
            known = min(len(base.entries), self._chunks)
            self._entries[:known] = base.entries[:known]
        mac = sign_import(target.key, target.claim.volume, self._manifest.content)
        self._content_mac = base64.b64encode(mac).decode()
        self.total = self._manifest.data_chunks * CHUNK

    def cost(self, piece: None) -> int:
        return 0  # it is spent per frame

    def details(self) -> dict[str, Any]:
        return {"DoneThrough": self._through, "Checkpoint": {"ContentMac": self._content_mac}}

    def transfer(self) -> bool:
        written, done_before = 0, self._through
        for frame in self._reader.frames():
            if self.stopping.is_set():
                return False
            length = self._take(frame, done_before)
            self.count(length)
            self.pacer.spend(length, self.stopping)
            written += length
            if written >= SYNC_BYTES:
                self._sync(frame.position.after)
                written = 0
        self._sync(self._chunks)
        try:
            with writing(self._where):
                self._root = self._leaf_root()
        except _Stopped:
            return False
        return True

    def _hashed(self, _chunks: int) -> None:
        if self.stopping.is_set():
            raise _Stopped

    def _take(self, frame: OpenedFrame, done_before: int) -> int:
        """Put a frame into the map and its data into the layer; return the bytes of its data."""
        at = 0
        for run in frame.runs:
            end = run.first + run.chunks
            value = HOLE if run.is_hole else self._target.layer
            for chunk in range(run.first, end):
                self._entries[chunk] = value
            if run.is_hole:
                continue
            view = frame.data[at : at + run.chunks * CHUNK]
            at += len(view)
            beyond = end * CHUNK - self._target.claim.size
            if beyond > 0 and any(view[-beyond:]):
                raise ArchiveDamaged(reason="it has data behind the end of the snapshot")
            if end > done_before:
                self._write(run.first, view)
        return at

    def _write(self, first: int, view: memoryview) -> None:
        self._check_room(len(view))
        codec = self._codecs.codec(self._target.table.uuid_of(self._target.layer))
        codec.encrypt_into(view, view, first * _SECTORS_PER_CHUNK)
        while view:
            segment, place = chunk_place(first)
            take = min(len(view) // CHUNK, CHUNKS_PER_SEGMENT - first % CHUNKS_PER_SEGMENT)
            self._unsynced.add(segment)
            with writing(self._where):
                pwrite_all(self._disk, self._target.segments[segment], view[: take * CHUNK], place)
            first, view = first + take, view[take * CHUNK :]

    @property
    def _where(self) -> str:
        return f"for the data of {self._target.claim.volume}"

    def _check_room(self, length: int) -> None:
        """Raise NoSpace at the floor: what lies below it is for volumes in use and for deletions."""
        try:
            usage = self._disk.statvfs(self._target.segments[0])
        except OSError:
            return  # what the disk says to the write counts
        if usage.f_bavail * usage.f_frsize - length < self._floor:
            raise NoSpace(where=self._where)

    def _sync(self, through: int) -> None:
        for segment in sorted(self._unsynced):
            with writing(self._where):
                self._disk.fdatasync(self._target.segments[segment])
        self._unsynced.clear()
        self._through = max(self._through, through)

    def finish(self) -> dict[str, Any]:
        """Write the map, and sign; returns {"Record", "Generation", "Digest"}."""
        if not self._reader.ended:
            raise AssertionError("BUG: finished before the last frame")
        target, claim = self._target, self._target.claim
        with writing(self._where):
            data = encode_sealed_map(
                SnapshotId(claim.volume), LineageId(claim.lineage), self._entries.cast("B"), self._chunks
            )
            self._disk.ftruncate(target.map_fd, 0)
            pwrite_all(self._disk, target.map_fd, data, 0)
            self._disk.fsync(target.map_fd)
        digest = map_hash(self._entries, self._chunks)
        body = next_body(target.body, claim, target.table, RecordState.CLEAN, digest, self._root)
        return {
            "Record": base64.b64encode(sign(body, target.key)).decode(),
            "Generation": 1,
            "Digest": self._reader.position.digest.hex(),
        }

    def _leaf_root(self) -> bytes:
        """Publish the leaves of the new layer; return the root over all layers, or none where the base has none."""
        target = self._target
        lineage, layer = target.table.lineage, target.layer
        remove_unfinished_of(self._disk, target.lineage_fd, alone=self._base is None)
        named = named_layers(self._entries)
        if layer in named:
            uuid = target.table.uuid_of(layer)
            wanted = Runs(named_ranges(self._entries, layer))
            slots = read_slots(self._disk, target.lineage_fd, lineage, {layer: uuid}, durable=True)
            if layer not in slots:
                hash_layer(self._disk, target.lineage_fd, lineage, layer, uuid, wanted, self._hashed)
        base = self._base
        is_bare = base is not None and (base.covering is None or base.covering.leaf_root == NO_HASH)
        if is_bare and named - {layer}:
            return NO_HASH  # what nobody signed yet is not signed in passing
        uuids = {number: target.table.uuid_of(number) for number in named}
        found = read_slots(self._disk, target.lineage_fd, lineage, uuids, durable=True)
        if set(found) != named:
            return NO_HASH
        return leaf_root(found.values())

    def release(self) -> None:
        self._reader.close()


def remove_unfinished_of(disk: Disk, dirfd: int, *, alone: bool) -> None:
    """Remove what a worker left that died while it hashed, where nobody else can be hashing in this lineage."""
    if alone:
        with contextlib.suppress(OSError):
            remove_unfinished(disk, dirfd)


# --- what ebsd sends


def prepare(params: dict[str, Any], holdings: Holdings) -> tuple[ArchiveImport, dict[str, Any]]:
    """Open the archive's header, verify the destination and the base, and begin.

    {"HeaderDigest": of the header that was judged, "Header": in base64 when it was read from a pipe already, else null;
    "Destination": {"ResourceId", "Owner", "Lineage", "Size", "Cipher", "KeyArn"}, "DestinationRecord", "Layer";
    "Base": null or {..., "AuthorityIds"}, "BaseRecord", "BaseContent", "BaseContentMac"; "DoneThrough", "SpaceReserve",
    "Rate"}. Descriptors: sessions of archive, destination and, if any, base; lineage directory, map to fill, map of the
    base if any; the archive; all segments of the layer.

    {"DataBytes"}. Raises ArchiveDamaged, ArchiveOfAnother for another header, ArchiveNeedsBase, what the sessions and
    the verification raise, HostFailure.
    """
    disk = RealDisk()
    has_base = params["Base"] is not None
    archive = holdings.ask()
    answer = holdings.ask()
    base_answer = holdings.ask() if has_base else None
    lineage_fd, map_fd, *rest = holdings.fds
    base_map_fd = rest.pop(0) if has_base else -1
    archive_fd, *segments = rest

    reader = _opened(archive_fd, params, archive)
    manifest = reader.read_manifest
    base = None
    if base_answer is not None:
        base = believed_source(disk, params["Base"], params["BaseRecord"], base_answer, lineage_fd, base_map_fd)
        _check_base(manifest, base, base_answer, params)
    elif manifest.base is not None:
        raise ArchiveNeedsBase(snapshot=manifest.snapshot, base=manifest.base.snapshot, reason="none was named")
    target = _target(disk, params, answer, base_answer, (lineage_fd, map_fd, *segments))
    if manifest.size != target.claim.size:
        raise IntegrityFailure(resource=target.claim.volume, reason=f"the archive has {manifest.size} bytes")
    done_through = int(params["DoneThrough"])
    if not 0 <= done_through <= manifest.chunks:
        raise IncorrectState(reason=f"An import of {manifest.chunks} chunks cannot be done through {done_through}")
    factory = CodecFactory(target.key, cipher=target.claim.cipher)
    holdings.factories.append(factory)
    made = ArchiveImport(
        disk=disk,
        reader=reader,
        target=target,
        codecs=factory,
        base=base,
        done_through=done_through,
        floor=int(params.get("SpaceReserve", 0)),
        rate=int(params.get("Rate", 0)),
    )
    return made, {"DataBytes": made.total}


def _opened(fd: int, params: dict[str, Any], archive: Answer) -> ArchiveReader:
    front = b"" if params["Header"] is None else base64.b64decode(params["Header"])
    try:
        if not front:
            os.lseek(fd, 0, os.SEEK_SET)
    except OSError as exc:
        raise HostFailure(where="at the archive", reason=exc.strerror or str(exc)) from exc
    reader = ArchiveReader(fd, front)
    manifest = reader.read_header()
    if reader.position.digest.hex() != params["HeaderDigest"]:
        raise ArchiveOfAnother(file="The import", reason="this is another archive than the one it was begun with")
    if archive.data_key is None or (archive.anchor.resource, archive.anchor.key_arn) != (
        manifest.archive, manifest.key_arn
    ):  # fmt: skip
        raise IntegrityFailure(resource=manifest.archive, reason="its key session is that of something else")
    reader.unlock(archive.data_key)
    return reader


def _check_base(manifest: Manifest, base: SourceSnapshot, answer: Answer, params: dict[str, Any]) -> None:
    wanted = manifest.base
    if wanted is None:
        raise ArchiveNeedsBase(snapshot=manifest.snapshot, base="no other", reason="it is full; leave --onto out")
    content, mac = bytes.fromhex(params["BaseContent"]), base64.b64decode(params["BaseContentMac"])
    if answer.data_key is None:
        raise IntegrityFailure(resource=base.claim.volume, reason="it was not imported: it has no data key")
    try:
        verify_import(answer.data_key, base.claim.volume, content, mac)
    except NotAuthentic:
        reason = "what the catalog says that it was imported as was not signed under its data key"
        raise IntegrityFailure(resource=base.claim.volume, reason=reason) from None
    if content != wanted.content or base.claim.size > manifest.size:
        reason = f"{base.claim.volume} has other content than that"
        raise ArchiveNeedsBase(snapshot=manifest.snapshot, base=wanted.snapshot, reason=reason)


def _target(
    disk: Disk, params: dict[str, Any], answer: Answer, base_answer: Answer | None, fds: tuple[int, ...]
) -> Target:
    lineage_fd, map_fd, *segments = fds
    claim = claim_of(params["Destination"], head=0)
    layer = int(params["Layer"])
    key = answer.data_key
    if key is None:
        raise IntegrityFailure(resource=claim.volume, reason="what is imported is always encrypted")
    with found_in(claim):
        record = record_of(params["DestinationRecord"])
        if base_answer is None:
            table = table_of(disk, lineage_fd, None)
            body = check_destination(claim, answer.anchor, key, record, table, layer)
        else:
            # Volumes of this lineage may be appending layers right now.
            table = table_of(disk, lineage_fd, record.body().table_count)
            body = check_filled(claim, answer.anchor, key, record, table, layer, alone=False)
            if base_answer.data_key is None or not key.equals(base_answer.data_key):
                raise IntegrityFailure(resource=claim.volume, reason="its data key is not that of its base")
        _check_segments(disk, claim, segments)
    return Target(claim, key, body, table, layer, lineage_fd, map_fd, tuple(segments))


def _check_segments(disk: Disk, claim: Claim, fds: list[int]) -> None:
    if len(fds) != segment_count(claim.size):
        raise StoreDamaged(file=claim.volume, reason=f"it cannot have {len(fds)} segments")
    for number, fd in enumerate(fds):
        status = disk.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size != segment_size(claim.size, number):
            raise StoreDamaged(file=claim.volume, reason=f"segment {number} of its layer has a wrong length")


if __name__ == "__main__":
    main(prepare, "ebsd-archive-importer")
