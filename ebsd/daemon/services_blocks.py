"""Methods of io.ebsd.EBS: members of the interface file to use cases and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

from ebsd.control.block_reads import BlockReads, Page
from ebsd.control.block_writes import BlockWrites, StartRequest
from ebsd.domain.blocks import BLOCK
from ebsd.domain.errors import InvalidParameter
from ebsd.domain.model import Caller
from ebsd.domain.tags import check_description, tags_of_members
from ebsd.domain.units import gib_rounded_up
from ebsd.ipc.peer import caller_of
from ebsd.ipc.varlink_server import Call, Handler, Reply

ALGORITHM: Final = "SHA256"
AGGREGATION: Final = "LINEAR"


class Provider(Protocol):
    """Where the use cases are."""

    @property
    def block_reads(self) -> BlockReads: ...

    @property
    def block_writes(self) -> BlockWrites: ...


class BlockServices:
    """The handlers of io.ebsd.EBS. ``use`` raises in rescue mode and while the key service is locked."""

    def __init__(self, use: Callable[[], Provider], admin_uid: int) -> None:
        self._use = use
        self._admin_uid = admin_uid

    def handlers(self) -> dict[str, Handler]:
        return {
            "ListSnapshotBlocks": self._list,
            "ListChangedBlocks": self._changed,
            "GetSnapshotBlock": self._get,
            "GetSnapshotBlocks": self._get_many,
            "StartSnapshot": self._start,
            "PutSnapshotBlock": self._put,
            "PutSnapshotBlocks": self._put_many,
            "CompleteSnapshot": self._complete,
        }

    def _caller(self, call: Call) -> Caller:
        return caller_of(call.peer, self._admin_uid)

    async def _list(self, call: Call) -> dict[str, Any]:
        p = call.parameters
        page = await self._use().block_reads.list(
            self._caller(call),
            p["SnapshotId"],
            most=p.get("MaxResults"),
            token=p.get("NextToken"),
            start=p.get("StartingBlockIndex"),
        )
        return {"Blocks": page.blocks, **_page(page)}

    async def _changed(self, call: Call) -> dict[str, Any]:
        p = call.parameters
        page = await self._use().block_reads.changed(
            self._caller(call),
            p.get("FirstSnapshotId"),
            p["SecondSnapshotId"],
            most=p.get("MaxResults"),
            token=p.get("NextToken"),
            start=p.get("StartingBlockIndex"),
            exact=bool(p.get("Exact")),
        )
        return {"ChangedBlocks": page.blocks, **_page(page)}

    async def _get(self, call: Call) -> Reply:
        p = call.parameters
        wanted = [(p["BlockIndex"], p["BlockToken"])]
        checksums, fd = await self._use().block_reads.get(self._caller(call), p["SnapshotId"], wanted)
        members = {"DataLength": BLOCK, "DataDescriptor": 0, "Checksum": checksums[0], "ChecksumAlgorithm": ALGORITHM}
        return Reply(members, [fd])

    async def _get_many(self, call: Call) -> Reply:
        p = call.parameters
        wanted = [(block["BlockIndex"], block["BlockToken"]) for block in p["Blocks"]]
        checksums, fd = await self._use().block_reads.get(self._caller(call), p["SnapshotId"], wanted)
        members = {
            "DataLength": BLOCK * len(wanted),
            "DataDescriptor": 0,
            "Checksums": list(checksums),
            "ChecksumAlgorithm": ALGORITHM,
        }
        return Reply(members, [fd])

    async def _start(self, call: Call) -> dict[str, Any]:
        p = call.parameters
        request = StartRequest(
            size_gib=p.get("VolumeSize"),
            size=p.get("SizeBytes"),
            parent=p.get("ParentSnapshotId"),
            name=p.get("Name"),
            description=check_description(p.get("Description") or ""),
            tags=tags_of_members(p.get("Tags") or []),
            encrypted=p.get("Encrypted"),
            key=p.get("KmsKeyArn"),
            timeout=p.get("Timeout"),
            client_token=p.get("ClientToken"),
        )
        snapshot, direct = await self._use().block_writes.start(self._caller(call), request)
        members: dict[str, Any] = {
            "SnapshotId": snapshot.id,
            "OwnerId": snapshot.account,
            "Status": snapshot.state.value,
            "StartTime": snapshot.started,
            "VolumeSize": gib_rounded_up(snapshot.size),
            "SizeBytes": snapshot.size,
            "BlockSize": BLOCK,
            "Description": snapshot.description,
            "Tags": [{"Key": key, "Value": value} for key, value in snapshot.tags.items()],
        }
        if direct.parent is not None:
            members["ParentSnapshotId"] = direct.parent
        if snapshot.key_arn is not None:
            members["KmsKeyArn"] = snapshot.key_arn
        return members

    async def _put(self, call: Call) -> dict[str, Any]:
        p = call.parameters
        _only(p, "ChecksumAlgorithm", ALGORITHM)
        if p["DataLength"] != BLOCK:
            raise InvalidParameter(parameter="DataLength", reason=f"a block has {BLOCK} bytes")
        if p.get("Progress") is not None and not 0 <= p["Progress"] <= 100:
            raise InvalidParameter(parameter="Progress", reason="it is from 0 to 100")
        given = [(p["BlockIndex"], p["Checksum"])]
        fd = call.lent_fd(p["DataDescriptor"])
        await self._use().block_writes.put(self._caller(call), p["SnapshotId"], given, fd)
        return {"Checksum": p["Checksum"], "ChecksumAlgorithm": ALGORITHM}

    async def _put_many(self, call: Call) -> dict[str, Any]:
        p = call.parameters
        given = [(block["BlockIndex"], block["Checksum"]) for block in p["Blocks"]]
        fd = call.lent_fd(p["DataDescriptor"])
        await self._use().block_writes.put(self._caller(call), p["SnapshotId"], given, fd)
        return {}

    async def _complete(self, call: Call) -> dict[str, Any]:
        p = call.parameters
        _only(p, "ChecksumAlgorithm", ALGORITHM)
        _only(p, "ChecksumAggregationMethod", AGGREGATION)
        state = await self._use().block_writes.complete(
            self._caller(call), p["SnapshotId"], changed=p["ChangedBlocksCount"], checksum=p.get("Checksum")
        )
        return {"Status": state.value}


def _only(parameters: Mapping[str, Any], name: str, value: str) -> None:
    if parameters.get(name) not in (None, value):
        raise InvalidParameter(parameter=name, reason=f"it is {value}")


def _page(page: Page) -> dict[str, Any]:
    members: dict[str, Any] = {
        "ExpiryTime": page.expires,
        "VolumeSize": gib_rounded_up(page.snapshot.size),
        "SizeBytes": page.snapshot.size,
        "BlockSize": BLOCK,
    }
    return members if page.following is None else {**members, "NextToken": page.following}
