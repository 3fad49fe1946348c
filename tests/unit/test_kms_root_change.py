"""The change of the root key: at every cut the old or the new one opens the state, and the old epoch is destroyed."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from kms_rig import ALICE, CHEAP, ROOT, Reply, Rig, at_every_step, memfd, memory_directory, refused

from ebsd.crypto.secret import Secret
from ebsd.domain.errors import RemoteError, RootKeyUnavailable, WrongPassphrase
from ebsd.kms import broker as broker_module
from ebsd.kms import epochchange, passphrase, rootchange, statefiles
from ebsd.kms.backup import Argon2, Content
from ebsd.kms.documents import DocumentStore
from ebsd.kms.epoch import open_epoch
from ebsd.kms.passphrase import PassphraseFile
from ebsd.kms.rootkey import Credential, KeyFile, RootKeySource
from ebsd.kms.rootplace import RootKeyPlace

OLD, NEW = b"the old passphrase", b"the new passphrase"


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    yield from memory_directory()


def sources(directory: Path, state: str = "state") -> dict[str, RootKeySource]:
    """Return every place that these tests use, as a start with it in the configuration makes it."""
    return {
        "file": KeyFile(directory / "root.key"),
        "other": KeyFile(directory / "other.key"),
        "credential": Credential("root", directory / "credentials"),
        "passphrase": PassphraseFile(directory / state, CHEAP),
    }


REQUESTS: dict[str, dict[str, Any]] = {
    "other": {"Kind": "file"},
    "credential": {"Kind": "credential", "Name": "root"},
    "passphrase": {"Kind": "passphrase"},
}


def start(directory: Path, nursery: trio.Nursery, place: str, *, state: str = "state", may_create: bool = False) -> Rig:
    return Rig(directory, nursery, root_key=sources(directory, state)[place], state=state, may_create=may_create)


async def opened(rig: Rig, *tries: bytes) -> bool:
    """Try passphrases while the broker is locked; say whether it runs then."""
    for words in tries:
        if rig.status == "locked":
            try:
                await rig.service(ROOT, "Unlock", PassphraseDescriptor=0, fds=[memfd(words)])
            except RemoteError as exc:
                if exc.code not in ("Ebsd.WrongPassphrase", "Ebsd.RootKeyUnavailable", "Ebsd.KeyServiceLocked"):
                    raise
    return rig.status == "running"


async def change(rig: Rig, directory: Path, to: str, uid: int = ROOT, words: bytes = NEW) -> Reply:
    members = dict(REQUESTS[to])
    if to == "other":
        members["Path"] = str(directory / "other.key")
    if to != "passphrase":
        return await rig.service(uid, "ChangeRootKey", **members)
    return await rig.service(uid, "ChangeRootKey", PassphraseDescriptor=0, fds=[memfd(words)], **members)


def give_credential(directory: Path) -> None:
    with Secret.random(32) as key:
        KeyFile(directory / "credentials" / "root").store(key)


async def begin(directory: Path, nursery: trio.Nursery, place: str) -> tuple[Rig, str]:
    """Return a broker with its root key at a place, and a CMK of it."""
    give_credential(directory)
    rig = start(directory, nursery, place, may_create=True)
    object.__setattr__(rig.broker._settings, "credentials_directory", str(directory / "credentials"))
    await opened(rig, OLD)
    return rig, await rig.key()


@pytest.fixture(autouse=True)
def _cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """A passphrase that a change makes costs as little as one of these tests."""
    monkeypatch.setattr(passphrase, "Argon2", lambda *cost: CHEAP if not cost else type(CHEAP)(*cost))


CHANGES = [("file", "other"), ("file", "passphrase"), ("file", "credential"), ("credential", "other"),
           ("passphrase", "other"), ("passphrase", "passphrase")]  # fmt: skip


@pytest.mark.trio
@pytest.mark.parametrize(("before", "after"), CHANGES)
async def test_a_change_is_seen_at_once_and_by_every_later_start(
    tmp_path: Path, nursery: trio.Nursery, before: str, after: str
) -> None:
    rig, key = await begin(tmp_path, nursery, before)
    with sources(tmp_path)["file"].read() if before == "file" else Secret.random(32) as old_root:
        reply = await change(rig, tmp_path, after)
        names = {name: source.describe() for name, source in sources(tmp_path).items()}
        assert (reply["RootKey"], reply["FormerRootKey"]) == (names[after], names[before])
        status = await rig.service(ALICE, "GetStatus")
        assert (status["State"], status["RootKey"]) == ("running", names[after])
        assert status.parameters.get("ConfiguredRootKey") == (names[before] if before != after else None)
        assert (await rig.kms(ALICE, "DescribeKey", KeyId=key))["KeyMetadata"]["Arn"] == key
        later = await rig.key()
        epoch_number = rig.broker.running.store.epoch.number
        await rig.close()
        with pytest.raises(RootKeyUnavailable, match="not the one"):
            open_epoch(old_root, (rig.state / "epoch").read_bytes())
    assert epoch_number == 2, "a new epoch key, too: copies of the old files open nothing new"

    if before != after:  # the configuration still names the old place
        old = start(tmp_path, nursery, before)
        assert await opened(old, OLD, NEW), old.reason
        status = await old.service(ALICE, "GetStatus")
        assert (status["RootKey"], status["ConfiguredRootKey"]) == (names[after], names[before])
        assert (rig.state / "root.moved").exists()
        await old.close()
    new = start(tmp_path, nursery, after)
    assert await opened(new, NEW), new.reason
    assert "ConfiguredRootKey" not in await new.service(ALICE, "GetStatus")
    assert {k["KeyArn"] for k in (await new.kms(ALICE, "ListKeys"))["Keys"]} == {key, later}
    await new.close()
    left = {"epoch", "keys.sqlite", "lock"} | ({"root"} if after == "passphrase" else set())
    assert {path.name for path in rig.state.iterdir() if path.is_file()} == left, "what the old one opened is gone"
    if before != after:
        old = start(tmp_path, nursery, before)
        assert not await opened(old, OLD, NEW), "the note is gone with the configuration that needed it"
        await old.close()


STEPS = (
    (Path, "rename"),
    (Path, "unlink"),
    (statefiles, "write_synced"),
    (statefiles, "write_all"),
    (statefiles, "overwrite"),
    (statefiles, "sync_directory"),
    (rootchange, "write_synced"),
    (rootchange, "sync_directory"),
    (passphrase, "write_synced"),
    (passphrase, "overwrite"),
    (passphrase, "sync_directory"),
    (epochchange, "create_database"),
    (DocumentStore, "close_database"),
    (DocumentStore, "__init__"),
)
"""What is done to the directory: a crash may come before each."""


@pytest.mark.trio
@pytest.mark.parametrize(("before", "after"), CHANGES)
async def test_at_every_cut_the_old_place_or_the_new_one_opens_everything(
    tmp_path: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, before: str, after: str
) -> None:
    rig, key = await begin(tmp_path, nursery, before)
    with monkeypatch.context() as patch:
        copies = at_every_step(patch, rig.state, STEPS)
        await change(rig, tmp_path, after)
    await rig.close()
    assert len(copies) > 20
    works: dict[str, list[bool]] = {before: [], after: []}
    for copy in copies:
        for place in dict.fromkeys((before, after)):
            shutil.rmtree(tmp_path / "tried", ignore_errors=True)
            shutil.copytree(copy, tmp_path / "tried")
            tried = start(tmp_path, nursery, place, state="tried")
            works[place].append(await opened(tried, OLD, NEW))
            if works[place][-1]:
                assert (await tried.kms(ALICE, "DescribeKey", KeyId=key))["KeyMetadata"]["Arn"] == key
            await tried.close()
    assert all(works[before]), "whoever changes the configuration late is served all along"
    assert works[after][-1], "and whoever changed it finds the new one"
    if before != after:
        assert not works[after][0], "which is not so before"
        assert works[after] == sorted(works[after]), "there is one moment"


@pytest.mark.trio
async def test_what_is_refused_changes_nothing(tmp_path: Path, nursery: trio.Nursery) -> None:
    rig, key = await begin(tmp_path, nursery, "file")
    before = (rig.state / "epoch").read_bytes()
    own = str(rig.key_file)
    (tmp_path / "bad.key").write_text("nonsense")
    (tmp_path / "bad.key").chmod(0o600)
    shutil.copy(rig.key_file, tmp_path / "copy.key")
    with refused("UnauthorizedOperation"):
        await change(rig, tmp_path, "other", uid=ALICE)
    with refused("IncorrectState", "already"):
        await rig.service(ROOT, "ChangeRootKey", Kind="file", Path=own)
    with refused("IncorrectState", "present root key"):
        await rig.service(ROOT, "ChangeRootKey", Kind="file", Path=str(tmp_path / "copy.key"))
    with refused("Ebsd.RootKeyUnavailable", "one line"):
        await rig.service(ROOT, "ChangeRootKey", Kind="file", Path=str(tmp_path / "bad.key"))
    with refused("InvalidParameterValue", "absolute"):
        await rig.service(ROOT, "ChangeRootKey", Kind="file", Path="root.key")
    with refused("InvalidParameterValue"):
        await rig.service(ROOT, "ChangeRootKey", Kind="prayer")
    with refused("InvalidParameterCombination"):
        await rig.service(ROOT, "ChangeRootKey", Kind="passphrase")
    with refused("ValidationException", "at least 8"):
        await change(rig, tmp_path, "passphrase", words=b"short")
    (tmp_path / "credentials" / "root").unlink()
    with refused("Ebsd.RootKeyUnavailable", "not given to the service"):
        await change(rig, tmp_path, "credential")
    assert (rig.state / "epoch").read_bytes() == before
    assert (await rig.kms(ALICE, "DescribeKey", KeyId=key))["KeyMetadata"]["Arn"] == key
    await rig.close()


@pytest.mark.trio
async def test_a_note_needs_the_old_root_key_and_names_the_new_one(tmp_path: Path, nursery: trio.Nursery) -> None:
    rig, _ = await begin(tmp_path, nursery, "file")
    await rig.close()
    with Secret.random(32) as stranger, sources(tmp_path)["file"].read() as mine:
        place = RootKeyPlace("file", str(tmp_path / "evil.key"))
        for sealed_under in (stranger, mine):
            rootchange.write_note(rig.state, sealed_under, place, stranger)
            assert rootchange.follow_note(rig.state, mine) is None, "it is not for this epoch, or not ours"
        for note in (b"", b"nonsense", b"EBSDMOVE\0\0\0\1\0\0\0\5hello" + bytes(80)):
            (rig.state / rootchange.MOVED).write_bytes(note)
            assert rootchange.follow_note(rig.state, mine) is None
            assert rootchange.named_by_note(rig.state) == ""
    again = start(tmp_path, nursery, "file")
    assert again.status == "running"
    assert not (rig.state / rootchange.MOVED).exists()
    await again.close()


@pytest.mark.trio
async def test_an_old_root_key_that_went_too_early_says_where_the_new_one_is(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    rig, _ = await begin(tmp_path, nursery, "file")
    await change(rig, tmp_path, "other")
    await rig.close()
    rig.key_file.unlink()
    early = start(tmp_path, nursery, "file")
    assert early.status == "rescue"
    assert f"it was changed to {tmp_path / 'other.key'}" in early.reason
    assert not rig.key_file.exists()
    await early.close()
    good = start(tmp_path, nursery, "other")
    assert good.status == "running"
    await good.close()


@pytest.mark.trio
async def test_the_old_passphrase_opens_nothing_after_a_change_of_passphrase(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    rig, _ = await begin(tmp_path, nursery, "passphrase")
    old_file = (rig.state / "root").read_bytes()
    await change(rig, tmp_path, "passphrase")
    await rig.close()
    with pytest.raises(WrongPassphrase):
        PassphraseFile(rig.state, CHEAP).unlock(bytearray(OLD))
    with (
        passphrase.open_root(old_file, bytearray(OLD)) as old_root,
        pytest.raises(RootKeyUnavailable, match="not the one"),
    ):
        open_epoch(old_root, (rig.state / "epoch").read_bytes())


@pytest.mark.trio
@pytest.mark.parametrize("name", ["root", "root.next", "epoch.new", "audit/log-1.jsonl", "mine"])
async def test_no_root_key_goes_into_the_state_directory(tmp_path: Path, nursery: trio.Nursery, name: str) -> None:
    rig = Rig(tmp_path, nursery)
    await rig.key()
    (tmp_path / "elsewhere").symlink_to(rig.state)
    for directory in (rig.state, tmp_path / "elsewhere", tmp_path / "state" / ".." / "state"):
        with refused("InvalidParameterValue", "it lies in the state directory"):
            await rig.service(ROOT, "ChangeRootKey", Kind="file", Path=str(directory / name))
        assert not (rig.state / name).exists()
    await rig.close()


@pytest.mark.trio
@pytest.mark.parametrize("name", ["root", "root.next", "root.moved"])
async def test_a_key_file_in_the_state_directory_is_not_taken_for_a_leftover(
    tmp_path: Path, nursery: trio.Nursery, name: str
) -> None:
    place = KeyFile(tmp_path / "state" / name)
    for start_number in range(3):
        rig = Rig(tmp_path, nursery, root_key=place, may_create=start_number == 0)
        assert rig.status == "running", rig.reason
        await rig.close()
    place.read().wipe()


@pytest.mark.trio
async def test_a_passphrase_that_a_failed_change_left_as_the_next_one_is_not_replaced_by_another(
    tmp_path: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig, key = await begin(tmp_path, nursery, "passphrase")

    def fail(_directory: Path) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("ebsd.kms.broker.finish_next", fail)
        with pytest.raises(RemoteError):
            await change(rig, tmp_path, "passphrase")

    def cut(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("ebsd.kms.broker.change_epoch", cut)
        with pytest.raises(RemoteError):
            await change(rig, tmp_path, "passphrase", words=b"a third passphrase")
    await rig.close()
    rig = start(tmp_path, nursery, "passphrase")
    assert await opened(rig, NEW), rig.reason
    assert (await rig.kms(ALICE, "DescribeKey", KeyId=key))["KeyMetadata"]["Arn"] == key
    await rig.close()


@pytest.mark.trio
async def test_a_backup_that_a_change_of_the_root_key_overtakes_is_whole(tmp_path: Path, nursery: trio.Nursery) -> None:
    rig, key = await begin(tmp_path, nursery, "file")
    write, began, go_on = broker_module.write_backup, threading.Event(), threading.Event()

    def slow(content: Content, passphrase: bytearray, cost: Argon2) -> bytes:
        began.set()
        assert go_on.wait(30)
        return write(content, passphrase, cost)

    files: list[bytes] = []

    async def back_up() -> None:
        files.append((await rig.broker.backup(bytearray(OLD)))[1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(broker_module, "write_backup", slow)
        async with trio.open_nursery() as both:
            both.start_soon(back_up)
            assert await trio.to_thread.run_sync(began.wait, 30)
            await change(rig, tmp_path, "other")
            go_on.set()
    await rig.close()
    rig = Rig(tmp_path, nursery, state="restored", root_key=KeyFile(tmp_path / "restored.key"))
    assert await rig.broker.restore(bytearray(files[0]), bytearray(OLD)) == 1
    assert (await rig.kms(ALICE, "DescribeKey", KeyId=key))["KeyMetadata"]["Arn"] == key
    await rig.close()
