"""A snapshot that a worker reads: its record believed, its map and table checked, its content named."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ebsd.domain.ids import parse_uuid
from ebsd.store.archive import content_id
from ebsd.store.disk import Disk
from ebsd.store.entries import map_hash, named_layers
from ebsd.store.layertable import LayerTable
from ebsd.store.leaftable import read_slots
from ebsd.store.sealedmap import SealedMap
from ebsd.store.signedrecord import SignedBody
from ebsd.volume.inputs import claim_of, found_in, record_of, sealed_map_of, table_of
from ebsd.volume.keysession import Answer
from ebsd.volume.verify import Claim, check_leaf_root, covered_layers
from ebsd.volume.verify_snapshot import believe_snapshot, check_snapshot_map, check_snapshot_table


@dataclass(frozen=True, slots=True)
class SourceSnapshot:
    """A snapshot that was verified."""

    claim: Claim
    table: LayerTable
    sealed: SealedMap
    covering: SignedBody | None
    unverified: bool
    """No signature covers its map."""

    @property
    def entries(self) -> memoryview:
        """The layer of each chunk, format I, whole pages."""
        return self.sealed.entries

    def content(self) -> bytes:
        """Return the identity of its content (store/archive.py)."""
        layers = [(number, self.table.uuid_of(number)) for number in sorted(named_layers(self.entries))]
        digest = map_hash(self.entries, self.sealed.chunks)
        return content_id(parse_uuid(self.claim.lineage), self.claim.size, digest, layers)


def believed_source(
    disk: Disk, members: dict[str, Any], record: str, answer: Answer, lineage_fd: int, map_fd: int
) -> SourceSnapshot:
    """Verify a snapshot as for a copy; ``members`` and ``record`` are those of a worker's ``start``.

    Raises IntegrityFailure, RecordTooOld, StoreDamaged.
    """
    claim = claim_of(members, head=0)
    with found_in(claim):
        authority_ids = [str(item) for item in members["AuthorityIds"]]
        believed = believe_snapshot(claim, answer.anchor, answer.data_key, record_of(record), authority_ids)
        # A volume of this lineage may be appending a layer right now: only what is relied on is read.
        table = table_of(disk, lineage_fd, believed.table_count)
        check_snapshot_table(claim, believed, table)
        sealed = sealed_map_of(disk, map_fd, claim)
        unverified = check_snapshot_map(claim, believed, sealed)
        covered = covered_layers(believed.covering, sealed.entries)
        slots = read_slots(disk, lineage_fd, table.lineage, {number: table.uuid_of(number) for number in covered})
        check_leaf_root(claim, believed.covering, covered, slots)
    return SourceSnapshot(claim, table, sealed, believed.covering, unverified)
