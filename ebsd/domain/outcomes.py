"""Encryption outcomes: what each operation that makes something of data does with encryption parameters, its source
and the account's encryption by default. Complete tables; every cell says where it comes from.

1. Columns are the six combinations of ``Encrypted`` (absent, true, false) and whether a key is named.
2. A cell is an outcome, or the class of the error that refuses the request.
3. Whether an outcome is admitted (unencrypted, or under a key that an administrator does not list) is not decided here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final

from ebsd.domain.errors import (
    CopyNotPermitted,
    EbsdError,
    KmsKeyRequiresEncrypted,
    ParentAndEncryption,
    ParentUnencrypted,
    SnapshotKeyWithoutEncryption,
    SnapshotMustBeEncrypted,
)


class Source(Enum):
    """What is made into something else. Shared: it is another account's, which shared it or made it public."""

    NONE = "none (empty)"
    PLAIN_SNAPSHOT = "unencrypted, own"
    SHARED_PLAIN_SNAPSHOT = "unencrypted, shared or public"
    OWN_ENCRYPTED_SNAPSHOT = "encrypted, own"
    SHARED_ENCRYPTED_SNAPSHOT = "encrypted, shared"


def source_of(*, encrypted: bool, own: bool) -> Source:
    """Return the kind of a source that is there."""
    if encrypted:
        return Source.OWN_ENCRYPTED_SNAPSHOT if own else Source.SHARED_ENCRYPTED_SNAPSHOT
    return Source.PLAIN_SNAPSHOT if own else Source.SHARED_PLAIN_SNAPSHOT


class Parent(Enum):
    """``ParentSnapshotId`` of StartSnapshot."""

    NONE = "none"
    PLAIN = "unencrypted"
    ENCRYPTED = "encrypted"


class Outcome(Enum):
    """Under which key what is made will be encrypted."""

    UNENCRYPTED = "unencrypted"
    DEFAULT_KEY = "the account's default key"
    SOURCE_KEY = "the key of the source"
    NAMED_KEY = "the named key"


class Origin(Enum):
    """Where a cell comes from: a page of AWS, or a decision of ebsd with its reason."""

    GUIDE = (
        "EBS user guide, Encryption outcomes (https://docs.aws.amazon.com/ebs/latest/userguide/encryption-examples.html)"
        "; where its table says 'default customer managed key' it means the account's default key, alias/aws/ebs or not"
    )
    KEY_NEEDS_ENCRYPTED = (
        "EC2 API reference, CreateVolume and CopySnapshot, KmsKeyId: 'If KmsKeyId is specified, the encrypted state "
        "must be true'; the code is what EC2 answers, also where encryption by default is on"
    )
    FALSE_IS_ABSENT = (
        "decision of ebsd: the guide's table asks only whether encryption is enabled, so an explicit false is read as "
        "absent; it never yields an unencrypted volume where an absent parameter would not"
    )
    COPY_GUIDE = (
        "EBS user guide, Copy an Amazon EBS snapshot, encryption outcomes "
        "(https://docs.aws.amazon.com/ebs/latest/userguide/ebs-copy-snapshot.html)"
    )
    COPY_DEFAULT = (
        "EC2 API reference, CopySnapshot, KmsKeyId: 'If this parameter is not specified, your KMS key for EBS is "
        "used'; decision of ebsd: the user guide has alias/aws/ebs here while encryption by default is off, and an "
        "examples page the source's key; the default key everywhere is the one rule that fits the reference"
    )
    COPY_FALSE = (
        "EC2 API reference, CopySnapshot, Encrypted: 'You cannot set this parameter to false'; decision of ebsd: the "
        "code, which AWS does not publish, is InvalidParameterValue"
    )
    SNAPSHOT = (
        "EBS user guide: a snapshot of an encrypted volume is encrypted under the same key; encryption by default has "
        "no effect on a snapshot (https://docs.aws.amazon.com/ebs/latest/userguide/how-ebs-encryption-works.html)"
    )
    START = (
        "EBS user guide, Encryption outcomes for EBS direct APIs "
        "(https://docs.aws.amazon.com/ebs/latest/userguide/ebsapis-using-encryption.html)"
    )
    START_MERGED = (
        "decision of ebsd: the cell is merged with its neighbour in the published table; the API reference, KmsKeyArn, "
        "has a child always under its parent's key, so a key beside a parent is refused, as beside an encrypted one"
    )
    CLONE = (
        "EC2 API reference, CopyVolumes (2026): an encrypted source is always cloned encrypted, under its own key "
        "where none is named; decision of ebsd: an unencrypted source, which the user guide refuses to clone, has the "
        "outcome of its snapshot's restore, which is the same work in two steps"
    )
    ARCHIVE = (
        "decision of ebsd: AWS has no archives; what comes from one is always encrypted, and an incremental one shares "
        "the data key of its base, and so its key"
    )


