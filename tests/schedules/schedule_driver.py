"""One random schedule: requests, snapshots, sweeps, growth, kills, power cuts and failing disks in an order of dice.

Everything follows from the seed. ``run_schedule`` raises ``Broken`` when a promise is not kept.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final

from schedule_dice import Cancelled
from schedule_oracle import CELL, ZEROS, Broken, Line, value_of
from schedule_product import Product
from schedule_world import CALLER, CELLS, FRONT, SIZES, TAIL, VOLUME, World

from ebsd.domain.errors import EbsdError, IntegrityFailure, StoreDamaged, UnsupportedFormat
from ebsd.domain.units import CHUNK, SECTOR

STICKY: Final = (
    "read.claimed", "read.looked-up", "write.claimed", "write.data-written", "write.entries-stored", "zero.claimed",
    "zero.entries-stored", "flush.before-freeze", "flush.frozen", "flush.segment-synced", "flush.data-synced",
    "flush.map-written", "flush.map-synced", "punch.claimed", "seal.before-claim", "seal.claimed", "seal.copied",
    "seal.switched", "seal.synced", "grow.before-claim", "grow.claimed", "grow.switched", "blocking", "blocked",
    "catalog", "committed", "channel", "answer", "lock",
)  # fmt: skip
MIXES: Final = (
    "wwwwrrffzzbslSdgDCKkexN", "wwwwwffzzbb", "wwwffzzbbkk", "wwwrrzzff", "wwwwffsssDSk", "wwwfsDDSS", "wwffgsk",
    "wwwzfffbxx", "wwwfzNse", "wwwwssfkkK", "wwzzffbbllrr", "wwfsDCzbS", "wsfe", "wwfffsDkb", "wwwffsSSDzC",
    "rrrzwfbbz", "wwffgggks",
)  # fmt: skip
"""What the dice choose from: w rite, z eroes, r ead, f lush, b ackground flush and reclaim, l eaks, s napshot,
D elete one, S weep, g row, k ill the volume process, K ill ebsd, C ut the power, d isk call that kills, e rror of the
disk, x: cancel a request, N o space on the disk, or some again, m ove chunks off old layers."""

DRAINS: Final = (
    "wwwfmmmmssDD", "wwwzfmmmsDDSk", "wfmmmsDDKkC", "wwwzffmmmmsDDg", "wwwfmmmmsDDNe", "wwwzfmmmsDbdk",
    "wwmmmmssDDSfC",
)  # fmt: skip
"""The same with drains, in mixes of their own: where they come is where they find something to do."""

DRAIN_POINTS: Final = ("drain.looked-up", "drain.claimed", "seal.before-claim", "answer")

ACCIDENTS: Final = "kKCdexN"

MOST_TASKS: Final = 9
CANCELLED: Final = ("write", "zero", "read", "flush", "background", "leaks")
DAMAGE: Final = frozenset((StoreDamaged.code, IntegrityFailure.code, UnsupportedFormat.code))


@dataclass(frozen=True)
class Focus:
    """What the dice are to choose from instead of their own choice, so that a rare thing is found soon."""

    mix: str = ""
    stay: tuple[str, ...] = ()
    """Points at which tasks stay for long."""
    accidents: float = 0.0
    """Odds of one at each step, instead of a few in a schedule; helper threads are preempted more often then."""
    own_layers: bool = False
    """Snapshots have come and gone before, so there are layers that only the volume names."""


@dataclass(eq=False)
class Request:
    """A request of the guest: it stays until it is answered, whichever process answers it."""

    kind: str
    offset: int = 0
    length: int = 0
    data: bytes = b""
    entries: list[tuple[Line, int]] = field(default_factory=list)
    cells: range = range(0)
    since: list[int] = field(default_factory=list)
    mark: dict[Line, int] = field(default_factory=dict)


class Driver:
    """The dice's hand."""

    def __init__(self, product: Product, seed: int, focus: Focus | None = None) -> None:
        Broken.first = None
        self.world = World(product, seed)
        self.dice = self.world.dice
        self.random: Random = self.dice.random
        self.requests: list[Request] = []
        self.busy: set[int] = set()
        self.numbers = 0
        self.served_by: Any = None
        self.tried: Any = None
        """The process of a failed engine that was tried to be replaced once."""
        self.focus = focus or Focus()
        self.mix = self.focus.mix or self.random.choice(MIXES)
        self.settling = False
        self.snapshots = 0
        self.hot = self.random.choice((1, 2, FRONT, FRONT))
        """Chunks at the front that most requests are for."""
        self.dice.accident = self._accident
        self.accidents = [c for c in self.mix if c in ACCIDENTS]

    # --- the schedule

    def run(self) -> None:
        random, dice, world = self.random, self.dice, self.world
        self._set_up()
        dice.sticky = frozenset(random.sample(STICKY, random.choice((0, 1, 2, 3, 5))))
        if self.focus.stay:
            dice.sticky = frozenset(self.focus.stay)
        dice.stay_odds = random.choice((0.7, 0.9, 0.99))
        dice.preempt_odds = random.choice((0.0, 0.1, 0.3))
        dice.accident_odds = 0.008 if self.accidents else 0.0
        if self.focus.accidents:
            dice.preempt_odds, dice.accident_odds = 0.5, self.focus.accidents
        new_odds = random.choice((0.1, 0.2, 0.35))
        for _ in range(random.choice((80, 150, 250))):
            if not dice.tasks or (random.random() < new_odds and len(dice.tasks) < MOST_TASKS):
                self._begin(random.choice(self.mix))
            self._step()
        end = random.random()
        if end < 0.45 and not world.failed:
            self._come_to_rest()
        self._cut()
        self._come_to_rest()

    def _set_up(self) -> None:
        world, random = self.world, self.random
        self.dice.spawn("ebsd startup", world.ebsd.process, world.startup())
        self._settle_down()
        for _ in range(random.choice((0, 2, 4))):
            self._begin("w")
        self._settle_down()
        if random.random() < 0.6:
            self._begin("f")
            self._settle_down()
        if random.random() < 0.5:
            self._begin("s")
            self._settle_down()
        if self.focus.own_layers:
            self._make_own_layers()

    def _make_own_layers(self) -> None:
        """A chunk in each of some layers, most of which nobody else names."""
        for chunk in range(FRONT):
            self._change("write", range(chunk * CELLS, (chunk + 1) * CELLS))
            self._settle_down()
            if chunk < FRONT - 1 or self.random.random() < 0.5:
                self._snapshot()
                self._settle_down()
        for _ in range(self.random.choice((0, 1, 2, 3))):
            self._delete()
            self._settle_down()
        self._ask("drain", lambda ebsd: ebsd.drains.begin(VOLUME))
        self._settle_down()

    def _step(self) -> bool:
        """One step of one task, and what follows from it."""
        world = self.world
        went = self.dice.step()
        self._look()
        if world.off:
            self._after_cut()
        self._serve()
        return went

    def _look(self) -> None:
        if Broken.first is not None:
            raise Broken.first

    def _serve(self) -> None:
        """Keep a volume process running, and resend what a dead one did not answer."""
        world = self.world
        worker = world.worker
        if worker is None or worker.process.dead:
            self.served_by = None
            if self._may_attach() and not any(t.name == "attach" and not t.done for t in self.dice.tasks):
                adopt = self.random.random() < 0.5
                self.dice.spawn("attach", world.ebsd.process, self._checked(lambda: world.attach(adopt), ()))
        elif self.served_by is not worker and VOLUME in world.ebsd.links:
            self.served_by = worker
            for request in self.requests:
                self._send(request)
            if self.random.random() < 0.5:
                self._spawn_engine("leaks", lambda: worker.engine.find_leaks())

    def _may_attach(self) -> bool:
        """Once after a failure, which only a power cut ends here; and not at once where there is no hurry."""
        world = self.world
        if world.failed or world.injected:
            tried, self.tried = self.tried, world.worker
            return tried is not world.worker
        return self.settling or self.random.random() < 0.2

    def _settle_down(self) -> None:
        """Let everything that was begun come to its end, without accidents."""
        before, self.dice.accident_odds = self.dice.accident_odds, 0.0
        self.settling, self.world.full = True, False
        for _ in range(20000):
            if not self._step() and (self.served_by is not None or self.world.failed or self.world.injected):
                break
        else:
            raise Broken("it never comes to rest")
        self.dice.accident_odds = before
        self.settling = False
        waiting = [f"{t.name} at {t.at}" for t in self.dice.tasks if not t.done]
        if waiting and not (self.world.failed or self.world.injected):
            raise Broken(f"deadlock: {waiting}")

    def _come_to_rest(self) -> None:
        """The end of a life: everything is answered, and what is then read is right."""
        world = self.world
        self._settle_down()
        worker = world.worker
        if world.failed or world.injected or worker is None or worker.process.dead:
            return
        world.check_snapshots("at rest")
        for cells in (range(FRONT * CELLS), range(TAIL * CELLS, worker.engine.size // CELL)):
            self._read(cells)
        self._settle_down()

    # --- accidents

    def _accident(self) -> None:
        if self.accidents and not self.world.off:
            self._happen(self.random.choice(self.accidents))

    def _happen(self, kind: str) -> None:
        world, random = self.world, self.random
        worker = world.worker
        alive = worker is not None and not worker.process.dead
        if kind == "k" and alive:
            world.kill(worker.process)  # type: ignore[union-attr]
        elif kind == "K":
            world.kill(world.ebsd.process)
        elif kind == "C":
            world.cut_power()
        elif kind == "d" and alive:
            worker.process.die_in = random.randrange(12)  # type: ignore[union-attr]
        elif kind == "e" and alive:
            if random.random() < 0.7:
                world.fail_sync = True
            else:
                world.fail_pwrite = True
        elif kind == "N":
            world.full = not world.full
            world.was_full = True
        elif kind == "x":
            # A request is cancelled where a real event loop may do it: while it waits, before a helper thread begins.
            waiting = [
                t for t in self.dice.tasks
                if t.name in CANCELLED and t.at in ("event", "blocking") and not t.running and not t.done
            ]  # fmt: skip
            if waiting:
                self.dice.cancel(random.choice(waiting))

    def _cut(self) -> None:
        self.world.cut_power()
        self._after_cut()

    def _after_cut(self) -> None:
        self.requests.clear()
        self.busy.clear()
        self.served_by = None
        self.world.after_cut()
        self._look()

    # --- what is begun

    def _begin(self, kind: str) -> None:
        if kind in ACCIDENTS:
            if self.random.random() < 0.15:
                self._happen(kind)
            return
        {
            "w": self._write, "z": self._zero, "r": self._read_some, "f": self._flush, "b": self._background,
            "l": self._leaks, "s": self._snapshot, "D": self._delete, "S": self._sweep, "g": self._grow,
            "m": self._move,
        }[kind]()  # fmt: skip

    def _cells(self) -> range | None:
        """Choose a range: some cells, unaligned or not, or whole chunks."""
        random = self.random
        size = self.world.worker.engine.size if self.world.worker and self.world.worker.engine else SIZES[0]
        first, end = (0, self.hot * CELLS) if random.random() < 0.75 else (TAIL * CELLS, size // CELL)
        shape = random.random()
        if shape < 0.35:
            count = random.choice((1, 1, 2, 3, 4))
            start = random.randrange(first, end)
        elif shape < 0.75:
            count = CELLS * random.choice((1, 1, 2))
            start = random.randrange(first, end) // CELLS * CELLS
        else:
            count = random.randrange(1, 2 * CELLS)
            start = random.randrange(first, end)
        return range(start, min(start + count, end))

    def _change(self, kind: str, cells: range | None = None) -> None:
        cells = cells or self._cells()
        if cells is None or self.busy.intersection(cells):
            return
        self.busy.update(cells)
        if kind == "write":
            self.numbers += 1
            values = [value_of(self.numbers)] * len(cells)
        else:
            values = [ZEROS] * len(cells)
        request = Request(kind, cells[0] * CELL, len(cells) * CELL, b"".join(values), cells=cells)
        request.entries = self.world.oracle.begin(cells, values)
        self._issue(request)

    def _write(self) -> None:
        self._change("write")

    def _zero(self) -> None:
        self._change("zero")

    def _read_some(self) -> None:
        cells = self._cells()
        if cells is not None:
            self._read(cells)

    def _read(self, cells: range) -> None:
        request = Request("read", cells[0] * CELL, len(cells) * CELL, cells=cells)
        request.since = [self.world.oracle.lines[cell].acked for cell in cells]
        self._issue(request)

    def _flush(self) -> None:
        self._issue(Request("flush", mark=self.world.oracle.mark()))

    def _issue(self, request: Request) -> None:
        self.requests.append(request)
        if self.served_by is not None and not self.served_by.process.dead:
            self._send(request)

    def _send(self, request: Request) -> None:
        self.dice.spawn(request.kind, self.served_by.process, self._execute(request, self.served_by.engine))

    async def _execute(self, request: Request, engine: Any) -> None:
        world = self.world
        try:
            if request.kind == "write":
                await engine.write(request.offset, request.data)
            elif request.kind == "zero":
                await engine.discard(request.offset, request.length)
            elif request.kind == "read":
                got = bytes(await engine.read(request.offset, request.length))
            else:
                await engine.flush()
        except OSError as error:
            self.dice.alive()
            self._done(request)
            if world.healthy or (engine.failed and not (world.failed or world.injected)):
                raise Broken(f"{request.kind} is refused: {error}") from error
            return
        except Cancelled:
            self._done(request)
            raise
        except EbsdError as error:
            self.dice.alive()
            raise Broken(f"{request.kind} finds damage: {error}") from error
        except Exception as error:
            self.dice.alive()
            raise Broken(f"{request.kind} ends with {type(error).__name__}: {error}") from error
        self._done(request)
        if request.kind == "read":
            for at, (cell, since) in enumerate(zip(request.cells, request.since, strict=True)):
                world.oracle.check_live("read", cell, got[at * CELL : (at + 1) * CELL], since)
        elif request.kind == "flush":
            world.oracle.flushed(request.mark)
        else:
            world.oracle.answer(request.entries)

    def _done(self, request: Request) -> None:
        self.requests.remove(request)
        if request.kind in ("write", "zero"):
            self.busy.difference_update(request.cells)

    def _spawn_engine(self, name: str, work: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        worker = self.served_by
        if worker is not None and not worker.process.dead:
            self.dice.spawn(name, worker.process, self._checked(work, ()))

    def _background(self) -> None:
        worker = self.served_by
        if worker is not None:
            self._spawn_engine("background", worker.vp._quiet_flush)

    def _leaks(self) -> None:
        worker = self.served_by
        if worker is not None:
            self._spawn_engine("leaks", worker.engine.find_leaks)

    # --- what ebsd is asked for

    async def _checked(self, work: Callable[[], Coroutine[Any, Any, Any]], refused: tuple[type[Exception], ...]) -> Any:
        """Refusals are answers; anything else is a bug of the product or of the world, and ends the schedule."""
        try:
            return await work()
        except refused as error:
            self.dice.alive()
            if isinstance(error, EbsdError) and error.code in DAMAGE:
                raise Broken(f"damage: {error}") from error
            return None
        except Broken:
            raise
        except Exception as error:
            self.dice.alive()
            if isinstance(error, (EbsdError, OSError)) and not self.world.healthy:
                return None
            raise Broken(f"{type(error).__name__}: {error}") from error

    def _ask(self, name: str, work: Callable[[Any], Coroutine[Any, Any, Any]]) -> None:
        ebsd = self.world.ebsd

        async def wait_and_do() -> None:
            await ebsd.ready.wait()
            await work(ebsd)

        self.dice.spawn(name, ebsd.process, self._checked(wait_and_do, (EbsdError, OSError)))

    def _snapshot(self) -> None:
        world = self.world

        async def take(ebsd: Any) -> None:
            row = await ebsd.snapshots.create(CALLER, VOLUME, name=None, description="", tags={})
            world.promised.add(row.id)

        self.snapshots += 1
        if self.snapshots < 12:
            self._ask("snapshot", take)

    def _delete(self) -> None:
        world = self.world
        rows = sorted(world.snapshot_rows())
        if rows:
            ident = self.random.choice(rows)

            async def delete(ebsd: Any) -> None:
                if ident in world.promised:
                    world.promised.discard(ident)
                    await ebsd.snapshots.delete(CALLER, ident)

            self._ask("delete", delete)

    def _sweep(self) -> None:
        async def sweep(ebsd: Any) -> None:
            lineage, random = self.world.volume().lineage, self.random.random()
            if random < 0.4:
                await ebsd.lineages.sweep_left(VOLUME, lineage)
                return
            async with ebsd.lineages.lock(lineage):
                await (ebsd.lineages.sweep_whole if random < 0.8 else ebsd.lineages.sweep)(lineage)

        self._ask("sweep", sweep)

    def _move(self) -> None:
        """A part of a drain: what may be moved, the moves, what was left, asking how far it is; each at any time."""
        worker, part = self.served_by, self.random.random()
        if worker is not None and worker.vp._drainer.pending and part < 0.6:
            if not any(t.name == "moves" and not t.done for t in self.dice.tasks):
                self._spawn_engine("moves", lambda: self._moves(worker))
        elif part < 0.75:
            self._ask("drain", lambda ebsd: ebsd.drains.begin(VOLUME))
        elif part < 0.8:
            self._ask("question", self._question)
        else:
            self._ask("give back", lambda ebsd: ebsd.drains.collect(VOLUME))

    @staticmethod
    async def _question(ebsd: Any) -> None:
        """How far a drain is: what is told as left is not taken by that."""
        link = ebsd.links.get(VOLUME)
        if link is not None:
            await link.drained()

    async def _moves(self, worker: Any) -> None:
        drainer = worker.vp._drainer
        await drainer.make_pass()
        if drainer._damaged and self.world.healthy:
            raise Broken(f"a drain finds damage in the layers {sorted(drainer._damaged)}")

    def _grow(self) -> None:
        size = self.world.volume().size
        later = [s for s in SIZES if s > size]
        if later:
            self._ask("grow", lambda ebsd: ebsd.growth.grow(CALLER, VOLUME, size=later[0], size_gib=None))


def run_schedule(
    product: Product, seed: int, prepare: Callable[[World], None] | None = None, focus: Focus | None = None
) -> None:
    """Run the schedule of a seed; raises Broken with the first promise that was not kept."""
    driver = Driver(product, seed, focus)
    if prepare is not None:
        prepare(driver.world)
    try:
        driver.run()
    finally:
        driver.world.end()


__all__ = ["CHUNK", "SECTOR", "Broken", "Focus", "run_schedule"]
