"""The key service as an object: what ebsd asks of the broker, each effect durable when its call returns.

Besides the disk this is the only part of the world that is not the product's. It keeps to the rules of
``kms/anchors.py`` as far as they show: a second anchor is refused, a floor never falls, a session answers once, in the
packets of ``kms/FORMAT.md``, which ``ebsd.volume.keysession`` reads. One may die at a changing call, before its effect.
"""

from __future__ import annotations

import json
import random
import socket
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ebsd.control.broker import AccountSettings, KeyDescription
from ebsd.crypto.kdf import key_check_value
from ebsd.crypto.secret import Secret
from ebsd.domain.errors import IncorrectState, IntegrityFailure, KeyDisabled, RemoteError
from ebsd.domain.ids import AccountId, KeyArn
from ebsd.domain.model import Caller
from ebsd.domain.sharing import PublicAccess
from ebsd.volume.keysession import ANSWER

from .crash_disk import CrashDisk

_HEADER = struct.Struct("<8sII")


@dataclass(frozen=True)
class Anchored:
    """The anchor of one resource."""

    owner: AccountId
    key: KeyArn | None
    kcv: str | None
    floor: int = 0
    authority: str | None = None
    authority_floor: int = 0


def _authority(name: str, source: Anchored) -> dict[str, Any]:
    """Return what covers the map of a resource made from this one."""
    if source.floor:
        return {"authority": name, "authority_floor": source.floor}
    return {"authority": source.authority, "authority_floor": source.authority_floor}


@dataclass(frozen=True)
class Wrapped:
    """What a blob opens to."""

    key: KeyArn
    context: tuple[tuple[str, str], ...]
    data_key: bytes


def arn(name: str) -> KeyArn:
    """Return the ARN of a customer key of the world: any name will do."""
    return KeyArn(f"arn:aws:kms:local:000000000000:key/{name}")