Result = Outcome | type[EbsdError]


@dataclass(frozen=True, slots=True)
class Cell:
    """One combination's result, and where that comes from."""

    result: Result
    origin: Origin


Row = tuple[Cell, Cell, Cell, Cell, Cell, Cell]
"""Encrypted absent; absent with a key; true; true with a key; false; false with a key."""


def _column(encrypted: bool | None, key_named: bool) -> int:
    return {None: 0, True: 2, False: 4}[encrypted] + key_named


_U, _DEF, _SAME, _K = Outcome.UNENCRYPTED, Outcome.DEFAULT_KEY, Outcome.SOURCE_KEY, Outcome.NAMED_KEY


# --- CreateVolume -----------------------------------------------------------------------------------------

_PAIR = Cell(KmsKeyRequiresEncrypted, Origin.KEY_NEEDS_ENCRYPTED)


def _create(absent: Outcome, true: Outcome) -> Row:
    return (
        Cell(absent, Origin.GUIDE),
        _PAIR,
        Cell(true, Origin.GUIDE),
        Cell(_K, Origin.GUIDE),
        Cell(absent, Origin.GUIDE if absent is _U else Origin.FALSE_IS_ABSENT),
        _PAIR,
    )


CREATE_VOLUME: Final[Mapping[tuple[bool, Source], Row]] = {
    # (encryption by default, source): Encrypted absent, true. A named key with true is used; absent decides false, too.
    (False, Source.NONE): _create(_U, _DEF),
    (False, Source.PLAIN_SNAPSHOT): _create(_U, _DEF),
    (False, Source.SHARED_PLAIN_SNAPSHOT): _create(_U, _DEF),
    (False, Source.OWN_ENCRYPTED_SNAPSHOT): _create(_SAME, _SAME),
    (False, Source.SHARED_ENCRYPTED_SNAPSHOT): _create(_DEF, _DEF),
    (True, Source.NONE): _create(_DEF, _DEF),
    (True, Source.PLAIN_SNAPSHOT): _create(_DEF, _DEF),
    (True, Source.SHARED_PLAIN_SNAPSHOT): _create(_DEF, _DEF),
    (True, Source.OWN_ENCRYPTED_SNAPSHOT): _create(_SAME, _SAME),
    (True, Source.SHARED_ENCRYPTED_SNAPSHOT): _create(_DEF, _DEF),
}


def decide_create_volume(
    *, encrypted: bool | None, key_named: bool, source: Source, encryption_by_default: bool
) -> Outcome:
    """Return under which key CreateVolume encrypts.

    Raises KmsKeyRequiresEncrypted when a key is named without ``Encrypted=true`` (EC2's InvalidParameterDependency).
    """
    return _decided(CREATE_VOLUME[encryption_by_default, source][_column(encrypted, key_named)])


# --- CopySnapshot -----------------------------------------------------------------------------------------


def _copy(absent: Outcome, true: Outcome, origin: Origin) -> Row:
    refused = Cell(CopyNotPermitted, Origin.COPY_FALSE)
    return (Cell(absent, origin), _PAIR, Cell(true, origin), Cell(_K, Origin.COPY_GUIDE), refused, refused)


COPY_SNAPSHOT: Final[Mapping[tuple[bool, Source], Row]] = {
    # Encryption by default is the destination's. Unlike CreateVolume, an encrypted source does not hand its key on.
    (False, Source.PLAIN_SNAPSHOT): _copy(_U, _DEF, Origin.COPY_GUIDE),
    (False, Source.SHARED_PLAIN_SNAPSHOT): _copy(_U, _DEF, Origin.COPY_GUIDE),
    (False, Source.OWN_ENCRYPTED_SNAPSHOT): _copy(_DEF, _DEF, Origin.COPY_DEFAULT),
    (False, Source.SHARED_ENCRYPTED_SNAPSHOT): _copy(_DEF, _DEF, Origin.COPY_DEFAULT),
    (True, Source.PLAIN_SNAPSHOT): _copy(_DEF, _DEF, Origin.COPY_GUIDE),
    (True, Source.SHARED_PLAIN_SNAPSHOT): _copy(_DEF, _DEF, Origin.COPY_GUIDE),
    (True, Source.OWN_ENCRYPTED_SNAPSHOT): _copy(_DEF, _DEF, Origin.COPY_GUIDE),
    (True, Source.SHARED_ENCRYPTED_SNAPSHOT): _copy(_DEF, _DEF, Origin.COPY_GUIDE),
}


def decide_copy_snapshot(
    *, encrypted: bool | None, key_named: bool, source: Source, encryption_by_default: bool
) -> Outcome:
    """Return under which key CopySnapshot encrypts.

    Raises CopyNotPermitted for ``Encrypted=false`` and KmsKeyRequiresEncrypted for a key without ``Encrypted``.
    """
    return _decided(COPY_SNAPSHOT[encryption_by_default, source][_column(encrypted, key_named)])


