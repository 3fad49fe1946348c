"""The leaf table of a lineage: which leaf file each sealed layer has; and the root over them, for a signed record.

1. Slot n is for layer n, at byte 64 * n behind a header; a slot of zeros: that layer was not hashed yet.
2. A slot is set once and never changes, so a root stays true for ever. It is set after its leaf file is durable and has
   its name, under a lock on the table: of two processes that hashed one layer, the first one's file stays.
3. A slot outlives its layer, as the entry of the layer table does.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import stat
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from ebsd.domain.errors import StoreDamaged, UnsupportedFormat
from ebsd.domain.ids import LineageId, format_uuid, parse_uuid
from ebsd.store.disk import Disk, open_regular, opened, pread_all, pwrite_all
from ebsd.store.entries import FIRST_RESERVED
from ebsd.store.leaves import LeafWriter

NAME: Final = "leaves"
MAGIC: Final = b"EBSDLFT1"
VERSION: Final = 1
SLOT: Final = 64

_HEADER = struct.Struct("<8sII16s24s8s")
_SLOT = struct.Struct("<II16s32s8s")
_SUMMED: Final = 56
_FEW: Final = 64
"""Slots that are read one by one; for more the whole table is."""
_ROOT_LABEL: Final = b"ebsd/1/leaf-root\0"


@dataclass(frozen=True, slots=True)
class LeafSlot:
    """That a layer was hashed: its number, its uuid, and the digest of its leaf file."""

    number: int
    uuid: bytes
    digest: bytes


def _summed(front: bytes) -> bytes:
    return front + hashlib.sha256(front).digest()[:8]


def encode_leaf_table_header(lineage: LineageId) -> bytes:
    """Return the 64 bytes of the header."""
    return _summed(_HEADER.pack(MAGIC, VERSION, 0, parse_uuid(lineage), bytes(24), b"")[:_SUMMED])


def encode_slot(slot: LeafSlot) -> bytes:
    """Return the 64 bytes of a slot. Raises ValueError for one that no layer can have."""
    if not 0 < slot.number < FIRST_RESERVED or len(slot.uuid) != 16 or len(slot.digest) != 32:
        raise ValueError(f"no leaf slot: {slot}")
    return _summed(_SLOT.pack(slot.number, 0, slot.uuid, slot.digest, b"")[:_SUMMED])


def parse_leaf_table_header(raw: bytes, lineage: LineageId, *, file: str) -> bool:
    """Check 64 bytes; False when they are all zeros, which is a table that was never written to.

    Raises StoreDamaged and UnsupportedFormat.
    """
    if not any(raw):
        return False
    if len(raw) != SLOT or _summed(raw[:_SUMMED]) != raw:
        raise StoreDamaged(file=file, reason="the checksum of its header is wrong")
    magic, version, flags, raw_lineage, zeros, _ = _HEADER.unpack(raw)
    if magic != MAGIC:
        raise StoreDamaged(file=file, reason="it is not a leaf table")
    if version != VERSION:
        raise UnsupportedFormat(file=file, what=f"version {version}")
    if flags:
        raise UnsupportedFormat(file=file, what=f"feature flags {flags:#x}")
    if any(zeros):
        raise StoreDamaged(file=file, reason="reserved bytes of its header are not zero")
    if format_uuid(raw_lineage) != lineage:
        raise StoreDamaged(file=file, reason="it is that of another lineage")
    return True


def parse_slot(raw: bytes, number: int, uuid: bytes, *, file: str) -> LeafSlot | None:
    """Read the 64 bytes of layer ``number``; None when it was not hashed. Raises StoreDamaged, UnsupportedFormat."""
    if not any(raw):
        return None
    if len(raw) != SLOT or _summed(raw[:_SUMMED]) != raw:
        raise StoreDamaged(file=file, reason=f"the checksum of layer {number} is wrong")
    found, flags, found_uuid, digest, _ = _SLOT.unpack(raw)
    if flags:
        raise UnsupportedFormat(file=file, what=f"flags {flags:#x} at layer {number}")
    if (found, found_uuid) != (number, uuid):
        raise StoreDamaged(file=file, reason=f"the place of layer {number} holds layer {found}")
    return LeafSlot(found, found_uuid, digest)


def read_slots(
    disk: Disk, dirfd: int, lineage: LineageId, layers: Mapping[int, bytes], *, durable: bool = False
) -> dict[int, LeafSlot]:
    """Return the slots of those of ``layers`` (number -> uuid) that were hashed. Raises as the parsers, OSError.

    ``durable``: make them so, for a root that is to be signed: who set one may have been killed before it synced it.
    """
    try:
        fd, _ = open_regular(disk, NAME, os.O_RDWR if durable else os.O_RDONLY, dirfd)
    except FileNotFoundError:
        return {}
    try:
        slots = _slots_in(disk, fd, lineage, layers)
        if durable and slots:
            _store(disk, fd, lineage, slots.values())
        return slots
    finally:
        disk.close(fd)


def _store(disk: Disk, fd: int, lineage: LineageId, slots: Iterable[LeafSlot]) -> None:
    """Make slots durable that are there already. Written again: after a failed sync they show, and stay unwritten."""
    pwrite_all(disk, fd, encode_leaf_table_header(lineage), 0)
    for slot in slots:
        pwrite_all(disk, fd, encode_slot(slot), slot.number * SLOT)
    disk.fdatasync(fd)


def _slots_in(disk: Disk, fd: int, lineage: LineageId, layers: Mapping[int, bytes]) -> dict[int, LeafSlot]:
    status = disk.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise StoreDamaged(file=NAME, reason="it is not a regular file")
    present = parse_leaf_table_header(_at(disk, fd, 0, status.st_size), lineage, file=NAME)
    slots: dict[int, LeafSlot] = {}
    whole = bytes(pread_all(disk, fd, status.st_size, 0, NAME)) if len(layers) > _FEW else None
    for number, uuid in layers.items():
        raw = _at(disk, fd, number, status.st_size) if whole is None else whole[number * SLOT : (number + 1) * SLOT]
        slot = parse_slot(raw, number, uuid, file=NAME)
        if slot is not None and not present:
            raise StoreDamaged(file=NAME, reason="it has layers but no header")
        if slot is not None:
            slots[number] = slot
    return slots


def _at(disk: Disk, fd: int, number: int, length: int) -> bytes:
    start = number * SLOT
    return bytes(pread_all(disk, fd, max(0, min(SLOT, length - start)), start, NAME))


def leaf_root(slots: Iterable[LeafSlot]) -> bytes:
    """Return SHA-256("ebsd/1/leaf-root\\0" || for each slot, ascending: u32 number || digest of its leaf file)."""
    root = hashlib.sha256(_ROOT_LABEL)
    for slot in sorted(slots, key=lambda slot: slot.number):
        root.update(slot.number.to_bytes(4, "little") + slot.digest)
    return root.digest()


def publish(disk: Disk, dirfd: int, lineage: LineageId, number: int, uuid: bytes, writer: LeafWriter) -> LeafSlot:
    """Finish a leaf file, give it its name, and set the slot of its layer; durable at return.

    Returns the slot that the layer has then: another process may have been first, and its file stays. Waits for the
    lock of the table: for a thread. Raises OSError (FileNotFoundError: somebody removed the temporary file),
    StoreDamaged. The writer is done with in any case.
    """
    try:
        digest = writer.finish()
        with opened(disk, NAME, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o600, dir_fd=dirfd) as fd:
            disk.flock(fd, fcntl.LOCK_EX)
            present = _slots_in(disk, fd, lineage, {number: uuid}).get(number)
            if present is not None:
                _store(disk, fd, lineage, [present])
                return present
            header = encode_leaf_table_header(lineage)
            if _at(disk, fd, 0, disk.fstat(fd).st_size) != header:
                pwrite_all(disk, fd, header, 0)
                disk.fdatasync(fd)
            directory = f"/proc/self/fd/{dirfd}"
            disk.rename(f"{directory}/{writer.temporary}", f"{directory}/{writer.name}")
            disk.fsync(dirfd)
            slot = LeafSlot(number, uuid, digest)
            pwrite_all(disk, fd, encode_slot(slot), number * SLOT)
            disk.fdatasync(fd)
            return slot
    finally:
        with contextlib.suppress(OSError):
            writer.abandon()
