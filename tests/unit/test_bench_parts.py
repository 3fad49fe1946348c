"""The benchmark's parts (scripts/bench.d): their table, who takes turns, ratios and the picture, without measuring."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

BENCH = Path(__file__).resolve().parents[2] / "scripts" / "bench.d"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setattr(sys, "path", list(sys.path))
    return importlib.import_module


def samples(load: Callable[[str], ModuleType], **rates: list[float]) -> dict:
    """Return samples of all rows, with these rates for each contestant."""
    sample = load("bench_figures").Sample
    return {
        row.name: {
            name: [sample(rate, rate, 10.0, 20.0, 100, server_us=rate) for rate in found]
            for name, found in rates.items()
        }
        for row in load("bench_arena").ROWS
    }


def test_each_part_has_a_module_that_runs_it(load):
    main = load("bench_main")
    names = [part.name for part in main.PARTS]
    assert len(set(names)) == len(names)
    assert {"peers", "plain", "snapshot-writes", "many", "provisioned", "latency", "copies", "depth"} <= set(names)
    for part in main.PARTS:
        assert callable(load(part.module).run), part.name


def test_what_is_asked_for(load):
    main = load("bench_main")
    quick = main.asked(main.arguments(["--quick", "--transport", "native"]), Path("/nowhere"))
    assert (quick.rounds, quick.seconds, quick.size, quick.sized) == (3, 0.3, 128 << 20, False)
    assert quick.settings == 'transport = "native"'
    usual = main.asked(main.arguments(["--size", "2G", "--depth", "0"]), Path("/nowhere"))
    assert (usual.rounds, usual.seconds, usual.size, usual.sized, usual.depth) == (5, 2.0, 2 << 30, True, 0)
    assert usual.settings == ""
    with pytest.raises(SystemExit):
        main.arguments(["--transport", "carrier pigeon"])


def test_nobody_always_goes_first(load):
    arena = load("bench_arena")
    assert [arena.in_turn(["a", "b", "c"], turn)[0] for turn in range(4)] == ["a", "c", "a", "c"]
    assert sorted(arena.in_turn(["a", "b", "c"], 1)) == ["a", "b", "c"]


def test_ratios_are_of_the_first_contestant_to_the_others(load):
    arena = load("bench_arena")
    found = samples(load, ebsd=[20.0, 2.0, 22.0], peer=[10.0, 1.0, 11.0], other=[40.0, 4.0, 44.0])
    table = arena.table_of("Title", found)
    assert list(table.columns) == ["", "unit", "ebsd", "peer", "ratio", "other", "ratio"]
    assert list(table.rows[0]) == [
        "write 1 MiB", "MiB/s", "20 (2-22)", "10 (1-11)", "2.00", "40 (4-44)", "0.50"
    ]  # fmt: skip
    assert [row[1] for row in table.rows] == ["MiB/s", "MiB/s", *["IOPS"] * 4, *["s/GiB"] * 2, *["us each"] * 4]
    assert list(table.rows[6])[2:] == ["0.02", "0.01", "0.50", "0.04", "2.00"]
    bars = arena.bars_of(found)
    assert len(bars) == 2 * len(arena.ROWS)
    assert [(bar.group, bar.label, bar.value) for bar in bars[:2]] == [
        ("write 1 MiB", "peer", 2.0), ("write 1 MiB", "other", 0.5)
    ]  # fmt: skip
    assert set(arena.as_json(found)["read 1 MiB"]) == {"ebsd", "peer", "other"}


def test_processor_time_is_per_gibibyte_or_request(load):
    arena = load("bench_arena")
    (found,) = samples(load, ebsd=[500.0])["write 1 MiB"]["ebsd"]
    assert arena.processor_time(arena.ROWS[0], found) == pytest.approx(0.512)  # 1024 requests of 500 us each
    assert arena.processor_time(arena.ROWS[-1], found) == 500.0


def test_shares_of_memory(load):
    figures = load("bench_figures")
    assert (
        figures.parse_pss("00400000-7fff ---p [rollup]\nRss:     200 kB\nPss:     123 kB\nPss_Anon: 7 kB\n") == 125952
    )
    with pytest.raises(ValueError):
        figures.parse_pss("Rss: 1 kB\n")


def test_processes_below_one(load):
    parents = {2: 1, 3: 2, 4: 3, 5: 1, 6: 5, 1: 0}
    assert load("bench_figures").descendants(parents, 2) == {3, 4}
    assert load("bench_figures").descendants(parents, 4) == set()


def test_the_picture_is_a_document_with_a_bar_for_each_ratio(load):
    bar, svg = load("bench_figures").Bar, load("bench_svg")
    text = svg.picture("Faster & <better>", [bar("read", "a", 4.0), bar("read", "b", 0.5), bar("write", "a", 1.0)])
    root = ElementTree.fromstring(text)
    space = "{http://www.w3.org/2000/svg}"
    widths = [float(rect.get("width")) for rect in root.iter(f"{space}rect")][1:]
    assert widths[0] == pytest.approx(8 * widths[1], abs=0.5)
    assert float(next(root.iter(f"{space}line")).get("x1")) == pytest.approx(svg.LABELS + widths[2], abs=0.1)
    texts = [item.text for item in root.iter(f"{space}text")]
    assert texts[0] == "Faster & <better>"
    assert {"read: a", "read: b", "write: a", "4.0", "0.5", "1.0"} <= set(texts)
    assert max(float(rect.get("x", 0)) + float(rect.get("width")) for rect in root.iter(f"{space}rect")) <= svg.WIDTH
    for wrong in ([], [bar("read", "a", -1.0)]):
        with pytest.raises(ValueError):
            svg.picture("none", wrong)