class MemoryBroker:
    """Implements ``ebsd.control.broker.Broker``."""

    def __init__(self, disk: CrashDisk, dice: random.Random) -> None:
        self._disk = disk
        self._dice = dice
        self.anchors: dict[str, Anchored] = {}
        self.blobs: dict[bytes, Wrapped] = {}
        self.grants: dict[str, tuple[KeyArn, tuple[tuple[str, str], ...]]] = {}
        self._kept: list[socket.socket] = []
        """Our ends of the latest sessions: a question cannot be sent to a closed one."""
        self.disabled: set[KeyArn] = set()
        """Keys that are disabled: neither cryptographic operations nor new grants, as ``kms/keystates.py`` says."""
        self.answer: Callable[[str], None] | None = None
        """Asked before the answer of each session: a test may raise here."""

    def data_key(self, blob: bytes) -> bytes:
        return self.blobs[blob].data_key

    async def describe_key(self, caller: Caller, key: str) -> KeyDescription:
        self._disk.reading("broker.describe_key")
        found = arn("managed") if key.startswith("alias/") else KeyArn(key if key.startswith("arn:") else arn(key))
        state = "Disabled" if found in self.disabled else "Enabled"
        return KeyDescription(found, caller.account, state, "CUSTOMER", "SYMMETRIC_DEFAULT", "ENCRYPT_DECRYPT")

    def _check_enabled(self, *keys: KeyArn) -> None:
        for key in keys:
            if key in self.disabled:
                raise RemoteError(KeyDisabled.code, f"{key} is disabled.", "")

    async def account(self, caller: Caller) -> AccountSettings:
        self._disk.reading("broker.account")
        return AccountSettings(False, "alias/aws/ebs", PublicAccess.UNBLOCKED)

    def _wrap(self, key: KeyArn, context: Mapping[str, str], data_key: bytes) -> bytes:
        blob = self._dice.randbytes(32)
        self.blobs[blob] = Wrapped(key, tuple(sorted(context.items())), data_key)
        return blob

    def _unwrap(self, blob: bytes, context: Mapping[str, str], resource: str) -> Wrapped:
        wrapped = self.blobs.get(blob)
        if wrapped is None or wrapped.context != tuple(sorted(context.items())):
            raise IntegrityFailure(resource=resource, reason="the wrapped key does not open in this context")
        return wrapped

    async def generate_wrapped_key(
        self, caller: Caller, key: KeyArn, size: int, context: Mapping[str, str]
    ) -> tuple[bytes, KeyArn]:
        self._disk.reading("broker.generate")
        self._check_enabled(key)
        return self._wrap(key, context, self._dice.randbytes(size)), key

    async def re_encrypt(
        self, caller: Caller, blob: bytes, source_context: Mapping[str, str], key: KeyArn, context: Mapping[str, str]
    ) -> bytes:
        self._disk.reading("broker.re_encrypt")
        source = self._unwrap(blob, source_context, "source")
        self._check_enabled(source.key, key)
        return self._wrap(key, context, source.data_key)

    async def create_grant(self, caller: Caller, key: KeyArn, context: Mapping[str, str], name: str) -> str:
        self._disk.changing("broker.create_grant", name)
        self._check_enabled(key)
        self.grants[name] = (key, tuple(sorted(context.items())))
        return name

    async def retire_grant(self, key: KeyArn, grant: str) -> None:
        self._disk.changing("broker.retire_grant", grant)
        self.grants.pop(grant, None)

    async def create_anchor(
        self,
        caller: Caller,
        resource: str,
        *,
        key: KeyArn | None,
        blob: bytes | None,
        context: Mapping[str, str] | None,
        made_from: str | None = None,
    ) -> None:
        self._disk.changing("broker.create_anchor", resource)
        if resource in self.anchors:
            raise IncorrectState(reason=f"The key service already has an anchor for {resource}")
        kcv = None
        if key is not None:
            assert blob is not None
            with Secret.from_buffer(bytearray(self._unwrap(blob, context or {}, resource).data_key)) as secret:
                kcv = key_check_value(secret).hex()
        covering = {} if made_from is None else _authority(made_from, self.anchors[made_from])
        self.anchors[resource] = Anchored(caller.account, key, kcv, **covering)

    async def inherit_anchor(self, caller: Caller, resource: str, *, encrypted: bool, source: str) -> None:
        self._disk.changing("broker.create_anchor", resource)
        if resource in self.anchors:
            raise IncorrectState(reason=f"The key service already has an anchor for {resource}")
        anchor = self.anchors.get(source)
        if anchor is None or (anchor.key is not None) is not encrypted:
            raise IntegrityFailure(resource=source, reason="its anchor is not what it must be")
        self.anchors[resource] = replace(anchor, floor=0, **_authority(source, anchor))

    async def describe_data_key(self, resource: str, blob: bytes) -> dict[str, str]:
        """Return nothing: keys have no ages here."""
        return {}

    async def accounts_without_public_snapshots(self) -> frozenset[AccountId]:
        return frozenset()

    async def raise_floor_soon(self, resource: str, generation: int) -> None:
        await self.raise_floor(resource, generation)

    async def raise_floor(self, resource: str, generation: int) -> None:
        self._disk.changing("broker.raise_floor", resource, generation)
        anchor = self.anchors.get(resource)
        if anchor is None:
            raise IntegrityFailure(resource=resource, reason="the key service has no anchor for it")
        self.anchors[resource] = replace(anchor, floor=max(anchor.floor, generation))

    async def delete_anchor(self, resource: str) -> None:
        self._disk.changing("broker.delete_anchor", resource)
        self.anchors.pop(resource, None)

    async def open_session(
        self,
        resource: str,
        *,
        key: KeyArn | None,
        grant: str | None,
        blob: bytes | None,
        context: Mapping[str, str] | None,
        recipient: Caller | None = None,
    ) -> int:
        """Return a session whose answer lies in it already."""
        self._disk.reading("broker.open_session", resource)
        anchor = self.anchors.get(resource)
        if anchor is None:
            raise IntegrityFailure(resource=resource, reason="the key service has no anchor for it")
        if self.answer is not None:
            self.answer(resource)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            members: dict[str, Any] = {
                "resource": resource,
                "owner": anchor.owner,
                "encrypted": anchor.key is not None,
                "key_arn": anchor.key,
                "kcv": anchor.kcv,
                "floor": anchor.floor,
                "authority": anchor.authority,
                "authority_floor": anchor.authority_floor,
            }
            refused = key in self.disabled
            if refused:
                members = {"Code": KeyDisabled.code, "Message": f"{key} is disabled.", "Hint": ""}
            body = json.dumps(members).encode()
            ours.send(_HEADER.pack(ANSWER, int(refused), len(body)) + body)
            if key is not None and not refused:
                assert grant in self.grants, f"no grant {grant}"
                assert blob is not None
                ours.send(self._unwrap(blob, context or {}, resource).data_key)
            self._kept.append(ours.dup())
        while len(self._kept) > 8:
            self._kept.pop(0).close()
        return theirs.detach()

    def close(self) -> None:
        while self._kept:
            self._kept.pop().close()


__all__ = ["Anchored", "MemoryBroker", "arn"]
