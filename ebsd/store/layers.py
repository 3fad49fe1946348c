"""Layers: segment files of ciphertext with identity placement; created, opened and sealed here.

Chunk c of the volume is at byte (c mod 2**24) * 64 KiB of segment c div 2**24: the host's file system is the
allocator, a chunk has one place for ever, and so no freed place can come back under another map.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable, Iterator
from typing import Final

from ebsd.domain.errors import StoreDamaged
from ebsd.domain.geometry import segment_count, segment_size
from ebsd.domain.units import CHUNK
from ebsd.store.disk import Disk, open_present, opened
from ebsd.store.entries import FIRST_RESERVED

MAX_SEGMENTS: Final = 64
_NAME = re.compile(r"([0-9]{10})-([0-9a-f]{32})\.([0-9]{3})")


def segment_name(number: int, uuid: bytes, segment: int) -> str:
    """Return the file name of a segment: ``<number, 10 digits>-<uuid, 32 hex digits>.<segment, 3 digits>``.

    Number and uuid stand in the name so that a lost catalog can be rebuilt from the directory.
    """
    if not 0 < number < FIRST_RESERVED or len(uuid) != 16 or not 0 <= segment < MAX_SEGMENTS:
        raise ValueError(f"no segment: layer {number}, uuid {uuid.hex()}, segment {segment}")
    return f"{number:010d}-{uuid.hex()}.{segment:03d}"


def parse_segment_name(name: str) -> tuple[int, bytes, int] | None:
    """Return (layer number, uuid, segment) of a segment's file name, None for any other name."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    number, uuid, segment = int(match[1]), bytes.fromhex(match[2]), int(match[3])
    if not 0 < number < FIRST_RESERVED or segment >= MAX_SEGMENTS:
        return None
    return number, uuid, segment


def create_layer(disk: Disk, dirfd: int, number: int, uuid: bytes, size: int, *, preallocate: bool = False) -> None:
    """Create all segments of a layer for a volume of ``size`` bytes, sparse, 0600; durable at return.

    ``preallocate`` gives all of them blocks, which read as zeros and mean nothing: content follows the map.
    Nothing is created in the I/O path. May be repeated after a crash: a file that is there and holds no data
    is completed. Raises StoreDamaged when one holds data (it is somebody's layer) and OSError.
    """
    for segment in range(segment_count(size)):
        name = segment_name(number, uuid, segment)
        length = segment_size(size, segment)
        with opened(disk, name, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o600, dir_fd=dirfd) as fd:
            status = disk.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise StoreDamaged(file=name, reason="it is not a regular file")
            if status.st_size > length or _has_data(disk, fd):
                raise StoreDamaged(file=name, reason="it was to be created and already holds data")
            if preallocate:
                disk.fallocate(fd, 0, length)
            disk.ftruncate(fd, length)
            disk.fsync(fd)
    disk.fsync(dirfd)


def grow_layer(disk: Disk, dirfd: int, number: int, uuid: bytes, old_size: int, new_size: int) -> None:
    """Make a layer, the head of a volume, fit ``new_size`` bytes; durable at return. Never shrinks.

    The last segment becomes longer, further ones are created, sparse; data stays. May be repeated after a crash, and
    while an engine has it open. Raises StoreDamaged when the layer is not one of ``old_size`` bytes, OSError.
    """
    if new_size < old_size:
        raise ValueError(f"a layer for {old_size} bytes does not shrink to {new_size}")
    present = segment_count(old_size)
    for segment in range(present - 1, segment_count(new_size)):
        name = segment_name(number, uuid, segment)
        length = segment_size(new_size, segment)
        create = os.O_CREAT if segment >= present else 0
        try:
            fd = disk.open(name, os.O_RDWR | os.O_NONBLOCK | create, dir_fd=dirfd)
        except FileNotFoundError:
            raise StoreDamaged(file=name, reason="it is missing") from None
        try:
            status = disk.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise StoreDamaged(file=name, reason="it is not a regular file")
            if segment < present and status.st_size < segment_size(old_size, segment):
                raise StoreDamaged(file=name, reason=f"it has only {status.st_size} bytes")
            if status.st_size < length:
                disk.ftruncate(fd, length)
            disk.fsync(fd)
        finally:
            disk.close(fd)
    disk.fsync(dirfd)


