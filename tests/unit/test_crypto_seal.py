"""Sealed documents: they open with all that they were sealed with, and with nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ebsd.crypto import seal as s
from ebsd.crypto.kdf import LABEL_BACKUP, LABEL_DOCUMENT
from ebsd.crypto.seal import SealBroken
from ebsd.crypto.secret import Secret

VECTORS: dict[str, Any] = json.loads((Path(__file__).parent / "vectors" / "wrap.json").read_text())
AAD = b"cmk:1"


@pytest.fixture
def key() -> Iterator[Secret]:
    with Secret.random(32) as secret:
        yield secret


def refused(key: Secret, sealed: bytes, *, label: bytes = LABEL_DOCUMENT, aad: bytes = AAD) -> None:
    with pytest.raises(SealBroken) as caught:
        s.open_sealed(key, label=label, aad=aad, sealed=sealed)
    assert str(caught.value) == str(SealBroken())
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("vector", VECTORS["sealed_documents"], ids=lambda vector: vector["label"])
def test_published_documents_open(vector: dict[str, Any]) -> None:
    with Secret.from_buffer(bytes.fromhex(vector["key"])) as key:
        label, aad = vector["label"].encode(), bytes.fromhex(vector["aad"])
        with s.open_sealed(key, label=label, aad=aad, sealed=bytes.fromhex(vector["sealed"])) as opened:
            assert opened.equals(bytes.fromhex(vector["plaintext"]))


@pytest.mark.parametrize("length", [1, 15, 4096, 100_000])
def test_what_was_sealed_opens(key: Secret, length: int) -> None:
    plaintext = bytes(range(256)) * (length // 256 + 1)
    sealed = s.seal(key, label=LABEL_DOCUMENT, aad=AAD, plaintext=plaintext[:length])
    assert len(sealed) == length + s.OVERHEAD
    with s.open_sealed(key, label=LABEL_DOCUMENT, aad=AAD, sealed=sealed) as opened:
        assert opened.equals(plaintext[:length])


def test_every_changed_byte_and_every_cut_is_refused(key: Secret) -> None:
    sealed = s.seal(key, label=LABEL_DOCUMENT, aad=AAD, plaintext=b"state: Enabled")
    for at in range(len(sealed)):
        refused(key, sealed[:at] + bytes((sealed[at] ^ 1,)) + sealed[at + 1 :])
        refused(key, sealed[:at])
    refused(key, sealed + b"\0")


def test_another_key_label_or_name_is_refused(key: Secret) -> None:
    sealed = s.seal(key, label=LABEL_DOCUMENT, aad=AAD, plaintext=b"x")
    with Secret.random(32) as other:
        refused(other, sealed)
    refused(key, sealed, label=LABEL_BACKUP)
    for aad in (b"", b"cmk:2", b"cmk:1\0"):
        refused(key, sealed, aad=aad)


def test_sealing_twice_gives_different_bytes(key: Secret) -> None:
    one, other = (s.seal(key, label=LABEL_DOCUMENT, aad=AAD, plaintext=b"x" * 16) for _ in range(2))
    assert one[1:45] != other[1:45]
    assert one[45:] != other[45:]


def test_lengths_outside_the_limits_are_refused(key: Secret, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s, "MAX_DOCUMENT", 100)
    for plaintext in (b"", bytes(101)):
        with pytest.raises(ValueError, match="1 to 100"):
            s.seal(key, label=LABEL_DOCUMENT, aad=AAD, plaintext=plaintext)
    refused(key, b"\1" + bytes(s.OVERHEAD + 100))
    with Secret.random(16) as short, pytest.raises(ValueError, match="at least 32"):
        s.seal(short, label=LABEL_DOCUMENT, aad=AAD, plaintext=b"x")
