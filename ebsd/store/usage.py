"""Usage: of the chunks that a map names, which are named by others of the lineage too, and which by it alone.

1. Computed from the maps, never from the layers' files: a chunk counts CHUNK bytes for every map that names it.
2. Maps are compared in blocks of 1 GiB of volume, each with the one before it in the order given: what is equal to its
   neighbour costs a digest, and what differs a step per chunk. The result is exact in any order; an order by age is
   the quick one.
3. Digests of a map are remembered for as long as its identity stays (a sealed map for ever, a durable one until it is
   written to), and so is how neighbours differ: what is read again is what changed, and the map before it.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from typing import Final

from ebsd.domain.units import CHUNK
from ebsd.store.entries import ENTRY, HOLE

BLOCK: Final = 64 * 1024
"""Bytes of entries compared at once: 1 GiB of volume."""

_LANES: Final = BLOCK // ENTRY
_LOW: Final = int.from_bytes(b"\xff\xff\xff\x7f" * _LANES, "little")
_HIGH: Final = int.from_bytes(b"\x00\x00\x00\x80" * _LANES, "little")
_HOLES: Final = bytes(BLOCK)
_DIGEST: Final = 20
_PIECE: Final = 1024
"""Bytes that are compared at once when neighbours differ."""


CACHED_MAPS: Final = 50_000
"""Maps whose digests are kept: 20 bytes per GiB of volume that holds data."""

CACHED_RESULTS: Final = 4096
"""Places of a lineage's maps for which the result is kept."""

CACHED_CHANGES: Final = 4_000_000
"""Differences between neighbours that are kept, 12 bytes each."""

Identity = tuple[int, ...]
"""What changes whenever a map's file does: device, inode, length, times."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes of one volume or snapshot."""

    allocated: int
    """All chunks that its map names."""
    shared: int
    """Of these, named by another map of the lineage too."""
    unique: int
    """What its deletion gives back: named by no other map, in a layer that a sweep may touch then."""


