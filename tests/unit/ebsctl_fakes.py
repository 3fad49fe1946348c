"""Fakes for the tests of ebsctl: a server that speaks both sockets' contract, and a host without real mounts.

The server checks every request and every reply against the interface files; a test that breaks the contract, on
either side, fails at ``close``.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from ebsctl.app import App
from ebsctl.cli import cli
from ebsctl.mounting import Programs
from ebsd.domain.errors import (
    AdmissionRuleNotFound,
    AliasExists,
    AliasNotFound,
    CommandFailed,
    EbsdError,
    HostUnsupported,
    IncorrectState,
    IncorrectVolumeState,
    InvalidParameterValue,
    JobNotFound,
    KeyNotFound,
    KeyStillUsed,
    RemoteError,
    ResourceNotFound,
    SnapshotNotFound,
    VolumeAlreadyAttached,
    VolumeNotFound,
)
from ebsd.wire.descriptors import close_all, recv_with_fds
from ebsd.wire.framing import FrameReader, encode
from ebsd.wire.idl import Interface
from ebsd.wire.messages import CallMessage, make_reply, make_service_error, parse_call, split_method

TIME = "2026-01-02T03:04:05Z"
GIB = 1 << 30
KEY_1 = "11111111-2222-4333-8444-555555555555"
KEY_2 = "66666666-7777-4888-9999-aaaaaaaaaaaa"
OWN = "000000000000"


def volume_id(number: int) -> str:
    return f"vol-{number:017x}"


def volume(number: int = 1, name: str = "data", **members: Any) -> dict[str, Any]:
    """Return a Volume that the interface file accepts."""
    return {
        "VolumeId": volume_id(number),
        "Name": name,
        "OwnerId": OWN,
        "State": "available",
        "Size": 10,
        "SizeBytes": 10 * GIB,
        "AllocatedBytes": 65536,
        "Encrypted": True,
        "KmsKeyId": f"arn:aws:kms:local:{OWN}:key/{KEY_1}",
        "DataEncryptionKeyId": KEY_2,
        "AvailabilityZone": "local-1a",
        "VolumeType": "gp3",
        "CreateTime": TIME,
        "Integrity": "verified",
        "Attachments": [],
        "Tags": [],
        **members,
    }


def snapshot_id(number: int) -> str:
    return f"snap-{number:017x}"


def snapshot(number: int = 1, name: str = "monday", **members: Any) -> dict[str, Any]:
    """Return a Snapshot that the interface file accepts."""
    return {
        "SnapshotId": snapshot_id(number),
        "Name": name,
        "OwnerId": OWN,
        "VolumeId": volume_id(1),
        "State": "completed",
        "Progress": "100%",
        "VolumeSize": 10,
        "SizeBytes": 10 * GIB,
        "Description": "",
        "Encrypted": True,
        "KmsKeyId": f"arn:aws:kms:local:{OWN}:key/{KEY_1}",
        "DataEncryptionKeyId": KEY_2,
        "StartTime": TIME,
        "Integrity": "verified",
        "Tags": [],
        **members,
    }


def job_id(number: int) -> str:
    return f"job-{number:017x}"


def job(number: int = 1, **members: Any) -> dict[str, Any]:
    """Return a Job that copies a snapshot."""
    return {
        "JobId": job_id(number),
        "OwnerId": OWN,
        "Kind": "copy-snapshot",
        "State": "running",
        "SourceId": snapshot_id(1),
        "DestinationId": snapshot_id(2),
        "Total": 4 * GIB,
        "Done": 0,
        "RateLimit": 0,
        "StartTime": TIME,
        **members,
    }


FAILURE = {"Code": "Ebsd.IntegrityFailure", "Message": "The source fails its integrity check.", "Hint": "Ask doctor."}
"""The Error of a job."""


def attachment(number: int = 1, **members: Any) -> dict[str, Any]:
    """Return an Attachment with a loop device."""
    return {
        "VolumeId": volume_id(number),
        "InstanceId": "i-" + "0" * 17,
        "State": "attached",
        "Path": f"/dev/loop{5000 + number}",
        "BlockFile": f"/run/ebsd/volumes/{volume_id(number)}",
        "Device": f"/dev/loop{5000 + number}",
        "DeviceNumber": f"7:{5000 + number}",
        "ReadOnly": False,
        "AttachTime": TIME,
        **members,
    }


def key(key_id: str = KEY_1, **members: Any) -> dict[str, Any]:
    """Return a KeyMetadata."""
    return {
        "AWSAccountId": OWN,
        "KeyId": key_id,
        "Arn": f"arn:aws:kms:local:{OWN}:key/{key_id}",
        "CreationDate": TIME,
        "Enabled": True,
        "Description": "",
        "KeyUsage": "ENCRYPT_DECRYPT",
        "KeyState": "Enabled",
        "Origin": "AWS_KMS",
        "KeyManager": "CUSTOMER",
        "KeySpec": "SYMMETRIC_DEFAULT",
        "CustomerMasterKeySpec": "SYMMETRIC_DEFAULT",
        "EncryptionAlgorithms": ["SYMMETRIC_DEFAULT"],
        "MultiRegion": False,
        "CurrentKeyMaterialId": "0" * 64,
        **members,
    }


class World:
    """What the fake server knows, and its methods, named as in the interface files."""

    def __init__(self) -> None:
        self.volumes: dict[str, dict[str, Any]] = {}
        self.reclaimed = 0
        self.snapshots: dict[str, dict[str, Any]] = {}
        self.jobs: dict[str, dict[str, Any]] = {}
        self.admission: dict[str | None, dict[str, Any]] = {}
        self.reencrypts = False
        """Whether copies and restores need a job."""
        self.job_end: dict[str, Any] = {"State": "completed"}
        self.verification: dict[str, Any] = {}
        """Members of the report of the next verification."""
        """What a job becomes when it is waited for."""
        self.keys: dict[str, dict[str, Any]] = {}
        self.aliases: dict[str, str] = {}
        self.key_resources: list[str] = []
        """What every key encrypts."""
        self.key_is_here = True
        """Whether the verification key of the audit log was not taken away."""
        self.blank = True
        self.note: str | None = None
        self.by_default = True
        self.public_access = "unblocked"
        self.shares: dict[str, set[str]] = {}
        self.default_key = "alias/aws/ebs"
        self.findings: list[dict[str, Any]] = []
        self.key_service_state = "running"
        self.passphrases: list[bytes] = []
        self.restored: list[bytes] = []

    def add(self, *volumes: dict[str, Any]) -> None:
        self.volumes.update({item["VolumeId"]: item for item in volumes})

    def add_snapshots(self, *snapshots: dict[str, Any]) -> None:
        self.snapshots.update({item["SnapshotId"]: item for item in snapshots})

    def add_jobs(self, *jobs: dict[str, Any]) -> None:
        self.jobs.update({item["JobId"]: item for item in jobs})

    def start_job(self, kind: str, source: str, destination: str) -> str | None:
        if not self.reencrypts:
            return None
        made = job(len(self.jobs) + 1, Kind=kind, SourceId=source, DestinationId=destination)
        self.add_jobs(made)
        ident: str = made["JobId"]
        return ident

    def find_job(self, ident: str) -> dict[str, Any]:
        if ident not in self.jobs:
            raise JobNotFound(job=ident)
        return self.jobs[ident]

    def find_snapshot(self, name: str) -> dict[str, Any]:
        for item in self.snapshots.values():
            if name in (item["SnapshotId"], item["Name"]):
                return item
        raise SnapshotNotFound(snapshot=name)

    def identify(self, name: str) -> tuple[str, dict[str, Any]]:
        """Return (kind, resource); the error of an unknown id is that of its own kind."""
        if name.startswith("vol-"):
            return "volume", self.find(name)
        if name.startswith("snap-"):
            return "snapshot", self.find_snapshot(name)
        for kind, items in (("volume", self.volumes), ("snapshot", self.snapshots)):
            for item in items.values():
                if item["Name"] == name:
                    return kind, item
        raise ResourceNotFound(resource=name)

    def find(self, name: str) -> dict[str, Any]:
        for item in self.volumes.values():
            if name in (item["VolumeId"], item["Name"]):
                return item
        raise VolumeNotFound(volume=name)

    def find_key(self, reference: str) -> dict[str, Any]:
        if reference.startswith("alias/") and reference not in self.aliases:
            raise AliasNotFound(alias=reference)
        key_id = self.aliases.get(reference, reference.rpartition("/")[2])
        if key_id not in self.keys:
            raise KeyNotFound(key=reference)
        return self.keys[key_id]

    # io.ebsd.EC2

    def EC2_CreateVolume(self, p: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        source = self.find_snapshot(p["SnapshotId"]) if "SnapshotId" in p else None
        size = p.get("SizeBytes") or (source or {})["SizeBytes"]
        made = volume(
            len(self.volumes) + 1,
            p["Name"],
            SizeBytes=size,
            Size=-(-size // GIB),
            Tags=p.get("Tags", []),
            Encrypted=self.by_default or p.get("Encrypted") is True,
            Integrity="new",
        )
        self.add(made)
        job_ident = None
        if source is not None:
            made["SnapshotId"] = source["SnapshotId"]
            job_ident = self.start_job("restore-volume", source["SnapshotId"], made["VolumeId"])
            made["State"] = "available" if job_ident is None else "creating"
        return {"Volume": made, "JobId": job_ident, "Note": self.note}

    def EC2_ModifyVolume(self, p: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        found = self.find(p["VolumeId"])
        before = found["SizeBytes"]
        if p["SizeBytes"] < before:
            reason = "New size cannot be smaller than existing size"
            raise InvalidParameterValue(value=p["SizeBytes"], parameter="Size", reason=reason)
        found |= {"SizeBytes": p["SizeBytes"], "Size": -(-p["SizeBytes"] // GIB)}
        return {"Volume": found, "OriginalSizeBytes": before}

    def EC2_CreateSnapshot(self, p: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        source = self.find(p["VolumeId"])
        number = len(self.snapshots) + 1
        made = snapshot(
            number,
            p.get("Name", snapshot_id(number)),
            VolumeId=source["VolumeId"],
            SizeBytes=source["SizeBytes"],
            Description=p.get("Description", ""),
            Tags=p.get("Tags", []),
            PauseMicroseconds=2345 if source["Attachments"] else None,
            Integrity=source["Integrity"] if source["Integrity"] == "unverified" else "verified",
        )
        self.add_snapshots(made)
        return {"Snapshot": made}

    def EC2_CreateSnapshots(self, p: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        names = p.get("VolumeIds") or [v["VolumeId"] for v in self.volumes.values() if v["Attachments"]]
        return {"Snapshots": [self.EC2_CreateSnapshot({"VolumeId": name}, [])["Snapshot"] for name in names]}

    def EC2_DeleteSnapshot(self, p: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        del self.snapshots[self.find_snapshot(p["SnapshotId"])["SnapshotId"]]
        return {}

    def EC2_DescribeSnapshots(self, p: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        if "SnapshotIds" in p:
            return {"Snapshots": [self.find_snapshot(name) for name in p["SnapshotIds"]]}
        return {"Snapshots": list(self.snapshots.values())}

    def EC2_CopySnapshot(self, p: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        source = self.find_snapshot(p["SourceSnapshotId"])
        number = len(self.snapshots) + 1
        made = snapshot(
            number,
            p.get("Name", snapshot_id(number)),
            VolumeId="vol-ffffffffffffffff0",
            Description=p.get("Description", ""),
            Tags=p.get("Tags", []),
        )
        self.add_snapshots(made)
        ident = self.start_job("copy-snapshot", source["SnapshotId"], made["SnapshotId"])
        if ident is not None:
            made |= {"State": "pending", "Progress": "0%"}
        return {"Snapshot": made, "JobId": ident, "Note": self.note}

    def EC2_CopyVolumes(self, p: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        source = self.find(p["SourceVolumeId"])
        made = volume(len(self.volumes) + 1, p["Name"], SourceVolumeId=source["VolumeId"], Tags=p.get("Tags", []))
        self.add(made)
        return {"Volumes": [made], "Note": self.note}

    def Control_CreateSchedule(self, p: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        self.schedule = {
            **p, "ScheduleId": "sched-1", "OwnerId": "000000001000", "State": "active", "NamePrefix": "",
            "CreateTime": "2026-11-21T12:00:00Z", "NextRunTime": "2026-11-22T02:30:00Z", "SnapshotIds": [],
            "LastRunTime": "2026-11-21T02:30:00Z", "LastRunState": "failed", "LastRunMessage": "no space",
        }  # fmt: skip
        return {"Schedule": self.schedule}

    def Control_RunSchedule(self, p: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        return {"Schedule": self.schedule}

    def Control_DescribeSchedules(self, p: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        return {"Schedules": [self.schedule]}

    def EC2_DeleteVolume(self, p: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        del self.volumes[self.find(p["VolumeId"])["VolumeId"]]
        return {}

    def EC2_DescribeVolumes(self, p: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        if "VolumeIds" in p:
            return {"Volumes": [self.find(name) for name in p["VolumeIds"]]}
        return {"Volumes": list(self.volumes.values())}

    def EC2_AttachVolume(self, p: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        found = self.find(p["VolumeId"])
        if found["Attachments"]:
            path = found["Attachments"][0]["Path"]
            raise VolumeAlreadyAttached(volume=found["VolumeId"], path=path)
        number = int(found["VolumeId"].removeprefix("vol-"), 16)
        made = attachment(number, ReadOnly=p.get("ReadOnly", False))
        if p.get("ExposeAs") == "file":
            made |= {"Path": made["BlockFile"], "Device": None, "DeviceNumber": None}
        found["Attachments"] = [made]
        found["State"] = "in-use"
        return {"Volume": found, "Attachment": made, "Blank": self.blank}

    def EC2_DetachVolume(self, p: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        found = self.find(p["VolumeId"])
        if not found["Attachments"]:
            raise IncorrectVolumeState(volume=p["VolumeId"], state=found["State"])
        found |= {"Attachments": [], "State": "available"}
        return {"Volume": found}

    def EC2_CreateTags(self, p: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        for resource in p["Resources"]:
            self.identify(resource)[1]["Tags"] += p["Tags"]
        return {}

    def EC2_DeleteTags(self, p: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        gone = {tag["Key"] for tag in p["Tags"]}
        for resource in p["Resources"]:
            found = self.identify(resource)[1]
            found["Tags"] = [tag for tag in found["Tags"] if tag["Key"] not in gone]
        return {}

    def EC2_GetEbsEncryptionByDefault(self, _p: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        return {"EbsEncryptionByDefault": self.by_default}

    def EC2_EnableEbsEncryptionByDefault(self, _p: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        self.by_default = True
        return {"EbsEncryptionByDefault": True}

    def EC2_DisableEbsEncryptionByDefault(self, _p: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        self.by_default = False
        return {"EbsEncryptionByDefault": False}

    def Control_DescribeAdmissionRules(self, _p: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        return {"Rules": list(self.admission.values())}

    def Control_PutAdmissionRule(self, p: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        rule = {**p, "ChangeTime": "2026-01-02T03:04:05Z"}
        self.admission[p.get("AccountId")] = rule
        return {"Rule": rule}

    def Control_DeleteAdmissionRule(self, p: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        if self.admission.pop(p.get("AccountId"), None) is None:
            raise AdmissionRuleNotFound(whom=p.get("AccountId", "all accounts"))
        return {}

    def Control_DescribeAccountLimits(self, _p: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        limits = [
            {"Name": "Volumes", "Used": 2, "Limit": 10},
            {"Name": "VolumeBytes", "Used": 3 << 30},
            {"Name": "Snapshots", "Used": 0, "Limit": 5},
            {"Name": "Jobs", "Used": 0},
        ]
        return {"AccountId": "000000001000", "MayCreate": True, "Limits": limits}

    def EC2_GetEbsDefaultKmsKeyId(self, _p: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        return {"KmsKeyId": self.default_key}

    def EC2_ModifyEbsDefaultKmsKeyId(self, p: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        self.default_key = f"arn:aws:kms:local:{OWN}:key/{KEY_1}" if p["KmsKeyId"] else ""
        return {"KmsKeyId": self.default_key}

    def EC2_ResetEbsDefaultKmsKeyId(self, _p: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        self.default_key = "alias/aws/ebs"
        return {"KmsKeyId": self.default_key}

    def EC2_GetSnapshotBlockPublicAccess(self, _p: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        return {"State": self.public_access, "ManagedBy": "account"}

    def EC2_EnableSnapshotBlockPublicAccess(self, p: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        self.public_access = p["State"]
        return {"State": self.public_access}

    def EC2_DisableSnapshotBlockPublicAccess(self, _p: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        self.public_access = "unblocked"
        return {"State": self.public_access}

    def EC2_ModifySnapshotAttribute(self, p: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        whom = {*p.get("UserIds", []), *p.get("GroupNames", [])}
        shares = self.shares.setdefault(self.find_snapshot(p["SnapshotId"])["SnapshotId"], set())
        (shares.update if p["OperationType"] == "add" else shares.difference_update)(whom)
        return {}

    def EC2_ResetSnapshotAttribute(self, p: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        self.shares.pop(self.find_snapshot(p["SnapshotId"])["SnapshotId"], None)
        return {}

    def EC2_DescribeSnapshotAttribute(self, p: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        ident = self.find_snapshot(p["SnapshotId"])["SnapshotId"]
        whom = sorted(self.shares.get(ident, ()), reverse=True)
        named = [{"Group": who} if who == "all" else {"UserId": who} for who in whom]
        return {"SnapshotId": ident, "CreateVolumePermissions": named}

    # io.ebsd.Control

    def Control_GetStatus(self, _p: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        return {
            "Version": "0.1.0",
            "State": "running",
            "Pid": 42,
            "Uid": 0,
            "StateDirectory": "/var/lib/ebsd",
            "RuntimeDirectory": "/run/ebsd",
            "StartTime": TIME,
            "Volumes": len(self.volumes),
            "AttachedVolumes": sum(1 for item in self.volumes.values() if item["Attachments"]),
            "FreeBytes": 5 * GIB,
            "Space": {
                "State": "ok",
                "TotalBytes": 50 * GIB,
                "FreeBytes": 5 * GIB,
                "ReserveBytes": GIB // 2,
                "BallastBytes": GIB // 4,
                "StoredBytes": 40 * GIB,
            },
            "KeyService": {"State": "running", "Pid": 43},
        }

    def Control_Doctor(self, _p: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        return {"Findings": self.findings}

    def Control_Identify(self, p: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        kind, found = self.identify(p["Resource"])
        return {"Kind": kind, "ResourceId": found["VolumeId" if kind == "volume" else "SnapshotId"]}

    def Control_Rename(self, p: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        kind, found = self.identify(p["Resource"])
        found["Name"] = p["Name"]
        return {"ResourceId": found["VolumeId" if kind == "volume" else "SnapshotId"]}

    def Control_DescribeJobs(self, p: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        if "JobIds" in p:
            return {"Jobs": [self.find_job(ident) for ident in p["JobIds"]]}
        return {"Jobs": list(self.jobs.values())}

    def Control_WaitJob(self, p: dict[str, Any], _fds: list[int]) -> list[dict[str, Any]]:
        found = self.find_job(p["JobId"])
        told = []
        if found["State"] == "running":
            told = [{"Job": {**found, "Done": found["Total"] * part // 4}} for part in range(4)]
            found |= {"Done": found["Total"], "EndTime": TIME, **self.job_end}
            self._settle(found)
        return [*told, {"Job": found}]

    def Control_Verify(self, p: dict[str, Any], _fds: list[int]) -> list[dict[str, Any]]:
        resource = p["Resource"]
        found = self.find_snapshot(resource)["SnapshotId"] if resource.startswith("snap-") else self.find(resource)
        report = {
            "ResourceId": found if isinstance(found, str) else found["VolumeId"],
            "Kind": "integrity" if p.get("Scrub") else "authenticity",
            "Note": "no key was used, as was asked for" if p.get("Scrub") else None,
            "Time": TIME, "Chunks": 4, "Bytes": 4 * 65536, "WithoutLeaf": 0, "HashedNow": 0, "DamagedChunks": 0,
            "Damage": [], "Complete": True, **self.verification,
        }  # fmt: skip
        total = report["Bytes"]
        last = {
            "JobId": job_id(1),
            "Done": total,
            "Total": total,
            "Report": {n: v for n, v in report.items() if v is not None},
        }
        return [*({**last, "Done": total * part // 4, "Report": None} for part in range(4)), last]

    def Control_LimitJob(self, p: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        found = self.find_job(p["JobId"])
        found["RateLimit"] = p.get("Rate", 7)
        return {"Job": found}

    def Control_CancelJob(self, p: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        found = self.find_job(p["JobId"])
        if found["State"] != "running":
            raise IncorrectState(reason=f"The job {p['JobId']} has ended already")
        found |= {"State": "cancelled", "EndTime": TIME}
        self._settle(found)
        return {"Job": found}

    def _settle(self, ended: dict[str, Any]) -> None:
        """Give what a job was filling its state; what was cancelled is removed."""
        ident = ended["DestinationId"]
        if ended["State"] == "cancelled":
            self.volumes.pop(ident, None)
            self.snapshots.pop(ident, None)
        if ident in self.volumes:
            self.volumes[ident]["State"] = "available" if ended["State"] == "completed" else "error"
        if ident in self.snapshots:
            state = "completed" if ended["State"] == "completed" else "error"
            self.snapshots[ident] |= {"State": state, "Progress": "100%"}

    def Control_RecordMount(self, p: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        found = self.find(p["VolumeId"])["Attachments"][0]
        found["RecordedMountPoint"] = found["MountPoint"] = p.get("MountPoint")
        return {}

    def Control_ReclaimVolume(self, p: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        self.find(p["VolumeId"])
        self.reclaimed += GIB
        return {"ReclaimedBytes": self.reclaimed}

    # io.ebsd.KMS

    def KMS_CreateKey(self, p: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        key_id = KEY_1 if KEY_1 not in self.keys else KEY_2
        self.keys[key_id] = key(key_id, Description=p.get("Description", ""))
        return {"KeyMetadata": self.keys[key_id]}

    def KMS_DescribeKey(self, p: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        return {"KeyMetadata": self.find_key(p["KeyId"])}

    def KMS_ListKeys(self, _p: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        return {"Keys": [{"KeyId": item["KeyId"], "KeyArn": item["Arn"]} for item in self.keys.values()]}

    def _switched(self, p: dict[str, Any], enabled: bool) -> dict[str, Any]:
        self.keys[p["KeyId"]] |= {"Enabled": enabled, "KeyState": "Enabled" if enabled else "Disabled"}
        return {}

    def KMS_EnableKey(self, p: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        return self._switched(p, True)

    def KMS_DisableKey(self, p: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        return self._switched(p, False)

    def KMS_CreateAlias(self, p: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        if p["AliasName"] in self.aliases:
            raise AliasExists(alias=p["AliasName"])
        self.aliases[p["AliasName"]] = p["TargetKeyId"]
        return {}

    def KMS_UpdateAlias(self, p: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        if p["AliasName"] not in self.aliases:
            raise AliasNotFound(alias=p["AliasName"])
        self.aliases[p["AliasName"]] = p["TargetKeyId"]
        return {}

    def KMS_DeleteAlias(self, p: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        if self.aliases.pop(p["AliasName"], None) is None:
            raise AliasNotFound(alias=p["AliasName"])
        return {}

    def KMS_ListAliases(self, p: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        return {
            "Aliases": [
                {
                    "AliasName": alias,
                    "AliasArn": f"arn:aws:kms:local:{OWN}:{alias}",
                    "TargetKeyId": target,
                    "CreationDate": TIME,
                    "LastUpdatedDate": TIME,
                }
                for alias, target in self.aliases.items()
                if p.get("KeyId") in (None, target, f"arn:aws:kms:local:{OWN}:key/{target}")
            ]
        }

    def KMS_ScheduleKeyDeletion(self, p: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        found = self.find_key(p["KeyId"])
        if self.key_resources and not p.get("AcceptDataLoss"):
            raise KeyStillUsed(key=found["Arn"], what=", ".join(self.key_resources))
        found |= {"KeyState": "PendingDeletion", "DeletionDate": TIME, "Enabled": False}
        days = p.get("PendingWindowInDays", 30)
        return {
            "KeyId": found["Arn"],
            "DeletionDate": TIME,
            "KeyState": "PendingDeletion",
            "PendingWindowInDays": days,
        }

    def KMS_CancelKeyDeletion(self, p: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        found = self.find_key(p["KeyId"])
        found |= {"KeyState": "Disabled"}
        del found["DeletionDate"]
        return {"KeyId": found["Arn"]}

    # io.ebsd.Audit

    def Audit_GetLog(self, _p: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        head = f"0:{'0' * 64}"
        return {"Head": head, "Directory": "/audit", "Segments": [], "VerificationKeyPresent": self.key_is_here}

    # io.ebsd.KeyService

    def KeyService_ListKeyResources(self, _p: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        listed = [{"ResourceId": ident, "OwnerId": OWN} for ident in self.key_resources]
        return {"Resources": listed, "Total": len(listed)}

    def KeyService_GetStatus(self, _p: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        state = self.key_service_state
        return {
            "State": state,
            "Reason": None if state == "running" else "the root key file is missing",
            "Pid": 43,
            "StateDirectory": "/var/lib/ebsd-kms",
            "RootKey": "/etc/ebsd/root.key",
            "RootKeyKind": "file",
            "Keys": len(self.keys),
        }

    def KeyService_Backup(self, p: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        self.passphrases.append(_read_to_end(fds[p["PassphraseDescriptor"]]))
        written = os.write(fds[p["Destination"]], b"sealed keys")
        return {"Keys": len(self.keys), "Bytes": written}

    def KeyService_Restore(self, p: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        self.passphrases.append(_read_to_end(fds[p["PassphraseDescriptor"]]))
        self.restored.append(_read_to_end(fds[p["Source"]]))
        return {"Keys": 2}


def _read_to_end(descriptor: int) -> bytes:
    data = b""
    while piece := os.read(descriptor, 65536):
        data += piece
    return data


Method = Callable[[dict[str, Any], list[int]], Any]
"""Returns one reply, or a list of replies for a caller who takes more."""


class FakeServer:
    """ebsd.sock and keys.sock in a directory, each served by a thread, one call per connection."""

    def __init__(self, directory: Path, *, keys: bool = True, ebsd: bool = True) -> None:
        self.path = str(directory / "ebsd.sock")
        self.keys_path = str(directory / "keys.sock")
        self.world = World()
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.overrides: dict[str, Method] = {}
        self.streamed: list[str] = []
        """The methods that were called with ``more``."""
        self.stays = False
        """Whether a stream stays open before its last reply, until the server is closed."""
        self.breaks = False
        """Whether a stream ends without its last reply."""
        self.raw: bytes | None = None
        """What to answer instead of a reply; b"" hangs up."""
        self.violations: list[str] = []
        self.released = threading.Event()
        self._listeners = [self._serve(path) for path, wanted in ((self.path, ebsd), (self.keys_path, keys)) if wanted]

    def fail(self, method: str, error: EbsdError) -> None:
        """Let a method such as ``EC2.AttachVolume`` answer with an error from now on."""

        def raising(_p: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
            raise error

        self.overrides[method] = raising

    def hang(self, method: str) -> None:
        """Let a method not answer until the server is closed."""

        def hanging(_p: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
            self.released.wait(20)
            raise RemoteError("InternalFailure", "released")

        self.overrides[method] = hanging

    @property
    def methods(self) -> list[str]:
        """The methods that were called, without ``io.ebsd.``."""
        return [method for method, _ in self.calls]

    def parameters(self, method: str) -> dict[str, Any]:
        """The parameters of the last call of a method."""
        return next(parameters for name, parameters in reversed(self.calls) if name == method)

    def close(self) -> None:
        self.released.set()
        for listener, thread in self._listeners:
            listener.shutdown(socket.SHUT_RDWR)  # ends accept(2)
            thread.join(20)
            listener.close()
        assert self.violations == []

    def _serve(self, path: str) -> tuple[socket.socket, threading.Thread]:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(path)
        listener.listen()
        thread = threading.Thread(target=self._loop, args=(listener,), daemon=True)
        thread.start()
        return listener, thread

    def _loop(self, listener: socket.socket) -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            with peer:
                try:
                    self._answer(peer)
                except OSError:
                    continue  # the client went away

    def _answer(self, peer: socket.socket) -> None:
        reader, fds, messages = FrameReader(), [], []
        try:
            while not messages:
                data, received = recv_with_fds(peer, 65536)
                fds += received
                if not data:
                    return
                messages = reader.feed(data)
            if self.raw is not None:
                peer.sendall(self.raw)
                return
            call = parse_call(messages[0])
            *before, last = self._reply(call, fds)
            if call.more:
                for message in before:
                    peer.sendall(encode({**message, "continues": True}))
                if before and self.stays:
                    self.released.wait(20)
                if before and self.breaks:
                    return
            peer.sendall(encode(last))
        finally:
            close_all(fds)

    def _reply(self, call: CallMessage, fds: list[int]) -> list[dict[str, Any]]:
        interface_name, method = split_method(call.method)
        short = f"{interface_name.removeprefix('io.ebsd.')}.{method}"
        self.calls.append((short, call.parameters))
        if call.more:
            self.streamed.append(short)
        interface = Interface.load(interface_name)
        try:
            self._checked(short, interface.check_parameters, method, call.parameters)
            function: Method = self.overrides.get(short) or getattr(self.world, short.replace(".", "_"))
            result = function(call.parameters, fds)
            results = result if isinstance(result, list) else [result]
            for one in results:
                self._checked(short, interface.check_result, method, one)
        except EbsdError as error:
            return [make_service_error(interface_name, error)]
        except Exception as error:  # noqa: BLE001 - a bug of the fake must fail the test, not hang it
            self.violations.append(f"{short}: {error!r}")
            return [make_service_error(interface_name, RemoteError("InternalFailure", repr(error)))]
        return [make_reply(one) for one in results]

    def _checked(
        self, short: str, check: Callable[[str, dict[str, Any]], None], method: str, members: dict[str, Any]
    ) -> None:
        try:
            check(method, members)
        except EbsdError as error:
            self.violations.append(f"{short}: {error}")
            raise


ROOT_MOUNT = "1 0 8:1 / / rw - ext4 /dev/sda1 rw\n"


class FakePrograms(Programs):
    """mkfs, mount, umount and blkid that only write down what they were asked, and keep a mountinfo file."""

    def __init__(self, mountinfo: Path) -> None:
        super().__init__("/nonexistent")
        self.mountinfo = mountinfo
        self.mountinfo.write_text(ROOT_MOUNT)
        self.commands: list[list[str]] = []
        self.missing: set[str] = set()
        self.failures: dict[str, tuple[int, str]] = {}
        self.enabled: set[str] = set()
        """Units that are started at boot."""
        self.interrupt: str | None = None
        self.detected = "ext4\n"

    def is_installed(self, program: str) -> bool:
        return program not in self.missing

    def require(self, program: str) -> str:
        if program in self.missing:
            raise HostUnsupported(reason=f"The program {program} is not installed", remedy="Install it")
        return f"/usr/sbin/{program}"

    def mount(self, command: Sequence[str]) -> None:
        self.run(command)

    def run(self, command: Sequence[str], pass_fds: Sequence[int] = ()) -> str:
        self.commands.append(list(command))
        program = command[0]
        if program == self.interrupt:
            raise KeyboardInterrupt
        if program in self.failures:
            status, output = self.failures[program]
            raise CommandFailed(command=" ".join(command), status=status, output=output)
        if program == "blkid":
            return self.detected
        if program == "systemctl":
            self._systemctl(command)
        if program == "mount":
            self.add_mount(command[-1], command[-2], f"7:{command[-2].removeprefix('/dev/loop')}")
        if program == "umount":
            escaped = command[-1].replace(" ", r"\040")
            lines = [line for line in self.mountinfo.read_text().splitlines() if line.split()[4] != escaped]
            self.mountinfo.write_text("\n".join(lines) + "\n")
        return ""

    def _systemctl(self, command: Sequence[str]) -> None:
        action, unit = command[1], command[-1]
        if action == "enable":
            self.enabled.add(unit)
        elif action == "disable":
            self.enabled.discard(unit)
        elif action == "is-enabled" and unit not in self.enabled:
            raise CommandFailed(command=" ".join(command), status=1, output="")

    def trim(self, mount_point: str) -> int:
        self.commands.append(["fstrim", mount_point])
        if "fstrim" in self.failures:
            raise IncorrectState(reason=self.failures["fstrim"][1])
        return 3 * GIB

    def add_mount(self, mount_point: str, device: str, number: str, file_system: str = "ext4") -> None:
        escaped = mount_point.replace(" ", r"\040")
        with self.mountinfo.open("a") as file:
            file.write(f"99 1 {number} / {escaped} rw,relatime - {file_system} {device} rw\n")


class Bench:
    """A server, a host and a way to run ebsctl on them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.server = FakeServer(directory)
        self.world = self.server.world
        self.programs = FakePrograms(directory / "mountinfo")
        self.uid = 0

    def run(self, *words: str, input: str | None = None) -> Result:  # noqa: A002 - CliRunner's word
        app = App(programs=self.programs, mountinfo=str(self.programs.mountinfo), uid=self.uid)
        return CliRunner().invoke(cli, ["--socket", self.server.path, *words], obj=app, input=input)

    def ok(self, *words: str) -> str:
        """Run, demand success, and return standard output."""
        result = self.run(*words)
        assert result.exit_code == 0, result.stderr
        return result.stdout

    def document(self, *words: str) -> Any:
        """Run with --json, demand success and an empty standard error, and return the one document."""
        result = self.run(*words, "--json")
        assert result.exit_code == 0, result.stderr
        assert result.stderr == ""
        return json.loads(result.stdout)

    def error(self, status: int, *words: str) -> dict[str, str]:
        """Run plainly and with --json, demand the exit status and no output, and return the error document."""
        plain = self.run(*words)
        assert plain.exit_code == status, plain.stderr
        assert plain.stdout == ""
        assert "error: " in plain.stderr
        result = self.run(*words, "--json")
        assert result.exit_code == status, result.stderr
        assert result.stdout == ""
        document: dict[str, str] = json.loads(result.stderr)
        assert set(document) == {"Code", "Message", "Hint"}
        return document
