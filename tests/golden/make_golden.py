"""Makes a small store of this version, with keys of its own that protect nothing: state, key service, root key.

``.venv/bin/python tests/golden/make_golden.py NAME`` writes tests/golden/NAME.tar.xz. README.md says when.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

GOLDEN = Path(__file__).resolve().parent
sys.path.insert(0, str(GOLDEN.parent))
MIB = 1024 * 1024


def content(seed: str, length: int) -> bytes:
    """Return bytes that a reader can make again."""
    return random.Random(seed).randbytes(length)


def main() -> None:
    from installation import Installation, installation

    (name,) = sys.argv[1:]
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="g") as place:
        root = Path(place)
        digests: dict[str, str] = {}

        def fill(ebsd: Installation, volume: str, *offsets: int) -> None:
            path = ebsd.ok("attach", volume, "--file")
            with open(path, "r+b", buffering=0) as file:
                for offset in offsets:
                    os.pwrite(file.fileno(), content(f"{volume}{offset}", 65536), offset)
                os.fsync(file.fileno())
            digests[volume] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
            ebsd.ok("detach", volume)

        with installation(root, settings="allow_unencrypted = true") as ebsd:
            ebsd.ok("key", "create", "second")
            ebsd.ok("create", "data", "--size", "2M", "--tag", "team=blue")
            fill(ebsd, "data", 0, 655360)
            ebsd.ok("snapshot", "data", "--name", "monday", "--description", "the first")
            fill(ebsd, "data", 0, 131072)
            ebsd.ok("snapshot", "data", "--name", "tuesday")
            ebsd.ok("create", "restored", "--from", "monday")
            fill(ebsd, "restored", 65536)
            ebsd.ok("copy", "monday", "--name", "copied", "--encrypted", "--key", "second")
            ebsd.ok("create", "plain", "--size", "1M", "--no-encrypted")
            fill(ebsd, "plain", 0)
            ebsd.ok("create", "empty", "--size", "1M")
        (root / "expected.json").write_text(json.dumps(digests, indent=1, sort_keys=True))
        (root / "state" / "ballast").unlink(missing_ok=True)
        archive = GOLDEN / f"{name}.tar.xz"
        members = ["state", "keys", "root.key", "expected.json"]
        subprocess.run(["tar", "-C", root, "--sparse", "--numeric-owner", "-cJf", archive, *members], check=True)


if __name__ == "__main__":
    main()
