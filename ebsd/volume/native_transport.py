"""The native transport: a block engine served as one FUSE file by threads outside the interpreter (native/transport.c).

1. What the engine can do without Python never comes here: the threads call it (native/hot.h). Here arrives what it
   hands back, what waits for something (a flush, a write that must be durable) and what is rare (zeros, seeks).
2. At most MAX_TASKS requests are in work; the rest waits in the queue of the threads.
3. Every request is answered exactly once, a cancelled one with EIO: whoever waits for it could not even be killed.
4. A connection can be taken over (``resume``): handles have no state, and a request that is sent again is a request.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
import types
from collections.abc import Callable, Coroutine, Generator
from typing import Any, Final

import trio

from ebsd.volume import seats
from ebsd.volume._fuse import ffi, lib
from ebsd.volume.seats import Seat
from ebsd.volume.transports import MAX_TASKS, BlockDevice, error_number

log = logging.getLogger(__name__)

INIT_SECONDS: Final = 10
"""How long the kernel's first request may take: it is sent by mount(2)."""

INIT_VALUES: Final = 64

POLL_MS: Final = 1
"""How long a wait for the next request may hold up the event loop, while no request waits for anything."""

LOOP_SECONDS: Final = 0.002
"""How long requests may follow each other before the event loop has its turn."""


def _threads() -> int:
    return min(4, max(2, os.cpu_count() or 1))


def _check(result: int, what: str) -> None:
    if result:
        raise OSError(-result, f"{what}: {os.strerror(-result)}")


