"""The catalog rebuilt from what else is in the store: records, layer tables, headers of maps, names of files.

1. It reads only, and writes one new file beside the old catalog; swapping the two is a step of its own.
2. What can be said is taken over even where something of a resource is damaged: a row without its map can be mended
   from a backup, a missing row cannot.
3. Nothing is guessed that could give wrong bytes. What was being made, and what no readable record names, gets no row;
   its files stay, and are told.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from ebsd.domain.errors import EbsdError, InvalidName
from ebsd.domain.geometry import chunk_count, segment_count
from ebsd.domain.ids import (
    COPY_SOURCE,
    LineageId,
    SnapshotId,
    VolumeId,
    parse_name,
    parse_resource_id,
    parse_snapshot_id,
    parse_uuid,
    parse_volume_id,
)
from ebsd.domain.model import Attachment, Integrity, Layer, LayerState, Lineage, Snapshot, Volume
from ebsd.domain.states import SnapshotState, VolumeState
from ebsd.domain.units import CHUNK, MAX_VOLUME, MIN_VOLUME, SECTOR
from ebsd.store.catalog import Catalog, Transaction
from ebsd.store.check import KEPT_CATALOG
from ebsd.store.disk import Disk, fsync_directory
from ebsd.store.durablemap import DurableMap
from ebsd.store.entries import is_all_holes
from ebsd.store.layers import parse_segment_name
from ebsd.store.layertable import LayerTable, read_layer_table
from ebsd.store.layout import StateLayout
from ebsd.store.livemap import LiveIdentity, read_live_identity
from ebsd.store.record import Record, read_record
from ebsd.store.signedrecord import RecordState, SignedBody, parse_signed

LOST: Final = (
    "tags",
    "jobs, and what they were making",
    "times at which snapshots were completed, and for how long they held I/O",
    "the places where volumes were mounted by ebsctl",
    "locks of snapshots",
    "the rules of the recycle bin; what lay in it is a volume or snapshot as others",
    "client tokens, and what became of the growths of volumes",
)
"""What stands in the catalog alone, whatever it held."""


@dataclass(slots=True)
class Plan:
    """The rows of the new catalog."""

    lineages: dict[LineageId, Lineage] = field(default_factory=dict)
    layers: list[Layer] = field(default_factory=list)
    next_layer: dict[LineageId, int] = field(default_factory=dict)
    volumes: list[Volume] = field(default_factory=list)
    snapshots: list[Snapshot] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What is not as it was, of resources that were taken over."""
    left: dict[str, str] = field(default_factory=dict)
    """Id (or lineage) that gets no row -> why."""


def has_resources(disk: Disk, layout: StateLayout, *, missing_ok: bool = False) -> bool:
    """Say whether the store holds anything that a catalog would name. Raises OSError.

    ``missing_ok``: also where the store was not made yet.
    """
    for directory in (layout.records, layout.maps, layout.layers):
        try:
            names = disk.listdir(directory)
        except FileNotFoundError:
            if not missing_ok:
                raise
            names = []
        if any(not name.startswith(".") for name in names):
            return True
    return False


def plan_rebuild(disk: Disk, layout: StateLayout, live: Path, boot_id: bytes, now: str) -> Plan:
    """Read the store and return what its catalog must say. Every error of a file becomes a line of ``left``.

    ``now``: what stands for times that are lost. Raises OSError only when STATE itself cannot be listed.
    """
    plan = Plan()
    records: dict[LineageId, dict[str, Record]] = {}
    for name in sorted(disk.listdir(layout.records)):
        if name.startswith("."):
            continue
        try:
            ident = parse_resource_id(name)
            record = read_record(disk, layout.record(ident))
            if record.resource.id != ident:
                plan.left[name] = f"its record is that of {record.resource.id}"
                continue
            record.body()
            parse_uuid(record.resource.lineage)
        except (EbsdError, OSError, ValueError) as error:
            plan.left[name] = f"its record cannot be read: {_reason(error)}"
            continue
        records.setdefault(record.resource.lineage, {})[name] = record
    for name in sorted(disk.listdir(layout.maps)):
        known = any(name in of_lineage for of_lineage in records.values())
        if not name.startswith(".") and not known:
            plan.left.setdefault(name, "it has no record")
    for lineage in sorted(disk.listdir(layout.layers)):
        if lineage not in records and _is_uuid(lineage):
            plan.left[lineage] = "a lineage that no readable record names"
    taken: dict[tuple[str, str], str] = {}
    for lineage, of_lineage in sorted(records.items()):
        _Lineage(disk, layout, plan, lineage, of_lineage, taken, _live_maps(disk, live, boot_id), now).run()
    return plan


