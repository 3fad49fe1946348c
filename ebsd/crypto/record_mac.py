"""Record MACs: what makes the record of an encrypted volume the work of a holder of its data key.

The key that signs is the key that is used, so a MAC alone does not tell a substituted data key; the key
check value in the broker's anchor does.
"""

from __future__ import annotations

import hmac
from hashlib import sha512
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.hashes import SHA512
from cryptography.hazmat.primitives.hmac import HMAC

from ebsd.crypto.kdf import record_key
from ebsd.crypto.secret import Buffer, Secret

MAC_BYTES: Final = 64
_PLAIN_LABEL: Final = b"ebsd/1/plain-record\0"


class BadMac(ValueError):
    """The MAC or checksum is not that of these bytes under this key."""

    def __init__(self) -> None:
        super().__init__("the record's MAC does not match")


def sign(data_key: Secret, body: Buffer) -> bytes:
    """Return the 64-byte HMAC-SHA-512 of ``body``, the record as stored without its MAC, under the record
    key."""
    with record_key(data_key) as key:
        mac = HMAC(key.view, SHA512())
        mac.update(body)
        return mac.finalize()


def verify(data_key: Secret, body: Buffer, mac: bytes) -> None:
    """Raise BadMac unless ``mac`` is that of ``body``; compared in constant time. Call it before parsing
    the body."""
    with record_key(data_key) as key:
        expected = HMAC(key.view, SHA512())
        expected.update(body)
        try:
            expected.verify(mac)
        except InvalidSignature:
            raise BadMac() from None


def plain_checksum(body: Buffer) -> bytes:
    """Return the 64-byte labelled SHA-512 that stands in the MAC's place for an unencrypted volume.

    It finds accidents, not malice: anybody who can edit the record can compute it. That a volume is meant
    to be unencrypted is said by the broker's anchor, never by its record.
    """
    digest = sha512(_PLAIN_LABEL)
    digest.update(body)
    return digest.digest()


def verify_plain(body: Buffer, checksum: bytes) -> None:
    """Raise BadMac unless ``checksum`` is the plain checksum of ``body``."""
    if not hmac.compare_digest(plain_checksum(body), checksum):
        raise BadMac()
