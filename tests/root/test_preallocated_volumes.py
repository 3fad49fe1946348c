"""Preallocated volumes on small real file systems: a full disk does not stop their writes; all comes back later."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from installation import Installation
from test_space import MIB, digest_of, digests, fill_to_the_last_byte, piece, small_store, stored

SIZE = 48
"""MiB of the volume that is preallocated."""

ZEROS = hashlib.sha256(bytes(MIB)).hexdigest()


@pytest.fixture(params=["ext4", "xfs"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Installation]:
    with small_store(tmp_path, request.param) as made:
        yield made


def described(ebsd: Installation, name: str) -> dict[str, object]:
    return next(volume for volume in ebsd.ctl_json("list")["Volumes"] if volume["Name"] == name)


def shown(ebsd: Installation, name: str) -> bool:
    told = described(ebsd, name).get("Preallocated", False) is True
    assert ("Preallocated" in ebsd.ok("show", name)) == told
    return told


def write(path: str, first: int, count: int, *, shift: int = 0) -> None:
    with open(path, "r+b", buffering=0) as file:
        for number in range(first, first + count):
            assert os.pwrite(file.fileno(), piece(number + shift), number * MIB) == MIB
            os.fsync(file.fileno())


def free(ebsd: Installation) -> int:
    subprocess.run(["sync", "-f", ebsd.state], check=True)
    usage = os.statvfs(ebsd.state)
    return usage.f_bavail * usage.f_frsize


def files(ebsd: Installation) -> set[Path]:
    return {path for top in ("layers", "maps", "records") for path in (ebsd.state / top).rglob("*")}


def test_a_full_disk_does_not_stop_a_preallocated_volume(store: Installation) -> None:
    store.ok("create", "data", "--size", f"{SIZE}M", "--preallocate")
    assert shown(store, "data")
    assert stored(store) >= SIZE * MIB
    assert described(store, "data")["AllocatedBytes"] == 0  # by the map, where all are holes
    path = store.ok("attach", "data", "--file")
    store.ok("create", "grown", "--size", "16M", "--preallocate")
    grown = store.ok("attach", "grown", "--file")
    store.ok("resize", "grown", "32M")
    assert not shown(store, "grown")
    store.kill()
    store.start()
    fill_to_the_last_byte(store.state / "weight")
    order = list(range(SIZE))
    random.Random(1).shuffle(order)
    for number in order:
        write(path, number, 1)
    assert digest_of(path, SIZE) == digests(SIZE)
    write(grown, 0, 16)
    with pytest.raises(OSError, match="No space left"):
        write(grown, 20, 1)
    assert digest_of(grown, 16) == digests(16)
    (store.state / "weight").unlink()
    for name in ("data", "grown"):
        store.ok("detach", name)
    path = store.ok("attach", "data", "--file")
    assert digest_of(path, SIZE) == digests(SIZE)
    store.ok("detach", "data")
    assert store.ctl("check").status == 0


def test_a_snapshot_ends_it_and_gives_back_what_was_not_written(store: Installation) -> None:
    for attached in (True, False):
        name = "attached" if attached else "detached"
        before = stored(store)
        store.ok("create", name, "--size", f"{SIZE}M", "--preallocate")
        path = store.ok("attach", name, "--file")
        write(path, 0, 10)
        if not attached:
            store.ok("detach", name)
        assert stored(store) - before >= SIZE * MIB
        store.ok("snapshot", name, "--name", f"s-{name}")
        assert not shown(store, name)
        assert 10 * MIB <= stored(store) - before <= 10 * MIB + 256 * 1024
        if attached:
            write(path, 0, 1, shift=900)
            store.ok("detach", name)
        store.ok("verify", f"s-{name}")
        store.ok("create", f"again-{name}", "--from", f"s-{name}")
        path = store.ok("attach", f"again-{name}", "--file")
        assert digest_of(path, 12) == [*digests(10), ZEROS, ZEROS]
        store.ok("detach", f"again-{name}")
    assert store.ctl("check").status == 0


def test_what_does_not_fit_is_refused_before_anything_is_made_and_deletion_gives_all_back(store: Installation) -> None:
    before = free(store)
    status, error = store.refused("create", "data", "--size", f"{before // MIB}M", "--preallocate")
    assert (status, error["Code"]) == (10, "Ebsd.NoSpace"), error
    assert "Delete snapshots or volumes" in error["Hint"]
    assert files(store) == set()
    store.ok("create", "data", "--size", f"{SIZE}M", "--preallocate")
    assert free(store) <= before - SIZE * MIB
    store.ok("attach", "data", "--file")
    store.ok("detach", "data")
    store.ok("delete", "data", "--yes")
    assert files(store) == set()
    assert free(store) >= before - MIB
    store.ok("create", "thin", "--size", "4M")
    store.ok("snapshot", "thin", "--name", "s")
    status, error = store.refused("create", "data", "--from", "s", "--preallocate")
    assert error["Code"] == "InvalidParameterCombination", error
    assert "empty" in error["Message"]
