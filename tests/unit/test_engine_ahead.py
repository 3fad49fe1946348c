"""Opening ahead: what the map names is open before a request needs it, and nothing else changes."""

from __future__ import annotations

import contextlib
import errno
import os

import pytest
import trio
from engine_rig import LINEAGE, Rig, engine_kind  # noqa: F401 - runs everything over both engines

from ebsd.domain.errors import StoreDamaged
from ebsd.domain.units import CHUNK
from ebsd.store.layers import parse_segment_name, segment_name
from ebsd.volume import ahead, engine
from ebsd.volume.ahead import BURST, PAUSE_FACTOR, LookAhead
from ebsd.volume.hashing import ENTRY_BYTES, LeafChecks, hash_layer, late_runs
from ebsd.volume.scheduling import DirectScheduler, run_sync
from ebsd.volume.trio_scheduling import TrioScheduler

LAYERS = 3 * BURST
SIZE = (LAYERS + 2) * CHUNK
PLAN = {chunk: chunk + 1 for chunk in range(LAYERS)}
"""Each chunk lies in a layer of its own, but for two holes at the end."""


@pytest.fixture
def rig(tmp_path):
    rig = Rig(tmp_path, SIZE, layers=LAYERS + 1)
    yield rig
    rig.close()


@pytest.fixture
def checks(rig):
    checks = LeafChecks(rig.disk, rig.dirfd, LINEAGE)
    yield checks
    checks.close()


def uuid_of(layer: int) -> bytes:
    return bytes([layer]) * 16


def hash_all(rig: Rig, layers) -> None:
    for layer in layers:
        runs = late_runs(rig.disk, rig.dirfd, layer, uuid_of(layer), [])
        hash_layer(rig.disk, rig.dirfd, LINEAGE, layer, uuid_of(layer), runs)


