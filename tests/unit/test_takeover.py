"""What a successor makes of what an engine deposited, whenever that engine ended."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engine_rig import LINEAGE, SHM, VOLUME, Rig

from ebsd.crypto.secret import Secret
from ebsd.domain.errors import IntegrityFailure, StoreDamaged
from ebsd.domain.geometry import chunk_count
from ebsd.domain.ids import AccountId, format_uuid
from ebsd.domain.model import Cipher
from ebsd.domain.units import MIB
from ebsd.store.durablemap import DurableMap
from ebsd.store.layers import open_layer
from ebsd.store.layertable import encode_table
from ebsd.store.livemap import LiveMap, LiveMapInUse
from ebsd.store.signedrecord import NO_HASH, RecordState, SignedBody
from ebsd.volume import takeover
from ebsd.volume.engine import Head
from ebsd.volume.holding import Deposit
from ebsd.volume.takeover import Restored, is_possible, restore

SIZE, LARGER = 8 * MIB, 8 * MIB + 128 * MIB


class Kept:
    """A holder's memory: descriptors of its own for all that is deposited."""

    pid = 1

    def __init__(self) -> None:
        self.deposits: dict[str, Deposit] = {}

    def keep(self, name: str, value: Mapping[str, Any], fds: Sequence[int] = (), *, watch: Sequence[int] = ()) -> None:
        assert set(watch) <= set(range(len(fds)))
        self.drop(name)
        self.deposits[name] = Deposit(dict(value), [os.dup(fd) for fd in fds])

    def drop(self, name: str) -> None:
        deposit = self.deposits.pop(name, None)
        for fd in deposit.fds if deposit else ():
            os.close(fd)

    def arm(self, *, failed_at: int, deaths: int) -> None: ...

    def serving(self) -> None: ...

    def done(self) -> None: ...


class Case:
    """A volume with an engine's deposits; its maps and descriptors are the engine's, which ends when ``restored``."""

    def __init__(self, root: Path) -> None:
        self.rig = Rig(root, SIZE)
        self.key = Secret.random(64)
        self.kept = Kept()
        rig, kept = self.rig, self.kept
        (rig.directory / "table").write_bytes(encode_table(rig.table))
        self.params: dict[str, Any] = {
            "VolumeId": VOLUME, "Owner": "000000001000", "Lineage": LINEAGE, "Size": SIZE, "Head": rig.head,
            "Cipher": int(Cipher.AES_256_XTS), "KeyArn": None, "Sources": [], "AttachGeneration": rig.generation,
            "BootId": format_uuid(rig.boot), "Record": "secret", "Unsynced": [1],
        }  # fmt: skip
        self.durable = DurableMap.open(rig.disk, rig.map_path)
        self.live = LiveMap.create(rig.disk, rig.live_path, rig.identity, self.durable, head=rig.head)
        self.listener = os.memfd_create("listener")
        takeover.keep_volume(kept, self.params, self.key, self.listener, rig.dirfd)
        takeover.keep_leaves(kept, None, ())
        takeover.keep_record(kept, self.body())
        takeover.keep_maps(kept, SIZE, self.durable, self.live)
        self.head_fds = self.open_head(rig.head, SIZE)
        takeover.keep_head(kept, Head(rig.head, self.head_fds))
        kept.keep("fuse", {}, [self.listener])

    def open_head(self, number: int, size: int) -> tuple[int, ...]:
        rig = self.rig
        return open_layer(rig.disk, rig.dirfd, number, rig.table.uuid_of(number), size, writable=True)

    def body(self, **more: Any) -> SignedBody:
        count = len(self.rig.table.layers)
        values: dict[str, Any] = {
            "state": RecordState.OPEN, "resource": VOLUME, "lineage": LINEAGE, "account": AccountId("000000001000"),
            "size": SIZE, "cipher": Cipher.AES_256_XTS, "generation": 7, "head": self.rig.head, "table_count": count,
            "table_hash": self.rig.table.prefix_hash(count), "map_hash": NO_HASH,
        }  # fmt: skip
        return SignedBody(**{**values, **more})

    def announce(self) -> Head:
        head = self.rig.announce_head()
        (self.rig.directory / "table").write_bytes(encode_table(self.rig.table))
        takeover.keep_next_head(self.kept, head)
        takeover.keep_record(self.kept, self.body(generation=8))
        return head

    def grow(self, until: str) -> None:
        """Grow as an engine does, up to a step of it."""
        rig = self.rig
        rig.head_fds = self.head_fds
        assert rig.grow_files(LARGER) == ()
        self.head_fds = self.open_head(rig.head, LARGER)
        longer = DurableMap.from_fd(rig.disk, os.dup(self.durable.fd), "map")
        grown = LiveMap.grown(rig.disk, rig.live_path, self.live, longer.header.chunks)
        takeover.keep_growth(self.kept, LARGER, longer, grown, ())
        for step in ("deposited", "renamed", "head", "maps", "dropped"):
            if step == "renamed":
                grown.replace(self.live)
            elif step == "head":
                takeover.keep_head(self.kept, Head(rig.head, self.head_fds))
            elif step == "maps":
                takeover.keep_maps(self.kept, LARGER, longer, grown)
            elif step == "dropped":
                self.kept.drop("growth")
            if step == until:
                break
        # A kill: what is not published stays where it is.
        grown._unpublished = None
        grown.close()
        longer.close()

    def restored(self) -> Restored:
        self.live.close()
        self.durable.close()
        for fd in (*self.head_fds, self.listener):
            os.close(fd)
        found = restore(self.rig.disk, self.kept.deposits)
        self.kept.deposits = {}
        return found


