"""The signed record of a volume or snapshot: 256 bytes of body, and 64 bytes of MAC that the store cannot read.

1. The MAC is over the body as stored, and whoever has the key checks it before parsing (``split_signed``).
2. The body is fixed: one value has one encoding, every reserved byte is zero, everything unknown is refused by name.
3. ``born``: generation 0, MAC of zeros. ``open``: written before the first write of a generation, says nothing of
   the map. ``clean``: written at detach, covers the map by its hash.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from ebsd.domain.errors import (
    InvalidSize,
    SnapshotIdMalformed,
    StoreDamaged,
    UnsupportedFormat,
    VolumeIdMalformed,
)
from ebsd.domain.ids import (
    AccountId,
    LineageId,
    SnapshotId,
    VolumeId,
    format_uuid,
    looks_like_snapshot_id,
    parse_snapshot_id,
    parse_uuid,
    parse_volume_id,
)
from ebsd.domain.model import Cipher
from ebsd.domain.units import SECTOR, check_volume_size
from ebsd.store.entries import FIRST_RESERVED

MAGIC: Final = b"EBSDSIG1"
VERSION: Final = 1
BODY_BYTES: Final = 256
MAC_BYTES: Final = 64
SIGNED_BYTES: Final = BODY_BYTES + MAC_BYTES
NO_HASH: Final = bytes(32)
UNSIGNED: Final = bytes(MAC_BYTES)
"""The MAC of a born record."""

_BODY = struct.Struct("<8sHHII24s16s12sQIIQII32s32sI32s")
_MAX_GENERATION: Final = 2**64 - 1


class RecordState(IntEnum):
    BORN = 0
    OPEN = 1
    CLEAN = 2


@dataclass(frozen=True, slots=True)
class SignedBody:
    """What the signature covers. Sizes in bytes."""

    state: RecordState
    resource: VolumeId | SnapshotId
    lineage: LineageId
    account: AccountId
    size: int
    cipher: Cipher
    generation: int
    """Grows by one with each signed write; 0 for born."""
    head: int
    """Head layer of a volume; 0 for a snapshot, which has none."""
    table_count: int
    """Layers of the layer table that ``table_hash`` covers."""
    table_hash: bytes
    map_hash: bytes = NO_HASH
    """Hash of the map in state clean, else zeros."""
    raw_access: bool = False
    """Whether plaintext may leave through raw devices of users (shown, not enforced, by the store)."""
    sector_size: int = SECTOR
    leaf_root: bytes = NO_HASH
    """Root over the leaves of the sealed layers that the map names, in state clean; zeros: not covered (yet)."""

    def __post_init__(self) -> None:
        problem = _problem(self)
        if problem:
            raise ValueError(f"no signed body: {problem}")

    def encode(self) -> bytes:
        """Return the 256 bytes that are signed."""
        return _BODY.pack(
            MAGIC, VERSION, self.state, 0, SIGNED_BYTES, self.resource.encode(), parse_uuid(self.lineage),
            self.account.encode(), self.size, self.sector_size, self.cipher, self.generation, self.head,
            self.table_count, self.table_hash, self.map_hash, int(self.raw_access), self.leaf_root,
        ).ljust(BODY_BYTES, b"\0")  # fmt: skip

    @classmethod
    def parse(cls, body: bytes, *, file: str) -> SignedBody:
        """Read 256 bytes that may be anybody's. Raises StoreDamaged and UnsupportedFormat, nothing else."""
        if len(body) != BODY_BYTES or bytes(body[:8]) != MAGIC:
            raise StoreDamaged(file=file, reason="its signed record is none")
        (_, version, state, flags, total, resource, lineage, account, size, sector_size, cipher, generation, head,
         count, table_hash, map_hash, raw_access, leaf_root) = _BODY.unpack(body[: _BODY.size])  # fmt: skip
        for known, what in (
            (version == VERSION, f"version {version} of the signed record"),
            (flags == 0, f"feature flags {flags:#x} in its signed record"),
            (state in RecordState.__members__.values(), f"record state {state}"),
            (sector_size == SECTOR, f"sector size {sector_size}"),
            (cipher in Cipher.__members__.values(), f"cipher {cipher}"),
            (raw_access in (0, 1), f"raw access {raw_access}"),
        ):
            if not known:
                raise UnsupportedFormat(file=file, what=what)
        if total != SIGNED_BYTES:
            raise StoreDamaged(file=file, reason=f"its signed record has length {total}")
        if any(body[_BODY.size :]):
            raise StoreDamaged(file=file, reason="reserved bytes of its signed record are not zero")
        try:
            parsed = cls(
                RecordState(state), VolumeId(resource.rstrip(b"\0").decode("ascii")), LineageId(format_uuid(lineage)),
                AccountId(account.decode("ascii")), size, Cipher(cipher), generation, head, count, table_hash,
                map_hash, bool(raw_access), leaf_root=leaf_root,
            )  # fmt: skip
        except ValueError as error:  # UnicodeDecodeError is one
            raise StoreDamaged(file=file, reason=f"its signed record: {error}") from error
        return parsed


