"""The files of a lineage as a whole: swept, or removed with the last volume or snapshot of it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from ebsd.domain.ids import LineageId
from ebsd.domain.model import Snapshot, Volume
from ebsd.store.disk import Disk, fsync_directory
from ebsd.store.layertable import read_layer_table
from ebsd.store.layout import StateLayout
from ebsd.store.sweep import DurableSource, MapSource, SealedSource, SweepReport, sweep


class LineageFiles:
    """File work of lineages, below one state directory. Blocks; the use cases run it in a worker thread."""

    def __init__(self, disk: Disk, state: StateLayout) -> None:
        self._disk = disk
        self._state = state

    def remove_lineage(self, lineage: LineageId) -> None:
        """Remove directory, table and layers of a lineage that nothing names; may be repeated."""
        directory = self._state.lineage(lineage)
        with contextlib.suppress(FileNotFoundError):
            for name in self._disk.listdir(directory):
                self._disk.unlink(directory / name)
            self._disk.rmdir(directory)
        fsync_directory(self._disk, self._state.layers)

    def sweep(
        self, lineage: LineageId, volumes: Sequence[Volume], snapshots: Sequence[Snapshot], protected: frozenset[int]
    ) -> SweepReport:
        """Give back what no map of these volumes and snapshots names; see ``store/sweep.py`` for the order."""
        maps: list[MapSource] = [DurableSource(self._disk, self._state.map(volume.id)) for volume in volumes]
        maps += [SealedSource(self._disk, self._state.map(snapshot.id), snapshot.id) for snapshot in snapshots]
        table = read_layer_table(self._disk, self._state.table(lineage))
        dirfd = self._disk.open(self._state.lineage(lineage), os.O_RDONLY | os.O_DIRECTORY)
        try:
            return sweep(self._disk, dirfd, table, protected=protected, maps=maps)
        finally:
            self._disk.close(dirfd)

    def resources_on_disk(self) -> set[str]:
        """Return the ids of all volumes and snapshots that have a record or a map."""
        names = {*self._disk.listdir(self._state.records), *self._disk.listdir(self._state.maps)}
        return {name for name in names if not name.startswith(".")}

    def remove_temporary(self) -> list[Path]:
        """Remove files under the temporary names of what was never finished; nobody may write meanwhile."""
        removed = []
        lineages = [self._state.layers / name for name in self._disk.listdir(self._state.layers)]
        for directory in (self._state.maps, self._state.records, *lineages):
            try:
                names = self._disk.listdir(directory)
            except NotADirectoryError:
                continue  # somebody else's file
            for name in names:
                if name.startswith(".") and name.endswith(".tmp"):
                    self._disk.unlink(directory / name)
                    removed.append(directory / name)
        return removed
