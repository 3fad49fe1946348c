"""The judges of the stress tests: what a wrong snapshot looks like, each must see."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from checked_workload import SECTOR, BlockModel, BlockWriter, Contents, Exerciser, Found, Journal, crc32c, is_one_moment


def run_until(part: Journal | Exerciser | BlockWriter, count: int) -> None:
    """Run a part in this thread until it has begun so many operations."""

    class Enough(threading.Event):
        def is_set(self) -> bool:
            return part.begun >= count

    part.run(Enough())


def test_a_journal_is_counted_and_must_be_a_prefix(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    run_until(journal, 250)
    assert Journal.count(tmp_path) == journal.promised == 250
    last = tmp_path / "journal-000002"
    whole = last.read_bytes()
    last.write_bytes(whole + Journal.record(250)[:30] + bytes(10))  # torn, as a crash may leave it
    assert Journal.count(tmp_path) == 250
    last.write_bytes(whole[:-1])
    assert Journal.count(tmp_path) == 249
    last.write_bytes(whole + Journal.record(251))
    with pytest.raises(AssertionError):
        Journal.count(tmp_path)
    last.write_bytes(whole)
    middle = tmp_path / "journal-000001"
    middle.write_bytes(middle.read_bytes()[:-1])
    with pytest.raises(AssertionError, match="files follow"):
        Journal.count(tmp_path)


def test_an_exercised_file_is_judged_byte_by_byte(tmp_path: Path) -> None:
    exerciser = Exerciser(tmp_path / "file", seed=3)
    run_until(exerciser, 400)
    end = len(exerciser.steps)
    found = (tmp_path / "file").read_bytes()
    contents = Contents(Exerciser.LIMIT)
    contents.advance(exerciser.steps, end)
    contents.check(found, exerciser.steps, end)
    early = Contents(Exerciser.LIMIT)
    early.advance(exerciser.steps, end - 50)
    early.check(found, exerciser.steps, end)  # not yet promised then, so the end is as good as any moment between
    early.check(bytes(early.data[: early.size]), exerciser.steps, end)
    changed = bytearray(found)
    changed[len(found) // 2] ^= 1
    with pytest.raises(AssertionError, match="1 bytes"):
        contents.check(bytes(changed), exerciser.steps, end)
    with pytest.raises(AssertionError, match="bytes long"):
        contents.check(found[:-1], exerciser.steps, end)
    with pytest.raises(AssertionError):
        contents.check(bytes(early.data[: early.size]), exerciser.steps, end)


def test_a_device_is_judged_by_whole_writes_and_across_its_writers(tmp_path: Path) -> None:
    device = tmp_path / "device"
    size = 1 << 20
    device.write_bytes(bytes(2 * size))
    writers = [BlockWriter(device, at, size, direct=False, unit=SECTOR, seed=at + 1) for at in (0, size)]
    for writer in writers:
        run_until(writer, 20)
    model = BlockModel(writers[0])
    model.advance(15)
    before = bytes(model.data)
    found = device.read_bytes()[:size]
    assert Found(20, False) in model.matches(found, 20)
    assert not model.matches(found, 19)
    assert model.matches(before, 20) == [Found(15, False)]
    write = writers[0].writes[15]
    torn = bytearray(before)
    after = BlockModel(writers[0])
    after.advance(16)
    torn[write.offset : write.offset + SECTOR] = after.data[write.offset : write.offset + SECTOR]
    assert Found(15, write.length > SECTOR) in model.matches(bytes(torn), 20) or write.length == SECTOR
    torn[write.offset] ^= 1
    assert not model.matches(bytes(torn), 20)
    # The second writer began when the first had ended: its writes without all of the first's are no moment.
    assert is_one_moment(writers, [Found(20, False), Found(7, False)])
    assert is_one_moment(writers, [Found(5, True), Found(0, False)])
    assert not is_one_moment(writers, [Found(19, True), Found(1, False)])
    assert not is_one_moment(writers, [Found(19, False), Found(0, True)])


def test_the_checksum_of_fio_is_castagnolis() -> None:
    assert crc32c(b"123456789") == 0xE3069283
