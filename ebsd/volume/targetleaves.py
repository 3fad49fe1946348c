"""The leaves of the one layer that a job fills from the first chunk to the last; in the end its slot, and the root.

A worker that goes on must not read again what earlier ones wrote. So the leaves of what is durable are noted in a file,
32 bytes per stored chunk in the order of the map, and a digest of the notes is part of the job's checkpoint. Notes that
do not agree with it are not used: then what was written is hashed again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Final

from ebsd.store.disk import Disk, pread_all, pwrite_all
from ebsd.store.layertable import LayerTable
from ebsd.store.leaftable import leaf_root, publish, read_slots
from ebsd.store.leaves import DIGEST, LeafWriter, Runs, remove_unfinished
from ebsd.volume.hashing import hash_layer

_READ: Final = 64 * 1024
"""Bytes of notes read at a time; a multiple of DIGEST."""


class TargetLeaves:
    """Digests of chunks in ascending order, and what becomes of them."""

    def __init__(
        self,
        disk: Disk,
        dirfd: int,
        table: LayerTable,
        layer: int,
        stored: Iterable[tuple[int, int]],
        notes_fd: int | None = None,
    ) -> None:
        """Borrow ``dirfd``, the lineage directory, and ``notes_fd``, a file of the job's own.

        ``stored``: (first, end) of the chunks that there will be, ascending.
        """
        self._disk = disk
        self._dirfd = dirfd
        self._lineage = table.lineage
        self._layer = layer
        self.uuid = table.uuid_of(layer)
        self._runs = Runs(stored)
        self._writer: LeafWriter | None = None
        self._notes_fd = notes_fd
        self._noted = 0
        """Bytes in the file."""
        self._unnoted = bytearray()
        self._digest = hashlib.sha256()

    def take_over(self, chunks: int, digest: str) -> bool:
        """Take the first ``chunks`` leaves from the notes; False, and none is taken, when they are not ``digest``.

        Raises OSError.
        """
        if self._notes_fd is None or self._disk.fstat(self._notes_fd).st_size < chunks * DIGEST:
            return False
        found = hashlib.sha256()
        for piece in self._pieces(chunks):
            found.update(piece)
        if found.hexdigest() != digest:
            return False
        for piece in self._pieces(chunks):
            self._write(piece)
        self._noted, self._digest = chunks * DIGEST, found
        return True

    def _pieces(self, chunks: int) -> Iterator[bytearray]:
        if self._notes_fd is None:
            return
        for at in range(0, chunks * DIGEST, _READ):
            length = min(_READ, chunks * DIGEST - at)
            yield pread_all(self._disk, self._notes_fd, length, at, "leaves")

    def add(self, digests: Iterable[bytes]) -> None:
        """Take the leaves of the next chunks. Raises OSError."""
        joined = b"".join(digests)
        self._write(joined)
        if self._notes_fd is not None:
            self._unnoted += joined
            if len(self._unnoted) >= _READ:
                self._write_notes(self._notes_fd)

    def _write(self, digests: bytes | bytearray) -> None:
        if self._writer is None:
            remove_unfinished(self._disk, self._dirfd)  # of a worker that died
            self._writer = LeafWriter(self._disk, self._dirfd, self._lineage, self._layer, self.uuid, self._runs)
        for at in range(0, len(digests), DIGEST):
            self._writer.add(bytes(digests[at : at + DIGEST]))

    def note(self) -> str:
        """Make all leaves that were added durable in the notes, and return what ``take_over`` wants. Raises OSError."""
        if self._notes_fd is not None:
            self._write_notes(self._notes_fd)
            self._disk.fdatasync(self._notes_fd)
        return self._digest.hexdigest()

    def _write_notes(self, fd: int) -> None:
        pwrite_all(self._disk, fd, self._unnoted, self._noted)
        self._digest.update(self._unnoted)
        self._noted += len(self._unnoted)
        self._unnoted = bytearray()

    def root(self) -> bytes:
        """Publish the leaf file and return the root; may be repeated after an error. Raises OSError, StoreDamaged.

        A layer without any chunk is named by no map, so no leaf file is needed, and none is in the root.
        """
        if not self._runs.chunks:
            return leaf_root([])
        uuids = {self._layer: self.uuid}
        slot = read_slots(self._disk, self._dirfd, self._lineage, uuids, durable=True).get(self._layer)
        if slot is not None:
            # A worker got as far and was killed; a copy that goes on writes the same ciphertext to the same places.
            self.abandon()
        elif self._writer is not None:
            writer, self._writer = self._writer, None
            slot = publish(self._disk, self._dirfd, self._lineage, self._layer, self.uuid, writer)
        else:
            slot = hash_layer(self._disk, self._dirfd, self._lineage, self._layer, self.uuid, self._runs)
        return leaf_root([slot])

    def abandon(self) -> None:
        """Remove what was not published."""
        if self._writer is not None:
            self._writer.abandon()
