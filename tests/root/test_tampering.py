"""Tampering: every edit of the store that attach can know of is refused by name, and putting it right heals.

What ``ebsctl check`` finds of each is shown beside it; what it cannot find without a key has no code in ``defects``.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apsw
import pytest
from defects import (
    CATALOG_CASES,
    CHUNK,
    CHUNKS,
    FILE_CASES,
    INTEGRITY,
    Case,
    CatalogCase,
    Store,
    Volume,
    make_volume,
    many_volumes,
)
from installation import installation

from ebsctl.client import Client
from ebsd.domain.ids import KeyArn
from ebsd.store.signedrecord import RecordState


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with installation(tmp_path_factory.mktemp("tampering")) as ebsd:
        client = Client(str(ebsd.socket), timeout=60)
        key, attackers = (client.kms("CreateKey")["KeyMetadata"]["Arn"] for _ in range(2))
        victim, other, bystander = many_volumes(ebsd, client, key, 3, attachments=2)
        path = client.ec2("AttachVolume", VolumeId=bystander.id, ExposeAs="file")["Attachment"]["Path"]
        yield Store(ebsd, client, victim, other, bystander, path, KeyArn(key), KeyArn(attackers))


# --- what is shown of every case -----------------------------------------------------------------------------


def children_of(pid: int) -> set[int]:
    """Return the children of a process, those that nobody has reaped included."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.add(int(entry.name))
    return found


def daemon_pid(store: Store) -> int:
    assert store.ebsd.daemon is not None
    return store.ebsd.daemon.pid


def traces_of(store: Store, volume: Volume, known: set[int]) -> list[str]:
    """Return what of a volume is on the host: mounts, devices, links, files of the runtime directory, processes."""
    runtime = store.ebsd.runtime
    found = [line for line in store.ebsd.leftovers() if volume.id in line]
    paths = [runtime / "volumes" / volume.id, runtime / "control" / f"{volume.id}.sock", runtime / "live" / volume.id]
    for name in (volume.id, volume.name):
        paths += [Path("/dev/ebsd", name), Path("/dev/ebsd/unencrypted", name)]
    found += [str(path) for path in paths if os.path.lexists(path)]
    found += [f"process {pid}" for pid in children_of(daemon_pid(store)) - known]
    return found


