"""The benchmark's arithmetic and tables (scripts/bench.d), without measuring anything."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).resolve().parents[2] / "scripts" / "bench.d"


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("bench_figures")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setattr(sys, "path", list(sys.path))
    return importlib.import_module("bench_main")


def fio_document(**changes: object) -> dict[str, object]:
    idle = {"total_ios": 0, "iops": 0, "bw_bytes": 0, "lat_ns": {"mean": 0}, "clat_ns": {}}
    busy = {
        "total_ios": 2000,
        "iops": 1000.5,
        "bw_bytes": 4 << 20,
        "lat_ns": {"mean": 61500.0},
        "clat_ns": {"percentile": {"50.000000": 60000, "99.000000": 99000}},
    }
    return {"jobs": [{"error": 0, "read": busy, "write": idle, **changes}]}


def test_fio_result(figures: ModuleType) -> None:
    sample = figures.parse_fio(fio_document(), server_seconds=0.1)
    assert (sample.iops, sample.mib_per_s, sample.mean_us, sample.p99_us) == (1000.5, 4.0, 61.5, 99.0)
    assert sample.server_us == pytest.approx(50.0)


def test_fio_result_of_the_side_that_worked(figures: ModuleType) -> None:
    job = fio_document()["jobs"][0]
    swapped = fio_document(read=job["write"], write=job["read"])
    assert figures.parse_fio(swapped).requests == 2000


@pytest.mark.parametrize(
    "document",
    [{}, {"jobs": []}, fio_document(error=5), fio_document(read=fio_document()["jobs"][0]["write"])],
    ids=["nothing", "no job", "error", "no request"],
)
def test_fio_without_a_result(figures: ModuleType, document: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        figures.parse_fio(document)


def test_fio_warns_before_its_document(figures: ModuleType) -> None:
    assert figures.parse_fio_output('fio: a note\n{"jobs": []}') == '{"jobs": []}'
    with pytest.raises(ValueError, match="no JSON"):
        figures.parse_fio_output("fio: cannot open")


def test_openssl_speed(figures: ModuleType) -> None:
    text = "+DT:AES-256-XTS:1:4096\n+R:284313:AES-256-XTS:0.390000\n+H:4096\n+F:25:AES-256-XTS:2986015507.69\n"
    assert figures.parse_openssl_speed(text) == 2986015507.69
    with pytest.raises(ValueError):
        figures.parse_openssl_speed("+H:4096\n")


def test_spread(figures: ModuleType) -> None:
    found = figures.spread([3.0, 1.0, 2.0])
    assert (found.median, found.low, found.high, found.rounds) == (2.0, 1.0, 3.0, 3)
    assert found.text(1) == "2.0 (1.0-3.0)"
    with pytest.raises(ValueError):
        figures.spread([])


def test_a_ratio_compares_within_a_round(figures: ModuleType) -> None:
    # The host was slow in the second round, for both: the ratio is 2 in each.
    assert figures.median_ratio([20, 2, 22], [10, 1, 11]) == 2
    with pytest.raises(ValueError):
        figures.median_ratio([1], [1, 2])


@pytest.mark.parametrize(
    ("text", "size"), [("512M", 512 << 20), ("2G", 2 << 30), ("2GiB", 2 << 30), ("1048576", 1 << 20)]
)
def test_sizes(figures: ModuleType, text: str, size: int) -> None:
    assert figures.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "G", "-1G", "1.5G", "1000", "2X", "two"])
def test_what_is_no_size(figures: ModuleType, text: str) -> None:
    with pytest.raises(ValueError):
        figures.parse_size(text)


def test_tables(figures: ModuleType) -> None:
    table = figures.Table("Title", ["", "rate"])
    table.add("read", "5 (4-6)")
    table.add("a longer|name", "12")
    table.notes.append("A note.")
    assert (
        table.plain()
        == "Title\n                    rate\n  read           5 (4-6)\n  a longer|name       12\n  A note."
    )
    assert table.markdown().splitlines() == [
        "**Title**",
        "",
        "|  | rate |",
        "| --- | ---: |",
        "| read | 5 (4-6) |",
        "| a longer\\|name | 12 |",
        "",
        "A note.",
    ]
    with pytest.raises(ValueError):
        table.add("one cell")


def test_arguments(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = bench.arguments(["--quick", "--size", "2G", "--rounds", "4", "--part", "cipher"])
    assert (chosen.quick, chosen.size, chosen.rounds, chosen.part) == (True, 2 << 30, 4, ["cipher"])
    for wrong in (["--rounds", "0"], ["--size", "tiny"], ["--part", "all"]):
        with pytest.raises(SystemExit):
            bench.arguments(wrong)
    assert "is no size" in capsys.readouterr().err
