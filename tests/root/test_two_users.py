"""Two Unix users and root at the sockets: what each can do with a thing of the other, and what each is told.

The table has a row for every method that names a resource. A stranger gets the code of AWS, and the very same answer
for a thing that does not exist: EC2 knows no volume of another account, KMS does not say whether a key is there.
"""

from __future__ import annotations

import base64
import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
from installation import Installation, installation

from ebsd.wire.idl import Interface

pytestmark = [pytest.mark.other_user, pytest.mark.timeout(180)]

CLIENT = """
import array, json, os, socket, sys
answers = []
for path, method, parameters in json.load(sys.stdin):
    fds = []
    if {"PlaintextDescriptor", "DataDescriptor", "Descriptor", "Image", "Target"} & set(parameters):
        fds.append(os.memfd_create("plaintext"))
        os.write(fds[0], b"" if "Target" in parameters else b"secret")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        sock.sendmsg([json.dumps({"method": method, "parameters": parameters}).encode() + bytes(1)], rights)
        answer = b""
        while not answer.endswith(bytes(1)):
            more, received, _, _ = socket.recv_fds(sock, 65536, 4)
            for fd in received:
                os.close(fd)
            answer += more or bytes(1)
    for fd in fds:
        os.close(fd)
    answers.append(json.loads(answer[:-1]))
json.dump(answers, sys.stdout)
"""
"""Makes calls as whoever runs it: one line of JSON in, one out. It needs nothing of this checkout."""

INTERFACES: Final = {
    "EC2": "ebsd.sock", "Control": "ebsd.sock", "EBS": "ebsd.sock", "Archives": "ebsd.sock", "KMS": "keys.sock",
    "KeyService": "keys.sock",
}  # fmt: skip

DENIED = "AccessDeniedException"
NO_SCHEDULE = "Ebsd.ScheduleNotFound"
NO_VOLUME, NO_SNAPSHOT, NO_KEY = "InvalidVolume.NotFound", "InvalidSnapshot.NotFound", "NotFoundException"
NO_ARCHIVE = "Ebsd.ArchiveOfAnother"
NO_GRANT, NO_OPERATION = "InvalidGrantTokenException", "UnauthorizedOperation"
POLICY = json.dumps({"Version": "2012-10-17", "Statement": {"Effect": "Allow", "Principal": "*", "Action": "kms:*",
                     "Resource": "*"}})  # fmt: skip


NO_BLOCKS, BAD_BLOCKS = "ResourceNotFoundException", "ValidationException"
AS_ROOT: Final = "as root"


@dataclass(frozen=True)
class Row:
    """One call, in which $NAMES stand for things of the owner, and the codes that each is answered; None: it works."""

    method: str
    parameters: dict[str, Any]
    stranger: str | None
    root: str | None = None
    owner: str | None = AS_ROOT

    def expected(self, who: str) -> str | None:
        return self.root if who == "root" or self.owner is AS_ROOT else self.owner


def on_key(method: str, stranger: str = DENIED, root: str | None = None, **more: Any) -> Row:
    return Row(f"KMS.{method}", {"KeyId": "$KEY", **more}, stranger, root)


