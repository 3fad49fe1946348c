"""The volume process: verify one volume, serve it over FUSE, sign its record at the end.

It is started by ebsd and told everything over descriptor 0. When ebsd dies it goes on; the next ebsd connects to
its control socket, which ebsd bound beforehand. A signal to end means "flush and stay": a mounted file system must
not lose its device because somebody ends services in the wrong order.

States: waiting -> verified -> serving -> unmounted -> stopped. A process that loses ebsd before it serves ends, as
nobody has seen its volume yet.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import trio

from ebsd.crypto import selftest
from ebsd.crypto.codec import CodecFactory, LayerCodec
from ebsd.crypto.secret import Secret
from ebsd.domain.errors import EbsdError, IncorrectState, IntegrityFailure, StoreDamaged, UnsupportedFormat
from ebsd.domain.ids import LineageId, VolumeId, parse_uuid
from ebsd.domain.model import Cipher
from ebsd.ipc.channel import Channel, ChannelClosed, ChannelHandler, serve
from ebsd.ipc.process import harden
from ebsd.store.disk import RealDisk
from ebsd.store.durablemap import DurableMap
from ebsd.store.layertable import LayerTable, read_layer_table
from ebsd.store.livemap import LiveIdentity, LiveMap
from ebsd.store.record import parse_record
from ebsd.store.signedrecord import NO_HASH, RecordState, SignedBody
from ebsd.volume import keysession, transport
from ebsd.volume.engine import BlockEngine, Head
from ebsd.volume.trio_scheduling import TrioScheduler
from ebsd.volume.verify import Claim, next_body, sign, verify

log = logging.getLogger("ebsd-volume")

FLUSH_SECONDS: Final = 5.0
"""How often what was written is made durable without being asked; also what an unclean stop of the host can cost."""

_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4
_PR_SET_IO_FLUSHER: Final = 57

_FIXED_DESCRIPTORS: Final = ("session", "control listener", "lineage directory", "durable map")


class _Codecs:
    """Gives the engine codecs by layer number; the layer table says which random id a number stands for."""

    def __init__(self, factory: CodecFactory, table: LayerTable) -> None:
        self._factory = factory
        self._table = table

    def for_layer(self, number: int) -> LayerCodec:
        return self._factory.codec(self._table.uuid_of(number))


class VolumeProcess:
    """One volume, from verification to the end."""

    def __init__(self) -> None:
        self._disk = RealDisk()
        self._volume = ""
        self._claim: Claim | None = None
        self._body: SignedBody | None = None
        self._key: Secret | None = None
        self._factory: CodecFactory | None = None
        self._table: LayerTable | None = None
        self._engine: BlockEngine | None = None
        self._live: LiveMap | None = None
        self._live_path: Path | None = None
        self._durable: DurableMap | None = None
        self._control: trio.socket.SocketType | None = None
        self._owner = (0, 0)
        self._file: transport.BlockFile | None = None
        self._unmounted = trio.Event()
        self._stopped: dict[str, Any] | None = None
        self._nursery: trio.Nursery | None = None

    # --- life

    async def run(self, parent: socket.socket) -> None:
        """Serve the parent, then whoever connects to the control socket, until told to stop."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._flush_on_signals)
            nursery.start_soon(self._serve_parent, Channel(parent))

    async def _serve_parent(self, channel: Channel) -> None:
        async with channel:
            await self._serve_channel(channel)
        if self._file is None and self._nursery is not None:
            # Nothing was exposed, so nothing can be lost.
            self._nursery.cancel_scope.cancel()

    async def _serve_channel(self, channel: Channel) -> None:
        handlers: dict[str, ChannelHandler] = {
            "hello": self._hello,
            "configure": self._configure,
            "serve": self._serve,
            "status": self._status,
            "flush": self._flush,
            "stop": self._stop,
        }
        with contextlib.suppress(ChannelClosed):
            await serve(channel, handlers)
        if self._stopped is not None and self._nursery is not None:
            self._nursery.cancel_scope.cancel()

    async def _accept(self) -> None:
        """Serve a later ebsd: the directory of the control socket lets nobody else in."""
        if self._control is None or self._nursery is None:
            raise AssertionError("BUG: accepting before configure")
        while True:
            connection, _ = await self._control.accept()
            self._nursery.start_soon(self._serve_later, Channel(connection))

    async def _serve_later(self, channel: Channel) -> None:
        async with channel:
            await self._serve_channel(channel)

    async def _flush_on_signals(self) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
            async for number in signals:
                log.info("%s: signal %d: flushing, and going on", self._volume, number)
                await self._quiet_flush()

    async def _flush_now_and_then(self) -> None:
        while True:
            await trio.sleep(FLUSH_SECONDS)
            await self._quiet_flush()

    async def _quiet_flush(self) -> None:
        engine = self._engine
        if engine is None or self._stopped is not None or engine.failed or not engine.needs_flush:
            return
        try:
            await engine.flush()
            await engine.reclaim()
        except OSError as exc:
            log.error("%s: flush failed: %s", self._volume, exc)

    # --- requests of ebsd

    async def _hello(self, params: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], Sequence[int]]:
        return {"VolumeId": self._volume, "Pid": os.getpid(), "Serving": self._file is not None}, ()

    async def _configure(self, params: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], Sequence[int]]:
        if self._claim is not None:
            raise IncorrectState(reason="This volume process is configured already")
        if len(fds) < len(_FIXED_DESCRIPTORS) + 1:
            raise IncorrectState(reason="Descriptors are missing")
        session_fd, control_fd, lineage_fd, map_fd, *head_fds = fds
        self._volume = str(params["VolumeId"])
        self._owner = (int(params["Uid"]), int(params["Gid"]))
        self._control = trio.socket.fromfd(control_fd, socket.AF_UNIX, socket.SOCK_SEQPACKET)
        os.close(control_fd)
        answer = await trio.to_thread.run_sync(
            self._verify_and_open, params, socket.socket(fileno=session_fd), lineage_fd, map_fd, head_fds
        )
        if self._nursery is not None:
            self._nursery.start_soon(self._accept)
        return answer, ()

    def _verify_and_open(
        self, params: dict[str, Any], session: socket.socket, lineage_fd: int, map_fd: int, head_fds: list[int]
    ) -> dict[str, Any]:
        claim = Claim(
            volume=self._volume,
            owner=params["Owner"],
            lineage=params["Lineage"],
            size=params["Size"],
            head=params["Head"],
            cipher=Cipher(params["Cipher"]),
            key_arn=params["KeyArn"],
        )
        answer = keysession.ask(session)
        self._key = answer.data_key
        try:
            record = parse_record(base64.b64decode(params["Record"]), file="record")
            durable = DurableMap.from_fd(self._disk, map_fd, "map")
            table = read_layer_table(self._disk, Path(f"/proc/self/fd/{lineage_fd}/table"))
            verdict = verify(claim, answer.anchor, answer.data_key, record, table, durable.entries())
        except (StoreDamaged, UnsupportedFormat) as exc:
            raise IntegrityFailure(resource=self._volume, reason=exc.message) from exc
        read_only = bool(params["ReadOnly"])
        self._claim, self._body, self._table, self._durable = claim, verdict.body, table, durable
        self._factory = CodecFactory(answer.data_key, cipher=claim.cipher)
        identity = LiveIdentity(
            parse_uuid(params["BootId"]), VolumeId(claim.volume), LineageId(claim.lineage), params["AttachGeneration"]
        )
        self._live_path = Path(params["LiveDirectory"]) / claim.volume
        self._live = LiveMap.create(self._disk, self._live_path, identity, durable, head=claim.head)
        self._engine = BlockEngine(
            disk=self._disk,
            scheduler=TrioScheduler(),
            size=claim.size,
            head=Head(claim.head, head_fds),
            lineage_dirfd=lineage_fd,
            table=table,
            live=self._live,
            durable=durable,
            codecs=_Codecs(self._factory, table),
            read_only=read_only,
        )
        next_record = None
        if not read_only:
            self._body = next_body(verdict.body, claim, table, RecordState.OPEN, NO_HASH)
            next_record = base64.b64encode(sign(self._body, self._key)).decode()
        return {
            "Size": claim.size,
            "Generation": verdict.body.generation,
            "Unverified": verdict.unverified,
            "Blank": verdict.blank,
            "NextRecord": next_record,
        }

    async def _serve(self, params: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], Sequence[int]]:
        if self._engine is None or self._file is not None or self._nursery is None:
            raise IncorrectState(reason="This volume process is not ready to serve, or serves already")
        (fuse,) = fds
        self._file = transport.BlockFile(self._engine, uid=self._owner[0], gid=self._owner[1])
        transport.open_session(self._file, fuse)
        self._nursery.start_soon(self._serve_fuse)
        self._nursery.start_soon(self._flush_now_and_then)
        return {}, ()

    async def _serve_fuse(self) -> None:
        try:
            await transport.serve()
        finally:
            transport.close_session()
            self._unmounted.set()
        log.info("%s: the block file is unmounted", self._volume)
        # Whatever ends us between now and `stop` must find everything durable.
        await self._quiet_flush()

    async def _status(self, params: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], Sequence[int]]:
        if self._engine is None:
            raise IncorrectState(reason="This volume process is not configured")
        statistics = asdict(self._engine.statistics())
        return {"Failed": self._engine.failed, "Unmounted": self._unmounted.is_set(), "Statistics": statistics}, ()

    async def _flush(self, params: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], Sequence[int]]:
        if self._engine is None:
            raise IncorrectState(reason="This volume process is not configured")
        await self._engine.flush()
        return {}, ()

    async def _stop(self, params: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], Sequence[int]]:
        """Flush, sign ``clean``, wipe. Answered again in the same words when ebsd asks again."""
        if self._stopped is not None:
            return self._stopped, ()
        engine, body, claim, table = self._engine, self._body, self._claim, self._table
        if engine is None or body is None or claim is None or table is None:
            raise IncorrectState(reason="This volume process is not configured")
        if self._file is not None:
            with trio.move_on_after(10):
                await self._unmounted.wait()
            if not self._unmounted.is_set():
                raise IncorrectState(reason="The block file is still mounted")
        try:
            digest = await engine.close()
        except OSError as exc:
            raise StoreDamaged(file=self._volume, reason=f"its last flush failed: {exc}") from exc
        stopped: dict[str, Any] = {"Generation": body.generation, "Record": None}
        if not engine.read_only:
            clean = next_body(body, claim, table, RecordState.CLEAN, digest)
            stopped = {
                "Generation": clean.generation,
                "Record": base64.b64encode(sign(clean, self._key)).decode(),
            }
        self._wipe()
        # The durable map is authoritative now: nothing is left for a salvage.
        if self._live is not None and self._live_path is not None:
            self._live.close()
            self._live_path.unlink(missing_ok=True)
        self._stopped = stopped
        return stopped, ()

    def _wipe(self) -> None:
        if self._factory is not None:
            self._factory.close()
        if self._key is not None:
            self._key.wipe()


def _lock_memory() -> None:
    """Keep plaintext buffers off swap, and this process out of a reclaim deadlock with the disk it serves.

    Both need privileges an unprivileged user may lack; then they are left, and ``doctor`` tells of swap.
    PR_SET_IO_FLUSHER: this process is in the path of writing back dirty pages (prctl(2)).
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT)
    zeros = [ctypes.c_ulong(0)] * 3
    libc.prctl(_PR_SET_IO_FLUSHER, ctypes.c_ulong(1), *zeros)


def main() -> None:
    """Harden, test the cryptography, and serve descriptor 0."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(name)s: %(message)s")
    for failure in harden(strict=False):
        log.warning("%s", failure)
    _lock_memory()
    selftest.run()
    parent = socket.socket(fileno=os.dup(0))
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.close(null)
    process = VolumeProcess()
    try:
        trio.run(process.run, parent)
    except EbsdError as exc:
        log.error("%s", exc)
        sys.exit(1)


if __name__ == "__main__":
    main()
