"""Verification before an attachment: what is believed, and each thing that is refused, with its reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from ebsd.crypto.kdf import key_check_value
from ebsd.crypto.secret import Secret
from ebsd.domain.errors import IntegrityFailure, RecordTooOld
from ebsd.domain.geometry import chunk_count
from ebsd.domain.ids import AccountId, KeyArn, LineageId, SnapshotId, VolumeId
from ebsd.domain.model import Cipher
from ebsd.domain.units import CHUNK, MIB, SECTOR
from ebsd.store.entries import entry_bytes, map_hash
from ebsd.store.layertable import LayerEntry, LayerTable
from ebsd.store.record import Record, Resource, WrappedKey
from ebsd.store.signedrecord import NO_HASH, UNSIGNED, RecordState, SignedBody, born
from ebsd.volume.keysession import Anchor
from ebsd.volume.verify import Claim, next_body, sign, verify

VOLUME = VolumeId("vol-0123456789abcdef0")
SOURCE = VolumeId("vol-11111111111111111")
SNAPSHOT = SnapshotId("snap-22222222222222222")
OTHER = VolumeId("vol-33333333333333333")
LINEAGE = LineageId("6ba7b810-9dad-41d1-80b4-00c04fd430c8")
OTHER_LINEAGE = LineageId("00000000-0000-4000-8000-000000000001")
OWNER = AccountId("000000001000")
SOMEBODY = AccountId("000000001001")
KEY_ARN = KeyArn("arn:aws:kms:local:000000001000:key/11111111-2222-4333-8444-555555555555")
OTHER_ARN = KeyArn("arn:aws:kms:local:000000001000:key/00000000-0000-4000-8000-000000000000")
SIZE = 2 * MIB
CHUNKS = SIZE // CHUNK
XTS, PLAIN = Cipher.AES_256_XTS, Cipher.NONE


@pytest.fixture(params=[XTS, PLAIN], ids=["encrypted", "unencrypted"])
def cipher(request) -> Cipher:
    return request.param


@dataclass
class Case:
    """All that a verification looks at; a test changes one thing and looks what is said."""

    key: Secret | None
    claim: Claim
    anchor: Anchor
    body: SignedBody
    table: LayerTable
    entries: memoryview
    authority: SignedBody | None = None
    wrong_mac: str = ""
    signing_key: Secret | None = None
    record_id: str = VOLUME
    raw_authority: bytes | None = None
    raw_signed: bytes | None = None
    patches: dict[int, int] = field(default_factory=dict)

    def signed(self, body: SignedBody, what: str) -> bytes:
        if body.state is RecordState.BORN:
            return born(body)
        signed = sign(body, self.signing_key or self.key)
        return signed[:-1] + bytes([signed[-1] ^ 1]) if self.wrong_mac == what else signed

    def verify(self):
        for chunk, layer in self.patches.items():
            self.entries[chunk] = layer
        wrapped = WrappedKey(KEY_ARN, b"blob") if self.key is not None else None
        resource = Resource(
            VolumeId(self.record_id), OWNER, "ada", LINEAGE, SECTOR, self.claim.cipher, SIZE, "2026-01-01T00:00:00Z", ""
        )
        authority = self.raw_authority
        if self.authority is not None:
            authority = self.signed(self.authority, "authority")
        signed = self.raw_signed or self.signed(self.body, "record")
        record = Record(resource, wrapped, signed, authority)
        return verify(self.claim, self.anchor, self.key, record, self.table, self.entries)

    def refused(self) -> str:
        with pytest.raises(IntegrityFailure) as caught:
            self.verify()
        assert caught.value.facts["resource"] == VOLUME
        return str(caught.value.facts["reason"])


def table_of(layers: int, cipher: Cipher, *, lineage: LineageId = LINEAGE, first: int = 1) -> LayerTable:
    entries = tuple(LayerEntry(n, bytes([first + n]) * 16, VOLUME) for n in range(1, layers + 1))
    return LayerTable(lineage, SECTOR, cipher, entries)


def entries_of(named: dict[int, int], chunks: int = CHUNKS) -> memoryview:
    entries = memoryview(bytearray(entry_bytes(chunks))).cast("I")
    for chunk, layer in named.items():
        entries[chunk] = layer
    return entries


def base(cipher: Cipher, **body: Any) -> Case:
    """A volume that was detached cleanly: head 3, two sealed layers under it."""
    key = Secret.random(64) if cipher is XTS else None
    table = table_of(3, cipher)
    entries = entries_of({0: 3, 1: 1, 7: 2})
    values: dict[str, Any] = {
        "state": RecordState.CLEAN, "resource": VOLUME, "lineage": LINEAGE, "account": OWNER, "size": SIZE,
        "cipher": cipher, "generation": 4, "head": 3, "table_count": 3, "table_hash": table.prefix_hash(3),
        "map_hash": map_hash(entries, CHUNKS),
    }  # fmt: skip
    return Case(
        key=key,
        claim=Claim(VOLUME, OWNER, LINEAGE, SIZE, 3, cipher, KEY_ARN if key else None),
        anchor=Anchor(
            VOLUME, OWNER, key is not None, KEY_ARN if key else None, key_check_value(key) if key else None, 4
        ),
        body=SignedBody(**{**values, **body}),
        table=table,
        entries=entries,
    )


def opened(cipher: Cipher) -> Case:
    return base(cipher, state=RecordState.OPEN, map_hash=NO_HASH)


def new(cipher: Cipher) -> Case:
    """A volume that was just made, empty."""
    case = base(cipher, state=RecordState.BORN, generation=0, map_hash=NO_HASH)
    case.anchor = replace(case.anchor, floor=0, key_check_value=None)
    case.entries = entries_of({})
    return case


def restored(cipher: Cipher, state: RecordState = RecordState.CLEAN) -> Case:
    """A volume made from a snapshot: layers 1 and 2 are the source's, 3 is its own head."""
    case = new(cipher)
    case.entries = entries_of({0: 2, 1: 1, 7: 2})
    clean = state is RecordState.CLEAN
    case.authority = replace(
        case.body, resource=SNAPSHOT, state=state, generation=1, head=0, table_count=2,
        table_hash=case.table.prefix_hash(2), map_hash=map_hash(case.entries, CHUNKS) if clean else NO_HASH,
    )  # fmt: skip
    case.claim = replace(case.claim, sources=frozenset({SNAPSHOT, SOURCE}))
    return case


