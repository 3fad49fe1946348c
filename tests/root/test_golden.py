"""Stores that earlier versions left are opened by this one: every volume has its bytes, and check is clean."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

import pytest
from installation import installation

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
ARCHIVES = sorted(GOLDEN.glob("*.tar.xz"))


def test_there_is_a_golden_store_and_each_is_small() -> None:
    assert ARCHIVES
    assert all(path.stat().st_size < 1 << 20 for path in ARCHIVES)


@pytest.mark.parametrize("archive", ARCHIVES, ids=lambda path: path.name)
def test_a_store_of_an_earlier_version_is_opened(archive: Path, tmp_path: Path) -> None:
    subprocess.run(["tar", "-C", tmp_path, "-xJf", archive], check=True)
    expected = json.loads((tmp_path / "expected.json").read_text())
    with installation(tmp_path, settings="allow_unencrypted = true") as ebsd:
        outcome = ebsd.ctl("--json", "check")
        assert outcome.status == 0, outcome.stdout
        ebsd.ok("create", "again", "--from", "copied")
        for name, digest in expected.items():
            path = ebsd.ok("attach", name, "--file")
            assert hashlib.sha256(Path(path).read_bytes()).hexdigest() == digest, name
            ebsd.ok("detach", name)
        assert {"again", "empty", *expected} == {v["Name"] for v in ebsd.ctl_json("list")["Volumes"]}
        assert {"monday", "tuesday", "copied"} == {s["Name"] for s in ebsd.ctl_json("list", "snapshots")["Snapshots"]}
        ebsd.ok("snapshot", "data", "--name", "now")
        outcome = ebsd.ctl("--json", "check")
        assert outcome.status == 0, outcome.stdout
