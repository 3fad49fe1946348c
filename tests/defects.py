"""Defects of a store, each made by one generator that is named for it: what tests damage the files of volumes with.

A defect says with which words ``attach`` refuses the volume and which code ``ebsctl check`` finds for it. An empty code
stands where only the data key shows it: the signature of a record, and ciphertext.
"""

from __future__ import annotations

import base64
import hashlib
import os
import secrets
import shutil
import stat
import struct
import subprocess
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from installation import Installation

from ebsctl.client import Client
from ebsd.domain.ids import AccountId, KeyArn, LineageId, SnapshotId, VolumeId
from ebsd.domain.model import Cipher
from ebsd.store.disk import RealDisk
from ebsd.store.durablemap import FIRST_ENTRY, HEADER_BYTES, DurableMap, encode_map_header
from ebsd.store.entries import ENTRY
from ebsd.store.layers import parse_segment_name, segment_name
from ebsd.store.layertable import encode_table, read_layer_table
from ebsd.store.record import Record, WrappedKey, encode_record, parse_record
from ebsd.store.sealedmap import encode_sealed_map, read_sealed_map
from ebsd.store.signedrecord import BODY_BYTES, UNSIGNED, RecordState, SignedBody, split_signed

CHUNK = 65536
SIZE = 8 * 1024 * 1024
CHUNKS = SIZE // CHUNK
INTEGRITY = 7
"""Exit status of ebsctl for whatever fails an integrity check."""

WRITTEN = (0, 5, 6, CHUNKS - 1)
"""Chunks that hold data; every other one is a hole."""

STALE_HOLE, STALE_DATA = 5, 9
DISK = RealDisk()


@dataclass
class Volume:
    """A volume of the test, detached and clean, and what a thief of its files could have kept from earlier."""

    id: VolumeId
    name: str
    lineage: LineageId
    state: Path
    data: dict[int, bytes]
    older: dict[str, bytes] = field(default_factory=dict)
    """Earlier contents of its record file: born, open (generation 1), clean (generation 2)."""

    @property
    def record(self) -> Path:
        return self.state / "records" / self.id

    @property
    def map(self) -> Path:
        return self.state / "maps" / self.id

    @property
    def directory(self) -> Path:
        return self.state / "layers" / self.lineage

    @property
    def table(self) -> Path:
        return self.directory / "table"

    @property
    def segment(self) -> Path:
        (found,) = (path for path in self.directory.iterdir() if parse_segment_name(path.name))
        return found

    def parsed(self) -> Record:
        return parse_record(self.record.read_bytes(), file="record")

    def put(self, record: Record) -> None:
        """Replace the record by one with a right checksum: what the MAC does not cover, anybody can write."""
        self.record.write_bytes(encode_record(record))

    def put_signed(self, signed: bytes) -> None:
        """Replace the signed part of the record, and what must agree with it in the unsigned part."""
        body = SignedBody.parse(signed[:BODY_BYTES], file="record")
        record = self.parsed()
        resource = replace(
            record.resource, id=body.resource, account=body.account, lineage=body.lineage, cipher=body.cipher,
            size=body.size,
        )  # fmt: skip
        wrapped = record.wrapped_key if body.cipher is not Cipher.NONE else None
        self.put(Record(resource, wrapped, signed))

    def put_body(self, **changes: Any) -> None:
        """Change members of the signed body and leave the MAC as it was."""
        body, mac = split_signed(self.parsed().signed, file="record")
        self.put_signed(replace(SignedBody.parse(body, file="record"), **changes).encode() + mac)


