"""What each map of a lineage names, shares and holds alone: against sets, for any maps, and what is read for it."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator

import pytest

from ebsd.domain.units import CHUNK
from ebsd.store.usage import BLOCK, Usage, UsageCache, UsageSource

LANES = BLOCK // 4


class Map:
    """A map of some blocks that counts how often it was read."""

    def __init__(self, name: str, entries: dict[int, int], chunks: int) -> None:
        self.name = name
        self.entries = entries
        self.chunks = chunks
        self.version = 0
        self.reads = 0

    def read(self) -> Iterator[bytes]:
        self.reads += 1
        values = array("I", bytes(4 * self.chunks))
        for chunk, layer in self.entries.items():
            values[chunk] = layer
        raw = values.tobytes()
        for at in range(0, len(raw), BLOCK):
            yield raw[at : at + BLOCK]

    def source(self, untouchable: frozenset[int] = frozenset()) -> UsageSource:
        return UsageSource(self.name, (self.version,), self.read, untouchable)


def expected(maps: list[Map], untouchable: dict[str, frozenset[int]]) -> dict[str, Usage]:
    found = {}
    for own in maps:
        others = {pair for other in maps if other is not own for pair in other.entries.items()}
        named = {(chunk, layer) for chunk, layer in own.entries.items() if layer}
        alone = {pair for pair in named if pair not in others}
        free = {pair for pair in alone if pair[1] not in untouchable[own.name]}
        found[own.name] = Usage(len(named) * CHUNK, (len(named) - len(alone)) * CHUNK, len(free) * CHUNK)
    return found


@pytest.mark.parametrize("seed", range(12))
def test_any_maps_as_sets_say(seed: int) -> None:
    dice = random.Random(seed)
    chunks = 2 * LANES + 100
    maps: list[Map] = []
    for number in range(dice.randrange(1, 9)):
        entries = dict(dice.choice(maps).entries) if maps and dice.random() < 0.8 else {}
        for _ in range(dice.choice([0, 1, 5, 300])):
            first = dice.randrange(chunks)
            layer = dice.choice([0, number + 1, number + 1, 0xFFFFFE00])
            for chunk in range(first, min(chunks, first + dice.choice([1, 3, 1000]))):
                entries[chunk] = layer
        # Snapshots end with their last chunk, volumes with whole pages, and volumes grow.
        length = dice.choice([chunks, -(-chunks // 1024) * 1024, chunks + LANES])
        maps.append(Map(f"map {number}", entries, length))
    untouchable = {m.name: frozenset(dice.sample(range(1, 9), 2)) for m in maps}
    cache = UsageCache()
    wanted = expected(maps, untouchable)
    assert cache.usages([m.source(untouchable[m.name]) for m in maps]) == wanted
    assert cache.usages([m.source(untouchable[m.name]) for m in reversed(maps)]) == wanted
    maps.pop(dice.randrange(len(maps)))
    assert cache.usages([m.source(untouchable[m.name]) for m in maps]) == expected(maps, untouchable)


def test_the_highest_and_lowest_values_count() -> None:
    values = [1, 0x7FFFFFFF, 0x80000000, 0xFFFFFEFF, 0] * 100
    lone = Map("lone", dict(enumerate(values)), 500)
    assert UsageCache().usages([lone.source()])["lone"] == Usage(400 * CHUNK, 0, 400 * CHUNK)


def test_only_what_changed_is_read_again_and_the_map_before_it() -> None:
    maps = [Map(f"snap {n}", {c: 1 + (c < n) for c in range(0, 3 * LANES, 7)}, 3 * LANES) for n in range(50)]
    cache = UsageCache()
    cache.usages([m.source() for m in maps])
    assert [m.reads for m in maps] == [1] * 50
    maps[7].entries[1] = 9
    maps[7].version += 1
    assert cache.usages([m.source() for m in maps])["snap 7"].unique == CHUNK
    maps.append(Map("new", {}, LANES))
    cache.usages([m.source() for m in maps])
    assert [m.reads for m in maps] == [1] * 6 + [2, 2, 2] + [1] * 40 + [2, 1]


def test_what_fell_out_of_the_cache_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ebsd.store.usage.CACHED_CHANGES", 1)
    dice = random.Random(1)
    maps = [Map(f"map {n}", {c: dice.randrange(5) for c in range(2 * LANES)}, 2 * LANES) for n in range(3)]
    nothing = {m.name: frozenset[int]() for m in maps}
    cache = UsageCache()
    for times in (1, 2):
        assert cache.usages([m.source() for m in maps]) == expected(maps, nothing)
        assert [m.reads for m in maps] == [times] * 3
