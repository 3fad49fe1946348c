"""Part ``engine``: the block engine alone, without a transport, native against reference; per second of CPU time.

CPU time, not the clock on the wall: all data is in the page cache, so both compute without a wait. The reference runs
without a loop that could wait; the native engine is called as a transport calls it, with one thread.
"""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench_figures import Table, median_ratio, spread
from bench_run import Outcome, Run, say

KIB, MIB = 1 << 10, 1 << 20
HEAD = 20_001
LAYERS = 10_000
STEP_SECONDS = 0.15


def run(run: Run) -> Outcome:
    size = run.size if run.sized else (64 if run.quick else 256) * MIB
    results: dict[str, dict[str, list[float]]] = {}
    for round_ in range(run.rounds):
        for kind in ("reference", "native"):
            say(f"engine: {kind}, round {round_ + 1}")
            directory = run.root / f"{kind}-{round_}"
            directory.mkdir()
            with _volume(directory, size, kind == "native") as volume:
                for name, rate in _rates(volume, size):
                    results.setdefault(name, {}).setdefault(kind, []).append(rate)
    table = Table("The engine alone, per second of CPU time", ["", "native", "reference", "ratio"])
    for name, row in results.items():
        native, reference = row["native"], row.get("reference")
        unit = 1 / MIB if "MiB/s" in name else 1.0
        table.add(
            name,
            spread([value * unit for value in native]).text(),
            spread([value * unit for value in reference]).text() if reference else "-",
            f"{median_ratio(native, reference):.1f}" if reference else "-",
        )
    deep = median_ratio(results[_DEEP]["native"], results[_FLAT]["native"])
    table.notes.append(f"reads of {LAYERS} layers against reads of one: {deep:.2f} times the rate")
    return Outcome([table], results)


_FLAT = "4 KiB random reads of one sealed layer, per second"
_DEEP = f"4 KiB random reads of {LAYERS} sealed layers, per second"


class _Volume:
    """An engine over files of its own; ``read`` and ``write`` are one request each."""

    def __init__(self, engine: Any, live: Any, sealed_fd: int, key: Any) -> None:
        from ebsd.volume._core import ffi, lib
        from ebsd.volume.scheduling import run_sync

        self.engine, self.live, self.sealed_fd, self.key = engine, live, sealed_fd, key
        self.handed_back = 0
        self._buffer = bytearray(MIB)
        if engine.hot is None:
            self.read: Callable[[int, int], object] = lambda at, length: run_sync(engine.read(at, length))
            self.write: Callable[[int, memoryview], object] = lambda at, data: run_sync(engine.write(at, data))
            return
        lane = lib.ebsd_hot_lane_new(engine.hot)  # as long as the process: there are few
        out, hot = ffi.from_buffer("unsigned char[]", self._buffer, True), engine.hot

        def read(at: int, length: int) -> None:
            if lib.ebsd_hot_read(hot, lane, at, length, out):
                self.handed_back += 1
                run_sync(engine.read(at, length))

        def write(at: int, data: memoryview) -> None:
            if lib.ebsd_hot_write(hot, lane, at, len(data), ffi.from_buffer("unsigned char[]", data)):
                self.handed_back += 1
                run_sync(engine.write(at, data))

        self.read, self.write = read, write

    def name_layers(self, chunks: int, layers: int) -> None:
        """Have the map name so many layers in turn, all of them the same file under the same key."""
        from ebsd.volume._core import lib

        for number in range(1, layers + 1):
            if self.engine.hot is not None and number > 1:
                lib.ebsd_core_add_layer(self.engine._core, number, 0, bytes(16), self.sealed_fd, self.key.address)
        for chunk in range(chunks):
            self.live.entries[chunk] = 1 + chunk % layers


