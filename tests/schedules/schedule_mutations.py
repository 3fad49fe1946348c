"""The rules, each with the change of the product that switches it off and the seed of a schedule that then fails.

A text that is to be replaced must occur exactly once; ``schedule_product`` refuses a table that has rotted. ``seed`` is
the first one found whose schedule breaks a promise; the same schedule passes without the change. A rule without a seed
has a test that goes one order of steps (``shown_by``), or a reason: what else keeps the promise when it is off.
"""

# ruff: noqa: E501 - the texts of the product stand here as they stand there
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from schedule_driver import DRAIN_POINTS, Focus
from schedule_product import Edit

ENGINE = "volume/engine.py"
LIVE = "store/livemap.py"
DURABLE = "store/durablemap.py"
SALVAGE = "store/salvage.py"
SWEEP = "store/sweep.py"
LAYERS = "store/layers.py"
PROCESS = "volume/process.py"
SNAPSHOTS = "control/snapshots.py"
SNAPSHOT_FILES = "control/snapshot_files.py"
LINEAGES = "control/lineages.py"
LINEAGE_FILES = "control/lineage_files.py"


@dataclass(frozen=True)
class Mutation:
    rule: str
    what: str
    """What the mutated product does, or leaves."""
    edits: tuple[Edit, ...] = ()
    why_not: str = ""
    """Why no schedule can fail."""
    shown_by: str = ""
    """A test below tests/unit that fails, where dice do not find the one order of steps that shows it."""
    prepare: Callable[[Any], None] | None = field(default=None, compare=False)
    """Changes the world instead: what the product decides where the world stands for it."""

    @property
    def seed(self) -> int | None:
        """Of a schedule that fails; None when no schedule can, or a test of one order of steps shows it."""
        return SEEDS.get(self.name)

    @property
    def focus(self) -> Focus | None:
        return FOCUS.get(self.what) or FOCUS.get(self.rule)

    @property
    def name(self) -> str:
        return f"{self.rule}: {self.what}"


def _one(rule: str, what: str, file: str, old: str, new: str, why_not: str = "") -> Mutation:
    return Mutation(rule, what, (Edit(file, old, new),), why_not)


def _stale_head(world: Any) -> None:
    world.stale_head = True


_GROWN_MAP = "test_store_files.py::test_a_map_that_grows_is_longer_on_the_disk_before_its_header_says_so"
_MIDDLE = "await self._point('mutated')\n"

READ = Focus("rrrrzzwffbb", ("read.looked-up",))
FULL = Focus("wwwzgNNf")
DISCARD = Focus("zzwwfk")
WRITE = Focus("wwwff", ("mutated",))
FLUSH = Focus("wwwzffk")
FAIL = Focus("wwwffe", ("flush.before-freeze",))
PUNCH = Focus("wwzzffbb")
LEAK = Focus("wwzfkbllb")
CANCEL = Focus("wwzzffxx")
SEAL = Focus("wwwzfss", ("seal.before-claim", "seal.claimed", "seal.switched"))
SEAL_KILL = Focus("wwwzfsskdK", ("seal.before-claim", "seal.switched", "flush.before-freeze", "mutated"))
HEAD = Focus("wwzfssskK", ("committed", "channel", "seal.before-claim", "answer"))
GROW = Focus("wwwzfg", ("grow.before-claim", "grow.claimed", "flush.data-synced", "flush.frozen", "mutated"))
GROW_CUT = Focus("wfggC")
START = Focus("wwfdkd")
SNAPSHOT_CUT = Focus("wfsssCKd")
DEATH = Focus("wwwsskkzC", ("seal.switched", "seal.before-claim", "flush.before-freeze"))
SWEEP_ALL = Focus("wwzfsDDSSSk")
DRAIN = Focus("wwwzfmmmm", DRAIN_POINTS, own_layers=True)
LEFT = Focus("wwwwfmmmms", ("answer", "committed", "seal.before-claim"), own_layers=True)

