"""One machine: ebsd and a volume process, both of the product's own code, over files in memory; and what it promised.

The product's: engine, maps, salvage, sweep, the seal of the volume process, snapshots, lineages, growth and the files
of all those. This module's own: the catalog (in memory), the channel between the processes, the attachment, and the
replacement of a volume process that died, by salvage or by adoption of its live map.
"""

from __future__ import annotations

import base64
import errno
import os
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

from schedule_catalog import Catalogue, FakeBroker, FakeHost, empty_catalog
from schedule_dice import Dice, Died, Lock, Process, Task, TimedOut, fake_trio
from schedule_disk import LAYER_BLOCK, DiskPath, File, Files, ProcessDisk
from schedule_oracle import CELL, ZEROS, Broken, Oracle
from schedule_product import SILENT, Os, Product

from ebsd.control.volume_link import Drained, Sealed
from ebsd.domain.errors import DaemonUnreachable, EbsdError, IncorrectState, RemoteError
from ebsd.domain.ids import LineageId, SnapshotId, VolumeId, parse_uuid
from ebsd.domain.model import Attachment, Caller, Cipher, ExposedAs, Integrity, LayerState, Lineage, Snapshot, Volume
from ebsd.domain.states import AttachmentState, SnapshotState, VolumeState
from ebsd.domain.units import CHUNK, SECTOR
from ebsd.store.catalog import Transaction

