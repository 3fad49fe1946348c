"""The bytes of an archive: header, manifest, frames, chain of digests. Layout and reasons: volume/ARCHIVE.md.

1. The parsers take hostile bytes: they raise ArchiveDamaged or UnsupportedFormat, and nothing else.
2. Every length is bounded before it is used. One value has one encoding: the manifest is canonical JSON.
3. No key here: what is sealed is opaque. The digests find accidents; what finds tampering is in crypto/archive.py.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from ebsd.domain.errors import ArchiveDamaged, EbsdError, UnsupportedFormat
from ebsd.domain.geometry import chunk_count
from ebsd.domain.ids import looks_like_snapshot_id, parse_name, parse_snapshot_id, parse_uuid, split_key_arn
from ebsd.domain.model import Cipher
from ebsd.domain.units import CHUNK, MAX_VOLUME, MIN_VOLUME, SECTOR

MAGIC: Final = b"EBSDARC1"
VERSION: Final = 1
FRAME_MAGIC: Final = b"EBSF"

DIGEST: Final = 32
MAC: Final = 64
TAG: Final = 16
SALT: Final = 16

MAX_MANIFEST: Final = 64 * 1024
MAX_BLOB: Final = 6144
"""Bytes of a wrapped key; KMS's own limit."""
MAX_TEXT: Final = 1024
"""Characters of a text of the manifest other than the description."""
MAX_DESCRIPTION: Final = 8192

FRAME_CHUNKS: Final = 16
"""Chunks with data of one frame: 1 MiB."""
FRAME_RUNS: Final = 4096
"""Runs of one frame, of data and of holes."""

CONTEXT_RESOURCE: Final = "aws:ebs:id"
CONTEXT_FORMAT: Final = "ebsd:format"
CONTEXT_ARCHIVE: Final = "ebsd:archive"
CONTEXT_FORMAT_VALUE: Final = "1/archive"

_PRELUDE = struct.Struct("<8sIII12s")
_FRAME = struct.Struct("<4sIQI12s16s")
_RUN = struct.Struct("<II")
_LAST = struct.Struct("<QQQ")
_COUNT = struct.Struct("<I")
_HOLES: Final = 1 << 31
"""In the length of a run: its chunks became holes, and no data follow."""

PRELUDE_BYTES: Final = _PRELUDE.size
FRAME_HEADER: Final = _FRAME.size
MAX_PAYLOAD: Final = _COUNT.size + FRAME_RUNS * _RUN.size + FRAME_CHUNKS * CHUNK
LAST_PAYLOAD: Final = _LAST.size

DATA_FRAME: Final = 1
LAST_FRAME: Final = 2

_HEADER_LABEL: Final = b"ebsd/1/archive\0"
_FRAME_LABEL: Final = b"ebsd/1/archive-frame\0"
_CONTENT_LABEL: Final = b"ebsd/1/archive-content\0"

_ACCOUNT = re.compile(r"[0-9]{12}")
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:.]{8,15}Z")


# --- the manifest


@dataclass(frozen=True, slots=True)
class Base:
    """The snapshot that an incremental archive needs."""

    snapshot: str
    content: bytes
    """``content_id`` of it."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an archive says of itself; not secret, and authentic once its MAC was checked under the archive's key."""

    archive: str
    """UUID of this archive."""
    snapshot: str
    volume: str
    """What the snapshot was taken of."""
    account: str
    owner: str
    """User name of the owner where it was exported."""
    name: str
    description: str
    started: str
    """When the snapshot was taken, RFC 3339 UTC."""
    created: str
    """When the archive was begun."""
    size: int
    """Bytes."""
    cipher: Cipher
    """Of the snapshot; the archive is always encrypted."""
    content: bytes
    """``content_id`` of the snapshot."""
    base: Base | None
    """None: the archive is full."""
    data_chunks: int
    hole_chunks: int
    """Chunks that became holes since the base; 0 in a full archive."""
    key_arn: str
    blob: bytes
    """The archive's key, wrapped."""
    context: Mapping[str, str]

    @property
    def chunks(self) -> int:
        """Chunks of the snapshot, stored or not."""
        return chunk_count(self.size)