@dataclass
class Store:
    """The installation under attack and the volumes in it."""

    ebsd: Installation
    client: Client
    victim: Volume
    other: Volume
    bystander: Volume
    bystander_file: str
    key: KeyArn
    """The CMK of victim and other."""
    attackers_key: KeyArn
    broker: int = 0

    def wrapped_by_broker(self, key: str, context: dict[str, str]) -> bytes:
        """Return a fresh wrapped key with any context: what only root can have made, on the broker's own socket."""
        reply = self.client.call(
            str(self.ebsd.runtime / "kms.sock"),
            "io.ebsd.Broker.GenerateDataKeyWithoutPlaintext",
            {
                "Caller": {"Uid": 0, "Name": "root"},
                "KeyId": key,
                "NumberOfBytes": 64,
                "EncryptionContext": context,
            },
        )
        return base64.b64decode(reply.parameters["CiphertextBlob"])

    def wrapped_for_user(self, key: str, context: dict[str, str]) -> bytes:
        """Return a fresh wrapped key as every user can have it made under a key of his own."""
        reply = self.client.kms("GenerateDataKey", KeyId=key, NumberOfBytes=64, EncryptionContext=context)
        return base64.b64decode(reply["CiphertextBlob"])


def make_volume(ebsd: Installation, client: Client, key: str, attachments: int = 2) -> Volume:
    """Create a volume, write its chunks in some attachments, and leave it detached and clean."""
    name = f"t-{secrets.token_hex(6)}"
    described = client.ec2("CreateVolume", Name=name, SizeBytes=SIZE, Encrypted=True, KmsKeyId=key)["Volume"]
    data = {chunk: secrets.token_bytes(CHUNK) for chunk in WRITTEN}
    volume = Volume(described["VolumeId"], name, described["DataEncryptionKeyId"], ebsd.state, data)
    volume.older["born"] = volume.record.read_bytes()
    for turn in range(attachments):
        path = client.ec2("AttachVolume", VolumeId=volume.id, ExposeAs="file")["Attachment"]["Path"]
        volume.older.setdefault("open", volume.record.read_bytes())
        with open(path, "r+b", buffering=0) as file:
            for chunk in WRITTEN[turn::attachments]:
                os.pwrite(file.fileno(), data[chunk], chunk * CHUNK)
        client.ec2("DetachVolume", VolumeId=volume.id)
        volume.older.setdefault("clean", volume.record.read_bytes())
    body = volume.parsed().body()
    assert (body.state, body.generation) == (RecordState.CLEAN, 2 * attachments)
    return volume


def many_volumes(ebsd: Installation, client: Client, key: str, count: int, attachments: int) -> list[Volume]:
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(lambda _: make_volume(ebsd, client, key, attachments), range(count)))


# --- edits of files ------------------------------------------------------------------------------------------


def flip(path: Path, offset: int, bit: int = 0) -> None:
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 1 << bit
    path.write_bytes(raw)


def flip_signed(store: Store, offset: int) -> None:
    """Flip a bit of the signed record, body or MAC, and make the checksum of the file right again."""
    signed = bytearray(store.victim.parsed().signed)
    signed[offset] ^= 1
    store.victim.put_signed(bytes(signed))


def wrapped(store: Store, **changes: Any) -> None:
    """Change members of the victim's wrapped key."""
    record = store.victim.parsed()
    assert record.wrapped_key is not None
    store.victim.put(replace(record, wrapped_key=replace(record.wrapped_key, **changes)))


def wrapped_key_of(volume: Volume) -> WrappedKey:
    key = volume.parsed().wrapped_key
    assert key is not None
    return key


def context_of(volume: Volume) -> dict[str, str]:
    return dict(wrapped_key_of(volume).context)


def as_unencrypted(volume: Volume) -> None:
    """Rewrite record and layer table as those of an unencrypted volume, checksums and all."""
    table = replace(read_layer_table(DISK, volume.table), cipher=Cipher.NONE)
    volume.table.write_bytes(encode_table(table))
    body = volume.parsed().body()
    body = replace(body, cipher=Cipher.NONE, table_hash=table.prefix_hash(body.table_count))
    volume.put_signed(body.encode() + hashlib.sha512(b"ebsd/1/plain-record\0" + body.encode()).digest())


