"""Blocks of the EBS direct APIs: their size and numbers, and the tokens that name them. Pure.

A token is not what gives access: who calls is checked at each call. It says that a reply has named this block, and
until when it may be asked for, as in EBS (https://docs.aws.amazon.com/ebs/latest/userguide/ebsapi-elements.html).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ebsd.domain.errors import (
    BlockOutOfRange,
    BlockTokenExpired,
    InvalidBlockToken,
    InvalidPageToken,
    InvalidParameter,
    PageTokenExpired,
)
from ebsd.domain.units import CHUNK, KIB

BLOCK: Final = 512 * KIB
"""Bytes of one block; the only size there is."""

CHUNKS_PER_BLOCK: Final = BLOCK // CHUNK

BLOCK_TOKEN_SECONDS: Final = 7 * 24 * 3600
PAGE_TOKEN_SECONDS: Final = 3600
"""How long tokens are good (EBS user guide, "Read EBS snapshots")."""

MIN_RESULTS: Final = 100
MAX_RESULTS: Final = 10_000
MOST_LISTED: Final = 3000
"""Blocks in one reply at most: a message has at most 1 MiB. EBS, too, may give fewer than were asked for."""

MOST_AT_ONCE: Final = 32
"""Blocks that one call reads or writes at most."""

MIN_TIMEOUT: Final = 10
MAX_TIMEOUT: Final = 4320
DEFAULT_TIMEOUT: Final = 60
"""Minutes without a block written, after which a snapshot that was started is given up."""

MAX_CLIENT_TOKEN: Final = 255
MAX_PENDING: Final = 100
"""Snapshots of one account that are started and not completed (EBS service quotas)."""

DIGEST: Final = 32
TOKEN_KEY_BYTES: Final = 32

_TOKEN: Final = struct.Struct("<cQQ")
_MAC_LABEL: Final = b"ebsd/1/block-token\0"
_KIND_BLOCK: Final = b"b"
_KIND_PAGE: Final = b"p"


def block_count(size: int) -> int:
    """Return how many blocks a volume of ``size`` bytes has; the last one may be cut by the size."""
    return -(-size // BLOCK)


def block_chunks(block: int, chunks: int) -> range:
    """Return the chunks of a block of a map with ``chunks`` chunks; empty behind its end."""
    first = block * CHUNKS_PER_BLOCK
    return range(first, max(first, min(first + CHUNKS_PER_BLOCK, chunks)))


def check_block(block: int, size: int) -> int:
    """Return a block's number, or raise BlockOutOfRange."""
    if not 0 <= block < block_count(size):
        raise BlockOutOfRange(block=block)
    return block


def check_results(wanted: int | None) -> int:
    """Return how many blocks a page holds. Raises InvalidParameter."""
    if wanted is None:
        return MOST_LISTED
    if not MIN_RESULTS <= wanted <= MAX_RESULTS:
        raise InvalidParameter(parameter="MaxResults", reason=f"it is from {MIN_RESULTS} to {MAX_RESULTS}")
    return min(wanted, MOST_LISTED)


def check_timeout(minutes: int | None) -> int:
    if minutes is None:
        return DEFAULT_TIMEOUT
    if not MIN_TIMEOUT <= minutes <= MAX_TIMEOUT:
        raise InvalidParameter(parameter="Timeout", reason=f"it is from {MIN_TIMEOUT} to {MAX_TIMEOUT} minutes")
    return minutes


def parse_checksum(text: str) -> bytes:
    """Return the 32 bytes of a SHA-256 in base64. Raises InvalidParameter."""
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    if len(raw) != DIGEST:
        raise InvalidParameter(parameter="Checksum", reason="it is a SHA-256 in base64, 44 characters")
    return raw


def encode_checksum(digest: bytes) -> str:
    return base64.b64encode(digest).decode()


@dataclass(frozen=True, slots=True)
class Tokens:
    """Makes and reads tokens under one secret; ``now`` and expiries are seconds since 1970."""

    key: bytes

    def __repr__(self) -> str:
        return "<Tokens>"

    def block(self, account: str, snapshot: str, block: int, expires: int) -> str:
        return self._make(_KIND_BLOCK, (account, snapshot), block, expires)

    def check_block(self, token: str, account: str, snapshot: str, block: int, now: float) -> None:
        """Raise InvalidBlockToken for a token that is not this block's, BlockTokenExpired for an old one."""
        found = self._read(token, _KIND_BLOCK, (account, snapshot))
        if found is None or found[0] != block:
            raise InvalidBlockToken(block=block, snapshot=snapshot)
        if now >= found[1]:
            raise BlockTokenExpired(block=block)

    def page(self, account: str, request: Sequence[str], following: int, now: float) -> str:
        """Return the token of the page that begins with block ``following``; ``request`` says what is listed."""
        return self._make(_KIND_PAGE, (account, *request), following, int(now) + PAGE_TOKEN_SECONDS)

    def read_page(self, token: str, account: str, request: Sequence[str], now: float) -> int:
        """Return the block that a page begins with. Raises InvalidPageToken, PageTokenExpired."""
        found = self._read(token, _KIND_PAGE, (account, *request))
        if found is None:
            raise InvalidPageToken()
        if now >= found[1]:
            raise PageTokenExpired()
        return found[0]

    def _make(self, kind: bytes, about: Sequence[str], block: int, expires: int) -> str:
        head = _TOKEN.pack(kind, block, expires)
        return base64.b64encode(head + self._mac(head, about)).decode()

    def _read(self, token: str, kind: bytes, about: Sequence[str]) -> tuple[int, int] | None:
        try:
            raw = base64.b64decode(token, validate=True)
        except (binascii.Error, ValueError):
            return None
        head, mac = raw[: _TOKEN.size], raw[_TOKEN.size :]
        if len(head) != _TOKEN.size or not hmac.compare_digest(mac, self._mac(head, about)):
            return None
        found, block, expires = _TOKEN.unpack(head)
        return (block, expires) if found == kind else None

    def _mac(self, head: bytes, about: Sequence[str]) -> bytes:
        mac = hmac.new(self.key, _MAC_LABEL + head, hashlib.sha256)
        for part in about:
            raw = part.encode()
            mac.update(len(raw).to_bytes(4, "little") + raw)
        return mac.digest()
