"""``World``: the daemon's composition over a crash disk, synchronous operations on it, crashes, and the checks.

1. Each operation is one trio run on a clock that jumps, in a fixed order. It returns when nothing is left to do; what
   would go on by itself (the burial of a process that dies) goes on in the next one.
2. Each operation tells the model (``truth``). One that is cut short leaves what may have come of it in ``_pending``,
   which ``recover`` resolves by what the catalog says.
3. ``check`` reads with the product's code, from outside: map, layers and key, no process, no use case.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import os
import random
import shutil
import tempfile
import uuid
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import trio
import trio.testing

from ebsd.control.block_writes import StartRequest
from ebsd.control.catalogue import Catalogue
from ebsd.control.creation import CopyRequest
from ebsd.control.host import Host, RuntimeLayout
from ebsd.control.space import Space
from ebsd.control.volume_files import VolumeFiles
from ebsd.control.volumes import CreateRequest
from ebsd.crypto.codec import CodecFactory
from ebsd.crypto.secret import Secret
from ebsd.daemon.main import compose, recover
from ebsd.daemon.services import UseCases
from ebsd.domain.blocks import BLOCK, encode_checksum
from ebsd.domain.errors import EbsdError, StoreDamaged
from ebsd.domain.geometry import chunk_count
from ebsd.domain.ids import KeyArn, LineageId, VolumeId, account_of_uid, parse_resource_id
from ebsd.domain.model import Caller, Cipher, ExposedAs, LayerState, Snapshot, Volume
from ebsd.domain.space import SpaceLimits
from ebsd.domain.states import DirectState, JobState, SnapshotState, VolumeState
from ebsd.domain.times import plus
from ebsd.domain.units import CHUNK, SECTOR
from ebsd.store.ballast import Ballast
from ebsd.store.catalog import Catalog, Transaction
from ebsd.store.disk import RealDisk
from ebsd.store.durablemap import DurableMap
from ebsd.store.entries import HOLE, map_hash
from ebsd.store.layers import open_layer, segment_name
from ebsd.store.layertable import read_layer_table
from ebsd.store.layout import LiveLayout, StateLayout
from ebsd.store.leaftable import LeafSlot, leaf_root, read_slots
from ebsd.store.leaves import LeafFile, leaf_digest
from ebsd.store.record import read_record
from ebsd.store.sealedmap import read_sealed_map
from ebsd.store.signedrecord import NO_HASH, RecordState, parse_signed
from ebsd.store.sweep import Known, find_orphans
from ebsd.volume.copier import SourceFiles, runs
from ebsd.volume.engine import BlockEngine
from ebsd.volume.scheduling import run_sync
from ebsd.volume.verify import covered_layers

from .crash_disk import CrashDisk, Died, Mode
from .memory_broker import MemoryBroker, arn
from .model import Truth
from .processes import Hosting, VolumeProc

T = TypeVar("T")
SHM = "/dev/shm" if Path("/dev/shm").is_dir() else None
REAL = RealDisk()
ROOT = Caller(0, "root", account_of_uid(0), is_admin=True)
CrashKind = Literal["power", "kill", "ebsd"]
MOST_PARKED: Final = 256
_PARKED: Final = "ebsd-world-parked"

# The one source of chance in trio's order of tasks.
trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING = True


class Broken(AssertionError):
    """An invariant of FORMAT.md does not hold."""


class JobEnded(Broken):
    """A copy did not come to its end; ``code`` is that of its error."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass
class _Pending:
    """What an operation that was cut short may have left."""

    made: Truth | None = None
    """What a new resource must show, if there is one."""
    gone: str = ""
    """A resource that may be gone."""
    grown: tuple[str, int] = ("", 0)


class _Nursery:
    """The nursery of whatever run is under way; burials are taken up again by the next one."""

    def __init__(self) -> None:
        self.real: trio.Nursery | None = None
        self._burials: list[tuple[Callable[..., Awaitable[Any]], tuple[Any, ...]]] = []

    def start_soon(self, function: Callable[..., Awaitable[Any]], *args: Any) -> None:
        assert self.real is not None
        if function.__name__ == "_bury":
            self._burials = [(f, a) for f, a in self._burials if not a[1].child.ended]
            self._burials.append((function, args))
        if function.__name__ == "_follow_drains":
            return  # ``World.drain`` does it
        self.real.start_soon(function, *args)

    def enter(self, nursery: trio.Nursery) -> None:
        self.real = nursery
        for function, args in self._burials:
            nursery.start_soon(function, *args)
        self._burials = [(f, a) for f, a in self._burials if not a[1].child.ended]


class _CountingCatalogue(Catalogue):
    """A commit that changes something is a place where one may die, before it; a transaction then leaves nothing."""

    def __init__(self, catalog: Catalog, ballast: Ballast, disk: CrashDisk) -> None:
        super().__init__(catalog, ballast)
        self._disk = disk

    async def run(self, use_case: Callable[[Transaction], T]) -> T:
        self._disk.reading("transaction")

        def counted(t: Transaction) -> T:
            before = t._db.total_changes()
            result = use_case(t)
            if t._db.total_changes() != before:
                self._disk.changing("commit")
            return result

        return await super().run(counted)


