"""The worker that looks at an archive: tells its manifest, opens its header, verifies all of it.

Started by ebsd before anything is made of an archive, and for ``ebsctl archive show`` and ``verify``. It is told
everything over descriptor 0 and ends with it. With a key, what is found is authentic or not; without, only checksums
were compared, which finds accidents.
"""

from __future__ import annotations

import base64
import contextlib
import logging
import os
import socket
import stat
from collections.abc import Sequence
from typing import Any

import trio

from ebsd.crypto.secret import Secret
from ebsd.domain.errors import ArchiveDamaged, EbsdError, HostFailure, IncorrectState, IntegrityFailure
from ebsd.ipc.channel import Channel, ChannelClosed, ChannelHandler, serve
from ebsd.ipc.incidents import as_ebsd_error, log_incident
from ebsd.store.archive import Manifest
from ebsd.volume import keysession
from ebsd.volume.archive_exporter import is_torn_header
from ebsd.volume.archivestream import ArchiveReader
from ebsd.volume.worker import enclosing, run_worker

log = logging.getLogger("ebsd-archive-inspector")


class Inspector:
    """One archive."""

    def __init__(self) -> None:
        self._fd = -1
        self._reader: ArchiveReader | None = None
        self._key: Secret | None = None
        self._bytes = 0
        self._running = False
        self._ended = False
        self._error: EbsdError | None = None
        self._nursery: trio.Nursery | None = None

    async def run(self, parent: socket.socket) -> None:
        """Serve ebsd until it is gone."""
        handlers: dict[str, ChannelHandler] = {
            "open": self._open, "unlock": self._unlock, "verify": self._verify, "progress": self._progress
        }  # fmt: skip
        async with trio.open_nursery() as nursery, Channel(parent) as channel:
            self._nursery = nursery
            try:
                with contextlib.suppress(ChannelClosed):
                    await serve(channel, enclosing(handlers))
            finally:
                if self._key is not None:
                    self._key.wipe()
                nursery.cancel_scope.cancel()

    # --- requests of ebsd

    async def _open(self, params: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], Sequence[int]]:
        """{"MayBeEmpty"}, one descriptor -> {"Manifest": null or its members, "IsFile", "Header": in base64 when the
        descriptor is no file, else null, "HeaderDigest"}.

        ``MayBeEmpty``: no manifest for a file that has less than the header of an archive. Raises ArchiveDamaged,
        UnsupportedFormat, HostFailure.
        """
        if self._reader is not None or len(fds) != 1:
            raise IncorrectState(reason="This process looks at one archive")
        self._fd = fds[0]
        return await trio.to_thread.run_sync(self._read_header, bool(params["MayBeEmpty"]), abandon_on_cancel=True), ()

    async def _unlock(self, params: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], Sequence[int]]:
        """{}, one key session -> {}; from here on the manifest is authentic.

        Raises what the session answers, ArchiveDamaged.
        """
        reader = self._reader
        if reader is None or len(fds) != 1:
            raise IncorrectState(reason="Nothing to unlock")
        session = socket.socket(fileno=fds.pop())
        await trio.to_thread.run_sync(self._ask, session, reader, abandon_on_cancel=True)
        return {}, ()

    async def _verify(self, params: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], Sequence[int]]:
        """{} -> {}; begins to read everything to the end, which ``progress`` tells."""
        if self._reader is None or self._running or self._nursery is None:
            raise IncorrectState(reason="Nothing to verify")
        self._running = True
        self._nursery.start_soon(self._work, self._reader)
        return {}, ()

    async def _progress(self, params: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], Sequence[int]]:
        """{} -> {"Ended", "Bytes" read, "Frames", "Authentic", "Digest" of what was read}; raises what was found."""
        reader = self._reader
        if reader is None:
            raise IncorrectState(reason="Nothing to tell")
        if self._error is not None:
            raise self._error
        at = reader.position
        return {
            "Ended": self._ended,
            "Bytes": at.offset,
            "Frames": at.number,
            "Authentic": reader.is_unlocked,
            "Digest": at.digest.hex(),
        }, ()

    # --- in a thread

    def _read_header(self, may_be_empty: bool) -> dict[str, Any]:
        try:
            is_file = stat.S_ISREG(os.fstat(self._fd).st_mode)
            if is_file:
                os.lseek(self._fd, 0, os.SEEK_SET)
            if may_be_empty and (not is_file or os.fstat(self._fd).st_size == 0):
                return {"Manifest": None, "IsFile": is_file, "Header": None, "HeaderDigest": None}
        except OSError as exc:
            raise HostFailure(where="at the archive", reason=exc.strerror or str(exc)) from exc
        reader = ArchiveReader(self._fd)
        try:
            manifest = reader.read_header()
        except ArchiveDamaged:
            if may_be_empty and is_torn_header(self._fd):
                return {"Manifest": None, "IsFile": is_file, "Header": None, "HeaderDigest": None}
            raise
        self._reader = reader
        return {
            "Manifest": manifest_members(manifest),
            "IsFile": is_file,
            "Header": None if is_file else base64.b64encode(reader.header).decode(),
            "HeaderDigest": reader.position.digest.hex(),
        }

    def _ask(self, session: socket.socket, reader: ArchiveReader) -> None:
        answer = keysession.ask(session)
        manifest = reader.read_manifest
        if answer.data_key is None or (answer.anchor.resource, answer.anchor.key_arn) != (
            manifest.archive, manifest.key_arn
        ):  # fmt: skip
            raise IntegrityFailure(resource=manifest.archive, reason="its key session is that of something else")
        self._key = answer.data_key
        reader.unlock(answer.data_key)

    async def _work(self, reader: ArchiveReader) -> None:
        def read() -> None:
            for _ in reader.frames():
                pass

        try:
            await trio.to_thread.run_sync(read, abandon_on_cancel=True)
        except EbsdError as exc:
            self._error = exc
        except Exception as exc:  # noqa: BLE001 - reported as an incident
            self._error = as_ebsd_error(exc, log_incident)
        finally:
            reader.close()
            self._ended = True


def manifest_members(manifest: Manifest) -> dict[str, Any]:
    """Return what ebsd gets of a manifest."""
    base = manifest.base
    return {
        "ArchiveId": manifest.archive,
        "SnapshotId": manifest.snapshot,
        "VolumeId": manifest.volume,
        "OwnerId": manifest.account,
        "OwnerName": manifest.owner,
        "Name": manifest.name,
        "Description": manifest.description,
        "StartTime": manifest.started,
        "CreateTime": manifest.created,
        "SizeBytes": manifest.size,
        "Cipher": int(manifest.cipher),
        "Content": manifest.content.hex(),
        "Base": None if base is None else {"SnapshotId": base.snapshot, "Content": base.content.hex()},
        "DataChunks": manifest.data_chunks,
        "HoleChunks": manifest.hole_chunks,
        "KeyArn": manifest.key_arn,
        "Blob": base64.b64encode(manifest.blob).decode(),
        "Context": dict(manifest.context),
    }


def main() -> None:
    """Become a holder of keys, serve descriptor 0, and end with it."""
    run_worker(log, Inspector().run)


if __name__ == "__main__":
    main()
