"""Snapshots block by block, through a real ebsd: what is read is what was written, and what is written can be restored.

Every comparison is byte by byte with what a volume's block file showed, never with what ebsd says of itself.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from installation import Installation, installation

from ebsctl.blocks import Blocks, batches, digest
from ebsctl.client import Client
from ebsd.domain.errors import RemoteError

BLOCK = 512 * 1024
CHUNK = 64 * 1024
SIZE = 24 * 1024 * 1024 + 192 * 1024
"""Not a whole number of blocks: the last one is cut."""

SEED = 20


@pytest.fixture(scope="module")
def ebsd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    with installation(tmp_path_factory.mktemp("blocks"), "allow_unencrypted = true") as made:
        yield made


@pytest.fixture(scope="module")
def blocks(ebsd: Installation) -> Blocks:
    return Blocks(Client(str(ebsd.socket), timeout=100))


def block_file(ebsd: Installation, volume: str) -> Path:
    return Path(ebsd.ok("attach", volume, "--file"))


def content(ebsd: Installation, snapshot: str, name: str) -> bytes:
    """Return what a volume made from a snapshot shows."""
    ebsd.ok("create", name, "--from", snapshot)
    data = block_file(ebsd, name).read_bytes()
    ebsd.ok("detach", name)
    ebsd.ok("delete", name, "--yes")
    return data


def scribble(path: Path, dice: random.Random, writes: int) -> None:
    with path.open("r+b", buffering=0) as file:
        for _ in range(writes):
            at = dice.randrange(0, SIZE - 4096, 4096)
            length = min(dice.choice((4096, CHUNK, 3 * CHUNK + 4096)), SIZE - at)
            os.pwrite(file.fileno(), dice.randbytes(length), at)
        os.fsync(file.fileno())


def zero(path: Path, at: int, length: int) -> None:
    with path.open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), bytes(length), at)
        os.fsync(file.fileno())


@pytest.fixture(scope="module")
def history(ebsd: Installation) -> dict[str, bytes]:
    """Three snapshots of one volume, by name: what each holds."""
    dice = random.Random(SEED)
    ebsd.ok("create", "data", "--size", str(SIZE))
    path = block_file(ebsd, "data")
    found = {}
    for name in ("s1", "s2", "s3"):
        scribble(path, dice, 6)
        if name == "s2":
            zero(path, 8 * BLOCK, 2 * BLOCK)
        if name == "s3":
            zero(path, SIZE - CHUNK, CHUNK)
        ebsd.ok("snapshot", "data", "--name", name)
        found[name] = path.read_bytes()
    ebsd.ok("detach", "data")
    return found


def different(one: bytes, other: bytes) -> set[int]:
    return {at // BLOCK for at in range(0, SIZE, BLOCK) if one[at : at + BLOCK] != other[at : at + BLOCK]}


def image_of(blocks: Blocks, snapshot: str) -> bytes:
    image = bytearray(-(-SIZE // BLOCK) * BLOCK)
    for batch in batches(blocks.stored(snapshot)):
        for (number, _), data in zip(batch, blocks.read(snapshot, batch), strict=True):
            image[number * BLOCK : (number + 1) * BLOCK] = data
    assert not any(image[SIZE:])
    return bytes(image[:SIZE])


def filled(blocks: Blocks, image: bytes, **members: Any) -> str:
    """Make a snapshot of an image, without completing it."""
    ident: str = blocks.call("StartSnapshot", SizeBytes=len(image), **members)["SnapshotId"]
    numbers = iter(range(-(-len(image) // BLOCK)))
    for batch in batches(numbers):
        blocks.write(ident, [(n, image[n * BLOCK : (n + 1) * BLOCK].ljust(BLOCK, b"\0")) for n in batch])
    return ident


def count(image: bytes) -> int:
    return -(-len(image) // BLOCK)


def refusal(blocks: Blocks, method: str, **members: Any) -> tuple[str, str]:
    with pytest.raises(RemoteError) as caught:
        blocks.call(method, **members)
    return caught.value.code, caught.value.aws_reason


# --- reading


def test_the_blocks_of_a_snapshot_are_its_bytes(blocks: Blocks, history: dict[str, bytes]) -> None:
    for name, data in history.items():
        assert image_of(blocks, name) == data
        stored = {number for number, _ in blocks.stored(name)}
        assert different(data, bytes(SIZE)) <= stored


def test_changed_blocks_are_those_whose_bytes_differ(blocks: Blocks, history: dict[str, bytes]) -> None:
    for first in history:
        for second in history:
            differing = different(history[first], history[second])
            listed = dict(blocks.changed(first, second))
            assert differing <= set(listed)
            assert set(dict(blocks.changed(first, second, exact=True))) == differing
            for number, token in listed.items():
                there = history[second][number * BLOCK : (number + 1) * BLOCK].ljust(BLOCK, b"\0")
                assert (blocks.read(second, [(number, token)])[0] if token else bytes(BLOCK)) == there
    assert set(dict(blocks.changed("s1", "s1"))) == set()


def test_a_backup_tool_keeps_a_copy_up_to_date(ebsd: Installation, history: dict[str, bytes], tmp_path: Path) -> None:
    copy = tmp_path / "copy.img"
    ebsd.ok("blocks", "get", "s1", copy)
    assert copy.read_bytes() == history["s1"]
    assert ebsd.ctl("blocks", "get", "s1", copy).status == 1  # nothing is overwritten unasked
    written = int(ebsd.ok("blocks", "get", "s2", copy, "--since", "s1", "--exact"))
    assert (written, copy.read_bytes()) == (len(different(history["s1"], history["s2"])), history["s2"])
    ebsd.ok("blocks", "get", "s3", copy, "--since", "s2")
    assert copy.read_bytes() == history["s3"]
    listed = ebsd.ctl_json("blocks", "changed", "s1", "s3", "--exact")["ChangedBlocks"]
    assert {block["BlockIndex"] for block in listed} == different(history["s1"], history["s3"])


def test_tokens_name_one_block_of_one_snapshot(blocks: Blocks, history: dict[str, bytes]) -> None:
    (number, token), (other, _), *_ = blocks.stored("s1")
    good = {"SnapshotId": "s1", "BlockIndex": number, "BlockToken": token}
    reply = blocks._client.call(blocks._client.path, "io.ebsd.EBS.GetSnapshotBlock", good)
    data = os.pread(reply.descriptors[0], BLOCK + 1, 0)
    assert digest(data) == reply.parameters["Checksum"]
    with pytest.raises(OSError, match="Operation not permitted"):
        os.pwrite(reply.descriptors[0], b"x", 0)
    os.close(reply.descriptors[0])
    refused = ("ValidationException", "INVALID_BLOCK_TOKEN")
    assert refusal(blocks, "GetSnapshotBlock", **{**good, "BlockIndex": other}) == refused
    assert refusal(blocks, "GetSnapshotBlock", **{**good, "SnapshotId": "s2"}) == refused
    forged = base64.b64decode(token)
    forged = base64.b64encode(forged[:-1] + bytes([forged[-1] ^ 1])).decode()
    assert refusal(blocks, "GetSnapshotBlock", **{**good, "BlockToken": forged}) == refused
    assert refusal(blocks, "GetSnapshotBlock", **{**good, "BlockIndex": 4096}) == (
        "ValidationException", "INVALID_BLOCK",
    )  # fmt: skip
    assert refusal(blocks, "ListSnapshotBlocks", SnapshotId="s1", NextToken=token) == (
        "ValidationException", "INVALID_PAGE_TOKEN",
    )  # fmt: skip
    assert refusal(blocks, "ListSnapshotBlocks", SnapshotId="none") == (
        "ResourceNotFoundException", "SNAPSHOT_NOT_FOUND",
    )  # fmt: skip


def test_snapshots_of_other_lineages_are_not_related(ebsd: Installation, blocks: Blocks) -> None:
    ebsd.ok("create", "stranger", "--size", "1M")
    ebsd.ok("snapshot", "stranger", "--name", "strange")
    code = refusal(blocks, "ListChangedBlocks", FirstSnapshotId="s1", SecondSnapshotId="strange")
    assert code == ("ValidationException", "UNRELATED_SNAPSHOTS")


def test_a_key_that_is_disabled_gives_no_blocks(ebsd: Installation, blocks: Blocks) -> None:
    ebsd.ok("key", "create", "lent")
    ebsd.ok("create", "locked", "--size", "1M", "--encrypted", "--key", "lent")
    ebsd.ok("snapshot", "locked", "--name", "l1")
    ebsd.ok("key", "disable", "lent")
    status, error = ebsd.refused("blocks", "list", "l1")
    assert (status, error["Code"]) == (6, "DisabledException")
    ebsd.ok("key", "enable", "lent")
    assert ebsd.ctl_json("blocks", "list", "l1")["Blocks"] == []


# --- writing


def test_a_volume_goes_block_by_block_into_a_new_snapshot(
    ebsd: Installation, blocks: Blocks, history: dict[str, bytes]
) -> None:
    image = history["s2"]
    ident = filled(blocks, image, Name="copied", Description="block by block", Tags=[{"Key": "a", "Value": "b"}])
    (shown,) = Client(str(ebsd.socket)).ec2("DescribeSnapshots", SnapshotIds=[ident])["Snapshots"]
    assert shown["State"] == "pending"
    assert "StartSnapshot" in shown["StateMessage"]
    assert refusal(blocks, "ListSnapshotBlocks", SnapshotId=ident) == ("ValidationException", "INVALID_SNAPSHOT_ID")
    assert ebsd.ctl("create", "early", "--from", ident).status == 4
    aggregate = hashlib.sha256()
    for n in range(count(image)):
        aggregate.update(hashlib.sha256(image[n * BLOCK : (n + 1) * BLOCK].ljust(BLOCK, b"\0")).digest())
    good = base64.b64encode(aggregate.digest()).decode()
    wrong = {"SnapshotId": ident, "ChangedBlocksCount": count(image) - 1}
    assert refusal(blocks, "CompleteSnapshot", **wrong) == ("ValidationException", "INVALID_PARAMETER_VALUE")
    status, error = ebsd.refused("blocks", "complete", ident, "--count", str(count(image)), "--checksum", digest(b"x"))
    assert (status, error["Code"]) == (2, "ValidationException")
    assert ebsd.ok("blocks", "complete", ident, "--count", str(count(image)), "--checksum", good) == "completed"
    assert ebsd.ok("blocks", "complete", ident, "--count", str(count(image))) == "completed"  # an answer was lost
    assert content(ebsd, ident, "restored") == image
    assert image_of(blocks, ident) == image
    assert refusal(blocks, "PutSnapshotBlocks", SnapshotId=ident, Blocks=[], DataDescriptor=0)[0] != ""
    report = ebsd.ctl_json("verify", ident)
    assert (report["Kind"], report["DamagedChunks"]) == ("authenticity", 0)
    assert ebsd.ctl_json("check")["Findings"] == []


def test_with_a_parent_only_what_changed_is_written(
    ebsd: Installation, blocks: Blocks, history: dict[str, bytes]
) -> None:
    ident = blocks.call("StartSnapshot", SizeBytes=SIZE, ParentSnapshotId="s1")["SnapshotId"]
    wanted = sorted(different(history["s1"], history["s3"]))
    image = history["s3"]
    blocks.write(ident, [(n, image[n * BLOCK : (n + 1) * BLOCK].ljust(BLOCK, b"\0")) for n in wanted])
    assert ebsd.ctl("delete", "s1", "--yes").status == 4  # the parent of one that is being filled stays
    assert blocks.call("CompleteSnapshot", SnapshotId=ident, ChangedBlocksCount=len(wanted))["Status"] == "completed"
    assert content(ebsd, ident, "again") == image
    assert set(dict(blocks.changed("s1", ident))) == set(wanted)
    assert set(dict(blocks.changed("s3", ident, exact=True))) == set()
    shown = Client(str(ebsd.socket)).ec2("DescribeSnapshots", SnapshotIds=["s1", ident])["Snapshots"]
    assert len({one["DataEncryptionKeyId"] for one in shown}) == 1
    assert ebsd.ctl_json("verify", ident)["DamagedChunks"] == 0
    ebsd.ok("delete", ident, "--yes")
    assert image_of(blocks, "s1") == history["s1"]
    assert image_of(blocks, "s3") == image
    assert ebsd.ctl_json("check")["Findings"] == []


def test_what_is_not_what_it_should_be_is_not_written(blocks: Blocks) -> None:
    ident = blocks.call("StartSnapshot", SizeBytes=4 * BLOCK + 4096)["SnapshotId"]

    def put(data: bytes, number: int = 0, checksum: str | None = None, **more: Any) -> str:
        fd = os.memfd_create("test")
        try:
            os.write(fd, data)
            return offer(fd, number, checksum or digest(data), **more)
        finally:
            os.close(fd)

    def offer(fd: int, number: int, checksum: str, **more: Any) -> str:
        members = {
            "SnapshotId": ident, "BlockIndex": number, "DataDescriptor": 0, "DataLength": BLOCK, "Checksum": checksum,
            "ChecksumAlgorithm": "SHA256", **more,
        }  # fmt: skip
        try:
            blocks._client.call(blocks._client.path, "io.ebsd.EBS.PutSnapshotBlock", members, [fd])
        except RemoteError as exc:
            return exc.aws_reason or exc.code
        return "written"

    block = os.urandom(BLOCK)
    assert put(block, checksum=digest(b"other")) == "INVALID_BLOCK"
    assert put(block[:-1], checksum=digest(block)) == "INVALID_BLOCK"
    assert put(block, number=5) == "INVALID_BLOCK"
    assert put(block, number=4) == "INVALID_BLOCK"  # data behind the end of the volume
    assert put(block, DataLength=4096) == "INVALID_PARAMETER_VALUE"
    assert put(block, ChecksumAlgorithm="MD5") == "INVALID_PARAMETER_VALUE"
    assert put(block, Checksum="short") == "INVALID_PARAMETER_VALUE"
    reading, writing = os.pipe()
    try:
        assert offer(reading, 0, digest(block)) == "INVALID_BLOCK"  # would never be written
    finally:
        os.close(reading)
        os.close(writing)
    with open("/etc/hostname", "rb") as file:
        assert offer(file.fileno(), 0, digest(block)) == "INVALID_BLOCK"
    assert refusal(blocks, "CompleteSnapshot", SnapshotId=ident, ChangedBlocksCount=1)[0] == "ValidationException"
    assert put(block) == "written"
    assert put(block) == "written"
    assert blocks.call("CompleteSnapshot", SnapshotId=ident, ChangedBlocksCount=1)["Status"] == "completed"
    assert put(block) == "INVALID_SNAPSHOT_ID"


def test_memory_that_changes_while_it_is_read_is_written_as_its_checksum_says_or_not_at_all(
    ebsd: Installation, blocks: Blocks
) -> None:
    good, bad = os.urandom(BLOCK), os.urandom(BLOCK)
    ident = blocks.call("StartSnapshot", SizeBytes=4 * BLOCK)["SnapshotId"]
    fd = os.memfd_create("hostile")
    stop = threading.Event()

    def change() -> None:
        while not stop.is_set():
            os.pwrite(fd, good, 0)
            os.pwrite(fd, bad, 0)
            os.ftruncate(fd, 4096)

    thread = threading.Thread(target=change)
    thread.start()
    written, refusals = 0, set()
    try:
        for number in range(30):
            given = [{"BlockIndex": number % 4, "Checksum": digest(good)}]
            members = {"SnapshotId": ident, "Blocks": given, "DataDescriptor": 0}
            try:
                blocks._client.call(blocks._client.path, "io.ebsd.EBS.PutSnapshotBlocks", members, [fd])
                written |= 1 << number % 4
            except RemoteError as exc:
                refusals.add(exc.aws_reason)
    finally:
        stop.set()
        thread.join()
        os.close(fd)
    assert refusals <= {"INVALID_BLOCK"}
    assert workers_of(ebsd, "ebsd.volume.block_writer"), "the writer is gone: it did not survive the file that shrank"
    done = blocks.call("CompleteSnapshot", SnapshotId=ident, ChangedBlocksCount=written.bit_count())
    assert done["Status"] == "completed"
    stored = list(blocks.stored(ident))
    assert [number for number, _ in stored] == [number for number in range(4) if written >> number & 1]
    for one in stored:
        assert blocks.read(ident, [one]) == [good]


def test_the_same_client_token_begins_one_snapshot(ebsd: Installation, blocks: Blocks) -> None:
    first = blocks.call("StartSnapshot", VolumeSize=1, ClientToken="t1", Timeout=10)
    assert blocks.call("StartSnapshot", VolumeSize=1, ClientToken="t1", Timeout=10) == first
    assert refusal(blocks, "StartSnapshot", VolumeSize=2, ClientToken="t1", Timeout=10)[0] == "ConflictException"
    ebsd.ok("delete", first["SnapshotId"], "--yes")
    gone = ("ResourceNotFoundException", "SNAPSHOT_NOT_FOUND")
    assert refusal(blocks, "CompleteSnapshot", SnapshotId=first["SnapshotId"], ChangedBlocksCount=0) == gone
    second = blocks.call("StartSnapshot", VolumeSize=1, ClientToken="t1", Timeout=10)
    assert second["SnapshotId"] != first["SnapshotId"]
    ebsd.ok("delete", second["SnapshotId"], "--yes")


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({}, "INVALID_PARAMETER_VALUE"),
        ({"VolumeSize": 0}, "INVALID_PARAMETER_VALUE"),
        ({"VolumeSize": 1, "SizeBytes": 1 << 30}, "INVALID_PARAMETER_VALUE"),
        ({"VolumeSize": 65537}, "INVALID_PARAMETER_VALUE"),
        ({"VolumeSize": 1, "Timeout": 9}, "INVALID_PARAMETER_VALUE"),
        ({"SizeBytes": 1 << 20, "ParentSnapshotId": "s1"}, "INVALID_VOLUME_SIZE"),
    ],
)
def test_what_cannot_be_started(
    blocks: Blocks, history: dict[str, bytes], members: dict[str, Any], reason: str
) -> None:
    assert refusal(blocks, "StartSnapshot", **members) == ("ValidationException", reason)


def test_unencrypted_snapshots_have_blocks_too(ebsd: Installation, blocks: Blocks) -> None:
    must = {"SizeBytes": 3 * BLOCK, "Encrypted": False}
    assert refusal(blocks, "StartSnapshot", **must) == ("ValidationException", "INVALID_PARAMETER_VALUE")
    ebsd.ok("defaults", "disable-encryption")
    try:
        image = os.urandom(3 * BLOCK)
        first = filled(blocks, image, Encrypted=False)
        assert blocks.call("CompleteSnapshot", SnapshotId=first, ChangedBlocksCount=3)["Status"] == "completed"
        child = blocks.call("StartSnapshot", SizeBytes=4 * BLOCK, ParentSnapshotId=first)
        assert "KmsKeyArn" not in child
        blocks.write(child["SnapshotId"], [(1, bytes(BLOCK)), (3, image[:BLOCK])])
        blocks.call("CompleteSnapshot", SnapshotId=child["SnapshotId"], ChangedBlocksCount=2)
        wanted = image[:BLOCK] + bytes(BLOCK) + image[2 * BLOCK :] + image[:BLOCK]
        assert content(ebsd, child["SnapshotId"], "plain") == wanted
        assert dict(blocks.changed(first, child["SnapshotId"], exact=True)).keys() == {1, 3}
    finally:
        ebsd.ok("defaults", "enable-encryption")


def test_what_goes_with_a_parent_is_the_parents(blocks: Blocks, history: dict[str, bytes]) -> None:
    code, _ = refusal(blocks, "StartSnapshot", SizeBytes=SIZE, ParentSnapshotId="s1", Encrypted=True)
    assert code == "ValidationException"


# --- processes that end


def workers_of(ebsd: Installation, module: str) -> list[int]:
    """Return the pids of the workers of this ebsd."""
    daemon, found = ebsd.daemon_pid(), []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == daemon and module.encode() in words:
            found.append(int(process.name))
    return found


def test_blocks_that_were_answered_survive_every_kill(
    ebsd: Installation, blocks: Blocks, history: dict[str, bytes]
) -> None:
    image = history["s1"]
    pieces = [(n, image[n * BLOCK : (n + 1) * BLOCK].ljust(BLOCK, b"\0")) for n in range(count(image))]
    ident = blocks.call("StartSnapshot", SizeBytes=SIZE, ParentSnapshotId="s3")["SnapshotId"]
    blocks.write(ident, pieces[:10])
    for pid in workers_of(ebsd, "ebsd.volume.block_writer"):
        os.kill(pid, signal.SIGKILL)
    blocks.write(ident, pieces[10:20])
    ebsd.kill()
    ebsd.start()
    assert workers_of(ebsd, "ebsd.volume.block_writer") == []
    blocks.write(ident, pieces[20:])
    ebsd.stop()
    ebsd.start()
    assert refusal(blocks, "ListSnapshotBlocks", SnapshotId=ident)[0] == "ValidationException"
    assert {finding["Severity"] for finding in ebsd.ctl_json("check")["Findings"]} <= {"note"}
    # Completed and killed at once: the next ebsd goes on by itself, or the caller does.
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ebsd.ctl, "blocks", "complete", ident, "--count", str(count(image)))
        time.sleep(0.35)
        ebsd.kill()
        asked.result()
    ebsd.start()
    assert ebsd.ok("blocks", "complete", ident, "--count", str(count(image))) == "completed"
    assert content(ebsd, ident, "survivor") == image
    assert image_of(blocks, "s3") == history["s3"]
    assert ebsd.ctl_json("check")["Findings"] == []


def test_a_reader_that_is_killed_is_replaced(ebsd: Installation, blocks: Blocks, history: dict[str, bytes]) -> None:
    tokens = list(blocks.stored("s1"))
    for pid in workers_of(ebsd, "ebsd.volume.block_reader"):
        os.kill(pid, signal.SIGKILL)
    assert blocks.read("s1", tokens[:1])[0] == history["s1"][tokens[0][0] * BLOCK :][:BLOCK].ljust(BLOCK, b"\0")


def test_a_snapshot_that_is_deleted_half_way_leaves_nothing(ebsd: Installation, blocks: Blocks) -> None:
    before = {path.name for path in (ebsd.state / "layers").iterdir()}
    ident = filled(blocks, os.urandom(4 * BLOCK))
    assert {path.name for path in (ebsd.state / "layers").iterdir()} > before
    ebsd.ok("delete", ident, "--yes")
    left = [path for path in ebsd.state.rglob("*") if ident in path.name]
    assert left == []
    assert {path.name for path in (ebsd.state / "layers").iterdir()} == before


def test_reads_and_writes_of_keys_are_in_the_audit_log(ebsd: Installation, blocks: Blocks) -> None:
    ident = filled(blocks, os.urandom(2 * BLOCK))
    blocks.call("CompleteSnapshot", SnapshotId=ident, ChangedBlocksCount=2)
    list(blocks.stored(ident))
    told = [json.dumps(record) for record in ebsd.ctl_json("audit")["Records"]]
    assert sum(ident in record and '"Decrypt"' in record for record in told) >= 2
