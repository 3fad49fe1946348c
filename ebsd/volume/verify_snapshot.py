"""Verification of both ends of a copy: is this the snapshot that the key service knows, and is the target new?

1. As in ``verify.py``, the anchor is the authority, a record counts after its MAC, table and map after their digests.
2. A snapshot's record is clean and signed under its own id; or it is born and carries the record of what it was
   taken of, signed under the same data key: that one then covers table and map. Without either it must be blank.
3. A destination is born and signed by nobody; what a killed run left in its data and its map is no finding.

Pure but for the key: bytes and values in, a verdict out. Every refusal is IntegrityFailure (RecordTooOld for a record
below the anchor's floor) and names its reason.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from ebsd.crypto.secret import Secret
from ebsd.domain.errors import RecordTooOld, StoreDamaged
from ebsd.domain.geometry import chunk_count
from ebsd.store.entries import ENTRY, HOLE, check_map_structure, is_all_holes, map_hash
from ebsd.store.layertable import LayerTable
from ebsd.store.record import Record
from ebsd.store.sealedmap import SealedMap
from ebsd.store.signedrecord import RecordState, SignedBody
from ebsd.volume.keysession import Anchor
from ebsd.volume.verify import Claim, believe, check_anchor, check_prefix, refuse, refuse_older_authority

_BLOCK = 64 * 1024


@dataclass(frozen=True, slots=True)
class Believed:
    """What is believed of a snapshot: its own body, and the signed one that covers table and map."""

    own: SignedBody
    covering: SignedBody | None
    """The snapshot's own body when that is signed, else its authority's; None: nobody signed, only holes are legal."""

    @property
    def table_count(self) -> int:
        """Layers of the table that must be read to check both bodies."""
        return max(self.own.table_count, self.covering.table_count if self.covering else 0)


# --- both ends


def _believe_own(claim: Claim, anchor: Anchor, key: Secret | None, record: Record) -> SignedBody:
    body = believe(claim, key, record.signed, "record")
    if body.resource != claim.volume or record.resource.id != claim.volume:
        raise refuse(claim, f"its record is that of {body.resource}")
    if body.generation < anchor.floor:
        raise RecordTooOld(resource=claim.volume, generation=body.generation, floor=anchor.floor)
    if body.size != claim.size:
        raise refuse(claim, f"the catalog says {claim.size} bytes, but its record {body.size}")
    if body.head != claim.head:
        raise refuse(claim, f"the catalog names layer {claim.head} as its head, its record layer {body.head}")
    return body


def _check_table(claim: Claim, body: SignedBody, table: LayerTable, what: str) -> None:
    if table.lineage != claim.lineage or table.cipher is not claim.cipher:
        raise refuse(claim, "its layer table is that of another lineage or cipher")
    check_prefix(claim, body, table, what)


# --- the source


def believe_snapshot(
    claim: Claim, anchor: Anchor, key: Secret | None, record: Record, authority_ids: Collection[str]
) -> Believed:
    """Check a snapshot's record; ``claim.head`` is 0, ``authority_ids`` may stand in the record it carries.

    An authority may be older than the catalog's size (the volume grew since) but not larger; clean or open. One that
    is born itself says nothing: then, as without any, only holes are legal.
    """
    check_anchor(claim, anchor, key)
    own = _believe_own(claim, anchor, key, record)
    if own.state is RecordState.CLEAN:
        return Believed(own, own)
    if own.state is not RecordState.BORN:
        raise refuse(claim, "its record is that of a resource that is open for writing")
    if record.authority is None:
        return Believed(own, None)
    authority = believe(claim, key, record.authority, "authority")
    refuse_older_authority(anchor, authority)
    if authority.resource not in authority_ids:
        raise refuse(claim, f"its authority is {authority.resource}, of which it was not taken")
    if authority.size > claim.size:
        raise refuse(claim, f"the catalog says {claim.size} bytes, but its authority {authority.size}")
    return Believed(own, None if authority.state is RecordState.BORN else authority)


def check_snapshot_table(claim: Claim, believed: Believed, table: LayerTable) -> None:
    """Check a table of at least ``believed.table_count`` layers."""
    _check_table(claim, believed.own, table, "record")
    if believed.covering is not None and believed.covering is not believed.own:
        _check_table(claim, believed.covering, table, "authority")


def check_snapshot_map(claim: Claim, believed: Believed, sealed: SealedMap) -> bool:
    """Check a sealed map, and say whether it is unverified: its structure is right, but no signature covers it."""
    if sealed.snapshot != claim.volume or sealed.lineage != claim.lineage:
        raise refuse(claim, "its map is that of another snapshot or lineage")
    if sealed.chunks != chunk_count(claim.size):
        raise refuse(claim, f"its map is not that of a snapshot of {claim.size} bytes")
    covering = believed.covering
    if covering is None:
        if not is_all_holes(sealed.entries):
            raise refuse(claim, "nobody has signed it, but its map names data")
        return False
    try:
        check_map_structure(sealed.entries, sealed.chunks, range(1, covering.table_count + 1), file="map")
    except StoreDamaged as exc:
        raise refuse(claim, f"its map is damaged: {exc.facts['reason']}") from exc
    if covering.state is RecordState.OPEN:
        return True
    signed_chunks = chunk_count(covering.size)
    raw = sealed.entries.cast("B")
    if map_hash(raw, signed_chunks) != covering.map_hash or not is_all_holes(raw[signed_chunks * ENTRY :]):
        raise refuse(claim, "its map is not the one its record was signed over")
    return False


# --- the destination


def check_destination(
    claim: Claim, anchor: Anchor, key: Secret | None, record: Record, table: LayerTable, layer: int
) -> SignedBody:
    """Check that a copy may be made into this resource, and return the body of its born record.

    ``claim.head`` is ``layer`` for a volume and 0 for a snapshot; the whole table must be that one layer.
    """
    check_anchor(claim, anchor, key)
    body = _believe_own(claim, anchor, key, record)
    if body.state is not RecordState.BORN or record.authority is not None:
        raise refuse(claim, "it is no new resource: somebody has signed it, or it was made from another one")
    _check_table(claim, body, table, "record")
    if [entry.number for entry in table.layers] != [layer]:
        raise refuse(claim, f"its layer table does not have exactly layer {layer}")
    return body


def check_filled(
    claim: Claim, anchor: Anchor, key: Secret | None, record: Record, table: LayerTable, layer: int, *, alone: bool
) -> SignedBody:
    """Check that blocks may be written into this new snapshot, and return the body of its born record.

    ``layer`` must have been made for it; ``alone``: it has no parent, and this is the only layer of its lineage.
    """
    check_anchor(claim, anchor, key)
    body = _believe_own(claim, anchor, key, record)
    if body.state is not RecordState.BORN or record.authority is not None:
        raise refuse(claim, "it is no new snapshot: somebody has signed it, or it was made from another one")
    _check_table(claim, body, table, "record")
    if not 1 <= layer <= body.table_count or table.layers[layer - 1].volume != claim.volume:
        raise refuse(claim, f"layer {layer} of its lineage was not made for it")
    if alone and len(table.layers) != 1:
        raise refuse(claim, "its lineage has other layers, although it has no parent")
    return body


def check_destination_map(claim: Claim, present: memoryview, wanted: memoryview) -> None:
    """Check that a map names nothing but what this copy names, too: all else a killed run cannot have left.

    Both views have format I and the same length.
    """
    here, there = present.cast("B"), wanted.cast("B")
    if len(here) != len(there):
        raise refuse(claim, f"its map is not that of a volume of {claim.size} bytes")
    zeros = bytes(_BLOCK)
    for at in range(0, len(here), _BLOCK):
        block = bytes(here[at : at + _BLOCK])
        if block in (zeros[: len(block)], bytes(there[at : at + _BLOCK])):
            continue
        pairs = zip(memoryview(block).cast("I"), there[at : at + _BLOCK].cast("I"), strict=True)
        if any(value not in (HOLE, due) for value, due in pairs):
            raise refuse(claim, "its map names data that this copy does not write")
