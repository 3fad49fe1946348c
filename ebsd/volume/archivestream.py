"""Archives as streams: a writer that frames and seals, a reader that opens and believes nothing before.

Both take a descriptor as it comes: a file, or a pipe. Format and reasons: ARCHIVE.md.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from ebsd.crypto.archive import FrameSealer, NotAuthentic, sign_header, verify_header
from ebsd.crypto.secret import Secret
from ebsd.domain.errors import ArchiveDamaged, HostFailure, NoSpace
from ebsd.domain.units import CHUNK
from ebsd.store.archive import (
    DATA_FRAME,
    DIGEST,
    FRAME_HEADER,
    LAST_FRAME,
    MAC,
    MAX_PAYLOAD,
    PRELUDE_BYTES,
    SALT,
    TAG,
    ChunkRun,
    Frame,
    LastFrame,
    Manifest,
    encode_frame,
    encode_last,
    encode_runs,
    encode_signed_part,
    frame_digest,
    header_digest,
    manifest_length,
    parse_frame,
    parse_last,
    parse_manifest,
    parse_runs,
)

SALT_FRAMES: Final = 1 << 20
"""Frames under one derived key: 1 TiB of data."""

_SPACE: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Salts = Callable[[int], bytes]
"""Returns random bytes: ``os.urandom``."""


@dataclass(frozen=True, slots=True)
class Position:
    """A point between two frames: all before it was sealed and is known."""

    number: int
    """Of the frame that comes next."""
    digest: bytes
    """Of all before."""
    offset: int
    """Bytes from the start of the archive."""
    after: int
    """Chunks below have been told of."""
    data_chunks: int
    hole_chunks: int


def _told(runs: Sequence[ChunkRun], at: Position, digest: bytes, length: int) -> Position:
    """Return the position behind a data frame of ``length`` bytes."""
    holes = sum(run.chunks for run in runs if run.is_hole)
    data = sum(run.chunks for run in runs) - holes
    return Position(
        at.number + 1,
        digest,
        at.offset + length,
        runs[-1].first + runs[-1].chunks,
        at.data_chunks + data,
        at.hole_chunks + holes,
    )


# --- writing


class ArchiveWriter:
    """Writes one archive, or what one lacks, to a descriptor that it borrows."""

    def __init__(self, fd: int, key: Secret, manifest: Manifest, salts: Salts = os.urandom) -> None:
        """Borrow descriptor and key. Then ``begin`` or ``go_on``."""
        self._fd = fd
        self._key = key
        self._signed = encode_signed_part(manifest)
        self._sealer = FrameSealer(key, self._signed)
        self._salts = salts
        self._salt = b""
        self._salted = 0
        self._plain = memoryview(bytearray(MAX_PAYLOAD))
        self._sealed = memoryview(bytearray(MAX_PAYLOAD + TAG))
        self._at = Position(0, b"", 0, 0, 0, 0)

    @property
    def position(self) -> Position:
        return self._at

    def begin(self) -> None:
        """Write the header. Raises NoSpace, HostFailure, as all that writes."""
        mac = sign_header(self._key, self._signed)
        digest = header_digest(self._signed, mac)
        header = self._signed + mac + digest
        self._write(memoryview(header))
        self._at = Position(0, digest, len(header), 0, 0, 0)

    def go_on(self, at: Position) -> None:
        """Continue behind what a reader has opened; the descriptor stands there. Under a salt of its own."""
        self._at = at

    def add(self, runs: Sequence[ChunkRun], fill: Callable[[memoryview], None]) -> None:
        """Write a frame; ``fill`` puts the data of its runs, whole chunks in order, into what it is given."""
        head = encode_runs(runs)
        data = sum(run.chunks for run in runs if not run.is_hole) * CHUNK
        payload = self._plain[: len(head) + data]
        payload[: len(head)] = head
        if data:
            fill(payload[len(head) :])
        digest, length = self._frame(DATA_FRAME, payload)
        self._at = _told(runs, self._at, digest, length)

    def finish(self) -> bytes:
        """Write the last frame; return the digest of the whole archive."""
        last = encode_last(LastFrame(self._at.number, self._at.data_chunks, self._at.hole_chunks))
        self._plain[: len(last)] = last
        digest, length = self._frame(LAST_FRAME, self._plain[: len(last)])
        at = self._at
        self._at = Position(at.number + 1, digest, at.offset + length, at.after, at.data_chunks, at.hole_chunks)
        return digest

    def close(self) -> None:
        """Clear what was in clear."""
        self._plain[:] = bytes(len(self._plain))
        self._sealer.close()

    def _frame(self, kind: int, payload: memoryview) -> tuple[bytes, int]:
        if not self._salt or self._salted == SALT_FRAMES:
            self._salt, self._salted = self._salts(SALT), 0
        self._salted += 1
        at = self._at
        header = encode_frame(Frame(kind, at.number, len(payload), self._salt))
        sealed = self._sealed[: len(payload) + TAG]
        self._sealer.seal(self._salt, kind, at.number, at.digest + header, payload, sealed)
        digest = frame_digest(at.digest, header, sealed)
        self._write(memoryview(header), sealed, memoryview(digest))
        return digest, len(header) + len(sealed) + len(digest)

    def _write(self, *parts: memoryview) -> None:
        left = list(parts)
        try:
            while left:
                done = os.writev(self._fd, left)
                while left and done >= len(left[0]):
                    done -= len(left.pop(0))
                if left and done:
                    left[0] = left[0][done:]
        except OSError as exc:
            if exc.errno in _SPACE:
                raise NoSpace(where="for the archive") from exc
            raise HostFailure(where="at the archive", reason=exc.strerror or str(exc)) from exc


# --- reading


@dataclass(frozen=True, slots=True)
class OpenedFrame:
    """A frame whose place and content are authentic; the data are valid until the next one is asked for."""

    runs: list[ChunkRun]
    data: memoryview
    """The data of its runs in order, whole chunks; writable."""
    position: Position
    """Behind it."""


class ArchiveReader:
    """Reads one archive from a descriptor that it borrows, from its first byte to its last."""

    def __init__(self, fd: int, front: bytes = b"") -> None:
        """``front``: the first bytes of the archive, which somebody has read from a pipe already."""
        self._fd = fd
        self._front = memoryview(front)
        self._signed = b""
        self._mac = b""
        self._header_digest = b""
        self._manifest: Manifest | None = None
        self._sealer: FrameSealer | None = None
        self._sealed = memoryview(bytearray(MAX_PAYLOAD + TAG))
        self._plain = memoryview(bytearray(MAX_PAYLOAD))
        self._at = Position(0, b"", 0, 0, 0, 0)
        self._ended = False

    @property
    def header(self) -> bytes:
        """The header, as it was read."""
        return self._signed + self._mac + self._header_digest

    @property
    def position(self) -> Position:
        """Behind what was read: of the frames that were opened, or, without a key, whose checksums are right."""
        return self._at

    @property
    def read_manifest(self) -> Manifest:
        """What ``read_header`` returned."""
        if self._manifest is None:
            raise AssertionError("BUG: a manifest before the header")
        return self._manifest

    @property
    def ended(self) -> bool:
        """Whether the last frame was read."""
        return self._ended

    @property
    def is_unlocked(self) -> bool:
        return self._sealer is not None

    def read_header(self) -> Manifest:
        """Return the manifest, of which nothing is authentic before ``unlock``. Raises ArchiveDamaged, HostFailure,
        UnsupportedFormat."""
        prelude = self._exactly(PRELUDE_BYTES, "its header")
        raw = self._exactly(manifest_length(prelude), "its header")
        mac = self._exactly(MAC, "its header")
        digest = self._exactly(DIGEST, "its header")
        signed = prelude + raw
        if header_digest(signed, mac) != digest:
            raise ArchiveDamaged(reason="the checksum of its header is wrong")
        self._manifest = parse_manifest(raw)
        self._signed, self._mac, self._header_digest = signed, mac, digest
        self._at = Position(0, digest, len(signed) + MAC + DIGEST, 0, 0, 0)
        return self._manifest

    def unlock(self, key: Secret) -> None:
        """Check the header under the archive's key, which is borrowed. Raises ArchiveDamaged."""
        try:
            verify_header(key, self._signed, self._mac)
        except NotAuthentic:
            raise ArchiveDamaged(reason="its header was not made with its key") from None
        self._sealer = FrameSealer(key, self._signed)

    def frames(self) -> Iterator[OpenedFrame]:
        """Yield all frames with data up to the end, which is checked, too. Raises ArchiveDamaged, HostFailure.

        Without a key only checksums are looked at: frames come without runs and data.
        """
        manifest = self.read_manifest
        while not self._ended:
            number = self._at.number
            header = self._exactly(FRAME_HEADER, f"frame {number}")
            frame = parse_frame(header, number)
            sealed = self._sealed[: frame.payload + TAG]
            self._fill(sealed, f"frame {number}")
            stored = self._exactly(DIGEST, f"frame {number}")
            digest = frame_digest(self._at.digest, header, sealed)
            if digest != stored:
                raise ArchiveDamaged(reason=f"the checksum of frame {number} is wrong")
            length = len(header) + len(sealed) + DIGEST
            if frame.kind == LAST_FRAME:
                self._end(frame, header, sealed, manifest)
                at = self._at
                self._at = Position(number + 1, digest, at.offset + length, at.after, at.data_chunks, at.hole_chunks)
                self._ended = True
            elif self._sealer is None:
                at = self._at
                self._at = Position(number + 1, digest, at.offset + length, at.after, 0, 0)
                yield OpenedFrame([], self._plain[:0], self._at)
            else:
                payload = self._open(frame, header, sealed)
                runs, data = parse_runs(payload, number, manifest, self._at.after)
                self._at = _told(runs, self._at, digest, length)
                yield OpenedFrame(runs, data, self._at)

    def close(self) -> None:
        """Clear what was in clear."""
        self._plain[:] = bytes(len(self._plain))
        if self._sealer is not None:
            self._sealer.close()

    def _end(self, frame: Frame, header: bytes, sealed: memoryview, manifest: Manifest) -> None:
        if self._read(memoryview(bytearray(1))):
            raise ArchiveDamaged(reason="something follows its last frame")
        if self._sealer is None:
            return
        last = parse_last(self._open(frame, header, sealed))
        at = self._at
        if last != LastFrame(at.number, at.data_chunks, at.hole_chunks):
            raise ArchiveDamaged(reason="its last frame tells of other frames than there are")
        if (at.data_chunks, at.hole_chunks) != (manifest.data_chunks, manifest.hole_chunks):
            raise ArchiveDamaged(reason="it does not have the chunks that its manifest tells of")

    def _open(self, frame: Frame, header: bytes, sealed: memoryview) -> memoryview:
        if self._sealer is None:
            raise AssertionError("BUG: opened without a key")
        payload = self._plain[: frame.payload]
        try:
            self._sealer.open(frame.salt, frame.kind, frame.number, self._at.digest + header, sealed, payload)
        except NotAuthentic:
            raise ArchiveDamaged(reason=f"frame {frame.number} was not made with its key for this place") from None
        return payload

    def _exactly(self, length: int, what: str) -> bytes:
        buffer = bytearray(length)
        self._fill(memoryview(buffer), what)
        return bytes(buffer)

    def _fill(self, buffer: memoryview, what: str) -> None:
        done = 0
        while done < len(buffer):
            got = self._read(buffer[done:])
            if not got:
                raise ArchiveDamaged(reason=f"it ends in {what}")
            done += got

    def _read(self, buffer: memoryview) -> int:
        if self._front:
            take = min(len(buffer), len(self._front))
            buffer[:take] = self._front[:take]
            self._front = self._front[take:]
            return take
        try:
            return os.readv(self._fd, [buffer])
        except OSError as exc:
            raise HostFailure(where="at the archive", reason=exc.strerror or str(exc)) from exc
