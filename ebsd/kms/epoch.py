"""The epoch file: the key under which all documents are sealed, itself sealed under the root key.

root key -> epoch key -> documents. The file is no database, so that the final deletion of a CMK is the overwriting of
one 4 KiB file: what an old epoch key sealed is then gone (epochchange.py). See FORMAT.md for its bytes.
"""

from __future__ import annotations

import hmac
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ebsd.crypto.kdf import derive
from ebsd.crypto.seal import SealBroken, open_sealed, seal
from ebsd.crypto.secret import Secret
from ebsd.domain.errors import IntegrityFailure, RootKeyUnavailable, UnsupportedFormat
from ebsd.kms.statefiles import EPOCH, read_limited

FILE_BYTES: Final = 4096
EPOCH_KEY_BYTES: Final = 32
_MAGIC: Final = b"EBSDEPOC"
_VERSION: Final = 1
_CHECK_BYTES: Final = 16
_HEADER: Final = struct.Struct(f">8sI{_CHECK_BYTES}sQ")
_LENGTH: Final = struct.Struct(">I")
_LABEL: Final = b"ebsd/1/epoch"
_CHECK_LABEL: Final = b"ebsd/1/root"


@dataclass(frozen=True, slots=True)
class Epoch:
    number: int
    key: Secret

    @classmethod
    def first(cls) -> Epoch:
        """Return epoch 1 with a fresh key."""
        return cls(1, Secret.random(EPOCH_KEY_BYTES))

    def next(self) -> Epoch:
        """Return the epoch after this one, with a fresh key."""
        return Epoch(self.number + 1, Secret.random(EPOCH_KEY_BYTES))


def root_check_value(root_key: Secret) -> bytes:
    """Return 16 bytes that tell root keys apart and say nothing else about them."""
    with derive(root_key, _CHECK_LABEL, b"", _CHECK_BYTES) as check:
        return bytes(check.view)


def seal_epoch(root_key: Secret, epoch: Epoch) -> bytes:
    """Return the content of an epoch file."""
    header = _HEADER.pack(_MAGIC, _VERSION, root_check_value(root_key), epoch.number)
    sealed = seal(root_key, label=_LABEL, aad=header, plaintext=epoch.key.view)
    content = header + _LENGTH.pack(len(sealed)) + sealed
    return content + bytes(FILE_BYTES - len(content))


def check_value_of(content: bytes) -> bytes:
    """Return the check value of the root key that an epoch file says it is sealed under; not authentic."""
    if len(content) != FILE_BYTES or not content.startswith(_MAGIC):
        raise IntegrityFailure(resource=_NAME, reason="it is not an epoch file")
    return bytes(_HEADER.unpack_from(content)[2])


def open_epoch(root_key: Secret, content: bytes) -> Epoch:
    """Return the epoch of an epoch file's content.

    Raises RootKeyUnavailable when it was sealed under another root key, UnsupportedFormat for a newer version
    and IntegrityFailure for a file that is damaged or no epoch file.
    """
    if len(content) != FILE_BYTES or not content.startswith(_MAGIC):
        raise IntegrityFailure(resource=_NAME, reason="it is not an epoch file")
    _, version, check, number = _HEADER.unpack_from(content)
    if version != _VERSION:
        raise UnsupportedFormat(file=_NAME, what=f"format version {version}")
    if not hmac.compare_digest(check, root_check_value(root_key)):
        raise RootKeyUnavailable(reason="it is not the one that this state was made with")
    start = _HEADER.size + _LENGTH.size
    (length,) = _LENGTH.unpack_from(content, _HEADER.size)
    if length > FILE_BYTES - start or any(content[start + length :]):
        raise IntegrityFailure(resource=_NAME, reason="its length or its padding was changed")
    try:
        key = open_sealed(root_key, label=_LABEL, aad=content[: _HEADER.size], sealed=content[start : start + length])
    except SealBroken as exc:
        raise IntegrityFailure(resource=_NAME, reason="its seal is broken: the file was changed") from exc
    if len(key) != EPOCH_KEY_BYTES:
        key.wipe()
        raise IntegrityFailure(resource=_NAME, reason="its key has another length")
    return Epoch(number, key)


def read_epoch_file(directory: Path) -> bytes:
    """Return the content of a state's epoch file; raises IntegrityFailure when there is none."""
    try:
        return read_limited(directory / EPOCH, FILE_BYTES)
    except OSError as exc:
        raise IntegrityFailure(resource=_NAME, reason=f"it cannot be read: {exc.strerror}") from exc


_NAME: Final = "The epoch file of the key service"
