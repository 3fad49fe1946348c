"""The verifier: reads every chunk that a volume or snapshot stores and compares it with its leaf.

Started by ebsd for one verification and told everything over descriptor 0 (``start``, ``progress``, ``finish``).

1. With a data key the record is believed first, then map, table and root, as for an attachment. Where all of that is
   signed, the leaves are, and what agrees with them is *authentic*. Without a key, and where no signature covers the
   leaves, comparing finds damage and not tampering (*integrity*), and the report says so.
2. It goes on after damage: each damaged chunk is reported, with the reason.
3. With a key it hashes what nobody hashed, and signs a snapshot whose leaves were not signed. Nothing else is written.
   What is hashed now proves nothing about earlier times, and is counted by itself.
"""

from __future__ import annotations

import base64
import contextlib
import logging
import mmap
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import trio

from ebsd.crypto.secret import Secret
from ebsd.domain.errors import EbsdError, IncorrectState, StoreDamaged
from ebsd.domain.geometry import chunk_count
from ebsd.domain.units import CHUNK, CHUNKS_PER_SEGMENT
from ebsd.ipc.channel import Channel, ChannelClosed, ChannelHandler, serve
from ebsd.ipc.incidents import as_ebsd_error, log_incident
from ebsd.store.disk import UNREADABLE, Disk, RealDisk
from ebsd.store.durablemap import DurableMap
from ebsd.store.entries import check_map_structure, named_layers
from ebsd.store.layers import segment_name
from ebsd.store.layertable import LayerTable
from ebsd.store.leaftable import NAME as LEAF_TABLE
from ebsd.store.leaftable import leaf_root, read_slots
from ebsd.store.leaves import leaf_file_name, named_ranges
from ebsd.store.record import Record
from ebsd.store.sealedmap import SealedMap
from ebsd.store.signedrecord import NO_HASH, RecordState, SignedBody, parse_signed
from ebsd.volume import keysession
from ebsd.volume.copier import STEP, Run, SourceFiles, data_chunks, runs
from ebsd.volume.hashing import LeafChecks, hash_layer, late_runs, slots_of
from ebsd.volume.inputs import claim_of, found_in, record_of, sealed_map_of, table_of
from ebsd.volume.leafdigests import leaf_digests
from ebsd.volume.pacing import Pacer
from ebsd.volume.verify import Claim, check_leaf_root, covered_layers, sign, verify
from ebsd.volume.verify_snapshot import believe_snapshot, check_snapshot_map, check_snapshot_table
from ebsd.volume.worker import enclosing, run_worker

log = logging.getLogger("ebsd-verifier")

MOST_DAMAGE: Final = 500
"""Entries of damage that are listed; all damaged chunks are counted."""

NOTE_SECONDS: Final = 2.0
"""How much time a verifier that is killed may have spent in vain."""

CHANGED: Final = "it has changed since it was hashed"


@dataclass(frozen=True, slots=True)
class Damage:
    """Consecutive chunks of one file that are damaged in one way; a whole file when there are none."""

    layer: int
    file: str
    reason: str
    first: int = 0
    chunks: int = 0

    def as_members(self, size: int) -> dict[str, Any]:
        """Return the members of io.ebsd.Control's Damage; offset and length are those in a volume of ``size`` bytes."""
        members: dict[str, Any] = {"Layer": self.layer, "File": self.file, "Reason": self.reason}
        if self.chunks:
            offset = self.first * CHUNK
            end = min((self.first + self.chunks) * CHUNK, size)
            members |= {"Chunk": self.first, "Chunks": self.chunks, "Offset": offset, "Length": end - offset}
        return members


@dataclass(frozen=True, slots=True)
class Subject:
    """What is verified: its map, the layers that it names, and how far signatures reach."""

    claim: Claim
    table: LayerTable
    entries: memoryview
    """u32 per chunk, format I."""
    head: int
    """The layer that takes writes; 0 for a snapshot."""
    own: SignedBody
    covering: SignedBody | None
    """The signed body that covers map and leaves, as far as it was checked; None: nobody signed yet."""
    covered: frozenset[int]
    """The layers whose leaves the root in ``covering`` is over."""
    map_is_signed: bool
    sealed: SealedMap | None
    """The map of a snapshot."""


