"""The cryptography of archives: a header that its key signs, frames that open only in their place of their archive.

Why it is so: volume/ARCHIVE.md. Layout of what is signed and sealed: store/archive.py.
"""

from __future__ import annotations

import hmac
import struct
from hashlib import sha256
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA512
from cryptography.hazmat.primitives.hmac import HMAC

from ebsd.crypto.kdf import DATA_KEY_BYTES, LABEL_ARCHIVE_FRAMES, LABEL_ARCHIVE_HEADER, LABEL_IMPORTED, derive
from ebsd.crypto.secret import Secret

TAG_BYTES: Final = 16
_KEY_BYTES: Final = 32
_NONCE = struct.Struct("<QI")


class NotAuthentic(ValueError):
    """It was not made with this key, or not for this place. It never says which."""

    def __init__(self) -> None:
        super().__init__("the archive does not open under this key")


def sign_header(archive_key: Secret, signed: bytes) -> bytes:
    """Return the 64-byte HMAC-SHA-512 over prelude and manifest."""
    with derive(_checked(archive_key), LABEL_ARCHIVE_HEADER, b"", 64) as key:
        mac = HMAC(key.view, SHA512())
        mac.update(signed)
        return mac.finalize()


def verify_header(archive_key: Secret, signed: bytes, mac: bytes) -> None:
    """Raise NotAuthentic unless a holder of the key signed this header; compared in constant time."""
    if not hmac.compare_digest(sign_header(archive_key, signed), mac):
        raise NotAuthentic()


def sign_import(data_key: Secret, snapshot: str, content: bytes) -> bytes:
    """Return the 64-byte MAC that says: this snapshot was imported, and has the content of this identity (32 bytes)."""
    with derive(_checked(data_key), LABEL_IMPORTED, b"", 64) as key:
        mac = HMAC(key.view, SHA512())
        mac.update(content + snapshot.encode("ascii"))
        return mac.finalize()


def verify_import(data_key: Secret, snapshot: str, content: bytes, mac: bytes) -> None:
    """Raise NotAuthentic unless a holder of the data key said so; compared in constant time."""
    if not hmac.compare_digest(sign_import(data_key, snapshot, content), mac):
        raise NotAuthentic()


class FrameSealer:
    """Seals and opens the frames of one archive, in place of the caller's buffers.

    A frame's key is derived from the archive's, its header and the frame's salt; its nonce is its number and kind; its
    associated data are the digest of all before it and its own head. So one opens only where it was written.
    """

    def __init__(self, archive_key: Secret, signed: bytes) -> None:
        """Borrow the 64-byte key; ``signed``: prelude and manifest."""
        self._key = _checked(archive_key)
        self._header = sha256(signed).digest()
        self._salt: bytes | None = None
        self._aead: AESGCM | None = None

    def seal(self, salt: bytes, kind: int, number: int, aad: bytes, plain: memoryview, into: memoryview) -> None:
        """Write ciphertext and tag: ``into`` has 16 bytes more than ``plain``."""
        self._cipher(salt).encrypt_into(_NONCE.pack(number, kind), plain, aad, into)

    def open(self, salt: bytes, kind: int, number: int, aad: bytes, sealed: memoryview, into: memoryview) -> None:
        """Write what was sealed; raises NotAuthentic, and then ``into`` holds nothing that may be used."""
        try:
            self._cipher(salt).decrypt_into(_NONCE.pack(number, kind), sealed, aad, into)
        except InvalidTag:
            into[:] = bytes(len(into))
            raise NotAuthentic() from None

    def close(self) -> None:
        """Drop the derived key."""
        self._aead = self._salt = None

    def _cipher(self, salt: bytes) -> AESGCM:
        if self._aead is None or salt != self._salt:
            with derive(self._key, LABEL_ARCHIVE_FRAMES, self._header + salt, _KEY_BYTES) as key:
                self._aead = AESGCM(key.view)
            self._salt = salt
        return self._aead


def _checked(archive_key: Secret) -> Secret:
    if len(archive_key) != DATA_KEY_BYTES:
        raise ValueError(f"the key of an archive has {DATA_KEY_BYTES} bytes, not {len(archive_key)}")
    return archive_key
