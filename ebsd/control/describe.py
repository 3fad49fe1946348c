"""Volumes, snapshots and jobs as clients see them: catalog values to members of the interfaces, and filters. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Final

from ebsd.control.host import Host
from ebsd.domain.errors import InvalidParameterValue
from ebsd.domain.ids import ZONE
from ebsd.domain.model import Attachment, Job, Snapshot, Verification, Volume
from ebsd.domain.mountinfo import Mount, mounts_of_device
from ebsd.domain.states import SnapshotState
from ebsd.domain.units import gib_rounded_up
from ebsd.store.usage import Usage

LOOP_MAJOR: Final = 7


def describe_attachment(attachment: Attachment, host: Host, mounts: Sequence[Mount]) -> dict[str, Any]:
    """Return the EC2 Attachment; where the device is mounted is computed from mountinfo, not remembered."""
    described: dict[str, Any] = {
        "VolumeId": attachment.volume,
        "InstanceId": host.instance,
        "State": attachment.state.value,
        "Path": attachment.path,
        "BlockFile": str(host.runtime.block_file(attachment.volume)),
        "ReadOnly": attachment.read_only,
        "AttachTime": attachment.time,
    }
    if attachment.loop_minor is not None:
        device, number = f"/dev/loop{attachment.loop_minor}", f"{LOOP_MAJOR}:{attachment.loop_minor}"
        described |= {"Device": device, "DeviceNumber": number}
        mounted = mounts_of_device(mounts, device, number)
        if mounted:
            described["MountPoint"] = mounted[0].mount_point
    if attachment.mount_point is not None:
        described["RecordedMountPoint"] = attachment.mount_point
    return described


def describe_verification(found: Verification) -> dict[str, Any]:
    """Return the Verification of io.ebsd.EC2."""
    return {
        "Time": found.time,
        "Kind": found.kind,
        "Chunks": found.chunks,
        "DamagedChunks": found.damaged_chunks,
        "DamagedFiles": found.damaged_files,
    }


def describe_volume(
    volume: Volume, host: Host, mounts: Sequence[Mount], *, usage: Usage | None, integrity: str
) -> dict[str, Any]:
    """Return the EC2 Volume; without ``usage`` its members are left out."""
    described: dict[str, Any] = {
        "VolumeId": volume.id,
        "Name": volume.name,
        "OwnerId": volume.account,
        "State": volume.state.value,
        "Size": gib_rounded_up(volume.size),
        "SizeBytes": volume.size,
        "Encrypted": volume.encrypted,
        "AvailabilityZone": ZONE,
        "VolumeType": "ebsd",
        "CreateTime": volume.created,
        "Integrity": integrity,
        "Attachments": [describe_attachment(volume.attachment, host, mounts)] if volume.attachment else [],
        "Tags": [{"Key": key, "Value": value} for key, value in volume.tags.items()],
    }
    if volume.is_preallocated:
        described["Preallocated"] = True
    if volume.verification is not None:
        described["LastVerification"] = describe_verification(volume.verification)
    if volume.reason:
        described["StateReason"] = volume.reason
    described |= _describe_usage(usage)
    if volume.encrypted:
        described |= {"KmsKeyId": volume.key_arn, "DataEncryptionKeyId": volume.lineage}
    if volume.snapshot is not None:
        described["SnapshotId"] = volume.snapshot
    return described


def _describe_usage(usage: Usage | None) -> dict[str, Any]:
    if usage is None:
        return {}
    return {"AllocatedBytes": usage.allocated, "SharedBytes": usage.shared, "UniqueBytes": usage.unique}


def describe_snapshot(snapshot: Snapshot, percent: int, usage: Usage | None = None) -> dict[str, Any]:
    """Return the EC2 Snapshot; ``percent`` is the progress of a copy that is under way."""
    described: dict[str, Any] = {
        "SnapshotId": snapshot.id,
        "Name": snapshot.name,
        "OwnerId": snapshot.account,
        "VolumeId": snapshot.volume,
        "State": snapshot.state.value,
        "Progress": "100%" if snapshot.state is SnapshotState.COMPLETED else f"{min(percent, 99)}%",
        "VolumeSize": gib_rounded_up(snapshot.size),
        "SizeBytes": snapshot.size,
        "Description": snapshot.description,
        "Encrypted": snapshot.encrypted,
        "StartTime": snapshot.started,
        "Integrity": snapshot.integrity.value,
        "Tags": [{"Key": key, "Value": value} for key, value in snapshot.tags.items()],
    }
    if snapshot.verification is not None:
        described["LastVerification"] = describe_verification(snapshot.verification)
    if snapshot.message:
        described["StateMessage"] = snapshot.message
    if snapshot.encrypted:
        described |= {"KmsKeyId": snapshot.key_arn, "DataEncryptionKeyId": snapshot.lineage}
    if snapshot.completed is not None:
        described["CompletionTime"] = snapshot.completed
    if snapshot.pause_us is not None:
        described["PauseMicroseconds"] = snapshot.pause_us
    described |= _describe_usage(usage)
    return described


def describe_job(job: Job) -> dict[str, Any]:
    """Return the Job of io.ebsd.Control."""
    described: dict[str, Any] = {
        "JobId": job.id,
        "OwnerId": job.account,
        "Kind": job.kind.value,
        "State": job.state.value,
        "SourceId": job.source,
        "DestinationId": job.destination,
        "Total": job.total,
        "Done": job.done,
        "StartTime": job.started,
    }
    if job.ended is not None:
        described["EndTime"] = job.ended
    if job.error is not None:
        described["Error"] = dict(job.error)
    return described


Filters = Mapping[str, Callable[[dict[str, Any]], Sequence[str]]]
"""Name of a filter -> the texts of a described resource that it is compared with."""

VOLUME_FILTERS: Final[Filters] = {
    "volume-id": lambda v: [v["VolumeId"]],
    "name": lambda v: [v["Name"]],
    "status": lambda v: [v["State"]],
    "state": lambda v: [v["State"]],
    "encrypted": lambda v: [str(v["Encrypted"]).lower()],
    "kms-key-id": lambda v: [v.get("KmsKeyId") or ""],
    "size": lambda v: [str(v["Size"])],
    "snapshot-id": lambda v: [v.get("SnapshotId") or ""],
    "owner-id": lambda v: [v["OwnerId"]],
    "availability-zone": lambda v: [v["AvailabilityZone"]],
    "attachment.status": lambda v: [a["State"] for a in v["Attachments"]],
    "attachment.device": lambda v: [a.get("Device") or "" for a in v["Attachments"]],
    "tag-key": lambda v: [t["Key"] for t in v["Tags"]],
}


SNAPSHOT_FILTERS: Final[Filters] = {
    "snapshot-id": lambda s: [s["SnapshotId"]],
    "name": lambda s: [s["Name"]],
    "status": lambda s: [s["State"]],
    "state": lambda s: [s["State"]],
    "volume-id": lambda s: [s["VolumeId"]],
    "volume-size": lambda s: [str(s["VolumeSize"])],
    "description": lambda s: [s["Description"]],
    "encrypted": lambda s: [str(s["Encrypted"]).lower()],
    "kms-key-id": lambda s: [s.get("KmsKeyId") or ""],
    "owner-id": lambda s: [s["OwnerId"]],
    "progress": lambda s: [s["Progress"]],
    "tag-key": lambda s: [t["Key"] for t in s["Tags"]],
}


def matches(resource: dict[str, Any], filters: Sequence[Mapping[str, Any]], known: Filters) -> bool:
    """Say whether a described resource passes every filter; values may hold ``*`` and ``?`` as in EC2.

    Raises InvalidParameterValue for a filter that does not exist.
    """
    for chosen in filters:
        name = str(chosen["Name"])
        if name.startswith("tag:"):
            texts: Sequence[str] = [t["Value"] for t in resource["Tags"] if t["Key"] == name[4:]]
        elif name in known:
            texts = known[name](resource)
        else:
            raise InvalidParameterValue(
                value=name, parameter="Filter", reason=f"known filters are tag:KEY, {', '.join(sorted(known))}"
            )
        if not any(fnmatchcase(text, pattern) for text in texts for pattern in chosen["Values"]):
            return False
    return True
