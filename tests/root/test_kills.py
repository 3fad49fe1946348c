"""SIGKILL in the middle of everything: what is there afterwards is the old state or the new one, never a mixture.

The moments are spread over the time that the operation takes, and drawn from a seed that a failure prints. By
default one kill of each kind, at another moment every time; EBSD_KILLS=100 does a hundred of each, the rarer kinds
included, and prints a table. EBSD_KILLS_SEED repeats the moments of a run.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from killing import COMBINATIONS, OPERATIONS, TWICE, Rig, Tally, estimate, kill_once, measure, moments

FEW = 1
KILLS = int(os.environ.get("EBSD_KILLS", FEW))
# The default run has the same moments every time, as far as a scheduler repeats itself; the long one has new ones.
SEED = int(os.environ.get("EBSD_KILLS_SEED", "0")) or (
    1 if KILLS == FEW else random.SystemRandom().randrange(1, 1 << 32)
)

pytestmark = pytest.mark.timeout(120 + 20 * KILLS)


@dataclass
class Killing:
    """The installation that is killed, a new one after a failure, and the tallies of all combinations."""

    factory: pytest.TempPathFactory
    rig: Rig | None = None
    tallies: dict[tuple[str, str], Tally] = field(default_factory=dict)

    def ready(self) -> Rig:
        if self.rig is None:
            self.rig = Rig(self.factory.mktemp("killed"))
            self.rig.begin()
        return self.rig

    def give_up(self) -> None:
        rig, self.rig = self.rig, None
        if rig is not None:
            rig.abandon()


@pytest.fixture(scope="module")
def killing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Killing]:
    killing = Killing(tmp_path_factory)
    try:
        yield killing
        if killing.rig is not None:
            rig, killing.rig = killing.rig, None
            try:
                rig.close()
            except BaseException:
                rig.abandon()
                raise
    finally:
        killing.give_up()
        _print_table(request.config, killing.tallies)


def _print_table(config: pytest.Config, tallies: dict[tuple[str, str], Tally]) -> None:
    reporter = config.pluginmanager.getplugin("terminalreporter")
    if reporter is None or KILLS <= FEW:
        return
    lines = [
        "",
        f"{'operation':<24} {'killed':<12} {'kills':>5} {'old':>5} {'new':>5} {'resumed':>7} {'nothing to kill':>15}",
    ]
    for (killed, name), tally in tallies.items():
        numbers = f"{tally.kills:>5} {tally.old:>5} {tally.new:>5} {tally.resumed:>7} {tally.missed:>15}"
        lines.append(f"{name:<24} {killed[:12]:<12} {numbers}")
    capturing = config.pluginmanager.getplugin("capturemanager")
    with capturing.global_and_fixture_disabled() if capturing is not None else contextlib.nullcontext():
        for line in lines:
            reporter.write_line(line)


CHOSEN = [
    (killed, name) for killed, name in COMBINATIONS if KILLS > FEW or not (OPERATIONS[name].rare or killed == TWICE)
]


@pytest.mark.parametrize(("killed", "name"), CHOSEN, ids=lambda value: value.replace(" ", "-"))
def test_a_kill_leaves_the_old_state_or_the_new_one(killing: Killing, killed: str, name: str) -> None:
    seed = f"{SEED}-{killed}-{name}"
    print(f"EBSD_KILLS_SEED={SEED}")
    rig = killing.ready()
    tally = killing.tallies.setdefault((killed, name), Tally())
    operation = OPERATIONS[name]()
    delay = -1.0
    try:
        duration = measure(rig, operation) if KILLS > FEW else estimate(rig, operation)
        for delay in moments(random.Random(seed), duration, KILLS):
            result = kill_once(rig, killed, operation, delay)
            if result is None:
                tally.missed += 1
            else:
                tally.add(result)
    except BaseException:
        print(f"{killed} was killed {delay:.4f} s into {name}, kill {tally.kills + 1}; the log of ebsd:")
        print(rig.ebsd.log.read_text(errors="replace")[-6000:])
        killing.give_up()
        raise
