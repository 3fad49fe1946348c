"""Key state x operation: every operation of both sockets, in every state of its key, against AWS's published matrix.

Source: AWS KMS Developer Guide, "Key states of AWS KMS keys".
"""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import trio
from kms_rig import ALICE, OTHER, SNAPSHOT, VOLUME, Rig, ask, caller, context, memfd, memory_directory

from ebsd.domain.errors import RemoteError
from ebsd.kms.archive_sessions import FORMAT_VALUE
from ebsd.kms.keystates import Group, KeyState
from ebsd.wire.idl import Interface

pytestmark = pytest.mark.trio

BOB_ARN: Final = "arn:aws:iam::000000001002:user/user1002"


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    yield from memory_directory()


@pytest.fixture
async def rig(tmp_path: Path, nursery: trio.Nursery) -> AsyncIterator[Rig]:
    rig = Rig(tmp_path, nursery)
    yield rig
    await rig.close()


@dataclass
class Scene:
    """A key that was used while it was enabled, and an enabled one beside it."""

    rig: Rig
    key: str
    other: str
    wrapped: str
    """CiphertextBlob of VOLUME, which has an anchor."""
    attach_grant: str
    grant: str
    token: str
    blob: str
    """CiphertextBlob of Encrypt under ``key``."""
    other_blob: str
    archived: str
    """CiphertextBlob of an archive under ``key``."""

    async def kms(self, method: str, **parameters: Any) -> Any:
        return await self.rig.kms(ALICE, method, **parameters)

    async def ebsd(self, method: str, **parameters: Any) -> Any:
        return await self.rig.ebsd(method, **parameters)


async def encrypted(rig: Rig, key: str) -> str:
    reply = await rig.kms(ALICE, "Encrypt", KeyId=key, PlaintextDescriptor=0, fds=[memfd(b"secret")])
    return str(reply["CiphertextBlob"])


ARCHIVE: Final = {
    "aws:ebs:id": SNAPSHOT,
    "ebsd:format": FORMAT_VALUE,
    "ebsd:archive": "3c5ff022-21c3-4d47-9af3-cb1d88279c4f",
}


async def archived(rig: Rig, key: str) -> str:
    made = await rig.ebsd(
        "GenerateDataKeyWithoutPlaintext", Caller=caller(ALICE), KeyId=key, NumberOfBytes=64, EncryptionContext=ARCHIVE
    )
    return str(made["CiphertextBlob"])


async def archive_session(s: Scene) -> None:
    reply = await s.ebsd(
        "OpenArchiveSession", Caller=caller(ALICE), KeyId=s.key, CiphertextBlob=s.archived, EncryptionContext=ARCHIVE
    )
    answer = await ask(socket.socket(fileno=reply.fds[reply["Session"]]))
    answer.data_key.wipe()  # type: ignore[union-attr]


async def scene(rig: Rig) -> Scene:
    key, other = await rig.key(), await rig.key()
    await rig.kms(ALICE, "CreateAlias", AliasName="alias/of-key", TargetKeyId=key)
    await rig.kms(ALICE, "CreateAlias", AliasName="alias/of-other", TargetKeyId=other)
    made = await rig.kms(
        ALICE, "CreateGrant", KeyId=key, GranteePrincipal=BOB_ARN, Operations=["Decrypt"], RetiringPrincipal=BOB_ARN
    )
    return Scene(
        rig,
        key,
        other,
        await rig.anchored(key),
        await rig.grant(key),
        made["GrantId"],
        made["GrantToken"],
        await encrypted(rig, key),
        await encrypted(rig, other),
        await archived(rig, key),
    )


async def bring(rig: Rig, key: str, state: KeyState) -> None:
    if state is KeyState.DISABLED:
        await rig.kms(ALICE, "DisableKey", KeyId=key)
    elif state is KeyState.PENDING_DELETION:
        await rig.kms(ALICE, "ScheduleKeyDeletion", KeyId=key, AcceptDataLoss=True)
    assert (await rig.kms(ALICE, "DescribeKey", KeyId=key))["KeyMetadata"]["KeyState"] == state.value


async def session(s: Scene) -> None:
    answer = await ask(await s.rig.session(s.key, s.attach_grant, s.wrapped))
    answer.data_key.wipe()  # type: ignore[union-attr]


async def rolled_back(s: Scene) -> None:
    await s.ebsd("RaiseFloor", ResourceId=VOLUME, Generation=3)
    await s.ebsd("AcceptRollback", Caller=caller(0), ResourceId=VOLUME, Generation=2)


DISABLED: Final = ("DisabledException", "{arn} is disabled.")
PENDING: Final = ("KMSInvalidStateException", "{arn} is pending deletion.")
NOT_PENDING: Final = ("KMSInvalidStateException", "{arn} is not pending deletion.")

Outcome = tuple[str, str] | None
ALWAYS: Final = (None, None, None)
CRYPTO: Final = (None, DISABLED, PENDING)
NOT_WHILE_PENDING: Final = (None, None, PENDING)

