"""Encryption contexts: their one byte form, and which pairs a user may add.

An encryption context is authenticated, not secret: a wrapped key opens only with the very pairs it was
wrapped with.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Final

from ebsd.domain.errors import KmsValidation

MAX_USER_PAIRS: Final = 8
MAX_TEXT: Final = 384
"""Characters of one key or value of a user's pair."""
MAX_PAIRS: Final = 16
MAX_CANONICAL: Final = 32 * 1024
"""Bytes; above what 8 pairs of a user and our own can need, so that hostile contexts cost nothing."""
RESERVED_PREFIXES: Final = ("aws:", "ebsd:")

_BE32: Final = struct.Struct(">I")


def canonical(context: Mapping[str, str]) -> bytes:
    """Return the byte form: be32 number of pairs, then per pair be32-prefixed key and be32-prefixed value.

    Pairs are sorted by the UTF-8 bytes of the key. Lengths are in bytes, texts are taken as they are (no
    Unicode normalisation), so equal bytes mean equal contexts. Raises KmsValidation for text that is not
    UTF-8-encodable and beyond MAX_PAIRS or MAX_CANONICAL.
    """
    if len(context) > MAX_PAIRS:
        raise KmsValidation(reason=f"The encryption context has more than {MAX_PAIRS} pairs")
    pairs = sorted((_utf8(key), _utf8(value)) for key, value in context.items())
    parts = [_BE32.pack(len(pairs))]
    for key, value in pairs:
        parts += (_BE32.pack(len(key)), key, _BE32.pack(len(value)), value)
    result = b"".join(parts)
    if len(result) > MAX_CANONICAL:
        raise KmsValidation(reason=f"The encryption context is longer than {MAX_CANONICAL} bytes")
    return result


def check_user_pairs(pairs: Mapping[str, str]) -> None:
    """Raise KmsValidation when a user may not put these pairs into a context.

    ``aws:`` and ``ebsd:`` (in any case) are ours: whoever could set ``aws:ebs:id`` could wrap a key of his
    own for somebody else's volume.
    """
    if len(pairs) > MAX_USER_PAIRS:
        raise KmsValidation(reason=f"An encryption context takes at most {MAX_USER_PAIRS} pairs of yours")
    for key, value in pairs.items():
        _utf8(key)
        _utf8(value)
        if not key:
            raise KmsValidation(reason="A key of the encryption context is empty")
        if key.casefold().startswith(RESERVED_PREFIXES):
            raise KmsValidation(reason=f"Keys that start with {_prefix(key)!r} are reserved")
        if len(key) > MAX_TEXT or len(value) > MAX_TEXT:
            raise KmsValidation(reason=f"A key or value is longer than {MAX_TEXT} characters")


def _prefix(key: str) -> str:
    return key[: key.index(":") + 1]


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise KmsValidation(reason="The encryption context holds text that UTF-8 cannot express") from None
