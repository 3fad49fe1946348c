"""A process that serves a block file is killed, and another goes on with its connection: nobody sees anything."""

from __future__ import annotations

import os
import random
import threading
import time
from pathlib import Path

import pytest
from block_server import ENGINES, Options, served

from ebsd.domain.units import CHUNK, MIB, SECTOR

SIZE = 16 * MIB
THREADS = 8
TIMES = 20


class Writer(threading.Thread):
    """Writes and reads sectors of its own share of the file; remembers what was acknowledged."""

    def __init__(self, path: Path, number: int, stop: threading.Event) -> None:
        super().__init__()
        self._path, self._number, self._stop_asked = path, number, stop
        self._dice = random.Random(number)
        self.acknowledged: dict[int, bytes] = {}
        self.error: Exception | None = None
        self.requests = 0

    def run(self) -> None:
        try:
            fd = os.open(self._path, os.O_RDWR)
            try:
                while not self._stop_asked.is_set():
                    self._step(fd)
            finally:
                os.close(fd)
        except (OSError, AssertionError) as exc:
            self.error = exc

    def _step(self, fd: int) -> None:
        # Sectors of one chunk belong to different threads, so that copies of whole chunks meet writes in place.
        sector = self._dice.randrange(SIZE // SECTOR // THREADS) * THREADS + self._number
        if self._dice.random() < 0.6:
            data = self._dice.randbytes(SECTOR)
            assert os.pwrite(fd, data, sector * SECTOR) == SECTOR
            self.acknowledged[sector] = data
        else:
            assert os.pread(fd, SECTOR, sector * SECTOR) == self.acknowledged.get(sector, bytes(SECTOR))
        if self._dice.random() < 0.01:
            os.fsync(fd)
        self.requests += 1


@pytest.mark.parametrize("engine", ENGINES)
def test_no_request_is_lost_when_the_process_is_killed(tmp_path: Path, engine: str) -> None:
    dice = random.Random(7)
    with served(Options(str(tmp_path), SIZE, "native", engine), keeps_connection=True) as block:
        stop = threading.Event()
        writers = [Writer(block.path, number, stop) for number in range(THREADS)]
        for writer in writers:
            writer.start()
        try:
            for _ in range(TIMES):
                time.sleep(dice.uniform(0.01, 0.1))
                before = sum(writer.requests for writer in writers)
                block.replace()
                deadline = time.monotonic() + 20
                while sum(writer.requests for writer in writers) < before + 2 * THREADS:
                    assert time.monotonic() < deadline, "requests of a process that was killed are not answered"
                    time.sleep(0.005)
        finally:
            stop.set()
            for writer in writers:
                writer.join(20)
        assert [writer.error for writer in writers if writer.error is not None] == []
        assert not any(writer.is_alive() for writer in writers)
        fd = os.open(block.path, os.O_RDONLY)
        for writer in writers:
            for sector, data in writer.acknowledged.items():
                assert os.pread(fd, SECTOR, sector * SECTOR) == data
        os.close(fd)
        block.end()


def test_large_requests_survive_too(tmp_path: Path) -> None:
    data = [os.urandom(MIB) for _ in range(4)]
    with served(Options(str(tmp_path), SIZE), keeps_connection=True) as block:
        done, errors = threading.Event(), []

        def write() -> None:
            fd = os.open(block.path, os.O_RDWR)
            try:
                turn = 0
                while not done.is_set():
                    turn += 1
                    for index, piece in enumerate(data):
                        assert os.pwrite(fd, piece, index * MIB + CHUNK // 2) == MIB
                        assert os.pread(fd, MIB, index * MIB + CHUNK // 2) == piece
            except (OSError, AssertionError) as exc:
                errors.append(exc)
            finally:
                os.close(fd)

        writer = threading.Thread(target=write)
        writer.start()
        for _ in range(5):
            time.sleep(0.05)
            block.replace()
        done.set()
        writer.join(20)
        assert not writer.is_alive()
        assert errors == []
        block.end()


def test_pyfuse3_takes_nothing_over() -> None:
    from ebsd.volume import transports

    with pytest.raises(OSError, match="cannot take"):
        transports.load("pyfuse3")(None, -1, uid=0, gid=0, resume=bytes(64))  # type: ignore[arg-type]
