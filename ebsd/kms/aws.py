"""The back end ``aws``: data keys under CMKs of AWS KMS, or of an endpoint that speaks its protocol.

1. AWS judges: its key policies, its grants, its key states. What is judged here is who of this host may use ebsd's
   principal there at all (``[key_service.aws] users``).
2. An encryption context is sent as the local back end would use it: the resource, its format, the user's pairs.
3. Every answer that names a key must name the one that was asked for; a blob is never opened by a key that it names.
4. An attach grant is asked for by its id where this broker did not make it itself: it may have been started since.
Source: KMS API reference, the page of each action; EBS User Guide, "How Amazon EBS encryption works".
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import trio

from ebsd.crypto.secret import Buffer, Secret
from ebsd.domain.errors import (
    AccessDenied,
    AwsKeyAdministration,
    AwsUserDenied,
    IncorrectKey,
    InvalidGrantId,
    InvalidGrantToken,
    KeyNotFound,
    KeyServiceUnavailable,
)
from ebsd.domain.ids import foreign_region
from ebsd.kms import anchors
from ebsd.kms.aws_client import AwsClient, Connection, blob_of, secret_of, text_of
from ebsd.kms.aws_errors import Garbled, clean
from ebsd.kms.aws_settings import AwsSettings
from ebsd.kms.awsleftovers import Leftovers
from ebsd.kms.grants import GrantRequest
from ebsd.kms.policy import Action, Requester
from ebsd.kms.records import Anchor
from ebsd.kms.service import (
    Context,
    GrantMade,
    KeyDescription,
    KeyService,
    SessionRequest,
    Unwrapped,
    Wrapped,
)

KNOWN_GRANTS: Final = 4096
"""Attach grants remembered with their tokens; AWS is asked about older ones."""
RETIRE_SECONDS: Final = 5.0
"""For which a detach waits for AWS: what is not retired by then is left over, and retired later."""
MAX_PAGES: Final = 500
"""Of 100 grants: what a key may have (KMS Developer Guide, "Quotas")."""
NOT_NAMED: Final = " because [key_service.aws] users does not name this user"
_ALIAS: Final = ":alias/"


@dataclass(frozen=True, slots=True)
class _Known:
    """An attach grant that this broker made."""

    key_arn: str
    context: dict[str, str]
    token: str
    """Makes the grant count at once; without it AWS may take five minutes (KMS Developer Guide, grant tokens)."""


class AwsKeys:
    """``KeyService`` over AWS KMS."""

    def __init__(self, settings: AwsSettings) -> None:
        self.settings = settings
        self.client = AwsClient(settings)
        self._grants: OrderedDict[str, _Known] = OrderedDict()
        self._leftovers = Leftovers()

    # --- names ----------------------------------------------------------------------------------------------

    def may_use(self, requester: Requester) -> bool:
        """Say whether the user may use keys of this back end."""
        users = self.settings.users
        return users is None or requester.caller.is_admin or requester.caller.uid in users

    def _admit(self, requester: Requester, action: Action, name: str) -> None:
        if not self.may_use(requester):
            raise AwsUserDenied(
                principal=requester.principal, action=f"kms:{action.value}", resource=name, reason=NOT_NAMED
            )
        self._check_region(name)

    def _check_region(self, name: str) -> None:
        """KMS finds keys of its own region only; an ARN of another one would be asked for in the wrong place."""
        region = foreign_region(name)
        if region is not None and region != self.settings.region:
            raise KeyNotFound(key=name)

    def _arn_of(self, answer: Mapping[str, Any], member: str = "KeyId", *, asked: str | None = None) -> str:
        """Return the key ARN of an answer, which is the asked one where that is an ARN of a key; raises Garbled."""
        arn = text_of(answer, member)
        if foreign_region(arn) != self.settings.region or _ALIAS in arn:
            raise Garbled(member)
        if asked is not None and asked.startswith("arn:") and _ALIAS not in asked and arn != asked:
            raise Garbled(member)
        return arn

    async def describe(
        self, requester: Requester, key_name: str, action: Action = Action.DESCRIBE_KEY
    ) -> KeyDescription:
        metadata = await self.metadata(requester, key_name, action)
        return KeyDescription(
            metadata["KeyId"],
            metadata["Arn"],
            metadata["AWSAccountId"],
            metadata["KeyState"],
            metadata["KeyManager"],
            metadata["KeySpec"],
            metadata["KeyUsage"],
        )

    async def metadata(
        self, requester: Requester, key_name: str, action: Action = Action.DESCRIBE_KEY
    ) -> dict[str, Any]:
        """Return the KeyMetadata of a key id, key ARN, alias name or alias ARN, as this host's keys have it."""
        self._admit(requester, action, key_name)

        def work(connection: Connection) -> dict[str, Any]:
            found = connection.call("describe_key", key_name, KeyId=key_name).get("KeyMetadata")
            if not isinstance(found, dict):
                raise Garbled("KeyMetadata")
            self._arn_of(found, "Arn", asked=key_name)
            return _metadata(found)

        return await self.client.request(work)

    async def list_aliases(self, requester: Requester, key_arn: str) -> list[dict[str, Any]]:
        """Return AliasListEntry of each alias of a key."""
        self._admit(requester, Action.LIST_ALIASES, key_arn)

        def work(connection: Connection) -> list[dict[str, Any]]:
            found = connection.call("list_aliases", key_arn, KeyId=key_arn, Limit=100).get("Aliases")
            if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
                raise Garbled("Aliases")
            return [
                {
                    "AliasName": text_of(entry, "AliasName"),
                    "AliasArn": text_of(entry, "AliasArn"),
                    "TargetKeyId": text_of(entry, "TargetKeyId"),
                    "CreationDate": _time(entry.get("CreationDate")),
                    "LastUpdatedDate": _time(entry.get("LastUpdatedDate")),
                }
                for entry in found
            ]

        return await self.client.request(work)

    # --- data keys ------------------------------------------------------------------------------------------

    async def generate_data_key(
        self, requester: Requester, key_name: str, length: int, context: Context
    ) -> tuple[Wrapped, Secret]:
        raise refusal("GenerateDataKey", key_name)

    async def generate_data_key_without_plaintext(
        self, requester: Requester, key_name: str, length: int, context: Context
    ) -> Wrapped:
        self._admit(requester, Action.GENERATE_DATA_KEY_WITHOUT_PLAINTEXT, key_name)

        def work(connection: Connection) -> Wrapped:
            answer = connection.call(
                "generate_data_key_without_plaintext",
                key_name,
                KeyId=key_name,
                NumberOfBytes=length,
                EncryptionContext=dict(context),
            )
            return Wrapped(blob_of(answer), self._arn_of(answer, asked=key_name), _material(answer, "KeyMaterialId"))

        return await self.client.request(work)

    async def encrypt(self, requester: Requester, key_name: str, plaintext: Buffer, context: Context) -> Wrapped:
        raise refusal("Encrypt", key_name)

    async def decrypt(self, requester: Requester, key_name: str | None, blob: bytes, context: Context) -> Unwrapped:
        raise refusal("Decrypt", key_name or "The ciphertext's key")

    def _decrypt(self, connection: Connection, key: str, blob: bytes, context: Context, grant: str) -> Secret:
        known = self._grants.get(grant)
        tokens = {"GrantTokens": [known.token]} if known is not None else {}
        answer = connection.call(
            "decrypt", key, grant, KeyId=key, CiphertextBlob=blob, EncryptionContext=dict(context), **tokens
        )
        plaintext = secret_of(answer)
        try:
            if self._arn_of(answer) != key:
                raise IncorrectKey()
        except BaseException:
            plaintext.wipe()
            raise
        return plaintext

    async def decrypt_for_archive(self, requester: Requester, key_arn: str, blob: bytes, context: Context) -> Secret:
        self._admit(requester, Action.DECRYPT, key_arn)
        return await self.client.request(lambda connection: self._decrypt(connection, key_arn, blob, context, ""))

    async def re_encrypt(
        self,
        requester: Requester,
        blob: bytes,
        source_key_name: str | None,
        source_context: Context,
        key_name: str,
        context: Context,
    ) -> tuple[Wrapped, Wrapped]:
        self._admit(requester, Action.RE_ENCRYPT_FROM, source_key_name or key_name)
        self._admit(requester, Action.RE_ENCRYPT_TO, key_name)
        source = {} if source_key_name is None else {"SourceKeyId": source_key_name}

        def work(connection: Connection) -> tuple[Wrapped, Wrapped]:
            answer = connection.call(
                "re_encrypt",
                key_name,
                CiphertextBlob=blob,
                SourceEncryptionContext=dict(source_context),
                DestinationKeyId=key_name,
                DestinationEncryptionContext=dict(context),
                **source,
            )
            opened = self._arn_of(answer, "SourceKeyId", asked=source_key_name)
            return (
                Wrapped(blob, opened, _material(answer, "SourceKeyMaterialId")),
                Wrapped(
                    blob_of(answer),
                    self._arn_of(answer, asked=key_name),
                    _material(answer, "DestinationKeyMaterialId"),
                ),
            )

        return await self.client.request(work)

    async def check_value(
        self, requester: Requester, key_name: str, blob: bytes, context: Context
    ) -> tuple[str, bytes]:
        self._admit(requester, Action.GENERATE_DATA_KEY_WITHOUT_PLAINTEXT, key_name)

        def work(connection: Connection) -> bytes:
            with self._decrypt(connection, key_name, blob, context, "") as data_key:
                return anchors.check_value(data_key)

        return key_name, await self.client.request(work)

    # --- grants ---------------------------------------------------------------------------------------------

    async def create_grant(self, requester: Requester, key_name: str, request: GrantRequest) -> GrantMade:
        raise refusal("CreateGrant", key_name)

    async def create_attach_grant(
        self, requester: Requester, key_name: str, context: Context, name: str | None
    ) -> GrantMade:
        self._admit(requester, Action.CREATE_GRANT, key_name)

        def work(connection: Connection) -> GrantMade:
            # Who decrypts is who retires: the principal of this broker, not its session.
            principal = connection.principal()
            answer = connection.call(
                "create_grant",
                key_name,
                KeyId=key_name,
                GranteePrincipal=principal,
                RetiringPrincipal=principal,
                Operations=["Decrypt"],
                Constraints={"EncryptionContextEquals": dict(context)},
                **({} if name is None else {"Name": name}),
            )
            return GrantMade(text_of(answer, "GrantId"), text_of(answer, "GrantToken"))

        try:
            made = await self.client.request(work)
        except KeyServiceUnavailable:
            if name is not None:
                self._leftovers.note_name(key_name, name)
            raise
        self._leftovers.settled(key_name, made.grant_id, name)
        self._grants[made.grant_id] = _Known(key_name, dict(context), made.token)
        while len(self._grants) > KNOWN_GRANTS:
            self._grants.popitem(last=False)
        return made

    async def retire_grant(
        self, requester: Requester, key_name: str | None, grant_id: str | None, token: str | None
    ) -> None:
        raise refusal("RetireGrant", key_name or "The grant's key")

    async def retire_attach_grant(self, key_arn: str, grant_id: str) -> None:
        self._check_region(key_arn)
        self._grants.pop(grant_id, None)
        self._leftovers.note_grant(key_arn, grant_id)
        try:
            with trio.fail_after(RETIRE_SECONDS):
                await self.client.request(partial(_retire, key=key_arn, grant_id=grant_id))
        except trio.TooSlowError:
            raise KeyServiceUnavailable(
                reason=f"{self.settings.place} did not answer within {RETIRE_SECONDS:g} seconds"
            ) from None
        except KeyServiceUnavailable:
            raise
        except BaseException:  # AWS said no, and would again
            self._leftovers.settled(key_arn, grant_id)
            raise
        self._leftovers.settled(key_arn, grant_id)

    async def retire_leftovers(self) -> int:
        """Retire the attach grants that AWS gave no answer about; returns how many entries were settled.

        Raises KeyServiceUnavailable: then the rest is left to the next time.
        """
        done = 0
        for leftover in self._leftovers.all():
            key_arn, grant, is_name = leftover
            found = await self.client.request(partial(_named, key=key_arn, name=grant)) if is_name else [grant]
            for grant_id in found:
                if grant_id not in self._grants:  # else it was asked for again meanwhile, and is in use
                    await self.client.request(partial(_retire, key=key_arn, grant_id=grant_id))
            self._leftovers.drop(leftover)
            done += 1
        return done

    # --- key sessions ---------------------------------------------------------------------------------------

    async def check_shared_use(self, requester: Requester, key_name: str, context: Context) -> None:
        """Who of this host may use keys in AWS may use all that AWS lets its principal use: there are no owners."""
        self._admit(requester, Action.DECRYPT, key_name)

    async def check_session(self, anchor: Anchor, request: SessionRequest) -> None:
        self._check_region(request.key_name)
        anchors.check_session(anchor, request.key_name, request.context)
        known = self._grants.get(request.grant_id)
        if known is None:
            fits = await self.client.request(lambda connection: _is_granted(connection, request))
        else:
            fits = known.key_arn == request.key_name and known.context == dict(request.context)
        if not fits:
            raise InvalidGrantToken(grant=request.grant_id[:80])

    async def decrypt_for_session(self, anchor: Anchor, request: SessionRequest) -> Secret:
        await self.check_session(anchor, request)

        def work(connection: Connection) -> Secret:
            data_key = self._decrypt(connection, request.key_name, request.blob, request.context, request.grant_id)
            try:
                anchors.check_data_key(anchor, data_key)
            except BaseException:
                data_key.wipe()
                raise
            return data_key

        return await self.client.request(work)

    # --- state ----------------------------------------------------------------------------------------------

    async def probe(self) -> tuple[float, str]:
        """Ask something harmless; returns (seconds, the principal). Raises what a request raises."""

        def work(connection: Connection) -> str:
            with suppress(AccessDenied):  # an answer all the same: nothing of ebsd needs ListAliases
                connection.call("list_aliases", "*", Limit=1)
            return connection.principal()

        begun = trio.current_time()
        principal = await self.client.request(work)
        return trio.current_time() - begun, clean(principal)


