"""The worker that writes an archive: reads a verified snapshot, or what changed since another, and seals it in frames.

1. Nothing is read as data before the snapshot, and the base of an incremental archive, were verified as for a copy.
2. What is read is compared with its leaves, as for a copy: damage must not become an authentic archive.
3. A file that has a part of this very archive is continued behind the last frame that opens; any other content of the
   file is refused and left alone. What is behind that frame was never whole, so it is cut off.
4. It is done when the archive is durable, where there is such a thing.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

from ebsd.crypto.codec import CodecFactory
from ebsd.crypto.secret import Secret
from ebsd.domain.errors import (
    ArchiveDamaged,
    ArchiveOfAnother,
    HostFailure,
    IntegrityFailure,
    InvalidParameterCombination,
    NoSpace,
    UnsupportedFormat,
)
from ebsd.domain.units import CHUNK, SECTOR
from ebsd.store.archive import MAGIC, Base, ChunkRun, Manifest, planned_frames
from ebsd.store.disk import RealDisk
from ebsd.store.entries import HOLE
from ebsd.volume.archivestream import ArchiveReader, ArchiveWriter, Position
from ebsd.volume.copier import Run, SourceFiles, data_chunks, runs
from ebsd.volume.keysession import Answer
from ebsd.volume.sources import SourceSnapshot, believed_source
from ebsd.volume.transfer import SYNC_BYTES, Holdings, Transfer, main

_SECTORS_PER_CHUNK: Final = CHUNK // SECTOR
_BLOCK: Final = 16 * 1024
"""Entries compared together."""
_UNSYNCABLE: Final = (errno.EINVAL, errno.EROFS, errno.ENOTSUP)


def changed_runs(entries: memoryview, base: memoryview | None, after: int) -> Iterator[ChunkRun]:
    """Yield what an archive tells of, ascending, from chunk ``after`` on; both maps have format I.

    Without a base the chunks with data; with one, those whose entry differs: another layer, or a hole by now.
    """
    for first in range(after - after % _BLOCK, len(entries), _BLOCK):
        block = entries[first : first + _BLOCK].tolist()
        before = [HOLE] * len(block)
        if base is not None:
            part = base[first : first + _BLOCK].tolist()
            before[: len(part)] = part
        if block == before:
            continue
        start, length, kind = 0, 0, False
        for at in range(max(after - first, 0), len(block)):
            if block[at] == before[at]:
                continue
            is_hole = block[at] == HOLE
            if length and start + length == at and kind is is_hole:
                length += 1
                continue
            if length:
                yield ChunkRun(first + start, length, kind)
            start, length, kind = at, 1, is_hole
        if length:
            yield ChunkRun(first + start, length, kind)


@dataclass(frozen=True, slots=True)
class Output:
    """Where an archive goes: a descriptor of the client."""

    fd: int
    is_file: bool

    @classmethod
    def of(cls, fd: int) -> Output:
        """Look at a descriptor; a file is locked for this worker, and rewound. Raises ArchiveOfAnother, HostFailure."""
        try:
            mode = os.fstat(fd).st_mode
            if not stat.S_ISREG(mode):
                return cls(fd, is_file=False)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.lseek(fd, 0, os.SEEK_SET)
        except BlockingIOError:
            raise ArchiveOfAnother(file="The file", reason="somebody else is writing it") from None
        except OSError as exc:
            raise HostFailure(where="at the archive", reason=exc.strerror or str(exc)) from exc
        return cls(fd, is_file=True)

    @property
    def is_empty(self) -> bool:
        return not self.is_file or os.fstat(self.fd).st_size == 0

    def cut(self, length: int) -> None:
        """Drop what is behind, and stand there."""
        with _writing():
            os.ftruncate(self.fd, length)
            os.lseek(self.fd, length, os.SEEK_SET)

    def sync(self, *, names: bool) -> None:
        """Make what was written durable, where there is such a thing: a pipe has none, a device has."""
        with _writing():
            (os.fsync if names else os.fdatasync)(self.fd)


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        if exc.errno in _UNSYNCABLE:
            return
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(where="for the archive") from exc
        raise HostFailure(where="at the archive", reason=exc.strerror or str(exc)) from exc


class ArchiveExport(Transfer[None]):
    """The data of one archive."""

    def __init__(
        self,
        *,
        source: SourceSnapshot,
        files: SourceFiles,
        codecs: CodecFactory,
        base: memoryview | None,
        output: Output,
        key: Secret,
        manifest: Manifest,
        reader: ArchiveReader | None,
        rate: int = 0,
    ) -> None:
        """``reader`` has read and unlocked the header of what the output has already; None: it has nothing."""
        super().__init__(1, rate)
        self._source = source
        self._files = files
        self._codecs = codecs
        self._base = base
        self._output = output
        self._manifest = manifest
        self._reader = reader
        self._writer = ArchiveWriter(output.fd, key, manifest)
        self._digest = b""
        self._through = 0
        self.total = manifest.data_chunks * CHUNK

    def cost(self, piece: None) -> int:
        return 0  # it is spent per frame

    def details(self) -> dict[str, Any]:
        return {"DoneThrough": self._through}

    def transfer(self) -> bool:
        at = self._continued()
        if self.stopping.is_set():
            return False
        if at is None:  # it was whole
            return True
        pending = 0
        for frame in planned_frames(changed_runs(self._source.entries, self._base, at.after)):
            if self.stopping.is_set():
                return False
            self._writer.add(frame, lambda view, frame=frame: self._fill(frame, view))  # type: ignore[misc]
            length = sum(run.chunks for run in frame if not run.is_hole) * CHUNK
            self.count(length)
            self.pacer.spend(length, self.stopping)
            pending += length
            if pending >= SYNC_BYTES:
                self._output.sync(names=False)
                pending, self._through = 0, self._writer.position.after
        self._digest = self._writer.finish()
        self._output.sync(names=False)  # here, where it may take its time
        return True

    def _continued(self) -> Position | None:
        """Begin, or stand behind the last good frame of what is there; None when that is all of it."""
        reader = self._reader
        if reader is None:
            self._writer.begin()
            return self._writer.position
        try:
            for frame in reader.frames():
                self.count(sum(run.chunks for run in frame.runs if not run.is_hole) * CHUNK)
                if self.stopping.is_set():
                    return reader.position
        except ArchiveDamaged:
            pass  # what the interruption left behind the last frame
        at = reader.position
        if reader.ended:
            self._digest = at.digest
            return None
        self._output.cut(at.offset)
        self._writer.go_on(at)
        self._through = at.after
        return at

    def _fill(self, frame: list[ChunkRun], view: memoryview) -> None:
        at = 0
        for piece in frame:
            if piece.is_hole:
                continue
            for run in runs(self._source.entries[: piece.first + piece.chunks], piece.first):
                part = view[at : at + run.chunks * CHUNK]
                self._read(run, part)
                at += len(part)

    def _read(self, run: Run, view: memoryview) -> None:
        self._files.read(run, view)
        codec = self._codecs.codec(self._source.table.uuid_of(run.layer))
        codec.decrypt_into(view, view, run.first * _SECTORS_PER_CHUNK)
        beyond = (run.first + run.chunks) * CHUNK - self._source.claim.size
        if beyond > 0:
            view[-beyond:] = bytes(beyond)

    def finish(self) -> dict[str, Any]:
        self._output.sync(names=True)
        return {
            "ArchiveId": self._manifest.archive,
            "Digest": self._digest.hex(),
            "DataBytes": self._manifest.data_chunks * CHUNK,
        }

    def release(self) -> None:
        self._files.close()
        self._writer.close()
        if self._reader is not None:
            self._reader.close()


# --- what ebsd sends


def prepare(params: dict[str, Any], holdings: Holdings) -> tuple[ArchiveExport, dict[str, Any]]:
    """Verify the snapshot and its base, look at the output, and begin.

    {"Source": {"ResourceId", "Owner", "Lineage", "Size", "Cipher", "KeyArn", "AuthorityIds"}, "SourceRecord", "Base"
    and "BaseRecord" alike, null for a full archive; "Archive": {"ArchiveId", "Created", "KeyArn", "Blob", "Context",
    "Volume", "OwnerName", "Name", "Description", "Started"}, "Rate"}. Descriptors: sessions of archive, source
    and, if any, base; lineage directory; maps of source and base; the output.

    {"DataBytes", "Unverified"}. Raises what the sessions and the verification raise, ArchiveOfAnother, HostFailure.
    """
    disk = RealDisk()
    has_base = params["Base"] is not None
    archive = holdings.ask()
    source_answer = holdings.ask()
    base_answer = holdings.ask() if has_base else None
    lineage_fd, map_fd, *maps, output_fd = holdings.fds
    source = believed_source(disk, params["Source"], params["SourceRecord"], source_answer, lineage_fd, map_fd)
    base = None
    if base_answer is not None:
        base = believed_source(disk, params["Base"], params["BaseRecord"], base_answer, lineage_fd, maps[0])
        _check_base(source, base, source_answer, base_answer)
    output = Output.of(output_fd)
    wanted = _manifest(params["Archive"], source, base)
    key = _archive_key(archive, wanted)
    reader = None
    if not output.is_empty:
        reader = _begun(output, wanted, key)
    factory = CodecFactory(source_answer.data_key, cipher=source.claim.cipher)
    holdings.factories.append(factory)
    made = ArchiveExport(
        source=source,
        files=SourceFiles(disk, lineage_fd, source.table),
        codecs=factory,
        base=None if base is None else base.entries,
        output=output,
        key=key,
        manifest=wanted if reader is None else reader.read_manifest,
        reader=reader,
        rate=int(params.get("Rate", 0)),
    )
    return made, {"DataBytes": made.total, "Unverified": source.unverified or (base is not None and base.unverified)}


def _check_base(source: SourceSnapshot, base: SourceSnapshot, answer: Answer, base_answer: Answer) -> None:
    if source.claim.lineage != base.claim.lineage or base.claim.size > source.claim.size:
        raise InvalidParameterCombination(
            reason=f"{source.claim.volume} has nothing in common with {base.claim.volume}, or is smaller"
        )
    keys = answer.data_key, base_answer.data_key
    if (keys[0] is None) is not (keys[1] is None) or (keys[0] and keys[1] and not keys[0].equals(keys[1])):
        raise IntegrityFailure(resource=base.claim.volume, reason="it has another data key than its lineage")


def _archive_key(answer: Answer, wanted: Manifest) -> Secret:
    if answer.data_key is None or (answer.anchor.resource, answer.anchor.key_arn) != (wanted.archive, wanted.key_arn):
        raise IntegrityFailure(resource=wanted.archive, reason="its key session is that of something else")
    return answer.data_key


def _manifest(members: dict[str, Any], source: SourceSnapshot, base: SourceSnapshot | None) -> Manifest:
    data, holes = _counted(source.entries, None if base is None else base.entries)
    return Manifest(
        archive=members["ArchiveId"],
        snapshot=source.claim.volume,
        volume=members["Volume"],
        account=source.claim.owner,
        owner=members["OwnerName"],
        name=members["Name"],
        description=members["Description"],
        started=members["Started"],
        created=members["Created"],
        size=source.claim.size,
        cipher=source.claim.cipher,
        content=source.content(),
        base=None if base is None else Base(base.claim.volume, base.content()),
        data_chunks=data,
        hole_chunks=holes,
        key_arn=members["KeyArn"],
        blob=base64.b64decode(members["Blob"]),
        context=members["Context"],
    )


def _counted(entries: memoryview, base: memoryview | None) -> tuple[int, int]:
    """Return how many chunks have data, or have other ones, and how many became holes."""
    if base is None:
        return data_chunks(entries), 0  # a table of 64 TiB takes minutes run by run
    data = holes = 0
    for run in changed_runs(entries, base, 0):
        data, holes = data + (0 if run.is_hole else run.chunks), holes + (run.chunks if run.is_hole else 0)
    return data, holes


def _begun(output: Output, wanted: Manifest, key: Secret) -> ArchiveReader | None:
    """Return a reader behind the header of what the file has; None when it has less than a header of an archive.

    Raises ArchiveOfAnother for everything but the archive that is wanted.
    """
    reader = ArchiveReader(output.fd)
    try:
        present = reader.read_header()
        reader.unlock(key)
    except (ArchiveDamaged, UnsupportedFormat) as exc:
        if is_torn_header(output.fd):
            output.cut(0)
            return None
        raise ArchiveOfAnother(
            file="The file", reason=f"it has something else: {exc.message.removesuffix('.')}"
        ) from exc
    if replace(present, name="", description="", created="") != replace(wanted, name="", description="", created=""):
        raise ArchiveOfAnother(file="The file", reason=f"it is an archive of {present.snapshot}, made otherwise")
    return reader


def is_torn_header(fd: int) -> bool:
    """Say whether a file has only what an export leaves that was killed while it wrote the header."""
    size = os.fstat(fd).st_size
    if size >= 1 << 17:
        return False
    head = os.pread(fd, len(MAGIC), 0)
    if not head or not MAGIC.startswith(head[: len(MAGIC)]):
        return False
    if size < 32:
        return True
    length = int.from_bytes(os.pread(fd, 4, 16), "little")
    return size < 32 + length + 96


if __name__ == "__main__":
    main(prepare, "ebsd-archive-exporter")
