"""Keys of the audit log: the pair whose private half leaves the host, and the start key that only moves forward.

1. Sealing to a public key is something anybody can do, so by itself it proves nothing: whoever replaces a whole chain
   could seal a chain key of his own. Therefore the start of each chain has a MAC under the *start key*, which is
   overwritten by its successor before the chain has a second record; its first value leaves the host with the
   private key.
2. The file has two slots: the new value is synced in one before the old one is overwritten in place, so a power cut
   leaves one of them, and no space is ever needed.
Formats: FORMAT.md, "Audit log".
"""

from __future__ import annotations

import os
import struct
from hashlib import sha256
from pathlib import Path
from typing import Final

from ebsd.crypto.kdf import LABEL_AUDIT_START
from ebsd.crypto.ratchet import KEY_BYTES, Ratchet
from ebsd.crypto.sealedbox import PRIVATE_BYTES, PUBLIC_BYTES, public_key
from ebsd.crypto.secret import Secret
from ebsd.kms.statefiles import sync_directory, write_all, write_synced

STATE: Final = "keys"
VERIFICATION_KEY: Final = "verification-key"

_MAGIC: Final = b"EBSDAUDK"
_FIELDS: Final = struct.Struct(f">8sIQ{PUBLIC_BYTES}s")
_KEY_END: Final = _FIELDS.size + KEY_BYTES
_SLOT_BYTES: Final = 512
_CHECK_BYTES: Final = 32
_TEXT: Final = b"ebsd-audit-key-1 "
_HEX: Final = b"0123456789abcdef"
TEXT_BYTES: Final = len(_TEXT) + 2 * (PRIVATE_BYTES + KEY_BYTES) + 1


class StartKey:
    """The public key and the start key of the next chain, as they are on the disk."""

    def __init__(self, public: bytes, index: int, key: Secret) -> None:
        self.public = public
        self.index = index
        """Chains that were begun before under this pair."""
        self._ratchet = Ratchet(key, LABEL_AUDIT_START)

    def mac(self, content: bytes) -> bytes:
        """Return the MAC of a chain's start; the start key is the next one from now on."""
        self.index += 1
        return self._ratchet.mac(content)

    def save(self, directory: Path) -> None:
        """Put this value in place of the one before, and overwrite that one. Raises OSError."""
        descriptor = os.open(directory / STATE, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            here = self.index % 2 * _SLOT_BYTES
            with self._ratchet.key() as key:
                slot = _pack(self.public, self.index, key)
            try:
                _write_at(descriptor, slot, here)
                os.fdatasync(descriptor)
                _write_at(descriptor, bytearray(_SLOT_BYTES), _SLOT_BYTES - here)
                os.fdatasync(descriptor)
            finally:
                slot[:] = bytes(len(slot))
        finally:
            os.close(descriptor)

    def wipe(self) -> None:
        self._ratchet.wipe()


def make(directory: Path) -> None:
    """Make a pair and a first start key; ``verification-key`` is what an administrator takes away.

    That file first: a start key without it would make chains that nobody can ever verify.
    """
    with Secret.random(PRIVATE_BYTES + KEY_BYTES) as both, Secret(PRIVATE_BYTES) as private, Secret(KEY_BYTES) as start:
        private.view[:], start.view[:] = both.view[:PRIVATE_BYTES], both.view[PRIVATE_BYTES:]
        text, slot = _format(both), _pack(public_key(private), 0, start)
    try:
        write_synced(directory / VERIFICATION_KEY, text)
        draft = directory / f"{STATE}.new"
        slot.extend(bytes(_SLOT_BYTES))
        write_synced(draft, slot)
        draft.rename(directory / STATE)
        sync_directory(directory)
    finally:
        text[:] = bytes(len(text))
        slot[:] = bytes(len(slot))


def load(directory: Path) -> StartKey | None:
    """Return the present start key; None when there is none that is whole. Raises OSError."""
    content = bytearray(2 * _SLOT_BYTES)
    try:
        descriptor = os.open(directory / STATE, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        os.readv(descriptor, [content])
        with memoryview(content) as view:
            slots = [found for at in (0, _SLOT_BYTES) if (found := _unpack(view[at : at + _SLOT_BYTES])) is not None]
    finally:
        os.close(descriptor)
        content[:] = bytes(len(content))
    slots.sort(key=lambda slot: slot.index)
    for older in slots[:-1]:  # a power cut between the two writes of ``save``
        older.wipe()
    return slots[-1] if slots else None


def read_verification_key(content: bytearray) -> tuple[Secret, Secret]:
    """Return (private key, first start key) of the file's text, which is wiped; raises ValueError."""
    try:
        digits = content[len(_TEXT) :].removesuffix(b"\n")
        if not content.startswith(_TEXT) or len(digits) != 2 * (PRIVATE_BYTES + KEY_BYTES):
            raise ValueError("it is no verification key of an audit log")
        both = Secret(PRIVATE_BYTES + KEY_BYTES)
        for at in range(len(both)):
            high, low = _HEX.find(digits[2 * at]), _HEX.find(digits[2 * at + 1])
            if high < 0 or low < 0:
                both.wipe()
                raise ValueError("it is no verification key of an audit log")
            both.view[at] = high << 4 | low
        digits[:] = bytes(len(digits))
    finally:
        content[:] = bytes(len(content))
    with both:
        return Secret.from_buffer(both.view[:PRIVATE_BYTES]), Secret.from_buffer(both.view[PRIVATE_BYTES:])


def is_here(directory: Path) -> bool:
    """Say whether the verification key still lies beside the log."""
    return (directory / VERIFICATION_KEY).exists()


def read_text(directory: Path) -> bytearray:
    """Return the verification key's text, the caller's to wipe; raises OSError."""
    content = bytearray(TEXT_BYTES + 1)
    descriptor = os.open(directory / VERIFICATION_KEY, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        del content[os.readv(descriptor, [content]) :]
    finally:
        os.close(descriptor)
    return content


def destroy(directory: Path) -> None:
    """Overwrite and remove the verification key, once somebody has it. Raises OSError."""
    path = directory / VERIFICATION_KEY
    descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        write_all(descriptor, bytes(TEXT_BYTES))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    path.unlink()
    sync_directory(directory)


def _pack(public: bytes, index: int, key: Secret) -> bytearray:
    """Return one slot."""
    slot = bytearray(_SLOT_BYTES)
    _FIELDS.pack_into(slot, 0, _MAGIC, 1, index, public)
    slot[_FIELDS.size : _KEY_END] = key.view
    slot[_KEY_END : _KEY_END + _CHECK_BYTES] = _check(memoryview(slot))
    return slot


def _unpack(slot: memoryview) -> StartKey | None:
    magic, version, index, public = _FIELDS.unpack_from(slot)
    if magic != _MAGIC or version != 1 or _check(slot) != slot[_KEY_END : _KEY_END + _CHECK_BYTES]:
        return None
    with Secret.from_buffer(slot[_FIELDS.size : _KEY_END]) as key:
        return StartKey(public, index, key)


def _check(slot: memoryview) -> bytes:
    """Return what tells a whole slot from one that was written in part."""
    return sha256(slot[:_KEY_END]).digest()


def _write_at(descriptor: int, content: bytearray, offset: int) -> None:
    if os.pwrite(descriptor, content, offset) != len(content):
        raise OSError("a slot of 512 bytes was written in part")


def _format(both: Secret) -> bytearray:
    text = bytearray(_TEXT)
    for byte in both.view:
        text += bytes((_HEX[byte >> 4], _HEX[byte & 15]))
    return text + b"\n"