# --- what is believed


def test_a_volume_that_was_detached_cleanly_is_verified(cipher):
    case = base(cipher)
    verdict = case.verify()
    assert (verdict.body, verdict.unverified, verdict.blank) == (case.body, False, False)


def test_a_volume_that_was_not_detached_is_unverified(cipher):
    verdict = opened(cipher).verify()
    assert (verdict.unverified, verdict.blank) == (True, False)


def test_a_new_volume_is_blank(cipher):
    verdict = new(cipher).verify()
    assert (verdict.body.generation, verdict.unverified, verdict.blank) == (0, False, True)


def test_a_restored_volume_is_verified_by_the_record_of_its_snapshot(cipher):
    verdict = restored(cipher).verify()
    assert (verdict.body.state, verdict.unverified, verdict.blank) == (RecordState.BORN, False, False)


def test_a_restored_volume_may_carry_the_record_of_the_volume_that_the_snapshot_was_taken_of(cipher):
    case = restored(cipher)
    case.authority = replace(case.authority, resource=SOURCE, head=2, generation=9)
    assert not case.verify().unverified


def test_a_restored_volume_whose_source_was_not_detached_is_unverified(cipher):
    case = restored(cipher, RecordState.OPEN)
    case.authority = replace(case.authority, resource=SOURCE, head=2, generation=9)
    assert case.verify().unverified


def test_an_authority_is_not_older_than_when_the_volume_was_made(cipher):
    case = restored(cipher)
    case.authority = replace(case.authority, resource=SOURCE, head=2, generation=9)
    case.anchor = replace(case.anchor, authority=SOURCE, authority_floor=9)
    assert not case.verify().unverified
    case.authority = replace(case.authority, generation=8)
    with pytest.raises(RecordTooOld, match="generation 8, but generation 9 was already reached"):
        case.verify()
    case.anchor = replace(case.anchor, authority=SNAPSHOT)  # says nothing of another resource's generations
    assert not case.verify().unverified


def test_a_restored_volume_may_be_larger_than_its_source(cipher):
    case = restored(cipher)
    case.claim = replace(case.claim, size=2 * SIZE)
    case.body = replace(case.body, size=2 * SIZE)
    case.entries = entries_of({0: 2, 1: 1, 7: 2}, 2 * CHUNKS)
    assert not case.verify().unverified
    case.patches = {CHUNKS: 1}
    assert case.refused() == "its map is not the one its record was signed over"


