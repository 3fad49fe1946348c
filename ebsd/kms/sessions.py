"""Key sessions: a connected socket that answers one question about one resource, once.

1. The socket is the identity: ebsd gets one end, the volume process inherits it, nobody else has it.
2. Everything is checked when the session opens and again when it is asked: a key disabled or a grant retired in
   between counts.
3. What came of it is recorded, durably, before it is answered.
4. The data key crosses raw, in a packet of its own, straight from secret memory.
5. A session ends with its answer, with a wrong question, or after its deadline. Packets: FORMAT.md.
"""

from __future__ import annotations

import errno
import json
import logging
import socket
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

import trio

from ebsd.crypto.secret import Secret
from ebsd.domain.errors import EbsdError, KeyServiceUnavailable
from ebsd.ipc.incidents import as_ebsd_error, log_incident
from ebsd.kms.records import Anchor
from ebsd.wire.messages import error_members

REQUEST: Final = b"EBSDKS01"
ANSWER: Final = b"EBSDKA01"
OK: Final = 0
ERROR: Final = 1
DEADLINE: Final = 30.0
"""Seconds from the opening of a session to the end of its answer."""
MAX_SESSIONS: Final = 256

_HEADER: Final = struct.Struct("<8sII")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Answer:
    anchor: Anchor
    data_key: Secret | None
    """None for an unencrypted resource; wiped by the session once it is sent."""


Question = Callable[[], Awaitable[Answer]]
"""Checks and decrypts at the moment of the question; raises EbsdError."""
Witness = Callable[[EbsdError | None], Awaitable[None]]
"""Records what came of the question, durably, before it is answered; raises EbsdError when that cannot be done."""


class Sessions:
    """The sessions that are open; their tasks live in the given nursery."""

    def __init__(self, nursery: trio.Nursery, *, deadline: float = DEADLINE, limit: int = MAX_SESSIONS) -> None:
        self._nursery = nursery
        self._deadline = deadline
        self._limit = limit
        self._open = 0

    @property
    def count(self) -> int:
        return self._open

    def open(self, resource: str, question: Question, witness: Witness) -> int:
        """Return the descriptor of a new session, the receiver's to close; raises KeyServiceUnavailable."""
        if self._open >= self._limit:
            raise KeyServiceUnavailable(reason=f"{self._limit} key sessions are open already")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        self._open += 1
        self._nursery.start_soon(self._serve, trio.socket.from_stdlib_socket(ours), resource, question, witness)
        return theirs.detach()

    async def _serve(self, sock: trio.socket.SocketType, resource: str, question: Question, witness: Witness) -> None:
        try:
            with sock, trio.move_on_after(self._deadline) as scope:
                await self._answer(sock, resource, question, witness)
            if scope.cancelled_caught:
                _log.warning("key session of %s: nobody asked within %g seconds", resource, self._deadline)
        except OSError as exc:
            _log.warning("key session of %s: %s", resource, exc.strerror)
        finally:
            self._open -= 1

    async def _answer(self, sock: trio.socket.SocketType, resource: str, question: Question, witness: Witness) -> None:
        packet = await sock.recv(len(REQUEST) + 1)
        if packet != REQUEST:
            if packet:  # an end of file is a volume process that did not come so far
                _log.warning("key session of %s: not a question", resource)
            return
        try:
            answer = await _witnessed(question, witness)
        except Exception as exc:  # noqa: BLE001 - answered, and reported unless it is an EbsdError
            error = as_ebsd_error(exc, log_incident)
            _log.info("key session of %s refused: %s", resource, error.code)
            await sock.send(_packet(ERROR, dict(error_members(error))))
            return
        try:
            await sock.send(_packet(OK, anchor_members(answer.anchor)))
            if answer.data_key is not None:
                await _send_key(sock, answer.data_key)
        finally:
            if answer.data_key is not None:
                answer.data_key.wipe()


async def _witnessed(question: Question, witness: Witness) -> Answer:
    """Return the answer once it is recorded; one that cannot be is wiped."""
    try:
        answer = await question()
    except trio.Cancelled:
        with trio.CancelScope(shield=True):  # a back end elsewhere may have answered already
            await _tell(witness, KeyServiceUnavailable(reason="the key session ended before its answer"))
        raise
    except Exception as exc:
        error = as_ebsd_error(exc, log_incident)
        await _tell(witness, error)
        raise error from exc
    try:
        await witness(None)
    except BaseException:
        if answer.data_key is not None:
            answer.data_key.wipe()
        raise
    return answer


async def _tell(witness: Witness, error: EbsdError) -> None:
    """Have a refusal recorded; it is one, recorded or not."""
    try:
        await witness(error)
    except EbsdError as problem:
        _log.error("a refusal was not recorded: %s", problem.message)


def anchor_members(anchor: Anchor) -> dict[str, Any]:
    """Return what a session says of an anchor; the names are the session protocol's."""
    return {
        "resource": anchor.resource,
        "owner": anchor.owner,
        "encrypted": anchor.encrypted,
        "key_arn": anchor.key_arn,
        "kcv": anchor.kcv,
        "floor": anchor.floor,
        "passed": anchor.passed,
        "authority": anchor.authority,
        "authority_floor": anchor.authority_floor,
    }


def _packet(status: int, members: dict[str, Any]) -> bytes:
    body = json.dumps(members).encode()
    return _HEADER.pack(ANSWER, status, len(body)) + body


async def _send_key(sock: trio.socket.SocketType, key: Secret) -> None:
    try:
        await sock.send(key.view)
        return
    except OSError as exc:
        # A kernel that cannot copy out of memfd_secret pages says so; the copy is wiped at once.
        if exc.errno != errno.EFAULT:
            raise
    copy = bytearray(key.view)
    try:
        await sock.send(copy)
    finally:
        copy[:] = bytes(len(copy))
