"""Examining a store in-process: hostile bytes everywhere, and the table of codes in the documentation.

EBSD_CHECK_SEEDS: how many times files and catalog are damaged at random (default 12).
"""

from __future__ import annotations

import json
import os
import random
import uuid
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import apsw
import pytest

from ebsd.control.snapshot_files import SnapshotFiles
from ebsd.control.volume_files import VolumeFiles
from ebsd.domain.ids import AccountId, KeyArn, LineageId, SnapshotId, VolumeId
from ebsd.domain.model import Cipher, Integrity, Layer, LayerState, Lineage, Snapshot, Volume
from ebsd.domain.states import SnapshotState, VolumeState
from ebsd.domain.units import CHUNK, MIB, SECTOR
from ebsd.store.ballast import Ballast
from ebsd.store.catalog import Catalog, Transaction
from ebsd.store.check import Examination
from ebsd.store.disk import RealDisk
from ebsd.store.durablemap import DurableMap
from ebsd.store.entries import map_hash
from ebsd.store.findings import RULES, Code, Finding, Severity
from ebsd.store.layers import segment_name
from ebsd.store.layertable import read_layer_table
from ebsd.store.layout import LiveLayout, StateLayout
from ebsd.store.record import read_record
from ebsd.store.signedrecord import RecordState

SEEDS = int(os.environ.get("EBSD_CHECK_SEEDS", "12"))
ROOT = Path(__file__).resolve().parents[2]


def test_the_document_shows_the_same_codes() -> None:
    rows = {}
    for line in (ROOT / "ebsd/store/FORMAT.md").read_text().partition("## Check")[2].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 4 and cells[0].startswith("`"):
            rows[cells[0].strip("`")] = cells[1:3]
    assert rows == {code: [rule.severity, "yes" if rule.repairable else "no"] for code, rule in RULES.items()}


# --- a store in-process ---------------------------------------------------------------------------------------

SIZE = 4 * MIB
CHUNKS = SIZE // CHUNK
KEY = KeyArn("arn:aws:kms:local:000000000000:key/00000000-0000-4000-8000-000000000000")
ACCOUNT = AccountId("000000000000")
BOOT = "11111111-2222-4333-8444-555555555555"
DISK = RealDisk()


@dataclass
class Rig:
    """Two volumes in lineages of their own, each with two snapshots, as the product's own functions make them."""

    layout: StateLayout
    live: Path
    image: bytes = b""
    volumes: list[Volume] = field(default_factory=list)
    snapshots: list[Snapshot] = field(default_factory=list)

    def examine(self, image: bytes | None = None, **changes: Any) -> list[Finding]:
        used = self.image if image is None else image
        arguments: dict[str, Any] = {"catalog": used, "anchors": None, "uid": os.getuid()} | changes
        return Examination(DISK, self.layout, self.live, BOOT, **arguments).run()

    def wrong(self, **changes: Any) -> list[Finding]:
        return [f for f in self.examine(**changes) if f.severity is not Severity.NOTE]


def volume_of(number: int) -> Volume:
    ident = VolumeId(f"vol-{number:017x}")
    return Volume(
        id=ident, account=ACCOUNT, owner="root", name=ident, size=SIZE, state=VolumeState.AVAILABLE,
        cipher=Cipher.AES_256_XTS, key_arn=KEY, wrapped_key=b"wrapped", context={"aws:ebs:id": ident},
        lineage=LineageId(str(uuid.UUID(int=number))), head=1, snapshot=None, attach_generation=0,
        integrity=Integrity.NEW, authority=None, created="2026-01-01T00:00:00Z", reason="",
    )  # fmt: skip


def snapshot_of(volume: Volume, number: int) -> Snapshot:
    return Snapshot(
        id=SnapshotId(f"snap-{number:017x}"), account=ACCOUNT, owner="root", name=f"s{number}", volume=volume.id,
        size=SIZE, state=SnapshotState.COMPLETED, message="", description="", cipher=volume.cipher, key_arn=KEY,
        wrapped_key=b"wrapped", context=volume.context, lineage=volume.lineage, new_head=0,
        integrity=Integrity.VERIFIED, authority=volume.id, pause_us=None, started="2026-01-01T00:00:00Z",
        completed="2026-01-01T00:00:00Z",
    )  # fmt: skip