FOCUS: dict[str, Focus] = {
    "R1": READ, "R4": FULL, "R5": DISCARD, "R6": WRITE, "R9": FLUSH, "R10": FLUSH, "R11": FAIL, "R12": PUNCH,
    "R13": CANCEL, "R14": SEAL, "R15": SEAL_KILL, "R16": SEAL_KILL, "R17": SEAL, "R18": HEAD, "R19": GROW,
    "live map": START, "durable map": GROW_CUT, "layers": SNAPSHOT_CUT, "layer table": SNAPSHOT_CUT,
    "salvage": DEATH, "sweep": SWEEP_ALL, "snapshot": SNAPSHOT_CUT, "record": SNAPSHOT_CUT,
    "a leak is punched though the durable map may name it": LEAK,
    "FROZEN is clean to who comes later": FLUSH, "sync does nothing": FLUSH,
    "a claim overtakes the ones that only wait": Focus("wwwwwsrf", ("write.data-written", "write.claimed")),
    "the first pass does not sync sealed layers": Focus("wwwfssk", ("seal.before-claim", "seal.switched"), 0.02),
    "neither a salvage nor a first pass without news syncs the map": Focus("wwfkkC"),
    "a pass moves the oldest unsynced layer to the head of its end": Focus(
        "wwwwffsskC", ("flush.frozen", "seal.before-claim", "flush.before-freeze"), 0.02
    ),
    "a growth does not wait for its claim": Focus("wwwsrrrrg", ("read.looked-up",)),
    "an await between the copy of the live map and its use": Focus(
        "wwwfffgeek", ("mutated", "flush.frozen", "flush.data-synced")
    ),
    "the longer live map does not get the marks": Focus("wwwgkk", ("flush.before-freeze",)),
    "the magic is there before the entries are": Focus("wfrrkK", (), 0.03),
    "nothing syncs it": Focus("wfsssssC"),
    "the live map is removed before its entries are applied": Focus("wwwkK", (), 0.03),
    "a live map whose engine failed is applied": Focus("wwwffek"),
    "the failed flag is not stored": Focus("wwwffek"),
    "by relatives: maps are not synced before the punch": Focus("wwwzfffsDDS", ("flush.map-written",)),
    "the sync of a durable map does nothing": Focus("wwwzfffsDSS", ("flush.map-written",)),
    "what an attached process may write is not protected": Focus("wwwwsKSS", ("channel", "committed", "catalog"), 0.015),
    "a lineage is swept while a live map waits for its salvage": Focus(
        "wwwskKkKd", ("seal.switched", "flush.before-freeze")
    ),
    "the files of a snapshot go before its row": Focus("wfssDDKKC"),
    "the map has its final name before the record is there": Focus("wfssK", (), 0.04),
    "R23": DRAIN, "R24": LEFT,
    "a drain does not wait for its claim": Focus("wwwwmmm", ("write.data-written", "drain.claimed"), own_layers=True),
    "what a drain could not read is said at once": Focus("wwwwfmmmmmm", ("drain.looked-up",), own_layers=True),
    "what was told as left stays told over a seal": Focus("wwwwmmmmms", own_layers=True),
    "a full disk fails what has its blocks": FULL, "a head that grew is not synced": GROW_CUT,
    "find_leaks asks the head's own descriptors, which are closed after a seal": Focus("wwsslll"),
}  # fmt: skip
"""Where to look for a mutation of these rules."""

