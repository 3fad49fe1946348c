"""The copy worker with real files, real cryptography and real processes: what arrives, and what a kill leaves."""

from __future__ import annotations

import base64
import contextlib
import ctypes
import errno
import hashlib
import itertools
import json
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import trio

from ebsd.crypto import record_mac
from ebsd.crypto.codec import CodecFactory
from ebsd.crypto.kdf import key_check_value
from ebsd.crypto.secret import Secret
from ebsd.domain.errors import RemoteError
from ebsd.domain.geometry import chunk_count
from ebsd.domain.model import Cipher
from ebsd.domain.units import CHUNK, MIB, SECTOR
from ebsd.ipc.channel import Channel
from ebsd.ipc.process import start_module
from ebsd.store.disk import RealDisk
from ebsd.store.durablemap import DurableMap, MapHeader
from ebsd.store.entries import map_hash
from ebsd.store.layers import create_layer, open_layer, segment_name
from ebsd.store.layertable import LayerEntry, append_layer, create_layer_table, read_layer_table
from ebsd.store.leaftable import leaf_root, read_slots
from ebsd.store.leaves import LeafFile, leaf_digest, leaf_file_name
from ebsd.store.record import Record, Resource, WrappedKey, encode_record
from ebsd.store.sealedmap import encode_sealed_map, read_sealed_map
from ebsd.store.signedrecord import NO_HASH, UNSIGNED, RecordState, SignedBody, born, split_signed
from ebsd.volume import copier
from ebsd.volume.copier import CopyWorker, Run, runs

pytestmark = pytest.mark.trio
ROOT = Path(__file__).resolve().parents[2]
DISK = RealDisk()

OWNER = "000000001000"
SNAPSHOT = "snap-0123456789abcdef0"
VOLUME = "vol-0123456789abcdef0"
NEW = {"snapshot": "snap-0fedcba9876543210", "volume": "vol-0fedcba9876543210"}
FROM, INTO = "6ba7b810-9dad-41d1-80b4-00c04fd430c8", "7ba7b810-9dad-41d1-80b4-00c04fd430c9"
KEY_ARN = "arn:aws:kms:local:000000001000:key/6ba7b810-9dad-41d1-80b4-00c04fd430c8"
XTS, PLAIN = Cipher.AES_256_XTS, Cipher.NONE


# --- the rig