def opened_layers(rig: Rig) -> set[int]:
    """Return the layers, but the head, of which this process has a segment open."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # that of the listing itself
            path = os.readlink(f"/proc/self/fd/{fd}")
            segment = parse_segment_name(os.path.basename(path))
            if segment is not None and path.startswith(str(rig.directory)):
                found.add(segment[0])
    return found - {rig.head}


def look_ahead(rig: Rig) -> LookAhead:
    pass_ = LookAhead(rig.engine, DirectScheduler())
    run_sync(pass_.make_pass())
    return pass_


class Opens:
    """What is opened below the lineage directory from now on."""

    def __init__(self, rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        self.fail: dict[str, int] = {}
        really = rig.disk.open

        def opening(path, flags, mode=0o600, dir_fd=None):
            if str(path) in self.fail:
                raise OSError(self.fail[str(path)], os.strerror(self.fail[str(path)]))
            self.names.append(str(path))
            return really(path, flags, mode, dir_fd)

        monkeypatch.setattr(rig.disk, "open", opening)


def test_after_the_pass_neither_a_read_nor_a_copy_opens_anything(rig, checks, monkeypatch):
    content = rig.seal_content(PLAN, 7)
    hash_all(rig, PLAN.values())
    rig.start(leaves=checks)
    assert look_ahead(rig).opened == LAYERS
    assert opened_layers(rig) == set(PLAN.values())
    opens = Opens(rig, monkeypatch)
    assert rig.read(0, SIZE) == content
    for chunk in (0, 5, LAYERS - 1):
        rig.write(chunk * CHUNK + 4096, b"part" * 1024)
        content[chunk * CHUNK + 4096 : chunk * CHUNK + 8192] = b"part" * 1024
    assert rig.read(0, SIZE) == content
    assert opens.names == []
    if rig.native:  # the first write of an engine is Python's, for its credit; nothing of the layers is
        assert rig.engine.handed_back == 1


def test_a_chunk_that_is_copied_is_compared_with_its_leaf_all_the_same(rig, checks):
    rig.seal_content(PLAN, 7)
    hash_all(rig, PLAN.values())
    with (rig.directory / segment_name(3, uuid_of(3), 0)).open("r+b") as file:
        file.seek(2 * CHUNK)
        file.write(b"damage")
    rig.start(leaves=checks)
    look_ahead(rig)
    with pytest.raises(StoreDamaged, match="chunk 2 of layer 3 has changed"):
        rig.write(2 * CHUNK + 4096, bytes(4096))


def test_a_layer_that_is_hashed_later_is_compared_then(rig, checks):
    """That there are no leaves yet is nothing to remember."""
    rig.seal_content(PLAN, 7)
    rig.start(leaves=checks)
    look_ahead(rig)
    assert not checks.knows(3)
    hash_all(rig, [3])
    with (rig.directory / segment_name(3, uuid_of(3), 0)).open("r+b") as file:
        file.seek(2 * CHUNK)
        file.write(b"damage")
    with pytest.raises(StoreDamaged, match="chunk 2 of layer 3 has changed"):
        rig.write(2 * CHUNK + 4096, bytes(4096))


@pytest.mark.parametrize("kept", [1, BURST + 3])
def test_it_ends_where_the_room_ends_and_closes_nothing_of_others(rig, monkeypatch, kept):
    content = rig.seal_content(PLAN, 7)
    monkeypatch.setattr(engine, "SEALED_FDS", kept)
    rig.start()
    last = (LAYERS - 1) * CHUNK
    assert rig.read(last, CHUNK) == content[last : last + CHUNK]
    opens = Opens(rig, monkeypatch)
    assert look_ahead(rig).opened == kept - 1
    assert len(opens.names) == kept - 1
    assert LAYERS in opened_layers(rig)
    assert look_ahead(rig).opened == 0
    assert len(opens.names) == kept - 1
    assert rig.read(0, SIZE) == content  # pushes out as ever


def test_leaves_push_out_no_others(rig, monkeypatch):
    rig.seal_content(PLAN, 7)
    hash_all(rig, PLAN.values())
    held = ENTRY_BYTES + (rig.directory / f"{1:010d}-{uuid_of(1).hex()}.leaves").stat().st_size
    few = LeafChecks(rig.disk, rig.dirfd, LINEAGE, memory=5 * held)
    rig.start(leaves=few)
    rig.write(40 * CHUNK, b"x" * 4096)
    look_ahead(rig)
    assert few.knows(41)
    assert sum(few.knows(layer) for layer in PLAN.values()) == 5
    few.close()


def test_what_a_chunk_left_meanwhile_is_closed_again(rig):
    rig.seal_content(PLAN, 7)
    rig.start()
    opened = rig.engine.open_ahead(4, 5)
    rig.write(4 * CHUNK, bytes(CHUNK))
    assert not rig.engine.is_of_use_ahead(4, 5)
    assert not rig.engine.take_opened(opened)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened.fd)
    assert 5 not in opened_layers(rig)


def test_what_a_request_opened_meanwhile_is_kept_once(rig):
    content = rig.seal_content(PLAN, 7)
    rig.start()
    opened = rig.engine.open_ahead(4, 5)
    assert rig.read(4 * CHUNK, CHUNK) == content[4 * CHUNK : 5 * CHUNK]
    assert not rig.engine.take_opened(opened)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened.fd)
    assert rig.read(4 * CHUNK, CHUNK) == content[4 * CHUNK : 5 * CHUNK]


def test_neither_the_head_nor_what_no_layer_has_is_opened(rig):
    rig.seal_content({**PLAN, 2: rig.head}, 7)
    rig.start()
    assert look_ahead(rig).opened == LAYERS - 1
    assert not any(rig.engine.is_of_use_ahead(chunk, rig.live.entries[chunk]) for chunk in range(LAYERS + 2))


def test_a_layer_that_cannot_be_opened_is_told_to_who_reads_it(rig):
    content = rig.seal_content(PLAN, 7)
    os.unlink(rig.directory / segment_name(5, uuid_of(5), 0))
    rig.start()
    assert look_ahead(rig).opened == LAYERS - 1
    with pytest.raises(StoreDamaged, match="missing"):
        rig.read(4 * CHUNK, CHUNK)
    assert rig.read(5 * CHUNK, CHUNK) == content[5 * CHUNK : 6 * CHUNK]


def test_without_descriptors_it_ends(rig, monkeypatch):
    rig.seal_content(PLAN, 7)
    rig.start()
    opens = Opens(rig, monkeypatch)
    opens.fail[segment_name(5, uuid_of(5), 0)] = errno.EMFILE
    assert look_ahead(rig).opened == 4
    assert len(opens.names) == 4


def test_a_closed_engine_opens_nothing(rig):
    rig.seal_content(PLAN, 7)
    rig.start()
    opened = rig.engine.open_ahead(4, 5)
    run_sync(rig.engine.close())
    assert not rig.engine.take_opened(opened)
    assert look_ahead(rig).opened == 0
    assert opened_layers(rig) == set()


def test_it_pauses_only_while_there_are_requests(rig):
    rig.seal_content(PLAN, 7)
    rig.start()
    pauses: list[float] = []

    class Busy(DirectScheduler):
        async def sleep(self, seconds: float) -> None:
            pauses.append(seconds)

        async def blocking(self, function, *args):
            if len(pauses) == 1:
                rig.read(0, CHUNK)
            return function(*args)

    run_sync(LookAhead(rig.engine, Busy()).make_pass())
    assert [pause > 0 for pause in pauses] == [False, True, False]
    assert PAUSE_FACTOR >= 1


def test_its_end_stops_it_where_it_is(rig):
    rig.seal_content(PLAN, 7)

    async def main() -> None:
        rig.start(TrioScheduler())
        pauses = []

        class Slow(TrioScheduler):
            async def sleep(self, seconds: float) -> None:
                pauses.append(seconds)
                if len(pauses) == 2:
                    nursery.start_soon(ends)
                    await trio.sleep_forever()

        async def ends() -> None:
            await looking.end()
            assert looking.opened == 2 * BURST
            ended.set()

        looking, ended = LookAhead(rig.engine, Slow()), trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(looking.run)
            await ended.wait()
        assert len(opened_layers(rig)) == 2 * BURST

        never = LookAhead(rig.engine, TrioScheduler())
        await never.end()
        await never.run()
        assert never.opened == 0

    trio.run(main)


def test_a_map_is_looked_through_once_for_each_segment(rig, monkeypatch):
    """The same layer has another file behind the border of a segment."""
    monkeypatch.setattr(ahead, "_BLOCK", 8)
    monkeypatch.setattr(ahead, "CHUNKS_PER_SEGMENT", 16)
    rig.seal_content({chunk: 1 + chunk % 4 for chunk in range(LAYERS)}, 7)
    rig.start()
    places: list[tuple[int, int]] = []
    monkeypatch.setattr(rig.engine, "is_of_use_ahead", lambda chunk, layer: places.append((chunk, layer)))
    run_sync(LookAhead(rig.engine, DirectScheduler()).make_pass())
    assert places == [(chunk, 1 + chunk % 4) for chunk in range(LAYERS) if chunk % 16 < 4]
