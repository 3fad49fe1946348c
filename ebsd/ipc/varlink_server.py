"""Varlink over a Unix socket for trio: one task per connection, one call after the other on each.

What a client can cause stays on its own connection:

1. A frame has at most 1 MiB and 16 descriptors, and ``frame_deadline`` seconds from its first byte to its
   last; a client has as long to take a reply. A uid has ``max_connections_per_uid`` connections, and with
   ``calls_per_uid`` that many calls are handled at a time, the others in turn: many connections buy no larger share.
2. A call that the interface file does not allow never reaches a handler.
3. A handler runs to its end, whether its client is still there or not: only the sending of the reply fails,
   quietly. It is cancelled only with the whole server.
4. Descriptors belong to the message whose bytes they came with; what the handler did not take is closed.
5. close(2) of what a client sent may take as long as he likes (SO_LINGER, a FUSE file of his), so it happens in
   threads, a few for each uid, and so does that of a connection, which may have descriptors nobody received.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import trio

from ebsd.domain.errors import EbsdError, InvalidParameterValue, ProtocolError, TooManyConnections
from ebsd.ipc.incidents import OnIncident, as_ebsd_error, log_incident
from ebsd.ipc.peer import Peer, peer_of, refuse_unusable
from ebsd.ipc.sockets import MAX_DESCRIPTORS, close_all, recv_with_fds, send_with_fds
from ebsd.wire import messages
from ebsd.wire.framing import FrameReader, encode
from ebsd.wire.idl import Interface
from ebsd.wire.messages import VarlinkError

MAX_CALL_DESCRIPTORS: Final = 16
"""Descriptors of one call; no method needs more than two."""

ACCEPT_PAUSE: Final = 0.1
"""Seconds before accepting again when descriptors or memory have run out."""

_CLOSERS: Final = 2
"""Threads that close what one uid sent."""

REFUSAL_DEADLINE: Final = 1.0
"""Seconds in which a client must take the error that ends its connection."""

_CHUNK: Final = 65536
_OUT_OF_RESOURCES: Final = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))
# The client of this one connection was too quick, or a firewall said no (accept(2)).
_CLIENT_GONE: Final = frozenset((errno.ECONNABORTED, errno.EPERM, errno.EPROTO, errno.EAGAIN))

_log = logging.getLogger(__name__)

Stream = Callable[[dict[str, Any], Sequence[int]], Awaitable[None]]


@dataclass
class Call:
    """One call, as its handler gets it. Without ``received`` and ``streamer`` it can be made in a test."""

    peer: Peer
    method: str
    """With its interface: ``io.ebsd.EC2.CreateVolume``."""
    parameters: dict[str, Any]
    more: bool = False
    received: list[int | None] = field(default_factory=list, repr=False)
    """Descriptors that came with the call; None where one was taken."""
    streamer: Stream | None = field(default=None, repr=False)

    def take_fd(self, index: int) -> int:
        """Return a descriptor that came with the call; it is the handler's from now on.

        Raises InvalidParameterValue when there is none of this index, or when it was taken before.
        """
        fd = self.received[index] if 0 <= index < len(self.received) else None
        if fd is None:
            raise InvalidParameterValue(
                value=index, parameter="descriptor index", reason="no such descriptor came with the call"
            )
        self.received[index] = None
        return fd

    def lent_fd(self, index: int) -> int:
        """Return a descriptor that came with the call and stays the call's: it is closed after the handler.

        Raises as ``take_fd``.
        """
        fd = self.take_fd(index)
        self.received[index] = fd
        return fd

    async def stream(self, parameters: dict[str, Any], fds: Sequence[int] = ()) -> None:
        """Send a reply that others follow, when the client asked for several; else do nothing.

        The descriptors are closed in any case. A client that is gone is no error.
        """
        if self.more and self.streamer is not None:
            await self.streamer(parameters, fds)
        else:
            close_all(fds)


@dataclass
class Reply:
    """A reply with descriptors: its parameters name them by index. They are closed after sending."""

    parameters: dict[str, Any] = field(default_factory=dict)
    fds: Sequence[int] = ()


Handler = Callable[[Call], Awaitable[Reply | dict[str, Any] | None]]
"""None means a reply without members."""


class VarlinkServer:
    """The services of one socket.

    ``services`` maps interface names to method names to handlers. ``admit`` refuses a peer by raising
    EbsdError, which is sent to it. ``frame_deadline`` and ``idle_deadline`` (between calls; None: for ever)
    are seconds. ``check_replies`` checks what handlers return against the interface file, for tests.

    Raises ValueError when an interface file has a method without a handler, or the reverse.
    """

    def __init__(
        self,
        *,
        vendor: str,
        product: str,
        version: str,
        url: str,
        services: Mapping[str, Mapping[str, Handler]],
        admit: Callable[[Peer], None] = refuse_unusable,
        max_connections_per_uid: int = 64,
        calls_per_uid: int | None = None,
        frame_deadline: float = 30.0,
        idle_deadline: float | None = None,
        on_incident: OnIncident | None = None,
        check_replies: bool = False,
    ) -> None:
        self._interfaces = {name: Interface.load(name) for name in (messages.SERVICE, *services)}
        for name, handlers in services.items():
            if odd := set(handlers) ^ set(self._interfaces[name].methods):
                raise ValueError(f"{name}: methods without handler or handlers without method: {sorted(odd)}")
        own = {"GetInfo": self._get_info, "GetInterfaceDescription": self._get_interface_description}
        self._services: dict[str, Mapping[str, Handler]] = {messages.SERVICE: own, **services}
        # Errors outside a call need an interface too.
        self.first = next(iter(services), messages.SERVICE)
        self._info = {"vendor": vendor, "product": product, "version": version, "url": url}
        self._admit = admit
        self._max_per_uid = max_connections_per_uid
        self.frame_deadline = frame_deadline
        self.idle_deadline = math.inf if idle_deadline is None else idle_deadline
        self._on_incident = on_incident or log_incident
        self._check_replies = check_replies
        self._connections: Counter[int] = Counter()
        self._calls_per_uid = calls_per_uid
        self._turns: dict[int, trio.Semaphore] = {}
        """By uid; there while the uid has connections."""
        self._closers: dict[int, trio.CapacityLimiter] = {}

    @property
    def connections(self) -> int:
        """Open connections, refused ones left out."""
        return self._connections.total()

    async def serve(
        self,
        listener: trio.socket.SocketType,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Accept and serve until cancelled; then the listener and all connections are closed."""
        with listener:
            async with trio.open_nursery() as nursery:
                task_status.started()
                starved = False
                while True:
                    try:
                        sock, _ = await listener.accept()
                        starved = False
                    except OSError as exc:
                        if exc.errno in _OUT_OF_RESOURCES:
                            if not starved:  # one line for each shortage, not ten in a second
                                _log.warning("no connection can be accepted: %s", os.strerror(exc.errno))
                            starved = True
                            await trio.sleep(ACCEPT_PAUSE)
                        elif exc.errno not in _CLIENT_GONE:
                            raise
                        continue
                    nursery.start_soon(self._connection, sock)

    async def _connection(self, sock: trio.socket.SocketType) -> None:
        with sock:
            try:
                await self._admitted(sock)
            except Exception as exc:  # noqa: BLE001 - the other connections share the nursery
                as_ebsd_error(exc, self._on_incident)

    async def close_for(self, uid: int, fds: Sequence[int]) -> None:
        """Close descriptors in a thread, when it is the uid's turn."""
        if not fds:
            return
        limiter = self._closers.setdefault(uid, trio.CapacityLimiter(_CLOSERS))
        started = threading.Lock()  # whoever has it closes them: the thread, or we when the server ends before it began

        def work() -> None:
            if started.acquire(blocking=False):
                close_all(fds)

        try:
            await trio.to_thread.run_sync(work, limiter=limiter, abandon_on_cancel=True)
        except trio.Cancelled:
            work()
            raise

    async def _admitted(self, sock: trio.socket.SocketType) -> None:
        peer = peer_of(sock)
        connection = _Connection(self, sock, peer)
        if self._connections[peer.uid] >= self._max_per_uid:
            await connection.refuse(TooManyConnections(uid=peer.uid, limit=self._max_per_uid))
            await self.close_for(peer.uid, [sock.detach()])
            return
        self._connections[peer.uid] += 1
        try:
            self._admit(peer)
            await connection.run()
        except EbsdError as exc:
            await connection.refuse(exc)
        finally:
            try:
                await connection.close()
            finally:
                self._connections[peer.uid] -= 1
                if not self._connections[peer.uid]:
                    del self._connections[peer.uid]
                    self._turns.pop(peer.uid, None)
                    self._closers.pop(peer.uid, None)

    async def answer_in_turn(self, call: Call) -> tuple[bytes, Sequence[int]]:
        """Return ``answer`` when it is the uid's turn."""
        if self._calls_per_uid is None:
            return await self.answer(call)
        async with self._turns.setdefault(call.peer.uid, trio.Semaphore(self._calls_per_uid)):
            return await self.answer(call)

    async def answer(self, call: Call) -> tuple[bytes, Sequence[int]]:
        """Return the frame of the last reply to a call, and its descriptors; raises nothing but Cancelled."""
        interface, name = messages.split_method(call.method)
        fds: Sequence[int] = ()
        try:
            handler = self._handler(interface, name)
            self._check_parameters(interface, name, call.parameters)
            result = await handler(call)
            reply = result if isinstance(result, Reply) else Reply(result or {})
            fds = reply.fds
            if not isinstance(reply.parameters, dict):
                raise AssertionError(f"BUG: {call.method} returned {type(reply.parameters).__name__}")
            if self._check_replies:
                self._check_result(interface, name, reply.parameters)
            return encode(messages.make_reply(reply.parameters)), fds
        except VarlinkError as exc:
            message = messages.make_error(exc.name, exc.parameters)
        except Exception as exc:  # noqa: BLE001 - answered, and reported as an incident
            message = messages.make_service_error(interface, as_ebsd_error(exc, self._on_incident))
        close_all(fds)
        return encode(message), ()

    def _handler(self, interface: str, name: str) -> Handler:
        handlers = self._services.get(interface)
        if handlers is None:
            raise messages.interface_not_found(interface)
        handler = handlers.get(name)
        if handler is None:
            raise messages.method_not_found(f"{interface}.{name}")
        return handler

    def _check_parameters(self, interface: str, name: str, parameters: dict[str, Any]) -> None:
        try:
            self._interfaces[interface].check_parameters(name, parameters)
        except EbsdError as exc:
            if interface == messages.SERVICE:  # it declares no ServiceError
                raise messages.invalid_parameter(str(exc.facts.get("parameter", ""))) from exc
            raise

    def _check_result(self, interface: str, name: str, parameters: dict[str, Any]) -> None:
        try:
            self._interfaces[interface].check_result(name, parameters)
        except EbsdError as exc:
            raise AssertionError(f"BUG: {interface}.{name} returned what it does not declare: {exc}") from exc

    async def _get_info(self, _call: Call) -> dict[str, Any]:
        return {**self._info, "interfaces": list(self._interfaces)}

    async def _get_interface_description(self, call: Call) -> dict[str, Any]:
        name = call.parameters["interface"]
        if name not in self._interfaces:
            raise messages.interface_not_found(name)
        return {"description": self._interfaces[name].description}


