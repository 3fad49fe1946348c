"""io.ebsd.KMS on keys.sock: the KMS actions, each for the account of the caller.

1. Who calls is SO_PEERCRED; nothing in a message can change it, and no call here comes "through ebsd".
2. Contexts that a user wraps under hold no ``aws:`` or ``ebsd:`` pairs, so nobody makes a blob for somebody else's
   volume; to open, any context may be given: the owner of a key may open what it wrapped.
3. A plaintext crosses in a descriptor and is never a part of a message.
4. A key of AWS is shown and no more: its administration, and any use but for volumes, is for its provider's own tools.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any, Final

import trio

from ebsd.crypto.context import check_user_pairs
from ebsd.crypto.secret import Secret
from ebsd.domain.errors import InvalidCiphertext, KeyServiceUnavailable, KmsValidation
from ebsd.domain.ids import foreign_region
from ebsd.ipc.memfds import sealed_memfd
from ebsd.ipc.peer import Peer, caller_of
from ebsd.ipc.varlink_server import Call, Handler, Reply
from ebsd.kms import deletion, grants, keys, rotation
from ebsd.kms.aws import AwsKeys, refusal
from ebsd.kms.backends import NOT_CONFIGURED
from ebsd.kms.broker import Broker
from ebsd.kms.descriptors import Descriptors
from ebsd.kms.local import LocalKeys, data_key_length
from ebsd.kms.policy import Action, Requester
from ebsd.kms.records import Grant
from ebsd.kms.service import Wrapped

_KEY_MEMBERS: Final = ("KeyId", "TargetKeyId", "SourceKeyId", "DestinationKeyId")
POLICY_NAME: Final = "default"
"""A key has one policy, and that is its name."""
DEFAULT_PAGE: Final = 50
MAX_PAGE: Final = 100
MAX_PLAINTEXT: Final = 4096
MAX_BLOB: Final = 6144
"""Bytes; KMS's own limit for CiphertextBlob."""


async def requester_of(peer: Peer, admin_uid: int) -> Requester:
    """Return who a peer of keys.sock is; the user database is asked in a thread, for it may be on the network."""
    caller = await trio.to_thread.run_sync(caller_of, peer, admin_uid)
    return Requester(caller, via_service=False)


def decode_blob(text: str) -> bytes:
    """Return the bytes of a CiphertextBlob member; raises InvalidCiphertext."""
    try:
        blob = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as exc:
        raise InvalidCiphertext() from exc
    if len(blob) > MAX_BLOB:
        raise InvalidCiphertext()
    return blob


def encode_blob(blob: bytes) -> str:
    return base64.b64encode(blob).decode("ascii")


def _user_context(parameters: Mapping[str, Any], member: str = "EncryptionContext") -> dict[str, str]:
    context: dict[str, str] = parameters.get(member) or {}
    check_user_pairs(context)
    return context


def _wrapped(wrapped: Wrapped) -> dict[str, Any]:
    return {
        "CiphertextBlob": encode_blob(wrapped.blob),
        "KeyId": wrapped.key_arn,
        "KeyMaterialId": wrapped.material_id,
    }


def _plaintext_reply(parameters: dict[str, Any], plaintext: Secret) -> Reply:
    """Return the reply with the plaintext in its descriptor, and wipe the plaintext."""
    with plaintext:
        return Reply({**parameters, "PlaintextDescriptor": 0}, [sealed_memfd(plaintext.view)])


