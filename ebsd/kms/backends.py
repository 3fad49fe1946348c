"""The key services of this broker as one: the name of a key says which back end a request goes to.

1. An ARN names its region: ``local`` is this host, any other is AWS. Nothing else is looked for in both, except by
   ``describe``: a bare alias or id that this host does not have may be one of AWS.
2. Where AWS is the default back end, alias/aws/ebs stands for the key that the configuration names.
3. A data key does not move between back ends by ReEncrypt: a copy gets a new one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ebsd.crypto.secret import Buffer, Secret
from ebsd.domain.errors import (
    AliasNotFound,
    KeyNotFound,
    KeyServiceUnavailable,
    KmsValidation,
)
from ebsd.domain.ids import MANAGED_ALIAS, foreign_region
from ebsd.kms.aws import AwsKeys
from ebsd.kms.grants import GrantRequest
from ebsd.kms.local import LocalKeys
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

NOT_CONFIGURED: Final = "it has no [key_service.aws], which the key {key} needs"


class BackEnds:
    """``KeyService`` over the local back end and, where it is configured, AWS."""

    def __init__(self, local: LocalKeys, aws: AwsKeys | None) -> None:
        self._local = local
        self._aws = aws

    def _of(self, key_name: str) -> KeyService:
        """Return the back end of a key; raises KeyServiceUnavailable when it is not configured."""
        if foreign_region(key_name) is None:
            return self._local
        if self._aws is None:
            raise KeyServiceUnavailable(reason=NOT_CONFIGURED.format(key=key_name))
        return self._aws

    def _meant(self, key_name: str) -> str:
        default = None if self._aws is None else self._aws.settings.default_key
        return default if default is not None and key_name == MANAGED_ALIAS else key_name

    async def describe(
        self, requester: Requester, key_name: str, action: Action = Action.DESCRIBE_KEY
    ) -> KeyDescription:
        meant = self._meant(key_name)
        if self._aws is not None and meant != key_name:
            return await self._aws.describe(requester, meant, action)
        try:
            return await self._of(key_name).describe(requester, key_name, action)
        except (KeyNotFound, AliasNotFound):
            if self._aws is None or key_name.startswith("arn:") or not self._aws.may_use(requester):
                raise
            bare_word = not key_name.startswith("alias/") and "-" not in key_name
            try:
                return await self._aws.describe(requester, f"alias/{key_name}" if bare_word else key_name, action)
            except KeyNotFound:
                pass  # neither has it
            raise

    async def generate_data_key(
        self, requester: Requester, key_name: str, length: int, context: Context
    ) -> tuple[Wrapped, Secret]:
        return await self._of(key_name).generate_data_key(requester, key_name, length, context)

    async def generate_data_key_without_plaintext(
        self, requester: Requester, key_name: str, length: int, context: Context
    ) -> Wrapped:
        return await self._of(key_name).generate_data_key_without_plaintext(requester, key_name, length, context)

    async def encrypt(self, requester: Requester, key_name: str, plaintext: Buffer, context: Context) -> Wrapped:
        return await self._of(key_name).encrypt(requester, key_name, plaintext, context)

    async def decrypt(self, requester: Requester, key_name: str | None, blob: bytes, context: Context) -> Unwrapped:
        service = self._local if key_name is None else self._of(key_name)
        return await service.decrypt(requester, key_name, blob, context)

    async def decrypt_for_archive(self, requester: Requester, key_arn: str, blob: bytes, context: Context) -> Secret:
        return await self._of(key_arn).decrypt_for_archive(requester, key_arn, blob, context)

    async def re_encrypt(
        self,
        requester: Requester,
        blob: bytes,
        source_key_name: str | None,
        source_context: Context,
        key_name: str,
        context: Context,
    ) -> tuple[Wrapped, Wrapped]:
        destination = self._of(key_name)
        # Without a name it is a blob of the same back end: any other says that it is none of its own.
        if source_key_name is not None and self._of(source_key_name) is not destination:
            raise KmsValidation(reason="ReEncrypt does not move a data key between AWS KMS and this host: make a copy")
        return await destination.re_encrypt(requester, blob, source_key_name, source_context, key_name, context)

    async def check_value(
        self, requester: Requester, key_name: str, blob: bytes, context: Context
    ) -> tuple[str, bytes]:
        return await self._of(key_name).check_value(requester, key_name, blob, context)

    async def create_grant(self, requester: Requester, key_name: str, request: GrantRequest) -> GrantMade:
        return await self._of(key_name).create_grant(requester, key_name, request)

    async def retire_grant(
        self, requester: Requester, key_name: str | None, grant_id: str | None, token: str | None
    ) -> None:
        service = self._local if key_name is None else self._of(key_name)
        await service.retire_grant(requester, key_name, grant_id, token)

    async def create_attach_grant(
        self, requester: Requester, key_name: str, context: Context, name: str | None
    ) -> GrantMade:
        return await self._of(key_name).create_attach_grant(requester, key_name, context, name)

    async def retire_attach_grant(self, key_arn: str, grant_id: str) -> None:
        await self._of(key_arn).retire_attach_grant(key_arn, grant_id)

    async def check_shared_use(self, requester: Requester, key_name: str, context: Context) -> None:
        await self._of(key_name).check_shared_use(requester, key_name, context)

    async def check_session(self, anchor: Anchor, request: SessionRequest) -> None:
        await self._of(request.key_name).check_session(anchor, request)

    async def decrypt_for_session(self, anchor: Anchor, request: SessionRequest) -> Secret:
        return await self._of(request.key_name).decrypt_for_session(anchor, request)


if TYPE_CHECKING:

    def _conforms(keys: BackEnds) -> KeyService:
        return keys
