"""Which file systems may hold the state: told by their magic numbers (statfs(2), linux/magic.h)."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from ebsd.domain.errors import HostUnsupported

TMPFS_MAGIC: Final = 0x01021994

MAGIC_REFUSED: Final[Mapping[int, str]] = {
    0x6969: "NFS",  # no durable fdatasync contract with the server, no exclusive locks
    0x65735546: "a FUSE file system",  # a write could wait for ebsd itself
    0xFF534D42: "CIFS",
}
MAGIC_WARNED: Final[Mapping[int, str]] = {
    TMPFS_MAGIC: "a tmpfs, which a reboot empties",
    0x794C7630: "overlayfs, as in a container: make it a volume",
}


class _StatFs(ctypes.Structure):
    _fields_ = (("f_type", ctypes.c_long), ("rest", ctypes.c_char * 256))


def magic_of(path: Path) -> int:
    """Return the magic number of the file system that holds the path. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = _StatFs()
    if libc.statfs(os.fsencode(path), ctypes.byref(buffer)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(path))
    return int(buffer.f_type) & 0xFFFFFFFF


def refuse_unsuitable(state_dir: Path) -> None:
    """Raise HostUnsupported for a state directory on a file system that cannot keep the promises of the store."""
    name = MAGIC_REFUSED.get(magic_of(state_dir))
    if name is not None:
        raise HostUnsupported(
            reason=f"The state directory {state_dir} lies on {name}", remedy="Use a directory on ext4, xfs or btrfs."
        )
