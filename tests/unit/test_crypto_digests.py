"""Digests of many pieces: all ways of computing them agree with hashlib, and lengths that do not fit are refused."""

from __future__ import annotations

import mmap
import os
import struct
import threading
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebsd.crypto.digests import DIGEST, PREFIX_MOST, by_sixteens, in_pairs, numbered_digests
from ebsd.domain.units import CHUNK
from ebsd.store.leaves import leaf_digest
from ebsd.volume.leafdigests import leaf_digests


def expected(prefix: bytes, first: int, data: bytes, piece: int) -> bytes:
    return b"".join(
        sha256(prefix + struct.pack("<Q", first + number) + data[number * piece : (number + 1) * piece]).digest()
        for number in range(len(data) // piece)
    )


@pytest.mark.parametrize("plain", [False, True])
@given(
    prefix=st.binary(max_size=PREFIX_MOST),
    piece=st.integers(1, 400),
    count=st.integers(0, 35),
    first=st.one_of(st.integers(0, 1000), st.integers(0, 2**64 - 10)),
    seed=st.integers(0, 255),
)
@settings(max_examples=300, deadline=None)
def test_each_digest_is_that_of_prefix_number_and_piece(plain, prefix, piece, count, first, seed):
    data = b"".join(sha256(bytes([seed, at % 256])).digest() for at in range(piece * count // 32 + 1))[: piece * count]
    assert numbered_digests(prefix, first, data, piece, plain=plain) == expected(prefix, first, data, piece)


@pytest.mark.parametrize("piece", [55, 56, 63, 64, 65, 119, 120, 127, 128])
@pytest.mark.parametrize("prefix", [0, 28, PREFIX_MOST])
@pytest.mark.parametrize("count", [3, 19])
def test_padding_is_right_at_the_borders_of_blocks(piece, prefix, count):
    data = os.urandom(count * piece)
    assert numbered_digests(bytes(prefix), 7, data, piece) == expected(bytes(prefix), 7, data, piece)


def test_leaves_are_those_that_are_computed_one_by_one():
    uuid, chunks = os.urandom(16), 21
    with mmap.mmap(-1, chunks * CHUNK) as buffer, memoryview(buffer) as view:
        view[:] = os.urandom(chunks * CHUNK)
        wanted = [leaf_digest(uuid, 9 + at, view[at * CHUNK : (at + 1) * CHUNK]) for at in range(chunks)]
        assert leaf_digests(uuid, 9, view) == wanted
        assert leaf_digests(uuid, 9, view[:CHUNK]) == wanted[:1]
        assert leaf_digests(uuid, 9, view[:0]) == []


def test_a_processor_with_wide_vectors_computes_sixteen_at_a_time():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    assert by_sixteens() is {"avx512f", "avx512bw"}.issubset(flags)


def test_many_threads_compute_at_once():
    data = os.urandom(64 * 1024)
    wanted, found = expected(b"p", 0, data, 4096), []
    threads = [threading.Thread(target=lambda: found.append(numbered_digests(b"p", 0, data, 4096))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [wanted] * 8
    assert len(wanted) == 16 * DIGEST


def test_lengths_and_numbers_that_do_not_fit_are_refused():
    for prefix, first, data, piece in (
        (bytes(PREFIX_MOST + 1), 0, bytes(8), 8),
        (b"", 0, bytes(8), 0),
        (b"", 0, bytes(8), 3),
        (b"", -1, bytes(8), 8),
        (b"", 2**64 - 1, bytes(8), 8),
    ):
        with pytest.raises(ValueError):
            numbered_digests(prefix, first, data, piece)
    assert in_pairs() in (False, True)