def set_entry(store: Store, chunk: int, value: int) -> None:
    with store.victim.map.open("r+b") as file:
        file.seek(FIRST_ENTRY + chunk * ENTRY)
        file.write(value.to_bytes(ENTRY, "little"))


def map_header_of_other(store: Store) -> None:
    opened = DurableMap.open(DISK, store.victim.map, writable=False)
    header = replace(opened.header, volume=store.other.id, lineage=store.other.lineage)
    opened.close()
    with store.victim.map.open("r+b") as file:
        file.write(encode_map_header(header))


def truncate(path: Path, length: int) -> None:
    os.truncate(path, length)


def swap(one: Path, other: Path) -> None:
    third = one.with_name("third")
    one.rename(third)
    other.rename(one)
    third.rename(other)


def swap_maps(store: Store) -> None:
    # Otherwise the two maps would name the same chunks.
    with store.other.map.open("r+b") as file:
        file.seek(FIRST_ENTRY + STALE_DATA * ENTRY)
        file.write((1).to_bytes(ENTRY, "little"))
    swap(store.victim.map, store.other.map)


def instead(path: Path, make: Callable[[Path], object]) -> None:
    """Put something else in the place of a file or directory, which stays beside it."""
    path.rename(path.with_name("aside"))
    make(path)


def link_aside(path: Path) -> None:
    path.symlink_to("aside")


def new_uuid_in_table(store: Store, *, rename: bool) -> None:
    """Give the head layer another random id, as a rollback of the key derivation would need, and its file too."""
    table = read_layer_table(DISK, store.victim.table)
    (entry,) = table.layers
    fresh = replace(entry, uuid=secrets.token_bytes(16))
    if rename:
        segment = store.victim.segment
        segment.rename(segment.with_name(segment_name(fresh.number, fresh.uuid, 0)))
    store.victim.table.write_bytes(encode_table(replace(table, layers=(fresh,))))


def signed_by_other(store: Store) -> None:
    """Take the other volume's signed record and keep our wrapped key: key and signature are each genuine."""
    own = wrapped_key_of(store.victim)
    record = parse_record(store.other.record.read_bytes(), file="record")
    store.victim.put(replace(record, wrapped_key=own))


def resigned_by_other(store: Store) -> None:
    """Take the MAC of the other volume for our body."""
    body, _ = split_signed(store.victim.parsed().signed, file="record")
    _, mac = split_signed(store.other.parsed().signed, file="record")
    store.victim.put_signed(body + mac)


def born_again(store: Store) -> None:
    body = store.victim.parsed().body()
    fresh = replace(body, state=RecordState.BORN, generation=0, map_hash=bytes(32), leaf_root=bytes(32))
    store.victim.put_signed(fresh.encode() + UNSIGNED)


@dataclass(frozen=True)
class Case:
    name: str
    code: str
    """What ``ebsctl check`` finds; empty when only the data key shows it."""
    reason: str
    """Part of the message that tells the user what is wrong."""
    edit: Callable[[Store], object]


