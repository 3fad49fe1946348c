"""Threads on the hot path while the event loop flushes, seals, grows, drains, punches; then the power goes.

Each 512 bytes carry a stamp: where they are, and a version. A sector is written by one thread, which knows its
version; the disk forgets what was not synced, so an entry that is durable before its data shows as garbage.
"""

from __future__ import annotations

import errno
import random
import struct
import tempfile
import threading
import time
from pathlib import Path

import pytest
import trio
from engine_rig import BLOCK, SHM, Died, FakeDisk, HotEngine, Rig

from ebsd.domain.units import CHUNK, SECTOR
from ebsd.volume._core import ffi, lib
from ebsd.volume.trio_scheduling import TrioScheduler

CHUNKS = 12
SIZE = CHUNKS * CHUNK
THREADS = 3
_STAMP = struct.Struct("<QQ")


class SharedDisk(FakeDisk):
    """One call that changes something at a time; all of them fail once the power is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
        self.gone = False

    def _changing(self, name: str, fd: int = -1, offset: int = 0, length: int = 0) -> None:
        if self.gone:
            raise OSError(errno.EIO, "the power is gone")
        super()._changing(name, fd, offset, length)

    def _locked(name):
        def method(self, *arguments):
            with self.lock:
                return getattr(super(), name)(*arguments)

        return method

    pwrite = _locked("pwrite")
    fdatasync = _locked("fdatasync")
    punch = _locked("punch")


def stamped(sector: int, version: int) -> bytes:
    return b"".join(
        (_STAMP.pack(sector * SECTOR + at, version) * (BLOCK // _STAMP.size)) for at in range(0, SECTOR, BLOCK)
    )


def versions(data: bytes, sector: int) -> list[int]:
    """Return the version of each block of a sector; each must be whole, of that place, or zeros (version 0)."""
    found = []
    for at in range(0, SECTOR, BLOCK):
        block = data[at : at + BLOCK]
        place, version = _STAMP.unpack_from(block)
        assert block == block[: _STAMP.size] * (BLOCK // _STAMP.size), f"sector {sector} is a mixture or garbage"
        assert (place, version) == (0, 0) or place == sector * SECTOR + at, f"sector {sector} shows {place}"
        found.append(version)
    return found


class Story:
    def __init__(self, rig: Rig, seed: int) -> None:
        self.rig = rig
        self.seed = seed
        self.answered = [0] * (SIZE // SECTOR)
        self.latest = [0] * (SIZE // SECTOR)
        """The version that was sent, answered or not."""
        self.durable = [0] * (SIZE // SECTOR)
        """What was answered before the last flush that returned began."""
        self.handed_back = self.done = 0
        self.errors: list[BaseException] = []
        self.ended = False

    # --- threads of a transport

    def work(self, me: int, token: trio.lowlevel.TrioToken) -> None:
        dice = random.Random(f"{self.seed}/{me}")
        engine = self.rig.engine
        assert isinstance(engine, HotEngine)
        lane = lib.ebsd_hot_lane_new(engine.hot)
        try:
            while not self.ended:
                if dice.random() < 0.5:
                    self._write(engine, lane, me, dice, token)
                else:
                    self._read(engine, lane, dice, token)
                self.done += 1
        except BaseException as error:  # noqa: BLE001 - shown by the test
            if not self.rig.disk.gone:
                self.errors.append(error)
        finally:
            lib.ebsd_hot_lane_free(engine.hot, lane)

    def _write(self, engine: HotEngine, lane, me: int, dice: random.Random, token) -> None:
        # Sectors in turn, so that all threads meet in each chunk; now and then zeros, over a sector of one's own.
        sector = dice.randrange(SIZE // SECTOR // THREADS) * THREADS + me
        version = self.latest[sector] = self.latest[sector] + 1
        data = stamped(sector, version)
        result = lib.ebsd_hot_write(engine.hot, lane, sector * SECTOR, SECTOR, ffi.from_buffer("unsigned char[]", data))
        if result == 1:
            self.handed_back += 1
            trio.from_thread.run(super(HotEngine, engine).write, sector * SECTOR, data, trio_token=token)
        elif result:
            raise OSError(-result, "write")
        self.answered[sector] = version

    def _read(self, engine: HotEngine, lane, dice: random.Random, token) -> None:
        first = dice.randrange(SIZE // SECTOR)
        count = min(dice.randrange(1, 40), SIZE // SECTOR - first)
        least = self.answered[first : first + count]
        out: bytes | bytearray | memoryview = bytearray(count * SECTOR)
        result = lib.ebsd_hot_read(
            engine.hot, lane, first * SECTOR, len(out), ffi.from_buffer("unsigned char[]", out, True)
        )
        if result == 1:
            self.handed_back += 1
            out = trio.from_thread.run(super(HotEngine, engine).read, first * SECTOR, len(out), trio_token=token)
        elif result:
            raise OSError(-result, "read")
        for at in range(count):
            for version in versions(bytes(out[at * SECTOR : (at + 1) * SECTOR]), first + at):
                assert version >= least[at], f"sector {first + at} went back to {version} from {least[at]}"

    # --- the loop

    async def control(self, seconds: float) -> None:
        dice = random.Random(self.seed)
        engine = self.rig.engine
        assert engine is not None
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.errors:
            match dice.randrange(8):
                case 0 | 1 | 2:
                    answered = list(self.answered)
                    await engine.flush()
                    self.durable = answered
                    await engine.reclaim()
                case 3:
                    # As long as it lasts nobody takes note of what is answered: the snapshot has what was before.
                    answered = list(self.answered)
                    copy = await self.rig.seal()
                    content = self.rig.content_of(copy.entries)
                    for sector, least in enumerate(answered):
                        for version in versions(content[sector * SECTOR : (sector + 1) * SECTOR], sector):
                            assert version >= least, f"the snapshot has sector {sector} of {version} instead of {least}"
                case 4 if self.rig.size < SIZE + 4 * CHUNK:
                    await self.rig.grow(self.rig.size + SECTOR * dice.randrange(1, 9))
                case 5:
                    engine.let_drain(range(1, engine.head))
                    for chunk in range(CHUNKS):
                        await engine.drain(chunk)
                case 6:
                    engine.close_all_but(())
                    assert 0 not in engine.left
                case _:
                    await engine.write_zeroes(SIZE, max(0, self.rig.size - SIZE))  # behind what the threads write
            await trio.sleep(dice.random() * 0.01)

    async def run(self, seconds: float, *, cut: bool) -> None:
        token = trio.lowlevel.current_trio_token()
        threads = [threading.Thread(target=self.work, args=(me, token)) for me in range(THREADS)]
        for thread in threads:
            thread.start()
        try:
            await self.control(seconds)
            self.rig.disk.gone = cut
        finally:
            self.ended = True
            for thread in threads:
                while thread.is_alive():
                    await trio.sleep(0.01)
        if not cut:
            assert self.rig.engine is not None
            await self.rig.engine.close()

    def check(self, least: list[int]) -> None:
        data = self.rig.read(0, SIZE)
        for sector in range(SIZE // SECTOR):
            for version in versions(data[sector * SECTOR : (sector + 1) * SECTOR], sector):
                assert least[sector] <= version <= self.latest[sector]


@pytest.mark.parametrize("cut", [False, True], ids=["close", "power cut"])
@pytest.mark.parametrize("seed", [1, 2])
def test_threads_and_the_loop_agree(seed: int, cut: bool) -> None:
    with tempfile.TemporaryDirectory(dir=SHM if SHM.is_dir() else None) as directory:
        rig = Rig(Path(directory), SIZE, disk=SharedDisk(), native=True)
        try:
            rig.start(TrioScheduler())
            story = Story(rig, seed)
            trio.run(lambda: story.run(1.0, cut=cut))
            assert story.errors == []
            assert story.done > 100
            assert story.handed_back < story.done / 2, "most requests need no Python"
            if cut:
                rig.disk.gone = False
                rig.power_cut(random.Random(seed))
                rig.check_durable()
                rig.start()
                story.check(story.durable)
            else:
                rig.drop()
                rig.live_path.unlink()
                rig.start()
                story.check(story.answered)
        finally:
            rig.close()


def test_a_write_after_the_end_is_handed_back_and_refused(tmp_path: Path) -> None:
    rig = Rig(tmp_path, SIZE, native=True)
    try:
        engine = rig.start()
        assert rig.write(0, bytes(SECTOR)) == SECTOR
        rig.disk.fail[("fdatasync", 0)] = errno.EIO
        with pytest.raises(OSError, match="the engine has stopped"):
            rig.flush()
        before = engine.handed_back
        for call in (lambda: rig.write(0, bytes(SECTOR)), lambda: rig.read(0, SECTOR)):
            with pytest.raises(OSError, match="the engine has stopped"):
                call()
        assert engine.handed_back == before + 2
    finally:
        rig.close()


def test_a_kill_in_a_hot_write_leaves_the_old_chunk(tmp_path: Path) -> None:
    rig = Rig(tmp_path, SIZE, native=True)
    try:
        content = rig.seal_content({0: 1, 1: 2}, 3)
        rig.start()
        rig.write(0, bytes(10))  # handed back: the gate lends from now on
        content[:10] = bytes(10)
        rig.disk.die_at = 0
        with pytest.raises(Died):
            rig.write(CHUNK, bytes(SECTOR))
        rig.drop()
        rig.disk.reset()
        rig.start(adopt=True)
        assert rig.read(0, SIZE) == content
    finally:
        rig.close()
