"""Each sync left out and each pair of steps exchanged is noticed by the crash that the table names, and only then.

``world.mutations`` has the table. The product is copied, changed, and asked for that one crash in a process of its own.
A crash is named by the number of a call, which moves when an operation gets another one: where it is noticed no more,
another crash of the operation must notice the mutation, and the table should have that one. Every run asserts that the
texts which are changed are there, and that no crash is noticed without its mutation.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from world.crashes import Crash, explore
from world.mutations import MUTATIONS, PRODUCT, Mutation, copy_product, mutate, run_on
from world.stories import BY_NAME

SHOWN = [mutation for mutation in MUTATIONS if mutation.crash is not None]


def test_what_is_changed_is_there():
    for mutation in MUTATIONS:
        assert (PRODUCT / mutation.file).read_text().count(mutation.old) == 1, mutation.what


def test_every_mutation_is_shown_or_explained():
    assert [m.what for m in MUTATIONS if (m.crash is None) is not bool(m.unshown)] == []
    assert len({m.what for m in MUTATIONS}) == len(MUTATIONS)


@pytest.mark.parametrize("mutation", SHOWN, ids=lambda m: m.what)
def test_a_mutation_is_noticed(mutation: Mutation, tmp_path: Path):
    assert mutation.crash is not None
    mutate(mutation, copy_product(tmp_path))
    result = run_on(tmp_path, "show", mutation.operation, *(str(part) for part in mutation.crash))
    assert result.returncode in (0, 1), result.stderr
    if result.returncode == 1:
        return
    found, _, _ = run_on(tmp_path, "hunt", mutation.operation).stdout.partition("\t")
    assert found.startswith("("), f"{mutation.what} is noticed by no crash of {mutation.operation}"
    print(f"{mutation.what}: not noticed by {mutation.crash} any more, but by {found}")
    explore(BY_NAME[mutation.operation], Crash(*ast.literal_eval(found)))


@pytest.mark.parametrize(("operation", "crash"), sorted({(m.operation, m.crash) for m in SHOWN if m.crash}))
def test_the_product_itself_stands_them_all(operation: str, crash: tuple[str, int, int]):
    explore(BY_NAME[operation], Crash(*crash))
