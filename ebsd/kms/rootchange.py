"""The change of the root key: a new one at a new place, and a note for starts that still look at the old place.

1. In this order: the new root key is durable at its place; the note is; the state changes to an epoch under the new
   root key (epochchange.py), whose switch is the point of no return and destroys the old epoch; the note goes when a
   start finds the new root key where the configuration says.
2. The note is sealed under the old root key, and names the new one by its check value. So it takes the old root key to
   send a start elsewhere, and nobody who merely edits the state directory can.
Byte layout of the note: FORMAT.md.
"""

from __future__ import annotations

import hmac
import struct
from pathlib import Path
from typing import Final

import msgspec

from ebsd.crypto.seal import SealBroken, open_sealed, seal
from ebsd.crypto.secret import Secret
from ebsd.domain.errors import IncorrectState, InvalidParameterCombination, InvalidParameterValue
from ebsd.kms import passphrase as passphrases
from ebsd.kms.epoch import check_value_of, read_epoch_file, root_check_value
from ebsd.kms.passphrase import PassphraseFile
from ebsd.kms.rootkey import ROOT_KEY_BYTES, Fault, RootKeyFault, RootKeySource
from ebsd.kms.rootplace import RootKeyPlace
from ebsd.kms.statefiles import overwrite, read_limited, sync_directory, write_synced

MOVED: Final = "root.moved"
_MAGIC: Final = b"EBSDMOVE"
_VERSION: Final = 1
_HEADER: Final = struct.Struct(">8sII")
_LABEL: Final = b"ebsd/1/root-moved"
_MAX_NOTE: Final = 8192


def new_root_key(source: RootKeySource, present: Secret, passphrase: bytearray | None) -> Secret:
    """Return the root key at a new place, made there where none is; blocks.

    A key that is there already is taken, as a credential must be: so that a change that was cut can be repeated. Raises
    IncorrectState for the present root key, RootKeyFault, KmsValidation, InvalidParameterCombination.
    """
    if isinstance(source, PassphraseFile):
        if passphrase is None:
            raise InvalidParameterCombination(reason="A root key under a passphrase takes a passphrase")
        return source.make_next(passphrase)
    if passphrase is not None:
        raise InvalidParameterCombination(reason="Only a root key under a passphrase takes a passphrase")
    try:
        key = source.read()
    except RootKeyFault as fault:
        if fault.fault is not Fault.MISSING:
            raise
        key = Secret.random(ROOT_KEY_BYTES)
        source.store(key)
    if hmac.compare_digest(root_check_value(key), root_check_value(present)):
        key.wipe()
        raise IncorrectState(reason=f"{source.describe()} holds the present root key")
    return key


# --- the note ---------------------------------------------------------------------------------------------------


def write_note(directory: Path, old: Secret, place: RootKeyPlace, new: Secret) -> None:
    """Say that the root key ``new`` is at a place from the next epoch on; durable at return."""
    raw = msgspec.json.encode(place)
    head = _HEADER.pack(_MAGIC, _VERSION, len(raw)) + raw
    sealed = seal(old, label=_LABEL, aad=head, plaintext=root_check_value(new))
    draft = directory / f"{MOVED}.draft"
    write_synced(draft, head + sealed)
    draft.rename(directory / MOVED)
    sync_directory(directory)


def follow_note(directory: Path, old: Secret) -> RootKeyPlace | None:
    """Return where the root key of the present epoch is, when the note under this old one says so; else None."""
    try:
        place, head, sealed = _parse(read_limited(directory / MOVED, _MAX_NOTE))
        with open_sealed(old, label=_LABEL, aad=head, sealed=sealed) as check:
            fits = hmac.compare_digest(bytes(check.view), check_value_of(read_epoch_file(directory)))
    except (OSError, ValueError, msgspec.MsgspecError, SealBroken):
        return None
    return place if fits else None


def named_by_note(directory: Path) -> str:
    """Return the place that a note names, for a hint: it may be anybody's; empty without a note."""
    try:
        place, _, _ = _parse(read_limited(directory / MOVED, _MAX_NOTE))
        return place.source(directory).describe()
    except (OSError, ValueError, msgspec.MsgspecError, InvalidParameterValue):
        return ""


def _parse(note: bytes) -> tuple[RootKeyPlace, bytes, bytes]:
    """Return (place, what the seal covers besides, sealed check value); raises ValueError."""
    if len(note) < _HEADER.size:
        raise ValueError("too short")
    magic, version, length = _HEADER.unpack_from(note)
    if magic != _MAGIC or version != _VERSION:
        raise ValueError("no note")
    end = _HEADER.size + length
    return msgspec.json.decode(note[_HEADER.size : end], type=RootKeyPlace), note[:end], note[end:]


def _is_ours(path: Path) -> bool:
    """Say whether a file is one that a change made: a key file may have been put here under one of these names."""
    try:
        return read_limited(path, 8)[:8] in (_MAGIC, passphrases.MAGIC)
    except FileNotFoundError:
        return False


def forget_old(directory: Path, source: RootKeySource) -> None:
    """Destroy what a change left, once a start has found the root key where it was told to look."""
    names = [MOVED] if isinstance(source, PassphraseFile) else [MOVED, passphrases.ROOT, passphrases.NEXT]
    for name in names:
        path = directory / name
        if _is_ours(path):
            overwrite(path)
            path.unlink()
            sync_directory(directory)
