"""Sealed documents in SQLite: written with their head in one transaction, verified all together at start.

1. A row is opaque without the epoch key, and its seal binds kind, id, version and epoch.
2. Every mutation writes its documents, their ledger rows and the head in one transaction; the version of a
   document is the counter of the transaction that wrote it, so no version ever comes back.
3. The ledger is plain (kind, id, version, SHA-256 of the sealed document) and is authenticated by the head's
   digests of it. That is what lets a missing, added, older or edited document be refused *by name*.
4. Nothing is repaired: what does not fit raises IntegrityFailure, and the broker stays in rescue.
5. Backing keys are opened when they are used and wiped afterwards; between uses only sealed bytes are held.

Synchronous and not thread-safe: ``Store`` runs one call at a time, off the event loop. Byte layout: FORMAT.md.
"""

from __future__ import annotations

import hashlib
import os
import struct
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final, cast

import apsw
import msgspec

from ebsd.crypto.kdf import LABEL_DOCUMENT
from ebsd.crypto.seal import SealBroken, open_sealed, seal
from ebsd.crypto.secret import Secret
from ebsd.domain.errors import IntegrityFailure, KeyServiceUnavailable, NoSpace, UnsupportedFormat
from ebsd.kms.epoch import Epoch
from ebsd.kms.records import KINDS, Document, Kind, from_json, to_json

SECRET_BYTES: Final = 32

_HEAD: Final = "head"
_NAME: Final = "The key database"
_WRITE_FAILED: Final = "an earlier write to its database failed; start it again"
_FORMAT: Final = 1
_APPLICATION_ID: Final = 0x4542534B  # "EBSK"
_U32: Final = struct.Struct(">I")
_U64: Final = struct.Struct(">Q")
_SCHEMA: Final = (
    "CREATE TABLE documents (kind TEXT NOT NULL, id TEXT NOT NULL, version INTEGER NOT NULL, "
    "sealed BLOB NOT NULL, PRIMARY KEY (kind, id)) STRICT, WITHOUT ROWID",
    "CREATE TABLE ledger (kind TEXT NOT NULL, id TEXT NOT NULL, version INTEGER NOT NULL, "
    "digest BLOB NOT NULL, PRIMARY KEY (kind, id)) STRICT, WITHOUT ROWID",
)


class Row(msgspec.Struct, frozen=True, array_like=True):
    """One sealed document as stored."""

    kind: str
    id: str
    version: int
    sealed: bytes


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """What the ledger says of one document."""

    version: int
    digest: bytes


