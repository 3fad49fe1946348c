"""Backup and restore: the same keys on a fresh host, and nothing changed by a backup that cannot be used."""

from __future__ import annotations

import os
import struct
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trio
from kms_rig import ALICE, BOB, CHEAP, ROOT, VOLUME, Rig, ask, caller, context, memfd, memory_directory, refused

from ebsd.crypto.secret import Secret
from ebsd.domain.errors import BackupRefused
from ebsd.kms.backup import Argon2, Content, read_backup, write_backup
from ebsd.kms.documents import Row
from ebsd.kms.rootkey import Credential, KeyFile

pytestmark = pytest.mark.trio


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    yield from memory_directory()


PASSPHRASE = b"correct horse"


@pytest.fixture
async def rig(tmp_path: Path, nursery: trio.Nursery) -> AsyncIterator[Rig]:
    (tmp_path / "one").mkdir()
    rig = Rig(tmp_path / "one", nursery)
    yield rig
    await rig.close()


async def backup(rig: Rig, passphrase: bytes = PASSPHRASE + b"\n", uid: int = ROOT) -> bytes:
    destination = memfd(b"")
    kept = os.dup(destination)
    reply = await rig.service(
        uid, "Backup", fds=[destination, memfd(passphrase)], Destination=0, PassphraseDescriptor=1
    )
    content = os.pread(kept, 1 << 20, 0)
    os.close(kept)
    assert reply["Bytes"] == len(content)
    return content


async def restore(rig: Rig, file: bytes, passphrase: bytes = PASSPHRASE, uid: int = ROOT) -> int:
    reply = await rig.service(uid, "Restore", fds=[memfd(file), memfd(passphrase)], Source=0, PassphraseDescriptor=1)
    return int(reply["Keys"])


async def test_restore_into_a_fresh_directory(rig: Rig, tmp_path: Path, nursery: trio.Nursery) -> None:
    arn = await rig.key()
    blob = await rig.anchored(arn)
    grant = await rig.grant(arn)
    await rig.ebsd("RaiseFloor", ResourceId=VOLUME, Generation=3)
    await rig.key(BOB)
    file = await backup(rig)
    other = Rig(tmp_path / "two", nursery)
    assert other.status == "running"
    assert await restore(other, file) == 2
    assert other.broker.running.store.model == rig.broker.running.store.model
    answer = await ask(await other.session(arn, grant, blob))
    assert answer.anchor.floor == 3
    assert answer.data_key is not None
    answer.data_key.wipe()
    await other.key()  # goes on without a restart
    await other.close()
    other = Rig(tmp_path / "two", nursery, may_create=False)
    assert other.status == "running", other.reason
    assert (await other.service(ALICE, "GetStatus"))["Keys"] == 3
    await other.close()
    names = {path.name.partition(".before-restore-")[0] for path in other.state.iterdir()}
    assert names == {"audit", "epoch", "keys.sqlite", "lock"}


async def test_restore_after_the_root_key_was_lost(rig: Rig, nursery: trio.Nursery) -> None:
    arn = await rig.key()
    file = await backup(rig)
    await rig.close()
    rig.key_file.unlink()
    again = Rig(rig.state.parent, nursery)
    assert again.status == "rescue"
    assert await restore(again, file) == 1
    assert again.status == "running"
    await again.wrapped(arn)
    await again.close()
    assert again.key_file.exists()
    again = Rig(rig.state.parent, nursery)
    assert again.status == "running", again.reason
    await again.close()


@pytest.mark.parametrize("content", [b"garbage", None])
async def test_restore_when_the_root_key_is_not_the_right_one(
    rig: Rig, nursery: trio.Nursery, content: bytes | None
) -> None:
    arn = await rig.key()
    file = await backup(rig)
    await rig.close()
    rig.key_file.unlink()
    if content is None:
        with Secret.random(32) as key:
            KeyFile(rig.key_file).store(key)
        content = rig.key_file.read_bytes()
        stays = True
    else:
        rig.key_file.write_bytes(content)
        rig.key_file.chmod(0o600)
        stays = False
    again = Rig(rig.state.parent, nursery)
    assert again.status == "rescue"
    await restore(again, file)
    await again.wrapped(arn)
    await again.close()
    assert (rig.key_file.read_bytes() == content) is stays
    again = Rig(rig.state.parent, nursery)
    assert again.status == "running", again.reason
    await again.close()


