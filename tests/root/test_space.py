"""Shows what a store does on a small real file system that runs full: writes wait, fail, go on; deletions work.

Two file systems of 300 MiB, ext4 and xfs, on loop devices.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import random
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from installation import Installation, installation, run

MIB = 1 << 20
CHUNK = 65536
SETTINGS = '[space]\nreserve = "16M"\nballast = "8M"\nfull_wait = {wait}'


@pytest.fixture(params=["ext4", "xfs"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Installation]:
    """An ebsd that does not wait for space, on a file system of its own of 300 MiB."""
    with small_store(tmp_path, request.param) as made:
        yield made


@contextmanager
def small_store(root: Path, file_system: str) -> Iterator[Installation]:
    image, state = root / "image", root / "state"
    state.mkdir()
    with image.open("wb") as file:
        file.truncate(300 * MIB)
    if file_system == "ext4":
        run("mkfs.ext4", "-q", "-m", "0", image)
    else:
        run("mkfs.xfs", "-q", image)
    run("mount", "-o", "loop", image, state)
    try:
        with (state / "pad").open("wb") as pad:  # less to fill
            os.posix_fallocate(pad.fileno(), 0, 100 * MIB)
        made = Installation(root, SETTINGS.format(wait=0))
        made.start()
        try:
            yield made
        finally:
            (state / "weight").unlink(missing_ok=True)
            made.ctl("detach", "--all")
            made.ctl("detach", "--all", "--force")
            made.stop()
    finally:
        run("umount", state)
    assert not made.leftovers()


def restart(store: Installation, *, wait: float) -> None:
    store.stop()
    store.settings = SETTINGS.format(wait=wait)
    store.start()


def space(store: Installation) -> dict[str, object]:
    return store.ctl_json("status")["Space"]


def weigh_down(store: Installation, left: int) -> None:
    """Leave this many MiB free."""
    with (store.state / "weight").open("wb") as weight:
        os.posix_fallocate(weight.fileno(), 0, int(str(space(store)["FreeBytes"])) - left * MIB)


def piece(number: int) -> bytes:
    return random.Random(number).randbytes(MIB)


def fill(path: str, first: int = 0) -> int:
    """Write and flush pieces until there is no space; returns how many there are."""
    count = [first]
    with pytest.raises(OSError, match="No space left"):
        write_pieces(path, count)
    return count[0]


def write_pieces(path: str, count: list[int]) -> None:
    with open(path, "r+b", buffering=0) as file:
        while True:
            assert os.pwrite(file.fileno(), piece(count[0]), count[0] * MIB) == MIB
            os.fsync(file.fileno())
            count[0] += 1


def fill_to_the_last_byte(path: Path) -> None:
    with path.open("ab", buffering=0) as file:
        for size in (MIB, 4096):
            with pytest.raises(OSError, match="No space left"):
                write_without_end(file, size)


def write_without_end(file: Any, size: int) -> None:
    while True:
        file.write(bytes(size))
        os.fsync(file.fileno())


def digest_of(path: str, count: int) -> list[str]:
    with open(path, "rb") as file:
        return [hashlib.sha256(file.read(MIB)).hexdigest() for _ in range(count)]


def digests(count: int) -> list[str]:
    return [hashlib.sha256(piece(number)).hexdigest() for number in range(count)]


def test_a_volume_runs_into_the_reserve_waits_and_goes_on(store: Installation) -> None:
    for name in ("old", "data"):
        store.ok("create", name, "--size", "400M")
    with open(store.ok("attach", "old", "--file"), "r+b", buffering=0) as file:
        for number in range(16):
            os.pwrite(file.fileno(), piece(1000 + number), number * MIB)
    store.ok("detach", "old")
    assert space(store)["State"] == "ok"
    path = store.ok("attach", "data", "--file")

    count = fill(path)
    assert count > 40
    told = space(store)
    assert told["State"] == "full"
    assert told["ReserveBytes"] == 16 * MIB
    assert 15 * MIB < told["FreeBytes"] < 17 * MIB, "all but the reserve is used, and the reserve is not"
    assert told["BallastBytes"] == 8 * MIB
    assert any(finding["Level"] == "failure" for finding in findings(store, "space"))
    with open(path, "r+b", buffering=0) as file:
        assert os.pwrite(file.fileno(), piece(0), 0) == MIB, "what has its place can be written"
    assert digest_of(path, count) == digests(count)

    before = store.ctl_json("list"), store.ctl_json("list", "snapshots"), files_below(store)
    for command in (("create", "new", "--size", "8M"), ("snapshot", "data")):
        status, error = store.refused(*command)
        assert (status, error["Code"]) == (10, "Ebsd.NoSpace"), error
        assert "16 MiB" in error["Message"]
        assert "Delete snapshots or volumes, or grow the file system." in error["Hint"]
    assert (store.ctl_json("list"), store.ctl_json("list", "snapshots"), files_below(store)) == before

    store.ok("detach", "data")
    restart(store, wait=600)
    # Over a loop device: to the block file itself the kernel lets one synchronous write at a time.
    path = store.ok("attach", "data")
    answers: list[int] = []
    writer = threading.Thread(target=lambda: answers.append(write_directly(path, count, 8)), daemon=True)
    writer.start()
    assert write_directly(path, 0, count) == count
    assert read_directly(path, count) == digests(count)
    assert writer.is_alive(), "it was to wait for space"
    assert not answers
    store.ok("delete", "old", "--yes")
    writer.join(60)
    assert answers == [8], "the space of what was deleted goes to the write that waits"
    count += 8
    assert digest_of(path, count) == digests(count)
    store.ok("detach", "data")
    path = store.ok("attach", "data", "--file")
    assert store.ctl_json("show", "data")["Integrity"] == "verified"
    assert digest_of(path, count) == digests(count)
    assert "incident" not in store.log.read_text()


def fill_once(path: str, first: int, pieces: int) -> int:
    with open(path, "r+b", buffering=0) as file:
        for number in range(first, first + pieces):
            assert os.pwrite(file.fileno(), piece(number), number * MIB) == MIB
        os.fsync(file.fileno())
    return pieces


def write_into_cache(path: str, pieces: int) -> None:
    with open(path, "r+b", buffering=0) as file:
        for number in range(pieces):
            os.pwrite(file.fileno(), piece(number), number * MIB)


def write_directly(path: str, first: int, pieces: int) -> int:
    """Write pieces past the page cache, where a flush would wait for everybody's writes."""
    buffer = mmap.mmap(-1, MIB)
    fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    try:
        for number in range(first, first + pieces):
            buffer[:] = piece(number)
            assert os.pwrite(fd, buffer, number * MIB) == MIB
    finally:
        os.close(fd)
    return pieces


