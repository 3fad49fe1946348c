"""Damage of ciphertext: found by ``verify``, by a copy and by copy-on-write; never served as something else."""

from __future__ import annotations

import errno
import os
import random
import secrets
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from installation import Installation, installation

from ebsctl.client import Client
from ebsd.store.layers import parse_segment_name
from ebsd.store.leaftable import LeafSlot, encode_slot
from ebsd.store.leaves import parse_leaf_file_name
from ebsd.store.record import parse_record
from ebsd.store.signedrecord import NO_HASH, RecordState, SignedBody

CHUNK = 65536
SIZE = 64 * CHUNK
INTEGRITY = 7
"""Exit status of ebsctl for whatever fails an integrity check."""

FIRST, SECOND = 3, 40
"""Chunks that hold data of two different layers in ``Story``."""


@pytest.fixture(scope="module")
def ebsd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    with installation(tmp_path_factory.mktemp("integrity")) as made:
        yield made


@pytest.fixture(scope="module")
def client(ebsd: Installation) -> Client:
    return Client(str(ebsd.socket), timeout=60)


def until(what: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.01)


def body_of(ebsd: Installation, ident: str) -> SignedBody:
    return parse_record((ebsd.state / "records" / ident).read_bytes(), file="record").body()


@dataclass
class Story:
    """A volume with two snapshots: layer 1 and 2 are sealed, 3 is the head and empty. Detached and clean."""

    ebsd: Installation
    client: Client
    volume: str
    lineage: str
    first: str
    second: str
    data: bytearray
    first_data: bytes

    @property
    def directory(self) -> Path:
        return self.ebsd.state / "layers" / self.lineage

    def segment(self, layer: int) -> Path:
        (found,) = (p for p in self.directory.iterdir() if (parse_segment_name(p.name) or (0,))[0] == layer)
        return found

    def leaf_file(self, layer: int) -> Path:
        (found,) = (p for p in self.directory.iterdir() if (parse_leaf_file_name(p.name) or (0,))[0] == layer)
        return found

    def flip(self, layer: int, chunk: int, at: int = 0) -> None:
        flip(self.segment(layer), chunk * CHUNK + at)


def flip(path: Path, offset: int) -> None:
    mode = path.stat().st_mode
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(offset)
        (value,) = file.read(1)
        file.seek(offset)
        file.write(bytes([value ^ 16]))
    path.chmod(mode)


@contextmanager
def attached(client: Client, volume: str) -> Iterator[int]:
    """A descriptor of the block file."""
    path = client.ec2("AttachVolume", VolumeId=volume, ExposeAs="file")["Attachment"]["Path"]
    fd = os.open(path, os.O_RDWR)
    try:
        yield fd
    finally:
        os.close(fd)
        client.ec2("DetachVolume", VolumeId=volume)


def make_volume(client: Client, size: int = SIZE, **more: object) -> dict[str, str]:
    return client.ec2("CreateVolume", Name=f"v-{secrets.token_hex(6)}", SizeBytes=size, Encrypted=True, **more)[
        "Volume"
    ]


def take(client: Client, volume: str) -> str:
    return client.ec2("CreateSnapshot", VolumeId=volume)["Snapshot"]["SnapshotId"]


def make_story(ebsd: Installation, client: Client) -> Story:
    volume = make_volume(client)
    ident = volume["VolumeId"]
    dice = random.Random(ident)
    data = bytearray(SIZE)
    snapshots = []
    with attached(client, ident) as fd:
        for chunks in (range(0, 32), range(30, 50)):
            for chunk in chunks:
                data[chunk * CHUNK : (chunk + 1) * CHUNK] = dice.randbytes(CHUNK)
                os.pwrite(fd, data[chunk * CHUNK : (chunk + 1) * CHUNK], chunk * CHUNK)
            snapshots.append((take(client, ident), bytes(data)))
            until(lambda: body_of(ebsd, snapshots[-1][0]).leaf_root != NO_HASH)
    return Story(
        ebsd, client, ident, volume["DataEncryptionKeyId"], snapshots[0][0], snapshots[1][0], data, snapshots[0][1]
    )


