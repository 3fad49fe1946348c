"""Salvage: bring what a dead engine acknowledged from its live map into the durable map, then end the live map.

While a live map of the current attachment exists, the durable map is not authoritative; this comes before
anything else that reads it. Order: data durable, entries written, map durable, live map unlinked. Each step may be
cut and the whole be repeated: entries are values and not changes, and the live map goes last.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from ebsd.domain.errors import StoreDamaged
from ebsd.store.disk import Disk
from ebsd.store.durablemap import DurableMap
from ebsd.store.entries import ENTRIES_PER_PAGE, check_map_structure
from ebsd.store.layers import drop_layer_cache, sync_layer
from ebsd.store.layertable import LayerTable
from ebsd.store.livemap import LiveIdentity, LiveMap


class SalvageOutcome(Enum):
    ABSENT = "there is no live map of this attachment"
    APPLIED = "its changes are in the durable map, and it is removed"
    FAILED = "its engine had failed: it was left as it is, and the durable map holds the last completed flush"


@dataclass(frozen=True, slots=True)
class Salvage:
    """What a salvage found and did; ``pages`` are map pages (4096 bytes of entries) that were written."""

    outcome: SalvageOutcome
    pages: int = 0


def salvage(
    disk: Disk,
    path: Path,
    identity: LiveIdentity,
    durable: DurableMap,
    *,
    data_fds: Iterable[int],
    layers: Collection[int],
    head: int,
    lineage: tuple[int, LayerTable] | None = None,
) -> Salvage:
    """Apply the live map at ``path`` to the durable map, when no engine holds it.

    ``data_fds``: every segment of the head, and of sealed layers that are not known to be durable; the ones opened
    longest ago, because a descriptor opened after a write-back error does not report it. ``layers`` and ``head``:
    what entries may name; ``head`` is the newest head row of the catalog, intents included. ``lineage``: descriptor
    of the lineage's directory and its table. With it a salvage finds by itself which layers of the volume may hold
    data that is not durable, and syncs those too; an engine that was killed while it sealed leaves more than one.
    Every identity but this one is void: its file is left to ``LiveMap.create``.

    A failed live map is not applied: its entries may name data that a failing disk lost, while the durable map is
    what the last completed flush made it. The page cache may show more than that; it is dropped, or what is read, and
    copied, and built on would be gone after the next power cut. The caller reports it; the next attachment has another
    generation.

    Raises ValueError (``lineage`` is needed), LiveMapInUse (its process is not dead yet: wait for that, never for a
    time), StoreDamaged (nothing was changed), OSError (repeat, or give up: nothing is lost that was not before).
    """
    live = LiveMap.open(disk, path, identity)
    if live is None:
        return Salvage(SalvageOutcome.ABSENT)
    try:
        if live.failed:
            _show_the_disk(disk, durable, data_fds, live, lineage)
            return Salvage(SalvageOutcome.FAILED)
        if live.chunks > durable.header.chunks:  # fewer: killed while it grew, the durable map first
            raise StoreDamaged(
                file=os.fspath(path),
                reason=f"it has {live.chunks} chunks, the durable map {durable.header.chunks}",
            )
        pages = live.marked_pages()
        for page in pages:
            count = min(ENTRIES_PER_PAGE, live.chunks - page * ENTRIES_PER_PAGE)
            check_map_structure(memoryview(live.page(page)), count, layers, file=os.fspath(path), head=head)
        if lineage is not None:
            dirfd, table = lineage
            for layer in recent_layers(live, table):
                sync_layer(disk, dirfd, layer, table.uuid_of(layer))
        elif live.oldest_unsynced != live.head:
            raise ValueError(f"layers {live.oldest_unsynced} to {live.head} must be synced, and lineage is not given")
        for fd in data_fds:
            disk.fdatasync(fd)
        for page in pages:
            first = page * ENTRIES_PER_PAGE
            durable.write_out(first, min(first + ENTRIES_PER_PAGE, live.chunks))
            durable.write_page(page, live.page(page))
        if durable.header.head != live.head:
            durable.write_head(live.head)
        # Unconditionally: the dead engine may have written pages, and cleared marks, that never reached the disk.
        durable.sync()
        disk.unlink(path)
        return Salvage(SalvageOutcome.APPLIED, len(pages))
    finally:
        live.close()


def _show_the_disk(
    disk: Disk, durable: DurableMap, data_fds: Iterable[int], live: LiveMap, lineage: tuple[int, LayerTable] | None
) -> None:
    """Drop what the cache has of the map and of the layers that may not be durable."""
    for fd in (durable.fd, *data_fds):
        disk.drop_cache(fd)
    if lineage is not None:
        dirfd, table = lineage
        for layer in recent_layers(live, table):
            drop_layer_cache(disk, dirfd, layer, table.uuid_of(layer))


def recent_layers(live: LiveMap, table: LayerTable) -> list[int]:
    """Return the layers of this volume that may hold data that is not durable: the head, and what was it lately."""
    return [
        entry.number
        for entry in table.layers[live.oldest_unsynced - 1 : live.head]
        if entry.volume == live.identity.volume
    ]