class Head(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The document over all documents."""

    counter: int
    epoch: int
    digests: dict[str, str]
    """Kind -> SHA-256, in hexadecimal, over the sorted ledger rows of that kind."""


class Secrets(Enum):
    KEEP = "keep"
    """The document keeps the secrets it has."""


@dataclass(frozen=True, slots=True)
class Put:
    document: Document
    secrets: tuple[Secret, ...] | Secrets = Secrets.KEEP
    """32 bytes each, in the order the document lists them. KEEP for a new document means none."""


@dataclass(frozen=True, slots=True)
class Drop:
    kind: Kind
    id: str


Change = Put | Drop
Ledger = dict[str, dict[str, Entry]]
"""Kind -> id -> entry."""


# --- sealing ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Opened:
    """The two parts of a document; ``wipe`` ends its secrets."""

    body: bytes
    secrets: tuple[Secret, ...]

    def wipe(self) -> None:
        for secret in self.secrets:
            secret.wipe()


def _aad(kind: str, doc_id: str, version: int, epoch: int) -> bytes:
    # Neither kind nor id can hold a zero byte: kinds are ours, ids are checked before they become ids.
    return b"\0".join((kind.encode(), doc_id.encode(), _U64.pack(version) + _U64.pack(epoch)))


def seal_document(
    epoch: Epoch, kind: str, doc_id: str, version: int, body: bytes, secrets: Sequence[Secret] = ()
) -> bytes:
    """Return the sealed form of one document."""
    raw_length = sum(len(secret) for secret in secrets)
    with Secret(2 * _U32.size + len(body) + raw_length) as plaintext:
        view = plaintext.view
        _U32.pack_into(view, 0, len(body))
        view[_U32.size : _U32.size + len(body)] = body
        at = _U32.size + len(body)
        _U32.pack_into(view, at, raw_length)
        at += _U32.size
        for secret in secrets:
            view[at : at + len(secret)] = secret.view
            at += len(secret)
        return seal(epoch.key, label=LABEL_DOCUMENT, aad=_aad(kind, doc_id, version, epoch.number), plaintext=view)


def open_document(epoch: Epoch, row: Row) -> Opened:
    """Open one document; raises SealBroken when it is not the one of this name, version and epoch."""
    aad = _aad(row.kind, row.id, row.version, epoch.number)
    with open_sealed(epoch.key, label=LABEL_DOCUMENT, aad=aad, sealed=row.sealed) as plaintext:
        view = plaintext.view
        try:
            (length,) = _U32.unpack_from(view, 0)
            body = bytes(view[_U32.size : _U32.size + length])
            at = _U32.size + length
            (raw_length,) = _U32.unpack_from(view, at)
        except struct.error:  # who made a key backup sealed it, lengths included
            raise SealBroken from None
        at += _U32.size
        if at + raw_length != len(view) or raw_length % SECRET_BYTES:
            raise SealBroken
        starts = range(at, len(view), SECRET_BYTES)
        return Opened(body, tuple(Secret.from_buffer(view[start : start + SECRET_BYTES]) for start in starts))


def sealed_digest(row: Row) -> bytes:
    return hashlib.sha256(row.sealed).digest()


def ledger_digest(entries: Mapping[str, Entry]) -> str:
    """Return SHA-256 over the sorted (be32 length, id, be64 version, digest) of one kind, in hexadecimal."""
    return _Digested.of(entries).hexdigest()


class _Digested:
    """The ledger of one kind in the order and the bytes in which it is digested, so that a change costs a change."""

    __slots__ = ("_ids", "_pieces")

    def __init__(self, ids: list[str], pieces: list[bytes]) -> None:
        self._ids = ids
        self._pieces = pieces

    @classmethod
    def of(cls, entries: Mapping[str, Entry]) -> _Digested:
        ids = sorted(entries)
        return cls(ids, [_piece(doc_id, entries[doc_id]) for doc_id in ids])

    def changed(self, changes: Mapping[str, Entry | None]) -> _Digested:
        """Return a copy with entries put, or dropped where they are None."""
        ids, pieces = self._ids.copy(), self._pieces.copy()
        for doc_id, entry in changes.items():
            at = bisect_left(ids, doc_id)
            there = at < len(ids) and ids[at] == doc_id
            if there:
                del ids[at], pieces[at]
            if entry is not None:
                ids.insert(at, doc_id)
                pieces.insert(at, _piece(doc_id, entry))
        return _Digested(ids, pieces)

    def hexdigest(self) -> str:
        return hashlib.sha256(b"".join(self._pieces)).hexdigest()


def _piece(doc_id: str, entry: Entry) -> bytes:
    name = doc_id.encode()
    return _U32.pack(len(name)) + name + _U64.pack(entry.version) + entry.digest


LATER_KINDS: Final = frozenset({Kind.ADMISSION.value})
"""Kinds that heads of the first version do not have."""


# --- verification -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Verified:
    """A set of rows that is exactly what its head says."""

    head: Head
    head_row: Row
    documents: tuple[Document, ...]
    rows: dict[tuple[str, str], Row]
    ledger: Ledger


def verify(epoch: Epoch, rows: Iterable[Row], ledger: Ledger) -> Verified:
    """Check every row against the ledger, the ledger against the head, and open everything.

    Raises IntegrityFailure that names the first document that is missing, added, older or edited.
    """
    present = {(row.kind, row.id): row for row in rows}
    head_row = present.pop((_HEAD, _HEAD), None)
    if head_row is None:
        raise _refusal("the document head is missing")
    head = _open_head(epoch, head_row)
    for kind in Kind:
        if ledger_digest(ledger.get(kind.value, {})) != head.digests[kind.value]:
            _blame_document(epoch, present, kind.value)
            raise _refusal(f"the ledger of {kind.value} documents is not the one the head was made for")
    for kind_name, entries in ledger.items():
        if kind_name not in head.digests:
            raise _refusal(f"the ledger has documents of the unknown kind {kind_name!r}")
        for doc_id, entry in entries.items():
            row = present.get((kind_name, doc_id))
            if row is None:
                raise _refusal(f"the document {kind_name} {doc_id} is missing")
            if row.version < entry.version:
                raise _refusal(f"the document {kind_name} {doc_id} is an older one that was put back")
            if row.version != entry.version or sealed_digest(row) != entry.digest:
                raise _refusal(f"the document {kind_name} {doc_id} was changed")
    documents = []
    for (kind_name, doc_id), row in sorted(present.items()):
        if doc_id not in ledger.get(kind_name, {}):
            raise _refusal(f"the document {kind_name} {doc_id} was added")
        documents.append(_open_checked(epoch, row))
    return Verified(head, head_row, tuple(documents), present, ledger)


def _open_head(epoch: Epoch, row: Row) -> Head:
    try:
        head = from_json(Head, open_document(epoch, row).body)
    except (SealBroken, ValueError, struct.error) as exc:
        raise _refusal(
            "the document head does not open: it was changed, or the epoch file is of another state"
        ) from exc
    if head.counter != row.version or head.epoch != epoch.number:
        raise _refusal("the document head is of another epoch or transaction")
    known, present = {kind.value for kind in Kind}, set(head.digests)
    if present - known or known - present - LATER_KINDS:
        raise _refusal("the document head has other kinds of documents than this version knows")
    # Before a kind came up there was none of it: a row of it is refused, for the head has no such ledger.
    none = {kind: ledger_digest({}) for kind in known - present}
    return msgspec.structs.replace(head, digests={**head.digests, **none}) if none else head


def _open_checked(epoch: Epoch, row: Row) -> Document:
    try:
        opened = open_document(epoch, row)
    except (SealBroken, struct.error) as exc:
        raise _refusal(f"the document {row.kind} {row.id} was changed: its seal is broken") from exc
    secrets = len(opened.secrets)
    opened.wipe()
    try:
        document = from_json(KINDS[Kind(row.kind)], opened.body)
    except ValueError as exc:
        raise _refusal(f"the document {row.kind} {row.id} cannot be understood") from exc
    if document.doc_id != row.id or secrets != len(getattr(document, "backing", ())):
        raise _refusal(f"the document {row.kind} {row.id} is not the one its name says")
    return document


def _blame_document(epoch: Epoch, present: Mapping[tuple[str, str], Row], kind: str) -> None:
    """Raise for the first document of a kind whose own seal is broken; the ledger cannot be asked any more."""
    for (row_kind, _), row in sorted(present.items()):
        if row_kind == kind:
            _open_checked(epoch, row)


def _refusal(reason: str) -> IntegrityFailure:
    return IntegrityFailure(resource=_NAME, reason=reason)


# --- the database -------------------------------------------------------------------------------------------


def create_database(path: Path, rows: Iterable[Row], ledger: Ledger) -> None:
    """Write a complete new database file and sync it; the directory is the caller's to sync."""
    path.unlink(missing_ok=True)
    with _apsw_errors():
        db = apsw.Connection(str(path))
        try:
            db.pragma("synchronous", "EXTRA")
            db.pragma("application_id", _APPLICATION_ID)
            db.pragma("user_version", _FORMAT)
            with db:
                for statement in _SCHEMA:
                    db.execute(statement)
                db.executemany(
                    "INSERT INTO documents VALUES (?, ?, ?, ?)",
                    ((row.kind, row.id, row.version, row.sealed) for row in rows),
                )
                db.executemany(
                    "INSERT INTO ledger VALUES (?, ?, ?, ?)",
                    (
                        (kind, doc_id, entry.version, entry.digest)
                        for kind, entries in ledger.items()
                        for doc_id, entry in entries.items()
                    ),
                )
        finally:
            db.close()
    path.chmod(0o600)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def empty_rows(epoch: Epoch) -> tuple[list[Row], Ledger]:
    """Return the rows of a state without documents: the head alone."""
    digests = {kind.value: ledger_digest({}) for kind in Kind}
    return [_head_row(epoch, Head(1, epoch.number, digests))], {}


def resealed(old: Epoch, new: Epoch, rows: Iterable[Row], counter: int) -> tuple[list[Row], Ledger]:
    """Return the documents of one epoch as those of another, written by transaction ``counter``, with their head."""
    sealed = []
    for row in rows:
        if row.kind == _HEAD:
            continue
        opened = open_document(old, row)
        try:
            again = seal_document(new, row.kind, row.id, counter, opened.body, opened.secrets)
        finally:
            opened.wipe()
        sealed.append(Row(row.kind, row.id, counter, again))
    ledger = ledger_of(sealed)
    digests = {kind.value: ledger_digest(ledger.get(kind.value, {})) for kind in Kind}
    return [_head_row(new, Head(counter, new.number, digests)), *sealed], ledger


def _head_row(epoch: Epoch, head: Head) -> Row:
    return Row(_HEAD, _HEAD, head.counter, seal_document(epoch, _HEAD, _HEAD, head.counter, to_json(head)))


def _kinds(changes: Sequence[Change]) -> set[str]:
    return {(change.document.kind if isinstance(change, Put) else change.kind).value for change in changes}


class DocumentStore:
    """The open database of a verified state."""

    def __init__(self, path: Path, epoch: Epoch) -> None:
        """Open and verify; raises IntegrityFailure, UnsupportedFormat, KeyServiceUnavailable."""
        if not path.exists():
            raise _refusal(f"{path.name} is missing, but its epoch file is there")
        self._epoch = epoch
        self._broken = ""
        """Why nothing can be written any more."""
        with _apsw_errors():
            self._db = _connect(path)
        try:
            with _apsw_errors():
                rows, ledger = _read(self._db)
            self._state = verify(epoch, rows, ledger)
            self._digested = {kind.value: _Digested.of(ledger.get(kind.value, {})) for kind in Kind}
        except BaseException:
            self._db.close()
            raise

    @property
    def documents(self) -> tuple[Document, ...]:
        """The documents as they were verified at the opening."""
        return self._state.documents

    @property
    def counter(self) -> int:
        return self._state.head.counter

    @property
    def epoch(self) -> Epoch:
        return self._epoch

    def secrets(self, kind: Kind, doc_id: str) -> tuple[Secret, ...]:
        """Open the secrets of one document; the caller wipes them."""
        return open_document(self._epoch, self._state.rows[kind.value, doc_id]).secrets

    def write(self, changes: Sequence[Change]) -> None:
        """Write the changes and the new head durably, or nothing.

        Raises NoSpace, after which nothing has changed and later writes are possible, and
        KeyServiceUnavailable, after which this object writes no more: whether a failed commit is on the disk
        is only known when it is read again.
        """
        self.check_writable()
        counter = self.counter + 1
        ledger = dict(self._state.ledger)
        for kind in _kinds(changes):
            ledger[kind] = dict(ledger.get(kind, {}))
        written: list[Row] = []
        dropped: list[tuple[str, str]] = []
        for change in changes:
            if isinstance(change, Put):
                row = self._sealed(change, counter)
                written.append(row)
                ledger[row.kind][row.id] = Entry(counter, sealed_digest(row))
            else:
                dropped.append((change.kind.value, change.id))
                ledger[change.kind.value].pop(change.id, None)
        digested = {
            kind: self._digested[kind].changed(
                {
                    doc_id: ledger[kind].get(doc_id)
                    for doc_kind, doc_id in (*((row.kind, row.id) for row in written), *dropped)
                    if doc_kind == kind
                }
            )
            for kind in _kinds(changes)
        }
        touched = {kind: entries.hexdigest() for kind, entries in digested.items()}
        head = Head(counter, self._epoch.number, {**self._state.head.digests, **touched})
        head_row = _head_row(self._epoch, head)
        self._commit([*written, head_row], dropped, ledger)
        self._digested.update(digested)
        rows = self._state.rows
        rows.update({(row.kind, row.id): row for row in written})
        for key in dropped:
            rows.pop(key, None)
        self._state = Verified(head, head_row, self._state.documents, rows, ledger)

    @property
    def is_writable(self) -> bool:
        return not self._broken

    def check_writable(self) -> None:
        """Raise KeyServiceUnavailable when memory and disk may disagree, or the database is closed."""
        if self._broken:
            raise KeyServiceUnavailable(reason=self._broken)

    def _sealed(self, change: Put, version: int) -> Row:
        document = change.document
        kind, doc_id, body = document.kind.value, document.doc_id, to_json(document)
        if not isinstance(change.secrets, Secrets):
            return Row(kind, doc_id, version, seal_document(self._epoch, kind, doc_id, version, body, change.secrets))
        earlier = self._state.rows.get((kind, doc_id))
        kept = () if earlier is None else open_document(self._epoch, earlier).secrets
        try:
            return Row(kind, doc_id, version, seal_document(self._epoch, kind, doc_id, version, body, kept))
        finally:
            for secret in kept:
                secret.wipe()

    def _commit(self, written: Sequence[Row], dropped: Sequence[tuple[str, str]], ledger: Ledger) -> None:
        try:
            with self._db:
                for row in written:
                    self._db.execute(
                        "INSERT OR REPLACE INTO documents VALUES (?, ?, ?, ?)",
                        (row.kind, row.id, row.version, row.sealed),
                    )
                    entry = ledger.get(row.kind, {}).get(row.id)
                    if entry is not None:
                        self._db.execute(
                            "INSERT OR REPLACE INTO ledger VALUES (?, ?, ?, ?)",
                            (row.kind, row.id, entry.version, entry.digest),
                        )
                for key in dropped:
                    self._db.execute("DELETE FROM documents WHERE kind = ? AND id = ?", key)
                    self._db.execute("DELETE FROM ledger WHERE kind = ? AND id = ?", key)
        except apsw.FullError as exc:
            if self._db.in_transaction:
                self._broken = _WRITE_FAILED
            raise NoSpace(where="for the key database") from exc
        except apsw.Error as exc:
            self._broken = _WRITE_FAILED
            raise KeyServiceUnavailable(reason="its database cannot be written") from exc

    def rows(self) -> list[Row]:
        """Return all rows, the head among them: one consistent copy."""
        return [self._state.head_row, *self._state.rows.values()]

    def close_database(self) -> None:
        """Move the write-ahead log into the database and close it; what was read can still be opened."""
        self._broken = "its state is closed"
        self._db.close()

    def reopen_database(self, path: Path) -> None:
        """Go on with the database that this one closed, renamed since; raises KeyServiceUnavailable."""
        with _apsw_errors():
            self._db = _connect(path)
        self._broken = ""

    def close(self) -> None:
        """Close the database and wipe the epoch key; may be called again."""
        self.close_database()
        self._epoch.key.wipe()


def ledger_of(rows: Iterable[Row]) -> Ledger:
    """Return the ledger that fits the rows; only a head can say whether it is the true one."""
    ledger: Ledger = {}
    for row in rows:
        if row.kind != _HEAD:
            ledger.setdefault(row.kind, {})[row.id] = Entry(row.version, sealed_digest(row))
    return ledger


@contextmanager
def _apsw_errors() -> Iterator[None]:
    try:
        yield
    except (apsw.CorruptError, apsw.NotADBError, apsw.FormatError) as exc:
        raise _refusal("SQLite cannot read it: it is damaged") from exc
    except apsw.FullError as exc:
        raise NoSpace(where="for the key database") from exc
    except apsw.Error as exc:
        raise KeyServiceUnavailable(reason=f"its database cannot be opened ({type(exc).__name__})") from exc


def _connect(path: Path) -> apsw.Connection:
    db = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_NOFOLLOW)
    try:
        db.pragma("trusted_schema", False)
        db.pragma("cell_size_check", True)
        db.pragma("locking_mode", "EXCLUSIVE")
        application, version = db.pragma("application_id"), db.pragma("user_version")
        if application != _APPLICATION_ID:
            raise _refusal("it is not a key database")
        if version != _FORMAT:
            raise UnsupportedFormat(file=_NAME, what=f"format version {version}")
        # A trigger or view that somebody put in would run with our next write.
        schema = [sql for (sql,) in db.execute("SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL ORDER BY name")]
        if schema != sorted(_SCHEMA):
            raise _refusal("it has other tables than it should")
        db.pragma("journal_mode", "WAL")
        db.pragma("synchronous", "FULL")
        db.pragma("secure_delete", True)
    except BaseException:
        db.close()
        raise
    return db


def _read(db: apsw.Connection) -> tuple[list[Row], Ledger]:
    if db.pragma("quick_check") != "ok":
        raise _refusal("SQLite finds it damaged")
    rows = [
        Row(*cast("tuple[str, str, int, bytes]", row))
        for row in db.execute("SELECT kind, id, version, sealed FROM documents")
    ]
    ledger: Ledger = {}
    for kind, doc_id, version, digest in db.execute("SELECT kind, id, version, digest FROM ledger"):
        ledger.setdefault(cast("str", kind), {})[cast("str", doc_id)] = Entry(
            cast("int", version), cast("bytes", digest)
        )
    if any(row.version < 0 for row in rows) or any(e.version < 0 for k in ledger.values() for e in k.values()):
        raise _refusal("it has a negative version")
    return rows, ledger
