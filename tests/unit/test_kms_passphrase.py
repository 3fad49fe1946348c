"""A root key under a passphrase: locked until it was given, made by the first one, and never neither old nor new."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import trio
from kms_rig import ALICE, CHEAP, ROOT, Reply, Rig, memfd, memory_directory, refused

from ebsd.crypto.secret import Secret
from ebsd.domain.errors import KmsValidation, WrongPassphrase
from ebsd.kms import passphrase as module
from ebsd.kms.passphrase import FILE_BYTES, PassphraseFile, open_root, seal_root
from ebsd.kms.rootkey import Fault, KeyFile, RootKeyFault

WORDS = b"correct horse"
LOCKED = "Ebsd.KeyServiceLocked"


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    yield from memory_directory()


def start(directory: Path, nursery: trio.Nursery) -> Rig:
    return Rig(directory, nursery, root_key=PassphraseFile(directory / "state", CHEAP))


@pytest.fixture
async def rig(tmp_path: Path, nursery: trio.Nursery) -> AsyncIterator[Rig]:
    rig = start(tmp_path, nursery)
    yield rig
    await rig.close()


async def unlock(rig: Rig, words: bytes = WORDS, uid: int = ROOT) -> Reply:
    return await rig.service(uid, "Unlock", PassphraseDescriptor=0, fds=[memfd(words)])


@pytest.mark.trio
async def test_the_first_passphrase_makes_the_root_key_and_later_starts_ask_for_it(
    rig: Rig, tmp_path: Path, nursery: trio.Nursery
) -> None:
    status = await rig.service(ALICE, "GetStatus")
    assert (status["State"], status["RootKeyKind"], status["PassphraseSet"]) == ("locked", "passphrase", False)
    with refused(LOCKED, "not chosen yet"):
        await rig.key()
    assert not (rig.state / "epoch").exists()
    assert (await unlock(rig, WORDS + b"\n"))["Keys"] == 0
    key = await rig.key()
    with refused("IncorrectState", "not locked"):
        await unlock(rig)
    await rig.close()

    again = start(tmp_path, nursery)
    status = await again.service(ALICE, "GetStatus")
    assert (status["State"], status["PassphraseSet"], again.reason.count("start")) == ("locked", True, 1)
    for refusal in (again.kms(ALICE, "DescribeKey", KeyId=key), again.ebsd("DescribeAnchor", ResourceId="vol-1")):
        with refused(LOCKED):
            await refusal
    with refused("Ebsd.WrongPassphrase"):
        await unlock(again, b"incorrect horse")
    assert again.status == "locked"
    assert (await unlock(again))["Keys"] == 1
    assert (await again.kms(ALICE, "DescribeKey", KeyId=key))["KeyMetadata"]["Arn"] == key
    assert not (tmp_path / "root.key").exists()
    await again.close()


@pytest.mark.trio
async def test_only_administrators_unlock_and_short_passphrases_are_refused(rig: Rig) -> None:
    with refused("UnauthorizedOperation"):
        await unlock(rig, uid=ALICE)
    with refused("ValidationException", "at least 8"):
        await unlock(rig, b"short")
    assert rig.status == "locked"
    assert not (rig.state / "root").exists()


@pytest.mark.trio
async def test_a_key_file_is_not_unlocked(tmp_path: Path, nursery: trio.Nursery) -> None:
    rig = Rig(tmp_path, nursery)
    status = await rig.service(ALICE, "GetStatus")
    assert status["RootKeyKind"] == "file"
    assert "PassphraseSet" not in status
    with refused("IncorrectState", "not under a passphrase"):
        await unlock(rig)
    await rig.close()


@pytest.mark.trio
async def test_a_cut_between_the_root_file_and_the_first_state(rig: Rig, tmp_path: Path, nursery: trio.Nursery) -> None:
    source = PassphraseFile(rig.state, CHEAP)
    source.make(bytearray(WORDS))
    source.close()
    await rig.close()
    again = start(tmp_path, nursery)
    assert again.status == "locked"
    await unlock(again)
    assert again.status == "running"
    await again.close()


@pytest.mark.trio
async def test_a_damaged_or_lost_root_file_is_told_and_a_backup_brings_it_back(
    rig: Rig, tmp_path: Path, nursery: trio.Nursery
) -> None:
    await unlock(rig)
    key = await rig.key()
    copy = tmp_path / "copy"
    with copy.open("w+b") as file:
        await rig.service(
            ROOT, "Backup", Destination=0, PassphraseDescriptor=1, fds=[os.dup(file.fileno()), memfd(b"of the backup")]
        )
    await rig.close()
    path = rig.state / "root"
    path.write_bytes(b"X" + path.read_bytes()[1:])
    damaged = start(tmp_path, nursery)
    with refused("Ebsd.RootKeyUnavailable", "damaged"):
        await unlock(damaged)
    await damaged.close()
    path.unlink()
    lost = start(tmp_path, nursery)
    assert lost.status == "rescue"
    with refused("Ebsd.RootKeyUnavailable", "does not exist"):
        await unlock(lost)
    assert not path.exists(), "another root key would open nothing"
    fds = [memfd(copy.read_bytes()), memfd(b"of the backup")]
    assert (await lost.service(ROOT, "Restore", Source=0, PassphraseDescriptor=1, fds=fds))["Keys"] == 1
    await lost.close()
    back = start(tmp_path, nursery)
    await unlock(back, b"of the backup")
    assert (await back.kms(ALICE, "DescribeKey", KeyId=key))["KeyMetadata"]["Arn"] == key
    await back.close()


@pytest.mark.trio
async def test_a_locked_state_is_not_replaced_by_a_backup(rig: Rig, tmp_path: Path, nursery: trio.Nursery) -> None:
    await unlock(rig)
    await rig.key()
    copy = tmp_path / "copy"
    with copy.open("w+b") as file:
        await rig.service(
            ROOT, "Backup", Destination=0, PassphraseDescriptor=1, fds=[os.dup(file.fileno()), memfd(WORDS)]
        )
    await rig.close()
    again = start(tmp_path, nursery)
    with refused(LOCKED):
        fds = [memfd(copy.read_bytes()), memfd(WORDS)]
        await again.service(ROOT, "Restore", Source=0, PassphraseDescriptor=1, fds=fds)
    await unlock(again)
    await again.close()


def test_a_root_file_opens_under_its_passphrase_only_and_every_byte_counts() -> None:
    with Secret.random(32) as key:
        content = seal_root(key, bytearray(WORDS), CHEAP)
        assert len(content) == FILE_BYTES
        assert bytes(key.view) not in content
        with open_root(content, bytearray(WORDS)) as opened:
            assert bytes(opened.view) == bytes(key.view)
        assert seal_root(key, bytearray(WORDS), CHEAP) != content, "another salt each time"
        with pytest.raises(WrongPassphrase):
            open_root(content, bytearray(b"correct hors"))
        for at in range(FILE_BYTES):
            changed = bytearray(content)
            changed[at] ^= 1
            if 12 <= at < 24:
                continue  # the cost: what it makes Argon2 spend is bounded, below
            with pytest.raises((WrongPassphrase, RootKeyFault)):
                open_root(bytes(changed), bytearray(WORDS))
        for wrong in (content[:-1], content + b"\0", b""):
            with pytest.raises(RootKeyFault):
                open_root(wrong, bytearray(WORDS))


@pytest.mark.parametrize("at", [12, 16, 20])
def test_a_root_file_cannot_make_us_spend_what_it_likes(at: int) -> None:
    with Secret.random(32) as key:
        content = bytearray(seal_root(key, bytearray(WORDS), CHEAP))
    content[at : at + 4] = b"\x7f\xff\xff\xff"
    with pytest.raises(RootKeyFault, match="damaged"):
        open_root(bytes(content), bytearray(WORDS))


def test_passphrases_have_eight_bytes_and_a_line_feed_does_not_count(tmp_path: Path) -> None:
    with pytest.raises(KmsValidation):
        PassphraseFile(tmp_path, CHEAP).make(bytearray(b"1234567\n"))
    assert list(tmp_path.iterdir()) == []


def _unreadable(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/passwd")


def _newer(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:8] + b"\0\0\0\2" + content[12:])


@pytest.mark.parametrize(("change", "fault"), [(_unreadable, Fault.INSECURE), (_newer, Fault.INSECURE)])
def test_a_root_file_that_must_be_looked_at_first(tmp_path: Path, change: Callable[[Path], None], fault: Fault) -> None:
    source = PassphraseFile(tmp_path, CHEAP)
    source.make(bytearray(WORDS))
    source.close()
    change(tmp_path / module.ROOT)
    with pytest.raises(RootKeyFault) as caught:
        source.unlock(bytearray(WORDS))
    assert caught.value.fault is fault


def test_a_key_file_has_no_passphrase(tmp_path: Path) -> None:
    assert KeyFile(tmp_path / "k").kind == "file"