def assert_refused(store: Store, volume: Volume, reason: str) -> None:
    """Attach, which must fail with the integrity status and the reason, and leave nothing on the host."""
    known = children_of(daemon_pid(store))
    outcome = store.ebsd.ctl("attach", volume.id)
    if outcome.status == 0:
        # What was kept of this volume is older than the key service remembers now.
        store.ebsd.ctl("detach", volume.id)
        if volume is store.victim:
            store.victim = make_volume(store.ebsd, store.client, store.key)
    assert outcome.status == INTEGRITY, f"{outcome.status}: {outcome.stdout} {outcome.stderr}"
    assert reason in outcome.stderr
    deadline = time.monotonic() + 5
    while (left := traces_of(store, volume, known)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not left
    (described,) = store.client.ec2("DescribeVolumes", VolumeIds=[volume.id])["Volumes"]
    assert (described["State"], described["Attachments"]) == ("available", [])


def assert_intact(store: Store, volume: Volume) -> None:
    """Attach read-only, which leaves the record as it is, and compare every byte of the volume."""
    path = store.client.ec2("AttachVolume", VolumeId=volume.id, ReadOnly=True, ExposeAs="file")["Attachment"]["Path"]
    try:
        content = Path(path).read_bytes()
    finally:
        store.client.ec2("DetachVolume", VolumeId=volume.id)
    assert content == b"".join(volume.data.get(chunk, bytes(CHUNK)) for chunk in range(CHUNKS))


def assert_bystander_works(store: Store) -> None:
    """Write to another volume that is attached all the time, and read all of it back."""
    fresh = secrets.token_bytes(CHUNK)
    fd = os.open(store.bystander_file, os.O_RDWR)
    try:
        os.pwrite(fd, fresh, 3 * CHUNK)
        os.fsync(fd)
        store.bystander.data[3] = fresh
        for chunk, data in store.bystander.data.items():
            assert os.pread(fd, CHUNK, chunk * CHUNK) == data
    finally:
        os.close(fd)


def assert_found(store: Store, code: str) -> None:
    """Examine the store: the defect is found, and nothing is found of the volume that is attached all the time."""
    found = store.client.control("CheckStore")["Findings"]
    wrong = [finding for finding in found if finding["Severity"] != "note"]
    assert code in {finding["Code"] for finding in wrong} or (code == "" and wrong == []), wrong
    for finding in wrong:
        assert finding.get("ResourceId") != store.bystander.id
        assert store.bystander.lineage not in finding.get("File", "")


class Original:
    """Copies of the files of some volumes, to be put back."""

    def __init__(self, place: Path, *volumes: Volume) -> None:
        self._copies: list[tuple[Path, Path]] = []
        for at, volume in enumerate(volumes):
            for path in (volume.record, volume.map, volume.directory):
                copy = place / f"{at}-{path.parent.name}"
                subprocess.run(["cp", "-a", "--sparse=always", path, copy], check=True)
                self._copies.append((path, copy))

    def put_back(self) -> None:
        for path, copy in self._copies:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
            subprocess.run(["cp", "-a", "--sparse=always", copy, path], check=True)


PROVED = {
    "wrapped key of another volume",
    "record of another volume",
    "record as it was born",
    "record deleted",
    "map deleted",
    "map without its last page",
    "maps of two volumes swapped",
    "segment deleted",
    "segment cut by a chunk",
    "segment is a FIFO",
    "directory of the layers deleted",
    "table deleted",
    "another id for layer and segment",
}
"""Cases after which the volume is attached and all of it compared; after every other one the next refusal, which
names its own edit and not this one, shows that the original is back."""


@pytest.mark.parametrize("case", FILE_CASES, ids=lambda case: case.name)
def test_an_edited_file_is_refused_and_the_original_attaches_again(store: Store, case: Case, tmp_path: Path) -> None:
    original = Original(tmp_path, store.victim, store.other)
    try:
        case.edit(store)
        assert_found(store, case.code)
        assert_refused(store, store.victim, case.reason)
    finally:
        for aside in store.ebsd.state.rglob("aside"):
            if aside.is_dir():
                shutil.rmtree(aside)
            else:
                aside.unlink()
        original.put_back()
    if case.name in PROVED:
        assert_intact(store, store.victim)
    assert_bystander_works(store)


def test_the_cases_that_are_proved_by_attaching_exist() -> None:
    assert {case.name for case in FILE_CASES} >= PROVED


# --- edits of the catalog ------------------------------------------------------------------------------------


def edit_rows(path: Path, table: str, ident: str, columns: dict[str, Any]) -> dict[str, Any]:
    """Set columns of one row and return what they were."""
    if not columns:
        return {}
    db = apsw.Connection(str(path))
    try:
        (before,) = db.execute(f"SELECT {', '.join(columns)} FROM {table} WHERE id=?", (ident,))
        assignments = ", ".join(f"{column}=?" for column in columns)
        db.execute(f"UPDATE {table} SET {assignments} WHERE id=?", (*columns.values(), ident))
    finally:
        db.close()
    return dict(zip(columns, before, strict=True))


@dataclass
class EditedCatalog:
    store: Store
    volumes: dict[str, Volume]
    originals: list[Original]
    rows: list[tuple[str, str, dict[str, Any]]]
    restored: bool = False

    def restore(self) -> None:
        if not self.restored:
            self.store.ebsd.stop()
            for table, ident, columns in self.rows:
                edit_rows(self.store.ebsd.state / "catalog.sqlite", table, ident, columns)
            for original in self.originals:
                original.put_back()
            self.store.ebsd.start()
            self.restored = True


@pytest.fixture(scope="module")
def edited(store: Store, tmp_path_factory: pytest.TempPathFactory) -> EditedCatalog:
    """A volume for each case, its rows edited while ebsd is stopped; the bystander stays attached throughout."""
    made = many_volumes(store.ebsd, store.client, store.key, len(CATALOG_CASES), attachments=1)
    edited = EditedCatalog(store, {}, [], [])
    for case, volume in zip(CATALOG_CASES, made, strict=True):
        edited.volumes[case.name] = volume
        edited.originals.append(Original(tmp_path_factory.mktemp("original"), volume))
        case.edit(store, volume)
    store.ebsd.stop()
    catalog = store.ebsd.state / "catalog.sqlite"
    for case, volume in zip(CATALOG_CASES, made, strict=True):
        for table, ident, columns in (
            ("volume", volume.id, case.columns(store, volume)),
            ("lineage", volume.lineage, case.lineage(store, volume)),
        ):
            edited.rows.append((table, ident, edit_rows(catalog, table, ident, columns)))
    store.ebsd.start()
    return edited


@pytest.mark.parametrize("case", CATALOG_CASES, ids=lambda case: case.name)
def test_a_volume_whose_catalog_row_was_edited_is_refused(edited: EditedCatalog, case: CatalogCase) -> None:
    assert not edited.restored
    assert_refused(edited.store, edited.volumes[case.name], case.reason)
    assert_bystander_works(edited.store)


def test_each_volume_whose_row_was_edited_is_found(edited: EditedCatalog) -> None:
    assert not edited.restored
    found = edited.store.client.control("CheckStore")["Findings"]
    damaged = {f.get("ResourceId") for f in found if f["Severity"] == "damage"}
    assert damaged >= {volume.id for volume in edited.volumes.values()}
    assert not damaged & {edited.store.victim.id, edited.store.other.id, edited.store.bystander.id}


@pytest.mark.parametrize("case", CATALOG_CASES, ids=lambda case: case.name)
def test_with_the_row_put_back_it_attaches_again(edited: EditedCatalog, case: CatalogCase) -> None:
    edited.restore()
    assert_intact(edited.store, edited.volumes[case.name])


def test_after_all_of_it_the_volumes_take_writes_and_end_clean(store: Store) -> None:
    device = store.ebsd.ok("attach", store.victim.id)
    store.victim.data[1] = secrets.token_bytes(CHUNK)
    with open(device, "r+b", buffering=0) as file:
        file.seek(CHUNK)
        file.write(store.victim.data[1])
    store.ebsd.ok("detach", store.victim.id)
    assert store.victim.parsed().body().state is RecordState.CLEAN
    for volume in (store.victim, store.other):
        assert_intact(store, volume)
    assert store.ebsd.ctl_json("show", store.victim.id)["Integrity"] == "verified"
    assert_bystander_works(store)
