"""Each disk call of each operation fails once: the operation says so, nothing is lost, nothing stays half made.

By default a sixth of the calls of each operation, each with one error; ``EBSD_CUTS=full``: every call with every error
that fits it, and a table.
"""

from __future__ import annotations

import errno
import os
import zlib
from collections.abc import Iterator

import pytest
from world import World
from world.crashes import SEED, go_on, prepare
from world.failures import Failure, all_failures, every_call, fail, thinned_failures
from world.reports import printed_table
from world.stories import BY_NAME, OPERATIONS, Operation

FULL = os.environ.get("EBSD_CUTS") == "full"
PART = 6

pytestmark = [pytest.mark.timeout(7200 if FULL else 300)]


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    yield from printed_table(request, f"{'operation':32}{'calls':>8}{'failures':>10}{'told':>6}{'wrong':>7}", loud=FULL)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.name)
def test_a_call_that_fails_is_told_and_loses_nothing(operation: Operation, table: list[str]):
    calls = every_call(operation)
    failures = list(all_failures(calls) if FULL else thinned_failures(calls))
    if not FULL:
        failures = failures[zlib.crc32(operation.name.encode()) % PART :: PART]
    told = 0
    wrong: list[str] = []
    for failure in failures:
        try:
            told += fail(operation, failure)
        except Exception as exc:  # noqa: BLE001 - all of them are wanted, not the first
            call = calls[failure.at]
            wrong.append(f"{failure} {call.actor} {call.name} {call.path}: {type(exc).__name__}: {exc}")
    table.append(f"{operation.name:32}{len(calls):8}{len(failures):10}{told:6}{len(wrong):7}")
    assert not wrong, f"{len(wrong)} of {len(failures)}:\n" + "\n".join(wrong[:20])


@pytest.mark.parametrize(
    ("operation", "failure"),
    [
        # The error of a durable map that could not be read was replaced by one of the live map's memory, whose lock
        # stayed.
        ("attach", Failure(36, errno.EIO)),
    ],
)
def test_what_was_once_wrong(operation: str, failure: Failure):
    assert fail(BY_NAME[operation], failure)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.name)
def test_short_counts_and_interruptions_change_nothing(operation: Operation):
    with World(SEED) as world:
        names = prepare(world, operation)
        world.disk.arm(short=world.dice)
        operation.run(world, names)
        world.disk.disarm()
        go_on(world)