LINEAGE = LineageId("6ba7b810-9dad-41d1-80b4-00c04fd430c8")
VOLUME = VolumeId("vol-0123456789abcdef0")
ACCOUNT = "000000001000"
CALLER = Caller(1000, "alice", ACCOUNT, is_admin=False)  # type: ignore[arg-type]
CELLS = CHUNK // CELL
FRONT = 3
"""Chunks at the front that are used, and TAIL the first one at the end: entries in different blocks of the map."""
TAIL = 1022
SIZES = (1022 * CHUNK + 5 * SECTOR, 1023 * CHUNK + 3 * SECTOR, 1025 * CHUNK + SECTOR)
"""Of the volume as it grows: in the last chunk, and by a map page."""
USED = frozenset([*range(FRONT), *range(TAIL, -(-SIZES[-1] // CHUNK))])
assert LAYER_BLOCK == CELL


@lru_cache(maxsize=65536)
def _pads(layer: int, first_cell: int, count: int) -> int:
    return int.from_bytes(bytes((layer * 53 + (first_cell + at) * 7) % 251 + 1 for at in range(count)), "little")


class CheapCodec:
    """Changes the first byte of each cell by layer and place: a wrong one, or a hole, never gives a value again."""

    def __init__(self, layer: int) -> None:
        self._layer = layer

    def encrypt_into(self, src: bytes | bytearray | memoryview, dst: memoryview, first_sector: int) -> None:
        if src is not dst:
            dst[:] = src
        count = len(dst) // CELL
        front = int.from_bytes(bytes(dst[::CELL]), "little") ^ _pads(self._layer, first_sector * 2, count)
        dst[::CELL] = front.to_bytes(count, "little")

    decrypt_into = encrypt_into


def _unreachable() -> DaemonUnreachable:
    return DaemonUnreachable(socket="control", reason="the process is dead")


class Codecs:
    def __init__(self, table: Any) -> None:
        self.table = table

    def for_layer(self, number: int) -> CheapCodec:
        self.table.uuid_of(number)
        return CheapCodec(number)


def _release(t: Transaction) -> None:
    t.set_volume_state(VOLUME, VolumeState.AVAILABLE)
    t.remove_attachment(VOLUME)


def _attached(attachment: Attachment) -> Callable[[Transaction], None]:
    def note(t: Transaction) -> None:
        t.set_volume_state(VOLUME, VolumeState.IN_USE)
        t.put_attachment(attachment)

    return note


class Worker:
    """A volume process: the product's ``VolumeProcess`` with an engine, started on files of the machine."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.process = Process("worker")
        self.disk = ProcessDisk(world.files, self.process, world.before(self.process))
        self.vp = world.product.process.VolumeProcess()
        self.vp._disk = self.disk
        self.calls: list[object] = []
        """Of its channels, in the order they came: one is handled at a time, those of an ebsd that died included."""
        self.record = b""
        """The signed record that ebsd writes before anything is served."""

    @property
    def engine(self) -> Any:
        return self.vp._engine

    async def start(self, volume: Volume, adopt: bool) -> bool:
        """Open everything; False when there is no live map to adopt."""
        return await self.world.dice.blocking(self._open, volume, adopt)

    def _open(self, volume: Volume, adopt: bool) -> bool:
        world, product, disk, vp = self.world, self.world.product, self.disk, self.vp
        attachment = volume.attachment
        assert attachment is not None
        vp._lineage_fd = disk.open(world.state.lineage(LINEAGE), os.O_RDONLY)
        vp._table = table = product.layertable.read_durable_table(disk, world.state.table(LINEAGE))
        vp._durable = product.durablemap.DurableMap.open(disk, world.state.map(VOLUME))
        vp._live_path = world.live.live_map(VOLUME)
        identity = product.livemap.LiveIdentity(parse_uuid(attachment.boot_id), VOLUME, LINEAGE, attachment.generation)
        if adopt:
            vp._live = product.livemap.LiveMap.open(disk, vp._live_path, identity)
            if vp._live is None or vp._live.failed or vp._live.chunks != vp._durable.header.chunks:
                return False
        else:
            vp._live = product.livemap.LiveMap.create(disk, vp._live_path, identity, vp._durable, head=attachment.head)
        vp._head_fds = list(
            product.layers.open_layer(
                disk, vp._lineage_fd, attachment.head, table.uuid_of(attachment.head), volume.size, writable=True
            )
        )
        vp._codecs = Codecs(table)
        vp._volume = VOLUME
        vp._claim = product.verify.Claim(
            VOLUME, ACCOUNT, LINEAGE, volume.size, attachment.head, Cipher.NONE, None, frozenset()
        )
        body = product.record.read_record(disk, world.state.record(VOLUME)).body()
        signed = product.signedrecord
        vp._body = product.verify.next_body(body, vp._claim, table, signed.RecordState.OPEN, signed.NO_HASH)
        self.record = product.verify.sign(vp._body, None)
        vp._engine = product.engine.BlockEngine(
            disk=disk,
            scheduler=world.dice,
            size=volume.size,
            head=product.engine.Head(attachment.head, vp._head_fds),
            lineage_dirfd=vp._lineage_fd,
            table=table,
            live=vp._live,
            durable=vp._durable,
            codecs=vp._codecs,
        )
        vp._drainer = product.draining.Drainer(vp._engine, world.dice)
        return True


class Link:
    """The channel to a volume process, with the methods of ``VolumeLink``; what it began goes on when ebsd dies."""

    def __init__(self, world: World, worker: Worker) -> None:
        self.world = world
        self.worker = worker
        self.stopping = False
        self.child = self

    async def wait(self) -> None:
        """As ``Child.wait``: a process that is not dead makes its caller's time limit pass."""
        await self.world.dice.point("child")
        if not self.worker.process.dead:
            raise TimedOut

    async def call(self, name: str, work: Callable[[], Awaitable[Any]]) -> Any:
        process, dice = self.worker.process, self.world.dice
        await dice.point("channel")
        if process.dead:
            raise _unreachable()

        queue, mine = self.worker.calls, object()
        queue.append(mine)

        async def answer() -> Any:
            await dice.until("call", lambda: queue[0] is mine)
            try:
                return await work()
            finally:
                queue.remove(mine)

        task: Task = dice.spawn(f"worker {name}", process, answer())
        await dice.until("answer", lambda: task.done or process.dead)
        if process.dead:
            raise _unreachable()
        if isinstance(task.error, EbsdError):
            raise RemoteError(task.error.code, task.error.message)
        if task.error is not None:
            if not isinstance(task.error, OSError):
                raise task.error
            raise RemoteError("InternalFailure", str(task.error))
        return task.result

    def _passed(self, fds: Any) -> list[int]:
        return [self.world.files.dup(fd, self.worker.process) for fd in fds]

    async def prepare_seal(self, head: int, segments: Any) -> tuple[int, bytes]:
        vp, fds = self.worker.vp, self._passed(segments)
        answer, _ = await self.call("prepare", lambda: vp._prepare_seal({"Head": head}, fds))
        return answer["Generation"], base64.b64decode(answer["Record"])

    async def seal(self, snapshot: str, account: str, output: int) -> Sealed:
        self.world.sealing = SnapshotId(snapshot)
        vp, fds = self.worker.vp, self._passed([output])
        answer, _ = await self.call("seal", lambda: vp._seal({"SnapshotId": snapshot, "Account": account}, fds))
        return Sealed(base64.b64decode(answer["Record"]), 0, frozenset(answer["Left"]))

    async def sealed_again(self, snapshot: str) -> Sealed:
        vp = self.worker.vp
        answer, _ = await self.call("sealed", lambda: vp._sealed({"SnapshotId": snapshot}, []))
        return Sealed(base64.b64decode(answer["Record"]), 0, frozenset(answer["Left"]))

    async def status(self) -> dict[str, Any]:
        engine = self.worker.engine

        async def look() -> dict[str, Any]:
            return {"Head": engine.head, "Size": engine.size}

        return await self.call("status", look)  # type: ignore[no-any-return]

    async def grow(self, size: int, head: int, segments: Any) -> None:
        vp, fds = self.worker.vp, self._passed(segments)
        await self.call("grow", lambda: vp._grow({"Size": size, "Head": head}, fds))

    async def drain(self, layers: Any) -> None:
        vp = self.worker.vp
        await self.call("drain", lambda: vp._drain({"Layers": list(layers)}, []))

    async def drained(self, taken: Any = ()) -> Drained:
        vp = self.worker.vp
        answer, _ = await self.call("drained", lambda: vp._drained({"Taken": sorted(taken)}, []))
        return Drained(answer["Pending"], answer["Moved"], frozenset(answer["Left"]))

    async def flush(self) -> None:
        vp = self.worker.vp
        await self.call("flush", lambda: vp._flush({}, []))


class Ebsd:
    """One life of the control daemon."""

    def __init__(self, world: World, links: dict[VolumeId, Link]) -> None:
        product, dice = world.product, world.dice
        self.process = Process("ebsd")
        self.dice = dice
        self.links = links
        self.ready = dice.event()
        self.catalogue = Catalogue(dice, world.catalog)
        self.disk = ProcessDisk(world.files, self.process, world.before(self.process))
        host = FakeHost(dice, world.boot_id)
        host.space = SimpleNamespace(require=world._nothing)  # type: ignore[attr-defined]
        host.drain = True  # type: ignore[attr-defined]
        host.runtime = SimpleNamespace(block_file=lambda _: None)  # type: ignore[attr-defined]
        volume_lock = Lock(dice)
        self.volumes = SimpleNamespace(lock=lambda _: volume_lock)
        self.volume_files = product.volume_files.VolumeFiles(
            self.disk, world.state, world.live, SimpleNamespace(relieved=lambda write: write())
        )
        self.lineages = product.lineages.Lineages(
            self.catalogue, product.lineage_files.LineageFiles(self.disk, world.state), links
        )
        self.drains = product.drains.Drains(host, self.catalogue, self.lineages, links, None)
        self.snapshot_files = product.snapshot_files.SnapshotFiles(self.disk, world.state, self.volume_files)
        take = self.snapshot_files.take_detached

        def take_detached(volume: Volume, snapshot: Snapshot) -> Any:
            world.fix_snapshot(snapshot.id, world.durable_entries())
            return take(volume, snapshot)

        self.snapshot_files.take_detached = take_detached
        self.snapshots = product.snapshots.Snapshots(
            host, self.catalogue, FakeBroker(dice), self.volumes, self.volume_files, self.snapshot_files,
            self.lineages, links, SimpleNamespace(follow=lambda _: None), None,
            SimpleNamespace(start_soon=self._start_soon),
        )  # fmt: skip
        self.growth = product.growth.Growth(
            host, self.catalogue, self.volume_files, self.volumes, self.lineages, self.snapshots, links
        )

    def _start_soon(self, work: Callable[..., Any], *args: Any) -> None:
        self.dice.spawn("later", self.process, work(*args))


class World:
    """The machine and its promises."""

    def __init__(self, product: Product, seed: int) -> None:
        self.product = product
        self.dice = Dice(seed)
        self.files = Files()
        DiskPath.files = self.files
        for directory in ("/state", "/state/layers", f"/state/layers/{LINEAGE}", "/state/maps", "/state/records"):
            self.files.directories.add(directory)
        layout = product.volume_files
        self.state = layout.StateLayout(DiskPath("/state"))
        self.live = layout.LiveLayout(DiskPath("/live"))
        self.catalog = empty_catalog()
        self.boot_id = "6ba7b811-9dad-41d1-80b4-00c04fd430c8"
        self.observer = ProcessDisk(self.files, self, lambda *_: None)
        self.oracle = Oracle([c for chunk in sorted(USED) for c in range(chunk * CELLS, (chunk + 1) * CELLS)])
        self.sealing: SnapshotId | None = None
        self.fixed: dict[SnapshotId, dict[int, bytes]] = {}
        """Snapshot -> its content at the moment of its seal; whether it came to be is the catalog's to say."""
        self.fixed_entries: dict[SnapshotId, list[int]] = {}
        self.promised: set[SnapshotId] = set()
        self.off = False
        self.failed = False
        """A sync failed: the engine must refuse everything from then on."""
        self.fail_sync = self.fail_pwrite = False
        self.injected = False
        self.full = self.was_full = False
        """The disk has no free block."""
        self.stale_head = False
        """Switches a rule of this module off: a volume process is started on the newest head."""
        self.worker: Worker | None = None
        self.starting: Worker | None = None
        product.use(
            {
                "trio": fake_trio(self.dice),
                "log": SILENT,
                "RealDisk": lambda: None,
                "close_all": lambda fds: [self.files.close(fd) for fd in fds],
                "host_helper": SimpleNamespace(show_size=self._nothing),
                "DIRECTORY": "",
            },
            Os(self._close, lambda fd: self.files.dup(fd, self.files.fds[fd].owner)),
        )
        self.ebsd = Ebsd(self, {})
        self._create()
        self.dice.hooks["seal.claimed"] = self._fix_snapshot

    async def _nothing(self, *_: object) -> None:
        """The kernel and the loop device have no part in this."""

    def _close(self, fd: int) -> None:
        if fd in self.files.fds:
            self.files.close(fd)

    def _create(self) -> None:
        uuid = bytes([1]) * 16
        volume = Volume(
            id=VOLUME, account=ACCOUNT, owner="alice", name=VOLUME, size=SIZES[0],  # type: ignore[arg-type]
            state=VolumeState.AVAILABLE, cipher=Cipher.NONE, key_arn=None, wrapped_key=None, context={},
            lineage=LINEAGE, head=1, snapshot=None, attach_generation=0, integrity=Integrity.NEW, authority=None,
            created="2030-01-01T00:00:00Z", reason="",
        )  # fmt: skip

        def create(t: Transaction) -> None:
            t.add_lineage(Lineage(LINEAGE, volume.account, SECTOR, Cipher.NONE))
            layer = t.add_layer(LINEAGE, uuid, VOLUME, SIZES[0])
            t.set_layer_state(LINEAGE, layer.number, LayerState.HEAD)
            t.add_volume(volume)

        self.catalog.run(create)
        self.ebsd.volume_files.create(volume, uuid, None, None)
        for changes in list(self.files.pending):
            self.files.sync_directory(changes)

    # --- every disk call of the product

    def before(self, process: Process) -> Callable[[str, str, int, int], None]:
        def before(name: str, path: str, offset: int, length: int) -> None:
            if process.dead:
                raise Died
            if process.die_in is not None:
                process.die_in -= 1
                if process.die_in < 0:
                    self.kill(process)
                    raise Died
            task = self.dice.current
            if task is not None and task.threads:
                self.dice.preempt()
                if process.dead:
                    raise Died
            if name in ("pwrite", "punch", "unlink"):
                self._check_change(process, name, path, offset, length)
            if name == "pwrite" and self.full and not path.startswith("/live"):
                self._need_blocks(path, offset, length)
            if process.name == "worker":
                self._fail(name, path)

        return before

    def _fail(self, name: str, path: str) -> None:
        if name == "fdatasync" and self.fail_sync and self.files.names[path].versions:
            self.fail_sync, self.failed = False, True
            self.files.names[path].fail_sync(self.dice.random)
            raise OSError(errno.EIO, "the disk failed")
        if name == "pwrite" and self.fail_pwrite and path.startswith("/state/layers/"):
            self.fail_pwrite, self.injected = False, True
            raise OSError(errno.EIO, "the disk failed")

    def _need_blocks(self, path: str, offset: int, length: int) -> None:
        file = self.files.names[path]
        if any(b not in file.blocks for b in range(offset // file.unit, -(-(offset + length) // file.unit))):
            raise OSError(errno.ENOSPC, "no space")

    @property
    def healthy(self) -> bool:
        """Nothing happened that a request may be refused for."""
        return not (self.failed or self.injected or self.was_full)

    def _layer_of(self, path: str) -> int | None:
        parsed = self.product.layers.parse_segment_name(path.rpartition("/")[2])
        return None if parsed is None else int(parsed[0])

    def _check_change(self, process: Process, name: str, path: str, offset: int, length: int) -> None:
        """I2: only the head is written, and what is taken away is named by no map, on the disk or off it."""
        layer = self._layer_of(path)
        if layer is None:
            return
        if name == "pwrite":
            engine = self.worker.engine if self.worker is not None else None
            if process.name != "worker" or engine is None or layer < engine.head:
                raise Broken(f"I2: {process.name} writes to the sealed layer {layer}")
            return
        for chunk in sorted(USED):
            if name == "punch" and not offset <= chunk * CHUNK < offset + length:
                continue
            if user := self._named_by(layer, chunk):
                raise Broken(f"I2: {name} of layer {layer} chunk {chunk}, which {user} names")

    def _named_by(self, layer: int, chunk: int) -> str | None:
        rows = self.snapshot_rows()
        for ident, entries in self.fixed_entries.items():
            if ident in rows and chunk < len(entries) and entries[chunk] == layer:
                return f"{ident}"
        live = self.files.names.get(f"/live/{VOLUME}")
        if live is not None and live.memory is not None and self.worker is not None and self.worker.engine is not None:
            engine = self.worker.engine
            if not self.worker.process.dead and chunk < engine._live.chunks and engine._entries[chunk] == layer:
                return "the live map"
        block, at = divmod(4096 + chunk * 4, 512)
        for content in self.files.names[f"/state/maps/{VOLUME}"].on_disk(block):
            if content is not None and int.from_bytes(content[at : at + 4], "little") == layer:
                return "the durable map"
        return None

    # --- content

    def content_of(self, entries: Any, when: str) -> dict[int, bytes]:
        """Return what a map shows: cell -> plaintext."""
        content: dict[int, bytes] = {}
        files: dict[int, File] = {}
        for path, file in self.files.names.items():
            layer = self._layer_of(path)
            if layer is not None:
                files[layer] = file
        for chunk in USED:
            layer = entries[chunk] if chunk < len(entries) else 0
            cells = range(chunk * CELLS, (chunk + 1) * CELLS)
            if layer == 0:
                for cell in cells:
                    content[cell] = ZEROS
                continue
            if layer not in files:
                raise Broken(f"{when}: chunk {chunk} names layer {layer}, which is gone")
            blocks = files[layer].blocks
            pads = _pads(layer, cells[0], CELLS).to_bytes(CELLS, "little")
            for cell, pad in zip(cells, pads, strict=True):
                raw = blocks.get(cell, ZEROS)
                content[cell] = bytes((raw[0] ^ pad,)) + raw[1:]
        return content

    def _fix_snapshot(self) -> None:
        """The engine holds everybody back: this is the moment of the snapshot."""
        if self.sealing is None or self.worker is None:
            return
        self.fix_snapshot(self.sealing, list(self.worker.engine._entries))

    def fix_snapshot(self, ident: SnapshotId, entries: list[int]) -> None:
        """This map at this moment is what the snapshot must show for ever."""
        content = self.content_of(entries, "seal")
        for cell, got in content.items():
            self.oracle.check_live("the moment of a snapshot", cell, got)
        self.fixed[ident] = content
        self.fixed_entries[ident] = entries

    def check_snapshots(self, when: str) -> None:
        rows = self.snapshot_rows()
        for ident in self.promised:
            row = rows.get(ident)
            if row is None or row.state is not SnapshotState.COMPLETED:
                raise Broken(f"{when}: {ident} was answered and is not there")
        for ident, row in rows.items():
            if row.state is not SnapshotState.COMPLETED:
                continue
            try:
                sealed = self.product.sealedmap.read_sealed_map(self.observer, self.state.map(ident), ident)
            except (EbsdError, OSError) as error:
                raise Broken(f"{when}: the map of {ident}: {error}") from error
            content = self.content_of(sealed.entries, when)
            fixed = self.fixed.get(ident)
            if fixed is None:
                raise Broken(f"{when}: {ident} is there and was never sealed")
            if content != fixed:
                cell = next(c for c in content if content[c] != fixed[c])
                raise Broken(f"{when}: {ident} changed in cell {cell}")

    def durable_entries(self) -> list[int]:
        try:
            durable = self.product.durablemap.DurableMap.open(self.observer, self.state.map(VOLUME))
        except EbsdError as error:
            raise Broken(f"the durable map: {error}") from error
        entries: list[int] = durable.entries().tolist()
        durable.close()
        return entries

    def _check_record(self, entries: list[int]) -> None:
        """No entry is on the disk under a record that does not know its layer: the next attachment would refuse it."""
        try:
            body = self.product.record.read_record(self.observer, self.state.record(VOLUME)).body()
        except (EbsdError, OSError) as error:
            raise Broken(f"the record of the volume: {error}") from error
        if max(entries) > body.table_count:
            raise Broken(f"the map names layer {max(entries)}, the record knows {body.table_count}")

    # --- accidents

    def kill(self, process: Process) -> None:
        """SIGKILL: its tasks, descriptors and locks are gone, files stay."""
        self.dice.kill(process)
        self.files.close_all_of(process)
        if process.name == "ebsd" and not self.off:
            if self.starting is not None:  # nobody has seen its volume: it ends with the one who started it
                self.kill(self.starting.process)
            self.ebsd = Ebsd(self, dict(self.ebsd.links))
            self.dice.spawn("ebsd startup", self.ebsd.process, self.startup())

    def cut_power(self) -> None:
        """Everything stops; ``after_cut`` looks at what is left once all code has been unwound."""
        self.off = True
        for worker in (self.worker, self.starting):
            if worker is not None:
                self.dice.kill(worker.process)
        self.dice.kill(self.ebsd.process)

    def _drop_all(self) -> None:
        for task in self.dice.tasks:
            task.process.dead = True
            if not task.done:
                self.dice.drop(task)
        self.dice.tasks.clear()

    def end(self) -> None:
        """Let nothing be left for the garbage collector to end."""
        self.cut_power()
        self._drop_all()

    def after_cut(self) -> None:
        self._drop_all()
        self.files.cut_power(self.dice.random)
        for path in [path for path in self.files.names if path.startswith("/live/")]:
            del self.files.names[path]
        self.off = self.failed = self.fail_sync = self.fail_pwrite = self.injected = False
        self.full = self.was_full = False
        self.worker = self.starting = None
        entries = self.durable_entries()
        self.oracle.check_zero_elsewhere("power cut", entries, USED)
        self.oracle.settle("power cut", self.content_of(entries, "power cut"))
        self.check_snapshots("power cut")
        self._check_record(entries)
        self.boot_id = self.boot_id[:-4] + self.dice.random.randbytes(2).hex()
        self.catalog.run(_release)
        self.ebsd = Ebsd(self, {})
        self.dice.spawn("ebsd startup", self.ebsd.process, self.startup())

    # --- what ebsd does with an attachment

    async def startup(self) -> None:
        """As the daemon: adopt, finish or undo snapshots, tidy; then requests."""
        ebsd = self.ebsd
        if self.worker is None or self.worker.process.dead:
            ebsd.links.clear()
        await ebsd.snapshots.recover()
        await ebsd.lineages.tidy()
        pending = any(row.state is SnapshotState.PENDING for row in self.snapshot_rows().values())
        if pending and self.healthy and (self.worker is None or not self.worker.process.dead):
            raise Broken("a snapshot stays pending over a start of ebsd")
        ebsd.ready.set()

    def volume(self) -> Volume:
        return self.catalog.run(lambda t: t.volume(VOLUME))

    def snapshot_rows(self) -> dict[SnapshotId, Snapshot]:
        return {row.id: row for row in self.catalog.run(lambda t: t.snapshots())}

    async def attach(self, adopt: bool) -> None:
        """Replace the volume process that died, or start the first one of this boot."""
        ebsd, old = self.ebsd, self.worker
        await ebsd.ready.wait()
        if old is not None and not old.process.dead:
            return
        knows = old is not None and old.engine is not None and old.engine.failed
        if (self.failed or self.injected) and not knows:
            return  # killed before its engine met the error: whether it will be reported again is the kernel's
        ebsd.links.pop(VOLUME, None)
        if self.volume().attachment is not None:
            await ebsd.catalogue.run(lambda t: t.set_volume_state(VOLUME, VolumeState.ERROR, "it died"))
        async with ebsd.volumes.lock(VOLUME):
            volume = self.volume()
            attachment = volume.attachment
            if attachment is not None:
                newest = attachment.head if self.stale_head else volume.head
                if adopt and await self._start(replace(attachment, head=newest), adopt=True):
                    if knows:
                        raise Broken("a live map whose engine failed is served")
                    return
                outcome = (await self.dice.blocking(
                    ebsd.volume_files.salvage, volume, self.boot_id, attachment.generation
                )).outcome  # fmt: skip
                if outcome is self.product.salvage.SalvageOutcome.FAILED:
                    if not knows:
                        raise Broken("a live map says failed, and nothing had failed")
                    return
                if knows:
                    raise Broken("a live map whose engine failed was applied")
                await ebsd.catalogue.run(_release)
                if self.dice.random.random() < 0.3:
                    return  # detached for a while
            generation = await ebsd.catalogue.run(lambda t: t.next_attach_generation(VOLUME))
            fresh = Attachment(
                VOLUME, AttachmentState.ATTACHED, self.boot_id, generation, ExposedAs.FILE, False, "", None, None,
                volume.head, None, "2030-01-01T00:00:00Z",
            )  # fmt: skip
            await ebsd.catalogue.run(_attached(fresh))
            await self._start(fresh, adopt=False)

    async def _start(self, attachment: Attachment, *, adopt: bool) -> bool:
        ebsd = self.ebsd
        worker = self.starting = Worker(self)
        link = Link(self, worker)
        volume = replace(self.volume(), attachment=attachment)
        try:
            started = await link.call("start", lambda: worker.start(volume, adopt))
        except DaemonUnreachable:
            self.starting = None
            return False
        except RemoteError as error:
            self.starting = None
            if not self.healthy:
                self.kill(worker.process)
                return False
            raise Broken(f"an attachment is refused: {error}") from error
        if not started:
            self.kill(worker.process)
            self.starting = None
            return False
        try:
            await self.dice.blocking(ebsd.volume_files.write_signed_record, VOLUME, worker.record)
        except (EbsdError, OSError):
            self.kill(worker.process)  # as the daemon undoes an attachment
            self.starting = None
            raise
        if worker.process.dead:
            self.starting = None
            return False
        await ebsd.catalogue.run(_attached(attachment))
        ebsd.links[VOLUME] = link
        self.worker, self.starting = worker, None
        return True


__all__ = ["CALLER", "CELLS", "FRONT", "SIZES", "TAIL", "USED", "VOLUME", "IncorrectState", "Link", "World"]
