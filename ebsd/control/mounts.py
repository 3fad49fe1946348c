"""What is mounted on this host now, as ebsd sees it: reads mountinfo and touches no device."""

from __future__ import annotations

from pathlib import Path

from ebsd.domain.mountinfo import Mount, parse_mountinfo


def read_mounts() -> list[Mount]:
    """Return the mounts of this process's mount namespace."""
    return parse_mountinfo(Path("/proc/self/mountinfo").read_text(errors="surrogateescape"))
