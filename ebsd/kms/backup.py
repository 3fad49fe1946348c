"""The backup of all keys: one file under a passphrase, written and read whole.

1. passphrase -> Argon2id -> KBKDF (in ``seal``) -> blocks; the parameters stand in the header, which every block
   authenticates, with its number and whether it is the last one: no block can be left out, moved or added.
2. The content is what the broker has on its disk: root key, epoch file, sealed documents. It restores exactly, and
   the documents' own head is checked once more when it is read.
3. Whatever is wrong with a file or a passphrase is BackupRefused, before anything was changed.
Source: RFC 9106 (Argon2; section 4 recommends 64 MiB, 3 passes, 4 lanes where 2 GiB are too much).
Byte layout: FORMAT.md.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import msgspec
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

from ebsd.crypto.kdf import LABEL_BACKUP
from ebsd.crypto.seal import OVERHEAD, SealBroken, open_sealed, seal
from ebsd.crypto.secret import Secret
from ebsd.domain.errors import BackupRefused, KmsValidation
from ebsd.kms.documents import Row
from ebsd.kms.epoch import FILE_BYTES
from ebsd.kms.rootkey import ROOT_KEY_BYTES

MIN_PASSPHRASE: Final = 8
MAX_PASSPHRASE: Final = 1024
MAX_BACKUP: Final = 512 * 1024 * 1024
_MAGIC: Final = b"EBSDKBAK"
_VERSION: Final = 1
_SALT_BYTES: Final = 16
_KEY_BYTES: Final = 32
_HEADER: Final = struct.Struct(f">8sIIII{_SALT_BYTES}s")
_LENGTH: Final = struct.Struct(">I")
_BLOCK: Final = 1024 * 1024
"""Bytes of plaintext in one block."""
_FIRST_BYTES: Final = ROOT_KEY_BYTES + FILE_BYTES


@dataclass(frozen=True, slots=True)
class Argon2:
    """Cost of the passphrase: memory in KiB, passes, lanes."""

    memory: int = 64 * 1024
    passes: int = 3
    lanes: int = 4

    def is_bearable(self) -> bool:
        """Say whether a file may make us spend this much: at most 1 GiB."""
        return 8 * self.lanes <= self.memory <= 1 << 20 and 1 <= self.passes <= 32 and 1 <= self.lanes <= 16


@dataclass(frozen=True, slots=True)
class Content:
    """What a backup holds. The receiver wipes the root key."""

    root_key: Secret
    epoch_file: bytes
    rows: list[Row]


def check_passphrase(text: bytearray) -> None:
    """Remove one newline from the end, in place; raises KmsValidation for less than 8 bytes."""
    if text.endswith(b"\n"):
        del text[-1:]
    if len(text) < MIN_PASSPHRASE:
        raise KmsValidation(reason=f"The passphrase must have at least {MIN_PASSPHRASE} bytes")


def write_backup(content: Content, passphrase: bytearray, cost: Argon2) -> bytes:
    """Return the backup file. Takes as long as Argon2 does: not for the event loop."""
    header = _HEADER.pack(_MAGIC, _VERSION, cost.memory, cost.passes, cost.lanes, os.urandom(_SALT_BYTES))
    rows = msgspec.msgpack.encode(content.rows)
    parts = [header]
    with _backup_key(header, passphrase) as key, Secret(_FIRST_BYTES) as first:
        first.view[:ROOT_KEY_BYTES] = content.root_key.view
        first.view[ROOT_KEY_BYTES:] = content.epoch_file
        blocks: list[memoryview] = [first.view]
        blocks += [memoryview(rows)[start : start + _BLOCK] for start in range(0, len(rows), _BLOCK)]
        for number, block in enumerate(blocks):
            aad = _aad(header, number, is_last=number == len(blocks) - 1)
            sealed = seal(key, label=LABEL_BACKUP, aad=aad, plaintext=block)
            parts += (_LENGTH.pack(len(sealed)), sealed)
    return b"".join(parts)


def read_backup(file: bytes | bytearray, passphrase: bytearray) -> Content:
    """Return what a backup holds. Takes as long as Argon2 does. Raises BackupRefused."""
    if len(file) < _HEADER.size or not file.startswith(_MAGIC):
        raise BackupRefused(reason="it is not a key backup")
    header = bytes(file[: _HEADER.size])
    _, version, memory, passes, lanes, _ = _HEADER.unpack(header)
    if version != _VERSION:
        raise BackupRefused(reason=f"it has format version {version}, which this version does not know")
    if not Argon2(memory, passes, lanes).is_bearable():
        raise BackupRefused(reason="its header is damaged")
    blocks = list(_blocks(memoryview(file)[_HEADER.size :]))
    with _backup_key(header, passphrase) as key:
        opened = []
        try:
            for number, block in enumerate(blocks):
                aad = _aad(header, number, is_last=number == len(blocks) - 1)
                opened.append(open_sealed(key, label=LABEL_BACKUP, aad=aad, sealed=block))
            if len(opened[0]) != _FIRST_BYTES:
                raise BackupRefused(reason="it is damaged")
            epoch_file = bytes(opened[0].view[ROOT_KEY_BYTES:])
            rows = msgspec.msgpack.decode(b"".join(part.view for part in opened[1:]), type=list[Row])
            return Content(Secret.from_buffer(opened[0].view[:ROOT_KEY_BYTES]), epoch_file, rows)
        except SealBroken as exc:
            raise BackupRefused(reason="the passphrase is wrong, or the file is damaged") from exc
        except msgspec.DecodeError as exc:
            raise BackupRefused(reason="its documents cannot be understood") from exc
        finally:
            for part in opened:
                part.wipe()


def _blocks(rest: memoryview) -> Iterator[bytes]:
    if not rest:
        raise BackupRefused(reason="it ends too early")
    while rest:
        if len(rest) < _LENGTH.size:
            raise BackupRefused(reason="it ends too early")
        (length,) = _LENGTH.unpack_from(rest)
        if length > _BLOCK + OVERHEAD or length > len(rest) - _LENGTH.size:
            raise BackupRefused(reason="it ends too early, or is damaged")
        yield bytes(rest[_LENGTH.size : _LENGTH.size + length])
        rest = rest[_LENGTH.size + length :]


def _aad(header: bytes, number: int, *, is_last: bool) -> bytes:
    return header + _LENGTH.pack(number) + bytes((is_last,))


def _backup_key(header: bytes, passphrase: bytearray) -> Secret:
    _, _, memory, passes, lanes, salt = _HEADER.unpack(header)
    key = Secret(_KEY_BYTES)
    function = Argon2id(salt=salt, length=_KEY_BYTES, iterations=passes, lanes=lanes, memory_cost=memory)
    function.derive_into(passphrase, key.view)  # type: ignore[arg-type]  # takes any buffer; the stub says bytes
    return key
