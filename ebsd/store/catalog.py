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
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import apsw

from ebsd.domain.errors import (
    HostFailure,
    NoSpace,
    SnapshotIdMalformed,
    StoreDamaged,
    UnsupportedFormat,
    VolumeIdMalformed,
)
from ebsd.store.catalog_bin import BinRows
from ebsd.store.catalog_blocks import BlockRows
from ebsd.store.catalog_imports import ImportRows
from ebsd.store.catalog_jobs import JobRows
from ebsd.store.catalog_layers import LayerRows
from ebsd.store.catalog_modifications import ModificationRows
from ebsd.store.catalog_schedules import ScheduleRows
from ebsd.store.catalog_sets import SetRows
from ebsd.store.catalog_snapshots import SnapshotRows
from ebsd.store.catalog_usage import UsageRows
from ebsd.store.catalog_volumes import VolumeRows
from ebsd.store.schema import MIGRATIONS, SCHEMA_VERSION

T = TypeVar("T")


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
            t.modifications()
            t.locks()
            t.bin_rules()
            t.bin_content()
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


class Transaction(
    VolumeRows,
    SnapshotRows,
    LayerRows,
    JobRows,
    ModificationRows,
    BlockRows,
    SetRows,
    ScheduleRows,
    BinRows,
    ImportRows,
    UsageRows,
):
    """What a use case may read and write; every method is one or two SQL statements."""
