"""Pages of volumes and snapshots: every row once, whatever the size; limits and tokens that cannot be are refused."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from world import World
from world.world import ROOT

from ebsd.control.pages import MAX_PAGE, PAGE_BYTES, taken
from ebsd.domain.errors import InvalidParameterValue

Describe = Callable[..., Awaitable[tuple[list[dict[str, Any]], str | None]]]


def pages(world: World, describe: Describe, size: int, filters: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    found, token = [], None
    while True:
        page, token = world._run(describe, ROOT, None, filters, size, token)
        found.append(page)
        if token is None:
            return found


@pytest.mark.parametrize("kind", ["volumes", "snapshots"])
def test_every_row_comes_once_in_pages_of_any_size(kind: str) -> None:
    with World(1) as world:
        made = [world.create() for _ in range(5)]
        if kind == "snapshots":
            made = [world.snapshot(made[0]) for _ in range(5)]
        describe = world.use.volumes.describe if kind == "volumes" else world.use.snapshots.describe
        ident = "VolumeId" if kind == "volumes" else "SnapshotId"
        for size in (1, 2, 3, 5, 6):
            found = pages(world, describe, size, [])
            assert [row[ident] for page in found for row in page] == made
            assert [len(page) for page in found[:-1]] == [size] * (len(found) - 1)
        # What a filter leaves out counts for the page, so a page may be empty and not the last one.
        last = [{"Name": "volume-id" if kind == "volumes" else "snapshot-id", "Values": made[-1:]}]
        assert [len(page) for page in pages(world, describe, 2, last)] == [0, 0, 1]
        named, token = world._run(describe, ROOT, made, [], 2)
        assert [row[ident] for row in named] == made
        assert token is None
        for size, token in ((0, None), (MAX_PAGE + 1, None), (1, "nonsense"), (1, "2026-01-01T00:00:00Z/job-1")):
            with pytest.raises(InvalidParameterValue):
                world._run(describe, ROOT, None, [], size, token)


def test_a_page_ends_before_it_is_too_long_for_a_message() -> None:
    rows = [str(number) for number in range(10)]
    tags = {"Tags": "x" * (PAGE_BYTES // 3)}
    first, token = taken(rows, 10, lambda row: ("then", row), lambda row: {"Id": row, **tags})
    assert ([row["Id"] for row in first], token) == (["0", "1", "2"], "then/2")