def _live_maps(disk: Disk, live: Path, boot_id: bytes) -> dict[str, LiveIdentity]:
    """Return the live maps of this boot."""
    found: dict[str, LiveIdentity] = {}
    try:
        names = disk.listdir(live)
    except OSError:
        return found
    for name in names:
        try:
            identity = read_live_identity(disk, live / name)
        except (EbsdError, OSError):
            continue
        if identity is not None and identity.boot_id == boot_id and identity.volume == name:
            found[name] = identity
    return found


class _Lineage:
    """The rows of one lineage."""

    def __init__(
        self,
        disk: Disk,
        layout: StateLayout,
        plan: Plan,
        lineage: LineageId,
        records: Mapping[str, Record],
        taken: dict[tuple[str, str], str],
        live: Mapping[str, LiveIdentity],
        now: str,
    ) -> None:
        self._disk = disk
        self._layout = layout
        self._plan = plan
        self._id = lineage
        self._records = records
        self._taken = taken
        self._live = live
        self._now = now
        self._files: dict[tuple[int, bytes], dict[int, os.stat_result]] = {}

    def run(self) -> None:
        try:
            table = read_layer_table(self._disk, self._layout.table(self._id))
            if table.lineage != self._id:
                raise ValueError(f"it is the table of lineage {table.lineage}")
            self._files = self._list_segments()
        except (EbsdError, OSError, ValueError) as error:
            for name in self._records:
                self._plan.left[name] = f"the layer table of its lineage {self._id} cannot be read: {_reason(error)}"
            return
        accounts = {(record.resource.account, record.resource.cipher) for record in self._records.values()}
        if len(accounts) != 1 or next(iter(accounts))[1] is not table.cipher:
            for name in self._records:
                self._plan.left[name] = f"records and table of lineage {self._id} disagree about account or cipher"
            return
        ((account, cipher),) = accounts
        heads: dict[int, Volume] = {}
        rows = 0
        for name, record in sorted(self._records.items()):
            if name.startswith("snap-"):
                rows += self._add_snapshot(name, record)
            else:
                volume = self._add_volume(name, record, table)
                if volume is not None:
                    heads[volume.head] = volume
                    rows += 1
        if not rows:
            return
        self._plan.lineages[self._id] = Lineage(self._id, account, SECTOR, cipher)
        self._plan.next_layer[self._id] = len(table.layers) + 1
        self._add_layers(table, heads)

    def _list_segments(self) -> dict[tuple[int, bytes], dict[int, os.stat_result]]:
        found: dict[tuple[int, bytes], dict[int, os.stat_result]] = {}
        directory = self._layout.lineage(self._id)
        for name in self._disk.listdir(directory):
            parsed = parse_segment_name(name)
            if parsed is None:
                continue
            fd = self._disk.open(directory / name, os.O_PATH)
            try:
                status = self._disk.fstat(fd)
            finally:
                self._disk.close(fd)
            if stat.S_ISREG(status.st_mode):
                found.setdefault(parsed[:2], {})[parsed[2]] = status
        return found

    def _add_snapshot(self, name: str, record: Record) -> bool:
        ident = parse_snapshot_id(name)
        if not self._layout.map(ident).exists():
            self._plan.left[name] = "it has no map: it was being made or deleted, or its map is lost"
            return False
        resource, key, origin = record.resource, record.wrapped_key, record.origin
        source = COPY_SOURCE
        if origin is not None:
            with contextlib.suppress(EbsdError):
                source = parse_volume_id(origin.source)
        self._plan.snapshots.append(
            Snapshot(
                id=ident,
                account=resource.account,
                owner=resource.owner,
                name=self._name(record),
                volume=source,
                size=resource.size,
                state=SnapshotState.COMPLETED,
                message="",
                description="" if origin is None else origin.description,
                cipher=resource.cipher,
                key_arn=None if key is None else key.key_arn,
                wrapped_key=None if key is None else key.blob,
                context={} if key is None else key.context,
                lineage=self._id,
                new_head=0,
                integrity=_integrity(record),
                authority=_signer(record),
                pause_us=None,
                started=resource.created,
                completed=self._now,
            )
        )
        return True

    def _add_volume(self, name: str, record: Record, table: LayerTable) -> Volume | None:
        ident = parse_volume_id(name)
        body = record.body()
        if self._is_unfinished_copy(ident, record, body):
            self._plan.left[name] = "a copy of a snapshot that was not finished; make it again"
            return None
        resource, key, origin = record.resource, record.wrapped_key, record.origin
        snapshot: SnapshotId | None = None
        if origin is not None and origin.source:
            with contextlib.suppress(EbsdError):
                snapshot = parse_snapshot_id(origin.source)
        live = self._live.get(name)
        volume = Volume(
            id=ident,
            account=resource.account,
            owner=resource.owner,
            name=self._name(record),
            size=self._size(ident, record),
            state=VolumeState.AVAILABLE,
            cipher=resource.cipher,
            key_arn=None if key is None else key.key_arn,
            wrapped_key=None if key is None else key.blob,
            context={} if key is None else key.context,
            lineage=self._id,
            head=self._head(ident, body, table),
            snapshot=snapshot,
            # A leftover live map is salvaged by the attachment after its own; there is none of a later generation.
            attach_generation=live.generation if live is not None else max(body.generation, 1),
            integrity=_integrity(record) if live is None else Integrity.UNVERIFIED,
            authority=_signer(record),
            created=resource.created,
            reason="",
        )
        self._plan.volumes.append(volume)
        return volume

    def _is_unfinished_copy(self, ident: VolumeId, record: Record, body: SignedBody) -> bool:
        """Say whether a job was filling it: nobody has signed it, and nothing else says what is in it.

        One that was restored within a lineage has a head behind the first layer, one that was made empty no source.
        """
        if body.state is not RecordState.BORN or record.authority is not None:
            return False
        if record.origin is not None and record.origin.source and body.head == 1:
            return True
        try:
            durable = DurableMap.open(self._disk, self._layout.map(ident), writable=False)
            try:
                return not is_all_holes(durable.entries())
            finally:
                durable.close()
        except (EbsdError, OSError):
            return False

    def _size(self, ident: VolumeId, record: Record) -> int:
        """Return the size that the record says, or the one that the map was grown to since."""
        size = record.resource.size
        try:
            durable = DurableMap.open(self._disk, self._layout.map(ident), writable=False)
        except (EbsdError, OSError) as error:
            self._plan.notes.append(f"{ident}: its map cannot be used: {_reason(error)}")
            return size
        chunks = durable.header.chunks
        durable.close()
        if chunks > chunk_count(size) and chunks * CHUNK <= MAX_VOLUME:
            self._plan.notes.append(f"{ident}: it had grown since its last detach; its size is rounded up to 64 KiB")
            return chunks * CHUNK
        return size

    def _head(self, ident: VolumeId, body: SignedBody, table: LayerTable) -> int:
        """Return the newest layer of the volume that its record does not know yet, else the one that the record says.

        A layer that the record knows and does not call the head was left by a snapshot that was abandoned.
        """
        newer = [
            entry.number
            for entry in table.layers[body.table_count :]
            if entry.volume == ident and (entry.number, entry.uuid) in self._files
        ]
        return max(newer, default=body.head)

    def _add_layers(self, table: LayerTable, heads: Mapping[int, Volume]) -> None:
        for entry in table.layers:
            segments = self._files.get((entry.number, entry.uuid))
            if segments is None:
                if entry.number in heads:
                    self._plan.notes.append(f"{heads[entry.number].id}: its head, layer {entry.number}, has no file")
                    size = heads[entry.number].size
                    self._layer(entry.number, entry.uuid, entry.volume, LayerState.HEAD, size)
                continue
            length = sum(status.st_size for status in segments.values())
            size = min(max(length - length % CHUNK, MIN_VOLUME), MAX_VOLUME)
            writable = bool(segments[min(segments)].st_mode & stat.S_IWUSR)
            state = LayerState.HEAD if entry.number in heads or writable else LayerState.SEALED
            if entry.number in heads:
                size = heads[entry.number].size
            elif segment_count(size) != len(segments):
                self._plan.notes.append(f"lineage {self._id}: segments of layer {entry.number} are missing")
            self._layer(entry.number, entry.uuid, entry.volume, state, size)

    def _layer(self, number: int, uuid: bytes, volume: VolumeId | SnapshotId, state: LayerState, size: int) -> None:
        self._plan.layers.append(Layer(self._id, number, uuid, volume, state, size))

    def _name(self, record: Record) -> str:
        """Return the name of a resource; its id when the name cannot be, or another one of the account has it."""
        resource = record.resource
        name = resource.name
        try:
            if name != resource.id:
                parse_name(name)
        except InvalidName:
            name = resource.id
        key = resource.account, name
        if key in self._taken:
            self._plan.notes.append(
                f"{resource.id}: its name {name!r} is that of {self._taken[key]}, too; it has none now"
            )
            name = resource.id
        self._taken[resource.account, name] = resource.id
        return name


