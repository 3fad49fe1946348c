"""What the sealed documents say: one frozen structure per kind of document, read and written as canonical JSON.

1. No structure here holds a secret: backing keys and data keys never stand in JSON or ``str``.
2. Unknown members are refused: a document of a newer version is not half understood.
"""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar, TypeVar

import msgspec

from ebsd.domain.ids import AccountId, KeyArn, KeyId, alias_arn, key_arn
from ebsd.domain.sharing import PublicAccess
from ebsd.kms.keystates import KeyState


class Kind(StrEnum):
    """Kinds of documents; the value stands in the database and in the seal's associated data."""

    KEY = "key"
    GRANT = "grant"
    ALIAS = "alias"
    ACCOUNT = "account"
    ANCHOR = "anchor"
    ADMISSION = "admission"


class KeyManager(StrEnum):
    CUSTOMER = "CUSTOMER"
    AWS = "AWS"
    """Made by the service itself: alias/aws/ebs."""


class Document(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base: ``kind`` and ``doc_id`` name the document; the members are its JSON."""

    kind: ClassVar[Kind]

    @property
    def doc_id(self) -> str:
        raise NotImplementedError


class BackingKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One 32-byte key of a CMK; its bytes are the document's secret at the same place in the order."""

    id: str
    """KeyMaterialId: 64 hexadecimal digits, random."""
    created: str
    rotation: str = ""
    """AUTOMATIC or ON_DEMAND; empty for the first one of a key."""

    @property
    def raw_id(self) -> bytes:
        return bytes.fromhex(self.id)


class Cmk(Document, frozen=True, forbid_unknown_fields=True):
    """A customer master key without its backing keys' bytes."""

    kind: ClassVar[Kind] = Kind.KEY

    id: KeyId
    account: AccountId
    description: str
    spec: str
    usage: str
    state: KeyState
    manager: KeyManager
    created: str
    policy: str
    """Key policy document, JSON text as it was put."""
    tags: dict[str, str]
    backing: tuple[BackingKey, ...]
    """Oldest first; the last one encrypts, every one decrypts."""
    deletion_date: str | None = None
    rotation_period_days: int | None = None
    """Of EnableKeyRotation: null while it is off."""
    next_rotation: str | None = None

    @property
    def doc_id(self) -> str:
        return self.id

    @property
    def arn(self) -> KeyArn:
        return key_arn(self.account, self.id)

    @property
    def current(self) -> BackingKey:
        return self.backing[-1]


class Alias(Document, frozen=True, forbid_unknown_fields=True):
    kind: ClassVar[Kind] = Kind.ALIAS

    account: AccountId
    name: str
    """With its prefix: ``alias/backup``."""
    target: KeyId
    created: str
    updated: str

    @property
    def doc_id(self) -> str:
        return f"{self.account}/{self.name}"

    @property
    def arn(self) -> str:
        return alias_arn(self.account, self.name)


class Constraints(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Grant constraints of the KMS API; null means unconstrained."""

    equals: dict[str, str] | None = None
    subset: dict[str, str] | None = None


class Grant(Document, frozen=True, forbid_unknown_fields=True):
    kind: ClassVar[Kind] = Kind.GRANT

    id: str
    """GrantId: 64 hexadecimal digits, random."""
    key: KeyId
    grantee: str
    operations: tuple[str, ...]
    constraints: Constraints
    retiring: str | None
    name: str
    created: str
    issuing_account: AccountId
    token_hashes: tuple[str, ...]
    """SHA-256, in hexadecimal, of the grant tokens given out; the tokens themselves are not kept."""

    @property
    def doc_id(self) -> str:
        return self.id


class Account(Document, frozen=True, forbid_unknown_fields=True):
    """EBS settings of an account; an account without a document has the defaults."""

    kind: ClassVar[Kind] = Kind.ACCOUNT

    id: AccountId
    encryption_by_default: bool = True
    """EBS starts with it off; a new installation of ours starts with it on."""
    default_key: str = ""
    """Key ARN; empty means alias/aws/ebs."""
    snapshot_public_access: PublicAccess = PublicAccess.UNBLOCKED
    """Whether snapshots of the account can be public."""

    @property
    def doc_id(self) -> str:
        return self.id


class Admission(Document, frozen=True, forbid_unknown_fields=True):
    """What an account makes, or everybody, must be encrypted, and under one of these keys."""

    kind: ClassVar[Kind] = Kind.ADMISSION

    account: str
    """``*``: all accounts."""
    allowed_keys: tuple[str, ...]
    """Key ARNs with the wildcards ``*`` and ``?``; empty: any key."""
    changed: str

    @property
    def doc_id(self) -> str:
        return self.account


class Anchor(Document, frozen=True, forbid_unknown_fields=True):
    """What a volume or snapshot must be, kept outside the store that an attacker may edit."""

    kind: ClassVar[Kind] = Kind.ANCHOR

    resource: str
    owner: AccountId
    encrypted: bool
    key_arn: str | None
    kcv: str | None
    """Key check value of the data key, 32 hexadecimal digits; null for an unencrypted resource."""
    context_id: str | None
    """``aws:ebs:id`` in the encryption context of its wrapped key: its own id, or, for a snapshot, which inherits its
    volume's wrapped key, that of the volume; null for an unencrypted resource."""
    floor: int = 0
    """Lowest generation that a record of the resource may have."""
    passed: int = 0
    """Highest floor that an accepted rollback gave up: the records of that time are not to come back, so the next one
    that is signed is above it."""
    authority: str | None = None
    """The resource whose signed record covers this one's map until its own is signed, as it was when this was made."""
    authority_floor: int = 0
    """Lowest generation that that record may have: its floor at the time. It does not rise with the other's floor."""
    data_key_created: str | None = None
    """When the data key was made, whichever resource it was made for; null where there is none or nobody noted it."""

    @property
    def doc_id(self) -> str:
        return self.resource


KINDS: dict[Kind, type[Document]] = {cls.kind: cls for cls in (Cmk, Grant, Alias, Account, Anchor, Admission)}

_encoder = msgspec.json.Encoder(order="deterministic")

T = TypeVar("T", bound=msgspec.Struct)


def to_json(value: msgspec.Struct) -> bytes:
    """Return the canonical JSON of a structure: members in order of definition, maps sorted by key, no spaces."""
    return _encoder.encode(value)


def from_json(kind: type[T], raw: bytes | bytearray | memoryview) -> T:
    """Read a structure back; raises ValueError for anything that does not fit it exactly."""
    return msgspec.json.decode(raw, type=kind)
