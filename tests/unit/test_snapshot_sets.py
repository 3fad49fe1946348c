"""Snapshots of several volumes: one moment in every order of steps, deadlines of the held, all or none after a cut."""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from dice_scheduler import DiceScheduler
from engine_rig import Rig

from ebsd.control.catalogue import Catalogue
from ebsd.control.lineages import Lineages
from ebsd.control.snapshot_sets import SetRequest, SnapshotSets
from ebsd.control.snapshots import Snapshots
from ebsd.control.volume_link import Sealed
from ebsd.control.volumes import Volumes
from ebsd.domain.errors import (
    EbsdError,
    IncorrectState,
    InvalidParameterCombination,
    InvalidParameterValue,
    MissingParameter,
    NotSupported,
    RemoteError,
    SnapshotRateExceeded,
    SnapshotSetFailed,
    VolumeNotAnswering,
    VolumeNotFound,
)
from ebsd.domain.ids import AccountId, LineageId, VolumeId, format_uuid
from ebsd.domain.model import (
    Attachment,
    Caller,
    Cipher,
    ExposedAs,
    Integrity,
    LayerState,
    Lineage,
    Volume,
)
from ebsd.domain.states import AttachmentState, SnapshotState, VolumeState
from ebsd.domain.units import CHUNK, SECTOR
from ebsd.store.catalog import Catalog, Transaction
from ebsd.volume.meeting import GATHER_SECONDS, HOLD_SECONDS, Meeting

SHM = "/dev/shm" if Path("/dev/shm").is_dir() else None
SIZE = 4 * CHUNK

# --- one moment (R26)


class DiceMeeting:
    """What ``Meeting`` does, for the dice; ``holds`` False: nobody waits under the claim for the others."""

    def __init__(self, scheduler: DiceScheduler, *, holds: bool) -> None:
        self.ready, self.held = scheduler.event(), scheduler.event()
        self.may_hold, self.go = scheduler.event(), scheduler.event()
        self.holds = holds

    async def arrived(self) -> None:
        self.ready.set()
        await self.may_hold.wait()

    async def holding(self) -> None:
        self.held.set()
        if self.holds:
            await self.go.wait()


