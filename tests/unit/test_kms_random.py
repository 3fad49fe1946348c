"""Random requests, many at a time: nothing fails unexpectedly, and the files always hold what was answered."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from kms_rig import ALICE, BOB, OTHER, ROOT, SNAPSHOT, VOLUME, Rig, caller, context, memory_directory

from ebsd.domain.errors import RemoteError

pytestmark = pytest.mark.trio

RESOURCES = (VOLUME, OTHER, SNAPSHOT, "vol-x")
PRINCIPALS = ("arn:aws:iam::000000001001:root", "arn:aws:iam::000000001002:user/x", "nobody")


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    yield from memory_directory()


class Monkey:
    """Makes requests out of what earlier ones answered."""

    def __init__(self, rig: Rig, seed: int) -> None:
        self.rig = rig
        self.dice = random.Random(seed)
        self.names = ["alias/aws/ebs", "alias/none", "", "12345678-1234-1234-1234-123456789abc"]
        self.blobs = ["AAAA"]
        self.grants = ["0" * 64]
        self.tokens = ["x"]
        self.codes: set[str] = set()

    def some(self, values: list[str]) -> str:
        return self.dice.choice(values)

    def request(self) -> tuple[str, str, dict[str, Any]]:
        dice, key = self.dice, self.some(self.names)
        resource = dice.choice(RESOURCES)
        pairs = dice.choice([context(resource), {}, {"a": "b"}])
        alias = dice.choice(["alias/a", "b", "alias/aws/ebs", "?"])
        who = {"Caller": caller(dice.choice((ALICE, BOB, ROOT)))}
        wrapped = {"KeyId": key, "CiphertextBlob": self.some(self.blobs), "EncryptionContext": pairs}
        return dice.choice(
            [
                ("kms", "CreateKey", {}),
                ("kms", "DescribeKey", {"KeyId": key}),
                ("kms", "EnableKey", {"KeyId": key}),
                ("kms", "DisableKey", {"KeyId": key}),
                ("kms", "CreateAlias", {"AliasName": alias, "TargetKeyId": key}),
                ("kms", "UpdateAlias", {"AliasName": alias, "TargetKeyId": key}),
                ("kms", "DeleteAlias", {"AliasName": alias}),
                ("kms", "ListAliases", dice.choice([{}, {"KeyId": key}])),
                ("kms", "GenerateDataKey", {"KeyId": key, "NumberOfBytes": 64, "EncryptionContext": pairs}),
                ("kms", "Decrypt", wrapped),
                (
                    "kms",
                    "CreateGrant",
                    {
                        "KeyId": key,
                        "GranteePrincipal": dice.choice(PRINCIPALS),
                        "Operations": ["Decrypt", "RetireGrant"],
                        "Name": dice.choice(["n", "m"]),
                    },
                ),
                ("kms", "RetireGrant", {"KeyId": key, "GrantId": self.some(self.grants)}),
                ("kms", "RetireGrant", {"GrantToken": self.some(self.tokens)}),
                ("ebsd", "DescribeKey", {**who, "KeyId": key}),
                (
                    "ebsd",
                    "GenerateDataKeyWithoutPlaintext",
                    {**who, "KeyId": key, "NumberOfBytes": 64, "EncryptionContext": pairs},
                ),
                ("ebsd", "CreateGrant", {**who, "KeyId": key, "EncryptionContextEquals": pairs}),
                ("ebsd", "RetireGrant", {"KeyId": key, "GrantId": self.some(self.grants)}),
                ("ebsd", "CreateAnchor", {**who, "ResourceId": resource, "Encrypted": True, **wrapped}),
                ("ebsd", "CreateAnchor", {**who, "ResourceId": resource, "Encrypted": False}),
                ("ebsd", "RaiseFloor", {"ResourceId": resource, "Generation": dice.randrange(-1, 9)}),
                ("ebsd", "DeleteAnchor", {"ResourceId": resource}),
                ("ebsd", "SetAccount", {**who, "EbsDefaultKmsKeyId": key}),
                ("ebsd", "SetAccount", {**who, "EbsEncryptionByDefault": dice.random() < 0.5}),
                (
                    "ebsd",
                    "OpenKeySession",
                    {"ResourceId": resource, "GrantId": self.some(self.grants), **wrapped},
                ),
            ]
        )

    async def step(self) -> None:
        channel, method, parameters = self.request()
        try:
            if channel == "kms":
                reply = await self.rig.kms(self.dice.choice((ALICE, BOB, ROOT)), method, **parameters)
            else:
                reply = await self.rig.ebsd(method, **parameters)
        except RemoteError as exc:
            self.codes.add(exc.code)
            return
        for fd in reply.fds:
            os.close(fd)
        answer = reply.parameters
        if method == "CreateKey":
            self.names += [answer["KeyMetadata"]["Arn"], answer["KeyMetadata"]["KeyId"]]
        for member, known in (
            ("CiphertextBlob", self.blobs),
            ("GrantId", self.grants),
            ("GrantToken", self.tokens),
        ):
            if member in answer:
                known.append(answer[member])


@pytest.mark.parametrize("seed", range(3))
async def test_random_requests(tmp_path: Path, nursery: trio.Nursery, seed: int) -> None:
    rig = Rig(tmp_path, nursery)
    monkey = Monkey(rig, seed)

    async def run() -> None:
        for _ in range(60):
            await monkey.step()

    for _ in range(2):
        async with trio.open_nursery() as tasks:
            for _ in range(4):
                tasks.start_soon(run)
        model = rig.broker.running.store.model
        await rig.close()
        rig = Rig(tmp_path, nursery, may_create=False)
        assert rig.status == "running", rig.reason
        assert rig.broker.running.store.model == model
        monkey.rig = rig
    await rig.close()
    assert "InternalFailure" not in monkey.codes
    assert len(monkey.codes) >= 6