OPERATIONS: dict[str, tuple[tuple[Outcome, ...], Callable[[Scene], Awaitable[Any]]]] = {
    # keys.sock                     Enabled, Disabled, PendingDeletion
    "KMS.DescribeKey": (ALWAYS, lambda s: s.kms("DescribeKey", KeyId=s.key)),
    "KMS.EnableKey": (NOT_WHILE_PENDING, lambda s: s.kms("EnableKey", KeyId=s.key)),
    "KMS.DisableKey": (NOT_WHILE_PENDING, lambda s: s.kms("DisableKey", KeyId=s.key)),
    "KMS.CreateAlias": (NOT_WHILE_PENDING, lambda s: s.kms("CreateAlias", AliasName="alias/x", TargetKeyId=s.key)),
    "KMS.UpdateAlias": (
        NOT_WHILE_PENDING,
        lambda s: s.kms("UpdateAlias", AliasName="alias/of-other", TargetKeyId=s.key),
    ),
    "KMS.UpdateAlias away": (ALWAYS, lambda s: s.kms("UpdateAlias", AliasName="alias/of-key", TargetKeyId=s.other)),
    "KMS.DeleteAlias": (ALWAYS, lambda s: s.kms("DeleteAlias", AliasName="alias/of-key")),
    "KMS.ListAliases": (ALWAYS, lambda s: s.kms("ListAliases", KeyId=s.key)),
    "KMS.GenerateDataKey": (CRYPTO, lambda s: s.kms("GenerateDataKey", KeyId=s.key, NumberOfBytes=32)),
    "KMS.GenerateDataKeyWithoutPlaintext": (
        CRYPTO,
        lambda s: s.kms("GenerateDataKeyWithoutPlaintext", KeyId=s.key, NumberOfBytes=32),
    ),
    "KMS.Encrypt": (CRYPTO, lambda s: encrypted(s.rig, s.key)),
    "KMS.Decrypt": (CRYPTO, lambda s: s.kms("Decrypt", CiphertextBlob=s.blob)),
    "KMS.Decrypt by name": (CRYPTO, lambda s: s.kms("Decrypt", CiphertextBlob=s.blob, KeyId=s.key)),
    "KMS.ReEncrypt": (CRYPTO, lambda s: s.kms("ReEncrypt", CiphertextBlob=s.blob, DestinationKeyId=s.other)),
    "KMS.ReEncrypt to it": (CRYPTO, lambda s: s.kms("ReEncrypt", CiphertextBlob=s.other_blob, DestinationKeyId=s.key)),
    "KMS.CreateGrant": (
        CRYPTO,
        lambda s: s.kms("CreateGrant", KeyId=s.key, GranteePrincipal=BOB_ARN, Operations=["Encrypt"]),
    ),
    "KMS.RetireGrant": (ALWAYS, lambda s: s.kms("RetireGrant", GrantToken=s.token)),
    "KMS.ListGrants": (ALWAYS, lambda s: s.kms("ListGrants", KeyId=s.key)),
    "KMS.RevokeGrant": (ALWAYS, lambda s: s.kms("RevokeGrant", KeyId=s.key, GrantId=s.grant)),
    "KMS.GetKeyPolicy": (ALWAYS, lambda s: s.kms("GetKeyPolicy", KeyId=s.key)),
    "KMS.PutKeyPolicy": (
        ALWAYS,
        lambda s: s.kms("PutKeyPolicy", KeyId=s.key, Policy=s.rig.broker.running.store.model.key_of_arn(s.key).policy),
    ),
    "KMS.ListKeyPolicies": (ALWAYS, lambda s: s.kms("ListKeyPolicies", KeyId=s.key)),
    "KMS.EnableKeyRotation": (CRYPTO, lambda s: s.kms("EnableKeyRotation", KeyId=s.key)),
    "KMS.DisableKeyRotation": (CRYPTO, lambda s: s.kms("DisableKeyRotation", KeyId=s.key)),
    "KMS.RotateKeyOnDemand": (CRYPTO, lambda s: s.kms("RotateKeyOnDemand", KeyId=s.key)),
    "KMS.GetKeyRotationStatus": (ALWAYS, lambda s: s.kms("GetKeyRotationStatus", KeyId=s.key)),
    "KMS.ListKeyRotations": (ALWAYS, lambda s: s.kms("ListKeyRotations", KeyId=s.key)),
    "KMS.ScheduleKeyDeletion": (
        NOT_WHILE_PENDING,
        lambda s: s.kms("ScheduleKeyDeletion", KeyId=s.key, AcceptDataLoss=True),
    ),
    "KMS.CancelKeyDeletion": (
        (NOT_PENDING, NOT_PENDING, None),
        lambda s: s.kms("CancelKeyDeletion", KeyId=s.key),
    ),
    "KeyService.ListKeyResources": (ALWAYS, lambda s: s.rig.service(ALICE, "ListKeyResources", KeyId=s.key)),
    # kms.sock
    "Broker.DescribeKey": (ALWAYS, lambda s: s.ebsd("DescribeKey", Caller=caller(ALICE), KeyId=s.key)),
    "Broker.GenerateDataKeyWithoutPlaintext": (CRYPTO, lambda s: s.rig.wrapped(s.key, resource=OTHER)),
    "Broker.ReEncrypt": (
        CRYPTO,
        lambda s: s.ebsd(
            "ReEncrypt",
            Caller=caller(ALICE),
            CiphertextBlob=s.wrapped,
            SourceEncryptionContext=context(),
            DestinationKeyId=s.key,
            DestinationEncryptionContext=context(OTHER),
        ),
    ),
    "Broker.CreateGrant": (CRYPTO, lambda s: s.rig.grant(s.key)),
    "Broker.RetireGrant": (ALWAYS, lambda s: s.ebsd("RetireGrant", KeyId=s.key, GrantId=s.attach_grant)),
    "Broker.OpenKeySession": (CRYPTO, session),
    "Broker.OpenArchiveSession": (CRYPTO, archive_session),
    "Broker.CreateAnchor": (
        CRYPTO,
        lambda s: s.ebsd(
            "CreateAnchor",
            Caller=caller(ALICE),
            ResourceId=OTHER,
            Encrypted=True,
            KeyId=s.key,
            CiphertextBlob=s.other_blob,
            EncryptionContext=context(OTHER),
        ),
    ),
    "Broker.CreateAnchor of a snapshot": (
        ALWAYS,
        lambda s: s.ebsd(
            "CreateAnchor", Caller=caller(ALICE), ResourceId=SNAPSHOT, Encrypted=True, SourceResourceId=VOLUME
        ),
    ),
    "Broker.DescribeDataKey": (
        ALWAYS,
        lambda s: s.ebsd("DescribeDataKey", ResourceId=VOLUME, CiphertextBlob=s.wrapped),
    ),
    "Broker.CheckSharedKey": (
        CRYPTO,
        lambda s: s.ebsd("CheckSharedKey", Caller=caller(ALICE), KeyId=s.key, EncryptionContext=context()),
    ),
    "Broker.DescribeAnchor": (ALWAYS, lambda s: s.ebsd("DescribeAnchor", ResourceId=VOLUME)),
    "Broker.RaiseFloor": (ALWAYS, lambda s: s.ebsd("RaiseFloor", ResourceId=VOLUME, Generation=3)),
    "Broker.AcceptRollback": (ALWAYS, rolled_back),
    "Broker.DeleteAnchor": (ALWAYS, lambda s: s.ebsd("DeleteAnchor", ResourceId=VOLUME)),
    "Broker.Admit": (ALWAYS, lambda s: s.ebsd("Admit", Caller=caller(ALICE), Making="volume", KeyId=s.key)),
    "Broker.SetAccount": (
        CRYPTO,
        lambda s: s.ebsd("SetAccount", Caller=caller(ALICE), EbsDefaultKmsKeyId=s.key),
    ),
}  # fmt: skip
"""Operation -> (outcome by state, call). A word after the method tells two uses of one method apart."""

