"""Frames of sealed maps: any entries come back, in whole and in part; what cannot be is refused; and what maps cost."""

from __future__ import annotations

import random
import struct
import tracemalloc
import zlib
from array import array

import pytest

from ebsd.domain.ids import LineageId, SnapshotId
from ebsd.domain.units import CHUNK, GIB, MIB, TIB
from ebsd.store.durablemap import FIRST_ENTRY
from ebsd.store.entries import ENTRY, entry_bytes
from ebsd.store.mapframes import (
    AS_ENTRIES,
    AS_RUNS,
    CHUNKS_PER_RUN,
    FRAME,
    OVERHEAD,
    PIECE,
    FrameDamaged,
    decode_frame,
    encode_frame,
)
from ebsd.store.sealedmap import encode_sealed_map

LANES = PIECE // ENTRY


def decoded(frame: bytes, chunks: int, first: int = 0, count: int | None = None) -> list[int]:
    entries = memoryview(bytearray((chunks if count is None else count) * ENTRY))
    decode_frame(memoryview(frame), entries, chunks, first)
    return entries.cast("I").tolist()


def encoded(values: list[int]) -> bytes:
    return encode_frame(memoryview(array("I", values)).cast("B"))


def any_entries(dice: random.Random) -> list[int]:
    """Runs of any length of few or many layers, or single chunks, among holes, some of them across pieces."""
    chunks = dice.choice([1, 15, 16, 17, 1000, LANES - 1, LANES, LANES + 1, 3 * LANES + 5])
    values = [dice.choice([0, 0, 7])] * chunks
    layers = [dice.choice([1, 2, 255, 256, 65536, 0x1000000, 0xFFFFFEFF]) for _ in range(dice.choice([1, 3, 300]))]
    for _ in range(dice.choice([0, 1, 5, chunks // 40, chunks // 2])):
        first = dice.randrange(chunks)
        end = min(chunks, first + dice.choice([1, 1, 2, 30, LANES + 9]))
        values[first:end] = [dice.choice([*layers, 0])] * (end - first)
    return values


@pytest.mark.parametrize("seed", range(60))
def test_any_entries_come_back_in_whole_and_in_part(seed: int) -> None:
    values = any_entries(random.Random(seed))
    frame = encoded(values)
    assert decoded(frame, len(values)) == values
    for first in range(0, len(values), LANES):
        part = values[first : first + LANES]
        assert decoded(frame, len(values), first, len(part)) == part


def test_a_run_across_pieces_is_one_run() -> None:
    values = [0] * 10 + [5] * (FRAME // ENTRY - 10)
    frame = encoded(values)
    assert struct.unpack_from("<II", frame) == (AS_RUNS, 1)
    assert len(frame) < 40
    assert decoded(frame, len(values)) == values


def test_what_has_no_structure_is_hardly_longer_than_it_is() -> None:
    raw = random.Random(1).randbytes(FRAME)
    frame = encode_frame(memoryview(raw))
    assert struct.unpack_from("<II", frame) == (AS_ENTRIES, FRAME // PIECE)
    assert len(frame) <= FRAME + OVERHEAD
    back = memoryview(bytearray(FRAME))
    decode_frame(memoryview(frame), back, FRAME // ENTRY)
    assert back == raw


def columns(*rows: tuple[int, int, int]) -> bytes:
    numbers = [struct.pack(f"<{len(rows)}I", *column) for column in zip(*rows, strict=True)]
    return b"".join(column[weight::ENTRY] for column in numbers for weight in range(ENTRY))


def as_runs(*rows: tuple[int, int, int], count: int | None = None) -> bytes:
    return struct.pack("<II", AS_RUNS, len(rows) if count is None else count) + zlib.compress(columns(*rows))


def test_a_frame_may_be_made_by_hand() -> None:
    assert decoded(as_runs((3, 1, 9), (0, 0, 8)), 32) == [0, 0, 0, 9, 9, 8] + [0] * 26
    assert decoded(struct.pack("<II", AS_RUNS, 0), 5) == [0] * 5


BOMB = zlib.compress(bytes(50_000_000))
ONE = as_runs((0, 0, 1))
DENSE = encoded(list(range(1, 65)))
BAD = {
    "nothing": b"",
    "half a head": b"\1\0\0\0",
    "another kind": struct.pack("<II", 3, 0),
    "no runs, and something": struct.pack("<II", AS_RUNS, 0) + b"x",
    "more runs than fit": as_runs(*[(0, 0, 1)] * (64 // CHUNKS_PER_RUN + 1)),
    "very many runs": as_runs((0, 0, 1), count=0xFFFFFFFF),
    "more runs than columns": as_runs((0, 0, 1), count=2),
    "fewer runs than columns": as_runs((0, 0, 1), (0, 0, 1), count=1),
    "behind the end": as_runs((64, 0, 1)),
    "beyond the end": as_runs((60, 4, 1)),
    "far beyond the end": as_runs((0, 0xFFFFFFFF, 1)),
    "far behind the end": as_runs((0xFFFFFFFF, 0, 1)),
    "a run of holes": as_runs((0, 3, 0)),
    "a bomb of runs": struct.pack("<II", AS_RUNS, 4) + BOMB,
    "a bomb of entries": struct.pack("<III", AS_ENTRIES, 1, len(BOMB)) + BOMB,
    "something behind the runs": ONE + b"x",
    "runs cut off": ONE[:-1],
    "something behind the entries": DENSE + b"x",
    "entries cut off": DENSE[:-1],
    "no entries": struct.pack("<II", AS_ENTRIES, 1),
    "two pieces instead of one": struct.pack("<II", AS_ENTRIES, 2) + DENSE[8:] + DENSE[8:],
    "a piece that is too long": struct.pack("<III", AS_ENTRIES, 1, 0xFFFFFFFF) + DENSE[12:],
}


@pytest.mark.parametrize("frame", BAD.values(), ids=BAD)
def test_what_cannot_be_is_refused_with_little_memory(frame: bytes) -> None:
    assert decoded(ONE, 64) == [1] + [0] * 63
    tracemalloc.start()
    with pytest.raises(FrameDamaged):
        decoded(frame, 64)
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


def test_any_bytes_are_entries_or_refused() -> None:
    dice = random.Random(3)
    good = [encoded(any_entries(random.Random(seed))) for seed in range(12)]
    refused = 0
    for _ in range(3000):
        frame = bytearray(dice.choice(good))
        for _ in range(dice.randrange(1, 4)):
            at = dice.randrange(len(frame))
            match dice.randrange(3):
                case 0:
                    frame[at] = dice.randrange(256)
                case 1:
                    del frame[at:]
                case _:
                    frame[at:at] = dice.randbytes(dice.randrange(1, 9))
            frame = frame or bytearray(1)
        try:
            decoded(bytes(frame), dice.choice([16, 1000, LANES]))
        except FrameDamaged:
            refused += 1
    assert refused > 2000


def stored(size: int) -> int:
    return -(-size // 4096) * 4096


def test_a_hundred_snapshots_of_10_gib_scattered_over_1_tib_cost_less_than_100_mib_of_maps() -> None:
    """The worst case: no chunk has a neighbour, and each has as many chunks, of as many layers, as the last."""
    dice = random.Random(1)
    chunks = TIB // CHUNK
    entries = array("I", bytes(chunks * ENTRY))
    for chunk in dice.sample(range(chunks), 10 * GIB // CHUNK):
        entries[chunk] = dice.randrange(1, 101)
    own = stored(FIRST_ENTRY + entry_bytes(chunks))
    snapshot, lineage = SnapshotId("snap-0123456789abcdef0"), LineageId("6ba7b810-9dad-41d1-80b4-00c04fd430c8")
    sealed = stored(len(encode_sealed_map(snapshot, lineage, memoryview(entries), chunks)))
    assert own + 100 * sealed < 96 * MIB


def test_what_was_written_in_one_go_costs_next_to_nothing() -> None:
    chunks = TIB // CHUNK
    entries = array("I", bytes(chunks * ENTRY))
    entries[: 10 * GIB // CHUNK] = array("I", [1]) * (10 * GIB // CHUNK)
    snapshot, lineage = SnapshotId("snap-0123456789abcdef0"), LineageId("6ba7b810-9dad-41d1-80b4-00c04fd430c8")
    assert len(encode_sealed_map(snapshot, lineage, memoryview(entries), chunks)) < 2048