class World:
    """See the package. Sizes and offsets are bytes; volumes and snapshots are named by their ids."""

    SIZE: Final = 16 * CHUNK
    """The smallest volume: 1 MiB, 16 chunks."""

    ODD: Final = 18 * CHUNK + 3 * SECTOR
    """A size that is not whole chunks."""

    def __init__(self, seed: int = 0, *, directory: str | None = SHM) -> None:
        self.dice = random.Random(seed)
        self._real_dice = random.Random(seed + 1)
        _remove_stale(Path(directory or tempfile.gettempdir()))
        self.base = Path(os.path.realpath(tempfile.mkdtemp(prefix=f"ebsd-world-{os.getpid()}-", dir=directory)))
        self.state = StateLayout(self.base / "state")
        for name in ("state", "run", "run/volumes", "run/control", "run/live", "grave"):
            (self.base / name).mkdir()
        self.disk = CrashDisk(self.base, volatile=self.base / "run", grave=self.base / "grave")
        # On the real disk: what guards against a full one is no part of what is tested here.
        self._space = Space(RealDisk(), self.state.root, self.state.ballast, SpaceLimits(0, 0, 0.0))
        self.broker = MemoryBroker(self.disk, self._real_dice)
        self.boot = self._new_uuid()
        self._clock = 0
        self.later = 0.0
        """Seconds by which the clock is ahead of the operations."""
        self.clock_is_even = True
        self._nursery = _Nursery()
        self.hosting = Hosting(self.disk, lambda: self._nursery.real)  # type: ignore[arg-type,return-value]
        self._filling: dict[int, bytes] = {}
        """Blocks of a snapshot that were not answered yet."""
        self.truth: dict[str, Truth] = {}
        """What each volume and snapshot must show."""
        self._sealed: dict[tuple[str, int, int], bytes] = {}
        """(lineage, layer, chunk) that a snapshot names -> digest of the ciphertext."""
        self._pending = _Pending()
        self._catalog: Catalog | None = None
        self._use: UseCases | None = None
        self._serves = False
        self.open()

    def _new_uuid(self) -> str:
        return str(uuid.UUID(bytes=self._real_dice.randbytes(16)))

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- life

    def _host(self) -> Host:
        def now() -> str:
            self._clock += 1
            time = f"2026-01-01T{self._clock // 3600 % 24:02d}:{self._clock // 60 % 60:02d}:{self._clock % 60:02d}Z"
            return plus(time, self.later)

        return Host(
            runtime=RuntimeLayout(self.base / "run", self.base / "run" / "live"),
            boot_id=self.boot,
            instance="i-0123456789abcdef0",
            admin_uid=0,
            allow_unencrypted=True,
            drain=True,
            space=self._space,
            now=now,
            random=self._real_dice.randbytes,
            clock_is_even=lambda: self.clock_is_even,
        )

    def open(self) -> None:
        """Start ebsd: directories, catalog, composition, the product's recovery."""
        assert self._catalog is None
        self.state.create(self.disk)
        self._catalog = Catalog(self.state.catalog)
        self._nursery = _Nursery()
        ballast = self._space.ballast
        files = VolumeFiles(self.disk, self.state, LiveLayout(self.base / "run" / "live"), ballast)
        self._use = compose(
            self._host(),
            _CountingCatalogue(self._catalog, ballast, self.disk),
            self.broker,  # type: ignore[arg-type]
            files,
            self.disk,
            self.state,
            self._nursery,  # type: ignore[arg-type]
        )
        self._run(self._recover)
        self._serves = True

    async def _recover(self) -> None:
        """The product's recovery; jobs that go on are waited for, however they end."""
        await recover(self.use)
        for job in await self.use.jobs.describe(ROOT, None):
            async for _ in self.use.jobs.watch(ROOT, job.job.id):
                pass
        await self._go_on_filling()

    def shut(self) -> None:
        """ebsd ends; volume processes go on."""
        if self._catalog is not None:
            self._catalog.close()
        self._catalog, self._use, self._serves = None, None, False

    def reopen(self) -> None:
        """A clean stop of ebsd, and another one."""
        self.shut()
        self._hang_up()
        self.open()

    def _hang_up(self) -> None:
        """What the end of ebsd does to its children: workers end, and volume processes that serve nothing."""
        for worker in self.hosting.workers:
            worker.die()
        self.hosting.workers.clear()
        for process in self.hosting.by_pid.values():
            process.closed()

    def crash(self, kind: CrashKind, mode: Mode = "random") -> None:
        """End what runs: ``ebsd`` and its workers alone; ``kill``: all processes; ``power``: and what was not synced.

        After ``arm`` it says what the death was; without one it is a death between two operations.
        """
        self.shut()
        self._hang_up()
        if kind == "ebsd":
            for process in self.hosting.by_pid.values():
                if self.disk.is_dead(process.actor):
                    process.die()
            self.disk.revive()
            return
        for process in self.hosting.by_pid.values():
            process.die()
        self.hosting.by_pid.clear()
        self._close_leaked()
        self.disk.revive()
        if kind == "power":
            self.disk.cut_power(self.dice, mode)
            for name in ("volumes", "control", "live"):
                for path in (self.base / "run" / name).iterdir():
                    path.unlink()
            self.boot = self._new_uuid()
            for name, truth in self.truth.items():
                if name.startswith("vol-"):
                    truth.cut()

    def _close_leaked(self) -> None:
        """Take their files from descriptors that dead processes had: whatever is still open below our directory.

        Some of them belong to objects that the collector has not met yet (an ``mmap`` keeps a duplicate), which will
        close the number once more: so it is not given free here, but left with nothing behind it.
        """
        parked = None
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/self/fd/{name}").startswith(f"{self.base}/"):
                    if parked is None:
                        parked = os.memfd_create(_PARKED, os.MFD_CLOEXEC)
                    os.dup2(parked, int(name), inheritable=False)
        if parked is not None:
            os.close(parked)
        _close_parked()

    def kill_process(self, volume: str) -> None:
        """Kill one volume process; the next operation finds that out."""
        process = self._process(volume)
        process.die()

    def recover(self, *, detach: bool = True) -> None:
        """Start ebsd after a crash; ``detach`` what stayed in ``error``, which salvages it. Resolves what was cut."""
        self.open()
        self._resolve()
        if detach:
            for volume in self.volumes():
                if volume.attachment is not None and self.hosting.process_of(volume.id) is None:
                    self.detach(volume.id)

    def close(self) -> None:
        """End everything and remove the directory."""
        self.shut()
        for process in (*self.hosting.by_pid.values(), *self.hosting.workers):
            process.die()
        self.broker.close()
        self._close_leaked()
        shutil.rmtree(self.base, ignore_errors=True)

    # --- runs

    def _run(self, function: Callable[..., Awaitable[T]], *args: Any, **kwargs: Any) -> T:
        """Run one use case to its end. A death is raised as ``Died``, an error as itself."""
        nursery = self._nursery

        async def main() -> T:
            async with trio.open_nursery() as real:
                nursery.enter(real)
                try:
                    await trio.testing.wait_all_tasks_blocked()  # burials first
                    result = await function(*args, **kwargs)
                    await trio.testing.wait_all_tasks_blocked()
                    return result
                finally:
                    real.cancel_scope.cancel()
                    nursery.real = real

        trio._core._run._r.seed(0)
        try:
            with self.hosting.patched():
                return trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
        except BaseExceptionGroup as group:
            error = _leaf(group)
        if self._serves and not self.disk.is_dead("ebsd"):
            self._resolve()  # it failed, and ebsd goes on
        raise error

    @property
    def use(self) -> UseCases:
        assert self._use is not None, "ebsd does not run"
        return self._use

    def _process(self, volume: str) -> VolumeProc:
        process = self.hosting.process_of(volume)
        assert process is not None, f"{volume} is not attached"
        return process

    def _engine(self, volume: str) -> BlockEngine:
        engine = self._process(volume).own._engine
        assert engine is not None
        return engine

    def _as_volume(self, volume: str, step: Callable[[], T]) -> T:
        """Do something in a volume process; when it dies of it and ebsd does not, ebsd will notice by itself."""
        process = self._process(volume)
        try:
            with self.disk.acting(process.actor):
                return step()
        except Died:
            if not self.disk.is_dead("ebsd"):
                process.die()
            raise

    @contextlib.contextmanager
    def may_die(self) -> Iterator[None]:
        """Suppress the death that was armed; ask ``disk.is_dead()`` whether it came. Disarms."""
        try:
            yield
        except Died:
            pass
        finally:
            self.disk.disarm()

    def count(self, operation: Callable[[], object]) -> int:
        """Do an operation and return how many changing calls it made: as many places to die at."""
        self.disk.disarm()
        operation()
        return len(self.disk.log)

    # --- operations

    def create(
        self, size: int = SIZE, *, encrypted: bool = True, key: str | None = None, preallocate: bool = False
    ) -> str:
        self._pending = _Pending(made=Truth(size))
        ident = self._create(size, None, encrypted, key, preallocate)
        return self._made(ident)

    def restore(self, snapshot: str, *, size: int | None = None, key: str | None = None) -> str:
        """A volume from a snapshot: instant under the same key, re-encrypted by a job under another."""
        row = self.row(snapshot)
        self._pending = _Pending(made=self.truth[snapshot].copy(size or row.size))
        ident = self._create(size, snapshot, None if key is None else True, key)
        return self._made(ident)

    def _create(
        self,
        size: int | None,
        snapshot: str | None,
        encrypted: bool | None,
        key: str | None,
        preallocate: bool = False,
    ) -> str:
        request = CreateRequest(
            name=None, size=size, size_gib=None, snapshot=snapshot,
            encrypted=encrypted, key=None if key is None else arn(key), context={}, tags={}, preallocate=preallocate,
        )  # fmt: skip

        async def create() -> str:
            volume, job, _ = await self.use.creation.create_volume(ROOT, request)
            await self._ended(job)
            return volume.id

        return self._run(create)

    async def _ended(self, ident: str | None) -> None:
        if ident is None:
            return
        job = None
        async for state in self.use.jobs.watch(ROOT, ident):
            job = state.job
        assert job is not None
        if job.state is not JobState.COMPLETED:
            raise JobEnded(f"{ident} is {job.state.value}: {job.error}", (job.error or {}).get("Code", ""))

    def _made(self, ident: str) -> str:
        assert self._pending.made is not None
        self.truth[ident] = self._pending.made
        self._pending = _Pending()
        if ident.startswith("snap-"):
            self._note_sealed(ident)
        return ident

    def snapshot(self, volume: str) -> str:
        """Take a snapshot, attached or not."""
        self._pending = _Pending(made=self.truth[volume].copy())
        made = self._run(self.use.snapshots.create, ROOT, volume, name=None, description="", tags={})
        return self._made(made.id)

    def copy(self, snapshot: str, *, new_key: bool = False, key: str | None = None) -> str:
        """Copy a snapshot: instant under its own key, re-encrypted by a job under a new or another one."""
        row = self.row(snapshot)
        wanted = f"key-{self._real_dice.randrange(10**6)}" if new_key else key
        return self._copy(snapshot, row.key_arn if wanted is None else arn(wanted))

    def _copy(self, snapshot: str, key: KeyArn | None) -> str:
        encrypted = key is not None
        request = CopyRequest(snapshot, None, "", encrypted or None, key, {})
        self._pending = _Pending(made=self.truth[snapshot].copy())

        async def copy() -> str:
            made, job, _ = await self.use.creation.copy_snapshot(ROOT, request)
            await self._ended(job)
            return made.id

        return self._made(self._run(copy))

    def fill(self, parent: str | None, size: int, blocks: dict[int, bytes]) -> str:
        """Make a snapshot block by block, two at a time and the first one twice; content is 512 KiB each."""
        truth = Truth(size) if parent is None else self.truth[parent].copy(size)
        for block, data in blocks.items():
            inside = data[: size - block * BLOCK]
            truth.acknowledge(truth.begin(block * BLOCK, inside))
        truth.flushed(truth.flush_begins())
        self._pending = _Pending(made=truth)
        self._filling = dict(blocks)
        first = min(blocks)
        rounds = [{first: bytes(BLOCK - SECTOR) + blocks[first][-SECTOR:]}]
        numbers = sorted(blocks)
        rounds += [{n: blocks[n] for n in numbers[at : at + 2]} for at in range(0, len(numbers), 2)]

        async def fill() -> str:
            request = StartRequest(None, size, parent, None, "", {}, True if parent is None else None, None, None, None)
            snapshot, _ = await self.use.block_writes.start(ROOT, request)
            try:
                for part in rounds:
                    await self._put_blocks(snapshot.id, part)
                    if part != rounds[0]:
                        for block in part:
                            self._filling.pop(block)
                await self.use.block_writes.complete(ROOT, snapshot.id, changed=len(blocks), checksum=None)
            except EbsdError:
                await self.use.block_writes.abandon(ROOT, snapshot.id)
                raise
            return snapshot.id

        return self._made(self._run(fill))

    async def _put_blocks(self, snapshot: str, part: dict[int, bytes]) -> None:
        fd = os.memfd_create("blocks")
        try:
            os.write(fd, b"".join(part.values()))
            given = [(n, encode_checksum(hashlib.sha256(data).digest())) for n, data in part.items()]
            await self.use.block_writes.put(ROOT, snapshot, given, fd)
        finally:
            os.close(fd)

    async def _go_on_filling(self) -> None:
        """What a client does after a restart: it writes what was not answered and completes, or gives up."""
        for direct in self._transaction(lambda t: [each for each in t.directs() if each.is_pending]):
            if direct.state is DirectState.OPEN and self.dice.random() < 0.5:
                await self.use.block_writes.abandon(ROOT, direct.id)
                continue
            if direct.state is DirectState.OPEN:
                if self._filling:
                    await self._put_blocks(direct.id, self._filling)
                written = self._transaction(lambda t, ident=direct.id: t.direct(ident)).written  # type: ignore[misc]
                await self.use.block_writes.complete(ROOT, direct.id, changed=written, checksum=None)
            else:
                await self.use.block_writes.complete(ROOT, direct.id, changed=direct.written, checksum=None)

    def cancelled_copy(self, snapshot: str) -> None:
        """Begin a copy under a new key, and cancel it while its worker is at work."""
        key = arn(f"key-{self._real_dice.randrange(10**6)}")
        request = CopyRequest(snapshot, None, "", True, key, {})
        self._pending = _Pending(made=self.truth[snapshot].copy())

        async def copy() -> None:
            _, job, _ = await self.use.creation.copy_snapshot(ROOT, request)
            for _ in range(4):
                await trio.lowlevel.checkpoint()
            assert job is not None
            await self.use.jobs.cancel(ROOT, job)

        self._run(copy)
        self._pending = _Pending()

    def attach(self, volume: str, *, read_only: bool = False) -> None:
        self._pending = _Pending()
        self._run(self.use.attachments.attach, ROOT, volume, read_only=read_only, expose_as=ExposedAs.FILE)

    def detach(self, volume: str, *, force: bool = False) -> None:
        self._pending = _Pending()
        mark = self.truth[volume].flush_begins() if volume in self.truth else 0
        engines = [p.own._engine for p in self.hosting.by_pid.values() if p.own._volume == volume]
        failed = any(engine is not None and engine.failed for engine in engines)
        self._run(self.use.attachments.detach, ROOT, volume, force=force)
        if not failed and volume in self.truth:  # a dead process's volume was salvaged, which makes durable, too
            self.truth[volume].flushed(mark)

    def resize(self, volume: str, size: int) -> None:
        self._pending = _Pending(grown=(volume, size))
        self._run(self.use.growth.grow, ROOT, volume, size=size, size_gib=None)
        self._pending = _Pending()
        self.truth[volume].grow(size)

    def delete_volume(self, volume: str) -> None:
        self._pending = _Pending(gone=volume)
        self._run(self.use.volumes.delete, ROOT, volume)
        del self.truth[volume]
        self._pending = _Pending()

    def delete_snapshot(self, snapshot: str) -> None:
        self._pending = _Pending(gone=snapshot)
        self._run(self.use.snapshots.delete, ROOT, snapshot)
        del self.truth[snapshot]
        self._pending = _Pending()

    def sweep(self) -> None:
        """Sweep every lineage, as a start does."""
        self._run(self.use.lineages.tidy)

    def drain(self, volume: str) -> None:
        """What ebsd and the process of a volume do by themselves after a deletion: look, move, give back."""
        self._pending = _Pending()
        self._run(self.use.drains.begin, volume)
        process = self.hosting.process_of(volume)
        if process is None:
            return  # it died of that, and ebsd notices by itself
        drainer = process.own._drainer
        if drainer is not None and drainer.pending:
            mark = self.truth[volume].flush_begins()
            self._as_volume(volume, lambda: run_sync(drainer.make_pass()))
            engine = self._engine(volume)
            if not engine.failed and not engine.needs_flush:
                self.truth[volume].flushed(mark)
        self._run(self.use.drains.collect, volume)

    # --- input and output of attached volumes

    def read(self, volume: str, offset: int, length: int) -> bytes:
        """Read, and check against the model (whole blocks of 512 bytes)."""
        engine = self._engine(volume)
        content = self._as_volume(volume, lambda: bytes(run_sync(engine.read(offset, length))))
        first, last = -(-offset // 512) * 512, (offset + length) // 512 * 512
        if first < last:
            self.truth[volume].check(content[first - offset : last - offset], f"{volume}, read", offset=first)
        return content

    def write(self, volume: str, offset: int, data: bytes) -> None:
        engine = self._engine(volume)
        write = self.truth[volume].begin(offset, data)
        self._as_volume(volume, lambda: run_sync(engine.write(offset, data)))
        self.truth[volume].acknowledge(write)

    def discard(self, volume: str, offset: int, length: int) -> None:
        """Discard, which here means: reads as zeros from now on."""
        engine = self._engine(volume)
        write = self.truth[volume].begin(offset, bytes(length))
        self._as_volume(volume, lambda: run_sync(engine.discard(offset, length)))
        self.truth[volume].acknowledge(write)

    write_zeroes = discard
    """The block file gives both to the engine as one request (fallocate)."""

    def flush(self, volume: str) -> None:
        engine = self._engine(volume)
        mark = self.truth[volume].flush_begins()
        self._as_volume(volume, lambda: run_sync(engine.flush()))
        self.truth[volume].flushed(mark)

    def tick(self, volume: str) -> None:
        """What a volume process does every few seconds: flush, then give back what no map names."""
        process = self._process(volume)
        mark = self.truth[volume].flush_begins()
        self._as_volume(volume, lambda: run_sync(process.own._quiet_flush()))
        engine = process.own._engine
        if engine is not None and not engine.failed and not engine.needs_flush:
            self.truth[volume].flushed(mark)

    def hash_layers(self, volume: str) -> None:
        """Let a volume process hash what is sealed, and ebsd fetch the records that it signs again."""
        process = self._process(volume)

        async def work() -> None:
            try:
                await process.hash_layers()
            except* Died:
                if not self.disk.is_dead("ebsd"):
                    process.die()
                raise
            attachments = self.use.attachments
            await attachments._roots.collect(attachments._links[VolumeId(volume)])

        self._run(work)

    # --- what the catalog says

    def _transaction(self, use_case: Callable[[Transaction], T]) -> T:
        assert self._catalog is not None
        return self._catalog.run(use_case)

    def volumes(self) -> list[Volume]:
        return self._transaction(lambda t: t.volumes())

    def snapshots(self) -> list[Snapshot]:
        return self._transaction(lambda t: t.snapshots())

    def row(self, resource: str) -> Any:
        if resource.startswith("snap-"):
            return self._transaction(lambda t: t.snapshot(resource))  # type: ignore[arg-type]
        return self._transaction(lambda t: t.volume(VolumeId(resource)))

    # --- after a crash

    def _resolve(self) -> None:
        """Bring the model in line with how the operation that was cut short ended; it ended as old or new (I5).

        What failed and could not be undone either is left to the next start, and so is the question how it ended.
        """
        volumes, snapshots = {v.id: v for v in self.volumes()}, self.snapshots()
        half = (VolumeState.CREATING, VolumeState.DELETING, SnapshotState.PENDING)
        if any(row.state in half for row in (*volumes.values(), *snapshots)):
            return
        pending, self._pending = self._pending, _Pending()
        present = {*volumes, *(s.id for s in snapshots)}
        for missing in sorted({*self.truth} - present):
            if missing != pending.gone:
                raise Broken(f"{missing} is gone")
            del self.truth[missing]
        for new in sorted(present - {*self.truth}):
            if pending.made is None:
                raise Broken(f"{new} came from nowhere")
            self.truth[new] = pending.made
            pending.made = None
            if new.startswith("snap-"):
                self._note_sealed(new)
        grown, size = pending.grown
        if grown and volumes[VolumeId(grown)].size == size:
            self.truth[grown].grow(size)

    # --- reading from outside

    def content(self, resource: str) -> bytes:
        """Return all bytes: of an attached volume through its engine, of the rest by map, layers and key."""
        if self.hosting.process_of(resource) is not None:
            engine = self._engine(resource)
            return bytes(run_sync(engine.read(0, engine.size)))
        return self._stored_content(self.row(resource))

    def _entries(self, row: Volume | Snapshot) -> memoryview:
        """Return a view of the entries of the map on the disk, one per chunk."""
        path = self.state.map(row.id)
        if isinstance(row, Snapshot):
            sealed = read_sealed_map(REAL, path, row.id)
            return sealed.entries[: sealed.chunks]
        durable = DurableMap.open(REAL, path, writable=False)
        try:
            return durable.entries()[: chunk_count(row.size)]
        finally:
            durable.close()

    def _stored_content(self, row: Volume | Snapshot) -> bytes:
        entries = self._entries(row)
        content = bytearray(len(entries) * CHUNK)
        wrapped = read_record(REAL, self.state.record(row.id)).wrapped_key
        key = None if wrapped is None else Secret.from_buffer(bytearray(self.broker.data_key(wrapped.blob)))
        table = read_layer_table(REAL, self.state.table(row.lineage))
        dirfd = os.open(self.state.lineage(row.lineage), os.O_RDONLY)
        source = SourceFiles(REAL, dirfd, table)
        try:
            with CodecFactory(key, cipher=row.cipher) as factory:
                for run in runs(entries, 0):
                    view = memoryview(content)[run.first * CHUNK : (run.first + run.chunks) * CHUNK]
                    source.read(run, view)
                    codec = factory.codec(table.uuid_of(run.layer))
                    codec.decrypt_into(view, view, run.first * CHUNK // SECTOR)
        finally:
            source.close()
            os.close(dirfd)
            if key is not None:
                key.wipe()
        return bytes(content[: row.size])

    # --- checks

    def check(self, *, settle: bool = True) -> None:
        """Compare every byte with the model and check the invariants. ``settle``: after a crash, what is is so."""
        present = {str(v.id) for v in self.volumes()} | {str(s.id) for s in self.snapshots()}
        if present != {*self.truth}:
            raise Broken(f"the catalog has {sorted(present)}, the model {sorted(self.truth)}")
        for resource, truth in self.truth.items():
            content = self.content(resource)
            # A process may serve the old size until it is asked again, or the volume attached again.
            behind = self.hosting.process_of(resource) is not None and len(content) == self._engine(resource).size
            if len(content) != truth.size and not (behind and len(content) < truth.size):
                raise Broken(f"{resource} has {len(content)} bytes instead of {truth.size}")
            truth.check(content, resource)
            if settle and self.hosting.process_of(resource) is None:
                truth.settle(content)
        self.invariants()

    def invariants(self, *, sealed: bool = True) -> None:
        """Raise Broken unless I1 to I3, I5 and the accounting of files, space, anchors and grants hold.

        Call it when nothing is half made: after an operation, or after ``recover``. ``sealed``: every chunk that a
        snapshot names is compared with what it was, which takes most of the time.
        """
        if self.disk.violations:
            raise Broken(f"I2: {self.disk.violations[0]}")
        volumes, snapshots = self.volumes(), self.snapshots()
        for row in (*volumes, *snapshots):
            self._check_row(row)
        if sealed:
            self._check_sealed(snapshots)
        for lineage in {row.lineage for row in (*volumes, *snapshots)}:
            self._check_leaves(lineage, [row for row in (*volumes, *snapshots) if row.lineage == lineage])
        self._check_names(volumes, snapshots)
        anchors = {*self.broker.anchors}
        present = {str(row.id) for row in (*volumes, *snapshots)}
        if anchors != present:
            raise Broken(f"anchors {sorted(anchors - present)} too many, {sorted(present - anchors)} missing")
        wanted = {v.attachment.grant for v in volumes if v.attachment is not None}
        if not {*self.broker.grants} <= wanted:
            raise Broken(f"grants are left: {sorted({*self.broker.grants} - wanted)}")

    def _check_row(self, row: Volume | Snapshot) -> None:
        states = (
            VolumeState.AVAILABLE, VolumeState.IN_USE, VolumeState.RECOVERABLE, SnapshotState.COMPLETED,
        )  # fmt: skip
        if row.state not in states:
            raise Broken(f"{row.id} is {row.state.value}")
        record = read_record(REAL, self.state.record(row.id))
        body = record.body()
        floor = self.broker.anchors[row.id].floor
        if body.generation < floor:
            raise Broken(f"{row.id}: its record is of generation {body.generation}, the floor is {floor}")
        table = read_layer_table(REAL, self.state.table(row.lineage))
        if table.prefix_hash(body.table_count) != body.table_hash:
            raise Broken(f"{row.id}: its record is over another layer table")
        entries = self._entries(row)
        whole = memoryview(bytearray(-(-len(entries) // 1024) * 4096)).cast("I")
        whole[: len(entries)] = entries
        if body.state is RecordState.CLEAN and isinstance(row, Snapshot):
            if map_hash(whole, len(entries)) != body.map_hash:
                raise Broken(f"{row.id}: its map is not the one that was signed")
        elif record.authority is not None:
            covering = parse_signed(record.authority, file=row.id)
            clean = covering.state is RecordState.CLEAN and covering.size == row.size
            if clean and map_hash(whole, len(entries)) != covering.map_hash:
                raise Broken(f"{row.id}: its map is not the one of its authority")
        for chunk, layer in enumerate(entries):
            if layer == HOLE:
                continue
            if layer not in table.numbers():
                raise Broken(f"I1: {row.id} names layer {layer} for chunk {chunk}, which the table has not")
            path = self._segment(row.lineage, layer, table.uuid_of(layer))
            if not path.exists() or not _data_at(path, chunk):
                raise Broken(f"I1: {row.id} names layer {layer} for chunk {chunk}, which has no data there")
        if isinstance(row, Volume):
            dirfd = os.open(self.state.lineage(row.lineage), os.O_RDONLY)
            try:
                for fd in open_layer(REAL, dirfd, row.head, table.uuid_of(row.head), row.size, writable=False):
                    os.close(fd)
            finally:
                os.close(dirfd)

    def _check_leaves(self, lineage: LineageId, rows: list[Volume | Snapshot]) -> None:
        """A layer with a slot has its leaf file, which agrees with what is named; roots are over such layers."""
        table = read_layer_table(REAL, self.state.table(lineage))
        dirfd = os.open(self.state.lineage(lineage), os.O_RDONLY)
        try:
            slots = read_slots(REAL, dirfd, lineage, {number: table.uuid_of(number) for number in table.numbers()})
            checked: set[tuple[int, int]] = set()
            for row in rows:
                entries = self._entries(row)
                self._check_root(row, entries, slots)
                for chunk, layer in enumerate(entries):
                    if layer in slots and (layer, chunk) not in checked:
                        checked.add((layer, chunk))
                        self._check_leaf(dirfd, lineage, layer, chunk, slots[layer])
        except StoreDamaged as exc:
            raise Broken(f"the leaves of {lineage}: {exc}") from exc
        finally:
            os.close(dirfd)

    def _check_leaf(self, dirfd: int, lineage: LineageId, layer: int, chunk: int, slot: LeafSlot) -> None:
        leaves = LeafFile.open(REAL, dirfd, lineage, layer, slot.uuid, slot.digest)
        try:
            leaf = leaves.digest_of(chunk)
        finally:
            leaves.close()
        with self._segment(lineage, layer, slot.uuid).open("rb") as file:
            ciphertext = os.pread(file.fileno(), CHUNK, chunk * CHUNK)
        if leaf is not None and leaf != leaf_digest(slot.uuid, chunk, ciphertext):
            raise Broken(f"the leaf of chunk {chunk} of layer {layer} is of something else")

    def _check_root(self, row: Volume | Snapshot, entries: memoryview, slots: dict[int, LeafSlot]) -> None:
        body = read_record(REAL, self.state.record(row.id)).body()
        if body.leaf_root == NO_HASH:
            return
        layers = covered_layers(body, entries)
        missing = layers - slots.keys()
        if missing:
            raise Broken(f"{row.id}: its root is over layer {min(missing)}, which has no slot")
        if leaf_root(slots[layer] for layer in layers) != body.leaf_root:
            raise Broken(f"{row.id}: its root is not that of its layers")

    def _segment(self, lineage: str, layer: int, layer_uuid: bytes) -> Path:
        return self.state.layers / lineage / segment_name(layer, layer_uuid, 0)

    def _ciphertext(self, row: Snapshot) -> Iterator[tuple[tuple[str, int, int], bytes]]:
        table = read_layer_table(REAL, self.state.table(row.lineage))
        for chunk, layer in enumerate(self._entries(row)):
            if layer != HOLE:
                fd = os.open(self._segment(row.lineage, layer, table.uuid_of(layer)), os.O_RDONLY)
                try:
                    yield (row.lineage, layer, chunk), hashlib.sha256(os.pread(fd, CHUNK, chunk * CHUNK)).digest()
                finally:
                    os.close(fd)

    def _note_sealed(self, snapshot: str) -> None:
        self._sealed.update(self._ciphertext(self.row(snapshot)))

    def _check_sealed(self, snapshots: list[Snapshot]) -> None:
        for row in snapshots:
            for place, digest in self._ciphertext(row):
                if self._sealed.get(place, digest) != digest:
                    raise Broken(f"I2: {row.id}: layer {place[1]} changed at chunk {place[2]} after it was sealed")

    def _check_names(self, volumes: list[Volume], snapshots: list[Snapshot]) -> None:
        """I3: no file that no row names; layers of final rows are there. Temporary files only while one is attached."""
        lineages = self._transaction(lambda t: {name: t.layers(name) for name in t.lineages()})
        layers = {name: [(x.number, x.uuid) for x in rows] for name, rows in lineages.items()}
        # The map of what was deleted stays until a sweep has compared it.
        deleted = self._transaction(lambda t: [parse_resource_id(ident) for ident in t.removing()])
        resources = [*(v.id for v in volumes), *(s.id for s in snapshots), *deleted]
        orphans = find_orphans(REAL, self.state, lambda: Known(layers, resources))
        if orphans:
            raise Broken(f"I3: nobody names {', '.join(str(p.relative_to(self.base)) for p in orphans)}")
        for name, rows in lineages.items():
            for layer in rows:
                if layer.state is LayerState.CREATING:
                    raise Broken(f"I3: layer {layer.number} of {name} is still creating")
        # One that was cut while it was made is void, and stays until the next attachment or the deletion.
        # A sealed layer may have a row and no file until the next sweep: see ``check_swept``.
        live = {path.name for path in (self.base / "run" / "live").iterdir() if not path.name.startswith(".")}
        wanted = {str(v.id) for v in volumes}
        if live - wanted:
            raise Broken(f"live maps of nobody: {sorted(live - wanted)}")

    def leaks(self) -> list[tuple[str, int, int]]:
        """Return (lineage, layer, chunk) that holds data and that no map names, heads of volumes included.

        After a sweep with nothing attached only heads can have some: those of zeroing that was not reclaimed.
        """
        named: set[tuple[str, int, int]] = set()
        for row in (*self.volumes(), *self.snapshots()):
            named |= {(row.lineage, layer, chunk) for chunk, layer in enumerate(self._entries(row)) if layer}
        leaked = []
        for lineage in sorted(os.listdir(self.state.layers)):
            for layer in self._transaction(lambda t, name=lineage: t.layers(name)):
                path = self._segment(lineage, layer.number, layer.uuid)
                if path.exists():
                    for chunk in range(path.stat().st_size // CHUNK):
                        if (lineage, layer.number, chunk) not in named and _data_at(path, chunk):
                            leaked.append((lineage, layer.number, chunk))
        return leaked

    def check_swept(self) -> None:
        """Raise Broken unless a sweep left nothing to give back; for a store where nothing is attached."""
        removing = self._transaction(lambda t: t.removing())
        if removing:
            raise Broken(f"deleted, and not given back: {removing}")
        leaks = self.sealed_leaks()
        if leaks:
            raise Broken(f"{len(leaks)} chunks that no map names are left, the first is {leaks[0]}")
        for lineage in self._transaction(lambda t: t.lineages()):
            heads = {v.head for v in self.volumes() if v.lineage == lineage}
            for layer in self._transaction(lambda t, name=lineage: t.layers(name)):
                if layer.number not in heads and layer.preallocated:
                    raise Broken(f"layer {layer.number} of {lineage} keeps blocks that nobody uses")
                if layer.number not in heads and not self._segment(lineage, layer.number, layer.uuid).exists():
                    raise Broken(f"I3: layer {layer.number} of {lineage} has a row and no file")

    def check_empty(self) -> None:
        """Raise Broken unless nothing is left of a store whose volumes and snapshots were all deleted."""
        left = [p for name in ("layers", "maps", "records") for p in (self.base / "state" / name).rglob("*")]
        left += [p for name in ("live", "volumes", "control") for p in (self.base / "run" / name).iterdir()]
        if left:
            raise Broken(f"left of nobody: {', '.join(str(p.relative_to(self.base)) for p in left)}")
        rows = self._transaction(lambda t: [*t.lineages(), *t.removing()])
        if rows:
            raise Broken(f"rows of nobody: {rows}")
        if self.broker.anchors or self.broker.grants:
            raise Broken(f"anchors {[*self.broker.anchors]}, grants {[*self.broker.grants]} of nobody")

    def sealed_leaks(self) -> list[tuple[str, int, int]]:
        """Return those of ``leaks`` that a sweep must have given back: not in the head of a volume."""
        heads = {(v.lineage, v.head) for v in self.volumes()}
        return [leak for leak in self.leaks() if leak[:2] not in heads]


@functools.cache
def _remove_stale(directory: Path) -> None:
    """Remove what test runs left that were killed: a directory has the process in its name."""
    for path in directory.glob("ebsd-world-*-*"):
        pid = path.name.split("-")[2]
        if pid.isdigit() and not Path("/proc", pid).exists():
            shutil.rmtree(path, ignore_errors=True)


def _leaf(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the death in a group, or its first error."""
    found: BaseException | None = None
    todo: list[BaseException] = [group]
    while todo:
        error = todo.pop(0)
        if isinstance(error, BaseExceptionGroup):
            todo += error.exceptions
        elif isinstance(error, Died):
            return error
        elif found is None or isinstance(found, trio.Cancelled):
            found = error
    assert found is not None
    return found


def _data_at(path: Path, chunk: int) -> bool:
    """Say whether a file has data in a chunk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        if os.fstat(fd).st_size < (chunk + 1) * CHUNK:
            return False
        return os.lseek(fd, chunk * CHUNK, os.SEEK_DATA) < (chunk + 1) * CHUNK
    except OSError:
        return False
    finally:
        os.close(fd)


__all__ = ["Broken", "Cipher", "CrashKind", "World"]


def _close_parked() -> None:
    """Free what ``World._close_leaked`` parked, when it has become much: after a collection nobody else closes it."""
    parked = _parked()
    if len(parked) > MOST_PARKED:
        gc.collect()
        for fd in _parked():
            os.close(fd)


def _parked() -> list[int]:
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}").startswith(f"/memfd:{_PARKED} "):
                found.append(int(name))
    return found
