"""The catalog: what volumes, lineages, layers and attachments exist, in one SQLite file.

1. One connection, used by one thread at a time; ``Catalog`` itself starts no thread.
2. A change is one plain function over ``Transaction``: load, decide, write. It commits or leaves nothing.
3. A row in state ``creating`` precedes every file; a row in a final state names only durable files.
4. What cannot be rebuilt from records, map headers and file names does not live here alone.

SQLite runs with WAL and synchronous=FULL: a returned commit survives power loss
(https://sqlite.org/pragma.html#pragma_synchronous). ``locking_mode=EXCLUSIVE`` keeps a second opener out.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import apsw

from ebsd.domain.errors import (
    HostFailure,
    JobNotFound,
    NameInUse,
    NoSpace,
    ResourceNotFound,
    SnapshotIdMalformed,
    SnapshotNotFound,
    StoreDamaged,
    UnsupportedFormat,
    VolumeIdMalformed,
    VolumeNotFound,
)
from ebsd.domain.ids import (
    AccountId,
    JobId,
    KeyArn,
    LineageId,
    SnapshotId,
    VolumeId,
    looks_like_snapshot_id,
    looks_like_volume_id,
    parse_job_id,
    parse_resource_id,
    parse_snapshot_id,
    parse_volume_id,
)
from ebsd.domain.model import (
    Attachment,
    Caller,
    Cipher,
    ExposedAs,
    Integrity,
    Job,
    Layer,
    LayerState,
    Lineage,
    Snapshot,
    Verification,
    Volume,
)
from ebsd.domain.states import AttachmentState, JobKind, JobState, SnapshotState, VolumeState
from ebsd.store.schema import MIGRATIONS, SCHEMA_VERSION

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Kin:
    """Where a volume or snapshot stands among those whose maps have one origin; the columns of ``family``."""

    id: str
    lineage: LineageId
    parent: str | None
    writer: str
    first: int
    beyond: int
    left: frozenset[int]
    deleted: bool


class Catalog:
    """The open catalog file. Not thread-safe: the caller runs one transaction at a time."""

    def __init__(self, path: Path) -> None:
        """Open or create the file; raises StoreDamaged, UnsupportedFormat or NoSpace when it cannot be used."""
        self.path = path
        try:
            self._db = apsw.Connection(str(path))
            self._db.set_busy_timeout(0)
            for pragma in (
                "locking_mode=EXCLUSIVE",
                "journal_mode=WAL",
                "synchronous=FULL",
                "wal_autocheckpoint=16",  # a short WAL is used again, so that a full disk still lets volumes be deleted
                "foreign_keys=ON",
                "cell_size_check=ON",
                "trusted_schema=OFF",
                "mmap_size=0",  # an I/O error must be an error, not a SIGBUS
            ):
                self._db.execute(f"PRAGMA {pragma}").fetchall()
            self._migrate()
            verdict = self._db.execute("PRAGMA quick_check(1)").fetchone()
        except apsw.FullError as exc:
            raise NoSpace(where=f"for the catalog {path}") from exc
        except apsw.CantOpenError as exc:
            # The file of its log, which is made anew at every start: on XFS that takes a block.
            db: apsw.Connection | None = getattr(self, "_db", None)
            if db is not None and db.system_errno in (errno.ENOSPC, errno.EDQUOT):
                raise NoSpace(where=f"to open the catalog {path}") from exc
            raise StoreDamaged(file=path, reason=str(exc)) from exc
        except apsw.Error as exc:
            raise StoreDamaged(file=path, reason=str(exc)) from exc
        if verdict is None or verdict[0] != "ok":
            raise StoreDamaged(file=path, reason=f"SQLite's quick_check says: {verdict and verdict[0]}")

    def _migrate(self) -> None:
        (version,) = self._db.execute("PRAGMA user_version").fetchone() or (0,)
        if version > SCHEMA_VERSION:
            raise UnsupportedFormat(file=self.path, what=f"schema version {version}")
        if 0 < version < SCHEMA_VERSION:
            self._keep_copy(version)
        for step in range(version + 1, SCHEMA_VERSION + 1):
            with self._db:
                self._db.execute(MIGRATIONS[step])
                self._db.execute(f"PRAGMA user_version={step}")

    def _keep_copy(self, version: int) -> None:
        """Copy the file aside before its schema changes, so that the ebsd that wrote it can be gone back to."""
        kept = self.path.with_name(f"{self.path.name}.kept-v{version}")
        if kept.exists():
            return  # of an earlier attempt, complete: it got its name last
        temporary = kept.with_name(f".{kept.name}.tmp")
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:
            file.write(self.image())
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(kept)
        directory = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def run(self, use_case: Callable[[Transaction], T]) -> T:
        """Run one transaction; whatever it raises is raised again and nothing of it stays.

        Raises NoSpace, HostFailure (its disk fails), StoreDamaged.
        """
        try:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                result = use_case(Transaction(self._db))
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
        except apsw.FullError as exc:
            raise NoSpace(where=f"for the catalog {self.path}") from exc
        except (apsw.IOError, apsw.CantOpenError, apsw.ReadOnlyError) as exc:
            raise HostFailure(where=f"at the catalog {self.path}", reason=str(exc)) from exc
        except (apsw.CorruptError, apsw.NotADBError) as exc:
            raise StoreDamaged(file=self.path, reason=str(exc)) from exc
        return result

    def check_rows(self) -> None:
        """Read every row once; raises StoreDamaged when one cannot be what it says, which quick_check does not see."""

        def read(t: Transaction) -> None:
            t.volumes()
            t.snapshots()
            t.jobs()
            for lineage in t.lineages():
                t.lineage(lineage)
                t.layers(lineage)

        try:
            self.run(read)
        except (ValueError, TypeError, KeyError, OverflowError, VolumeIdMalformed, SnapshotIdMalformed) as exc:
            raise StoreDamaged(file=self.path, reason=f"a row cannot be: {exc}") from exc
        except apsw.Error as exc:
            raise StoreDamaged(file=self.path, reason=str(exc)) from exc

    def image(self) -> bytes:
        """Return the bytes of the file as of the last commit, for somebody who examines them. Not in a transaction."""
        return bytes(self._db.serialize("main"))

    def close(self) -> None:
        """Write the WAL back and close; idempotent."""
        self._db.close()


class Transaction:
    """What a use case may read and write; every method is one or two SQL statements."""

    def __init__(self, db: apsw.Connection) -> None:
        self._db = db

    def _rows(self, sql: str, *args: Any) -> list[tuple[Any, ...]]:
        return list(self._db.execute(sql, args))

    def _row(self, sql: str, *args: Any) -> tuple[Any, ...] | None:
        rows = self._rows(sql, *args)
        return rows[0] if rows else None

    # --- verifications

    def _verifications(self, table: str, where: str, *args: Any) -> dict[str, Verification]:
        """Return what the last verification found of those rows of a table that were verified, by id."""
        rows = self._rows(
            "SELECT v.resource, v.time, v.kind, v.chunks, v.damaged, v.files "
            f"FROM verification v JOIN {table} ON {table}.id=v.resource {where}",
            *args,
        )
        return {row[0]: Verification(*row[1:]) for row in rows}

    def put_verification(self, resource: str, found: Verification) -> None:
        self._rows(
            "INSERT OR REPLACE INTO verification VALUES (?,?,?,?,?,?)",
            resource, found.time, found.kind, found.chunks, found.damaged_chunks, found.damaged_files,
        )  # fmt: skip

    # --- names and tags

    def name_of(self, resource: str) -> str:
        row = self._row("SELECT name FROM name WHERE resource=?", resource)
        return "" if row is None else str(row[0])

    def resource_named(self, account: AccountId, name: str) -> str | None:
        row = self._row("SELECT resource FROM name WHERE account=? AND name=?", account, name)
        return None if row is None else str(row[0])

    def give_name(self, account: AccountId, name: str, resource: str) -> None:
        """Name a resource, or name it anew. Raises NameInUse when another one of the account has the name."""
        holder = self.resource_named(account, name)
        if holder is not None and holder != resource:
            raise NameInUse(name=name, resource=holder)
        self._rows("DELETE FROM name WHERE resource=?", resource)
        self._rows("INSERT INTO name VALUES (?,?,?)", account, name, resource)

    def tags_of(self, resource: str) -> dict[str, str]:
        return {
            str(k): str(v) for k, v in self._rows("SELECT key, value FROM tag WHERE resource=? ORDER BY key", resource)
        }

    def set_tags(self, resource: str, tags: Mapping[str, str]) -> None:
        self._rows("DELETE FROM tag WHERE resource=?", resource)
        for key, value in tags.items():
            self._rows("INSERT INTO tag VALUES (?,?,?)", resource, key, value)

    # --- lineages and layers

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

    # --- volumes

    def add_volume(self, volume: Volume) -> None:
        self._rows(
            "INSERT INTO volume VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
            volume.id,
            volume.account,
            volume.owner,
            volume.size,
            volume.state.value,
            volume.reason,
            int(volume.cipher),
            volume.key_arn,
            volume.wrapped_key,
            _json(volume.context),
            volume.lineage,
            volume.head,
            volume.snapshot,
            volume.attach_generation,
            volume.integrity.value,
            volume.authority,
            volume.created,
        )
        self.give_name(volume.account, volume.name, volume.id)
        self.set_tags(volume.id, volume.tags)
        self._add_kin(Kin(volume.id, volume.lineage, None, volume.id, volume.head, 0, frozenset(), False))

    def volume(self, volume: VolumeId) -> Volume:
        """Return one volume with its name, tags and attachment; raises VolumeNotFound."""
        found = self._volumes("WHERE volume.id=?", volume)
        if not found:
            raise VolumeNotFound(volume=volume)
        return found[0]

    def volumes(
        self, account: AccountId | None = None, after: tuple[str, str] | None = None, limit: int = -1
    ) -> list[Volume]:
        """Return all volumes, or those of one account, oldest first; a page of them behind (time, id)."""
        return self._volumes(
            "WHERE (?1 IS NULL OR volume.account=?1) AND (?2 IS NULL OR (volume.created, volume.id) > (?2, ?3))",
            account,
            *(after or (None, None)),
            limit=limit,
        )

    def _volumes(self, where: str, *args: Any, limit: int = -1) -> list[Volume]:
        tags: dict[str, dict[str, str]] = {}
        for resource, key, value in self._rows(
            f"SELECT resource, key, value FROM tag JOIN volume ON volume.id=tag.resource {where} ORDER BY key", *args
        ):
            tags.setdefault(resource, {})[key] = value
        rows = self._rows(
            "SELECT volume.id, volume.account, owner, name.name, size, volume.state, reason, cipher, key_arn, "
            "wrapped_key, context, lineage, volume.head, snapshot, attach_generation, integrity, authority, created, "
            "a.state, a.boot_id, a.generation, a.exposed_as, a.read_only, a.path, a.loop_minor, a.grant_id, "
            "a.head, a.mount_point, a.time, "
            "(SELECT preallocated FROM layer l WHERE l.lineage=volume.lineage AND l.number=volume.head) "
            "FROM volume JOIN name ON name.resource=volume.id LEFT JOIN attachment a ON a.volume=volume.id "
            f"{where} ORDER BY volume.created, volume.id LIMIT {limit:d}",
            *args,
        )
        found = self._verifications("volume", where, *args)
        return [_volume_from_row(row, tags.get(row[0], {}), found.get(row[0])) for row in rows]

    def find_volume(self, caller: Caller, name_or_id: str) -> Volume:
        """Return the volume a caller means by a name or an id.

        Names resolve in the caller's account; administrators name others' volumes by id. A volume of
        somebody else is not found (EC2 answers InvalidVolume.NotFound, not a denial, so ids cannot be probed).
        """
        if looks_like_volume_id(name_or_id):
            volume_id = parse_volume_id(name_or_id)
        else:
            resource = self.resource_named(caller.account, name_or_id)
            if resource is None or not looks_like_volume_id(resource):
                raise VolumeNotFound(volume=name_or_id)
            volume_id = VolumeId(resource)
        volume = self.volume(volume_id)
        if volume.account != caller.account and not caller.is_admin:
            raise VolumeNotFound(volume=name_or_id)
        return volume

    def set_volume_state(self, volume: VolumeId, state: VolumeState, reason: str = "") -> None:
        self._rows("UPDATE volume SET state=?, reason=? WHERE id=?", state.value, reason, volume)

    def set_integrity(self, volume: VolumeId, integrity: Integrity) -> None:
        self._rows("UPDATE volume SET integrity=? WHERE id=?", integrity.value, volume)

    def set_wrapped_key(
        self, volume: VolumeId, key_arn: KeyArn, wrapped_key: bytes, context: Mapping[str, str]
    ) -> None:
        self._rows(
            "UPDATE volume SET key_arn=?, wrapped_key=?, context=? WHERE id=?",
            key_arn,
            wrapped_key,
            _json(context),
            volume,
        )

    def set_volume_head(self, volume: VolumeId, head: int) -> None:
        self._rows("UPDATE volume SET head=? WHERE id=?", head, volume)

    def set_volume_size(self, volume: VolumeId, size: int) -> None:
        self._rows("UPDATE volume SET size=? WHERE id=?", size, volume)

    def lineage_volumes(self, lineage: LineageId) -> list[Volume]:
        return self._volumes("WHERE volume.lineage=?", lineage)

    def remove_volume(self, volume: VolumeId) -> None:
        for table, column in (
            ("attachment", "volume"),
            ("tag", "resource"),
            ("name", "resource"),
            ("verification", "resource"),
            ("volume", "id"),
        ):
            self._rows(f"DELETE FROM {table} WHERE {column}=?", volume)
        self._bury_kin(volume)

    # --- attachments

    def next_attach_generation(self, volume: VolumeId) -> int:
        """Return a generation no earlier attachment of the volume had."""
        row = self._row(
            "UPDATE volume SET attach_generation=attach_generation+1 WHERE id=? RETURNING attach_generation", volume
        )
        if row is None:
            raise VolumeNotFound(volume=volume)
        return int(row[0])

    def put_attachment(self, attachment: Attachment) -> None:
        self._rows(
            "INSERT OR REPLACE INTO attachment VALUES (?,?,?,?,?,?,?,?,?,?,?,?)",
            attachment.volume,
            attachment.state.value,
            attachment.boot_id,
            attachment.generation,
            attachment.exposed_as.value,
            int(attachment.read_only),
            attachment.path,
            attachment.loop_minor,
            attachment.grant,
            attachment.head,
            attachment.mount_point,
            attachment.time,
        )

    def remove_attachment(self, volume: VolumeId) -> None:
        self._rows("DELETE FROM attachment WHERE volume=?", volume)

    def used_loop_minors(self) -> set[int]:
        return {int(row[0]) for row in self._rows("SELECT loop_minor FROM attachment WHERE loop_minor IS NOT NULL")}

    # --- snapshots

    def add_snapshot(self, snapshot: Snapshot) -> None:
        self._rows(
            "INSERT INTO snapshot VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
            snapshot.id,
            snapshot.account,
            snapshot.owner,
            snapshot.volume,
            snapshot.size,
            snapshot.state.value,
            snapshot.message,
            snapshot.description,
            int(snapshot.cipher),
            snapshot.key_arn,
            snapshot.wrapped_key,
            _json(snapshot.context),
            snapshot.lineage,
            snapshot.new_head,
            snapshot.integrity.value,
            snapshot.authority,
            snapshot.pause_us,
            snapshot.started,
            snapshot.completed,
        )
        self.give_name(snapshot.account, snapshot.name, snapshot.id)
        self.set_tags(snapshot.id, snapshot.tags)
        self._add_kin(Kin(snapshot.id, snapshot.lineage, None, snapshot.volume, 1, 1, frozenset(), False))

    def snapshot(self, snapshot: SnapshotId) -> Snapshot:
        """Return one snapshot with its name and tags; raises SnapshotNotFound."""
        found = self._snapshots("WHERE snapshot.id=?", snapshot)
        if not found:
            raise SnapshotNotFound(snapshot=snapshot)
        return found[0]

    def snapshots(
        self, account: AccountId | None = None, after: tuple[str, str] | None = None, limit: int = -1
    ) -> list[Snapshot]:
        """Return all snapshots, or those of one account, oldest first; a page of them behind (time, id)."""
        # Only the conditions that there are: "or there is none" in SQL would keep SQLite from using its index.
        conditions = ["snapshot.account=?"] * (account is not None) + ["(started, snapshot.id)>(?, ?)"] * bool(after)
        where = "WHERE " + " AND ".join(conditions) if conditions else ""
        arguments = (*(() if account is None else (account,)), *(after or ()))
        return self._snapshots(where, *arguments, limit=limit)

    def pending_snapshots(self) -> list[Snapshot]:
        return self._snapshots("WHERE state='pending'")

    def lineage_snapshot_ids(self, lineage: LineageId) -> list[SnapshotId]:
        """Return the ids of all snapshots of a lineage, oldest first."""
        sql = "SELECT id FROM snapshot WHERE lineage=? ORDER BY started, id"
        return [SnapshotId(row[0]) for row in self._rows(sql, lineage)]

    def lineage_snapshots(self, lineage: LineageId) -> list[Snapshot]:
        return self._snapshots("WHERE snapshot.lineage=?", lineage)

    def _snapshots(self, where: str, *args: Any, limit: int = -1) -> list[Snapshot]:
        rows = self._rows(
            "SELECT snapshot.id, snapshot.account, owner, name.name, volume, size, state, message, description, "
            "cipher, key_arn, wrapped_key, context, lineage, new_head, integrity, authority, pause_us, started, "
            "completed "
            f"FROM snapshot JOIN name ON name.resource=snapshot.id {where} "
            f"ORDER BY started, snapshot.id LIMIT {limit:d}",
            *args,
        )
        tags: dict[str, dict[str, str]] = {}
        for resource, key, value in self._rows(
            f"SELECT resource, key, value FROM tag JOIN snapshot ON snapshot.id=tag.resource {where} ORDER BY key",
            *args,
        ):
            tags.setdefault(resource, {})[key] = value
        found = self._verifications("snapshot", where, *args)
        return [_snapshot_from_row(row, tags.get(row[0], {}), found.get(row[0])) for row in rows]

    def find_snapshot(self, caller: Caller, name_or_id: str) -> Snapshot:
        """Return the snapshot a caller means; the rules are those of ``find_volume``."""
        if looks_like_snapshot_id(name_or_id):
            snapshot_id = parse_snapshot_id(name_or_id)
        else:
            resource = self.resource_named(caller.account, name_or_id)
            if resource is None or not looks_like_snapshot_id(resource):
                raise SnapshotNotFound(snapshot=name_or_id)
            snapshot_id = SnapshotId(resource)
        snapshot = self.snapshot(snapshot_id)
        if snapshot.account != caller.account and not caller.is_admin:
            raise SnapshotNotFound(snapshot=name_or_id)
        return snapshot

    def complete_snapshot(
        self, snapshot: SnapshotId, completed: str, pause_us: int | None, integrity: Integrity
    ) -> None:
        self._rows(
            "UPDATE snapshot SET state=?, completed=?, pause_us=?, integrity=? WHERE id=?",
            SnapshotState.COMPLETED.value,
            completed,
            pause_us,
            integrity.value,
            snapshot,
        )

    def set_snapshot_key(
        self, snapshot: SnapshotId, key_arn: KeyArn, wrapped_key: bytes, context: Mapping[str, str]
    ) -> None:
        self._rows(
            "UPDATE snapshot SET key_arn=?, wrapped_key=?, context=? WHERE id=?",
            key_arn,
            wrapped_key,
            _json(context),
            snapshot,
        )

    def set_authority(self, resource: VolumeId | SnapshotId, authority: str | None) -> None:
        table = "snapshot" if looks_like_snapshot_id(resource) else "volume"
        self._rows(f"UPDATE {table} SET authority=? WHERE id=?", authority, resource)

    def remove_snapshot(self, snapshot: SnapshotId) -> None:
        for table, column in (
            ("tag", "resource"),
            ("name", "resource"),
            ("verification", "resource"),
            ("snapshot", "id"),
        ):
            self._rows(f"DELETE FROM {table} WHERE {column}=?", snapshot)
        self._bury_kin(snapshot)

    # --- the family tree of a lineage's maps; the rules and what they are good for: store/sweep.py

    def kin(self, resource: str) -> Kin | None:
        """Return where a volume or snapshot stands in its family, deleted ones too as long as they are of use."""
        found = self._kin("WHERE id=?", resource)
        return found[0] if found else None

    def relatives(self, kin: Kin) -> list[str]:
        """Return the nearest that are not deleted, in every direction, through deleted ones; ascending.

        Raises StoreDamaged when a link of the family is missing.
        """
        seen, near, queue = {kin.id}, [], [kin]
        roots_seen = False
        while queue:
            at = queue.pop()
            around = self._kin("WHERE parent=?", at.id)
            if at.parent is not None:
                above = self._kin("WHERE id=?", at.parent)
                if not above:
                    raise StoreDamaged(file="catalog", reason=f"it lacks {at.parent}, which {at.id} was made from")
                around += above
            elif not roots_seen:
                # What has no parent hangs on a root that never had a map.
                roots_seen = True
                around += self._kin("WHERE lineage=? AND parent IS NULL", at.lineage)
            for other in around:
                if other.id in seen:
                    continue
                seen.add(other.id)
                if other.deleted:
                    queue.append(other)
                else:
                    near.append(other.id)
        return sorted(near)

    def note_taken(self, snapshot: Snapshot) -> None:
        """Put a snapshot that is taken now between its volume and what that was made from."""
        volume = self.kin(snapshot.volume)
        if volume is None:
            return
        self._rows(
            "UPDATE family SET parent=?, writer=?, first=?, beyond=?, left=? WHERE id=?",
            volume.parent,
            volume.writer,
            volume.first,
            snapshot.new_head,
            _numbers(volume.left),
            snapshot.id,
        )
        self._rows(
            "UPDATE family SET parent=?, first=?, left='[]' WHERE id=?", snapshot.id, snapshot.new_head, volume.id
        )

    def note_not_taken(self, snapshot: Snapshot) -> None:
        """Undo ``note_taken`` for a snapshot that did not come into being."""
        kin = self.kin(snapshot.id)
        if kin is not None and kin.beyond > 1:
            self._rows(
                "UPDATE family SET parent=?, first=? WHERE parent=? AND id=?",
                kin.parent,
                kin.first,
                kin.id,
                snapshot.volume,
            )
            self.note_left(snapshot.volume, kin.left)

    def note_left(self, resource: VolumeId | SnapshotId, layers: Collection[int]) -> None:
        """Remember layers that a volume has moved chunks off; for a snapshot, before it was taken."""
        kin = self.kin(resource)
        if kin is not None and not kin.left.issuperset(layers):
            self._rows("UPDATE family SET left=? WHERE id=?", _numbers(kin.left.union(layers)), resource)

    def forget_left(self, volume: VolumeId, layers: Collection[int]) -> None:
        kin = self.kin(volume)
        if kin is not None:
            self._rows("UPDATE family SET left=? WHERE id=?", _numbers(kin.left.difference(layers)), volume)

    def note_made_from(self, resource: VolumeId | SnapshotId, source: SnapshotId) -> None:
        """Put what is made with the map of a snapshot below it."""
        self._rows("UPDATE family SET parent=? WHERE id=?", source, resource)

    def _add_kin(self, kin: Kin) -> None:
        self._rows(
            "INSERT INTO family VALUES (?,?,?,?,?,?,?,?)",
            kin.id,
            kin.lineage,
            kin.parent,
            kin.writer,
            kin.first,
            kin.beyond,
            _numbers(kin.left),
            int(kin.deleted),
        )

    def _kin(self, where: str, *args: Any) -> list[Kin]:
        return [
            Kin(ident, LineageId(lineage), parent, writer, first, beyond, frozenset(json.loads(left)), bool(deleted))
            for ident, lineage, parent, writer, first, beyond, left, deleted in self._rows(
                f"SELECT id, lineage, parent, writer, first, beyond, left, deleted FROM family {where}", *args
            )
        ]

    def _bury_kin(self, resource: str) -> None:
        self._rows("UPDATE family SET deleted=1 WHERE id=?", resource)
        self._prune_kin(resource)

    def _prune_kin(self, resource: str) -> None:
        """Forget a deleted one when no two relatives need it to be joined; one whose map is not swept yet stays."""
        kin = self.kin(resource)
        if kin is None or not self._is_joint(kin):
            return
        for child in self._kin("WHERE parent=?", resource):
            if self._is_joint(child):
                self._splice_kin(child)
        children = self._kin("WHERE parent=?", resource)
        parent = None if kin.parent is None else self.kin(kin.parent)
        if len(children) < 2 or parent is None or self._is_joint(parent):
            self._splice_kin(kin)
            if parent is not None and not children:
                self._prune_kin(parent.id)

    def _is_joint(self, kin: Kin) -> bool:
        """Say whether it is there only to join others: deleted, and its map compared with theirs."""
        return kin.deleted and not self._rows("SELECT 1 FROM removing WHERE resource=?", kin.id)

    def _splice_kin(self, kin: Kin) -> None:
        self._rows("UPDATE family SET parent=? WHERE parent=?", kin.parent, kin.id)
        self._rows("DELETE FROM family WHERE id=?", kin.id)

    # --- what is being removed

    def begin_removing(self, resource: str) -> None:
        """Note that files and anchor of a resource, whose row goes after this, are to go too: before it goes."""
        self._rows("INSERT OR IGNORE INTO removing VALUES (?)", resource)

    def end_removing(self, resource: str) -> None:
        self._rows("DELETE FROM removing WHERE resource=?", resource)
        self._prune_kin(resource)

    def removing_of(self, lineage: LineageId) -> list[Kin]:
        """Return what was deleted from a lineage and whose map was not compared with its relatives' yet."""
        return self._kin("WHERE lineage=? AND deleted=1 AND id IN (SELECT resource FROM removing) ORDER BY id", lineage)

    def removing(self) -> list[str]:
        return [str(row[0]) for row in self._rows("SELECT resource FROM removing ORDER BY resource")]

    # --- jobs

    def put_job(self, job: Job) -> None:
        self._rows(
            "INSERT OR REPLACE INTO job VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?)",
            job.id,
            job.account,
            job.owner,
            job.kind.value,
            job.state.value,
            job.source,
            job.destination,
            job.total,
            job.done,
            job.done_through,
            job.started,
            job.ended,
            None if job.error is None else _json(job.error),
        )

    def jobs(self, account: AccountId | None = None) -> list[Job]:
        """Return all jobs, or those of one account, oldest first."""
        where, args = ("", ()) if account is None else ("WHERE account=?", (account,))
        return [_job_from_row(row) for row in self._rows(f"SELECT * FROM job {where} ORDER BY started, id", *args)]

    def find_job(self, caller: Caller, ident: str) -> Job:
        """Return a job by its id; raises JobNotFound, also for another account's."""
        row = self._row("SELECT * FROM job WHERE id=?", parse_job_id(ident))
        if row is None or (row[1] != caller.account and not caller.is_admin):
            raise JobNotFound(job=ident)
        return _job_from_row(row)

    # --- settings

    def setting(self, key: str) -> str | None:
        row = self._row("SELECT value FROM setting WHERE key=?", key)
        return None if row is None else str(row[0])

    def set_setting(self, key: str, value: str) -> None:
        self._rows("INSERT OR REPLACE INTO setting VALUES (?,?)", key, value)


