"""``Tree``: any story of a tree of volumes and snapshots, told to the world and to its model, as a state machine.

1. A rule does one operation, through ``_do``. What was armed (a death, a failing call, short counts) may strike in any
   later operation, at the call that it was armed for; then the world is brought up again and compared byte for byte.
2. After each step: catalog, files, records, maps, anchors and grants agree (``World.invariants``). At the end, and
   after each crash: every byte of everything; after a sweep no leaked chunk; after everything was deleted no file.
3. What must be refused is refused with its code and changes nothing (``_picture``).
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from ebsd.control.creation import CopyRequest
from ebsd.control.volumes import CreateRequest
from ebsd.domain.errors import EbsdError
from ebsd.domain.model import Snapshot, Volume
from ebsd.domain.units import CHUNK, SECTOR
from ebsd.volume.scheduling import run_sync

from .crash_disk import Call, Died, Mode
from .memory_broker import arn
from .world import ROOT, CrashKind, JobEnded, World

MAX_VOLUMES: Final = 5
MAX_SNAPSHOTS: Final = 6
MAX_SIZE: Final = 24 * CHUNK
"""So many chunks that a walk over everything takes milliseconds."""

DISK_CALLS: Final = frozenset({
    "open", "pread", "pwrite", "punch", "fallocate", "ftruncate", "fdatasync", "fsync", "fsync_directory",
    "rename", "unlink", "mkdir", "rmdir", "listdir",
})  # fmt: skip
"""Calls that a disk may refuse; the others of the log are processes, channels and the key service."""


@dataclass(frozen=True)
class Death:
    """``who`` dies before its changing call number ``at``; ``again``: so does the recovery after it."""

    at: int
    who: str
    mode: Mode = "lose"
    again: int | None = None


@dataclass(frozen=True)
class Failure:
    """The disk refuses its call number ``at``."""

    at: int
    code: int


@dataclass(frozen=True)
class Short:
    """Short counts and EINTR in the next operation."""


@dataclass(frozen=True)
class Span:
    """A range near an edge: ``chunk`` counts from the start, or from the end when it is negative."""

    chunk: int
    shift: int
    length: int

    def within(self, size: int) -> tuple[int, int]:
        """Return (offset, length) of the part that lies in a volume."""
        at = self.chunk * CHUNK if self.chunk >= 0 else size + (self.chunk + 1) * CHUNK
        offset = min(max(0, at + self.shift), size - 1)
        return offset, min(self.length, size - offset)


which = st.integers(0, 5)
keys = st.sampled_from(["one", "two"])
sizes = st.sampled_from([World.SIZE, World.ODD, World.SIZE + SECTOR, World.SIZE + CHUNK - SECTOR])
growths = st.sampled_from([0, SECTOR, CHUNK - 3 * SECTOR, CHUNK, CHUNK + SECTOR, 3 * CHUNK])
modes = st.sampled_from(["lose", "random", "keep"])
lengths = st.sampled_from(
    [
        SECTOR,
        CHUNK,
        1,
        511,
        512,
        513,
        SECTOR - 1,
        SECTOR + 1,
        2 * SECTOR,
        CHUNK - 1,
        CHUNK + 1,
        2 * CHUNK,
        3 * CHUNK + 777,
    ]
)
shifts = st.sampled_from([0, -1, 1, -511, 512, -SECTOR, SECTOR, SECTOR + 1, -SECTOR - 512, CHUNK // 2])
spans = st.builds(Span, st.sampled_from([0, 1, 2, -1, -2, 3, 15, 16]), shifts, lengths)
places = st.integers(0, 90)
dices = st.integers(0, 99)
deaths = st.one_of(
    st.builds(Death, places, st.sampled_from(["power", "kill", "ebsd", "volume", "worker"]), modes),
    st.builds(Death, places, st.sampled_from(["power", "kill", "ebsd"]), modes, places),
)
failures = st.one_of(st.builds(Failure, places, st.sampled_from([errno.EIO, errno.ENOSPC])), st.just(Short()))


class Tree(RuleBasedStateMachine):
    """See the module."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(seed=1)
        self.fault: Death | Failure | Short | None = None
        self._struck = False
        self._stamp = 0
        self.disabled: set[str] = set()
        self._look()

    # --- what is there

    def _look(self) -> None:
        self.rows: dict[str, Volume | Snapshot] = {}
        self.idle: list[str] = []
        self.attached: list[str] = []
        self.read_only: list[str] = []
        self.dead: list[str] = []
        """Attached, and their process has died: they want a detach."""
        volumes, snapshots = self.world._transaction(lambda t: (t.volumes(), t.snapshots()))
        for volume in volumes:
            self.rows[volume.id] = volume
            if volume.attachment is None:
                self.idle.append(volume.id)
            elif self.world.hosting.process_of(volume.id) is None:
                self.dead.append(volume.id)
            else:
                (self.read_only if volume.attachment.read_only else self.attached).append(volume.id)
        self.snaps = [str(snapshot.id) for snapshot in snapshots]
        self.rows.update({str(snapshot.id): snapshot for snapshot in snapshots})
        # Ids are random: the order of creation is what makes a story readable, and shrink.
        order = {name: number for number, name in enumerate(self.world.truth)}
        for names in (self.idle, self.attached, self.read_only, self.dead, self.snaps):
            names.sort(key=lambda name: order.get(name, 0))
        self.volumes = self.idle + self.attached + self.read_only + self.dead

    def _usable(self, resource: str) -> bool:
        """Say whether the key of a resource is enabled, or it has none."""
        key = self.rows[resource].key_arn
        return key is None or key not in self.world.broker.disabled

    def _data(self, length: int) -> bytes:
        """Return bytes that no other write of the story has."""
        self._stamp += 1
        word = self._stamp.to_bytes(4, "big") + b"data"
        return (word * (length // 8 + 1))[:length]

    # --- one operation

    def _do(self, operation: Callable[[], Any], *, refused: str | None = None, may_fail: str | None = None) -> bool:
        """Do an operation; ``refused`` is the code it must be refused with, ``may_fail`` one that a job may end with.

        Returns whether it was done. Whatever was struck is brought up again, and compared.
        """
        before = self._picture() if refused is not None and not self.dead else None
        error: BaseException | None = None
        try:
            operation()
        except (Died, EbsdError, OSError, JobEnded) as exc:
            error = exc
        if self._has_struck():
            self._after_strike(error)
        elif refused is not None:
            code = getattr(error, "code", None)
            assert code == refused, f"{code} ({error!r}) instead of {refused}"
            assert before is None or self._picture() == before, f"refused with {code}, and it changed something"
        elif error is not None and getattr(error, "code", None) != may_fail:
            raise error
        if isinstance(self.fault, Short):
            self._disarm()
        self._look()
        if not self.dead:
            self.world.invariants(sealed=False)
        return error is None and refused is None

    def _has_struck(self) -> bool:
        if isinstance(self.fault, Death):
            return self.world.disk._die_in is None
        return self._struck

    def _disarm(self) -> None:
        self.world.disk.disarm()
        self.fault, self._struck = None, False

    def _after_strike(self, error: BaseException | None) -> None:
        fault = self.fault
        self._disarm()
        if isinstance(fault, Death):
            if fault.who in ("volume", "worker"):
                return
            assert isinstance(error, Died), f"it died, and the answer was {error!r}"
            kind: CrashKind = fault.who  # type: ignore[assignment]
            self.world.crash(kind, fault.mode)
            self._recover(kind, fault.mode, fault.again)
            return
        assert not isinstance(error, Died)
        self._distrust_failed()
        self.world.reopen()
        self.world._resolve()
        self._look()
        for volume in self.attached + self.read_only:
            own = self.world.hosting.process_of(volume).own  # type: ignore[union-attr]
            if own._engine is None or own._engine.failed or own._stopped is not None:
                self.world.detach(volume, force=True)
        for volume in self.dead:
            self.world.detach(volume)
        self.world.check()

    def _distrust_failed(self) -> None:
        """After a failed flush pass nobody knows what the disk has of what came after the last one."""
        for volume, truth in self.world.truth.items():
            process = self.world.hosting.process_of(volume)
            if process is not None and process.own._engine is not None and process.own._engine.failed:
                truth.cut()

    def _recover(self, kind: CrashKind, mode: Mode, again: int | None = None) -> None:
        if again is not None:
            self.world.disk.arm(die_at=again, scope="ebsd" if kind == "ebsd" else "")
        for _ in range(2):
            try:
                self.world.recover()
                break
            except Died:
                self.world.crash(kind, mode)
        self.world.disk.disarm()
        self.world.check()

    def _picture(self) -> object:
        """Return all that a refused command must leave as it is."""
        world = self.world
        volumes = {v.id: replace(v, attach_generation=0) for v in world.volumes()}
        files = {(at, *sorted(names)) for at, _, names in os.walk(world.state.root) if "catalog.sqlite" not in names}
        layers = world._transaction(lambda t: {name: t.layers(name) for name in t.lineages()})
        return volumes, world.snapshots(), layers, files, dict(world.broker.anchors), dict(world.broker.grants)

    @contextlib.contextmanager
    def _quiet_disk(self) -> Iterator[None]:
        """What is armed waits: for a look at everything."""
        disk = self.world.disk
        judge, short = disk.judge, disk._short
        disk.judge = disk._short = None
        try:
            yield
        finally:
            disk.judge, disk._short = judge, short

    # --- stories

    @initialize(size=sizes, key=st.one_of(keys, st.none()), many=st.lists(spans, max_size=3), branch=st.booleans())
    def begin(self, size: int, key: str | None, many: list[Span], branch: bool) -> None:
        self._do(lambda: self.world.create(size, encrypted=key is not None, key=key))
        self._do(lambda: self.world.attach(self.idle[0]))
        if many:
            self.write(0, many)
        if branch:
            self.branch(0, CHUNK)

    @precondition(lambda self: len(self.volumes) < MAX_VOLUMES)
    @rule(size=sizes, key=st.one_of(keys, st.none()))
    def create(self, size: int, key: str | None) -> None:
        refused = "DisabledException" if key in self.disabled else None
        self._do(lambda: self.world.create(size, encrypted=key is not None, key=key), refused=refused)

    def _attach(self, volume: str, *, read_only: bool) -> None:
        refused = None if self._usable(volume) else "CustomerKeyHasBeenRevoked"
        self._do(lambda: self.world.attach(volume, read_only=read_only), refused=refused)

    @precondition(lambda self: self.idle)
    @rule(n=which, read_only=st.sampled_from([False, False, False, True]))
    def attach(self, n: int, read_only: bool) -> None:
        volume = self.idle[n % len(self.idle)]
        refused = None if self._usable(volume) else "CustomerKeyHasBeenRevoked"
        self._do(lambda: self.world.attach(volume, read_only=read_only), refused=refused)

    @precondition(lambda self: self.attached or self.read_only or self.dead)
    @rule(n=which)
    def detach(self, n: int) -> None:
        there = self.dead + self.attached + self.read_only
        volume = there[n % len(there)]
        self._do(lambda: self.world.detach(volume))

    # --- input and output

    @precondition(lambda self: self.attached)
    @rule(n=which, many=st.lists(spans, min_size=1, max_size=3))
    def write(self, n: int, many: list[Span]) -> None:
        volume = self.attached[n % len(self.attached)]
        for span in many:
            offset, length = span.within(self.rows[volume].size)
            if not self._do(lambda: self.world.write(volume, offset, self._data(length))):  # noqa: B023
                break

    @precondition(lambda self: self.attached)
    @rule(n=which, span=spans)
    def overwrite(self, n: int, span: Span) -> None:
        """Once more, as often as all else together is not: most of what happens to a volume is writes."""
        self.write(n, [span])

    @precondition(lambda self: self.attached)
    @rule(n=which, span=spans, last=st.one_of(st.none(), spans))
    def zero(self, n: int, span: Span, last: Span | None) -> None:
        """A discard near an edge; or zeros from one edge to another one, over any number of chunks."""
        volume = self.attached[n % len(self.attached)]
        size = self.rows[volume].size
        offset, length = span.within(size)
        if last is None:
            self._do(lambda: self.world.discard(volume, offset, length))
        else:
            start, end = sorted((offset, sum(last.within(size))))
            self._do(lambda: self.world.write_zeroes(volume, start, end - start))

    @precondition(lambda self: self.attached or self.read_only)
    @rule(n=which, span=spans, what=st.sampled_from(["read", "flush", "tick", "drain"]))
    def use(self, n: int, span: Span, what: str) -> None:
        there = self.attached + self.read_only
        volume = there[n % len(there)]
        if what == "read":
            offset, length = span.within(self.rows[volume].size)
            self._do(lambda: self.world.read(volume, offset, length))
        else:
            self._do(lambda: getattr(self.world, what)(volume))

    # --- snapshots, restores, copies

    @precondition(lambda self: len(self.snaps) < MAX_SNAPSHOTS and self.volumes)
    @rule(n=which)
    def snapshot(self, n: int) -> None:
        volume = self.volumes[n % len(self.volumes)]
        refused = "IncorrectState" if volume in self.dead else None
        self._do(lambda: self.world.snapshot(volume), refused=refused)

    @precondition(lambda self: self.volumes and len(self.snaps) < MAX_SNAPSHOTS and len(self.volumes) < MAX_VOLUMES)
    @rule(n=which, growth=growths)
    def branch(self, n: int, growth: int) -> None:
        """A snapshot and an attached volume of it: what most stories need before anything can go wrong."""
        self.snapshot(n)
        if not self.snaps:
            return
        self.restore(len(self.snaps) - 1, growth, None)
        if self.idle and self._usable(self.idle[-1]):
            self._do(lambda: self.world.attach(self.idle[-1]))

    @precondition(lambda self: self.snaps and len(self.volumes) < MAX_VOLUMES)
    @rule(n=which, growth=growths, key=st.one_of(st.none(), keys))
    def restore(self, n: int, growth: int, key: str | None) -> None:
        source = self.snaps[n % len(self.snaps)]
        size = min(self.rows[source].size + growth, MAX_SIZE)
        target = self.rows[source].key_arn if key is None else arn(key)
        refused = "DisabledException" if target in self.world.broker.disabled else None
        may_fail = None if self._usable(source) else "DisabledException"
        self._do(lambda: self.world.restore(source, size=size, key=key), refused=refused, may_fail=may_fail)

    @precondition(lambda self: self.snaps and len(self.snaps) < MAX_SNAPSHOTS)
    @rule(n=which, key=st.one_of(st.none(), keys))
    def copy(self, n: int, key: str | None) -> None:
        source = self.snaps[n % len(self.snaps)]
        target = self.rows[source].key_arn if key is None else arn(key)
        refused = "DisabledException" if target in self.world.broker.disabled else None
        may_fail = None if self._usable(source) else "DisabledException"
        self._do(lambda: self.world.copy(source, key=key), refused=refused, may_fail=may_fail)

    @precondition(lambda self: self.idle or self.attached)
    @rule(n=which, growth=growths)
    def resize(self, n: int, growth: int) -> None:
        there = self.attached + self.idle
        volume = there[n % len(there)]
        size = min(self.rows[volume].size + growth, MAX_SIZE)
        self._do(lambda: self.world.resize(volume, size))

    @precondition(lambda self: self.idle or self.snaps)
    @rule(n=which, snapshot=st.booleans())
    def delete(self, n: int, snapshot: bool) -> None:
        if self.snaps and (snapshot or not self.idle):
            self._do(lambda: self.world.delete_snapshot(self.snaps[n % len(self.snaps)]))
        else:
            self._do(lambda: self.world.delete_volume(self.idle[n % len(self.idle)]))

    @rule(compare=st.booleans(), disable=st.sampled_from([None, None, None, "one", "two"]))
    def sweep(self, compare: bool, disable: str | None) -> None:
        """Sweep and perhaps compare; and disable a key, enable the other one: what is attached goes on."""
        if self._do(self.world.sweep) and compare and not self.dead:
            with self._quiet_disk():
                self.world.check(settle=False)
        self.disabled = set() if disable is None else {disable}
        self.world.broker.disabled = {arn(name) for name in self.disabled}

    # --- commands that must be refused

    @rule(n=which, span=spans, wrong=st.sampled_from(["twice", "again", "shrink", "change", "smaller", "nobody"]))
    def wrong(self, n: int, span: Span, wrong: str) -> None:
        """A command that is wrong in the present state of whom it is for."""
        if wrong == "nobody" or not self.volumes:
            self._wrong_with_nobody(n)
        elif wrong == "smaller":
            if self.snaps:
                self._wrong_with_a_snapshot(self.snaps[n % len(self.snaps)])
        else:
            self._wrong_with_a_volume(self.volumes[n % len(self.volumes)], wrong, span)

    def _wrong_with_a_volume(self, volume: str, wrong: str, span: Span) -> None:
        world, size = self.world, self.rows[volume].size
        if wrong == "shrink":
            if size > World.SIZE:
                self._do(lambda: world.resize(volume, World.SIZE), refused="InvalidParameterValue")
        elif volume in self.idle:
            self._do(lambda: world.detach(volume), refused="IncorrectState")
        elif wrong == "twice":
            self._do(lambda: world.delete_volume(volume), refused="VolumeInUse")
        elif volume in self.dead:
            self._do(lambda: world.resize(volume, MAX_SIZE), refused="IncorrectState")
            self._do(lambda: world.attach(volume), refused="IncorrectState")
        elif wrong == "again":
            self._do(lambda: world.attach(volume), refused="VolumeInUse")
        elif volume in self.read_only:
            self._do(lambda: world.resize(volume, MAX_SIZE), refused="OperationNotPermitted")
            if volume in self.read_only:
                self._refuse_change(volume, span, errno.EROFS)
        else:
            self._refuse_change(volume, replace(span, length=size + 1), errno.EFBIG)

    def _refuse_change(self, volume: str, span: Span, number: int) -> None:
        engine = self.world._engine(volume)
        offset, length = max(0, span.shift), span.length
        for change in (lambda: engine.write(offset, bytes(length)), lambda: engine.discard(offset, length)):
            code = None
            try:
                run_sync(change())
            except OSError as error:
                code = error.errno
            assert code == number, f"{volume} took a change that it must refuse, or said {code}"

    def _wrong_with_a_snapshot(self, snapshot: str) -> None:
        row, use = self.rows[snapshot], self.world.use
        smaller = CreateRequest(
            name=None, size=World.SIZE, size_gib=None, snapshot=snapshot,
            encrypted=None, key=None, context={}, tags={},
        )  # fmt: skip
        plain = CopyRequest(snapshot, None, "", False, None, {})
        refused = "InvalidParameterValue"
        if row.size > World.SIZE:
            self._do(lambda: self.world._run(use.creation.create_volume, ROOT, smaller), refused=refused)
        elif row.key_arn is not None:
            self._do(lambda: self.world._run(use.creation.copy_snapshot, ROOT, plain), refused=refused)

    def _wrong_with_nobody(self, n: int) -> None:
        use, volume, snapshot = self.world.use, "vol-0ffffffffffffffff", "snap-0ffffffffffffffff"
        missing = CopyRequest(snapshot, None, "", None, None, {})
        code, function, *args = (
            ("InvalidVolume.NotFound", use.volumes.delete, volume),
            ("InvalidVolume.NotFound", partial(use.attachments.detach, force=False), volume),
            ("InvalidSnapshot.NotFound", use.snapshots.delete, snapshot),
            ("InvalidSnapshot.NotFound", use.creation.copy_snapshot, missing),
        )[n % 4]
        self._do(lambda: self.world._run(function, ROOT, *args), refused=code)  # type: ignore[arg-type]

    # --- ends and faults

    @rule(who=st.sampled_from(["ebsd", "volume", "clean", "power", "kill"]), n=which, mode=modes, dice=dices)
    def end_of(self, who: str, n: int, mode: Mode, dice: int) -> None:
        """A clean restart of ebsd, or a death between two operations."""
        there = self.attached + self.read_only
        if who == "clean":
            self._do(self.world.reopen)
        elif who == "volume":
            if there:
                self.world.kill_process(there[n % len(there)])
        else:
            self._disarm()
            self.world.dice.seed(dice)
            kind: CrashKind = who  # type: ignore[assignment]
            self.world.crash(kind, mode)
            self._recover(kind, mode)
        self._look()

    @rule(fault=deaths, dice=dices)
    def arm_death(self, fault: Death, dice: int) -> None:
        self._arm(fault, dice)

    @rule(fault=failures, dice=dices)
    def arm_disk(self, fault: Failure | Short, dice: int) -> None:
        self._arm(fault, dice)

    def _arm(self, fault: Death | Failure | Short, dice: int) -> None:
        """What strikes in some later operation."""
        self._disarm()
        world, self.fault = self.world, fault
        world.dice.seed(dice)
        if isinstance(fault, Short):
            world.disk.arm(short=world.dice)
        elif isinstance(fault, Death):
            scope = "" if fault.who in ("power", "kill") else fault.who
            world.disk.arm(die_at=fault.at, scope=scope, tear=world.dice if fault.who == "power" else None)
        else:
            left = fault.at

            def judge(call: Call) -> int | None:
                nonlocal left
                if call.name not in DISK_CALLS or (fault.code == errno.ENOSPC and call.name in ("pread", "listdir")):
                    return None
                left -= 1
                self._struck = self._struck or left < 0
                return fault.code if left == -1 else None

            world.disk.judge = judge

    def teardown(self) -> None:
        try:
            if sys.exc_info()[0] is None:
                self.end()
        finally:
            self.world.close()

    def end(self) -> None:
        """Detach everything, sweep, compare everything; then delete everything, in one order or the other."""
        self._disarm()
        world = self.world
        for volume in self.attached + self.read_only + self.dead:
            world.detach(volume)
        world.sweep()
        world.check()
        world.check_swept()
        names = [*world.truth]
        for name in names if self._stamp % 2 else reversed(names):
            (world.delete_snapshot if name.startswith("snap-") else world.delete_volume)(name)
        world.check_empty()


__all__ = ["Death", "Failure", "Short", "Span", "Tree"]
