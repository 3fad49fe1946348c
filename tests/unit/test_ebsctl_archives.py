"""ebsctl archive: what is left on the disk when ebsd refuses, and what no archive is written to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from ebsctl_fakes import Bench

REFUSAL = (
    b'{"error":"io.ebsd.Archives.ServiceError","parameters":'
    b'{"Code":"InvalidSnapshot.NotFound","Message":"It does not exist.","Hint":""}}\0'
)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.server.close()


def test_a_refused_export_leaves_no_file_and_none_changed(bench: Bench, tmp_path: Path) -> None:
    bench.server.raw = REFUSAL
    new, old = tmp_path / "new", tmp_path / "old"
    old.touch()
    for file in (new, old):
        assert bench.run("archive", "export", "x", str(file)).exit_code == 3
    assert not new.exists()
    assert old.exists()
    precious = tmp_path / "precious"
    precious.write_bytes(b"precious")
    assert bench.run("archive", "export", "x", str(precious)).exit_code != 0
    assert precious.read_bytes() == b"precious"


def test_a_file_stays_when_nobody_knows_whether_the_export_began(bench: Bench, tmp_path: Path) -> None:
    """A job may be about to write into it: what it writes into a file without a name would be lost."""
    bench.server.raw = b""
    assert bench.run("archive", "export", "x", str(tmp_path / "new")).exit_code == 9
    assert (tmp_path / "new").exists()


@pytest.mark.parametrize("verb", [["import", "FILE", "name"], ["verify", "FILE"], ["show", "FILE"]])
def test_an_archive_that_is_not_there_is_an_error_and_is_not_made(
    bench: Bench, tmp_path: Path, verb: list[str]
) -> None:
    file = tmp_path / "none"
    words = [str(file) if word == "FILE" else word for word in verb]
    error = bench.error(1, "archive", *words)
    assert str(file) in error["Message"]
    assert not file.exists()


def test_what_cannot_be_combined_is_a_usage_error(bench: Bench) -> None:
    assert bench.run("archive", "export", "x", "-", "--json").exit_code == 2
    assert bench.run("archive", "import", "-", "x", "--no-wait").exit_code == 2


def test_a_new_archive_is_its_makers_alone(bench: Bench, tmp_path: Path) -> None:
    bench.server.raw = REFUSAL
    seen: list[int] = []
    real = os.open

    def spy(path: str, flags: int, mode: int = 0o777, **more: object) -> int:
        if str(path) == str(tmp_path / "a"):
            seen.append(mode)
        return real(path, flags, mode)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", spy)
        bench.run("archive", "export", "x", str(tmp_path / "a"))
    assert seen == [0o600]
