"""What is mounted on this host now, as ebsd sees it: reads mountinfo and sysfs, and touches no device."""

from __future__ import annotations

import re
from pathlib import Path

from ebsd.domain.mountinfo import Mount, parse_mountinfo


def read_mounts() -> list[Mount]:
    """Return the mounts of this process's mount namespace."""
    return parse_mountinfo(Path("/proc/self/mountinfo").read_text(errors="surrogateescape"))


def loop_minors_of(block_file: Path) -> list[int]:
    """Return the loop devices that are bound to a block file, while that is mounted."""
    minors = []
    for attribute in Path("/sys/block").glob("loop*/loop/backing_file"):
        number = re.fullmatch(r"loop([0-9]+)", attribute.parts[3])
        try:
            bound = attribute.read_text(errors="surrogateescape").rstrip("\n")
        except OSError:
            continue  # it was released meanwhile
        if number is not None and bound == str(block_file):
            minors.append(int(number[1]))
    return minors
