"""fio writes, discards and reads back, on the loop device, with every block size and depth, while snapshots are taken.

EBSD_FIO_MIB: how much each trial writes; 1024 for the whole trial. What was discarded must read as zeros, what was
written as it was written, whatever its neighbours in the same chunk went through meanwhile.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from installation import Installation, installation

MIB = 1 << 20
AMOUNT = int(os.environ.get("EBSD_FIO_MIB", "16"))
SNAPSHOT_EVERY = 0.5

BLOCKS = {
    "4k": ["--bs=4k"],
    "16k": ["--bs=16k"],
    "a chunk": ["--bs=64k"],
    "1M": ["--bs=1M"],
    "any sectors": ["--bsrange=4k-256k", "--blockalign=4k"],
}
DEPTHS = (1, 32)

pytestmark = pytest.mark.timeout(300 + AMOUNT)


@pytest.fixture(scope="module")
def ebsd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    with installation(tmp_path_factory.mktemp("fio")) as made:
        yield made


@pytest.fixture
def device(ebsd: Installation, request: pytest.FixtureRequest) -> Iterator[str]:
    """The loop device of a new volume of twice the amount."""
    ebsd.ok("create", "data", "--size", f"{2 * AMOUNT}M", "--encrypted")
    ebsd.ok("attach", "data")
    (attachment,) = ebsd.ctl_json("show", "data")["Attachments"]
    yield attachment["Device"]
    ebsd.ok("detach", "data")
    ebsd.ok("delete", "data", "--yes")


def fio(device: str, scratch: Path, *words: str) -> subprocess.Popen[str]:
    common = ["--name=trial", f"--filename={device}", "--direct=1", "--ioengine=libaio", "--verify=crc32c"]
    common += [
        "--output-format=json",
        "--verify_fatal=1",
        "--randseed=7",
        f"--io_size={AMOUNT}M",
        f"--aux-path={scratch}",
    ]
    return subprocess.Popen(
        ["fio", *common, *words], cwd=scratch, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("blocks", BLOCKS)
def test_what_fio_wrote_and_discarded_is_what_it_reads(
    ebsd: Installation, device: str, tmp_path: Path, blocks: str, depth: int
) -> None:
    discards = ["--trim_percentage=25", "--trim_verify_zero=1", "--trim_backlog=16", "--verify_backlog=64"]
    trial = fio(device, tmp_path, "--rw=randtrimwrite", f"--iodepth={depth}", *BLOCKS[blocks], *discards, "--loops=2")
    taken = 0
    while trial.poll() is None:
        ebsd.ok("snapshot", "data", "--name", f"s{taken}")
        taken += 1
        time.sleep(SNAPSHOT_EVERY)
    said, _ = trial.communicate()
    for number in range(taken):
        ebsd.ok("delete", f"s{number}", "--yes")
    assert trial.returncode == 0, said[-3000:]
    assert taken
    (job,) = json.loads(said[said.index("{") :])["jobs"]
    done = {way: job[way]["total_ios"] for way in ("write", "trim", "read")}
    print(done)
    assert job["write"]["io_bytes"] >= AMOUNT * MIB // 2
    assert all(done.values()), f"something was never tried: {done}"


def test_fio_finds_what_is_wrong(device: str, tmp_path: Path) -> None:
    writes = fio(device, tmp_path, "--rw=write", "--bs=64k", "--do_verify=0")
    said, _ = writes.communicate()
    assert writes.returncode == 0, said
    with open(device, "r+b", buffering=0) as opened:
        os.pwrite(opened.fileno(), b"\1" * 512, 5 * MIB + 512)
    reads = fio(device, tmp_path, "--rw=write", "--bs=64k", "--verify_only=1")
    said, _ = reads.communicate()
    assert reads.returncode != 0
    assert "verify" in said
