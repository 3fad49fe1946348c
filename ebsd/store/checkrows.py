"""The rows of a catalog as an examination reads them: whatever is in them, each impossible one becomes a finding.

``Catalog`` itself believes its rows and raises at the first one that cannot be. Here a bad row hides no other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import apsw

from ebsd.domain.errors import EbsdError
from ebsd.domain.ids import LineageId, SnapshotId, VolumeId, parse_resource_id, parse_snapshot_id, parse_uuid
from ebsd.domain.jobs import KINDS, Makes
from ebsd.domain.model import Cipher, ExposedAs, Integrity, LayerState
from ebsd.domain.states import (
    ACTIVE_JOBS,
    AttachmentState,
    DirectState,
    JobKind,
    JobState,
    SnapshotState,
    VolumeState,
)
from ebsd.domain.units import SECTOR, check_volume_size
from ebsd.store.entries import FIRST_RESERVED
from ebsd.store.findings import Code, Finding

Row = Mapping[str, Any]

_WAL_MODE: Final = 2
_ROLLBACK_MODE: Final = b"\x01\x01"
_MODE_AT: Final = 18


@dataclass(frozen=True, slots=True)
class LayerRow:
    number: int
    uuid: bytes
    made_for: str
    state: LayerState
    size: int


@dataclass(frozen=True, slots=True)
class ResourceRow:
    """What the catalog says of a volume or snapshot."""

    id: VolumeId | SnapshotId
    account: str
    lineage: LineageId
    size: int
    cipher: Cipher
    state: str
    head: int
    """0 for a snapshot."""
    key_arn: str | None
    wrapped_key: bytes | None
    context: Mapping[str, str]
    authority: str | None
    integrity: Integrity
    attached: bool = False
    attached_read_only: bool = False
    served_head: int = 0
    """The layer that the attachment's process writes to."""
    boot_id: str = ""
    generation: int = 0

    @property
    def is_snapshot(self) -> bool:
        return self.id.startswith("snap-")

    @property
    def settled(self) -> bool:
        """Whether its files must all be there."""
        if self.is_snapshot:
            return self.state in (SnapshotState.COMPLETED, SnapshotState.RECOVERABLE)
        return self.state in (VolumeState.AVAILABLE, VolumeState.IN_USE, VolumeState.ERROR, VolumeState.RECOVERABLE)


@dataclass(slots=True)
class Rows:
    """All rows that can be; what cannot be stands in ``findings``."""

    lineages: dict[LineageId, tuple[str, Cipher]] = field(default_factory=dict)
    """Lineage -> (account, cipher)."""
    layers: dict[LineageId, dict[int, LayerRow]] = field(default_factory=dict)
    resources: dict[str, ResourceRow] = field(default_factory=dict)
    unreadable: set[str] = field(default_factory=set)
    """Ids of volumes and snapshots whose row cannot be; they are known, and nothing can be compared."""
    broken_lineages: set[str] = field(default_factory=set)
    """Lineages of which some row cannot be."""
    removing: set[str] = field(default_factory=set)
    filling: set[str] = field(default_factory=set)
    """Destinations of jobs that have not ended, and snapshots that clients fill block by block."""
    findings: list[Finding] = field(default_factory=list)

    def of_lineage(self, lineage: str) -> list[ResourceRow]:
        return [row for row in self.resources.values() if row.lineage == lineage]

    def knows(self, resource: str) -> bool:
        return resource in self.resources or resource in self.unreadable or resource in self.removing


def read_rows(image: bytes, *, file: str) -> Rows:
    """Read the image of a catalog (the bytes of an SQLite file). Raises nothing: every error becomes a finding."""
    rows = Rows()
    try:
        _read(image, rows, file)
    except (apsw.Error, ValueError, TypeError, OverflowError) as error:
        rows.findings.append(Finding(Code.CATALOG_DAMAGED, "", file, f"it cannot be read: {error}"))
    return rows


