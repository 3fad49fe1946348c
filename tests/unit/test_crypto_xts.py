"""The XTS kernel against NIST, Wycheproof, IEEE 1619 and the `cryptography` package."""

from __future__ import annotations

import ctypes
import gc
import json
import mmap
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cryptography_vectors
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from ebsd.crypto import xts
from ebsd.crypto.kdf import layer_key
from ebsd.crypto.secret import Secret
from ebsd.crypto.selftest import run as self_test
from ebsd.crypto.wrap import unwrap, wrap_fresh
from ebsd.crypto.xts import XtsClosed, XtsKey, XtsKeyRefused

VECTORS = Path(__file__).parent / "vectors"
KEY = bytes(range(64))


def nist_vectors(folder: str) -> Iterator[dict[str, str]]:
    """Records of a CAVP response file whose data units are whole bytes."""
    name = os.path.join("ciphers", "AES", "XTS", folder, "XTSGenAES256.rsp")
    with cryptography_vectors.open_vector_file(name, "r") as file:
        record: dict[str, str] = {}
        for line in [*file, ""]:
            key, equals, value = (part.strip() for part in line.partition("="))
            if equals:
                record[key.lower()] = value
            elif record:
                if "key" in record and int(record["dataunitlen"]) % 8 == 0:
                    yield record
                record = {}


def one_unit(key: bytes, tweak: int, data: bytes, *, encrypt: bool) -> bytes:
    out = bytearray(len(data))
    with XtsKey(key) as xts_key:
        run = xts_key.encrypt if encrypt else xts_key.decrypt
        run(data, out, unit=len(data), first_tweak=tweak)
    return bytes(out)


def reference(key: bytes, first_tweak: int, unit: int, data: bytes) -> bytes:
    """What `cryptography` makes of it, with a context per unit."""
    out = []
    for number, at in enumerate(range(0, len(data), unit)):
        mode = modes.XTS((first_tweak + number).to_bytes(16, "little"))
        encryptor = Cipher(algorithms.AES(key), mode).encryptor()
        out.append(encryptor.update(data[at : at + unit]) + encryptor.finalize())
    return b"".join(out)


@pytest.mark.parametrize("folder", ["tweak-128hexstr", "tweak-dataunitseqno"])
def test_nist_vectors_hold_in_both_directions(folder: str) -> None:
    count = 0
    for record in nist_vectors(folder):
        key, plaintext, ciphertext = (bytes.fromhex(record[name]) for name in ("key", "pt", "ct"))
        if "i" in record:
            tweak = int.from_bytes(bytes.fromhex(record["i"]), "little")
        else:
            tweak = int(record["dataunitseqnumber"])
        assert one_unit(key, tweak, plaintext, encrypt=True) == ciphertext, record["count"]
        assert one_unit(key, tweak, ciphertext, encrypt=False) == plaintext, record["count"]
        count += 1
    assert count >= 400


def test_ieee_vector_10_holds() -> None:
    key = bytes.fromhex(
        "2718281828459045235360287471352662497757247093699959574966967627"
        "3141592653589793238462643383279502884197169399375105820974944592"
    )
    ciphertext = one_unit(key, 0xFF, bytes(range(256)) * 2, encrypt=True)
    assert ciphertext.startswith(bytes.fromhex("1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b"))