def _problem(body: SignedBody) -> str:
    """Say which rule a body breaks; empty when none."""
    is_snapshot = looks_like_snapshot_id(body.resource)
    try:
        _ = parse_snapshot_id(body.resource) if is_snapshot else parse_volume_id(body.resource)
        check_volume_size(body.size)
        parse_uuid(body.lineage)
    except (VolumeIdMalformed, SnapshotIdMalformed, InvalidSize, ValueError) as error:
        return str(error)
    account = body.account
    born, clean = body.state is RecordState.BORN, body.state is RecordState.CLEAN
    rules = (
        (len(account) == 12 and account.isascii() and account.isdigit(), "the account is not 12 digits"),
        (body.sector_size == SECTOR, "the sector size is unknown"),
        (
            0 <= body.generation <= _MAX_GENERATION and (body.generation == 0) is born,
            "state and generation disagree",
        ),
        (0 <= body.head < FIRST_RESERVED and (body.head != 0 or is_snapshot), "the head layer is impossible"),
        (0 <= body.table_count < FIRST_RESERVED, "the layer count is impossible"),
        (len(body.table_hash) == 32, "the table hash has a wrong length"),
        (len(body.map_hash) == 32 and (body.map_hash != NO_HASH) is clean, "state and map hash disagree"),
        (len(body.leaf_root) == 32 and (clean or body.leaf_root == NO_HASH), "state and root of the leaves disagree"),
    )
    return next((text for holds, text in rules if not holds), "")


def split_signed(record: bytes | bytearray | memoryview, *, file: str) -> tuple[bytes, bytes]:
    """Return (body, MAC) of 320 bytes without reading either: the MAC is checked before anything is parsed."""
    if len(record) != SIGNED_BYTES:
        raise StoreDamaged(file=file, reason=f"its signed record has {len(record)} bytes instead of {SIGNED_BYTES}")
    raw = bytes(record)
    return raw[:BODY_BYTES], raw[BODY_BYTES:]


def parse_signed(record: bytes | bytearray | memoryview, *, file: str) -> SignedBody:
    """Return the body of a signed record whose MAC somebody else checks, or has checked.

    Refuses a born body with a MAC and another one without: a state that was changed after signing.
    """
    body, mac = split_signed(record, file=file)
    parsed = SignedBody.parse(body, file=file)
    if (mac == UNSIGNED) is not (parsed.state is RecordState.BORN):
        raise StoreDamaged(file=file, reason="the state of its signed record and its signature disagree")
    return parsed


def born(body: SignedBody) -> bytes:
    """Return the 320 bytes of a born record."""
    if body.state is not RecordState.BORN:
        raise ValueError(f"a record in state {body.state.name} is signed")
    return body.encode() + UNSIGNED