def write_catalog(path: Path, plan: Plan, attachments: Mapping[str, tuple[Attachment, int]]) -> None:
    """Write the plan as a new catalog at ``path``, which must not exist; durable at return.

    ``attachments``: volume -> its attachment as found on the host, and the size that its process serves. Raises
    OSError, StoreDamaged, NoSpace.
    """
    catalog = Catalog(path)
    try:
        catalog.run(lambda t: _write(t, plan, attachments))
    finally:
        catalog.close()


def _write(t: Transaction, plan: Plan, attachments: Mapping[str, tuple[Attachment, int]]) -> None:
    for lineage in plan.lineages.values():
        t.add_lineage(lineage)
    served: set[tuple[LineageId, int]] = set()
    for volume in plan.volumes:
        found = attachments.get(volume.id)
        if found is None:
            t.add_volume(volume)
            continue
        attachment, size = found
        generation = max(volume.attach_generation, attachment.generation)
        t.add_volume(replace(volume, state=VolumeState.IN_USE, size=size, attach_generation=generation))
        t.put_attachment(attachment)
        served.add((volume.lineage, attachment.head))
    for snapshot in plan.snapshots:
        t.add_snapshot(snapshot)
    for layer in plan.layers:
        is_served = (layer.lineage, layer.number) in served
        t.put_layer(replace(layer, state=LayerState.HEAD) if is_served else layer)
    for ident, number in plan.next_layer.items():
        t.set_next_layer(ident, number)