class NativeConnection:
    """A block file on a FUSE connection; see ``transports.Connection`` and ``transports.Transport``."""

    def __init__(
        self,
        device: BlockDevice,
        fuse_fd: int,
        *,
        uid: int,
        gid: int,
        hot: int | None = None,
        keep_init: Callable[[bytes], None] = lambda values: None,
        resume: bytes | None = None,
        on_zeroed: Callable[[int], None] = lambda length: None,
        threads: int | None = None,
    ) -> None:
        self._device = device
        self._on_zeroed = on_zeroed
        self._threads = threads or _threads()
        self._seat = Seat(self._add_task)
        self._nursery: trio.Nursery | None = None
        self._last_turn = 0.0
        self._tasks = 0
        self._handlers: dict[int, Callable[[Any], Coroutine[Any, Any, None]]] = {
            lib.EBSD_FUSE_READ: self._read,
            lib.EBSD_FUSE_WRITE: self._write,
            lib.EBSD_FUSE_FLUSH: self._flush,
            lib.EBSD_FUSE_ZERO: self._zero,
            lib.EBSD_FUSE_SEEK_DATA: self._seek_data,
            lib.EBSD_FUSE_SEEK_HOLE: self._seek_hole,
        }
        error = ffi.new("int *")
        address = ffi.NULL if hot is None else ffi.cast("void *", hot)
        self._fuse = lib.ebsd_fuse_new(fuse_fd, device.size, device.read_only, uid, gid, address, error)
        os.close(fuse_fd)  # it has a duplicate
        if self._fuse == ffi.NULL:
            _check(error[0], "the FUSE session")
        try:
            if resume is None:
                self._begin(keep_init)
            else:
                if len(resume) != INIT_VALUES or not any(resume):
                    raise OSError(errno.EINVAL, "the connection that is to be taken over was never begun")
                _check(lib.ebsd_fuse_resume(self._fuse, resume), "the FUSE connection cannot be taken over")
        except BaseException:
            lib.ebsd_fuse_free(self._fuse)
            raise

    def _begin(self, keep_init: Callable[[bytes], None]) -> None:
        values = ffi.new("unsigned char[]", INIT_VALUES)
        _check(lib.ebsd_fuse_await_init(self._fuse, INIT_SECONDS * 1000, values), "the FUSE connection does not begin")
        keep_init(bytes(ffi.buffer(values)))  # before any request: none can be lost for want of them
        _check(lib.ebsd_fuse_answer_init(self._fuse), "the FUSE connection does not begin")

    async def serve(self) -> None:
        """Answer requests until the file is unmounted or its connection aborted."""
        _check(lib.ebsd_fuse_start(self._fuse, self._threads), "the threads of the FUSE connection")
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            self._add_task()

    def _add_task(self) -> None:
        """Have one more task that can take the reader's seat: the others all wait with their requests."""
        if self._nursery is not None and self._tasks < MAX_TASKS and not self._seat.ended:
            self._tasks += 1
            self._nursery.start_soon(self._work)

    async def _work(self) -> None:
        """Take requests from the reader's seat and answer them; the first that waits leaves the seat to another."""
        while await self._seat.take():
            request = lib.ebsd_fuse_take(self._fuse)
            if request == ffi.NULL:
                await self._wait_for_request()
            else:
                await self._drive(self._answer(request))

    @types.coroutine
    def _drive(self, handler: Coroutine[Any, Any, None]) -> Generator[Any, Any, None]:
        yield from seats.drive(handler, self._seat)

    async def _wait_for_request(self) -> None:
        may_hold_up = time.monotonic() - self._last_turn < LOOP_SECONDS and not self._seat.suspended
        if may_hold_up and lib.ebsd_fuse_wait(self._fuse, POLL_MS):
            return
        if lib.ebsd_fuse_ended(self._fuse):
            self._seat.end()
            return
        bell = lib.ebsd_fuse_doorbell(self._fuse)
        try:
            await trio.lowlevel.wait_readable(bell)
        except BaseException:
            self._seat.hand_over()  # cancelled: the seat must not be left with a task that is gone
            raise
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(bell)
        self._last_turn = time.monotonic()

    async def _answer(self, request: Any) -> None:
        number = errno.EIO
        try:
            await self._handlers[request.kind](request)
            return
        except Exception as exc:  # noqa: BLE001 - error_number logs what is unexpected
            number = error_number(exc)
        except BaseException:
            lib.ebsd_fuse_answer(self._fuse, request, number)
            raise
        lib.ebsd_fuse_answer(self._fuse, request, number)

    # Each ends with its answer, after which nothing may fail.

    async def _read(self, request: Any) -> None:
        data = await self._device.read(request.offset, request.length)
        lib.ebsd_fuse_answer_data(self._fuse, request, ffi.from_buffer(data), len(data))

    async def _write(self, request: Any) -> None:
        await self._device.write(request.offset, memoryview(ffi.buffer(request.data, request.length)))
        if request.durable:
            await self._device.flush()
        lib.ebsd_fuse_answer_written(self._fuse, request)

    async def _flush(self, request: Any) -> None:
        await self._device.flush()
        lib.ebsd_fuse_answer(self._fuse, request, 0)

    async def _zero(self, request: Any) -> None:
        await self._device.write_zeroes(request.offset, request.length)
        self._on_zeroed(request.length)
        lib.ebsd_fuse_answer(self._fuse, request, 0)

    async def _seek_data(self, request: Any) -> None:
        found = await self._device.find(request.offset, data=True)
        lib.ebsd_fuse_answer_offset(self._fuse, request, found)

    async def _seek_hole(self, request: Any) -> None:
        found = await self._device.find(request.offset, data=False)
        lib.ebsd_fuse_answer_offset(self._fuse, request, found)

    def forget_attributes(self) -> None:
        """Tell the kernel that the file's attributes changed. Waits for the kernel, so not on the event loop."""
        lib.ebsd_fuse_set_size(self._fuse, self._device.size)
        _check(lib.ebsd_fuse_forget_attributes(self._fuse), "the kernel does not forget the attributes")

    def close(self) -> None:
        """Let go of the connection; the mount itself is the business of whoever made it."""
        if lib.ebsd_fuse_stop(self._fuse):
            log.error("a thread of the FUSE connection does not end; its memory is left to it")
            return
        lib.ebsd_fuse_free(self._fuse)
