"""The engine against a byte array: any requests, clean closes, kills and power cuts, at any call to the disk."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

from engine_rig import BLOCK, Died, Rig
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from ebsd.domain.units import CHUNK, SECTOR
from ebsd.store.salvage import SalvageOutcome
from ebsd.volume.scheduling import run_sync

SIZE = 20 * CHUNK + 3 * SECTOR
SHM = Path("/dev/shm")

interesting = st.one_of(
    st.integers(0, SIZE),
    st.integers(0, SIZE // CHUNK).map(lambda n: n * CHUNK),
    st.integers(0, SIZE // SECTOR).map(lambda n: n * SECTOR),
    st.just(SIZE),
)
ranges = st.tuples(interesting, interesting).map(lambda pair: (min(pair), max(pair)))


class VolumeMachine(RuleBasedStateMachine):
    native = False

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory(dir=SHM if SHM.is_dir() else None)
        self.rig = Rig(Path(self.directory.name), SIZE, native=self.native)
        self.dice = random.Random(0)
        self.maybe: dict[int, list[bytes]] = {}
        """Block -> what it may be after a power cut: its flushed contents and everything since."""
        self.snapshots: list[tuple[bytes, memoryview]] = []
        """What the volume read as, and the copy of its map."""

    @initialize(seed=st.integers(0, 2**32), short=st.booleans())
    def begin(self, seed: int, short: bool) -> None:
        self.dice = random.Random(seed)
        plan = {c: self.dice.randint(1, 2) for c in range(20) if self.dice.random() < 0.4}
        self.model = self.rig.seal_content(plan, seed)
        if short:
            self.rig.disk.short = random.Random(seed)
        self.rig.start()

    def _engine(self):
        return self.rig.engine

    def _change(self, offset: int, data: bytes) -> None:
        """Note new contents; every value a block has had since the last flush is allowed after a cut."""
        first, last = offset // BLOCK, (offset + len(data) - 1) // BLOCK
        for block in range(first, last + 1):
            self.maybe.setdefault(block, [bytes(self.model[block * BLOCK : (block + 1) * BLOCK])])
        self.model[offset : offset + len(data)] = data
        for block in range(first, last + 1):
            self.maybe[block].append(bytes(self.model[block * BLOCK : (block + 1) * BLOCK]))

    @rule(at=ranges, seed=st.integers(0, 2**16))
    def write(self, at: tuple[int, int], seed: int) -> None:
        offset, end = at
        data = random.Random(seed).randbytes(end - offset)
        assert run_sync(self._engine().write(offset, data)) == len(data)
        if data:
            self._change(offset, data)

    @rule(at=ranges)
    def zero(self, at: tuple[int, int]) -> None:
        offset, end = at
        run_sync(self._engine().discard(offset, end - offset))
        if end > offset:
            self._change(offset, bytes(end - offset))

    @rule(at=ranges)
    def read(self, at: tuple[int, int]) -> None:
        offset, end = at
        assert bytes(run_sync(self._engine().read(offset, end - offset))) == self.model[offset:end]

    @rule()
    def flush(self) -> None:
        self.rig.flush()
        self.maybe.clear()

    @rule()
    def reclaim(self) -> None:
        run_sync(self._engine().reclaim())

    @rule()
    def find_leaks(self) -> None:
        run_sync(self._engine().find_leaks())

    @rule()
    def seal(self) -> None:
        copy = run_sync(self.rig.seal())
        self.maybe.clear()
        self.snapshots.append((bytes(self.model), copy.entries))

    @rule(calls=st.integers(0, 9), adopt=st.booleans(), cut=st.booleans())
    def die_during_seal(self, calls: int, adopt: bool, cut: bool) -> None:
        head = self.rig.announce_head()
        self.rig.disk.die_at = calls
        try:
            copy = run_sync(self._engine().seal(head, self.rig.table))
            self.maybe.clear()
            self.snapshots.append((bytes(self.model), copy.entries))
        except Died:
            pass
        if cut:
            self._cut()
        else:
            self.rig.drop()
            self._recover(adopt)

    @rule()
    def snapshots_are_what_they_were(self) -> None:
        for content, entries in self.snapshots:
            assert self.rig.content_of(entries) == content

    @rule()
    def reopen_after_clean_close(self) -> None:
        run_sync(self._engine().close())
        self.maybe.clear()
        self.rig.drop()
        self.rig.live_path.unlink()
        self.rig.start()

    @rule(adopt=st.booleans())
    def kill(self, adopt: bool) -> None:
        self.rig.drop()
        self._recover(adopt)

    def _recover(self, adopt: bool) -> None:
        self.rig.disk.reset()
        if not adopt:
            found = self.rig.salvage()
            assert found.outcome is SalvageOutcome.APPLIED
            self.maybe.clear()
        self.rig.start(adopt=adopt)

    @rule(adopt=st.booleans(), calls=st.integers(0, 6))
    def kill_during_flush(self, adopt: bool, calls: int) -> None:
        self.rig.disk.die_at = calls
        try:
            self.rig.flush()
            self.maybe.clear()
        except Died:
            pass
        self.rig.drop()
        self._recover(adopt)

    @rule(calls=st.integers(0, 6))
    def kill_during_salvage(self, calls: int) -> None:
        self.rig.drop()
        self.rig.disk.reset()
        self.rig.disk.die_at = calls
        try:
            self.rig.salvage()
            self.maybe.clear()
        except Died:
            self.rig.disk.reset()
            assert self.rig.salvage().outcome is SalvageOutcome.APPLIED
            self.maybe.clear()
        self.rig.disk.reset()
        self.rig.start()

    @rule(at=ranges, seed=st.integers(0, 2**16), calls=st.integers(0, 4), cut=st.booleans(), kind=st.booleans())
    def die_during_change(self, at: tuple[int, int], seed: int, calls: int, cut: bool, kind: bool) -> None:
        offset, end = at
        data = random.Random(seed).randbytes(end - offset) if kind else bytes(end - offset)
        before = bytes(self.model)
        self.rig.disk.die_at = calls
        died = True
        try:
            if kind:
                run_sync(self._engine().write(offset, data))
            else:
                run_sync(self._engine().write_zeroes(offset, end - offset))
            died = False
        except Died:
            pass
        if end > offset:
            self._change(offset, data)
        if cut:
            self._cut()
            return
        self.rig.drop()
        self._recover(adopt=True)
        if died:
            actual = self.rig.read(0, SIZE)
            for at_block in range(0, SIZE, BLOCK):
                block = slice(at_block, at_block + BLOCK)
                assert actual[block] in (before[block], self.model[block])
            self.model[:] = actual

    @rule(calls=st.one_of(st.none(), st.integers(0, 6)), salvage_first=st.booleans())
    def power_cut(self, calls: int | None, salvage_first: bool) -> None:
        if calls is not None:
            self.rig.disk.die_at = calls
            try:
                if salvage_first:
                    self.rig.drop()
                    self.rig.salvage()
                else:
                    self.rig.flush()
                self.maybe.clear()
            except Died:
                pass
        self._cut()

    def _cut(self) -> None:
        self.rig.power_cut(self.dice)
        self.rig.check_durable()
        self.rig.start()
        actual = self.rig.read(0, SIZE)
        for at in range(0, SIZE, BLOCK):
            got, block = actual[at : at + BLOCK], at // BLOCK
            if block in self.maybe:
                assert got in self.maybe[block], f"block {block} is neither old nor new"
            else:
                assert got == self.model[at : at + BLOCK], f"block {block} was flushed and is gone"
        self.model[:] = actual
        self.maybe.clear()
        self.snapshots_are_what_they_were()

    @invariant()
    def reads_as_the_model(self) -> None:
        if self.rig.engine is not None:
            assert self.rig.read(0, SIZE) == self.model

    def teardown(self) -> None:
        self.snapshots_are_what_they_were()
        self.rig.close()
        self.directory.cleanup()


class NativeMachine(VolumeMachine):
    native = True


VolumeMachine.TestCase.settings = NativeMachine.TestCase.settings = settings(
    max_examples=25,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink),  # "explain" traces every line
    database=None,
)
test_volume_machine = VolumeMachine.TestCase
test_native_volume_machine = NativeMachine.TestCase
