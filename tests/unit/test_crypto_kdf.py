"""Key derivation against SP 800-108 written out with the standard library, and the published vectors."""

from __future__ import annotations

import hashlib
import hmac
import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebsd.crypto import kdf, record_mac
from ebsd.crypto.codec import XtsLayerCodec
from ebsd.crypto.record_mac import BadMac
from ebsd.crypto.secret import Secret

VECTORS: dict[str, Any] = json.loads((Path(__file__).parent / "vectors" / "wrap.json").read_text())
DATA_KEY = bytes(range(64))
LABELS = [value for name, value in vars(kdf).items() if name.startswith("LABEL_")]


def sp800_108(key: bytes, label: bytes, context: bytes, length: int) -> bytes:
    out = b""
    counter = 0
    while len(out) < length:
        counter += 1
        fixed = label + b"\0" + context + (8 * length).to_bytes(4, "big")
        out += hmac.new(key, counter.to_bytes(4, "big") + fixed, hashlib.sha512).digest()
    return out[:length]


@settings(max_examples=100, deadline=None)
@given(
    key=st.binary(min_size=14, max_size=200),
    label=st.sampled_from(LABELS),
    context=st.binary(max_size=100),
    length=st.integers(1, 300),
)
def test_derivation_is_sp_800_108_in_counter_mode(key: bytes, label: bytes, context: bytes, length: int) -> None:
    with Secret.from_buffer(key) as secret, kdf.derive(secret, label, context, length) as derived:
        assert derived.equals(sp800_108(key, label, context, length))


def test_labels_are_the_published_ones_and_no_two_are_equal() -> None:
    assert sorted(LABELS) == [
        b"ebsd/1/archive-frames",
        b"ebsd/1/archive-header",
        b"ebsd/1/audit",
        b"ebsd/1/audit-start",
        b"ebsd/1/backup",
        b"ebsd/1/document",
        b"ebsd/1/imported",
        b"ebsd/1/kcv",
        b"ebsd/1/record",
        b"ebsd/1/wrap",
        b"ebsd/1/xts",
    ]


def test_labels_that_could_be_read_in_two_ways_are_refused() -> None:
    with Secret.from_buffer(DATA_KEY) as key:
        for label in (b"", b"a\0b"):
            with pytest.raises(ValueError, match="label"):
                kdf.derive(key, label, b"", 32)
        for length in (0, -1, (1 << 16) + 1):
            with pytest.raises(ValueError, match="derived"):
                kdf.derive(key, kdf.LABEL_KCV, b"", length)


@pytest.mark.parametrize("vector", VECTORS["layer_keys"])
def test_published_layer_keys_hold(vector: dict[str, Any]) -> None:
    with (
        Secret.from_buffer(bytes.fromhex(vector["data_key"])) as data_key,
        kdf.layer_key(
            data_key,
            bytes.fromhex(vector["layer_uuid"]),
            vector["segment"],
            vector["sector_size"],
            vector["cipher"],
        ) as key,
    ):
        assert key.equals(bytes.fromhex(vector["key"]))


def test_published_sector_holds() -> None:
    layer, sector = VECTORS["layer_keys"][0], VECTORS["sectors"][0]
    assert sector["key"] == layer["key"]
    assert (layer["segment"], layer["sector_size"]) == (0, 4096)
    buffer = bytearray(i % 251 for i in range(4096))
    with Secret.from_buffer(bytes.fromhex(layer["data_key"])) as data_key:
        codec = XtsLayerCodec(data_key, bytes.fromhex(layer["layer_uuid"]))
        codec.encrypt_into(buffer, buffer, sector["sector"])
        codec.close()
    assert hashlib.sha256(buffer).hexdigest() == sector["ciphertext_sha256"]


def test_every_parameter_of_a_layer_key_changes_it() -> None:
    base = (bytes(16), 0, 4096, 1)
    others = [(b"\1" + bytes(15), 0, 4096, 1), (bytes(16), 1, 4096, 1), (bytes(16), 0, 512, 1)]
    with Secret.from_buffer(DATA_KEY) as data_key:
        keys = [bytes(kdf.layer_key(data_key, *given).view) for given in [base, *others, (bytes(16), 0, 4096, 2)]]
    assert all(one != other for one, other in combinations(keys, 2))


def test_published_key_check_value_holds() -> None:
    for vector in VECTORS["key_check_values"]:
        with Secret.from_buffer(bytes.fromhex(vector["data_key"])) as data_key:
            assert kdf.key_check_value(data_key).hex() == vector["key_check_value"]


def test_data_keys_and_ids_of_other_lengths_are_refused() -> None:
    with Secret.from_buffer(bytes(range(32))) as short:
        for derive in (kdf.record_key, kdf.key_check_value):
            with pytest.raises(ValueError, match="64 bytes"):
                derive(short)
        with pytest.raises(ValueError, match="64 bytes"):
            kdf.layer_key(short, bytes(16), 0, 4096, 1)
    with Secret.from_buffer(DATA_KEY) as data_key, pytest.raises(ValueError, match="16 bytes"):
        kdf.layer_key(data_key, bytes(15), 0, 4096, 1)


@pytest.mark.parametrize("vector", VECTORS["records"])
def test_published_record_mac_and_checksum_hold(vector: dict[str, Any]) -> None:
    body = bytes.fromhex(vector["body"])
    with Secret.from_buffer(bytes.fromhex(vector["data_key"])) as data_key:
        assert record_mac.sign(data_key, body).hex() == vector["mac"]
        record_mac.verify(data_key, body, bytes.fromhex(vector["mac"]))
    assert record_mac.plain_checksum(body).hex() == vector["plain_checksum"]
    record_mac.verify_plain(body, bytes.fromhex(vector["plain_checksum"]))


def test_a_record_with_any_changed_bit_or_cut_mac_is_refused() -> None:
    body = b"a record"
    with Secret.from_buffer(DATA_KEY) as data_key, Secret.random(64) as other_key:
        mac = record_mac.sign(data_key, body)
        assert len(mac) == record_mac.MAC_BYTES
        for at in range(len(mac)):
            with pytest.raises(BadMac):
                record_mac.verify(data_key, body, mac[:at] + bytes((mac[at] ^ 1,)) + mac[at + 1 :])
        for changed in (b"", b"a recorD", body + b"\0"):
            with pytest.raises(BadMac):
                record_mac.verify(data_key, changed, mac)
        for wrong in (b"", mac[:-1], mac + b"\0", record_mac.plain_checksum(body)):
            with pytest.raises(BadMac):
                record_mac.verify(data_key, body, wrong)
        with pytest.raises(BadMac):
            record_mac.verify(other_key, body, mac)


def test_a_plain_checksum_finds_accidents() -> None:
    checksum = record_mac.plain_checksum(b"a record")
    for body, given_checksum in ((b"a recorD", checksum), (b"a record", checksum[:-1]), (b"a record", b"")):
        with pytest.raises(BadMac):
            record_mac.verify_plain(body, given_checksum)
