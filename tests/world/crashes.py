"""One crash of one operation: cut it, recover, compare with the truth, go on working, have all space back.

``Crash`` names it so that a failure can be had again: ``explore(BY_NAME["restore"], Crash("power random", 17, 3))``.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Final, NamedTuple
from unittest import mock

from ebsd.control import lineages
from ebsd.domain.errors import EbsdError

from .crash_disk import EVERYBODY, Call, Died, Mode
from .stories import Names, Operation, history
from .world import CrashKind, World

SEED: Final = 11

LONG: Final = 45
"""Calls from which on an operation is long."""


class Kind(NamedTuple):
    """A way to die. ``scope``: who does; ``end``: what ends with it; ``mode``: of what was not synced."""

    scope: str
    end: CrashKind
    mode: Mode = "random"
    tears: bool = False
    """What dies leaves a part of the write that it was making."""


KINDS: Final = {
    "power lose": Kind(EVERYBODY, "power", "lose"),
    "power random": Kind(EVERYBODY, "power", "random", tears=True),
    "power keep": Kind(EVERYBODY, "power", "keep"),
    "kill": Kind(EVERYBODY, "kill", tears=True),
    "ebsd": Kind("ebsd", "ebsd", tears=True),
    "volume": Kind("volume", "ebsd", tears=True),
    "worker": Kind("worker", "ebsd", tears=True),
}


class Crash(NamedTuple):
    """Kind, the number of changing calls of its scope that still happen, and the dice of everything that is chance."""

    kind: str
    at: int
    dice: int = 0


def prepare(world: World, operation: Operation) -> Names:
    names = history(world, attached=operation.volatile)
    operation.before(world, names)
    world.disk.disarm()
    return names


def calls_of(operation: Operation) -> list[Call]:
    """Do an operation once, and return its changing calls."""
    with World(SEED) as world:
        names = prepare(world, operation)
        operation.run(world, names)
        return list(world.disk.log)


def crashes_of(calls: list[Call], kind: str) -> range:
    """Return where one can die: before each call of the scope, and behind the last one."""
    scope = KINDS[kind].scope
    mine = sum(1 for call in calls if call.actor.startswith(scope))
    return range(mine + 1) if mine else range(0)


def all_crashes(calls: list[Call], dice: int) -> Iterator[Crash]:
    """Every place in every way to die, twice (see ``explore``); ``dice``: how often where chance has a part."""
    for kind in KINDS:
        for at in crashes_of(calls, kind):
            for die in range(dice if kind == "power random" else 2):
                yield Crash(kind, at, die)


def thinned(calls: list[Call]) -> Iterator[Crash]:
    """Each place once, with a kind that goes round; of those that kill one process alone if that makes the call.

    Of the jobs, which are long, every second place.
    """
    names = list(KINDS)
    turn = 0
    for at in range(0, len(calls) + 1, 1 if len(calls) < LONG else 2):
        while True:
            turn += 1
            kind = names[turn % len(names)]
            scope = KINDS[kind].scope
            if at < len(calls) and calls[at].actor.startswith(scope):
                break
            if at == len(calls) and scope == EVERYBODY:
                break
        mine = sum(1 for call in calls[:at] if call.actor.startswith(scope))
        yield Crash(kind, mine, at)


def explore(operation: Operation, crash: Crash) -> bool:
    """Do one crash and all checks; return whether somebody died in the operation. Raises what a check says."""
    kind = KINDS[crash.kind]
    dice = random.Random(f"{crash}")
    with World(SEED) as world:
        names = prepare(world, operation)
        world.dice = dice
        world.disk.arm(die_at=crash.at, scope=kind.scope, tear=dice if kind.tears else None)
        died = False
        try:
            operation.run(world, names)
        except Died:
            died = True
        except EbsdError:
            died = True
            if kind.scope == EVERYBODY:
                raise
        world.disk.disarm()
        if world.disk.is_dead("ebsd") or kind.scope == EVERYBODY or dice.random() < 0.5 or world._use is None:
            # As in a store of many maps, whose start does not read and sync them all: every second time.
            few = -1 if crash.dice % 2 else lineages.FEW_MAPS
            with mock.patch.object(lineages, "FEW_MAPS", few):
                world.crash(kind.end, kind.mode)
                second_cut(world, dice)
                world.recover()
                if kind.end != "power":
                    # What a recovery saw in the page cache and built upon, or salvaged, it must have made durable.
                    detach_dead(world)
                    world.check()
                    world.crash("power", "lose")
                    world.recover()
        else:
            world.disk.revive()  # who died was buried; ebsd goes on
        go_on(world, to_the_end=dice.random() < 0.3)
        return died


def second_cut(world: World, dice: random.Random) -> None:
    """Now and then the recovery is cut, too."""
    while dice.random() < 0.4:
        world.disk.arm(die_at=dice.randrange(40), tear=dice)
        with contextlib.suppress(Died):
            world.recover()
        world.disk.disarm()
        world.crash(*dice.choice((("power", "random"), ("power", "lose"), ("kill", "random"), ("ebsd", "random"))))


def crash_after(operation: Operation, *, mode: Mode = "lose") -> None:
    """Let an operation end, cut the power, and do all checks."""
    with World(SEED) as world:
        names = prepare(world, operation)
        operation.run(world, names)
        world.crash("power", mode)
        world.recover()
        go_on(world)


def go_on(world: World, *, to_the_end: bool = True) -> None:
    """Check; then work with everything, check, delete everything, and see that nothing is left."""
    detach_dead(world)
    world.check()
    if not to_the_end:
        for volume in world.volumes():
            if volume.attachment is not None:
                world.detach(volume.id)
        world.sweep()
        world.check_swept()
        return
    for volume in world.volumes():
        if volume.attachment is None:
            world.attach(volume.id)
        world.write(volume.id, 3000, b"z" * 70000)
        world.read(volume.id, 0, world.row(volume.id).size)
        world.tick(volume.id)
        world.hash_layers(volume.id)
        world.detach(volume.id)
    world.sweep()
    world.check_swept()
    world.check()
    for snapshot in world.snapshots():
        world.delete_snapshot(snapshot.id)
    for volume in world.volumes():
        world.delete_volume(volume.id)
    world.check_empty()


def detach_dead(world: World) -> None:
    """Detach the volumes whose process died, which salvages them; ebsd finds out in its next moment."""
    for volume in world.volumes():
        if volume.attachment is not None and world.hosting.process_of(volume.id) is None:
            world.detach(volume.id)


__all__ = [
    "KINDS",
    "SEED",
    "Crash",
    "Kind",
    "all_crashes",
    "calls_of",
    "crashes_of",
    "explore",
    "go_on",
    "prepare",
    "thinned",
]
