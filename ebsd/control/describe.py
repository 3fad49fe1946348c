"""Volumes as EC2 shows them: catalog values to members of io.ebsd.EC2, and the filters over those. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Final

from ebsd.control.host import Host
from ebsd.domain.errors import InvalidParameterValue
from ebsd.domain.ids import ZONE
from ebsd.domain.model import Attachment, Volume
from ebsd.domain.mountinfo import Mount, mounts_of_device
from ebsd.domain.units import gib_rounded_up

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


def describe_volume(
    volume: Volume, host: Host, mounts: Sequence[Mount], *, allocated: int | None, integrity: str
) -> dict[str, Any]:
    """Return the EC2 Volume. ``allocated`` is in bytes of the host file system."""
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
    if volume.reason:
        described["StateReason"] = volume.reason
    if allocated is not None:
        described["AllocatedBytes"] = allocated
    if volume.encrypted:
        described |= {"KmsKeyId": volume.key_arn, "DataEncryptionKeyId": volume.lineage}
    if volume.snapshot is not None:
        described["SnapshotId"] = volume.snapshot
    return described


_FILTERS: Final[Mapping[str, Callable[[dict[str, Any]], Sequence[str]]]] = {
    # name of the filter -> the texts of a volume it is compared with
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


def matches(volume: dict[str, Any], filters: Sequence[Mapping[str, Any]]) -> bool:
    """Say whether a described volume passes every filter; values may hold ``*`` and ``?`` as in EC2.

    Raises InvalidParameterValue for a filter that does not exist.
    """
    for chosen in filters:
        name = str(chosen["Name"])
        if name.startswith("tag:"):
            texts: Sequence[str] = [t["Value"] for t in volume["Tags"] if t["Key"] == name[4:]]
        elif name in _FILTERS:
            texts = _FILTERS[name](volume)
        else:
            raise InvalidParameterValue(
                value=name, parameter="Filter", reason=f"known filters are tag:KEY, {', '.join(sorted(_FILTERS))}"
            )
        if not any(fnmatchcase(text, pattern) for text in texts for pattern in chosen["Values"]):
            return False
    return True