def changes(before: bytes, after: bytes) -> array[int]:
    """Return where two blocks of BLOCK bytes differ: triples of chunk in the block, value before, value after."""
    found = array("I")
    for at in range(0, BLOCK, _PIECE):
        old, new = before[at : at + _PIECE], after[at : at + _PIECE]
        if old != new:
            pairs = zip(memoryview(old).cast("I"), memoryview(new).cast("I"), strict=True)
            for lane, (left, right) in enumerate(pairs, at // ENTRY):
                if left != right:
                    found.extend((lane, left, right))
    return found


def alone_in(steps: Sequence[tuple[int, array[int]]]) -> list[Counter[int]]:
    """Return, per group of equal blocks, how many chunks of each layer no other map names.

    ``steps``: (how many maps are in the group, how its block differs from that of the group before). There are at
    least two maps: a chunk that never changes is shared. Chunks are followed through the runs of their values; who
    names a value for one map in all names it alone.
    """
    before = [0]
    for maps, _ in steps:
        before.append(before[-1] + maps)
    counts: dict[tuple[int, int], int] = {}
    owners: dict[tuple[int, int], int] = {}
    running: dict[int, tuple[int, int]] = {}
    """Chunk -> (group in which its present value began, the value)."""

    def end(lane: int, value: int, first: int, beyond: int) -> None:
        if value != HOLE:
            key = lane, value
            counts[key] = counts.get(key, 0) + before[beyond] - before[first]
            owners[key] = first

    for group, (_, changed) in enumerate(steps):
        for lane, old, new in zip(changed[0::3], changed[1::3], changed[2::3], strict=True):
            first, value = running.get(lane, (0, old))
            end(lane, value, first, group)
            running[lane] = group, new
    for lane, (first, value) in running.items():
        end(lane, value, first, len(steps))
    alone: list[Counter[int]] = [Counter() for _ in steps]
    for (lane, value), count in counts.items():
        if count == 1:
            alone[owners[lane, value]][value] += 1
    return alone


def _nonzero_lanes(number: int) -> int:
    """Return a number whose highest bit of each 32-bit lane says whether the lane of ``number`` is not 0."""
    # The carry of a lane ends in its highest bit: both terms are below 2**31.
    return ((number & _LOW) + _LOW | number) & _HIGH


@dataclass(frozen=True, slots=True)
class UsageSource:
    """One map of a lineage: ``read`` yields its entries in blocks of BLOCK bytes, the last one perhaps shorter."""

    name: str
    identity: Identity
    read: Callable[[], Iterator[bytes]]
    untouchable: frozenset[int]
    """Layers that a sweep leaves alone also when this resource is gone: heads of others."""


class UsageCache:
    """Computes usages, and remembers what it has read and compared. Not thread-safe."""

    def __init__(self) -> None:
        self._digests: OrderedDict[str, tuple[Identity, tuple[bytes, ...]]] = OrderedDict()
        self._allocated: dict[bytes, int] = {}
        """Digest -> chunks that the block names."""
        self._changes: OrderedDict[tuple[bytes, bytes], array[int]] = OrderedDict()
        self._kept = 0
        self._results: OrderedDict[tuple[tuple[bytes, int], ...], Sequence[Mapping[int, int]]] = OrderedDict()
        self._loaded: OrderedDict[str, list[bytes]] = OrderedDict()
        """The blocks of the last two maps that were read, while usages are computed."""

    def usages(self, sources: Sequence[UsageSource]) -> dict[str, Usage]:
        """Return the usage of each map of one lineage; ``sources`` are all of them. Raises StoreDamaged, OSError."""
        try:
            return self._usages(sources)
        finally:
            self._loaded.clear()
            while self._kept > CACHED_CHANGES:
                self._kept -= len(self._changes.popitem(last=False)[1]) // 3
            while len(self._digests) > CACHED_MAPS:
                self._digests.popitem(last=False)
            if len(self._allocated) > CACHED_MAPS * 20:
                self._allocated.clear()
                self._digests.clear()

    def _usages(self, sources: Sequence[UsageSource]) -> dict[str, Usage]:
        maps: list[tuple[UsageSource, tuple[bytes, ...]]] = []
        length = 0
        for source in sources:
            digests = self._digests_of(source)
            length = max(length, len(digests))
            if maps:
                self._learn_changes(maps[-1], (source, digests))
            maps.append((source, digests))
        allocated = dict.fromkeys((source.name for source, _ in maps), 0)
        alone = dict.fromkeys(allocated, 0)
        unique = dict.fromkeys(allocated, 0)
        for index in range(length):
            groups: list[tuple[bytes, list[UsageSource]]] = []
            for source, digests in maps:
                digest = _at(digests, index)
                if groups and groups[-1][0] == digest:
                    groups[-1][1].append(source)
                else:
                    groups.append((digest, [source]))
            if len(groups) == 1 and not groups[0][0]:
                continue
            for (digest, having), layers in zip(groups, self._alone(groups, index), strict=True):
                for source in having:
                    allocated[source.name] += self._allocated.get(digest, 0)
                for layer, chunks in layers.items():  # which is of a group of one
                    alone[having[0].name] += chunks
                    unique[having[0].name] += chunks if layer not in having[0].untouchable else 0
        return {
            name: Usage(total * CHUNK, (total - alone[name]) * CHUNK, unique[name] * CHUNK)
            for name, total in allocated.items()
        }

    def _alone(self, groups: Sequence[tuple[bytes, Sequence[UsageSource]]], index: int) -> Sequence[Mapping[int, int]]:
        if len(groups) == 1:
            having = groups[0][1]
            if len(having) > 1:
                return [{}]
            counts = Counter(memoryview(self._load(having[0])[index]).cast("I"))
            del counts[HOLE]
            return [counts]
        steps = [(len(groups[0][1]), array("I"))]
        for (before, _), (after, having) in pairwise(groups):
            steps.append((len(having), self._changes[before, after]))
        key = tuple((digest, len(having)) for digest, having in groups)
        result = self._results.get(key)
        if result is None:
            result = self._results[key] = alone_in(steps)
            while len(self._results) > CACHED_RESULTS:
                self._results.popitem(last=False)
        return result

    def _learn_changes(
        self, before: tuple[UsageSource, tuple[bytes, ...]], after: tuple[UsageSource, tuple[bytes, ...]]
    ) -> None:
        for index in range(max(len(before[1]), len(after[1]))):
            key = _at(before[1], index), _at(after[1], index)
            if key[0] == key[1]:
                continue
            if key in self._changes:
                self._changes.move_to_end(key)
                continue
            old = self._load(before[0])[index] if key[0] else _HOLES
            new = self._load(after[0])[index] if key[1] else _HOLES
            self._changes[key] = found = changes(old, new)
            self._kept += len(found) // 3

    def _digests_of(self, source: UsageSource) -> tuple[bytes, ...]:
        """Return a digest per block; empty for a block of holes."""
        known = self._digests.get(source.name)
        if known is not None and known[0] == source.identity:
            self._digests.move_to_end(source.name)
            return known[1]
        digests = tuple(self._noted(block) for block in self._load(source))
        self._digests[source.name] = source.identity, digests
        return digests

    def _load(self, source: UsageSource) -> list[bytes]:
        blocks = self._loaded.get(source.name)
        if blocks is None:
            # A durable map has whole pages, a sealed one ends with its last chunk.
            padded = (bytes(block).ljust(BLOCK, b"\0") for block in source.read())
            blocks = self._loaded[source.name] = [_HOLES if block == _HOLES else block for block in padded]
            while len(self._loaded) > 2:
                self._loaded.popitem(last=False)
        return blocks

    def _noted(self, block: bytes) -> bytes:
        if block is _HOLES:
            return b""
        digest = blake2b(block, digest_size=_DIGEST).digest()
        if digest not in self._allocated:
            self._allocated[digest] = _nonzero_lanes(int.from_bytes(block, "little")).bit_count()
        return digest


def _at(digests: Sequence[bytes], index: int) -> bytes:
    return digests[index] if index < len(digests) else b""
