"""Frames of a sealed map: the entries of 16 GiB of volume, as columns of numbers, compressed; and back. No I/O.

1. Where few runs are stored, each run is three numbers: the holes before it, its further chunks, its layer. Where there
   are many, the entries stand as they are. Bytes of equal weight stand together: zlib finds what they have in common.
2. Nothing is inflated beyond what the number of runs or of chunks allows, and there are never more runs than fit.
3. What costs a step in Python is a run, never a chunk or a hole.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from typing import Final

from ebsd.store.entries import ENTRY, HOLE

FRAME: Final = 1024 * 1024
"""Bytes of entries in a frame: 262,144 chunks."""

PIECE: Final = 64 * 1024
"""Bytes of entries that can be read of a frame alone: 16384 chunks."""

OVERHEAD: Final = 1024
"""Bytes that an encoded frame is longer than its entries at most: head, and what zlib adds where nothing repeats."""

AS_RUNS: Final = 1
AS_ENTRIES: Final = 2
CHUNKS_PER_RUN: Final = 16
"""There are never more runs than one for so many chunks of the frame."""

_HEAD = struct.Struct("<II")
_LENGTH = struct.Struct("<I")
_COLUMNS: Final = 3
_STORED: Final = b"\0" + b"\1" * 255
"""Translates every byte but 0 to 1."""

_FEW: Final = 256


class FrameDamaged(ValueError):
    """A frame does not hold what it must; the text says what is wrong with it."""


# --- writing


def encode_frame(entries: memoryview) -> bytes:
    """Return the frame of these entries: format B, whole entries, at most FRAME bytes."""
    most = len(entries) // ENTRY // CHUNKS_PER_RUN
    runs = stored_runs(entries, most)
    if runs is None:
        pieces = [_deflate([bytes(entries[at : at + PIECE])]) for at in range(0, len(entries), PIECE)]
        return _HEAD.pack(AS_ENTRIES, len(pieces)) + b"".join(_LENGTH.pack(len(piece)) + piece for piece in pieces)
    if not runs:
        return _HEAD.pack(AS_RUNS, 0)
    end = 0
    gaps, more, layers = [], [], []
    for first, beyond, layer in runs:
        gaps.append(first - end)
        more.append(beyond - first - 1)
        layers.append(layer)
        end = beyond
    columns = [struct.pack(f"<{len(runs)}I", *column) for column in (gaps, more, layers)]
    return _HEAD.pack(AS_RUNS, len(runs)) + _deflate(columns)


def _deflate(columns: Sequence[bytes]) -> bytes:
    """Compress columns of u32 into one zlib stream: the lowest bytes of each, then the second ones, and so on."""
    stream = zlib.compressobj(6, zlib.DEFLATED, 15, 9)
    parts = []
    for column in columns:
        for weight in range(ENTRY):
            parts.append(stream.compress(column[weight::ENTRY]))
            if weight == 0 and len(column) > _FEW:
                parts.append(stream.flush(zlib.Z_PARTIAL_FLUSH))  # what follows is mostly zeros: another Huffman code
    parts.append(stream.flush())
    return b"".join(parts)


def stored_runs(entries: memoryview, most: int) -> list[tuple[int, int, int]] | None:
    """Return (first chunk, end, layer) of the runs of equal entries that are no holes; None when there are too many.

    A run may be cut where a piece of 16384 chunks ends, and is joined again.
    """
    runs: list[tuple[int, int, int]] = []
    for base in range(0, len(entries), PIECE):
        piece = bytes(entries[base : base + PIECE])
        if piece == piece[:ENTRY] * (len(piece) // ENTRY):
            layer = int.from_bytes(piece[:ENTRY], "little")
            found = [(0, len(piece) // ENTRY, layer)] if layer != HOLE else []
        else:
            found = _runs_in(piece, most + 1 - len(runs))
        offset = base // ENTRY
        for first, end, layer in found:
            if runs and runs[-1][1:] == (offset + first, layer):
                runs[-1] = runs[-1][0], offset + end, layer
            else:
                runs.append((offset + first, offset + end, layer))
        if len(runs) > most:
            return None
    return runs


def _runs_in(piece: bytes, most: int) -> list[tuple[int, int, int]]:
    """Return the runs of a piece, or its first ones when there are more than ``most``."""
    planes = [piece[weight::ENTRY] for weight in range(ENTRY)]
    marks = planes[0].translate(_STORED)  # a byte per chunk: 1 where something is stored
    zeros = bytes(len(marks))
    if planes[1:] != [zeros] * 3:
        either = 0
        for plane in planes:
            either |= int.from_bytes(plane.translate(_STORED), "little")
        marks = either.to_bytes(len(marks), "little")
    values = memoryview(piece).cast("I")
    count = len(values)
    runs: list[tuple[int, int, int]] = []
    first = marks.find(1)
    while first >= 0 and len(runs) <= most:
        layer = values[first]
        end = first + 1
        if end < count and values[end] == layer:
            end = _end_of_run(piece, first)
        runs.append((first, end, layer))
        first = marks.find(1, end)
    return runs


def _end_of_run(piece: bytes, first: int) -> int:
    """Return where the run that begins at entry ``first`` ends: compares twice as much each time, then halves."""
    one = piece[first * ENTRY : (first + 1) * ENTRY]
    count = len(piece) // ENTRY
    end, step = first + 1, 1
    while end + step <= count and piece[end * ENTRY : (end + step) * ENTRY] == one * step:
        end += step
        step *= 2
    while step := step // 2:
        if end + step <= count and piece[end * ENTRY : (end + step) * ENTRY] == one * step:
            end += step
    return end


# --- reading


def decode_frame(frame: memoryview, entries: memoryview, chunks: int, first: int = 0) -> None:
    """Fill ``entries`` (format B, zeros) from chunk ``first`` on, of a frame of ``chunks``. Raises FrameDamaged.

    ``first`` is where a piece begins. Of what is not asked for, not everything is looked at.
    """
    if len(frame) < _HEAD.size:
        raise FrameDamaged("is too short")
    kind, count = _HEAD.unpack_from(frame)
    body = frame[_HEAD.size :]
    if kind == AS_ENTRIES and count == -(-chunks * ENTRY // PIECE):
        _fill_pieces(body, entries, chunks, first)
    elif kind == AS_RUNS and 0 < count <= chunks // CHUNKS_PER_RUN:
        _fill_runs(entries, first, chunks, *_inflate(body, _COLUMNS, count))
    elif kind != AS_RUNS or count or body:
        raise FrameDamaged(f"is of kind {kind}, with {count} parts and {len(body)} bytes behind them")


def _fill_pieces(body: memoryview, entries: memoryview, chunks: int, first: int) -> None:
    at, begin, end = 0, first * ENTRY, first * ENTRY + len(entries)
    for start in range(0, chunks * ENTRY, PIECE):
        if len(body) - at < _LENGTH.size:
            raise FrameDamaged("ends before its pieces do")
        (length,) = _LENGTH.unpack_from(body, at)
        at += _LENGTH.size
        stream = body[at : at + length]
        at += length
        if begin <= start < end:
            stop = min(start + PIECE, chunks * ENTRY)
            (column,) = _inflate(stream, 1, (stop - start) // ENTRY)
            entries[start - begin : stop - begin] = column.cast("B")
    if at != len(body):
        raise FrameDamaged("does not end with its pieces")


def _inflate(body: memoryview, columns: int, count: int) -> list[memoryview]:
    """Return columns of ``count`` numbers each, format I."""
    inflater = zlib.decompressobj()
    wanted = columns * count * ENTRY
    try:
        plain = inflater.decompress(body, wanted + 1)  # one more, so that "too much" is seen and no more inflated
    except zlib.error as error:
        raise FrameDamaged("does not inflate") from error
    if len(plain) != wanted or not inflater.eof or inflater.unused_data or inflater.unconsumed_tail:
        raise FrameDamaged(f"does not hold {wanted} bytes")
    found = []
    for column in range(columns):
        numbers = bytearray(count * ENTRY)
        for weight in range(ENTRY):
            at = (column * ENTRY + weight) * count
            numbers[weight::ENTRY] = plain[at : at + count]
        found.append(memoryview(numbers).cast("I"))
    return found


def _fill_runs(
    entries: memoryview, first: int, chunks: int, gaps: memoryview, more: memoryview, layers: memoryview
) -> None:
    values = entries.cast("I")
    low, high = first, first + len(values)
    at = 0
    for gap, further, layer in zip(gaps.tolist(), more.tolist(), layers.tolist(), strict=True):
        begin = at + gap
        at = begin + further + 1
        if at > chunks or layer == HOLE:
            raise FrameDamaged(f"has a run of layer {layer} that ends at chunk {at} of {chunks}")
        if begin >= high:
            return
        if not further:
            if begin >= low:
                values[begin - low] = layer
        elif at > low:
            begin, end = max(begin, low) - low, min(at, high) - low
            entries[begin * ENTRY : end * ENTRY] = layer.to_bytes(ENTRY, "little") * (end - begin)
