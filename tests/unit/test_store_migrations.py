"""Catalogs of earlier schemas: this version opens each, whatever cuts the migration, and the old file is kept."""

from __future__ import annotations

from pathlib import Path

import apsw
import pytest

from ebsd.domain.errors import StoreDamaged, UnsupportedFormat
from ebsd.domain.ids import LineageId, SnapshotId, VolumeId
from ebsd.domain.model import LayerState
from ebsd.domain.states import JobState, SnapshotState, VolumeState
from ebsd.store import catalog as catalog_module
from ebsd.store.catalog import Catalog
from ebsd.store.checkrows import read_rows
from ebsd.store.schema import MIGRATIONS, SCHEMA_VERSION

V1 = Path(__file__).parent / "vectors" / "catalog_v1.sql"
LINEAGE = LineageId("6ba7b810-9dad-41d1-80b4-00c04fd430c8")


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "catalog.sqlite"
    db = apsw.Connection(str(path))
    db.execute("PRAGMA journal_mode=WAL").fetchall()
    db.execute(V1.read_text())
    db.close()
    return path


def version_of(path: Path) -> int:
    db = apsw.Connection(str(path))
    try:
        (version,) = db.execute("PRAGMA user_version").fetchone() or (0,)
        return int(version)
    finally:
        db.close()


def assert_all_is_there(path: Path) -> None:
    catalog = Catalog(path)
    try:
        catalog.check_rows()
        volume = catalog.run(lambda t: t.volume(VolumeId("vol-0123456789abcdef0")))
        assert (volume.name, volume.state, volume.head, volume.tags) == (
            "data",
            VolumeState.AVAILABLE,
            2,
            {"team": "blue"},
        )
        other = catalog.run(lambda t: t.volume(VolumeId("vol-0123456789abcdef1")))
        assert other.attachment is not None
        assert (other.attachment.mount_point, other.attachment.head) == ("/srv", 3)
        snapshot = catalog.run(lambda t: t.snapshot(SnapshotId("snap-0123456789abcdef0")))
        assert (snapshot.name, snapshot.state, snapshot.description) == ("monday", SnapshotState.COMPLETED, "before")
        states = [layer.state for layer in catalog.run(lambda t: t.layers(LINEAGE))]
        assert states == [LayerState.SEALED, LayerState.HEAD, LayerState.HEAD]
        assert [job.state for job in catalog.run(lambda t: t.jobs())] == [JobState.COMPLETED]
        assert catalog.run(lambda t: t.removing()) == ["snap-0123456789abcdef2"]
        assert read_rows(catalog.image(), file="catalog").findings == []
    finally:
        catalog.close()


def test_a_catalog_of_the_first_schema_is_taken_over_and_kept(old: Path) -> None:
    assert_all_is_there(old)
    assert version_of(old) == SCHEMA_VERSION
    kept = old.with_name("catalog.sqlite.kept-v1")
    assert version_of(kept) == 1
    assert_all_is_there(old)
    kept.replace(old)  # going back: the older ebsd has its file again, and this one takes it over once more
    assert_all_is_there(old)


@pytest.mark.parametrize("step", range(2, SCHEMA_VERSION + 1))
def test_a_migration_that_is_cut_changes_nothing_of_its_step(
    old: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = {**MIGRATIONS, step: MIGRATIONS[step] + "; INSERT INTO no_such_table VALUES (1);"}
    monkeypatch.setattr(catalog_module, "MIGRATIONS", broken)
    with pytest.raises(StoreDamaged):
        Catalog(old)
    monkeypatch.undo()
    assert version_of(old) == step - 1
    assert_all_is_there(old)


def test_a_newer_version_is_refused_and_left_alone(old: Path) -> None:
    db = apsw.Connection(str(old))
    db.execute(f"PRAGMA user_version={SCHEMA_VERSION + 1}")
    db.close()
    with pytest.raises(UnsupportedFormat, match=f"schema version {SCHEMA_VERSION + 1}"):
        Catalog(old)
    assert version_of(old) == SCHEMA_VERSION + 1
    assert list(old.parent.glob("*kept*")) == []


def test_the_first_migration_still_makes_the_first_schema(old: Path, tmp_path: Path) -> None:
    def schema(path: Path) -> list[object]:
        db = apsw.Connection(str(path))
        try:
            return [
                tuple(row) for row in db.execute("SELECT type, name, tbl_name FROM sqlite_master ORDER BY name")
            ] + [
                (table, tuple(column[1:]))
                for (table,) in db.execute("SELECT name FROM sqlite_master WHERE type='table' ORDER BY name").fetchall()
                for column in db.execute(f"PRAGMA table_info({table})").fetchall()
            ]
        finally:
            db.close()

    fresh = tmp_path / "fresh.sqlite"
    db = apsw.Connection(str(fresh))
    db.execute(MIGRATIONS[1])
    db.close()
    assert schema(fresh) == schema(old)
