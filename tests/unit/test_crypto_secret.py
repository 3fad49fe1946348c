"""Secret memory: it holds, it is wiped, and it does not get out by accident."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import traceback

import pytest

from ebsd.crypto import secret as secret_module
from ebsd.crypto.secret import Protection, Secret, SecretWiped


@pytest.fixture(params=["as the kernel gives", "no memfd_secret"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "no memfd_secret":
        monkeypatch.setattr(secret_module, "_SYS_MEMFD_SECRET", {})
    return str(request.param)


@pytest.mark.parametrize("length", [1, 32, 64, 4096, 5000])
def test_a_secret_is_zero_at_first_and_keeps_what_is_written(kind: str, length: int) -> None:
    with Secret(length) as secret:
        assert len(secret) == len(secret.view) == length
        assert bytes(secret.view) == bytes(length)
        secret.view[:] = b"\xa5" * length
        assert bytes(secret.view) == b"\xa5" * length


def test_without_memfd_secret_the_memory_is_locked_or_says_that_it_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(secret_module, "_SYS_MEMFD_SECRET", {})
    with Secret(32) as secret:
        assert secret.protection in (Protection.LOCKED, Protection.UNLOCKED)


def test_random_secrets_differ_and_fill_every_byte(kind: str) -> None:
    with Secret.random(5000) as one, Secret.random(5000) as other:
        assert not one.equals(other)
        assert any(one.view[4990:])
        assert len(set(bytes(one.view))) > 200


def test_no_length_below_one_is_taken() -> None:
    for length in (0, -1):
        with pytest.raises(ValueError, match="at least 1"):
            Secret(length)
    with pytest.raises(ValueError, match="at least 1"):
        Secret.from_buffer(b"")


def test_from_buffer_copies(kind: str) -> None:
    source = bytearray(b"sixteen bytes ok")
    with Secret.from_buffer(source) as secret:
        source[:] = bytes(16)
        assert secret.equals(b"sixteen bytes ok")
        assert not secret.equals(b"sixteen bytes oK")
        assert not secret.equals(b"sixteen bytes")
        with Secret.from_buffer(secret.view) as other:
            assert secret.equals(other)


def test_wiping_twice_is_fine_and_use_after_it_is_refused(kind: str) -> None:
    secret = Secret.random(64)
    secret.wipe()
    secret.wipe()
    assert secret.is_wiped
    assert len(secret) == 0
    with pytest.raises(SecretWiped):
        _ = secret.view
    with pytest.raises(SecretWiped):
        secret.equals(b"")


def test_a_view_that_outlives_the_secret_reads_zeros(kind: str) -> None:
    secret = Secret.random(64)
    view = secret.view[16:]
    secret.wipe()
    assert bytes(view) == bytes(48)
    view.release()


def test_a_with_block_wipes_even_when_it_raises(kind: str) -> None:
    secret = Secret.random(64)
    with pytest.raises(KeyError), secret:
        raise KeyError
    assert secret.is_wiped


def test_a_view_keeps_a_secret_that_nobody_names(kind: str) -> None:
    view = Secret.from_buffer(b"still wanted").view
    gc.collect()
    assert bytes(view) == b"still wanted"


def test_the_garbage_collector_gives_the_descriptors_back() -> None:
    before = len(os.listdir("/proc/self/fd"))
    secrets = [Secret.random(64) for _ in range(50)]
    assert len(secrets) == 50
    del secrets
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_secret_never_shows_its_content() -> None:
    with Secret.from_buffer(b"hunter2 hunter2!") as secret:
        try:
            raise RuntimeError(f"{secret} {secret!r} {[secret]}")
        except RuntimeError:
            text = traceback.format_exc()
    assert "hunter2" not in text
    assert "<Secret of 16 bytes>" in text
    assert repr(secret) == "<Secret, wiped>"


def test_a_secret_is_not_copied_pickled_or_turned_into_bytes() -> None:
    with Secret.random(16) as secret:
        for attempt in (copy.copy, copy.deepcopy, pickle.dumps, bytes, list, memoryview):
            with pytest.raises(TypeError):
                attempt(secret)  # type: ignore[operator]


def test_comparison_with_an_operator_is_by_identity() -> None:
    with Secret.from_buffer(bytes(16)) as one, Secret.from_buffer(bytes(16)) as other:
        assert one != other
        assert one != bytes(16)
        assert one.equals(other)


def test_a_forked_child_that_ends_leaves_the_parents_secret_alone() -> None:
    secret = Secret.from_buffer(b"parent")
    child = os.fork()
    if child == 0:
        del secret
        gc.collect()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert secret.equals(b"parent")
    secret.wipe()


def test_memfd_secret_memory_is_not_readable_through_proc() -> None:
    with Secret.from_buffer(b"out of the direct map") as secret:
        if secret.protection is not Protection.MEMFD_SECRET:
            pytest.skip("this kernel has no memfd_secret")
        with open("/proc/self/maps") as maps:
            start = next(int(line.split("-")[0], 16) for line in maps if "secretmem" in line)
        with open("/proc/self/mem", "rb", buffering=0) as memory:
            memory.seek(start)
            with pytest.raises(OSError, match=r"Input/output|Bad address"):
                memory.read(16)
