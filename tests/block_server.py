"""One block engine behind one transport, in a process of its own: what the contract of the block file is tried on.

Run with the options as JSON, see ``Options``. What a test wants to go wrong it says by files in the directory:
``shut`` (the gate holds new chunks up), ``bug`` (it raises what nobody expects), ``fail-sync`` (fdatasync fails with
EIO). ``syncs`` grows by a byte for each fdatasync.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import trio

from ebsd.crypto.codec import CodecFactory, LayerCodec
from ebsd.crypto.secret import Secret
from ebsd.domain.geometry import chunk_count
from ebsd.domain.ids import LineageId, VolumeId
from ebsd.domain.model import Cipher
from ebsd.domain.units import SECTOR
from ebsd.store.disk import RealDisk
from ebsd.store.durablemap import DurableMap, MapHeader
from ebsd.store.layers import create_layer, open_layer
from ebsd.store.layertable import LayerEntry, LayerTable
from ebsd.store.livemap import LiveIdentity, LiveMap
from ebsd.volume import transports
from ebsd.volume.engine import BlockEngine, Head
from ebsd.volume.host import mount_fuse, unmount_fuse
from ebsd.volume.native_engine import NativeEngine
from ebsd.volume.trio_scheduling import TrioScheduler

LINEAGE: Final = LineageId("6ba7b810-9dad-41d1-80b4-00c04fd430c8")
VOLUME: Final = VolumeId("vol-0123456789abcdef0")
TABLE: Final = LayerTable(
    LINEAGE, SECTOR, Cipher.AES_256_XTS, tuple(LayerEntry(n, bytes([n]) * 16, VOLUME) for n in (1, 2))
)
HEAD: Final = 2
IDENTITY: Final = LiveIdentity(bytes(range(16)), VOLUME, LINEAGE, 1)
UID: Final = 12345

ENGINES: Final = {"reference": BlockEngine, "native": NativeEngine}


@dataclass(frozen=True)
class Options:
    """What one process serves."""

    directory: str
    size: int
    transport: str = "native"
    engine: str = "reference"
    read_only: bool = False
    takes_over: bool = False
    fuse_fd: int = -1


class ObedientDisk(RealDisk):
    """Syncs as the files in the directory say."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._directory = directory

    def fdatasync(self, fd: int) -> None:
        if (self._directory / "fail-sync").exists():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        with open(self._directory / "syncs", "ab") as syncs:
            syncs.write(b".")
        super().fdatasync(fd)


class ObedientGate:
    """Holds new chunks up as long as there is a file ``shut``; raises something odd where there is one ``bug``."""

    def __init__(self, directory: Path) -> None:
        self._shut, self._bug = directory / "shut", directory / "bug"

    def admits(self, chunks: int) -> bool:
        if self._bug.exists():
            raise RuntimeError("nobody expects this")
        return not self._shut.exists()

    def written(self) -> None:
        """Nothing."""

    def lend(self) -> tuple[int, float]:
        """Nothing: the files are looked at for every write."""
        return 0, 0.0

    async def wait(self, since: float | None) -> float:
        await trio.sleep(0.02)
        return time.monotonic()


class Codecs:
    def __init__(self, factory: CodecFactory) -> None:
        self._factory = factory

    def for_layer(self, number: int) -> LayerCodec:
        return self._factory.codec(TABLE.uuid_of(number))


def make_files(directory: Path, size: int) -> None:
    """Make an empty volume."""
    disk = RealDisk()
    (directory / "lineage").mkdir()
    dirfd = os.open(directory / "lineage", os.O_RDONLY)
    for layer in TABLE.layers:
        create_layer(disk, dirfd, layer.number, layer.uuid, size)
    os.close(dirfd)
    DurableMap.create(disk, directory / "map", MapHeader(LINEAGE, VOLUME, HEAD, chunk_count(size))).close()


async def serve(options: Options) -> None:
    """Serve until the connection ends; says ``ready`` before."""
    directory = Path(options.directory)
    disk = ObedientDisk(directory)
    dirfd = os.open(directory / "lineage", os.O_RDONLY)
    durable = DurableMap.open(disk, directory / "map")
    if options.takes_over:
        adopted = LiveMap.open(disk, directory / "live", IDENTITY)
        assert adopted is not None
        live = adopted
    else:
        live = LiveMap.create(disk, directory / "live", IDENTITY, durable, head=HEAD)
    key = Secret.from_buffer(bytearray(range(64)))
    engine = ENGINES[options.engine](
        disk=disk,
        scheduler=TrioScheduler(),
        size=options.size,
        head=Head(HEAD, open_layer(disk, dirfd, HEAD, TABLE.uuid_of(HEAD), options.size, writable=True)),
        lineage_dirfd=dirfd,
        table=TABLE,
        live=live,
        durable=durable,
        codecs=Codecs(CodecFactory(key, cipher=Cipher.AES_256_XTS)),
        read_only=options.read_only,
        space=ObedientGate(directory),
    )

    def keep(values: bytes) -> None:
        live.init_values = values

    connection = transports.load(options.transport)(
        engine,
        options.fuse_fd,
        uid=UID,
        gid=UID,
        hot=engine.hot,
        keep_init=keep,
        resume=live.init_values if options.takes_over else None,
    )
    print("ready", flush=True)
    await connection.serve()
    connection.close()
    print(json.dumps(asdict(engine.statistics())), flush=True)


class Served:
    """A mounted block file and the process behind it. ``fuse`` is this process's copy of the connection, or -1."""

    def __init__(self, options: Options, *, keeps_connection: bool = False) -> None:
        self.directory = Path(options.directory)
        self.path = self.directory / "block"
        self.path.touch()
        make_files(self.directory, options.size)
        request = {"path": str(self.path), "uid": UID, "gid": UID, "read_only": options.read_only}
        self.fuse = mount_fuse(request)[1][0]
        self.options = options
        self.log = self.directory / "log"
        self.process = self.start()
        if not keeps_connection:
            os.close(self.fuse)
            self.fuse = -1

    def start(self) -> subprocess.Popen[str]:
        """Start a process on the connection; returns when it serves."""
        options = json.dumps(asdict(replace(self.options, fuse_fd=self.fuse)))
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, __file__, options],
                pass_fds=[self.fuse],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=Path(__file__).parent,
            )
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line == "ready\n", self.log.read_text()
        return process

    def replace(self) -> None:
        """Kill the process, and have another take its connection over."""
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.options = replace(self.options, takes_over=True)
        self.process = self.start()

    def end(self) -> dict[str, Any]:
        """Unmount, and return what the engine counted."""
        unmount_fuse({"path": str(self.path), "force": False, "volume": "it"})
        if self.fuse >= 0:
            os.close(self.fuse)
            self.fuse = -1
        said, _ = self.process.communicate(timeout=30)
        assert self.process.returncode == 0, self.log.read_text()
        statistics: dict[str, Any] = json.loads(said)
        return statistics

    def abort(self) -> None:
        """Leave nothing behind, whatever the state."""
        with contextlib.suppress(OSError):
            unmount_fuse({"path": str(self.path), "force": True, "volume": "it"})
        if self.fuse >= 0:
            os.close(self.fuse)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


@contextlib.contextmanager
def served(options: Options, *, keeps_connection: bool = False) -> Iterator[Served]:
    """Mount and serve a new volume for the length of a block."""
    made = Served(options, keeps_connection=keeps_connection)
    try:
        yield made
    finally:
        made.abort()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO)
    trio.run(serve, Options(**json.loads(sys.argv[1])))
