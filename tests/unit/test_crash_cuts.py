"""Each operation is cut before each of its calls, and behind the last one; what is found then is the old or the new.

By default each place is cut in one way, which goes round (of jobs every second place): a power cut that loses, keeps or
mixes what was not synced, the kill of everything, of ebsd alone, of a volume process, of a copy worker.
``EBSD_CUTS=full`` cuts each place in each way, with ``EBSD_CUTS_DICE`` dice (2) where chance has a part, and prints a
table; it takes the better part of an hour.

A failure names its ``Crash``; ``explore(BY_NAME[operation], Crash(...))`` is that one again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from world.crashes import Crash, all_crashes, calls_of, explore, thinned
from world.reports import printed_table
from world.stories import BY_NAME, OPERATIONS, Operation

FULL = os.environ.get("EBSD_CUTS") == "full"
DICE = int(os.environ.get("EBSD_CUTS_DICE", "2"))

pytestmark = [pytest.mark.timeout(7200 if FULL else 300)]


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    yield from printed_table(request, f"{'operation':32}{'places':>8}{'crashes':>9}{'failures':>10}", loud=FULL)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.name)
def test_a_cut_leaves_the_old_or_the_new(operation: Operation, table: list[str]):
    calls = calls_of(operation)
    explored = 0
    failures: list[str] = []
    for crash in all_crashes(calls, DICE) if FULL else thinned(calls):
        explored += 1
        try:
            explore(operation, crash)
        except Exception as exc:  # noqa: BLE001 - all of them are wanted, not the first
            failures.append(f"{crash}: {type(exc).__name__}: {exc}")
    table.append(f"{operation.name:32}{len(calls) + 1:8}{explored:9}{len(failures):10}")
    assert not failures, f"{len(failures)} of {explored}:\n" + "\n".join(failures[:20])


@pytest.mark.parametrize(
    ("operation", "crash"),
    [
        # The head of an abandoned snapshot was in the page cache only, and the row that names it was final.
        ("snapshot detached", Crash("kill", 7, 7)),
        ("snapshot attached", Crash("kill", 7, 7)),
        # The same of a sealed map that was renamed, and whose snapshot recovery called completed.
        ("snapshot detached", Crash("kill", 19)),
        ("copy", Crash("kill", 13)),
        # Of an append to the layer table only the length was left, and all of the lineage was called damaged.
        ("snapshot detached", Crash("power random", 3, 3)),
        ("restore", Crash("power random", 3, 7)),
        # An entry of the layer table was in the page cache only, and a row that needs it was final.
        ("snapshot attached", Crash("ebsd", 3, 3)),
        # A restore between its intent and its layer: a row without a file for ever.
        ("restore", Crash("kill", 2)),
    ],
)
def test_what_was_once_wrong(operation: str, crash: Crash):
    explore(BY_NAME[operation], crash)
