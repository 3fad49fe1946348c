"""Methods of io.ebsd.Control that bring images in and out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ebsd.control.exporting import Exporting
from ebsd.control.importing import Importing, ImportRequest
from ebsd.control.volumes import CreateRequest
from ebsd.ipc.peer import caller_of
from ebsd.ipc.varlink_server import Call, Handler


@dataclass(frozen=True, slots=True)
class Transfers:
    """The use cases."""

    importing: Importing
    exporting: Exporting


class TransferMethods:
    """The handlers; each asks for the use cases anew, which are not there in rescue mode."""

    def __init__(self, transfers: Callable[[], Transfers], admin_uid: int) -> None:
        self._transfers = transfers
        self._admin_uid = admin_uid

    def table(self) -> dict[str, Handler]:
        """Return method -> handler."""
        return {
            "ImportVolume": self._import,
            "ExportImage": self._export,
            "DescribeExport": self._describe_export,
        }

    async def _import(self, call: Call) -> dict[str, Any]:
        caller, p = caller_of(call.peer, self._admin_uid), call.parameters
        importing = self._transfers().importing
        request = ImportRequest(
            create=CreateRequest(
                name=p.get("Name"),
                size=p.get("SizeBytes"),
                size_gib=None,
                snapshot=None,
                encrypted=p.get("Encrypted"),
                key=p.get("KmsKeyId"),
                context=p.get("EncryptionContext") or {},
                tags={str(tag["Key"]): str(tag.get("Value") or "") for tag in p.get("Tags") or []},
            ),
            served_bytes=None if p.get("Server") is None else p.get("ImageBytes") or 0,
            detect_zeros=bool(p.get("DetectZeros")),
            rate=p.get("Rate"),
        )
        indices = [p["Image"], *([p["Server"]] if p.get("Server") is not None else [])]
        volume, job, note = await importing.import_volume(caller, request, _taken(call, indices))
        return {"VolumeId": volume.id, "JobId": job, **({"Note": note} if note else {})}

    async def _export(self, call: Call) -> dict[str, Any]:
        caller, p = caller_of(call.peer, self._admin_uid), call.parameters
        job = await self._transfers().exporting.export(
            caller,
            p["Resource"],
            _taken(call, [p["Target"]]),
            served=bool(p.get("Served")),
            sparse=p.get("Sparse") is not False,
            allow_damaged=bool(p.get("AllowDamaged")),
            rate=p.get("Rate"),
        )
        return {"JobId": job}

    async def _describe_export(self, call: Call) -> dict[str, Any]:
        caller = caller_of(call.peer, self._admin_uid)
        return await self._transfers().exporting.describe(caller, call.parameters["JobId"])


def _taken(call: Call, indices: list[int]) -> list[int]:
    """Return descriptors that came with a call; those that were not taken when one is missing stay the call's."""
    for index in indices:
        if not 0 <= index < len(call.received) or call.received[index] is None or indices.count(index) > 1:
            call.take_fd(-1)  # raises what is said of a missing one
    return [call.take_fd(index) for index in indices]