@pytest.fixture
def story(ebsd: Installation, client: Client) -> Story:
    return make_story(ebsd, client)


def hashed_layers(story: Story) -> set[int]:
    return {found[0] for p in story.directory.iterdir() if (found := parse_leaf_file_name(p.name)) is not None}


# --- hashing


def test_a_snapshot_of_an_attached_volume_is_signed_again_with_the_root_of_its_leaves(story: Story) -> None:
    for snapshot in (story.first, story.second):
        body = body_of(story.ebsd, snapshot)
        assert (body.state, body.generation) == (RecordState.CLEAN, 2)
        assert body.leaf_root != NO_HASH
    assert hashed_layers(story) == {1, 2}
    volume = body_of(story.ebsd, story.volume)
    assert (volume.state, volume.head) == (RecordState.CLEAN, 3)
    assert volume.leaf_root == body_of(story.ebsd, story.second).leaf_root
    with attached(story.client, story.volume) as fd:
        assert os.pread(fd, SIZE, 0) == story.data


def test_a_snapshot_of_a_detached_volume_is_hashed_by_the_next_process(ebsd: Installation, client: Client) -> None:
    volume = make_volume(client)
    with attached(client, volume["VolumeId"]) as fd:
        os.pwrite(fd, secrets.token_bytes(CHUNK), 0)
    snapshot = take(client, volume["VolumeId"])
    directory = ebsd.state / "layers" / volume["DataEncryptionKeyId"]
    assert not [name for name in os.listdir(directory) if "leaves" in name]
    with attached(client, volume["VolumeId"]):
        until(lambda: "leaves" in os.listdir(directory))
    assert body_of(ebsd, volume["VolumeId"]).leaf_root != NO_HASH
    assert body_of(ebsd, snapshot).state is RecordState.BORN


def test_a_volume_process_that_is_killed_before_it_had_hashed_leaves_that_to_the_next_one(
    ebsd: Installation, client: Client
) -> None:
    size = 6000 * CHUNK
    volume = make_volume(client, size)
    ident = volume["VolumeId"]
    directory = ebsd.state / "layers" / volume["DataEncryptionKeyId"]
    path = client.ec2("AttachVolume", VolumeId=ident, ExposeAs="file")["Attachment"]["Path"]
    block = secrets.token_bytes(16 * CHUNK)
    with open(path, "r+b", buffering=0) as file:
        for at in range(0, size, len(block)):
            os.pwrite(file.fileno(), block, at)
    (process,) = (pid for pid in ebsd.processes()["volumes"] if ident in environment_of(pid))
    snapshot = take(client, ident)
    until(lambda: any(name.endswith(".tmp") for name in os.listdir(directory)))
    os.kill(process, signal.SIGKILL)
    until(lambda: client.ec2("DescribeVolumes", VolumeIds=[ident])["Volumes"][0]["State"] == "error")
    client.ec2("DetachVolume", VolumeId=ident)
    assert "leaves" not in os.listdir(directory)
    assert body_of(ebsd, snapshot).leaf_root == NO_HASH
    with attached(client, ident) as fd:
        until(lambda: "leaves" in os.listdir(directory))
        assert os.pread(fd, CHUNK, 0) == block[:CHUNK]
    assert body_of(ebsd, ident).leaf_root != NO_HASH


def environment_of(pid: int) -> str:
    """What tells one volume process from another: the files it has open."""
    return " ".join(os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir())


def test_an_ebsd_that_was_killed_fetches_the_root_from_the_process_that_went_on(tmp_path: Path) -> None:
    with installation(tmp_path) as ebsd:
        client = Client(str(ebsd.socket), timeout=60)
        size = 3008 * CHUNK
        volume = make_volume(client, size)
        path = client.ec2("AttachVolume", VolumeId=volume["VolumeId"], ExposeAs="file")["Attachment"]["Path"]
        with open(path, "r+b", buffering=0) as file:
            for at in range(0, size, 16 * CHUNK):
                os.pwrite(file.fileno(), secrets.token_bytes(16 * CHUNK), at)
        snapshot = take(client, volume["VolumeId"])
        ebsd.kill()
        ebsd.start()
        until(lambda: body_of(ebsd, snapshot).leaf_root != NO_HASH)
        assert body_of(ebsd, snapshot).generation == 2


