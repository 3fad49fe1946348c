"""Wrapped keys against a second implementation, written from FORMAT.md alone, and against random changes.

EBSD_MUTATIONS says how many changed blobs and contexts are tried (default 20000; 1000000 takes about two minutes),
EBSD_MUTATIONS_SEED repeats a run.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import random
import struct
from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ebsd.crypto import wrap
from ebsd.crypto.secret import Secret
from ebsd.domain.errors import InvalidCiphertext

MUTATIONS = int(os.environ.get("EBSD_MUTATIONS", "20000"))
SEED = int(os.environ.get("EBSD_MUTATIONS_SEED", "0")) or (
    1 if MUTATIONS == 20000 else random.SystemRandom().randrange(1 << 32)
)

pytestmark = pytest.mark.timeout(120 + MUTATIONS // 1000)

Context = dict[str, str]
CMK, BACKING_ID, BACKING_KEY = bytes(range(16)), bytes(range(32)), bytes(range(100, 132))
CONTEXTS: list[Context] = [
    {"aws:ebs:id": "vol-0123456789abcdef0", "ebsd:format": "1/aes-256-xts/4096"},
    {"aws:ebs:id": "vol-0123456789abcdef0", "ebsd:format": "1/aes-256-xts/4096", "Dept": "IT", "équipe": "bleue"},
    {"aws:ebs:id": "snap-0123456789abcdef0", "ebsd:format": "1/aes-256-xts/4096", "a": "", "b": "ab", "ab": "b"},
    {},
]


# --- FORMAT.md, "Key derivation", "Canonical context", "Wrapped key"


def be32(number: int) -> bytes:
    return struct.pack(">I", number)


def canonical(context: Context) -> bytes:
    pairs = sorted((key.encode(), value.encode()) for key, value in context.items())
    return be32(len(pairs)) + b"".join(be32(len(text)) + text for pair in pairs for text in pair)


def keys_of(backing_key: bytes, header: bytes, salt: bytes, pairs: bytes) -> tuple[bytes, bytes]:
    context = header + salt + hashlib.sha256(pairs).digest()
    block = hmac.digest(backing_key, be32(1) + b"ebsd/1/wrap" + b"\0" + context + be32(8 * 64), "sha512")
    return block[:32], block[32:]


def seal(plaintext: bytes, context: Context, salt: bytes, iv: bytes) -> bytes:
    header = bytes((1, 1)) + CMK + BACKING_ID
    pairs = canonical(context)
    key, commitment = keys_of(BACKING_KEY, header, salt, pairs)
    return header + salt + iv + AESGCM(key).encrypt(iv, plaintext, header + pairs) + commitment


def unseal(blob: bytes, context: Context) -> bytes:
    header, salt, iv, sealed, found = blob[:50], blob[50:82], blob[82:94], blob[94:-32], blob[-32:]
    pairs = canonical(context)
    key, commitment = keys_of(BACKING_KEY, header, salt, pairs)
    assert commitment == found
    return AESGCM(key).decrypt(iv, sealed, header + pairs)


@pytest.fixture(scope="module")
def backing_key() -> Secret:
    return Secret.from_buffer(BACKING_KEY)


@pytest.mark.parametrize("context", CONTEXTS, ids=len)
def test_both_implementations_make_the_same_bytes_and_open_each_others(backing_key: Secret, context: Context) -> None:
    dice = random.Random(SEED)
    for length in (1, 16, 63, 64, 65, 1024, 4096):
        plaintext, salt, iv = dice.randbytes(length), dice.randbytes(32), dice.randbytes(12)
        blob = seal(plaintext, context, salt, iv)
        assert wrap.wrap(backing_key, CMK, BACKING_ID, plaintext, context, salt=salt, iv=iv) == blob
        assert unseal(wrap.wrap_fresh(backing_key, CMK, BACKING_ID, plaintext, context), context) == plaintext
        with wrap.unwrap(backing_key, blob, context) as opened:
            assert opened.equals(plaintext)


# --- changes of blobs


def flip(dice: random.Random, blob: bytearray, _other: bytes) -> None:
    blob[dice.randrange(len(blob))] ^= 1 << dice.randrange(8)


def overwrite(dice: random.Random, blob: bytearray, _other: bytes) -> None:
    at, length = dice.randrange(len(blob)), dice.randint(1, 16)
    blob[at : at + length] = dice.randbytes(min(length, len(blob) - at))


def clear(dice: random.Random, blob: bytearray, _other: bytes) -> None:
    at = dice.randrange(len(blob))
    length = dice.randint(1, len(blob) - at)
    blob[at : at + length] = bytes((dice.choice((0, 255)),)) * length


def exchange(dice: random.Random, blob: bytearray, _other: bytes) -> None:
    one, two = dice.randrange(len(blob)), dice.randrange(len(blob))
    blob[one], blob[two] = blob[two], blob[one]


def cut(dice: random.Random, blob: bytearray, _other: bytes) -> None:
    at = dice.randrange(len(blob))
    del blob[at : at + dice.randint(1, 40)]


def insert(dice: random.Random, blob: bytearray, _other: bytes) -> None:
    at = dice.randint(0, len(blob))
    blob[at:at] = dice.randbytes(dice.randint(1, 40))


FIELDS = (0, 1, 2, 18, 50, 82, 94, 158, 174, 206)
"""Where the fields of the blob of a 64-byte key begin, and its end."""


def graft(dice: random.Random, blob: bytearray, other: bytes) -> None:
    """Put one or more whole fields of another good blob in."""
    one, two = sorted(dice.sample(range(len(FIELDS)), 2))
    blob[FIELDS[one] : FIELDS[two]] = other[FIELDS[one] : FIELDS[two]]


def splice(dice: random.Random, blob: bytearray, other: bytes) -> None:
    at = dice.randrange(len(blob))
    blob[at:] = other[at:]


BLOBS: tuple[Callable[[random.Random, bytearray, bytes], None], ...] = (
    flip, flip, overwrite, clear, exchange, cut, insert, graft, graft, splice,
)  # fmt: skip

# --- changes of contexts


def change_text(dice: random.Random, text: str) -> str:
    at = dice.randint(0, len(text))
    return dice.choice(
        (
            text[:at] + chr(dice.choice((0, 0x41, 0xE9, 0x301, 0x2028, 0x1F511))) + text[at:],
            text[:at] + text[at + 1 :],
            text.swapcase(),
            text[::-1],
            text + "\0",
            " " + text,
            text.replace("0", "1", 1),
        )
    )


def change_pair(dice: random.Random, context: Context) -> None:
    if context:
        key = dice.choice(list(context))
        value = context.pop(key)
        if dice.random() < 0.5:
            context[change_text(dice, key)] = value
        else:
            context[key] = change_text(dice, value)


def move_text(dice: random.Random, context: Context) -> None:
    """Move the border between a key and its value, which must not read alike."""
    if context:
        key = dice.choice(list(context))
        joined = key + context.pop(key)
        at = dice.randint(0, len(joined))
        context[joined[:at]] = joined[at:]


def drop_or_add(dice: random.Random, context: Context) -> None:
    if context and dice.random() < 0.5:
        del context[dice.choice(list(context))]
    else:
        context[dice.choice(("", "a", "aws:ebs:id ", "AWS:EBS:ID", "ebsd:format2"))] = dice.choice(("", "x"))


def exchange_values(dice: random.Random, context: Context) -> None:
    if len(context) > 1:
        one, two = dice.sample(list(context), 2)
        context[one], context[two] = context[two], context[one]


CONTEXT_CHANGES: tuple[Callable[[random.Random, Context], None], ...] = (
    change_pair, move_text, drop_or_add, exchange_values,
)  # fmt: skip


def test_no_changed_blob_and_no_changed_context_opens(backing_key: Secret) -> None:
    """Blob, context or both are changed, once to three times, or one good blob meets the context of another."""
    print(f"EBSD_MUTATIONS_SEED={SEED}")
    dice = random.Random(SEED)
    good = [(wrap.wrap_fresh(backing_key, CMK, BACKING_ID, dice.randbytes(64), c), c) for c in CONTEXTS for _ in "ab"]
    pairs = {(blob, canonical(context)) for blob, context in good}
    tried = 0
    while tried < MUTATIONS:
        (first, first_context), (second, second_context) = dice.choice(good), dice.choice(good)
        what = dice.choice(("blob", "blob", "context", "both"))
        blob, context = bytearray(first), dict(first_context)
        if what != "context":
            for _ in range(dice.choice((1, 1, 1, 2, 3))):
                dice.choice(BLOBS)(dice, blob or bytearray(b"\1"), second)
        if what != "blob":
            if dice.random() < 0.3:
                context = dict(second_context)
            else:
                dice.choice(CONTEXT_CHANGES)(dice, context)
        if (bytes(blob), canonical(context)) in pairs:
            continue  # changed into a good pair again
        tried += 1
        try:
            opened = wrap.unwrap(backing_key, blob, context)
        except InvalidCiphertext as refused:
            if refused.facts:
                raise AssertionError("it tells what is wrong") from refused
        else:
            opened.wipe()
            raise AssertionError(f"{blob.hex()} opened under {context!r}, changed from {first.hex()}")


def test_no_other_backing_key_opens_it() -> None:
    dice = random.Random(SEED)
    blob = seal(bytes(64), CONTEXTS[0], bytes(32), bytes(12))
    for bit in range(256):
        changed = bytearray(BACKING_KEY)
        changed[bit // 8] ^= 1 << bit % 8
        with Secret.from_buffer(changed) as key, pytest.raises(InvalidCiphertext):
            wrap.unwrap(key, blob, CONTEXTS[0])
    with Secret.from_buffer(dice.randbytes(32)) as key, pytest.raises(InvalidCiphertext):
        wrap.unwrap(key, blob, CONTEXTS[0])