def read_directly(path: str, pieces: int) -> list[str]:
    buffer = mmap.mmap(-1, MIB)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    found = []
    try:
        for number in range(pieces):
            assert os.preadv(fd, [buffer], number * MIB) == MIB
            found.append(hashlib.sha256(buffer[:]).hexdigest())
    finally:
        os.close(fd)
    return found


def findings(store: Installation, check: str) -> list[dict[str, str]]:
    outcome = store.ctl("--json", "doctor")
    return [finding for finding in outcome.json["Findings"] if finding["Check"] == check]


def files_below(store: Installation) -> set[str]:
    return {
        str(path)
        for directory in ("layers", "maps", "records")
        for path in (store.state / directory).rglob("*")
        if path.name != "table"
    }


def test_a_detach_does_not_wait_for_space(store: Installation) -> None:
    """With an hour of patience a detach would take an hour."""
    store.ok("create", "data", "--size", "400M")
    restart(store, wait=3600)
    path = store.ok("attach", "data")
    weigh_down(store, 60)
    fd = os.open(path, os.O_RDWR)
    failures: list[int | None] = []
    kept = 20

    def write() -> None:
        try:
            for number in range(200):
                os.pwrite(fd, piece(number), number * MIB)
                if number == kept:
                    os.fsync(fd)
            os.fsync(fd)
        except OSError as exc:
            failures.append(exc.errno)
        finally:
            os.close(fd)

    writer = threading.Thread(target=write)
    writer.start()
    while space(store)["State"] != "full":
        assert writer.is_alive()
    store.ok("detach", "data", "--force")
    writer.join(60)
    assert not writer.is_alive()
    (store.state / "weight").unlink()
    path = store.ok("attach", "data")
    assert digest_of(path, kept) == digests(kept)


@pytest.mark.parametrize("store", ["ext4"], indirect=True)
def test_a_detach_tells_that_cached_writes_found_no_space(store: Installation) -> None:
    """Nobody has asked for a flush, so nobody was told yet: the detach is the last one who can."""
    store.ok("create", "data", "--size", "200M")
    path = store.ok("attach", "data")
    weigh_down(store, 40)
    write_into_cache(path, 60)
    status, error = store.refused("detach", "data")
    assert (status, error["Code"]) == (10, "Ebsd.NoSpace")
    assert "stays attached" in error["Hint"]
    (store.state / "weight").unlink()
    write_into_cache(path, 60)
    store.ok("detach", "data")
    assert digest_of(store.ok("attach", "data"), 60) == digests(60)


def test_deletions_work_on_a_disk_that_is_full_to_the_last_byte(store: Installation) -> None:
    store.ok("create", "data", "--size", "64M")
    path = store.ok("attach", "data", "--file")
    names = []
    for number in range(6):
        with open(path, "r+b", buffering=0) as file:
            for chunk in range(number, 1024, 7):
                os.pwrite(file.fileno(), piece(number)[:CHUNK], chunk * CHUNK)
        names.append(f"s{number}")
        store.ok("snapshot", "data", "--name", names[-1])
    store.ok("create", "other", "--size", "64M")
    expected = Path(path).read_bytes()
    fill_to_the_last_byte(store.state / "weight")
    assert space(store)["State"] == "full"
    for name in names[::2]:
        store.ok("delete", name, "--yes")
        fill_to_the_last_byte(store.state / "weight")
    store.ok("delete", "other", "--yes")
    assert Path(path).read_bytes() == expected
    fill_to_the_last_byte(store.state / "weight")
    store.ok("detach", "data")
    assert sorted(s["Name"] for s in store.ctl_json("list", "snapshots")["Snapshots"]) == names[1::2]
    fill_to_the_last_byte(store.state / "weight")
    store.stop()
    store.start()
    store.ok("delete", "data", "--yes")
    for name in names[1::2]:
        store.ok("delete", name, "--yes")
    assert files_below(store) == set()
    (store.state / "weight").unlink()
    restart(store, wait=0)  # the ballast is built at the start
    assert space(store)["BallastBytes"] == 8 * MIB
    log = store.log.read_text()
    assert "space could not be given back" not in log
    assert "Traceback" not in log