async def test_restore_refuses_a_root_key_that_others_can_read(rig: Rig, nursery: trio.Nursery) -> None:
    await rig.key()
    file = await backup(rig)
    await rig.close()
    rig.key_file.chmod(0o644)
    again = Rig(rig.state.parent, nursery)
    with refused("Ebsd.RootKeyUnavailable", "0644"):
        await restore(again, file)
    assert again.status == "rescue"
    await again.close()
    rig.key_file.chmod(0o600)
    again = Rig(rig.state.parent, nursery)
    assert again.status == "running", again.reason
    await again.close()


async def test_restore_with_a_credential(rig: Rig, tmp_path: Path, nursery: trio.Nursery) -> None:
    arn = await rig.key()
    file = await backup(rig)
    with Secret.random(32) as key:
        KeyFile(tmp_path / "cred").store(key)
    other = Rig(tmp_path / "three", nursery, root_key=Credential("cred", tmp_path))
    await restore(other, file)
    await other.wrapped(arn)
    await other.close()
    other = Rig(tmp_path / "three", nursery, root_key=Credential("cred", tmp_path))
    assert other.status == "running", other.reason
    await other.close()
    absent = Rig(tmp_path / "four", nursery, root_key=Credential("none", tmp_path))
    assert absent.status == "rescue"
    with refused("Ebsd.RootKeyUnavailable", "credential:none"):
        await restore(absent, file)
    await absent.close()


async def test_restore_over_a_damaged_database(rig: Rig, nursery: trio.Nursery) -> None:
    arn = await rig.key()
    file = await backup(rig)
    await rig.close()
    (rig.state / "keys.sqlite").write_bytes(b"gone")
    again = Rig(rig.state.parent, nursery)
    assert again.status == "rescue"
    await restore(again, file)
    await again.wrapped(arn)
    await again.close()
    [kept] = rig.state.glob("keys.sqlite.before-restore-*")
    assert kept.read_bytes() == b"gone"


async def test_restore_does_not_replace_keys_or_anchors(rig: Rig, tmp_path: Path, nursery: trio.Nursery) -> None:
    await rig.key()
    file = await backup(rig)
    with refused("IncorrectState"):
        await restore(rig, file)
    other = Rig(tmp_path / "two", nursery)
    await other.ebsd("CreateAnchor", Caller=caller(ALICE), ResourceId=VOLUME, Encrypted=False)
    with refused("IncorrectState"):
        await restore(other, file)
    assert other.status == "running"
    await other.close()


async def test_a_wrong_passphrase_changes_nothing(rig: Rig, tmp_path: Path, nursery: trio.Nursery) -> None:
    await rig.key()
    file = await backup(rig)
    other = Rig(tmp_path / "two", nursery)
    before = {path.name: path.read_bytes() for path in other.state.iterdir() if path.name in ("epoch", "keys.sqlite")}
    with refused("Ebsd.BackupRefused", "passphrase is wrong"):
        await restore(other, file, b"wrong horse!")
    assert other.status == "running"
    await other.key()
    await other.close()
    assert (other.state / "epoch").read_bytes() == before["epoch"]