WITHOUT_KEY: Final = {
    "KMS.CreateKey", "KMS.ListKeys", "Broker.GetStatus", "Broker.GetAccount", "Broker.CheckAws", "Broker.Shutdown",
    "Broker.ListPublicAccessBlocks", "Broker.RecordSharing", "Broker.PutAdmissionRule", "Broker.DeleteAdmissionRule",
    "Broker.ListAdmissionRules",
}  # fmt: skip


async def test_every_operation_is_in_the_table() -> None:
    methods = {
        f"{interface}.{name}": method
        for interface in ("KMS", "KeyService", "Broker")
        for name, method in Interface.load(f"io.ebsd.{interface}").methods.items()
    }
    # What the key service does with itself takes no key.
    handlers = {
        name for name, method in methods.items() if "KeyService." not in name or "KeyId" in method.parameters.fields
    }
    assert {name.split()[0] for name in OPERATIONS} | WITHOUT_KEY == handlers
    grouped = [name for group in Group for name in group.value]
    assert len(grouped) == len(set(grouped))
    assert {name.removeprefix("KMS.") for name in handlers if name.startswith("KMS.")} - {"CreateKey"} == set(grouped)


@pytest.mark.parametrize("state", KeyState)
@pytest.mark.parametrize("name", OPERATIONS)
async def test_the_state_decides_every_operation(rig: Rig, name: str, state: KeyState) -> None:
    expected, call = OPERATIONS[name]
    s = await scene(rig)
    if name == "Broker.CreateAnchor":
        s.other_blob = await rig.wrapped(s.key, resource=OTHER)
    await bring(rig, s.key, state)
    before = rig.broker.running.store.model.key_of_arn(s.key)
    wanted = expected[list(KeyState).index(state)]
    if wanted is None:
        await call(s)
        return
    with pytest.raises(RemoteError) as caught:
        await call(s)
    assert (caught.value.code, caught.value.message) == (wanted[0], wanted[1].format(arn=s.key))
    assert caught.value.exit_status == 6
    assert rig.broker.running.store.model.key_of_arn(s.key) == before
