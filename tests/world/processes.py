"""Child processes as objects: the product's ``VolumeProcess`` and ``CopyWorker`` behind channels that are calls.

``Hosting.patched`` puts them in the place of real children for the length of a block: what starts a process, finds it
again, mounts and unmounts is answered here, and worker threads become plain calls, so that all happens in one order.
A process that dies at one of its calls answers ``ChannelClosed``, as the kernel would for it.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import trio

from ebsd.control import attachments, block_workers, block_writes, host_helper, job_work, volume_link
from ebsd.domain.errors import DaemonUnreachable, EbsdError, RemoteError
from ebsd.ipc.channel import ChannelClosed
from ebsd.ipc.incidents import as_ebsd_error, log_incident
from ebsd.volume import copier
from ebsd.volume import process as volume_module
from ebsd.volume.block_writer import BlockWriter
from ebsd.volume.copier import CopyWorker
from ebsd.volume.process import VolumeProcess
from ebsd.volume.scheduling import DirectScheduler

from .crash_disk import CrashDisk, Died


class FakeChild:
    """A process that ends when it is told to."""

    def __init__(self, pid: int, end: Callable[[], None]) -> None:
        self.pid = pid
        self._kill = end
        self._over = trio.Event()

    @property
    def ended(self) -> bool:
        return self._over.is_set()

    def end(self) -> None:
        """Note that it has ended."""
        self._over.set()

    def kill(self) -> None:
        self._kill()
        self.end()

    def poll(self) -> bool:
        return self.ended

    async def wait(self) -> int | None:
        await self._over.wait()
        return None


class _Later:
    """A nursery that takes everything and starts nothing: what a process does by itself, the test does for it."""

    def __init__(self, start: Callable[..., object] | None = None) -> None:
        self.cancel_scope = trio.CancelScope()
        self._start = start

    def start_soon(self, function: Callable[..., Any], *args: Any) -> None:
        if self._start is not None:
            self._start(function, *args)


class Process:
    """What volume processes and workers have in common here."""

    kind = ""

    def __init__(self, disk: CrashDisk, pid: int) -> None:
        self.disk = disk
        self.child = FakeChild(pid, self.die)
        self.actor = f"{self.kind}:{pid}"
        self.alive = True

    def handlers(self) -> Mapping[str, Callable[..., Awaitable[Any]]]:
        raise NotImplementedError

    def closed(self) -> None:
        """ebsd's end of the channel is closed."""

    async def answer(self, method: str, params: dict[str, Any], fds: Sequence[int]) -> dict[str, Any]:
        """Answer one request; descriptors are duplicated, as sending them does."""
        if not self.alive:
            raise ChannelClosed(reason="the other end is gone")
        copies = [os.dup(fd) for fd in fds]
        try:
            with self.disk.acting(self.actor):
                result, _ = await self.handlers()[method](params, copies)
        except Died:
            if self.disk.is_dead("ebsd"):
                raise
            self.die()
            raise ChannelClosed(reason="the other end is gone") from None
        except EbsdError as exc:
            raise RemoteError(exc.code, exc.message, exc.hint) from exc
        except OSError as exc:
            told = as_ebsd_error(exc, log_incident)
            raise RemoteError(told.code, told.message, told.hint) from exc
        return dict(result)

    def die(self) -> None:
        raise NotImplementedError


