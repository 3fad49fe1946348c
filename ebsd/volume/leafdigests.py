"""The leaves of consecutive chunks, all of them in one native call; ``store/leaves.py`` says what a leaf is."""

from __future__ import annotations

import os

from ebsd.crypto.digests import numbered_digests
from ebsd.domain.units import CHUNK, CHUNKS_PER_SEGMENT
from ebsd.store.disk import Disk, opened, pread_into_all
from ebsd.store.layers import segment_name
from ebsd.store.leaves import DIGEST, leaf_prefix


def leaf_digests(uuid: bytes, first: int, ciphertext: bytes | bytearray | memoryview) -> list[bytes]:
    """Return the leaf of each chunk from ``first`` on; ``ciphertext`` is whole chunks. As ``leaf_digest`` has them."""
    digests = bytes(numbered_digests(leaf_prefix(uuid), first, ciphertext, CHUNK))
    return [digests[at : at + DIGEST] for at in range(0, len(digests), DIGEST)]


def hash_chunks(
    disk: Disk, dirfd: int, number: int, uuid: bytes, first: int, end: int, buffer: memoryview
) -> list[bytes]:
    """Return the leaves of chunks [first, end) of one segment, read into ``buffer``. Raises StoreDamaged, OSError."""
    segment, place = divmod(first, CHUNKS_PER_SEGMENT)
    view = buffer[: (end - first) * CHUNK]
    name = segment_name(number, uuid, segment)
    with opened(disk, name, os.O_RDONLY | os.O_NONBLOCK, dir_fd=dirfd) as fd:
        pread_into_all(disk, fd, view, place * CHUNK, name)
    return leaf_digests(uuid, first, view)
