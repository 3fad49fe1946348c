"""The key service as the broker's handlers and key sessions use it: data keys, descriptions, grants.

The local back end (local.py) and AWS KMS (aws.py) implement it, and what chooses between them (backends.py). Anchors
and account settings are not part of it: they stay with the broker whatever the back end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from ebsd.crypto.secret import Buffer, Secret
from ebsd.kms.grants import GrantRequest
from ebsd.kms.policy import Action, Requester
from ebsd.kms.records import Anchor

Context = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class KeyDescription:
    """What handlers need of a CMK, whichever back end has it."""

    key_id: str
    arn: str
    account: str
    state: str
    manager: str
    spec: str
    usage: str


@dataclass(frozen=True, slots=True)
class Wrapped:
    """A wrapped key: the blob, and which CMK and backing key made it."""

    blob: bytes
    key_arn: str
    material_id: str


@dataclass(frozen=True, slots=True)
class Unwrapped:
    """An opened blob; the receiver wipes the plaintext."""

    plaintext: Secret
    key_arn: str
    material_id: str


@dataclass(frozen=True, slots=True)
class GrantMade:
    grant_id: str
    token: str


@dataclass(frozen=True, slots=True)
class SessionRequest:
    """The one Decrypt that a key session may do."""

    key_name: str
    grant_id: str
    blob: bytes
    context: Context


class KeyService(Protocol):
    """Every method raises AccessDenied, KeyNotFound, AliasNotFound or InvalidKeyArn for the key's name, and
    KeyDisabled or KmsInvalidState for its state, besides what is said of it."""

    async def describe(
        self, requester: Requester, key_name: str, action: Action = Action.DESCRIBE_KEY
    ) -> KeyDescription:
        """Return the key of a name once the action on it is allowed; makes alias/aws/ebs on first use."""

    async def generate_data_key(
        self, requester: Requester, key_name: str, length: int, context: Context
    ) -> tuple[Wrapped, Secret]:
        """Return ``length`` random bytes (1 to 1024), wrapped and in clear; the receiver wipes them."""

    async def generate_data_key_without_plaintext(
        self, requester: Requester, key_name: str, length: int, context: Context
    ) -> Wrapped:
        """Return ``length`` random bytes (1 to 1024), wrapped."""

    async def encrypt(self, requester: Requester, key_name: str, plaintext: Buffer, context: Context) -> Wrapped:
        """Return the plaintext (1 to 4096 bytes) wrapped."""

    async def decrypt(self, requester: Requester, key_name: str | None, blob: bytes, context: Context) -> Unwrapped:
        """Open a blob; without a name its CMK is read from the blob.

        Raises InvalidCiphertext, IncorrectKey for the blob of another CMK than the named one, and
        CiphertextAccessDenied where the blob's CMK is unknown or not the requester's.
        """

    async def re_encrypt(
        self,
        requester: Requester,
        blob: bytes,
        source_key_name: str | None,
        source_context: Context,
        key_name: str,
        context: Context,
    ) -> tuple[Wrapped, Wrapped]:
        """Return (source, destination): the same secret wrapped anew. Raises what ``decrypt`` raises."""

    async def create_grant(self, requester: Requester, key_name: str, request: GrantRequest) -> GrantMade:
        """Make a grant, or repeat one of the same name and parameters. Raises KmsLimitExceeded."""

    async def retire_grant(
        self, requester: Requester, key_name: str | None, grant_id: str | None, token: str | None
    ) -> None:
        """Retire a grant by token, or by key and id. Raises InvalidGrantToken."""

    async def create_attach_grant(
        self, requester: Requester, key_name: str, context: Context, name: str | None
    ) -> GrantMade:
        """Make the grant of an attachment: Decrypt of exactly this context, for the account's volume processes."""

    async def retire_attach_grant(self, key_arn: str, grant_id: str) -> None:
        """Retire a grant for ebsd; one that is gone already is no error, for ebsd may repeat after a crash."""

    async def check_shared_use(self, requester: Requester, key_name: str, context: Context) -> None:
        """Raise AccessDenied unless the requester may do with another account's key what EBS does with that of a
        snapshot that is shared with him (``policy.SHARED_USE``)."""

    async def check_session(self, anchor: Anchor, request: SessionRequest) -> None:
        """Raise IntegrityFailure or InvalidGrantToken unless anchor, key, grant and context fit together."""

    async def decrypt_for_session(self, anchor: Anchor, request: SessionRequest) -> Secret:
        """Check again and open the session's blob under the anchored CMK; the receiver wipes the data key.

        Raises what ``check_session`` raises, IncorrectKey, InvalidCiphertext, and IntegrityFailure when another
        data key comes out than the one the anchor remembers.
        """

    async def decrypt_for_archive(self, requester: Requester, key_arn: str, blob: bytes, context: Context) -> Secret:
        """Open the wrapped key of an archive for a user whom its CMK allows that; the receiver wipes it.

        Raises IncorrectKey, InvalidCiphertext.
        """

    async def check_value(
        self, requester: Requester, key_name: str, blob: bytes, context: Context
    ) -> tuple[str, bytes]:
        """Return the key's ARN and the check value (16 bytes) of the 64-byte data key in a blob."""
