"""Wrapped keys and encryption contexts: published vectors, and one error for everything that is wrong."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ebsd.crypto
from ebsd.crypto import wrap as w
from ebsd.crypto.context import MAX_PAIRS, canonical, check_user_pairs
from ebsd.crypto.secret import Secret
from ebsd.domain.errors import InvalidCiphertext, KmsValidation

VECTORS: dict[str, Any] = json.loads((Path(__file__).parent / "vectors" / "wrap.json").read_text())
FORMAT = Path(ebsd.crypto.__file__).with_name("FORMAT.md")

CMK = bytes(range(16))
BACKING = bytes(range(32))
CONTEXT = {"aws:ebs:id": "vol-0123456789abcdef0", "ebsd:format": "1/aes-256-xts/4096", "team": "blue"}
UNIFORM = str(InvalidCiphertext())


@pytest.fixture(scope="module")
def backing_key() -> Secret:
    return Secret.from_buffer(bytes(range(100, 132)))


@pytest.fixture(scope="module")
def blob(backing_key: Secret) -> bytes:
    return w.wrap_fresh(backing_key, CMK, BACKING, bytes(range(64)), CONTEXT)


def refused(key: Secret, blob: bytes, context: Mapping[str, str] = CONTEXT) -> None:
    """The one error, without facts and without a cause that would tell more."""
    with pytest.raises(InvalidCiphertext) as caught:
        w.unwrap(key, blob, context)
    assert str(caught.value) == UNIFORM
    assert caught.value.facts == {}
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__


@pytest.mark.parametrize("vector", VECTORS["wrapped_keys"], ids=lambda vector: vector["name"])
def test_published_blobs_hold(vector: dict[str, Any]) -> None:
    part = {name: bytes.fromhex(value) for name, value in vector.items() if name not in ("name", "context")}
    assert canonical(vector["context"]) == part["canonical_context"]
    with Secret.from_buffer(part["backing_key"]) as key:
        made = w.wrap(
            key,
            part["cmk_id"],
            part["backing_id"],
            part["plaintext"],
            vector["context"],
            salt=part["salt"],
            iv=part["iv"],
        )
        assert made == part["blob"]
        assert made.endswith(part["derived"][32:])
        with w.unwrap(key, part["blob"], vector["context"]) as opened:
            assert opened.equals(part["plaintext"])


def test_the_format_document_shows_the_vectors_of_the_file() -> None:
    text = re.sub(r"\s+", "", FORMAT.read_text())
    shown = [VECTORS["wrapped_keys"][0][name] for name in ("blob", "derived")]
    shown += [vector["canonical_context"] for vector in VECTORS["wrapped_keys"]]
    shown += [vector["key"] for vector in VECTORS["layer_keys"]]
    shown += [vector["ciphertext_sha256"] for vector in VECTORS["sectors"]]
    shown += [vector[name] for vector in VECTORS["records"] for name in ("mac", "plain_checksum")]
    shown += [vector["key_check_value"] for vector in VECTORS["key_check_values"]]
    shown += [vector["sealed"] for vector in VECTORS["sealed_documents"]]
    assert [value for value in shown if value not in text] == []


def test_a_blob_says_whose_it_is(blob: bytes) -> None:
    assert w.parse_blob(blob) == w.BlobHeader(1, 1, CMK, BACKING, 64)
    assert w.parse_blob(memoryview(blob)) == w.parse_blob(bytearray(blob))
    assert len(blob) == 64 + w.OVERHEAD == 206


def test_two_wrappings_of_one_key_share_no_random_part(backing_key: Secret, blob: bytes) -> None:
    again = w.wrap_fresh(backing_key, CMK, BACKING, bytes(range(64)), CONTEXT)
    assert again[50:94] != blob[50:94]
    assert again[94:] != blob[94:]


@settings(max_examples=60, deadline=None)
@given(
    plaintext=st.binary(min_size=1, max_size=300),
    context=st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=20), st.text(st.characters(codec="utf-8"))),
)
def test_what_was_wrapped_is_unwrapped(plaintext: bytes, context: dict[str, str]) -> None:
    if len(context) > MAX_PAIRS:
        return
    with Secret.random(32) as key, Secret.from_buffer(plaintext) as secret:
        blob = w.wrap_fresh(key, CMK, BACKING, secret.view, context)
        with w.unwrap(key, blob, dict(reversed(context.items()))) as opened:
            assert opened.equals(secret)


def test_the_longest_plaintext_is_wrapped(backing_key: Secret) -> None:
    plaintext = os.urandom(w.MAX_PLAINTEXT)
    with w.unwrap(backing_key, w.wrap_fresh(backing_key, CMK, BACKING, plaintext, {}), {}) as opened:
        assert opened.equals(plaintext)


def test_every_changed_byte_of_a_blob_is_refused(backing_key: Secret, blob: bytes) -> None:
    for at in range(len(blob)):
        for flip in (0x01, 0x80, 0xFF):
            refused(backing_key, blob[:at] + bytes((blob[at] ^ flip,)) + blob[at + 1 :])


def test_every_cut_and_every_extension_of_a_blob_is_refused(backing_key: Secret, blob: bytes) -> None:
    for length in range(len(blob)):
        refused(backing_key, blob[:length])
    for more in (1, 16, w.MAX_PLAINTEXT, 1 << 20):
        refused(backing_key, blob + bytes(more))


def test_every_other_context_is_refused(backing_key: Secret, blob: bytes) -> None:
    others: list[dict[str, str]] = [{}, {**CONTEXT, "more": ""}, {"team": "blue"}, {"\ud800": "surrogate"}]
    others += [{str(n): "" for n in range(MAX_PAIRS + 1)}, {"long": "x" * 100_000}]
    for key, value in CONTEXT.items():
        rest = {name: text for name, text in CONTEXT.items() if name != key}
        others.append(rest)
        for at in range(len(value)):
            others.append({**rest, key: value[:at] + chr(ord(value[at]) ^ 1) + value[at + 1 :]})
        for at in range(len(key)):
            others.append({**rest, key[:at] + chr(ord(key[at]) ^ 1) + key[at + 1 :]: value})
        others += [
            {**rest, key + value[:1]: value[1:]},
            {**rest, key: value + "\0"},
            {**rest, key.upper(): value},
        ]
    for context in others:
        refused(backing_key, blob, context)


def test_another_backing_key_is_refused(blob: bytes) -> None:
    with Secret.random(32) as other:
        refused(other, blob)


def test_a_blob_whose_tag_fits_but_whose_commitment_does_not_is_refused(backing_key: Secret, blob: bytes) -> None:
    refused(backing_key, blob[:-32] + os.urandom(32))


def test_blobs_that_are_none_are_refused_by_the_parser(blob: bytes) -> None:
    for bad in (
        b"",
        b"\1",
        bytes(206),
        b"\2" + blob[1:],
        b"\1\2" + blob[2:],
        blob[: w.OVERHEAD],
        blob + bytes(4096),
    ):
        with pytest.raises(InvalidCiphertext):
            w.parse_blob(bad)


def test_wrapping_refuses_parts_outside_the_limits(backing_key: Secret) -> None:
    salt, iv = bytes(32), bytes(12)
    for plaintext in (b"", bytes(w.MAX_PLAINTEXT + 1)):
        with pytest.raises(KmsValidation, match="plaintext"):
            w.wrap(backing_key, CMK, BACKING, plaintext, {}, salt=salt, iv=iv)
    for cmk, backing, a_salt, an_iv in (
        (CMK[1:], BACKING, salt, iv),
        (CMK, BACKING[1:], salt, iv),
        (CMK, BACKING, salt[1:], iv),
        (CMK, BACKING, salt, iv + b"\0"),
    ):
        with pytest.raises(ValueError, match="bytes, not"):
            w.wrap(backing_key, cmk, backing, b"x", {}, salt=a_salt, iv=an_iv)
    with Secret.random(64) as long_key, pytest.raises(ValueError, match="backing key has 32"):
        w.wrap(long_key, CMK, BACKING, b"x", {}, salt=salt, iv=iv)
    with pytest.raises(KmsValidation):
        w.wrap(backing_key, CMK, BACKING, b"x", {"\udfff": ""}, salt=salt, iv=iv)


def test_pairs_are_sorted_by_the_bytes_of_utf_8_not_by_utf_16() -> None:
    # U+FF61 comes before U+10000 in UTF-8 and after it in UTF-16
    context = {"\U00010000": "", "\uff61": ""}
    assert canonical(context).index(b"\xef\xbd\xa1") < canonical(context).index(b"\xf0\x90\x80\x80")


def test_contexts_that_differ_have_different_bytes() -> None:
    contexts: list[dict[str, str]] = [
        {},
        {"": ""},
        {"a": "b"},
        {"ab": ""},
        {"": "ab"},
        {"a": "", "b": ""},
        {"a": "\0\0\0\1b"},
        {"\u00e9": ""},
        {"e\u0301": ""},
    ]
    assert len({canonical(context) for context in contexts}) == len(contexts)


@pytest.mark.parametrize(
    "pairs",
    [
        {"aws:ebs:id": "vol-1"},
        {"AWS:ebs:id": "vol-1"},
        {"ebsd:format": "1"},
        {"EbsD:x": "1"},
        {"": "x"},
        {"k" * 385: "x"},
        {"k": "x" * 385},
        {"\ud800": "x"},
        {"k": "\ud800"},
        {str(n): "" for n in range(9)},
    ],
    ids=lambda pairs: ascii(pairs)[:24],
)
def test_pairs_that_users_may_not_set_are_refused(pairs: dict[str, str]) -> None:
    with pytest.raises(KmsValidation):
        check_user_pairs(pairs)


def test_pairs_that_users_may_set_are_taken() -> None:
    check_user_pairs({})
    check_user_pairs({"aws": "x", "awsome:": "y", "x aws:": "", "k" * 384: "ü" * 384} | dict.fromkeys("1234", ""))