# --- copy-on-write


def test_a_damaged_chunk_cannot_be_written_in_part_and_all_else_goes_on(story: Story) -> None:
    restored = story.client.ec2("CreateVolume", SnapshotId=story.second, Name=f"r-{secrets.token_hex(4)}")["Volume"]
    story.flip(1, FIRST, 5000)
    with attached(story.client, restored["VolumeId"]) as fd:
        for _ in range(2):
            with pytest.raises(OSError) as caught:
                os.pwrite(fd, b"part", FIRST * CHUNK)
            assert caught.value.errno == errno.EIO
        os.pwrite(fd, b"part", (FIRST + 1) * CHUNK)
        os.pwrite(fd, b"part", SECOND * CHUNK)
        os.fsync(fd)
    with attached(story.client, restored["VolumeId"]) as fd:
        with pytest.raises(OSError):  # the entry stayed where it was
            os.pwrite(fd, b"part", FIRST * CHUNK)
        fresh = secrets.token_bytes(CHUNK)
        os.pwrite(fd, fresh, FIRST * CHUNK)
        os.pwrite(fd, b"part", FIRST * CHUNK)
        assert os.pread(fd, CHUNK, FIRST * CHUNK) == b"part" + fresh[4:]
    assert f"chunk {FIRST} of layer 1 has changed" in story.ebsd.log.read_text()
    with attached(story.client, story.volume) as fd:
        assert os.pread(fd, CHUNK, SECOND * CHUNK) == story.data[SECOND * CHUNK : (SECOND + 1) * CHUNK]


# --- leaves that were tampered with


def slot_of(story: Story, layer: int) -> int:
    return 64 * layer


def zero_slot(story: Story) -> None:
    with (story.directory / "leaves").open("r+b") as file:
        file.seek(slot_of(story, 1))
        file.write(bytes(64))


def forged_slot(story: Story) -> None:
    with (story.directory / "leaves").open("r+b") as file:
        file.seek(slot_of(story, 1))
        slot = file.read(64)
        file.seek(slot_of(story, 1))
        file.write(encode_slot(LeafSlot(1, slot[8:24], bytes(32))))


def swapped_leaf_table(story: Story) -> None:
    other = make_story(story.ebsd, story.client)
    shutil.copy(other.directory / "leaves", story.directory / "leaves")


TAMPERED: dict[str, tuple[Callable[[Story], object], str]] = {
    "no leaf table": (lambda s: (s.directory / "leaves").unlink(), "its leaf table lacks layer 1"),
    "a slot zeroed": (zero_slot, "its leaf table lacks layer 1"),
    "a slot forged": (forged_slot, "the leaves of its layers are not those that its record was signed over"),
    "a bit of a slot": (lambda s: flip(s.directory / "leaves", 64 + 30), "the checksum of layer 1 is wrong"),
    "a bit of the header": (lambda s: flip(s.directory / "leaves", 20), "the checksum of its header is wrong"),
    "the leaf table of another lineage": (swapped_leaf_table, "it is that of another lineage"),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_a_tampered_leaf_table_is_refused_at_attach_by_name(story: Story, case: str) -> None:
    restored = story.client.ec2("CreateVolume", SnapshotId=story.first, Name=f"r-{secrets.token_hex(4)}")["Volume"]
    kept = (story.directory / "leaves").read_bytes()
    tamper, reason = TAMPERED[case]
    tamper(story)
    for volume in (story.volume, restored["VolumeId"]):
        outcome = story.ebsd.ctl("attach", volume)
        assert outcome.status == INTEGRITY, outcome
        assert reason in outcome.stderr
    (story.directory / "leaves").write_bytes(kept)
    with attached(story.client, story.volume) as fd:
        assert os.pread(fd, SIZE, 0) == story.data
    with attached(story.client, restored["VolumeId"]) as fd:
        assert os.pread(fd, SIZE, 0) == story.first_data
