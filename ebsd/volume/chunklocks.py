"""Locks on ranges of chunks: shared for readers, exclusive for writers, first come first served.

1. A claim waits for every conflicting claim that came before it, granted or not: nobody starves.
2. A claim covers its whole range or nothing, and a task holds at most one claim: no deadlock is possible.
   (Equal to taking one lock per chunk in ascending order, at the cost of one list entry per request.)
3. Without conflict a claim is granted without waiting, and without touching the scheduler.
"""

from __future__ import annotations

from collections.abc import Callable

from ebsd.volume.scheduling import Event


class Claim:
    """Chunks [first, end), held or waited for."""

    __slots__ = ("blockers", "end", "exclusive", "first", "granted")

    def __init__(self, first: int, end: int, exclusive: bool) -> None:
        self.first = first
        self.end = end
        self.exclusive = exclusive
        self.blockers = 0
        """Earlier claims that conflict with this one and are not released."""
        self.granted: Event | None = None


class ChunkLocks:
    """All claims of one engine. For one event loop: no method but ``wait`` awaits."""

    __slots__ = ("_claims", "_new_event")

    def __init__(self, new_event: Callable[[], Event]) -> None:
        self._claims: list[Claim] = []
        self._new_event = new_event

    def enqueue(self, first: int, end: int, exclusive: bool) -> Claim:
        """Join the queue. The claim is held when its ``blockers`` are 0, else the caller must ``wait``."""
        claim = Claim(first, end, exclusive)
        if self._claims:
            for other in self._claims:
                if other.first < end and first < other.end and (exclusive or other.exclusive):
                    claim.blockers += 1
        self._claims.append(claim)
        return claim

    async def wait(self, claim: Claim) -> None:
        """Wait until the claim is held. A cancellation withdraws it."""
        if claim.blockers == 0:
            return
        claim.granted = self._new_event()
        try:
            await claim.granted.wait()
        except BaseException:
            self.release(claim)
            raise

    def release(self, claim: Claim) -> None:
        """Leave the queue and grant what only this claim held up."""
        claims = self._claims
        at = claims.index(claim)
        del claims[at]
        for other in claims[at:]:
            if other.first < claim.end and claim.first < other.end and (other.exclusive or claim.exclusive):
                other.blockers -= 1
                if other.blockers == 0 and other.granted is not None:
                    other.granted.set()

    def __len__(self) -> int:
        return len(self._claims)