@dataclass
class End:
    """One end of a copy as ebsd and the key service know it; tests change it before they start."""

    id: str
    lineage: str
    directory: Path
    cipher: Cipher
    size: int
    layers: int
    head: int = 0
    key: bytes = field(default_factory=lambda: os.urandom(64))
    record: Record | None = None
    claim: dict = field(default_factory=dict)
    anchor: dict = field(default_factory=dict)

    def secret(self) -> Secret | None:
        return None if self.cipher is PLAIN else Secret.from_buffer(self.key)

    def sign(self, body: SignedBody) -> bytes:
        secret = self.secret()
        encoded = body.encode()
        return encoded + (record_mac.plain_checksum(encoded) if secret is None else record_mac.sign(secret, encoded))

    def table(self):
        return read_layer_table(DISK, self.directory / "table")

    def body(self, **changes) -> SignedBody:
        body = SignedBody(
            RecordState.BORN, self.id, self.lineage, OWNER, self.size, self.cipher, 0, self.head,
            self.layers, self.table().prefix_hash(self.layers),
        )  # fmt: skip
        return replace(body, **changes)

    def make_record(self, signed: bytes, authority: bytes | None = None) -> Record:
        resource = Resource(
            self.id, OWNER, "user", self.lineage, SECTOR, self.cipher, self.size, "2026-01-01T00:00:00Z", ""
        )
        wrapped = None if self.cipher is PLAIN else WrappedKey(KEY_ARN, b"blob", {})
        return Record(resource, wrapped, signed, authority)

    def codec(self, layer: int):
        """Return (factory, codec) of one layer; the factory must live as long as the codec is used."""
        secret = self.secret()
        factory = CodecFactory(secret, cipher=self.cipher)
        return (factory, secret), factory.codec(self.table().uuid_of(layer))

    def session(self, held: list) -> socket.socket:
        """Return a key session whose answer is there before the question."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        members = json.dumps(self.anchor).encode()
        ours.send(struct.pack("<8sII", b"EBSDKA01", 0, len(members)) + members)
        if self.anchor["encrypted"]:
            ours.send(self.key)
        held.append(ours)
        return theirs


def make_end(root, name, resource, lineage, cipher, size, layers, head=0) -> End:
    directory = root / name
    directory.mkdir()
    create_layer_table(DISK, directory / "table", lineage, cipher)
    with opened(directory) as fd:
        for number in range(1, layers + 1):
            uuid = os.urandom(16)
            append_layer(DISK, directory / "table", LayerEntry(number, uuid, VOLUME))
            create_layer(DISK, fd, number, uuid, size)
    end = End(resource, lineage, directory, cipher, size, layers, head)
    secret = end.secret()
    key_arn = None if secret is None else KEY_ARN
    end.claim = {
        "ResourceId": resource, "Owner": OWNER, "Lineage": lineage, "Size": size, "Cipher": int(cipher),
        "KeyArn": key_arn,
    }  # fmt: skip
    end.anchor = {
        "resource": resource, "owner": OWNER, "encrypted": secret is not None, "key_arn": key_arn,
        "kcv": None if secret is None else key_check_value(secret).hex(), "floor": 0,
    }  # fmt: skip
    return end


@contextlib.contextmanager
def opened(path, flags=os.O_RDONLY):
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


class Rig:
    """A snapshot over several layers with known content, and a destination."""

    def __init__(
        self, root: Path, *, kind="snapshot", source=XTS, target=XTS, size=8 * MIB, target_size=None, layers=3,
        density=0.5, seed=1, signed="authority", entries=None,
    ) -> None:  # fmt: skip
        dice = random.Random(seed)
        self.root, self.kind, self.done_through = root, kind, 0
        self.chunks = chunk_count(size)
        self.source = make_end(root, "source", SNAPSHOT, FROM, source, size, layers)
        self.target = make_end(
            root, "target", NEW[kind], INTO, target, target_size or size, 1, head=1 if kind == "volume" else 0
        )
        self.entries = memoryview(bytearray(self.chunks * 4)).cast("I")
        self.plain: dict[int, bytes] = {}
        if entries is None:
            layer = 1
            for chunk in range(self.chunks):
                if dice.random() < 0.3:  # stretches of one layer, and single chunks
                    layer = dice.randrange(1, layers + 1)
                self.entries[chunk] = layer if dice.random() < density else 0
        else:
            self.entries[:] = memoryview(bytearray(b"".join(n.to_bytes(4, "little") for n in entries))).cast("I")
        self._fill(dice)
        self.write_map(self.entries)
        self.sign_source(signed)
        self.target.record = self.target.make_record(born(self.target.body()))
        self.target.claim |= {"Kind": kind, "Layer": 1}
        self.source.claim["AuthorityIds"] = [VOLUME]
        self.target_uuid = self.target.table().uuid_of(1)
        self.encode = lambda record: base64.b64encode(encode_record(record)).decode()
        self.new_output()

    def _fill(self, dice: random.Random) -> None:
        table = self.source.table()
        with contextlib.ExitStack() as stack:
            codecs, fds = {}, {}
            for number in table.numbers():
                codecs[number] = self.source.codec(number)
                path = self.source.directory / segment_name(number, table.uuid_of(number), 0)
                fds[number] = stack.enter_context(opened(path, os.O_RDWR))
                # Old content that no map names any more must not be copied.
                os.pwrite(fds[number], dice.randbytes(CHUNK), dice.randrange(self.chunks) * CHUNK)
            for chunk, layer in enumerate(self.entries):
                if layer:
                    data = bytearray(dice.randbytes(CHUNK))
                    beyond = (chunk + 1) * CHUNK - self.source.size
                    if beyond > 0:
                        data[-beyond:] = bytes(beyond)
                    self.plain[chunk] = bytes(data)
                    codecs[layer][1].encrypt_into(data, data, chunk * 16)
                    os.pwrite(fds[layer], data, chunk * CHUNK)

    @property
    def map_path(self) -> Path:
        return self.root / "source.map"

    @property
    def output(self) -> Path:
        return self.root / "output"

    def write_map(self, entries: memoryview, snapshot=SNAPSHOT, lineage=FROM) -> None:
        self.map_path.write_bytes(encode_sealed_map(snapshot, lineage, entries, len(entries)))

    def sign_source(self, how: str) -> None:
        source = self.source
        digest = map_hash(self.entries, self.chunks)
        volume = source.body(
            state=RecordState.CLEAN, resource=VOLUME, generation=6, head=source.layers, map_hash=digest
        )
        if how == "clean":
            source.record = source.make_record(
                source.sign(source.body(state=RecordState.CLEAN, generation=1, map_hash=digest))
            )
            return
        authority = {
            "authority": lambda: source.sign(volume),
            "open": lambda: source.sign(replace(volume, state=RecordState.OPEN, map_hash=NO_HASH)),
            "nobody": lambda: None,
        }[how]()
        source.record = source.make_record(born(source.body()), authority)

    def new_output(self) -> None:
        self.output.unlink(missing_ok=True)
        if self.kind == "snapshot":
            self.output.touch()
        else:
            chunks = chunk_count(self.target.size)
            DurableMap.create(DISK, self.output, MapHeader(INTO, self.target.id, 1, chunks)).close()

    def target_fds(self) -> list[int]:
        with opened(self.target.directory) as fd:
            return list(open_layer(DISK, fd, 1, self.target_uuid, self.target.size, writable=True))

    def target_segment(self) -> Path:
        return self.target.directory / segment_name(1, self.target_uuid, 0)

    async def start(self, channel: Channel) -> dict:
        """Send the request as ebsd does."""
        held: list[socket.socket] = []
        sessions = [self.source.session(held), self.target.session(held)]
        fds = [
            sessions[0].fileno(),
            sessions[1].fileno(),
            os.open(self.source.directory, os.O_RDONLY),
            os.open(self.map_path, os.O_RDONLY),
            os.open(self.target.directory, os.O_RDONLY),
            os.open(self.output, os.O_RDWR),
            *self.target_fds(),
        ]
        params = {
            "Source": self.source.claim,
            "SourceRecord": self.encode(self.source.record),
            "Destination": self.target.claim,
            "DestinationRecord": self.encode(self.target.record),
            "DoneThrough": self.done_through,
        }
        try:
            return (await channel.request("start", params, fds, deadline=20)).message
        finally:
            for fd in fds[2:]:
                os.close(fd)
            for sock in sessions + held:
                sock.close()

    async def copy(self, channel: Channel) -> bytes:
        """Copy to the end and return the signed record."""
        await self.start(channel)
        last = await wait_until_ended(channel)
        assert last["State"] == "done", last
        assert (last["Done"], last["DoneThrough"]) == (last["Total"], self.chunks)
        answer = (await channel.request("finish", {}, deadline=20)).message
        assert (await channel.request("finish", {}, deadline=20)).message == answer
        assert answer["Generation"] == 1
        return base64.b64decode(answer["Record"])

    def check(self, signed: bytes) -> None:
        """Compare content, holes, map and record of the destination with what the source held."""
        target = self.target
        chunks = chunk_count(target.size)
        expected = memoryview(bytearray(chunks * 4)).cast("I")
        for chunk in self.plain:
            expected[chunk] = 1
        if self.kind == "snapshot":
            found = read_sealed_map(DISK, self.output, target.id, most_chunks=chunks)
            assert (found.lineage, found.entries) == (INTO, expected)
        else:
            durable = DurableMap.open(DISK, self.output)
            assert durable.entries()[:chunks] == expected
            durable.close()
        raw, mac = split_signed(signed, file="record")
        secret = target.secret()
        if secret is None:
            record_mac.verify_plain(raw, mac)
        else:
            record_mac.verify(secret, raw, mac)
        assert SignedBody.parse(raw, file="record") == target.body(
            state=RecordState.CLEAN, generation=1, map_hash=map_hash(expected, chunks), leaf_root=self.leaf_root(chunks)
        )
        self.check_data(chunks)

    def leaf_root(self, chunks: int) -> bytes:
        """Compare the leaves of the destination with its ciphertext and return the root that must be signed."""
        found = [name for name in os.listdir(self.target.directory) if "leaves" in name]
        if self.kind == "volume" or not self.plain:
            assert found == []
            return NO_HASH if self.kind == "volume" else leaf_root([])
        assert sorted(found) == [leaf_file_name(1, self.target_uuid), "leaves"]
        with opened(self.target.directory) as fd, opened(self.target_segment()) as data:
            slot = read_slots(DISK, fd, INTO, {1: self.target_uuid})[1]
            leaves = LeafFile.open(DISK, fd, INTO, 1, self.target_uuid, slot.digest)
            for chunk in range(chunks):
                ciphertext = os.pread(data, CHUNK, chunk * CHUNK)
                wanted = leaf_digest(self.target_uuid, chunk, ciphertext) if chunk in self.plain else None
                assert leaves.digest_of(chunk) == wanted
            leaves.close()
        return leaf_root([slot])

    def check_data(self, through: int, *, holes=True) -> None:
        """Compare the content below a chunk, and that holes have no blocks."""
        keep, codec = self.target.codec(1)
        with opened(self.target_segment()) as fd:
            for chunk in range(through):
                if chunk in self.plain:
                    data = bytearray(os.pread(fd, CHUNK, chunk * CHUNK))
                    if self.target.cipher is not PLAIN:
                        assert data != self.plain[chunk]
                    codec.decrypt_into(data, data, chunk * 16)
                    assert data == self.plain[chunk], chunk
                elif holes:
                    assert not has_data(fd, chunk), chunk
        del keep

    def source_digest(self) -> dict[str, str]:
        files = [self.map_path, *self.source.directory.iterdir()]
        return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def has_data(fd: int, chunk: int) -> bool:
    try:
        return os.lseek(fd, chunk * CHUNK, os.SEEK_DATA) < (chunk + 1) * CHUNK
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return False


async def wait_until_ended(channel: Channel) -> dict:
    while True:
        progress = (await channel.request("progress", {}, deadline=20)).message
        if progress["State"] != "copying":
            return progress
        await trio.sleep(0.005)


@contextlib.asynccontextmanager
async def worker(disk=None):
    """A worker in this process: (channel, worker)."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    made = CopyWorker(disk)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(made.run, theirs)
        async with Channel(ours) as channel:
            yield channel, made


