"""Verification: does what lies in the store belong to this volume, and is it as new as the key service knows?

1. The anchor is the authority: it came from the key service, nobody who edits the store can change it.
2. The record is believed only after its MAC under the data key; the table and the map only after their digests
   in the record, or, after an unclean stop, after a check of their structure (``unverified``).
3. A volume made from a snapshot and not opened for writing since has no signature of its own: its record carries the
   signed record of its source, under the same data key, which then covers table and map.
4. Every refusal names its reason and happens before any device exists.

Pure but for the key: bytes and values in, a verdict out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from ebsd.crypto import record_mac
from ebsd.crypto.kdf import key_check_value
from ebsd.crypto.secret import Secret
from ebsd.domain.errors import IntegrityFailure, RecordTooOld, StoreDamaged, UnsupportedFormat
from ebsd.domain.geometry import chunk_count
from ebsd.domain.model import Cipher
from ebsd.store.entries import ENTRY, check_map_structure, entry_bytes, is_all_holes, map_hash, named_layers
from ebsd.store.layertable import LayerTable
from ebsd.store.leaftable import LeafSlot, leaf_root
from ebsd.store.record import Record
from ebsd.store.signedrecord import NO_HASH, UNSIGNED, RecordState, SignedBody, split_signed
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
    sources: frozenset[str] = frozenset()
    """Ids that may stand in its authority: of the snapshot it was made from, and of the volume that was taken of."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The record's body that was believed, and how far the map is covered by it."""

    body: SignedBody
    unverified: bool
    blank: bool
    covering: SignedBody | None = None
    """The signed body that covers table, map and leaves: its own, or its authority's; None: nobody signed yet."""


def verify(
    claim: Claim, anchor: Anchor, key: Secret | None, record: Record, table: LayerTable, entries: memoryview
) -> Verdict:
    """Return the verdict, or raise IntegrityFailure or RecordTooOld with the reason.

    ``entries`` are the entries of the durable map, u32 per chunk, whole pages.
    """
    check_anchor(claim, anchor, key)
    body = _check_record(claim, anchor, key, record)
    covering = body if body.state is not RecordState.BORN else _check_authority(claim, anchor, key, record)
    _check_table(claim, body, table)
    if covering is not None and covering is not body:
        check_prefix(claim, covering, table, "authority")
    raw = _check_length(claim, entries)
    unverified = _check_map(claim, covering, raw)
    return Verdict(body, unverified, is_all_holes(raw), covering)


def next_body(
    body: SignedBody,
    claim: Claim,
    table: LayerTable,
    state: RecordState,
    digest: bytes,
    root: bytes = NO_HASH,
    *,
    above: int = 0,
) -> SignedBody:
    """Return the body of the next signed write: one generation further, over the present table, head and size.

    ``digest`` is the map's and ``root`` that of the leaves, both of a clean record only. ``above``: what an accepted
    rollback gave up; the records of that time must not be newer than what follows it.
    """
    count = len(table.layers)
    return replace(
        body,
        state=state,
        size=claim.size,
        generation=max(body.generation, above) + 1,
        head=claim.head,
        table_count=count,
        table_hash=table.prefix_hash(count),
        map_hash=digest,
        leaf_root=root,
    )


def sign(body: SignedBody, key: Secret | None) -> bytes:
    """Return the 320 bytes of the signed record; without a key, with a checksum that finds accidents only."""
    encoded = body.encode()
    return encoded + (record_mac.plain_checksum(encoded) if key is None else record_mac.sign(key, encoded))


def refuse(claim: Claim, reason: str) -> IntegrityFailure:
    return IntegrityFailure(resource=claim.volume, reason=reason)


def check_anchor(claim: Claim, anchor: Anchor, key: Secret | None) -> None:
    """Compare what the catalog says of a resource with what the key service says, and the key with the anchor."""
    if anchor.resource != claim.volume:
        raise refuse(claim, f"the key service answered for {anchor.resource}")
    if anchor.owner != claim.owner:
        raise refuse(claim, f"the catalog says it belongs to {claim.owner}, the key service to {anchor.owner}")
    if anchor.encrypted is not (claim.cipher is not Cipher.NONE):
        kinds = {True: "encrypted", False: "unencrypted"}
        raise refuse(
            claim,
            f"the catalog says it is {kinds[claim.cipher is not Cipher.NONE]}, "
            f"but the key service knows it as {kinds[anchor.encrypted]}",
        )
    if (key is None) is anchor.encrypted:
        raise refuse(claim, "the key service answered with the wrong kind of key")
    if anchor.encrypted and anchor.key_arn != claim.key_arn:
        raise refuse(claim, f"it is anchored to {anchor.key_arn}, but the catalog names {claim.key_arn}")
    if key is not None and anchor.key_check_value is not None and key_check_value(key) != anchor.key_check_value:
        raise refuse(claim, "its wrapped key opens to another data key than the one it was made with")


def believe(claim: Claim, key: Secret | None, signed: bytes, what: str) -> SignedBody:
    """Return the body of 320 bytes: with a MAC after it was verified, without one only when it is born."""
    try:
        raw, mac = split_signed(signed, file="record")
        if mac != UNSIGNED:
            if key is None:
                record_mac.verify_plain(raw, mac)
            else:
                record_mac.verify(key, raw, mac)
        body = SignedBody.parse(raw, file="record")
    except record_mac.BadMac:
        raise refuse(claim, f"the signature of its {what} is not valid under its data key") from None
    except (StoreDamaged, UnsupportedFormat) as exc:
        raise refuse(claim, exc.message.removesuffix(".")) from exc
    if (mac == UNSIGNED) is not (body.state is RecordState.BORN):
        raise refuse(claim, f"its {what} is neither signed nor that of a new resource")
    for aspect, here, there in (
        ("owner", body.account, claim.owner),
        ("lineage", body.lineage, claim.lineage),
        ("cipher", body.cipher, claim.cipher),
    ):
        if here != there:
            raise refuse(claim, f"its {what} and the catalog disagree about its {aspect}")
    return body