class VolumeProc(Process):
    """A volume process: the product's object, whose FUSE connection is this test."""

    kind = "volume"

    def __init__(self, disk: CrashDisk, pid: int) -> None:
        super().__init__(disk, pid)
        self.own = VolumeProcess(disk, DirectScheduler())
        self._sealed: list[tuple[Callable[..., Awaitable[Any]], tuple[Any, ...]]] = []
        """What it would begin by itself after a seal."""
        self.own._nursery = _Later(self._keep)  # type: ignore[assignment]

    def _keep(self, function: Callable[..., Awaitable[Any]], *args: Any) -> None:
        if function.__name__ == "add_sealed":
            self._sealed.append((function, args))

    async def hash_layers(self) -> None:
        """Do what a volume process does beside its device: hash what is sealed, sign its snapshots again."""
        leaves = self.own._leaves
        if leaves is None or not self.alive:
            return
        with self.disk.acting(self.actor):
            while self._sealed:
                function, args = self._sealed.pop(0)
                await function(*args)
            leaves._scope, leaves._ended, leaves._idle = trio.CancelScope(), trio.Event(), trio.Event()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(leaves.run)
                await leaves._idle.wait()
                nursery.cancel_scope.cancel()
            leaves._running = False

    def handlers(self) -> Mapping[str, Callable[..., Awaitable[Any]]]:
        return self.own.handlers()

    def closed(self) -> None:
        if self.own._stopped is not None or self.own._file is None:
            self.child.kill()  # it ends by itself

    async def unmount(self) -> None:
        try:
            with self.disk.acting(self.actor):
                await self.own._serve_fuse()
        except Died:
            if self.disk.is_dead("ebsd"):
                raise
            self.die()  # whoever unmounts does not hear of it

    def die(self) -> None:
        """What the kernel does: descriptors and locks go, files stay."""
        if not self.alive:
            return
        self.alive = False
        self.child.end()
        own = self.own
        if own._engine is not None:
            own._engine._close_sealed()
        fds = {*own._head_fds, own._lineage_fd}
        if own._next_head is not None:
            fds |= {*own._next_head.fds}
        if own._live is not None:
            own._live._unpublished = None  # a dead process unlinks nothing
            own._live.close()
        if own._durable is not None and own._durable.fd >= 0:
            fds.add(own._durable.fd)
            own._durable.fd = -1
        for fd in fds:
            with contextlib.suppress(OSError):
                os.close(fd)
        if own._control is not None:
            own._control._sock.close()  # trio's own close wants a run
        own._wipe()


class WorkerProc(Process):
    """A copy worker."""

    kind = "worker"

    def __init__(self, disk: CrashDisk, pid: int, nursery: Callable[[], trio.Nursery]) -> None:
        super().__init__(disk, pid)
        self.own = CopyWorker(disk)

        def start(function: Callable[..., Any], *args: Any) -> None:
            nursery().start_soon(self._as_actor, function, *args)

        self.own._nursery = _Later(start)  # type: ignore[assignment]

    async def _as_actor(self, function: Callable[..., Awaitable[Any]], *args: Any) -> None:
        # No task runs between the two but this one: what copies never waits.
        with self.disk.acting(self.actor):
            try:
                await function(*args)
            except Died:
                if self.disk.is_dead("ebsd"):
                    raise
                self.die()

    def handlers(self) -> Mapping[str, Callable[..., Awaitable[Any]]]:
        return {"start": self.own._start, "progress": self.own._progress, "finish": self.own._finish}

    def closed(self) -> None:
        self.child.kill()

    def die(self) -> None:
        if not self.alive:
            return
        self.alive = False
        self.child.end()
        if self.own._copy is not None:
            self.own._copy.stop()
        if self.own._job is not None:
            self.own._job.close()


class BlockWriterProc(Process):
    """A writer of blocks, which counts as a worker."""

    kind = "worker"

    def __init__(self, disk: CrashDisk, pid: int) -> None:
        super().__init__(disk, pid)
        self.own = BlockWriter(disk)

    def handlers(self) -> Mapping[str, Callable[..., Awaitable[Any]]]:
        own = self.own
        return {"start": own._start, "put": own._put, "check": own._check, "seal": own._seal}

    def closed(self) -> None:
        self.child.kill()

    def die(self) -> None:
        if self.alive:
            self.alive = False
            self.child.end()
            self.own.wipe()