MUTATIONS: tuple[Mutation, ...] = (
    # --- R1, R2: claims
    _one(
        "R1", "a read has no claim", ENGINE,
        "self._locks.enqueue(offset >> _SHIFT, (offset + length - 1 >> _SHIFT) + 1, False)", "self._locks.enqueue(1 << 31, 1 << 31, False)",
    ),
    _one(
        "R1", "a write does not wait for its claim", ENGINE,
        '                await self._locks.wait(claim)\n            try:\n                await self._point("write.claimed")',
        '                pass\n            try:\n                await self._point("write.claimed")',
    ),
    _one(
        "R1", "a discard does not wait for its claim", ENGINE,
        "(step - 1 >> _SHIFT) + 1, True)\n            if claim.blockers:", "(step - 1 >> _SHIFT) + 1, True)\n            if False:",
    ),
    _one(
        "R2", "a claim overtakes the ones that only wait", "volume/chunklocks.py",
        "if other.first < end and first < other.end and (exclusive or other.exclusive):",
        "if other.first < end and first < other.end and (exclusive or other.exclusive) and not other.blockers:",
    ),
    # --- R3 to R6: a write
    _one(
        "R3", "the entry is stored before the data", ENGINE,
        "        segment, place = divmod(start, SEGMENT)\n        fd = self._head_fds[segment]\n        try:\n",
        "        segment, place = divmod(start, SEGMENT)\n        fd = self._head_fds[segment]\n"
        "        self._name_head(first, last + 1)\n        try:\n",
    ),
    _one(
        "R3", "the rest of a chunk that the head does not hold is not copied", ENGINE,
        "if (offset > start or end < stop) and self._entries[chunk] != HOLE:", "if False:",
    ),
    _one(
        "R4", "no blocks are asked for before the data of a write", ENGINE,
        "        self._durable.write_out(first, end)\n        if self._punch_queue:", "        if self._punch_queue:",
    ),
    _one(
        "R4", "no blocks are asked for before a discard", ENGINE,
        "            return\n        self._durable.write_out(first, end)\n", "            return\n",
        why_not="a chunk that is discarded was named by an entry, so its page was written out before, by whoever wrote it",
    ),
    _one(
        "R5", "a write does not mark its page", ENGINE,
        "                marks[page] = DIRTY\n                self._dirty.add(page)\n                self._changed.add(page)\n"
        "                entries[chunk] = head\n",
        "                self._dirty.add(page)\n                self._changed.add(page)\n                entries[chunk] = head\n",
    ),
    _one(
        "R5", "a discard does not mark its page", ENGINE,
        "                marks[page] = DIRTY\n                self._dirty.add(page)\n                self._changed.add(page)\n"
        "                entries[chunk] = HOLE\n",
        "                self._dirty.add(page)\n                self._changed.add(page)\n                entries[chunk] = HOLE\n",
    ),
    _one(
        "R5", "a write does not tell the next pass of its page", ENGINE,
        "                self._dirty.add(page)\n                self._changed.add(page)\n                entries[chunk] = head\n",
        "                self._changed.add(page)\n                entries[chunk] = head\n",
    ),
    _one(
        "R6", "the segment is marked as touched before its pwrite, with an await between", ENGINE,
        "        try:\n            pwrite_all(self._disk, fd, scratch[: stop - start], place)\n        finally:\n"
        "            self._touched.add(fd)\n",
        "        self._touched.add(fd)\n        kept = bytes(scratch[: stop - start])\n        " + _MIDDLE
        + "        pwrite_all(self._disk, fd, kept, place)\n",
    ),
    _one(
        "R6", "an await between the encryption and its pwrite", ENGINE,
        "        try:\n            pwrite_all(self._disk, fd, scratch[: stop - start], place)\n",
        "        " + _MIDDLE + "        try:\n            pwrite_all(self._disk, fd, scratch[: stop - start], place)\n",
    ),
    # --- R7 to R11: a pass
    _one(
        "R7", "the pass writes entries as they are now, not its copies", ENGINE,
        'b"".join(data for _, data in copies[at:end])', 'b"".join(self._live.page(page) for page, _ in copies[at:end])',
    ),
    _one(
        "R7", "the data is not synced", ENGINE,
        "                await self._scheduler.blocking(self._disk.fdatasync, fd)\n", "",
    ),
    _one(
        "R7", "the copies are written before the data is synced", ENGINE,
        '            await self._point("flush.frozen")\n',
        '            await self._scheduler.blocking(self._write_copies, copies)\n            await self._point("flush.frozen")\n',
    ),
    _one("R7", "the map is not synced", ENGINE, "await self._scheduler.blocking(self._durable.sync)", "pass"),
    _one("R7", "two passes run at a time", ENGINE, "while self._running is not None:  # one pass at a time", "while False:"),
    _one(
        "R8", "a flush joins a pass that has frozen", ENGINE,
        "            self._gathering = None  # frozen from here on", "            # frozen from here on",
    ),
    _one("R9", "marks are cleared at the freeze", ENGINE, "self._marks[page] = FROZEN", "self._marks[page] = CLEAN"),
    _one(
        "R9", "marks are cleared without a look whether they are FROZEN", ENGINE,
        "if self._marks[page] == FROZEN:  # else", "if True:  # else",
    ),
    _one("R10", "the first pass is like any other", ENGINE, "self._first_pass = True", "self._first_pass = False"),
    _one(
        "R10", "the first pass does not sync the head", ENGINE,
        "                touched.update(self._head_fds)\n", "                pass\n",
    ),
    _one(
        "R10", "the first pass does not sync sealed layers", ENGINE,
        "sealed = self._sealed_to_sync()", "sealed = []",
    ),
    _one(
        "R10", "the first pass syncs no recent layer that no entry names", ENGINE,
        "recent = recent_layers(self._live, self._table)", "recent: list[int] = []",
        why_not="the layers that the live map names are synced in any case, and a snapshot that names others was synced "
        "by its own seal",
    ),
    _one(
        "R10", "the first pass does not sync the map when nothing is new", ENGINE,
        "            if copies or first_pass:\n", "            if copies:\n",
        why_not="a mark is cleared after a sync of the map, and a salvage ends with one: what has no mark is durable",
    ),
    Mutation(
        "R10", "neither a salvage nor a first pass without news syncs the map",
        (
            Edit(ENGINE, "            if copies or first_pass:\n", "            if copies:\n"),
            Edit(SALVAGE, "        durable.sync()\n        disk.unlink(path)\n", "        disk.unlink(path)\n"),
        ),
    ),
    _one(
        "R11", "after an error in a pass the engine goes on", ENGINE,
        "            raise self._fail(error) from error\n", "            raise EngineFailed(error) from error\n",
    ),
    _one("R11", "the failed flag is not stored", ENGINE, "        self._live.mark_failed()\n", ""),
    _one(
        "R11", "who joined a pass that failed is answered", ENGINE,
        "            mine.error = failed\n", "            mine.finished = True\n",
    ),
    # --- R12: punching
    _one(
        "R12", "a punch does not look at the entry again", ENGINE,
        "<= self._durable_freeze and entries[chunk] != head\n", "<= self._durable_freeze\n",
        why_not="a write takes its chunks out of the queue before it stores their entries, so what is in the queue is "
        "never in the head; the look is the second of two",
    ),
    Mutation(
        "R12", "a punch looks neither at the queue nor at the entry again",
        (
            Edit(
                ENGINE,
                "                    if queue.get(chunk, self._durable_freeze + 1) <= self._durable_freeze and entries[chunk] != head\n",
                "",
            ),
            Edit(ENGINE, "                        del queue[chunk]\n", "                        queue.pop(chunk, None)\n"),
        ),
    ),
    _one(
        "R12", "a write leaves its chunks in the queue", ENGINE,
        "                self._punch_queue.pop(chunk, None)\n", "                pass\n",
        why_not="a punch looks at the entry again, under its claim, and the chunk of a write that is over is in the head",
    ),
    Mutation(
        "R12", "a write leaves its chunks in the queue, and a punch does not look at the entry",
        (
            Edit(ENGINE, "                self._punch_queue.pop(chunk, None)\n", "                pass\n"),
            Edit(ENGINE, "<= self._durable_freeze and entries[chunk] != head\n", "<= self._durable_freeze\n"),
        ),
    ),
    _one(
        "R12", "a punch does not wait until the zero is durable", ENGINE,
        "self._punch_queue[chunk] = self._freezes\n                else:", "self._punch_queue[chunk] = -1\n                else:",
    ),
    _one(
        "R12", "a punch does not wait for its claim", ENGINE,
        '                await self._locks.wait(claim)\n            try:\n                await self._point("punch.claimed")',
        '                pass\n            try:\n                await self._point("punch.claimed")',
    ),
    _one(
        "R12", "a leak is punched though the durable map may name it", ENGINE,
        "        self._marks[page] = DIRTY\n        self._dirty.add(page)\n\n    # --- draining", "        pass\n\n    # --- draining",
        why_not="a page in which the two maps differ has a mark already, and of what has none the first pass syncs the map",
    ),

    # --- R13: cancellation
    _one(
        "R13", "a cancelled pass does not give its segments and pages back", ENGINE,
        "            if not completed:  # cancelled", "            if False:  # cancelled",
    ),
    _one(
        "R13", "a cancelled pass does not wake who joined it", ENGINE,
        "            mine.done.set()\n", "            if mine.finished or mine.error:\n                mine.done.set()\n",
    ),
    _one(
        "R13", "a cancelled waiter stays in the queue of claims", "volume/chunklocks.py",
        "        except BaseException:\n            self.release(claim)\n            raise\n", "        finally:\n            pass\n",
    ),
    # --- R14 to R17: a seal
    _one(
        "R14", "a seal does not wait for its claim", ENGINE,
        "            await self._locks.wait(everything)\n            granted", "            granted",
    ),
    _one("R14", "pages that change during the copy are not copied again", ENGINE, "for page in self._changed:", "for page in ():"),
    _one(
        "R14", "a write does not note the page it changes", ENGINE,
        "                self._changed.add(page)\n                entries[chunk] = head\n", "                entries[chunk] = head\n",
    ),
    _one(
        "R15", "the live header does not name the new head", ENGINE,
        "                self._live.head = new_head.number\n                self._use_head", "                self._use_head",
    ),
    _one(
        "R15", "the live header names the new head only after the requests go on", ENGINE,
        "                self._live.head = new_head.number\n                self._use_head(new_head, table, codec)\n"
        '                await self._point("seal.switched")\n            finally:\n                self._locks.release(everything)\n',
        "                self._use_head(new_head, table, codec)\n"
        '                await self._point("seal.switched")\n            finally:\n                self._locks.release(everything)\n'
        "            for _ in range(12):\n                " + _MIDDLE + "            self._live.head = new_head.number\n",
    ),
    _one(
        "R16", "what was the head is forgotten at the switch", ENGINE,
        "        self._punch_queue.clear()\n", "        self._punch_queue.clear()\n        self._touched.clear()\n",
    ),
    _one(
        "R16", "a seal returns without a pass after the switch", ENGINE,
        '            await self.flush()\n            await self._point("seal.synced")', '            await self._point("seal.synced")',
    ),
    Mutation(
        "R16", "a pass moves the oldest unsynced layer to the head of its end",
        (Edit(ENGINE, "self._live.oldest_unsynced = head", "self._live.oldest_unsynced = self._head"),),
        shown_by="test_engine_seal.py::test_a_kill_after_a_pass_that_synced_before_the_pause_loses_nothing",
    ),
    _one(
        "R17", "the punch queue survives the switch", ENGINE, "        self._punch_queue.clear()\n", "",
        why_not="a punch goes by head and descriptors of its own moment: it meets a hole of the new head, which no map "
        "names, as a write to it would have taken the chunk out of the queue",
    ),

    Mutation(
        "R17", "find_leaks asks the head's own descriptors, which are closed after a seal",
        (
            Edit(
                ENGINE,
                "fd = open_segment(self._disk, self._dirfd, head, self._uuid_of(head), segment, writable=False)\n            try:",
                "fd = self._head_fds[segment]\n            try:",
            ),
            Edit(
                ENGINE,
                "            finally:\n                self._disk.close(fd)\n            if self._head != head:",
                "            finally:\n                pass\n            if self._head != head:",
            ),
        ),
    ),
    # --- R18: heads
    Mutation("R18", "a volume process is started on the head of the one before it", (), prepare=_stale_head),
    _one(
        "R18", "an engine does not store its head into the live header", ENGINE,
        "            live.head = head.number\n\n", "            pass\n\n",
    ),
    _one(
        "R18", "a snapshot that was given up takes the volume's new head back", SNAPSHOTS,
        "                t.note_not_taken(snapshot)\n            t.remove_snapshot",
        "                t.note_not_taken(snapshot)\n"
        "                t.set_volume_head(snapshot.volume, snapshot.new_head - 1)\n            t.remove_snapshot",
    ),
    # --- R19: growth, live map
    _one(
        "R19", "a growth does not wait for its claim", ENGINE,
        '            await self._locks.wait(everything)\n            try:\n                await self._point("grow.claimed")',
        '            try:\n                await self._point("grow.claimed")',
    ),
    _one(
        "R19", "an await between the copy of the live map and its use", ENGINE,
        "                live.replace(self._live)\n", "                live.replace(self._live)\n                " + _MIDDLE,
    ),
    _one(
        "R19", "a growth does not wait for the pass that uses the old map", ENGINE,
        "            if self._running is not None:  # it may be writing", "            if False:  # it may be writing",
    ),
    _one(
        "R19", "the longer live map does not get the marks", LIVE,
        "        self.marks[: len(old.marks)] = old.marks\n", "",
    ),
    _one(
        "R19", "the longer live map gets the entries of when it was made", LIVE,
        "        self.raw_entries[: len(old.raw_entries)] = old.raw_entries\n        self.marks", "        self.marks",
    ),
    _one(
        "R19", "the longer live map does not get the failed flag", LIVE,
        "        self._failed[0] = old._failed[0]\n", "",
        why_not="the engine looks whether it has stopped after it was granted everything, and no await follows",
    ),
    # --- R23, R24: a drain
    _one(
        "R23", "a drain does not look at the entry again", ENGINE,
        "if self._entries[chunk] != layer or layer not in self._exclusive:", "if layer not in self._exclusive:",
    ),
    _one(
        "R23", "a drain does not wait for its claim", ENGINE,
        '            await self._locks.wait(claim)\n        try:\n            await self._point("drain.claimed")',
        '            pass\n        try:\n            await self._point("drain.claimed")',
    ),
    _one(
        "R23", "what a drain could not read is said at once", ENGINE,
        "        read = await self._read_aside(layer, chunk)\n",
        "        read = await self._read_aside(layer, chunk)\n        if isinstance(read, Exception):\n            raise read\n",
    ),
    _one(
        "R24", "a seal leaves the list of exclusive layers", ENGINE,
        "        self._exclusive = frozenset()  # whatever the copy names has two maps now\n", "",
        why_not="what is drained of a layer that is shared takes space twice, and its content is the same",
    ),
    _one(
        "R24", "what was told as left stays told over a seal", ENGINE,
        "left, self._left, self._told = self.left, set(), set()", "left, self._left = self.left, set()",
    ),
    _one(
        "R24", "what left since it was told is taken back, too", ENGINE,
        "        self._told.difference_update(layers)\n",
        "        self._told.difference_update(layers)\n        self._left.difference_update(layers)\n",
        why_not="it costs space, until a whole sweep",
    ),
    _one(
        "R24", "what was left is asked for while a snapshot may be taken", LINEAGES,
        "        async with self.lock(lineage):\n            if not await self._catalogue.run(lambda t: t.is_settled(lineage)):\n                return 0\n            drained",
        "        if True:\n            if not await self._catalogue.run(lambda t: t.is_settled(lineage)):\n                return 0\n            drained",
    ),
    Mutation(
        "R24", "what was left is asked for while a snapshot is pending",
        (
            Edit(
                LINEAGES,
                "            if not await self._catalogue.run(lambda t: t.is_settled(lineage)):\n                return 0\n            drained",
                "            drained",
            ),
        ),
        shown_by="test_control_lineages.py::test_what_a_volume_left_is_not_asked_for_while_a_snapshot_is_pending",
    ),
    _one(
        "live map", "the magic is there before the entries are", LIVE,
        "            durable.read_into(live.raw_entries)\n            live._write_header(head, head)\n",
        "            live._write_header(head, head)\n            durable.read_into(live.raw_entries)\n",
    ),
    _one(
        "live map", "FROZEN is clean to who comes later", LIVE,
        "[page for page in range(len(marks)) if marks[page]]", "[page for page in range(len(marks)) if marks[page] == DIRTY]",
    ),
    # --- durable map, layers, table
    _one(
        "durable map", "sync does nothing", DURABLE,
        "        self._disk.fdatasync(self.fd)\n", "        pass\n",
    ),
    Mutation(
        "durable map", "a growth writes the header before the file is longer",
        (Edit(
            DURABLE,
            "        disk.ftruncate(fd, FIRST_ENTRY + entry_bytes(chunks))\n        disk.fdatasync(fd)\n"
            "        pwrite_all(disk, fd, encode_map_header(replace(header, chunks=chunks)), 0)\n        disk.fdatasync(fd)",
            "        pwrite_all(disk, fd, encode_map_header(replace(header, chunks=chunks)), 0)\n        disk.fdatasync(fd)\n"
            "        disk.ftruncate(fd, FIRST_ENTRY + entry_bytes(chunks))\n        disk.fdatasync(fd)",
        ),),
        shown_by=_GROWN_MAP,
    ),
    Mutation(
        "durable map", "a growth does not sync the longer file before the header",
        (Edit(
            DURABLE,
            "        disk.ftruncate(fd, FIRST_ENTRY + entry_bytes(chunks))\n        disk.fdatasync(fd)\n",
            "        disk.ftruncate(fd, FIRST_ENTRY + entry_bytes(chunks))\n",
        ),),
        shown_by=_GROWN_MAP,
    ),
    _one(
        "durable map", "a growth does not sync the header", DURABLE,
        "encode_map_header(replace(header, chunks=chunks)), 0)\n        disk.fdatasync(fd)",
        "encode_map_header(replace(header, chunks=chunks)), 0)",
    ),
    _one(
        "durable map", "a full disk fails what has its blocks", DURABLE,
        "                if error.errno not in (errno.ENOSPC, errno.EDQUOT):\n                    raise\n", "                raise\n",
    ),
    _one(
        "layers", "the directory of a new head is not synced", LAYERS,
        "            disk.ftruncate(fd, length)\n            disk.fsync(fd)\n    disk.fsync(dirfd)\n",
        "            disk.ftruncate(fd, length)\n            disk.fsync(fd)\n",
    ),
    _one(
        "layers", "the files of a new head are not synced", LAYERS,
        "            disk.ftruncate(fd, length)\n            disk.fsync(fd)\n    disk.fsync(dirfd)\n",
        "            disk.ftruncate(fd, length)\n    disk.fsync(dirfd)\n",
    ),
    _one(
        "layers", "a head that grew is not synced", LAYERS,
        "                disk.ftruncate(fd, length)\n            disk.fsync(fd)\n        finally", "                disk.ftruncate(fd, length)\n        finally",
    ),
    _one(
        "layers", "a sealed layer is made read-only without a sync", LAYERS,
        "            disk.fchmod(fd, 0o440)\n            disk.fsync(fd)\n", "            disk.fchmod(fd, 0o440)\n",
        why_not="the pass after the switch, or the salvage before a detached snapshot, has synced its data",
    ),
    _one(
        "layer table", "an append is not synced", "store/layertable.py",
        "        pwrite_all(disk, fd, wanted, at)\n        disk.fdatasync(fd)\n", "        pwrite_all(disk, fd, wanted, at)\n",
        why_not="a power cut takes the last entry then, and the first sweep completes the table by the rows of the catalog; "
        "test_layer_table.py shows it for the table alone",
    ),
    Mutation(
        "layer table", "an entry that was seen, and perhaps never synced, is counted and built on",
        (
            Edit("store/layertable.py", "    _sync(disk, path)\n    for layer in layers", "    for layer in layers"),
            Edit("store/layertable.py", "    _sync(disk, path)\n    return table\n", "    return table\n"),
        ),
        "as before: the last entry is completed by the rows; test_layer_table.py has two in a row, of which one is lost",
    ),
    Mutation(
        "layer table", "nothing syncs it",
        (
            Edit("store/layertable.py", "    _sync(disk, path)\n    for layer in layers", "    for layer in layers"),
            Edit("store/layertable.py", "    _sync(disk, path)\n    return table\n", "    return table\n"),
            Edit("store/layertable.py", "        pwrite_all(disk, fd, wanted, at)\n        disk.fdatasync(fd)\n", "        pwrite_all(disk, fd, wanted, at)\n"),
        ),
    ),

    # --- salvage
    Mutation(
        "salvage", "entries are applied without a sync of their data",
        (
            Edit(SALVAGE, "                sync_layer(disk, dirfd, layer, table.uuid_of(layer))\n", "                pass\n"),
            Edit(SALVAGE, "        for fd in data_fds:\n            disk.fdatasync(fd)\n", ""),
        ),
    ),
    _one(
        "salvage", "only the head is synced, not what was the head lately", SALVAGE,
        "                sync_layer(disk, dirfd, layer, table.uuid_of(layer))\n", "                pass\n",
    ),
    _one(
        "salvage", "the head's own descriptors are not synced", SALVAGE,
        "        for fd in data_fds:\n            disk.fdatasync(fd)\n", "",
        why_not="the layers from the oldest unsynced one to the head are synced by name; these descriptors are there for "
        "errors of write-back that a newer descriptor does not report, which the world does not have",
    ),
    _one("salvage", "entries are not applied", SALVAGE, "            durable.write_page(page, live.page(page))\n", "            pass\n"),
    Mutation(
        "salvage", "the live map is removed before its entries are applied",
        (
            Edit(SALVAGE, "        for fd in data_fds:\n", "        disk.unlink(path)\n        for fd in data_fds:\n"),
            Edit(SALVAGE, "        durable.sync()\n        disk.unlink(path)\n", "        durable.sync()\n"),
        ),
    ),
    _one(
        "salvage", "the map is not synced", SALVAGE, "        durable.sync()\n        disk.unlink(path)\n", "        disk.unlink(path)\n",
        why_not="the first pass of the next engine syncs the map (R10) before it answers a flush, a sweep syncs what it "
        "read, and the sealed map of a detached snapshot is a file of its own",
    ),
    _one("salvage", "a live map whose engine failed is applied", SALVAGE, "        if live.failed:\n", "        if False:\n"),
    # --- sweep
    Mutation(
        "sweep", "of all maps: they are not synced before the punch",
        (Edit(SWEEP, "    for source in sources:\n        source.sync()\n", ""),),
        shown_by="test_store_sweep.py::test_a_map_is_made_durable_after_it_was_read_and_before_anything_goes",
    ),
    _one(
        "sweep", "by relatives: maps are not synced before the punch", SWEEP,
        "    for source in relatives.values():\n        source.sync()\n", "",
    ),
    Mutation(
        "sweep", "a durable map is not held from before the flush",
        (Edit(SWEEP, "        if self._held is not None:\n", "        if False:\n"),),
        shown_by="test_store_sweep.py::test_a_map_whose_sync_failed_since_it_was_held_stops_the_sweep",
    ),
    Mutation(
        "sweep", "maps beyond the relatives are not synced before the punch",
        (
            Edit(
                SWEEP, "            left -= _layers_of(memoryview(block), table, source.name)\n        source.sync()\n",
                "            left -= _layers_of(memoryview(block), table, source.name)\n",
            ),
        ),
        shown_by="test_store_sweep.py::test_maps_beyond_the_relatives_are_durable_before_anything_goes",
    ),
    Mutation(
        "sweep", "the sync of a durable map does nothing",
        (
            Edit(SWEEP, "            self._disk.fdatasync(fd)\n", "            pass\n"),
            Edit(SWEEP, "            self._disk.fdatasync(self._held)\n", ""),
        ),
    ),
    Mutation(
        "sweep", "heads are not protected",
        (
            Edit(LINEAGE_FILES, "return frozenset((volume.head,))", "return frozenset()"),
            Edit(LINEAGE_FILES, "return frozenset((volume.head, *own))", "return frozenset(own)"),
        ),
    ),
    _one(
        "sweep", "what an attached process may write is not protected", LINEAGE_FILES,
        "return frozenset((volume.head, *own))", "return frozenset((volume.head,))",
    ),
    _one(
        "sweep", "layers that are being made are not protected", LINEAGES,
        "    return made.union(", "    return frozenset[int]().union(",
        why_not="of an attached volume every layer from its process's head on is protected, of a detached one its newest "
        "head; a lineage with a volume that is being made is not swept at all",
    ),
    _one(
        "sweep", "a sweep does not flush first", LINEAGES, "            await link.flush()\n        return True", "        return True",
    ),
    Mutation(
        "sweep", "a lineage is swept while a live map waits for its salvage",
        (
            Edit(LINEAGES, "(VolumeState.CREATING, VolumeState.ERROR)", "(VolumeState.CREATING,)"),
            Edit(
                LINEAGES,
                "            if link is None:\n                return False\n",
                "            if link is None:\n                continue\n",
            ),
        ),
    ),
    Mutation(
        "sweep", "a snapshot does not hold the lineage's lock, so one may be pending in a sweep",
        (
            Edit(
                SNAPSHOTS,
                "        async with self._volumes.lock(found.id), self._lineages.lock(found.lineage):\n            await self.settle_pending",
                "        async with self._volumes.lock(found.id):\n            await self.settle_pending",
            ),
        ),
    ),
    Mutation(
        "sweep", "the same, and the layers are chosen after the maps are read",
        (
            Edit(
                SNAPSHOTS,
                "        async with self._volumes.lock(found.id), self._lineages.lock(found.lineage):\n            await self.settle_pending",
                "        async with self._volumes.lock(found.id):\n            await self.settle_pending",
            ),
            Edit(
                SWEEP,
                "    chosen = _choose(disk, dirfd, table, protected, rows)\n",
                "    class Early:\n        def __init__(self, m):\n            self.name, self.sync = m.name, m.sync\n"
                "            self.blocks = list(m.read())\n        def read(self):\n            return iter(self.blocks)\n"
                "    maps = [Early(m) for m in maps]\n    chosen = _choose(disk, dirfd, table, protected, rows)\n",
            ),
        ),
    ),
    _one(
        "sweep", "a pending snapshot does not stop a sweep", LINEAGES,
        "    if any(snapshot.state is SnapshotState.PENDING for snapshot in snapshots):\n        return False\n", "",
        why_not="while one is taken the lock of the lineage keeps sweeps off, and after a crash it is settled first; one "
        "that cannot be has no map under its final name, so the sweep reads no map and touches nothing",
    ),
    _one(
        "sweep", "the maps of snapshots are not counted", LINEAGE_FILES,
        "        maps += [SealedSource(self._disk, self._state.map(snapshot.id), snapshot.id) for snapshot in snapshots]\n", "",
    ),
    _one(
        "sweep", "by relatives: the maps of volumes are not counted", LINEAGE_FILES,
        "relatives={ident: self._source(ident, held) for ident in relatives},",
        'relatives={ident: self._source(ident, held) for ident in relatives if ident.startswith("snap-")},',
    ),
    _one(
        "sweep", "by relatives: the maps of snapshots are not counted", LINEAGE_FILES,
        "relatives={ident: self._source(ident, held) for ident in relatives},",
        'relatives={ident: self._source(ident, held) for ident in relatives if ident.startswith("vol-")},',
    ),
    _one(
        "sweep", "by relatives: what may be written is not protected", LINEAGE_FILES,
        "                },\n                protected=protected,\n", "                },\n                protected=(),\n",
        why_not="what a deleted map named or its volume left is sealed, and the layers that were made for its own writing "
        "lie before the head that its volume got when it was taken",
    ),
    _one(
        "sweep", "the files of a snapshot go before its row", SNAPSHOTS,
        "            snapshot = await self._catalogue.run(forget)\n            if snapshot is None",
        "            await trio.to_thread.run_sync(self._files.remove, found.id)\n            snapshot = await self._catalogue.run(forget)\n            if snapshot is None",
    ),
    # --- finishing a snapshot
    _one(
        "snapshot", "the sealed map is not synced", PROCESS, "        self._disk.fsync(output)\n", "        pass\n",
    ),
    _one(
        "snapshot", "the map has its final name before the record is there", SNAPSHOT_FILES,
        "            self._write_record(snapshot, signed, authority)\n"
        "            self._disk.rename(self._new_map(snapshot.id), self._state.map(snapshot.id))\n",
        "            self._disk.rename(self._new_map(snapshot.id), self._state.map(snapshot.id))\n"
        "            self._write_record(snapshot, signed, authority)\n",
    ),
    _one(
        "snapshot", "the final name of the map is not synced", SNAPSHOT_FILES,
        "            self._disk.rename(self._new_map(snapshot.id), self._state.map(snapshot.id))\n"
        "            fsync_directory(self._disk, self._state.maps)\n",
        "            self._disk.rename(self._new_map(snapshot.id), self._state.map(snapshot.id))\n",
    ),
    _one(
        "snapshot", "the row is final before the files are", SNAPSHOTS,
        "        await trio.to_thread.run_sync(self._files.finish, snapshot, sealed.record, None)\n",
        "        await self._commit(snapshot, _served_head(volume), 0)\n"
        "        await trio.to_thread.run_sync(self._files.finish, snapshot, sealed.record, None)\n",
    ),
    _one(
        "snapshot", "the record that knows the new head is not written before the switch", SNAPSHOTS,
        "        await trio.to_thread.run_sync(self._volume_files.write_signed_record, volume.id, record)\n", "",
    ),
    _one(
        "snapshot", "a pending snapshot with a complete map is not asked for", SNAPSHOTS,
        "        if await trio.to_thread.run_sync(self._files.exists, snapshot.id):\n            return True\n", "",
        why_not="nobody was told that it was taken: removing it is as right as finishing it, only less kind",
    ),
    _one(
        "record", "a record is renamed into place without a sync", "store/atomic.py",
        "            pwrite_all(disk, fd, data, 0)\n            disk.fsync(fd)\n", "            pwrite_all(disk, fd, data, 0)\n",
    ),
    _one(
        "record", "the name of a record is not synced", "store/atomic.py",
        "    fsync_directory(disk, path.parent)\n", "",
    ),
)  # fmt: skip

