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
from installation import Installation, holder_of, installation

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
    """A story of the test's own."""
    return make_story(ebsd, client)


@pytest.fixture(scope="module")
def common_story(ebsd: Installation, client: Client) -> Story:
    return make_story(ebsd, client)


@pytest.fixture
def shared(common_story: Story, tmp_path: Path) -> Iterator[Story]:
    """One story for several tests: sealed layers and leaves are put back after each."""
    # Nothing that grows: volumes that tests restore have layers in the same directory.
    sealed = ("0000000001", "0000000002", "leaves")
    kept = [path for path in common_story.directory.iterdir() if path.name.startswith(sealed)]
    for path in kept:
        shutil.copy(path, tmp_path / path.name)
    yield common_story
    for path in kept:
        path.unlink(missing_ok=True)
        shutil.copy(tmp_path / path.name, path)


def hashed_layers(story: Story) -> set[int]:
    return {found[0] for p in story.directory.iterdir() if (found := parse_leaf_file_name(p.name)) is not None}


# --- hashing


def test_a_snapshot_of_an_attached_volume_is_signed_again_with_the_root_of_its_leaves(shared: Story) -> None:
    for snapshot in (shared.first, shared.second):
        body = body_of(shared.ebsd, snapshot)
        assert (body.state, body.generation) == (RecordState.CLEAN, 2)
        assert body.leaf_root != NO_HASH
    assert hashed_layers(shared) == {1, 2}
    volume = body_of(shared.ebsd, shared.volume)
    assert (volume.state, volume.head) == (RecordState.CLEAN, 3)
    assert volume.leaf_root == body_of(shared.ebsd, shared.second).leaf_root
    with attached(shared.client, shared.volume) as fd:
        assert os.pread(fd, SIZE, 0) == shared.data


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
    size = 3200 * CHUNK
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
    os.kill(holder_of(process), signal.SIGKILL)
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
        size = 800 * CHUNK
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


def test_a_damaged_chunk_cannot_be_written_in_part_and_all_else_goes_on(shared: Story) -> None:
    restored = shared.client.ec2(
        "CreateVolume", SnapshotId=shared.second, Name=f"r-{secrets.token_hex(4)}", AllowDamaged=True
    )["Volume"]
    shared.flip(1, FIRST, 5000)
    with attached(shared.client, restored["VolumeId"]) as fd:
        for _ in range(2):
            with pytest.raises(OSError) as caught:
                os.pwrite(fd, b"part", FIRST * CHUNK)
            assert caught.value.errno == errno.EIO
        os.pwrite(fd, b"part", (FIRST + 1) * CHUNK)
        os.pwrite(fd, b"part", SECOND * CHUNK)
        os.fsync(fd)
    with attached(shared.client, restored["VolumeId"]) as fd:
        with pytest.raises(OSError):  # the entry stayed where it was
            os.pwrite(fd, b"part", FIRST * CHUNK)
        fresh = secrets.token_bytes(CHUNK)
        os.pwrite(fd, fresh, FIRST * CHUNK)
        os.pwrite(fd, b"part", FIRST * CHUNK)
        assert os.pread(fd, CHUNK, FIRST * CHUNK) == b"part" + fresh[4:]
    assert f"chunk {FIRST} of layer 1 has changed" in shared.ebsd.log.read_text()
    with attached(shared.client, shared.volume) as fd:
        assert os.pread(fd, CHUNK, SECOND * CHUNK) == shared.data[SECOND * CHUNK : (SECOND + 1) * CHUNK]


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


def test_a_tampered_leaf_table_is_refused_at_attach_by_name(shared: Story) -> None:
    restored = shared.client.ec2(
        "CreateVolume", SnapshotId=shared.first, Name=f"r-{secrets.token_hex(4)}", AllowDamaged=True
    )["Volume"]
    kept = (shared.directory / "leaves").read_bytes()
    for case, (tamper, reason) in TAMPERED.items():
        tamper(shared)
        for volume in (shared.volume, restored["VolumeId"]):
            outcome = shared.ebsd.ctl("attach", volume)
            assert outcome.status == INTEGRITY, (case, outcome)
            assert reason in outcome.stderr, (case, outcome)
        (shared.directory / "leaves").write_bytes(kept)
    with attached(shared.client, shared.volume) as fd:
        assert os.pread(fd, SIZE, 0) == shared.data
    with attached(shared.client, restored["VolumeId"]) as fd:
        assert os.pread(fd, SIZE, 0) == shared.first_data


