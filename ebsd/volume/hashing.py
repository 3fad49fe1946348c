"""Hashing sealed layers, and comparing what is read of them with their leaves.

1. A layer is hashed once, after it was sealed; from its ciphertext, so that no key is needed and nothing is decrypted.
2. Beside a device it is done gently: a step of 1 MiB in a thread, and a pause after it while there are requests.
3. A leaf file is compared with its slot as a whole when it is first used. One that fails stays refused. Large ones are
   read in a thread, and kept open; small ones are kept in memory: after thousands of snapshots there are thousands.
4. A chunk whose layer was not hashed, or that its leaf file does not cover, is not compared: nobody says what it was.
"""

from __future__ import annotations

import contextlib
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping
from typing import Final

from ebsd.domain.errors import EbsdError, StoreDamaged, UnsupportedFormat
from ebsd.domain.ids import LineageId
from ebsd.domain.units import CHUNK, CHUNKS_PER_SEGMENT, MIB
from ebsd.store.disk import Disk
from ebsd.store.layers import segment_name
from ebsd.store.leaftable import LeafSlot, publish, read_slots
from ebsd.store.leaves import LeafFile, LeafWriter, Runs, SharedLeaves, merged_ranges, stored_ranges
from ebsd.volume.leafdigests import hash_chunks, leaf_digests
from ebsd.volume.scheduling import Scheduler

STEP_CHUNKS: Final = MIB // CHUNK

PAUSE_FACTOR: Final = 3.0
"""How many times as long as a step the pause after it is, while there are requests."""

LEAF_FILES: Final = 128
"""Large leaf files kept open."""

LEAF_BYTES: Final = 16 * MIB
"""Memory for small leaf files."""

ENTRY_BYTES: Final = 1024
"""What a layer costs in it at least."""

ATTEMPTS: Final = 3
"""How often a layer is hashed when its temporary file is removed meanwhile: an ebsd that starts tidies up."""


