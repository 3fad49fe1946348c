"""Blocks: lists of them against a comparison byte by byte over random histories, tokens, and the catalog's bits."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebsd.domain import blocks as rules
from ebsd.domain.blocks import BLOCK, CHUNKS_PER_BLOCK, Tokens
from ebsd.domain.errors import (
    BlockOutOfRange,
    BlockTokenExpired,
    InvalidBlockToken,
    InvalidPageToken,
    InvalidParameter,
    PageTokenExpired,
)
from ebsd.domain.ids import AccountId, SnapshotId
from ebsd.domain.states import DirectEvent, DirectState
from ebsd.store import blocklists
from ebsd.store.blocklists import changed_blocks, holds_data, overlay, stored_blocks, written_blocks
from ebsd.store.catalog import Catalog
from ebsd.store.catalog_blocks import PAGE_BLOCKS, DirectSnapshot

# --- lists, against bytes

CHUNKS: Final = 40
"""Five blocks."""


class History:
    """A lineage as its maps have it, and the byte that each chunk shows; a layer for each snapshot, as in the store."""

    def __init__(self) -> None:
        self.entries = [0] * CHUNKS
        self.bytes: list[int] = [0] * CHUNKS
        self.head = 1
        self.taken: list[tuple[list[int], list[int]]] = []

    def write(self, chunk: int, value: int) -> None:
        self.entries[chunk] = self.head
        self.bytes[chunk] = value

    def discard(self, chunk: int) -> None:
        self.entries[chunk] = 0
        self.bytes[chunk] = 0

    def snapshot(self) -> None:
        self.taken.append((list(self.entries), list(self.bytes)))
        self.head += 1

    def restore(self, which: int) -> None:
        if self.taken:
            self.entries, self.bytes = (list(part) for part in self.taken[which % len(self.taken)])
            self.head += 1


STEP = st.one_of(
    st.tuples(st.just("write"), st.integers(0, CHUNKS - 1), st.integers(0, 2)),
    st.tuples(st.just("discard"), st.integers(0, CHUNKS - 1)),
    st.tuples(st.just("snapshot")),
    st.tuples(st.just("restore"), st.integers(0, 9)),
)


def view(entries: list[int]) -> memoryview:
    from array import array

    return memoryview(array("I", entries))


def differing(one: list[int], other: list[int]) -> set[int]:
    return {at // CHUNKS_PER_BLOCK for at, (a, b) in enumerate(zip(one, other, strict=True)) if a != b}


@given(st.lists(STEP, max_size=60), st.integers(1, 3))
def test_changed_blocks_are_a_superset_of_the_bytes_that_differ_and_every_one_was_written(
    steps: list[tuple[object, ...]], limit: int
) -> None:
    history = History()
    for name, *arguments in steps:
        getattr(history, str(name))(*arguments)
    history.snapshot()
    for first, first_bytes in history.taken:
        for second, second_bytes in history.taken:
            found: list[int] = []
            start: int | None = 0
            while start is not None:
                page = changed_blocks(view(first), view(second), start, limit)
                assert len(page.blocks) <= limit
                found += page.blocks
                start = page.following
            assert found == sorted(set(found))
            assert differing(first_bytes, second_bytes) <= set(found)
            assert set(found) == differing(first, second)
    for entries, _ in history.taken:
        stored = stored_blocks(view(entries), 0, 100)
        assert stored.blocks == [n for n in range(5) if any(entries[8 * n : 8 * n + 8])]
        assert [n for n in range(7) if holds_data(view(entries), n)] == stored.blocks


@given(st.lists(st.sampled_from([0, 1, 2]), max_size=40), st.lists(st.sampled_from([0, 1, 2]), max_size=40))
@settings(max_examples=60)
def test_a_longer_map_is_compared_with_holes_and_windows_do_not_matter(one: list[int], other: list[int]) -> None:
    length = max(len(one), len(other))
    filled = [[*part, *[0] * (length - len(part))] for part in (one, other)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocklists, "_WINDOW", 2 * CHUNKS_PER_BLOCK * 4)
        for start in range(6):
            found = changed_blocks(view(one), view(other), start, 100)
            assert found.blocks == [n for n in sorted(differing(*filled)) if n >= start]
            assert found.following is None


def test_written_blocks_are_laid_over_the_map_of_the_parent() -> None:
    entries = view([3] * 20)
    overlay(entries, bytes([0b101]), 7, 20)
    assert entries.tolist() == [7] * 8 + [3] * 8 + [7] * 4
    assert written_blocks(bytes([0, 0b10000001])) == [8, 15]


# --- tokens

KEY = bytes(range(32))
TOKENS = Tokens(KEY)
TOKEN = TOKENS.block("000000001000", "snap-1", 7, 1000)


def test_a_token_is_good_for_its_block_until_it_expires() -> None:
    TOKENS.check_block(TOKEN, "000000001000", "snap-1", 7, 999.9)
    assert len(TOKEN) <= 256
    with pytest.raises(BlockTokenExpired):
        TOKENS.check_block(TOKEN, "000000001000", "snap-1", 7, 1000)
    assert KEY.hex() not in repr(TOKENS)


@pytest.mark.parametrize(
    ("account", "snapshot", "block"),
    [("000000001001", "snap-1", 7), ("000000001000", "snap-2", 7), ("000000001000", "snap-1", 8)],
)
def test_a_token_is_good_for_nothing_else(account: str, snapshot: str, block: int) -> None:
    with pytest.raises(InvalidBlockToken):
        TOKENS.check_block(TOKEN, account, snapshot, block, 0)


@given(st.integers(0, len(base64.b64decode(TOKEN)) - 1), st.integers(1, 255))
def test_a_token_with_any_other_byte_is_refused(at: int, change: int) -> None:
    raw = bytearray(base64.b64decode(TOKEN))
    raw[at] ^= change
    with pytest.raises(InvalidBlockToken):
        TOKENS.check_block(base64.b64encode(raw).decode(), "000000001000", "snap-1", 7, 0)


@pytest.mark.parametrize("token", ["", "x", "é", TOKEN[:-4], TOKEN + "AAAA", base64.b64encode(bytes(49)).decode()])
def test_what_is_no_token_is_refused(token: str) -> None:
    with pytest.raises(InvalidBlockToken):
        TOKENS.check_block(token, "000000001000", "snap-1", 7, 0)
    with pytest.raises(InvalidPageToken):
        TOKENS.read_page(token, "000000001000", ("list", "snap-1"), 0)


def test_a_page_token_goes_on_with_the_same_request_only() -> None:
    token = TOKENS.page("000000001000", ("list", "snap-1"), 300, 100.0)
    assert TOKENS.read_page(token, "000000001000", ("list", "snap-1"), 3699) == 300
    with pytest.raises(PageTokenExpired):
        TOKENS.read_page(token, "000000001000", ("list", "snap-1"), 3700)
    for account, request in (
        ("000000001000", ("list", "snap-2")),
        ("000000001001", ("list", "snap-1")),
        ("000000001000", ("changed", "snap-1")),
        ("000000001000", ("lis", "tsnap-1")),
    ):
        with pytest.raises(InvalidPageToken):
            TOKENS.read_page(token, account, request, 0)
    with pytest.raises(InvalidBlockToken):
        TOKENS.check_block(token, "list", "snap-1", 300, 0)
    with pytest.raises(InvalidBlockToken):
        Tokens(bytes(32)).check_block(TOKEN, "000000001000", "snap-1", 7, 0)


def test_limits() -> None:
    assert rules.check_block(1, BLOCK + 1) == 1
    for block in (-1, 2):
        with pytest.raises(BlockOutOfRange):
            rules.check_block(block, BLOCK + 1)
    assert rules.check_results(None) == rules.check_results(10_000) == rules.MOST_LISTED
    assert rules.check_timeout(None) == 60
    for check, value in ((rules.check_results, 99), (rules.check_results, 10_001), (rules.check_timeout, 9)):
        with pytest.raises(InvalidParameter):
            check(value)
    with pytest.raises(InvalidParameter):
        rules.check_timeout(4321)
    for checksum in ("", "x", "é", base64.b64encode(bytes(31)).decode()):
        with pytest.raises(InvalidParameter):
            rules.parse_checksum(checksum)
    assert rules.block_chunks(1, 12) == range(8, 12)
    assert len(rules.block_chunks(9, 12)) == 0


# --- the catalog

SNAPSHOT = SnapshotId("snap-00000000000000001")
ACCOUNT = AccountId("000000001000")


def direct(**more: object) -> DirectSnapshot:
    values = {
        "id": SNAPSHOT, "account": ACCOUNT, "state": DirectState.OPEN, "parent": None, "layer": 1, "timeout": 60,
        "active": 100, "written": 0, "client_token": "t", "request": "r", **more,
    }  # fmt: skip
    return DirectSnapshot(**values)  # type: ignore[arg-type]


@given(st.lists(st.lists(st.integers(0, 3 * PAGE_BLOCKS), min_size=1, max_size=8), max_size=8))
@settings(max_examples=30, deadline=None)
def test_the_catalog_has_a_bit_for_each_block_that_is_durable(
    tmp_path_factory: pytest.TempPathFactory, puts: list[list[int]]
) -> None:
    catalog = Catalog(tmp_path_factory.mktemp("catalog") / "catalog.sqlite")
    try:
        catalog.run(lambda t: t.add_direct(direct()))
        for at, blocks in enumerate(puts):
            catalog.run(lambda t, blocks=blocks, at=at: t.note_written(SNAPSHOT, blocks, 200 + at))  # type: ignore[misc]
        known = sorted({block for blocks in puts for block in blocks})
        assert written_blocks(catalog.run(lambda t: t.written_bits(SNAPSHOT))) == known
        found = catalog.run(lambda t: t.direct(SNAPSHOT))
        assert found is not None
        assert found.written == len(known)
        assert found.active == (199 + len(puts) if puts else 100)
    finally:
        catalog.close()


def test_the_end_of_a_direct_snapshot_forgets_its_blocks_and_later_itself(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "catalog.sqlite")
    try:
        catalog.run(lambda t: t.add_direct(direct(parent=SnapshotId("snap-00000000000000002"))))
        catalog.run(lambda t: t.note_written(SNAPSHOT, [5], 150))
        assert catalog.run(lambda t: t.pending_children(SnapshotId("snap-00000000000000002"))) == [SNAPSHOT]
        catalog.run(lambda t: t.advance_direct(direct(), DirectEvent.TIME_OUT, 300))
        assert catalog.run(lambda t: t.written_bits(SNAPSHOT)) == b""
        assert catalog.run(lambda t: t.pending_children(SnapshotId("snap-00000000000000002"))) == []
        catalog.run(lambda t: t.forget_directs(300))
        assert catalog.run(lambda t: t.direct_of_token(ACCOUNT, "t")) is not None
        catalog.run(lambda t: t.forget_directs(301))
        assert catalog.run(lambda t: t.directs()) == []
    finally:
        catalog.close()
