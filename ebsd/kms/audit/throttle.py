"""How much of the audit log a user may fill, and how fast: a token bucket of record bytes for each.

1. A call is let in while its user's bucket is not empty, and takes what its record turns out to need: the level may go
   below zero by the records of the calls that run at the same time, and those wait for the refill.
2. A refused call leaves no record. What does is one summary when it begins, and one a minute while it goes on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

BURST: Final = 16 * 1024 * 1024
"""Bytes of records at once: some 10,000 calls."""
REFILL: Final = 16 * 1024
"""Bytes of records a second; 1.4 GB a day for a user who asks without a pause."""
SUMMARY_PAUSE: Final = 60.0
"""Seconds between two summaries of one user."""
MAX_BUCKETS: Final = 4096


@dataclass(slots=True)
class _Bucket:
    level: float
    at: float
    told: float = -math.inf
    refused: int = 0


class Throttle:
    """The buckets, by whoever they are kept for; a full bucket is as good as none and may be forgotten."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, *, burst: int = BURST, refill: int = REFILL
    ) -> None:
        """``clock`` gives seconds and never goes back."""
        self._clock = clock
        self._burst = burst
        self._refill = refill
        self._buckets: dict[str, _Bucket] = {}

    def refuses(self, payer: str) -> bool:
        """Say whether a call must be refused, and count it when it is."""
        bucket = self._bucket(payer)
        if bucket.level > 0:
            return False
        bucket.refused += 1
        return True

    def charge(self, payer: str, size: int) -> None:
        """Take the bytes of a record."""
        self._bucket(payer).level -= size

    def summary(self, payer: str) -> int | None:
        """Return how many calls were refused since the last summary when it is time for one, which this then is."""
        bucket = self._bucket(payer)
        if not bucket.refused or bucket.at - bucket.told < SUMMARY_PAUSE:
            return None
        refused, bucket.refused, bucket.told = bucket.refused, 0, bucket.at
        return refused

    @property
    def bucket_count(self) -> int:
        return len(self._buckets)

    def _bucket(self, payer: str) -> _Bucket:
        """Return a bucket as it is now."""
        now = self._clock()
        bucket = self._buckets.get(payer)
        if bucket is None:
            if len(self._buckets) >= MAX_BUCKETS:
                self._forget(now)
            bucket = self._buckets[payer] = _Bucket(self._burst, now)
        bucket.level = self._level(bucket, now)
        bucket.at = now
        return bucket

    def _level(self, bucket: _Bucket, now: float) -> float:
        return min(self._burst, bucket.level + self._refill * (now - bucket.at))

    def _forget(self, now: float) -> None:
        """Forget the full buckets; when none is, the fullest, whose user gains least by it."""
        levels = {payer: self._level(bucket, now) for payer, bucket in self._buckets.items()}
        full = [payer for payer, level in levels.items() if level >= self._burst]
        for payer in full or [max(levels, key=levels.__getitem__)]:
            del self._buckets[payer]