def archive_context(archive: str, snapshot: str) -> dict[str, str]:
    """Return the encryption context of an archive's key: no volume's key has one like it."""
    return {CONTEXT_RESOURCE: snapshot, CONTEXT_FORMAT: CONTEXT_FORMAT_VALUE, CONTEXT_ARCHIVE: archive}


def content_id(lineage: bytes, size: int, map_digest: bytes, layers: Sequence[tuple[int, bytes]]) -> bytes:
    """Return what names the content of a snapshot, and says nothing about it to others: 32 bytes.

    The layers (number, uuid) that its map names, ascending, are sealed, so they and the map's hash determine every
    chunk. ``lineage`` has 16 bytes.
    """
    digest = hashlib.sha256(_CONTENT_LABEL + lineage + size.to_bytes(8, "little") + map_digest)
    for number, uuid in layers:
        digest.update(number.to_bytes(4, "little") + uuid)
    return digest.digest()


def _damaged(reason: str) -> ArchiveDamaged:
    return ArchiveDamaged(reason=reason)


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


_MEMBERS: Final[dict[str, tuple[type, ...]]] = {
    "archive": (str,), "snapshot": (str,), "volume": (str,), "account": (str,), "owner": (str,), "name": (str,),
    "description": (str,), "started": (str,), "created": (str,), "size": (int,), "sector_size": (int,),
    "chunk_size": (int,), "cipher": (int,), "content": (str,), "base": (dict, type(None)), "data_chunks": (int,),
    "hole_chunks": (int,), "key_arn": (str,), "blob": (str,), "context": (dict,),
}  # fmt: skip


def encode_manifest(manifest: Manifest) -> bytes:
    """Return the canonical bytes. Raises ValueError when they would not parse."""
    base = manifest.base
    raw = _canonical(
        {
            "archive": manifest.archive,
            "snapshot": manifest.snapshot,
            "volume": manifest.volume,
            "account": manifest.account,
            "owner": manifest.owner,
            "name": manifest.name,
            "description": manifest.description,
            "started": manifest.started,
            "created": manifest.created,
            "size": manifest.size,
            "sector_size": SECTOR,
            "chunk_size": CHUNK,
            "cipher": int(manifest.cipher),
            "content": manifest.content.hex(),
            "base": None if base is None else {"snapshot": base.snapshot, "content": base.content.hex()},
            "data_chunks": manifest.data_chunks,
            "hole_chunks": manifest.hole_chunks,
            "key_arn": manifest.key_arn,
            "blob": base64.b64encode(manifest.blob).decode(),
            "context": dict(manifest.context),
        }
    )
    try:
        parse_manifest(raw)
    except (ArchiveDamaged, UnsupportedFormat) as error:
        raise ValueError(f"this manifest could not be read again: {error.message}") from error
    return raw


def parse_manifest(raw: bytes) -> Manifest:
    """Read a manifest. Raises ArchiveDamaged, UnsupportedFormat."""
    if not 1 <= len(raw) <= MAX_MANIFEST:
        raise _damaged(f"a manifest does not have {len(raw)} bytes")
    try:
        value = json.loads(raw)
        canonical = _canonical(value)
    except (ValueError, RecursionError) as error:
        raise _damaged("its manifest is not JSON") from error
    if not isinstance(value, dict) or canonical != raw:
        raise _damaged("its manifest is not canonical JSON")
    if value.keys() != _MEMBERS.keys():
        raise _damaged("its manifest does not have the members of one")
    for name, kinds in _MEMBERS.items():
        if type(value[name]) not in kinds:
            raise _damaged(f"member {name} of its manifest has a wrong type")
    _check_texts(value)
    _check_numbers(value)
    base = value["base"]
    if base is not None and (base.keys() != {"snapshot", "content"} or type(base["snapshot"]) is not str):
        raise _damaged("member base of its manifest is malformed")
    manifest = Manifest(
        archive=value["archive"],
        snapshot=value["snapshot"],
        volume=value["volume"],
        account=value["account"],
        owner=value["owner"],
        name=value["name"],
        description=value["description"],
        started=value["started"],
        created=value["created"],
        size=value["size"],
        cipher=Cipher(value["cipher"]),
        content=_digest(value["content"], "content"),
        base=None if base is None else Base(base["snapshot"], _digest(base["content"], "base")),
        data_chunks=value["data_chunks"],
        hole_chunks=value["hole_chunks"],
        key_arn=value["key_arn"],
        blob=_blob(value["blob"]),
        context=value["context"],
    )
    _check_ids(manifest)
    if manifest.base is None and manifest.hole_chunks:
        raise _damaged("a full archive says that chunks became holes")
    if manifest.data_chunks + manifest.hole_chunks > manifest.chunks:
        raise _damaged("it says that it has more chunks than its snapshot")
    return manifest


