"""FAULTS.md names tests that exist, and a row without one says so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
ROWS = [line for line in (TESTS / "FAULTS.md").read_text().splitlines() if re.match(r"\| \d+ \|", line)]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip())
def test_the_tests_of_a_row_exist(row: str) -> None:
    named = re.findall(r"`([a-z]+/test_\w+\.py)(?:::(\w+))?`", row)
    assert named or "**none**" in row
    for path, test in named:
        assert (TESTS / path).is_file(), path
        assert not test or re.search(rf"def {test}\(", (TESTS / path).read_text()), test


def test_the_rows_are_numbered() -> None:
    assert [int(row.split("|")[1]) for row in ROWS] == list(range(1, len(ROWS) + 1))
