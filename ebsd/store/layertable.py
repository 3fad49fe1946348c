"""The layer table of a lineage: which uuid each layer number has; append-only, dense, one slot per layer.

1. Entry i (from 0) is layer i + 1, at byte 64 * (i + 1): the place of an append follows from its number, so a torn
   append is repaired by doing it again. Nothing counts an entry, is built on it, or is put behind it before it
   is durable.
2. What is read is strict. Who knows how many layers there are (a record, the catalog) says so, and what lies behind
   them, an append under way or a torn one, is not looked at.
3. A record holds (count, ``prefix_hash(count)``), so entries that it covers can never be exchanged.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from ebsd.domain.errors import SnapshotIdMalformed, StoreDamaged, UnsupportedFormat, VolumeIdMalformed
from ebsd.domain.ids import LineageId, SnapshotId, VolumeId, format_uuid, parse_resource_id, parse_uuid
from ebsd.domain.model import Cipher, Layer
from ebsd.domain.units import SECTOR
from ebsd.store.atomic import write_file_atomically
from ebsd.store.disk import Disk, opened, pwrite_all, read_file
from ebsd.store.entries import FIRST_RESERVED

MAGIC: Final = b"EBSDLTB1"
VERSION: Final = 1
SLOT: Final = 64
MAX_FILE: Final = 64 * 1024 * 1024
"""A million layers: hourly snapshots for a century."""

_HEADER = struct.Struct("<8sII16sII16s")
_ENTRY = struct.Struct("<II16s24s8s")
_SUMMED = 56

_KEPT: Final = 8
_seen: dict[bytes, tuple[bytes, tuple[LayerEntry, ...]]] = {}
"""Header -> (bytes, layers) of the longest table with it that was read; of a few lineages."""


@dataclass(frozen=True, slots=True)
class LayerEntry:
    """One layer: its number in the lineage, its random uuid, and the volume or copied snapshot it was made for."""

    number: int
    uuid: bytes
    volume: VolumeId | SnapshotId


@dataclass(frozen=True, slots=True)
class LayerTable:
    """A parsed table; ``layers[i]`` is layer i + 1."""

    lineage: LineageId
    sector_size: int
    cipher: Cipher
    layers: tuple[LayerEntry, ...]
    raw: bytes = field(default=b"", compare=False, repr=False)
    """The file up to the last layer, when the table was read from one: what ``encode_table`` gives."""

    def uuid_of(self, number: int) -> bytes:
        """Return the uuid of a layer; raises KeyError for a number that the table does not have."""
        if not 1 <= number <= len(self.layers):
            raise KeyError(number)
        return self.layers[number - 1].uuid

    def numbers(self) -> range:
        return range(1, len(self.layers) + 1)

    def prefix_hash(self, count: int) -> bytes:
        """Return SHA-256(header || first ``count`` entries), which the signed record holds. Raises ValueError."""
        if not 0 <= count <= len(self.layers):
            raise ValueError(f"the table has {len(self.layers)} layers, not {count}")
        if self.raw:
            return hashlib.sha256(memoryview(self.raw)[: (count + 1) * SLOT]).digest()
        digest = hashlib.sha256(encode_header(self))
        for entry in self.layers[:count]:
            digest.update(encode_entry(entry))
        return digest.digest()


def _summed(front: bytes) -> bytes:
    return front + hashlib.sha256(front).digest()[:8]


def encode_header(table: LayerTable) -> bytes:
    """Return the 64 bytes of the header."""
    lineage = parse_uuid(table.lineage)
    return _summed(_HEADER.pack(MAGIC, VERSION, 0, lineage, table.sector_size, table.cipher, bytes(16)))


def encode_entry(entry: LayerEntry) -> bytes:
    """Return the 64 bytes of an entry. Raises ValueError for a number or uuid that no layer can have."""
    if not 0 < entry.number < FIRST_RESERVED or len(entry.uuid) != 16:
        raise ValueError(f"no layer: {entry}")
    parse_resource_id(entry.volume)
    return _summed(_ENTRY.pack(entry.number, 0, entry.uuid, entry.volume.encode(), bytes(8)))


def encode_table(table: LayerTable) -> bytes:
    """Return the whole file."""
    return encode_header(table) + b"".join(encode_entry(entry) for entry in table.layers)


def parse_layer_table(data: bytes | bytearray, *, file: str, count: int | None = None) -> LayerTable:
    """Read a table: its first ``count`` layers, or all of them when that is None, but for a last one of zeros.

    Raises StoreDamaged (length, checksum, order, duplicate, reserved bytes) and UnsupportedFormat (magic of no
    table is damage; version, flags, sector size or cipher that are not known are not).
    """
    header = _checked_slot(data, 0, file)
    magic, version, flags, raw_lineage, sector_size, cipher, zero = _HEADER.unpack(header)
    if magic != MAGIC:
        raise StoreDamaged(file=file, reason="it is not a layer table")
    if version != VERSION:
        raise UnsupportedFormat(file=file, what=f"version {version}")
    if flags:
        raise UnsupportedFormat(file=file, what=f"feature flags {flags:#x}")
    if any(zero):
        raise StoreDamaged(file=file, reason="reserved bytes of its header are not zero")
    if sector_size != SECTOR:
        raise UnsupportedFormat(file=file, what=f"sector size {sector_size}")
    if cipher not in Cipher.__members__.values():
        raise UnsupportedFormat(file=file, what=f"cipher {cipher}")
    if count is None:
        if len(data) % SLOT:
            raise StoreDamaged(file=file, reason=f"its {len(data)} bytes are not whole entries")
        count = len(data) // SLOT - 1
        if count > 0 and not any(data[count * SLOT :]):
            count -= 1  # an append of which a power cut left the length: it was not made, and is done again
    # Tables only grow, and get long: what an earlier call has looked at is compared as bytes.
    raw = bytes(data[: (count + 1) * SLOT])
    seen, earlier = _seen.get(bytes(data[:SLOT]), (b"", ()))
    layers: list[LayerEntry] = []
    if raw.startswith(seen):
        layers += earlier
    elif seen.startswith(raw) and len(raw) == (count + 1) * SLOT:
        layers += earlier[:count]
    uuids = {entry.uuid for entry in layers}
    for number in range(len(layers) + 1, count + 1):
        entry = _parse_entry(data, number, file)
        if entry.uuid in uuids:
            raise StoreDamaged(file=file, reason=f"layer {number} has the uuid of an earlier layer")
        uuids.add(entry.uuid)
        layers.append(entry)
    if len(raw) > len(seen) or not seen.startswith(raw):
        while len(_seen) >= _KEPT:
            _seen.pop(next(iter(_seen)), None)
        _seen[raw[:SLOT]] = (raw, tuple(layers))
    return LayerTable(LineageId(format_uuid(raw_lineage)), sector_size, Cipher(cipher), tuple(layers), raw)


def _checked_slot(data: bytes | bytearray, index: int, file: str) -> bytes:
    slot = bytes(data[index * SLOT : (index + 1) * SLOT])
    what = f"layer {index}" if index else "its header"
    if len(slot) != SLOT:
        raise StoreDamaged(file=file, reason=f"it ends before or in {what}")
    if _summed(slot[:_SUMMED]) != slot:
        raise StoreDamaged(file=file, reason=f"the checksum of {what} is wrong")
    return slot[:_SUMMED]


def _parse_entry(data: bytes | bytearray, number: int, file: str) -> LayerEntry:
    found, flags, uuid, raw_volume, zero = _ENTRY.unpack(_checked_slot(data, number, file))
    if flags:
        raise UnsupportedFormat(file=file, what=f"flags {flags:#x} at layer {number}")
    if found != number:
        raise StoreDamaged(file=file, reason=f"the place of layer {number} holds layer {found}")
    if any(zero):
        raise StoreDamaged(file=file, reason=f"reserved bytes of layer {number} are not zero")
    name = raw_volume.rstrip(b"\0")
    try:
        volume = parse_resource_id(name.decode("ascii"))
    except (UnicodeDecodeError, VolumeIdMalformed, SnapshotIdMalformed) as error:
        raise StoreDamaged(file=file, reason=f"layer {number} names no volume or snapshot") from error
    return LayerEntry(number, uuid, volume)


def create_layer_table(disk: Disk, path: Path, lineage: LineageId, cipher: Cipher) -> LayerTable:
    """Write a table without layers, durable at return. Raises OSError."""
    table = LayerTable(lineage, SECTOR, cipher, ())
    write_file_atomically(disk, path, encode_table(table))
    return table


def read_layer_table(disk: Disk, path: Path, *, count: int | None = None) -> LayerTable:
    """Read and parse a table; errors as ``parse_layer_table``, and FileNotFoundError."""
    return parse_layer_table(read_file(disk, path, MAX_FILE), file=os.fspath(path), count=count)


def read_durable_table(disk: Disk, path: Path) -> LayerTable:
    """Read a table, and make durable what was read: for a record that will count its layers. Errors as there.

    The last entry may be of an append that is under way, or of one whose maker was killed.
    """
    table = read_layer_table(disk, path)
    _sync(disk, path)
    return table


def _sync(disk: Disk, path: Path) -> None:
    with opened(disk, path, os.O_RDONLY | os.O_NONBLOCK) as fd:
        disk.fdatasync(fd)


def append_layer(disk: Disk, path: Path, entry: LayerEntry) -> LayerTable:
    """Put an entry at its place and make it durable; return the table that ends with it.

    May be repeated after a crash or an error with the same entry: a torn entry at its place is overwritten, the
    same one stays. Raises StoreDamaged when the place holds another whole entry (numbers are never used twice),
    when an earlier one is missing, or when an earlier one has this uuid; OSError.
    """
    data = read_file(disk, path, MAX_FILE)
    table = parse_layer_table(data, file=os.fspath(path), count=entry.number - 1)
    if any(layer.uuid == entry.uuid for layer in table.layers):
        raise StoreDamaged(file=os.fspath(path), reason=f"an earlier layer has the uuid of layer {entry.number}")
    wanted = encode_entry(entry)
    at = entry.number * SLOT
    present = bytes(data[at : at + SLOT])
    if present != wanted and len(present) == SLOT and _summed(present[:_SUMMED]) == present:
        raise StoreDamaged(file=os.fspath(path), reason=f"it has another layer {entry.number} already")
    with opened(disk, path, os.O_WRONLY) as fd:
        pwrite_all(disk, fd, wanted, at)
        disk.fdatasync(fd)
    return LayerTable(table.lineage, table.sector_size, table.cipher, (*table.layers, entry), table.raw + wanted)


def extend_layer_table(disk: Disk, path: Path, table: LayerTable, layers: Iterable[Layer]) -> LayerTable:
    """Append the layers, ascending, that the table at ``path`` does not have yet; return it, durable. Errors as there.

    By number: the rows of layers that a sweep removed are gone, their entries in the table stay for ever.
    """
    known = len(table.layers)
    # Whoever made the last entry may have been killed before it was durable: it is only seen. A head, or an entry
    # behind it, would outlive it after a power cut.
    _sync(disk, path)
    for layer in layers:
        if layer.number > known:
            table = append_layer(disk, path, LayerEntry(layer.number, layer.uuid, layer.volume))
    return table


def known_layers(path: Path) -> int:
    """Return a number that all layers missing in the table are at or behind; for a caller with the lineage's lock.

    By the length of the table: the last entry of a torn one is not counted. Raises OSError.
    """
    return max(1, path.stat().st_size // SLOT - 1)