# --- CreateSnapshot, CopyVolumes --------------------------------------------------------------------------

CREATE_SNAPSHOT: Final[Mapping[tuple[bool, bool], Cell]] = {
    # (encryption by default, volume encrypted). There are no encryption parameters: EC2 API reference, CreateSnapshot.
    (False, False): Cell(_U, Origin.SNAPSHOT),
    (False, True): Cell(_SAME, Origin.SNAPSHOT),
    (True, False): Cell(_U, Origin.SNAPSHOT),
    (True, True): Cell(_SAME, Origin.SNAPSHOT),
}

COPY_VOLUMES: Final[Mapping[tuple[bool, bool], tuple[Cell, Cell]]] = {
    # (encryption by default, volume encrypted): no key, a key, which implies encryption. A clone is a restore of a
    # snapshot that nobody sees (control.cloning), and decide_create_volume decides it.
    (False, False): (Cell(_U, Origin.CLONE), Cell(_K, Origin.CLONE)),
    (False, True): (Cell(_SAME, Origin.CLONE), Cell(_K, Origin.CLONE)),
    (True, False): (Cell(_DEF, Origin.CLONE), Cell(_K, Origin.CLONE)),
    (True, True): (Cell(_SAME, Origin.CLONE), Cell(_K, Origin.CLONE)),
}

IMPORT_ARCHIVE: Final[Mapping[bool, tuple[Cell, Cell]]] = {
    # Incremental: no key, a key. Of an archive, which is encrypted itself, whatever was archived.
    False: (Cell(_DEF, Origin.ARCHIVE), Cell(_K, Origin.ARCHIVE)),
    True: (Cell(_SAME, Origin.ARCHIVE), Cell(_SAME, Origin.ARCHIVE)),
}


def decide_create_snapshot(*, volume_encrypted: bool, encryption_by_default: bool) -> Outcome:
    """Return under which key a snapshot of a volume is encrypted."""
    return _decided(CREATE_SNAPSHOT[encryption_by_default, volume_encrypted])


def decide_import_archive(*, key_named: bool, is_incremental: bool, encryption_by_default: bool) -> Outcome:
    """Return under which key what is made of an archive is encrypted: always under one, whatever was archived.

    An incremental archive shares the data key of its base, and so its KMS key. AWS has no such action.
    """
    return _decided(IMPORT_ARCHIVE[is_incremental][key_named])


# --- StartSnapshot ----------------------------------------------------------------------------------------


def _start(*results: Result, origin: Origin = Origin.START) -> Row:
    absent, absent_key, true, true_key, false, false_key = (Cell(result, origin) for result in results)
    return absent, absent_key, true, true_key, false, false_key


_PARENT, _PLAIN_PARENT = ParentAndEncryption, ParentUnencrypted
_MUST, _NO_KEY = SnapshotMustBeEncrypted, SnapshotKeyWithoutEncryption


def _plain_parent(absent: Result) -> Row:
    row = _start(absent, _PARENT, _PARENT, _PARENT, _PARENT, _PARENT)
    return (row[0], Cell(_PARENT, Origin.START_MERGED), *row[2:])


START_SNAPSHOT: Final[Mapping[tuple[bool, Parent], Row]] = {
    # A key ARN alone implies encryption: unlike in EC2.
    (False, Parent.NONE): _start(_U, _K, _DEF, _K, _U, _NO_KEY),
    (False, Parent.PLAIN): _plain_parent(_U),
    (False, Parent.ENCRYPTED): _start(_SAME, _PARENT, _PARENT, _PARENT, _PARENT, _PARENT),
    (True, Parent.NONE): _start(_DEF, _K, _DEF, _K, _MUST, _NO_KEY),
    (True, Parent.PLAIN): _plain_parent(_PLAIN_PARENT),
    (True, Parent.ENCRYPTED): _start(_SAME, _PARENT, _PARENT, _PARENT, _PARENT, _PARENT),
}


def decide_start_snapshot(
    *, encrypted: bool | None, key_named: bool, parent: Parent, encryption_by_default: bool
) -> Outcome:
    """Return under which key StartSnapshot encrypts; SOURCE_KEY is the parent's.

    Raises ValidationException's classes: ParentAndEncryption, ParentUnencrypted, SnapshotMustBeEncrypted,
    SnapshotKeyWithoutEncryption.
    """
    return _decided(START_SNAPSHOT[encryption_by_default, parent][_column(encrypted, key_named)])


def _decided(cell: Cell) -> Outcome:
    if isinstance(cell.result, Outcome):
        return cell.result
    raise cell.result()
