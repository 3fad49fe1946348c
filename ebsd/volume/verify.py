"""Verification: does what lies in the store belong to this volume, and is it as new as the key service knows?

1. The anchor is the authority: it came from the key service, nobody who edits the store can change it.
2. The record is believed only after its MAC under the data key; the table and the map only after their digests
   in the record, or, after an unclean stop, after a check of their structure (``unverified``).
3. Every refusal names its reason and happens before any device exists.

Pure but for the key: bytes and values in, a verdict out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ebsd.crypto import record_mac
from ebsd.crypto.kdf import key_check_value
from ebsd.crypto.secret import Secret
from ebsd.domain.errors import IntegrityFailure, RecordTooOld, StoreDamaged, UnsupportedFormat
from ebsd.domain.geometry import chunk_count
from ebsd.domain.model import Cipher
from ebsd.store.entries import check_map_structure, entry_bytes, is_all_holes, map_hash
from ebsd.store.layertable import LayerTable
from ebsd.store.record import Record
from ebsd.store.signedrecord import UNSIGNED, RecordState, SignedBody, split_signed
from ebsd.volume.keysession import Anchor


@dataclass(frozen=True, slots=True)
class Claim:
    """What ebsd, from its catalog, says the volume is."""

    volume: str
    owner: str
    lineage: str
    size: int
    head: int
    cipher: Cipher
    key_arn: str | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """The record's body that was believed, and how far the map is covered by it."""

    body: SignedBody
    unverified: bool
    blank: bool


def verify(
    claim: Claim, anchor: Anchor, key: Secret | None, record: Record, table: LayerTable, entries: memoryview
) -> Verdict:
    """Return the verdict, or raise IntegrityFailure or RecordTooOld with the reason.

    ``entries`` are the entries of the durable map, u32 per chunk, whole pages.
    """
    _check_anchor(claim, anchor, key)
    body = _check_record(claim, anchor, key, record)
    _check_table(claim, body, table)
    unverified = _check_map(claim, body, table, entries)
    return Verdict(body, unverified, is_all_holes(entries))


def next_body(body: SignedBody, claim: Claim, table: LayerTable, state: RecordState, digest: bytes) -> SignedBody:
    """Return the body of the next signed write: one generation further, over the present table, head and size."""
    count = len(table.layers)
    return replace(
        body,
        state=state,
        size=claim.size,
        generation=body.generation + 1,
        head=claim.head,
        table_count=count,
        table_hash=table.prefix_hash(count),
        map_hash=digest,
    )


def sign(body: SignedBody, key: Secret | None) -> bytes:
    """Return the 320 bytes of the signed record; without a key, with a checksum that finds accidents only."""
    encoded = body.encode()
    return encoded + (record_mac.plain_checksum(encoded) if key is None else record_mac.sign(key, encoded))


def _refuse(claim: Claim, reason: str) -> IntegrityFailure:
    return IntegrityFailure(resource=claim.volume, reason=reason)


def _check_anchor(claim: Claim, anchor: Anchor, key: Secret | None) -> None:
    if anchor.resource != claim.volume:
        raise _refuse(claim, f"the key service answered for {anchor.resource}")
    if anchor.owner != claim.owner:
        raise _refuse(claim, f"the catalog says it belongs to {claim.owner}, the key service to {anchor.owner}")
    if anchor.encrypted is not (claim.cipher is not Cipher.NONE):
        kinds = {True: "encrypted", False: "unencrypted"}
        raise _refuse(
            claim,
            f"the catalog says it is {kinds[claim.cipher is not Cipher.NONE]}, "
            f"but the key service knows it as {kinds[anchor.encrypted]}",
        )
    if (key is None) is anchor.encrypted:
        raise _refuse(claim, "the key service answered with the wrong kind of key")
    if anchor.encrypted and anchor.key_arn != claim.key_arn:
        raise _refuse(claim, f"it is anchored to {anchor.key_arn}, but the catalog names {claim.key_arn}")
    if key is not None and anchor.key_check_value is not None and key_check_value(key) != anchor.key_check_value:
        raise _refuse(claim, "its wrapped key opens to another data key than the one it was made with")


def _check_record(claim: Claim, anchor: Anchor, key: Secret | None, record: Record) -> SignedBody:
    signed, mac = split_signed(record.signed, file="record")
    body = _parse(claim, signed)
    if body.resource != claim.volume or record.resource.id != claim.volume:
        raise _refuse(claim, f"its record is that of {body.resource}")
    if body.state is RecordState.BORN:
        if mac != UNSIGNED or body.generation != 0:
            raise _refuse(claim, "its record is neither signed nor that of a new volume")
    else:
        try:
            if key is None:
                record_mac.verify_plain(signed, mac)
            else:
                record_mac.verify(key, signed, mac)
        except record_mac.BadMac:
            raise _refuse(claim, "the signature of its record is not valid under its data key") from None
    if body.generation < anchor.floor:
        raise RecordTooOld(resource=claim.volume, generation=body.generation, floor=anchor.floor)
    for what, here, there in (
        ("owner", body.account, claim.owner),
        ("lineage", body.lineage, claim.lineage),
        ("cipher", body.cipher, claim.cipher),
    ):
        if here != there:
            raise _refuse(claim, f"its record and the catalog disagree about its {what}")
    if body.size > claim.size:
        raise _refuse(claim, f"the catalog says {claim.size} bytes, but its record {body.size}")
    if body.state is RecordState.BORN and record.authority is not None:
        raise _refuse(claim, "its record carries an authority that this version does not use")
    return body


def _parse(claim: Claim, signed: bytes) -> SignedBody:
    try:
        return SignedBody.parse(signed, file="record")
    except (StoreDamaged, UnsupportedFormat) as exc:
        raise _refuse(claim, exc.message) from exc


def _check_table(claim: Claim, body: SignedBody, table: LayerTable) -> None:
    if table.lineage != claim.lineage or table.cipher is not claim.cipher:
        raise _refuse(claim, "its layer table is that of another lineage or cipher")
    if len(table.layers) < body.table_count:
        raise _refuse(claim, f"its layer table has {len(table.layers)} layers, its record {body.table_count}")
    if table.prefix_hash(body.table_count) != body.table_hash:
        raise _refuse(claim, "its layer table is not the one its record was signed over")
    if claim.head != body.head and claim.head <= body.table_count:
        raise _refuse(claim, f"the catalog names layer {claim.head} as its head, its record layer {body.head}")
    if claim.head not in table.numbers():
        raise _refuse(claim, f"its head layer {claim.head} is not in the layer table")


def _check_map(claim: Claim, body: SignedBody, table: LayerTable, entries: memoryview) -> bool:
    chunks = chunk_count(claim.size)
    if len(entries.cast("B")) != entry_bytes(chunks):
        raise _refuse(claim, f"its map is not that of a volume of {claim.size} bytes")
    if body.state is RecordState.BORN:
        if not is_all_holes(entries):
            raise _refuse(claim, "it was never opened for writing, but its map names data")
        return False
    try:
        check_map_structure(entries, chunks, range(1, body.table_count + 1), file="map")
    except StoreDamaged as exc:
        raise _refuse(claim, f"its map is damaged: {exc.facts['reason']}") from exc
    if body.state is RecordState.OPEN:
        return True
    signed_chunks = chunk_count(body.size)
    raw = entries.cast("B")
    if map_hash(raw, signed_chunks) != body.map_hash or any(raw[signed_chunks * 4 :]):
        raise _refuse(claim, "its map is not the one its record was signed over")
    return False
