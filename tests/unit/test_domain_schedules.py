"""When a schedule's runs are due, whatever clock and ebsd do, and which snapshots its retention lets go."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ebsd.domain.errors import EbsdError
from ebsd.domain.ids import AccountId, SnapshotId, VolumeId
from ebsd.domain.schedules import (
    DAY,
    Kept,
    Retention,
    Schedule,
    Timing,
    decide,
    expired,
    parse_retention,
    parse_timing,
    seconds_of,
    snapshot_name,
    time_of,
)

HOUR = 3600
NOON = seconds_of("2026-11-21T12:00:00Z")
HOURLY = Timing(HOUR, ())
TWICE = Timing(0, (2 * HOUR + 1800, 14 * HOUR))


def schedule(timing: Timing, handled: int, *, paused: bool = False) -> Schedule:
    return Schedule(
        id="sched-1", account=AccountId("000000001000"), owner="o", name="s", volume=VolumeId("vol-1"), tag=None,
        timing=timing, retention=Retention(None, None), prefix="", paused=paused, handled=handled, created="",
    )  # fmt: skip


def runs(start: Schedule, times: list[int]) -> list[int]:
    """Look at these times; return when runs were made."""
    made = []
    for now in times:
        due = decide(start, now)
        if due.run:
            made.append(now)
        start = replace(start, handled=due.handled)
    return made


@pytest.mark.parametrize(
    ("timing", "now", "slot", "following"),
    [
        (HOURLY, "12:00:00", "12:00:00", "13:00:00"),
        (HOURLY, "12:59:59", "12:00:00", "13:00:00"),
        (TWICE, "14:00:00", "14:00:00", "02:30:00+1"),
        (TWICE, "13:59:59", "02:30:00", "14:00:00"),
        (TWICE, "02:29:59", "14:00:00-1", "02:30:00"),
        (Timing(DAY, ()), "12:00:00", "00:00:00", "00:00:00+1"),
        (Timing(0, (0,)), "00:00:00", "00:00:00", "00:00:00+1"),
    ],
)
def test_slots_cover_all_time(timing: Timing, now: str, slot: str, following: str) -> None:
    def at(text: str) -> int:
        return seconds_of(f"2026-11-21T{text[:8]}Z") + DAY * int(text[8:] or 0)

    assert timing.slot(at(now)) == at(slot)
    assert timing.next_slot(at(now)) == at(following)
    assert timing.slot(timing.next_slot(at(now))) == timing.next_slot(at(now))


def test_each_slot_has_one_run() -> None:
    times = list(range(NOON, NOON + 4 * HOUR, 30))
    assert runs(schedule(HOURLY, NOON), times) == [NOON + n * HOUR for n in (1, 2, 3)]


def test_what_was_missed_is_made_once() -> None:
    assert runs(schedule(HOURLY, NOON), [NOON + 30 * DAY + 700, NOON + 30 * DAY + 730]) == [NOON + 30 * DAY + 700]


def test_a_jump_forward_is_one_run_and_back_again_is_no_silence() -> None:
    ahead = NOON + 3650 * DAY
    back = list(range(NOON + 60, NOON + 3 * HOUR, 30))
    assert runs(schedule(HOURLY, NOON), [ahead, ahead + 30, *back]) == [ahead, NOON + HOUR, NOON + 2 * HOUR]


def test_a_clock_that_steps_back_a_little_repeats_nothing() -> None:
    at = NOON + HOUR
    assert runs(schedule(HOURLY, NOON), [at, at - 5, at, at - 30, at + 5]) == [at]


def test_what_a_paused_schedule_missed_is_not_made_up() -> None:
    resting = schedule(HOURLY, NOON, paused=True)
    due = decide(resting, NOON + 5 * HOUR)
    assert not due.run
    assert runs(replace(resting, paused=False, handled=due.handled), [NOON + 5 * HOUR + 60]) == []


@pytest.mark.parametrize(
    ("every", "at"),
    [
        (None, None), (None, []), (30, None), (0, None), (-60, None), (90, None), (367 * DAY, None),
        (3600, ["02:00"]), (None, ["2:00"]), (None, ["24:00"]), (None, ["12:60"]), (None, ["١٢:٠٠"]), (None, ["1200"]),
        (None, [f"{n:02}:00" for n in range(24)] + ["00:30"]),
    ],
)  # fmt: skip
def test_timings_that_cannot_be(every: int | None, at: list[str] | None) -> None:
    with pytest.raises(EbsdError) as error:
        parse_timing(every, at)
    assert error.value.exit_status == 2


def test_timings_that_can() -> None:
    assert parse_timing(60, None) == Timing(60, ())
    assert parse_timing(None, ["14:00", "02:30", "14:00"]) == TWICE
    for count, seconds in ((0, None), (10_001, None), (None, 59), (None, 10**12)):
        with pytest.raises(EbsdError):
            parse_retention(count, seconds)


# --- retention


def made(*ages: int, damaged: tuple[int, ...] = (), locked: tuple[int, ...] = ()) -> list[Kept]:
    """Return snapshots of these ages in days, oldest first, named by their age."""
    return [
        Kept(SnapshotId(str(age)), NOON - age * DAY, age not in damaged, age in locked)
        for age in sorted(ages, reverse=True)
    ]


def gone(kept: list[Kept], count: int | None, days: int | None, *, even: bool = True) -> list[int]:
    retention = Retention(count, None if days is None else days * DAY)
    return [int(each) for each in expired(kept, retention, NOON, clock_is_even=even)]


def test_every_rule_must_let_it_go() -> None:
    kept = made(1, 2, 3, 4, 5)
    assert gone(kept, None, None) == []
    assert gone(kept, 2, None) == [5, 4, 3]
    assert gone(kept, None, 3) == [5, 4], "what is exactly as old stays"
    assert gone(kept, 2, 4) == [5]
    assert gone(kept, 4, 1) == [5]
    assert gone(kept, 9, None) == []
    assert gone([], 1, 1) == []


def test_the_last_good_one_stays_whatever_the_rules_say() -> None:
    assert gone(made(100), None, 1) == []
    assert gone(made(98, 99, 100), None, 1) == [100, 99]
    assert gone(made(98, 99, 100, damaged=(98, 99)), None, 1) == [99], "100 is the last good one, 98 the newest"
    assert gone(made(1, 2, 3, damaged=(1,)), 1, None) == [3]
    assert gone(made(1, 2, damaged=(1, 2)), 1, None) == [2]


def test_locked_ones_stay_and_hold_up_nobody() -> None:
    assert gone(made(1, 2, 3, 4, locked=(3,)), 1, None) == [4, 2]


def test_a_clock_that_jumped_deletes_nothing_by_age() -> None:
    assert gone(made(1, 2, 3), None, 1, even=False) == []
    assert gone(made(1, 2, 3), 1, 1, even=False) == []
    assert gone(made(1, 2, 3), 1, None, even=False) == [3, 2], "a count needs no clock"


def test_names_sort_by_time_and_fit() -> None:
    one = schedule(HOURLY, NOON)
    assert snapshot_name(one, "data", "2026-11-21T21:00:00Z") == "data-20261121T210000Z"
    assert snapshot_name(replace(one, prefix="p"), "data", "2026-11-21T21:00:00Z") == "p-20261121T210000Z"
    tagged = replace(one, prefix="p", volume=None, tag=("a", "b"))
    assert snapshot_name(tagged, "data", "2026-11-21T21:00:00Z") == "p-data-20261121T210000Z"
    assert len(snapshot_name(one, "d" * 63, "2026-11-21T21:00:00Z")) == 63
    assert time_of(seconds_of("2026-11-21T21:00:00Z")) == "2026-11-21T21:00:00Z"