ROWS: Final = [
    # what is there, by every name it has
    Row("EC2.DescribeVolumes", {"VolumeIds": ["$VOLUME"]}, NO_VOLUME),
    Row("EC2.DescribeSnapshots", {"SnapshotIds": ["$SNAPSHOT"]}, NO_SNAPSHOT),
    Row("Control.Identify", {"Resource": "$VOLUME"}, NO_VOLUME),
    Row("Control.Identify", {"Resource": "$SNAPSHOT"}, NO_SNAPSHOT),
    Row("Control.Identify", {"Resource": "$NAME"}, "InvalidID", "InvalidID", None),
    Row("Control.DescribeJobs", {"JobIds": ["$JOB"]}, "Ebsd.JobNotFound"),
    Row("Control.WaitJob", {"JobId": "$JOB"}, "Ebsd.JobNotFound"),
    on_key("DescribeKey"),
    Row("KMS.DescribeKey", {"KeyId": "$BARE"}, NO_KEY, NO_KEY, None),
    Row("KMS.DescribeKey", {"KeyId": "$ALIAS"}, DENIED),
    Row("KMS.DescribeKey", {"KeyId": "$MANAGED"}, DENIED),
    Row("KMS.DescribeKey", {"KeyId": "alias/$NAME"}, NO_KEY, NO_KEY, None),
    on_key("ListAliases"),
    on_key("GetKeyRotationStatus"),
    on_key("ListKeyRotations"),
    on_key("GetKeyPolicy"),
    on_key("ListKeyPolicies"),
    on_key("ListGrants"),
    Row("KeyService.ListKeyResources", {"KeyId": "$KEY"}, DENIED),
    # use of the key
    on_key("GenerateDataKey", KeySpec="AES_256"),
    on_key("GenerateDataKeyWithoutPlaintext", KeySpec="AES_256"),
    on_key("Encrypt", PlaintextDescriptor=0),
    on_key("Decrypt", CiphertextBlob="$BLOB"),
    Row("KMS.Decrypt", {"CiphertextBlob": "$BLOB"}, DENIED),
    Row("KMS.ReEncrypt", {"CiphertextBlob": "$BLOB", "DestinationKeyId": "$MINE"}, DENIED),
    Row("KMS.ReEncrypt", {"CiphertextBlob": "$MYBLOB", "DestinationKeyId": "$KEY"}, DENIED),
    on_key("CreateGrant", GranteePrincipal="$PRINCIPAL", Operations=["Decrypt"]),
    Row("EC2.CreateVolume", {"SizeBytes": 8 << 20, "Encrypted": True, "KmsKeyId": "$KEY"}, DENIED),
    Row("Control.ImportVolume", {"Image": 0, "Encrypted": True, "KmsKeyId": "$KEY"}, DENIED),
    Row("EC2.ModifyEbsDefaultKmsKeyId", {"KmsKeyId": "$KEY"}, DENIED),
    Row("Control.RewrapDataKeys", {"KeyId": "$KEY"}, DENIED),
    # changes of the key
    on_key("PutKeyPolicy", Policy=POLICY, BypassPolicyLockoutSafetyCheck=True),
    on_key("EnableKeyRotation"),
    on_key("DisableKeyRotation"),
    on_key("RotateKeyOnDemand"),
    on_key("DisableKey"),
    on_key("EnableKey"),
    Row("KMS.CreateAlias", {"AliasName": "alias/stolen", "TargetKeyId": "$KEY"}, DENIED, "ValidationException", None),
    Row("KMS.UpdateAlias", {"AliasName": "alias/mine", "TargetKeyId": "$KEY"}, DENIED, "ValidationException", None),
    Row("KMS.UpdateAlias", {"AliasName": "alias/$NAME", "TargetKeyId": "$MINE"}, NO_KEY, NO_KEY, None),
    Row("KMS.DeleteAlias", {"AliasName": "alias/$NAME"}, NO_KEY, NO_KEY, None),
    # volumes and snapshots
    Row("EC2.AttachVolume", {"VolumeId": "$IDLE", "ExposeAs": "file"}, NO_VOLUME),
    Row("Control.RecordMount", {"VolumeId": "$IDLE", "MountPoint": "/x"}, NO_VOLUME),
    Row("Control.ReclaimVolume", {"VolumeId": "$VOLUME"}, NO_VOLUME),
    Row("Control.RestartEngine", {"VolumeId": "$VOLUME"}, NO_VOLUME),
    Row("EC2.DetachVolume", {"VolumeId": "$IDLE"}, NO_VOLUME),
    Row("EC2.DetachVolume", {"VolumeId": "$VOLUME", "Force": True}, NO_VOLUME),
    Row("EC2.ModifyVolume", {"VolumeId": "$VOLUME", "SizeBytes": 16 << 20}, NO_VOLUME),
    Row("EC2.DescribeVolumesModifications", {"VolumeIds": ["$VOLUME"]}, NO_VOLUME),
    Row("EC2.CreateSnapshot", {"VolumeId": "$VOLUME"}, NO_VOLUME),
    Row("EC2.CreateSnapshots", {"VolumeIds": ["$VOLUME"]}, NO_VOLUME),
    Row("EC2.CopyVolumes", {"SourceVolumeId": "$VOLUME"}, NO_VOLUME),
    Row("EC2.CreateSnapshots", {"AllAttached": True, "ExcludeVolumeIds": ["$VOLUME"]}, NO_VOLUME,
        "InvalidParameterValue"),  # nothing is left
    Row("Control.CreateSchedule", {"Name": "$NAME", "VolumeId": "$VOLUME", "EverySeconds": 3600}, NO_VOLUME,
        "Ebsd.NameInUse"),  # theirs: there is one of this name
    Row("Control.DescribeSchedules", {"ScheduleIds": ["$SCHEDULE"]}, NO_SCHEDULE),
    Row("Control.RunSchedule", {"ScheduleId": "$SCHEDULE"}, NO_SCHEDULE),
    Row("Control.PauseSchedule", {"ScheduleId": "$SCHEDULE", "Paused": True}, NO_SCHEDULE),
    Row("Control.DeleteSchedule", {"ScheduleId": "$SCHEDULE"}, NO_SCHEDULE),
    Row("EC2.CopySnapshot", {"SourceSnapshotId": "$SNAPSHOT"}, NO_SNAPSHOT),
    Row("EC2.CreateVolume", {"SnapshotId": "$SNAPSHOT"}, NO_SNAPSHOT),
    Row("EC2.DescribeSnapshotAttribute", {"SnapshotId": "$SNAPSHOT", "Attribute": "createVolumePermission"},
        NO_SNAPSHOT),
    Row("EC2.ModifySnapshotAttribute", {"SnapshotId": "$SNAPSHOT", "OperationType": "add", "UserIds": ["000000065000"]},
        NO_SNAPSHOT),
    Row("EC2.ResetSnapshotAttribute", {"SnapshotId": "$SNAPSHOT", "Attribute": "createVolumePermission"}, NO_SNAPSHOT),
    Row("EC2.CreateTags", {"Resources": ["$VOLUME"], "Tags": [{"Key": "a", "Value": "b"}]}, NO_VOLUME),
    Row("EC2.CreateTags", {"Resources": ["$SNAPSHOT"], "Tags": [{"Key": "a", "Value": "b"}]}, NO_SNAPSHOT),
    Row("EC2.DeleteTags", {"Resources": ["$VOLUME"], "Tags": [{"Key": "a", "Value": "b"}]}, NO_VOLUME),
    Row("Control.Rename", {"Resource": "$VOLUME", "Name": "stolen"}, NO_VOLUME),
    Row("Control.Rename", {"Resource": "$SNAPSHOT", "Name": "stolen-too"}, NO_SNAPSHOT),
    Row("EC2.LockSnapshot", {"SnapshotId": "$SNAPSHOT", "LockMode": "compliance", "LockDuration": 1,
                              "CoolOffPeriod": 1}, NO_SNAPSHOT),
    Row("EC2.DescribeLockedSnapshots", {"SnapshotIds": ["$SNAPSHOT"]}, NO_SNAPSHOT),
    Row("EC2.UnlockSnapshot", {"SnapshotId": "$SNAPSHOT"}, NO_SNAPSHOT),  # of its owner while it cools off
    Row("Control.Verify", {"Resource": "$SNAPSHOT"}, NO_SNAPSHOT),
    Row("Control.Verify", {"Resource": "$VOLUME"}, NO_VOLUME),
    Row("Control.ExportImage", {"Resource": "$VOLUME", "Target": 0}, NO_VOLUME),
    Row("Control.DescribeExport", {"JobId": "$JOB"}, "Ebsd.JobNotFound"),
    Row("Control.CheckStore", {"Resources": ["$VOLUME"]}, NO_OPERATION, None, NO_OPERATION),
    Row("Control.AcceptRollback", {"Resource": "$SNAPSHOT"}, NO_OPERATION, None, NO_OPERATION),
    Row("Control.LimitJob", {"JobId": "$JOB", "Rate": 1 << 20}, "Ebsd.JobNotFound", "IncorrectState"),
    Row("Control.ResumeJob", {"JobId": "$JOB"}, "Ebsd.JobNotFound", "IncorrectState"),
    Row("Control.CancelJob", {"JobId": "$JOB"}, "Ebsd.JobNotFound", "IncorrectState"),
    # blocks; what the owner and root are told of a token, a size or data that cannot be, a stranger is not
    Row("EBS.ListSnapshotBlocks", {"SnapshotId": "$SNAPSHOT"}, NO_BLOCKS),
    Row("EBS.ListChangedBlocks", {"FirstSnapshotId": "$SNAPSHOT", "SecondSnapshotId": "$SNAPSHOT"}, NO_BLOCKS),
    Row("EBS.GetSnapshotBlock", {"SnapshotId": "$SNAPSHOT", "BlockIndex": 0, "BlockToken": ""}, NO_BLOCKS, BAD_BLOCKS),
    Row("EBS.GetSnapshotBlocks", {"SnapshotId": "$SNAPSHOT", "Blocks": [{"BlockIndex": 0, "BlockToken": ""}]},
        NO_BLOCKS, BAD_BLOCKS),
    Row("EBS.StartSnapshot", {"ParentSnapshotId": "$SNAPSHOT", "SizeBytes": 1 << 20}, NO_BLOCKS, BAD_BLOCKS),
    Row("EBS.StartSnapshot", {"KmsKeyArn": "$KEY", "SizeBytes": 1 << 20}, DENIED),
    Row("EBS.PutSnapshotBlock", {"SnapshotId": "$DIRECT", "BlockIndex": 0, "DataDescriptor": 0, "DataLength": 524288,
        "Checksum": "A" * 43 + "=", "ChecksumAlgorithm": "SHA256"}, NO_BLOCKS, BAD_BLOCKS),
    Row("EBS.PutSnapshotBlocks", {"SnapshotId": "$DIRECT", "DataDescriptor": 0,
        "Blocks": [{"BlockIndex": 0, "Checksum": "A" * 43 + "="}]}, NO_BLOCKS, BAD_BLOCKS),
    Row("EBS.CompleteSnapshot", {"SnapshotId": "$DIRECT", "ChangedBlocksCount": 0}, NO_BLOCKS),
    # archives; the file that comes along is none, which nobody is told who may not know of the snapshot
    Row("Archives.Export", {"SnapshotId": "$SNAPSHOT", "Descriptor": 0}, NO_SNAPSHOT, NO_ARCHIVE),
    Row("Archives.Export", {"SnapshotId": "$SNAPSHOT", "SinceSnapshotId": "$SNAPSHOT", "Descriptor": 0}, NO_SNAPSHOT,
        "InvalidParameterCombination"),
    Row("Archives.Export", {"SnapshotId": "$SNAPSHOT", "KmsKeyId": "$KEY", "Descriptor": 0}, NO_SNAPSHOT, NO_ARCHIVE),
    Row("Archives.Import", {"Name": "stolen", "OntoSnapshotId": "$SNAPSHOT", "KmsKeyId": "$KEY", "Descriptor": 0},
        "Ebsd.ArchiveDamaged", "Ebsd.ArchiveDamaged"),
    # ends
    Row("KMS.RetireGrant", {"GrantToken": "$TOKEN"}, NO_GRANT),
    Row("KMS.RetireGrant", {"KeyId": "$KEY", "GrantId": "$GRANT"}, NO_GRANT, NO_GRANT),
    Row("KMS.RevokeGrant", {"KeyId": "$KEY", "GrantId": "$OTHERGRANT"}, DENIED),
    Row("EC2.ListVolumesInRecycleBin", {"VolumeIds": ["$IDLE"]}, NO_VOLUME, NO_VOLUME, NO_VOLUME),
    Row("EC2.RestoreVolumeFromRecycleBin", {"VolumeId": "$IDLE"}, NO_VOLUME, NO_VOLUME, NO_VOLUME),
    Row("EC2.DeleteSnapshot", {"SnapshotId": "$SNAPSHOT"}, NO_SNAPSHOT),
    Row("EC2.ListSnapshotsInRecycleBin", {"SnapshotIds": ["$SNAPSHOT"]}, NO_SNAPSHOT),
    Row("EC2.RestoreSnapshotFromRecycleBin", {"SnapshotId": "$SNAPSHOT"}, NO_SNAPSHOT),
    Row("Control.DeleteRecycleBinRule", {"Identifier": "$RULE"}, "ResourceNotFoundException"),
    Row("EC2.DeleteSnapshot", {"SnapshotId": "$SNAPSHOT", "Permanently": False}, NO_SNAPSHOT),
    Row("EC2.DeleteVolume", {"VolumeId": "$VOLUME"}, NO_VOLUME),
    Row("EC2.DeleteVolume", {"VolumeId": "$IDLE"}, NO_VOLUME),
    on_key("ScheduleKeyDeletion", AcceptDataLoss=True),
    on_key("CancelKeyDeletion"),
]  # fmt: skip
NAMING: Final = frozenset(
    ("KeyId", "VolumeId", "VolumeIds", "SnapshotId", "SnapshotIds", "SourceSnapshotId", "Resource", "Resources",
     "FirstSnapshotId", "SecondSnapshotId", "ParentSnapshotId", "KmsKeyArn", "JobId", "JobIds", "Identifier",
     "KmsKeyId", "TargetKeyId", "GrantId", "CiphertextBlob", "AliasName")
)  # fmt: skip
"""Parameters that name a resource."""