def swap_catalog(disk: Disk, layout: StateLayout, fresh: Path, suffix: str) -> Path | None:
    """Put a new catalog in the place of the present one, which is kept beside it; return where, None for nothing.

    A cut between the steps leaves no catalog, and resources: ebsd then starts in rescue mode again. Raises OSError.
    """
    kept = layout.root / f"{KEPT_CATALOG}{suffix}"
    moved: Path | None = None
    # The -wal goes first: it holds commits that belong to the old file, and must never meet the new one.
    for extra in ("-wal", "-shm", "-journal", ""):
        source = layout.catalog.with_name(layout.catalog.name + extra)
        if os.path.lexists(source):
            moved = kept
            disk.rename(source, kept.with_name(kept.name + extra))
    disk.rename(fresh, layout.catalog)
    fsync_directory(disk, layout.root)
    return moved


def _integrity(record: Record) -> Integrity:
    body = record.body()
    if body.state is RecordState.BORN:
        if record.authority is None:
            return Integrity.NEW
        body = parse_signed(record.authority, file="authority")
    return Integrity.UNVERIFIED if body.state is RecordState.OPEN else Integrity.VERIFIED


def _signer(record: Record) -> str | None:
    return None if record.authority is None else parse_signed(record.authority, file="authority").resource


def _is_uuid(text: str) -> bool:
    try:
        parse_uuid(text)
    except ValueError:
        return False
    return True


def _reason(error: Exception) -> str:
    if isinstance(error, EbsdError):
        return str(error.facts.get("reason") or error.facts.get("what") or error.message)
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
