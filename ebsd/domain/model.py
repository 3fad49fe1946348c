"""The nouns of the catalog as frozen values: volumes, snapshots, lineages, layers, attachments, jobs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, IntEnum, StrEnum
from typing import Any

from ebsd.domain.ids import AccountId, JobId, KeyArn, LineageId, SnapshotId, VolumeId
from ebsd.domain.states import (
    ACTIVE_JOBS,
    AttachmentState,
    JobKind,
    JobState,
    ModificationState,
    SnapshotState,
    VolumeState,
)
from ebsd.domain.tokens import ClientToken


class Cipher(IntEnum):
    """Cipher ids of the on-disk format: an allow-list. The value is part of key derivation."""

    AES_256_XTS = 1
    NONE = 2
    """Unencrypted. Taken only when the key service's own anchor says so, never from a file of the store."""


class ExposedAs(StrEnum):
    """How an attachment shows the volume."""

    LOOP = "loop"
    FILE = "file"


class Integrity(StrEnum):
    """What is known of a volume's map and record."""

    NEW = "new"
    """Never attached for writing."""
    VERIFIED = "verified"
    """The signed record covers the map."""
    UNVERIFIED = "unverified"
    """After an unclean stop: the structure of the map was checked, but no signature covers it."""


class LayerState(Enum):
    CREATING = "creating"
    HEAD = "head"
    SEALED = "sealed"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: from SO_PEERCRED, never from a message."""

    uid: int
    name: str
    account: AccountId
    is_admin: bool


@dataclass(frozen=True, slots=True)
class Lineage:
    """Volumes and snapshots that share one data key, sector size and cipher; of one account."""

    id: LineageId
    account: AccountId
    sector_size: int
    cipher: Cipher


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of a lineage: number (never reused) and the random id its keys are derived from."""

    lineage: LineageId
    number: int
    uuid: bytes
    volume: VolumeId | SnapshotId
    """What it was made for: a volume, or the snapshot that a copy filled."""
    state: LayerState
    size: int
    preallocated: int = 0
    """Bytes from its start that got blocks when it was made, as long as those without data were not given back."""


@dataclass(frozen=True, slots=True)
class Attachment:
    """A volume in use on this host during one boot."""

    volume: VolumeId
    state: AttachmentState
    boot_id: str
    generation: int
    """Attach generation: binds the live map to this attachment."""
    exposed_as: ExposedAs
    read_only: bool
    path: str
    """What the user opens: the loop device, or the block file."""
    loop_minor: int | None
    grant: str | None
    head: int
    """The head layer that the volume process writes to; behind ``Volume.head`` while a snapshot is being taken."""
    mount_point: str | None
    """Where ``ebsctl`` said it mounted the device; what is really mounted is read from mountinfo."""
    time: str


@dataclass(frozen=True, slots=True)
class Verification:
    """What the last verification of a volume or snapshot found."""

    time: str
    kind: str
    """authenticity: compared with what is signed; integrity: with what was noted when it was written."""
    chunks: int
    damaged_chunks: int
    damaged_files: int
    """Leaf files and tables, or a record that was refused."""

    @property
    def is_damaged(self) -> bool:
        return bool(self.damaged_chunks or self.damaged_files)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A snapshot of the catalog: a sealed map over sealed layers."""

    id: SnapshotId
    account: AccountId
    owner: str
    name: str
    volume: VolumeId
    """The volume it was taken of; COPY_SOURCE for a copy."""
    size: int
    state: SnapshotState
    message: str
    description: str
    cipher: Cipher
    key_arn: KeyArn | None
    wrapped_key: bytes | None
    context: Mapping[str, str]
    lineage: LineageId
    new_head: int
    """The layer that became the volume's head when this one was taken; 0 for a copy."""
    integrity: Integrity
    authority: str | None
    """Whose signed record covers its map, when nobody had the data key to sign its own."""
    pause_us: int | None
    started: str
    completed: str | None
    tags: Mapping[str, str] = field(default_factory=dict)
    verification: Verification | None = None
    token: ClientToken | None = None
    """Of the request that makes it, to be committed with its row; None for what is read from the catalog."""

    @property
    def encrypted(self) -> bool:
        return self.cipher is not Cipher.NONE


@dataclass(frozen=True, slots=True)
class Imported:
    """What is known of a snapshot that was made of an archive."""

    snapshot: SnapshotId
    account: AccountId
    archive: str
    """UUID."""
    source: str
    """Id of the snapshot where it was exported."""
    content: bytes
    """Identity of its content, 32 bytes."""
    mac: bytes
    """Over snapshot and content, under its data key: 64 bytes."""


@dataclass(frozen=True, slots=True)
class Job:
    """Work that takes long, in a process of its own, and survives a restart of ebsd."""

    id: JobId
    account: AccountId
    owner: str
    kind: JobKind
    state: JobState
    source: str
    """Id of what it reads, or '' when that is the client's."""
    destination: str
    """Id of what it makes, or ''."""
    total: int
    """Bytes of the source that hold data; 0 until it was counted."""
    done: int
    done_through: int
    """Chunks below this one are done for good: durable in the destination, where there is one."""
    started: str
    ended: str | None
    error: Mapping[str, str] | None
    """Code, Message and Hint of what ended it."""
    rate: int | None = None
    """Bytes per second at most; 0: no limit, None: the configured one."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """What was asked for, as its kind needs it to go on; JSON values."""
    checkpoint: Mapping[str, Any] = field(default_factory=dict)
    """What the worker of its kind must know, beside ``done_through``, to go on from there; JSON values."""

    @property
    def is_active(self) -> bool:
        """Whether source and destination are in use: it runs, or waits for its client."""
        return self.state in ACTIVE_JOBS


@dataclass(frozen=True, slots=True)
class Modification:
    """The latest growth of a volume; sizes in bytes."""

    volume: VolumeId
    state: ModificationState
    original: int
    target: int
    started: str
    ended: str | None
    message: str
    """Why it failed; empty otherwise."""


@dataclass(frozen=True, slots=True)
class Volume:
    """A volume of the catalog."""

    id: VolumeId
    account: AccountId
    owner: str
    name: str
    size: int
    state: VolumeState
    cipher: Cipher
    key_arn: KeyArn | None
    wrapped_key: bytes | None
    context: Mapping[str, str]
    """Encryption context of ``wrapped_key``."""
    lineage: LineageId
    head: int
    snapshot: SnapshotId | None
    attach_generation: int
    integrity: Integrity
    authority: str | None
    """Whose signed record covers its map until its first attachment; None for a volume made empty."""
    created: str
    reason: str
    """Why the volume is in ``error``; empty otherwise."""
    tags: Mapping[str, str] = field(default_factory=dict)
    attachment: Attachment | None = None
    verification: Verification | None = None
    preallocated: int = 0
    """Bytes from the start of its head that have blocks, so that writing them cannot lack space."""
    token: ClientToken | None = None
    """Of the request that makes it, to be committed with its row; None for what is read from the catalog."""
    source_volume: VolumeId | None = None
    """Of a clone, what it was made from, which may be gone."""

    @property
    def is_preallocated(self) -> bool:
        return self.preallocated >= self.size

    @property
    def encrypted(self) -> bool:
        return self.cipher is not Cipher.NONE