def test_wycheproof_vectors_of_every_stolen_length_hold_in_both_directions() -> None:
    vectors = json.loads((VECTORS / "aes_xts_test.json").read_text())["tests"]
    for vector in vectors:
        key, iv, message, ciphertext = (bytes.fromhex(vector[name]) for name in ("key", "iv", "msg", "ct"))
        tweak = int.from_bytes(iv, "little")
        assert one_unit(key, tweak, message, encrypt=True) == ciphertext, vector["tcId"]
        assert one_unit(key, tweak, ciphertext, encrypt=False) == message, vector["tcId"]
    assert {len(vector["msg"]) // 2 for vector in vectors} == set(range(16, 34))


BOTH_WAYS = pytest.mark.parametrize("plain", [False, True])
"""VAES where the processor has it, and OpenSSL alone."""


@BOTH_WAYS
@settings(max_examples=150, deadline=None)
@given(
    unit=st.one_of(st.sampled_from([16, 512, 4096]), st.integers(16, 700), st.integers(1, 17).map(lambda n: 256 * n)),
    units=st.integers(0, 9),
    first_tweak=st.one_of(st.integers(0, 1 << 34), st.integers(0, (1 << 128) - 16)),
    seed=st.binary(min_size=64, max_size=64),
    in_place=st.booleans(),
)
def test_kernel_agrees_with_cryptography(
    plain: bool, unit: int, units: int, first_tweak: int, seed: bytes, in_place: bool
) -> None:
    key = seed if seed[:32] != seed[32:] else KEY
    data = (seed * (unit * units // 64 + 1))[: unit * units]
    source = bytearray(data)
    target = source if in_place else bytearray(len(data))
    with XtsKey(key, plain=plain) as xts_key:
        xts_key.encrypt(source, target, unit=unit, first_tweak=first_tweak)
        assert target == reference(key, first_tweak, unit, data)
        xts_key.decrypt(target, target, unit=unit, first_tweak=first_tweak)
    assert target == data


@pytest.mark.parametrize("unit", [16, 256])
def test_tweak_carries_from_byte_to_byte(unit: int) -> None:
    data = bytes(6 * unit)
    for first_tweak in (0xFF, 0xFFFF_FFFC, (1 << 64) - 1, (1 << 120) - 2):
        out = bytearray(len(data))
        with XtsKey(KEY) as key:
            key.encrypt(data, out, unit=unit, first_tweak=first_tweak)
        assert out == reference(KEY, first_tweak, unit, data)


def test_bytes_around_the_destination_stay() -> None:
    for unit, plain in ((256, False), (4096, False), (4096, True)):
        out = bytearray(b"-" * (3 * unit + 128))
        with XtsKey(KEY, plain=plain) as key, memoryview(out) as view:
            key.encrypt(bytes(3 * unit), view[64:-64], unit=unit, first_tweak=1)
        assert out[:64] == out[-64:] == b"-" * 64
        assert out[64:-64] == reference(KEY, 1, unit, bytes(3 * unit))


def test_vaes_is_used_where_the_processor_has_it_and_never_when_openssl_is_asked_for() -> None:
    flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")).split()
    needed = {"aes", "avx512f", "avx512bw", "avx512vl", "vaes", "vpclmulqdq"}
    with XtsKey(KEY) as wide, XtsKey(KEY, plain=True) as plain:
        assert wide.is_wide == (needed <= set(flags))
        assert not plain.is_wide


def test_tweaks_beyond_128_bits_are_refused() -> None:
    out = bytearray(32)
    with XtsKey(KEY) as key:
        key.encrypt(bytes(32), out, unit=16, first_tweak=(1 << 128) - 2)
        for first_tweak in ((1 << 128) - 1, 1 << 128, -1):
            with pytest.raises(ValueError, match="tweak"):
                key.encrypt(bytes(32), out, unit=16, first_tweak=first_tweak)


def test_a_request_of_one_mebibyte_is_read_and_written_in_place() -> None:
    data = bytes(range(256)) * 4096
    buffer = bytearray(data)
    with XtsKey(KEY) as key:
        key.encrypt(buffer, buffer, unit=4096, first_tweak=7)
        assert buffer[4096:8192] == reference(KEY, 8, 4096, data[4096:8192])
        key.decrypt(memoryview(buffer), buffer, unit=4096, first_tweak=7)
    assert buffer == data


@pytest.mark.parametrize(("length", "unit"), [(16, 15), (16, 0), (16, -16), (4097, 4096), (1 << 25, 1 << 25)])
def test_lengths_that_are_no_whole_units_are_refused(length: int, unit: int) -> None:
    with XtsKey(KEY) as key, pytest.raises(ValueError, match="units"):
        key.encrypt(bytes(length), bytearray(length), unit=unit, first_tweak=0)


def test_a_destination_of_another_length_is_refused_before_anything_is_written() -> None:
    for length in (4095, 4097, 0):
        out = bytearray(length)
        with XtsKey(KEY) as key, pytest.raises(ValueError, match="do not go into"):
            key.encrypt(bytes(4096), out, unit=4096, first_tweak=0)
        assert out == bytes(length)


def test_a_shifted_overlap_is_refused() -> None:
    buffer = memoryview(bytearray(8192 + 16))
    with XtsKey(KEY) as key:
        for source, target in ((buffer[:8192], buffer[16:]), (buffer[16:], buffer[:8192])):
            with pytest.raises(ValueError, match="overlap"):
                key.encrypt(source, target, unit=4096, first_tweak=0)


def test_a_read_only_destination_is_refused() -> None:
    with XtsKey(KEY) as key, pytest.raises((TypeError, BufferError)):
        key.encrypt(bytes(16), bytes(16), unit=16, first_tweak=0)


def test_equal_halves_are_refused_for_both_directions() -> None:
    # OpenSSL 3.0 itself refuses them for encryption only; the key is made before a direction is known.
    with pytest.raises(XtsKeyRefused, match="equal"):
        XtsKey(KEY[:32] * 2)
    with pytest.raises(XtsKeyRefused), Secret(64) as zeros:
        XtsKey(zeros)


def test_keys_of_other_lengths_are_refused() -> None:
    for length in (0, 32, 63, 65, 128):
        with pytest.raises(XtsKeyRefused, match="64"):
            XtsKey(bytes(range(length)))


def test_a_secret_and_its_bytes_make_the_same_key() -> None:
    out = bytearray(16)
    with Secret.from_buffer(KEY) as secret, XtsKey(secret) as key:
        secret.wipe()  # the key does not need it any more
        key.encrypt(bytes(16), out, unit=16, first_tweak=3)
    assert out == reference(KEY, 3, 16, bytes(16))


def test_a_closed_key_refuses_to_work_and_closes_again() -> None:
    key = XtsKey(KEY)
    key.close()
    key.close()
    for run in (key.encrypt, key.decrypt):
        with pytest.raises(XtsClosed):
            run(bytes(16), bytearray(16), unit=16, first_tweak=0)


def heap_holds(needle: memoryview) -> bool:
    """Search the C heap, without making a copy of the needle there."""
    libc = ctypes.CDLL(None)
    libc.memmem.restype = ctypes.c_void_p
    wanted = (ctypes.c_char * len(needle)).from_buffer(needle)
    with open("/proc/self/maps") as maps:
        start, end = next((int(part, 16) for part in line.split()[0].split("-")) for line in maps if "[heap]" in line)
    with mmap.mmap(-1, end - start) as copy, open("/proc/self/mem", "rb", buffering=0) as memory:
        assert os.preadv(memory.fileno(), [copy], start) == end - start
        haystack = (ctypes.c_char * (end - start)).from_buffer(copy)
        found = libc.memmem(
            ctypes.byref(haystack),
            ctypes.c_size_t(end - start),
            ctypes.byref(wanted),
            ctypes.c_size_t(len(needle)),
        )
        del haystack
    return found is not None


@BOTH_WAYS
def test_closing_removes_every_key_schedule_from_memory(plain: bool) -> None:
    # An AES-256 schedule starts with the key itself, so a schedule is found by its key. Key2 is for the
    # tweak, which is encrypted in both directions.
    out = bytearray(8192)
    with Secret.random(64) as secret:
        key = XtsKey(secret, plain=plain)
        key.encrypt(out, out, unit=4096, first_tweak=0)
        key.decrypt(out, out, unit=4096, first_tweak=0)
        assert heap_holds(secret.view[:32])
        assert heap_holds(secret.view[32:])
        key.close()
        assert not heap_holds(secret.view[:32])
        assert not heap_holds(secret.view[32:])


@BOTH_WAYS
def test_dropping_a_key_removes_its_schedules_too(plain: bool) -> None:
    with Secret.random(64) as secret:
        key = XtsKey(secret, plain=plain)
        assert heap_holds(secret.view[:32])
        del key
        gc.collect()
        assert not heap_holds(secret.view[:32])


def test_derivation_and_unwrapping_leave_no_key_on_the_heap() -> None:
    with Secret.random(64) as data_key, Secret.random(32) as backing_key:
        blob = wrap_fresh(backing_key, bytes(16), bytes(32), data_key.view, {})
        with unwrap(backing_key, blob, {}) as opened, layer_key(opened, bytes(16), 0, 4096, 1) as key:
            for part in (data_key.view, backing_key.view, key.view):
                assert not heap_holds(part[:32])


@BOTH_WAYS
def test_many_threads_may_use_one_key(plain: bool) -> None:
    data = os.urandom(64 * 4096)
    expected = {start: reference(KEY, start, 4096, data) for start in range(0, 800, 100)}
    barrier = threading.Barrier(len(expected))

    def work(start: int) -> None:
        target = bytearray(len(data))
        barrier.wait()
        for _ in range(60):
            key.encrypt(data, target, unit=4096, first_tweak=start)
            assert target == expected[start]
            key.decrypt(target, target, unit=4096, first_tweak=start)
            assert target == data

    with XtsKey(KEY, plain=plain) as key, ThreadPoolExecutor(len(expected)) as pool:
        for result in [pool.submit(work, start) for start in expected]:
            result.result(timeout=60)


@BOTH_WAYS
def test_closing_waits_for_running_calls_and_stops_later_ones(plain: bool) -> None:
    data = bytes(1 << 20)
    expected = reference(KEY, 0, 4096, data[:4096])
    started = threading.Barrier(5)
    key = XtsKey(KEY, plain=plain)

    def work() -> None:
        target = bytearray(len(data))
        started.wait()
        while True:
            try:
                key.encrypt(data, target, unit=4096, first_tweak=0)
            except XtsClosed:
                return
            assert target[:4096] == expected

    with ThreadPoolExecutor(4) as pool:
        results = [pool.submit(work) for _ in range(4)]
        started.wait()
        key.close()
        for result in results:
            result.result(timeout=60)


def test_the_key_shows_nothing_of_itself() -> None:
    key = XtsKey(KEY)
    assert repr(key) == "<XtsKey>"
    key.close()
    assert repr(key) == "<XtsKey, closed>"


def test_self_test_passes_and_names_its_library() -> None:
    self_test()
    assert xts.library().startswith("OpenSSL ")