@contextlib.contextmanager
def worker_process(settings: str):
    """The real program with other constants: (channel, Popen)."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import ebsd.volume.copier as c; {settings}; c.main()"
    with theirs:
        child = subprocess.Popen([sys.executable, "-I", "-c", program], stdin=theirs.fileno())
    try:
        yield Channel(ours), child
    finally:
        child.kill()
        child.wait()
        ours.close()


# --- what arrives


@pytest.mark.parametrize(
    ("entries", "first", "expected"),
    [
        ([0, 0, 0], 0, []),
        ([1, 1, 0, 2, 1], 0, [(0, 2, 1), (3, 1, 2), (4, 1, 1)]),
        ([1, 1, 0, 2, 1], 1, [(1, 1, 1), (3, 1, 2), (4, 1, 1)]),
        ([7] * 80, 5, [(5, 32, 7), (37, 32, 7), (69, 11, 7)]),
        ([0] * 16383 + [3, 3, 3], 0, [(16383, 1, 3), (16384, 2, 3)]),
        ([1, 1], 2, []),
    ],
)
async def test_runs_cover_each_stored_chunk_once(entries, first, expected):
    view = memoryview(bytearray(b"".join(n.to_bytes(4, "little") for n in entries))).cast("I")
    assert list(runs(view, first)) == [Run(*each) for each in expected]


@pytest.mark.parametrize("kind", ["snapshot", "volume"])
@pytest.mark.parametrize(("source", "target"), [(XTS, XTS), (PLAIN, XTS), (XTS, PLAIN)])
@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_a_copy_holds_what_the_source_held(tmp_path, kind, source, target, seed):
    dice = random.Random(seed)
    rig = Rig(
        tmp_path, kind=kind, source=source, target=target, seed=seed, layers=dice.randrange(1, 6),
        size=dice.randrange(256, 4000) * SECTOR, density=dice.choice([0.1, 0.6, 1.0]),
        signed=dice.choice(["authority", "clean"]),
    )  # fmt: skip
    before = rig.source_digest()
    async with worker() as (channel, _):
        signed = await rig.copy(channel)
    rig.check(signed)
    assert rig.source_digest() == before


async def test_the_layer_of_a_volume_may_be_called_its_head(tmp_path):
    rig = Rig(tmp_path, kind="volume")
    rig.target.claim["Head"] = rig.target.claim.pop("Layer")
    async with worker() as (channel, _):
        rig.check(await rig.copy(channel))


async def test_a_larger_volume_has_a_tail_of_holes_and_no_bytes_from_behind_the_source(tmp_path):
    size = 2 * MIB + 3 * SECTOR
    rig = Rig(tmp_path, kind="volume", size=size, target_size=5 * MIB, density=1.0)
    last = rig.chunks - 1
    # A source that breaks the rule that nothing lies behind its end.
    layer = rig.entries[last]
    keep, codec = rig.source.codec(layer)
    noise = bytearray(os.urandom(CHUNK))
    noise[: 3 * SECTOR] = rig.plain[last][: 3 * SECTOR]
    codec.encrypt_into(noise, noise, last * 16)
    path = rig.source.directory / segment_name(layer, rig.source.table().uuid_of(layer), 0)
    with opened(path, os.O_RDWR) as fd:
        os.pwrite(fd, noise, last * CHUNK)
    async with worker() as (channel, _):
        rig.check(await rig.copy(channel))
    del keep


@pytest.mark.parametrize("kind", ["snapshot", "volume"])
async def test_a_blank_snapshot_that_nobody_signed_is_copied(tmp_path, kind):
    rig = Rig(tmp_path, kind=kind, density=0, signed="nobody")
    async with worker() as (channel, _):
        rig.check(await rig.copy(channel))


async def test_the_answer_of_start_counts_and_tells_what_is_unverified(tmp_path):
    rig = Rig(tmp_path, signed="open")
    async with worker() as (channel, _):
        answer = await rig.start(channel)
        assert answer == {"Chunks": rig.chunks, "DataChunks": len(rig.plain), "Unverified": True}
        assert (await wait_until_ended(channel))["Total"] == len(rig.plain) * CHUNK


async def test_descriptors_stay_few_with_many_layers(tmp_path, monkeypatch):
    most = 0

    class Counting(RealDisk):
        def __init__(self):
            super().__init__()
            self.segments = set()

        def open(self, path, flags, mode=0o600, dir_fd=None):
            nonlocal most
            fd = super().open(path, flags, mode, dir_fd)
            if str(path).endswith(".000"):
                assert flags & os.O_ACCMODE == os.O_RDONLY
                self.segments.add(fd)
                most = max(most, len(self.segments))
            return fd

        def close(self, fd):
            self.segments.discard(fd)
            super().close(fd)

    rig = Rig(tmp_path, layers=20, density=1.0)
    monkeypatch.setattr(copier.SourceFiles.__init__, "__defaults__", (4,))
    monkeypatch.setattr(copier, "LANES", 2)
    disk = Counting()
    async with worker(disk) as (channel, _):
        rig.check(await rig.copy(channel))
    assert most <= 2 * 2 * 4, "each thread keeps four segments, each with and without the page cache"
    assert not disk.segments


# --- kills and resuming


def scribble(rig: Rig, through: int) -> None:
    """Lose everything that was not promised to be durable: garbage where data was to be."""
    with opened(rig.target_segment(), os.O_RDWR) as fd:
        for chunk in rig.plain:
            if chunk >= through:
                os.pwrite(fd, os.urandom(CHUNK), chunk * CHUNK)


@pytest.mark.parametrize("kind", ["snapshot", "volume"])
async def test_a_killed_worker_is_followed_by_one_that_goes_on(tmp_path, kind):
    rig = Rig(tmp_path, kind=kind, size=48 * MIB, density=0.9)
    before = rig.source_digest()
    dice = random.Random(os.urandom(8))
    resumed = []
    with contextlib.ExitStack() as stack:
        for attempt in range(6):
            # The first one gets so far that there is something to go on from, and no further.
            wait = "60 if a[3].first >= 256 else 0.004" if attempt == 0 else "0.004"
            channel, child = stack.enter_context(
                worker_process("c.SYNC_BYTES = 1 << 20; _s = c.Copy._carry; "
                               f"c.Copy._carry = lambda *a: (c.time.sleep({wait}), _s(*a))[1]")
            )  # fmt: skip
            await rig.start(channel)
            deadline = trio.current_time() + dice.uniform(0, 0.15)
            progress = {"DoneThrough": rig.done_through}
            while trio.current_time() < deadline or (attempt == 0 and progress["DoneThrough"] == 0):
                progress = (await channel.request("progress", {}, deadline=20)).message
                if progress["State"] == "done" and dice.random() < 0.5:
                    await channel.request("finish", {}, deadline=20)
            child.send_signal(signal.SIGKILL)
            child.wait()
            channel.close()
            assert progress["DoneThrough"] >= rig.done_through
            rig.done_through = progress["DoneThrough"]
            resumed.append(rig.done_through)
            rig.check_data(rig.done_through)
            scribble(rig, rig.done_through)
    assert any(0 < each < rig.chunks for each in resumed), resumed
    if kind == "snapshot":
        rig.new_output()  # what a killed finish left is another temporary file
    async with worker() as (channel, _):
        rig.check(await rig.copy(channel))
    assert rig.source_digest() == before


async def test_only_what_was_synced_counts_as_done(tmp_path, monkeypatch):
    monkeypatch.setattr(copier, "SYNC_BYTES", 2 * MIB)
    synced = []
    told: list[int] = []

    class Watching(RealDisk):
        def fdatasync(self, fd):
            if os.readlink(f"/proc/self/fd/{fd}").endswith(".000"):  # and not the notes of leaves
                told.append(made._copy.progress().done_through if made._copy else 0)
                synced.append(fd)
            super().fdatasync(fd)

    rig = Rig(tmp_path, density=1.0)
    async with worker(Watching()) as (channel, made):
        await rig.start(channel)
        await wait_until_ended(channel)
    # Asked before each fdatasync: what the one before it covered, and nothing of what this one will.
    assert told[0] == 0
    assert all(0 < later - earlier <= 64 for earlier, later in itertools.pairwise(told)), told
    assert 3 <= len(synced) == len(told)


@pytest.mark.parametrize("kind", ["snapshot", "volume"])
async def test_finish_after_a_finish_that_was_killed(tmp_path, kind):
    rig = Rig(tmp_path, kind=kind)
    async with worker() as (channel, _):
        await rig.copy(channel)
    rig.done_through = rig.chunks
    async with worker() as (channel, _):  # the map is there already, and is written again
        rig.check(await rig.copy(channel))


@pytest.mark.parametrize("moment", ["before start", "copying", "done", "finished"])
async def test_the_process_ends_with_its_channel(tmp_path, moment):
    rig = Rig(tmp_path)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        child = start_module("ebsd.volume.copier", stdin_socket=theirs)
    try:
        async with Channel(ours) as channel:
            if moment != "before start":
                await rig.start(channel)
            if moment in ("done", "finished"):
                await wait_until_ended(channel)
            if moment == "finished":
                rig.check(base64.b64decode((await channel.request("finish", {}, deadline=20)).message["Record"]))
        with trio.fail_after(10):
            assert await child.wait() == 0
    finally:
        child.kill()
        await child.wait()


async def test_a_stopped_copy_ends_after_its_step(tmp_path, monkeypatch):
    rig = Rig(tmp_path, density=1.0)
    gate = trio.lowlevel.current_trio_token()

    monkeypatch.setattr(copier, "LANES", 1)

    class Slow(RealDisk):
        steps = 0

        def pwrite(self, fd, data, offset):
            Slow.steps += 1
            if Slow.steps == 3:
                trio.from_thread.run_sync(lambda: None, trio_token=gate)
                trio.from_thread.run_sync(channel.close, trio_token=gate)
                trio.from_thread.run(trio.sleep, 0.2, trio_token=gate)
            return super().pwrite(fd, data, offset)

    async with worker(Slow()) as (channel, made):
        await rig.start(channel)
        await trio.sleep(1)
    assert Slow.steps == 3
    assert not made.hangs
    assert all(key.is_wiped for key in made._job.keys)


async def test_a_thread_that_hangs_keeps_neither_the_worker_nor_the_keys(tmp_path, monkeypatch):
    monkeypatch.setattr(copier, "STOP_SECONDS", 0.1)
    gate = threading.Event()
    entered, left = threading.Event(), threading.Event()

    class Hanging(RealDisk):
        def pwrite(self, fd, data, offset):
            entered.set()
            gate.wait()
            left.set()
            raise OSError(errno.EIO, "at last")

    rig = Rig(tmp_path, density=1.0)
    try:
        async with worker(Hanging()) as (channel, made):
            await rig.start(channel)
            assert await trio.to_thread.run_sync(entered.wait, 10)
        assert made.hangs
        assert [key.is_wiped for key in made._job.keys] == [True, True]
    finally:
        gate.set()
    assert await trio.to_thread.run_sync(left.wait, 10)
    made._job.close()


# --- keys


async def test_keys_are_wiped_and_files_closed_after_finish(tmp_path):
    rig = Rig(tmp_path)
    before = set(os.listdir("/proc/self/fd"))
    async with worker() as (channel, made):
        await rig.copy(channel)
        assert [key.is_wiped for key in made._job.keys] == [True, True]
        for factory in made._job.factories:
            with pytest.raises(ValueError):
                factory.codec(bytes(16))
        assert not made._job.fds
        assert not any(any(buffer) for buffer in made._copy._buffers)
    assert set(os.listdir("/proc/self/fd")) <= before


async def test_keys_are_wiped_after_a_failure(tmp_path):
    rig = Rig(tmp_path, density=1.0)
    for file in rig.source.directory.glob("*.000"):
        os.truncate(file, MIB)
    async with worker() as (channel, made):
        await rig.start(channel)
        progress = await wait_until_ended(channel)
        assert (progress["State"], progress["Error"]["Code"]) == ("failed", "Ebsd.StoreDamaged")
        with trio.fail_after(10):
            await made._ended.wait()
        await trio.testing.wait_all_tasks_blocked()
        assert [key.is_wiped for key in made._job.keys] == [True, True]
        with pytest.raises(RemoteError, match="not done"):
            await channel.request("finish", {}, deadline=20)


# --- errors of the disk


async def test_a_missing_source_file_is_damage(tmp_path):
    rig = Rig(tmp_path, layers=1)
    (file,) = rig.source.directory.glob("*.000")
    file.unlink()
    async with worker() as (channel, _):
        await rig.start(channel)
        error = (await wait_until_ended(channel))["Error"]
    assert error["Code"] == "Ebsd.StoreDamaged"
    assert file.name in error["Message"]
    assert "missing" in error["Message"]


class Failing(RealDisk):
    def __init__(self, call: str, number: int) -> None:
        super().__init__()
        self.call, self.number = call, number
        self.left = 2

    def open(self, path, flags, mode=0o600, dir_fd=None):
        if self.call == "open" and str(path).endswith(".000"):
            raise OSError(self.number, os.strerror(self.number))
        return super().open(path, flags, mode, dir_fd=dir_fd)

    def make_direct(self, fd):
        return False

    def _fail(self, call):
        if call == self.call:
            self.left -= 1
            if self.left == 0:
                raise OSError(self.number, os.strerror(self.number))

    def pwrite(self, fd, data, offset):
        self._fail("pwrite")
        return super().pwrite(fd, data, offset)

    def pread_into(self, fd, buffer, offset):
        if len(buffer) >= 16 * CHUNK:
            self._fail("pread")
        return super().pread_into(fd, buffer, offset)

    def fdatasync(self, fd):
        self._fail("fdatasync")
        super().fdatasync(fd)


@pytest.mark.parametrize(
    ("call", "number", "code"),
    [
        ("pwrite", errno.ENOSPC, "Ebsd.NoSpace"),
        ("pwrite", errno.EDQUOT, "Ebsd.NoSpace"),
        ("pwrite", errno.EIO, "Ebsd.HostFailure"),
        ("pread", errno.EIO, "Ebsd.StoreDamaged"),
        ("pread", errno.ENOMEM, "Ebsd.HostFailure"),
        ("open", errno.EMFILE, "Ebsd.HostFailure"),
        ("fdatasync", errno.EIO, "Ebsd.HostFailure"),
        ("fdatasync", errno.ENOSPC, "Ebsd.NoSpace"),
    ],
)
async def test_errors_of_the_disk_end_the_copy_with_their_reason(tmp_path, monkeypatch, call, number, code):
    monkeypatch.setattr(copier, "SYNC_BYTES", 2 * MIB)
    rig = Rig(tmp_path, density=1.0, layers=1)
    async with worker(Failing(call, number)) as (channel, _):
        await rig.start(channel)
        progress = await wait_until_ended(channel)
    assert (progress["State"], progress["Error"]["Code"]) == ("failed", code)
    assert progress["DoneThrough"] < rig.chunks
    rig.check_data(progress["DoneThrough"], holes=False)
    rig.done_through = progress["DoneThrough"]
    async with worker() as (channel, _):
        rig.check(await rig.copy(channel))


async def test_a_full_disk_at_finish_may_be_tried_again(tmp_path):
    rig = Rig(tmp_path)
    disk = Failing("pwrite", errno.ENOSPC)
    disk.left = -1
    async with worker(disk) as (channel, _):
        await rig.start(channel)
        await wait_until_ended(channel)
        disk.left = 1
        with pytest.raises(RemoteError) as caught:
            await channel.request("finish", {}, deadline=20)
        assert caught.value.code == "Ebsd.NoSpace"
        rig.check(base64.b64decode((await channel.request("finish", {}, deadline=20)).message["Record"]))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a tmpfs needs uid 0")
async def test_a_full_file_system_is_no_space(tmp_path):
    mounted = tmp_path / "small"
    mounted.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "ebsd-test", mounted], check=False).returncode:
        pytest.skip("this host does not let us mount a tmpfs")
    try:
        rig = Rig(tmp_path, size=32 * MIB, density=0.9)
        small = mounted / "target"
        subprocess.run(["cp", "-a", "--sparse=always", rig.target.directory, small], check=True)
        rig.target.directory = small
        async with worker() as (channel, _):
            await rig.start(channel)
            progress = await wait_until_ended(channel)
        assert (progress["State"], progress["Error"]["Code"]) == ("failed", "Ebsd.NoSpace")
        assert 0 < progress["Done"] < progress["Total"]
        subprocess.run(["mount", "-o", "remount,size=64m", mounted], check=True)
        rig.done_through = progress["DoneThrough"]
        async with worker() as (channel, _):
            rig.check(await rig.copy(channel))
    finally:
        subprocess.run(["umount", mounted], check=True)


# --- the channel


async def test_requests_out_of_order_are_refused(tmp_path):
    rig = Rig(tmp_path)
    async with worker() as (channel, _):
        for method in ("progress", "finish"):
            with pytest.raises(RemoteError, match="not begun"):
                await channel.request(method, {}, deadline=20)
        await rig.start(channel)
        with pytest.raises(RemoteError, match="copies already"):
            await rig.start(channel)
        await wait_until_ended(channel)
        rig.check(base64.b64decode((await channel.request("finish", {}, deadline=20)).message["Record"]))


async def test_a_born_record_stays_what_ebsd_gave(tmp_path):
    rig = Rig(tmp_path)
    assert rig.target.record.signed[256:] == UNSIGNED
    async with worker() as (channel, _):
        signed = await rig.copy(channel)
    assert signed[256:] != UNSIGNED


async def test_a_batch_lies_in_huge_pages_where_the_kernel_has_them():
    buffer = copier.page_buffer()
    assert buffer.nbytes == copier.STEP
    address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if (bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)) is not None:
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith("VmFlags:"):
            assert ("hg" in line.split()) is Path("/sys/kernel/mm/transparent_hugepage").exists()
            return
    raise AssertionError("the buffer is in no mapping")
