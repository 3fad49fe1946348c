"""The export worker: read a verified snapshot under its data key, and write it in the clear to where a client said.

1. Nothing is read as data before the snapshot was verified as for a copy (``verify_snapshot.py``).
2. Every chunk of a layer that was hashed is compared with its leaf before it is decrypted: in an image, damage could
   not be told from data any more. With ``AllowDamaged`` it is counted and named, and what can be read is written; what
   cannot be read is zeros.
3. Behind the end of the snapshot nothing is written. Holes are holes of a new file, and zeros everywhere else.
4. It is done when the image is durable, where there is such a thing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from ebsd.crypto.codec import CodecFactory
from ebsd.domain.errors import ImageUnusable, IncorrectState, StoreDamaged
from ebsd.domain.geometry import chunk_count
from ebsd.domain.units import CHUNK, SECTOR
from ebsd.store.disk import Disk, RealDisk
from ebsd.store.layertable import LayerTable
from ebsd.store.leaftable import read_slots
from ebsd.volume.copier import Run, SourceFiles, data_chunks, runs
from ebsd.volume.image_target import ImageTarget, target_of
from ebsd.volume.inputs import claim_of, found_in, record_of, sealed_map_of, table_of
from ebsd.volume.nbd import NbdClient, NbdTarget
from ebsd.volume.transfer import Holdings, Transfer, main
from ebsd.volume.verify import check_leaf_root, covered_layers
from ebsd.volume.verify_snapshot import believe_snapshot, check_snapshot_map, check_snapshot_table

NAMED_DAMAGE: Final = 100
"""Damaged chunks that are named; all are counted."""

_SECTORS_PER_CHUNK: Final = CHUNK // SECTOR


class Gap(NamedTuple):
    """Consecutive chunks without data."""

    first: int
    chunks: int


def with_gaps(stored: Iterator[Run], chunks: int) -> Iterator[Run | Gap]:
    """Yield all chunks of a map, ascending."""
    at = 0
    for run in stored:
        if run.first > at:
            yield Gap(at, run.first - at)
        yield run
        at = run.first + run.chunks
    if at < chunks:
        yield Gap(at, chunks - at)


class Export(Transfer[Run | Gap]):
    """The data of one export."""

    def __init__(
        self,
        disk: Disk,
        dirfd: int,
        table: LayerTable,
        entries: memoryview,
        size: int,
        target: ImageTarget,
        codecs: CodecFactory,
        *,
        allow_damaged: bool,
        rate: int,
    ) -> None:
        super().__init__(target.threads, rate)
        self._table = table
        self._entries = entries
        self._size = size
        self._target = target
        self._codecs = codecs
        self._allow_damaged = allow_damaged
        # One for each thread: they keep descriptors and digests open, for one thread.
        self._sources = [SourceFiles(disk, dirfd, table, direct=True) for _ in range(target.threads)]
        self._pieces = with_gaps(runs(entries, 0), chunk_count(size))
        self._damaged: list[int] = []
        self._damage = 0
        self._noting = threading.Lock()
        self.total = data_chunks(entries) * CHUNK

    def cost(self, piece: Run | Gap) -> int:
        return piece.chunks * CHUNK if isinstance(piece, Run) else 0

    def details(self) -> dict[str, Any]:
        return {"DoneThrough": 0, "Checkpoint": {"DamagedChunks": self._damage, "Damaged": sorted(self._damaged)}}

    def transfer(self) -> bool:
        while self.batch(lambda _: next(self._pieces, None), self._step):
            if self.stopping.is_set():
                return False
        if self.stopping.is_set():
            return False
        self._target.sync()
        return True

    def release(self) -> None:
        for source in self._sources:
            source.close()

    def _step(self, thread: int, piece: Run | Gap, buffer: memoryview) -> None:
        start = piece.first * CHUNK
        length = min(piece.chunks * CHUNK, self._size - start)
        if isinstance(piece, Gap):
            self._target.zero(start, length)
            return
        view = buffer[: piece.chunks * CHUNK]
        self._read(self._sources[thread], piece, view)
        self._target.write(start, view[:length])
        self.count(len(view))

    def _read(self, source: SourceFiles, run: Run, view: memoryview) -> None:
        """Fill a view with plaintext. Raises StoreDamaged naming the chunk, HostFailure."""
        codec = self._codecs.codec(self._table.uuid_of(run.layer))
        lost: list[int] = []
        try:
            source.read(run, view)
        except StoreDamaged:
            if not self._allow_damaged:
                raise
            lost = self._read_damaged(source, run, view)
        codec.decrypt_into(view, view, run.first * _SECTORS_PER_CHUNK)
        for number in lost:
            view[number * CHUNK : (number + 1) * CHUNK] = bytes(CHUNK)

    def _read_damaged(self, source: SourceFiles, run: Run, view: memoryview) -> list[int]:
        """Read chunk by chunk, note those that are damaged, and return which of them cannot be read at all."""
        lost: list[int] = []
        for number in range(run.chunks):
            one = Run(run.first + number, 1, run.layer)
            piece = view[number * CHUNK : (number + 1) * CHUNK]
            try:
                source.read(one, piece)
            except StoreDamaged:
                self._note_damage(one.first)
                try:
                    source.fetch(one, piece)
                except StoreDamaged:
                    lost.append(number)
        return lost

    def _note_damage(self, chunk: int) -> None:
        with self._noting:
            self._damage += 1
            if len(self._damaged) < NAMED_DAMAGE:
                self._damaged.append(chunk)

    # --- end

    def finish(self) -> dict[str, Any]:
        """{}: the last ``progress`` has told all."""
        return {}


def prepare(params: dict[str, Any], holdings: Holdings) -> tuple[Export, dict[str, Any]]:
    """Verify the snapshot, look at the target, and begin.

    {"Source": {"ResourceId", "Owner", "Lineage", "Size", "Cipher", "KeyArn", "AuthorityIds"}, "SourceRecord",
    "Sparse", "AllowDamaged", "Format": raw or nbd, "Rate"}. Descriptors: session, lineage directory and sealed map; the
    target, or a connection to what serves it.

    {"Bytes": stored in the snapshot, "Unverified": whether no signature covers its map}. Raises what the verification
    raises, ImageUnusable, and what the target answers.
    """
    disk = RealDisk()
    if len(holdings.fds) != 4:
        raise IncorrectState(reason="Descriptors are missing")
    answer = holdings.ask()
    lineage_fd, map_fd, target_fd = holdings.fds
    claim = claim_of(params["Source"], head=0)
    with found_in(claim):
        record = record_of(params["SourceRecord"])
        authority_ids = [str(item) for item in params["Source"]["AuthorityIds"]]
        believed = believe_snapshot(claim, answer.anchor, answer.data_key, record, authority_ids)
        # A volume of this lineage may be appending a layer right now: only what is relied on is read.
        table = table_of(disk, lineage_fd, believed.table_count)
        check_snapshot_table(claim, believed, table)
        sealed = sealed_map_of(disk, map_fd, claim)
        unverified = check_snapshot_map(claim, believed, sealed)
        covered = covered_layers(believed.covering, sealed.entries)
        slots = read_slots(disk, lineage_fd, table.lineage, {number: table.uuid_of(number) for number in covered})
        check_leaf_root(claim, believed.covering, covered, slots)
    factory = CodecFactory(answer.data_key, cipher=claim.cipher)
    holdings.factories.append(factory)
    stopping = threading.Event()
    target: ImageTarget
    if params.get("Format") == "nbd":
        target = _served(target_fd, claim.size, stopping)
    else:
        target = target_of(disk, target_fd, claim.size, sparse=bool(params.get("Sparse", True)), stopping=stopping)
    made = Export(
        disk,
        lineage_fd,
        table,
        sealed.entries,
        claim.size,
        target,
        factory,
        allow_damaged=bool(params.get("AllowDamaged")),
        rate=int(params.get("Rate", 0)),
    )
    made.stopping = stopping
    return made, {"Bytes": made.total, "Unverified": unverified}


def _served(fd: int, size: int, stopping: threading.Event) -> ImageTarget:
    try:
        return NbdTarget(NbdClient(fd, stopping), size)
    except OSError as exc:
        raise ImageUnusable(reason=exc.strerror or str(exc), remedy="Export a raw image, and convert it.") from exc


if __name__ == "__main__":
    main(prepare, "ebsd-exporter")