def test_a_copy_that_meets_the_reserve_leaves_nothing_behind(store: Installation) -> None:
    store.ok("key", "create", "other")
    store.ok("create", "data", "--size", "400M")
    path = store.ok("attach", "data", "--file")
    fill_once(path, 0, 30)
    store.ok("snapshot", "data", "--name", "s")
    weigh_down(store, 40)
    assert space(store)["State"] != "full"
    before = store.ctl_json("list"), store.ctl_json("list", "snapshots"), files_below(store)
    for command in (
        ("copy", "s", "--name", "c", "--encrypted", "--key", "other"),
        ("create", "c", "--from", "s", "--encrypted", "--key", "other"),
    ):
        status, error = store.refused(*command)
        assert (status, error["Code"]) == (10, "Ebsd.NoSpace"), error
        assert "Delete snapshots or volumes, or grow the file system." in error["Hint"]
        assert (store.ctl_json("list"), store.ctl_json("list", "snapshots"), files_below(store)) == before
        jobs = store.ctl_json("list", "jobs")["Jobs"]
        assert {job["State"] for job in jobs} == {"failed"}
    assert digest_of(path, 30) == digests(30)
    fill_once(path, 30, 4)
    (store.state / "weight").unlink()
    store.ok("copy", "s", "--name", "c", "--encrypted", "--key", "other")


# --- what a deletion gives back ---------------------------------------------------------------------------


def stored(ebsd: Installation) -> int:
    subprocess.run(["sync", "-f", ebsd.state], check=True)
    return sum(path.stat().st_blocks * 512 for path in (ebsd.state / "layers").rglob("*-*.[0-9][0-9][0-9]"))


def used(ebsd: Installation) -> dict[str, tuple[int, int, int]]:
    """Return id -> (allocated, shared, unique) of everything."""
    listed = [*ebsd.ctl_json("list")["Volumes"], *ebsd.ctl_json("list", "snapshots")["Snapshots"]]
    return {
        item.get("SnapshotId") if "VolumeSize" in item else item["VolumeId"]: (
            item["AllocatedBytes"],
            item["SharedBytes"],
            item["UniqueBytes"],
        )
        for item in listed
    }


@pytest.mark.parametrize("seed", [0])
def test_a_deletion_gives_back_what_was_announced(tmp_path: Path, seed: int) -> None:
    """Snapshots of a volume and of one restored from it, deleted with both in any order.

    Compared with the blocks of the layers' files: the tolerance is below one chunk, for the file system's own blocks.
    """
    dice = random.Random(seed)
    with installation(tmp_path) as ebsd:
        ebsd.ok("create", "a", "--size", "16M")
        names = ["a"]

        def scribble(volume: str) -> None:
            with open(ebsd.ok("attach", volume, "--file"), "r+b", buffering=0) as file:
                for _ in range(dice.randrange(1, 30)):
                    os.pwrite(file.fileno(), dice.randbytes(100), dice.randrange(255) * CHUNK)
            if dice.random() < 0.5:
                ebsd.ok("detach", volume)
                ebsd.ok("snapshot", volume, "--name", f"s{len(names)}")
            else:
                ebsd.ok("snapshot", volume, "--name", f"s{len(names)}")
                ebsd.ok("detach", volume)
            names.append(f"s{len(names)}")

        for _ in range(3):
            scribble("a")
        ebsd.ok("create", "b", "--from", "s2")
        names.append("b")
        for _ in range(5):
            scribble(dice.choice("ab"))
        ebsd.ok("copy", "s3", "--name", "copy", "--encrypted", "--key", "alias/aws/ebs")
        names.append("copy")
        dice.shuffle(names)
        total = stored(ebsd)
        assert total == ebsd.ctl_json("status")["Space"]["StoredBytes"] - tables(ebsd)
        for name in names:
            ident = ebsd.ctl_json("show", name)
            allocated, shared, unique = used(ebsd)[ident.get("SnapshotId") if name[0] in "sc" else ident["VolumeId"]]
            assert 0 <= unique <= allocated - shared
            assert (ident["AllocatedBytes"], ident["UniqueBytes"]) == (allocated, unique)
            ebsd.ok("delete", name, "--yes")
            left = stored(ebsd)
            assert abs(total - left - unique) < CHUNK // 2, (name, total - left, unique)
            total = left
        assert total == 0


def tables(ebsd: Installation) -> int:
    everything = sum(path.stat().st_blocks * 512 for path in (ebsd.state / "layers").glob("*/*"))
    return everything - stored(ebsd)
