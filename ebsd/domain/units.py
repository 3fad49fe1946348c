"""Sizes: the units of the format, and how people write sizes."""

from __future__ import annotations

import re
from typing import Final, NewType

from ebsd.domain.errors import InvalidSize

Bytes = NewType("Bytes", int)

KIB: Final = 1024
MIB: Final = 1024**2
GIB: Final = 1024**3
TIB: Final = 1024**4

SECTOR: Final = 4096
"""Bytes of one XTS data unit; also the logical block size of the loop device."""

CHUNK: Final = 64 * KIB
"""Bytes of one unit of allocation, copy-on-write and digest."""

SEGMENT: Final = TIB
"""Bytes of volume kept in one segment file and covered by one XTS key (IEEE 1619-2025: at most
2**36 blocks of 16 bytes under one key). Also below ext4's largest file (16 TiB - 4 KiB)."""

CHUNKS_PER_SEGMENT: Final = SEGMENT // CHUNK

MIN_VOLUME: Final = MIB
MAX_VOLUME: Final = 64 * TIB

_SIZE = re.compile(r"(?P<number>[0-9]{1,20})(?P<unit>[KMGT]?)(?:i?B)?", re.IGNORECASE)
_FACTOR = {"": 1, "K": KIB, "M": MIB, "G": GIB, "T": TIB}


def parse_size(text: str) -> Bytes:
    """Read a size such as ``10G`` or ``1048576``; K, M, G and T are powers of 1024.

    Only the notation is judged here; ``check_volume_size`` judges the value.
    Raises InvalidSize for anything else, signs and fractions included.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise InvalidSize(size=text, reason="it is not a number of bytes or a number with K, M, G or T")
    return Bytes(int(match["number"]) * _FACTOR[match["unit"].upper()])


def check_volume_size(size: int) -> Bytes:
    """Return ``size`` in bytes when a volume may have it, else raise InvalidSize.

    The limits are EBS's own upper one (64 TiB, io2 and gp3) and 1 MiB below.
    """
    if size <= 0:
        raise InvalidSize(size=str(size), reason="a volume has a positive size")
    if size < MIN_VOLUME:
        raise InvalidSize(size=str(size), reason="the smallest volume is 1 MiB")
    if size > MAX_VOLUME:
        raise InvalidSize(size=str(size), reason="the largest volume is 64 TiB")
    if size % SECTOR:
        raise InvalidSize(size=str(size), reason=f"a size is a multiple of the sector, {SECTOR} bytes")
    return Bytes(size)


def format_size(size: int) -> str:
    """Write a size for people: ``10 GiB``, ``1.5 GiB``, ``4 KiB``, ``512 B``."""
    for factor, unit in ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if size >= factor:
            text = f"{size / factor:.1f}".removesuffix(".0")
            return f"{text} {unit}"
    return f"{size} B"


def gib_rounded_up(size: int) -> int:
    """Return a size in bytes as the whole GiB that EC2's ``Size`` member shows."""
    return -(-size // GIB)