# --- ebsctl verify


def report_of(ebsd: Installation, resource: str, *options: str, status: int = 0) -> dict:
    outcome = ebsd.ctl("--json", "verify", resource, *options)
    assert outcome.status == status, outcome
    return outcome.json


def shown(story: Story, resource: str) -> dict:
    kind = "Volume" if resource.startswith("vol-") else "Snapshot"
    (found,) = story.client.ec2(f"Describe{kind}s", **{f"{kind}Ids": [resource]})[f"{kind}s"]
    return found["LastVerification"]


def test_what_is_whole_is_verified_as_authentic(shared: Story) -> None:
    for resource, chunks in ((shared.first, 32), (shared.second, 50), (shared.volume, 50)):
        report = report_of(shared.ebsd, resource)
        assert (report["Kind"], report["Damage"], report["DamagedChunks"]) == ("authenticity", [], 0)
        assert (report["Chunks"], report["Bytes"], report["WithoutLeaf"], report["HashedNow"]) == (
            chunks, chunks * CHUNK, 0, 0,
        )  # fmt: skip
        assert shown(shared, resource) == {
            "Time": report["Time"], "Kind": "authenticity", "Chunks": chunks, "DamagedChunks": 0, "DamagedFiles": 0,
        }  # fmt: skip
    assert "no damage in 50 chunks" in shared.ebsd.ok("show", shared.second)


def test_a_flipped_bit_is_told_with_its_chunk_and_place(shared: Story) -> None:
    shared.flip(1, FIRST, 4095)
    shared.flip(2, SECOND, 0)
    shared.flip(2, SECOND + 1, CHUNK - 1)
    for options in ((), ("--scrub",)):
        report = report_of(shared.ebsd, shared.second, *options, status=INTEGRITY)
        assert report["Kind"] == ("integrity" if options else "authenticity")
        assert report["DamagedChunks"] == 3
        what = "it has changed since it was hashed"
        assert report["Damage"] == [
            {"Chunk": FIRST, "Chunks": 1, "Offset": FIRST * CHUNK, "Length": CHUNK, "Layer": 1,
             "File": shared.segment(1).name, "Reason": what},
            {"Chunk": SECOND, "Chunks": 2, "Offset": SECOND * CHUNK, "Length": 2 * CHUNK, "Layer": 2,
             "File": shared.segment(2).name, "Reason": what},
        ]  # fmt: skip
        assert report_of(shared.ebsd, shared.first, *options, status=INTEGRITY)["DamagedChunks"] == 1
    assert "3 of 50 chunks damaged" in shared.ebsd.ok("show", shared.second)
    other = make_story(shared.ebsd, shared.client)
    assert report_of(shared.ebsd, other.second)["Damage"] == []
    # Put right, it is whole again.
    shared.flip(1, FIRST, 4095)
    assert report_of(shared.ebsd, shared.first)["Kind"] == "authenticity"


def test_truncated_missing_and_swapped_layers_are_told(shared: Story) -> None:
    first, second = shared.segment(1), shared.segment(2)
    kept = first.read_bytes(), second.read_bytes()
    os.truncate(second, 45 * CHUNK + 100)
    report = report_of(shared.ebsd, shared.second, status=INTEGRITY)
    assert report["DamagedChunks"] == 20, "a file that is not whole chunks is not relied on"
    assert {damage["Layer"] for damage in report["Damage"]} == {2}
    os.truncate(second, 45 * CHUNK)
    report = report_of(shared.ebsd, shared.second, status=INTEGRITY)
    assert (report["DamagedChunks"], report["Damage"][0]["Chunk"]) == (5, 45)
    assert "it ends before byte" in report["Damage"][0]["Reason"]
    second.unlink()
    report = report_of(shared.ebsd, shared.second, status=INTEGRITY)
    assert (report["DamagedChunks"], report["Damage"][0]["Reason"]) == (20, "it is missing")
    # Ciphertext of one layer under the name of the other: right in itself, at the right place, under the wrong key.
    second.write_bytes(kept[0])
    report = report_of(shared.ebsd, shared.second, status=INTEGRITY)
    assert (report["DamagedChunks"], report["Damage"][0]["Chunk"]) == (20, 30)
    second.write_bytes(kept[1])
    assert report_of(shared.ebsd, shared.second)["Damage"] == []


