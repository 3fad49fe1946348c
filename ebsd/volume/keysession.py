"""The volume process's end of a key session: one question, one answer, the key straight into locked memory.

The packets are described in ``kms/FORMAT.md``.
"""

from __future__ import annotations

import json
import socket
import struct
from dataclasses import dataclass
from typing import Any, Final

from ebsd.crypto.secret import Secret
from ebsd.domain.errors import KeyServiceUnavailable, RemoteError
from ebsd.domain.ids import AccountId

REQUEST: Final = b"EBSDKS01"
ANSWER: Final = b"EBSDKA01"
DATA_KEY_BYTES: Final = 64
_HEADER: Final = struct.Struct("<8sII")
_MAX_ANSWER: Final = 16384
DEADLINE: Final = 30.0


@dataclass(frozen=True, slots=True)
class Anchor:
    """What the key service itself knows of a resource; nothing in the store can change it."""

    resource: str
    owner: AccountId
    encrypted: bool
    key_arn: str | None
    key_check_value: bytes | None
    """First 16 bytes of a derivation of the data key; None until the key was first seen."""
    floor: int
    authority: str | None = None
    """Whose signed record covers the map until the resource's own is signed, as the key service knows it."""
    authority_floor: int = 0
    passed: int = 0
    """Highest generation that an accepted rollback gave up."""


@dataclass(frozen=True, slots=True)
class Answer:
    anchor: Anchor
    data_key: Secret | None


def ask(session: socket.socket) -> Answer:
    """Ask the session for its one answer and close it. Blocks up to DEADLINE seconds.

    Raises RemoteError with the broker's code (for example DisabledException or Ebsd.IntegrityFailure) and
    KeyServiceUnavailable when the broker does not answer or answers nonsense.
    """
    with session:
        session.settimeout(DEADLINE)
        try:
            session.send(REQUEST)
            body, failed = _parse(_receive_answer(session))
            if failed:
                raise RemoteError(str(body["Code"]), str(body["Message"]), str(body.get("Hint", "")))
            anchor = _anchor(body)
            return Answer(anchor, _receive_key(session) if anchor.encrypted else None)
        except TimeoutError as exc:
            raise KeyServiceUnavailable(reason=f"it did not answer within {DEADLINE:g} seconds") from exc
        except OSError as exc:
            raise KeyServiceUnavailable(reason=exc.strerror) from exc
        except (ValueError, KeyError, TypeError, struct.error, RecursionError) as exc:
            raise KeyServiceUnavailable(reason="its answer cannot be understood") from exc


def _receive_answer(session: socket.socket) -> bytes:
    packet, _, flags, _ = session.recvmsg(_MAX_ANSWER)
    if flags & socket.MSG_TRUNC:
        raise ValueError("an answer that is longer than any")
    return packet


def _parse(packet: bytes) -> tuple[dict[str, Any], bool]:
    magic, status, length = _HEADER.unpack_from(packet)
    if magic != ANSWER or len(packet) != _HEADER.size + length or status not in (0, 1):
        raise ValueError("not an answer of a key session")
    body = json.loads(packet[_HEADER.size :])
    if not isinstance(body, dict):
        raise TypeError("the answer is not an object")
    return body, status == 1


def _anchor(body: dict[str, Any]) -> Anchor:
    kcv = body.get("kcv")
    encrypted, floor = body["encrypted"], body["floor"]
    authority, authority_floor = body.get("authority"), body.get("authority_floor", 0)
    passed = body.get("passed", 0)
    if not isinstance(encrypted, bool) or not all(type(n) is int for n in (floor, authority_floor, passed)):
        raise TypeError("an anchor with members of wrong types")
    return Anchor(
        str(body["resource"]),
        AccountId(str(body["owner"])),
        encrypted,
        body.get("key_arn"),
        bytes.fromhex(kcv) if kcv else None,
        floor,
        None if authority is None else str(authority),
        authority_floor,
        passed,
    )


def _receive_key(session: socket.socket) -> Secret:
    key = Secret(DATA_KEY_BYTES)
    try:
        received, _, flags, _ = session.recvmsg_into([key.view])
    except BaseException:
        key.wipe()
        raise
    if received != DATA_KEY_BYTES or flags & socket.MSG_TRUNC:
        key.wipe()
        raise ValueError("a data key of another length")
    return key
