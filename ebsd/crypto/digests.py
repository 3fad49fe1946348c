"""SHA-256 of many numbered pieces of one buffer in one native call, without the interpreter's lock."""

from __future__ import annotations

from typing import Final

from ebsd.crypto._digest import ffi, lib
from ebsd.crypto.xts import IoBuffer

DIGEST: Final = 32
PREFIX_MOST: Final = 48
"""Bytes of a prefix: with the number it fits into one block of SHA-256 and leaves room for data."""

_BYTES: Final = ffi.typeof("unsigned char[]")


class DigestError(Exception):
    """OpenSSL failed or had no memory."""


def numbered_digests(prefix: bytes, first: int, data: IoBuffer, piece: int, *, plain: bool = False) -> bytearray:
    """Return SHA-256(prefix || u64 number, little endian || piece) of each piece, 32 bytes each, in order.

    ``data`` is whole pieces of ``piece`` bytes; the first has the number ``first``, the next ones count up. ``plain``:
    by OpenSSL alone, for comparison. Raises ValueError for other lengths and numbers, DigestError.
    """
    view = ffi.from_buffer(_BYTES, data)
    if piece < 1 or len(view) % piece:
        raise ValueError(f"{len(view)} bytes are no pieces of {piece}")
    count = len(view) // piece
    if not 0 <= first <= (1 << 64) - 1 - count:
        raise ValueError(f"numbers from {first} on leave 64 bits")
    digests = bytearray(count * DIGEST)
    into = ffi.from_buffer(_BYTES, digests, True)
    result = lib.ebsd_digest_pieces(prefix, len(prefix), first, view, piece, count, into, plain)
    if result == lib.EBSD_DIGEST_BAD_LENGTH:
        raise ValueError(f"a prefix of {len(prefix)} bytes; {PREFIX_MOST} are the most")
    if result != lib.EBSD_DIGEST_DONE:
        raise DigestError("OpenSSL failed")
    return digests


def by_sixteens() -> bool:
    """Say whether this processor computes sixteen pieces at a time."""
    return bool(lib.ebsd_digest_sixteens())


def in_pairs() -> bool:
    """Say whether this processor computes two pieces at a time."""
    return bool(lib.ebsd_digest_pairs())
