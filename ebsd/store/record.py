"""The record file of a volume or snapshot: with it and the layer table, the catalog can be rebuilt.

1. The checksum at the end finds accidents; authenticity is the signed record's business, elsewhere.
2. The parser takes hostile bytes: it raises StoreDamaged or UnsupportedFormat and nothing else.
3. One value has one encoding: sections ascend, padding is zero, JSON is canonical (sorted keys, no spaces, UTF-8).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ebsd.domain.errors import StoreDamaged, UnsupportedFormat
from ebsd.domain.ids import AccountId, KeyArn, LineageId, SnapshotId, VolumeId
from ebsd.domain.model import Cipher
from ebsd.store.atomic import write_file_atomically
from ebsd.store.disk import Disk, read_file
from ebsd.store.signedrecord import SignedBody, parse_signed

MAGIC: Final = b"EBSDREC1"
VERSION: Final = 1
MAX_RECORD: Final = 64 * 1024

SECTION_RESOURCE: Final = 1
SECTION_WRAPPED_KEY: Final = 2
SECTION_SIGNED: Final = 3
SECTION_AUTHORITY: Final = 4
SECTION_ORIGIN: Final = 5

_HEADER = struct.Struct("<8sII")
_SECTION = struct.Struct("<HHI")
_CHECKSUM: Final = 32


@dataclass(frozen=True, slots=True)
class Resource:
    """The unsigned description of a volume or snapshot; what matters of it stands in the signed record too."""

    id: VolumeId | SnapshotId
    account: AccountId
    owner: str
    """Name of the Unix user when the resource was created."""
    lineage: LineageId
    sector_size: int
    cipher: Cipher
    size: int
    """Bytes."""
    created: str
    """RFC 3339, UTC."""
    name: str
    """The name, empty for none."""


@dataclass(frozen=True, slots=True)
class WrappedKey:
    """The data key as the key service wrapped it, and what it was bound to."""

    key_arn: KeyArn
    blob: bytes
    context: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Origin:
    """What only the catalog knew otherwise, for rebuilding it; nothing else is decided by it."""

    source: str
    """Of a snapshot, the volume it was taken of; of a volume, the snapshot it was made from; empty for none."""
    description: str = ""
    """Of a snapshot, as its owner gave it."""


@dataclass(frozen=True, slots=True)
class Record:
    """The contents of a record file."""

    resource: Resource
    wrapped_key: WrappedKey | None
    """None for an unencrypted resource."""
    signed: bytes
    """The signed record, 320 bytes as stored."""
    authority: bytes | None = None
    """The source's signed record, 320 bytes, of a volume that was made from it and not yet signed itself."""
    origin: Origin | None = None
    """None in records that were written before there was this section."""

    def body(self, file: str = "record") -> SignedBody:
        """Return the signed record's body, parsed; whether its signature is right was not looked at."""
        return parse_signed(self.signed, file=file)


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def encode_record(record: Record) -> bytes:
    """Return the bytes of the file. Raises ValueError when they would be over MAX_RECORD or not parse."""
    resource = record.resource
    sections = [
        (
            SECTION_RESOURCE,
            _canonical(
                {
                    "id": resource.id,
                    "account": resource.account,
                    "owner": resource.owner,
                    "lineage": resource.lineage,
                    "sector_size": resource.sector_size,
                    "cipher": int(resource.cipher),
                    "size": resource.size,
                    "created": resource.created,
                    "name": resource.name,
                }
            ),
        )
    ]
    if record.wrapped_key is not None:
        key = record.wrapped_key
        blob = base64.b64encode(key.blob).decode()
        fields = {"key_arn": key.key_arn, "blob": blob, "context": dict(key.context)}
        sections.append((SECTION_WRAPPED_KEY, _canonical(fields)))
    sections.append((SECTION_SIGNED, record.signed))
    if record.authority is not None:
        sections.append((SECTION_AUTHORITY, record.authority))
    if record.origin is not None:
        origin = {"source": record.origin.source, "description": record.origin.description}
        sections.append((SECTION_ORIGIN, _canonical(origin)))
    body = b"".join(_SECTION.pack(kind, 0, len(data)) + data + bytes(-len(data) % 8) for kind, data in sections)
    total = _HEADER.size + len(body) + _CHECKSUM
    front = _HEADER.pack(MAGIC, VERSION, total) + body
    encoded = front + hashlib.sha256(front).digest()
    try:
        parse_record(encoded, file="record")
    except (StoreDamaged, UnsupportedFormat) as error:
        raise ValueError(f"this record could not be read again: {error.message}") from error
    return encoded


