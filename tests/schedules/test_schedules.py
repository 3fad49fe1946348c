"""Random schedules of the data path and of what ebsd does around it; and each rule switched off makes one of them fail.

What runs is the product's own code, over files in memory (``schedule_world.py`` says what is not). A schedule follows
from its seed alone. By default SEEDS of them run, and each mutation of ``schedule_mutations.py`` by its recorded seed.

EBSD_SCHEDULES=N runs N more and N with drains, with fresh seeds that are printed; EBSD_SCHEDULE_SEED=S repeats one.
``pytest -s`` shows for each rule what was found without it.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from schedule_driver import DRAIN_POINTS, DRAINS, Focus, run_schedule
from schedule_mutations import MUTATIONS, Mutation
from schedule_oracle import Broken
from schedule_product import Product

SEEDS = 500
DRAIN_SEEDS = 200
BLOCK = 50
SEARCH = 600
"""Schedules that are tried when a recorded seed no longer shows its mutation: any change of the product moves them."""
PRODUCT = Path(__file__).resolve().parents[2] / "ebsd"
UNIT = PRODUCT.parent / "tests" / "unit"
EQUIVALENT = 6
"""Schedules that a mutation must pass which is said to change nothing that shows."""


@pytest.fixture(scope="module")
def product() -> Product:
    return Product()


def run(product: Product, seed: int, focus: Focus | None = None) -> None:
    try:
        run_schedule(product, seed, None, focus)
    except BaseException as error:
        error.add_note(f"EBSD_SCHEDULE_SEED={seed} repeats this schedule")
        raise


@pytest.mark.parametrize("first", range(0, SEEDS, BLOCK))
def test_no_schedule_breaks_a_promise(product: Product, first: int) -> None:
    for seed in range(first, first + BLOCK):
        run(product, seed)
    print(f"\n{BLOCK} schedules from seed {first}: every promise kept")


def with_drains(seed: int) -> Focus:
    """Return what makes a schedule one with drains; every second one stays long where others matter most."""
    return Focus(DRAINS[seed % len(DRAINS)], DRAIN_POINTS if seed % 2 else (), own_layers=True)


@pytest.mark.parametrize("first", range(0, DRAIN_SEEDS, BLOCK))
def test_no_schedule_with_drains_breaks_a_promise(product: Product, first: int) -> None:
    for seed in range(first, first + BLOCK):
        run(product, seed, with_drains(seed))


@pytest.mark.timeout(0)
@pytest.mark.skipif(not os.environ.get("EBSD_SCHEDULES"), reason="EBSD_SCHEDULES=N runs N schedules with fresh seeds")
def test_fresh_schedules(product: Product) -> None:
    base = secrets.randbelow(2**40)
    count = int(os.environ["EBSD_SCHEDULES"])
    print(f"\n{count} schedules from seed {base}")
    for seed in range(base, base + count):
        run(product, seed)
        run(product, seed, with_drains(seed))
        if (seed - base) % 1000 == 999:
            print(f"{seed - base + 1} schedules: every promise kept", flush=True)


@pytest.mark.skipif(not os.environ.get("EBSD_SCHEDULE_SEED"), reason="EBSD_SCHEDULE_SEED=S repeats one schedule")
def test_one_schedule(product: Product) -> None:
    seed = int(os.environ["EBSD_SCHEDULE_SEED"])
    run(product, seed)
    run(product, seed, with_drains(seed))


def search(mutation: Mutation) -> tuple[int, Broken] | None:
    """Return the first seed that shows a mutation, the recorded one first, and what is found."""
    mutated = Product(mutation.edits)
    for seed in (mutation.seed or 0, *range(max(SEARCH, 3 * (mutation.seed or 0)))):
        try:
            run_schedule(mutated, seed, mutation.prepare, mutation.focus)
        except Broken as broken:
            return seed, broken
    return None


@pytest.mark.timeout(1200)  # of a rare one, when the product has changed and its seed is looked for again
@pytest.mark.parametrize("mutation", [m for m in MUTATIONS if m.seed is not None], ids=lambda m: m.name)
def test_without_a_rule_a_schedule_fails(product: Product, mutation: Mutation) -> None:
    found = search(mutation)
    assert found is not None, f"no schedule shows it any more: {mutation.name}"
    seed, broken = found
    print(f"\n{mutation.name}\n    seed {seed}: {broken}")
    run(product, seed, mutation.focus)


@pytest.mark.parametrize("mutation", [m for m in MUTATIONS if m.why_not], ids=lambda m: m.name)
def test_a_rule_that_something_else_keeps_too_is_said_to_be_one(mutation: Mutation) -> None:
    assert mutation.seed is None
    mutated = Product(mutation.edits)  # its text is still there
    for seed in range(EQUIVALENT):
        run_schedule(mutated, seed, mutation.prepare, mutation.focus)


@pytest.mark.parametrize("mutation", [m for m in MUTATIONS if m.shown_by], ids=lambda m: m.name)
@pytest.mark.parametrize("without", [True, False], ids=["without the rule", "with it"])
def test_without_a_rule_a_test_of_one_order_of_steps_fails(mutation: Mutation, without: bool, tmp_path: Path) -> None:
    shutil.copytree(PRODUCT, tmp_path / "ebsd", ignore=shutil.ignore_patterns("__pycache__"))
    for edit in mutation.edits if without else ():
        path = tmp_path / "ebsd" / edit.file
        text = path.read_text()
        assert text.count(edit.old) == 1
        path.write_text(text.replace(edit.old, edit.new))
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'base'}",
         UNIT / mutation.shown_by],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert result.returncode == int(without), result.stdout


def test_every_rule_has_a_schedule_a_test_or_a_reason() -> None:
    assert [m.name for m in MUTATIONS if [m.seed is not None, bool(m.shown_by), bool(m.why_not)].count(True) != 1] == []
