"""The audit log's files: append in order, durable before the answer, whole again after a crash.

1. Segments ``log-<number of the first record>.jsonl`` follow one another; each begins with the start of a chain, so
   each can be verified by itself. So does every start of the broker.
2. A chain key lives in this process only. Its first value stands in the chain's first record, sealed to the public key.
3. After any failed write the chain is over: its key has moved on, and what is on the disk must be read anew. The
   next append begins another one, which names the head it found.
4. Space is reserved before an operation begins (``reserve``), so that what is done can also be recorded.
5. Nothing is ever removed: what no longer fits the chain at start is set aside as ``cut-...``, and said.
One thread at a time; nothing here knows what a record says.
"""

from __future__ import annotations

import base64
import contextlib
import logging
import os
import threading
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ebsd.crypto.kdf import LABEL_AUDIT
from ebsd.crypto.ratchet import KEY_BYTES, Ratchet
from ebsd.crypto.sealedbox import seal_to
from ebsd.crypto.secret import Secret
from ebsd.kms.audit import keys
from ebsd.kms.audit.lines import EMPTY, MAX_LINE, Head, body_of, encode_record, hash_of, line_of, parse_line
from ebsd.kms.audit.space import allocate
from ebsd.kms.statefiles import sync_directory, write_all

SEGMENT_BYTES: Final = 16 * 1024 * 1024
"""A segment of at least so many bytes is followed by another one."""
AHEAD: Final = 1024 * 1024
"""Bytes allocated beyond what is needed, while there is space."""

BEGIN: Final = "BeginAuditChain"
END: Final = "EndAuditChain"

MISFIT: Final = "do not follow the record before them"
"""Why lines were set aside that no power cut leaves so."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Found:
    """What the end of the log was when it was opened."""

    head: Head
    cut: dict[str, Any] | None = None
    """What did not fit the chain any more and was set aside."""


ChainRecord = Callable[[str, dict[str, Any]], dict[str, Any]]
"""Returns the record of a chain's begin or end, given its event name and details."""


