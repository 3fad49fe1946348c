"""Codecs: which key and tweak a sector of a layer gets, and how long keys live."""

from __future__ import annotations

import gc
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher as LibraryCipher
from cryptography.hazmat.primitives.ciphers import algorithms, modes

from ebsd.crypto.codec import CodecClosed, CodecFactory, LayerCodec, PlainCodec, XtsLayerCodec
from ebsd.crypto.kdf import layer_key
from ebsd.crypto.secret import Secret
from ebsd.crypto.xts import XtsClosed
from ebsd.domain.model import Cipher
from ebsd.domain.units import SECTOR, SEGMENT

LAYER = bytes(range(16))
SPAN = SEGMENT // SECTOR


@pytest.fixture
def data_key() -> Iterator[Secret]:
    with Secret.from_buffer(bytes(range(64))) as secret:
        yield secret


def reference(data_key: Secret, layer: bytes, first_sector: int, data: bytes, size: int = SECTOR) -> bytes:
    """Sector by sector with the library: key of its segment, tweak = number in the volume."""
    out = []
    for index in range(len(data) // size):
        sector = first_sector + index
        with layer_key(data_key, layer, sector // (SEGMENT // size), size, 1) as key:
            cipher = LibraryCipher(algorithms.AES(bytes(key.view)), modes.XTS(sector.to_bytes(16, "little")))
        encryptor = cipher.encryptor()
        out.append(encryptor.update(data[index * size : (index + 1) * size]) + encryptor.finalize())
    return b"".join(out)


@pytest.mark.parametrize("first_sector", [0, 1, SPAN - 1, SPAN - 2, SPAN - 4, SPAN, 5 * SPAN - 3, 64 * SPAN - 4])
def test_sectors_get_the_key_of_their_segment_and_the_tweak_of_their_number(
    data_key: Secret, first_sector: int
) -> None:
    data = os.urandom(4 * SECTOR)
    out = bytearray(len(data))
    codec = XtsLayerCodec(data_key, LAYER)
    codec.encrypt_into(data, out, first_sector)
    assert out == reference(data_key, LAYER, first_sector, data)
    codec.decrypt_into(out, out, first_sector)
    assert out == data
    codec.close()


def test_small_sectors_count_and_split_by_their_own_size(data_key: Secret) -> None:
    data = os.urandom(4 * 512)
    out = bytearray(len(data))
    codec = XtsLayerCodec(data_key, LAYER, 512)
    first = SEGMENT // 512 - 2
    codec.encrypt_into(data, out, first)
    assert out == reference(data_key, LAYER, first, data, 512)
    codec.close()


def test_two_layers_never_share_ciphertext(data_key: Secret) -> None:
    data = bytes(SECTOR)
    outs = []
    with CodecFactory(data_key, cipher=Cipher.AES_256_XTS) as factory:
        for number in range(3):
            out = bytearray(SECTOR)
            factory.codec(bytes((number,)) * 16).encrypt_into(data, out, 9)
            outs.append(bytes(out))
    assert len(set(outs)) == 3


def test_memory_maps_and_views_are_taken(data_key: Secret) -> None:
    codec = XtsLayerCodec(data_key, LAYER)
    with mmap.mmap(-1, 2 * SECTOR) as area:
        view = memoryview(area)
        codec.encrypt_into(view[:SECTOR], view[SECTOR:], 0)
        assert view[SECTOR:] == reference(data_key, LAYER, 0, bytes(SECTOR))
        view.release()
        codec.encrypt_into(area, area, SPAN - 1)
    codec.close()


@pytest.mark.parametrize("kind", ["xts", "plain"])
def test_ranges_that_are_no_whole_sectors_are_refused(data_key: Secret, kind: str) -> None:
    codec: LayerCodec = XtsLayerCodec(data_key, LAYER) if kind == "xts" else PlainCodec()
    for length, room, first in (
        (SECTOR - 1, SECTOR - 1, 0),
        (512, 512, 0),
        (SECTOR, SECTOR, -1),
        (SECTOR, 2 * SECTOR, 0),
        (2 * SECTOR, SECTOR, 0),
        (2 * SECTOR, SECTOR, SPAN - 1),
    ):
        for run in (codec.encrypt_into, codec.decrypt_into):
            out = bytearray(room)
            with pytest.raises(ValueError, match="bytes"):
                run(bytes(length), out, first)
            assert out == bytes(room)
    codec.close()


def test_an_empty_range_is_nothing(data_key: Secret) -> None:
    XtsLayerCodec(data_key, LAYER).encrypt_into(b"", bytearray(), SPAN)
    PlainCodec().encrypt_into(b"", bytearray(), 0)


def test_a_plain_codec_copies_also_onto_itself() -> None:
    data = bytearray(os.urandom(SECTOR))
    before, out = bytes(data), bytearray(SECTOR)
    codec = PlainCodec()
    codec.encrypt_into(data, out, 3)
    assert out == before
    codec.decrypt_into(data, data, 3)
    assert data == before


def test_a_closed_codec_refuses_to_work(data_key: Secret) -> None:
    codec = XtsLayerCodec(data_key, LAYER)
    codec.encrypt_into(bytes(SECTOR), bytearray(SECTOR), 0)
    codec.close()
    codec.close()
    for sector in (0, SPAN):
        with pytest.raises(CodecClosed):
            codec.encrypt_into(bytes(SECTOR), bytearray(SECTOR), sector)


def test_a_factory_remembers_the_layers_used_last(data_key: Secret) -> None:
    with CodecFactory(data_key, cipher=Cipher.AES_256_XTS, kept=2) as factory:
        one, two, three = (bytes((n,)) * 16 for n in range(3))
        first = factory.codec(one)
        second = factory.codec(two)
        assert factory.codec(one) is first
        factory.codec(three)  # pushes out `two`, used longest ago
        assert factory.codec(one) is first
        assert factory.codec(two) is not second


def test_a_codec_pushed_out_still_works_for_who_holds_it_and_closes_with_the_factory(
    data_key: Secret,
) -> None:
    factory = CodecFactory(data_key, cipher=Cipher.AES_256_XTS, kept=1)
    held = factory.codec(LAYER)
    out = bytearray(SECTOR)
    held.encrypt_into(bytes(SECTOR), out, 0)
    factory.codec(bytes(16))
    again = bytearray(SECTOR)
    held.encrypt_into(bytes(SECTOR), again, 0)
    assert again == out
    factory.close()
    factory.close()
    with pytest.raises((CodecClosed, XtsClosed)):
        held.encrypt_into(bytes(SECTOR), again, 0)
    with pytest.raises(CodecClosed):
        factory.codec(LAYER)
    assert not data_key.is_wiped  # borrowed: it still signs the record


def test_codecs_that_nobody_holds_are_not_kept_alive(data_key: Secret) -> None:
    with CodecFactory(data_key, cipher=Cipher.AES_256_XTS, kept=2) as factory:
        for number in range(20):
            factory.codec(bytes((number,)) * 16).encrypt_into(bytes(SECTOR), bytearray(SECTOR), 0)
        gc.collect()
        assert len(factory._alive) == 2


def test_the_cipher_and_the_presence_of_a_key_must_agree(data_key: Secret) -> None:
    with pytest.raises(ValueError, match="without a data key"):
        CodecFactory(None, cipher=Cipher.AES_256_XTS)
    with pytest.raises(ValueError, match="with a data key"):
        CodecFactory(data_key, cipher=Cipher.NONE)
    with CodecFactory(None, cipher=Cipher.NONE) as factory:
        assert isinstance(factory.codec(LAYER), PlainCodec)


def test_threads_share_a_factory_under_eviction(data_key: Secret) -> None:
    data = os.urandom(2 * SECTOR)
    layers = [bytes((n,)) * 16 for n in range(6)]
    expected = {layer: reference(data_key, layer, SPAN - 1, data) for layer in layers}

    def work(offset: int) -> None:
        out = bytearray(len(data))
        for step in range(150):
            layer = layers[(step * (offset + 1)) % len(layers)]
            factory.codec(layer).encrypt_into(data, out, SPAN - 1)
            assert out == expected[layer]

    with CodecFactory(data_key, cipher=Cipher.AES_256_XTS, kept=2) as factory, ThreadPoolExecutor(6) as pool:
        for result in [pool.submit(work, offset) for offset in range(6)]:
            result.result(timeout=60)
