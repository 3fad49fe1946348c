"""The native engine under threads, with the sanitizers of gcc: a second of ``scripts/sanitize``."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_a_second_of_hammering_finds_nothing():
    run = subprocess.run([ROOT / "scripts" / "sanitize", "1", "7"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert [line.partition(":")[0] for line in run.stdout.splitlines()] == ["address", "thread"]