class AuditLog:
    """The log in one directory, which the broker's lock guards."""

    def __init__(
        self,
        directory: Path,
        chain_record: ChainRecord,
        stamp: Callable[[], str],
        *,
        segment_bytes: int = SEGMENT_BYTES,
    ) -> None:
        self._directory = directory
        self._chain_record = chain_record
        self._stamp = stamp
        self._segment_bytes = self._rotate_at = segment_bytes
        self._lock = threading.Lock()
        self._fd: int | None = None
        self._ratchet: Ratchet | None = None
        self._chain = ""
        self._size = 0
        self._allocated = 0
        self._promised = 0
        self._head = EMPTY

    # --- what is known --------------------------------------------------------------------------------------

    @property
    def directory(self) -> Path:
        return self._directory

    @property
    def head(self) -> Head:
        """The head of what is in the file; durable for all records whose append was told to sync."""
        return self._head

    def segments(self) -> list[Path]:
        """Return the segments, oldest first."""
        return sorted(self._directory.glob("log-*.jsonl"))

    # --- space ----------------------------------------------------------------------------------------------

    def has_room(self) -> bool:
        """Say whether one more record is sure to fit, without asking the disk."""
        return self._fd is not None and self._size + self._promised + 2 * MAX_LINE <= self._allocated

    def make_room(self) -> None:
        """Open the log if need be and allocate space for one more record. Raises OSError."""
        with self._lock:
            if self._fd is None:
                self._open("recovery")
            if not self.has_room():
                self._allocate(self._fd)

    def promise(self) -> None:
        """Keep the space of one record until ``redeem``."""
        self._promised += MAX_LINE

    def redeem(self) -> None:
        self._promised -= MAX_LINE

    def _allocate(self, descriptor: int | None) -> None:
        assert descriptor is not None
        needed = self._size + self._promised + 2 * MAX_LINE
        try:
            allocate(descriptor, needed + AHEAD)
            self._allocated = needed + AHEAD
        except OSError:
            allocate(descriptor, needed)
            self._allocated = needed

    # --- begin and end --------------------------------------------------------------------------------------

    def open(self) -> None:
        """Read the end of the log, set aside what does not fit, and begin a chain. Raises OSError."""
        with self._lock:
            self._open("start")

    def _open(self, reason: str) -> None:
        self._directory.mkdir(mode=0o700, exist_ok=True)
        found = self._recover()
        segments = self.segments()
        path = segments[-1] if segments else self._directory / _segment_name(found.head.count)
        self._begin(path, found.head, reason, found.cut)

    def _recover(self) -> Found:
        """Return the last head that the files agree on; what follows it is set aside. Raises OSError."""
        cut: dict[str, Any] | None = None
        for path in reversed(self.segments()):
            head, good, why = _scan(path)
            size = path.stat().st_size
            if good < size:
                cut = self._set_aside(path, good, size, head, why)
            elif not good:
                path.unlink()
            if good:
                return Found(head, cut)
        return Found(EMPTY, cut)

    def _set_aside(self, path: Path, good: int, size: int, head: Head, why: str) -> dict[str, Any]:
        name = f"cut-{path.stem}-{self._stamp()}"
        aside = self._directory / name
        if good == 0:
            path.rename(aside)
        else:
            with path.open("rb") as source:
                source.seek(good)
                rest = source.read()
            with contextlib.suppress(OSError):  # a full disk must not keep the log from being whole again
                aside.write_bytes(rest)
            os.truncate(path, good)
        sync_directory(self._directory)
        _log.error("the audit log ended with %d bytes that %s; they are in %s", size - good, why, aside)
        return {"bytes": size - good, "reason": why, "file": name, "segment": path.name, "count": head.count}

    def _begin(self, path: Path, head: Head, reason: str, cut: dict[str, Any] | None) -> None:
        """Begin a chain at the end of a segment, which may be new; what was open before is closed then."""
        start = keys.load(self._directory)
        made = start is None
        if start is None:
            keys.make(self._directory)
            start = keys.load(self._directory)
            assert start is not None, "BUG: keys that were just written"
        is_new = not path.exists()
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        chain = str(uuid.uuid4())
        try:
            size = os.fstat(descriptor).st_size
            allocated = size + self._promised + 2 * MAX_LINE
            allocate(descriptor, allocated)
            with Secret.random(KEY_BYTES) as key:
                details = _start_details(chain, start, head, key)
                ratchet = Ratchet(key, LABEL_AUDIT)
            details |= {"reason": reason} | ({"newKeys": True} if made else {}) | ({"cut": cut} if cut else {})
            body = body_of(head.count, head.hash, encode_record(self._chain_record(BEGIN, details)))
            raw = line_of(ratchet.mac(body), body)
            try:
                write_all(descriptor, raw + b"\n")
                os.fsync(descriptor)
                sync_directory(self._directory)
                # After the record, so that no start key is ever skipped: a gap means that a chain was removed.
                start.save(self._directory)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, size)
                raise
        except BaseException:
            os.close(descriptor)
            if is_new:
                path.unlink(missing_ok=True)
            raise
        finally:
            start.wipe()
        self._forget()
        self._fd, self._ratchet, self._chain = descriptor, ratchet, chain
        self._size, self._allocated = size + len(raw) + 1, allocated
        self._rotate_at = self._segment_bytes
        self._head = Head(head.count + 1, hash_of(raw))
        if made:
            _log.warning(
                "the audit log has a new key pair: take %s off this host (ebsctl audit --take-key FILE)",
                self._directory / keys.VERIFICATION_KEY,
            )

    def close(self) -> None:
        """End the chain in order; may be called again. What cannot be written any more is left out."""
        with self._lock:
            if self._fd is None:
                return
            descriptor = self._fd
            with contextlib.suppress(OSError):
                self._append([self._chain_record(END, {"chain": self._chain})], sync=True)
                os.ftruncate(descriptor, self._size)  # gives back what was allocated ahead
            self._forget()

    def _forget(self) -> None:
        if self._ratchet is not None:
            self._ratchet.wipe()
        if self._fd is not None:
            os.close(self._fd)
        self._fd, self._ratchet, self._size, self._allocated = None, None, 0, 0

    # --- append ---------------------------------------------------------------------------------------------

    def append(self, records: Sequence[dict[str, Any]], *, sync: bool) -> None:
        """Append records in this order; with ``sync`` they, and all before them, are durable when it returns.

        Raises OSError when they are not in the log.
        """
        with self._lock:
            if self._fd is None:
                self._open("recovery")
            elif self._size >= self._rotate_at:
                self._rotate()
            self._append(records, sync=sync)

    def _append(self, records: Sequence[dict[str, Any]], *, sync: bool) -> None:
        assert self._fd is not None
        assert self._ratchet is not None
        head, lines = self._head, []
        for record in records:
            body = body_of(head.count, head.hash, encode_record(record))
            raw = line_of(self._ratchet.mac(body), body)
            head = Head(head.count + 1, hash_of(raw))
            lines += [raw, b"\n"]
        content = b"".join(lines)
        try:
            write_all(self._fd, content)
            if sync:
                os.fdatasync(self._fd)
        except BaseException:
            with contextlib.suppress(OSError):  # else the next start sets aside what it finds
                os.ftruncate(self._fd, self._size)
            self._forget()
            raise
        self._size += len(content)
        self._head = head

    def _rotate(self) -> None:
        try:
            self._begin(self._directory / _segment_name(self._head.count), self._head, "rotation", None)
        except OSError as exc:
            self._rotate_at = self._size + AHEAD
            _log.warning("the audit log goes on in a long segment: %s", exc.strerror)


def start_content(details: dict[str, Any], head: Head) -> bytes:
    """Return what the start key's MAC, and the sealing of the chain key, are bound to."""
    return b"\0".join(
        text.encode() for text in (details["chain"], str(details["index"]), details["publicKey"], str(head))
    )


def _start_details(chain: str, start: keys.StartKey, head: Head, key: Secret) -> dict[str, Any]:
    public = base64.b64encode(start.public).decode()
    details: dict[str, Any] = {"chain": chain, "index": start.index, "publicKey": public}
    content = start_content(details, head)
    sealed = seal_to(start.public, aad=content, plaintext=key)
    return {
        **details,
        "sealedKey": base64.b64encode(sealed).decode(),
        "startMac": start.mac(content + b"\0" + sealed).hex(),
        "previousHead": str(head),
    }


def _scan(path: Path) -> tuple[Head, int, str]:
    """Return (head after the last line that fits, bytes up to there, why the next one does not fit)."""
    head, good = EMPTY, 0
    with path.open("rb") as file:
        for raw in file:
            if not raw.endswith(b"\n"):
                return head, good, "are no whole record"
            line = parse_line(raw[:-1])
            if line is None:
                return head, good, "are no record"
            if good and (line.number, line.prev) != (head.count, head.hash):
                return head, good, MISFIT
            head, good = line.head, good + len(raw)
    return head, good, ""


def _segment_name(number: int) -> str:
    return f"log-{number:015d}.jsonl"
