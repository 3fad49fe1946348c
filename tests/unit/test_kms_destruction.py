"""The end of a key: what is due goes with its epoch, nothing of it stays in the files, and no crash leaves a half."""

from __future__ import annotations

import base64
import errno
import itertools
import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import trio
from kms_rig import ALICE, BOB, OTHER, VOLUME, Rig, ask, at_every_step, caller, memfd, memory_directory, refused

from ebsd.crypto.seal import SealBroken
from ebsd.domain.clockwatch import ClockWatch
from ebsd.domain.errors import AuditLogFull, IntegrityFailure, NoSpace
from ebsd.kms import broker as broker_module
from ebsd.kms import documents, epochchange, statefiles
from ebsd.kms.broker import utc_now
from ebsd.kms.documents import DocumentStore, Row, open_document
from ebsd.kms.epoch import open_epoch
from ebsd.kms.main import _delete_due, _look_after_keys
from ebsd.kms.records import Kind
from ebsd.kms.rootkey import KeyFile
from ebsd.kms.rotation import format_time, parse_time

pytestmark = pytest.mark.trio

BOB_ARN = "arn:aws:iam::000000001002:user/user1002"


class Time:
    """A clock that tests move on."""

    def __init__(self) -> None:
        self.now = utc_now()

    def __call__(self) -> str:
        return self.now

    def days(self, days: float) -> None:
        self.now = format_time(parse_time(self.now) + timedelta(days=days))


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    yield from memory_directory()


@dataclass
class Story:
    """A broker with a key that is to go (``doomed``) and one that stays (``kept``)."""

    rig: Rig
    time: Time
    doomed: str
    kept: str
    doomed_blob: str
    kept_blob: str
    doomed_wrapped: str
    kept_wrapped: str
    doomed_grant: str
    kept_grant: str
    secrets: list[bytes]
    """The bytes of the doomed key's backing keys."""
    before: dict[str, bytes]
    """The files of the state before the deletion, closed or not."""

    def rows(self) -> list[Row]:
        """Return what was in the database before: every sealed document."""
        copy = self.rig.state.parent / "copy.sqlite"
        for suffix in ("", "-wal"):
            content = self.before.get(f"keys.sqlite{suffix}")
            if content is not None:
                Path(f"{copy}{suffix}").write_bytes(content)
        with closing(sqlite3.connect(copy)) as db:
            return [Row(*row) for row in db.execute("SELECT kind, id, version, sealed FROM documents")]


async def encrypted(rig: Rig, key: str) -> str:
    reply = await rig.kms(ALICE, "Encrypt", KeyId=key, PlaintextDescriptor=0, fds=[memfd(b"secret")])
    return str(reply["CiphertextBlob"])


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


async def begin(directory: Path, nursery: trio.Nursery, *, schedule: bool = True) -> Story:
    time = Time()
    rig = Rig(directory, nursery, clock=time)
    doomed, kept = await rig.key(), await rig.key()
    await rig.kms(ALICE, "RotateKeyOnDemand", KeyId=doomed)
    await rig.kms(ALICE, "CreateAlias", AliasName="alias/doomed", TargetKeyId=doomed)
    await rig.kms(ALICE, "CreateAlias", AliasName="alias/moved", TargetKeyId=doomed)
    await rig.kms(ALICE, "CreateAlias", AliasName="alias/kept", TargetKeyId=kept)
    await rig.kms(ALICE, "CreateGrant", KeyId=doomed, GranteePrincipal=BOB_ARN, Operations=["Decrypt"])
    story = Story(
        rig,
        time,
        doomed,
        kept,
        await encrypted(rig, doomed),
        await encrypted(rig, kept),
        await rig.anchored(doomed),
        await rig.anchored(kept, resource=OTHER),
        await rig.grant(doomed),
        await rig.grant(kept, resource=OTHER),
        [],
        {},
    )
    await rig.ebsd("RaiseFloor", ResourceId=VOLUME, Generation=7)
    for secret in rig.broker.running.store.secrets(Kind.KEY, doomed.rpartition("/")[2]):
        story.secrets.append(bytes(secret.view))
        secret.wipe()
    assert len(story.secrets) == 2
    if schedule:
        await rig.kms(ALICE, "ScheduleKeyDeletion", KeyId=doomed, PendingWindowInDays=7, AcceptDataLoss=True)
    story.before = files(rig.state)
    return story


