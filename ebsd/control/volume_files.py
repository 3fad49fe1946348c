"""The files of a volume, as the use cases need them: made, opened for an attachment, salvaged, removed.

Everything here blocks and is O(files) or O(map); the use cases run it in a worker thread.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from ebsd.domain.errors import EbsdError, HostUnsupported, IntegrityFailure, NoSpace, StoreDamaged
from ebsd.domain.geometry import chunk_count, segment_count
from ebsd.domain.ids import KeyArn, SnapshotId, VolumeId, parse_uuid
from ebsd.domain.model import Layer, Volume
from ebsd.domain.units import SECTOR
from ebsd.store.ballast import Ballast
from ebsd.store.disk import Disk, fsync_directory, read_file
from ebsd.store.durablemap import DurableMap, MapHeader, create_durable_map, grow_durable_map
from ebsd.store.layers import create_layer, grow_layer, open_layer
from ebsd.store.layertable import LayerEntry, LayerTable, append_layer, create_layer_table, read_layer_table
from ebsd.store.layout import LiveLayout, StateLayout
from ebsd.store.leaves import remove_unfinished
from ebsd.store.livemap import LiveIdentity, LiveMap, remove_live_map
from ebsd.store.record import MAX_RECORD, Origin, Record, Resource, WrappedKey, parse_record, read_record, write_record
from ebsd.store.salvage import Salvage, SalvageOutcome, salvage
from ebsd.store.signedrecord import BODY_BYTES, UNSIGNED, RecordState, SignedBody

log = logging.getLogger(__name__)


_NOT_WHAT_IT_WAS: Final[Mapping[int, str]] = {
    errno.ENOENT: "it is missing",
    errno.ELOOP: "it is a symbolic link",
    errno.EISDIR: "it is a directory",
    errno.ENOTDIR: "it is no directory",
    errno.ENXIO: "it is not a regular file",
}
"""What opening a file of the store can say when somebody put something else in its place."""


@dataclass(frozen=True, slots=True)
class OpenedForAttach:
    """What a volume process gets: the record's bytes, and descriptors that are the caller's to close."""

    record: bytes
    fds: list[int]
    """Lineage directory, durable map, then the segments of the head in order."""


class VolumeFiles:
    """File work of volumes, below one state directory."""

    def __init__(self, disk: Disk, state: StateLayout, live: LiveLayout, ballast: Ballast) -> None:
        self._disk = disk
        self._state = state
        self._live = live
        self._ballast = ballast

    def create(
        self, volume: Volume, layer_uuid: bytes, key: KeyArn | None, blob: bytes | None, *, preallocate: bool = False
    ) -> None:
        """Make lineage directory, layer table, head, map and born record; durable at return.

        ``preallocate`` gives the head and the map all their blocks, so that neither a write nor a flush needs any.
        Raises NoSpace and OSError; what was made then is removed by ``remove``.
        """
        with space_errors(self._state.root):
            directory = self._state.create_lineage(self._disk, volume.lineage)
            table_path = self._state.table(volume.lineage)
            create_layer_table(self._disk, table_path, volume.lineage, volume.cipher)
            table = append_layer(self._disk, table_path, LayerEntry(volume.head, layer_uuid, volume.id))
            dirfd = self._disk.open(directory, os.O_RDONLY | os.O_DIRECTORY)
            try:
                create_layer(self._disk, dirfd, volume.head, layer_uuid, volume.size, preallocate=preallocate)
            finally:
                self._disk.close(dirfd)
            header = MapHeader(volume.lineage, volume.id, volume.head, chunk_count(volume.size))
            create_durable_map(self._disk, self._state.map(volume.id), header, written_out=preallocate)
            body = SignedBody(
                RecordState.BORN,
                volume.id,
                volume.lineage,
                volume.account,
                volume.size,
                volume.cipher,
                generation=0,
                head=volume.head,
                table_count=volume.head,
                table_hash=table.prefix_hash(volume.head),
            )
            wrapped = None if key is None or blob is None else WrappedKey(key, blob, volume.context)
            record = Record(_resource(volume), wrapped, body.encode() + UNSIGNED, origin=Origin(volume.snapshot or ""))
            write_record(self._disk, self._state.record(volume.id), record)

    def remove(self, volume: Volume) -> None:
        """Remove record and live map of a volume; may be repeated. Map and layers are the sweep's business."""
        self.remove_live_map(volume.id)
        with contextlib.suppress(FileNotFoundError):
            self._disk.unlink(self._state.record(volume.id))
        fsync_directory(self._disk, self._state.records)

    def remove_live_map(self, volume: VolumeId) -> None:
        """Remove the live map, if there is one: its changes are in the durable map, or nobody wants them."""
        remove_live_map(self._disk, self._live.live_map(volume))

    def wrapped_key(self, volume: Volume) -> WrappedKey:
        """Return the wrapped data key from the record; what opens it is the key service's business."""
        record = self._record(volume)
        if record.wrapped_key is None:
            raise IntegrityFailure(
                resource=volume.id, reason="its record has no wrapped key, but the catalog says it is encrypted"
            )
        if record.wrapped_key.context != volume.context:
            raise IntegrityFailure(
                resource=volume.id, reason="its record and the catalog disagree about its encryption context"
            )
        if record.resource.account != volume.account:
            raise IntegrityFailure(resource=volume.id, reason="its record and the catalog disagree about its owner")
        return record.wrapped_key

    def _record(self, volume: Volume) -> Record:
        try:
            return read_record(self._disk, self._state.record(volume.id))
        except OSError as exc:
            raise _record_error(volume.id, exc) from exc

    def write_signed_record(self, ident: VolumeId, signed: bytes) -> None:
        """Put a record that the volume process signed into the record file, durable at return.

        Draws on the ballast: a volume must come off a full disk cleanly.
        """
        path = self._state.record(ident)

        def write() -> None:
            present = read_record(self._disk, path)
            body = SignedBody.parse(signed[:BODY_BYTES], file=str(path))
            resource = replace(present.resource, size=body.size)
            write_record(self._disk, path, Record(resource, present.wrapped_key, signed, origin=present.origin))

        with space_errors(path):
            self._ballast.relieved(write)

    def rename(self, ident: VolumeId | SnapshotId, name: str) -> None:
        """Put a new name into the record, which serves when the catalog is rebuilt. Raises EbsdError, OSError."""
        path = self._state.record(ident)
        with space_errors(path):
            present = read_record(self._disk, path)
            write_record(self._disk, path, replace(present, resource=replace(present.resource, name=name)))

    def open_for_attach(self, volume: Volume, read_only: bool) -> OpenedForAttach:
        """Open what a volume process serves from; raises IntegrityFailure or StoreDamaged for what is not there."""
        try:
            record = bytes(read_file(self._disk, self._state.record(volume.id), MAX_RECORD))
        except OSError as exc:
            raise _record_error(volume.id, exc) from exc
        parse_record(record, file=str(self._state.record(volume.id)))
        fds: list[int] = []
        try:
            fds.append(self._open_lineage(volume))
            fds.append(self._open_map(volume, read_only))
            table = read_layer_table(self._disk, self._state.table(volume.lineage))
            fds += open_layer(
                self._disk, fds[0], volume.head, self._uuid(table, volume), volume.size, writable=not read_only
            )
        except BaseException as exc:
            for fd in fds:
                self._disk.close(fd)
            if isinstance(exc, OSError):
                raise _damage(exc) from exc
            raise
        return OpenedForAttach(record, fds)

    def _open_lineage(self, volume: Volume) -> int:
        return self._disk.open(self._state.lineage(volume.lineage), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)

    def _open_map(self, volume: Volume, read_only: bool) -> int:
        flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_NOFOLLOW | os.O_NONBLOCK
        return self._disk.open(self._state.map(volume.id), flags)

    @staticmethod
    def _uuid(table: LayerTable, volume: Volume) -> bytes:
        try:
            return table.uuid_of(volume.head)
        except KeyError:
            raise IntegrityFailure(
                resource=volume.id, reason=f"its head layer {volume.head} is not in the layer table"
            ) from None

    def salvage(self, volume: Volume, boot_id: str, generation: int) -> Salvage:
        """Bring what a dead volume process acknowledged into the durable map; no process may hold the live map.

        Errors as ``store.salvage``; a live map that is not there, or is void, is no error.
        """
        path = self._live.live_map(volume.id)
        if not path.exists():
            return Salvage(SalvageOutcome.ABSENT)
        opened = self.open_for_attach(volume, read_only=False)
        _, map_fd, *head = opened.fds
        try:
            table = read_layer_table(self._disk, self._state.table(volume.lineage))
            durable = DurableMap.from_fd(self._disk, map_fd, str(self._state.map(volume.id)))
            identity = LiveIdentity(parse_uuid(boot_id), volume.id, volume.lineage, generation)
            result = salvage(
                self._disk,
                path,
                identity,
                durable,
                data_fds=head,
                layers=table.numbers(),
                head=volume.head,
                lineage=(opened.fds[0], table),
            )
            remove_unfinished(self._disk, opened.fds[0])  # what the dead one was hashing
        finally:
            for fd in opened.fds:
                self._disk.close(fd)
        if result.outcome is SalvageOutcome.FAILED:
            log.error("%s: %s", volume.id, result.outcome.value)
        elif result.outcome is SalvageOutcome.APPLIED:
            log.warning("%s: salvaged %d map pages of an attachment that did not end cleanly", volume.id, result.pages)
        return result

    def has_failed(self, volume: Volume, boot_id: str, generation: int) -> bool:
        """Say whether the live map of an attachment whose process has ended says that its engine had failed.

        Raises LiveMapInUse while something of that process is left.
        """
        identity = LiveIdentity(parse_uuid(boot_id), volume.id, volume.lineage, generation)
        try:
            live = LiveMap.open(self._disk, self._live.live_map(volume.id), identity)
        except (EbsdError, OSError) as exc:
            log.error("the live map of %s: %s", volume.id, exc)
            return False
        if live is None:
            return False
        try:
            return live.failed
        finally:
            live.close()

    def grow(self, volume: Volume, layer: Layer, size: int, served: int) -> list[int]:
        """Let head layer and durable map fit ``size`` bytes; may be repeated.

        Returns the segments of the head beyond those of ``served`` bytes, opened for writing; the caller closes them.
        """
        with space_errors(self._state.root):
            dirfd = self._open_lineage(volume)
            try:
                grow_layer(self._disk, dirfd, layer.number, layer.uuid, volume.size, size)
                grow_durable_map(self._disk, self._state.map(volume.id), size)
                segments = open_layer(self._disk, dirfd, layer.number, layer.uuid, size, writable=True)
            finally:
                self._disk.close(dirfd)
        kept = segment_count(served)
        for fd in segments[:kept]:
            self._disk.close(fd)
        return list(segments[kept:])


def _record_error(resource: str, error: OSError) -> Exception:
    if error.errno == errno.ENOENT:
        return IntegrityFailure(resource=resource, reason="its record is missing")
    return _damage(error)


def _damage(error: OSError) -> Exception:
    """Return the error as StoreDamaged when it says that something else lies where a file of the store was."""
    reason = _NOT_WHAT_IT_WAS.get(error.errno or 0)
    return error if reason is None else StoreDamaged(file=error.filename, reason=reason)


def _resource(volume: Volume) -> Resource:
    return Resource(
        volume.id,
        volume.account,
        volume.owner,
        volume.lineage,
        SECTOR,
        volume.cipher,
        volume.size,
        volume.created,
        volume.name,
    )


@contextlib.contextmanager
def space_errors(where: Path) -> Iterator[None]:
    """Raise NoSpace for what the host file system answers with ENOSPC or EDQUOT, HostUnsupported for EFBIG."""
    try:
        yield
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(where=f"in {where}") from exc
        if exc.errno == errno.EFBIG:
            raise HostUnsupported(
                reason=f"The file system of {where} cannot hold a file of that size",
                remedy="Choose a smaller size, or put the state directory on another file system.",
            ) from exc
        raise
