"""Requests of the engine one by one: what they answer, what they cost the disk, and what an error leaves."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import tempfile
from pathlib import Path

import pytest
from engine_rig import HOLE, Rig, engine_kind  # noqa: F401 - runs everything over both engines

from ebsd.domain.errors import StoreDamaged
from ebsd.domain.units import CHUNK, MIB, SECTOR, SEGMENT
from ebsd.store.durablemap import DurableMap
from ebsd.store.entries import map_hash
from ebsd.volume.engine import BlockEngine, EngineClosed, EngineFailed
from ebsd.volume.scheduling import run_sync

SHM = "/dev/shm" if Path("/dev/shm").is_dir() else None
SIZE = 20 * CHUNK + 3 * SECTOR


@pytest.fixture
def rig():
    with tempfile.TemporaryDirectory(dir=SHM) as directory:
        rig = Rig(Path(directory), SIZE)
        yield rig
        rig.close()


def calls(rig: Rig, name: str) -> int:
    return rig.disk.calls.get(name, 0)


def test_a_read_is_cut_at_the_end_of_the_volume(rig):
    rig.start()
    assert len(rig.read(SIZE - 10, 100)) == 10
    assert rig.read(SIZE, 1) == rig.read(SIZE + 5, 1) == rig.read(0, 0) == b""


def test_a_write_over_the_end_changes_nothing(rig):
    rig.start()
    with pytest.raises(OSError) as caught:
        rig.write(SIZE - 10, bytes([1]) * 11)
    assert caught.value.errno == errno.EFBIG
    assert rig.engine.is_blank()


def test_a_read_only_engine_refuses_changes_and_answers_flushes(rig):
    content = rig.seal_content({3: 1}, 7)
    engine = rig.start(read_only=True)
    for request in (engine.write(0, b"x"), engine.discard(0, 1), engine.write_zeroes(0, CHUNK)):
        with pytest.raises(OSError) as caught:
            run_sync(request)
        assert caught.value.errno == errno.EROFS
    run_sync(engine.flush())
    assert rig.read(0, SIZE) == content
    assert run_sync(engine.close())
    assert calls(rig, "punch") == 0


def test_a_hole_never_meets_the_cipher_or_the_disk(rig):
    rig.start()
    rig.disk.reset()
    assert rig.read(0, SIZE) == bytes(SIZE)
    assert not rig.disk.calls
    assert rig.codecs.made[rig.head].calls == 0


def test_a_mebibyte_of_one_layer_is_one_pread_and_one_decryption(rig):
    rig.start()
    rig.write(0, bytes(MIB))
    rig.disk.reset()
    before = rig.codecs.made[rig.head].calls
    rig.read(0, MIB)
    assert calls(rig, "pread") == 1
    assert rig.codecs.made[rig.head].calls == before + 1


def test_a_mebibyte_of_whole_chunks_is_one_encryption_and_one_pwrite(rig):
    rig.start()
    rig.write(0, b"1")  # the map is written out
    rig.disk.reset()
    before = rig.codecs.made[rig.head].calls
    rig.write(CHUNK, bytes([1]) * MIB)
    assert (calls(rig, "pwrite"), calls(rig, "pread")) == (1, 0)
    assert rig.codecs.made[rig.head].calls == before + 1


def test_a_write_with_ragged_ends_is_still_one_pwrite(rig):
    content = rig.seal_content({0: 1, 1: 2, 16: 1}, 3)
    rig.start()
    rig.write(SIZE - 1, b"1")
    rig.disk.reset()
    data = random.Random(1).randbytes(MIB)
    rig.write(1000, data)
    content[1000 : 1000 + MIB] = data
    content[SIZE - 1 :] = b"1"
    assert (calls(rig, "pwrite"), calls(rig, "pread")) == (1, 2)  # only the ends are read
    assert rig.read(0, SIZE) == content
    assert rig.engine.statistics().copied_chunks == 2


def test_a_write_that_covers_the_cut_last_chunk_reads_nothing(rig):
    rig.seal_content({20: 1}, 3)
    rig.start()
    rig.disk.reset()
    rig.write(20 * CHUNK, bytes([5]) * (3 * SECTOR))
    assert calls(rig, "pread") == 0
    assert rig.read(20 * CHUNK, CHUNK) == bytes([5]) * (3 * SECTOR)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize(("offset", "length"), [(2 * CHUNK, CHUNK), (2 * CHUNK + SECTOR, SECTOR), (CHUNK, MIB)])
def test_a_chunk_is_named_after_all_of_it_is_written(rig, monkeypatch, offset, length, fails):
    """I1: a kill between the two must not leave an entry that names what is not there."""
    engine = rig.start()
    rig.write(0, b"1")
    handed_back = getattr(engine, "handed_back", 0)
    named: list[list[int]] = []
    write_out = rig.disk.pwrite

    def pwrite(fd, data, at):
        named.append([chunk for chunk in range(1, 20) if rig.live.entries[chunk] != HOLE])
        if fails:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return write_out(fd, data, at)

    monkeypatch.setattr(rig.disk, "pwrite", pwrite)
    with pytest.raises(OSError, match="Input/output error") if fails else contextlib.nullcontext():
        rig.write(offset, bytes([3]) * length)
    monkeypatch.undo()
    assert getattr(engine, "handed_back", 0) == handed_back, "a native engine did not do it itself"
    assert named
    assert not any(named), "named before it was written"
    assert rig.live.entries[offset // CHUNK] == (HOLE if fails else rig.head)


def test_an_unaligned_write_in_the_head_touches_only_its_sectors(rig):
    rig.start()
    rig.write(0, bytes([7]) * CHUNK)
    rig.disk.reset()
    rig.write(SECTOR - 1, b"ab")
    writes = [(offset, length) for name, _, offset, length in rig.disk.log if name == "pwrite"]
    assert writes == [(0, 2 * SECTOR)]
    assert rig.read(SECTOR - 2, 4) == b"\x07ab\x07"


def test_a_whole_chunk_of_zeros_becomes_a_hole_and_ragged_ends_are_written(rig):
    rig.start()
    rig.write(0, bytes([9]) * (4 * CHUNK))
    run_sync(rig.engine.write_zeroes(CHUNK - 5, CHUNK + 10))
    assert list(rig.live.entries[:4]) == [rig.head, HOLE, rig.head, rig.head]
    expected = bytearray(bytes([9]) * (4 * CHUNK))
    expected[CHUNK - 5 : 2 * CHUNK + 5] = bytes(CHUNK + 10)
    assert rig.read(0, 4 * CHUNK) == expected


def test_zeroing_a_part_of_a_hole_writes_nothing(rig):
    rig.start()
    rig.disk.reset()
    run_sync(rig.engine.write_zeroes(5, 2 * CHUNK))
    assert not rig.disk.calls
    assert rig.engine.is_blank()


def test_zeroing_up_to_the_end_makes_the_cut_last_chunk_a_hole(rig):
    rig.start()
    rig.write(20 * CHUNK, bytes([1]) * (3 * SECTOR))
    run_sync(rig.engine.discard(20 * CHUNK, 3 * SECTOR))
    assert rig.engine.is_blank()


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_every_failing_pwrite_of_a_copy_leaves_map_and_content_as_they_were(rig, code):
    content = rig.seal_content({n: 1 + n % 2 for n in range(20)}, 5)
    rig.start()
    data = bytes([1]) * (3 * CHUNK)
    number = 0
    while True:
        rig.disk.reset()
        rig.disk.fail["pwrite", number] = code
        entries = list(rig.live.entries)
        try:
            rig.write(3000, data)
            break
        except OSError as error:
            failure = error
        assert failure.errno == code
        assert list(rig.live.entries) == entries
        rig.disk.reset()
        assert rig.read(0, SIZE) == content
        rig.flush()
        number += 1
    assert number == 1  # one run, one pwrite
    content[3000 : 3000 + len(data)] = data
    rig.disk.reset()
    assert rig.read(0, SIZE) == content


def test_a_request_that_failed_does_not_stop_the_others(rig):
    rig.start()
    rig.write(0, bytes([1]) * CHUNK)
    rig.disk.reset()
    rig.disk.fail[("pwrite", 0)] = errno.EIO
    with pytest.raises(OSError):
        rig.write(0, bytes([2]) * CHUNK)
    assert len(rig.engine._locks) == 0
    rig.write(0, bytes([3]) * CHUNK)
    assert rig.read(0, CHUNK) == bytes([3]) * CHUNK


@pytest.mark.parametrize("name", ["fdatasync", "pwrite"])
def test_every_failing_call_of_a_flush_stops_the_engine_for_ever(rig, name):
    number = 0
    while True:
        rig.start()
        rig.write(0, bytes([1]) * CHUNK)
        rig.disk.reset()
        rig.disk.fail[(name, number)] = errno.EIO
        try:
            rig.flush()
            break
        except EngineFailed as error:
            failure = error
        assert failure.cause_errno == errno.EIO
        assert rig.live.failed
        rig.disk.reset()
        for request in (rig.engine.read(0, 1), rig.engine.write(0, b"x"), rig.engine.flush(), rig.engine.close()):
            with pytest.raises(EngineFailed):
                run_sync(request)
        rig.drop()
        number += 1
    assert number >= 1


def test_an_engine_refuses_a_live_map_whose_engine_failed(rig):
    rig.start()
    rig.live.mark_failed()
    rig.drop()
    with pytest.raises(EngineFailed):
        rig.start(adopt=True)


def test_the_first_flush_syncs_head_sealed_layers_and_map_even_when_nothing_is_new(rig):
    rig.seal_content({0: 1, 1: 2}, 1)
    rig.start()
    rig.disk.reset()
    rig.flush()
    assert calls(rig, "fdatasync") == 4  # head, two sealed layers, map
    rig.disk.reset()
    rig.flush()
    assert not rig.disk.calls


def test_a_flush_of_writes_in_place_leaves_the_map_alone(rig):
    rig.start()
    rig.write(0, bytes(CHUNK))
    rig.flush()
    rig.disk.reset()
    rig.write(0, bytes(CHUNK))
    rig.flush()
    assert (calls(rig, "fdatasync"), calls(rig, "pwrite")) == (1, 1)


def test_short_counts_and_interruptions_are_completed(rig):
    content = rig.seal_content(dict.fromkeys(range(0, 20, 3), 1), 5)
    rig.disk.short = random.Random(3)
    rig.start()
    for _ in range(20):
        offset = rig.disk.short.randrange(SIZE)
        data = rig.disk.short.randbytes(min(SIZE - offset, 200_000))
        rig.write(offset, data)
        content[offset : offset + len(data)] = data
    rig.flush()
    assert rig.read(0, SIZE) == content


def test_a_segment_that_ends_early_is_damage_and_not_zeros(rig):
    rig.seal_content({5: 1}, 5)
    os.truncate(rig.directory / f"{1:010d}-{'01' * 16}.000", 4 * CHUNK)
    rig.start()
    with pytest.raises(StoreDamaged):
        rig.read(5 * CHUNK, 1)
    assert len(rig.engine._locks) == 0


def test_a_missing_layer_and_an_unknown_layer_are_damage(rig):
    rig.seal_content({5: 1}, 5)
    (rig.directory / f"{1:010d}-{'01' * 16}.000").unlink()
    rig.start()
    rig.live.entries[6] = 77
    rig.live.entries[7] = 0xFFFFFFFF
    for chunk in (5, 6, 7):
        with pytest.raises(StoreDamaged):
            rig.read(chunk * CHUNK, 1)


def test_close_flushes_and_returns_the_hash_of_the_durable_map(rig):
    rig.start()
    rig.write(12345, b"hello")
    digest = run_sync(rig.engine.close())
    assert run_sync(rig.engine.close()) == digest
    with pytest.raises(EngineClosed):
        rig.read(0, 1)
    durable = DurableMap.open(rig.disk, rig.map_path)
    assert map_hash(durable.entries(), 21) == digest
    durable.close()


def test_a_volume_is_blank_until_written_and_again_after_all_of_it_is_discarded(rig):
    engine = rig.start()
    assert engine.is_blank()
    rig.write(5, b"x")
    assert not engine.is_blank()
    run_sync(engine.discard(0, SIZE))
    assert engine.is_blank()


def test_punched_chunks_give_their_blocks_back(rig):
    engine = rig.start()
    rig.write(0, bytes([1]) * (16 * CHUNK))
    rig.flush()
    before = os.fstat(rig.head_fds[0]).st_blocks
    run_sync(engine.discard(0, 16 * CHUNK))
    assert run_sync(engine.reclaim()) == 0  # the zero is not durable yet
    rig.flush()
    assert run_sync(engine.reclaim()) == 16
    assert os.fstat(rig.head_fds[0]).st_blocks <= before - 16 * CHUNK // 512
    assert rig.read(0, 16 * CHUNK) == bytes(16 * CHUNK)
    assert calls(rig, "punch") == 1


def test_leaked_chunks_of_the_head_are_found_and_punched(rig):
    rig.start()
    rig.write(0, bytes([1]) * (3 * CHUNK))
    rig.flush()
    run_sync(rig.engine.discard(CHUNK, CHUNK))
    run_sync(rig.engine.close())  # and nobody punched
    rig.drop()
    engine = rig.start()
    assert run_sync(engine.find_leaks()) == 1
    assert run_sync(engine.reclaim()) == 0
    rig.flush()
    assert run_sync(engine.reclaim()) == 1
    assert rig.read(0, CHUNK) == bytes([1]) * CHUNK


def test_many_sealed_layers_need_few_descriptors(rig, monkeypatch):
    monkeypatch.setattr("ebsd.volume.engine.SEALED_FDS", 1)
    content = rig.seal_content({n: 1 + n % 2 for n in range(20)}, 5)
    rig.start()
    before = len(os.listdir("/proc/self/fd"))
    assert rig.read(0, SIZE) == content
    assert len(os.listdir("/proc/self/fd")) == before + 1


def test_a_volume_over_a_tebibyte_is_split_at_segments():
    with tempfile.TemporaryDirectory(dir=SHM) as directory:
        rig = Rig(Path(directory), SEGMENT + MIB, layers=1)
        try:
            rig.start()
            data = random.Random(4).randbytes(3 * CHUNK)
            rig.disk.reset()
            rig.write(SEGMENT - CHUNK - 100, data)
            assert rig.read(SEGMENT - CHUNK - 100, len(data)) == data
            fds = {fd for name, fd, _, _ in rig.disk.log if name == "pwrite"}
            assert set(rig.head_fds) < fds
            run_sync(rig.engine.discard(SEGMENT - CHUNK, 2 * CHUNK))
            rig.flush()
            assert run_sync(rig.engine.reclaim()) == 2
            assert rig.read(SEGMENT - CHUNK, 2 * CHUNK) == bytes(2 * CHUNK)
        finally:
            rig.close()


def test_a_volume_that_grew_reads_zeros_where_its_last_chunk_was_cut(rig):
    rig.start()
    rig.write(20 * CHUNK, bytes([1]) * (3 * SECTOR))
    run_sync(rig.engine.close())
    rig.drop()
    rig.size = 21 * CHUNK
    rig.start()
    assert rig.read(20 * CHUNK, CHUNK) == bytes([1]) * (3 * SECTOR) + bytes(13 * SECTOR)


def test_an_engine_has_no_trio_and_no_threads_of_its_own():
    import ebsd.volume.engine as module

    source = Path(module.__file__).read_text()
    assert "import trio" not in source
    assert "import threading" not in source
    assert BlockEngine.__doc__