def write_chunks(rig: Rig, volume: Volume, layer: Layer, chunks: range) -> None:
    """Put data into the volume's head and name it in its map, and sign that, as an attachment does."""
    name = segment_name(layer.number, layer.uuid, 0)
    with (rig.layout.lineage(volume.lineage) / name).open("r+b") as file:
        for chunk in chunks:
            os.pwrite(file.fileno(), os.urandom(CHUNK), chunk * CHUNK)
    durable = DurableMap.open(DISK, rig.layout.map(volume.id))
    entries = durable.entries()
    for chunk in chunks:
        entries[chunk] = layer.number
    durable.write_out(0, CHUNKS)
    durable.write_page(0, bytes(entries.cast("B")))
    durable.write_head(layer.number)
    durable.close()
    table = read_layer_table(DISK, rig.layout.table(volume.lineage))
    count = len(table.layers)
    record = read_record(DISK, rig.layout.record(volume.id))
    body = replace(
        record.body(), state=RecordState.CLEAN, generation=record.body().generation + 2, head=layer.number,
        table_count=count, table_hash=table.prefix_hash(count), map_hash=map_hash(entries, CHUNKS),
    )  # fmt: skip
    files = VolumeFiles(DISK, rig.layout, LiveLayout(rig.live), Ballast(DISK, rig.layout.ballast, 0, 0))
    files.write_signed_record(volume.id, body.encode() + b"m" * 64)


def make_rig(root: Path) -> Rig:
    rig = Rig(StateLayout(root / "state"), root / "live")
    rig.live.mkdir()
    (root / "state").mkdir(mode=0o700)
    rig.layout.create(DISK)
    catalog = Catalog(rig.layout.catalog)
    files = VolumeFiles(DISK, rig.layout, LiveLayout(rig.live), Ballast(DISK, rig.layout.ballast, 0, 0))
    snapshots = SnapshotFiles(DISK, rig.layout, files)

    def add(t: Transaction, volume: Volume) -> Layer:
        t.add_lineage(Lineage(volume.lineage, ACCOUNT, SECTOR, volume.cipher))
        layer = t.add_layer(volume.lineage, os.urandom(16), volume.id, SIZE)
        t.set_layer_state(volume.lineage, 1, LayerState.HEAD)
        t.add_volume(volume)
        return layer

    for number in (1, 2):
        volume = volume_of(number)
        layer = catalog.run(lambda t, v=volume: add(t, v))
        files.create(volume, layer.uuid, KEY, b"wrapped")
        for turn in range(2):
            write_chunks(rig, volume, layer, range(turn, turn + 3))
            snapshot = snapshot_of(volume, 10 * number + turn)
            old = layer
            layer = catalog.run(lambda t, v=volume: t.add_layer(v.lineage, os.urandom(16), v.id, SIZE))
            volume = replace(volume, head=layer.number)
            for fd in snapshots.add_head([old, layer], SIZE):
                DISK.close(fd)
            snapshots.take_detached(volume, snapshot)
            snapshots.seal_layer(old)

            def commit(t: Transaction, s: Snapshot = snapshot, v: Volume = volume, o: Layer = old) -> None:
                t.add_snapshot(s)
                t.set_volume_head(v.id, v.head)
                t.set_layer_state(v.lineage, v.head, LayerState.HEAD)
                t.set_layer_state(v.lineage, o.number, LayerState.SEALED)

            catalog.run(commit)
            rig.snapshots.append(snapshot)
        rig.volumes.append(volume)
    rig.image = catalog.image()
    catalog.close()
    return rig


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return make_rig(tmp_path)


def files_of(rig: Rig, volume: Volume) -> list[Path]:
    """Return all files that only this volume and its snapshots have."""
    mine = {str(volume.id), *(s.id for s in rig.snapshots if s.volume == volume.id)}
    found = [rig.layout.root / kind / name for kind in ("maps", "records") for name in sorted(mine)]
    return found + sorted(rig.layout.lineage(volume.lineage).iterdir())


def test_a_whole_store_is_clean_with_its_catalog_and_without(rig: Rig) -> None:
    assert rig.wrong() == []
    assert [f for f in rig.examine() if f.severity is Severity.NOTE and f.code is not Code.NOT_COMPARED] == []
    assert [f for f in Examination(DISK, rig.layout, rig.live, BOOT, os.getuid(), None, None).run()
            if f.severity is not Severity.NOTE] == []  # fmt: skip