class ChunkCheck:
    """Compares every stored chunk with its leaf: ``run`` in a thread, all else may be called from any other."""

    def __init__(
        self,
        disk: Disk,
        dirfd: int,
        subject: Subject,
        *,
        hash_missing: bool,
        rate: int = 0,
        done_through: int = 0,
        checkpoint: Mapping[str, Any] | None = None,
    ) -> None:
        """Borrow ``dirfd``, the lineage directory. ``rate``: bytes per second at most, 0 for no limit.

        Below ``done_through`` an earlier worker checked everything, and ``checkpoint`` is what it had found.
        """
        self._disk = disk
        self._dirfd = dirfd
        self._subject = subject
        self._table = subject.table
        self._hash_missing = hash_missing
        self._files = SourceFiles(disk, dirfd, subject.table, direct=True)
        self._leaves = LeafChecks(disk, dirfd, subject.table.lineage)
        self._buffer = memoryview(mmap.mmap(-1, STEP))
        self._stopping = threading.Event()
        self._bad_files: set[int] = set()
        self.total = data_chunks(subject.entries) * CHUNK
        self.done = 0
        self.chunks = 0
        self.without_leaf = 0
        self.hashed_now = 0
        self.damaged_chunks = 0
        self.damage: list[Damage] = []
        self.complete = True
        """Whether ``damage`` lists all."""
        self.pacer = Pacer(rate)
        self._first = done_through
        if checkpoint:
            self._take_over(checkpoint)
        self.durable = (done_through, self._checkpoint())
        """How far another worker need not look again, and what it must know for that."""

    def _take_over(self, checkpoint: Mapping[str, Any]) -> None:
        self.done = int(checkpoint["Bytes"])
        self.chunks, self.without_leaf, self.hashed_now, self.damaged_chunks = (
            int(count) for count in checkpoint["Counts"]
        )
        self.damage = [Damage(*each) for each in checkpoint["Damage"]]
        self._bad_files = set(checkpoint["BadFiles"])
        self.complete = bool(checkpoint["Complete"])

    def _checkpoint(self) -> dict[str, Any]:
        return {
            "Bytes": self.done,
            "Counts": [self.chunks, self.without_leaf, self.hashed_now, self.damaged_chunks],
            "Damage": [[each.layer, each.file, each.reason, each.first, each.chunks] for each in self.damage],
            "BadFiles": sorted(self._bad_files),
            "Complete": self.complete,
        }

    def stop(self) -> None:
        self._stopping.set()

    def run(self) -> None:
        """Check everything. Raises Stopped, and what is not damage but an error: EbsdError, OSError."""
        try:
            if self._hash_missing:
                self._hash()
            noted = time.monotonic()
            for run in runs(self._subject.entries, self._first):
                self._go_on()
                self._check(run)
                self.done += run.chunks * CHUNK
                self.pacer.spend(run.chunks * CHUNK, self._stopping)
                if time.monotonic() - noted >= NOTE_SECONDS:
                    self.durable = (run.first + run.chunks, self._checkpoint())
                    noted = time.monotonic()
        finally:
            self._files.close()
            self._leaves.close()

    def note_file(self, layer: int, file: str, reason: str) -> None:
        """Note damage of a file that is not a chunk's."""
        self._note(Damage(layer, file, reason))

    def _go_on(self) -> None:
        if self._stopping.is_set():
            raise Stopped

    def _hash(self) -> None:
        entries, table = self._subject.entries, self._table
        layers = named_layers(entries) - {self._subject.head}
        try:
            _, missing = slots_of(self._disk, self._dirfd, table.lineage, {n: table.uuid_of(n) for n in layers})
        except StoreDamaged:
            return  # told where the leaves of its layers are looked up
        for layer in missing:
            uuid = table.uuid_of(layer)
            try:
                wanted = late_runs(self._disk, self._dirfd, layer, uuid, named_ranges(entries, layer))
                self.total += wanted.chunks * CHUNK
                hash_layer(self._disk, self._dirfd, table.lineage, layer, uuid, wanted, self._hashed)
            except (StoreDamaged, OSError) as exc:
                if isinstance(exc, OSError) and exc.errno not in UNREADABLE:
                    raise
                log.error("layer %d was not hashed: %s", layer, exc)  # what cannot be read is reported below
            else:
                self.hashed_now += sum(end - first for first, end in named_ranges(entries, layer))

    def _hashed(self, chunks: int) -> None:
        self._go_on()
        self.pacer.spend(chunks * CHUNK, self._stopping)
        self.done += chunks * CHUNK

    def _check(self, run: Run) -> None:
        view = self._buffer[: run.chunks * CHUNK]
        try:
            self._files.fetch(run, view)
        except StoreDamaged as exc:
            if run.chunks > 1:  # which of them?
                for chunk in range(run.first, run.first + run.chunks):
                    self._check(Run(chunk, 1, run.layer))
            else:
                self.chunks += 1
                self._damaged(run.layer, run.first, str(exc.facts["reason"]))
            return
        uuid = self._table.uuid_of(run.layer)
        wanted = [self._leaf(run.layer, uuid, run.first + at) for at in range(run.chunks)]
        found = leaf_digests(uuid, run.first, view) if any(wanted) else []
        for at, leaf in enumerate(wanted):
            chunk = run.first + at
            self.chunks += 1
            if leaf is None:
                self.without_leaf += 1
            elif found[at] != leaf:
                self._damaged(run.layer, chunk, CHANGED)

    def _leaf(self, layer: int, uuid: bytes, chunk: int) -> bytes | None:
        if layer == self._subject.head or layer in self._bad_files:
            return None
        try:
            if not self._leaves.knows(layer):
                self._leaves.load(layer, uuid)()
            return self._leaves.leaf(layer, chunk)
        except EbsdError as exc:
            self._bad_files.add(layer)
            file = str(exc.facts.get("file", leaf_file_name(layer, uuid)))
            self.note_file(layer, file, str(exc.facts.get("reason", exc.message.removesuffix("."))))
            return None

    def _damaged(self, layer: int, chunk: int, reason: str) -> None:
        self.damaged_chunks += 1
        file = segment_name(layer, self._table.uuid_of(layer), chunk // CHUNKS_PER_SEGMENT)
        if self.damage:
            last = self.damage[-1]
            if (last.layer, last.file, last.reason, last.first + last.chunks) == (layer, file, reason, chunk):
                self.damage[-1] = replace(last, chunks=last.chunks + 1)
                return
        self._note(Damage(layer, file, reason, chunk, 1))

    def _note(self, damage: Damage) -> None:
        if len(self.damage) < MOST_DAMAGE:
            self.damage.append(damage)
        else:
            self.complete = False


class Stopped(Exception):
    """ebsd is gone."""


class Verifier:
    """One verification, from ``start`` to ``result``."""

    def __init__(self, disk: Disk | None = None) -> None:
        self._disk: Disk = disk or RealDisk()
        self._fds: list[int] = []
        self._key: Secret | None = None
        self._subject: Subject | None = None
        self._check: ChunkCheck | None = None
        self._has_key = False
        self._result: dict[str, Any] | None = None
        self._error: EbsdError | None = None
        self._nursery: trio.Nursery | None = None

    async def run(self, parent: socket.socket) -> None:
        """Serve ebsd until it is gone."""
        handlers: dict[str, ChannelHandler] = {
            "start": self._start, "progress": self._progress, "finish": self._finish
        }  # fmt: skip
        async with trio.open_nursery() as nursery, Channel(parent) as channel:
            self._nursery = nursery
            try:
                with contextlib.suppress(ChannelClosed):
                    await serve(channel, enclosing(handlers))
            finally:
                if self._check is not None:
                    self._check.stop()
                nursery.cancel_scope.cancel()

    # --- requests of ebsd

    async def _start(self, params: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], Sequence[int]]:
        """Believe the record and begin.

        {"Resource": {"ResourceId", "Owner", "Lineage", "Size", "Cipher", "KeyArn", "Head" (0 for a snapshot),
        "AuthorityIds"}, "Record": in base64, "WithKey", "DoneThrough", "Checkpoint", "Rate"}. Descriptors: a key
        session when WithKey, lineage directory, map. {} as answer. Raises IntegrityFailure, RecordTooOld, the error of
        the session.
        """
        if self._subject is not None:
            raise IncorrectState(reason="This verifier has begun already")
        self._fds = fds
        self._subject = await trio.to_thread.run_sync(self._prepare, params)
        if self._nursery is None:
            raise AssertionError("BUG: a request before run")
        self._nursery.start_soon(self._work)
        return {}, ()

    async def _progress(self, params: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], Sequence[int]]:
        """{"Rate"} -> {"State": checking, done or failed, "Done", "Total", "DoneThrough", "Checkpoint", "Error"?}.

        Bytes of stored chunks, those that are hashed first included.
        """
        check = self._check
        if check is None:
            raise IncorrectState(reason="This verifier has not begun")
        check.pacer.limit(int(params.get("Rate", 0)))
        state = "done" if self._result is not None else "failed" if self._error is not None else "checking"
        done_through, checkpoint = check.durable
        answer: dict[str, Any] = {
            "State": state,
            "Done": check.done,
            "Total": check.total,
            "DoneThrough": done_through,
            "Checkpoint": checkpoint,
        }
        if self._error is not None:
            answer["Error"] = {"Code": self._error.code, "Message": self._error.message, "Hint": self._error.hint}
        return answer, ()

    async def _finish(self, params: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], Sequence[int]]:
        """{} -> what ``_report`` returns."""
        if self._result is None:
            raise IncorrectState(reason="The verification has not ended")
        return self._result, ()

    # --- in a thread

    async def _work(self) -> None:
        try:
            self._result = await trio.to_thread.run_sync(self._run, abandon_on_cancel=True)
        except Stopped:
            pass
        except EbsdError as exc:
            self._error = exc
        except Exception as exc:  # noqa: BLE001 - reported as an incident
            self._error = as_ebsd_error(exc, log_incident)

    def _prepare(self, params: dict[str, Any]) -> Subject:
        members = params["Resource"]
        head = int(members["Head"])
        sources = frozenset(str(item) for item in members["AuthorityIds"])
        claim = replace(claim_of(members, head=head), sources=sources)
        self._has_key = bool(params["WithKey"])
        answer: keysession.Answer | None = None
        if self._has_key:
            answer = keysession.ask(socket.socket(fileno=self._fds.pop(0)))
            self._key = answer.data_key
        lineage_fd, map_fd = self._fds
        with found_in(claim):
            record = record_of(params["Record"])
            if answer is None:
                subject = self._unbelieved(claim, record, lineage_fd, map_fd)
            elif head:
                subject = self._believed_volume(claim, answer, record, lineage_fd, map_fd)
            else:
                subject = self._believed_snapshot(claim, answer, record, lineage_fd, map_fd)
        self._check = ChunkCheck(
            self._disk,
            lineage_fd,
            subject,
            hash_missing=self._has_key,
            rate=int(params.get("Rate", 0)),
            done_through=min(int(params.get("DoneThrough", 0)), len(subject.entries)),
            checkpoint=params.get("Checkpoint"),
        )
        return subject

    def _believed_snapshot(
        self, claim: Claim, answer: keysession.Answer, record: Record, lineage_fd: int, map_fd: int
    ) -> Subject:
        believed = believe_snapshot(claim, answer.anchor, answer.data_key, record, claim.sources)
        table = table_of(self._disk, lineage_fd, believed.table_count)
        check_snapshot_table(claim, believed, table)
        sealed = sealed_map_of(self._disk, map_fd, claim)
        unverified = check_snapshot_map(claim, believed, sealed)
        own, covering = believed.own, believed.covering
        covered = frozenset(covered_layers(covering, sealed.entries))
        subject = Subject(claim, table, sealed.entries, 0, own, covering, covered, not unverified, sealed)
        self._check_root(subject, lineage_fd)
        return subject

    def _believed_volume(
        self, claim: Claim, answer: keysession.Answer, record: Record, lineage_fd: int, map_fd: int
    ) -> Subject:
        table = table_of(self._disk, lineage_fd, None)
        entries = self._durable_entries(claim, map_fd)
        verdict = verify(claim, answer.anchor, answer.data_key, record, table, entries)
        cut = entries[: chunk_count(claim.size)]
        covered = frozenset(covered_layers(verdict.covering, cut))
        signed = not verdict.unverified
        subject = Subject(claim, table, cut, claim.head, verdict.body, verdict.covering, covered, signed, None)
        self._check_root(subject, lineage_fd)
        return subject

    def _check_root(self, subject: Subject, lineage_fd: int) -> None:
        """Compare the leaf table with the root. Raises IntegrityFailure, StoreDamaged."""
        uuids = {layer: subject.table.uuid_of(layer) for layer in subject.covered}
        slots = read_slots(self._disk, lineage_fd, subject.table.lineage, uuids)
        check_leaf_root(subject.claim, subject.covering, subject.covered, slots)

    def _unbelieved(self, claim: Claim, record: Record, lineage_fd: int, map_fd: int) -> Subject:
        """Take record, table and map for what they say, when their structure is right."""
        table = table_of(self._disk, lineage_fd, None)
        own = record.body()
        if own.resource != claim.volume:
            raise StoreDamaged(file="record", reason=f"it is that of {own.resource}")
        covering: SignedBody | None = own
        if own.state is RecordState.BORN:
            covering = None if record.authority is None else parse_signed(record.authority, file="authority")
        sealed = None
        if claim.head:
            entries = self._durable_entries(claim, map_fd)[: chunk_count(claim.size)]
        else:
            sealed = sealed_map_of(self._disk, map_fd, claim)
            entries = sealed.entries
        check_map_structure(entries, chunk_count(claim.size), table.numbers(), file="map")
        covered = frozenset(covered_layers(covering, entries))
        return Subject(claim, table, entries, claim.head, own, covering, covered, False, sealed)

    def _durable_entries(self, claim: Claim, fd: int) -> memoryview:
        durable = DurableMap.from_fd(self._disk, fd, "map")
        if (durable.header.volume, durable.header.lineage) != (claim.volume, claim.lineage):
            raise StoreDamaged(file="map", reason=f"it is that of {durable.header.volume}")
        return durable.entries()

    def _run(self) -> dict[str, Any]:
        subject, check = self._subject, self._check
        if subject is None or check is None:
            raise AssertionError("BUG: a run before start")
        try:
            if not self._has_key:
                self._compare_root(subject, check)
            check.run()
            return self._report(subject, check)
        finally:
            if self._key is not None:
                self._key.wipe()

    def _compare_root(self, subject: Subject, check: ChunkCheck) -> None:
        """Without a key, a root that disagrees is damage like another: nobody knows which of the two is wrong."""
        try:
            self._check_root(subject, self._fds[0])
        except EbsdError as exc:
            check.note_file(0, LEAF_TABLE, str(exc.facts["reason"]))

    def _report(self, subject: Subject, check: ChunkCheck) -> dict[str, Any]:
        """Return {"Kind": authenticity or integrity, "Why" not the former, "Chunks", "Bytes", "WithoutLeaf",
        "HashedNow", "DamagedChunks", "Damage", "Complete", "Record", "Generation": of a snapshot signed again}.
        """
        is_covered = named_layers(subject.entries) <= {*subject.covered, subject.head}
        has_root = subject.covering is not None and subject.covering.leaf_root != NO_HASH and is_covered
        why = ""
        if not self._has_key:
            why = "no key was used"
        elif not subject.map_is_signed:
            why = "no signature covers its map: it was not detached cleanly"
        elif check.chunks and check.without_leaf == check.chunks:
            why = "none of its chunks has a leaf: no snapshot has sealed them"
        elif check.chunks and not has_root:
            why = "no signature covered its leaves"
        report: dict[str, Any] = {
            "Kind": "integrity" if why else "authenticity",
            "Why": why,
            "Chunks": check.chunks,
            "Bytes": check.chunks * CHUNK,
            "WithoutLeaf": check.without_leaf,
            "HashedNow": check.hashed_now,
            "DamagedChunks": check.damaged_chunks,
            "Damage": [damage.as_members(subject.claim.size) for damage in check.damage],
            "Complete": check.complete,
            "Record": None,
            "Generation": 0,
        }
        body = None if not self._has_key or has_root or check.damage else self._next_body(subject)
        if body is not None:
            report |= {
                "Record": base64.b64encode(sign(body, self._key)).decode(),
                "Generation": body.generation,
            }
        return report

    def _next_body(self, subject: Subject) -> SignedBody | None:
        """Return what a snapshot whose map is signed and whose leaves are not is signed with now; None: nothing."""
        if subject.sealed is None or subject.covering is None or not subject.map_is_signed:
            return None
        layers = named_layers(subject.entries)
        table = subject.table
        slots, missing = slots_of(self._disk, self._fds[0], table.lineage, {n: table.uuid_of(n) for n in layers})
        if missing:
            return None
        return replace(
            subject.own,
            state=RecordState.CLEAN,
            generation=subject.own.generation + 1,
            map_hash=subject.sealed.hash(),
            leaf_root=leaf_root(slots.values()),
        )


def main() -> None:
    """Become a holder of a key, serve descriptor 0, and end with it."""
    run_worker(log, Verifier().run, gently=True)


if __name__ == "__main__":
    main()