class _Connection:
    """One client: reads a call, answers it, reads the next."""

    def __init__(self, server: VarlinkServer, sock: trio.socket.SocketType, peer: Peer) -> None:
        self._server = server
        self._sock = sock
        self._peer = peer
        self._reader = FrameReader()
        self._unfinished: list[int] = []
        """Descriptors of the frame that is not complete yet."""
        self._unwanted: list[int] = []
        """Descriptors to be closed before the next reply."""
        self._broken = False

    async def run(self) -> None:
        """Serve until the client hangs up or a deadline passes. Raises ProtocolError."""
        while (received := await self._receive()) is not None:
            try:
                while received:
                    message, fds = received.pop(0)
                    await self._call(message, fds)
            finally:
                for _, fds in received:
                    self._unwanted += fds
            self._reader.check()
            if self._broken:
                return

    async def close(self) -> None:
        """Close what is left, and then the connection itself."""
        self._unwanted += self._unfinished
        self._unfinished = []
        await self._server.close_for(self._peer.uid, [*self._take_unwanted(), self._sock.detach()])

    def _take_unwanted(self) -> list[int]:
        fds, self._unwanted = self._unwanted, []
        return fds

    async def refuse(self, error: EbsdError) -> None:
        """Say why the connection ends, unless the client does not take it."""
        if not self._broken:
            with trio.move_on_after(REFUSAL_DEADLINE), contextlib.suppress(OSError):
                reply = messages.make_service_error(self._server.first, error)
                await send_with_fds(self._sock, encode(reply))

    async def _receive(self) -> list[tuple[dict[str, Any], list[int]]] | None:
        """Return at least one message, each with its descriptors; None when the connection is over."""
        deadline = trio.current_time() + self._wait()
        while True:
            with trio.CancelScope(deadline=deadline) as scope:
                try:
                    # Room for all that fit a message: what does not is closed by the kernel, here and now.
                    data, fds = await recv_with_fds(self._sock, _CHUNK, max_fds=MAX_DESCRIPTORS)
                except OSError:  # reset by the client
                    return None
            if scope.cancelled_caught:
                if self._reader.partial:
                    raise ProtocolError(reason="a message took too long to arrive")
                return None
            if not data:
                self._unwanted += fds
                return None
            was_partial = self._reader.partial
            complete = self._assign(self._feed(data, fds), fds)
            if complete:
                return complete
            if not was_partial:
                deadline = trio.current_time() + self._wait()

    def _wait(self) -> float:
        return self._server.frame_deadline if self._reader.partial else self._server.idle_deadline

    def _feed(self, data: bytes, fds: list[int]) -> list[dict[str, Any]]:
        try:
            return self._reader.feed(data)
        except ProtocolError:
            self._unwanted += fds
            raise

    def _assign(self, complete: list[dict[str, Any]], fds: list[int]) -> list[tuple[dict[str, Any], list[int]]]:
        """Give each message its descriptors: what came now belongs to the last byte, so to the last one."""
        result: list[tuple[dict[str, Any], list[int]]] = [(message, []) for message in complete]
        if result:
            result[0][1].extend(self._unfinished)
            self._unfinished = []
        if self._reader.partial or not result:
            self._unfinished += fds
        else:
            result[-1][1].extend(fds)
        if len(self._unfinished) > MAX_CALL_DESCRIPTORS or any(
            len(owned) > MAX_CALL_DESCRIPTORS for _, owned in result
        ):
            for _, owned in result:
                self._unwanted += owned
            raise ProtocolError(reason=f"a message has more than {MAX_CALL_DESCRIPTORS} descriptors")
        return result

    async def _call(self, message: dict[str, Any], fds: list[int]) -> None:
        received: list[int | None] = list(fds)
        try:
            asked = messages.parse_call(message)
            if not asked.oneway and await self._has_hung_up():
                self._broken = True  # nobody waits for the answer, so it was given up: late it would surprise
                return
            call = Call(self._peer, asked.method, asked.parameters, asked.more, received, self._stream)
            reply, reply_fds = await self._server.answer_in_turn(call)
            # Before the reply: whoever has it may count on the daemon not holding his file or device any more.
            await self._close_left(received)
            if asked.oneway:
                close_all(reply_fds)
            else:
                await self._send(reply, reply_fds)
        except VarlinkError as exc:
            await self._send(encode(messages.make_error(exc.name, exc.parameters)))
        finally:
            self._leave(received)

    async def _has_hung_up(self) -> bool:
        """Say whether the client has closed its end; one that only writes no more still reads."""
        try:
            await self._sock.sendmsg([b""])
        except OSError:
            return True
        return False

    async def _close_left(self, received: list[int | None]) -> None:
        self._leave(received)
        await self._server.close_for(self._peer.uid, self._take_unwanted())

    def _leave(self, received: list[int | None]) -> None:
        """Have the descriptors closed that the handler did not take."""
        self._unwanted += [fd for fd in received if fd is not None]
        received[:] = [None] * len(received)

    async def _stream(self, parameters: dict[str, Any], fds: Sequence[int]) -> None:
        try:
            frame = encode(messages.make_reply(parameters, continues=True))
        except BaseException:
            close_all(fds)
            raise
        await self._send(frame, fds)

    async def _send(self, frame: bytes, fds: Sequence[int] = ()) -> None:
        """Send, or find out that the client is gone or takes too long; close the descriptors."""
        try:
            if not self._broken:
                self._broken = True  # until all of it is sent
                with trio.move_on_after(self._server.frame_deadline), contextlib.suppress(OSError):
                    await send_with_fds(self._sock, frame, fds)
                    self._broken = False
        finally:
            close_all(fds)
