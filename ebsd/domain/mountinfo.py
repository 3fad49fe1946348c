"""Reading /proc/self/mountinfo: what is mounted where, without touching any device. Pure.

Format: proc_pid_mountinfo(5).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_ESCAPE = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of mountinfo."""

    device_number: str
    """``major:minor``. btrfs shows an anonymous number here, so its source has to be compared instead."""
    mount_point: str
    fs_type: str
    source: str


def parse_mountinfo(text: str) -> list[Mount]:
    """Return the mounts in the order of the file; lines of an unknown shape are skipped."""
    mounts = []
    for line in text.splitlines():
        left, dash, right = line.partition(" - ")
        fields, rest = left.split(" "), right.split(" ")
        if dash and len(fields) >= 6 and len(rest) >= 2:
            mounts.append(Mount(fields[2], _unescape(fields[4]), rest[0], _unescape(rest[1])))
    return mounts


def mounts_of_device(mounts: Iterable[Mount], device: str, device_number: str) -> list[Mount]:
    """Return the mounts whose file system lies on the block device, oldest first."""
    return [m for m in mounts if m.device_number == device_number or m.source == device]


def _unescape(text: str) -> str:
    raw = _ESCAPE.sub(lambda match: chr(int(match[1], 8)), text)
    return raw.encode("latin-1", "surrogateescape").decode(errors="surrogateescape") if "\\" in text else raw