def remains(story: Story, directory: Path) -> list[str]:
    """Return what a search of the files finds of the doomed key and of what its epoch had sealed."""
    wanted = {f"backing key {number}": secret for number, secret in enumerate(story.secrets)}
    wanted |= {f"{row.kind} {row.id}": row.sealed for row in story.rows()}
    wanted["epoch"] = story.before["epoch"][40:133]
    found = []
    for path in (found for found in directory.rglob("*") if found.is_file()):
        content = path.read_bytes()
        for what, secret in wanted.items():
            for part in (secret, secret[:16], secret.hex().encode(), base64.b64encode(secret)):
                if part in content:
                    found.append(f"{what} in {path.name}")
    return found


async def check_the_rest(story: Story, rig: Rig) -> None:
    """See that the doomed key is gone with what was its own, and that everything else is as it was."""
    model = rig.broker.running.store.model
    assert [key.arn for key in model.keys.values() if key.account == "000000001001"] == [story.kept]
    assert [alias.name for alias in model.aliases.values()] == ["alias/kept"]
    assert list(model.grants) == [story.kept_grant]
    assert sorted(model.anchors) == [VOLUME, OTHER]
    with refused("NotFoundException", f"Key '{story.doomed}' does not exist"):
        await rig.kms(ALICE, "DescribeKey", KeyId=story.doomed)
    with refused("NotFoundException", "alias/doomed"):
        await rig.kms(ALICE, "DescribeKey", KeyId="alias/doomed")
    with refused("AccessDeniedException", "does not exist"):
        await rig.kms(ALICE, "Decrypt", CiphertextBlob=story.doomed_blob)
    anchor = (await rig.ebsd("DescribeAnchor", ResourceId=VOLUME))["Anchor"]
    assert (anchor["KeyId"], anchor["Floor"]) == (story.doomed, 7)
    with refused("NotFoundException", story.doomed):
        await rig.grant(story.doomed)
    with refused("NotFoundException", story.doomed):
        await rig.session(story.doomed, story.doomed_grant, story.doomed_wrapped)
    await rig.ebsd("RetireGrant", KeyId=story.doomed, GrantId=story.doomed_grant)
    assert (await rig.kms(ALICE, "Decrypt", CiphertextBlob=story.kept_blob)).plaintext() == b"secret"
    answer = await ask(await rig.session(story.kept, story.kept_grant, story.kept_wrapped, OTHER))
    answer.data_key.wipe()  # type: ignore[union-attr]


async def test_a_key_goes_when_its_time_is_over_and_nothing_else(tmp_path: Path, nursery: trio.Nursery) -> None:
    story = await begin(tmp_path, nursery)
    rig = story.rig
    story.time.days(6.99)
    assert await rig.broker.destroy_due() == []
    old_epoch = rig.broker.running.store.epoch
    assert old_epoch.number == 1
    status = (await rig.ebsd("GetStatus"))["PendingDeletion"]
    assert (status["Keys"], status["Resources"]) == (1, 1)
    assert status["Next"] == (await rig.kms(ALICE, "DescribeKey", KeyId=story.doomed))["KeyMetadata"]["DeletionDate"]
    story.time.days(0.01)
    assert [key.arn for key in await rig.broker.destroy_due()] == [story.doomed]
    assert await rig.broker.destroy_due() == []
    assert rig.broker.running.store.epoch.number == 2
    assert len(old_epoch.key) == 0, "wiped"
    assert "PendingDeletion" not in await rig.ebsd("GetStatus")
    await check_the_rest(story, rig)
    await rig.key(BOB)
    model = rig.broker.running.store.model
    await rig.close()
    rig = Rig(tmp_path, nursery, may_create=False)
    assert rig.status == "running", rig.reason
    assert rig.broker.running.store.model == model
    await check_the_rest(story, rig)
    await rig.close()


