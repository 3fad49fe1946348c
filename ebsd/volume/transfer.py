"""What imports and exports share: threads that work through pieces of a volume, and the process that serves ebsd.

1. ``Transfer.run`` never raises; ``progress`` tells how it ended. All but ``run`` may be called from any thread.
2. Steps have at most STEP bytes, as those of a copy, and begin at multiples of it. Pieces are claimed one by one, under
   a lock, and worked on side by side: cipher, digests and I/O leave the lock of the interpreter. Between two batches
   nobody works, so what was claimed before is done.
3. The process ends with its channel. A thread that hangs in a file of the client's is left to the end of the process.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import mmap
import os
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Generic, TypeVar

import trio

from ebsd.crypto.codec import CodecFactory
from ebsd.crypto.secret import Secret
from ebsd.domain.errors import EbsdError, HostFailure, IncorrectState, NoSpace
from ebsd.domain.units import MIB
from ebsd.ipc.channel import ChannelHandler
from ebsd.ipc.incidents import as_ebsd_error, log_incident
from ebsd.volume import keysession
from ebsd.volume.copier import STEP
from ebsd.volume.pacing import Pacer
from ebsd.volume.worker import run_worker, serve_until_gone

SYNC_BYTES: Final = 256 * MIB
SYNC_SECONDS: Final = 2.0
"""How much, or how long, is moved at most between two syncs: what a kill can cost."""

STOP_SECONDS: Final = 5.0

_SPACE: Final = (errno.ENOSPC, errno.EDQUOT)

Piece = TypeVar("Piece")


@contextlib.contextmanager
def writing(what: str) -> Iterator[None]:
    """Turn errors of writes and syncs into NoSpace or HostFailure."""
    try:
        yield
    except OSError as exc:
        if exc.errno in _SPACE:
            raise NoSpace(where=what) from exc
        raise HostFailure(where=what, reason=exc.strerror or str(exc)) from exc


def aligned_buffer() -> memoryview:
    """Return STEP bytes that begin at a page, as what goes past the page cache must."""
    return memoryview(mmap.mmap(-1, STEP))


class Transfer(ABC, Generic[Piece]):
    """The data of one import or export."""

    def __init__(self, threads: int, rate: int) -> None:
        """``rate``: bytes per second at most, 0 for no limit."""
        self.pacer = Pacer(rate)
        self.state = "working"
        """working, done or failed."""
        self.error: EbsdError | None = None
        self.done = 0
        """Bytes that were moved, those of earlier runs included."""
        self.total = 0
        self.stopping = threading.Event()
        self._threads = threads
        self._claiming = threading.Lock()
        self._counting = threading.Lock()
        self._buffers = [aligned_buffer() for _ in range(threads)]

    # --- what a direction does

    @abstractmethod
    def transfer(self) -> bool:
        """Move everything; False when stopped before the end."""

    @abstractmethod
    def cost(self, piece: Piece) -> int:
        """Return the bytes of a piece that count against the rate."""

    @abstractmethod
    def details(self) -> dict[str, Any]:
        """Return what ``progress`` says beside State, Done, Total and Error."""

    @abstractmethod
    def finish(self) -> dict[str, Any]:
        """Do what is left when all was moved, and return the answer of ``finish``; blocks."""

    def release(self) -> None:
        """Give back what the thread used, at the end of ``run``."""

    # --- for everybody

    def progress(self) -> dict[str, Any]:
        # The error is set before the state, and the state read before the error.
        state = self.state
        answer = {"State": state, "Done": self.done, "Total": self.total, **self.details()}
        if self.error is not None:
            answer["Error"] = {"Code": self.error.code, "Message": self.error.message, "Hint": self.error.hint}
        return answer

    def stop(self) -> None:
        """Make ``run`` return after its present steps."""
        self.stopping.set()

    def fail(self, error: EbsdError) -> None:
        self.error = error
        self.state = "failed"

    def run(self) -> None:
        """Move everything. Raises nothing."""
        try:
            if self.transfer():
                self.state = "done"
        except EbsdError as exc:
            self.fail(exc)
        except Exception as exc:  # noqa: BLE001 - reported as an incident
            self.fail(as_ebsd_error(exc, log_incident))
        finally:
            for buffer in self._buffers:
                buffer[:] = bytes(STEP)  # a step that failed may have left plaintext
            self.release()

    def batch(
        self, claim: Callable[[memoryview], Piece | None], work: Callable[[int, Piece, memoryview], object]
    ) -> bool:
        """Work through pieces for SYNC_BYTES or SYNC_SECONDS; say whether there may be more.

        ``claim`` gets the buffer of the thread that ``work`` (thread, piece, buffer) will run in. Raises what the
        first of them raised that failed; the others end their step before.
        """
        budget, deadline = SYNC_BYTES // STEP, time.monotonic() + SYNC_SECONDS
        errors: list[BaseException] = []
        ended = False

        def claimed(buffer: memoryview) -> Piece | None:
            nonlocal budget, ended
            with self._claiming:
                if ended or errors or budget <= 0 or self.stopping.is_set() or time.monotonic() > deadline:
                    return None
                budget -= 1
                piece = claim(buffer)
                ended = piece is None
                if piece is not None:
                    self.pacer.spend(self.cost(piece), self.stopping)
                return piece

        def work_through(thread: int) -> None:
            buffer = self._buffers[thread]
            try:
                while (piece := claimed(buffer)) is not None:
                    work(thread, piece, buffer)
            except BaseException as exc:  # noqa: BLE001 - raised below, in the thread that waits
                errors.append(exc)

        helpers = [
            threading.Thread(target=work_through, args=(number,), daemon=True) for number in range(1, self._threads)
        ]
        for helper in helpers:
            helper.start()
        work_through(0)
        for helper in helpers:
            helper.join()
        if errors:
            raise errors[0]
        return not ended

    def count(self, length: int) -> None:
        """Note bytes that were moved; for any thread."""
        with self._counting:
            self.done += length


class Holdings:
    """What a transfer holds: keys and descriptors go with ``close``."""

    def __init__(self, fds: list[int]) -> None:
        self.fds = fds
        self.keys: list[Secret] = []
        self.factories: list[CodecFactory] = []

    def ask(self) -> keysession.Answer:
        """Ask the session that is the first descriptor, and keep its key."""
        with socket.socket(fileno=self.fds.pop(0)) as session:
            answer = keysession.ask(session)
        if answer.data_key is not None:
            self.keys.append(answer.data_key)
        return answer

    def wipe(self) -> None:
        """Clear every key; may be called again."""
        for factory in self.factories:
            factory.close()
        for key in self.keys:
            key.wipe()

    def close(self) -> None:
        """Clear every key and close every descriptor; may be called again."""
        self.wipe()
        while self.fds:
            os.close(self.fds.pop())


Prepare = Callable[[dict[str, Any], Holdings], tuple[Transfer[Any], dict[str, Any]]]
"""Verifies what came with ``start``, in a thread, and returns the transfer and the answer; may raise."""


class TransferWorker:
    """One transfer, from ``start`` to ``finish``; the other requests are the same for both directions."""

    def __init__(self, prepare: Prepare) -> None:
        self._prepare = prepare
        self._holdings: Holdings | None = None
        self._transfer: Transfer[Any] | None = None
        self._finished: dict[str, Any] | None = None
        self._ended = trio.Event()
        self._nursery: trio.Nursery | None = None

    async def run(self, parent: socket.socket) -> None:
        """Serve ebsd until it is gone; then stop, wipe and return."""
        handlers: dict[str, ChannelHandler] = {
            "start": self._start, "progress": self._progress, "finish": self._finish
        }  # fmt: skip
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                await serve_until_gone(parent, handlers)
            finally:
                with trio.CancelScope(shield=True):
                    await self._end()
                nursery.cancel_scope.cancel()

    @property
    def hangs(self) -> bool:
        """Whether the thread did not end in time and must be left to the end of the process."""
        return self._transfer is not None and not self._ended.is_set()

    async def _end(self) -> None:
        if self._transfer is not None:
            self._transfer.stop()
            with trio.move_on_after(STOP_SECONDS):
                await self._ended.wait()
        if self._holdings is not None:
            if self.hangs:  # its descriptors are in use
                self._holdings.wipe()
            else:
                self._holdings.close()

    async def _start(self, params: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], Sequence[int]]:
        holdings = Holdings(fds)
        try:
            if self._holdings is not None:
                raise IncorrectState(reason="This worker has begun already")
            transfer, answer = await trio.to_thread.run_sync(self._prepare, params, holdings)
        except BaseException:
            holdings.close()
            raise
        self._holdings, self._transfer = holdings, transfer
        if self._nursery is None:
            raise AssertionError("BUG: a request before run")
        self._nursery.start_soon(self._run, transfer, holdings)
        return answer, ()

    async def _run(self, transfer: Transfer[Any], holdings: Holdings) -> None:
        await trio.to_thread.run_sync(transfer.run, abandon_on_cancel=True)
        self._ended.set()
        if transfer.error is not None:
            logging.getLogger("ebsd-transfer").error("it failed: %s", transfer.error)
            holdings.wipe()  # what failed never goes on in this process

    async def _progress(self, params: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], Sequence[int]]:
        _close_all(fds)
        if self._transfer is None:
            raise IncorrectState(reason="This worker has not begun")
        if "Rate" in params:
            self._transfer.pacer.limit(int(params["Rate"]))
        return self._transfer.progress(), ()

    async def _finish(self, params: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], Sequence[int]]:
        _close_all(fds)
        if self._finished is not None:
            return self._finished, ()
        if self._transfer is None or self._holdings is None:
            raise IncorrectState(reason="This worker has not begun")
        if self._transfer.state != "done":
            raise IncorrectState(reason=f"The transfer is not done; its state is {self._transfer.state}")
        await self._ended.wait()  # the thread says "done" a moment before it has ended
        try:
            self._finished = await trio.to_thread.run_sync(self._transfer.finish)
        except NoSpace:
            raise
        except EbsdError as exc:
            self._transfer.fail(exc)
            self._holdings.close()
            raise
        self._holdings.close()
        return self._finished, ()


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


def main(prepare: Prepare, name: str) -> None:
    """Become a holder of keys, serve descriptor 0, and end with it."""
    run_worker(logging.getLogger(name), TransferWorker(prepare).run)