class FakeChannel:
    """ebsd's end of a channel: a request is a call. A place where ebsd may die lies before it and after it."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.closed = False

    async def request(
        self, method: str, params: dict[str, Any], fds: Sequence[int] = (), *, deadline: float | None = None
    ) -> Any:
        disk = self.process.disk
        disk.changing(f"ask.{method}")
        answer = await self.process.answer(method, params, fds)
        disk.changing(f"answered.{method}")
        return SimpleNamespace(message=answer, fds=[])

    def close(self) -> None:
        self.closed = True
        self.process.closed()

    async def aclose(self) -> None:
        self.close()


class Hosting:
    """The host of the world: its processes, mounts, and the calls of the product that reach them."""

    def __init__(self, disk: CrashDisk, nursery: Callable[[], trio.Nursery]) -> None:
        self.disk = disk
        self._nursery = nursery
        self._pid = 0
        self.by_pid: dict[int, VolumeProc] = {}
        self.volumes: dict[str, VolumeProc] = {}
        """Volume id -> its process, dead or alive."""
        self.workers: list[WorkerProc | BlockWriterProc] = []

    def start(self, module: str, arguments: Sequence[str] | None = None) -> tuple[FakeChild, FakeChannel]:
        self.disk.changing(f"start.{module}")
        self._pid += 1
        if module == volume_link.MODULE:
            process: Process = VolumeProc(self.disk, self._pid)
            self.by_pid[self._pid] = process  # type: ignore[assignment]
        elif module == block_writes.MODULE:
            process = BlockWriterProc(self.disk, self._pid)
            self.workers.append(process)
        else:
            process = WorkerProc(self.disk, self._pid, self._nursery)
            self.workers.append(process)  # type: ignore[arg-type]
        return process.child, FakeChannel(process)

    def process_of(self, volume: str) -> VolumeProc | None:
        """Return the living process of a volume."""
        for process in self.by_pid.values():
            if process.alive and process.own._volume == volume:
                return process
        return None

    async def _connect(self, path: Path, *, kind: int, deadline: float) -> VolumeProc:
        process = self.process_of(Path(path).name.removesuffix(".sock"))
        if process is None:
            raise DaemonUnreachable(socket=path, reason="nobody listens")
        return process

    async def _mount_fuse(self, path: Path, *, uid: int, gid: int, read_only: bool, by: object) -> int:
        self.disk.changing("host.mount_fuse", str(path))
        return os.open("/dev/null", os.O_RDWR)

    async def _unmount_fuse(self, volume: str, path: Path, *, force: bool, by: object = None) -> None:
        self.disk.changing("host.unmount_fuse", str(path))
        process = self.process_of(volume)
        if process is not None and process.own._file is not None and not process.own._unmounted.is_set():
            await process.unmount()

    async def _nothing(self, *args: Any, **kwargs: Any) -> None:
        self.disk.changing("host.helper")

    @contextlib.contextmanager
    def patched(self) -> Iterator[None]:
        """Put this host in the place of the real one for the length of a block."""

        def listener(path: Path) -> socket.socket:
            path.unlink(missing_ok=True)
            return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)

        async def inline(function: Callable[..., Any], *args: Any, **_: Any) -> Any:
            await trio.lowlevel.checkpoint_if_cancelled()
            return function(*args)

        async def served() -> None:
            """The FUSE session ends at once: the test is what uses the device."""

        connection = SimpleNamespace(serve=served, close=lambda: None, forget_attributes=lambda: None)

        def connect(device: Any, fuse_fd: int, **_: Any) -> SimpleNamespace:
            os.close(fuse_fd)
            return connection

        transports = SimpleNamespace(load=lambda name: connect)
        replaced: list[tuple[Any, str, Any]] = []
        try:
            for target, name, value in (
                (trio.to_thread, "run_sync", inline),
                (copier, "LANES", 1),
                (volume_link, "start_with_channel", self.start),
                (job_work, "start_with_channel", self.start),
                (block_workers, "start_with_channel", self.start),
                (volume_link, "connect", self._connect),
                (volume_link, "Channel", FakeChannel),
                (volume_link, "adopt", lambda pid: self.by_pid[pid].child),
                (attachments, "control_listener", listener),
                (attachments, "loop_minors_of", lambda path: []),
                (host_helper, "running", contextlib.nullcontext),
                (host_helper, "mount_fuse", self._mount_fuse),
                (host_helper, "unmount_fuse", self._unmount_fuse),
                (host_helper, "show_size", self._nothing),
                (volume_module, "transports", transports),
                # An adopted process says its own number, which is this process's for all of them.
                (VolumeProcess, "_hello", self._hello()),
            ):
                replaced.append((target, name, getattr(target, name)))
                setattr(target, name, value)
            yield
        finally:
            for target, name, value in reversed(replaced):
                setattr(target, name, value)

    def _hello(self) -> Callable[..., Awaitable[Any]]:
        hosting = self

        async def hello(
            own: VolumeProcess, params: dict[str, Any], fds: list[int]
        ) -> tuple[dict[str, Any], Sequence[int]]:
            pid = next(pid for pid, process in hosting.by_pid.items() if process.own is own)
            return {"VolumeId": own._volume, "Pid": pid, "Serving": own._file is not None}, ()

        return hello


__all__ = ["Hosting", "VolumeProc", "WorkerProc"]