def _check_record(claim: Claim, anchor: Anchor, key: Secret | None, record: Record) -> SignedBody:
    body = believe(claim, key, record.signed, "record")
    if body.resource != claim.volume or record.resource.id != claim.volume:
        raise refuse(claim, f"its record is that of {body.resource}")
    if body.generation < anchor.floor:
        raise RecordTooOld(resource=claim.volume, generation=body.generation, floor=anchor.floor)
    if body.size > claim.size:
        raise refuse(claim, f"the catalog says {claim.size} bytes, but its record {body.size}")
    if body.state is not RecordState.BORN and record.authority is not None:
        raise refuse(claim, "its record is signed and carries an authority, too")
    return body


def refuse_older_authority(anchor: Anchor, authority: SignedBody) -> None:
    """Raise RecordTooOld for a record of the right resource that had been replaced when this one was made from it."""
    if authority.resource == anchor.authority and authority.generation < anchor.authority_floor:
        raise RecordTooOld(resource=authority.resource, generation=authority.generation, floor=anchor.authority_floor)


def _check_authority(claim: Claim, anchor: Anchor, key: Secret | None, record: Record) -> SignedBody | None:
    """Return the body of the record that covers the map of a volume that nobody has signed yet; None: nothing does."""
    if record.authority is None:
        return None
    authority = believe(claim, key, record.authority, "authority")
    refuse_older_authority(anchor, authority)
    if authority.state is RecordState.BORN:
        raise refuse(claim, "its authority is signed by nobody")
    if authority.resource not in claim.sources:
        raise refuse(claim, f"its authority is {authority.resource}, from which it was not made")
    if authority.size > claim.size:
        raise refuse(claim, f"the catalog says {claim.size} bytes, but its authority {authority.size}")
    if claim.head <= authority.table_count:
        raise refuse(claim, f"its head is layer {claim.head}, which its authority knows as another volume's")
    return authority


def _check_table(claim: Claim, body: SignedBody, table: LayerTable) -> None:
    if table.lineage != claim.lineage or table.cipher is not claim.cipher:
        raise refuse(claim, "its layer table is that of another lineage or cipher")
    check_prefix(claim, body, table, "record")
    if claim.head != body.head and claim.head <= body.table_count:
        raise refuse(claim, f"the catalog names layer {claim.head} as its head, its record layer {body.head}")
    if claim.head not in table.numbers():
        raise refuse(claim, f"its head layer {claim.head} is not in the layer table")


def check_prefix(claim: Claim, body: SignedBody, table: LayerTable, what: str) -> None:
    """Compare the layers that a body was signed over with those of the table."""
    if len(table.layers) < body.table_count:
        raise refuse(claim, f"its layer table has {len(table.layers)} layers, its {what} {body.table_count}")
    if table.prefix_hash(body.table_count) != body.table_hash:
        raise refuse(claim, f"its layer table is not the one its {what} was signed over")


def covered_layers(covering: SignedBody | None, entries: memoryview) -> set[int]:
    """Return the layers that the root of the leaves in a body is over: what its map names, except its own head.

    None of them when the body has no root. ``entries`` passed their check against the body before.
    """
    if covering is None or covering.leaf_root == NO_HASH:
        return set()
    return named_layers(entries) - {covering.head}


def check_leaf_root(
    claim: Claim, covering: SignedBody | None, layers: Collection[int], slots: Mapping[int, LeafSlot]
) -> bool:
    """Compare the leaf table with the root in the body that covers the map; False when that has none.

    ``layers`` are those of ``covered_layers``, ``slots`` what the leaf table has for them. Raises IntegrityFailure.
    """
    if covering is None or covering.leaf_root == NO_HASH:
        return False
    missing = sorted(set(layers) - set(slots))
    if missing:
        raise refuse(claim, f"its leaf table lacks layer {missing[0]}, which its record was signed over")
    if leaf_root(slots[layer] for layer in layers) != covering.leaf_root:
        raise refuse(claim, "the leaves of its layers are not those that its record was signed over")
    return True


def _check_length(claim: Claim, entries: memoryview) -> memoryview:
    """Return the entries of the claimed size, format B. More of them, holes, are left by a growth that was cut."""
    raw = entries.cast("B")
    wanted = entry_bytes(chunk_count(claim.size))
    if len(raw) < wanted or not is_all_holes(raw[wanted:]):
        raise refuse(claim, f"its map is not that of a volume of {claim.size} bytes")
    return raw[:wanted]


def _check_map(claim: Claim, covering: SignedBody | None, raw: memoryview) -> bool:
    """Check the map against the signed body that covers it, and say whether only its structure could be checked."""
    if covering is None:
        if not is_all_holes(raw):
            raise refuse(claim, "it was never opened for writing, but its map names data")
        return False
    try:
        check_map_structure(raw, chunk_count(claim.size), range(1, covering.table_count + 1), file="map")
    except StoreDamaged as exc:
        raise refuse(claim, f"its map is damaged: {exc.facts['reason']}") from exc
    if covering.state is RecordState.OPEN:
        return True
    signed_chunks = chunk_count(covering.size)
    if map_hash(raw, signed_chunks) != covering.map_hash or not is_all_holes(raw[signed_chunks * ENTRY :]):
        raise refuse(claim, "its map is not the one its record was signed over")
    return False
