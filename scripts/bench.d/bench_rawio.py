"""A quick test of one device or block file without fio: plain preadv and pwritev with O_DIRECT, one at a time."""

from __future__ import annotations

import mmap
import os
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

REQUEST = 1 << 20
PAGE = 4096


@dataclass(frozen=True)
class QuickResult:
    """What five seconds tell about one device; the rates are MiB/s, the latencies medians in microseconds."""

    write_mib_s: float
    read_mib_s: float
    write_4k_us: float
    read_4k_us: float


def quick_check(path: str, *, seconds: float = 5.0, span: int | None = None) -> QuickResult:
    """Write and read the first ``span`` bytes of ``path`` (256 MiB at most by default). What is there is lost.

    Sequential 1 MiB first, so that all of the span is written before it is read, then random 4 KiB; a quarter of the
    time for each. Raises OSError; ValueError when the device is smaller than 1 MiB.
    """
    # Without write-back, and without a second cache of the plaintext.
    fd = os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
    try:
        size = os.lseek(fd, 0, os.SEEK_END)
        span = min(size, span or 256 << 20) // REQUEST * REQUEST
        if span < REQUEST:
            raise ValueError(f"{path} has {size} bytes; at least 1 MiB is needed")
        with mmap.mmap(-1, REQUEST) as buffer, memoryview(buffer) as view:  # page aligned, as O_DIRECT demands
            view[:] = os.urandom(REQUEST)
            share = seconds / 4
            write = _sequential(lambda at: os.pwritev(fd, [view], at), span, share, whole=True)
            read = _sequential(lambda at: os.preadv(fd, [view], at), span, share, whole=False)
            with view[:PAGE] as page:
                write_us = _random(lambda at: os.pwritev(fd, [page], at), span, share)
                read_us = _random(lambda at: os.preadv(fd, [page], at), span, share)
        os.fsync(fd)
    finally:
        os.close(fd)
    return QuickResult(write, read, write_us, read_us)


def _sequential(request: Callable[[int], int], span: int, seconds: float, *, whole: bool) -> float:
    """Return MiB/s of the passes over the span; ``whole`` ends none before its end."""
    done = 0
    begin = time.perf_counter()
    while True:
        for at in range(0, span, REQUEST):
            _complete(request(at), REQUEST)
            done += REQUEST
            if time.perf_counter() - begin > seconds and not (whole and done < span):
                return done / (1 << 20) / (time.perf_counter() - begin)


def _random(request: Callable[[int], int], span: int, seconds: float) -> float:
    """Return the median latency in microseconds."""
    places = random.Random(1)
    took = []
    end = time.perf_counter() + seconds
    while not took or time.perf_counter() < end:
        at = places.randrange(span // PAGE) * PAGE
        begin = time.perf_counter()
        _complete(request(at), PAGE)
        took.append(time.perf_counter() - begin)
    return statistics.median(took) * 1e6


def _complete(count: int, wanted: int) -> None:
    if count != wanted:
        raise OSError(f"{count} of {wanted} bytes")
