"""Real files of this host as test data: an archive of many, and the fingerprint of a tree."""

from __future__ import annotations

import hashlib
import os
import tarfile
from pathlib import Path

FILES = 5000

Fingerprint = dict[str, tuple[str, int]]
"""Path below the tree -> (SHA-256, mode)."""


def archive_real_files(archive: Path, count: int = FILES) -> Path:
    """Write a tar archive of ``count`` regular files of this host, modes included."""
    found = 0
    with tarfile.open(archive, "w") as tar:
        for top in ("/usr/share", "/usr/lib"):
            for directory, _, names in sorted(os.walk(top)):
                for name in sorted(names):
                    path = Path(directory, name)
                    if found < count and path.is_file() and not path.is_symlink() and path.stat().st_size < 200_000:
                        tar.add(path, arcname=str(path).lstrip("/"))
                        found += 1
    assert found == count, "this host has too few files to test with"
    return archive


def fingerprint(tree: Path) -> Fingerprint:
    """Return what every file below a directory holds."""
    found = {}
    for directory, _, names in os.walk(tree):
        for name in names:
            path = Path(directory, name)
            found[str(path.relative_to(tree))] = (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mode)
    return found