def test_a_snapshot_of_holes_needs_no_authority(cipher):
    case = new(cipher)
    case.claim = replace(case.claim, sources=frozenset({SNAPSHOT, SOURCE}))
    assert case.verify().blank


def test_the_restored_volume_is_signed_like_any_other_after_its_first_attachment(cipher):
    case = restored(cipher)
    body = next_body(case.verify().body, case.claim, case.table, RecordState.OPEN, NO_HASH)
    case.body, case.authority = body, None
    assert (body.generation, body.table_count) == (1, 3)
    assert case.verify().unverified
    case.body = next_body(body, case.claim, case.table, RecordState.CLEAN, map_hash(case.entries, CHUNKS))
    assert not case.verify().unverified


def test_layers_that_came_after_the_signature_are_no_finding(cipher):
    case = base(cipher)
    case.table = replace(case.table, layers=(*case.table.layers, LayerEntry(4, bytes([9]) * 16, OTHER)))
    case.claim = replace(case.claim, head=4)
    assert not case.verify().unverified


def test_a_volume_that_has_grown_since_its_signature_has_holes_there(cipher):
    case = base(cipher)
    case.claim = replace(case.claim, size=2 * SIZE)
    case.entries = entries_of({0: 3, 1: 1, 7: 2}, 2 * CHUNKS)
    assert not case.verify().unverified
    case.patches = {2 * CHUNKS - 1: 2}
    assert case.refused() == "its map is not the one its record was signed over"


@pytest.mark.parametrize("make", [base, opened, new, restored])
def test_a_map_that_grew_before_the_catalog_did_is_no_finding(cipher, make):
    case = make(cipher)
    longer = entries_of({}, 5000)
    longer[: len(case.entries)] = case.entries
    case.entries = longer
    case.verify()
    case.patches = {1024: 1}  # the first one behind the page that the size needs
    assert case.refused() == f"its map is not that of a volume of {SIZE} bytes"


def test_the_floor_is_the_oldest_generation_that_is_believed(cipher):
    case = base(cipher)
    case.anchor = replace(case.anchor, floor=5)
    with pytest.raises(RecordTooOld):
        case.verify()
    for make in (new, restored):
        case = make(cipher)
        case.anchor = replace(case.anchor, floor=1)
        with pytest.raises(RecordTooOld):
            case.verify()


# --- what is refused

Change = Callable[[Case], None]


def claim(**changes: Any) -> Change:
    return lambda case: setattr(case, "claim", replace(case.claim, **changes))


def anchor(**changes: Any) -> Change:
    return lambda case: setattr(case, "anchor", replace(case.anchor, **changes))


def body(**changes: Any) -> Change:
    return lambda case: setattr(case, "body", replace(case.body, **changes))


def authority(**changes: Any) -> Change:
    return lambda case: setattr(case, "authority", replace(case.authority, **changes))


def entries(named: dict[int, int]) -> Change:
    return lambda case: case.patches.update(named)


def put(**changes: Any) -> Change:
    def change(case: Case) -> None:
        for name, value in changes.items():
            setattr(case, name, value)

    return change


def raw(name: str, at: int, value: bytes) -> Change:
    """Bytes of a signed record that do not parse; signed as they are, so that it is the parser that refuses."""

    def change(case: Case) -> None:
        source = case.body if name == "raw_signed" else case.authority
        encoded = source.encode()
        encoded = encoded[:at] + value + encoded[at + len(value) :]
        signature = sign(_Bytes(encoded), case.key)  # type: ignore[arg-type]
        case.authority = None if name == "raw_authority" else case.authority
        setattr(case, name, signature)

    return change


class _Bytes:
    def __init__(self, encoded: bytes) -> None:
        self._encoded = encoded

    def encode(self) -> bytes:
        return self._encoded


EVERYBODY = (base, opened, new, restored)