@dataclass
class User:
    """Somebody at the sockets."""

    ebsd: Installation
    uid: int

    @property
    def account(self) -> str:
        return f"{self.uid:012}"

    def call_all(self, calls: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
        """Make the calls (interface and method, parameters), one after the other; returns the replies."""
        asked = [
            (str(self.ebsd.runtime / INTERFACES[method.partition(".")[0]]), f"io.ebsd.{method}", parameters)
            for method, parameters in calls
        ]
        return self.raw(asked)

    def raw(self, asked: list[tuple[str, str, dict[str, Any]]]) -> list[dict[str, Any]]:
        """Make calls, each with the path of its socket."""
        done = subprocess.run(
            ["setpriv", f"--reuid={self.uid}", f"--regid={self.uid}", "--clear-groups", "/usr/bin/env", "-i",
             sys.executable, "-I", "-c", CLIENT],
            input=json.dumps(asked), capture_output=True, text=True, timeout=120, cwd="/",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        (reply,) = self.call_all([(method, parameters)])
        assert "error" not in reply, (method, reply)
        return reply.get("parameters") or {}


@pytest.fixture(scope="module")
def ebsd() -> Iterator[Installation]:
    root = Path(tempfile.mkdtemp(prefix="ebsd-users-"))
    root.chmod(0o711)
    try:
        with installation(root) as made:
            yield made
    finally:
        shutil.rmtree(root)


@pytest.fixture(scope="module")
def users(ebsd: Installation) -> Iterator[tuple[User, User]]:
    """Two real users of the host, for the time of this module."""
    names = [f"ebsd-{os.getpid()}-{letter}" for letter in "ab"]
    try:
        for name in names:
            subprocess.run(["useradd", "--no-create-home", "--shell", "/usr/sbin/nologin", name], check=True)
        first, second = (User(ebsd, pwd.getpwnam(name).pw_uid) for name in names)
        yield first, second
    finally:
        for name in names:
            subprocess.run(["userdel", name], check=False, capture_output=True)
    assert not [user.pw_name for user in pwd.getpwall() if user.pw_name in names]


def belongings(user: User, tag: str, grantee: User) -> dict[str, str]:
    """Make one of everything for a user; returns what the $NAMES of the table stand for."""
    key = user.call("KMS.CreateKey")["KeyMetadata"]["Arn"]
    user.call("KMS.CreateAlias", AliasName=f"alias/{tag}", TargetKeyId=key)
    managed = user.call("KMS.DescribeKey", KeyId="alias/aws/ebs")["KeyMetadata"]["Arn"]
    request = {"KeyId": key, "GranteePrincipal": f"arn:aws:iam::{user.account}:root", "Operations": ["Encrypt"]}
    grants = [user.call("KMS.CreateGrant", **request) for _ in range(2)]
    volume = user.call("EC2.CreateVolume", SizeBytes=8 << 20, Encrypted=True, KmsKeyId=key, Name=tag)["Volume"]
    idle = user.call("EC2.CreateVolume", SizeBytes=8 << 20, Encrypted=True, KmsKeyId=key, Name=f"{tag}-idle")["Volume"]
    user.call("EC2.AttachVolume", VolumeId=volume["VolumeId"], ExposeAs="file")
    snapshot = user.call("EC2.CreateSnapshot", VolumeId=volume["VolumeId"], Name=f"{tag}-snap")["Snapshot"]
    copy = user.call("EC2.CopySnapshot", SourceSnapshotId=snapshot["SnapshotId"], Encrypted=True, KmsKeyId=managed)
    user.call("Control.WaitJob", JobId=copy["JobId"])
    direct = user.call("EBS.StartSnapshot", SizeBytes=1 << 20, Encrypted=True, KmsKeyArn=key)["SnapshotId"]
    rule = user.call("Control.CreateRecycleBinRule", ResourceType="snapshot", RetentionDays=1)["Rule"]
    times = {"VolumeId": idle["VolumeId"], "Times": ["00:00"]}
    schedule = user.call("Control.CreateSchedule", Name=tag, **times)["Schedule"]
    blob = user.call("KMS.Encrypt", KeyId=key, PlaintextDescriptor=0)["CiphertextBlob"]
    alias = f"{key.rpartition(':')[0]}:alias"
    return {
        "$KEY": key, "$BARE": key.rpartition("/")[2], "$ALIAS": f"{alias}/{tag}", "$MANAGED": f"{alias}/aws/ebs",
        "$NAME": tag, "$VOLUME": volume["VolumeId"], "$IDLE": idle["VolumeId"], "$SNAPSHOT": snapshot["SnapshotId"],
        "$DIRECT": direct,
        "$RULE": rule["Identifier"],
        "$SCHEDULE": schedule["ScheduleId"],
        "$JOB": copy["JobId"], "$BLOB": blob, "$TOKEN": grants[0]["GrantToken"], "$GRANT": grants[0]["GrantId"],
        "$OTHERGRANT": grants[1]["GrantId"], "$PRINCIPAL": f"arn:aws:iam::{grantee.account}:root",
    }  # fmt: skip


def own(user: User) -> dict[str, str]:
    """Make a key with an alias for whoever wants to use another's beside it."""
    key = user.call("KMS.CreateKey")["KeyMetadata"]["Arn"]
    user.call("KMS.CreateAlias", AliasName="alias/mine", TargetKeyId=key)
    blob = user.call("KMS.Encrypt", KeyId=key, PlaintextDescriptor=0)["CiphertextBlob"]
    return {"$MINE": key, "$MYBLOB": blob}


def nobodys(things: dict[str, str]) -> dict[str, str]:
    """Return names of the same shapes that nothing has."""
    other_uuid = "00000000-0000-4000-8000-000000000000"
    key = things["$KEY"].rpartition("/")[0] + "/" + other_uuid
    blob = bytearray(base64.b64decode(things["$BLOB"]))
    blob[2:18] = bytes(16)
    return things | {
        "$KEY": key, "$BARE": other_uuid, "$ALIAS": things["$ALIAS"] + "-not", "$MANAGED": things["$MANAGED"] + "-not",
        "$NAME": things["$NAME"] + "-not", "$VOLUME": "vol-00000000000000000", "$IDLE": "vol-00000000000000000",
        "$SNAPSHOT": "snap-00000000000000000", "$DIRECT": "snap-00000000000000000",
        "$JOB": things["$JOB"][:-8] + "00000000", "$SCHEDULE": "sched-00000000000000000",
        "$BLOB": base64.b64encode(blob).decode(), "$TOKEN": "A" * 43 + "=", "$GRANT": "0" * 64,
        "$OTHERGRANT": "0" * 64,
    }  # fmt: skip


def filled(row: Row, things: dict[str, str]) -> tuple[str, dict[str, Any]]:
    text = json.dumps(row.parameters)
    for name in sorted(things, key=len, reverse=True):
        text = text.replace(name, json.dumps(things[name])[1:-1])
    return row.method, json.loads(text)


def told(reply: dict[str, Any], things: dict[str, str]) -> tuple[str | None, str]:
    """Return code and text of an answer, with the names of things in it made equal; a reply has neither."""
    if "error" not in reply:
        return None, ""
    text = reply["parameters"]["Message"] + "|" + reply["parameters"]["Hint"]
    for name in sorted(things, key=lambda name: len(things[name]), reverse=True):
        text = text.replace(things[name], "THING")
    return reply["parameters"]["Code"], text


def table(user: User, things: dict[str, str]) -> list[tuple[str | None, str]]:
    return [told(reply, things) for reply in user.call_all([filled(row, things) for row in ROWS])]


def shown(row: Row) -> str:
    return f"{row.method} {json.dumps(row.parameters)}"


@dataclass
class World:
    owner: User
    stranger: User
    root: User
    things: dict[str, str]
    others: dict[str, str]
    """A second set of the owner's."""


@pytest.fixture(scope="module")
def world(ebsd: Installation, users: tuple[User, User]) -> World:
    owner, stranger = users
    things, others = (belongings(owner, tag, stranger) for tag in ("first", "second"))
    return World(owner, stranger, User(ebsd, 0), things, others)


def state_of(user: User) -> str:
    """Return all that the user sees of its own, without what changes by itself."""
    calls = [("EC2.DescribeVolumes", {}), ("EC2.DescribeSnapshots", {}), ("KMS.ListKeys", {}), ("KMS.ListAliases", {})]
    lists = user.call_all(calls)
    keys = [key["KeyArn"] for key in lists[2]["parameters"]["Keys"]]
    each = [
        (f"KMS.{method}", {"KeyId": key})
        for key in keys
        for method in ("DescribeKey", "GetKeyPolicy", "ListGrants", "GetKeyRotationStatus", "ListKeyRotations")
    ]
    return json.dumps([*lists, *user.call_all(each)], sort_keys=True)


def test_every_method_that_names_a_resource_has_a_row() -> None:
    asked = {row.method for row in ROWS}
    naming = {
        f"{short}.{name}"
        for short in INTERFACES
        for name, method in Interface.load(f"io.ebsd.{short}").methods.items()
        if NAMING & set(method.parameters.fields)
    }
    assert naming - asked == set()
    assert len({shown(row) for row in ROWS}) == len(ROWS)


def test_a_stranger_can_do_nothing_and_learns_nothing(world: World) -> None:
    mine = own(world.stranger)
    before = state_of(world.owner)
    real = table(world.stranger, world.things | mine)
    absent = table(world.stranger, nobodys(world.things) | mine)
    wrong = {
        shown(row): (found[0], row.stranger) for row, found in zip(ROWS, real, strict=True) if found[0] != row.stranger
    }
    assert not wrong
    tells = {shown(row): (here, there) for row, here, there in zip(ROWS, real, absent, strict=True) if here != there}
    assert not tells, "an answer says whether a thing of somebody else is there"
    assert state_of(world.owner) == before


def test_a_stranger_sees_nothing_in_lists(world: World) -> None:
    calls: list[tuple[str, dict[str, Any]]] = [
        ("EC2.DescribeVolumes", {}), ("EC2.DescribeSnapshots", {}), ("Control.DescribeJobs", {}), ("KMS.ListKeys", {}),
        ("KMS.ListAliases", {}), ("Control.GetStatus", {}), ("Control.Doctor", {}), ("KeyService.GetStatus", {}),
        ("EC2.DescribeVolumes", {"Filters": [{"Name": "volume-id", "Values": [world.things["$VOLUME"]]}]}),
        ("EC2.DescribeSnapshots", {"Filters": [{"Name": "volume-id", "Values": [world.things["$VOLUME"]]}]}),
        ("EC2.GetEbsDefaultKmsKeyId", {}),
    ]  # fmt: skip
    text = json.dumps(world.stranger.call_all(calls))
    hidden = [name for name in ("$KEY", "$BARE", "$VOLUME", "$IDLE", "$SNAPSHOT", "$JOB") if world.things[name] in text]
    assert not hidden, text
    names = sorted(os.listdir(world.owner.ebsd.runtime / "volumes"))
    assert world.things["$VOLUME"] in names
    for path in ("volumes", "control", "live"):
        with pytest.raises(subprocess.CalledProcessError):
            subprocess.run(
                ["setpriv", f"--reuid={world.stranger.uid}", "--clear-groups", "ls", world.owner.ebsd.runtime / path],
                check=True, capture_output=True,
            )  # fmt: skip
    block = world.owner.ebsd.runtime / "volumes" / world.things["$VOLUME"]
    for uid, works in ((world.stranger.uid, False), (world.owner.uid, True)):
        done = subprocess.run(
            ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "head", "-c", "1", block],
            capture_output=True, check=False,
        )  # fmt: skip
        assert (done.returncode == 0) is works


def test_no_socket_has_what_belongs_to_another(world: World) -> None:
    """Only ebsd reaches kms.sock, which gives no data key; key sessions are opened nowhere else."""
    runtime = world.owner.ebsd.runtime
    asked = [
        (socket, f"io.ebsd.{method}")
        for socket, methods in {
            "kms.sock": ["Broker.Decrypt", "Broker.Encrypt", "Broker.GenerateDataKey", "KMS.Decrypt", "KMS.Encrypt",
                         "KMS.GenerateDataKey", "KeyService.Backup", "EC2.DescribeVolumes"],
            "keys.sock": ["Broker.OpenKeySession", "Broker.CreateGrant", "Broker.DeleteAnchor", "EC2.DescribeVolumes"],
            "ebsd.sock": ["KMS.Decrypt", "KMS.GenerateDataKey", "Broker.OpenKeySession", "KeyService.Backup"],
        }.items()
        for method in methods
    ]  # fmt: skip
    for user in (world.root, world.owner):
        calls = [(str(runtime / socket), method, {}) for socket, method in asked if user.uid == 0 or socket[1] != "m"]
        for call, reply in zip(calls, user.raw(calls), strict=True):
            assert reply["error"].startswith("org.varlink.service."), (call, reply)
            assert reply["error"].endswith(("MethodNotFound", "InterfaceNotFound")), (call, reply)
    with pytest.raises(AssertionError, match="PermissionError"):
        world.owner.raw([(str(runtime / "kms.sock"), "io.ebsd.Broker.GetStatus", {})])


USES: Final = {
    "EC2.DescribeSnapshots": None, "EC2.CopySnapshot": DENIED, "EC2.CreateVolume": DENIED,
    "EBS.ListSnapshotBlocks": DENIED, "EBS.ListChangedBlocks": DENIED, "EBS.StartSnapshot": DENIED,
    "EBS.GetSnapshotBlock": BAD_BLOCKS, "EBS.GetSnapshotBlocks": BAD_BLOCKS,
}  # fmt: skip
"""What a recipient of a shared snapshot does with it; the key of this one he may not use."""


def test_a_recipient_can_only_use_what_is_shared_with_him(world: World) -> None:
    """Whatever other method names a snapshot is its owner's: each row of the table, and those to come."""
    owner, recipient, things = world.owner, world.stranger, world.things
    shared = {"SnapshotId": things["$SNAPSHOT"], "UserIds": [recipient.account]}
    owner.call("EC2.ModifySnapshotAttribute", OperationType="add", **shared)
    before = state_of(owner)
    rows = [row for row in ROWS if "$SNAPSHOT" in json.dumps(row.parameters)]
    replies = recipient.call_all([filled(row, things) for row in rows])
    told_of = {shown(row): told(reply, things)[0] for row, reply in zip(rows, replies, strict=True)}
    owners = {"AuthFailure", NO_OPERATION}  # or as of what is not there: the recycle bin is its owner's alone
    wrong = {
        shown(row): code
        for row, code in zip(rows, told_of.values(), strict=True)
        if (code != USES[row.method] if row.method in USES else code not in {*owners, row.stranger})
    }
    assert not wrong
    assert state_of(owner) == before
    owner.call("EC2.ModifySnapshotAttribute", OperationType="remove", **shared)
    again = [told(reply, things)[0] for reply in recipient.call_all([filled(row, things) for row in rows])]
    assert again == [row.stranger for row in rows]


@pytest.mark.parametrize("who", ["root", "owner"])
def test_root_and_the_owner_can(world: World, who: str) -> None:
    """After the stranger: these calls change and delete what they name, in the order of the table."""
    user, things = (world.root, world.things) if who == "root" else (world.owner, world.others)
    found = table(user, things | own(user))
    wrong = {
        shown(row): (code, row.expected(who), text)
        for row, (code, text) in zip(ROWS, found, strict=True)
        if code != row.expected(who)
    }
    assert not wrong
