"""The files of the store: what was written reads back, and every other byte is refused with one of two errors."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import random
import re
import struct
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ebsd.store
from ebsd.domain.errors import StoreDamaged, UnsupportedFormat
from ebsd.domain.ids import AccountId, KeyArn, LineageId, SnapshotId, VolumeId
from ebsd.domain.model import Cipher
from ebsd.domain.units import CHUNK, GIB, TIB
from ebsd.store.disk import RealDisk
from ebsd.store.durablemap import DurableMap, MapHeader, encode_map_header, parse_map_header
from ebsd.store.entries import check_map_structure, is_all_holes, map_hash, named_layers
from ebsd.store.layertable import (
    LayerEntry,
    LayerTable,
    append_layer,
    create_layer_table,
    encode_entry,
    encode_header,
    encode_table,
    parse_layer_table,
    read_layer_table,
)
from ebsd.store.record import (
    Origin,
    Record,
    Resource,
    WrappedKey,
    encode_record,
    parse_record,
    read_record,
    write_record,
)
from ebsd.store.signedrecord import (
    SIGNED_BYTES,
    UNSIGNED,
    RecordState,
    SignedBody,
    born,
    parse_signed,
    split_signed,
)

LINEAGE = LineageId("6ba7b810-9dad-41d1-80b4-00c04fd430c8")
VOLUME = VolumeId("vol-0123456789abcdef0")
MAC = bytes(range(1, 65))
DISK = RealDisk()
REFUSED = (StoreDamaged, UnsupportedFormat)

BODY = SignedBody(
    state=RecordState.CLEAN, resource=VOLUME, lineage=LINEAGE, account=AccountId("000000001000"), size=10 * GIB,
    cipher=Cipher.AES_256_XTS, generation=7, head=3, table_count=3, table_hash=bytes([2]) * 32,
    map_hash=bytes([3]) * 32, leaf_root=bytes([4]) * 32,
)  # fmt: skip
RESOURCE = Resource(
    id=VOLUME, account=AccountId("000000001000"), owner="ada", lineage=LINEAGE, sector_size=4096,
    cipher=Cipher.AES_256_XTS, size=10 * GIB, created="2026-01-02T03:04:05Z", name="dätå",
)  # fmt: skip
KEY = WrappedKey(
    KeyArn("arn:aws:kms:local:000000001000:key/1234abcd-12ab-34cd-56ef-1234567890ab"),
    b"blob" * 40,
    {"aws:ebs:id": VOLUME},
)
RECORD = Record(RESOURCE, KEY, BODY.encode() + MAC)


def resummed(raw: bytes) -> bytes:
    return raw[:-32] + hashlib.sha256(raw[:-32]).digest()


# --- signed record


def test_a_signed_body_reads_back_and_has_its_documented_offsets():
    raw = BODY.encode()
    assert len(raw) == 256
    assert SignedBody.parse(raw, file="f") == BODY
    assert raw[:8] == b"EBSDSIG1"
    assert struct.unpack_from("<HHII", raw, 8) == (1, 2, 0, 320)
    assert raw[20:44] == VOLUME.encode().ljust(24, b"\0")
    assert raw[60:72] == b"000000001000"
    assert struct.unpack_from("<QIIQIII", raw, 72)[:4] == (10 * GIB, 4096, 1, 7)
    assert struct.unpack_from("<II", raw, 96) == (3, 3)
    assert raw[104:136] == BODY.table_hash
    assert raw[136:168] == BODY.map_hash
    assert raw[172:204] == BODY.leaf_root


@pytest.mark.parametrize(
    ("at", "raw", "words"),
    [
        (8, b"\x02\x00", "version 2"),
        (10, b"\x03\x00", "record state 3"),
        (12, b"\x01", "feature flags"),
        (80, b"\x00\x02", "sector size 512"),
        (84, b"\x09", "cipher 9"),
        (168, b"\x02", "raw access 2"),
    ],
)
def test_what_a_newer_version_may_have_written_is_refused_by_name(at, raw, words):
    body = bytearray(BODY.encode())
    body[at : at + len(raw)] = raw
    with pytest.raises(UnsupportedFormat, match=words):
        SignedBody.parse(bytes(body), file="f")


def test_every_reserved_byte_of_a_signed_body_must_be_zero():
    for at in range(204, 256):
        body = bytearray(BODY.encode())
        body[at] = 1
        with pytest.raises(StoreDamaged):
            SignedBody.parse(bytes(body), file="f")


@pytest.mark.parametrize(
    "change",
    [
        {"generation": 0},
        {"generation": 2**64},
        {"map_hash": bytes(32)},
        {"state": RecordState.OPEN},
        {"state": RecordState.BORN},
        {"account": AccountId("1000")},
        {"account": AccountId("00000000100x")},
        {"account": AccountId("٠" * 12)},
        {"resource": VolumeId("vol-0123")},
        {"resource": VolumeId("../../etc/passwd")},
        {"size": 4097 * 1024},
        {"size": 0},
        {"leaf_root": b""},
        {"state": RecordState.OPEN, "map_hash": bytes(32), "leaf_root": bytes([4]) * 32},
        {"head": 0},
        {"head": 0xFFFFFF00},
        {"table_hash": b""},
        {"lineage": LineageId("x")},
        {"sector_size": 512},
    ],
)
def test_a_signed_body_that_breaks_a_rule_cannot_be_made(change):
    with pytest.raises(ValueError, match="no signed body"):
        replace(BODY, **change)


def test_a_snapshot_has_no_head():
    snapshot = replace(BODY, resource=SnapshotId("snap-0123456789abcdef0"), head=0)
    assert SignedBody.parse(snapshot.encode(), file="f") == snapshot


def test_every_changed_byte_of_a_signed_record_is_refused_or_another_value():
    raw = BODY.encode() + MAC
    dice = random.Random(1)
    for at in range(256):
        for flip in {1, 0x80, dice.randrange(1, 256)}:
            changed = bytearray(raw)
            changed[at] ^= flip
            with contextlib.suppress(*REFUSED):
                assert parse_signed(bytes(changed), file="f").encode() == changed[:256]


def test_a_born_record_has_no_signature_and_a_signed_one_has():
    fresh = replace(BODY, state=RecordState.BORN, generation=0, map_hash=bytes(32), leaf_root=bytes(32))
    raw = born(fresh)
    assert split_signed(raw, file="f") == (fresh.encode(), UNSIGNED)
    assert parse_signed(raw, file="f") == fresh
    for wrong in (fresh.encode() + MAC, BODY.encode() + UNSIGNED, raw[:-1], raw + b"\0", b""):
        with pytest.raises(StoreDamaged):
            parse_signed(wrong, file="f")
    with pytest.raises(ValueError):
        born(BODY)


# --- record file


def test_a_record_reads_back(tmp_path):
    authority = replace(BODY, resource=SnapshotId("snap-0123456789abcdef0"), head=0).encode() + MAC
    for record in (RECORD, replace(RECORD, authority=authority)):
        assert parse_record(encode_record(record), file="f") == record
    write_record(DISK, tmp_path / "r", RECORD)
    write_record(DISK, tmp_path / "r", RECORD)
    assert read_record(DISK, tmp_path / "r") == RECORD
    assert os.listdir(tmp_path) == ["r"]
    assert (tmp_path / "r").stat().st_mode & 0o777 == 0o600
    assert record.body().generation == 7


def test_an_unencrypted_record_has_no_wrapped_key_and_an_encrypted_one_has():
    plain = Record(replace(RESOURCE, cipher=Cipher.NONE), None, replace(BODY, cipher=Cipher.NONE).encode() + MAC)
    assert parse_record(encode_record(plain), file="f") == plain
    for wrong in (replace(plain, wrapped_key=KEY), replace(RECORD, wrapped_key=None)):
        with pytest.raises(ValueError, match="disagree"):
            encode_record(wrong)


@pytest.mark.parametrize(
    "change",
    [
        {"id": VolumeId("vol-0123456789abcdef1")},
        {"account": AccountId("000000000000")},
        {"lineage": LineageId("6ba7b811-9dad-41d1-80b4-00c04fd430c8")},
        {"size": 11 * GIB},
    ],
)
def test_a_record_that_contradicts_its_signed_part_is_refused(change):
    with pytest.raises(ValueError, match="disagree"):
        encode_record(replace(RECORD, resource=replace(RESOURCE, **change)))


def test_every_changed_byte_of_a_record_is_refused():
    raw = encode_record(RECORD)
    for at in range(len(raw)):
        for flip in (1, 0x40, 0xFF):
            changed = bytearray(raw)
            changed[at] ^= flip
            with pytest.raises(REFUSED):
                parse_record(changed, file="f")
    for length in range(len(raw)):
        with pytest.raises(REFUSED):
            parse_record(raw[:length], file="f")
    with pytest.raises(REFUSED):
        parse_record(raw + b"\0", file="f")


def test_every_changed_byte_of_a_record_with_a_right_checksum_gives_only_the_two_errors():
    raw = encode_record(RECORD)
    dice = random.Random(2)
    for at in range(len(raw) - 32):
        for flip in (1, 0x40, dice.randrange(1, 256)):
            changed = bytearray(raw)
            changed[at] ^= flip
            changed = resummed(bytes(changed))
            try:
                record = parse_record(changed, file="f")
            except REFUSED:
                continue
            assert encode_record(record) == changed


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=600))
def test_any_bytes_in_place_of_the_sections_give_only_the_two_errors(body):
    front = struct.pack("<8sII", b"EBSDREC1", 1, 16 + len(body) + 32) + body
    with pytest.raises(REFUSED):
        parse_record(front + hashlib.sha256(front).digest(), file="f")


def with_sections(*sections: tuple[int, bytes], version: int = 1) -> bytes:
    body = b"".join(struct.pack("<HHI", k, 0, len(d)) + d + bytes(-len(d) % 8) for k, d in sections)
    front = struct.pack("<8sII", b"EBSDREC1", version, 16 + len(body) + 32) + body
    return front + hashlib.sha256(front).digest()


def resource_json(**changes: object) -> bytes:
    value = {
        "id": VOLUME, "account": "000000001000", "owner": "ada", "lineage": LINEAGE, "sector_size": 4096, "cipher": 1,
        "size": 10 * GIB, "created": "2026-01-02T03:04:05Z", "name": "n",
    }  # fmt: skip
    value.update(changes)
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def key_json(**changes: object) -> bytes:
    value: dict[str, object] = {"key_arn": KEY.key_arn, "blob": base64.b64encode(b"x").decode(), "context": {}}
    value.update(changes)
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


SIGNED = BODY.encode() + MAC


def test_the_hand_made_record_of_the_next_tests_is_right():
    assert parse_record(with_sections((1, resource_json()), (2, key_json()), (3, SIGNED)), file="f")


@pytest.mark.parametrize(
    "sections",
    [
        [(1, resource_json()), (2, key_json())],
        [(2, key_json()), (3, SIGNED)],
        [(2, key_json()), (1, resource_json()), (3, SIGNED)],
        [(1, resource_json()), (1, resource_json()), (2, key_json()), (3, SIGNED)],
        [(1, resource_json()), (2, key_json()), (3, SIGNED), (5, b"new")],
        [(0, b""), (1, resource_json()), (2, key_json()), (3, SIGNED)],
        [(1, resource_json()), (2, key_json()), (3, SIGNED + b"\0")],
        [(1, resource_json()), (2, key_json()), (3, SIGNED), (4, b"")],
        [(1, resource_json() + b" "), (2, key_json()), (3, SIGNED)],
        [(1, b"[" * 50_000), (2, key_json()), (3, SIGNED)],
        [(1, b"9" * 50_000), (2, key_json()), (3, SIGNED)],
        [(1, b"\xff"), (2, key_json()), (3, SIGNED)],
        [(1, b""), (2, key_json()), (3, SIGNED)],
        [(1, b"null"), (2, key_json()), (3, SIGNED)],
        [(1, resource_json(extra=1)), (2, key_json()), (3, SIGNED)],
        [(1, resource_json(size=10.0 * GIB)), (2, key_json()), (3, SIGNED)],
        [(1, resource_json(size=float("nan"))), (2, key_json()), (3, SIGNED)],
        [(1, resource_json(cipher=True)), (2, key_json()), (3, SIGNED)],
        [(1, resource_json(cipher=3)), (2, key_json()), (3, SIGNED)],
        [(1, resource_json(name=None)), (2, key_json()), (3, SIGNED)],
        [(1, resource_json(name="\ud800")), (2, key_json()), (3, SIGNED)],
        [(1, resource_json()), (2, key_json(context={"a": 1})), (3, SIGNED)],
        [(1, resource_json()), (2, key_json(context=[])), (3, SIGNED)],
        [(1, resource_json()), (2, key_json(blob="eA")), (3, SIGNED)],
        [(1, resource_json()), (2, key_json(blob="eB==")), (3, SIGNED)],
        [(1, resource_json()), (2, key_json(blob="é")), (3, SIGNED)],
    ],
)
def test_a_record_with_wrong_sections_is_refused(sections):
    with pytest.raises(REFUSED):
        parse_record(with_sections(*sections), file="f")


def test_the_origin_of_a_resource_is_read_again_and_older_records_have_none() -> None:
    parsed = parse_record(with_sections((1, resource_json()), (2, key_json()), (3, SIGNED)), file="f")
    assert parsed.origin is None
    named = replace(parsed, origin=Origin("snap-0123456789abcdef0", "before the upgrade"))
    assert parse_record(encode_record(named), file="f") == named


def test_a_record_of_another_version_or_over_64_kib_is_refused(tmp_path):
    good = ((1, resource_json()), (2, key_json()), (3, SIGNED))
    with pytest.raises(UnsupportedFormat, match="version 2"):
        parse_record(with_sections(*good, version=2), file="f")
    with pytest.raises(ValueError):
        encode_record(replace(RECORD, wrapped_key=replace(KEY, blob=bytes(64 * 1024))))
    (tmp_path / "r").write_bytes(bytes(64 * 1024 + 1))
    with pytest.raises(StoreDamaged):
        read_record(DISK, tmp_path / "r")


# --- layer table

UUIDS = [bytes([n]) * 16 for n in range(1, 6)]
TABLE = LayerTable(LINEAGE, 4096, Cipher.AES_256_XTS, tuple(LayerEntry(n + 1, UUIDS[n], VOLUME) for n in range(4)))


def test_a_layer_table_reads_back_and_hashes_its_prefixes():
    raw = encode_table(TABLE)
    assert len(raw) == 64 * 5
    assert parse_layer_table(raw, file="f") == TABLE
    assert parse_layer_table(raw, file="f", count=2).layers == TABLE.layers[:2]
    for count in range(5):
        assert TABLE.prefix_hash(count) == hashlib.sha256(raw[: 64 * (count + 1)]).digest()
    with pytest.raises(ValueError):
        TABLE.prefix_hash(5)
    assert TABLE.uuid_of(3) == UUIDS[2]
    for number in (0, 5, -1):
        with pytest.raises(KeyError):
            TABLE.uuid_of(number)


def test_every_changed_byte_of_a_layer_table_is_refused():
    raw = encode_table(TABLE)
    for at in range(len(raw)):
        for flip in (1, 0x80):
            changed = bytearray(raw)
            changed[at] ^= flip
            with pytest.raises(REFUSED):
                parse_layer_table(changed, file="f")
    for length in range(len(raw)):
        if length % 64 or length == 0:
            with pytest.raises(REFUSED):
                parse_layer_table(raw[:length], file="f")


def slot(front: bytes) -> bytes:
    front = front.ljust(56, b"\0")
    return front + hashlib.sha256(front).digest()[:8]


@pytest.mark.parametrize(
    ("front", "error"),
    [
        (b"EBSDLTB2" + encode_header(TABLE)[8:56], StoreDamaged),
        (b"EBSDLTB1" + struct.pack("<I", 2) + encode_header(TABLE)[12:56], UnsupportedFormat),
        (encode_header(TABLE)[:12] + struct.pack("<I", 1) + encode_header(TABLE)[16:56], UnsupportedFormat),
        (encode_header(TABLE)[:32] + struct.pack("<I", 512) + encode_header(TABLE)[36:56], UnsupportedFormat),
        (encode_header(TABLE)[:36] + struct.pack("<I", 7), UnsupportedFormat),
        (encode_header(TABLE)[:55] + b"\1", StoreDamaged),
    ],
)
def test_a_wrong_header_of_a_layer_table_with_a_right_checksum_is_refused(front, error):
    with pytest.raises(error):
        parse_layer_table(slot(front), file="f")


@pytest.mark.parametrize(
    ("entry", "error"),
    [
        (struct.pack("<II16s24s", 2, 0, UUIDS[1], VOLUME.encode()), StoreDamaged),
        (struct.pack("<II16s24s", 1, 1, UUIDS[1], VOLUME.encode()), UnsupportedFormat),
        (struct.pack("<II16s24s", 1, 0, UUIDS[1], b"vol-x"), StoreDamaged),
        (struct.pack("<II16s24s", 1, 0, UUIDS[1], b"\xff"), StoreDamaged),
        (struct.pack("<II16s24s8s", 1, 0, UUIDS[1], VOLUME.encode(), b"1"), StoreDamaged),
    ],
)
def test_a_wrong_entry_with_a_right_checksum_is_refused(entry, error):
    with pytest.raises(error):
        parse_layer_table(encode_header(TABLE) + slot(entry), file="f")


def test_a_uuid_stands_in_a_table_only_once(tmp_path):
    twice = encode_header(TABLE) + encode_entry(TABLE.layers[0]) + encode_entry(LayerEntry(2, UUIDS[0], VOLUME))
    with pytest.raises(StoreDamaged, match="uuid"):
        parse_layer_table(twice, file="f")
    create_layer_table(DISK, tmp_path / "table", LINEAGE, Cipher.AES_256_XTS)
    append_layer(DISK, tmp_path / "table", TABLE.layers[0])
    with pytest.raises(StoreDamaged, match="uuid"):
        append_layer(DISK, tmp_path / "table", LayerEntry(2, UUIDS[0], VOLUME))


def test_an_append_can_be_repeated_after_any_tear(tmp_path):
    path = tmp_path / "table"
    create_layer_table(DISK, path, LINEAGE, Cipher.AES_256_XTS)
    append_layer(DISK, path, TABLE.layers[0])
    append_layer(DISK, path, TABLE.layers[1])
    assert append_layer(DISK, path, TABLE.layers[1]).layers == TABLE.layers[:2]
    whole = path.read_bytes()
    for kept in range(64):
        path.write_bytes(whole[: 128 + kept])
        assert read_layer_table(DISK, path, count=1).layers == TABLE.layers[:1]
        append_layer(DISK, path, TABLE.layers[1])
        assert path.read_bytes() == whole
        path.write_bytes(whole[: 128 + kept] + bytes(64 - kept))
        append_layer(DISK, path, TABLE.layers[1])
        assert path.read_bytes() == whole


def test_an_append_never_replaces_another_layer_and_leaves_no_gap(tmp_path):
    path = tmp_path / "table"
    create_layer_table(DISK, path, LINEAGE, Cipher.AES_256_XTS)
    append_layer(DISK, path, TABLE.layers[0])
    with pytest.raises(StoreDamaged, match="another"):
        append_layer(DISK, path, LayerEntry(1, UUIDS[4], VOLUME))
    with pytest.raises(StoreDamaged):
        append_layer(DISK, path, TABLE.layers[2])
    assert read_layer_table(DISK, path).layers == TABLE.layers[:1]


# --- durable map

HEADER = MapHeader(LINEAGE, VOLUME, 3, 1000)


def test_a_map_header_reads_back_and_fits_one_block():
    raw = encode_map_header(HEADER)
    assert len(raw) == 512
    assert parse_map_header(raw, file="f") == HEADER
    for at in range(512):
        changed = bytearray(raw)
        changed[at] ^= 0x10
        with pytest.raises(REFUSED):
            parse_map_header(changed, file="f")


@pytest.mark.parametrize(
    ("at", "raw", "error"),
    [
        (0, b"EBSDMAP2", StoreDamaged),
        (8, b"\x02", UnsupportedFormat),
        (12, b"\x01", UnsupportedFormat),
        (32, b"vol_", StoreDamaged),
        (56, b"\x02", UnsupportedFormat),
        (60, b"\x00", StoreDamaged),
        (60, b"\x00\xff\xff\xff", StoreDamaged),
        (64, bytes(8), StoreDamaged),
        (64, b"\xff" * 8, StoreDamaged),
        (100, b"\x01", StoreDamaged),
    ],
)
def test_a_wrong_map_header_with_a_right_checksum_is_refused(at, raw, error):
    changed = bytearray(encode_map_header(HEADER))
    changed[at : at + len(raw)] = raw
    with pytest.raises(error):
        parse_map_header(resummed(bytes(changed)), file="f")


def test_a_map_of_another_length_than_its_header_says_is_damage(tmp_path):
    DurableMap.create(DISK, tmp_path / "m", HEADER).close()
    for length in (8191, 8193, 4096, 100, 0):
        os.truncate(tmp_path / "m", length)
        with pytest.raises(StoreDamaged):
            DurableMap.open(DISK, tmp_path / "m")
        os.truncate(tmp_path / "m", 8192)


def test_the_map_hash_covers_label_count_and_entries_alone():
    entries = memoryview(bytearray(8192)).cast("I")
    entries[0], entries[1], entries[1500] = 1, 2, 3
    expected = hashlib.sha256(b"ebsd/1/map\0" + (1001).to_bytes(8, "little") + bytes(entries.cast("B")[:4004]))
    assert map_hash(entries, 1001) == expected.digest()
    assert map_hash(entries.cast("B"), 1001) == expected.digest()
    assert map_hash(entries, 1000) != map_hash(entries, 1001)


def test_the_structure_of_a_map_is_checked_entry_by_entry():
    entries = memoryview(bytearray(4096 * 40)).cast("I")
    for chunk in (0, 1023, 1024, 30_000):
        entries[chunk] = 2
    assert check_map_structure(entries, 40_000, {1, 2}, file="m") == {2}
    assert named_layers(entries) == {2}
    with pytest.raises(StoreDamaged, match="chunk 0 names the unknown layer 0x2"):
        check_map_structure(entries, 40_000, {1}, file="m")
    assert check_map_structure(entries, 40_000, {1}, file="m", head=2) == {2}
    with pytest.raises(StoreDamaged, match="behind its last chunk"):
        check_map_structure(entries, 30_000, {1, 2}, file="m")
    with pytest.raises(StoreDamaged, match="chunk 30000 has no data in layer 2"):
        check_map_structure(entries, 40_000, {2}, file="m", has_data=lambda layer, chunk: chunk != 30_000)
    entries[31_000] = 0xFFFFFF00
    with pytest.raises(StoreDamaged, match="chunk 31000 names the reserved value"):
        check_map_structure(entries, 40_000, {1, 2, 0xFFFFFF00 - 1}, file="m")


def test_one_entry_anywhere_makes_a_map_not_blank():
    for chunk in (0, 16_383, 16_384, 19_999):
        entries = memoryview(bytearray(80_000)).cast("I")
        assert is_all_holes(entries)
        entries[chunk] = 1 << 24
        assert not is_all_holes(entries)


# --- the sources


def test_no_map_module_packs_into_a_buffer():
    for path in (Path(ebsd.store.__file__).parent, Path(ebsd.store.__file__).parent.parent / "volume"):
        for source in path.glob("*.py"):
            assert re.search(r"\bpack_into\b", source.read_text()) is None, source
    assert SIGNED_BYTES == 320
    assert CHUNK < TIB


# --- FORMAT.md


def documented(name: str, length: int) -> bytes:
    """The bytes of a worked example; lines that are left out are zeros."""
    text = (Path(ebsd.store.__file__).parent / "FORMAT.md").read_text()
    (block,) = re.findall(rf"```hex {name}\n(.*?)```", text, flags=re.DOTALL)
    raw = bytearray(length)
    for line in block.splitlines():
        at, _, digits = line.partition("  ")
        raw[int(at, 16) : int(at, 16) + 16] = bytes.fromhex(digits)
    return bytes(raw)


def test_the_worked_examples_of_the_documentation_are_what_the_code_writes():
    table = parse_layer_table(documented("table", 128), file="f")
    assert table.layers == (LayerEntry(1, bytes(range(16)), VOLUME),)
    assert parse_map_header(documented("map", 512), file="f") == MapHeader(LINEAGE, VOLUME, 1, 16)
    signed = SignedBody.parse(documented("signed", 256), file="f")
    assert (signed.state, signed.generation, signed.size) == (RecordState.CLEAN, 2, 16 * CHUNK)
    entries = memoryview(bytearray(4096)).cast("I")
    entries[0] = entries[2] = 1
    assert signed.table_hash == table.prefix_hash(1)
    assert signed.map_hash == map_hash(entries, 16)