async def test_no_byte_of_it_stays_in_any_file(tmp_path: Path, nursery: trio.Nursery) -> None:
    story = await begin(tmp_path, nursery)
    rig = story.rig
    # What a restore had kept beside the state counts, too.
    kept = {name: f"{name}.before-restore-20260101T000000000Z" for name in ("epoch", "keys.sqlite")}
    for name, copy in kept.items():
        shutil.copy(rig.state / name, rig.state / copy)
    links = {name: tmp_path / f"link-{name}" for name in ("epoch", "keys.sqlite", "keys.sqlite-wal", *kept.values())}
    for name, link in links.items():
        os.link(rig.state / name, link)
    assert remains(story, rig.state)  # the search does find what is there
    story.time.days(8)
    await rig.broker.destroy_due()
    assert remains(story, rig.state) == []
    for name, link in links.items():
        assert set(link.read_bytes()) == {0}, f"the blocks of {name} were not overwritten"
    await rig.key()
    await rig.close()
    assert remains(story, rig.state) == []
    assert sorted(files(rig.state)) == ["epoch", "keys.sqlite", "lock"]


async def test_an_old_database_without_its_epoch_opens_nothing(tmp_path: Path, nursery: trio.Nursery) -> None:
    story = await begin(tmp_path, nursery)
    rig = story.rig
    await rig.close()
    story.before = files(rig.state)
    rows = story.rows()
    assert {row.kind for row in rows} == {"key", "alias", "grant", "anchor", "head"}
    with KeyFile(rig.key_file).read() as root_key:
        old = open_epoch(root_key, story.before["epoch"])
        for row in rows:  # with the old epoch file all of it opens
            open_document(old, row).wipe()
        rig = Rig(tmp_path, nursery, clock=story.time)
        story.time.days(8)
        await rig.broker.destroy_due()
        await rig.close()
        new = open_epoch(root_key, (rig.state / "epoch").read_bytes())
        for row in rows:
            with pytest.raises(SealBroken):
                open_document(new, row)
        with old.key, new.key:
            assert not old.key.equals(new.key)
    (rig.state / "keys.sqlite").write_bytes(story.before["keys.sqlite"])
    rig = Rig(tmp_path, nursery)
    assert rig.status == "rescue"
    assert "the document head does not open" in rig.reason
    await rig.close()


async def test_a_row_of_the_old_epoch_put_back_is_refused_by_name(tmp_path: Path, nursery: trio.Nursery) -> None:
    story = await begin(tmp_path, nursery)
    rig = story.rig
    await rig.ebsd("RaiseFloor", ResourceId=OTHER, Generation=9)  # by the last transaction of its epoch
    story.before = files(rig.state)
    rows = {row.kind: row for row in story.rows()}
    assert rows["anchor"].id == OTHER
    assert rows["anchor"].version == max(row.version for row in story.rows())
    story.time.days(8)
    await rig.broker.destroy_due()
    await rig.close()
    pristine = files(rig.state)
    for row, reason in (
        *((row, f"the document key {row.id} was added") for row in story.rows() if row.id == story.doomed[-36:]),
        (rows["anchor"], f"the document anchor {rows['anchor'].id} is an older one that was put back"),
    ):
        (rig.state / "keys.sqlite").write_bytes(pristine["keys.sqlite"])
        with closing(sqlite3.connect(rig.state / "keys.sqlite")) as db, db:
            db.execute(
                "INSERT OR REPLACE INTO documents VALUES (?, ?, ?, ?)", (row.kind, row.id, row.version, row.sealed)
            )
        rig = Rig(tmp_path, nursery)
        assert reason in rig.reason
        await rig.close()


async def test_a_key_that_is_kept_in_time_stays(tmp_path: Path, nursery: trio.Nursery) -> None:
    story = await begin(tmp_path, nursery)
    rig = story.rig
    story.time.days(6)
    await rig.kms(ALICE, "CancelKeyDeletion", KeyId=story.doomed)
    story.time.days(100)
    assert await rig.broker.destroy_due() == []
    await rig.kms(ALICE, "EnableKey", KeyId=story.doomed)
    assert (await rig.kms(ALICE, "Decrypt", CiphertextBlob=story.doomed_blob)).plaintext() == b"secret"
    answer = await ask(await rig.session(story.doomed, story.doomed_grant, story.doomed_wrapped))
    answer.data_key.wipe()  # type: ignore[union-attr]
    await rig.close()


async def test_all_that_are_due_go_in_one_change(tmp_path: Path, nursery: trio.Nursery) -> None:
    story = await begin(tmp_path, nursery)
    rig = story.rig
    second, later = await rig.key(), await rig.key()
    await rig.kms(ALICE, "ScheduleKeyDeletion", KeyId=second, PendingWindowInDays=8)
    await rig.kms(ALICE, "ScheduleKeyDeletion", KeyId=later, PendingWindowInDays=30)
    story.time.days(9)
    assert {key.arn for key in await rig.broker.destroy_due()} == {story.doomed, second}
    assert rig.broker.running.store.epoch.number == 2
    story.time.days(30)
    assert {key.arn for key in await rig.broker.destroy_due()} == {later}
    assert rig.broker.running.store.epoch.number == 3
    await check_the_rest(story, rig)
    await rig.close()