def counters_of_a_set(seed: int, *, holds: bool) -> list[int]:
    """Seal three engines together while a writer counts in them in turn; return what each copy shows."""
    scheduler = DiceScheduler(seed)
    with tempfile.TemporaryDirectory(dir=SHM) as directory:
        roots = [Path(directory, str(n)) for n in range(3)]
        for root in roots:
            root.mkdir()
        rigs = [Rig(root, SIZE) for root in roots]
        try:
            engines = [rig.start(scheduler) for rig in rigs]
            meetings = [DiceMeeting(scheduler, holds=holds) for _ in rigs]
            ended = False

            async def write() -> None:
                number = 0
                while not ended:
                    number += 1
                    for engine in engines:
                        await engine.write(0, struct.pack("<Q", number) * (SECTOR // 8))

            async def seal_all() -> None:
                nonlocal ended
                for meeting in meetings:
                    await meeting.ready.wait()
                for meeting in meetings:
                    meeting.may_hold.set()
                    for _ in range(scheduler.dice.choice((0, 5, 40))):
                        await scheduler.point("on the way to the next volume")
                for meeting in meetings:
                    await meeting.held.wait()
                for meeting in meetings:
                    meeting.go.set()
                for task in seals:
                    while not task.done:
                        await scheduler.point("waiting")
                ended = True

            seals = [
                scheduler.spawn("seal", engine.seal(rig.announce_head(), rig.table, meeting))
                for rig, engine, meeting in zip(rigs, engines, meetings, strict=True)
            ]
            scheduler.spawn("writer", write())
            scheduler.spawn("set", seal_all())
            scheduler.run()
            for task in scheduler.tasks:
                if task.error is not None:
                    raise task.error
            contents = [rig.content_of(task.result.entries) for rig, task in zip(rigs, seals, strict=True)]
            return [struct.unpack("<Q", content[:8])[0] for content in contents]
        finally:
            for rig in rigs:
                rig.close()


SEEDS = range(60)


def test_a_set_is_of_one_moment_in_every_order_of_steps() -> None:
    seen = set()
    for seed in SEEDS:
        a, b, c = counters_of_a_set(seed, holds=True)
        assert a >= b >= c >= a - 1, f"seed {seed}: {a}, {b}, {c}"
        seen.add(a - c)
    assert seen == {0, 1}, "the writer was never caught in the middle of a round"


def test_without_holding_some_order_tears_a_set() -> None:
    torn = [seed for seed in SEEDS if not is_one_moment(*counters_of_a_set(seed, holds=False))]
    assert torn, "the test above would not notice that nobody waits for the others"


def is_one_moment(a: int, b: int, c: int) -> bool:
    return a >= b >= c >= a - 1


@pytest.mark.parametrize("at", ["arrived", "holding"])
def test_a_meeting_that_fails_leaves_the_volume_as_it_was(tmp_path: Path, at: str) -> None:
    rig = Rig(tmp_path, SIZE)
    scheduler = DiceScheduler()
    engine = rig.start(scheduler)

    async def nothing() -> None:
        pass

    async def fail() -> None:
        raise SnapshotSetFailed(volume="vol-1", reason="alone")

    meeting = SimpleNamespace(**{"arrived": nothing, "holding": nothing, at: fail})
    task = scheduler.spawn("seal", engine.seal(rig.announce_head(), rig.table, meeting))
    later = scheduler.spawn("write", engine.write(0, b"x" * SECTOR))
    scheduler.run()
    assert isinstance(task.error, SnapshotSetFailed)
    assert later.error is None
    assert engine.head == rig.live.head == 3, "the head is the old one"
    again = scheduler.spawn("seal", engine.seal(rig.announce_head(), rig.table))
    scheduler.run()
    assert again.error is None, "and can be sealed later"
    assert rig.content_of(again.result.entries)[:SECTOR] == b"x" * SECTOR
    rig.close()


# --- who is held, and for how long


class Held:
    """A volume process with nothing but a seal that meets others."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.meeting = Meeting("vol-1", "snap-1")
        self.sealed = False
        self.held_since: float | None = None
        self.held_for: float | None = None
        nursery.start_soon(self.meeting.run, self.seal)

    async def seal(self) -> dict[str, Any]:
        await self.meeting.arrived()
        self.held_since = trio.current_time()
        try:
            await self.meeting.holding()
            self.sealed = True
        finally:
            self.held_for = trio.current_time() - self.held_since
        return {"Record": "..."}


@pytest.fixture
async def held(nursery: trio.Nursery) -> Held:
    return Held(nursery)


@pytest.mark.trio
async def test_who_is_told_to_go_seals_and_answers(held: Held) -> None:
    await held.meeting.gathered()
    assert held.held_since is None, "nothing is held before all are ready"
    await held.meeting.hold()
    assert held.held_since is not None
    assert await held.meeting.go() == {"Record": "..."}
    held.meeting.let_go("too late to stop it")
    assert await held.meeting.go() == {"Record": "..."}


@pytest.mark.trio
async def test_requests_are_held_no_longer_than_the_deadline(autojump_clock: trio.abc.Clock, held: Held) -> None:
    await held.meeting.gathered()
    await held.meeting.hold()
    await trio.sleep(HOLD_SECONDS + 1)
    assert held.held_for == HOLD_SECONDS
    with pytest.raises(SnapshotSetFailed):
        await held.meeting.go()
    assert not held.sealed, "what was given up is never sealed"


@pytest.mark.trio
async def test_who_is_ready_waits_long_and_holds_nothing(autojump_clock: trio.abc.Clock, held: Held) -> None:
    await held.meeting.gathered()
    await trio.sleep(GATHER_SECONDS - 1)
    await held.meeting.hold()
    await held.meeting.give_up("")
    assert not held.sealed


@pytest.mark.trio
async def test_nobody_waits_for_ever(autojump_clock: trio.abc.Clock, held: Held) -> None:
    await held.meeting.gathered()
    await trio.sleep(GATHER_SECONDS + 1)
    with pytest.raises(SnapshotSetFailed):
        await held.meeting.hold()
    with pytest.raises(SnapshotSetFailed):
        await held.meeting.go()
    assert held.held_since is None


@pytest.mark.trio
@pytest.mark.parametrize("begun", [False, True])
async def test_requests_go_on_at_once_when_ebsd_goes_away(
    autojump_clock: trio.abc.Clock, held: Held, begun: bool
) -> None:
    await held.meeting.gathered()
    if begun:
        await held.meeting.hold()
    before = trio.current_time()
    await held.meeting.give_up("ebsd went away")
    assert trio.current_time() == before
    with pytest.raises(SnapshotSetFailed, match="went away"):
        await held.meeting.go()
    assert not held.sealed


@pytest.mark.trio
async def test_an_error_of_the_seal_is_the_answer(nursery: trio.Nursery) -> None:
    meeting = Meeting("vol-1", "snap-1")

    async def seal() -> dict[str, Any]:
        raise OSError(5, "input/output error")

    nursery.start_soon(meeting.run, seal)
    for ask in (meeting.gathered, meeting.hold, meeting.go):
        with pytest.raises(EbsdError, match="input/output"):
            await ask()


# --- all or none

ACCOUNT = AccountId("000000001000")
CALLER = Caller(1000, "somebody", ACCOUNT, is_admin=False)


class Died(BaseException):
    """ebsd was killed here."""


class World:
    """What outlives an ebsd: catalog, files, and volume processes. ``step`` counts, and is where ebsd is killed."""

    def __init__(self, directory: Path) -> None:
        self.catalog = Catalog(directory / "catalog")
        self.maps: set[str] = set()
        self.processes: dict[VolumeId, Process] = {}
        self.steps = 0
        self.die_at: int | None = None
        self.log: list[str] = []

    def step(self, what: str) -> None:
        self.steps += 1
        self.log.append(what)
        if self.steps == self.die_at:
            raise Died(what)


class Process:
    """A volume process, and ebsd's link to it: it gives up what it holds when ebsd dies."""

    def __init__(self, world: World, volume: VolumeId) -> None:
        self.world, self.volume = world, volume
        self.head, self.next_head = 1, 0
        self.state = ""
        self.sealed: str | None = None
        self.fails: dict[str, EbsdError] = {}
        self.child = SimpleNamespace(wait=trio.sleep_forever)
        self.silent = False

    def _asked(self, what: str) -> None:
        if self.silent:
            raise VolumeNotAnswering(volume=self.volume, reason="it is stopped")
        self.world.step(f"{what} of {self.volume}")
        if what in self.fails:
            raise self.fails.pop(what)

    async def prepare_seal(self, head: int, fds: object) -> tuple[int, bytes]:
        self._asked("prepare")
        self.next_head = head
        return 2, b"open"

    async def gather(self, snapshot: str, account: str, output: int) -> None:
        self._asked("gather")
        self.state = "ready"

    async def hold(self, snapshot: str) -> None:
        self._asked("hold")
        assert self.state == "ready"
        self.state = "held"

    async def go(self, snapshot: str) -> Sealed:
        assert "ready" not in {p.state for p in self.world.processes.values()}, "before all were held"
        assert self.state == "held"
        self._asked("go")
        self.state, self.sealed, self.head = "sealed", snapshot, self.next_head
        self.world.step(f"the answer of {self.volume}")
        return Sealed(b"signed", 1000, frozenset())

    async def seal(self, snapshot: str, account: str, output: int) -> Sealed:
        self._asked("seal")
        self.state, self.sealed, self.head = "sealed", snapshot, self.next_head
        return Sealed(b"signed", 1000, frozenset())

    async def let_go(self, snapshot: str) -> None:
        self._asked("let go")
        self.state = self.state if self.state == "sealed" else "let go"

    async def sealed_again(self, snapshot: str) -> Sealed:
        self._asked("sealed")
        if self.sealed != snapshot:
            raise RemoteError(IncorrectState.code, "That snapshot was not the last one sealed")
        return Sealed(b"signed", 1000, frozenset())

    async def status(self) -> dict[str, Any]:
        return {"Head": self.head}

    async def answering(self) -> bool:
        while self.silent:
            await trio.sleep(0.1)
        return True


class Files:
    """Files by their names; a map has its final name when the snapshot is in ``maps``."""

    def __init__(self, world: World) -> None:
        self._world = world

    def known_layers(self, lineage: LineageId) -> int:
        return 0

    def add_head(self, layers: list[Any], size: int) -> list[int]:
        self._world.step("head")
        return []

    complete_head = add_head

    def open_new_map(self, snapshot: str) -> int:
        return os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)

    def take_detached(self, volume: Volume, snapshot: Any) -> None:
        self._world.step("detached")
        self._world.maps.add(snapshot.id)
        self._world.step("detached, renamed")

    def finish(self, snapshot: Any, record: bytes, authority: None) -> None:
        self._world.step("finish")
        self._world.maps.add(snapshot.id)
        self._world.step("finished")

    def exists(self, snapshot: str) -> bool:
        return snapshot in self._world.maps

    def remove(self, snapshot: str) -> None:
        self._world.step("remove")
        self._world.maps.discard(snapshot)
        self._world.step("removed")

    def record(self, snapshot: Any) -> Any:
        return SimpleNamespace(wrapped_key=None, authority=None)

    def signer_of(self, record: Any) -> None:
        return None

    def seal_layer(self, layer: Any) -> None:
        self._world.step("seal layer")

    def write_signed_record(self, volume: str, record: bytes) -> None:
        self._world.step("record")


class FakeBroker:
    def __init__(self, world: World) -> None:
        self._world = world

    async def inherit_anchor(self, *args: Any, **kwargs: Any) -> None:
        self._world.step("anchor")

    async def raise_floor(self, *args: Any) -> None:
        self._world.step("floor")

    async def delete_anchor(self, *args: Any) -> None:
        self._world.step("no anchor")


class CountingCatalogue(Catalogue):
    """Each transaction may be the last one: killed before it, or just after its commit."""

    def __init__(self, world: World) -> None:
        super().__init__(world.catalog, None)  # type: ignore[arg-type]
        self._world = world

    async def run(self, use_case: Callable[[Transaction], Any]) -> Any:
        self._world.step("transaction")
        result = await super().run(use_case)
        self._world.step("committed")
        return result


class Ebsd:
    """One life of ebsd over a world."""

    def __init__(self, world: World, nursery: trio.Nursery) -> None:
        self.world = world
        numbers = iter(range(10**6))
        salt = os.urandom(4)
        host = SimpleNamespace(
            now=lambda: "2026-11-21T21:00:00Z",
            random=lambda n: (salt + next(numbers).to_bytes(4, "big") * 4)[:n],
            space=SimpleNamespace(require=self._require),
        )
        self.catalogue = CountingCatalogue(world)
        broker, files = FakeBroker(world), Files(world)
        lineages = Lineages(self.catalogue, None, world.processes)  # type: ignore[arg-type]
        volumes = Volumes(host, self.catalogue, broker, None, files, lineages)  # type: ignore[arg-type]
        roots = SimpleNamespace(follow=lambda link: None)
        parts: dict[str, Any] = {
            "host": host, "catalogue": self.catalogue, "volumes": volumes, "files": files, "lineages": lineages,
            "links": world.processes, "roots": roots, "nursery": nursery,
        }  # fmt: skip
        self.snapshots = Snapshots(broker=broker, volume_files=files, sharing=None, **parts)
        self.sets = SnapshotSets(snapshots=self.snapshots, **parts)

    async def _require(self) -> None:
        pass

    async def recover(self) -> None:
        for process in self.world.processes.values():
            if process.state in ("ready", "held"):
                process.state = "let go"
        await self.snapshots.recover()
        await self.sets.recover()


def volume(number: int, lineage: LineageId, *, attached: bool) -> Volume:
    ident = VolumeId(f"vol-{number:017x}")
    attachment = Attachment(
        ident, AttachmentState.ATTACHED, "boot", 1, ExposedAs.FILE, False, "/x", None, None, number, None, "t"
    )
    return Volume(
        id=ident, account=ACCOUNT, owner="somebody", name=f"v{number}", size=CHUNK,
        state=VolumeState.IN_USE if attached else VolumeState.AVAILABLE, cipher=Cipher.NONE, key_arn=None,
        wrapped_key=None, context={}, lineage=lineage, head=number, snapshot=None, attach_generation=1,
        integrity=Integrity.VERIFIED, authority=None, created=f"2026-11-21T20:00:0{number}Z", reason="",
        tags={"app": "db"} if number < 3 else {}, attachment=attachment if attached else None,
    )  # fmt: skip


NAMES = ("v1", "v2", "v3")
REQUEST = SetRequest(NAMES, False, {}, (), lambda volume: f"set-{volume.name}", "", {"made": "by hand"}, copy_tags=True)


def new_world(directory: Path) -> World:
    """Three volumes: two attached ones of one lineage, and a detached one of another."""
    world = World(directory)
    ids = [LineageId(format_uuid(bytes([n]) * 6 + b"\x40" + bytes([n]) + b"\x80" + bytes(7))) for n in (1, 2)]

    def fill(t: Transaction) -> None:
        for ident in ids:
            t.add_lineage(Lineage(ident, ACCOUNT, SECTOR, Cipher.NONE))
        for number in (1, 2, 3):
            each = volume(number, ids[number == 3], attached=number < 3)
            layer = t.add_layer(each.lineage, bytes([number]) * 16, each.id, CHUNK)
            t.set_layer_state(each.lineage, layer.number, LayerState.HEAD)
            t.add_volume(each)
            t.set_volume_head(each.id, layer.number)
            if each.attachment is not None:
                t.put_attachment(each.attachment)
                world.processes[each.id] = Process(world, each.id)
                world.processes[each.id].head = layer.number

    world.catalog.run(fill)
    return world


def check(world: World, *, answered: bool) -> int:
    """See that all three snapshots are completed or none is there; returns how many."""

    def look(t: Transaction) -> int:
        found = t.snapshots()
        assert [s.state for s in found] in ([], [SnapshotState.COMPLETED] * 3), found
        assert {s.id for s in found} == world.maps, "files and rows are the same"
        assert t.sets() == []
        assert all(t.set_of(s.id) is None for s in found)
        assert len({s.started for s in found}) <= 1
        for each in t.volumes():
            if each.attachment is not None:
                assert each.attachment.head == world.processes[each.id].head, "what is written to is protected"
        return len(found)

    count = world.catalog.run(look)
    assert count == 3 or not answered, "it was answered, and is gone"
    return count


@pytest.mark.trio
async def test_a_set_names_its_snapshots_and_copies_tags(tmp_path: Path, nursery: trio.Nursery) -> None:
    world = new_world(tmp_path)
    made = await Ebsd(world, nursery).sets.create(CALLER, REQUEST)
    assert [s.name for s in made] == ["set-v1", "set-v2", "set-v3"]
    assert [dict(s.tags) for s in made] == [{"app": "db", "made": "by hand"}] * 2 + [{"made": "by hand"}]
    assert [s.pause_us for s in made] == [1000, 1000, None]
    assert check(world, answered=True) == 3
    world.catalog.close()


@pytest.mark.trio
async def test_killed_at_any_step_a_set_is_whole_or_gone(tmp_path: Path) -> None:
    ends: dict[int, int] = {}
    number = 0
    while True:
        number += 1
        (tmp_path / str(number)).mkdir()
        world = new_world(tmp_path / str(number))
        world.die_at = number
        answered = False
        try:
            async with trio.open_nursery() as nursery:
                await Ebsd(world, nursery).sets.create(CALLER, REQUEST)
                answered = True
        except* Died:
            pass
        was = world.log[-1]
        if not answered:
            # Killed again a few steps into the recovery, which is killed, too.
            for later in (3, 7, 12):
                world.die_at = world.steps + later
                try:
                    async with trio.open_nursery() as nursery:
                        await Ebsd(world, nursery).recover()
                except* Died:
                    pass
            world.die_at = None
            async with trio.open_nursery() as nursery:
                await Ebsd(world, nursery).recover()
        try:
            count = check(world, answered=answered)
        except AssertionError as error:
            error.add_note(f"killed at step {number}: {was}")
            raise
        ends[count] = ends.get(count, 0) + 1
        world.catalog.close()
        if answered:
            break
    assert min(ends[0], ends[3]) > 5, f"cuts on one side only: {ends}"


FAILED = SnapshotSetFailed(volume="vol-1", reason="the others did not come")


@pytest.mark.trio
@pytest.mark.parametrize("what", ["prepare", "gather", "hold", "go"])
async def test_one_that_fails_takes_the_set_with_it_and_lets_the_others_go(
    tmp_path: Path, nursery: trio.Nursery, what: str
) -> None:
    world = new_world(tmp_path)
    ebsd = Ebsd(world, nursery)
    first, second = world.processes.values()
    second.fails[what] = FAILED
    with pytest.raises(SnapshotSetFailed):
        await ebsd.sets.create(CALLER, REQUEST)
    assert first.state in ("", "let go", "sealed")
    assert check(world, answered=False) == 0
    assert len(await ebsd.sets.create(CALLER, REQUEST)) == 3
    assert check(world, answered=True) == 3
    world.catalog.close()


@pytest.mark.trio
async def test_a_process_of_an_earlier_version_is_named(tmp_path: Path, nursery: trio.Nursery) -> None:
    world = new_world(tmp_path)
    first, _ = world.processes.values()
    first.fails["gather"] = RemoteError(NotSupported.code, "gather is not supported")
    with pytest.raises(SnapshotSetFailed, match=f"{first.volume}.*earlier version"):
        await Ebsd(world, nursery).sets.create(CALLER, REQUEST)
    assert check(world, answered=False) == 0
    world.catalog.close()


@pytest.mark.trio
async def test_a_set_stays_pending_while_one_does_not_answer(tmp_path: Path, nursery: trio.Nursery) -> None:
    world = new_world(tmp_path)
    ebsd = Ebsd(world, nursery)
    first, second = world.processes.values()
    real = second.hold

    async def stop(snapshot: str) -> None:
        second.silent = True
        await real(snapshot)

    second.hold = stop  # type: ignore[method-assign]
    with pytest.raises(SnapshotSetFailed, match="stopped"):
        await ebsd.sets.create(CALLER, REQUEST)
    assert first.state == "let go"
    assert len(world.catalog.run(lambda t: t.pending_snapshots())) == 3, "it may have sealed"
    second.hold = real  # type: ignore[method-assign]
    with pytest.raises(SnapshotRateExceeded):
        await ebsd.snapshots.create(CALLER, "v1", name=None, description="", tags={})
    second.silent = False
    with trio.fail_after(10):
        while world.catalog.run(lambda t: t.pending_snapshots()):
            await trio.sleep(0.05)
    assert check(world, answered=False) == 0
    assert len(await ebsd.sets.create(CALLER, REQUEST)) == 3
    world.catalog.close()


def chosen_by(**kwargs: Any) -> SetRequest:
    return SetRequest(**{
        "volumes": (), "all_attached": False, "target_tags": {}, "excluded": (), "name": lambda v: None,
        "description": "", "tags": {}, "copy_tags": False, **kwargs,
    })  # fmt: skip


@pytest.mark.trio
async def test_volumes_are_chosen_in_one_way(tmp_path: Path, nursery: trio.Nursery) -> None:
    world = new_world(tmp_path)
    sets = Ebsd(world, nursery).sets

    async def chosen(**kwargs: Any) -> list[str]:
        return [s.volume[-1] for s in await sets.create(CALLER, chosen_by(**kwargs))]

    assert await chosen(volumes=("v3", "v1", "v3")) == ["3", "1"]
    assert await chosen(all_attached=True) == ["1", "2"]
    assert await chosen(all_attached=True, excluded=("v1",)) == ["2"]
    assert await chosen(target_tags={"app": "db", "none": "x"}) == ["1", "2"]
    for error, wrong in (
        (MissingParameter, {}),
        (InvalidParameterCombination, {"volumes": ("v1",), "all_attached": True}),
        (InvalidParameterValue, {"target_tags": {"app": "web"}}),
        (InvalidParameterValue, {"all_attached": True, "excluded": ("v1", "v2")}),
        (VolumeNotFound, {"volumes": ("v1", "v9")}),
        (VolumeNotFound, {"all_attached": True, "excluded": ("v9",)}),
    ):
        with pytest.raises(error):
            await chosen(**wrong)
    stranger = Caller(1001, "else", AccountId("000000001001"), is_admin=False)
    with pytest.raises(VolumeNotFound):
        await sets.create(stranger, REQUEST)
    with pytest.raises(InvalidParameterValue):
        await sets.create(stranger, chosen_by(all_attached=True))
    world.catalog.close()
