"""What is fuzzed: each parser of bytes that somebody else may have made, with seeds and the errors that it may raise.

A run of a target returns, or raises one of its declared errors; anything else is a finding. ``mend`` makes checksums
right again, so that what lies behind them is reached, too.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from ebsctl.images import form_of, needs_more
from ebsd.crypto import kdf, wrap
from ebsd.crypto.seal import SealBroken, open_sealed, seal
from ebsd.crypto.secret import Secret
from ebsd.domain.errors import (
    ArchiveDamaged,
    BackupRefused,
    EbsdError,
    IntegrityFailure,
    InvalidCiphertext,
    MalformedPolicy,
    ProtocolError,
    RemoteError,
    RootKeyUnavailable,
    StoreDamaged,
    UnsupportedFormat,
    WrongPassphrase,
)
from ebsd.domain.ids import AccountId, KeyArn, LineageId, SnapshotId, VolumeId
from ebsd.domain.model import Cipher
from ebsd.domain.mountinfo import parse_mountinfo
from ebsd.domain.units import MIB
from ebsd.ipc.packets import number_of, parse_answer, parse_request, to_packet
from ebsd.kms.backup import Argon2, Content, read_backup, write_backup
from ebsd.kms.documents import Row, open_document, seal_document
from ebsd.kms.epoch import Epoch, open_epoch, seal_epoch
from ebsd.kms.passphrase import open_root, seal_root
from ebsd.kms.policydocument import parse_policy
from ebsd.kms.rootkey import RootKeyFault
from ebsd.store.archive import ChunkRun, Manifest, archive_context, encode_manifest, parse_manifest
from ebsd.store.disk import RealDisk
from ebsd.store.durablemap import DurableMap, MapHeader, encode_map_header, parse_map_header
from ebsd.store.layertable import SLOT, LayerEntry, LayerTable, encode_entry, encode_header, parse_layer_table
from ebsd.store.leaves import LeafFile, LeafWriter, Runs, leaf_file_name
from ebsd.store.livemap import read_live_identity
from ebsd.store.record import Record, Resource, WrappedKey, encode_record, parse_record
from ebsd.store.sealedmap import _TRAILER, encode_sealed_map, parse_sealed_map
from ebsd.store.signedrecord import RecordState, SignedBody, parse_signed
from ebsd.volume.archivestream import ArchiveReader, ArchiveWriter
from ebsd.volume.nbd import NbdClient
from ebsd.wire.framing import FrameReader
from ebsd.wire.idl import IdlError, Interface
from ebsd.wire.messages import VarlinkError, parse_call, parse_reply

LINEAGE = LineageId("6ba7b810-9dad-41d1-80b4-00c04fd430c8")
VOLUME = VolumeId("vol-0123456789abcdef0")
SNAPSHOT = SnapshotId("snap-0123456789abcdef0")
UUID = bytes(range(16))
DISK = RealDisk()
DAMAGED = (StoreDamaged, UnsupportedFormat)

Mend = Callable[[bytes], bytes]


@dataclass(frozen=True)
class Target:
    """One parser."""

    run: Callable[[bytes], object]
    seeds: Callable[[], list[bytes]]
    errors: tuple[type[BaseException], ...]
    mend: Mend | None = None
    longest: int = 1 << 16


def resummed(raw: bytes) -> bytes:
    """SHA-256 of all before it in the last 32 bytes."""
    return raw[:-32] + hashlib.sha256(raw[:-32]).digest()


@cache
def _scratch(name: str) -> int:
    """A memory file that a run may fill; parsers that read descriptors get it."""
    return os.memfd_create(name)


def _filled(name: str, data: bytes) -> int:
    fd = _scratch(name)
    os.ftruncate(fd, 0)
    os.pwrite(fd, data, 0)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


# --- wire


def run_frames(data: bytes) -> None:
    reader = FrameReader()
    step = 1 + len(data) // 7
    messages = [message for at in range(0, len(data), step) for message in reader.feed(data[at : at + step])]
    for message in messages:
        with contextlib.suppress(VarlinkError, EbsdError):
            call = parse_call(message)
            interface, _, method = call.method.rpartition(".")
            if interface in ("io.ebsd.EC2", "io.ebsd.KMS", "io.ebsd.EBS", "io.ebsd.Control"):
                known = _interface(interface)
                if method in known.methods:
                    known.check_parameters(method, call.parameters)
        with contextlib.suppress(ProtocolError, RemoteError):
            parse_reply(message)
    reader.check()


@cache
def _interface(name: str) -> Interface:
    return Interface.load(name)


def frame_seeds() -> list[bytes]:
    calls: list[dict[str, Any]] = [
        {"method": "io.ebsd.EC2.CreateVolume", "parameters": {"SizeBytes": 1 << 30, "Tags": [{"Key": "a"}]}},
        {"method": "io.ebsd.EC2.DescribeVolumes", "parameters": {"VolumeIds": [VOLUME]}, "more": True},
        {"method": "io.ebsd.KMS.Decrypt", "parameters": {"CiphertextBlob": "AAAA", "EncryptionContext": {"a": "b"}}},
        {"method": "org.varlink.service.GetInfo", "parameters": {}, "oneway": False},
        {"parameters": {"a": [1, 2.5, None, "é\u2028"]}, "continues": True},
        {"error": "io.ebsd.EC2.ServiceError", "parameters": {"Code": "X", "Message": "m", "Hint": ""}},
    ]  # fmt: skip
    return [json.dumps(call, ensure_ascii=False).encode() + b"\0" for call in calls]


def run_packet(data: bytes) -> None:
    packet = to_packet(data, [])
    if packet is not None:
        for step in (number_of, parse_request, lambda p: parse_answer(p, 1)):
            with contextlib.suppress(EbsdError):
                step(packet)


def run_idl(data: bytes) -> None:
    Interface.parse(data.decode("utf-8", "replace"))


def idl_seeds() -> list[bytes]:
    return [
        b"# text\ninterface io.ebsd.X\n\ntype T (a: int, b: ?[]string, c: [string]T, d: (x, y))\n"
        b"method M(a: T, b: ?object) -> (c: float)\nerror E (reason: string)\n"
    ]


# --- store


def body() -> SignedBody:
    return SignedBody(
        state=RecordState.CLEAN, resource=VOLUME, lineage=LINEAGE, account=AccountId("000000001000"), size=64 * MIB,
        cipher=Cipher.AES_256_XTS, generation=7, head=3, table_count=3, table_hash=bytes([2]) * 32,
        map_hash=bytes([3]) * 32, leaf_root=bytes([4]) * 32,
    )  # fmt: skip


def record_seeds() -> list[bytes]:
    resource = Resource(
        id=VOLUME, account=AccountId("000000001000"), owner="ada", lineage=LINEAGE, sector_size=4096,
        cipher=Cipher.AES_256_XTS, size=64 * MIB, created="2026-01-02T03:04:05Z", name="dätå",
    )  # fmt: skip
    arn = KeyArn("arn:aws:kms:local:000000001000:key/1234abcd-12ab-34cd-56ef-1234567890ab")
    signed = body().encode() + bytes(range(64))
    return [
        encode_record(Record(resource, WrappedKey(arn, b"blob" * 40, {"aws:ebs:id": VOLUME}), signed)),
    ]


def map_header() -> MapHeader:
    return MapHeader(LINEAGE, VOLUME, 3, 1024)


def run_durable(data: bytes) -> None:
    parse_map_header(data[:512], file="map")
    fd = os.dup(_filled("map", data))
    try:
        DurableMap.from_fd(DISK, fd, "map").entries()
    finally:
        os.close(fd)


def _entries(chunks: int) -> memoryview:
    values = memoryview(bytearray(4 * chunks)).cast("I")
    for number in range(0, chunks, 3):
        values[number] = 1 + number % 5
    return values


def sealed_map_seeds() -> list[bytes]:
    return [
        bytes(encode_sealed_map(SNAPSHOT, LINEAGE, _entries(chunks), chunks)) for chunks in (1, 100, 16384 + 7, 40000)
    ]


def run_sealed_map(data: bytes) -> None:
    parse_sealed_map(data, SNAPSHOT, file="map")


def mend_sealed_map(data: bytes) -> bytes:
    """Trailer: magic, id, length, SHA-256 of all before the trailer; made like that of a whole file."""
    seed = _sealed_map_trailer()
    front = data[: -len(seed)] if len(data) > len(seed) else data
    trailer = bytearray(data[-len(seed) :])
    if len(trailer) == len(seed):
        trailer[:32] = seed[:32]
        trailer[32:40] = len(data).to_bytes(8, "little")
        trailer[-32:] = hashlib.sha256(front).digest()
    return front + bytes(trailer)


@cache
def _sealed_map_trailer() -> bytes:
    return sealed_map_seeds()[0][-_TRAILER.size :]


def table_seeds() -> list[bytes]:
    table = LayerTable(LINEAGE, 4096, Cipher.AES_256_XTS, (), b"")
    raw = encode_header(table)
    entries = [encode_entry(LayerEntry(number, bytes([number]) * 16, VOLUME)) for number in (1, 2, 3)]
    return [raw, raw + b"".join(entries)]


def mend_table(data: bytes) -> bytes:
    return b"".join(_summed_slot(data[at : at + SLOT]) for at in range(0, len(data), SLOT))


def _summed_slot(slot: bytes) -> bytes:
    return slot[:-8] + hashlib.sha256(slot[:-8]).digest()[:8] if len(slot) == SLOT else slot


@cache
def _leaf_directory() -> tuple[int, str]:
    import tempfile

    path = tempfile.mkdtemp(prefix="ebsd-fuzz-")
    import atexit
    import shutil

    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY), path


def leaf_seeds() -> list[bytes]:
    dirfd, path = _leaf_directory()
    found = []
    for ranges in ([(0, 1)], [(0, 5), (7, 20), (300, 301)]):
        runs = Runs(ranges)
        writer = LeafWriter(DISK, dirfd, LINEAGE, 2, UUID, runs)
        for number in range(sum(end - first for first, end in ranges)):
            writer.add(hashlib.sha256(bytes([number % 256])).digest())
        writer.finish()
        made = Path(path) / writer.temporary
        found.append(made.read_bytes())
        made.unlink()
    return found


def run_leaves(data: bytes) -> None:
    dirfd, path = _leaf_directory()
    (Path(path) / leaf_file_name(2, UUID)).write_bytes(data)
    leaves = LeafFile.open(DISK, dirfd, LINEAGE, 2, UUID, None)
    try:
        for chunk in (0, 1, 7, 19, 300, 1 << 27):
            leaves.digest_of(chunk)
    finally:
        leaves.close()


def run_live(data: bytes) -> None:
    path = Path(_leaf_directory()[1]) / "live"
    path.write_bytes(data)
    read_live_identity(DISK, path)


# --- archives


def manifest(**changes: Any) -> Manifest:
    made = Manifest(
        archive="00112233-4455-4677-8899-aabbccddeeff", snapshot=SNAPSHOT, volume=VOLUME, account="000000001000",
        owner="ada", name="monday", description="für später", started="2026-11-20T10:00:00.000Z",
        created="2026-11-21T10:00:00.000Z", size=8 * MIB, cipher=Cipher.AES_256_XTS, content=bytes(range(32)),
        base=None, data_chunks=2, hole_chunks=0,
        key_arn="arn:aws:kms:local:000000001000:key/1234abcd-12ab-34cd-56ef-1234567890ab", blob=b"blob" * 40,
        context=archive_context("00112233-4455-4677-8899-aabbccddeeff", SNAPSHOT),
    )  # fmt: skip
    return replace(made, **changes)


ARCHIVE_KEY = bytes(range(64))


@cache
def _archive_key() -> Secret:
    return Secret.from_buffer(ARCHIVE_KEY)


def archive_seeds() -> list[bytes]:
    fd = os.memfd_create("archive")
    writer = ArchiveWriter(fd, _archive_key(), manifest(data_chunks=1), lambda length: bytes(length))
    writer.begin()
    writer.add([ChunkRun(3, 1, False)], lambda into: None)
    writer.finish()
    writer.close()
    length = os.lseek(fd, 0, os.SEEK_END)
    data = os.pread(fd, length, 0)
    os.close(fd)
    return [data]


def run_archive(data: bytes) -> None:
    for has_key in (False, True):
        reader = ArchiveReader(_filled("archive", data))
        try:
            reader.read_header()
            if has_key:
                reader.unlock(_archive_key())
            for _ in reader.frames():
                pass
        finally:
            reader.close()


# --- keys


@cache
def _key() -> Secret:
    return Secret.from_buffer(bytes(range(1, 33)))


CONTEXT = {"aws:ebs:id": VOLUME}


def blob_seeds() -> list[bytes]:
    return [
        wrap.wrap(_key(), bytes(16), bytes(32), bytes(64), CONTEXT, salt=bytes(32), iv=bytes(12)),
        wrap.wrap(_key(), bytes(16), bytes(32), b"x", CONTEXT, salt=bytes(32), iv=bytes(12)),
    ]


def run_blob(data: bytes) -> None:
    wrap.unwrap(_key(), data, CONTEXT).wipe()


@cache
def _epoch() -> Epoch:
    return Epoch(1, Secret.from_buffer(bytes(range(32))))


def run_document(data: bytes) -> None:
    open_document(_epoch(), Row("key", "id", 1, data))


def document_body(data: bytes) -> None:
    """What is sealed is as hostile as who has the key: the inner lengths."""
    data = data or b"x"  # nothing cannot be sealed
    row = Row("key", "id", 1, seal(_epoch().key, label=kdf.LABEL_DOCUMENT, aad=_document_aad(), plaintext=data))
    open_document(_epoch(), row)


def _document_aad() -> bytes:
    return b"\0".join((b"key", b"id", (1).to_bytes(8, "big") + (1).to_bytes(8, "big")))


def run_epoch(data: bytes) -> None:
    open_epoch(_key(), data).key.wipe()


def run_seal(data: bytes) -> None:
    open_sealed(_key(), label=b"x", aad=b"y", sealed=data).wipe()


CHEAP = Argon2(memory=64, passes=1, lanes=1)


def _is_cheap(data: bytes) -> bool:
    """A header may ask for what is bearable once, but not a thousand times."""
    return data[12:24] == b"".join(n.to_bytes(4, "big") for n in (64, 1, 1)) or len(data) < 24


def backup_seeds() -> list[bytes]:
    content = Content(Secret.from_buffer(bytes(32)), seal_epoch(_key(), _epoch()), [Row("key", "id", 1, b"sealed" * 9)])
    return [write_backup(content, bytearray(b"passphrase"), CHEAP)]


def run_backup(data: bytes) -> None:
    if _is_cheap(data):
        read_backup(data, bytearray(b"passphrase")).root_key.wipe()


def root_seeds() -> list[bytes]:
    return [seal_root(Secret.from_buffer(bytes(32)), bytearray(b"passphrase"), CHEAP)]


def run_root(data: bytes) -> None:
    if _is_cheap(data):
        open_root(data, bytearray(b"passphrase")).wipe()


def policy_seeds() -> list[bytes]:
    statement = {
        "Sid": "A1", "Effect": "Allow", "Principal": {"AWS": ["arn:aws:iam::000000001000:root", "*"]},
        "Action": ["kms:Decrypt", "kms:*"], "Resource": "*",
        "Condition": {"ForAnyValue:StringLike": {"kms:EncryptionContext:aws:ebs:id": ["vol-*"]},
                      "Bool": {"kms:GrantIsForAWSResource": "true"}, "NumericLessThan": {"kms:GrantOperations": 3}},
    }  # fmt: skip
    return [json.dumps({"Version": "2012-10-17", "Id": "x", "Statement": [statement]}).encode()]


def run_policy(data: bytes) -> None:
    parse_policy(data.decode("utf-8", "surrogateescape"))


# --- images and the host


def run_image(data: bytes) -> None:
    form_of(data)


def run_image_info(data: bytes) -> None:
    """qemu-img describes an image whose texts its maker chose."""
    with contextlib.suppress(ValueError, RecursionError):
        info = json.loads(data)
        if isinstance(info, dict):
            needs_more(info, "/dev/fd/3")


def run_nbd(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            ours.send(data)
        ours.shutdown(socket.SHUT_WR)
        client = NbdClient(theirs.fileno(), threading.Event())
        try:
            client.status(0, 65536)
            client.read_into(0, memoryview(bytearray(8192)))
        finally:
            client.close()


def nbd_seeds() -> list[bytes]:
    greeting = b"NBDMAGICIHAVEOPT" + (3).to_bytes(2, "big")

    def answer(option: int, kind: int, payload: bytes = b"") -> bytes:
        head = (0x3E889045565A9).to_bytes(8, "big") + option.to_bytes(4, "big") + kind.to_bytes(4, "big")
        return head + len(payload).to_bytes(4, "big") + payload

    export = b"\0\0" + (1 << 20).to_bytes(8, "big") + (1).to_bytes(2, "big")
    context = (1).to_bytes(4, "big") + b"base:allocation"
    go = answer(7, 3, export) + answer(7, 1)
    structured = answer(8, 1) + answer(10, 4, context) + answer(10, 1)
    refused = answer(8, 0x80000001)
    status = b"\x66\x8e\x33\xef\0\1\0\5" + (1).to_bytes(8, "big") + (12).to_bytes(4, "big")
    status += (1).to_bytes(4, "big") + (65536).to_bytes(4, "big") + (3).to_bytes(4, "big")
    hole = (
        b"\x66\x8e\x33\xef\0\1\0\2" + (2).to_bytes(8, "big") + (12).to_bytes(4, "big") + bytes(8) + bytes([0, 0, 32, 0])
    )
    return [greeting + structured + go + status + hole, greeting + refused + go]


def run_mountinfo(data: bytes) -> None:
    parse_mountinfo(data.decode("utf-8", "surrogateescape"))


def description_seeds() -> list[bytes]:
    data = {"extents": [{"filename": "/dev/fd/3"}]}
    return [json.dumps({"format": "vmdk", "format-specific": {"data": data}}).encode()]


def mount_seeds() -> list[bytes]:
    return [b"36 35 98:0 / /mnt\\040x rw,noatime shared:1 - ext4 /dev/root rw\n"]


def packet_seeds() -> list[bytes]:
    return [b'{"v":1,"id":1,"method":"x","params":{}}', b'{"id":1,"result":{}}']


def mend_durable(data: bytes) -> bytes:
    return resummed(data[:512]) + data[512:]


REFUSED_ARCHIVE = (ArchiveDamaged, UnsupportedFormat)
REFUSED_EPOCH = (IntegrityFailure, RootKeyUnavailable, UnsupportedFormat)

TARGETS: dict[str, Target] = {
    "frames": Target(run_frames, frame_seeds, (ProtocolError,)),
    "packets": Target(run_packet, packet_seeds, (ProtocolError,)),
    "interfaces": Target(run_idl, idl_seeds, (IdlError,), longest=4096),
    "records": Target(lambda d: parse_record(d, file="record").body(), record_seeds, DAMAGED, resummed),
    "signed-records": Target(
        lambda d: parse_signed(d, file="record"), lambda: [body().encode() + bytes(range(64))], DAMAGED
    ),
    "durable-maps": Target(
        run_durable, lambda: [encode_map_header(map_header()) + bytes(3584 + 4096)], DAMAGED, mend_durable
    ),
    "sealed-maps": Target(run_sealed_map, sealed_map_seeds, DAMAGED, mend_sealed_map),
    "layer-tables": Target(lambda d: parse_layer_table(d, file="table"), table_seeds, DAMAGED, mend_table),
    "leaves": Target(run_leaves, leaf_seeds, DAMAGED, resummed),
    "live-maps": Target(run_live, lambda: [bytes(4096)], (StoreDamaged,)),
    "manifests": Target(parse_manifest, lambda: [encode_manifest(manifest())], REFUSED_ARCHIVE),
    "archives": Target(run_archive, archive_seeds, REFUSED_ARCHIVE, longest=1 << 18),
    "wrapped-keys": Target(run_blob, blob_seeds, (InvalidCiphertext,)),
    "sealed": Target(run_seal, lambda: [seal(_key(), label=b"x", aad=b"y", plaintext=b"text")], (SealBroken,)),
    "documents": Target(
        run_document, lambda: [seal_document(_epoch(), "key", "id", 1, b"{}", [_key()])], (SealBroken,)
    ),
    "document-bodies": Target(document_body, lambda: [bytes([0, 0, 0, 2]) + b"{}" + bytes(4)], (SealBroken,)),
    "epochs": Target(run_epoch, lambda: [seal_epoch(_key(), _epoch())], REFUSED_EPOCH),
    "backups": Target(run_backup, backup_seeds, (BackupRefused,)),
    "root-keys": Target(run_root, root_seeds, (RootKeyFault, WrongPassphrase)),
    "policies": Target(run_policy, policy_seeds, (MalformedPolicy,)),
    "images": Target(run_image, lambda: [b"QFI\xfb" + bytes(600), b"KDMV" + bytes(600), b"vhdxfile" + bytes(600)], ()),
    "image-descriptions": Target(run_image_info, description_seeds, ()),
    "nbd": Target(run_nbd, nbd_seeds, (OSError,)),
    "mounts": Target(run_mountinfo, mount_seeds, ()),
}
