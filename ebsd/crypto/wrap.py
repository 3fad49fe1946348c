"""Wrapped keys: a small secret under a backing key of a CMK, bound to its encryption context.

Layout and reasons: FORMAT.md, "Wrapped key". Three rules:

1. AES-GCM key and commitment are derived for every call over header, salt and context, so a (key, IV) pair
   never repeats, and a blob that opens under one backing key opens under no other.
2. The commitment is compared first, in constant time.
3. Whatever is wrong, the answer is the one InvalidCiphertext: no oracle.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ebsd.crypto.context import canonical
from ebsd.crypto.kdf import LABEL_WRAP, derive
from ebsd.crypto.secret import Buffer, Secret
from ebsd.domain.errors import InvalidCiphertext, KmsValidation

VERSION: Final = 1
SUITE_AES_256_GCM: Final = 1
"""KBKDF-HMAC-SHA-512, AES-256-GCM, 32-byte commitment. An allow-list of one."""

BACKING_KEY_BYTES: Final = 32
CMK_ID_BYTES: Final = 16
BACKING_ID_BYTES: Final = 32
SALT_BYTES: Final = 32
IV_BYTES: Final = 12
TAG_BYTES: Final = 16
COMMITMENT_BYTES: Final = 32
MAX_PLAINTEXT: Final = 4096
"""Bytes; KMS's own limit for Encrypt."""

_HEADER: Final = 2 + CMK_ID_BYTES + BACKING_ID_BYTES
_SALT_END: Final = _HEADER + SALT_BYTES
_IV_END: Final = _SALT_END + IV_BYTES
OVERHEAD: Final = _IV_END + TAG_BYTES + COMMITMENT_BYTES
"""Bytes a blob is longer than its plaintext: 142."""


@dataclass(frozen=True, slots=True)
class BlobHeader:
    """What a blob says of itself. Nothing of it is authenticated until ``unwrap`` succeeds."""

    version: int
    suite: int
    cmk_id: bytes
    """16 bytes of the CMK's UUID."""
    backing_id: bytes
    """32 bytes that name the backing key."""
    plaintext_length: int


def wrap(
    backing_key: Secret,
    cmk_id: bytes,
    backing_id: bytes,
    plaintext: Buffer,
    context: Mapping[str, str],
    *,
    salt: bytes,
    iv: bytes,
) -> bytes:
    """Return the blob of ``plaintext`` (1 .. 4096 bytes) for this context.

    ``salt`` (32 bytes) and ``iv`` (12 bytes) must be fresh random; ``wrap_fresh`` makes them.
    Raises KmsValidation for a plaintext or context outside the limits, ValueError for parts of a wrong
    length.
    """
    for name, part, wanted in (
        ("CMK id", cmk_id, CMK_ID_BYTES),
        ("backing key id", backing_id, BACKING_ID_BYTES),
        ("salt", salt, SALT_BYTES),
        ("IV", iv, IV_BYTES),
    ):
        if len(part) != wanted:
            raise ValueError(f"the {name} has {wanted} bytes, not {len(part)}")
    if not 1 <= len(plaintext) <= MAX_PLAINTEXT:
        raise KmsValidation(reason=f"The plaintext has {len(plaintext)} bytes; 1 to {MAX_PLAINTEXT} are possible")
    header = bytes((VERSION, SUITE_AES_256_GCM)) + cmk_id + backing_id
    pairs = canonical(context)
    with _keys(backing_key, header, salt, pairs) as keys:
        sealed = AESGCM(keys.view[:32]).encrypt(iv, plaintext, header + pairs)
        return b"".join((header, salt, iv, sealed, keys.view[32:]))


def wrap_fresh(
    backing_key: Secret, cmk_id: bytes, backing_id: bytes, plaintext: Buffer, context: Mapping[str, str]
) -> bytes:
    """Return ``wrap`` with salt and IV from the kernel."""
    salt, iv = os.urandom(SALT_BYTES), os.urandom(IV_BYTES)
    return wrap(backing_key, cmk_id, backing_id, plaintext, context, salt=salt, iv=iv)


def parse_blob(blob: Buffer) -> BlobHeader:
    """Return the header, to find the backing key by. Raises InvalidCiphertext for anything that is no blob
    of ours."""
    length = len(blob) - OVERHEAD
    if not 1 <= length <= MAX_PLAINTEXT or blob[0] != VERSION or blob[1] != SUITE_AES_256_GCM:
        raise InvalidCiphertext()
    cmk_end = 2 + CMK_ID_BYTES
    return BlobHeader(blob[0], blob[1], bytes(blob[2:cmk_end]), bytes(blob[cmk_end:_HEADER]), length)


def unwrap(backing_key: Secret, blob: Buffer, context: Mapping[str, str]) -> Secret:
    """Return the plaintext. Raises InvalidCiphertext, always the same, for every blob, key or context that
    is not the one it was wrapped with."""
    if len(blob) > OVERHEAD + MAX_PLAINTEXT:
        raise InvalidCiphertext()
    # One immutable copy, so that what is checked is what is opened even if the caller's buffer is shared.
    blob = bytes(blob)
    length = parse_blob(blob).plaintext_length
    header, salt, iv = blob[:_HEADER], blob[_HEADER:_SALT_END], blob[_SALT_END:_IV_END]
    sealed, commitment = blob[_IV_END:-COMMITMENT_BYTES], blob[-COMMITMENT_BYTES:]
    try:
        pairs = canonical(context)
    except KmsValidation:
        raise InvalidCiphertext() from None
    with _keys(backing_key, header, salt, pairs) as keys:
        if not hmac.compare_digest(keys.view[32:], commitment):
            raise InvalidCiphertext()
        plaintext = Secret(length)
        try:
            AESGCM(keys.view[:32]).decrypt_into(iv, sealed, header + pairs, plaintext.view)
        except InvalidTag:
            plaintext.wipe()
            raise InvalidCiphertext() from None
    return plaintext


def _keys(backing_key: Secret, header: bytes, salt: bytes, pairs: bytes) -> Secret:
    """Return AES-GCM key (32) || commitment (32): the single HMAC output for this blob."""
    if len(backing_key) != BACKING_KEY_BYTES:
        raise ValueError(f"a backing key has {BACKING_KEY_BYTES} bytes, not {len(backing_key)}")
    return derive(backing_key, LABEL_WRAP, header + salt + sha256(pairs).digest(), 64)
