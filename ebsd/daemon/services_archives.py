"""Methods of io.ebsd.Archives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import aclosing
from typing import Any

from ebsd.control.archives import Archives, Check, ExportRequest, ImportRequest, Started
from ebsd.domain.model import Caller, Cipher
from ebsd.domain.units import CHUNK
from ebsd.ipc.peer import caller_of
from ebsd.ipc.varlink_server import Call, Handler


class ArchiveMethods:
    """The handlers; each asks for the use cases anew, which are not there in rescue mode."""

    def __init__(self, archives: Callable[[], Archives], admin_uid: int) -> None:
        self._archives = archives
        self._admin_uid = admin_uid

    def table(self) -> dict[str, Handler]:
        """Return method -> handler."""
        return {"Export": self._export, "Import": self._import, "Describe": self._describe, "Verify": self._verify}

    def _caller(self, call: Call) -> Caller:
        return caller_of(call.peer, self._admin_uid)

    async def _export(self, call: Call) -> dict[str, Any]:
        p, archives = call.parameters, self._archives()
        request = ExportRequest(p["SnapshotId"], p.get("SinceSnapshotId"), p.get("KmsKeyId"), p.get("Rate"))
        return _members(await archives.export(self._caller(call), request, call.take_fd(p["Descriptor"])))

    async def _import(self, call: Call) -> dict[str, Any]:
        p, archives = call.parameters, self._archives()
        request = ImportRequest(
            name=p["Name"],
            onto=p.get("OntoSnapshotId"),
            key=p.get("KmsKeyId"),
            description=p.get("Description"),
            tags={str(tag["Key"]): str(tag.get("Value") or "") for tag in p.get("Tags") or []},
            rate=p.get("Rate"),
        )
        return _members(await archives.import_archive(self._caller(call), request, call.take_fd(p["Descriptor"])))

    async def _describe(self, call: Call) -> dict[str, Any]:
        archives = self._archives()
        return {"Archive": _described(await archives.describe(call.take_fd(call.parameters["Descriptor"])))}

    async def _verify(self, call: Call) -> dict[str, Any]:
        p, archives = call.parameters, self._archives()
        checks = archives.verify(self._caller(call), call.take_fd(p["Descriptor"]), scrub=bool(p.get("Scrub")))
        async with aclosing(checks) as steps:
            async for step in steps:
                if step.ended:
                    return _check(step)
                await call.stream(_check(step))
        raise AssertionError("BUG: a verification without an end")


def _members(started: Started) -> dict[str, Any]:
    return {
        "JobId": started.job,
        "ArchiveId": started.archive,
        "SnapshotId": started.snapshot,
        "KmsKeyId": started.key,
        "Resumed": started.resumed,
    }


def _check(check: Check) -> dict[str, Any]:
    members = {
        "Done": check.done, "Ended": check.ended, "Authentic": check.authentic, "Digest": check.digest
    }  # fmt: skip
    return {**members, "Note": check.note} if check.note else members


def _described(manifest: Mapping[str, Any]) -> dict[str, Any]:
    same = (
        "ArchiveId", "SnapshotId", "VolumeId", "OwnerId", "OwnerName", "Name", "Description", "StartTime", "CreateTime",
        "SizeBytes",
    )  # fmt: skip
    members = {
        **{name: manifest[name] for name in same},
        "Encrypted": manifest["Cipher"] != Cipher.NONE,
        "DataBytes": manifest["DataChunks"] * CHUNK,
        "HoleBytes": manifest["HoleChunks"] * CHUNK,
        "KmsKeyId": manifest["KeyArn"],
    }
    base = manifest["Base"]
    return members if base is None else {**members, "BaseSnapshotId": base["SnapshotId"]}
