"""What a volume process does about leaves: hash the layers that its volume names, and sign snapshots with their root.

1. Beside the device, one layer after another, gently; nothing of it is needed for serving, so no error ends anything.
2. A snapshot's record is signed again, one generation further, when all layers that its map names were hashed. ebsd
   fetches it: the process that asked for the snapshot may be gone by then.
3. Whatever is cut is done by whoever next holds the data key: this volume's next process, or a verification.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final

import trio

from ebsd.domain.errors import EbsdError
from ebsd.domain.ids import LineageId
from ebsd.store.disk import Disk
from ebsd.store.entries import named_layers
from ebsd.store.layertable import LayerTable
from ebsd.store.leaftable import LeafSlot, leaf_root
from ebsd.store.leaves import Runs, named_ranges
from ebsd.store.signedrecord import NO_HASH, SignedBody
from ebsd.volume.hashing import LeafChecks, hash_layer_gently, late_runs, slots_of
from ebsd.volume.trio_scheduling import TrioScheduler

log = logging.getLogger("ebsd-volume")

PATIENCE: Final = 1.0
"""Seconds that an end waits for what is being hashed: without requests it goes at full speed."""


@dataclass(frozen=True, slots=True)
class _Snapshot:
    body: SignedBody
    named: frozenset[int]


class LeafWork:
    """The leaf work of one volume process; ``run`` does it, all else returns at once."""

    def __init__(
        self,
        disk: Disk,
        dirfd: int,
        lineage: LineageId,
        *,
        table: Callable[[], LayerTable],
        checks: LeafChecks,
        requests: Callable[[], int],
        sign: Callable[[SignedBody], bytes],
        slots: Mapping[int, LeafSlot] | None = None,
    ) -> None:
        """Borrow ``dirfd``. ``requests`` counts what the device was asked for; ``sign`` gives the 320 bytes.

        ``slots``: of layers that a signed root is over; they were made durable before that was signed.
        """
        self._disk = disk
        self._dirfd = dirfd
        self._lineage = lineage
        self._table = table
        self._checks = checks
        self._requests = requests
        self._sign = sign
        self._scheduler = TrioScheduler()
        self._layers: deque[tuple[int, Callable[[], Runs]]] = deque()
        self._snapshots: list[_Snapshot] = []
        self._slots = dict(slots or {})
        """Of layers that are known to be hashed, durably."""
        self._wanted = trio.Event()
        self._idle = trio.Event()
        self._scope = trio.CancelScope()
        self._ended = trio.Event()
        self._expected = 0
        self._running = False
        self.signed: dict[str, tuple[int, bytes]] = {}
        """Snapshot -> (generation, signed record), until somebody has taken it."""

    @property
    def pending(self) -> bool:
        """Whether there is work left."""
        return self._running and not self._ended.is_set() and not self._idle.is_set()

    # --- work to do

    def add_missing(self, entries: memoryview, head: int) -> None:
        """Hash what this map names and nobody hashed, ``head`` excepted; for the start. O(map): for a thread."""
        table = self._table()
        unknown = sorted(named_layers(entries) - {head} - self._slots.keys())
        uuids = {n: table.uuid_of(n) for n in unknown if n in table.numbers()}
        try:
            _, missing = slots_of(self._disk, self._dirfd, self._lineage, uuids)
        except (EbsdError, OSError) as exc:
            log.error("the leaves of %s: %s", self._lineage, exc)
            return
        for layer in missing:
            named = Runs(named_ranges(entries, layer))
            self._layers.append((layer, lambda layer=layer, named=named: self._late(layer, named)))  # type: ignore[misc]

    def _late(self, layer: int, named: Runs) -> Runs:
        return late_runs(self._disk, self._dirfd, layer, self._table().uuid_of(layer), named)

    def expect_sealed(self) -> None:
        """Count as pending from now on, until ``add_sealed`` and what it brings are done."""
        self._expected += 1
        self._idle = trio.Event()

    async def add_sealed(self, entries: memoryview, layer: int, body: SignedBody) -> None:
        """Hash a layer that was sealed just now under this map, then sign ``body``, of its snapshot, again."""
        try:
            runs, named = await self._scheduler.blocking(_named_in, entries, layer)
            self._layers.append((layer, lambda: runs))
            self._snapshots.append(_Snapshot(body, frozenset(named)))
        finally:
            self._expected -= 1
            self._wanted.set()

    def take(self, snapshots: Iterable[str]) -> None:
        """Forget records that ebsd has on the disk."""
        for snapshot in snapshots:
            self.signed.pop(snapshot, None)

    async def end(self) -> None:
        """Wait a moment for what is left, then stop; the rest is somebody else's."""
        if self._running:
            with trio.move_on_after(PATIENCE):
                await self._idle.wait()
            self._scope.cancel()
            await self._ended.wait()
        self._checks.close()

    # --- doing it

    async def run(self) -> None:
        """Work until ``end``. Raises nothing that is not a bug."""
        self._running = True
        try:
            with self._scope:
                while True:
                    while self._layers:
                        layer, runs = self._layers[0]
                        await self._hash(layer, runs)
                        self._layers.popleft()
                        await self._sign_what_is_hashed()
                    self._wanted = trio.Event()
                    if not self._expected:
                        self._idle.set()
                    await self._wanted.wait()
        finally:
            self._ended.set()

    async def _hash(self, layer: int, runs: Callable[[], Runs]) -> None:
        uuid = self._table().uuid_of(layer)
        try:
            await hash_layer_gently(
                self._disk, self._scheduler, self._dirfd, self._lineage, layer, uuid,
                await self._scheduler.blocking(runs), requests=self._requests, sleep=trio.sleep,
            )  # fmt: skip
        except (EbsdError, OSError) as exc:
            log.error("layer %d of %s was not hashed: %s", layer, self._lineage, exc)
        self._checks.forget(layer)

    async def _sign_what_is_hashed(self) -> None:
        left = {layer for layer, _ in self._layers}
        for snapshot in list(self._snapshots):
            if snapshot.named & left:
                continue  # its turn comes
            root = await self._scheduler.blocking(self.root, snapshot.named)
            self._snapshots.remove(snapshot)
            if root != NO_HASH:
                body = replace(snapshot.body, generation=snapshot.body.generation + 1, leaf_root=root)
                self.signed[body.resource] = (body.generation, self._sign(body))

    def root(self, layers: Iterable[int]) -> bytes:
        """Return the root over these layers, zeros when not all of them were hashed; blocks."""
        table = self._table()
        wanted = set(layers)
        try:
            # A slot that is set never changes, and a map may name thousands of layers.
            slots, missing = slots_of(
                self._disk,
                self._dirfd,
                self._lineage,
                {layer: table.uuid_of(layer) for layer in wanted - self._slots.keys()},
            )
            self._slots.update(slots)
        except (EbsdError, OSError) as exc:
            log.error("the leaves of %s: %s", self._lineage, exc)
            return NO_HASH
        return NO_HASH if missing else leaf_root(self._slots[layer] for layer in wanted)


def _named_in(entries: memoryview, layer: int) -> tuple[Runs, set[int]]:
    return Runs(named_ranges(entries, layer)), named_layers(entries)