def refusal(operation: str, key: str) -> AwsKeyAdministration:
    """Return the refusal of an action on a key of AWS, with the command of the AWS CLI that does it."""
    command = "".join(f"-{letter.lower()}" if letter.isupper() else letter for letter in operation).lstrip("-")
    return AwsKeyAdministration(key=key, operation=operation, command=command, region=foreign_region(key) or "REGION")


def _retire(connection: Connection, key: str, grant_id: str) -> None:
    """Retire a grant; one that is gone, or whose key is, is retired already."""
    with suppress(InvalidGrantId, InvalidGrantToken, KeyNotFound):
        connection.call("retire_grant", key, grant_id, KeyId=key, GrantId=grant_id)


def _named(connection: Connection, key: str, name: str) -> list[str]:
    """Return the ids of the grants of a key that have this name and us as grantee."""
    ids: list[str] = []
    marker: dict[str, str] = {}
    principal = connection.principal()
    for _page in range(MAX_PAGES):
        try:
            answer = connection.call("list_grants", key, KeyId=key, Limit=100, GranteePrincipal=principal, **marker)
        except KeyNotFound:
            return ids
        ids += [text_of(grant, "GrantId") for grant in _grants_in(answer) if grant.get("Name") == name]
        if not answer.get("Truncated"):
            break
        marker = {"Marker": text_of(answer, "NextMarker")}
    return ids


