"""Lineages: one lock each, and the sweep that gives back what no volume or snapshot of them names any more."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import trio

from ebsd.control.catalogue import Catalogue
from ebsd.control.lineage_files import LineageFiles
from ebsd.control.volume_link import VolumeLink
from ebsd.domain.errors import EbsdError
from ebsd.domain.ids import LineageId, VolumeId
from ebsd.domain.model import Layer, LayerState, Snapshot, Volume
from ebsd.domain.states import SnapshotState, VolumeState
from ebsd.store.catalog import Transaction
from ebsd.store.sweep import Known

log = logging.getLogger(__name__)


class Lineages:
    """Serialises what changes the set of maps and layers of a lineage: snapshot, restore, delete, sweep.

    Lock order: a volume's lock before its lineage's.
    """

    def __init__(self, catalogue: Catalogue, files: LineageFiles, links: Mapping[VolumeId, VolumeLink]) -> None:
        self._catalogue = catalogue
        self._files = files
        self._links = links
        self._locks: dict[LineageId, trio.Lock] = {}

    def lock(self, lineage: LineageId) -> trio.Lock:
        return self._locks.setdefault(lineage, trio.Lock())

    async def sweep(self, lineage: LineageId) -> None:
        """Punch what no map names and remove layers that none does; the caller holds the lineage's lock.

        A failure costs space, never data: it is logged, and the next deletion or start tries again.
        """
        try:
            await self._sweep(lineage)
        except (EbsdError, OSError) as exc:
            log.error("lineage %s: space could not be given back: %s", lineage, exc)

    async def _sweep(self, lineage: LineageId) -> None:
        def load(t: Transaction) -> tuple[list[Volume], list[Snapshot], list[Layer]]:
            return t.lineage_volumes(lineage), t.lineage_snapshots(lineage), t.layers(lineage)

        volumes, snapshots, layers = await self._catalogue.run(load)
        if not volumes and not snapshots:
            await trio.to_thread.run_sync(self._files.remove_lineage, lineage)
            await self._catalogue.run(lambda t: t.remove_lineage(lineage))
            self._locks.pop(lineage, None)
            return
        if not may_sweep(volumes, snapshots):
            log.info("lineage %s: not swept, something in it is being made or waits for its detach", lineage)
            return
        for volume in volumes:
            link = self._links.get(volume.id)
            if volume.attachment is not None:
                if link is None:
                    return
                # A whole flush that began after the last seal: from here on the durable map names whatever sealed layer
                # the live one does, and later changes only go to the head or to 0.
                await link.flush()
        report = await trio.to_thread.run_sync(
            self._files.sweep, lineage, volumes, snapshots, protected_layers(volumes, layers)
        )
        gone = set(report.removed)

        def note(t: Transaction) -> None:
            for number in gone:
                t.remove_layer(lineage, number)

        await self._catalogue.run(note)
        if report.removed or report.punched_chunks:
            log.info("lineage %s: %d layers removed, %d chunks punched", lineage, len(gone), report.punched_chunks)

    async def remove_orphans(self) -> None:
        """Remove files that no row names, and sweep every lineage once: at start, before any request."""

        def load(t: Transaction) -> tuple[Known, list[LineageId]]:
            lineages = t.lineages()
            layers = {x: [(layer.number, layer.uuid) for layer in t.layers(x)] for x in lineages}
            return Known(layers, [*(v.id for v in t.volumes()), *(s.id for s in t.snapshots())]), lineages

        known, lineages = await self._catalogue.run(load)
        for path in await trio.to_thread.run_sync(self._files.remove_orphans, lambda: known):
            log.warning("removed %s, which nothing names", path)
        for lineage in lineages:
            async with self.lock(lineage):
                await self.sweep(lineage)


def may_sweep(volumes: list[Volume], snapshots: list[Snapshot]) -> bool:
    """Say whether every map of the lineage is known: nothing is half made, no live map waits to be salvaged."""
    if any(snapshot.state is SnapshotState.PENDING for snapshot in snapshots):
        return False
    return not any(volume.state in (VolumeState.CREATING, VolumeState.ERROR) for volume in volumes)


def protected_layers(volumes: list[Volume], layers: list[Layer]) -> frozenset[int]:
    """Return the layers the sweep may not touch: heads, layers being made, and all that an attached process may write.

    An attached process writes to its attachment's head or, while a snapshot is being taken, to a later one that was
    made for the same volume.
    """
    protected = {volume.head for volume in volumes}
    protected |= {layer.number for layer in layers if layer.state is LayerState.CREATING}
    for volume in volumes:
        if volume.attachment is not None:
            first = volume.attachment.head
            protected |= {layer.number for layer in layers if layer.volume == volume.id and layer.number >= first}
    return frozenset(protected)
