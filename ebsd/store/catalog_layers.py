"""The catalog's lineages and layers."""

from __future__ import annotations

from ebsd.domain.errors import ResourceNotFound
from ebsd.domain.ids import AccountId, LineageId, SnapshotId, VolumeId, parse_resource_id
from ebsd.domain.model import Cipher, Layer, LayerState, Lineage
from ebsd.store.catalog_rows import Rows


class LayerRows(Rows):
    """Lineages and layers, and what stands in a lineage."""

    def add_lineage(self, lineage: Lineage) -> None:
        self._rows(
            "INSERT INTO lineage VALUES (?,?,?,?,1)",
            lineage.id,
            lineage.account,
            lineage.sector_size,
            int(lineage.cipher),
        )

    def lineage(self, lineage: LineageId) -> Lineage:
        row = self._row("SELECT id, account, sector_size, cipher FROM lineage WHERE id=?", lineage)
        if row is None:
            raise ResourceNotFound(resource=lineage)
        return Lineage(LineageId(row[0]), AccountId(row[1]), row[2], Cipher(row[3]))

    def lineages(self) -> list[LineageId]:
        return [LineageId(row[0]) for row in self._rows("SELECT id FROM lineage ORDER BY id")]

    def add_layer(
        self, lineage: LineageId, uuid: bytes, volume: VolumeId | SnapshotId, size: int, preallocated: int = 0
    ) -> Layer:
        """Take the next layer number of the lineage, for ever, and add a layer in state ``creating``."""
        row = self._row("UPDATE lineage SET next_layer=next_layer+1 WHERE id=? RETURNING next_layer-1", lineage)
        if row is None:
            raise ResourceNotFound(resource=lineage)
        layer = Layer(lineage, int(row[0]), uuid, volume, LayerState.CREATING, size, preallocated)
        self.put_layer(layer)
        return layer

    def put_layer(self, layer: Layer) -> None:
        """Add a layer that has its number already: for a catalog that is rebuilt."""
        self._rows(
            "INSERT INTO layer (lineage, number, uuid, volume, state, size, preallocated) VALUES (?,?,?,?,?,?,?)",
            layer.lineage,
            layer.number,
            layer.uuid,
            layer.volume,
            layer.state.value,
            layer.size,
            layer.preallocated,
        )

    def set_next_layer(self, lineage: LineageId, number: int) -> None:
        """Say which number the next layer gets: for a catalog that is rebuilt."""
        self._rows("UPDATE lineage SET next_layer=? WHERE id=?", number, lineage)

    def set_layer_state(self, lineage: LineageId, number: int, state: LayerState) -> None:
        self._rows("UPDATE layer SET state=? WHERE lineage=? AND number=?", state.value, lineage, number)

    def layers(self, lineage: LineageId, first: int = 0) -> list[Layer]:
        """Return the layers of a lineage from a number on, oldest first."""
        return [
            Layer(lineage, number, bytes(uuid), parse_resource_id(volume), LayerState(state), size, preallocated)
            for number, uuid, volume, state, size, preallocated in self._rows(
                "SELECT number, uuid, volume, state, size, preallocated FROM layer "
                "WHERE lineage=? AND number>=? ORDER BY number",
                lineage,
                first,
            )
        ]

    def preallocated_layers(self, lineage: LineageId) -> list[int]:
        """Return the layers of a lineage that have blocks without data, as far as is known."""
        sql = "SELECT number FROM layer WHERE lineage=? AND preallocated>0 ORDER BY number"
        return [int(row[0]) for row in self._rows(sql, lineage)]

    def set_given_back(self, lineage: LineageId, number: int) -> None:
        """Note that a layer has no more blocks than its chunks need."""
        self._rows("UPDATE layer SET preallocated=0 WHERE lineage=? AND number=?", lineage, number)

    def remove_layer(self, lineage: LineageId, number: int) -> None:
        self._rows("DELETE FROM layer WHERE lineage=? AND number=?", lineage, number)

    def remove_lineage(self, lineage: LineageId) -> None:
        self._rows("DELETE FROM layer WHERE lineage=?", lineage)
        self._rows("DELETE FROM family WHERE lineage=?", lineage)
        self._rows("DELETE FROM lineage WHERE id=?", lineage)

    def layers_of(self, writer: str, first: int, beyond: int) -> list[int]:
        """Return the numbers of the layers [first, beyond) that were made for a volume; without end when that is 0."""
        sql = "SELECT number FROM layer WHERE volume=? AND number>=? AND (?=0 OR number<?) ORDER BY number"
        return [int(row[0]) for row in self._rows(sql, writer, first, beyond, beyond)]

    def unsealed_layers(self, lineage: LineageId, most: int) -> list[int] | None:
        """Return the layers that somebody may write to, or may have written to a moment ago; None for too many."""
        sql = "SELECT number FROM layer WHERE lineage=? AND state<>'sealed' ORDER BY number LIMIT ?"
        numbers = [int(row[0]) for row in self._rows(sql, lineage, most + 1)]
        return numbers if len(numbers) <= most else None

    def layer(self, lineage: LineageId, number: int) -> Layer | None:
        sql = "SELECT uuid, volume, state, size, preallocated FROM layer WHERE lineage=? AND number=?"
        row = self._row(sql, lineage, number)
        if row is None:
            return None
        return Layer(lineage, number, bytes(row[0]), parse_resource_id(row[1]), LayerState(row[2]), row[3], row[4])

    def resources(self) -> set[str]:
        """Return the ids of all volumes and snapshots, those that are being removed included."""
        sql = "SELECT id FROM volume UNION ALL SELECT id FROM snapshot UNION ALL SELECT resource FROM removing"
        return {str(row[0]) for row in self._rows(sql)}

    def moved_away(self, lineage: LineageId) -> str | None:
        """Return a volume or snapshot that layers of this lineage were made for and that is said to be of another."""
        for table in ("volume", "snapshot"):
            row = self._row(
                f"SELECT r.id FROM layer JOIN {table} r ON r.id=layer.volume "
                "WHERE layer.lineage=? AND r.lineage<>layer.lineage ORDER BY r.id",
                lineage,
            )
            if row is not None:
                return str(row[0])
        return None

    def attached_volumes(self) -> list[VolumeId]:
        return [VolumeId(row[0]) for row in self._rows("SELECT volume FROM attachment ORDER BY volume")]

    def is_settled(self, lineage: LineageId) -> bool:
        """Say whether every map of the lineage is what it will be: nothing half made, no live map to be salvaged."""
        return not self._rows(
            "SELECT 1 FROM snapshot WHERE lineage=? AND state='pending' "
            "UNION ALL SELECT 1 FROM volume WHERE lineage=? AND state IN ('creating', 'error') LIMIT 1",
            lineage,
            lineage,
        )

    def is_empty(self, lineage: LineageId) -> bool:
        """Say whether no volume and no snapshot is left in a lineage."""
        return not self._rows(
            "SELECT 1 FROM snapshot WHERE lineage=? UNION ALL SELECT 1 FROM volume WHERE lineage=? LIMIT 1",
            lineage,
            lineage,
        )

    def map_count(self, lineage: LineageId) -> int:
        (count,) = self._rows("SELECT count(*) FROM family WHERE lineage=?", lineage)[0]
        return int(count)

    def written_layers(self, lineage: LineageId) -> frozenset[int]:
        """Return the layers that no sweep may touch: heads, those being made, and what an attached process may write.

        An attached process writes to its attachment's head or, while a snapshot is being taken, to a later one that
        was made for the same volume.
        """
        rows = self._rows(
            "SELECT head FROM volume WHERE lineage=? "
            "UNION SELECT number FROM layer WHERE lineage=? AND state='creating' "
            "UNION SELECT layer.number FROM volume JOIN attachment a ON a.volume=volume.id "
            "JOIN layer ON layer.volume=volume.id AND layer.number>=a.head WHERE volume.lineage=?",
            lineage,
            lineage,
            lineage,
        )
        return frozenset(int(row[0]) for row in rows)
