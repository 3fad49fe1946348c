"""The rules of jobs: their kinds, their pace, the limits of rates, and the history that is kept."""

from __future__ import annotations

import importlib.util
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from ebsd.domain.errors import InvalidParameterValue
from ebsd.domain.ids import AccountId, JobId
from ebsd.domain.jobs import KINDS, MIN_RATE, Pace, check_rate, new_job
from ebsd.domain.model import Caller
from ebsd.domain.states import JobKind, JobState
from ebsd.store.catalog import Catalog
from ebsd.volume.pacing import Pacer, PacerOfMany

MIB = 1 << 20


def test_of_many_threads_that_wait_for_the_rate_the_one_with_the_earliest_place_goes_first() -> None:
    pacer, stopping = PacerOfMany(10 * MIB), threading.Event()
    done: list[int] = []

    def spend(place: int) -> None:
        pacer.spend(place, MIB, stopping)
        done.append(place)

    threads = []
    for place in (7, 5, 1, 3, 2):
        threads.append(threading.Thread(target=spend, args=(place,)))
        threads[-1].start()
        while place not in pacer._waiting and not (pacer._busy and place == 7):
            time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert done == [7, 1, 2, 3, 5]


def test_threads_that_wait_for_the_rate_end_when_they_are_to_stop() -> None:
    pacer, stopping = PacerOfMany(1024), threading.Event()
    threads = [threading.Thread(target=pacer.spend, args=(place, MIB, stopping)) for place in range(4)]
    for thread in threads:
        thread.start()
    stopping.set()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_every_kind_has_its_row_and_its_worker():
    assert set(KINDS) == set(JobKind)
    for rules in KINDS.values():
        assert importlib.util.find_spec(rules.worker) is not None, rules.worker


def test_the_pace_is_that_of_the_last_ten_seconds():
    pace = Pace()
    assert (pace.rate, pace.seconds_left(100)) == (None, None)
    pace.note(0.0, 1000)
    assert pace.rate is None, "what was done before somebody looked says nothing"
    for second in range(1, 31):
        pace.note(float(second), 1000 + 100 * second)
    assert pace.rate == 100
    for second in range(31, 61):
        pace.note(float(second), 4000 + 10 * (second - 30))
    assert pace.rate == 10, "the fast beginning is forgotten"
    assert pace.seconds_left(4305) == 1
    assert pace.seconds_left(5000) == 70


def test_a_worker_that_does_again_what_was_lost_is_not_slower_than_nothing():
    pace = Pace()
    pace.note(0.0, 0)
    pace.note(1.0, 500)
    pace.note(2.0, 300)
    assert pace.rate is None
    pace.note(3.0, 400)
    assert pace.rate == 100


def test_a_job_that_stands_still_has_no_end_in_sight():
    pace = Pace()
    pace.note(0.0, 50)
    pace.note(5.0, 50)
    assert (pace.rate, pace.seconds_left(100)) == (0, None)


@pytest.mark.parametrize("rate", [None, 0, MIN_RATE, 1 << 40])
def test_rates_that_can_be(rate: int | None):
    assert check_rate(rate) == rate


@pytest.mark.parametrize("rate", [-1, 1, MIN_RATE - 1, 1 << 60])
def test_rates_that_cannot_be(rate: int):
    with pytest.raises(InvalidParameterValue, match="Rate"):
        check_rate(rate)


def test_the_history_of_an_account_is_bounded_and_keeps_what_has_not_ended(tmp_path: Path):
    catalog = Catalog(tmp_path / "catalog.sqlite")
    one, other = AccountId("000000001000"), AccountId("000000001001")
    caller = Caller(0, "root", AccountId("000000000000"), is_admin=True)

    def put(number: int, account: AccountId, state: JobState) -> None:
        job = new_job(
            JobId(f"job-{number:017x}"), JobKind.COPY_SNAPSHOT, account=account, owner="x", source="snap-1",
            destination="snap-2", started=f"2026-01-01T00:{number:02d}:00Z",
        )  # fmt: skip
        catalog.run(lambda t: t.put_job(replace(job, state=state)))

    try:
        put(0, one, JobState.RUNNING)
        put(1, one, JobState.INTERRUPTED)
        for number in range(2, 12):
            put(number, one, JobState.COMPLETED if number % 2 else JobState.FAILED)
        put(12, other, JobState.COMPLETED)
        catalog.run(lambda t: t.forget_ended_jobs(one, 3))
        numbers = [int(job.id[4:], 16) for job in catalog.run(lambda t: t.jobs())]
        assert numbers == [0, 1, 9, 10, 11, 12]
        assert [int(job.id[4:], 16) for job in catalog.run(lambda t: t.active_jobs())] == [0, 1]
        before = catalog.run(lambda t: t.find_job(caller, f"job-{0:017x}"))
        catalog.run(lambda t: t.set_job_rate(before.id, 12345678))
        catalog.run(lambda t: t.note_progress(replace(before, done=5, done_through=7, checkpoint={"a": "b"})))
        after = catalog.run(lambda t: t.find_job(caller, before.id))
        assert after == replace(before, done=5, done_through=7, checkpoint={"a": "b"}, rate=12345678)
    finally:
        catalog.close()


def test_what_is_spent_takes_its_time_and_a_change_holds_at_once():
    pacer, stopping = Pacer(MIB), threading.Event()
    begin = time.monotonic()
    pacer.spend(MIB // 4, stopping)
    assert time.monotonic() - begin >= 0.2
    waiting = threading.Thread(target=pacer.spend, args=(3600 * MIB, stopping))
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    pacer.limit(0)
    waiting.join(30)
    assert not waiting.is_alive()


def test_whoever_waits_for_the_rate_can_be_stopped():
    pacer, stopping = Pacer(MIN_RATE), threading.Event()
    waiting = threading.Thread(target=pacer.spend, args=(1 << 40, stopping))
    waiting.start()
    stopping.set()
    waiting.join(30)
    assert not waiting.is_alive()
