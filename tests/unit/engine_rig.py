"""A volume in a temporary directory, a cipher that notices mistakes, and a disk that forgets, fails and dies.

A module that imports ``engine_kind`` runs over both engines. The native one then serves whatever it can without Python,
as it would for a transport; its disk and its cipher are those of the rig all the same.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from unittest.mock import patch

import cffi
import pytest
from dice_scheduler import DiceScheduler

from ebsd.domain.geometry import chunk_count
from ebsd.domain.ids import LineageId, VolumeId
from ebsd.domain.model import Cipher
from ebsd.domain.units import CHUNK, SECTOR
from ebsd.store.disk import RealDisk
from ebsd.store.durablemap import DurableMap, MapHeader, grow_durable_map
from ebsd.store.entries import HOLE, check_map_structure
from ebsd.store.layers import create_layer, grow_layer, open_layer, parse_segment_name, segment_name
from ebsd.store.layertable import LayerEntry, LayerTable
from ebsd.store.livemap import LiveIdentity, LiveMap
from ebsd.store.salvage import Salvage, salvage
from ebsd.volume import native_engine
from ebsd.volume._core import ffi, lib
from ebsd.volume.engine import BlockEngine, Head, Leaves, SealedCopy
from ebsd.volume.native_engine import NativeEngine
from ebsd.volume.scheduling import DirectScheduler, Scheduler, run_sync
from ebsd.volume.spacegate import Gate

LINEAGE = LineageId("6ba7b810-9dad-41d1-80b4-00c04fd430c8")
VOLUME = VolumeId("vol-0123456789abcdef0")
SHM = Path("/dev/shm")
BLOCK = 512
"""What a disk writes whole: the unit in which a power cut mixes old and new."""


@lru_cache(maxsize=4096)
def _pad(layer: int, sector: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{layer}/{sector}".encode()).digest() * (SECTOR // 32), "little")


@dataclass(frozen=True)
class _ToyKey:
    address: int
    """No address: the layer, which ``_toy_run`` is given."""


_toys: dict[int, ToyCodec] = {}
_lanes: list[object] = []
"""That of the one thread; kept for ever, as no engine is known to be the last."""

_c = cffi.FFI()


@_c.callback("int(uintptr_t, int, unsigned char *, unsigned char *, size_t, size_t, unsigned char *)", error=6)
def _toy_run(layer: int, encrypt: int, src, dst, length: int, unit: int, tweak) -> int:
    """What stands for ``ebsd_xts_run``."""
    assert unit == SECTOR
    source = bytes(_c.buffer(src, length))
    _toys[layer]._run(source, memoryview(_c.buffer(dst, length)), int.from_bytes(_c.buffer(tweak, 16), "little"))
    return 0


class HotEngine(NativeEngine):
    """The native engine behind what a transport does: the hot path first, and what that hands back to Python."""

    uses_rig = True
    """Whether C calls the rig's disk and cipher instead of its own."""

    def _prepare(self) -> None:
        self.died: BaseException | None = None
        self.handed_back = 0
        if self.uses_rig:
            self._prepare_for_rig()
        else:
            super()._prepare()
        if not _lanes:
            _lanes.append(lib.ebsd_hot_lane_new(self.hot))
        self._lane = _lanes[0]
        assert self._lane != ffi.NULL

    def _prepare_for_rig(self) -> None:
        with patch.object(native_engine, "run_address", lambda: int(_c.cast("uintptr_t", _toy_run))):
            super()._prepare()
        disk = self._disk

        def call(method: Callable[[int, memoryview, int], int]):
            def called(fd: int, buffer, length: int, offset: int) -> int:
                try:
                    return method(fd, memoryview(_c.buffer(buffer, length)), offset)
                except OSError as error:
                    _c.errno = error.errno
                except BaseException as error:  # noqa: BLE001 - raised again behind the C code
                    self.died = error
                    _c.errno = errno.EIO
                return -1

            return _c.callback("ssize_t(int, void *, size_t, int64_t)", called)

        self.calls = call(disk.pread_into), call(lambda fd, buffer, offset: disk.pwrite(fd, bytes(buffer), offset))
        lib.ebsd_core_use_calls(self._core, *(int(_c.cast("uintptr_t", one)) for one in self.calls))

    def _is_hot(self, offset: int, length: int) -> bool:
        # A task that holds a claim goes on in this thread only, which must not wait for it.
        return length > 0 <= offset and offset + length <= self.size and not len(self._locks)

    def _answered(self, result: int) -> bool:
        if self.died is not None:
            died, self.died = self.died, None
            raise died
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        self.handed_back += result
        return result == 0

    async def read(self, offset: int, length: int) -> bytearray | memoryview:
        if self._is_hot(offset, length):
            out = bytearray(b"x" * length)
            memory = ffi.from_buffer("unsigned char[]", out, True)
            if self._answered(lib.ebsd_hot_read(self.hot, self._lane, offset, length, memory)):
                return out
        return await super().read(offset, length)

    async def write(self, offset: int, data: bytes | bytearray | memoryview) -> int:
        if self._is_hot(offset, len(data)):
            memory = ffi.from_buffer("unsigned char[]", data)
            if self._answered(lib.ebsd_hot_write(self.hot, self._lane, offset, len(data), memory)):
                return len(data)
        return await super().write(offset, data)