SEEDS: dict[str, int] = {
    "R10: neither a salvage nor a first pass without news syncs the map": 69,
    "R10: the first pass does not sync sealed layers": 21,
    "R10: the first pass does not sync the head": 168,
    "R10: the first pass is like any other": 28,
    "R11: after an error in a pass the engine goes on": 4,
    "R11: the failed flag is not stored": 5,
    "R11: who joined a pass that failed is answered": 4,
    "R12: a punch does not wait for its claim": 187,
    "R12: a punch does not wait until the zero is durable": 7,
    "R12: a punch looks neither at the queue nor at the entry again": 5,
    "R12: a write leaves its chunks in the queue, and a punch does not look at the entry": 2,
    "R13: a cancelled pass does not give its segments and pages back": 130,
    "R13: a cancelled pass does not wake who joined it": 4,
    "R13: a cancelled waiter stays in the queue of claims": 16,
    "R14: a seal does not wait for its claim": 10,
    "R14: a write does not note the page it changes": 16,
    "R14: pages that change during the copy are not copied again": 6,
    "R15: the live header does not name the new head": 1,
    "R15: the live header names the new head only after the requests go on": 18,
    "R16: a seal returns without a pass after the switch": 1,
    "R16: what was the head is forgotten at the switch": 136,
    "R17: find_leaks asks the head's own descriptors, which are closed after a seal": 5,
    "R18: a snapshot that was given up takes the volume's new head back": 118,
    "R18: a volume process is started on the head of the one before it": 118,
    "R18: an engine does not store its head into the live header": 9,
    "R19: a growth does not wait for its claim": 109,
    "R19: a growth does not wait for the pass that uses the old map": 19,
    "R19: an await between the copy of the live map and its use": 67,
    "R19: the longer live map does not get the marks": 57,
    "R19: the longer live map gets the entries of when it was made": 22,
    "R1: a discard does not wait for its claim": 271,
    "R1: a read has no claim": 115,
    "R1: a write does not wait for its claim": 19,
    "R2: a claim overtakes the ones that only wait": 16,
    "R3: the entry is stored before the data": 113,
    "R3: the rest of a chunk that the head does not hold is not copied": 1,
    "R4: no blocks are asked for before the data of a write": 7,
    "R5: a discard does not mark its page": 48,
    "R5: a write does not mark its page": 14,
    "R5: a write does not tell the next pass of its page": 3,
    "R6: an await between the encryption and its pwrite": 0,
    "R6: the segment is marked as touched before its pwrite, with an await between": 11,
    "R7: the copies are written before the data is synced": 77,
    "R7: the data is not synced": 2,
    "R7: the map is not synced": 0,
    "R7: the pass writes entries as they are now, not its copies": 59,
    "R7: two passes run at a time": 4,
    "R8: a flush joins a pass that has frozen": 8,
    "R9: marks are cleared at the freeze": 32,
    "R9: marks are cleared without a look whether they are FROZEN": 122,
    "R23: a drain does not look at the entry again": 0,
    "R23: a drain does not wait for its claim": 110,
    "R23: what a drain could not read is said at once": 234,
    "R24: what was told as left stays told over a seal": 47,
    "R24: what was left is asked for while a snapshot may be taken": 21,
    "durable map: a full disk fails what has its blocks": 1,
    "durable map: a growth does not sync the header": 0,
    "durable map: sync does nothing": 0,
    "layer table: nothing syncs it": 5,
    "layers: a head that grew is not synced": 1,
    "layers: the directory of a new head is not synced": 5,
    "layers: the files of a new head are not synced": 0,
    "live map: FROZEN is clean to who comes later": 32,
    "live map: the magic is there before the entries are": 175,
    "record: a record is renamed into place without a sync": 0,
    "record: the name of a record is not synced": 7,
    "salvage: a live map whose engine failed is applied": 5,
    "salvage: entries are applied without a sync of their data": 3,
    "salvage: entries are not applied": 7,
    "salvage: only the head is synced, not what was the head lately": 3,
    "salvage: the live map is removed before its entries are applied": 175,
    "snapshot: the final name of the map is not synced": 0,
    "snapshot: the map has its final name before the record is there": 984,
    "snapshot: the record that knows the new head is not written before the switch": 3,
    "snapshot: the row is final before the files are": 1,
    "snapshot: the sealed map is not synced": 0,
    "sweep: a lineage is swept while a live map waits for its salvage": 90,
    "sweep: a snapshot does not hold the lineage's lock, so one may be pending in a sweep": 2,
    "sweep: a sweep does not flush first": 139,
    "sweep: what an attached process may write is not protected": 2258,
    "sweep: by relatives: maps are not synced before the punch": 901,
    "sweep: by relatives: the maps of snapshots are not counted": 119,
    "sweep: by relatives: the maps of volumes are not counted": 5,
    "sweep: heads are not protected": 0,
    "sweep: the files of a snapshot go before its row": 125,
    "sweep: the maps of snapshots are not counted": 15,
    "sweep: the same, and the layers are chosen after the maps are read": 2,
    "sweep: the sync of a durable map does nothing": 1755,
}
"""Mutation -> a seed whose schedule, with the focus of the mutation, breaks a promise."""