def damage(path: Path, dice: random.Random) -> None:
    """Do something hostile to one file."""
    raw = bytearray(path.read_bytes()[: 1 << 20])
    path.chmod(0o600)
    kind = dice.randrange(8)
    if kind == 0:
        os.truncate(path, dice.randrange(path.stat().st_size or 1))
    elif kind == 1:
        path.write_bytes(dice.randbytes(dice.randrange(5000)))
    elif kind == 2:
        path.unlink()
    elif kind == 3:
        path.unlink()
        dice.choice((os.mkfifo, os.mkdir, lambda p: p.symlink_to("/dev/zero"), lambda p: p.symlink_to(p.name)))(path)
    elif kind == 4:
        path.write_bytes(b"")
    else:
        for _ in range(dice.choice((1, 1, 20))):
            raw[dice.randrange(min(len(raw), dice.choice((64, 1024, len(raw)))))] ^= 1 << dice.randrange(8)
        path.write_bytes(raw)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_whatever_is_done_to_the_files_of_one_volume_the_other_is_clean(rig: Rig, seed: int) -> None:
    dice = random.Random(seed)
    victim, other = rig.volumes
    for _ in range(dice.randrange(1, 4)):
        path = dice.choice([p for p in files_of(rig, victim) if p.is_file() and not p.is_symlink()])
        damage(path, dice)
    clean = {str(other.id), *(s.id for s in rig.snapshots if s.volume == other.id)}
    for findings in (rig.examine(), rig.examine(catalog=None)):
        for finding in findings:
            assert finding.resource not in clean, finding
            assert other.lineage not in finding.file, finding
            assert Finding.from_members(json.loads(json.dumps(finding.as_members()))) is not None


@pytest.mark.parametrize("seed", range(SEEDS))
def test_whatever_is_done_to_the_catalog_is_told(rig: Rig, seed: int) -> None:
    dice = random.Random(seed)
    image = bytearray(rig.image)
    if seed % 4 == 0:
        del image[dice.randrange(len(image)) :]
    else:
        for _ in range(30):
            image[dice.randrange(len(image))] ^= 1 << dice.randrange(8)
    findings = rig.examine(image=bytes(image))
    assert [f for f in findings if f.severity is not Severity.NOTE] or seed % 4


ABSURD = (
    ("volume", "size", 2**63 - 1), ("volume", "size", -1), ("volume", "size", 4097), ("volume", "state", "half"),
    ("volume", "cipher", 2), ("volume", "cipher", 77), ("volume", "account", "x"), ("volume", "context", "{"),
    ("volume", "context", "[]"), ("volume", "head", 0), ("volume", "head", 2**40), ("volume", "key_arn", None),
    ("volume", "integrity", "sure"), ("volume", "state", "in-use"), ("snapshot", "size", 2**62),
    ("snapshot", "state", "nearly"), ("snapshot", "lineage", "../../etc"), ("layer", "state", "gone"),
    ("layer", "number", -3), ("layer", "size", 2**63 - 1), ("layer", "uuid", b"short"), ("lineage", "cipher", 0),
    ("lineage", "sector_size", 512), ("volume", "id", "vol-nonsense"),
)  # fmt: skip


@pytest.mark.parametrize(("table", "column", "value"), ABSURD)
def test_an_absurd_value_in_a_row_is_told_and_hides_nothing(rig: Rig, table: str, column: str, value: object) -> None:
    db = apsw.Connection(str(rig.layout.catalog))
    db.execute("PRAGMA foreign_keys=OFF")
    db.execute(f"UPDATE {table} SET {column}=? WHERE rowid=1", (value,))
    db.close()
    other = rig.volumes[1]
    (rig.layout.record(other.id)).unlink()
    findings = rig.wrong(catalog=rig.layout.catalog.read_bytes())
    codes = {f.code for f in findings if f.resource != other.id}
    assert codes & {Code.CATALOG_ROW, Code.CATALOG_REFERENCE}, findings
    assert Code.RECORD_MISSING in {f.code for f in findings if f.resource == other.id}


def test_chunks_that_no_map_names_are_told_of_sealed_layers(rig: Rig) -> None:
    layers = sorted(rig.layout.lineage(rig.volumes[0].lineage).glob("*.000"))
    for path, chunks in zip(layers, ((50, 63), (0,), (9,)), strict=True):
        path.chmod(0o600)
        with path.open("r+b") as file:
            for chunk in chunks:
                os.pwrite(file.fileno(), b"x" * CHUNK, chunk * CHUNK)
        path.chmod(0o600 if path is layers[-1] else 0o440)
    told = {f.file.rpartition("/")[2]: f.detail for f in rig.wrong() if f.code is Code.LEAKED_SPACE}
    assert told == {
        layers[0].name: "2 chunks of layer 1 are named by no map",
        layers[1].name: "1 chunks of layer 2 are named by no map",
    }