def test_without_its_key_a_snapshot_is_scrubbed_and_the_report_says_so(ebsd: Installation, client: Client) -> None:
    key = client.kms("CreateKey")["KeyMetadata"]["KeyId"]
    volume = make_volume(client, KmsKeyId=key)
    with attached(client, volume["VolumeId"]) as fd:
        os.pwrite(fd, secrets.token_bytes(4 * CHUNK), 0)
        snapshot = take(client, volume["VolumeId"])
        until(lambda: body_of(ebsd, snapshot).leaf_root != NO_HASH)
    client.kms("DisableKey", KeyId=key)
    report = report_of(ebsd, snapshot)
    assert (report["Kind"], report["Damage"], report["Chunks"], report["WithoutLeaf"]) == ("integrity", [], 4, 0)
    assert report["Note"].startswith("its key could not be used")
    directory = ebsd.state / "layers" / volume["DataEncryptionKeyId"]
    (segment,) = (path for path in directory.iterdir() if path.name.startswith("0000000001") and path.suffix == ".000")
    flip(segment, 2 * CHUNK + 7)
    report = report_of(ebsd, snapshot, status=INTEGRITY)
    assert [(d["Chunk"], d["Chunks"]) for d in report["Damage"]] == [(2, 1)]
    client.kms("EnableKey", KeyId=key)
    assert report_of(ebsd, snapshot, status=INTEGRITY)["Kind"] == "authenticity"
    assert report_of(ebsd, snapshot, "--scrub", status=INTEGRITY)["Note"] == "no key was used, as was asked for"


def test_a_snapshot_that_nobody_hashed_is_hashed_and_signed_by_its_verification(
    ebsd: Installation, client: Client
) -> None:
    volume = make_volume(client)
    with attached(client, volume["VolumeId"]) as fd:
        os.pwrite(fd, secrets.token_bytes(4 * CHUNK), 0)
    snapshot = take(client, volume["VolumeId"])
    scrubbed = report_of(ebsd, snapshot, "--scrub")
    assert (scrubbed["WithoutLeaf"], scrubbed["HashedNow"], scrubbed["Kind"]) == (4, 0, "integrity")
    report = report_of(ebsd, snapshot)
    assert (report["Kind"], report["WithoutLeaf"], report["HashedNow"]) == ("integrity", 0, 4)
    assert report["Note"] == "no signature covered its leaves"
    body = body_of(ebsd, snapshot)
    assert (body.state, body.generation) == (RecordState.CLEAN, 1)
    report = report_of(ebsd, snapshot)
    assert (report["Kind"], report["HashedNow"]) == ("authenticity", 0)
    restored = client.ec2("CreateVolume", SnapshotId=snapshot, Name=f"r-{secrets.token_hex(4)}")["Volume"]
    with attached(client, restored["VolumeId"]) as fd:
        os.pwrite(fd, b"x", 0)


def test_an_attached_volume_is_refused_with_what_to_do_instead(shared: Story) -> None:
    with attached(shared.client, shared.volume):
        status, error = shared.ebsd.refused("verify", shared.volume)
    assert (status, error["Code"]) == (4, "IncorrectState")
    assert "snapshot" in error["Hint"]


def test_leaves_made_anew_by_who_has_no_key_are_refused_with_it_and_found_without(story: Story) -> None:
    story.flip(1, FIRST)
    (story.directory / "leaves").unlink()
    status, error = story.ebsd.refused("verify", story.second)
    assert (status, error["Code"]) == (INTEGRITY, "Ebsd.IntegrityFailure")
    assert "its leaf table lacks layer 1" in error["Message"]
    assert shown(story, story.second)["DamagedFiles"] == 1
    report = report_of(story.ebsd, story.second, "--scrub", status=INTEGRITY)
    assert report["Damage"][0]["File"] == "leaves"
    assert report["DamagedChunks"] == 0


def test_a_damaged_leaf_file_is_told_and_its_chunks_are_not_called_whole(shared: Story) -> None:
    path = shared.leaf_file(1)
    flip(path, path.stat().st_size - 40)
    report = report_of(shared.ebsd, shared.second, status=INTEGRITY)
    (damage,) = report["Damage"]
    assert (damage["File"], damage["Reason"]) == (path.name, "its checksum is wrong")
    assert (report["DamagedChunks"], report["WithoutLeaf"]) == (0, 30)
    with attached(shared.client, shared.volume) as fd:
        with pytest.raises(OSError):
            os.pwrite(fd, b"part", 0)
        assert os.pread(fd, CHUNK, 0) == shared.data[:CHUNK]