NATIVE = False
"""Which engine a rig starts."""


@pytest.fixture(params=["reference", "native"], autouse=True)
def engine_kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run every test of a module over both engines."""
    monkeypatch.setitem(globals(), "NATIVE", request.param == "native")
    return str(request.param)


class ToyCodec:
    """XOR with a pad of (layer, sector): a wrong layer, a wrong sector or a hole in the cipher gives garbage."""

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self.calls = 0
        _toys[layer] = self

    def native_key(self, segment: int) -> _ToyKey:
        return _ToyKey(self.layer)

    def _run(self, src: bytes | bytearray | memoryview, dst: memoryview, first_sector: int) -> None:
        self.calls += 1
        assert len(src) == len(dst) > 0
        assert len(src) % SECTOR == 0
        for at in range(0, len(src), SECTOR):
            value = int.from_bytes(src[at : at + SECTOR], "little") ^ _pad(self.layer, first_sector + at // SECTOR)
            dst[at : at + SECTOR] = value.to_bytes(SECTOR, "little")

    encrypt_into = _run
    decrypt_into = _run


class ToyCodecs:
    def __init__(self) -> None:
        self.made: dict[int, ToyCodec] = {}

    def for_layer(self, number: int) -> ToyCodec:
        return self.made.setdefault(number, ToyCodec(number))


class Died(BaseException):
    """The process was killed, or the power went, at this call."""


class FakeDisk(RealDisk):
    """A real disk that remembers what is not synced, and misbehaves on demand.

    ``die_at``: number of changing calls (pwrite, fdatasync, punch, unlink) until ``Died``. ``fail``: (call name,
    its number from now) -> errno. ``short``: dice for short counts and EINTR.
    """

    def __init__(self) -> None:
        super().__init__()
        self.old: dict[int, dict[int, list[bytes]]] = {}
        """Inode -> block -> its durable contents, then every later version."""
        self.fds: dict[int, int] = {}
        self.die_at: int | None = None
        self.fail: dict[tuple[str, int], int] = {}
        self.short: random.Random | None = None
        self.log: list[tuple[str, int, int, int]] = []
        self.calls: dict[str, int] = {}
        self.files: dict[int, Path] = {}
        self.guard: Callable[[Path], None] | None = None
        """Asked before every change of a file's data."""

    def reset(self) -> None:
        self.die_at = None
        self.fail.clear()
        self.log.clear()
        self.calls.clear()

    def _changing(self, name: str, fd: int = -1, offset: int = 0, length: int = 0) -> None:
        if self.die_at is not None:
            if self.die_at == 0:
                raise Died(name)
            self.die_at -= 1
        self._call(name, fd, offset, length)

    def _call(self, name: str, fd: int = -1, offset: int = 0, length: int = 0) -> None:
        number = self.calls.get(name, 0)
        self.calls[name] = number + 1
        self.log.append((name, fd, offset, length))
        code = self.fail.get((name, number))
        if code is not None:
            raise OSError(code, os.strerror(code))

    def _remember(self, fd: int, offset: int, length: int, change: Callable[[], int]) -> int:
        inode = os.fstat(fd).st_ino
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        if self.guard is not None:
            self.guard(path)
        self.files.setdefault(inode, path)
        blocks = range(offset // BLOCK, -(-(offset + length) // BLOCK))
        pending = self.old.setdefault(inode, {})
        for block in blocks:
            if block not in pending:
                pending[block] = [os.pread(fd, BLOCK, block * BLOCK)]
        result = change()
        for block in blocks:
            pending[block].append(os.pread(fd, BLOCK, block * BLOCK))
        return result

    def pread_into(self, fd: int, buffer: bytearray | memoryview, offset: int) -> int:
        self._call("pread", fd, offset, len(buffer))
        if self.short is not None and len(buffer) > 1:
            if self.short.random() < 0.2:
                raise InterruptedError(errno.EINTR, "interrupted")
            buffer = memoryview(buffer)[: self.short.randrange(1, len(buffer) + 1)]
        return super().pread_into(fd, buffer, offset)

    def pwrite(self, fd: int, data: bytes | bytearray | memoryview, offset: int) -> int:
        self._changing("pwrite", fd, offset, len(data))
        if self.short is not None and len(data) > BLOCK:
            if self.short.random() < 0.2:
                raise InterruptedError(errno.EINTR, "interrupted")
            # Whole blocks: a kill between the two halves of a block is a torn block, which no disk promises away.
            data = memoryview(data)[: self.short.randrange(BLOCK, len(data) + 1) // BLOCK * BLOCK]
        return self._remember(fd, offset, len(data), lambda: os.pwrite(fd, data, offset))

    def punch(self, fd: int, offset: int, length: int) -> None:
        self._changing("punch", fd, offset, length)

        def change() -> int:
            RealDisk.punch(self, fd, offset, length)
            return 0

        self._remember(fd, offset, length, change)

    def fdatasync(self, fd: int) -> None:
        self._changing("fdatasync", fd)
        self.old.pop(os.fstat(fd).st_ino, None)

    def fsync(self, fd: int) -> None:
        self._changing("fsync", fd)
        self.old.pop(os.fstat(fd).st_ino, None)

    def unlink(self, path: str | os.PathLike[str]) -> None:
        self._changing("unlink")
        with contextlib.suppress(FileNotFoundError):
            self.old.pop(os.stat(path).st_ino, None)  # the number may be given to another file
        super().unlink(path)

    def rename(self, source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
        self._changing("rename")
        super().rename(source, target)

    def ftruncate(self, fd: int, length: int) -> None:
        self._changing("ftruncate", fd)
        super().ftruncate(fd, length)

    def cut_power(self, dice: random.Random) -> None:
        """Put a state on the files that a power cut may leave: each unsynced block old, new or in between."""
        for inode, blocks in self.old.items():
            fd = os.open(self.files[inode], os.O_RDWR)
            for block, versions in blocks.items():
                os.pwrite(fd, dice.choice(versions), block * BLOCK)
            os.close(fd)
        self.old.clear()


class Rig:
    """STATE and RUNTIME of one volume, with sealed layers and a head; engines come and go."""

    def __init__(
        self, root: Path, size: int, *, layers: int = 3, disk: FakeDisk | None = None, native: bool | None = None
    ) -> None:
        self.root = root
        self.native = NATIVE if native is None else native
        self.size = size
        self.disk = disk or FakeDisk()
        self.directory = root / "lineage"
        self.directory.mkdir()
        self.dirfd = os.open(self.directory, os.O_RDONLY)
        entries = tuple(LayerEntry(n, bytes([n]) * 16, VOLUME) for n in range(1, layers + 1))
        self.table = LayerTable(LINEAGE, SECTOR, Cipher.AES_256_XTS, entries)
        self.head = layers
        for entry in entries:
            create_layer(self.disk, self.dirfd, entry.number, entry.uuid, size)
        self.map_path = root / "map"
        self.live_path = root / "live"
        DurableMap.create(self.disk, self.map_path, MapHeader(LINEAGE, VOLUME, layers, chunk_count(size))).close()
        self.codecs = ToyCodecs()
        self.boot = bytes(range(16))
        self.generation = 1
        self.engine: BlockEngine | None = None
        self.live: LiveMap | None = None
        self.durable: DurableMap | None = None
        self.head_fds: tuple[int, ...] = ()
        self.next_fds: tuple[int, ...] = ()
        self.growing: LiveMap | None = None
        self.disk.guard = self._check_not_sealed

    def _check_not_sealed(self, path: Path) -> None:
        """I2, for every test: no change of a layer that is not the head any more, in whoever's eyes."""
        segment = parse_segment_name(path.name)
        head = self.engine.head if self.engine is not None else self.head
        assert segment is None or segment[0] >= head, f"the sealed layer {segment[0]} is changed"

    def announce_head(self) -> Head:
        """What comes before a seal: a row, files and a table entry of a new head, and its descriptors."""
        number = len(self.table.layers) + 1
        entry = LayerEntry(number, bytes([number]) * 16, VOLUME)
        create_layer(self.disk, self.dirfd, number, entry.uuid, self.size)
        self.table = replace(self.table, layers=(*self.table.layers, entry))
        self.head = number
        self._close_next()
        self.next_fds = open_layer(self.disk, self.dirfd, number, entry.uuid, self.size, writable=True)
        return Head(number, self.next_fds)

    async def seal(self) -> SealedCopy:
        """Take a snapshot as a volume process does: the old head's descriptors are closed when it returned."""
        assert self.engine is not None
        copy = await self.engine.seal(self.announce_head(), self.table)
        for fd in self.head_fds:
            os.close(fd)
        self.head_fds, self.next_fds = self.next_fds, ()
        return copy

    def grow_files(self, size: int) -> tuple[int, ...]:
        """What comes before a growth: the head and the durable map are longer. Returns the further segments."""
        uuid = self.table.uuid_of(self.head)
        grow_layer(self.disk, self.dirfd, self.head, uuid, self.size, size)
        grow_durable_map(self.disk, self.map_path, size)
        fds = open_layer(self.disk, self.dirfd, self.head, uuid, size, writable=True)
        for fd in fds[: len(self.head_fds)]:
            os.close(fd)
        return fds[len(self.head_fds) :]

    async def grow(self, size: int) -> None:
        """Let the volume grow as a volume process does."""
        assert self.engine is not None
        assert self.live is not None
        assert self.durable is not None
        extra = self.grow_files(size)
        self.next_fds = extra
        self.durable.refresh()
        old = self.live
        live = LiveMap.grown(self.disk, self.live_path, old, self.durable.header.chunks)
        self.growing = live
        await self.engine.grow(size, extra, live, self.durable)
        self.live, self.growing = live, None
        old.close()
        self.head_fds, self.next_fds = self.head_fds + extra, ()
        self.size = size

    def content_of(self, entries: memoryview) -> bytes:
        """What a map shows, read from the layers."""
        content = bytearray(len(entries) * CHUNK)
        for chunk, layer in enumerate(entries):
            if layer != HOLE:
                name = segment_name(layer, self.table.uuid_of(layer), 0)
                cipher = bytearray((self.directory / name).read_bytes()[chunk * CHUNK : (chunk + 1) * CHUNK])
                plain = memoryview(content)[chunk * CHUNK : (chunk + 1) * CHUNK]
                ToyCodec(layer).decrypt_into(memoryview(cipher), plain, chunk * CHUNK // SECTOR)
        return bytes(content[: self.size])

    @property
    def identity(self) -> LiveIdentity:
        return LiveIdentity(self.boot, VOLUME, LINEAGE, self.generation)

    def seal_content(self, plan: dict[int, int], seed: int) -> bytearray:
        """Fill chunks of sealed layers: chunk -> layer. Returns what the volume then reads as."""
        content = bytearray(chunk_count(self.size) * CHUNK)
        dice = random.Random(seed)
        durable = DurableMap.open(self.disk, self.map_path)
        entries = durable.entries()
        for chunk, layer in plan.items():
            plain = dice.randbytes(CHUNK)
            content[chunk * CHUNK : (chunk + 1) * CHUNK] = plain
            cipher = bytearray(CHUNK)
            ToyCodec(layer).encrypt_into(plain, memoryview(cipher), chunk * CHUNK // SECTOR)
            (fd,) = open_layer(self.disk, self.dirfd, layer, bytes([layer]) * 16, self.size, writable=True)
            os.pwrite(fd, cipher, chunk * CHUNK)
            os.close(fd)
            entries[chunk] = layer
        durable.write_page(0, bytes(entries.cast("B")))
        durable.sync()
        durable.close()
        self.disk.old.clear()
        return content[: self.size]

    def start(
        self,
        scheduler: Scheduler | None = None,
        *,
        adopt: bool = False,
        read_only: bool = False,
        leaves: Leaves | None = None,
        space: Gate | None = None,
        preallocated: int = 0,
    ) -> BlockEngine:
        """Start an engine: on a new live map made from the durable one, or on the one a dead engine left."""
        self.durable = DurableMap.open(self.disk, self.map_path)
        self.head_fds = open_layer(self.disk, self.dirfd, self.head, bytes([self.head]) * 16, self.size, writable=True)
        if adopt:
            self.live = LiveMap.open(self.disk, self.live_path, self.identity)
            assert self.live is not None
        else:
            self.generation += 1
            self.live = LiveMap.create(self.disk, self.live_path, self.identity, self.durable, head=self.head)
        kind = BlockEngine
        if self.native:  # where dice choose who goes on, each step must be one of Python's
            kind = NativeEngine if isinstance(scheduler, DiceScheduler) else HotEngine
        self.engine = kind(
            disk=self.disk,
            scheduler=scheduler or DirectScheduler(),
            size=self.size,
            head=Head(self.head, self.head_fds),
            lineage_dirfd=self.dirfd,
            table=self.table,
            live=self.live,
            durable=self.durable,
            codecs=self.codecs,
            read_only=read_only,
            leaves=leaves,
            space=space,
            preallocated=preallocated,
        )
        return self.engine

    def drop(self) -> None:
        """What the kernel does when the process dies: descriptors and locks go, files stay."""
        if self.engine is not None:
            self.engine._close_sealed()
            self.engine = None
        if self.live is not None:
            self.live.close()
            self.live = None
        if self.durable is not None:
            self.durable.close()
            self.durable = None
        if self.growing is not None:
            self.growing._unpublished = None  # a dead process unlinks nothing
            self.growing.close()
            self.growing = None
        for fd in self.head_fds:
            os.close(fd)
        self.head_fds = ()
        self._close_next()

    def _close_next(self) -> None:
        for fd in self.next_fds:
            os.close(fd)
        self.next_fds = ()

    def salvage(self) -> Salvage:
        durable = DurableMap.open(self.disk, self.map_path)
        try:
            return salvage(
                self.disk, self.live_path, self.identity, durable,
                data_fds=(), layers=self.table.numbers(), head=self.head, lineage=(self.dirfd, self.table),
            )  # fmt: skip
        finally:
            durable.close()

    def power_cut(self, dice: random.Random) -> None:
        self.drop()
        self.disk.reset()
        self.disk.cut_power(dice)
        self.live_path.unlink(missing_ok=True)
        self.boot = dice.randbytes(16)

    def check_durable(self) -> None:
        durable = DurableMap.open(self.disk, self.map_path)
        check_map_structure(durable.entries(), durable.header.chunks, self.table.numbers(), file="map")
        durable.close()

    def close(self) -> None:
        self.drop()
        os.close(self.dirfd)

    def read(self, offset: int, length: int) -> bytes:
        assert self.engine is not None
        return bytes(run_sync(self.engine.read(offset, length)))

    def write(self, offset: int, data: bytes) -> int:
        assert self.engine is not None
        return run_sync(self.engine.write(offset, data))

    def flush(self) -> None:
        assert self.engine is not None
        run_sync(self.engine.flush())

    def durable_entries(self) -> list[int]:
        durable = DurableMap.open(self.disk, self.map_path)
        try:
            return durable.entries().tolist()[: chunk_count(self.size)]
        finally:
            durable.close()


__all__ = ["BLOCK", "HOLE", "LINEAGE", "VOLUME", "Died", "FakeDisk", "Rig", "ToyCodec", "ToyCodecs"]
