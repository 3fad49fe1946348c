"""Each sync left out and each pair of steps exchanged is noticed by the crash that the table names, and only then.

``world.mutations`` has the table. The product is copied, changed, and asked for that one crash in a process of its own.
By default a third of them, chosen by the day's number of the year; ``EBSD_CUTS=full``: all. Every run asserts that the
texts which are changed are there, and that no crash of the table is noticed without its mutation.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from world.crashes import Crash, explore
from world.mutations import MUTATIONS, PRODUCT, Mutation, copy_product, mutate, run_on
from world.stories import BY_NAME

PARTS = 1 if os.environ.get("EBSD_CUTS") == "full" else 3
TODAY = time.gmtime().tm_yday % PARTS
SHOWN = [mutation for mutation in MUTATIONS if mutation.crash is not None]


def test_what_is_changed_is_there():
    for mutation in MUTATIONS:
        assert (PRODUCT / mutation.file).read_text().count(mutation.old) == 1, mutation.what


def test_every_mutation_is_shown_or_explained():
    assert [m.what for m in MUTATIONS if (m.crash is None) is not bool(m.unshown)] == []
    assert len({m.what for m in MUTATIONS}) == len(MUTATIONS)


@pytest.mark.parametrize("mutation", SHOWN[TODAY::PARTS], ids=lambda m: m.what)
def test_a_mutation_is_noticed(mutation: Mutation, tmp_path: Path):
    assert mutation.crash is not None
    mutate(mutation, copy_product(tmp_path))
    result = run_on(tmp_path, "show", mutation.operation, *(str(part) for part in mutation.crash))
    assert result.returncode == 1, f"{mutation.what} is not noticed: {result.stdout}{result.stderr}"
    assert result.stdout, result.stderr


@pytest.mark.parametrize(("operation", "crash"), sorted({(m.operation, m.crash) for m in SHOWN if m.crash}))
def test_the_product_itself_stands_them_all(operation: str, crash: tuple[str, int, int]):
    explore(BY_NAME[operation], Crash(*crash))
