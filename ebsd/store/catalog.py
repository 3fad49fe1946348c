"""The catalog: what volumes, lineages, layers and attachments exist, in one SQLite file.

1. One connection, used by one thread at a time; ``Catalog`` itself starts no thread.
2. A change is one plain function over ``Transaction``: load, decide, write. It commits or leaves nothing.
3. A row in state ``creating`` precedes every file; a row in a final state names only durable files.
4. What cannot be rebuilt from records, map headers and file names does not live here alone.

SQLite runs with WAL and synchronous=FULL: a returned commit survives power loss
(https://sqlite.org/pragma.html#pragma_synchronous). ``locking_mode=EXCLUSIVE`` keeps a second opener out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

import apsw

from ebsd.domain.errors import (
    NameInUse,
    NoSpace,
    ResourceNotFound,
    StoreDamaged,
    UnsupportedFormat,
    VolumeNotFound,
)
from ebsd.domain.ids import (
    AccountId,
    KeyArn,
    LineageId,
    SnapshotId,
    VolumeId,
    looks_like_volume_id,
    parse_volume_id,
)
from ebsd.domain.model import (
    Attachment,
    Caller,
    Cipher,
    ExposedAs,
    Integrity,
    Layer,
    LayerState,
    Lineage,
    Volume,
)
from ebsd.domain.states import AttachmentState, VolumeState

T = TypeVar("T")

SCHEMA_VERSION: Final = 1

_MIGRATIONS: Final[dict[int, str]] = {
    # From version N - 1 to N. Never edit a migration that was released; add the next one.
    1: """
    CREATE TABLE lineage (
        id          TEXT PRIMARY KEY,   -- UUID text; EC2's DataEncryptionKeyId
        account     TEXT NOT NULL,
        sector_size INTEGER NOT NULL,
        cipher      INTEGER NOT NULL,   -- domain.model.Cipher
        next_layer  INTEGER NOT NULL    -- never goes back, so a layer number is never used twice
    ) STRICT;
    CREATE TABLE layer (
        lineage TEXT NOT NULL REFERENCES lineage(id),
        number  INTEGER NOT NULL,
        uuid    BLOB NOT NULL UNIQUE,
        volume  TEXT NOT NULL,          -- the volume it was made as the head of
        state   TEXT NOT NULL,          -- creating, head, sealed
        size    INTEGER NOT NULL,       -- bytes of the volume it was made for
        PRIMARY KEY (lineage, number)
    ) STRICT;
    CREATE TABLE volume (
        id          TEXT PRIMARY KEY,
        account     TEXT NOT NULL,
        owner       TEXT NOT NULL,      -- user name when it was made; the account binds
        size        INTEGER NOT NULL,   -- bytes
        state       TEXT NOT NULL,      -- domain.states.VolumeState
        reason      TEXT NOT NULL,      -- why it is in error, else ''
        cipher      INTEGER NOT NULL,
        key_arn     TEXT,
        wrapped_key BLOB,
        context     TEXT NOT NULL,      -- encryption context of wrapped_key, JSON
        lineage     TEXT NOT NULL REFERENCES lineage(id),
        head        INTEGER NOT NULL,
        snapshot    TEXT,
        attach_generation INTEGER NOT NULL,
        integrity   TEXT NOT NULL,      -- domain.model.Integrity: what the last check of record and map said
        created     TEXT NOT NULL       -- RFC 3339 UTC
    ) STRICT;
    CREATE INDEX volume_account ON volume(account);
    CREATE TABLE name (                 -- volumes and snapshots of an account share one namespace
        account  TEXT NOT NULL,
        name     TEXT NOT NULL,
        resource TEXT NOT NULL UNIQUE,
        PRIMARY KEY (account, name)
    ) STRICT;
    CREATE TABLE tag (
        resource TEXT NOT NULL,
        key      TEXT NOT NULL,
        value    TEXT NOT NULL,
        PRIMARY KEY (resource, key)
    ) STRICT;
    CREATE TABLE attachment (
        volume      TEXT PRIMARY KEY REFERENCES volume(id),
        state       TEXT NOT NULL,      -- domain.states.AttachmentState
        boot_id     TEXT NOT NULL,      -- another boot's attachment is void
        generation  INTEGER NOT NULL,
        exposed_as  TEXT NOT NULL,
        read_only   INTEGER NOT NULL,
        path        TEXT NOT NULL,
        loop_minor  INTEGER,
        grant_id    TEXT,
        mount_point TEXT,
        time        TEXT NOT NULL
    ) STRICT;
    CREATE TABLE setting (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
    """,
}


class Catalog:
    """The open catalog file. Not thread-safe: the caller runs one transaction at a time."""

    def __init__(self, path: Path) -> None:
        """Open or create the file; raises StoreDamaged or UnsupportedFormat when it cannot be used."""
        self.path = path
        try:
            self._db = apsw.Connection(str(path))
            self._db.set_busy_timeout(0)
            for pragma in (
                "locking_mode=EXCLUSIVE",
                "journal_mode=WAL",
                "synchronous=FULL",
                "foreign_keys=ON",
                "cell_size_check=ON",
                "trusted_schema=OFF",
                "mmap_size=0",  # an I/O error must be an error, not a SIGBUS
            ):
                self._db.execute(f"PRAGMA {pragma}").fetchall()
            self._migrate()
            verdict = self._db.execute("PRAGMA quick_check(1)").fetchone()
        except apsw.Error as exc:
            raise StoreDamaged(file=path, reason=str(exc)) from exc
        if verdict is None or verdict[0] != "ok":
            raise StoreDamaged(file=path, reason=f"SQLite's quick_check says: {verdict and verdict[0]}")

    def _migrate(self) -> None:
        (version,) = self._db.execute("PRAGMA user_version").fetchone() or (0,)
        if version > SCHEMA_VERSION:
            raise UnsupportedFormat(file=self.path, what=f"schema version {version}")
        for step in range(version + 1, SCHEMA_VERSION + 1):
            with self._db:
                self._db.execute(_MIGRATIONS[step])
                self._db.execute(f"PRAGMA user_version={step}")

    def run(self, use_case: Callable[[Transaction], T]) -> T:
        """Run one transaction; whatever it raises is raised again and nothing of it stays."""
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
        return result

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

    def add_layer(self, lineage: LineageId, uuid: bytes, volume: VolumeId, size: int) -> Layer:
        """Take the next layer number of the lineage, for ever, and add a layer in state ``creating``."""
        row = self._row("UPDATE lineage SET next_layer=next_layer+1 WHERE id=? RETURNING next_layer-1", lineage)
        if row is None:
            raise ResourceNotFound(resource=lineage)
        layer = Layer(lineage, int(row[0]), uuid, volume, LayerState.CREATING, size)
        self._rows(
            "INSERT INTO layer VALUES (?,?,?,?,?,?)", lineage, layer.number, uuid, volume, layer.state.value, size
        )
        return layer

    def set_layer_state(self, lineage: LineageId, number: int, state: LayerState) -> None:
        self._rows("UPDATE layer SET state=? WHERE lineage=? AND number=?", state.value, lineage, number)

    def layers(self, lineage: LineageId) -> list[Layer]:
        """Return the layers of a lineage, oldest first."""
        return [
            Layer(lineage, number, bytes(uuid), VolumeId(volume), LayerState(state), size)
            for number, uuid, volume, state, size in self._rows(
                "SELECT number, uuid, volume, state, size FROM layer WHERE lineage=? ORDER BY number", lineage
            )
        ]

    def remove_lineage(self, lineage: LineageId) -> None:
        self._rows("DELETE FROM layer WHERE lineage=?", lineage)
        self._rows("DELETE FROM lineage WHERE id=?", lineage)

    # --- volumes

    def add_volume(self, volume: Volume) -> None:
        self._rows(
            "INSERT INTO volume VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
            volume.id,
            volume.account,
            volume.owner,
            volume.size,
            volume.state.value,
            volume.reason,
            int(volume.cipher),
            volume.key_arn,
            volume.wrapped_key,
            json.dumps(dict(volume.context), sort_keys=True),
            volume.lineage,
            volume.head,
            volume.snapshot,
            volume.attach_generation,
            volume.integrity.value,
            volume.created,
        )
        self.give_name(volume.account, volume.name, volume.id)
        self.set_tags(volume.id, volume.tags)

    def volume(self, volume: VolumeId) -> Volume:
        """Return one volume with its name, tags and attachment; raises VolumeNotFound."""
        found = self._volumes("WHERE volume.id=?", volume)
        if not found:
            raise VolumeNotFound(volume=volume)
        return found[0]

    def volumes(self, account: AccountId | None = None) -> list[Volume]:
        """Return all volumes, or those of one account, oldest first."""
        return self._volumes("") if account is None else self._volumes("WHERE volume.account=?", account)

    def _volumes(self, where: str, *args: Any) -> list[Volume]:
        tags: dict[str, dict[str, str]] = {}
        for resource, key, value in self._rows(
            f"SELECT resource, key, value FROM tag JOIN volume ON volume.id=tag.resource {where} ORDER BY key", *args
        ):
            tags.setdefault(resource, {})[key] = value
        rows = self._rows(
            "SELECT volume.id, volume.account, owner, name.name, size, volume.state, reason, cipher, key_arn, "
            "wrapped_key, context, lineage, head, snapshot, attach_generation, integrity, created, "
            "a.state, a.boot_id, a.generation, a.exposed_as, a.read_only, a.path, a.loop_minor, a.grant_id, "
            "a.mount_point, a.time "
            "FROM volume JOIN name ON name.resource=volume.id LEFT JOIN attachment a ON a.volume=volume.id "
            f"{where} ORDER BY volume.created, volume.id",
            *args,
        )
        return [_volume_from_row(row, tags.get(row[0], {})) for row in rows]

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
            json.dumps(dict(context), sort_keys=True),
            volume,
        )

    def remove_volume(self, volume: VolumeId) -> None:
        for table, column in (("attachment", "volume"), ("tag", "resource"), ("name", "resource"), ("volume", "id")):
            self._rows(f"DELETE FROM {table} WHERE {column}=?", volume)

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
            "INSERT OR REPLACE INTO attachment VALUES (?,?,?,?,?,?,?,?,?,?,?)",
            attachment.volume,
            attachment.state.value,
            attachment.boot_id,
            attachment.generation,
            attachment.exposed_as.value,
            int(attachment.read_only),
            attachment.path,
            attachment.loop_minor,
            attachment.grant,
            attachment.mount_point,
            attachment.time,
        )

    def remove_attachment(self, volume: VolumeId) -> None:
        self._rows("DELETE FROM attachment WHERE volume=?", volume)

    def used_loop_minors(self) -> set[int]:
        return {int(row[0]) for row in self._rows("SELECT loop_minor FROM attachment WHERE loop_minor IS NOT NULL")}

    # --- settings

    def setting(self, key: str) -> str | None:
        row = self._row("SELECT value FROM setting WHERE key=?", key)
        return None if row is None else str(row[0])

    def set_setting(self, key: str, value: str) -> None:
        self._rows("INSERT OR REPLACE INTO setting VALUES (?,?)", key, value)


def _volume_from_row(row: tuple[Any, ...], tags: Mapping[str, str]) -> Volume:
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
        created,
        a_state,
        boot_id,
        generation,
        exposed_as,
        read_only,
        path,
        loop_minor,
        grant,
        mount_point,
        time,
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
        created=created,
        reason=reason,
        tags=dict(tags),
        attachment=attachment,
    )
