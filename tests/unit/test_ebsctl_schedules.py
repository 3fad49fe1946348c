"""ebsctl schedule and clone: what they send, what they print, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
from test_ebsctl_snapshots import Bench, bench  # noqa: F401 - a fixture

from ebsctl.commands.schedules import parse_duration
from ebsd.domain.errors import InvalidParameterValue


@pytest.mark.parametrize(("text", "seconds"), [("90m", 5400), ("6h", 21600), ("30d", 2592000), ("4w", 2419200)])
def test_durations(text: str, seconds: int) -> None:
    assert parse_duration("--every", text) == seconds


@pytest.mark.parametrize("text", ["", "6", "h", "6 h", "-6h", "1.5h", "6H", "1y", "\u0666h", "9999999999m"])
def test_durations_that_cannot_be(text: str) -> None:
    with pytest.raises(InvalidParameterValue):
        parse_duration("--every", text)


@pytest.mark.parametrize(
    "words",
    [
        ["create", "s"],
        ["create", "s", "data"],
        ["create", "s", "data", "--tagged", "a=b", "--every", "1h"],
        ["create", "s", "data", "--every", "1h", "--at", "02:00"],
        ["create", "s", "data", "--every", "soon"],
        ["create", "s", "--tagged", "nothing", "--every", "1h"],
        ["delete", "s"],
    ],
)
def test_usage_errors_reach_nobody(bench: Bench, words: list[str]) -> None:  # noqa: F811
    bench.error(2, "schedule", *words)
    assert bench.server.calls == []


def test_a_schedule_is_sent_as_it_was_typed(bench: Bench) -> None:  # noqa: F811
    document: dict[str, Any] = bench.document(
        "schedule", "create", "nightly", "--tagged", "app=db", "--at", "02:30", "--keep", "7", "--keep-for", "30d"
    )
    assert document["Name"] == "nightly"
    assert bench.server.parameters("Control.CreateSchedule") == {
        "Name": "nightly",
        "TargetTag": {"Key": "app", "Value": "db"},
        "Times": ["02:30"],
        "RetainCount": 7,
        "RetainSeconds": 30 * 86400,
    }
    shown = bench.run("schedule", "show", "nightly")
    assert shown.exit_code == 0
    for text in ("app=db", "at 02:30", "the newest 7 and what is younger than 30d", "no space"):
        assert text in shown.stdout
    assert "nightly" in bench.run("schedule", "list").stdout
    assert bench.run("schedule", "run", "nightly").exit_code == 1, "the run failed"