FILE_CASES = (
    # The wrapped key.
    Case(
        "wrapped key of another volume",
        "record-disagrees",
        "was made with another key or encryption context",
        lambda s: wrapped(s, blob=wrapped_key_of(s.other).blob),
    ),
    Case(
        "wrapped key and context of another volume",
        "record-disagrees",
        "fails its integrity check",
        lambda s: wrapped(s, blob=wrapped_key_of(s.other).blob, context=context_of(s.other)),
    ),
    Case(
        "fresh wrapped key of the same CMK and context",
        "record-disagrees",
        "opens to another data key",
        lambda s: wrapped(s, blob=s.wrapped_by_broker(s.key, context_of(s.victim))),
    ),
    Case(
        "fresh wrapped key of the same CMK, made with another context",
        "record-disagrees",
        "was made with another key or encryption context",
        lambda s: wrapped(s, blob=s.wrapped_for_user(s.key, {"team": "x"})),
    ),
    Case(
        "fresh wrapped key of the same CMK with its own context",
        "record-disagrees",
        "fails its integrity check",
        lambda s: wrapped(s, blob=s.wrapped_for_user(s.key, {"team": "x"}), context={"team": "x"}),
    ),
    Case(
        "wrapped key of an attacker's CMK",
        "record-disagrees",
        "does not identify a CMK that can perform this operation",
        lambda s: wrapped(s, blob=s.wrapped_by_broker(s.attackers_key, context_of(s.victim)), key_arn=s.attackers_key),
    ),
    Case(
        "one more pair in the context",
        "record-disagrees",
        "encryption context",
        lambda s: wrapped(s, context={**context_of(s.victim), "team": "x"}),
    ),
    # The record.
    Case(
        "record says unencrypted",
        "record-disagrees",
        "its record has no wrapped key",
        lambda s: as_unencrypted(s.victim),
    ),
    Case(
        "record of another volume",
        "record-foreign",
        "fails its integrity check",
        lambda s: shutil.copy(s.other.record, s.victim.record),
    ),
    Case("signed record of another volume", "record-foreign", "is not valid under its data key", signed_by_other),
    Case("signature of another volume", "", "is not valid under its data key", resigned_by_other),
    Case(
        "record as it was born",
        "record-old",
        "generation 0",
        lambda s: s.victim.record.write_bytes(s.victim.older["born"]),
    ),
    Case(
        "record of the first attachment",
        "record-old",
        "generation 1",
        lambda s: s.victim.record.write_bytes(s.victim.older["open"]),
    ),
    Case(
        "record of the first detachment",
        "record-old",
        "generation 2",
        lambda s: s.victim.record.write_bytes(s.victim.older["clean"]),
    ),
    Case("record made born again", "record-old", "generation 0", born_again),
    Case("record of a generation to come", "", "is not valid under", lambda s: s.victim.put_body(generation=1000)),
    Case(
        "record says that the end was unclean",
        "",
        "is not valid under",
        lambda s: s.victim.put_body(state=RecordState.OPEN, map_hash=bytes(32), leaf_root=bytes(32)),
    ),
    Case("one bit of the hash of the map", "map-unsigned", "is not valid under", lambda s: flip_signed(s, 160)),
    Case("first bit of the signature", "", "is not valid under", lambda s: flip_signed(s, BODY_BYTES)),
    Case(
        "one bit without its checksum", "record-damaged", "its checksum is wrong", lambda s: flip(s.victim.record, 600)
    ),
    Case("record deleted", "record-missing", "its record is missing", lambda s: s.victim.record.unlink()),
    Case("record is a FIFO", "not-a-file", "is damaged", lambda s: instead(s.victim.record, os.mkfifo)),
    Case("record is a symlink", "not-a-file", "is damaged", lambda s: instead(s.victim.record, link_aside)),
    # The map.
    Case("map deleted", "map-missing", "is missing", lambda s: s.victim.map.unlink()),
    Case("map without its last page", "map-damaged", "bytes instead of", lambda s: truncate(s.victim.map, FIRST_ENTRY)),
    Case(
        "one bit of the header of the map",
        "map-damaged",
        "the checksum of its header is wrong",
        lambda s: flip(s.victim.map, 40),
    ),
    Case("map entry of an unknown layer", "map-entry", "names the unknown layer 0x7", lambda s: set_entry(s, 5, 7)),
    Case(
        "map entry made a hole",
        "map-unsigned",
        "not the one its record was signed over",
        lambda s: set_entry(s, STALE_HOLE, 0),
    ),
    Case(
        "hole made a map entry",
        "map-unsigned",
        "not the one its record was signed over",
        lambda s: set_entry(s, STALE_DATA, 1),
    ),
    Case("maps of two volumes swapped", "map-foreign", "fails its integrity check", swap_maps),
    Case("map that names another volume", "map-foreign", "map", map_header_of_other),
    Case("map is a FIFO", "not-a-file", "is not a regular file", lambda s: instead(s.victim.map, os.mkfifo)),
    Case("map is a symlink", "not-a-file", "is damaged", lambda s: instead(s.victim.map, link_aside)),
    Case("map is a directory", "not-a-file", "is damaged", lambda s: instead(s.victim.map, os.mkdir)),
    # Layers.
    Case("segment deleted", "layer-missing", "is missing", lambda s: s.victim.segment.unlink()),
    Case("segment cut by a chunk", "layer-damaged", "are needed", lambda s: truncate(s.victim.segment, SIZE - CHUNK)),
    Case(
        "segment is a symlink", "not-a-file", "is not a regular file", lambda s: instead(s.victim.segment, link_aside)
    ),
    Case("segment is a FIFO", "not-a-file", "is not a regular file", lambda s: instead(s.victim.segment, os.mkfifo)),
    Case(
        "segment is a directory", "not-a-file", "is not a regular file", lambda s: instead(s.victim.segment, os.mkdir)
    ),
    Case("directory of the layers deleted", "table-missing", "is missing", lambda s: shutil.rmtree(s.victim.directory)),
    Case(
        "directory of the layers is a symlink",
        "not-a-file",
        "is damaged",
        lambda s: instead(s.victim.directory, link_aside),
    ),
    # The layer table.
    Case("table deleted", "table-missing", "is missing", lambda s: s.victim.table.unlink()),
    Case(
        "table without its entry",
        "table-disagrees",
        "its head layer 1 is not in the layer table",
        lambda s: truncate(s.victim.table, 64),
    ),
    Case("table cut in its entry", "table-damaged", "not whole entries", lambda s: truncate(s.victim.table, 100)),
    Case(
        "one bit of the table",
        "table-damaged",
        "the checksum of layer 1 is wrong",
        lambda s: flip(s.victim.table, 64 + 10),
    ),
    Case("another id for the layer", "table-disagrees", "is missing", lambda s: new_uuid_in_table(s, rename=False)),
    Case(
        "another id for layer and segment",
        "table-disagrees",
        "not the one its record was signed",
        lambda s: new_uuid_in_table(s, rename=True),
    ),
    Case("table of another lineage", "table-disagrees", "fails its integrity check", lambda s: table_of_other(s)),
)