@contextmanager
def _volume(directory: Path, size: int, native: bool) -> Iterator[_Volume]:
    from ebsd.crypto.codec import CodecFactory
    from ebsd.crypto.secret import Secret
    from ebsd.domain.geometry import chunk_count
    from ebsd.domain.ids import LineageId, VolumeId
    from ebsd.domain.model import Cipher
    from ebsd.domain.units import SECTOR
    from ebsd.store.disk import RealDisk
    from ebsd.store.durablemap import DurableMap, MapHeader
    from ebsd.store.layers import create_layer, open_layer
    from ebsd.store.layertable import LayerEntry, LayerTable
    from ebsd.store.livemap import LiveIdentity, LiveMap
    from ebsd.volume.engine import Head
    from ebsd.volume.native_engine import engine_kind
    from ebsd.volume.scheduling import DirectScheduler
    from ebsd.volume.spacegate import SpaceGate

    disk, scheduler = RealDisk(), DirectScheduler()
    lineage, volume = LineageId("6ba7b810-9dad-41d1-80b4-00c04fd430c8"), VolumeId("vol-0123456789abcdef0")
    uuids = {1: bytes([1]) * 16, HEAD: bytes([2]) * 16}
    table = LayerTable(lineage, SECTOR, Cipher.AES_256_XTS, tuple(LayerEntry(n, u, volume) for n, u in uuids.items()))
    (directory / "lineage").mkdir()
    dirfd = os.open(directory / "lineage", os.O_RDONLY)
    for number, uuid in uuids.items():
        create_layer(disk, dirfd, number, uuid, size)
    DurableMap.create(disk, directory / "map", MapHeader(lineage, volume, HEAD, chunk_count(size))).close()
    durable = DurableMap.open(disk, directory / "map")
    live = LiveMap.create(disk, directory / "live", LiveIdentity(bytes(16), volume, lineage, 1), durable, head=HEAD)
    heads = open_layer(disk, dirfd, HEAD, uuids[HEAD], size, writable=True)
    (sealed,) = open_layer(disk, dirfd, 1, uuids[1], size, writable=True)
    for at in range(0, size, MIB):
        os.pwrite(sealed, os.urandom(MIB), at)
    with Secret.random(64) as key, CodecFactory(key, cipher=Cipher.AES_256_XTS) as factory:

        class Codecs:
            def for_layer(self, number: int) -> Any:
                return factory.codec(uuids[number])

        engine = engine_kind(native)(
            disk=disk, scheduler=scheduler, size=size, head=Head(HEAD, heads), lineage_dirfd=dirfd, table=table,
            live=live, durable=durable, codecs=Codecs(),
            space=SpaceGate(disk=disk, scheduler=scheduler, fd=dirfd, floor=0, patience=1.0),
        )  # fmt: skip
        try:
            yield _Volume(engine, live, sealed, factory.codec(uuids[1]).native_key(0))  # type: ignore[union-attr]
        finally:
            engine._close_sealed()
            live.close()
            durable.close()
            for fd in (*heads, sealed, dirfd):
                os.close(fd)


def _rates(volume: _Volume, size: int) -> Iterator[tuple[str, float]]:
    dice = random.Random(1)
    sectors = [dice.randrange(size // (4 * KIB)) * 4 * KIB for _ in range(5000)]
    data = memoryview(os.urandom(MIB))
    volume.name_layers(size // (64 * KIB), 1)
    volume.read(0, 4 * KIB)
    yield _FLAT, _rate(sectors, lambda at: volume.read(at, 4 * KIB))
    if volume.engine.hot is not None:
        volume.name_layers(size // (64 * KIB), LAYERS)
        yield _DEEP, _rate(sectors, lambda at: volume.read(at, 4 * KIB))
    volume.name_layers(size // (64 * KIB), 1)
    chunks = dice.sample(range(0, size, 64 * KIB), size // (128 * KIB))
    volume.write(0, data[: 4 * KIB])
    begin = time.process_time()
    for at in chunks:
        volume.write(at + 4 * KIB, data[: 4 * KIB])
    yield "4 KiB writes that copy a chunk, per second", len(chunks) / (time.process_time() - begin)
    whole = range(0, size, MIB)
    for at in whole:
        volume.write(at, data)
    yield "1 MiB writes in place, MiB/s", MIB * _rate(whole, lambda at: volume.write(at, data))
    yield "1 MiB reads, MiB/s", MIB * _rate(whole, lambda at: volume.read(at, MIB))
    yield "4 KiB random writes in place, per second", _rate(sectors, lambda at: volume.write(at, data[: 4 * KIB]))
    yield "4 KiB random reads, per second", _rate(sectors, lambda at: volume.read(at, 4 * KIB))


def _rate(places: Any, request: Callable[[int], object]) -> float:
    """Return requests per CPU second."""
    done = 0
    begin = time.process_time()
    for at in itertools.cycle(places):
        request(at)
        done += 1
        if done % 64 == 0 and time.process_time() - begin > STEP_SECONDS:
            break
    return done / (time.process_time() - begin)
