"""Where each file of the store lives: all paths in one place.

Ids are checked here once more, because a path is made of them: an id that came from a damaged catalog must not
leave its directory.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from ebsd.domain.ids import (
    LineageId,
    SnapshotId,
    VolumeId,
    parse_resource_id,
    parse_uuid,
    parse_volume_id,
)
from ebsd.store.disk import Disk, fsync_directory


@dataclass(frozen=True, slots=True)
class StateLayout:
    """Paths below STATE, the directory that survives a reboot."""

    root: Path

    @property
    def catalog(self) -> Path:
        return self.root / "catalog.sqlite"

    @property
    def lock(self) -> Path:
        """Held locked by the one ebsd that serves this directory."""
        return self.root / "lock"

    @property
    def ballast(self) -> Path:
        """Space set aside so that deletions work on a full disk."""
        return self.root / "ballast"

    @property
    def layers(self) -> Path:
        return self.root / "layers"

    @property
    def maps(self) -> Path:
        return self.root / "maps"

    @property
    def records(self) -> Path:
        return self.root / "records"

    def lineage(self, lineage: LineageId) -> Path:
        """Directory of the segment files and the layer table of one lineage. Raises ValueError."""
        parse_uuid(lineage)
        return self.layers / lineage

    def table(self, lineage: LineageId) -> Path:
        """Layer table of a lineage. Raises ValueError."""
        return self.lineage(lineage) / "table"

    def map(self, resource: VolumeId | SnapshotId) -> Path:
        """Durable map of a volume, or sealed map of a snapshot. Raises VolumeIdMalformed, SnapshotIdMalformed."""
        return self.maps / _checked(resource)

    def record(self, resource: VolumeId | SnapshotId) -> Path:
        """Record of a volume or snapshot. Raises VolumeIdMalformed, SnapshotIdMalformed."""
        return self.records / _checked(resource)

    def create(self, disk: Disk) -> None:
        """Make the directories that are missing, mode 0700, durable at return. Raises OSError."""
        for directory in (self.root, self.layers, self.maps, self.records):
            with contextlib.suppress(FileExistsError):
                disk.mkdir(directory, 0o700)
        fsync_directory(disk, self.root)
        fsync_directory(disk, self.root.parent)

    def create_lineage(self, disk: Disk, lineage: LineageId) -> Path:
        """Make the directory of a lineage, mode 0750, durable at return; one that is there stays."""
        directory = self.lineage(lineage)
        with contextlib.suppress(FileExistsError):
            disk.mkdir(directory, 0o750)
        fsync_directory(disk, self.layers)
        return directory


@dataclass(frozen=True, slots=True)
class LiveLayout:
    """Paths below RUNTIME/live, a tmpfs: void after a reboot."""

    root: Path

    def live_map(self, volume: VolumeId) -> Path:
        """Live map of a volume. Raises VolumeIdMalformed."""
        return self.root / parse_volume_id(volume)


def _checked(resource: str) -> str:
    return parse_resource_id(resource)