def _volume_from_row(row: tuple[Any, ...], tags: Mapping[str, str], verification: Verification | None) -> Volume:
    (
        ident,
        account,
        owner,
        name,
        size,
        state,
        reason,
        cipher,
        key_arn,
        wrapped_key,
        context,
        lineage,
        head,
        snapshot,
        attach_generation,
        integrity,
        authority,
        created,
        a_state,
        boot_id,
        generation,
        exposed_as,
        read_only,
        path,
        loop_minor,
        grant,
        active_head,
        mount_point,
        time,
        preallocated,
    ) = row
    volume_id = VolumeId(ident)
    attachment = None
    if a_state is not None:
        attachment = Attachment(
            volume_id,
            AttachmentState(a_state),
            boot_id,
            generation,
            ExposedAs(exposed_as),
            bool(read_only),
            path,
            loop_minor,
            grant,
            active_head,
            mount_point,
            time,
        )
    return Volume(
        id=volume_id,
        account=AccountId(account),
        owner=owner,
        name=name,
        size=size,
        state=VolumeState(state),
        cipher=Cipher(cipher),
        key_arn=None if key_arn is None else KeyArn(key_arn),
        wrapped_key=None if wrapped_key is None else bytes(wrapped_key),
        context=json.loads(context),
        lineage=LineageId(lineage),
        head=head,
        snapshot=None if snapshot is None else SnapshotId(snapshot),
        attach_generation=attach_generation,
        integrity=Integrity(integrity),
        authority=authority,
        created=created,
        reason=reason,
        tags=dict(tags),
        attachment=attachment,
        verification=verification,
        preallocated=preallocated or 0,
    )