def parse_record(data: bytes | bytearray, *, file: str) -> Record:
    """Read a record file. Raises StoreDamaged and UnsupportedFormat, nothing else."""
    raw = bytes(data)
    if not _HEADER.size + _CHECKSUM <= len(raw) <= MAX_RECORD:
        raise StoreDamaged(file=file, reason=f"a record does not have {len(raw)} bytes")
    magic, version, total = _HEADER.unpack(raw[: _HEADER.size])
    if magic != MAGIC:
        raise StoreDamaged(file=file, reason="it is not a record")
    if hashlib.sha256(raw[:-_CHECKSUM]).digest() != raw[-_CHECKSUM:]:
        raise StoreDamaged(file=file, reason="its checksum is wrong")
    if version != VERSION:
        raise UnsupportedFormat(file=file, what=f"version {version}")
    if total != len(raw):
        raise StoreDamaged(file=file, reason=f"it has {len(raw)} bytes and says {total}")
    sections = _split_sections(raw[_HEADER.size : -_CHECKSUM], file)
    if SECTION_RESOURCE not in sections or SECTION_SIGNED not in sections:
        raise StoreDamaged(file=file, reason="it lacks its resource or its signed record")
    resource = _parse_resource(sections[SECTION_RESOURCE], file)
    raw_key = sections.get(SECTION_WRAPPED_KEY)
    wrapped_key = None if raw_key is None else _parse_wrapped_key(raw_key, file)
    if (wrapped_key is None) is not (resource.cipher is Cipher.NONE):
        raise StoreDamaged(file=file, reason="its cipher and its wrapped key disagree")
    raw_origin = sections.get(SECTION_ORIGIN)
    origin = None if raw_origin is None else _parse_origin(raw_origin, file)
    record = Record(resource, wrapped_key, sections[SECTION_SIGNED], sections.get(SECTION_AUTHORITY), origin)
    body = record.body(file)
    for mine, signed, what in (
        (resource.id, body.resource, "id"),
        (resource.account, body.account, "account"),
        (resource.lineage, body.lineage, "lineage"),
        (resource.sector_size, body.sector_size, "sector size"),
        (resource.cipher, body.cipher, "cipher"),
        (resource.size, body.size, "size"),
    ):
        if mine != signed:
            raise StoreDamaged(file=file, reason=f"its {what} and its signed record disagree")
    if record.authority is not None:
        parse_signed(record.authority, file=file)
    return record


def _split_sections(body: bytes, file: str) -> dict[int, bytes]:
    sections: dict[int, bytes] = {}
    at = 0
    last = 0
    while at < len(body):
        if len(body) - at < _SECTION.size:
            raise StoreDamaged(file=file, reason="it ends in the head of a section")
        kind, zero, length = _SECTION.unpack_from(body, at)
        at += _SECTION.size
        end = at + length
        padded = end + -length % 8
        if zero or padded > len(body) or any(body[end:padded]):
            raise StoreDamaged(file=file, reason=f"section {kind} is malformed")
        if not SECTION_RESOURCE <= kind <= SECTION_ORIGIN:
            raise UnsupportedFormat(file=file, what=f"section {kind}")
        if kind <= last:
            raise StoreDamaged(file=file, reason=f"section {kind} is out of order")
        last = kind
        sections[kind] = body[at:end]
        at = padded
    return sections


def _parse_json(raw: bytes, kinds: Mapping[str, type], what: str, file: str) -> dict[str, Any]:
    try:
        value = json.loads(raw)
        canonical = _canonical(value)
    except (ValueError, RecursionError) as error:
        raise StoreDamaged(file=file, reason=f"its {what} is not JSON") from error
    if not isinstance(value, dict) or value.keys() != kinds.keys() or canonical != raw:
        raise StoreDamaged(file=file, reason=f"its {what} does not have the members and the form of one")
    for name, kind in kinds.items():
        if type(value[name]) is not kind:
            raise StoreDamaged(file=file, reason=f"member {name} of its {what} has a wrong type")
    return value


def _parse_resource(raw: bytes, file: str) -> Resource:
    kinds = {
        "id": str, "account": str, "owner": str, "lineage": str, "sector_size": int, "cipher": int, "size": int,
        "created": str, "name": str,
    }  # fmt: skip
    value = _parse_json(raw, kinds, "resource", file)
    if value["cipher"] not in Cipher.__members__.values():
        raise UnsupportedFormat(file=file, what=f"cipher {value['cipher']}")
    return Resource(**{**value, "cipher": Cipher(value["cipher"])})


def _parse_origin(raw: bytes, file: str) -> Origin:
    value = _parse_json(raw, {"source": str, "description": str}, "origin", file)
    return Origin(value["source"], value["description"])


def _parse_wrapped_key(raw: bytes, file: str) -> WrappedKey:
    value = _parse_json(raw, {"key_arn": str, "blob": str, "context": dict}, "wrapped key", file)
    context = value["context"]
    if not all(type(item) is str for item in context.values()):
        raise StoreDamaged(file=file, reason="the context of its wrapped key is not text")
    try:
        blob = base64.b64decode(value["blob"], validate=True)
    except (binascii.Error, ValueError) as error:
        raise StoreDamaged(file=file, reason="the blob of its wrapped key is not base64") from error
    if base64.b64encode(blob).decode() != value["blob"]:
        raise StoreDamaged(file=file, reason="the blob of its wrapped key is not canonical base64")
    return WrappedKey(KeyArn(value["key_arn"]), blob, context)


def read_record(disk: Disk, path: Path) -> Record:
    """Read a record file; errors as ``parse_record``, and FileNotFoundError, OSError."""
    return parse_record(read_file(disk, path, MAX_RECORD), file=os.fspath(path))


def write_record(disk: Disk, path: Path, record: Record) -> None:
    """Replace a record file, durable at return; a crash leaves the old one or the new one. Raises OSError."""
    write_file_atomically(disk, path, encode_record(record))