class KmsInterface:
    """The handlers; ``handlers`` maps method names to them."""

    def __init__(self, broker: Broker, descriptors: Descriptors, admin_uid: int) -> None:
        self._broker = broker
        self._descriptors = descriptors
        self._admin_uid = admin_uid

    def handlers(self) -> dict[str, Handler]:
        shown = {"DescribeKey": self._describe_foreign_key, "ListAliases": self._list_foreign_aliases}
        return {
            name: _here_only(name, handler, shown.get(name)) for name, handler in self._handlers_of_this_host().items()
        }

    def _handlers_of_this_host(self) -> dict[str, Handler]:
        return {
            "CreateKey": self._create_key,
            "DescribeKey": self._describe_key,
            "ListKeys": self._list_keys,
            "EnableKey": self._enable_key,
            "DisableKey": self._disable_key,
            "CreateAlias": self._create_alias,
            "UpdateAlias": self._update_alias,
            "DeleteAlias": self._delete_alias,
            "ListAliases": self._list_aliases,
            "GenerateDataKey": self._generate_data_key,
            "GenerateDataKeyWithoutPlaintext": self._generate_data_key_without_plaintext,
            "Encrypt": self._encrypt,
            "Decrypt": self._decrypt,
            "ReEncrypt": self._re_encrypt,
            "CreateGrant": self._create_grant,
            "RetireGrant": self._retire_grant,
            "ListGrants": self._list_grants,
            "RevokeGrant": self._revoke_grant,
            "GetKeyPolicy": self._get_key_policy,
            "PutKeyPolicy": self._put_key_policy,
            "ListKeyPolicies": self._list_key_policies,
            "EnableKeyRotation": self._enable_key_rotation,
            "DisableKeyRotation": self._disable_key_rotation,
            "RotateKeyOnDemand": self._rotate_key_on_demand,
            "GetKeyRotationStatus": self._get_key_rotation_status,
            "ListKeyRotations": self._list_key_rotations,
            "ScheduleKeyDeletion": self._schedule_key_deletion,
            "CancelKeyDeletion": self._cancel_key_deletion,
        }

    @property
    def _keys(self) -> LocalKeys:
        return self._broker.running.keys

    async def _requester(self, call: Call) -> Requester:
        return await requester_of(call.peer, self._admin_uid)

    async def _create_key(self, call: Call) -> dict[str, Any]:
        p = call.parameters
        request = keys.check_create(
            description=p.get("Description"),
            spec=p.get("KeySpec"),
            usage=p.get("KeyUsage"),
            origin=p.get("Origin"),
            multi_region=p.get("MultiRegion"),
            tags=[(tag["TagKey"], tag["TagValue"]) for tag in p.get("Tags") or ()],
            policy=p.get("Policy"),
            bypass_lockout_check=p.get("BypassPolicyLockoutSafetyCheck"),
        )
        key = await self._keys.create_key(await self._requester(call), request)
        return {"KeyMetadata": keys.metadata(key)}

    async def _describe_key(self, call: Call) -> dict[str, Any]:
        key = await self._keys.key(await self._requester(call), call.parameters["KeyId"], Action.DESCRIBE_KEY)
        return {"KeyMetadata": keys.metadata(key)}

    def _aws(self, key: str) -> AwsKeys:
        if self._broker.aws is None:
            raise KeyServiceUnavailable(reason=NOT_CONFIGURED.format(key=key))
        return self._broker.aws

    async def _describe_foreign_key(self, call: Call) -> dict[str, Any]:
        name = call.parameters["KeyId"]
        return {"KeyMetadata": await self._aws(name).metadata(await self._requester(call), name)}

    async def _list_foreign_aliases(self, call: Call) -> dict[str, Any]:
        name = call.parameters["KeyId"]
        return {"Aliases": await self._aws(name).list_aliases(await self._requester(call), name)}

    async def _list_keys(self, call: Call) -> dict[str, Any]:
        mine = self._keys.list_keys(await self._requester(call))
        return {"Keys": [{"KeyId": key.id, "KeyArn": key.arn} for key in mine]}

    async def _enable_key(self, call: Call) -> None:
        await self._keys.set_enabled(await self._requester(call), call.parameters["KeyId"], enabled=True)

    async def _disable_key(self, call: Call) -> None:
        await self._keys.set_enabled(await self._requester(call), call.parameters["KeyId"], enabled=False)

    async def _create_alias(self, call: Call) -> None:
        p = call.parameters
        await self._keys.create_alias(await self._requester(call), p["AliasName"], p["TargetKeyId"])

    async def _update_alias(self, call: Call) -> None:
        p = call.parameters
        await self._keys.update_alias(await self._requester(call), p["AliasName"], p["TargetKeyId"])

    async def _delete_alias(self, call: Call) -> None:
        await self._keys.delete_alias(await self._requester(call), call.parameters["AliasName"])

    async def _list_aliases(self, call: Call) -> dict[str, Any]:
        found = await self._keys.list_aliases(await self._requester(call), call.parameters.get("KeyId"))
        return {
            "Aliases": [
                {
                    "AliasName": alias.name,
                    "AliasArn": alias.arn,
                    "TargetKeyId": alias.target,
                    "CreationDate": alias.created,
                    "LastUpdatedDate": alias.updated,
                }
                for alias in found
            ]
        }

    async def _generate_data_key(self, call: Call) -> Reply:
        p = call.parameters
        wrapped, plaintext = await self._keys.generate_data_key(
            await self._requester(call),
            p["KeyId"],
            data_key_length(p.get("NumberOfBytes"), p.get("KeySpec")),
            _user_context(p),
        )
        return _plaintext_reply(_wrapped(wrapped), plaintext)

    async def _generate_data_key_without_plaintext(self, call: Call) -> dict[str, Any]:
        p = call.parameters
        wrapped = await self._keys.generate_data_key_without_plaintext(
            await self._requester(call),
            p["KeyId"],
            data_key_length(p.get("NumberOfBytes"), p.get("KeySpec")),
            _user_context(p),
        )
        return _wrapped(wrapped)

    async def _encrypt(self, call: Call) -> dict[str, Any]:
        p = call.parameters
        context = _user_context(p)
        requester = await self._requester(call)
        service = self._keys
        fd = call.take_fd(p["PlaintextDescriptor"])
        content = await self._descriptors.read(fd, MAX_PLAINTEXT, call.peer.uid, "PlaintextDescriptor")
        try:
            wrapped = await service.encrypt(requester, p["KeyId"], content, context)
        finally:
            content[:] = bytes(len(content))
        return {
            "CiphertextBlob": encode_blob(wrapped.blob),
            "KeyId": wrapped.key_arn,
            "EncryptionAlgorithm": keys.SYMMETRIC,
        }

    async def _decrypt(self, call: Call) -> Reply:
        p = call.parameters
        opened = await self._keys.decrypt(
            await self._requester(call),
            p.get("KeyId"),
            decode_blob(p["CiphertextBlob"]),
            p.get("EncryptionContext") or {},
        )
        members = {
            "KeyId": opened.key_arn,
            "KeyMaterialId": opened.material_id,
            "EncryptionAlgorithm": keys.SYMMETRIC,
        }
        return _plaintext_reply(members, opened.plaintext)

    async def _re_encrypt(self, call: Call) -> dict[str, Any]:
        p = call.parameters
        source, destination = await self._keys.re_encrypt(
            await self._requester(call),
            decode_blob(p["CiphertextBlob"]),
            p.get("SourceKeyId"),
            p.get("SourceEncryptionContext") or {},
            p["DestinationKeyId"],
            _user_context(p, "DestinationEncryptionContext"),
        )
        return {
            "CiphertextBlob": encode_blob(destination.blob),
            "SourceKeyId": source.key_arn,
            "KeyId": destination.key_arn,
            "SourceKeyMaterialId": source.material_id,
            "DestinationKeyMaterialId": destination.material_id,
        }

    async def _create_grant(self, call: Call) -> dict[str, Any]:
        p = call.parameters
        constraints = p.get("Constraints") or {}
        equals = constraints.get("EncryptionContextEquals")
        subset = constraints.get("EncryptionContextSubset")
        for pairs in (equals, subset):
            check_user_pairs(pairs or {})
        request = grants.check_request(
            grantee=p["GranteePrincipal"],
            operations=p["Operations"],
            equals=equals,
            subset=subset,
            retiring=p.get("RetiringPrincipal"),
            name=p.get("Name"),
        )
        made = await self._keys.create_grant(await self._requester(call), p["KeyId"], request)
        return {"GrantId": made.grant_id, "GrantToken": made.token}

    async def _retire_grant(self, call: Call) -> None:
        p = call.parameters
        grant_id = p.get("GrantId")
        if grant_id is not None and len(grant_id) > 128:
            raise KmsValidation(reason="GrantId must have at most 128 characters")
        await self._keys.retire_grant(await self._requester(call), p.get("KeyId"), grant_id, p.get("GrantToken"))

    async def _list_grants(self, call: Call) -> dict[str, Any]:
        p = call.parameters
        found = await self._keys.list_grants(
            await self._requester(call), p["KeyId"], p.get("GrantId"), p.get("GranteePrincipal")
        )
        limit = p.get("Limit")
        if limit is not None and not 1 <= limit <= MAX_PAGE:
            raise KmsValidation(reason=f"Limit must be between 1 and {MAX_PAGE}")
        start = _after(found, p.get("Marker"))
        page = found[start : start + (limit or DEFAULT_PAGE)]
        more = start + len(page) < len(found)
        members: dict[str, Any] = {"Grants": [grants.as_members(grant) for grant in page], "Truncated": more}
        if more:
            members["NextMarker"] = page[-1].id
        return members

    async def _revoke_grant(self, call: Call) -> None:
        p = call.parameters
        await self._keys.revoke_grant(await self._requester(call), p["KeyId"], p["GrantId"])

    async def _get_key_policy(self, call: Call) -> dict[str, Any]:
        p = call.parameters
        _check_policy_name(p.get("PolicyName"))
        return {
            "Policy": await self._keys.policy(await self._requester(call), p["KeyId"]),
            "PolicyName": POLICY_NAME,
        }

    async def _put_key_policy(self, call: Call) -> None:
        p = call.parameters
        _check_policy_name(p.get("PolicyName"))
        await self._keys.put_policy(
            await self._requester(call),
            p["KeyId"],
            p["Policy"],
            bypass=bool(p.get("BypassPolicyLockoutSafetyCheck")),
        )

    async def _list_key_policies(self, call: Call) -> dict[str, Any]:
        await self._keys.key(await self._requester(call), call.parameters["KeyId"], Action.LIST_KEY_POLICIES)
        return {"PolicyNames": [POLICY_NAME]}

    # --- rotation -------------------------------------------------------------------------------------------

    async def _enable_key_rotation(self, call: Call) -> None:
        p = call.parameters
        await self._keys.enable_rotation(await self._requester(call), p["KeyId"], p.get("RotationPeriodInDays"))

    async def _disable_key_rotation(self, call: Call) -> None:
        await self._keys.disable_rotation(await self._requester(call), call.parameters["KeyId"])

    async def _rotate_key_on_demand(self, call: Call) -> dict[str, Any]:
        key = await self._keys.rotate_on_demand(await self._requester(call), call.parameters["KeyId"])
        return {"KeyId": key.arn}

    async def _get_key_rotation_status(self, call: Call) -> dict[str, Any]:
        key = await self._keys.key(
            await self._requester(call), call.parameters["KeyId"], Action.GET_KEY_ROTATION_STATUS
        )
        return rotation.status(key)

    async def _list_key_rotations(self, call: Call) -> dict[str, Any]:
        p = call.parameters
        material = p.get("IncludeKeyMaterial") or "ROTATIONS_ONLY"
        if material not in ("ALL_KEY_MATERIAL", "ROTATIONS_ONLY"):
            raise KmsValidation(reason="IncludeKeyMaterial must be ALL_KEY_MATERIAL or ROTATIONS_ONLY")
        key = await self._keys.key(await self._requester(call), p["KeyId"], Action.LIST_KEY_ROTATIONS)
        return {"Rotations": rotation.rotations(key, all_material=material == "ALL_KEY_MATERIAL")}

    # --- deletion -------------------------------------------------------------------------------------------

    async def _schedule_key_deletion(self, call: Call) -> dict[str, Any]:
        p = call.parameters
        requester = await self._requester(call)
        days = p.get("PendingWindowInDays")
        deletions = self._broker.running.deletion
        key = await deletions.schedule(requester, p["KeyId"], days, accept_loss=bool(p.get("AcceptDataLoss")))
        return {
            "KeyId": key.arn,
            "DeletionDate": key.deletion_date,
            "KeyState": key.state.value,
            "PendingWindowInDays": deletion.DEFAULT_WINDOW if days is None else days,
        }

    async def _cancel_key_deletion(self, call: Call) -> dict[str, Any]:
        requester = await self._requester(call)
        key = await self._broker.running.deletion.cancel(requester, call.parameters["KeyId"])
        return {"KeyId": key.arn}


def _here_only(operation: str, handler: Handler, shown: Handler | None) -> Handler:
    """Return the handler of an action on keys of this host; a key of AWS is shown or refused."""

    async def handle(call: Call) -> Reply | dict[str, Any] | None:
        for member in _KEY_MEMBERS:
            name = call.parameters.get(member)
            if name is not None and foreign_region(name) is not None:
                if shown is None:
                    raise refusal(operation, name)
                return await shown(call)
        return await handler(call)

    return handle


def _check_policy_name(name: str | None) -> None:
    if name not in (None, POLICY_NAME):
        raise KmsValidation(reason=f"PolicyName must be {POLICY_NAME}")


def _after(found: list[Grant], marker: str | None) -> int:
    """Return where the page after the grant ``marker`` begins."""
    if marker is None:
        return 0
    for at, grant in enumerate(found, 1):
        if grant.id == marker:
            return at
    raise KmsValidation(reason="Marker is not one that ListGrants gave, or its grant is gone; begin again")
