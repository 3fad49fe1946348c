"""The native engine and the reference do the same: answers, maps and stored bytes, after any story.

The cipher is the real one, C does its own I/O, and what the hot path hands back goes to Python, as from a transport.
"""

from __future__ import annotations

import os
import random
import tempfile
from pathlib import Path
from unittest.mock import patch

import pytest
from engine_rig import LINEAGE, SHM, HotEngine, Rig
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ebsd.crypto.codec import CodecFactory
from ebsd.crypto.secret import Secret
from ebsd.domain.errors import EbsdError
from ebsd.domain.model import Cipher
from ebsd.domain.units import CHUNK, SECTOR
from ebsd.store.disk import RealDisk
from ebsd.store.layers import segment_name
from ebsd.volume.engine import BlockEngine, Codec
from ebsd.volume.hashing import LeafChecks, hash_layer, late_runs
from ebsd.volume.scheduling import run_sync

SIZE = 40 * CHUNK + 5 * SECTOR
SECRET = bytes(range(64))
DISK = RealDisk()


class Codecs:
    """The real ones, by layer number."""

    def __init__(self, rig: Rig, cipher: Cipher) -> None:
        self.rig = rig
        self.key = Secret(64)
        self.key.view[:] = SECRET
        self.factory = CodecFactory(None if cipher is Cipher.NONE else self.key, cipher=cipher)

    def for_layer(self, number: int) -> Codec:
        return self.factory.codec(self.rig.table.uuid_of(number))

    def close(self) -> None:
        self.factory.close()
        self.key.wipe()


class StingyGate:
    """Admits everything, and lends a few chunks at a time."""

    def __init__(self, dice: random.Random) -> None:
        self.dice = dice

    def admits(self, chunks: int) -> bool:
        return True

    def written(self) -> None:
        pass

    def lend(self) -> tuple[int, float]:
        return self.dice.randrange(6), float("inf")

    async def wait(self, since: float | None) -> float:
        raise AssertionError("there is space")


class Side:
    """One engine over files of its own."""

    def __init__(self, root: Path, *, native: bool, cipher: Cipher, files: int, stingy: bool) -> None:
        root.mkdir()
        self.native = native
        self.rig = Rig(root, SIZE, layers=1, native=native)
        self.codecs = self.rig.codecs = Codecs(self.rig, cipher)
        self.checks = LeafChecks(DISK, self.rig.dirfd, LINEAGE, memory=3000)
        gate = StingyGate(random.Random(1)) if stingy else None
        with patch.object(HotEngine, "uses_rig", False), patch("ebsd.volume.engine.SEALED_FDS", files):
            self.engine: BlockEngine = self.rig.start(leaves=self.checks, space=gate)

    def step(self, name: str, *arguments: int) -> object:
        """Do one step; what it answers or raises must be the same on both sides."""
        try:
            return getattr(self, name)(*arguments)
        except (EbsdError, OSError) as error:
            return type(error).__name__, str(error)

    def read(self, offset: int, length: int) -> bytes:
        return self.rig.read(offset, length)

    def write(self, offset: int, length: int, seed: int) -> int:
        return self.rig.write(offset, random.Random(seed).randbytes(length))

    def zero(self, offset: int, length: int) -> None:
        run_sync(self.engine.write_zeroes(offset, length))

    def flush(self) -> None:
        self.rig.flush()

    def reclaim(self) -> int:
        return run_sync(self.engine.reclaim())

    def find_leaks(self) -> int:
        return run_sync(self.engine.find_leaks())

    def seal(self, hash_it: int) -> bytes:
        layer = self.engine.head
        entries = bytes(run_sync(self.rig.seal()).entries)
        if hash_it:
            uuid = self.rig.table.uuid_of(layer)
            hash_layer(DISK, self.rig.dirfd, LINEAGE, layer, uuid, late_runs(DISK, self.rig.dirfd, layer, uuid, []))
            self.checks.forget(layer)
        return entries

    def grow(self, more: int) -> int:
        if self.rig.size < SIZE + 60 * CHUNK:
            run_sync(self.rig.grow(self.rig.size + more * SECTOR))
        return self.rig.size

    def drain(self, chunk: int) -> bool:
        self.engine.let_drain(range(1, self.engine.head))
        return run_sync(self.engine.drain(chunk))

    def close_files(self) -> None:
        self.engine.close_all_but(())
        self.checks.forget_all_but(())

    def left(self) -> frozenset[int]:
        return self.engine.left

    def damage(self, chunk: int) -> None:
        """Change a byte of a chunk in whatever sealed layer holds it."""
        layer = self.engine._entries[chunk]
        if 0 < layer < self.engine.head:
            with (self.rig.directory / segment_name(layer, self.rig.table.uuid_of(layer), 0)).open("r+b") as file:
                file.seek(chunk * CHUNK + 5000)
                value = file.read(1)[0]
                file.seek(chunk * CHUNK + 5000)
                file.write(bytes([value ^ 1]))

    def stored(self) -> dict[str, bytes]:
        """All that lies in the store, as bytes; and the live map's entries, by their marks durable or not."""
        assert self.rig.live is not None
        files = {name: (self.rig.directory / name).read_bytes() for name in sorted(os.listdir(self.rig.directory))}
        live = self.rig.live
        return files | {"entries": bytes(live.raw_entries), "marks": bytes(live.marks)}

    def durable(self) -> list[int]:
        return self.rig.durable_entries()

    def close(self) -> None:
        self.checks.close()
        self.rig.close()
        self.codecs.close()