def table_of_other(store: Store) -> None:
    """Keep layer number, id and file; only the lineage that the table says it is of changes."""
    table = read_layer_table(DISK, store.victim.table)
    store.victim.table.write_bytes(encode_table(replace(table, lineage=store.other.lineage)))


@dataclass(frozen=True)
class CatalogCase:
    name: str
    reason: str
    columns: Callable[[Store, Volume], dict[str, Any]]
    """What the row of the volume is changed to."""
    lineage: Callable[[Store, Volume], dict[str, Any]] = lambda _s, _v: {}
    """What the row of its lineage is changed to."""
    edit: Callable[[Store, Volume], object] = lambda _s, _v: None
    """What else is changed, in files."""


def attackers_wrapped_key(store: Store, volume: Volume) -> None:
    """Wrap a data key that the attacker may decrypt, bound to the very context of the volume."""
    blob = store.wrapped_by_broker(store.attackers_key, context_of(volume))
    record = volume.parsed()
    volume.put(replace(record, wrapped_key=WrappedKey(store.attackers_key, blob, context_of(volume))))


UNENCRYPTED = {"cipher": int(Cipher.NONE)}
STRANGER = AccountId("000000001234")

CATALOG_CASES = (
    CatalogCase("cipher none", "knows it as encrypted", lambda _s, _v: UNENCRYPTED),
    CatalogCase(
        "cipher none and no key, lineage too",
        "knows it as encrypted",
        lambda _s, _v: {**UNENCRYPTED, "key_arn": None, "wrapped_key": None},
        lambda _s, _v: UNENCRYPTED,
    ),
    CatalogCase(
        "cipher none in catalog, record and layer table alike",
        "knows it as encrypted",
        lambda _s, _v: {**UNENCRYPTED, "key_arn": None, "wrapped_key": None},
        lambda _s, _v: UNENCRYPTED,
        lambda _s, v: as_unencrypted(v),
    ),
    CatalogCase("attacker's CMK", "its key is", lambda s, _v: {"key_arn": s.attackers_key}),
    CatalogCase(
        "attacker's CMK and his wrapped key, in the record too",
        "its key is",
        lambda s, _v: {"key_arn": s.attackers_key},
        edit=attackers_wrapped_key,
    ),
    CatalogCase("owner", "fails its integrity check", lambda _s, _v: {"account": STRANGER}),
    CatalogCase("size halved", "fails its integrity check", lambda _s, _v: {"size": SIZE // 2}),
    CatalogCase("size less one sector", "fails its integrity check", lambda _s, _v: {"size": SIZE - 4096}),
    CatalogCase("size doubled", "are needed", lambda _s, _v: {"size": SIZE * 2}),
    CatalogCase("head", "its head layer 2 is not in the layer table", lambda _s, _v: {"head": 2}),
    CatalogCase("lineage", "disagree about its lineage", lambda s, _v: {"lineage": s.other.lineage}),
)


# --- defects of snapshots and their layers -------------------------------------------------------------------


@dataclass(frozen=True)
class Chain:
    """A volume with two snapshots, detached; layers 1 and 2 are sealed, 3 is its head."""

    state: Path
    volume: str
    lineage: str
    snapshots: list[str]

    @property
    def snapshot(self) -> SnapshotId:
        """The newer one, which names layers 1 and 2."""
        return SnapshotId(self.snapshots[1])

    @property
    def map(self) -> Path:
        return self.state / "maps" / self.snapshot

    @property
    def record(self) -> Path:
        return self.state / "records" / self.snapshot

    def layer(self, number: int) -> Path:
        (found,) = (self.state / "layers" / self.lineage).glob(f"{number:010d}-*.000")
        return found

    def rewrite(self, edit: Callable[[memoryview], object]) -> None:
        """Edit the entries of the sealed map, with all its checksums right."""
        sealed = read_sealed_map(DISK, self.map, self.snapshot)
        entries = memoryview(bytearray(sealed.entries.cast("B"))).cast("I")
        edit(entries)
        self.map.write_bytes(encode_sealed_map(self.snapshot, sealed.lineage, entries, sealed.chunks))


@dataclass(frozen=True)
class SnapshotCase:
    """A defect; ``refused`` says whether restore or the attach after it ends with the integrity status."""

    name: str
    code: str
    edit: Callable[[Chain], object]
    refused: bool = True


def flipped_bit_in_the_map(chain: Chain) -> None:
    flip(chain.map, 600)


def truncated_map(chain: Chain) -> None:
    truncate(chain.map, chain.map.stat().st_size - 1)


def map_of_another_snapshot(chain: Chain) -> None:
    shutil.copy(chain.map.with_name(chain.snapshots[0]), chain.map)


def map_that_inflates_without_end(chain: Chain) -> None:
    """A frame of a few KiB that would give 64 MiB; index, trailer and checksum are right."""
    raw = chain.map.read_bytes()
    header = raw[:HEADER_BYTES]
    frame = zlib.compress(bytes(64 * 1024 * 1024), 9)
    front = header + frame + struct.pack("<QQ", HEADER_BYTES, HEADER_BYTES + len(frame))
    total = len(front) + 72
    trailer = struct.pack("<8s24sQ32s", b"EBSDMEND", chain.snapshot.encode(), total, hashlib.sha256(front).digest())
    chain.map.write_bytes(front + trailer)


def map_of_a_size_of_2_to_the_63(chain: Chain) -> None:
    raw = bytearray(chain.map.read_bytes())
    raw[64:72] = (2**63).to_bytes(8, "little")
    raw[HEADER_BYTES - 32 : HEADER_BYTES] = hashlib.sha256(raw[: HEADER_BYTES - 32]).digest()
    chain.map.write_bytes(raw)


def entry_of_an_unknown_layer(chain: Chain) -> None:
    chain.rewrite(lambda entries: entries.__setitem__(0, 77))


def entry_of_a_reserved_value(chain: Chain) -> None:
    chain.rewrite(lambda entries: entries.__setitem__(0, 0xFFFFFFFF))


def entry_of_the_head_of_the_volume(chain: Chain) -> None:
    chain.rewrite(lambda entries: entries.__setitem__(0, 3))


def entry_made_a_hole(chain: Chain) -> None:
    chain.rewrite(lambda entries: entries.__setitem__(0, 0))


def entry_of_a_chunk_without_data(chain: Chain) -> None:
    chain.rewrite(lambda entries: entries.__setitem__(100, 1))


def missing_layer(chain: Chain) -> None:
    chain.layer(1).unlink()


def truncated_layer(chain: Chain) -> None:
    truncate(chain.layer(1), CHUNK)


def layer_punched(chain: Chain) -> None:
    layer = chain.layer(1)
    layer.chmod(0o600)
    subprocess.run(["fallocate", "--punch-hole", "--offset", "0", "--length", str(CHUNK), layer], check=True)
    layer.chmod(0o440)


def symbolic_link_for_a_layer(chain: Chain) -> None:
    layer = chain.layer(1)
    moved = chain.state / "moved-layer"
    shutil.copy(layer, moved)
    layer.unlink()
    layer.symlink_to(moved)


def swapped_layers(chain: Chain) -> None:
    swap(chain.layer(1), chain.layer(2))


def record_of_the_other_snapshot(chain: Chain) -> None:
    shutil.copy(chain.record.with_name(chain.snapshots[0]), chain.record)


def record_of_cipher_none(chain: Chain) -> None:
    record = parse_record(chain.record.read_bytes(), file="record")
    body = replace(record.body(), cipher=Cipher.NONE)
    signed = body.encode() + split_signed(record.signed, file="record")[1]
    resource = replace(record.resource, cipher=Cipher.NONE)
    chain.record.write_bytes(encode_record(Record(resource, None, signed, record.authority, record.origin)))


def missing_record(chain: Chain) -> None:
    chain.record.unlink()


def record_is_a_device(chain: Chain) -> None:
    chain.record.unlink()
    os.mknod(chain.record, 0o600 | stat.S_IFCHR, os.makedev(1, 5))


SNAPSHOT_CASES = tuple(
    SnapshotCase(edit.__name__.replace("_", " "), code, edit, refused)
    for edit, code, refused in (
        (flipped_bit_in_the_map, "map-damaged", True),
        (truncated_map, "map-damaged", True),
        (map_of_another_snapshot, "map-damaged", True),
        (map_that_inflates_without_end, "map-damaged", True),
        (map_of_a_size_of_2_to_the_63, "map-damaged", True),
        (entry_of_an_unknown_layer, "map-entry", True),
        (entry_of_a_reserved_value, "map-entry", True),
        (entry_of_the_head_of_the_volume, "map-entry", True),
        (entry_made_a_hole, "map-unsigned", True),
        (entry_of_a_chunk_without_data, "data-missing", True),
        # Layers are opened when they are read: what is wrong with one is met there, and found here before.
        (missing_layer, "layer-missing", False),
        (truncated_layer, "layer-damaged", False),
        (layer_punched, "data-missing", False),
        (symbolic_link_for_a_layer, "not-a-file", False),
        (swapped_layers, "data-missing", False),
        (record_of_the_other_snapshot, "record-foreign", True),
        (record_of_cipher_none, "record-disagrees", True),
        (missing_record, "record-missing", True),
        (record_is_a_device, "not-a-file", True),
    )
)
