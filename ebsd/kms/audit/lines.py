"""One line of the audit log: its record, its place, the hash of the line before it, and its MAC. Pure.

    {"mac":"<64 hex>","n":<number>,"prev":"<64 hex>","record":{...}}

1. The bytes are the truth: hash and MAC are over them as they stand, and nobody has to re-encode JSON to check one.
2. ``prev`` covers the whole line before, its MAC included; the MAC covers the rest of its own line, ``prev`` included.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Final

HASH_BYTES: Final = 32
GENESIS: Final = "0" * 64
"""``prev`` of the first record of all."""
MAX_LINE: Final = 64 * 1024
"""Bytes of a line, its newline included."""

_LABEL: Final = b"ebsd audit 1\0"
_LINE: Final = re.compile(
    rb'\{"mac":"([0-9a-f]{64})",("n":(0|[1-9][0-9]{0,14}),"prev":"([0-9a-f]{64})","record":(\{[^\n]*\})\})'
)


@dataclass(frozen=True, slots=True)
class Head:
    """How long a log is, and the hash of its last line: who knows it knows all lines up to there."""

    count: int
    hash: str

    def __str__(self) -> str:
        return f"{self.count}:{self.hash}"


EMPTY: Final = Head(0, GENESIS)


@dataclass(frozen=True, slots=True)
class Line:
    number: int
    prev: str
    mac: str
    body: bytes
    """What the MAC is over."""
    raw: bytes
    """All of the line without its newline."""

    @property
    def head(self) -> Head:
        return Head(self.number + 1, hash_of(self.raw))

    def record(self) -> dict[str, Any]:
        """Return the record; raises ValueError when it is no JSON."""
        document = json.loads(self.raw)["record"]
        if not isinstance(document, dict):
            raise ValueError("the record is no object")
        return document


def encode_record(record: Mapping[str, Any]) -> bytes:
    """Return a record as JSON without spaces, ASCII only, so that no character of it can end the line."""
    return json.dumps(record, separators=(",", ":"), ensure_ascii=True).encode("ascii")


def body_of(number: int, prev: str, record: bytes) -> bytes:
    return b'"n":%d,"prev":"%s","record":%s}' % (number, prev.encode(), record)


def line_of(mac: bytes, body: bytes) -> bytes:
    """Return the line without its newline."""
    return b'{"mac":"%s",%s' % (mac.hex().encode(), body)


def hash_of(raw: bytes) -> str:
    """Return the hash of a line, 64 hexadecimal digits."""
    return sha256(_LABEL + raw).hexdigest()


def parse_line(raw: bytes) -> Line | None:
    """Read a line without its newline; None when it has not exactly this form. The JSON inside is not looked at."""
    found = _LINE.fullmatch(raw)
    if found is None:
        return None
    mac, body, number, prev, _ = found.groups()
    return Line(int(number), prev.decode(), mac.decode(), body, raw)


def parse_head(text: str) -> Head:
    """Read ``COUNT:HASH``; raises ValueError."""
    count, _, digest = text.strip().partition(":")
    if not count.isascii() or not count.isdigit() or re.fullmatch(r"[0-9a-f]{64}", digest) is None:
        raise ValueError("a head is COUNT:HASH, with 64 hexadecimal digits")
    return Head(int(count), digest)