REFUSALS: list[tuple[str, tuple[Callable[[Cipher], Case], ...], Change]] = [
    # the anchor
    (f"the key service answered for {OTHER}", EVERYBODY, anchor(resource=OTHER)),
    (f"the catalog says it belongs to {OWNER}, the key service to {SOMEBODY}", EVERYBODY, anchor(owner=SOMEBODY)),
    # the record
    ("the signature of its record is not valid under its data key", (base, opened), put(wrong_mac="record")),
    (f"its record is that of {OTHER}", (base, opened, new), body(resource=OTHER)),
    (f"its record is that of {VOLUME}", EVERYBODY, put(record_id=OTHER)),
    ("its record and the catalog disagree about its owner", EVERYBODY, body(account=SOMEBODY)),
    ("its record and the catalog disagree about its lineage", EVERYBODY, body(lineage=OTHER_LINEAGE)),
    (f"the catalog says {SIZE} bytes, but its record {2 * SIZE}", EVERYBODY, body(size=2 * SIZE)),
    ("its record is neither signed nor that of a new resource", (base, opened), lambda c: setattr(
        c, "raw_signed", c.body.encode() + UNSIGNED)),
    ("its record is neither signed nor that of a new resource", (new, restored), lambda c: setattr(
        c, "raw_signed", sign(c.body, c.key))),
    ("record is damaged: its signed record is none", (base, opened), raw("raw_signed", 0, b"EBSDSIG2")),
    ("record has version 2 of the signed record, which this version does not know", (base, opened),
     raw("raw_signed", 8, b"\2\0")),
    # the table
    ("its layer table is that of another lineage or cipher", EVERYBODY, lambda c: setattr(
        c, "table", table_of(3, c.claim.cipher, lineage=OTHER_LINEAGE))),
    ("its layer table is that of another lineage or cipher", EVERYBODY, lambda c: setattr(
        c, "table", table_of(3, PLAIN if c.claim.cipher is XTS else XTS))),
    ("its layer table has 2 layers, its record 3", EVERYBODY, lambda c: setattr(
        c, "table", table_of(2, c.claim.cipher))),
    ("its layer table is not the one its record was signed over", EVERYBODY, lambda c: setattr(
        c, "table", table_of(3, c.claim.cipher, first=9))),
    ("the catalog names layer 2 as its head, its record layer 3", (base, opened, new), claim(head=2)),
    ("its head layer 4 is not in the layer table", EVERYBODY, claim(head=4)),
    # the map
    (f"its map is not that of a volume of {SIZE} bytes", EVERYBODY, put(entries=memoryview(bytearray(0)).cast("I"))),
    (f"its map is not that of a volume of {1100 * CHUNK} bytes", EVERYBODY, claim(size=1100 * CHUNK)),
    ("it was never opened for writing, but its map names data", (new,), entries({3: 3})),
    ("it was never opened for writing, but its map names data", (new,), entries({CHUNKS - 1: 1})),
    ("its map is damaged: chunk 5 names the unknown layer 0x4", (base, opened), entries({5: 4})),
    ("its map is damaged: chunk 5 names the reserved value 0xffffff00", (base, opened, restored),
     entries({5: 0xFFFFFF00})),
    ("its map is damaged: it has entries behind its last chunk", (base, opened, restored), entries({CHUNKS: 1})),
    ("its map is not the one its record was signed over", (base,), entries({0: 1})),
    ("its map is not the one its record was signed over", (base,), entries({0: 0})),
    # the authority
    ("its record is signed and carries an authority, too", (base, opened), lambda c: setattr(
        c, "authority", restored(c.claim.cipher).authority)),
    ("the signature of its authority is not valid under its data key", (restored,), put(wrong_mac="authority")),
    ("its authority is signed by nobody", (restored,), authority(
        state=RecordState.BORN, generation=0, map_hash=NO_HASH)),
    (f"its authority is {OTHER}, from which it was not made", (restored,), authority(resource=OTHER, head=2)),
    (f"its authority is {VOLUME}, from which it was not made", (restored,), authority(resource=VOLUME, head=2)),
    (f"its authority is {SNAPSHOT}, from which it was not made", (restored,), claim(sources=frozenset())),
    (f"its authority is {SNAPSHOT}, from which it was not made", (restored,), claim(sources=frozenset({SOURCE}))),
    ("its authority and the catalog disagree about its owner", (restored,), authority(account=SOMEBODY)),
    ("its authority and the catalog disagree about its lineage", (restored,), authority(lineage=OTHER_LINEAGE)),
    (f"the catalog says {SIZE} bytes, but its authority {2 * SIZE}", (restored,), authority(size=2 * SIZE)),
    ("its head is layer 3, which its authority knows as another volume's", (restored,), authority(table_count=3)),
    ("its layer table is not the one its authority was signed over", (restored,), authority(table_hash=bytes(32))),
    ("its map is damaged: chunk 5 names the unknown layer 0x3", (restored,), entries({5: 3})),
    ("its map is not the one its record was signed over", (restored,), entries({0: 1})),
    ("its map is not the one its record was signed over", (restored,), entries({0: 0})),
    ("its map is not the one its record was signed over", (restored,), authority(map_hash=bytes([7]) * 32)),
    ("it was never opened for writing, but its map names data", (restored,), put(authority=None)),
    ("record is damaged: its signed record is none", (restored,), raw("raw_authority", 0, b"EBSDSIG2")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("reason", "make", "change"),
    [
        pytest.param(reason, make, change, id=f"{reason}-{make.__name__}")
        for reason, makes, change in REFUSALS
        for make in makes
    ],
)
def test_what_is_refused(cipher, reason, make, change):
    case = make(cipher)
    case.verify()  # and nothing is wrong but for the change
    change(case)
    assert case.refused() == reason


ENCRYPTED_REFUSALS: list[tuple[str, Change]] = [
    ("the catalog says it is encrypted, but the key service knows it as unencrypted", anchor(encrypted=False)),
    ("the catalog says it is unencrypted, but the key service knows it as encrypted", claim(cipher=PLAIN)),
    ("the key service answered with the wrong kind of key", put(key=None)),
    (f"it is anchored to {OTHER_ARN}, but the catalog names {KEY_ARN}", anchor(key_arn=OTHER_ARN)),
    (f"it is anchored to None, but the catalog names {KEY_ARN}", anchor(key_arn=None)),
]


@pytest.mark.parametrize("make", EVERYBODY)
@pytest.mark.parametrize(("reason", "change"), ENCRYPTED_REFUSALS, ids=[r[:40] for r, _ in ENCRYPTED_REFUSALS])
def test_what_is_refused_of_an_encrypted_volume(reason, change, make):
    case = make(XTS)
    change(case)
    assert case.refused() == reason


@pytest.mark.parametrize("make", EVERYBODY)
def test_another_data_key_than_the_one_it_was_made_with_is_refused(make):
    case = make(XTS)
    with Secret.random(64) as other:
        case.anchor = replace(case.anchor, key_check_value=key_check_value(other))
        assert case.refused() == "its wrapped key opens to another data key than the one it was made with"


@pytest.mark.parametrize("make", [base, opened, restored])
def test_a_record_that_another_key_signed_is_refused(make):
    case = make(XTS)
    case.signing_key = Secret.random(64)
    what = "authority" if make is restored else "record"
    assert case.refused() == f"the signature of its {what} is not valid under its data key"


def test_a_key_for_an_unencrypted_volume_is_refused():
    case = base(PLAIN)
    case.key = Secret.random(64)
    assert case.refused() == "the key service answered with the wrong kind of key"


@pytest.mark.parametrize("make", [base, opened, restored])
def test_a_checksum_is_no_signature(make):
    """What an unencrypted volume has in the place of a MAC does not open an encrypted one."""
    case = make(XTS)
    target = case.body if case.authority is None else case.authority
    signed = sign(target, None)
    if case.authority is None:
        case.raw_signed = signed
    else:
        case.authority, case.raw_authority = None, signed
    assert "is not valid under its data key" in case.refused()


@pytest.mark.parametrize("what", ["record", "authority"])
def test_ciphers_that_disagree(what):
    case = restored(XTS)
    if what == "record":
        case.body = replace(case.body, cipher=PLAIN)
    else:
        case.authority = replace(case.authority, cipher=PLAIN)
    assert case.refused() == f"its {what} and the catalog disagree about its cipher"


def test_records_of_a_wrong_length_are_refused():
    for name in ("raw_signed", "raw_authority"):
        case = restored(XTS)
        if name == "raw_authority":
            case.authority = None
        setattr(case, name, bytes(319))
        assert "319 bytes instead of 320" in case.refused()


def test_the_sizes_of_the_cases():
    assert chunk_count(SIZE) == CHUNKS == 32


def test_what_follows_an_accepted_rollback_is_above_all_that_was_given_up() -> None:
    case = base(XTS)
    body = case.verify().body
    following = next_body(body, case.claim, case.table, RecordState.OPEN, NO_HASH, above=9)
    assert (body.generation, following.generation) == (4, 10)
    assert next_body(following, case.claim, case.table, RecordState.OPEN, NO_HASH, above=9).generation == 11
