"""Examining the store while it is in use, and repairing what is safe to repair.

1. A helper process looks first without any lock (``ebsd.volume.checker``). What it finds in a lineage may come from a
   change meanwhile, so it looks again while the locks of that lineage and its volumes are held: what is found then is
   told, and nothing else.
2. A repair acts under the same locks on what was found under them. It changes modes and owners, gives back space by the
   sweep, finishes or removes what is pending as the start of ebsd does, removes temporary files, and sets aside what
   nobody names. It never touches what is damaged, and deletes nothing but temporary files.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import trio

from ebsd.control.broker import Broker
from ebsd.control.catalogue import Catalogue
from ebsd.control.host import Host
from ebsd.control.lineages import Lineages
from ebsd.control.snapshots import Snapshots
from ebsd.control.volumes import Volumes
from ebsd.domain.errors import EbsdError, NeedsRoot, ResourceNotFound
from ebsd.domain.ids import LineageId, SnapshotId, VolumeId, looks_like_snapshot_id
from ebsd.domain.model import Caller, LayerState
from ebsd.ipc.process import run_helper
from ebsd.store.check import ASIDE
from ebsd.store.checkrows import Rows, read_rows
from ebsd.store.disk import RealDisk, fsync_directory
from ebsd.store.findings import RULES, Code, Finding, Severity
from ebsd.store.layers import parse_segment_name
from ebsd.store.layout import StateLayout

MODULE: Final = "ebsd.volume.checker"
DEADLINE: Final = 24 * 3600.0
PROGRESS_SECONDS: Final = 0.3
ROOM: Final = 600_000
"""Bytes of findings in one message."""
MOST_STEPS: Final = 1000
_COUNTERS: Final = struct.Struct("<QQ")
_BEFORE_ROWS: Final = frozenset((Code.ORPHAN, Code.RESOURCE_UNKNOWN, Code.TEMPORARY, Code.LIVE_VOID))
"""What is found by a listing, and dropped when it has a row, or is gone, after that."""

Progress = Callable[[int, int], Awaitable[None]]


@dataclass(slots=True)
class Report:
    """What came out."""

    findings: list[Finding] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)
    """What a repair did, in order, and what it could not do."""


class StoreExamination:
    """Use cases on the store as a whole. Without ``catalogue`` (rescue mode) it only looks, and repairs nothing."""

    def __init__(
        self,
        host: Host,
        state: StateLayout,
        broker: Broker,
        catalogue: Catalogue | None,
        volumes: Volumes | None,
        snapshots: Snapshots | None,
        lineages: Lineages | None,
    ) -> None:
        self._host = host
        self._state = state
        self._broker = broker
        self._catalogue = catalogue
        self._volumes = volumes
        self._snapshots = snapshots
        self._lineages = lineages
        self._one = trio.Lock()

    async def check(
        self, caller: Caller, resources: Sequence[str] | None, *, repair: bool, progress: Progress
    ) -> Report:
        """Examine all, or the lineages of the resources named; with ``repair`` mend what can be, and look again.

        Raises NeedsRoot, ResourceNotFound; ValueError never, whatever lies in the store.
        """
        if not caller.is_admin:
            raise NeedsRoot(operation="Examining the store", remedy="Ask the administrator for `ebsctl check`.")
        async with self._one:
            chosen = await self._find(caller, resources)
            report = Report()
            if repair and self._catalogue is not None:
                await self._examine(chosen, report, progress, repair=True)
                report.findings.clear()
            await self._examine(chosen, report, progress, repair=False)
            return report

    async def _find(self, caller: Caller, names: Sequence[str] | None) -> frozenset[str] | None:
        """Return the lineages of the resources; None for all."""
        if not names:
            return None
        rows = await self._rows()
        found = set()
        for name in names:
            ident = name
            if self._volumes is not None and name not in rows.unreadable:
                _, ident = await self._volumes.identify(caller, name)
            if ident not in rows.resources:
                raise ResourceNotFound(resource=name)
            found.add(str(rows.resources[ident].lineage))
        return frozenset(found)

    async def _rows(self) -> Rows:
        if self._catalogue is None:
            return Rows()
        image = await self._catalogue.image()
        return await trio.to_thread.run_sync(lambda: read_rows(image, file=self._state.catalog.name))

    async def _examine(
        self, chosen: frozenset[str] | None, report: Report, progress: Progress, *, repair: bool
    ) -> None:
        first = await self._look(chosen, progress)
        if self._catalogue is None:
            report.findings += first
            return
        doubtful = {f.lineage for f in first if f.lineage and f.severity is not Severity.NOTE}
        report.findings += [f for f in first if f.lineage not in doubtful and f.code not in _BEFORE_ROWS]
        rows = await self._rows()
        listed = [f for f in first if f.lineage not in doubtful and f.code in _BEFORE_ROWS]
        still = [f for f in listed if await self._still(f, rows)]
        report.findings += still
        if repair:
            rights = [f for f in first if not f.lineage and f.code in (Code.MODE, Code.OWNER)]
            for finding in still + rights:
                await self._mend(finding, rows, report)
        for lineage in sorted(doubtful):
            async with self._locked(lineage):
                again = await self._look(frozenset((lineage,)), _quiet)
                again += [f for f in first if f.lineage == lineage and f.code is Code.TEMPORARY and self._exists(f)]
                report.findings += again
                if repair:
                    rows = await self._rows()
                    for finding in _safe_to_mend(again):
                        await self._mend(finding, rows, report)

    @asynccontextmanager
    async def _locked(self, lineage: str) -> AsyncIterator[None]:
        """Hold the locks of all volumes of a lineage, then its own: the order that everybody keeps to."""
        if self._volumes is None or self._lineages is None:
            raise AssertionError("BUG: no locks in rescue mode")
        rows = await self._rows()
        async with AsyncExitStack() as stack:
            for row in sorted(rows.of_lineage(lineage), key=lambda row: row.id):
                if not row.is_snapshot:
                    await stack.enter_async_context(self._volumes.lock(VolumeId(row.id)))
            await stack.enter_async_context(self._lineages.lock(LineageId(lineage)))
            yield

    async def _still(self, finding: Finding, rows: Rows) -> bool:
        """Say whether what a listing showed is there yet and has no row now: a row precedes its files."""
        name = Path(finding.file).name
        if rows.knows(finding.resource) and finding.code in (Code.ORPHAN, Code.RESOURCE_UNKNOWN):
            return False
        if finding.code is Code.TEMPORARY and rows.knows(finding.resource):
            return False  # made, or being replaced, by whoever holds its locks
        if finding.code is Code.ORPHAN and not finding.resource and name in rows.lineages:
            return False
        return await trio.to_thread.run_sync(self._exists, finding)

    def _exists(self, finding: Finding) -> bool:
        return os.path.lexists(self._state.root / finding.file)

    async def _look(self, lineages: Collection[str] | None, progress: Progress) -> list[Finding]:
        """Have a helper process look at the store once."""
        image = b"" if self._catalogue is None else await self._catalogue.image()
        request = {
            "Anchors": await self._anchors(image, lineages),
            "Lineages": None if lineages is None else sorted(lineages),
        }
        fds = [os.memfd_create(name, os.MFD_CLOEXEC) for name in ("catalog", "request", "findings", "counters")]
        try:
            disk = RealDisk()
            for fd, data in zip(fds, (image, json.dumps(request).encode()), strict=False):
                await trio.to_thread.run_sync(_write_all, fd, data)
            os.ftruncate(fds[3], _COUNTERS.size)
            params = {
                "StateDirectory": str(self._state.root),
                "LiveDirectory": str(self._host.runtime.live),
                "BootId": self._host.boot_id,
                "HasCatalog": self._catalogue is not None,
            }
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_watch, fds[3], progress)
                await run_helper(MODULE, {"method": "check", "params": params}, fds, deadline=DEADLINE)
                nursery.cancel_scope.cancel()
            raw = disk.pread(fds[2], os.fstat(fds[2]).st_size, 0)
            return [Finding.from_members(members) for members in json.loads(raw)]
        finally:
            for fd in fds:
                os.close(fd)

    async def _anchors(self, image: bytes, lineages: Collection[str] | None) -> Mapping[str, Any] | None:
        """Return what the key service knows of the resources: data for a comparison, no key. None: it is away."""
        if self._catalogue is None:
            names = await trio.to_thread.run_sync(os.listdir, self._state.records)
            names = [name for name in names if name.startswith(("vol-", "snap-"))]
        else:
            rows = await trio.to_thread.run_sync(lambda: read_rows(image, file="catalog"))
            names = [row.id for row in rows.resources.values() if lineages is None or row.lineage in lineages]
        try:
            return {name: await self._broker.describe_anchor(name) for name in names}
        except EbsdError:
            return None

    # --- repair

    async def _mend(self, finding: Finding, rows: Rows, report: Report) -> None:
        if not RULES[finding.code].repairable or finding.severity is Severity.NOTE:
            return
        try:
            report.steps.append(await self._mend_one(finding, rows))
        except (EbsdError, OSError) as exc:
            report.steps.append(f"{finding.file or finding.resource}: could not be repaired: {exc}")

    async def _mend_one(self, finding: Finding, rows: Rows) -> str:
        path = self._state.root / finding.file
        if finding.code is Code.LEAKED_SPACE:
            return await self._sweep(finding)
        if finding.code is Code.PENDING:
            return await self._finish(finding)
        steps: dict[Code, Callable[[], str]] = {
            Code.MODE: lambda: self._set_mode(path, finding, rows),
            Code.OWNER: lambda: self._set_owner(path, finding),
            Code.TEMPORARY: lambda: _remove_temporary(path, finding),
            Code.ORPHAN: lambda: self._set_aside(path, finding),
        }
        return await trio.to_thread.run_sync(steps[finding.code])

    async def _sweep(self, finding: Finding) -> str:
        if self._lineages is None:
            raise AssertionError("BUG: no sweep in rescue mode")
        await self._lineages.sweep_whole(LineageId(finding.lineage))
        return f"{finding.file}: its lineage was swept"

    async def _finish(self, finding: Finding) -> str:
        if self._volumes is None or self._snapshots is None:
            raise AssertionError("BUG: nothing is finished in rescue mode")
        if looks_like_snapshot_id(finding.resource):
            await self._snapshots.settle(SnapshotId(finding.resource))
            return f"{finding.resource}: it was finished, or removed where it could not be"
        await self._volumes.remove_half_made(VolumeId(finding.resource))
        return f"{finding.resource}: what there was of it is removed"

    def _set_mode(self, path: Path, finding: Finding, rows: Rows) -> str:
        with _opened(path) as fd:
            mode = 0o600
            if stat.S_ISDIR(os.fstat(fd).st_mode):
                mode = 0o700
            elif (parsed := parse_segment_name(path.name)) is not None:
                layer = rows.layers.get(LineageId(finding.lineage), {}).get(parsed[0])
                if layer is not None and layer.state is LayerState.SEALED:
                    mode = 0o440
            os.fchmod(fd, mode)
        return f"{finding.file}: its mode is {mode:04o} now"

    def _set_owner(self, path: Path, finding: Finding) -> str:
        with _opened(path) as fd:
            os.fchown(fd, os.geteuid(), os.getegid())
        return f"{finding.file}: it belongs to uid {os.geteuid()} now"

    def _set_aside(self, path: Path, finding: Finding) -> str:
        aside = self._state.root / ASIDE
        place = aside / f"{self._host.now()}-{self._host.random(4).hex()}" / Path(finding.file).parent
        place.mkdir(mode=0o700, parents=True)
        path.rename(place / path.name)
        disk = RealDisk()
        for directory in (place, path.parent, aside, self._state.root):
            fsync_directory(disk, directory)
        return f"{finding.file}: set aside in {place}"


def describe_report(report: Report) -> dict[str, Any]:
    """Return the members of Control.CheckStore: the worst findings first, and no more than a message can carry."""
    order = list(Severity)
    findings, room = [], ROOM
    for finding in sorted(report.findings, key=lambda f: order.index(f.severity)):
        rule = RULES[finding.code]
        members: dict[str, Any] = {
            "Code": finding.code.value,
            "Severity": finding.severity.value,
            "Detail": finding.detail,
            "Repairable": rule.repairable and finding.severity is not Severity.NOTE,
        }
        optional = {"ResourceId": finding.resource, "File": finding.file, "Advice": rule.advice}
        members |= {name: text for name, text in optional.items() if text}
        room -= len(json.dumps(members))
        if room < 0:
            break
        findings.append(members)
    return {
        "Done": 0,
        "Total": 0,
        "Findings": findings,
        "Steps": report.steps[:MOST_STEPS],
        "Omitted": len(report.findings) - len(findings),
    }


def _safe_to_mend(findings: Sequence[Finding]) -> list[Finding]:
    """Return what may be mended in a lineage: where something is damaged, nothing that could be evidence or data."""
    if any(finding.severity is Severity.DAMAGE for finding in findings):
        return [finding for finding in findings if finding.code in (Code.MODE, Code.OWNER)]
    return list(findings)


def _remove_temporary(path: Path, finding: Finding) -> str:
    path.unlink()
    fsync_directory(RealDisk(), path.parent)
    return f"{finding.file}: removed"


@contextlib.contextmanager
def _opened(path: Path) -> Any:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _write_all(fd: int, data: bytes) -> None:
    at = 0
    while at < len(data):
        at += os.pwrite(fd, data[at : at + (1 << 24)], at)


async def _quiet(_done: int, _total: int) -> None:
    await trio.lowlevel.checkpoint()


async def _watch(counters: int, progress: Progress) -> None:
    while True:
        await trio.sleep(PROGRESS_SECONDS)
        await progress(*_COUNTERS.unpack(os.pread(counters, _COUNTERS.size, 0)))