def _is_granted(connection: Connection, request: SessionRequest) -> bool:
    """Ask whether a grant is one that opens this session: Decrypt of exactly its context."""
    try:
        answer = connection.call(
            "list_grants", request.key_name, request.grant_id, KeyId=request.key_name, GrantId=request.grant_id
        )
    except InvalidGrantId:
        return False
    return any(
        grant.get("GrantId") == request.grant_id
        and "Decrypt" in grant.get("Operations", ())
        and (grant.get("Constraints") or {}).get("EncryptionContextEquals") == dict(request.context)
        for grant in _grants_in(answer)
    )


def _grants_in(answer: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = answer.get("Grants")
    if not isinstance(found, list) or not all(isinstance(grant, dict) for grant in found):
        raise Garbled("Grants")
    return found


def _material(answer: Mapping[str, Any], member: str) -> str:
    """Return the id of key material; endpoints older than 2025 tell none."""
    value = answer.get(member)
    return clean(value) if isinstance(value, str) else ""


def _time(value: object) -> str:
    if not isinstance(value, datetime):
        return ""
    return value.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _metadata(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the KeyMetadata members that this host's keys have, with what the API calls their defaults."""
    spec = found.get("KeySpec") or found.get("CustomerMasterKeySpec") or "SYMMETRIC_DEFAULT"
    members: dict[str, Any] = {
        "AWSAccountId": clean(found.get("AWSAccountId", "")),
        "KeyId": text_of(found, "KeyId"),
        "Arn": text_of(found, "Arn"),
        "CreationDate": _time(found.get("CreationDate")),
        "Enabled": found.get("Enabled") is True,
        "Description": str(found.get("Description", "")),
        "KeyUsage": clean(found.get("KeyUsage") or "ENCRYPT_DECRYPT"),
        "KeyState": clean(text_of(found, "KeyState")),
        "Origin": clean(found.get("Origin", "")),
        "KeyManager": clean(found.get("KeyManager", "")),
        "KeySpec": clean(spec),
        "CustomerMasterKeySpec": clean(spec),
        "EncryptionAlgorithms": [clean(name) for name in found.get("EncryptionAlgorithms") or ()],
        "MultiRegion": found.get("MultiRegion") is True,
        "CurrentKeyMaterialId": clean(found.get("CurrentKeyMaterialId", "")),
    }
    if isinstance(found.get("DeletionDate"), datetime):
        members["DeletionDate"] = _time(found["DeletionDate"])
    return members


if TYPE_CHECKING:

    def _conforms(keys: AwsKeys) -> KeyService:
        return keys