async def test_every_part_of_a_backup_is_checked(rig: Rig) -> None:
    await rig.key()
    file = await backup(rig)
    for position in (0, 8, 11, 20, 24, 39, 40, 43, 44, 60, len(file) // 2, len(file) - 1):
        damaged = bytearray(file)
        damaged[position] ^= 1
        with pytest.raises(BackupRefused):
            read_backup(damaged, bytearray(PASSPHRASE))
    for damaged in (b"", file[:30], file[:40], file[:-1], file + b"\0", file + b"\0\0\0\1x", b"x" * 5000):
        with pytest.raises(BackupRefused):
            read_backup(damaged, bytearray(PASSPHRASE))


def _blocks(file: bytes) -> list[bytes]:
    at, blocks = 40, []
    while at < len(file):
        (length,) = struct.unpack_from(">I", file, at)
        blocks.append(file[at : at + 4 + length])
        at += 4 + length
    return blocks


async def test_blocks_cannot_be_left_out_or_moved() -> None:
    rows = [Row("key", str(number), number, os.urandom(1000)) for number in range(2500)]
    with Secret.random(32) as root_key:
        file = write_backup(Content(root_key, bytes(4096), rows), bytearray(PASSPHRASE), CHEAP)
        content = read_backup(file, bytearray(PASSPHRASE))
        assert content.rows == rows
        assert content.root_key.equals(root_key)
        content.root_key.wipe()
    header, blocks = file[:40], _blocks(file)
    assert len(blocks) == 4
    for order in ((0, 1, 2), (0, 1, 3), (0, 2, 1, 3), (1, 0, 2, 3), (0, 1, 2, 3, 3), (0,), (3,)):
        with pytest.raises(BackupRefused):
            read_backup(header + b"".join(blocks[number] for number in order), bytearray(PASSPHRASE))


async def test_a_backup_cannot_make_us_spend_more_than_we_would() -> None:
    header = struct.pack(">8sIIII16s", b"EBSDKBAK", 1, 1 << 21, 1, 1, bytes(16))
    with pytest.raises(BackupRefused, match="header is damaged"):
        read_backup(header + bytes(100), bytearray(PASSPHRASE))


async def test_default_cost_is_that_of_rfc_9106() -> None:
    assert Argon2() == Argon2(memory=65536, passes=3, lanes=4)


async def test_backup_holds_no_secret_in_clear(rig: Rig) -> None:
    arn = await rig.key()
    running = rig.broker.running
    secrets = [bytes(running.root_key.view), bytes(running.store.epoch.key.view), arn.encode(), b"keys"]
    file = await backup(rig)
    for secret in secrets:
        assert secret not in file


@pytest.mark.parametrize("passphrase", [b"short", b"1234567\n"])
async def test_short_passphrases(rig: Rig, passphrase: bytes) -> None:
    with refused("ValidationException", "8 bytes"):
        await backup(rig, passphrase)
    with refused("ValidationException", "8 bytes"):
        await restore(rig, b"x", passphrase)


async def test_only_administrators_back_up_and_restore(rig: Rig) -> None:
    with refused("UnauthorizedOperation"):
        await backup(rig, uid=ALICE)
    with refused("UnauthorizedOperation"):
        await restore(rig, b"x", uid=ALICE)


async def test_destination_must_be_writable(rig: Rig, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    with refused("InvalidParameterValue"):
        await rig.service(ROOT, "Backup", fds=[fd, memfd(PASSPHRASE)], Destination=0, PassphraseDescriptor=1)


async def test_no_backup_in_rescue(tmp_path: Path, nursery: trio.Nursery) -> None:
    rig = Rig(tmp_path, nursery, may_create=False)
    with refused("Ebsd.KeysMissing"):
        await backup(rig)
    await rig.close()


async def test_backup_of_a_pipe_reader(rig: Rig) -> None:
    reader, writer = os.pipe()
    secret_reader, secret_writer = os.pipe()
    os.write(secret_writer, PASSPHRASE)
    os.close(secret_writer)
    await rig.service(ROOT, "Backup", fds=[writer, secret_reader], Destination=0, PassphraseDescriptor=1)
    with os.fdopen(reader, "rb") as file:
        content = read_backup(file.read(), bytearray(PASSPHRASE))
    content.root_key.wipe()
    assert context()