def close(found: Restored) -> None:
    found.live.close()
    found.durable.close()
    upcoming = () if found.next_head is None else found.next_head.fds
    for fd in (found.control, found.lineage, found.fuse, *found.head.fds, *upcoming):
        os.close(fd)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def case() -> Iterator[Case]:
    with tempfile.TemporaryDirectory(dir=SHM) as root:
        made = Case(Path(root))
        yield made
        os.close(made.rig.dirfd)
        made.rig._close_next()


def test_a_volume_comes_back_as_it_was(case: Case) -> None:
    case.live.store(3, case.rig.head)
    found = case.restored()
    assert "Record" not in found.params
    assert "Unsynced" not in found.params
    assert found.key is not None
    assert found.key.equals(case.key)
    assert (found.claim.size, found.claim.head, found.body.generation) == (SIZE, case.rig.head, 7)
    assert (found.live.entries[3], found.live.marked_pages()) == (case.rig.head, [0])
    assert found.head.number == case.rig.head
    assert len(found.head.fds) == 1
    assert (found.next_head, found.last_seal, found.older_heads, found.grown) == (None, None, [], False)
    close(found)


def test_the_lock_is_that_of_the_file_that_was_deposited(case: Case) -> None:
    found = case.restored()
    with pytest.raises(LiveMapInUse):
        LiveMap.open(case.rig.disk, case.rig.live_path, case.rig.identity)
    close(found)
    again = LiveMap.open(case.rig.disk, case.rig.live_path, case.rig.identity)
    assert again is not None
    again.close()


def test_a_head_that_was_announced_is_not_written_to_yet(case: Case) -> None:
    """The record that knows it may not be on the disk."""
    old = case.rig.head
    head = case.announce()
    found = case.restored()
    assert (found.head.number, found.claim.head, found.body.generation) == (old, old, 8)
    assert found.next_head is not None
    assert found.next_head.number == head.number
    assert len(found.next_head.fds) == 1
    close(found)


def test_a_head_that_a_seal_may_have_switched_to_is_gone_on_with(case: Case) -> None:
    old = case.rig.head
    head = case.announce()
    takeover.keep_head(case.kept, head)
    takeover.keep_seal(case.kept, ("snap-1", {"Record": "r"}))
    found = case.restored()
    assert (found.head.number, found.claim.head) == (head.number, head.number)
    assert (found.next_head, found.older_heads) == (None, [old])
    assert found.last_seal == ("snap-1", {"Record": "r"})
    close(found)


@pytest.mark.parametrize(
    ("until", "size"),
    [("deposited", SIZE), ("renamed", LARGER), ("head", LARGER), ("maps", LARGER), ("dropped", LARGER)],
)
def test_a_growth_took_place_when_the_longer_map_has_its_name(case: Case, until: str, size: int) -> None:
    case.live.store(5, case.rig.head)
    before = descriptors()
    case.grow(until)
    found = case.restored()
    assert (found.claim.size, found.live.chunks, found.durable.header.chunks) == (size, *[chunk_count(size)] * 2)
    assert (found.live.entries[5], found.live.marked_pages()) == (case.rig.head, [0])
    assert len(found.head.fds) == 1
    assert found.grown is (until != "dropped")
    assert os.fstat(found.live.descriptor()).st_nlink == 1
    if size == SIZE:
        found.durable.refresh()  # as the growth does that ebsd asks for again
        assert found.durable.header.chunks == chunk_count(LARGER)
    close(found)
    assert descriptors() < before


def _other_key(case: Case) -> None:
    with Secret(64) as zeros:
        copy = zeros.shared_copy()
    case.kept.keep("key", {"Length": 64}, [copy])
    os.close(copy)


def _other_table(case: Case) -> None:
    table = case.rig.table
    other = replace(table, layers=(replace(table.layers[0], uuid=b"x" * 16), *table.layers[1:]))
    (case.rig.directory / "table").write_bytes(encode_table(other))


def _other_attachment(case: Case) -> None:
    case.params["AttachGeneration"] += 1
    takeover.keep_volume(case.kept, case.params, case.key, case.listener, case.rig.dirfd)


@pytest.mark.parametrize(
    ("spoil", "error"),
    [(_other_key, IntegrityFailure), (_other_table, IntegrityFailure), (_other_attachment, StoreDamaged)],
)
def test_what_is_not_what_it_was_is_refused(case: Case, spoil: Callable[[Case], None], error: type[Exception]) -> None:
    spoil(case)
    with pytest.raises(error):
        case.restored()


@pytest.mark.parametrize(
    ("transport", "kernel", "possible"),
    [
        ("native", "6.9.0", True),
        ("native", "6.18.44-fc", True),
        ("native", "10.0-rc1", True),
        ("native", "6.8.12", False),
        ("native", "6.1.0-37-amd64", False),
        ("native", "strange", False),
        ("pyfuse3", "6.18.44", False),
    ],
)
def test_where_another_engine_can_go_on(transport: str, kernel: str, possible: bool) -> None:
    assert is_possible(transport, kernel) is possible