def _read(image: bytes, rows: Rows, file: str) -> None:
    if len(image) < _MODE_AT + 2:
        raise ValueError("it is empty")
    if image[_MODE_AT] == _WAL_MODE:  # an image in memory has no WAL, and SQLite would refuse it for that
        image = image[:_MODE_AT] + _ROLLBACK_MODE + image[_MODE_AT + 2 :]
    db = apsw.Connection(":memory:")
    try:
        db.deserialize("main", image)
        for pragma in ("trusted_schema=OFF", "cell_size_check=ON"):
            db.execute(f"PRAGMA {pragma}").fetchall()
        for (verdict,) in db.execute("PRAGMA integrity_check(20)").fetchall():
            if verdict != "ok":
                rows.findings.append(Finding(Code.CATALOG_DAMAGED, "", file, f"SQLite says: {verdict}"))
        for table, rowid, parent, _ in db.execute("PRAGMA foreign_key_check").fetchall():
            detail = f"row {rowid} of {table} names a row of {parent} that is not there"
            rows.findings.append(Finding(Code.CATALOG_REFERENCE, "", file, detail))
        for table, reader in _READERS:
            for row in _table(db, table, rows, file):
                try:
                    reader(row, rows)
                except (EbsdError, ValueError, TypeError, KeyError, OverflowError) as error:
                    _note_bad(table, row, str(error), rows, file)
        _check_names(db, rows, file)
        _check_bin(db, rows, file)
    finally:
        db.close()


def _table(db: apsw.Connection, table: str, rows: Rows, file: str) -> list[Row]:
    found: list[Row] = []
    try:
        cursor = db.execute(f"SELECT * FROM {table}")
        for values in cursor:
            found.append(dict(zip((column[0] for column in cursor.get_description()), values, strict=True)))
    except apsw.Error as error:
        rows.findings.append(Finding(Code.CATALOG_DAMAGED, "", file, f"table {table}: {error}"))
    return found


def _note_bad(table: str, row: Row, reason: str, rows: Rows, file: str) -> None:
    ident = str(row.get("id") or row.get("volume") or row.get("lineage") or "")
    resource = ident if table in ("volume", "snapshot", "attachment") else ""
    if resource and table != "attachment":
        rows.unreadable.add(resource)
    lineage = str(row.get("id" if table == "lineage" else "lineage") or "")
    if lineage:
        rows.broken_lineages.add(lineage)
    detail = f"the row {ident!r} of {table} cannot be: {reason}"
    rows.findings.append(Finding(Code.CATALOG_ROW, resource, file, detail))


def _need(holds: bool, reason: str) -> None:
    if not holds:
        raise ValueError(reason)


def _account(value: object) -> str:
    _need(isinstance(value, str) and len(value) == 12 and value.isascii() and value.isdigit(), "its account")
    return str(value)


def _lineage(value: object) -> LineageId:
    parse_uuid(str(value))
    return LineageId(str(value))


def _layer_number(value: object) -> int:
    _need(isinstance(value, int) and 0 < value < FIRST_RESERVED, f"layer number {value!r}")
    return int(value)  # type: ignore[call-overload, no-any-return]


def _read_lineage(row: Row, rows: Rows) -> None:
    lineage = _lineage(row["id"])
    _need(row["sector_size"] == SECTOR, f"sector size {row['sector_size']!r}")
    rows.lineages[lineage] = _account(row["account"]), Cipher(row["cipher"])


def _read_layer(row: Row, rows: Rows) -> None:
    lineage, number = _lineage(row["lineage"]), _layer_number(row["number"])
    uuid = bytes(row["uuid"])
    _need(len(uuid) == 16, "its uuid")
    made_for = parse_resource_id(str(row["volume"]))
    layer = LayerRow(number, uuid, made_for, LayerState(row["state"]), check_volume_size(row["size"]))
    rows.layers.setdefault(lineage, {})[number] = layer


def _common(row: Row) -> dict[str, Any]:
    cipher, context = Cipher(row["cipher"]), json.loads(row["context"])
    _need(isinstance(context, dict), "its encryption context")
    _need(cipher is not Cipher.NONE or row["key_arn"] is None, "it is unencrypted and names a key")
    _need(cipher is Cipher.NONE or row["key_arn"] is not None, "it is encrypted and names no key")
    return {
        "account": _account(row["account"]),
        "lineage": _lineage(row["lineage"]),
        "size": check_volume_size(row["size"]),
        "cipher": cipher,
        "key_arn": row["key_arn"],
        "wrapped_key": None if row["wrapped_key"] is None else bytes(row["wrapped_key"]),
        "context": context,
        "authority": row["authority"],
        "integrity": Integrity(row["integrity"]),
    }


