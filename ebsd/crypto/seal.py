"""Sealed documents: authenticated encryption of the key broker's rows and backups.

Every sealing derives a key of its own from a random salt, so any number of documents may be sealed under
one key without counting IVs (SP 800-38D, 8.3, limits one key to 2**32 random ones). Layout: FORMAT.md,
"Sealed document".
"""

from __future__ import annotations

import os
from hashlib import sha256
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ebsd.crypto.kdf import derive
from ebsd.crypto.secret import Buffer, Secret

VERSION: Final = 1
SALT_BYTES: Final = 32
IV_BYTES: Final = 12
TAG_BYTES: Final = 16
OVERHEAD: Final = 1 + SALT_BYTES + IV_BYTES + TAG_BYTES
MAX_DOCUMENT: Final = 64 * 1024 * 1024
"""Bytes of plaintext; a bound for hostile input, far above any document of the broker."""
MIN_KEY_BYTES: Final = 32


class SealBroken(ValueError):
    """The document is damaged, or was sealed with another key, label or associated data. It never says
    which."""

    def __init__(self) -> None:
        super().__init__("the sealed document does not open")


def seal(key: Secret, *, label: bytes, aad: bytes, plaintext: Buffer) -> bytes:
    """Return version || salt || iv || ciphertext || tag of ``plaintext`` (1 .. MAX_DOCUMENT bytes).

    ``label`` is one of the labels in ebsd.crypto.kdf; ``aad`` names the document (its id and kind), is not
    stored and must be given again to open it. ``key`` has at least 32 bytes. Raises ValueError for lengths.
    """
    if not 1 <= len(plaintext) <= MAX_DOCUMENT:
        raise ValueError(f"a document has 1 to {MAX_DOCUMENT} bytes, not {len(plaintext)}")
    version, salt, iv = bytes((VERSION,)), os.urandom(SALT_BYTES), os.urandom(IV_BYTES)
    with _document_key(key, label, aad, salt) as document_key:
        sealed = AESGCM(document_key.view).encrypt(iv, plaintext, version + aad)
    return b"".join((version, salt, iv, sealed))


def open_sealed(key: Secret, *, label: bytes, aad: bytes, sealed: Buffer) -> Secret:
    """Return the plaintext of a sealed document. Raises SealBroken, always the same, when it does not
    open."""
    sealed = bytes(sealed)
    length = len(sealed) - OVERHEAD
    if not 1 <= length <= MAX_DOCUMENT or sealed[0] != VERSION:
        raise SealBroken()
    salt, iv, body = sealed[1:33], sealed[33:45], memoryview(sealed)[45:]
    with _document_key(key, label, aad, salt) as document_key:
        plaintext = Secret(length)
        try:
            AESGCM(document_key.view).decrypt_into(iv, body, sealed[:1] + aad, plaintext.view)
        except InvalidTag:
            plaintext.wipe()
            raise SealBroken() from None
    return plaintext


def _document_key(key: Secret, label: bytes, aad: bytes, salt: bytes) -> Secret:
    if len(key) < MIN_KEY_BYTES:
        raise ValueError(f"a sealing key has at least {MIN_KEY_BYTES} bytes, not {len(key)}")
    return derive(key, label, sha256(aad).digest() + salt, 32)
