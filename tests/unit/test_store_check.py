"""Examining a store in-process: hostile bytes everywhere, and the table of codes in the documentation."""

from __future__ import annotations

from pathlib import Path

from ebsd.store.findings import RULES

ROOT = Path(__file__).resolve().parents[2]


def test_the_document_shows_the_same_codes() -> None:
    rows = {}
    for line in (ROOT / "ebsd/store/FORMAT.md").read_text().partition("## Check")[2].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 4 and cells[0].startswith("`"):
            rows[cells[0].strip("`")] = cells[1:3]
    assert rows == {code: [rule.severity, "yes" if rule.repairable else "no"] for code, rule in RULES.items()}