def _snapshot_from_row(row: tuple[Any, ...], tags: Mapping[str, str], verification: Verification | None) -> Snapshot:
    (
        ident,
        account,
        owner,
        name,
        volume,
        size,
        state,
        message,
        description,
        cipher,
        key_arn,
        wrapped_key,
        context,
        lineage,
        new_head,
        integrity,
        authority,
        pause_us,
        started,
        completed,
    ) = row
    return Snapshot(
        id=SnapshotId(ident),
        account=AccountId(account),
        owner=owner,
        name=name,
        volume=VolumeId(volume),
        size=size,
        state=SnapshotState(state),
        message=message,
        description=description,
        cipher=Cipher(cipher),
        key_arn=None if key_arn is None else KeyArn(key_arn),
        wrapped_key=None if wrapped_key is None else bytes(wrapped_key),
        context=json.loads(context),
        lineage=LineageId(lineage),
        new_head=new_head,
        integrity=Integrity(integrity),
        authority=authority,
        pause_us=pause_us,
        started=started,
        completed=completed,
        tags=tags,
        verification=verification,
    )


def _job_from_row(row: tuple[Any, ...]) -> Job:
    ident, account, owner, kind, state, source, destination, total, done, done_through, started, ended, error = row
    return Job(
        id=JobId(ident),
        account=AccountId(account),
        owner=owner,
        kind=JobKind(kind),
        state=JobState(state),
        source=SnapshotId(source),
        destination=destination,
        total=total,
        done=done,
        done_through=done_through,
        started=started,
        ended=ended,
        error=None if error is None else json.loads(error),
    )


def _numbers(layers: Collection[int]) -> str:
    return json.dumps(sorted(layers))


def _json(value: Mapping[str, str]) -> str:
    return json.dumps(dict(value), sort_keys=True)
