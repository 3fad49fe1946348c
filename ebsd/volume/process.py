"""The volume process: verify one volume, serve it over FUSE, sign its record at the end.

It is started by ebsd and told everything over descriptor 0. When ebsd dies it goes on; the next ebsd connects to
its control socket, which ebsd bound beforehand. A signal to end means "flush and stay": a mounted file system must
not lose its device because somebody ends services in the wrong order. What it seals it hashes (``leafwork.py``), and
what it has left in layers that nobody else needs it drains (``draining.py``); the layers that its map names it opens
before they are needed (``ahead.py``).

Requests that change something are handled one at a time. An ebsd that lost patience connects anew: what it asked before
that comes first, so that a request that was given up can never follow its successors.

States: waiting -> verified -> serving -> unmounted -> stopped. A process that loses ebsd before it serves ends, as
nobody has seen its volume yet.
"""

from __future__ import annotations

import base64
import contextlib
import logging
import os
import resource
import signal
import socket
import sys
import time
import traceback
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import trio

from ebsd.crypto.codec import CodecFactory, LayerCodec
from ebsd.crypto.secret import Secret
from ebsd.domain.errors import (
    EbsdError,
    IncorrectState,
    IntegrityFailure,
    NotSupported,
    StoreDamaged,
    UnsupportedFormat,
    WritesFailed,
)
from ebsd.domain.ids import AccountId, LineageId, SnapshotId, parse_snapshot_id
from ebsd.domain.units import CHUNK
from ebsd.ipc import confinement
from ebsd.ipc.channel import Channel, ChannelClosed, ChannelHandler, serve
from ebsd.ipc.confinement import Kind
from ebsd.store.disk import Disk, RealDisk, pwrite_all
from ebsd.store.durablemap import DurableMap
from ebsd.store.entries import map_hash, named_layers
from ebsd.store.layertable import LayerTable, read_durable_table, read_layer_table
from ebsd.store.leaftable import LeafSlot, read_slots
from ebsd.store.leaves import remove_unfinished
from ebsd.store.livemap import FAILED_AT, LiveMap, remove_live_map
from ebsd.store.record import parse_record
from ebsd.store.sealedmap import encode_sealed_map
from ebsd.store.signedrecord import NO_HASH, RecordState, SignedBody
from ebsd.volume import keysession, secrecy, takeover, transports
from ebsd.volume.ahead import LookAhead
from ebsd.volume.draining import Drainer
from ebsd.volume.engine import SEALED_FDS, BlockEngine, Head
from ebsd.volume.hashing import LeafChecks
from ebsd.volume.holder import RESTART
from ebsd.volume.holding import Deposit, Holding, NoHolder, Succession, meet_holder
from ebsd.volume.leafwork import LeafWork
from ebsd.volume.meeting import Meeting
from ebsd.volume.native_engine import engine_kind
from ebsd.volume.scheduling import Scheduler
from ebsd.volume.spacegate import SpaceGate
from ebsd.volume.trio_scheduling import TrioScheduler
from ebsd.volume.verify import Claim, check_leaf_root, covered_layers, next_body, sign, verify

log = logging.getLogger("ebsd-volume")

OPEN_FILES: Final = 65_536
"""Descriptors of a volume process: half of them may be sealed layers. After thousands of snapshots there are thousands
of layers with live chunks, and to read from one that is closed costs opening it."""

MAX_LEFT: Final = 10_000
"""Layers that are told of as left: the answer must fit a packet, and the rest costs space until a whole sweep."""

FLUSH_SECONDS: Final = 5.0
"""How often what was written is made durable without being asked; also what an unclean stop of the host can cost."""

SOON_BYTES: Final = 64 << 20
SOON_SECONDS: Final = 0.5
"""A discard of this much is flushed, and its blocks are given back, after this time: more may follow it."""

FAILED_SECONDS: Final = 0.2
"""How long a process goes on whose engine has failed, so that errors reach those who wait for an answer."""

_FIXED_DESCRIPTORS: Final = ("session", "control listener", "lineage directory", "durable map")


class _Codecs:
    """Gives the engine codecs by layer number; the layer table says which random id a number stands for."""

    def __init__(self, factory: CodecFactory, table: LayerTable) -> None:
        self._factory = factory
        self.table = table

    def for_layer(self, number: int) -> LayerCodec:
        return self._factory.codec(self.table.uuid_of(number))


