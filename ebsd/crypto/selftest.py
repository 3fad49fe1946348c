"""Known-answer tests of the approved algorithms, run once at the start of every process that uses keys."""

from __future__ import annotations

from hashlib import sha256
from typing import Final

from ebsd.crypto import kdf, wrap
from ebsd.crypto.digests import numbered_digests
from ebsd.crypto.secret import Secret
from ebsd.crypto.xts import XtsKey, XtsKeyRefused
from ebsd.domain.errors import InvalidCiphertext


class SelfTestFailed(RuntimeError):
    """An algorithm gave a wrong answer: the process must not touch data."""


# IEEE 1619-2007, annex B, vector 10: XTS-AES-256, 512 bytes, data unit 0xff; the digits of e and pi.
_XTS_KEY: Final = bytes.fromhex(
    "2718281828459045235360287471352662497757247093699959574966967627"
    "3141592653589793238462643383279502884197169399375105820974944592"
)
_XTS_PLAINTEXT: Final = bytes(range(256)) * 2
_XTS_FIRST_BLOCKS: Final = bytes.fromhex("1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b")
_XTS_UNITS: Final = 3
_XTS_SHA256: Final = bytes.fromhex("29e045a287d0cb1b0cd501266d9c8a3096f7d410f72a53769605ffe97862ed97")
"""Of the ciphertext of the plaintext thrice, as data units 0xff, 0x100 and 0x101."""

_KEY: Final = bytes(range(64))
_LAYER_KEY_SHA256: Final = bytes.fromhex("d650b328f23770675a5f3ad3333591ae768dac306b773d02bcdf16ed7b9935dd")
_CONTEXT: Final = {"aws:ebs:id": "vol-00000000000000001"}
_BLOB_SHA256: Final = bytes.fromhex("3e0c434c6524c7ecb9ec3a6702bd1bf6d0e71ead9f9ba1f0237393e6a673dd25")


def run() -> None:
    """Check XTS in both directions, digests, key derivation and wrapping. Raises SelfTestFailed. Takes about 2 ms."""
    _xts()
    _digests()
    _kdf()
    _wrap()


def _expect(condition: bool, what: str) -> None:
    if not condition:
        raise SelfTestFailed(f"known-answer test failed: {what}")


def _xts() -> None:
    """Both ways of computing it, where the processor has the second."""
    for plain in (False, True):
        _xts_of(plain)
    try:
        XtsKey(_XTS_KEY[:32] * 2)
    except XtsKeyRefused:
        return
    raise SelfTestFailed("an XTS key with equal halves was taken")


def _xts_of(plain: bool) -> None:
    plaintext = _XTS_PLAINTEXT * _XTS_UNITS
    unit = len(_XTS_PLAINTEXT)
    buffer = bytearray(plaintext)
    with XtsKey(_XTS_KEY, plain=plain) as key:
        key.encrypt(buffer, buffer, unit=unit, first_tweak=0xFF)
        _expect(buffer.startswith(_XTS_FIRST_BLOCKS), "XTS-AES-256, IEEE 1619 vector 10")
        _expect(sha256(buffer).digest() == _XTS_SHA256, "XTS-AES-256 encryption")
        key.decrypt(buffer, buffer, unit=unit, first_tweak=0xFF)
        _expect(buffer == plaintext, "XTS-AES-256 decryption")


def _digests() -> None:
    """All ways of computing them (sixteen, two and one at a time), against digests of Python's own OpenSSL."""
    piece, first = 210, 0x0102030405060708
    data = b"".join(sha256(bytes([at])).digest() for at in range(125))[: 19 * piece]
    wanted = b"".join(
        sha256(b"label" + (first + at).to_bytes(8, "little") + data[at * piece : (at + 1) * piece]).digest()
        for at in range(len(data) // piece)
    )
    for plain in (False, True):
        _expect(numbered_digests(b"label", first, data, piece, plain=plain) == wanted, f"SHA-256, plain {plain}")


def _kdf() -> None:
    with Secret.from_buffer(_KEY) as data_key, kdf.layer_key(data_key, bytes(16), 0, 4096, 1) as key:
        _expect(sha256(key.view).digest() == _LAYER_KEY_SHA256, "KBKDF with HMAC-SHA-512")


def _wrap() -> None:
    salt, iv = bytes(wrap.SALT_BYTES), bytes(wrap.IV_BYTES)
    with Secret.from_buffer(_KEY[:32]) as backing_key:
        blob = wrap.wrap(backing_key, bytes(16), bytes(32), _KEY, _CONTEXT, salt=salt, iv=iv)
        _expect(sha256(blob).digest() == _BLOB_SHA256, "wrapping")
        with wrap.unwrap(backing_key, blob, _CONTEXT) as opened:
            _expect(opened.equals(_KEY), "unwrapping")
        try:
            wrap.unwrap(backing_key, blob, {}).wipe()
        except InvalidCiphertext:
            return
    raise SelfTestFailed("a wrapped key opened with a wrong encryption context")
