"""The claims of the native engine as its tasks see them: one queue with the hot path's threads (native/claims.h)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from ebsd.volume._core import ffi, lib
from ebsd.volume.chunklocks import ChunkLocks, Claim
from ebsd.volume.scheduling import Event

if TYPE_CHECKING:
    from ebsd.volume._core import CData


@runtime_checkable
class WatchesDescriptors(Protocol):
    """A scheduler whose loop may have to be told of something by a thread."""

    def watch(self, fd: int, ready: Callable[[], None]) -> None:
        """Call ``ready`` on the loop whenever ``fd`` is readable; ``ready`` reads it empty."""
        ...


class _NativeClaim(Claim):
    __slots__ = ("handle",)

    def __init__(self, first: int, end: int, exclusive: bool) -> None:
        super().__init__(first, end, exclusive)
        self.handle: CData = ffi.NULL


class NativeClaims(ChunkLocks):
    """See ``ChunkLocks``. ``blockers`` of a claim is right when it joins; whether it is held later is asked below."""

    __slots__ = ("_blockers", "_core", "_waiting", "_watch", "_watched")

    def __init__(
        self, core: CData, new_event: Callable[[], Event], watch: Callable[[int, Callable[[], None]], None] | None
    ) -> None:
        """``watch``: see ``WatchesDescriptors``; without it no thread must hold a claim while a task waits."""
        super().__init__(new_event)
        self._core = core
        self._blockers = ffi.new("uint32_t *")
        self._waiting: set[_NativeClaim] = set()
        self._watch = watch
        self._watched = False

    def enqueue(self, first: int, end: int, exclusive: bool) -> Claim:
        """See ``ChunkLocks``. Raises MemoryError."""
        claim = _NativeClaim(first, end, exclusive)
        claim.handle = lib.ebsd_core_claim(self._core, first, end, exclusive, self._blockers)
        if claim.handle == ffi.NULL:
            raise MemoryError("no memory for a claim")
        claim.blockers = self._blockers[0]
        return claim

    async def wait(self, claim: Claim) -> None:
        """See ``ChunkLocks``."""
        assert isinstance(claim, _NativeClaim)
        if claim.blockers == 0:
            return
        claim.granted = self._new_event()
        self._waiting.add(claim)
        try:
            if self._watch is not None and not self._watched:
                bell = lib.ebsd_core_bell(self._core)
                if bell < 0:
                    raise OSError(-bell, os.strerror(-bell))
                self._watch(bell, self._answer)
                self._watched = True
            # A thread may have granted it between the two, and rung before anybody watched.
            if not lib.ebsd_core_is_held(self._core, claim.handle):
                await claim.granted.wait()
        except BaseException:
            self._waiting.discard(claim)
            self.release(claim)
            raise
        self._waiting.discard(claim)

    def release(self, claim: Claim) -> None:
        """See ``ChunkLocks``."""
        assert isinstance(claim, _NativeClaim)
        handle, claim.handle = claim.handle, ffi.NULL
        if lib.ebsd_core_unclaim(self._core, handle):
            self._wake()

    def _answer(self) -> None:
        """A thread has rung."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(lib.ebsd_core_bell(self._core))
        self._wake()

    def _wake(self) -> None:
        for claim in self._waiting:
            if claim.granted is not None and lib.ebsd_core_is_held(self._core, claim.handle):
                claim.granted.set()

    def __len__(self) -> int:
        return lib.ebsd_core_claims(self._core)