class VolumeProcess:
    """One volume, from verification to the end."""

    def __init__(
        self, disk: Disk | None = None, scheduler: Scheduler | None = None, holder: Holding | None = None
    ) -> None:
        self._holder: Holding = holder or NoHolder()
        self._pid = self._holder.pid
        self._deaths = 0
        self._replaceable = False
        """Another engine can go on with the connection."""
        self._successors = self._pause_ms = 0
        """Engines before this one, and how long nothing was served between the last of them and this."""
        self._disk: Disk = disk or RealDisk()
        self._scheduler: Scheduler = scheduler or TrioScheduler()
        self._volume = ""
        self._claim: Claim | None = None
        self._body: SignedBody | None = None
        self._key: Secret | None = None
        self._factory: CodecFactory | None = None
        self._table: LayerTable | None = None
        self._engine: BlockEngine | None = None
        self._gate: SpaceGate | None = None
        self._live: LiveMap | None = None
        self._live_path: Path | None = None
        self._durable: DurableMap | None = None
        self._control: trio.socket.SocketType | None = None
        self._owner = (0, 0)
        self._head_fds: list[int] = []
        self._transport: transports.Transport | None = None
        self._file: transports.Connection | None = None
        self._unmounted = trio.Event()
        self._zeroed = 0
        """Bytes discarded since the last flush of our own."""
        self._much_zeroed = trio.Event()
        self._stopped: dict[str, Any] | None = None
        self._lineage_fd = -1
        self._codecs: _Codecs | None = None
        self._next_head: Head | None = None
        self._leaves: LeafWork | None = None
        self._drainer: Drainer | None = None
        self._ahead: LookAhead | None = None
        self._handling = trio.Lock()
        self._channels: list[trio.Event] = []
        """One event for each open channel, in order of their beginning; set at its end."""
        self._last_seal: tuple[str, dict[str, Any]] | None = None
        """The last snapshot and the answer that was given for it, in case its receiver died."""
        self._meeting: Meeting | None = None
        """The last seal that was to share its moment with other volumes."""
        self._nursery: trio.Nursery | None = None

    # --- life

    async def run(self, parent: socket.socket) -> None:
        """Serve the parent, then whoever connects to the control socket, until told to stop."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._flush_on_signals)
            nursery.start_soon(self._serve_parent, Channel(parent))

    async def go_on(self, succession: Succession) -> None:
        """Go on for an engine that died, with what it deposited, until told to stop.

        Raises EbsdError where that cannot be, now or later; OSError.
        """
        params, (_, lineage_fd) = succession.deposits["volume"]
        self._transport = transports.load(params["Transport"])
        self._confine(params, lineage_fd)
        await trio.to_thread.run_sync(self._restore, succession.deposits)
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._flush_on_signals)
            nursery.start_soon(self._accept)
            self._start_serving(nursery)
            await trio.to_thread.run_sync(self._holder.serving)
            self._successors = succession.number
            self._pause_ms = round(1000 * (time.monotonic() - succession.since))
            log.warning("%s: engine %d goes on, after %d ms", self._volume, self._successors + 1, self._pause_ms)
            if self._leaves is not None and self._live is not None:
                await trio.to_thread.run_sync(self._find_missing_leaves, self._leaves, self._live)
                nursery.start_soon(self._leaves.run)

    def _restore(self, deposits: Mapping[str, Deposit]) -> None:
        """Become the engine of a volume that another one served, up to where the connection's requests come again."""
        found = takeover.restore(self._disk, deposits)
        self._volume, self._claim, self._body, self._key = found.claim.volume, found.claim, found.body, found.key
        self._owner = (int(found.params["Uid"]), int(found.params["Gid"]))
        self._control = trio.socket.fromfd(found.control, socket.AF_UNIX, socket.SOCK_SEQPACKET)
        os.close(found.control)
        self._table, self._lineage_fd = found.table, found.lineage
        self._live, self._durable = found.live, found.durable
        self._live_path = Path(found.params["LiveDirectory"]) / found.claim.volume
        self._head_fds, self._next_head, self._last_seal = list(found.head.fds), found.next_head, found.last_seal
        self._make_engine(found.params, found.slots, None)
        if found.grown:
            self._deposit_grown()
        for number in found.older_heads:
            takeover.drop_head(self._holder, number)
        self._replaceable = True
        self._file = self._connect(found.fuse, resume=found.live.init_values)

    def _find_missing_leaves(self, leaves: LeafWork, live: LiveMap) -> None:
        remove_unfinished(self._disk, self._lineage_fd)  # what the dead one was hashing
        leaves.add_missing(memoryview(bytes(live.raw_entries)).cast("I"), live.head)
        live.let_pages_go()

    async def _serve_parent(self, channel: Channel) -> None:
        async with channel:
            await self._serve_channel(channel)
        if self._file is None and self._nursery is not None:
            # Nothing was exposed, so nothing can be lost.
            self._nursery.cancel_scope.cancel()

    async def _serve_channel(self, channel: Channel) -> None:
        earlier, ended = tuple(self._channels), trio.Event()

        def in_turn(handler: ChannelHandler) -> ChannelHandler:
            async def handle(params: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], Sequence[int]]:
                for channel_end in earlier:
                    await channel_end.wait()
                async with self._handling:
                    return await handler(params, fds)

            return handle

        handlers = {name: handler if name == "hello" else in_turn(handler) for name, handler in self.handlers().items()}
        self._channels.append(ended)
        try:
            with contextlib.suppress(ChannelClosed):
                await serve(channel, handlers)
        finally:
            if self._meeting is not None:
                # Who could say "go" is gone, or will not be believed any more: requests are not held for him.
                self._meeting.let_go("ebsd went away")
            self._channels.remove(ended)
            ended.set()
        if self._stopped is not None and not self._channels and self._nursery is not None:
            self._nursery.cancel_scope.cancel()

    def handlers(self) -> dict[str, ChannelHandler]:
        """Return what answers each request of ebsd."""
        return {
            "hello": self._hello,
            "configure": self._configure,
            "serve": self._serve,
            "status": self._status,
            "prepare_seal": self._prepare_seal,
            "seal": self._seal,
            "gather": self._gather,
            "hold": self._hold,
            "go": self._go,
            "let_go": self._let_go,
            "sealed": self._sealed,
            "hashed": self._hashed,
            "drain": self._drain,
            "drained": self._drained,
            "grow": self._grow,
            "flush": self._flush,
            "reclaim": self._reclaim,
            "hurry": self._hurry,
            "restart": self._restart,
            "stop": self._stop,
        }

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
            with trio.move_on_after(FLUSH_SECONDS):
                await self._much_zeroed.wait()
                await trio.sleep(SOON_SECONDS)
            self._zeroed, self._much_zeroed = 0, trio.Event()
            await self._quiet_flush()

    async def _quiet_flush(self) -> None:
        engine = self._engine
        if engine is None or self._stopped is not None or engine.failed:
            return
        try:
            if engine.needs_flush:
                await engine.flush()
            # Also when somebody else's flush made the zeros durable, as that of mkfs does after its discard.
            await engine.reclaim()
        except OSError as exc:
            log.error("%s: flush failed: %s", self._volume, exc)

    def _engine_has_failed(self) -> None:
        if self._nursery is not None:
            self._nursery.start_soon(self._end_failed)

    async def _end_failed(self) -> None:
        """End as a kill would, once those who asked have their errors: nothing will be served any more.

        That is how ebsd learns of it, and everybody who uses the device. The live map says that the engine failed.
        """
        log.error("%s: a sync failed; nothing is served any more", self._volume)
        await trio.sleep(FAILED_SECONDS)
        # Not wiped: a thread of the transport may be encrypting. The kernel clears the memory of who ends.
        os._exit(1)

    # --- requests of ebsd

    async def _hello(self, params: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], Sequence[int]]:
        return {"VolumeId": self._volume, "Pid": self._pid, "Serving": self._file is not None}, ()

    async def _configure(self, params: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], Sequence[int]]:
        if self._claim is not None:
            raise IncorrectState(reason="This volume process is configured already")
        if len(fds) < len(_FIXED_DESCRIPTORS) + 1:
            raise IncorrectState(reason="Descriptors are missing")
        session_fd, control_fd, lineage_fd, map_fd, *head_fds = fds
        # An ebsd of a version with one transport says nothing of it.
        self._transport = transports.load(params.get("Transport", "pyfuse3"))
        self._confine(params, lineage_fd)
        self._volume = str(params["VolumeId"])
        self._deaths = int(params.get("Deaths", 0))
        self._replaceable = takeover.is_possible(params.get("Transport", "pyfuse3"), os.uname().release)
        if not self._replaceable:
            self._holder = NoHolder()  # it keeps nothing that nobody could go on with
        self._owner = (int(params["Uid"]), int(params["Gid"]))
        self._control = trio.socket.fromfd(control_fd, socket.AF_UNIX, socket.SOCK_SEQPACKET)
        os.close(control_fd)
        answer = await trio.to_thread.run_sync(
            self._verify_and_open, params, socket.socket(fileno=session_fd), lineage_fd, map_fd, head_fds
        )
        if self._nursery is not None:
            self._nursery.start_soon(self._accept)
        return answer, ()

    def _confine(self, params: dict[str, Any], lineage_fd: int) -> None:
        """Before the first thread, and before the first byte of a user, whoever this engine follows."""
        confinement.enclose(log, (lineage_fd,), (str(params["LiveDirectory"]),))

    def _verify_and_open(
        self, params: dict[str, Any], session: socket.socket, lineage_fd: int, map_fd: int, head_fds: list[int]
    ) -> dict[str, Any]:
        claim = takeover.claim_of(params)
        answer = keysession.ask(session)
        self._key = answer.data_key
        try:
            record = parse_record(base64.b64decode(params["Record"]), file="record")
            durable = DurableMap.from_fd(self._disk, map_fd, "map")
            table = read_durable_table(self._disk, Path(f"/proc/self/fd/{lineage_fd}/table"))
            verdict = verify(claim, answer.anchor, answer.data_key, record, table, durable.entries())
            if (durable.header.volume, durable.header.lineage) != (claim.volume, claim.lineage):
                raise StoreDamaged(file="map", reason=f"it is that of {durable.header.volume}")
            covered = covered_layers(verdict.covering, durable.entries())
            slots = read_slots(
                self._disk, lineage_fd, LineageId(claim.lineage), {layer: table.uuid_of(layer) for layer in covered}
            )
            check_leaf_root(claim, verdict.covering, covered, slots)
        except (StoreDamaged, UnsupportedFormat) as exc:
            raise IntegrityFailure(resource=self._volume, reason=exc.message.rstrip(".")) from exc
        self._claim, self._body, self._table, self._durable = claim, verdict.body, table, durable
        self._head_fds = head_fds
        self._lineage_fd = lineage_fd
        self._live_path = Path(params["LiveDirectory"]) / claim.volume
        self._live = LiveMap.create(self._disk, self._live_path, takeover.identity_of(params), durable, head=claim.head)
        self._make_engine(params, slots, params.get("Unsynced"))
        if self._leaves is not None:
            self._leaves.add_missing(durable.entries(), claim.head)
        next_record = None
        if not params["ReadOnly"]:
            self._body = next_body(verdict.body, claim, table, RecordState.OPEN, NO_HASH, above=answer.anchor.passed)
            next_record = base64.b64encode(sign(self._body, self._key)).decode()
        self._deposit(params, verdict.covering, covered)
        return {
            "Size": claim.size,
            "Generation": verdict.body.generation,
            "Unverified": verdict.unverified,
            "Blank": verdict.blank,
            "NextRecord": next_record,
        }

    def _make_engine(
        self, params: dict[str, Any], slots: Mapping[int, LeafSlot], unsynced: Collection[int] | None
    ) -> None:
        """Make an engine of the maps and the head that are there, and what works beside it."""
        claim, table, live, durable = self._claim, self._table, self._live, self._durable
        if claim is None or table is None or live is None or durable is None:
            raise AssertionError("BUG: an engine without maps")
        read_only, lineage = bool(params["ReadOnly"]), LineageId(claim.lineage)
        self._factory = CodecFactory(self._key, cipher=claim.cipher)
        self._codecs = _Codecs(self._factory, table)
        checks = LeafChecks(self._disk, self._lineage_fd, lineage, slots)
        self._gate = SpaceGate(
            disk=self._disk,
            scheduler=self._scheduler,
            fd=self._lineage_fd,
            floor=int(params["SpaceReserve"]),
            patience=float(params["FullWait"]),
        )
        self._engine = engine_kind(native=True)(
            disk=self._disk,
            scheduler=self._scheduler,
            size=claim.size,
            head=Head(claim.head, self._head_fds),
            lineage_dirfd=self._lineage_fd,
            table=table,
            live=live,
            durable=durable,
            codecs=self._codecs,
            read_only=read_only,
            unsynced_layers=unsynced,
            sealed_files=_sealed_files(),
            leaves=checks,
            space=self._gate,
            preallocated=int(params.get("Preallocated", 0)) if claim.head == params["Head"] else 0,
            on_failure=self._engine_has_failed,
        )
        self._ahead = LookAhead(self._engine, self._scheduler)
        if not read_only:
            self._leaves = LeafWork(
                self._disk,
                self._lineage_fd,
                lineage,
                table=self._present_table,
                checks=checks,
                requests=lambda: 0 if self._engine is None else self._engine.requests,
                sign=lambda body: sign(body, self._key),
                slots=slots,
            )
            self._drainer = Drainer(
                self._engine, self._scheduler, is_ample=self._gate.is_ample, forget_all_but=checks.forget_all_but
            )

    def _deposit(self, params: dict[str, Any], covering: SignedBody | None, covered: Collection[int]) -> None:
        """Leave with the holder what a successor needs, before ebsd hears that there is anything to serve."""
        holder, control, body, live, durable = self._holder, self._control, self._body, self._live, self._durable
        if control is None or body is None or live is None or durable is None or self._claim is None:
            raise AssertionError("BUG: a deposit without a volume")
        takeover.keep_volume(holder, params, self._key, control.fileno(), self._lineage_fd)
        takeover.keep_leaves(holder, covering, covered)
        takeover.keep_record(holder, body)
        takeover.keep_maps(holder, self._claim.size, durable, live)
        takeover.keep_head(holder, Head(self._claim.head, self._head_fds))

    async def _serve(self, params: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], Sequence[int]]:
        if self._engine is None or self._file is not None or self._nursery is None:
            raise IncorrectState(reason="This volume process is not ready to serve, or serves already")
        (fuse,) = fds
        # In a thread: the first request of the kernel may be a moment away.
        self._file = await trio.to_thread.run_sync(self._connect, fuse)
        self._start_serving(self._nursery)
        if self._leaves is not None:
            self._nursery.start_soon(self._leaves.run)
        return {}, ()

    def _start_serving(self, nursery: trio.Nursery) -> None:
        nursery.start_soon(self._serve_fuse)
        nursery.start_soon(self._flush_now_and_then)
        if self._ahead is not None:
            nursery.start_soon(self._ahead.run)
        if self._drainer is not None:
            nursery.start_soon(self._drainer.run, self._is_hashed)

    def _connect(self, fuse: int, resume: bytes | None = None) -> transports.Connection:
        engine, live = self._engine, self._live
        if self._transport is None or engine is None or live is None:
            raise AssertionError("BUG: connecting before configure")

        def keep(values: bytes) -> None:
            live.init_values = values
            self._holder.keep("fuse", {}, [connection])
            # From here on there may be requests, which another engine can answer.
            self._holder.arm(failed_at=FAILED_AT, deaths=self._deaths)

        uid, gid = self._owner
        connection = os.dup(fuse)  # the transport may close the other one at any time
        try:
            return self._transport(
                engine,
                fuse,
                uid=uid,
                gid=gid,
                hot=engine.hot,
                keep_init=keep,
                on_zeroed=self._note_zeroed,
                resume=resume,
            )
        finally:
            os.close(connection)

    def _note_zeroed(self, length: int) -> None:
        """Give what a discard freed back soon; what is little waits for the next flush of our own."""
        self._zeroed += length
        if self._zeroed >= SOON_BYTES:
            self._much_zeroed.set()

    def _is_hashed(self) -> bool:
        return self._leaves is None or not self._leaves.pending

    async def _serve_fuse(self) -> None:
        if self._file is None:
            raise AssertionError("BUG: serving before connecting")
        await self._file.serve()
        # Not after an error: what waits for an answer would get one of EIO, instead of one from the next engine.
        self._file.close()
        self._unmounted.set()
        log.info("%s: the block file is unmounted", self._volume)
        # Whatever ends us between now and `stop` must find everything durable.
        await self._quiet_flush()

    async def _status(self, params: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], Sequence[int]]:
        if self._engine is None or self._gate is None:
            raise IncorrectState(reason="This volume process is not configured")
        gate = self._gate
        return {
            "Space": {
                "Short": gate.short,
                "Waiting": gate.waiting,
                "Waits": gate.waits,
                "Failures": gate.failures,
            },
            "Engine": {"Pid": os.getpid(), "Successors": self._successors, "PauseMilliseconds": self._pause_ms},
            "Failed": self._engine.failed,
            "Unmounted": self._unmounted.is_set(),
            "Head": self._engine.head,
            "Size": self._engine.size,
            "Sealed": self._last_seal[0] if self._last_seal else None,
            "Statistics": asdict(self._engine.statistics()),
        }, ()

    async def _flush(self, params: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], Sequence[int]]:
        if self._engine is None:
            raise IncorrectState(reason="This volume process is not configured")
        await self._engine.flush()
        return {}, ()

    async def _reclaim(self, params: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], Sequence[int]]:
        """Give the blocks of what was discarded back now. {} -> {"Freed": bytes that were, since the process began}."""
        engine = self._engine
        if engine is None:
            raise IncorrectState(reason="This volume process is not configured")
        await engine.flush()
        await engine.reclaim()
        return {"Freed": engine.statistics().punched_chunks * CHUNK}, ()

    async def _hurry(self, params: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], Sequence[int]]:
        """Let writes wait for space no longer, or again: who detaches must not wait for a disk that stays full."""
        if self._gate is None:
            raise IncorrectState(reason="This volume process is not configured")
        self._gate.hurried = bool(params["Hurried"])
        return {}, ()

    async def _prepare_seal(self, params: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], Sequence[int]]:
        """Learn of the head that a snapshot will switch to, and sign a record that covers it.

        The record comes before the switch: entries that name the new head must never be on the disk under a record
        that does not know it.
        """
        await self._no_meeting()
        engine, claim, body, codecs = self._engine, self._claim, self._body, self._codecs
        if engine is None or claim is None or body is None or codecs is None or engine.read_only:
            raise IncorrectState(reason="This volume process cannot seal")
        table = await trio.to_thread.run_sync(self._read_table)
        codecs.table = self._table = table
        given_up = self._next_head
        if given_up is not None and given_up.number != engine.head:
            for fd in given_up.fds:
                os.close(fd)
        self._next_head = Head(int(params["Head"]), fds)
        self._body = next_body(body, replace(claim, head=self._next_head.number), table, RecordState.OPEN, NO_HASH)
        await trio.to_thread.run_sync(self._deposit_next, self._body, self._next_head)
        record = base64.b64encode(sign(self._body, self._key)).decode()
        return {"Generation": self._body.generation, "Record": record}, ()

    def _deposit_next(self, body: SignedBody, head: Head) -> None:
        takeover.keep_next_head(self._holder, head)
        takeover.keep_record(self._holder, body)

    def _present_table(self) -> LayerTable:
        if self._table is None:
            raise AssertionError("BUG: leaves before configure")
        return self._table

    def _read_table(self) -> LayerTable:
        return read_layer_table(self._disk, Path(f"/proc/self/fd/{self._lineage_fd}/table"))

    async def _seal(self, params: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], Sequence[int]]:
        """Seal the head into a snapshot: pause, copy of the map, switch; then sync, write the map, sign."""
        await self._no_meeting()
        (output,) = fds
        return await self._seal_into(output, params, None), ()

    async def _seal_into(self, output: int, params: dict[str, Any], meeting: Meeting | None) -> dict[str, Any]:
        engine, claim, table, head = self._engine, self._claim, self._table, self._next_head
        try:
            snapshot = parse_snapshot_id(params["SnapshotId"])
            if engine is None or claim is None or table is None or head is None:
                raise IncorrectState(reason="No new head was announced")
            # ebsd has written the record that knows this head, and a successor must not go back behind a switch.
            await trio.to_thread.run_sync(takeover.keep_head, self._holder, head)
            try:
                copy = await engine.seal(head, table, meeting)
            except BaseException:
                if engine.head != head.number and not engine.failed:
                    with trio.CancelScope(shield=True):
                        await trio.to_thread.run_sync(takeover.drop_head, self._holder, head.number)
                raise
            if engine.head == head.number:
                self._claim = replace(claim, head=head.number)
                old, self._head_fds, self._next_head = self._head_fds, list(head.fds), None
                for fd in old:
                    os.close(fd)
                await trio.to_thread.run_sync(takeover.drop_head, self._holder, copy.layer)
            lineage = LineageId(claim.lineage)
            digest = await trio.to_thread.run_sync(
                self._write_sealed_map, output, snapshot, lineage, copy.entries, copy.chunks
            )
        finally:
            os.close(output)
        count = len(table.layers)
        body = SignedBody(
            RecordState.CLEAN,
            snapshot,
            lineage,
            AccountId(params["Account"]),
            engine.size,
            claim.cipher,
            generation=1,
            head=0,
            table_count=count,
            table_hash=table.prefix_hash(count),
            map_hash=digest,
        )
        answer = {
            "Record": base64.b64encode(sign(body, self._key)).decode(),
            "PauseMicroseconds": copy.pause_us,
            "WaitMicroseconds": copy.wait_us,
            "Left": sorted(copy.left)[:MAX_LEFT],
        }
        self._last_seal = (snapshot, answer)
        await trio.to_thread.run_sync(takeover.keep_seal, self._holder, self._last_seal)
        if self._leaves is not None and self._nursery is not None:
            self._leaves.expect_sealed()
            self._nursery.start_soon(self._leaves.add_sealed, copy.entries, copy.layer, body)
        return answer

    # A seal that shares its moment with other volumes, in this order; the answer of ``go`` is that of ``seal``.

    async def _gather(self, params: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], Sequence[int]]:
        """Begin a seal, and come to where only the others are missing; requests run on."""
        await self._no_meeting()
        if self._nursery is None:
            raise AssertionError("BUG: asked before run")
        (output,) = fds
        meeting = self._meeting = Meeting(self._volume, str(params["SnapshotId"]))
        self._nursery.start_soon(meeting.run, partial(self._seal_into, output, params, meeting))
        await meeting.gathered()
        return {}, ()

    async def _hold(self, params: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], Sequence[int]]:
        await self._meeting_for(params).hold()
        return {}, ()

    async def _go(self, params: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], Sequence[int]]:
        return await self._meeting_for(params).go(), ()

    async def _let_go(self, params: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], Sequence[int]]:
        await self._meeting_for(params).give_up("another volume could not be sealed")
        return {}, ()

    def _meeting_for(self, params: dict[str, Any]) -> Meeting:
        if self._meeting is None or self._meeting.snapshot != params["SnapshotId"]:
            raise IncorrectState(reason="That snapshot is not the one that was begun")
        return self._meeting

    async def _no_meeting(self) -> None:
        """Let go of what nobody will say "go" to any more; its outcome is known at return."""
        if self._meeting is not None:
            await self._meeting.give_up("something else was asked for")
            self._meeting = None

    def _write_sealed_map(
        self, output: int, snapshot: SnapshotId, lineage: LineageId, entries: memoryview, chunks: int
    ) -> bytes:
        pwrite_all(self._disk, output, encode_sealed_map(snapshot, lineage, entries, chunks), 0)
        self._disk.fsync(output)
        return map_hash(entries, chunks)

    async def _sealed(self, params: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], Sequence[int]]:
        # A seal that was given up, or whose ebsd is gone, has ended by now: its outcome is the answer.
        await self._no_meeting()
        if self._last_seal is None or self._last_seal[0] != params["SnapshotId"]:
            raise IncorrectState(reason="That snapshot was not the last one sealed")
        return self._last_seal[1], ()

    async def _hashed(self, params: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], Sequence[int]]:
        """Give the records of snapshots that were signed again with the root of their leaves.

        {"Taken": ids whose records are on the disk} -> {"Pending": whether more may come, "Records": {id:
        {"Generation", "Record": in base64}}}. A record is given until it was taken, after ``stop`` too.
        """
        if self._leaves is None:
            return {"Pending": False, "Records": {}}, ()
        self._leaves.take(params["Taken"])
        records = {
            snapshot: {"Generation": generation, "Record": base64.b64encode(record).decode()}
            for snapshot, (generation, record) in self._leaves.signed.items()
        }
        return {"Pending": self._leaves.pending, "Records": records}, ()

    async def _drain(self, params: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], Sequence[int]]:
        """Begin to drain those of {"Layers": numbers, which no other map names} that are small."""
        if self._drainer is not None:
            self._drainer.begin(params["Layers"])
        return {}, ()

    async def _drained(self, params: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], Sequence[int]]:
        """Tell of layers that chunks were moved off, for whatever reason; what was taken is not told again.

        {"Taken": layers that are noted} -> {"Pending": whether a drain is under way, "Moved": chunks that the last one
        moved, "Left": layers}.
        """
        engine, drainer = self._engine, self._drainer
        if engine is None or drainer is None:
            return {"Pending": False, "Moved": 0, "Left": []}, ()
        engine.forget_left(params["Taken"])
        left = sorted(engine.tell_left())[:MAX_LEFT]
        return {"Pending": drainer.pending, "Moved": drainer.moved, "Left": left}, ()

    async def _grow(self, params: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], Sequence[int]]:
        """Take over the files that ebsd has lengthened, and have the kernel ask for the new size."""
        engine, claim, durable, live = self._engine, self._claim, self._durable, self._live
        if engine is None or claim is None or durable is None or live is None or self._live_path is None:
            raise IncorrectState(reason="This volume process is not configured")
        size = int(params["Size"])
        if int(params["Head"]) != engine.head or size <= engine.size:
            for fd in fds:
                os.close(fd)
        if int(params["Head"]) != engine.head:
            raise IncorrectState(reason=f"Layer {engine.head} is written to, and not layer {params['Head']}")
        if size > engine.size:
            with contextlib.ExitStack() as undo:
                for fd in fds:
                    undo.callback(os.close, fd)
                twin = os.dup(durable.fd)
                undo.callback(os.close, twin)
                longer = await trio.to_thread.run_sync(DurableMap.from_fd, self._disk, twin, "map")
                grown = await trio.to_thread.run_sync(
                    LiveMap.grown, self._disk, self._live_path, live, longer.header.chunks
                )
                undo.callback(grown.close)
                await trio.to_thread.run_sync(takeover.keep_growth, self._holder, size, longer, grown, fds)
                undo.callback(self._holder.drop, "growth")
                await engine.grow(size, fds, grown, longer)
                undo.pop_all()
            live.close()
            durable.close()
            self._live, self._durable = grown, longer
            self._claim = replace(claim, size=size)
            self._head_fds += fds
            await trio.to_thread.run_sync(self._deposit_grown)
        if self._file is not None:
            await trio.to_thread.run_sync(self._file.forget_attributes)
        return {}, ()

    def _deposit_grown(self) -> None:
        if self._claim is None or self._durable is None or self._live is None:
            raise AssertionError("BUG: a growth of nothing")
        # In this order: a successor takes what is missing in the one from the growth, which goes last.
        takeover.keep_head(self._holder, Head(self._claim.head, self._head_fds))
        takeover.keep_maps(self._holder, self._claim.size, self._durable, self._live)
        self._holder.drop("growth")

    async def _restart(self, params: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], Sequence[int]]:
        """End, so that the holder starts the engine anew, of the program as it is installed now. The answer is the end.

        Nothing is drained: what was read and not answered comes again, as at any other end.
        """
        if self._engine is None or self._file is None or not self._replaceable:
            raise NotSupported(
                what="restarting the engine of this volume",
                remedy="Detach it and attach it again: only the native transport (Linux 6.9 or newer) can go on.",
            )
        await self._no_meeting()
        await self._engine.flush()  # or the holder would have to, while everybody waits
        log.warning("%s: the engine ends to be started anew", self._volume)
        os._exit(RESTART)

    async def _stop(self, params: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], Sequence[int]]:
        """Flush, sign ``clean``, wipe. Answered again in the same words when ebsd asks again."""
        if self._stopped is not None:
            return self._stopped, ()
        await self._no_meeting()
        engine, body, claim, table = self._engine, self._body, self._claim, self._table
        if engine is None or body is None or claim is None or table is None:
            raise IncorrectState(reason="This volume process is not configured")
        if self._file is not None:
            with trio.move_on_after(10):
                await self._unmounted.wait()
            if not self._unmounted.is_set():
                raise IncorrectState(reason="The block file is still mounted")
        if self._ahead is not None:
            await self._ahead.end()
        if self._drainer is not None:
            await self._drainer.end()
        if self._leaves is not None:
            await self._leaves.end()
        try:
            digest = await engine.close()
        except OSError as exc:
            raise WritesFailed(volume=self._volume, reason=str(exc)) from exc
        stopped: dict[str, Any] = {"Generation": body.generation, "Record": None, "Left": []}
        if not engine.read_only:
            now = replace(claim, head=engine.head, size=engine.size)
            root = await trio.to_thread.run_sync(self._root_of_leaves, engine.head)
            clean = next_body(body, now, table, RecordState.CLEAN, digest, root)
            stopped = {
                "Generation": clean.generation,
                "Record": base64.b64encode(sign(clean, self._key)).decode(),
                "Left": sorted(engine.left)[:MAX_LEFT],
            }
        # Before anything that may fail: the key is wiped next, and nobody could sign again.
        self._stopped = stopped
        await trio.to_thread.run_sync(self._holder.done)
        self._wipe()
        # The durable map is authoritative now: nothing is left for a salvage.
        if self._live is not None and self._live_path is not None:
            self._live.close()
            remove_live_map(self._disk, self._live_path)
        return stopped, ()

    def _root_of_leaves(self, head: int) -> bytes:
        if self._leaves is None or self._live is None:
            return NO_HASH
        return self._leaves.root(named_layers(self._live.raw_entries) - {head})

    def _wipe(self) -> None:
        if self._factory is not None:
            self._factory.close()
        if self._key is not None:
            self._key.wipe()


def _sealed_files() -> int:
    """Raise the limit of open files as far as is of use, and return how many sealed layers may be kept open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(OPEN_FILES, hard)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return max(SEALED_FDS, wanted // 2) if wanted >= 4 * SEALED_FDS else SEALED_FDS


def main() -> None:
    """Harden, test the cryptography, and serve descriptor 0."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(name)s: %(message)s")
    secrecy.confine(log, Kind.VOLUME)
    holder, succession = meet_holder()
    own = VolumeProcess(holder=holder)
    try:
        if succession is None:
            trio.run(own.run, secrecy.take_parent())
        else:
            trio.run(own.go_on, succession)
        return
    except EbsdError as exc:
        log.error("%s", exc)
        holder.done()  # it would be no better with the next one
    except BaseException:  # noqa: BLE001 - the process ends of it
        traceback.print_exc()
    # At once: threads of the transport may be serving, with memory that the interpreter would clear away at its end.
    os._exit(1)


if __name__ == "__main__":
    main()
