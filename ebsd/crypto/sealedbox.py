"""Sealing to a public key: whoever has the public half can seal, only the private half opens.

X25519 (RFC 7748) between a key pair made for this one sealing and the receiver's, HKDF-SHA-256 of the shared secret
(SP 800-56C two-step, RFC 5869), AES-256-GCM. It hides; it says nothing about who sealed. Layout: FORMAT.md,
"Sealed box".
"""

from __future__ import annotations

from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from ebsd.crypto.seal import SealBroken
from ebsd.crypto.secret import Buffer, Secret

VERSION: Final = 1
PUBLIC_BYTES: Final = 32
PRIVATE_BYTES: Final = 32
TAG_BYTES: Final = 16
OVERHEAD: Final = 1 + PUBLIC_BYTES + TAG_BYTES
_INFO: Final = b"ebsd/1/sealed-box"
_IV: Final = bytes(12)
"""One key seals one thing, so the IV may be fixed (SP 800-38D, 8.2, asks for uniqueness per key)."""


def public_key(private: Secret) -> bytes:
    """Return the public half of a private key of 32 bytes."""
    return X25519PrivateKey.from_private_bytes(private.view).public_key().public_bytes_raw()


def seal_to(public: bytes, *, aad: bytes, plaintext: Secret) -> bytes:
    """Return version || public half of the sealing's own key pair || ciphertext || tag."""
    own = X25519PrivateKey.generate()
    own_public = own.public_key().public_bytes_raw()
    shared = own.exchange(X25519PublicKey.from_public_bytes(public))
    version = bytes((VERSION,))
    return version + own_public + _cipher(shared, own_public, public).encrypt(_IV, plaintext.view, version + aad)


def open_box(private: Secret, *, aad: bytes, sealed: Buffer) -> Secret:
    """Return the plaintext; raises SealBroken, always the same, when it does not open."""
    sealed = bytes(sealed)
    length = len(sealed) - OVERHEAD
    if length < 1 or sealed[0] != VERSION:
        raise SealBroken()
    sender = sealed[1 : 1 + PUBLIC_BYTES]
    key = X25519PrivateKey.from_private_bytes(private.view)
    try:
        shared = key.exchange(X25519PublicKey.from_public_bytes(sender))
    except ValueError:  # a point of small order
        raise SealBroken() from None
    plaintext = Secret(length)
    cipher = _cipher(shared, sender, key.public_key().public_bytes_raw())
    try:
        cipher.decrypt_into(_IV, memoryview(sealed)[1 + PUBLIC_BYTES :], sealed[:1] + aad, plaintext.view)
    except InvalidTag:
        plaintext.wipe()
        raise SealBroken() from None
    return plaintext


def _cipher(shared: bytes, sender: bytes, receiver: bytes) -> AESGCM:
    # Both public halves are in the salt, so a box cannot be taken for one of other parties.
    return AESGCM(HKDF(algorithm=SHA256(), length=32, salt=sender + receiver, info=_INFO).derive(shared))
