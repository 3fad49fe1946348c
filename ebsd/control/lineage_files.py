"""The files of a lineage as a whole: swept, or removed with the last volume or snapshot of it."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ebsd.domain.ids import LineageId, VolumeId, looks_like_snapshot_id, parse_resource_id, parse_snapshot_id
from ebsd.domain.model import Layer, Snapshot, Volume
from ebsd.store.disk import Disk, fsync_directory, opened
from ebsd.store.layertable import LayerTable, extend_layer_table, known_layers, read_layer_table
from ebsd.store.layout import StateLayout
from ebsd.store.sweep import DurableSource, MapSource, SealedSource, SweepReport, give_back, sweep, sweep_deleted
from ebsd.store.usage import Usage, UsageCache, UsageSource

log = logging.getLogger(__name__)

Held = Mapping[str, int]
"""Volume -> a descriptor of its map."""
NOTHING_HELD: Final[Held] = {}


@dataclass(frozen=True, slots=True)
class Usages:
    """What the maps of one lineage use, by id, and how many seconds it took to find that out."""

    of: Mapping[str, Usage]
    cost: float


@dataclass(frozen=True, slots=True)
class MapsOfLineage:
    """Whose maps there are, oldest first, and which layers no sweep touches as somebody writes to them."""

    snapshots: Sequence[str]
    volumes: Mapping[str, frozenset[int]]
    """With the layers that each of them protects."""
    written: frozenset[int]
    """All layers that are protected, those that are being made included."""


def protected_by(volume: Volume, layers: Sequence[Layer]) -> frozenset[int]:
    """Return the layers that no sweep touches because of this volume: its head, and what its process may write to.

    An attached process writes to its attachment's head or, while a snapshot is being taken, to a later one that was
    made for the same volume.
    """
    if volume.attachment is None:
        return frozenset((volume.head,))
    first = volume.attachment.head
    own = (layer.number for layer in layers if layer.volume == volume.id and layer.number >= first)
    return frozenset((volume.head, *own))


class LineageFiles:
    """File work of lineages, below one state directory. Blocks; the use cases run it in a worker thread."""

    def __init__(self, disk: Disk, state: StateLayout) -> None:
        self._disk = disk
        self._state = state
        self._usage = UsageCache()
        self._usage_lock = threading.Lock()

    def remove_lineage(self, lineage: LineageId) -> None:
        """Remove directory, table and layers of a lineage that nothing names; may be repeated."""
        directory = self._state.lineage(lineage)
        with contextlib.suppress(FileNotFoundError):
            for name in self._disk.listdir(directory):
                self._disk.unlink(directory / name)
            self._disk.rmdir(directory)
        fsync_directory(self._disk, self._state.layers)

    def sweep(
        self,
        lineage: LineageId,
        volumes: Sequence[Volume],
        snapshots: Sequence[Snapshot],
        layers: Sequence[Layer],
        protected: frozenset[int],
        held: Held,
    ) -> SweepReport:
        """Give back what no map of these volumes and snapshots names; see ``store/sweep.py`` for the order.

        ``layers``: all rows of the lineage, oldest first. ``held``: as of ``holding``, of those that are attached.
        """
        maps = self._sources(volumes, snapshots, held)
        with self._opened(lineage, layers) as (dirfd, table):
            return sweep(
                self._disk, dirfd, table, protected=protected, maps=maps, rows=[layer.number for layer in layers]
            )

    def named_layers(self, resources: Collection[str]) -> set[int]:
        """Return the layers that the maps of these volumes and snapshots name, as they are on the disk."""
        named: set[int] = set()
        for resource in resources:
            previous = b""
            for block in self._source(resource).read():
                if block != previous:
                    named.update(memoryview(block).cast("I"))
                    previous = block
        return named

    def give_back(
        self,
        lineage: LineageId,
        volumes: Sequence[Volume],
        snapshots: Sequence[Snapshot],
        rows: Sequence[Layer],
        layers: Collection[int],
        held: Held,
    ) -> SweepReport:
        """Give back all of these layers that no map names, with data or not; ``rows`` are those of the lineage."""
        maps = self._sources(volumes, snapshots, held)
        with self._opened(lineage, rows) as (dirfd, table):
            return give_back(self._disk, dirfd, table, layers=layers, maps=maps)

    def sweep_deleted(
        self,
        lineage: LineageId,
        deleted: str | None,
        also: Collection[int],
        relatives: Mapping[str, Sequence[str] | None],
        layers: Sequence[Layer],
        protected: frozenset[int],
        held: Held,
    ) -> SweepReport:
        """Give back what a map that is no more named alone; ``relatives`` with theirs, where they count.

        ``layers``: at least the rows that the layer table may lack, oldest first.
        """
        source = None
        if deleted is not None and self._state.map(parse_resource_id(deleted)).exists():
            source = self._source(deleted)
        with self._opened(lineage, layers) as (dirfd, table):
            return sweep_deleted(
                self._disk,
                dirfd,
                table,
                deleted=source,
                also=also,
                relatives={ident: self._source(ident, held) for ident in relatives},
                beyond={
                    ident: [self._source(other, held) for other in others]
                    for ident, others in relatives.items()
                    if others is not None
                },
                protected=protected,
            )

    def usages(self, maps: MapsOfLineage) -> Usages:
        """Return the usage of each map of one lineage that is there; of an attached volume the durable one.

        Raises StoreDamaged and OSError. Other threads wait meanwhile.
        """
        with self._usage_lock:
            began = time.monotonic()
            sources = []
            directory = self._disk.open(self._state.maps, os.O_RDONLY | os.O_DIRECTORY)
            try:
                for ident in (*maps.snapshots, *maps.volumes):
                    source = self._usage_source(directory, ident, maps)
                    if source is not None:
                        sources.append(source)
            finally:
                self._disk.close(directory)
            found = self._usage.usages(sources)
        return Usages(found, time.monotonic() - began)

    def _usage_source(self, directory: int, ident: str, maps: MapsOfLineage) -> UsageSource | None:
        """Return one map, None when it is not made yet, or was removed a moment ago. There may be very many."""
        try:
            with opened(self._disk, parse_resource_id(ident), os.O_RDONLY | os.O_NONBLOCK, dir_fd=directory) as fd:
                status = self._disk.fstat(fd)
        except FileNotFoundError:
            return None
        identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        own = maps.volumes.get(ident)
        untouchable = maps.written if own is None else maps.written - own
        return UsageSource(ident, identity, lambda: self._source(ident).read(), untouchable)

    @contextlib.contextmanager
    def holding(self, volumes: Collection[VolumeId]) -> Iterator[Held]:
        """Hold the maps of attached volumes from before they flush until they were synced; see ``DurableSource``."""
        with contextlib.ExitStack() as stack:
            held: dict[str, int] = {}
            for ident in volumes:
                path = self._state.map(ident)
                held[ident] = stack.enter_context(opened(self._disk, path, os.O_RDONLY | os.O_NONBLOCK))
            yield held

    def _sources(self, volumes: Sequence[Volume], snapshots: Sequence[Snapshot], held: Held) -> list[MapSource]:
        maps: list[MapSource] = [self._source(volume.id, held) for volume in volumes]
        maps += [SealedSource(self._disk, self._state.map(snapshot.id), snapshot.id) for snapshot in snapshots]
        return maps

    def _source(self, resource: str, held: Held = NOTHING_HELD) -> MapSource:
        path = self._state.map(parse_resource_id(resource))
        if looks_like_snapshot_id(resource):
            return SealedSource(self._disk, path, parse_snapshot_id(resource))
        return DurableSource(self._disk, path, held.get(resource))

    @contextlib.contextmanager
    def _opened(self, lineage: LineageId, layers: Sequence[Layer]) -> Iterator[tuple[int, LayerTable]]:
        table = self._complete_table(lineage, layers)
        dirfd = self._disk.open(self._state.lineage(lineage), os.O_RDONLY | os.O_DIRECTORY)
        try:
            yield dirfd, table
        finally:
            self._disk.close(dirfd)

    def known_layers(self, lineage: LineageId) -> int:
        """As ``store.layertable.known_layers``, of a lineage."""
        return known_layers(self._state.table(lineage))

    def remove_map(self, resource: str) -> None:
        """Remove the map of what was deleted, after its chunks were given back; may be repeated."""
        with contextlib.suppress(FileNotFoundError):
            self._disk.unlink(self._state.map(parse_resource_id(resource)))
        fsync_directory(self._disk, self._state.maps)

    def _complete_table(self, lineage: LineageId, layers: Sequence[Layer]) -> LayerTable:
        """Return the table with an entry for each row: one whose maker was cut before it has none.

        Such a row can go only when the table keeps its number from being used again. A disk without space must not
        keep a sweep from giving some back: the row then stays until the next one.
        """
        path = self._state.table(lineage)
        table = read_layer_table(self._disk, path)
        try:
            return extend_layer_table(self._disk, path, table, layers)
        except OSError as exc:
            if exc.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            log.warning("%s could not be completed until the next sweep: %s", path, exc)
            return table

    def resources_on_disk(self) -> set[str]:
        """Return the ids of all volumes and snapshots that have a record or a map."""
        names = {*self._disk.listdir(self._state.records), *self._disk.listdir(self._state.maps)}
        return {name for name in names if not name.startswith(".")}

    def remove_temporary(self, unfinished: Collection[str] = ()) -> list[Path]:
        """Remove files under the temporary names of what was never finished; nobody may write meanwhile.

        ``unfinished``: ids of what is still being made, whose maps stay.
        """
        kept = {self._state.maps / f".{ident}.tmp" for ident in unfinished}
        removed = []
        lineages = [self._state.layers / name for name in self._disk.listdir(self._state.layers)]
        for directory in (self._state.maps, self._state.records, *lineages):
            try:
                names = self._disk.listdir(directory)
            except NotADirectoryError:
                continue  # somebody else's file
            for name in names:
                if name.startswith(".") and name.endswith(".tmp") and directory / name not in kept:
                    self._disk.unlink(directory / name)
                    removed.append(directory / name)
        return removed