def damaged_chunk(layer: int, uuid: bytes, chunk: int) -> StoreDamaged:
    """Return the error for a chunk that is not what its leaf says."""
    name = segment_name(layer, uuid, chunk // CHUNKS_PER_SEGMENT)
    return StoreDamaged(file=name, reason=f"chunk {chunk} of layer {layer} has changed since the layer was hashed")


_Opener = Callable[[Disk, int, LineageId, int, bytes, bytes], LeafFile | None]


def _cost(found: LeafFile | EbsdError | None) -> tuple[int, int]:
    """Return how many descriptors and how many bytes of memory it takes to keep this."""
    held = found.held if isinstance(found, LeafFile) else 0
    return int(isinstance(found, LeafFile) and not held), ENTRY_BYTES + held


class LeafChecks:
    """The leaves of the layers of one lineage. For one thread, except for ``load``, which touches nothing of it."""

    def __init__(
        self,
        disk: Disk,
        dirfd: int,
        lineage: LineageId,
        slots: Mapping[int, LeafSlot] | None = None,
        *,
        files: int = LEAF_FILES,
        memory: int = LEAF_BYTES,
    ) -> None:
        """Borrow ``dirfd``, the lineage directory, until ``close``.

        ``slots`` were read, and compared with a root, already; those of other layers are read at their first use.
        """
        self._disk = disk
        self._dirfd = dirfd
        self._lineage = lineage
        self._slots = slots or {}
        self._files = files
        self._memory = memory
        self._known: OrderedDict[int, LeafFile | EbsdError | None] = OrderedDict()
        self.on_forget: Callable[[int], object] = lambda layer: None
        """Called with a layer that is not known any more, before its leaf file is closed."""
        self._open = self._held = 0

    def knows(self, layer: int) -> bool:
        """Say whether ``leaf`` can be asked about this layer; else ``load_small`` or ``load`` comes first."""
        return layer in self._known

    def load_small(self, layer: int, uuid: bytes) -> bool:
        """Make a layer known if that reads no more than a small file, and say so; else ``load`` does it.

        Blocks no longer than a read of a chunk does. Raises OSError.
        """
        slot = self._slot(layer, uuid)
        found: LeafFile | EbsdError | None = None
        if isinstance(slot, LeafSlot):
            found = self._file(slot, LeafFile.open_small)
            if found is None:
                return False
        self._keep(layer, slot if isinstance(slot, EbsdError) else found)
        return True

    def load(self, layer: int, uuid: bytes) -> Callable[[], None]:
        """Look a layer up and check all of its leaf file, when it has one; what is wrong is told by ``leaf``.

        For any thread; what it returns makes the layer known, in the thread of all else. Raises OSError.
        """
        slot = self._slot(layer, uuid)
        found = self._file(slot, LeafFile.open) if isinstance(slot, LeafSlot) else slot
        return lambda: self._keep(layer, found)

    def load_ahead(self, layer: int, uuid: bytes) -> Callable[[], bool] | None:
        """As ``load`` for a layer with a small leaf file, which nothing is wrong with; None for any other.

        One without is not noted: it may be hashed at any time. What is returned makes the layer known, unless others
        would be forgotten for it, and says whether it is known. Raises OSError.
        """
        slot = self._slot(layer, uuid)
        found = self._file(slot, LeafFile.open_small) if isinstance(slot, LeafSlot) else None
        if not isinstance(found, LeafFile):
            return None

        def keep() -> bool:
            if layer not in self._known and self._held + _cost(found)[1] <= self._memory:
                self._keep(layer, found)
            return layer in self._known

        return keep

    def _slot(self, layer: int, uuid: bytes) -> LeafSlot | EbsdError | None:
        if layer in self._slots:
            return self._slots[layer]
        try:
            return read_slots(self._disk, self._dirfd, self._lineage, {layer: uuid}).get(layer)
        except (StoreDamaged, UnsupportedFormat) as exc:
            return exc.with_traceback(None)

    def _file(self, slot: LeafSlot, opener: _Opener) -> LeafFile | EbsdError | None:
        try:
            return opener(self._disk, self._dirfd, self._lineage, slot.number, slot.uuid, slot.digest)
        except (StoreDamaged, UnsupportedFormat) as exc:
            return exc.with_traceback(None)

    def _keep(self, layer: int, found: LeafFile | EbsdError | None) -> None:
        self.forget(layer)
        opened, held = _cost(found)
        while self._known and (self._open + opened > self._files or self._held + held > self._memory):
            self.forget(next(iter(self._known)))
        self._known[layer] = found
        self._open += opened
        self._held += held

    def shared(self, layer: int) -> SharedLeaves | None:
        """Return the leaves of a layer that is known, for a reader that is not Python; None when it has none.

        Valid until ``on_forget``. Raises as ``leaf``.
        """
        found = self._known[layer]
        if isinstance(found, EbsdError):
            raise type(found)(**found.facts)
        return None if found is None else found.shared()

    def leaf(self, layer: int, chunk: int) -> bytes | None:
        """Return what the leaf of a chunk must be; None when nothing says so.

        Raises KeyError for a layer that is not known (any more), StoreDamaged or UnsupportedFormat when the leaf file
        or the table is not what it must be, OSError.
        """
        return self.leaves(layer, chunk, 1)[0]

    def leaves(self, layer: int, first: int, count: int) -> list[bytes | None]:
        """Return what the leaves of consecutive chunks must be; else as ``leaf``."""
        found = self._known[layer]
        self._known.move_to_end(layer)
        if isinstance(found, EbsdError):
            raise type(found)(**found.facts)
        return [None] * count if found is None else found.digests_of(first, count)

    def forget(self, layer: int) -> None:
        """Look at a layer again at its next use: it has been hashed."""
        if layer not in self._known:
            return
        found = self._known.pop(layer)
        self.on_forget(layer)
        opened, held = _cost(found)
        self._open -= opened
        self._held -= held
        if isinstance(found, LeafFile):
            found.close()

    def forget_all_but(self, layers: Collection[int]) -> None:
        """Close what is open of other layers; they may be gone."""
        for layer in [layer for layer in self._known if layer not in layers]:
            self.forget(layer)

    def close(self) -> None:
        while self._known:
            self.forget(next(iter(self._known)))

    def check(self, layer: int, uuid: bytes, first: int, ciphertext: memoryview) -> None:
        """Compare consecutive whole chunks with their leaves; blocks. Raises StoreDamaged naming the chunk, OSError."""
        if not self.knows(layer):
            self.load(layer, uuid)()
        wanted = self.leaves(layer, first, len(ciphertext) // CHUNK)
        if not any(wanted):
            return
        found = leaf_digests(uuid, first, ciphertext)
        for at, leaf in enumerate(wanted):
            if leaf is not None and leaf != found[at]:
                raise damaged_chunk(layer, uuid, first + at)


# --- hashing


def steps(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Cut ranges of chunks into pieces of at most 1 MiB, none across a border of segments."""
    for first, end in ranges:
        at = first
        while at < end:
            border = (at // CHUNKS_PER_SEGMENT + 1) * CHUNKS_PER_SEGMENT
            stop = min(end, at + STEP_CHUNKS, border)
            yield at, stop
            at = stop


def late_runs(disk: Disk, dirfd: int, layer: int, uuid: bytes, named: Iterable[tuple[int, int]]) -> Runs:
    """Return what to hash of a layer whose sealing map is not at hand: all that is stored, and what a map names."""
    return Runs(merged_ranges(stored_ranges(disk, dirfd, layer, uuid), named))


def hash_layer(
    disk: Disk,
    dirfd: int,
    lineage: LineageId,
    layer: int,
    uuid: bytes,
    runs: Runs,
    on_step: Callable[[int], object] = lambda chunks: None,
) -> LeafSlot:
    """Hash a sealed layer at full speed and return its slot, durable; blocks. Raises StoreDamaged, OSError.

    ``on_step`` is called with the number of chunks that were hashed; what it raises ends the hashing.
    """
    buffer = memoryview(bytearray(MIB))
    writer = LeafWriter(disk, dirfd, lineage, layer, uuid, runs)
    try:
        for first, end in steps(runs):
            for leaf in hash_chunks(disk, dirfd, layer, uuid, first, end, buffer):
                writer.add(leaf)
            on_step(end - first)
    except BaseException:
        writer.abandon()
        raise
    return publish(disk, dirfd, lineage, layer, uuid, writer)


async def hash_layer_gently(
    disk: Disk,
    scheduler: Scheduler,
    dirfd: int,
    lineage: LineageId,
    layer: int,
    uuid: bytes,
    runs: Runs,
    *,
    requests: Callable[[], int],
    sleep: Callable[[float], Awaitable[object]],
) -> LeafSlot:
    """As ``hash_layer``, a step at a time, pausing while ``requests`` (a count) goes up.

    A cancellation leaves nothing behind. A temporary file that somebody removed is begun again. Raises StoreDamaged,
    OSError.
    """
    for _ in range(ATTEMPTS - 1):
        with contextlib.suppress(FileNotFoundError):
            return await _hash_gently(disk, scheduler, dirfd, lineage, layer, uuid, runs, requests, sleep)
    return await _hash_gently(disk, scheduler, dirfd, lineage, layer, uuid, runs, requests, sleep)


async def _hash_gently(
    disk: Disk,
    scheduler: Scheduler,
    dirfd: int,
    lineage: LineageId,
    layer: int,
    uuid: bytes,
    runs: Runs,
    requests: Callable[[], int],
    sleep: Callable[[float], Awaitable[object]],
) -> LeafSlot:
    buffer = memoryview(bytearray(MIB))
    writer = await scheduler.blocking(LeafWriter, disk, dirfd, lineage, layer, uuid, runs)

    def step(first: int, end: int) -> None:
        for leaf in hash_chunks(disk, dirfd, layer, uuid, first, end, buffer):
            writer.add(leaf)

    try:
        for first, end in steps(runs):
            before, began = requests(), time.monotonic()
            await scheduler.blocking(step, first, end)
            await sleep(PAUSE_FACTOR * (time.monotonic() - began) if requests() != before else 0.0)
    except BaseException:
        writer.abandon()
        raise
    return await scheduler.blocking(publish, disk, dirfd, lineage, layer, uuid, writer)


def slots_of(
    disk: Disk, dirfd: int, lineage: LineageId, uuids: Mapping[int, bytes]
) -> tuple[dict[int, LeafSlot], list[int]]:
    """Return the slots of layers (number -> uuid), and the numbers of those that were not hashed, ascending."""
    slots = read_slots(disk, dirfd, lineage, uuids, durable=True)
    return slots, sorted(set(uuids) - set(slots))
