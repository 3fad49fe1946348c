"""Volumes, snapshots and jobs as clients see them: catalog values to members of the interfaces, and filters. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from ebsd.control.host import Host
from ebsd.domain.filters import TAG, Texts
from ebsd.domain.ids import ZONE
from ebsd.domain.jobs import JobView
from ebsd.domain.model import Attachment, Modification, Snapshot, Verification, Volume
from ebsd.domain.mountinfo import Mount, mounts_of_device
from ebsd.domain.states import ModificationState, SnapshotState
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
    if volume.source_volume is not None:
        described["SourceVolumeId"] = volume.source_volume
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
        "Progress": "100%" if snapshot.state is not SnapshotState.PENDING else f"{min(percent, 99)}%",
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


_EVERYBODYS: Final = frozenset(
    ("SnapshotId", "OwnerId", "VolumeId", "State", "Progress", "VolumeSize", "SizeBytes", "Description", "Encrypted",
     "KmsKeyId", "DataEncryptionKeyId", "StartTime", "CompletionTime", "Integrity")
)  # fmt: skip
"""Members of a Snapshot that EC2 shows to whom it is shared with, and Integrity; all others are its owner's."""


def describe_shared_snapshot(snapshot: Snapshot) -> dict[str, Any]:
    """Return what somebody sees of a snapshot that is shared with him: no name, no tags, nothing of its relatives."""
    described = describe_snapshot(snapshot, 0)
    return {name: value for name, value in described.items() if name in _EVERYBODYS} | {
        "Name": snapshot.id,
        "Tags": [],
    }


def describe_job(view: JobView) -> dict[str, Any]:
    """Return the Job of io.ebsd.Control."""
    job = view.job
    described: dict[str, Any] = {
        "JobId": job.id,
        "OwnerId": job.account,
        "Kind": job.kind.value,
        "State": job.state.value,
        "SourceId": job.source,
        "DestinationId": job.destination,
        "Total": job.total,
        "Done": job.done,
        "RateLimit": view.limit,
        "StartTime": job.started,
    }
    if view.rate is not None:
        described["BytesPerSecond"] = view.rate
    if view.seconds_left is not None:
        described["SecondsLeft"] = view.seconds_left
    if job.ended is not None:
        described["EndTime"] = job.ended
    if job.error is not None:
        described["Error"] = dict(job.error)
    return described


def describe_modification(found: Modification) -> dict[str, Any]:
    """Return the VolumeModification of io.ebsd.EC2."""
    described: dict[str, Any] = {
        "VolumeId": found.volume,
        "ModificationState": found.state.value,
        "OriginalSize": gib_rounded_up(found.original),
        "OriginalSizeBytes": found.original,
        "TargetSize": gib_rounded_up(found.target),
        "TargetSizeBytes": found.target,
        "Progress": _MODIFICATION_PROGRESS[found.state],
        "StartTime": found.started,
    }
    if found.ended is not None:
        described["EndTime"] = found.ended
    if found.message:
        described["StatusMessage"] = found.message
    return described


_MODIFICATION_PROGRESS: Final = {
    ModificationState.MODIFYING: 0,
    ModificationState.OPTIMIZING: 50,
    ModificationState.COMPLETED: 100,
    ModificationState.FAILED: 0,
}


# --- filters: name -> the texts of a described resource that a value is compared with


def _text(member: str) -> Texts:
    return lambda described: [str(described.get(member) or "")]


def _flag(member: str) -> Texts:
    return lambda described: [str(bool(described.get(member))).lower()]


def _attached(member: str) -> Texts:
    return lambda described: [str(each.get(member) or "") for each in described["Attachments"]]


def _tag_keys(described: Mapping[str, Any]) -> list[str]:
    return [tag["Key"] for tag in described["Tags"]]


VOLUME_FILTERS: Final[Mapping[str, Texts]] = {
    "volume-id": _text("VolumeId"),
    "name": _text("Name"),
    "status": _text("State"),
    "state": _text("State"),
    "encrypted": _flag("Encrypted"),
    "kms-key-id": _text("KmsKeyId"),
    "data-encryption-key-id": _text("DataEncryptionKeyId"),
    "size": _text("Size"),
    "snapshot-id": _text("SnapshotId"),
    "owner-id": _text("OwnerId"),
    "availability-zone": _text("AvailabilityZone"),
    "volume-type": _text("VolumeType"),
    "create-time": _text("CreateTime"),
    "integrity": _text("Integrity"),
    "attachment.status": _attached("State"),
    "attachment.device": _attached("Device"),
    "attachment.instance-id": _attached("InstanceId"),
    "attachment.attach-time": _attached("AttachTime"),
    "tag-key": _tag_keys,
    TAG: _tag_keys,
}
"""Those of DescribeVolumes that mean something on one host, and some that only ebsd has."""

SNAPSHOT_FILTERS: Final[Mapping[str, Texts]] = {
    "snapshot-id": _text("SnapshotId"),
    "name": _text("Name"),
    "status": _text("State"),
    "state": _text("State"),
    "volume-id": _text("VolumeId"),
    "volume-size": _text("VolumeSize"),
    "size": _text("VolumeSize"),
    "description": _text("Description"),
    "encrypted": _flag("Encrypted"),
    "kms-key-id": _text("KmsKeyId"),
    "data-encryption-key-id": _text("DataEncryptionKeyId"),
    "owner-id": _text("OwnerId"),
    "progress": _text("Progress"),
    "start-time": _text("StartTime"),
    "integrity": _text("Integrity"),
    "tag-key": _tag_keys,
    TAG: _tag_keys,
}

MODIFICATION_FILTERS: Final[Mapping[str, Texts]] = {
    "volume-id": _text("VolumeId"),
    "modification-state": _text("ModificationState"),
    "state": _text("ModificationState"),
    "original-size": _text("OriginalSize"),
    "target-size": _text("TargetSize"),
    "start-time": _text("StartTime"),
}

JOB_FILTERS: Final[Mapping[str, Texts]] = {
    "job-id": _text("JobId"),
    "owner-id": _text("OwnerId"),
    "kind": _text("Kind"),
    "status": _text("State"),
    "state": _text("State"),
    "source-id": _text("SourceId"),
    "destination-id": _text("DestinationId"),
    "start-time": _text("StartTime"),
}