def test_a_record_that_is_refused_is_told_as_such(story: Story) -> None:
    path = story.ebsd.state / "records" / story.second
    flip(path, path.stat().st_size - 40)
    status, error = story.ebsd.refused("verify", story.second)
    assert (status, error["Code"]) == (INTEGRITY, "Ebsd.StoreDamaged")
    assert shown(story, story.second)["DamagedFiles"] == 1


def test_a_snapshot_known_as_damaged_is_not_used_unless_that_is_wanted(story: Story) -> None:
    story.flip(1, FIRST)
    report_of(story.ebsd, story.second, status=INTEGRITY)
    key = story.client.kms("CreateKey")["KeyMetadata"]["Arn"]
    for arguments in (
        ("create", "again", "--from", story.second),
        ("copy", story.second, "--encrypted", "--key", key),
        ("copy", story.second, "--encrypted", "--key", key, "--allow-damaged"),
        ("create", "again", "--from", story.second, "--encrypted", "--key", key, "--allow-damaged"),
    ):
        status, error = story.ebsd.refused(*arguments)
        assert (status, error["Code"]) == (INTEGRITY, "Ebsd.SnapshotDamaged"), arguments
        assert "--allow-damaged" in error["Hint"]
    name = f"again-{secrets.token_hex(4)}"
    story.ebsd.ok("create", name, "--from", story.second, "--allow-damaged")
    with attached(story.client, name) as fd:
        assert os.pread(fd, CHUNK, SECOND * CHUNK) == story.data[SECOND * CHUNK : (SECOND + 1) * CHUNK]
        with pytest.raises(OSError):
            os.pwrite(fd, b"part", FIRST * CHUNK)
    story.flip(1, FIRST)
    report_of(story.ebsd, story.second)
    story.ebsd.ok("create", f"again-{secrets.token_hex(4)}", "--from", story.second)


def test_a_copy_of_a_damaged_snapshot_fails_and_names_the_chunk(story: Story) -> None:
    story.flip(2, SECOND, 77)
    key = story.client.kms("CreateKey")["KeyMetadata"]["Arn"]
    status, error = story.ebsd.refused("copy", story.second, "--encrypted", "--key", key)
    assert (status, error["Code"]) == (INTEGRITY, "Ebsd.StoreDamaged")
    assert f"chunk {SECOND} of layer 2 has changed" in error["Message"]
    assert story.segment(2).name in error["Message"]


def test_a_copied_snapshot_is_authentic_from_the_start(story: Story) -> None:
    key = story.client.kms("CreateKey")["KeyMetadata"]["Arn"]
    copy = story.ebsd.ok("copy", story.second, "--encrypted", "--key", key)
    report = report_of(story.ebsd, copy)
    assert (report["Kind"], report["Chunks"], report["WithoutLeaf"], report["HashedNow"]) == ("authenticity", 50, 0, 0)


def test_an_unencrypted_volume_is_scrubbed(tmp_path: Path) -> None:
    with installation(tmp_path, "allow_unencrypted = true") as ebsd:
        client = Client(str(ebsd.socket), timeout=60)
        client.ec2("DisableEbsEncryptionByDefault")
        ident = client.ec2("CreateVolume", Name="plain", SizeBytes=SIZE, Encrypted=False)["Volume"]["VolumeId"]
        with attached(client, ident) as fd:
            os.pwrite(fd, secrets.token_bytes(3 * CHUNK), 0)
            snapshot = take(client, ident)
            until(lambda: body_of(ebsd, snapshot).leaf_root != NO_HASH)
        report = report_of(ebsd, snapshot)
        assert (report["Kind"], report["Chunks"], report["WithoutLeaf"]) == ("integrity", 3, 0)
        assert "not encrypted" in report["Note"]


def test_what_is_deleted_during_a_verification_is_given_back_after_it(story: Story) -> None:
    """The snapshot that is read may be deleted: its chunks stay until it was read."""
    report = report_of(story.ebsd, story.first)
    assert report["Damage"] == []
    story.client.ec2("DeleteSnapshot", SnapshotId=story.first)
    assert report_of(story.ebsd, story.second)["Damage"] == []
    assert story.ebsd.ctl("verify", story.first).status == 3