def _check_texts(value: Mapping[str, Any]) -> None:
    for name, kinds in _MEMBERS.items():
        limit = MAX_DESCRIPTION if name == "description" else 2 * MAX_BLOB if name == "blob" else MAX_TEXT
        if kinds == (str,) and len(value[name]) > limit:
            raise _damaged(f"member {name} of its manifest is too long")
    for name in ("started", "created"):
        if _TIME.fullmatch(value[name]) is None:
            raise _damaged(f"member {name} of its manifest is no time")
    if _ACCOUNT.fullmatch(value["account"]) is None:
        raise _damaged("member account of its manifest is no account")


def _check_numbers(value: Mapping[str, Any]) -> None:
    for name, known in (("sector_size", SECTOR), ("chunk_size", CHUNK)):
        if value[name] != known:
            raise UnsupportedFormat(file="The archive", what=f"the {name.replace('_', ' ')} {value[name]}")
    if value["cipher"] not in Cipher.__members__.values():
        raise UnsupportedFormat(file="The archive", what=f"the cipher {value['cipher']}")
    if not MIN_VOLUME <= value["size"] <= MAX_VOLUME or value["size"] % SECTOR:
        raise _damaged("it is that of a snapshot whose size cannot be")
    if value["data_chunks"] < 0 or value["hole_chunks"] < 0:
        raise _damaged("it says that it has fewer than no chunks")


def _check_ids(manifest: Manifest) -> None:
    try:
        parse_uuid(manifest.archive)
        parse_snapshot_id(manifest.snapshot)
        parse_name(manifest.name) if not looks_like_snapshot_id(manifest.name) else parse_snapshot_id(manifest.name)
        split_key_arn(manifest.key_arn)
        if manifest.base is not None:
            parse_snapshot_id(manifest.base.snapshot)
    except (EbsdError, ValueError) as error:
        raise _damaged("its manifest has an id or a name that cannot be") from error
    if dict(manifest.context) != archive_context(manifest.archive, manifest.snapshot):
        raise _damaged("the encryption context of its key is not that of this archive")


def _digest(text: object, member: str) -> bytes:
    if type(text) is str and re.fullmatch("[0-9a-f]{64}", text):
        return bytes.fromhex(text)
    raise _damaged(f"member {member} of its manifest is no digest")


def _blob(text: str) -> bytes:
    try:
        blob = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise _damaged("its wrapped key is not base64") from error
    if not 1 <= len(blob) <= MAX_BLOB or base64.b64encode(blob).decode() != text:
        raise _damaged("its wrapped key is malformed")
    return blob


# --- the header


def encode_signed_part(manifest: Manifest) -> bytes:
    """Return prelude and manifest: what the MAC of the header is over. Raises ValueError."""
    raw = encode_manifest(manifest)
    return _PRELUDE.pack(MAGIC, VERSION, 0, len(raw), bytes(12)) + raw


def header_digest(signed: bytes, mac: bytes) -> bytes:
    """Return the digest that follows the header, the first one of the chain."""
    return hashlib.sha256(_HEADER_LABEL + signed + mac).digest()


def manifest_length(prelude: bytes) -> int:
    """Return how many bytes of manifest follow these PRELUDE_BYTES; then MAC and DIGEST bytes.

    Raises ArchiveDamaged, and UnsupportedFormat for a version or a feature that is not known.
    """
    magic, version, flags, length, zero = _PRELUDE.unpack(prelude)
    if magic != MAGIC:
        raise _damaged("it does not begin like an archive of ebsd")
    if version != VERSION:
        raise UnsupportedFormat(file="The archive", what=f"version {version}")
    if flags:
        raise UnsupportedFormat(file="The archive", what=f"the feature flags {flags:#x}")
    if any(zero) or not 1 <= length <= MAX_MANIFEST:
        raise _damaged("its first bytes are malformed")
    return int(length)


# --- frames