async def test_a_deadline_that_passed_while_no_broker_ran_is_met_at_start(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    story = await begin(tmp_path, nursery)
    await story.rig.close()
    story.time.days(400)
    rig = Rig(tmp_path, nursery, may_create=False, clock=story.time)
    with trio.fail_after(10):
        async with trio.open_nursery() as looking:
            hours = (itertools.count(0, 3600).__next__ for _ in range(2))
            looking.start_soon(_look_after_keys, rig.broker, ClockWatch(*hours))
            while len(rig.broker.running.store.model.keys) > 1:
                await trio.sleep(0.01)
            looking.cancel_scope.cancel()
    await check_the_rest(story, rig)
    assert remains(story, rig.state) == []
    await rig.close()


# --- crashes ----------------------------------------------------------------------------------------------


STEPS = (
    (Path, "rename"),
    (Path, "unlink"),
    (statefiles, "write_synced"),
    (statefiles, "write_all"),
    (statefiles, "overwrite"),
    (statefiles, "sync_directory"),
    (statefiles, "commit_switch"),
    (epochchange, "create_database"),
    (epochchange, "_read_back"),
    (DocumentStore, "close_database"),
    (DocumentStore, "__init__"),
)
"""What is done to the directory: a crash may come before each."""


async def test_a_crash_at_any_step_leaves_the_key_whole_or_gone(
    tmp_path: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    story = await begin(tmp_path, nursery)
    story.time.days(8)
    with monkeypatch.context() as patch:
        copies = at_every_step(patch, story.rig.state, STEPS)
        await story.rig.broker.destroy_due()
    await story.rig.close()
    assert len(copies) > 20
    there = []
    for copy in copies:
        rig = Rig(tmp_path, nursery, may_create=False, state=copy.name, clock=story.time)
        assert rig.status == "running", f"{copy.name}: {rig.reason}"
        there.append(any(key.arn == story.doomed for key in rig.broker.running.store.model.keys.values()))
        if there[-1]:
            (whole,) = rig.broker.running.store.secrets(Kind.KEY, story.doomed[-36:])[:1]
            with whole:
                assert bytes(whole.view) == story.secrets[0]
        else:
            assert remains(story, copy) == [], copy.name
        assert [key.arn for key in await rig.broker.destroy_due()] == ([story.doomed] if there[-1] else [])
        await check_the_rest(story, rig)
        await rig.close()
        assert remains(story, copy) == [], copy.name
        assert sorted(files(copy)) == ["epoch", "keys.sqlite", "lock"], copy.name
    assert there == sorted(there, reverse=True), "once gone, it stays gone"
    assert {True, False} == set(there)


async def test_a_finishing_that_is_cut_itself_goes_on(
    tmp_path: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start after a crash finishes the switch, and may be cut at each of its steps as well."""
    story = await begin(tmp_path, nursery)
    story.time.days(8)
    half = tmp_path / "half"
    real = statefiles.finish_switch

    def copied(directory: Path) -> bool:
        shutil.copytree(directory, half)
        return real(directory)

    with monkeypatch.context() as patch:
        patch.setattr(statefiles, "finish_switch", copied)
        await story.rig.broker.destroy_due()
    await story.rig.close()
    with monkeypatch.context() as patch:
        copies = at_every_step(patch, half, STEPS)
        rig = Rig(tmp_path, nursery, state="half")
        await rig.close()
    assert len(copies) > 8
    for copy in copies:
        rig = Rig(tmp_path, nursery, may_create=False, state=copy.name, clock=story.time)
        assert rig.status == "running", f"{copy.name}: {rig.reason}"
        await check_the_rest(story, rig)
        await rig.close()
        assert remains(story, copy) == [], copy.name


# --- failures ---------------------------------------------------------------------------------------------


async def test_a_full_disk_puts_it_off(tmp_path: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch) -> None:
    story = await begin(tmp_path, nursery)
    rig = story.rig
    story.time.days(8)

    def full(path: Path, *_: object) -> None:
        path.write_bytes(b"half")
        raise NoSpace(where="for the key database")

    with monkeypatch.context() as patch:
        patch.setattr(epochchange, "create_database", full)
        with pytest.raises(NoSpace):
            await rig.broker.destroy_due()
    assert not [name for name in files(rig.state) if ".new" in name]
    shown = (await rig.kms(ALICE, "DescribeKey", KeyId=story.doomed))["KeyMetadata"]
    assert shown["KeyState"] == "PendingDeletion"
    await rig.ebsd("RaiseFloor", ResourceId=OTHER, Generation=3)
    assert [key.arn for key in await rig.broker.destroy_due()] == [story.doomed]
    await check_the_rest(story, rig)
    await rig.close()


@pytest.mark.parametrize(("function", "gone"), [("write_synced", False), ("overwrite", True)])
async def test_a_failing_disk_is_settled_by_what_it_has(
    tmp_path: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, function: str, gone: bool
) -> None:
    """Before the file ``switch`` stands, the old state goes on; from then on, the new one."""
    story = await begin(tmp_path, nursery)
    rig = story.rig
    story.time.days(8)
    real = getattr(statefiles, function)
    failed = []

    def failing(path: Path, *arguments: object) -> None:
        if not failed and path.name != "epoch.new":
            failed.append(path.name)
            raise OSError(5, "Input/output error")
        real(path, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(statefiles, function, failing)
        with pytest.raises(OSError, match="Input/output"):
            await rig.broker.destroy_due()
    assert failed == ["epoch" if gone else "switch.new"]
    assert rig.status == "running", rig.reason
    await rig.ebsd("RaiseFloor", ResourceId=OTHER, Generation=3)
    assert [key.arn for key in await rig.broker.destroy_due()] == ([] if gone else [story.doomed])
    await check_the_rest(story, rig)
    assert remains(story, rig.state) == []
    await rig.close()


async def test_what_cannot_be_read_back_replaces_nothing(
    tmp_path: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    story = await begin(tmp_path, nursery)
    rig = story.rig
    story.time.days(8)
    real = documents.create_database

    def lossy(path: Path, rows: list[Row], ledger: documents.Ledger) -> None:
        real(path, [row for row in rows if row.id != OTHER], ledger)

    with monkeypatch.context() as patch:
        patch.setattr(epochchange, "create_database", lossy)
        with pytest.raises(IntegrityFailure, match=f"anchor {OTHER} is missing"):
            await rig.broker.destroy_due()
    assert rig.status == "running"
    assert rig.broker.running.store.epoch.number == 1
    await rig.ebsd("RaiseFloor", ResourceId=OTHER, Generation=3)
    await rig.close()
    assert sorted(files(rig.state)) == ["epoch", "keys.sqlite", "lock"]
    assert (rig.state / "epoch").read_bytes() == story.before["epoch"]


@pytest.mark.parametrize("content", [b"", b"2026 keep\n", b"2026 destroy all\n", b"../x\n"])
async def test_a_switch_that_nobody_wrote_is_refused(tmp_path: Path, nursery: trio.Nursery, content: bytes) -> None:
    story = await begin(tmp_path, nursery)
    await story.rig.close()
    (story.rig.state / "switch").write_bytes(content)
    before = files(story.rig.state)
    rig = Rig(tmp_path, nursery)
    assert rig.status == "rescue"
    assert "switch" in rig.reason
    await rig.close()
    assert files(rig.state) == before


async def test_others_work_on_while_the_files_are_written(
    tmp_path: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    story = await begin(tmp_path, nursery)
    rig = story.rig
    story.time.days(8)
    inside, leave = trio.Event(), trio.Event()
    token = trio.lowlevel.current_trio_token()
    real = documents.create_database

    def slow(*arguments: Any) -> None:
        trio.from_thread.run_sync(inside.set, trio_token=token)
        trio.from_thread.run(leave.wait, trio_token=token)
        real(*arguments)

    made: list[str] = []

    async def make() -> None:
        made.append(await rig.key(BOB))

    monkeypatch.setattr(epochchange, "create_database", slow)
    with trio.fail_after(20):
        async with trio.open_nursery() as work:
            work.start_soon(rig.broker.destroy_due)
            await inside.wait()
            assert (await rig.kms(ALICE, "Decrypt", CiphertextBlob=story.kept_blob)).plaintext() == b"secret"
            with refused("KMSInvalidStateException", "is pending deletion"):
                await rig.kms(ALICE, "Decrypt", CiphertextBlob=story.doomed_blob)
            work.start_soon(make)  # waits
            await trio.sleep(0.05)
            assert not made
            leave.set()
    assert (await rig.kms(BOB, "DescribeKey", KeyId=made[0]))["KeyMetadata"]["KeyState"] == "Enabled"
    await rig.close()
    rig = Rig(tmp_path, nursery)
    assert (await rig.kms(BOB, "DescribeKey", KeyId=made[0]))["KeyMetadata"]["KeyState"] == "Enabled"
    await rig.close()


async def test_nothing_is_deleted_in_rescue(tmp_path: Path, nursery: trio.Nursery) -> None:
    story = await begin(tmp_path, nursery)
    await story.rig.close()
    story.rig.key_file.unlink()
    before = files(story.rig.state)
    story.time.days(8)
    rig = Rig(tmp_path, nursery, clock=story.time)
    with pytest.raises(broker_module.RootKeyUnavailable):
        await rig.broker.destroy_due()
    await rig.close()
    assert files(rig.state) == before


# --- backups ----------------------------------------------------------------------------------------------


async def backup(rig: Rig) -> bytes:
    target = os.memfd_create("backup")
    with os.fdopen(os.dup(target), "rb") as file:
        await rig.service(0, "Backup", fds=[target, memfd(b"password")], Destination=0, PassphraseDescriptor=1)
        file.seek(0)
        return file.read()


async def restored(rig: Rig, content: bytes) -> None:
    await rig.service(0, "Restore", fds=[memfd(content), memfd(b"password")], Source=0, PassphraseDescriptor=1)


async def test_a_backup_from_before_still_has_the_key(tmp_path: Path, nursery: trio.Nursery) -> None:
    """Restored when its time is over: the key waits for another week, in which it can be kept."""
    story = await begin(tmp_path, nursery)
    content = await backup(story.rig)
    story.time.days(8)
    await story.rig.broker.destroy_due()
    after = await backup(story.rig)
    await story.rig.close()

    rig = Rig(tmp_path, nursery, state="elsewhere", clock=story.time)
    await restored(rig, content)
    assert await rig.broker.destroy_due() == []
    story.time.days(6)
    assert await rig.broker.destroy_due() == []
    await rig.kms(ALICE, "CancelKeyDeletion", KeyId=story.doomed)
    await rig.kms(ALICE, "EnableKey", KeyId=story.doomed)
    assert (await rig.kms(ALICE, "Decrypt", CiphertextBlob=story.doomed_blob)).plaintext() == b"secret"
    await rig.close()

    rig = Rig(tmp_path, nursery, state="later", clock=story.time)
    await restored(rig, after)
    await check_the_rest(story, rig)
    await rig.close()


async def test_the_default_key_of_an_account_may_be_gone(tmp_path: Path, nursery: trio.Nursery) -> None:
    """As on EC2: the setting stays, and creating fails until another one is chosen."""
    story = await begin(tmp_path, nursery, schedule=False)
    rig = story.rig
    await rig.ebsd("SetAccount", Caller=caller(ALICE), EbsDefaultKmsKeyId=story.doomed)
    await rig.kms(ALICE, "ScheduleKeyDeletion", KeyId=story.doomed, PendingWindowInDays=7, AcceptDataLoss=True)
    story.time.days(8)
    await rig.broker.destroy_due()
    assert (await rig.ebsd("GetAccount", Caller=caller(ALICE)))["EbsDefaultKmsKeyId"] == story.doomed
    with refused("NotFoundException"):
        await rig.wrapped(story.doomed, more="x")
    await rig.ebsd("SetAccount", Caller=caller(ALICE), EbsDefaultKmsKeyId="")
    await rig.close()


async def test_no_key_is_destroyed_that_the_audit_log_has_no_room_for(
    tmp_path: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    story = await begin(tmp_path, nursery)
    story.time.days(8)
    log = story.rig.broker.trail.log

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(log, "has_room", lambda: False)
        patch.setattr(log, "make_room", full)
        with pytest.raises(AuditLogFull):
            await _delete_due(story.rig.broker)
    assert len(story.rig.broker.running.store.model.keys) == 2
    await _delete_due(story.rig.broker)
    await check_the_rest(story, story.rig)
    await story.rig.close()