def _has_data(disk: Disk, fd: int) -> bool:
    return next(chunks_with_data(disk, fd), None) is not None


def chunks_with_data(disk: Disk, fd: int) -> Iterator[tuple[int, int]]:
    """Yield (first, end) of the chunks of a segment that are not wholly a hole of the file, ascending, each once.

    A piece of a chunk behind the last whole one counts as a chunk. Raises OSError.
    """
    following = at = 0
    while True:
        try:
            start = disk.lseek(fd, at, os.SEEK_DATA)
            at = disk.lseek(fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        first, end = max(following, start // CHUNK), -(-at // CHUNK)
        if first < end:
            yield first, end
            following = end


def open_segment(
    disk: Disk, dirfd: int, number: int, uuid: bytes, segment: int, *, writable: bool, least: int = CHUNK
) -> int:
    """Open one segment below the lineage directory ``dirfd``; the caller closes it.

    ``least`` is the length in bytes that the caller relies on. A missing file, a file that is not regular and a
    shorter one are StoreDamaged; a length that is not whole chunks is too. Sealed layers are opened read-only,
    so that the kernel refuses what I2 forbids.
    """
    name = segment_name(number, uuid, segment)
    flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_NOFOLLOW | os.O_CLOEXEC
    fd, status = open_present(disk, name, flags, dirfd)
    try:
        if status.st_size < least:
            raise StoreDamaged(file=name, reason=f"it has {status.st_size} bytes, {least} are needed")
        if status.st_size % CHUNK:
            raise StoreDamaged(file=name, reason=f"its {status.st_size} bytes are not whole chunks")
    except BaseException:
        disk.close(fd)
        raise
    return fd


def open_layer(disk: Disk, dirfd: int, number: int, uuid: bytes, size: int, *, writable: bool) -> tuple[int, ...]:
    """Open all segments that a volume of ``size`` bytes needs; the caller closes them. Raises as ``open_segment``."""
    fds: list[int] = []
    try:
        for segment in range(segment_count(size)):
            least = segment_size(size, segment)
            fds.append(open_segment(disk, dirfd, number, uuid, segment, writable=writable, least=least))
    except BaseException:
        for fd in fds:
            disk.close(fd)
        raise
    return tuple(fds)


def seal_layer(disk: Disk, dirfd: int, number: int, uuid: bytes, size: int) -> None:
    """Make all segments durable and read-only (0440). May be repeated. Raises as ``open_segment``."""
    for segment in range(segment_count(size)):
        fd = open_segment(disk, dirfd, number, uuid, segment, writable=False)
        try:
            disk.fchmod(fd, 0o440)
            disk.fsync(fd)
        finally:
            disk.close(fd)


def sync_layer(disk: Disk, dirfd: int, number: int, uuid: bytes) -> None:
    """Make the data of all segments that are there durable. Raises StoreDamaged when there is none, OSError."""
    _for_each_segment(disk, dirfd, number, uuid, disk.fdatasync)


def drop_layer_cache(disk: Disk, dirfd: int, number: int, uuid: bytes) -> None:
    """Have reads of all segments come from the disk again. Raises as ``sync_layer``."""
    _for_each_segment(disk, dirfd, number, uuid, disk.drop_cache)


def _for_each_segment(disk: Disk, dirfd: int, number: int, uuid: bytes, act: Callable[[int], None]) -> None:
    for segment in range(MAX_SEGMENTS):
        try:
            fd = disk.open(segment_name(number, uuid, segment), os.O_RDONLY | os.O_NONBLOCK, dir_fd=dirfd)
        except FileNotFoundError:
            if segment == 0:
                raise StoreDamaged(file=segment_name(number, uuid, segment), reason="it is missing") from None
            return
        try:
            act(fd)
        finally:
            disk.close(fd)
