"""The audit log as the broker's tasks use it: admission before an operation, its record before the answer.

1. ``admitted`` refuses an operation whose record might not fit, before anything of it happened.
2. Records that wait at the same time are written and synced together; their order is that of ``record`` calls.
3. Heads go to the broker's log, so to the journal: what was told to another machine cannot be cut off unseen.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import trio

from ebsd.domain.errors import AuditLogFull, AuditLogUnavailable, EbsdError
from ebsd.domain.ids import format_uuid
from ebsd.kms.audit import records
from ebsd.kms.audit.lines import Head
from ebsd.kms.audit.log import SEGMENT_BYTES, AuditLog

HEAD_EVERY: Final = 64
"""Records between two heads in the log, at most."""
HEAD_PAUSE: Final = 60.0
"""Seconds between two looks for a head that was not told yet."""

_log = logging.getLogger("ebsd.kms.audit")


@dataclass(slots=True)
class _Entry:
    record: dict[str, Any]
    sync: bool
    done: bool = False
    problem: EbsdError | None = None


class Trail:
    """One open audit log and the records on their way to it."""

    def __init__(
        self,
        directory: Path,
        *,
        clock: Callable[[], str],
        random: Callable[[int], bytes] = os.urandom,
        segment_bytes: int = SEGMENT_BYTES,
    ) -> None:
        self._clock = clock
        self._random = random
        self._log = AuditLog(directory, self._chain_record, self._file_stamp, segment_bytes=segment_bytes)
        self._queue: list[_Entry] = []
        self._writing = trio.Lock()
        self._limiter = trio.CapacityLimiter(1)
        self._told = 0

    @property
    def log(self) -> AuditLog:
        return self._log

    def open(self) -> None:
        """Open the log; blocks. A log that cannot be opened is tried again at each operation, which is refused else."""
        try:
            self._log.open()
        except OSError as exc:
            _log.error("the audit log cannot be opened, so operations are refused: %s", exc)
            return
        self._tell(self._log.head)

    async def close(self) -> None:
        """Write what waits, end the chain; may be called again."""
        with trio.CancelScope(shield=True):
            async with self._writing:
                await trio.to_thread.run_sync(self._log.close, limiter=self._limiter)
        self._tell(self._log.head)

    def stamp(self, request_id: str | None = None) -> records.Stamp:
        """Return time and fresh ids; a request id may be given."""
        return records.Stamp(self._clock(), self._id(), request_id or self._id(), self._id())

    # --- recording ------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def admitted(self) -> AsyncIterator[None]:
        """Hold the space of one record for the body. Raises AuditLogFull or AuditLogUnavailable before it begins."""
        if not self._log.has_room():
            try:
                async with self._writing:
                    if not self._log.has_room():
                        await trio.to_thread.run_sync(self._log.make_room, limiter=self._limiter)
            except OSError as exc:
                raise _as_error(exc) from exc
        self._log.promise()
        try:
            yield
        finally:
            self._log.redeem()

    async def record(self, record: dict[str, Any], *, sync: bool = True) -> None:
        """Return when the record is in the log; with ``sync``, when it is durable. Raises what ``admitted`` raises."""
        entry = _Entry(record, sync)
        self._queue.append(entry)
        with trio.CancelScope(shield=True):
            async with self._writing:
                if not entry.done:  # else somebody wrote it with his own
                    await self._write()
        if entry.problem is not None:
            raise entry.problem

    async def key_event(self, name: str, key: str, details: Mapping[str, Any]) -> None:
        """Record what the broker did to a key by itself; a failure is told in the log, for it has happened already."""
        try:
            await self.record(records.service_record(name, self.stamp(), {"keyId": key, **details}, key))
        except EbsdError as exc:
            _log.error("%s was not recorded: %s", name, exc.message)

    async def _write(self) -> None:
        batch, self._queue = self._queue, []
        sync = any(entry.sync for entry in batch)
        problem: EbsdError | None = None
        try:
            content = [entry.record for entry in batch]
            await trio.to_thread.run_sync(lambda: self._log.append(content, sync=sync), limiter=self._limiter)
        except OSError as exc:
            problem = _as_error(exc)
            _log.error("the audit log cannot be written: %s", exc)
        for entry in batch:
            entry.done, entry.problem = True, problem
        if self._log.head.count - self._told >= HEAD_EVERY:
            self._tell(self._log.head)

    # --- heads ----------------------------------------------------------------------------------------------

    async def tell_heads(self) -> None:
        """Tell the head now and then, for as long as it moves; never returns."""
        while True:
            await trio.sleep(HEAD_PAUSE)
            if self._log.head.count != self._told:
                self._tell(self._log.head)

    def _tell(self, head: Head) -> None:
        self._told = head.count
        _log.info("audit head %s", head)

    # --- parts ----------------------------------------------------------------------------------------------

    def _id(self) -> str:
        return format_uuid(self._random(16))

    def _file_stamp(self) -> str:
        return "".join(character for character in self._clock() if character.isalnum())

    def _chain_record(self, name: str, details: dict[str, Any]) -> dict[str, Any]:
        return records.service_record(name, self.stamp(), details)


def _as_error(exc: OSError) -> EbsdError:
    if exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return AuditLogFull()
    return AuditLogUnavailable(reason=exc.strerror or str(exc))