def _read_volume(row: Row, rows: Rows) -> None:
    ident = parse_resource_id(str(row["id"]))
    _need(ident.startswith("vol-"), "its id")
    state = VolumeState(row["state"])
    head = _layer_number(row["head"])
    rows.resources[ident] = ResourceRow(id=ident, state=state.value, head=head, **_common(row))


def _read_snapshot(row: Row, rows: Rows) -> None:
    ident = parse_resource_id(str(row["id"]))
    _need(ident.startswith("snap-"), "its id")
    state = SnapshotState(row["state"])
    rows.resources[ident] = ResourceRow(id=ident, state=state.value, head=0, **_common(row))


def _read_attachment(row: Row, rows: Rows) -> None:
    found = rows.resources.get(str(row["volume"]))
    if found is None:
        return  # said by the foreign keys, or its volume's row cannot be
    AttachmentState(row["state"])
    ExposedAs(row["exposed_as"])
    fields = {name: getattr(found, name) for name in ResourceRow.__slots__}
    fields |= {
        "attached": True,
        "attached_read_only": bool(row["read_only"]),
        "served_head": _layer_number(row["head"]),
        "boot_id": str(row["boot_id"]),
        "generation": int(row["generation"]),
    }
    rows.resources[found.id] = ResourceRow(**fields)


def _read_job(row: Row, rows: Rows) -> None:
    makes = KINDS[JobKind(row["kind"])].makes
    if makes is not Makes.NOTHING:
        parse_resource_id(str(row["destination"]))
    if JobState(row["state"]) in ACTIVE_JOBS and makes is not Makes.NOTHING:
        rows.filling.add(str(row["destination"]))


def _read_direct(row: Row, rows: Rows) -> None:
    if DirectState(row["state"]) in (DirectState.STARTING, DirectState.OPEN, DirectState.SEALING):
        rows.filling.add(str(parse_snapshot_id(str(row["id"]))))


def _read_removing(row: Row, rows: Rows) -> None:
    rows.removing.add(str(parse_resource_id(str(row["resource"]))))


_READERS: Final[tuple[tuple[str, Callable[[Row, Rows], None]], ...]] = (
    ("lineage", _read_lineage),
    ("layer", _read_layer),
    ("volume", _read_volume),
    ("snapshot", _read_snapshot),
    ("attachment", _read_attachment),
    ("job", _read_job),
    ("direct_snapshot", _read_direct),
    ("removing", _read_removing),
)
"""In this order: an attachment needs its volume."""


def _check_bin(db: apsw.Connection, rows: Rows, file: str) -> None:
    """What is recoverable lies in the recycle bin: elsewhere nobody could have it back, or see it."""
    binned = {str(row["resource"]) for row in _table(db, "recycle_bin", rows, file)}
    for resource in rows.resources.values():
        is_recoverable = resource.state in (VolumeState.RECOVERABLE, SnapshotState.RECOVERABLE)
        if is_recoverable is not (resource.id in binned):
            detail = f"it is {resource.state}, and {'not ' if is_recoverable else ''}in the recycle bin"
            rows.findings.append(Finding(Code.CATALOG_ROW, resource.id, file, detail))
    for ident in sorted(binned - rows.resources.keys() - rows.unreadable):
        rows.findings.append(Finding(Code.CATALOG_REFERENCE, ident, file, "it is in the recycle bin, and has no row"))


def _check_names(db: apsw.Connection, rows: Rows, file: str) -> None:
    named = {str(row["resource"]) for row in _table(db, "name", rows, file)}
    for ident in sorted(rows.resources.keys() - named):
        rows.findings.append(Finding(Code.CATALOG_ROW, ident, file, "it has no row in name, and cannot be found"))
    for resource in rows.resources.values():
        lineage = rows.lineages.get(resource.lineage)
        if lineage is None:
            continue  # said by the foreign keys
        if lineage != (resource.account, resource.cipher):
            detail = "it and its lineage disagree about account or cipher"
            rows.findings.append(Finding(Code.CATALOG_ROW, resource.id, file, detail))
        states = (VolumeState.IN_USE, VolumeState.ERROR)
        if not resource.is_snapshot and resource.attached is not (resource.state in states):
            detail = f"it is {resource.state}, and its attachment {'is' if resource.attached else 'is not'} there"
            rows.findings.append(Finding(Code.CATALOG_ROW, resource.id, file, detail))
