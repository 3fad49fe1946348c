"""Methods of ebsd.sock: members of the interface files to use cases and back.

Parameters were checked against the interface file before a handler runs; here they are only given types.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from ebsd.control import host_helper
from ebsd.control.archives import Archives
from ebsd.control.attachments import Attachments
from ebsd.control.block_reads import BlockReads
from ebsd.control.block_writes import BlockWrites
from ebsd.control.broker import Broker
from ebsd.control.cloning import Cloning
from ebsd.control.creation import CopyRequest, Creation
from ebsd.control.describe import describe_snapshot
from ebsd.control.drains import Drains
from ebsd.control.examination import StoreExamination, describe_report
from ebsd.control.expiries import Expiries
from ebsd.control.growth import Growth
from ebsd.control.host import Host
from ebsd.control.inspection import Inspection
from ebsd.control.jobs import Jobs
from ebsd.control.lineages import Lineages
from ebsd.control.locking import SnapshotLocks
from ebsd.control.rebuilding import Rebuilding
from ebsd.control.recycle_bin import RecycleBin
from ebsd.control.rewrapping import Rewrapping
from ebsd.control.rollback import Rollback
from ebsd.control.schedules import Schedules
from ebsd.control.sharing import Sharing
from ebsd.control.snapshot_sets import SnapshotSets
from ebsd.control.snapshots import Snapshots
from ebsd.control.usage import AccountUsage
from ebsd.control.verification import Verifications, describe_verification_report
from ebsd.control.volumes import CreateRequest, Volumes
from ebsd.daemon.services_admission import AdmissionMethods
from ebsd.daemon.services_archives import ArchiveMethods
from ebsd.daemon.services_bin import BinMethods
from ebsd.daemon.services_blocks import BlockServices
from ebsd.daemon.services_jobs import JobMethods
from ebsd.daemon.services_locks import lock_methods
from ebsd.daemon.services_schedules import schedule_methods
from ebsd.daemon.services_sets import SetServices
from ebsd.daemon.services_sharing import SharingMethods
from ebsd.daemon.services_transfers import TransferMethods, Transfers
from ebsd.domain.errors import InRescue, InvalidParameterValue, KeyServiceLocked
from ebsd.domain.ids import MANAGED_ALIAS, looks_like_volume_id
from ebsd.domain.model import Caller, ExposedAs
from ebsd.domain.sharing import parse_scope
from ebsd.domain.tags import check_description, tags_of_members
from ebsd.domain.tokens import parse_client_token
from ebsd.ipc.peer import caller_of
from ebsd.ipc.varlink_server import Call, Handler
from ebsd.wire.messages import error_members

Method = Callable[[Caller, dict[str, Any]], Awaitable[dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class UseCases:
    """Everything the methods call; absent in rescue mode."""

    volumes: Volumes
    attachments: Attachments
    snapshots: Snapshots
    sets: SnapshotSets
    cloning: Cloning
    schedules: Schedules
    creation: Creation
    growth: Growth
    lineages: Lineages
    jobs: Jobs
    archives: Archives
    drains: Drains
    block_reads: BlockReads
    block_writes: BlockWrites
    verifications: Verifications
    rewrapping: Rewrapping
    rollback: Rollback
    usage: AccountUsage
    locks: SnapshotLocks
    recycle_bin: RecycleBin
    expiries: Expiries
    sharing: Sharing
    transfers: Transfers


class Services:
    """The handlers of io.ebsd.EC2 and io.ebsd.Control."""

    def __init__(
        self,
        host: Host,
        broker: Broker,
        inspection: Inspection,
        examination: StoreExamination,
        rebuilding: Rebuilding,
        use_cases: UseCases | None,
        rescue: str,
        locked: str = "",
    ) -> None:
        self._host = host
        self._broker = broker
        self._inspection = inspection
        self._examination = examination
        self._rebuilding = rebuilding
        self._use_cases = use_cases
        self._rescue = rescue
        self._locked = locked

    def table(self) -> dict[str, dict[str, Handler]]:
        """Return interface -> method -> handler."""
        bin_methods = BinMethods(self._host, lambda: self._use.recycle_bin, lambda: self._use.volumes)
        ec2: dict[str, Method] = {
            "CreateVolume": self._create_volume,
            "DeleteVolume": self._delete_volume,
            "DescribeVolumes": self._describe_volumes,
            "AttachVolume": self._attach_volume,
            "DetachVolume": self._detach_volume,
            "ModifyVolume": self._modify_volume,
            "DescribeVolumesModifications": self._describe_modifications,
            "CreateSnapshot": self._create_snapshot,
            "DeleteSnapshot": self._delete_snapshot,
            "DescribeSnapshots": self._describe_snapshots,
            "CopySnapshot": self._copy_snapshot,
            "CreateTags": self._create_tags,
            "DeleteTags": self._delete_tags,
            "GetEbsEncryptionByDefault": self._get_encryption_by_default,
            "EnableEbsEncryptionByDefault": self._enable_encryption_by_default,
            "DisableEbsEncryptionByDefault": self._disable_encryption_by_default,
            "GetEbsDefaultKmsKeyId": self._get_default_key,
            "ModifyEbsDefaultKmsKeyId": self._modify_default_key,
            "ResetEbsDefaultKmsKeyId": self._reset_default_key,
            **lock_methods(lambda: self._use.locks),
            **SharingMethods(lambda: self._use.sharing).table(),
            **bin_methods.ec2(),
            **SetServices(lambda: self._use.sets, lambda: self._use.cloning, lambda: self._use.volumes).table(),
        }
        control: dict[str, Method] = {
            "GetStatus": self._get_status,
            "Doctor": self._doctor,
            "Benchmark": self._benchmark,
            "Identify": self._identify,
            "RestartEngine": self._restart_engine,
            "Rename": self._rename,
            "AcceptRollback": self._accept_rollback,
            "RebuildCatalog": self._rebuild_catalog,
            "RecordMount": self._record_mount,
            "ReclaimVolume": self._reclaim_volume,
            "DescribeAccountLimits": self._describe_account_limits,
            **schedule_methods(lambda: self._use.schedules),
            **bin_methods.control(),
        }
        return {
            "io.ebsd.EC2": {name: self._handler(method) for name, method in ec2.items()},
            "io.ebsd.Control": {
                **{name: self._handler(method) for name, method in control.items()},
                **AdmissionMethods(self._broker, self._host.admin_uid).table(),
                **JobMethods(lambda: self._use.jobs, self._host.admin_uid).table(),
                **TransferMethods(lambda: self._use.transfers, self._host.admin_uid).table(),
                "Verify": self._verify,
                "CheckStore": self._check_store,
                "RewrapDataKeys": self._rewrap_data_keys,
            },
            "io.ebsd.EBS": BlockServices(lambda: self._use, self._host.admin_uid).handlers(),
            "io.ebsd.Archives": ArchiveMethods(lambda: self._use.archives, self._host.admin_uid).table(),
        }

    def _handler(self, method: Method) -> Handler:
        async def handle(call: Call) -> dict[str, Any]:
            return await method(caller_of(call.peer, self._host.admin_uid), call.parameters)

        return handle

    @property
    def _use(self) -> UseCases:
        if self._use_cases is None:
            raise KeyServiceLocked(reason=self._locked) if self._locked else InRescue(reason=self._rescue)
        return self._use_cases

    # --- EC2

    async def _create_volume(self, caller: Caller, p: dict[str, Any]) -> dict[str, Any]:
        request = CreateRequest(
            name=p.get("Name"),
            size=p.get("SizeBytes"),
            size_gib=p.get("Size"),
            snapshot=p.get("SnapshotId"),
            encrypted=p.get("Encrypted"),
            key=p.get("KmsKeyId"),
            context=p.get("EncryptionContext") or {},
            tags=tags_of_members(p.get("Tags") or []),
            allow_damaged=bool(p.get("AllowDamaged")),
            preallocate=bool(p.get("Preallocate")),
            rate=p.get("Rate"),
        )
        volume, job, note = await self._use.creation.create_volume(
            caller, request, parse_client_token(caller.account, "CreateVolume", p)
        )
        return _present({"Volume": await self._use.volumes.describe_one(volume), "JobId": job, "Note": note})

    async def _delete_volume(self, caller: Caller, p: dict[str, Any]) -> dict[str, Any]:
        recycled = await self._use.volumes.delete(caller, p["VolumeId"], permanently=bool(p.get("Permanently")))
        return {"InRecycleBin": True} if recycled else {}

    async def _describe_volumes(self, caller: Caller, p: dict[str, Any]) -> dict[str, Any]:
        filters = p.get("Filters") or []
        found, token = await self._use.volumes.describe(
            caller, p.get("VolumeIds"), filters, p.get("MaxResults"), p.get("NextToken")
        )
        return _present({"Volumes": found, "NextToken": token})

    async def _attach_volume(self, caller: Caller, p: dict[str, Any]) -> dict[str, Any]:
        expose_as = p.get("ExposeAs")
        if expose_as is not None and expose_as not in tuple(ExposedAs):
            raise InvalidParameterValue(value=expose_as, parameter="ExposeAs", reason="it is loop or file")
        result = await self._use.attachments.attach(
            caller,
            p["VolumeId"],
            read_only=bool(p.get("ReadOnly")),
            expose_as=None if expose_as is None else ExposedAs(expose_as),
            accept=p.get("AcceptGeneration"),
        )
        described = await self._use.volumes.describe_one(result.volume)
        return {"Volume": described, "Attachment": described["Attachments"][0], "Blank": result.blank}

    async def _detach_volume(self, caller: Caller, p: dict[str, Any]) -> dict[str, Any]:
        volume = await self._use.attachments.detach(caller, p["VolumeId"], force=bool(p.get("Force")))
        return {"Volume": await self._use.volumes.describe_one(volume)}

    async def _modify_volume(self, caller: Caller, p: dict[str, Any]) -> dict[str, Any]:
        volume, before = await self._use.growth.grow(
            caller, p["VolumeId"], size=p.get("SizeBytes"), size_gib=p.get("Size")
        )
        return {"Volume": await self._use.volumes.describe_one(volume), "OriginalSizeBytes": before}

    async def _describe_modifications(self, caller: Caller, p: dict[str, Any]) -> dict[str, Any]:
        found, token = await self._use.growth.describe(
            caller, p.get("VolumeIds"), p.get("Filters") or (), p.get("MaxResults"), p.get("NextToken")
        )
        return _present({"VolumesModifications": found, "NextToken": token})

    async def _create_snapshot(self, caller: Caller, p: dict[str, Any]) -> dict[str, Any]:
        snapshot = await self._use.creation.take_snapshot(
            caller,
            p["VolumeId"],
            name=p.get("Name"),
            description=check_description(p.get("Description") or ""),
            tags=tags_of_members(p.get("Tags") or []),
            token=parse_client_token(caller.account, "CreateSnapshot", p),
        )
        return {"Snapshot": describe_snapshot(snapshot, 0)}

    async def _delete_snapshot(self, caller: Caller, p: dict[str, Any]) -> dict[str, Any]:
        permanently = bool(p.get("Permanently"))
        if await self._use.block_writes.abandon(caller, p["SnapshotId"]):
            return {}
        recycled = await self._use.snapshots.delete(caller, p["SnapshotId"], permanently=permanently)
        return {"InRecycleBin": True} if recycled else {}

    async def _describe_snapshots(self, caller: Caller, p: dict[str, Any]) -> dict[str, Any]:
        filters = p.get("Filters") or []
        found, token = await self._use.snapshots.describe(
            caller,
            p.get("SnapshotIds"),
            filters,
            p.get("MaxResults"),
            p.get("NextToken"),
            parse_scope(caller.account, p.get("OwnerIds"), p.get("RestorableByUserIds")),
        )
        return _present({"Snapshots": found, "NextToken": token})

    async def _copy_snapshot(self, caller: Caller, p: dict[str, Any]) -> dict[str, Any]:
        request = CopyRequest(
            source=p["SourceSnapshotId"],
            name=p.get("Name"),
            description=check_description(p.get("Description") or ""),
            encrypted=p.get("Encrypted"),
            key=p.get("KmsKeyId"),
            tags=tags_of_members(p.get("Tags") or []),
            allow_damaged=bool(p.get("AllowDamaged")),
            rate=p.get("Rate"),
        )
        snapshot, job, note = await self._use.creation.copy_snapshot(
            caller, request, parse_client_token(caller.account, "CopySnapshot", p)
        )
        return _present({"Snapshot": describe_snapshot(snapshot, 0), "JobId": job, "Note": note})

    async def _create_tags(self, caller: Caller, p: dict[str, Any]) -> dict[str, Any]:
        await self._use.volumes.add_tags(caller, p["Resources"], tags_of_members(p["Tags"]))
        return {}

    async def _delete_tags(self, caller: Caller, p: dict[str, Any]) -> dict[str, Any]:
        await self._use.volumes.remove_tags(caller, p["Resources"], {t["Key"]: t.get("Value") for t in p["Tags"]})
        return {}

    async def _get_encryption_by_default(self, caller: Caller, p: dict[str, Any]) -> dict[str, Any]:
        return {"EbsEncryptionByDefault": (await self._broker.account(caller)).encryption_by_default}

    async def _enable_encryption_by_default(self, caller: Caller, p: dict[str, Any]) -> dict[str, Any]:
        settings = await self._broker.set_account(caller, encryption_by_default=True)
        return {"EbsEncryptionByDefault": settings.encryption_by_default}

    async def _disable_encryption_by_default(self, caller: Caller, p: dict[str, Any]) -> dict[str, Any]:
        settings = await self._broker.set_account(caller, encryption_by_default=False)
        return {"EbsEncryptionByDefault": settings.encryption_by_default}

    async def _get_default_key(self, caller: Caller, p: dict[str, Any]) -> dict[str, Any]:
        return {"KmsKeyId": (await self._broker.account(caller)).default_key or MANAGED_ALIAS}

    async def _modify_default_key(self, caller: Caller, p: dict[str, Any]) -> dict[str, Any]:
        return {
            "KmsKeyId": (await self._broker.set_account(caller, default_key=p["KmsKeyId"])).default_key or MANAGED_ALIAS
        }

    async def _reset_default_key(self, caller: Caller, p: dict[str, Any]) -> dict[str, Any]:
        return {"KmsKeyId": (await self._broker.set_account(caller, default_key="")).default_key or MANAGED_ALIAS}

    # --- Control

    async def _get_status(self, caller: Caller, p: dict[str, Any]) -> dict[str, Any]:
        status = await self._inspection.status(caller)
        held = None
        if self._use_cases is not None:
            full = status["Space"]["State"] != "ok"
            held = await self._use_cases.recycle_bin.held(caller, with_sizes=full)
        return status if held is None else {**status, "RecycleBin": held}

    async def _doctor(self, caller: Caller, p: dict[str, Any]) -> dict[str, Any]:
        return {"Findings": await self._inspection.doctor()}

    async def _benchmark(self, caller: Caller, p: dict[str, Any]) -> dict[str, Any]:
        return await host_helper.benchmark()

    async def _identify(self, caller: Caller, p: dict[str, Any]) -> dict[str, Any]:
        kind, ident = await self._use.volumes.identify(caller, p["Resource"])
        return {"Kind": kind, "ResourceId": ident}

    async def _restart_engine(self, caller: Caller, p: dict[str, Any]) -> dict[str, Any]:
        volume, pause = await self._use.attachments.restart_engine(caller, p["VolumeId"])
        return {"VolumeId": volume, "PauseMilliseconds": pause}

    async def _rebuild_catalog(self, caller: Caller, p: dict[str, Any]) -> dict[str, Any]:
        return await self._rebuilding.rebuild(caller)

    async def _check_store(self, call: Call) -> dict[str, Any]:
        async def progress(done: int, total: int) -> None:
            await call.stream({"Done": done, "Total": total, "Findings": [], "Steps": [], "Omitted": 0})

        if self._locked:
            raise KeyServiceLocked(reason=self._locked)
        report = await self._examination.check(
            caller_of(call.peer, self._host.admin_uid),
            call.parameters.get("Resources"),
            repair=bool(call.parameters.get("Repair")),
            progress=progress,
        )
        return describe_report(report)

    async def _verify(self, call: Call) -> dict[str, Any]:
        caller = caller_of(call.peer, self._host.admin_uid)
        resource, scrub = call.parameters["Resource"], bool(call.parameters.get("Scrub"))
        rate = call.parameters.get("Rate")
        async with aclosing(self._use.verifications.verify(caller, resource, scrub=scrub, rate=rate)) as steps:
            async for step in steps:
                members = {"JobId": step.job, "Done": step.done, "Total": step.total}
                if step.report is not None:
                    return {**members, "Report": describe_verification_report(step.report)}
                await call.stream(members)
        raise AssertionError("BUG: a verification without a report")

    async def _rewrap_data_keys(self, call: Call) -> dict[str, Any]:
        def members(done: int, total: int, **more: Any) -> dict[str, Any]:
            return {"Done": done, "Total": total, "Rewrapped": 0, "Current": 0, "Skipped": 0, "Failed": 0, **more}

        async def progress(done: int, total: int) -> None:
            await call.stream({**members(done, total), "Failures": []})

        p = call.parameters
        report = await self._use.rewrapping.rewrap(
            caller_of(call.peer, self._host.admin_uid),
            p["KeyId"],
            p.get("Resources"),
            p.get("DestinationKeyId"),
            progress,
        )
        return members(
            report.done,
            report.total,
            KeyId=report.key,
            Rewrapped=report.rewrapped,
            Current=report.current,
            Skipped=report.skipped,
            Failed=report.failed,
            Failures=[{"ResourceId": ident, "Error": error_members(error)} for ident, error in report.failures],
        )

    async def _accept_rollback(self, caller: Caller, p: dict[str, Any]) -> dict[str, Any]:
        if p.get("Generation") is None:
            return await self._use.rollback.describe(caller, p["Resource"])
        return await self._use.rollback.accept(caller, p["Resource"], p["Generation"])

    async def _rename(self, caller: Caller, p: dict[str, Any]) -> dict[str, Any]:
        ident = await self._use.volumes.rename(caller, p["Resource"], p["Name"])
        if looks_like_volume_id(ident):
            await self._use.attachments.relink(ident)
        return {"ResourceId": ident}

    async def _describe_account_limits(self, caller: Caller, p: dict[str, Any]) -> dict[str, Any]:
        return await self._use.usage.describe(caller, p.get("AccountId"))

    async def _record_mount(self, caller: Caller, p: dict[str, Any]) -> dict[str, Any]:
        await self._use.attachments.record_mount(caller, p["VolumeId"], p.get("MountPoint"))
        return {}

    async def _reclaim_volume(self, caller: Caller, p: dict[str, Any]) -> dict[str, Any]:
        return {"ReclaimedBytes": await self._use.attachments.reclaim(caller, p["VolumeId"])}


def _present(members: dict[str, Any]) -> dict[str, Any]:
    """Return the members that have a value: an optional member of a reply is absent rather than null."""
    return {name: value for name, value in members.items() if value is not None}