class Frame(NamedTuple):
    """The head of a frame."""

    kind: int
    number: int
    payload: int
    """Bytes of the payload, in clear and sealed alike; the tag comes on top."""
    salt: bytes


def encode_frame(frame: Frame) -> bytes:
    return _FRAME.pack(FRAME_MAGIC, frame.kind, frame.number, frame.payload, bytes(12), frame.salt)


def parse_frame(raw: bytes, number: int) -> Frame:
    """Read the head of the frame that has to come now. Raises ArchiveDamaged."""
    magic, kind, stored, payload, zero, salt = _FRAME.unpack(raw)
    if magic != FRAME_MAGIC or any(zero):
        raise _damaged(f"frame {number} does not begin like one")
    if stored != number:
        raise _damaged(f"frame {stored} stands where frame {number} has to be")
    fits = {DATA_FRAME: _COUNT.size + _RUN.size <= payload <= MAX_PAYLOAD, LAST_FRAME: payload == LAST_PAYLOAD}
    if not fits.get(kind, False):
        raise _damaged(f"frame {number} has a kind or a length that cannot be")
    return Frame(kind, stored, payload, salt)


def frame_digest(previous: bytes, header: bytes, sealed: memoryview) -> bytes:
    """Return the digest that ends a frame: over the one before, the head and what is sealed, tag included."""
    digest = hashlib.sha256(_FRAME_LABEL + previous + header)
    digest.update(sealed)
    return digest.digest()


class ChunkRun(NamedTuple):
    """Consecutive chunks: their data, or that they became holes."""

    first: int
    chunks: int
    is_hole: bool


class LastFrame(NamedTuple):
    """What the last frame says of all before it."""

    frames: int
    data_chunks: int
    hole_chunks: int


def encode_last(last: LastFrame) -> bytes:
    return _LAST.pack(*last)


def parse_last(payload: bytes | memoryview) -> LastFrame:
    return LastFrame(*_LAST.unpack(payload))


def encode_runs(runs: Sequence[ChunkRun]) -> bytes:
    """Return what stands in front of the data of a frame."""
    heads = (_RUN.pack(run.first, run.chunks | (_HOLES if run.is_hole else 0)) for run in runs)
    return _COUNT.pack(len(runs)) + b"".join(heads)


def parse_runs(payload: memoryview, number: int, manifest: Manifest, after: int) -> tuple[list[ChunkRun], memoryview]:
    """Return the runs of a frame and their data, whole chunks, in order. ``after``: the chunk that may come first.

    Raises ArchiveDamaged: with the right key that is what only a faulty writer can have made.
    """
    (count,) = _COUNT.unpack_from(payload)
    data_at = _COUNT.size + count * _RUN.size
    if not 1 <= count <= FRAME_RUNS or data_at > len(payload):
        raise _damaged(f"frame {number} has a table of chunks that cannot be")
    runs: list[ChunkRun] = []
    data = 0
    for first, length in _RUN.iter_unpack(payload[_COUNT.size : data_at]):
        run = ChunkRun(first, length & ~_HOLES, bool(length & _HOLES))
        is_within = run.first >= after and run.chunks >= 1 and run.first + run.chunks <= manifest.chunks
        if not is_within or (run.is_hole and manifest.base is None):
            raise _damaged(f"frame {number} has chunks that cannot be there")
        after = run.first + run.chunks
        data += 0 if run.is_hole else run.chunks
        runs.append(run)
    if data > FRAME_CHUNKS or data_at + data * CHUNK != len(payload):
        raise _damaged(f"frame {number} does not have the data of its chunks")
    return runs, payload[data_at:]


def planned_frames(stored: Iterator[ChunkRun]) -> Iterator[list[ChunkRun]]:
    """Distribute runs, ascending, over frames; a run of data is cut where a frame is full."""
    frame: list[ChunkRun] = []
    room = FRAME_CHUNKS
    for run in stored:
        first, left = run.first, run.chunks
        while left:
            if len(frame) == FRAME_RUNS or (not run.is_hole and not room):
                yield frame
                frame, room = [], FRAME_CHUNKS
            take = left if run.is_hole else min(left, room)
            frame.append(ChunkRun(first, take, run.is_hole))
            room -= 0 if run.is_hole else take
            first, left = first + take, left - take
    if frame:
        yield frame
