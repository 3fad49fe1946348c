"""Keys are destroyed by a clock that has gone evenly for a while only."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from ebsd.domain.clockwatch import SETTLED_SECONDS, TOLERANCE, ClockWatch
from ebsd.kms import main


class Clocks:
    def __init__(self) -> None:
        self.wall, self.steady = 1_000_000.0, 5.0

    def watch(self) -> ClockWatch:
        return ClockWatch(lambda: self.wall, lambda: self.steady)

    def pass_(self, seconds: float, jump: float = 0.0) -> None:
        self.wall += seconds + jump
        self.steady += seconds


def test_a_clock_is_trusted_after_an_hour() -> None:
    clocks = Clocks()
    watch = clocks.watch()
    assert not watch.look()
    clocks.pass_(SETTLED_SECONDS - 1)
    assert not watch.look()
    clocks.pass_(1)
    assert watch.look()


@pytest.mark.parametrize("jump", [86400.0 * 365 * 70, 30 * 86400.0, TOLERANCE + 1, -TOLERANCE - 1, -86400.0])
def test_a_jump_begins_the_hour_anew(jump: float) -> None:
    clocks = Clocks()
    watch = clocks.watch()
    clocks.pass_(2 * SETTLED_SECONDS)
    assert watch.look()
    clocks.pass_(600, jump)
    assert not watch.look()
    clocks.pass_(SETTLED_SECONDS - 1)
    assert not watch.look()
    clocks.pass_(600)
    assert watch.look()


@pytest.mark.parametrize("drift", [TOLERANCE / 2, -TOLERANCE / 2])
def test_a_drift_between_two_looks_is_no_jump(drift: float) -> None:
    clocks = Clocks()
    watch = clocks.watch()
    for _ in range(int(SETTLED_SECONDS // 600)):
        clocks.pass_(600, drift)
        settled = watch.look()
    assert settled


def test_keys_that_are_due_wait_for_the_clock(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The broker's own loop: none is asked for before the hour is over, whatever the date."""
    clocks, asked, looked = Clocks(), [], []

    async def destroy_due(broker: object) -> None:
        asked.append(clocks.steady)

    async def rotate_due(broker: object) -> None:
        looked.append(clocks.steady)
        clocks.pass_(main.LOOK_SECONDS)

    monkeypatch.setattr(main, "_delete_due", destroy_due)
    monkeypatch.setattr(main, "_rotate_due", rotate_due)

    async def run() -> None:
        with trio.move_on_after(2 * SETTLED_SECONDS):
            await main._look_after_keys(object(), clocks.watch())  # type: ignore[arg-type]

    trio.run(run, clock=MockClock(autojump_threshold=0))
    assert looked[0] < SETTLED_SECONDS
    assert len(looked) > 10
    assert asked
    assert min(asked) >= SETTLED_SECONDS
