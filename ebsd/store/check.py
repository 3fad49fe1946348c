"""The whole store examined, without any key: what lies there against the catalog, file against file.

1. It reads and changes nothing. Whatever it reads may be anybody's: every error becomes a finding.
2. One damaged resource hides no other: each record, map, table and layer is judged by itself.
3. What it looks at may be in use. Findings that can come from a change meanwhile bear the lineage whose locks the
   caller holds to look again; what is found then is true.
4. What needs a data key is not its business: the signature of records, and ciphertext.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from ebsd.domain.errors import EbsdError, UnsupportedFormat
from ebsd.domain.geometry import chunk_count, segment_count, segment_size
from ebsd.domain.ids import LineageId, SnapshotId, VolumeId, parse_resource_id, parse_uuid
from ebsd.domain.model import Cipher, Integrity, LayerState
from ebsd.domain.units import CHUNK
from ebsd.store.checkmaps import (
    BLOCK_CHUNKS,
    Comparison,
    DurableReader,
    LayerFiles,
    MapInHand,
    SealedReader,
    compare,
)
from ebsd.store.checkrows import LayerRow, ResourceRow, Rows, read_rows
from ebsd.store.disk import Disk
from ebsd.store.findings import Code, Finding
from ebsd.store.layers import parse_segment_name, segment_name
from ebsd.store.layertable import LayerTable, read_layer_table
from ebsd.store.layout import StateLayout
from ebsd.store.leaftable import NAME as LEAF_TABLE
from ebsd.store.leaftable import read_slots
from ebsd.store.leaves import LeafFile, is_being_written, leaf_file_name, parse_leaf_file_name
from ebsd.store.livemap import read_live_identity
from ebsd.store.record import Record, read_record
from ebsd.store.signedrecord import RecordState, SignedBody, parse_signed

ASIDE: Final = "aside"
"""Directory below STATE where a repair puts what nobody names; nothing in it is looked at."""

KEPT_CATALOG: Final = "catalog.sqlite.kept-"
"""What the name of a catalog that was replaced begins with."""

_OURS: Final = frozenset(("catalog.sqlite", "lock", "ballast", "layers", "maps", "records", "kms", ASIDE, "root.key"))
_CATALOG_FILE: Final = re.compile(r"catalog\.sqlite(-wal|-shm|-journal|\.kept-.*)?")
_TEMPORARY: Final = re.compile(r"\.(.+)\.tmp")
_KINDS: Final = (
    (stat.S_ISLNK, "a symbolic link"),
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISBLK, "a block device"),
    (stat.S_ISCHR, "a character device"),
)
_NOT_READABLE_AS_FILE: Final = (errno.ELOOP, errno.EISDIR, errno.ENOTDIR, errno.ENXIO)


@dataclass(frozen=True, slots=True)
class Anchor:
    """What the key service knows of a resource."""

    owner: str
    encrypted: bool
    floor: int
    """Lowest generation that its record may have."""
    key: str | None


@dataclass(slots=True)
class Examination:
    """One examination: what it reads, and what it was told of the rest of the world."""

    disk: Disk
    layout: StateLayout
    live: Path
    """Directory of the live maps."""
    boot_id: str
    uid: int
    """Whom all files must belong to."""
    catalog: bytes | None
    """Image of the catalog; None when there is no usable one, and files are only compared with one another."""
    anchors: Mapping[str, Anchor | None] | None
    """What the key service said, None for a resource that it does not know; None as a whole when it did not answer."""
    lineages: frozenset[str] | None = None
    """Only these, and nothing that belongs to none; None for all."""
    progress: Callable[[int, int], None] = lambda _done, _total: None
    """Called with the chunks that were looked at, and of how many."""
    findings: list[Finding] = field(default_factory=list)
    rows: Rows = field(default_factory=Rows)
    _done: int = 0
    _total: int = 0

    def run(self) -> list[Finding]:
        """Examine, and return what was found. Raises OSError only where not even STATE can be listed."""
        whole = self.lineages is None
        names = self._listed()
        if self.catalog is not None:
            self.rows = read_rows(self.catalog, file=self.layout.catalog.name)
            if whole:
                self.findings += self.rows.findings
        else:
            self.rows = self._rows_of_records(names["records"])
        everything = sorted(
            {*self.rows.lineages, *self.rows.layers, *(r.lineage for r in self.rows.resources.values())}
        )
        chosen = [lineage for lineage in everything if self.lineages is None or lineage in self.lineages]
        self._total = sum(self._weight(lineage) for lineage in chosen)
        if whole:
            self._look_at_state(names)
        for lineage in chosen:
            _Lineage(self, LineageId(lineage)).run()
        if whole:
            self._look_for_strangers(names)
            self._look_at_live_maps()
        return self.findings

    def tell(self, code: Code, resource: str, path: Path | str, detail: str, lineage: str = "") -> None:
        self.findings.append(Finding(code, resource, self.shown(path), detail, lineage))

    def shown(self, path: Path | str) -> str:
        """Return a path as findings show it: relative to STATE where it lies in it."""
        text = os.fspath(path)
        return text.removeprefix(f"{self.layout.root}/")

    def step(self, chunks: int) -> None:
        self._done += chunks
        self.progress(self._done, max(self._total, self._done))

    def _weight(self, lineage: str) -> int:
        sizes = [row.size for row in self.rows.of_lineage(lineage)]
        sizes += [layer.size for layer in self.rows.layers.get(LineageId(lineage), {}).values()]
        chunks = chunk_count(max(sizes, default=0))
        return -(-chunks // BLOCK_CHUNKS) * BLOCK_CHUNKS

    # --- single files

    def status(self, path: Path | str, dir_fd: int | None = None) -> os.stat_result | None:
        """Return what lies at a path, a symbolic link itself; None for nothing. Raises OSError."""
        try:
            fd = self.disk.open(path, os.O_PATH, dir_fd=dir_fd)
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            return self.disk.fstat(fd)
        finally:
            self.disk.close(fd)

    def read(
        self, path: Path, resource: str, lineage: str, reader: Callable[[], Any], missing: Code, damaged: Code
    ) -> Any:
        """Return what ``reader`` gives, or None after telling why it cannot be had."""
        try:
            found = self.status(path)
            if found is None:
                self.tell(missing, resource, path, "it is missing", lineage)
                return None
            if not stat.S_ISREG(found.st_mode):
                self.tell(Code.NOT_A_FILE, resource, path, f"it is {_kind(found)}", lineage)
                return None
            self.check_rights(path, found, resource, lineage, sealed=False)
            return reader()
        except UnsupportedFormat as error:
            self.tell(Code.UNSUPPORTED, resource, path, f"it has {error.facts['what']}", lineage)
        except EbsdError as error:
            self.tell(damaged, resource, path, str(error.facts.get("reason", error.message)), lineage)
        except FileNotFoundError:
            self.tell(missing, resource, path, "it is missing", lineage)
        except OSError as error:
            code = Code.NOT_A_FILE if error.errno in _NOT_READABLE_AS_FILE else Code.UNREADABLE
            self.tell(code, resource, path, error.strerror or str(error), lineage)
        return None

    def check_rights(
        self, path: Path | str, found: os.stat_result, resource: str, lineage: str, *, sealed: bool
    ) -> None:
        mode = stat.S_IMODE(found.st_mode)
        wanted = 0o400 if sealed else 0o600
        if mode & 0o7137 or mode & 0o600 != wanted:
            what = "0440, read-only as a sealed layer is" if sealed else "0600"
            self.tell(Code.MODE, resource, path, f"its mode is {mode:04o} instead of {what}", lineage)
        if found.st_uid != self.uid:
            self.tell(Code.OWNER, resource, path, f"it belongs to uid {found.st_uid} instead of {self.uid}", lineage)

    def check_directory(self, path: Path, resource: str, lineage: str, missing: Code) -> bool:
        """Say whether a directory is there, after telling what is wrong with it."""
        try:
            found = self.status(path)
        except OSError as error:
            self.tell(Code.UNREADABLE, resource, path, error.strerror or str(error), lineage)
            return False
        if found is None:
            self.tell(missing, resource, path, "the directory is missing", lineage)
            return False
        if not stat.S_ISDIR(found.st_mode):
            self.tell(Code.NOT_A_FILE, resource, path, f"it is {_kind(found)} instead of a directory", lineage)
            return False
        mode = stat.S_IMODE(found.st_mode)
        if mode & 0o027 or mode & 0o700 != 0o700:
            self.tell(Code.MODE, resource, path, f"its mode is {mode:04o} instead of 0700", lineage)
        if found.st_uid != self.uid:
            self.tell(Code.OWNER, resource, path, f"it belongs to uid {found.st_uid} instead of {self.uid}", lineage)
        return True

    # --- the store as a whole

    def _listed(self) -> dict[str, list[str]]:
        """List the directories BEFORE the catalog is read: a row precedes its files."""
        names: dict[str, list[str]] = {"": sorted(self.disk.listdir(self.layout.root))}
        for name in ("maps", "records", "layers"):
            try:
                names[name] = sorted(self.disk.listdir(self.layout.root / name))
            except OSError:
                names[name] = []  # told by check_directory
        return names

    def _look_at_state(self, names: Mapping[str, list[str]]) -> None:
        for directory, code in (
            (self.layout.root, Code.TABLE_MISSING),
            (self.layout.layers, Code.TABLE_MISSING),
            (self.layout.maps, Code.MAP_MISSING),
            (self.layout.records, Code.RECORD_MISSING),
        ):
            self.check_directory(directory, "", "", code)
        for name in names[""]:
            if name == ASIDE or name.startswith(KEPT_CATALOG):
                self.tell(Code.SET_ASIDE, "", name, "it was set aside by a repair, and is not used")
            elif name not in _OURS and not _CATALOG_FILE.fullmatch(name):
                self.tell(Code.FOREIGN, "", name, "nothing of ebsd has this name")
        if self.anchors is None:
            self.tell(Code.NOT_COMPARED, "", "", "the key service does not answer: records are not compared with it")
        if self.catalog is None:
            self.tell(Code.NOT_COMPARED, "", "", "there is no usable catalog: files are compared with records only")

    def _look_for_strangers(self, names: Mapping[str, list[str]]) -> None:
        """Tell of what no row names. Who looks again drops what has a row by then, or is gone."""
        if any(finding.code is Code.CATALOG_DAMAGED for finding in self.rows.findings):
            self.tell(Code.NOT_COMPARED, "", self.layout.catalog, "what no row names is not known: rows may be missing")
            return
        kinds = {"maps": set[str](), "records": set[str]()}
        for kind, found in kinds.items():
            for name in names[kind]:
                path = self.layout.root / kind / name
                temporary = _TEMPORARY.fullmatch(name)
                if temporary is not None:
                    owner = self.rows.resources.get(temporary[1])
                    if owner is None or owner.settled:
                        lineage = owner.lineage if owner else ""
                        self.tell(Code.TEMPORARY, temporary[1], path, "it was never finished", lineage)
                elif not _is_resource(name):
                    self.tell(Code.FOREIGN, "", path, "nothing of ebsd has this name")
                elif not self.rows.knows(name):
                    found.add(name)
        if self.catalog is not None:
            for name in sorted(kinds["maps"] | kinds["records"]):
                self._tell_stranger(name, has_map=name in kinds["maps"], has_record=name in kinds["records"])
        else:
            for name in sorted(kinds["maps"] - kinds["records"]):
                detail = "it has no record"
                self.tell(Code.RECORD_MISSING, name, self.layout.records / name, detail)
        for name in names["layers"]:
            path = self.layout.layers / name
            if not _is_uuid(name):
                self.tell(Code.FOREIGN, "", path, "nothing of ebsd has this name")
            elif name not in self.rows.lineages and name not in self.rows.broken_lineages:
                self.tell(Code.ORPHAN, "", path, "a lineage that no volume or snapshot names")

    def _tell_stranger(self, name: str, *, has_map: bool, has_record: bool) -> None:
        if not has_map:
            self.tell(
                Code.ORPHAN, name, self.layout.records / name, "a record without a map, of nothing the catalog has"
            )
        elif not has_record:
            self.tell(Code.ORPHAN, name, self.layout.maps / name, "a map without a record, of nothing the catalog has")
        else:
            detail = "record and map are there, and the catalog does not know it: is the catalog older than the store?"
            self.tell(Code.RESOURCE_UNKNOWN, name, self.layout.records / name, detail)

    def _look_at_live_maps(self) -> None:
        try:
            names = sorted(self.disk.listdir(self.live))
        except OSError as error:
            self.tell(Code.UNREADABLE, "", self.live, error.strerror or str(error))
            return
        for name in names:
            path = self.live / name
            ident = name.removeprefix(".").removesuffix(".grown")
            row = self.rows.resources.get(ident)
            if not _is_resource(ident):
                self.tell(Code.FOREIGN, "", path, "nothing of ebsd has this name")
                continue
            try:
                identity = read_live_identity(self.disk, path)
            except FileNotFoundError:
                continue
            except (EbsdError, OSError) as error:
                if row is None or not row.attached:
                    self.tell(Code.LIVE_VOID, ident, path, str(error))
                continue
            if identity is None:
                reason = "it is no live map"
            elif identity.boot_id != _raw_uuid(self.boot_id):
                reason = "it is of another boot"
            elif row is None or not row.attached:
                reason = "its volume is not attached"
            elif identity.generation != row.generation or name != ident:
                reason = "it is of an earlier attachment"
            else:
                continue
            self.tell(Code.LIVE_VOID, ident, path, reason)

    # --- without a catalog

    def _rows_of_records(self, names: list[str]) -> Rows:
        """Return the rows that the records stand for: what they say is all that there is to compare with."""
        rows = Rows()
        for name in names:
            if not _is_resource(name):
                continue
            path = self.layout.records / name
            reader = partial(read_record, self.disk, path)
            record = self.read(path, name, "", reader, Code.RECORD_MISSING, Code.RECORD_DAMAGED)
            if record is None:
                rows.unreadable.add(name)
                continue
            if record.resource.id != name:
                self.tell(Code.RECORD_FOREIGN, name, path, f"it is the record of {record.resource.id}")
                rows.unreadable.add(name)
                continue
            resource, key, body = record.resource, record.wrapped_key, record.body()
            rows.lineages[resource.lineage] = resource.account, resource.cipher
            rows.resources[name] = ResourceRow(
                id=resource.id, account=resource.account, lineage=resource.lineage, size=resource.size,
                cipher=resource.cipher, state="completed" if name.startswith("snap-") else "available", head=body.head,
                key_arn=key and key.key_arn, wrapped_key=key and key.blob, context=key.context if key else {},
                authority=None if record.authority is None else parse_signed(record.authority, file=name).resource,
                integrity=Integrity.UNVERIFIED if body.state is RecordState.OPEN else Integrity.VERIFIED,
            )  # fmt: skip
        return rows


class _Lineage:
    """The examination of one lineage."""

    def __init__(self, parent: Examination, lineage: LineageId) -> None:
        self._parent = parent
        self._id = lineage
        self._layout = parent.layout
        self._rows = parent.rows
        self._resources = sorted(parent.rows.of_lineage(lineage), key=lambda row: row.id)
        self._layers = parent.rows.layers.get(lineage, {})
        self._cipher = parent.rows.lineages.get(lineage, ("", Cipher.AES_256_XTS))[1]
        self._bodies: dict[str, SignedBody] = {}
        """Resource -> its own signed body."""
        self._covering: dict[str, SignedBody | None] = {}
        """Resource -> the signed body that covers its map; None when only holes are legal."""

    def _tell(self, code: Code, resource: str, path: Path | str, detail: str) -> None:
        self._parent.tell(code, resource, path, detail, self._id)

    def _emit(self, finding: Finding) -> None:
        shown = self._parent.shown(finding.file)
        self._parent.findings.append(replace(finding, file=shown, lineage=self._id))

    def run(self) -> None:
        for row in self._resources:
            self._look_at_row(row)
            if row.settled:
                self._look_at_record(row)
        directory = self._layout.lineage(self._id)
        if not self._parent.check_directory(directory, "", self._id, Code.TABLE_MISSING):
            return
        path = self._layout.table(self._id)
        reader = partial(read_layer_table, self._parent.disk, path)
        table = self._parent.read(path, "", self._id, reader, Code.TABLE_MISSING, Code.TABLE_DAMAGED)
        try:
            dirfd = self._parent.disk.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            self._tell(Code.UNREADABLE, "", directory, error.strerror or str(error))
            return
        try:
            self._look_at_directory(directory, dirfd, table)
        except OSError as error:
            self._tell(Code.UNREADABLE, "", directory, error.strerror or str(error))
        finally:
            self._parent.disk.close(dirfd)

    # --- rows and records

    def _look_at_row(self, row: ResourceRow) -> None:
        path = self._layout.catalog
        if not row.settled and row.id not in self._rows.filling:
            self._tell(Code.PENDING, row.id, path, f"it is {row.state}, and no job makes it")
        if row.attached and not row.attached_read_only:
            detail = (
                "it is in use: its map is compared as of the last flush, and space of its newest layer is not counted"
            )
            self._tell(Code.ATTACHED, row.id, "", detail)
            live = self._parent.live / row.id
            ours = row.boot_id == self._parent.boot_id and row.state == "in-use"
            if ours and self._parent.status(live) is None:
                self._tell(Code.LIVE_MISSING, row.id, live, "it is missing while the volume is attached")
        if row.integrity is Integrity.UNVERIFIED and not row.attached:
            self._tell(Code.UNVERIFIED, row.id, "", "after an unclean stop its map is covered by no signature")
        if not row.is_snapshot and row.settled and self._parent.catalog is not None and row.head not in self._layers:
            self._tell(Code.LAYER_MISSING, row.id, path, f"its head, layer {row.head}, has no row")

        elif not row.is_snapshot and not self._is_made_for(row, row.head):
            self._tell(Code.CATALOG_ROW, row.id, path, f"its head, layer {row.head}, was made for another volume")

    def _is_made_for(self, row: ResourceRow, number: int) -> bool:
        """Say whether a layer was made for this volume, as far as a row says."""
        return number not in self._layers or self._layers[number].made_for == row.id

    def _look_at_record(self, row: ResourceRow) -> None:
        path = self._layout.record(row.id)
        reader = partial(read_record, self._parent.disk, path)
        record = self._parent.read(path, row.id, self._id, reader, Code.RECORD_MISSING, Code.RECORD_DAMAGED)
        if record is None:
            return
        if record.resource.id != row.id:
            self._tell(Code.RECORD_FOREIGN, row.id, path, f"it is the record of {record.resource.id}")
            return
        body = record.body()
        self._bodies[row.id] = body
        authority = None if record.authority is None else parse_signed(record.authority, file=str(path))
        covering = body if body.state is not RecordState.BORN else authority
        self._covering[row.id] = None if covering is None or covering.state is RecordState.BORN else covering
        for problem in _disagreements(row, record, authority):
            self._tell(Code.RECORD_DISAGREES, row.id, path, problem)
        self._compare_with_anchor(row, body, path)

    def _compare_with_anchor(self, row: ResourceRow, body: SignedBody, path: Path) -> None:
        anchors = self._parent.anchors
        if anchors is None or row.id not in anchors:
            return
        anchor = anchors[row.id]
        if anchor is None:
            self._tell(Code.ANCHOR_DISAGREES, row.id, path, "the key service does not know it")
            return
        encrypted = row.cipher is not Cipher.NONE
        if anchor.encrypted is not encrypted:
            kinds = {True: "encrypted", False: "unencrypted"}
            detail = f"the catalog says it is {kinds[encrypted]}, the key service that it is {kinds[anchor.encrypted]}"
            self._tell(Code.ANCHOR_DISAGREES, row.id, path, detail)
        if anchor.owner != row.account:
            detail = f"the catalog says it belongs to {row.account}, the key service to {anchor.owner}"
            self._tell(Code.ANCHOR_DISAGREES, row.id, path, detail)
        if anchor.encrypted and encrypted and anchor.key != row.key_arn:
            detail = f"the catalog says its key is {row.key_arn}, the key service that it is {anchor.key}"
            self._tell(Code.ANCHOR_DISAGREES, row.id, path, detail)
        if body.generation < anchor.floor:
            detail = f"it is of generation {body.generation}, and generation {anchor.floor} was reached"
            self._tell(Code.RECORD_OLD, row.id, path, detail)

    # --- table, layers, maps

    def _look_at_directory(self, directory: Path, dirfd: int, table: LayerTable | None) -> None:
        names = sorted(self._parent.disk.listdir(f"/proc/self/fd/{dirfd}/"))
        uuids = {number: layer.uuid for number, layer in self._layers.items()}
        if table is not None:
            self._compare_table(table)
            uuids |= {entry.number: entry.uuid for entry in table.layers}
        rows = self._layers
        if self._parent.catalog is None:
            rows = self._layers_of_files(names, table)
        files = LayerFiles(self._parent.disk, dirfd, uuids)
        maps = self._open_maps(table)
        try:
            longest = max([*(row.size for row in self._resources), *(layer.size for layer in rows.values())], default=0)
            result = compare(
                maps,
                files,
                known=set(table.numbers()) if table is not None else set(rows),
                sweepable=self._sweepable(rows),
                blocks_of_layers=-(-chunk_count(longest) // BLOCK_CHUNKS),
                unencrypted=self._cipher is Cipher.NONE,
                emit=self._emit,
                step=self._parent.step,
            )
        finally:
            files.close()
            for one in maps:
                one.reader.close()
        self._look_at_layers(directory, dirfd, rows, result.named)
        self._look_at_leaves(directory, dirfd, rows)
        self._tell_leaks(directory, rows, uuids, result, all_maps=len(maps) == len(self._resources))
        self._look_for_strangers(directory, names, rows, result)

    def _compare_table(self, table: LayerTable) -> None:
        path = self._layout.table(self._id)
        if table.lineage != self._id:
            self._tell(Code.TABLE_DISAGREES, "", path, f"it is the table of lineage {table.lineage}")
        if table.cipher is not self._cipher:
            detail = f"its cipher is {int(table.cipher)}, the catalog's {int(self._cipher)}"
            self._tell(Code.TABLE_DISAGREES, "", path, detail)
        for number, layer in sorted(self._layers.items()):
            if layer.state is LayerState.CREATING:
                continue
            if number not in table.numbers() and number not in {row.head for row in self._resources}:
                continue  # never made, as below
            if number not in table.numbers():
                self._tell(Code.TABLE_DISAGREES, "", path, f"it ends before layer {number}, which the catalog has")
            elif table.uuid_of(number) != layer.uuid:
                self._tell(
                    Code.TABLE_DISAGREES, "", path, f"it and the catalog disagree about the id of layer {number}"
                )
            elif table.layers[number - 1].volume != layer.made_for:
                self._tell(Code.TABLE_DISAGREES, "", path, f"it and the catalog disagree what layer {number} is for")
        for resource, body in self._bodies.items():
            covering = self._covering[resource]
            for one, what in ((body, "record"), (covering, "authority")):
                if one is None or (one is body and what == "authority"):
                    continue
                if len(table.layers) < one.table_count:
                    detail = f"it has {len(table.layers)} layers, the {what} of {resource} {one.table_count}"
                    self._tell(Code.TABLE_DISAGREES, resource, path, detail)
                elif table.prefix_hash(one.table_count) != one.table_hash:
                    detail = f"it is not the one that the {what} of {resource} was signed over"
                    self._tell(Code.TABLE_DISAGREES, resource, path, detail)

    def _layers_of_files(self, names: list[str], table: LayerTable | None) -> dict[int, LayerRow]:
        """Return the layers that have a first segment, where no catalog says which there are."""
        sizes = {row.id: row.size for row in self._resources}
        found: dict[int, LayerRow] = {}
        for name in names:
            parsed = parse_segment_name(name)
            if parsed is None or table is None or parsed[0] not in table.numbers() or parsed[2]:
                continue
            entry = table.layers[parsed[0] - 1]
            if entry.uuid == parsed[1]:
                heads = {row.head for row in self._resources}
                size = sizes.get(entry.volume, CHUNK) if parsed[0] in heads else CHUNK
                state = LayerState.HEAD if parsed[0] in heads else LayerState.CREATING
                found[parsed[0]] = LayerRow(parsed[0], parsed[1], entry.volume, state, size)
        return found

    def _look_at_layers(
        self, directory: Path, dirfd: int, rows: Mapping[int, LayerRow], named: Collection[int]
    ) -> None:
        heads = {row.head: row for row in self._resources if not row.is_snapshot}
        for number, layer in sorted(rows.items()):
            if layer.state is LayerState.CREATING and number not in heads:
                continue
            owner = heads.get(number)
            if owner is not None and not owner.settled:
                continue
            if owner is None and number not in named:
                # Nobody reads it. A restore that was cut before it made the file leaves a row without one, as the table
                # is dense; a deletion that could not sweep leaves a file that was never sealed.
                continue
            size = owner.size if owner is not None else layer.size
            for segment in range(segment_count(size)):
                name = segment_name(number, layer.uuid, segment)
                least = segment_size(size, segment)
                resource = owner.id if owner is not None else ""
                self._look_at_segment(directory / name, name, dirfd, layer, least, resource)

    def _look_at_leaves(self, directory: Path, dirfd: int, rows: Mapping[int, LayerRow]) -> None:
        """Check the leaf files that the table of leaves names against it. What is published has its file before."""
        disk = self._parent.disk
        path = directory / LEAF_TABLE
        uuids = {number: layer.uuid for number, layer in rows.items()}
        try:
            slots = read_slots(disk, dirfd, self._id, uuids)
        except (EbsdError, OSError) as error:
            self._tell(Code.LEAVES_DAMAGED, "", path, _reason(error))
            return
        for number, slot in sorted(slots.items()):
            try:
                LeafFile.open(disk, dirfd, self._id, number, slot.uuid, slot.digest).close()
            except (EbsdError, OSError) as error:
                self._tell(Code.LEAVES_DAMAGED, "", directory / leaf_file_name(number, slot.uuid), _reason(error))

    def _look_at_segment(self, path: Path, name: str, dirfd: int, layer: LayerRow, least: int, resource: str) -> None:
        try:
            found = self._parent.status(name, dirfd)
        except OSError as error:
            self._tell(Code.UNREADABLE, resource, path, error.strerror or str(error))
            return
        if found is None:
            self._tell(Code.LAYER_MISSING, resource, path, "it is missing")
        elif not stat.S_ISREG(found.st_mode):
            self._tell(Code.NOT_A_FILE, resource, path, f"it is {_kind(found)}")
        else:
            if found.st_size < least:
                detail = f"it has {found.st_size} bytes, {least} are needed"
                self._tell(Code.LAYER_DAMAGED, resource, path, detail)
            elif found.st_size % CHUNK:
                self._tell(Code.LAYER_DAMAGED, resource, path, f"its {found.st_size} bytes are not whole chunks")
            if self._parent.catalog is not None and layer.state is not LayerState.CREATING:
                sealed = layer.state is LayerState.SEALED
                self._parent.check_rights(path, found, resource, self._id, sealed=sealed)

    def _open_maps(self, table: LayerTable | None) -> list[MapInHand]:
        heads = {
            number: row.id for row in self._resources for number in _written(row) if self._is_made_for(row, number)
        }
        if self._parent.catalog is None:
            heads = {}  # a record may not know yet that its volume went on to another layer
        maps = []
        for row in self._resources:
            if not row.settled:
                continue
            path = self._layout.map(row.id)
            reader = self._parent.read(
                path, row.id, self._id, self._opener(row, path), Code.MAP_MISSING, Code.MAP_DAMAGED
            )
            if reader is None:
                continue
            body, covering = self._bodies.get(row.id), self._covering.get(row.id)
            changing = self._parent.catalog is None or (row.attached and not row.attached_read_only)
            count = covering.table_count if covering is not None else 0
            if body is None and table is not None:  # no record to say which layers it may name; that is told already
                count = len(table.layers)
            known = (
                row.state != "error" and not changing and covering is not None and covering.state is RecordState.CLEAN
            )
            maps.append(
                MapInHand(
                    row.id,
                    os.fspath(path),
                    reader,
                    range(1, count + 1),
                    {number for number, owner in heads.items() if owner != row.id},
                    chunk_count(covering.size) if covering is not None else 0,
                    covering.map_hash if covering is not None and known else None,
                    changing,
                )
            )
            self._compare_map_header(row, path, reader)
        return maps

    def _opener(self, row: ResourceRow, path: Path) -> Callable[[], DurableReader | SealedReader]:
        if row.is_snapshot:
            return lambda: SealedReader(self._parent.disk, path, SnapshotId(row.id))
        return lambda: DurableReader(self._parent.disk, path)

    def _compare_map_header(self, row: ResourceRow, path: Path, reader: DurableReader | SealedReader) -> None:
        if isinstance(reader, DurableReader) and reader.header.volume != row.id:
            self._tell(Code.MAP_FOREIGN, row.id, path, f"it is the map of {reader.header.volume}")
        if reader.lineage != self._id:
            self._tell(Code.MAP_DISAGREES, row.id, path, f"it belongs to lineage {reader.lineage}")
        wanted = chunk_count(row.size)
        if reader.chunks < wanted or (row.is_snapshot and reader.chunks != wanted):
            self._tell(Code.MAP_DISAGREES, row.id, path, f"it has {reader.chunks} chunks, the volume {wanted}")

    def _sweepable(self, rows: Mapping[int, LayerRow]) -> list[int]:
        """Return the layers whose unnamed chunks a sweep would give back; see ``control/lineages.py``."""
        if self._parent.catalog is None or any(not row.settled or row.state == "error" for row in self._resources):
            return []
        protected = {number for row in self._resources for number in _written(row)}
        for row in self._resources:
            if row.attached:
                protected |= {n for n, layer in rows.items() if layer.made_for == row.id and n >= row.served_head}
        return [n for n, layer in rows.items() if layer.state is not LayerState.CREATING and n not in protected]

    def _tell_leaks(
        self, directory: Path, rows: Mapping[int, LayerRow], uuids: Mapping[int, bytes], result: Comparison, *,
        all_maps: bool,
    ) -> None:  # fmt: skip
        if not (result.complete and all_maps):
            if self._resources:
                detail = "not all maps of the lineage can be read: whether space leaks is not known"
                self._tell(Code.NOT_COMPARED, "", directory, detail)
            return
        for layer, chunks in sorted(result.leaked.items()):
            path = directory / segment_name(layer, uuids[layer], 0)
            self._tell(Code.LEAKED_SPACE, "", path, f"{chunks} chunks of layer {layer} are named by no map")

    def _look_for_strangers(
        self,
        directory: Path,
        names: list[str],
        rows: Mapping[int, LayerRow],
        result: Comparison,
    ) -> None:
        complete = result.complete and self._id not in self._rows.broken_lineages
        for name in names:
            path = directory / name
            segment = parse_segment_name(name)
            parsed = parse_leaf_file_name(name) if segment is None else segment[:2]
            if name in ("table", LEAF_TABLE) or is_being_written(name):
                continue
            if _TEMPORARY.fullmatch(name):
                self._tell(Code.TEMPORARY, "", path, "it was never finished")
            elif parsed is None:
                self._tell(Code.FOREIGN, "", path, "nothing of ebsd has this name")
            elif parsed[0] in rows:
                if rows[parsed[0]].uuid != parsed[1] and self._parent.catalog is not None:
                    detail = f"layer {parsed[0]} has another id in the catalog"
                    self._tell(Code.LAYER_UNKNOWN, "", path, detail)
            elif parsed[0] in result.named:
                self._tell(
                    Code.LAYER_UNKNOWN, "", path, f"maps name layer {parsed[0]}, of which the catalog has no row"
                )
            elif complete and self._parent.catalog is not None:
                detail = f"no map names layer {parsed[0]}, and the catalog has no row of it"
                self._tell(Code.ORPHAN, "", path, detail)


def _written(row: ResourceRow) -> set[int]:
    """Return the layers that writes to a volume may go to: its head, and while a snapshot is taken the one before."""
    if row.is_snapshot:
        return set()
    return {row.head, row.served_head} if row.attached and not row.attached_read_only else {row.head}


def _disagreements(row: ResourceRow, record: Record, authority: SignedBody | None) -> list[str]:
    """Return in which respects the record is not that of the row."""
    resource, body, key = record.resource, record.body(), record.wrapped_key
    found = [
        f"its {what} is {here}, in the catalog {there}"
        for what, here, there in (
            ("account", resource.account, row.account),
            ("lineage", resource.lineage, row.lineage),
            ("cipher", int(resource.cipher), int(row.cipher)),
            ("key", key and key.key_arn, row.key_arn),
        )
        if here != there
    ]
    if key is not None and (key.blob, dict(key.context)) != (row.wrapped_key, dict(row.context)):
        found.append("its wrapped key is not the one in the catalog")
    if body.size != row.size and (row.is_snapshot or body.size > row.size):
        found.append(f"its size is {body.size}, in the catalog {row.size}")
    if not row.is_snapshot and body.head != row.head and row.head <= body.table_count and not row.attached:
        found.append(f"its head is layer {body.head}, in the catalog layer {row.head}")
    if body.state is not RecordState.BORN and authority is not None:
        found.append("it is signed and carries an authority, too")
    if body.state is RecordState.BORN and authority is not None and authority.resource != row.authority:
        found.append(f"its authority is {authority.resource}, in the catalog {row.authority}")
    if authority is not None and (authority.lineage, authority.account) != (row.lineage, row.account):
        found.append("its authority is of another lineage or account")
    if row.is_snapshot and body.state is RecordState.OPEN:
        found.append("it is that of a resource that is open for writing")
    return found


def _reason(error: Exception) -> str:
    if isinstance(error, EbsdError):
        return str(error.facts.get("reason") or error.facts.get("what") or error.message)
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def _kind(found: os.stat_result) -> str:
    return next((text for test, text in _KINDS if test(found.st_mode)), "something else")


def _is_resource(name: str) -> bool:
    try:
        parse_resource_id(name)
    except EbsdError:
        return False
    return True


def _is_uuid(name: str) -> bool:
    return bool(_raw_uuid(name))


def _raw_uuid(text: str) -> bytes:
    try:
        return parse_uuid(text)
    except ValueError:
        return b""


def resource_of(name: str) -> VolumeId | SnapshotId | None:
    """Return the id that a file of the store is named by; None for any other name."""
    return parse_resource_id(name) if _is_resource(name) else None
