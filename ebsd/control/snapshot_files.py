"""The files of snapshots, and of volumes restored from them, as the use cases need them.

A snapshot is there when its record and its sealed map are: the record is written first, the map is renamed into
place last, so a complete map under its final name says that everything else is there too.

Everything here blocks and is O(map); the use cases run it in a worker thread.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ebsd.control.volume_files import VolumeFiles, space_errors
from ebsd.domain.errors import IntegrityFailure, StoreDamaged
from ebsd.domain.geometry import chunk_count
from ebsd.domain.ids import KeyArn, LineageId, SnapshotId, VolumeId
from ebsd.domain.model import Cipher, Layer, Snapshot, Volume
from ebsd.domain.units import SECTOR
from ebsd.store.disk import Disk, fsync_directory, read_file
from ebsd.store.durablemap import DurableMap, MapHeader, create_durable_map
from ebsd.store.entries import ENTRY, entry_bytes
from ebsd.store.layers import create_layer, open_layer, seal_layer
from ebsd.store.layertable import LayerTable, create_layer_table, extend_layer_table, known_layers, read_layer_table
from ebsd.store.layout import StateLayout
from ebsd.store.record import MAX_RECORD, Origin, Record, Resource, WrappedKey, read_record, write_record
from ebsd.store.sealedmap import read_sealed_map, write_sealed_map
from ebsd.store.signedrecord import NO_HASH, UNSIGNED, RecordState, SignedBody, parse_signed


@dataclass(frozen=True, slots=True)
class Destination:
    """A new resource in a lineage of its own, made empty for a copy to fill."""

    resource: VolumeId | SnapshotId
    lineage: LineageId
    account: str
    owner: str
    name: str
    size: int
    cipher: Cipher
    created: str
    source: str
    """Of a volume, the snapshot it is made from; of a snapshot, what stands for the volume it was taken of."""
    description: str


class SnapshotFiles:
    """File work of snapshots, below one state directory."""

    def __init__(self, disk: Disk, state: StateLayout, volumes: VolumeFiles) -> None:
        self._disk = disk
        self._state = state
        self._volumes = volumes

    # --- taking a snapshot

    def add_head(self, layers: Sequence[Layer], size: int) -> list[int]:
        """Put the newest of a lineage's layers into table and directory; returns its segments, opened for writing.

        ``layers``, oldest first, are at least those of the lineage that the table lacks. A crash may have left earlier
        ones out of it, and it is dense: they are put in too, without files. The caller closes the descriptors.
        """
        newest = layers[-1]
        with space_errors(self._state.root):
            self._extend_table(layers)
            dirfd = self._disk.open(self._state.lineage(newest.lineage), os.O_RDONLY | os.O_DIRECTORY)
            try:
                create_layer(self._disk, dirfd, newest.number, newest.uuid, size)
                return list(open_layer(self._disk, dirfd, newest.number, newest.uuid, size, writable=True))
            finally:
                self._disk.close(dirfd)

    def complete_head(self, layers: Sequence[Layer], size: int) -> list[int]:
        """As ``add_head`` for a head that may be there already, with data."""
        newest = layers[-1]
        dirfd = self._disk.open(self._state.lineage(newest.lineage), os.O_RDONLY | os.O_DIRECTORY)
        fds: list[int] = []
        try:
            try:
                fds += open_layer(self._disk, dirfd, newest.number, newest.uuid, size, writable=True)
            except StoreDamaged:
                return self.add_head(layers, size)
            # Whoever made it was killed, perhaps before its files and names were durable: they are only seen.
            for fd in fds:
                self._disk.fsync(fd)
            self._disk.fsync(dirfd)
            return fds
        except BaseException:
            for fd in fds:
                self._disk.close(fd)
            raise
        finally:
            self._disk.close(dirfd)

    def _extend_table(self, layers: Sequence[Layer]) -> LayerTable:
        path = self._state.table(layers[-1].lineage)
        return extend_layer_table(self._disk, path, read_layer_table(self._disk, path), layers)

    def known_layers(self, lineage: LineageId) -> int:
        """As ``store.layertable.known_layers``, of a lineage."""
        return known_layers(self._state.table(lineage))

    def open_new_map(self, snapshot: SnapshotId) -> int:
        """Return a descriptor of the snapshot's map under its temporary name, empty; the caller closes it."""
        return self._disk.open(self._new_map(snapshot), os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)

    def open_map_to_fill(self, snapshot: SnapshotId) -> int:
        """As ``open_new_map``, with what an earlier worker of the same job left in it."""
        return self._disk.open(self._new_map(snapshot), os.O_RDWR | os.O_CREAT, 0o600)

    def sync_new_maps(self) -> None:
        """Make the temporary names of maps durable."""
        fsync_directory(self._disk, self._state.maps)

    def _new_map(self, snapshot: SnapshotId) -> str:
        return str(self._state.maps / f".{snapshot}.tmp")

    def finish(self, snapshot: Snapshot, signed: bytes, authority: bytes | None) -> None:
        """Write the record, then rename the complete map into place: from here on the snapshot exists."""
        with space_errors(self._state.root):
            self._write_record(snapshot, signed, authority)
            self._disk.rename(self._new_map(snapshot.id), self._state.map(snapshot.id))
            fsync_directory(self._disk, self._state.maps)

    def _write_record(self, snapshot: Snapshot, signed: bytes, authority: bytes | None) -> None:
        wrapped = None
        if snapshot.key_arn is not None and snapshot.wrapped_key is not None:
            wrapped = WrappedKey(snapshot.key_arn, snapshot.wrapped_key, snapshot.context)
        resource = Resource(
            snapshot.id,
            snapshot.account,
            snapshot.owner,
            snapshot.lineage,
            SECTOR,
            snapshot.cipher,
            snapshot.size,
            snapshot.started,
            snapshot.name,
        )
        origin = Origin(snapshot.volume, snapshot.description)
        write_record(self._disk, self._state.record(snapshot.id), Record(resource, wrapped, signed, authority, origin))

    def take_detached(self, volume: Volume, snapshot: Snapshot) -> str | None:
        """Take the snapshot of a volume that no process writes to: its durable map is the point in time.

        No data key is at hand, so the snapshot's record is unsigned and carries the volume's signed one as its
        authority: that one covers the map when the volume ended cleanly. Returns whose record that is.
        """
        with space_errors(self._state.root):
            record = read_record(self._disk, self._state.record(volume.id))
            body = record.body()
            durable = DurableMap.open(self._disk, self._state.map(volume.id), writable=False)
            try:
                # Longer when a growth was cut or failed: what it added is nobody's, and no signature covers it.
                entries, chunks = durable.entries(), chunk_count(volume.size)
                if durable.header.chunks < chunks:
                    raise StoreDamaged(
                        file=self._state.map(volume.id),
                        reason=f"it has {durable.header.chunks} chunks, the volume {chunks}",
                    )
            finally:
                durable.close()
            write_sealed_map(
                self._disk, self._state.maps / f".{snapshot.id}.tmp", snapshot.id, volume.lineage, entries, chunks
            )
            authority = None if body.state is RecordState.BORN else record.signed
            if body.state is RecordState.BORN and record.authority is not None:
                authority = record.authority
            born = self._born(snapshot.id, snapshot.account, volume.lineage, volume.size, volume.cipher, head=0)
            self.finish(snapshot, born, authority)
            return _signer(authority)

    def _born(
        self, resource: VolumeId | SnapshotId, account: str, lineage: LineageId, size: int, cipher: Cipher, *, head: int
    ) -> bytes:
        table = read_layer_table(self._disk, self._state.table(lineage))
        count = len(table.layers)
        body = SignedBody(
            RecordState.BORN,
            resource,
            lineage,
            account,  # type: ignore[arg-type]
            size,
            cipher,
            generation=0,
            head=head,
            table_count=count,
            table_hash=table.prefix_hash(count),
            map_hash=NO_HASH,
        )
        return body.encode() + UNSIGNED

    def seal_layer(self, layer: Layer) -> None:
        """Make a layer read-only for ever; data first made durable."""
        dirfd = self._disk.open(self._state.lineage(layer.lineage), os.O_RDONLY | os.O_DIRECTORY)
        try:
            seal_layer(self._disk, dirfd, layer.number, layer.uuid, layer.size)
        finally:
            self._disk.close(dirfd)

    def sign_again(self, snapshot: SnapshotId, generation: int, signed: bytes) -> bool:
        """Replace the signed part of a record by the one a generation later; False when it is not that, or none there.

        An authority that it carried goes: from here on the snapshot's own signature covers map and table.
        """
        try:
            present = read_record(self._disk, self._state.record(snapshot))
        except FileNotFoundError:
            return False
        body = parse_signed(signed, file=snapshot)
        if body.resource != snapshot or body.generation != generation or present.body().generation + 1 != generation:
            return False
        with space_errors(self._state.root):
            record = replace(present, signed=signed, authority=None)
            write_record(self._disk, self._state.record(snapshot), record)
        return True

    def exists(self, snapshot: SnapshotId) -> bool:
        """Say whether the snapshot is complete: its map stands under its final name, durably when this says so.

        Whoever renamed it may have been killed before the name was durable, and a row would be final too early.
        """
        if not self._state.map(snapshot).exists():
            return False
        fsync_directory(self._disk, self._state.maps)
        return True

    def has_same_map(self, volume: VolumeId, snapshot: SnapshotId) -> bool:
        """Say whether the durable map of a volume is the snapshot's; False when one of them is gone."""
        try:
            durable = DurableMap.open(self._disk, self._state.map(volume), writable=False)
            try:
                chunks, entries = durable.header.chunks, bytes(durable.entries().cast("B"))
            finally:
                durable.close()
            sealed = read_sealed_map(self._disk, self._state.map(snapshot), snapshot)
        except FileNotFoundError:
            return False
        length = chunks * ENTRY
        same = bytes(sealed.entries.cast("B"))
        return len(same) >= length and entries[:length] == same[:length] and not any(same[length:])

    def remove(self, snapshot: SnapshotId) -> None:
        """Remove map and record, finished or not; may be repeated. Layers are the sweep's business."""
        for path in (self._state.map(snapshot), self._state.maps / f".{snapshot}.tmp", self._state.record(snapshot)):
            with contextlib.suppress(FileNotFoundError):
                self._disk.unlink(path)
        fsync_directory(self._disk, self._state.maps)
        fsync_directory(self._disk, self._state.records)

    def remove_record(self, resource: VolumeId | SnapshotId) -> None:
        """Remove the record of what was deleted, without which nobody can open it; may be repeated."""
        with contextlib.suppress(FileNotFoundError):
            self._disk.unlink(self._state.record(resource))
        fsync_directory(self._disk, self._state.records)

    # --- using a snapshot

    def record(self, snapshot: Snapshot) -> Record:
        """Return the record of a snapshot; raises IntegrityFailure when it is missing, StoreDamaged when damaged."""
        return self.record_of(snapshot.id)

    def record_of(self, resource: VolumeId | SnapshotId) -> Record:
        """Return a record by id; raises IntegrityFailure when it is missing."""
        try:
            return read_record(self._disk, self._state.record(resource))
        except FileNotFoundError:
            raise IntegrityFailure(resource=resource, reason="its record is missing") from None

    def generation_of(self, resource: VolumeId | SnapshotId) -> tuple[int, float]:
        """Return the generation of a record, and when its file was written; raises IntegrityFailure, StoreDamaged."""
        record = self.record_of(resource)
        return record.body().generation, self._state.record(resource).stat().st_mtime

    def put_wrapped_key(self, resource: VolumeId | SnapshotId, earlier: WrappedKey, blob: bytes) -> None:
        """Put another wrapping of the same data key into a record, which keeps everything else, durable at return.

        Raises IntegrityFailure when it does not have ``earlier`` any more, NoSpace.
        """
        with space_errors(self._state.root):
            present = self.record_of(resource)
            if present.wrapped_key != earlier:
                raise IntegrityFailure(resource=resource, reason="its record was changed while it was rewrapped")
            wrapped = replace(earlier, blob=blob)
            write_record(self._disk, self._state.record(resource), replace(present, wrapped_key=wrapped))

    def is_prepared(self, resource: VolumeId | SnapshotId) -> bool:
        """Say whether ``prepare_destination`` got to its end, and no removal has begun.

        Of both files the record is written last; the map, which only a volume has from the start, is removed first.
        """
        if not resource.startswith("snap-") and not self._state.map(resource).exists():
            return False
        return self._state.record(resource).exists()

    def record_bytes(self, resource: VolumeId | SnapshotId) -> bytes:
        return bytes(read_file(self._disk, self._state.record(resource), MAX_RECORD))

    def authority_of(self, snapshot: Snapshot) -> bytes | None:
        """Return the signed record that covers the snapshot's map: its own, or the one it carries."""
        record = self.record(snapshot)
        return record.authority if record.body().state is RecordState.BORN else record.signed

    @staticmethod
    def signer_of(record: Record) -> str | None:
        """Return the id of whose signed record covers the map of this one, if not its own."""
        return _signer(record.authority)

    def restore(self, snapshot: Snapshot, volume: Volume, layers: Sequence[Layer], blob: bytes | None) -> str | None:
        """Make a volume that shares the snapshot's layers: a head of its own, the snapshot's map, a born record.

        The record carries the signed record of the snapshot as authority, which the first attachment checks the map
        against, as nobody has the data key now; returns whose record it is. O(map), no data is read.
        """
        with space_errors(self._state.root):
            sealed = read_sealed_map(self._disk, self._state.map(snapshot.id), snapshot.id)
            for fd in self.add_head(layers, volume.size):
                self._disk.close(fd)
            chunks = chunk_count(volume.size)
            entries = memoryview(bytearray(entry_bytes(chunks)))
            source = sealed.entries.cast("B")
            used = min(len(source), len(entries))
            entries[:used] = source[:used]
            header = MapHeader(volume.lineage, volume.id, volume.head, chunks)
            create_durable_map(self._disk, self._state.map(volume.id), header, entries)
            wrapped = None
            if volume.key_arn is not None and blob is not None:
                wrapped = WrappedKey(volume.key_arn, blob, volume.context)
            born = self._born(volume.id, volume.account, volume.lineage, volume.size, volume.cipher, head=volume.head)
            resource = Resource(
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
            authority = self.authority_of(snapshot)
            origin = Origin(snapshot.id)
            write_record(self._disk, self._state.record(volume.id), Record(resource, wrapped, born, authority, origin))
            return _signer(authority)

    def copy_within_lineage(self, source: Snapshot, copy: Snapshot) -> str | None:
        """Make a copy that shares data key and layers: the same map, another id. Returns whose record covers it."""
        with space_errors(self._state.root):
            sealed = read_sealed_map(self._disk, self._state.map(source.id), source.id)
            temporary = self._state.maps / f".{copy.id}.tmp"
            write_sealed_map(self._disk, temporary, copy.id, copy.lineage, sealed.entries, sealed.chunks)
            born = self._born(copy.id, copy.account, copy.lineage, copy.size, copy.cipher, head=0)
            authority = self.authority_of(source)
            self.finish(copy, born, authority)
            return _signer(authority)

    # --- copies into another lineage

    def prepare_destination(
        self, destination: Destination, layer: Layer, key: KeyArn | None, blob: bytes | None, context: Mapping[str, str]
    ) -> None:
        """Make lineage, layer, born record and, for a volume, the all-hole map that a copy worker fills."""
        with space_errors(self._state.root):
            self._state.create_lineage(self._disk, destination.lineage)
            create_layer_table(
                self._disk, self._state.table(destination.lineage), destination.lineage, destination.cipher
            )
            for fd in self.add_head([layer], destination.size):
                self._disk.close(fd)
            is_snapshot = destination.resource.startswith("snap-")
            if not is_snapshot:
                header = MapHeader(
                    destination.lineage, VolumeId(destination.resource), layer.number, chunk_count(destination.size)
                )
                DurableMap.create(self._disk, self._state.map(destination.resource), header).close()
            self._write_born(destination, 0 if is_snapshot else layer.number, key, blob, context)

    def prepare_child(
        self,
        destination: Destination,
        layers: Sequence[Layer],
        key: KeyArn | None,
        blob: bytes | None,
        context: Mapping[str, str],
    ) -> None:
        """Make the layer and the born record of a snapshot that is to be filled in the lineage of its parent.

        ``layers`` as of ``add_head``; the newest is its own.
        """
        with space_errors(self._state.root):
            for fd in self.add_head(layers, destination.size):
                self._disk.close(fd)
            self._write_born(destination, 0, key, blob, context)

    def _write_born(
        self, destination: Destination, head: int, key: KeyArn | None, blob: bytes | None, context: Mapping[str, str]
    ) -> None:
        born = self._born(
            destination.resource,
            destination.account,
            destination.lineage,
            destination.size,
            destination.cipher,
            head=head,
        )
        resource = Resource(
            destination.resource,
            destination.account,  # type: ignore[arg-type]
            destination.owner,
            destination.lineage,
            SECTOR,
            destination.cipher,
            destination.size,
            destination.created,
            destination.name,
        )
        wrapped = None if key is None or blob is None else WrappedKey(key, blob, context)
        record = Record(resource, wrapped, born, origin=Origin(destination.source, destination.description))
        write_record(self._disk, self._state.record(destination.resource), record)

    def open_layer_to_fill(self, snapshot: SnapshotId, layer: Layer) -> list[int]:
        """Return descriptors of the lineage directory and of the layer's segments, for writing; the caller closes them.

        Raises IntegrityFailure when the directory is missing, StoreDamaged, OSError.
        """
        directory = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
        try:
            fds = [self._disk.open(self._state.lineage(layer.lineage), directory)]
        except FileNotFoundError:
            raise IntegrityFailure(resource=snapshot, reason="its directory of layers is missing") from None
        try:
            fds += open_layer(self._disk, fds[0], layer.number, layer.uuid, layer.size, writable=True)
        except BaseException:
            self._disk.close(fds[0])
            raise
        return fds

    def prepare_increment(
        self,
        destination: Destination,
        missing: Sequence[Layer],
        layer: Layer,
        key: KeyArn,
        blob: bytes,
        context: Mapping[str, str],
    ) -> None:
        """Make a further layer, and the born record of a snapshot, in a lineage that is there already.

        ``missing``: the layers that its table lacks, oldest first, perhaps without ``layer``. May be repeated as long
        as the layer holds no data. The caller holds the lineage's lock.
        """
        with space_errors(self._state.root):
            if missing:
                self._extend_table(missing)
            dirfd = self._disk.open(self._state.lineage(layer.lineage), os.O_RDONLY | os.O_DIRECTORY)
            try:
                create_layer(self._disk, dirfd, layer.number, layer.uuid, destination.size)
            finally:
                self._disk.close(dirfd)
            self._write_born(destination, 0, key, blob, context)

    def open_source(self, snapshot: Snapshot) -> list[int]:
        """Return descriptors of the lineage directory and the sealed map, read-only; the caller closes them."""
        return self.open_for_reading(snapshot.id, snapshot.lineage)

    def open_for_reading(self, resource: VolumeId | SnapshotId, lineage: LineageId) -> list[int]:
        """Return descriptors of the lineage directory and the map, read-only; the caller closes them.

        Raises IntegrityFailure when one is missing, OSError.
        """
        directory = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
        fds: list[int] = []
        try:
            fds.append(self._disk.open(self._state.lineage(lineage), directory))
            fds.append(self._disk.open(self._state.map(resource), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK))
        except OSError as exc:
            for fd in fds:
                self._disk.close(fd)
            if exc.errno == errno.ENOENT:
                what = "map" if fds else "directory of layers"
                raise IntegrityFailure(resource=resource, reason=f"its {what} is missing") from exc
            raise
        return fds

    def open_destination(self, destination: Destination, layer: Layer) -> list[int]:
        """Return descriptors of the lineage directory, the map to fill and the segments; the caller closes them."""
        directory = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
        fds = [self._disk.open(self._state.lineage(destination.lineage), directory)]
        if destination.resource.startswith("snap-"):
            fds.append(self.open_map_to_fill(SnapshotId(destination.resource)))
        else:
            fds.append(self._disk.open(self._state.map(destination.resource), os.O_RDWR | os.O_NOFOLLOW))
        fds += open_layer(self._disk, fds[0], layer.number, layer.uuid, destination.size, writable=True)
        return fds

    def signed_copy(self, resource: VolumeId | SnapshotId) -> bytes | None:
        """Return the signed record of a destination whose worker has finished, None before that.

        It is written when map and data are durable, for a snapshot under the map's temporary name.
        """
        if not self.is_prepared(resource):
            return None
        record = self.record_of(resource)
        if record.body().state is RecordState.BORN:
            return None
        if resource.startswith("snap-"):
            parts = (self._state.map(resource), Path(self._new_map(SnapshotId(resource))))
            if not any(path.exists() for path in parts):
                return None
        return record.signed

    def finish_copied_snapshot(self, snapshot: Snapshot, signed: bytes) -> None:
        """Write the record and rename the map; may be repeated, with the map in place already."""
        if self.exists(snapshot.id):
            return
        self.finish(snapshot, signed, None)

    def finish_copied_volume(self, volume: Volume, signed: bytes) -> None:
        """Put the signed record of a volume that a copy filled into its record file."""
        parse_signed(signed, file=volume.id)
        self._volumes.write_signed_record(volume.id, signed)


def _signer(signed: bytes | None) -> str | None:
    return None if signed is None else parse_signed(signed, file="authority").resource