def _position(unit: int) -> st.SearchStrategy[int]:
    return st.integers(0, (SIZE + 8 * CHUNK) // unit).map(lambda n: n * unit)


positions = st.one_of(_position(CHUNK), _position(SECTOR), _position(SECTOR), _position(1))
lengths = st.one_of(
    st.integers(1, 40).map(lambda n: n * SECTOR), st.integers(1, 20).map(lambda n: n * CHUNK), st.integers(0, 3 * CHUNK)
)
seeds = st.integers(0, 1000)
chunks = st.integers(0, SIZE // CHUNK)
STEPS = st.one_of(
    st.tuples(st.just("write"), positions, lengths, seeds),
    st.tuples(st.just("write"), positions, lengths, seeds),
    st.tuples(st.just("read"), positions, lengths),
    st.tuples(st.just("zero"), positions, lengths),
    st.tuples(st.just("seal"), st.integers(0, 1)),
    st.tuples(st.just("grow"), st.integers(1, 40)),
    st.tuples(st.just("drain"), chunks),
    st.tuples(st.just("damage"), chunks),
    st.sampled_from([("flush",), ("reclaim",), ("find_leaks",), ("close_files",), ("left",)]),
)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(
    story=st.lists(STEPS, min_size=5, max_size=60),
    cipher=st.sampled_from([Cipher.AES_256_XTS, Cipher.NONE]),
    files=st.sampled_from([1, 2, 100]),
    stingy=st.booleans(),
)
def test_both_do_the_same(story, cipher, files, stingy):
    with tempfile.TemporaryDirectory(dir=SHM if SHM.is_dir() else None) as directory:
        sides = [
            Side(Path(directory) / name, native=name == "native", cipher=cipher, files=files, stingy=stingy)
            for name in ("reference", "native")
        ]
        try:
            for number, step in enumerate([*story, ("flush",), ("read", 0, SIZE), ("left",)]):
                one, other = (side.step(*step) for side in sides)
                assert one == other, f"step {number}, {step}"
            one, other = (side.stored() for side in sides)
            assert one.keys() == other.keys()
            assert [name for name in one if one[name] != other[name]] == []
            assert sides[0].durable() == sides[1].durable()
        finally:
            for side in sides:
                side.close()


@pytest.fixture
def native(tmp_path):
    side = Side(tmp_path / "native", native=True, cipher=Cipher.AES_256_XTS, files=100, stingy=False)
    yield side
    side.close()


def test_what_is_not_rare_is_not_handed_back(native):
    """Otherwise all of the above would compare Python with Python."""
    model = bytearray(SIZE)
    native.write(0, 4 * SECTOR, 0)  # asks the gate, which lends from then on
    for seed in range(20):
        offset = seed * 2 * CHUNK + seed % 3 * SECTOR
        native.write(offset, CHUNK + SECTOR, seed)
    model[:] = native.read(0, SIZE)
    native.seal(1)
    handed_back = native.engine.handed_back
    for first in (True, False):
        for seed in range(20):
            offset = seed * 2 * CHUNK + 2 * SECTOR
            native.write(offset, SECTOR, 100 + seed)
            model[offset : offset + SECTOR] = random.Random(100 + seed).randbytes(SECTOR)
            assert native.read(offset, 4 * SECTOR) == model[offset : offset + 4 * SECTOR]
        if first:
            assert native.engine.handed_back - handed_back <= 2, "more than the first use of the layer, and its leaves"
            handed_back = native.engine.handed_back
    assert native.engine.handed_back == handed_back
    assert native.engine.statistics().copied_chunks >= 20
    assert native.read(0, SIZE) == model


@pytest.mark.parametrize("chunks", [600, 4000])
def test_leaves_of_a_large_leaf_file_are_found(tmp_path, chunks):
    """More than 16 KiB of it, in many runs: then it is read page by page, through a descriptor."""
    with patch(f"{__name__}.SIZE", chunks * CHUNK):
        side = Side(tmp_path / "native", native=True, cipher=Cipher.NONE, files=100, stingy=False)
    try:
        written = [chunk for chunk in range(chunks) if chunk % 3 and chunk % 7]
        for chunk in written:
            side.write(chunk * CHUNK, SECTOR, chunk)
        side.seal(1)
        side.rig.write(written[0] * CHUNK + SECTOR, b"first use")
        handed_back = side.engine.handed_back
        for chunk in random.Random(2).sample(written, 150):
            side.write(chunk * CHUNK + 2 * SECTOR, SECTOR, 1)
            assert side.read(chunk * CHUNK, SECTOR) == random.Random(chunk).randbytes(SECTOR)
        assert side.engine.handed_back == handed_back
        damaged = written[-5]
        side.damage(damaged)
        assert "has changed since the layer was hashed" in str(side.step("write", damaged * CHUNK, SECTOR, 1))
    finally:
        side.close()
