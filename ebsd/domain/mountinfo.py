"""Reading mountinfo: what is mounted where, without touching any device. Pure.

Format: proc_pid_mountinfo(5). Paths and sources come from whoever may mount, so nothing in them is trusted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final, NamedTuple

_OCTAL: Final = re.compile(r"\\([0-7]{3})")


class Mount(NamedTuple):
    """One line of mountinfo, with the escapes of the kernel undone."""

    device_number: str
    """``major:minor``; ``0:NN``, an anonymous number, for btrfs."""
    mount_point: str
    file_system: str
    source: str


def parse_mountinfo(text: str) -> list[Mount]:
    """Return the mounts in the order of the text, without malformed lines.

    The kernel writes blank, tab, line feed and backslash in paths as octal escapes (``\\040``), and any number of
    optional fields before the ``-``. Only a line feed ends a line: paths may hold other separators of Unicode.
    """
    mounts = []
    for line in text.split("\n"):
        cells = line.split(" ")
        try:
            dash = cells.index("-", 6)
            mounts.append(Mount(cells[2], _unescaped(cells[4]), cells[dash + 1], _unescaped(cells[dash + 2])))
        except (ValueError, IndexError):
            continue
    return mounts


def _unescaped(cell: str) -> str:
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), cell)


def mounts_of_device(mounts: Iterable[Mount], device: str | None, device_number: str) -> list[Mount]:
    """Return the mounts whose file system lies on the block device, oldest first.

    btrfs shows an anonymous number, so there the source must be the device; of other file systems the source is
    not believed, as anybody who may mount FUSE can choose it.
    """
    return [
        mount
        for mount in mounts
        if mount.device_number == device_number
        or (mount.file_system == "btrfs" and mount.device_number.startswith("0:") and mount.source == device)
    ]
