"""The broker's files: kept through restarts, refused by name when somebody edited them, free of plaintext keys."""

from __future__ import annotations

import base64
import os
import shutil
import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from pathlib import Path

import apsw
import pytest
import trio
from kms_rig import ALICE, BOB, OTHER, VOLUME, Rig, caller, context, memory_directory, refused

from ebsd.crypto.secret import Secret
from ebsd.domain.errors import ConfigurationError, KeyServiceUnavailable, NoSpace, StateDirectoryInUse
from ebsd.kms import statefiles
from ebsd.kms.documents import DocumentStore
from ebsd.kms.records import Kind
from ebsd.kms.rootkey import Credential, Fault, KeyFile, RootKeyFault

pytestmark = pytest.mark.trio


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    yield from memory_directory()


Edit = Callable[[sqlite3.Connection], None]


async def fill(rig: Rig) -> str:
    """Make documents of every kind, some in two versions; return a key's ARN."""
    arn = await rig.key()
    await rig.key(BOB)
    await rig.kms(ALICE, "CreateAlias", AliasName="alias/a", TargetKeyId=arn)
    await rig.anchored(arn)
    await rig.anchored(arn, resource=OTHER)
    await rig.grant(arn)
    await rig.ebsd("SetAccount", Caller=caller(ALICE), EbsEncryptionByDefault=False)
    return arn


def edit(rig: Rig, change: Edit) -> None:
    with closing(sqlite3.connect(rig.state / "keys.sqlite", isolation_level=None)) as db:
        change(db)


def kept(rig: Rig, kind: str) -> tuple[object, ...]:
    with closing(sqlite3.connect(rig.state / "keys.sqlite")) as db:
        row = db.execute("SELECT * FROM documents WHERE kind = ? ORDER BY id LIMIT 1", (kind,)).fetchone()
        return tuple(row)


async def reopened(rig: Rig, nursery: trio.Nursery, **options: bool) -> Rig:
    await rig.close()
    return Rig(rig.state.parent, nursery, **options)


# --- restart ----------------------------------------------------------------------------------------------


async def test_everything_is_there_after_a_restart(tmp_path: Path, nursery: trio.Nursery) -> None:
    rig = Rig(tmp_path, nursery)
    arn = await fill(rig)
    await rig.kms(ALICE, "DisableKey", KeyId=arn)
    await rig.ebsd("RaiseFloor", ResourceId=VOLUME, Generation=5)
    made = await rig.kms(BOB, "CreateKey", Description="bob's")
    wrapped = await rig.kms(BOB, "GenerateDataKey", KeyId=made["KeyMetadata"]["KeyId"], NumberOfBytes=64)
    model = rig.broker.running.store.model
    rig = await reopened(rig, nursery, may_create=False)
    assert rig.status == "running"
    assert rig.broker.running.store.model == model
    opened = await rig.kms(BOB, "Decrypt", CiphertextBlob=wrapped["CiphertextBlob"])
    assert opened.plaintext() == wrapped.plaintext()
    await rig.kms(ALICE, "EnableKey", KeyId=arn)
    await rig.close()


async def test_a_crash_loses_nothing_that_was_answered(tmp_path: Path, nursery: trio.Nursery) -> None:
    """Copies the files while the broker has them open, as a SIGKILL or a power cut would leave them."""
    rig = Rig(tmp_path, nursery)
    arn = await fill(rig)
    copy = tmp_path / "copy"
    for generation in range(1, 4):
        await rig.ebsd("RaiseFloor", ResourceId=VOLUME, Generation=generation)
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(rig.state, copy)
        after = Rig(tmp_path, nursery, state="copy", may_create=False)
        assert after.status == "running", after.reason
        assert (await after.ebsd("DescribeAnchor", ResourceId=VOLUME))["Anchor"]["Floor"] == generation
        assert (await after.kms(ALICE, "DescribeKey", KeyId=arn))["KeyMetadata"]["Arn"] == arn
        await after.close()
    await rig.close()


async def test_one_broker_serves_one_directory(tmp_path: Path, nursery: trio.Nursery) -> None:
    rig = Rig(tmp_path, nursery)
    with pytest.raises(StateDirectoryInUse):
        Rig(tmp_path, nursery)
    await rig.close()
    await Rig(tmp_path, nursery).close()


async def test_files_are_private(tmp_path: Path, nursery: trio.Nursery) -> None:
    before = os.umask(0)
    try:
        rig = Rig(tmp_path, nursery)
    finally:
        os.umask(before)
    await rig.close()
    assert rig.state.stat().st_mode & 0o777 == 0o700
    files = {path.name: path.stat().st_mode & 0o777 for path in rig.state.iterdir()}
    assert files == {**dict.fromkeys(("epoch", "keys.sqlite", "lock"), 0o600), "audit": 0o700}
    assert {path.stat().st_mode & 0o777 for path in (rig.state / "audit").iterdir()} == {0o600}
    assert rig.key_file.stat().st_mode & 0o777 == 0o600
    assert (rig.state / "epoch").stat().st_size == 4096


async def test_no_plaintext_key_in_any_file(tmp_path: Path, nursery: trio.Nursery) -> None:
    rig = Rig(tmp_path, nursery)
    arn = await fill(rig)
    made = await rig.kms(ALICE, "GenerateDataKey", KeyId=arn, NumberOfBytes=64)
    running = rig.broker.running
    secrets = [made.plaintext(), bytes(running.root_key.view), bytes(running.store.epoch.key.view)]
    for key_id in running.store.model.keys:
        for secret in running.store.secrets(Kind.KEY, key_id):
            secrets.append(bytes(secret.view))
            secret.wipe()
    assert len(secrets) == 5
    root_key = base64.b64encode(secrets[1])
    assert root_key in rig.key_file.read_bytes()

    def search() -> None:
        for path in (found for found in rig.state.rglob("*") if found.is_file()):
            content = path.read_bytes()
            for secret in secrets:
                for part in (secret, secret[:16], secret.hex().encode(), base64.b64encode(secret)):
                    assert part not in content, path.name

    search()
    await rig.close()
    search()


# --- edits of keys.sqlite ---------------------------------------------------------------------------------


def _flip(kind: str, position: int) -> Edit:
    def change(db: sqlite3.Connection) -> None:
        doc_id, sealed = db.execute(
            "SELECT id, sealed FROM documents WHERE kind = ? ORDER BY id LIMIT 1", (kind,)
        ).fetchone()
        damaged = bytearray(sealed)
        damaged[position] ^= 1
        db.execute("UPDATE documents SET sealed = ? WHERE kind = ? AND id = ?", (bytes(damaged), kind, doc_id))

    return change


def _sql(*statements: str) -> Edit:
    def change(db: sqlite3.Connection) -> None:
        for statement in statements:
            db.execute(statement)

    return change


EDITS: list[tuple[str, Edit, str]] = [
    *(
        (f"{kind} flipped at {position}", _flip(kind, position), f"document {kind}")
        for kind in ("key", "grant", "alias", "account", "anchor", "head")
        for position in (0, 5, 40, -1)
    ),
    *(
        (f"{kind} removed", _sql(f"DELETE FROM documents WHERE kind = '{kind}'"), f"document {kind}")
        for kind in ("key", "grant", "alias", "account", "anchor", "head")
    ),
    (
        "anchor removed with its ledger row",
        _sql(f"DELETE FROM documents WHERE id = '{VOLUME}'", f"DELETE FROM ledger WHERE id = '{VOLUME}'"),
        "ledger of anchor documents",
    ),
    (
        "row added",
        _sql(
            "INSERT INTO documents SELECT kind, 'vol-00000000000000009', version, sealed FROM documents "
            f"WHERE id = '{VOLUME}'"
        ),
        "anchor vol-00000000000000009 was added",
    ),
    (
        "row of an unknown kind added",
        _sql("INSERT INTO documents VALUES ('spell', 'x', 1, x'00')"),
        "document spell x was added",
    ),
    (
        "row added with a ledger row",
        _sql(
            "INSERT INTO documents SELECT kind, 'vol-00000000000000009', version, sealed FROM documents "
            f"WHERE id = '{VOLUME}'",
            "INSERT INTO ledger SELECT kind, 'vol-00000000000000009', version, digest FROM ledger "
            f"WHERE id = '{VOLUME}'",
        ),
        "anchor vol-00000000000000009 was changed",
    ),
    (
        "two anchors exchanged",
        _sql(
            f"UPDATE documents SET id = 'x' WHERE id = '{VOLUME}'",
            f"UPDATE documents SET id = '{VOLUME}' WHERE id = '{OTHER}'",
            f"UPDATE documents SET id = '{OTHER}' WHERE id = 'x'",
        ),
        f"anchor {VOLUME} was changed",
    ),
    ("version raised", _sql("UPDATE documents SET version = version + 1 WHERE kind = 'grant'"), "document grant"),
    ("negative version", _sql("UPDATE documents SET version = -1 WHERE kind = 'grant'"), "negative version"),
    ("ledger emptied", _sql("DELETE FROM ledger"), "ledger of key documents"),
    ("ledger of an unknown kind", _sql("INSERT INTO ledger VALUES ('spell', 'x', 1, x'00')"), "unknown kind 'spell'"),
    (
        "trigger put in",
        _sql("CREATE TRIGGER t AFTER INSERT ON documents BEGIN DELETE FROM ledger; END"),
        "other tables",
    ),
    ("table put in", _sql("CREATE TABLE more (x)"), "other tables"),
    ("another application", _sql("PRAGMA application_id = 1"), "not a key database"),
    ("a newer format", _sql("PRAGMA user_version = 2"), "format version 2"),
]


@pytest.mark.parametrize(("change", "reason"), [case[1:] for case in EDITS], ids=[case[0] for case in EDITS])
async def test_offline_edits_are_refused_by_name(
    filled: Callable[[], Rig], nursery: trio.Nursery, change: Edit, reason: str
) -> None:
    rig = filled()
    edit(rig, change)
    rig = await reopened(rig, nursery)
    assert rig.status == "rescue"
    assert reason in rig.reason
    with refused("Ebsd.Rescue", reason):
        await rig.kms(ALICE, "ListKeys")
    with refused("Ebsd.Rescue", reason):
        await rig.ebsd("GetAccount", Caller=caller(ALICE))
    assert (await rig.ebsd("GetStatus"))["State"] == "rescue"
    await rig.close()
    assert rig.key_file.exists()


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of a filled state, made once."""
    directory = tmp_path_factory.mktemp("template")

    async def make() -> None:
        async with trio.open_nursery() as nursery:
            rig = Rig(directory, nursery)
            await fill(rig)
            await rig.close()

    trio.run(make)
    return directory


@pytest.fixture
def filled(template: Path, tmp_path: Path, nursery: trio.Nursery) -> Callable[[], Rig]:
    def copy() -> Rig:
        shutil.copytree(template / "state", tmp_path / "state")
        shutil.copy(template / "root.key", tmp_path)
        # Opened and closed by ``reopened``: a rig is needed for its paths only.
        rig = object.__new__(Rig)
        rig.state, rig.key_file = tmp_path / "state", tmp_path / "root.key"

        class Closed:
            async def close(self) -> None: ...

        rig.broker = Closed()  # type: ignore[assignment]
        return rig

    return copy


DENY_ALL = (
    '{"Version": "2012-10-17", "Statement": '
    '[{"Effect": "Deny", "Principal": "*", "Action": "kms:Decrypt", "Resource": "*"},'
    ' {"Effect": "Allow", "Principal": {"AWS": "000000001001"}, "Action": "kms:*", "Resource": "*"}]}'
)
Change = Callable[[Rig, str], Awaitable[object]]
CHANGES: dict[str, tuple[str, Change, bool]] = {
    # what was changed since: kind, how, whether the document is still there
    "a key that was disabled": ("key", lambda rig, arn: rig.kms(ALICE, "DisableKey", KeyId=arn), True),
    "a key that waits for its deletion": (
        "key",
        lambda rig, arn: rig.kms(ALICE, "ScheduleKeyDeletion", KeyId=arn, AcceptDataLoss=True),
        True,
    ),
    "a key policy": ("key", lambda rig, arn: rig.kms(ALICE, "PutKeyPolicy", KeyId=arn, Policy=DENY_ALL), True),
    "a key that was rotated": ("key", lambda rig, arn: rig.kms(ALICE, "RotateKeyOnDemand", KeyId=arn), True),
    "a rotation period": ("key", lambda rig, arn: rig.kms(ALICE, "EnableKeyRotation", KeyId=arn), True),
    "an alias that was moved": ("alias", lambda rig, _: moved_alias(rig), True),
    "an alias that was deleted": ("alias", lambda rig, _: rig.kms(ALICE, "DeleteAlias", AliasName="alias/a"), False),
    "an attach grant that was retired": ("grant", lambda rig, arn: retired_grant(rig, arn), False),
    "an account's settings": (
        "account",
        lambda rig, _: rig.ebsd("SetAccount", Caller=caller(ALICE), EbsEncryptionByDefault=True),
        True,
    ),
    "a floor that was raised": (
        "anchor",
        lambda rig, _: rig.ebsd("RaiseFloor", ResourceId=VOLUME, Generation=4),
        True,
    ),
    "an anchor that was deleted": ("anchor", lambda rig, _: rig.ebsd("DeleteAnchor", ResourceId=VOLUME), False),
}


async def moved_alias(rig: Rig) -> None:
    await rig.kms(ALICE, "UpdateAlias", AliasName="alias/a", TargetKeyId=await rig.key())


async def retired_grant(rig: Rig, arn: str) -> None:
    (grant,) = rig.broker.running.store.model.grants
    await rig.ebsd("RetireGrant", KeyId=arn, GrantId=grant)


def rows_of(rig: Rig, table: str) -> dict[tuple[str, str], tuple[object, ...]]:
    with closing(sqlite3.connect(rig.state / "keys.sqlite")) as db:
        return {(row[0], row[1]): tuple(row) for row in db.execute(f"SELECT * FROM {table}")}


@pytest.mark.parametrize("with_ledger", [False, True], ids=["document", "document and ledger"])
@pytest.mark.parametrize("what", CHANGES)
async def test_an_older_document_put_back_is_refused_by_name(
    tmp_path: Path, nursery: trio.Nursery, what: str, with_ledger: bool
) -> None:
    kind, change, stays = CHANGES[what]
    rig = Rig(tmp_path, nursery)
    arn = await fill(rig)
    await rig.close()
    before, ledger = rows_of(rig, "documents"), rows_of(rig, "ledger")
    rig = Rig(tmp_path, nursery)
    await change(rig, arn)
    await rig.close()
    after = rows_of(rig, "documents")
    (old,) = (row for name, row in before.items() if name[0] == kind and after.get(name) != row)

    def put_back(db: sqlite3.Connection) -> None:
        db.execute("INSERT OR REPLACE INTO documents VALUES (?, ?, ?, ?)", old)
        if with_ledger:
            db.execute("INSERT OR REPLACE INTO ledger VALUES (?, ?, ?, ?)", ledger[kind, str(old[1])])

    edit(rig, put_back)
    rig = Rig(tmp_path, nursery)
    assert rig.status == "rescue"
    if with_ledger:
        assert f"the ledger of {kind} documents is not the one the head was made for" in rig.reason
    else:
        problem = "is an older one that was put back" if stays else "was added"
        assert f"the document {kind} {old[1]} {problem}" in rig.reason
    with refused("Ebsd.Rescue", rig.reason.rstrip(".")):
        await rig.kms(ALICE, "ListKeys")
    await rig.close()


async def test_an_older_head_put_back_is_refused(tmp_path: Path, nursery: trio.Nursery) -> None:
    rig = Rig(tmp_path, nursery)
    await fill(rig)
    await rig.close()
    head = kept(rig, "head")
    rig = Rig(tmp_path, nursery)
    await rig.ebsd("RaiseFloor", ResourceId=VOLUME, Generation=4)
    await rig.close()
    edit(rig, lambda db: db.execute("INSERT OR REPLACE INTO documents VALUES (?, ?, ?, ?)", head) and None)
    rig = Rig(tmp_path, nursery)
    assert "ledger of anchor documents is not the one the head was made for" in rig.reason
    await rig.close()


@pytest.mark.parametrize("content", [b"", b"not a database" * 400, None])
async def test_a_database_that_is_none(filled: Callable[[], Rig], nursery: trio.Nursery, content: bytes | None) -> None:
    rig = filled()
    if content is None:
        raw = bytearray((rig.state / "keys.sqlite").read_bytes())
        raw[4096:4200] = bytes(104)
        content = bytes(raw)
    (rig.state / "keys.sqlite").write_bytes(content)
    rig = await reopened(rig, nursery)
    assert rig.status == "rescue"
    assert "key database" in rig.reason.lower()
    await rig.close()


async def test_symbolic_links_are_not_followed(filled: Callable[[], Rig], nursery: trio.Nursery) -> None:
    rig = filled()
    for name in ("keys.sqlite", "epoch"):
        moved = rig.state.parent / name
        (rig.state / name).rename(moved)
        (rig.state / name).symlink_to(moved)
        rig = await reopened(rig, nursery)
        assert rig.status == "rescue"
        await rig.close()
        (rig.state / name).unlink()
        moved.rename(rig.state / name)


# --- epoch file -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("position", "reason"),
    [(0, "not an epoch file"), (8, "format version"), (12, "not the one that this state"), (35, "seal is broken"),
     (39, "length"), (60, "seal is broken"), (130, "seal is broken"), (4095, "padding")],
)  # fmt: skip
async def test_damaged_epoch_file(filled: Callable[[], Rig], nursery: trio.Nursery, position: int, reason: str) -> None:
    rig = filled()
    path = rig.state / "epoch"
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1
    path.write_bytes(raw)
    rig = await reopened(rig, nursery)
    assert reason in rig.reason
    await rig.close()


@pytest.mark.parametrize("gone", ["epoch", "keys.sqlite"])
async def test_half_a_state_is_not_made_anew(filled: Callable[[], Rig], nursery: trio.Nursery, gone: str) -> None:
    rig = filled()
    key = rig.key_file.read_bytes()
    (rig.state / gone).unlink()
    rig = await reopened(rig, nursery)
    assert rig.status == "rescue"
    assert "epoch file" in rig.reason
    await rig.close()
    assert not (rig.state / gone).exists()
    assert rig.key_file.read_bytes() == key


async def test_epoch_file_of_another_state_under_the_same_root_key(
    filled: Callable[[], Rig], tmp_path: Path, nursery: trio.Nursery
) -> None:
    rig = filled()
    other = Rig(tmp_path, nursery, state="other")
    await other.close()
    shutil.copy(other.state / "epoch", rig.state / "epoch")
    rig = await reopened(rig, nursery)
    assert "the epoch file is of another state" in rig.reason
    await rig.close()


# --- root key ---------------------------------------------------------------------------------------------


async def test_no_new_root_key_where_state_exists(filled: Callable[[], Rig], nursery: trio.Nursery) -> None:
    rig = filled()
    rig.key_file.unlink()
    rig = await reopened(rig, nursery)
    assert rig.status == "rescue"
    with refused("Ebsd.RootKeyUnavailable", "does not exist"):
        await rig.kms(ALICE, "CreateKey")
    await rig.close()
    assert not rig.key_file.exists()


async def test_another_root_key_is_recognised(filled: Callable[[], Rig], nursery: trio.Nursery) -> None:
    rig = filled()
    rig.key_file.unlink()
    with Secret.random(32) as key:
        KeyFile(rig.key_file).store(key)
    rig = await reopened(rig, nursery)
    with refused("Ebsd.RootKeyUnavailable", "not the one that this state was made with"):
        await rig.kms(ALICE, "ListKeys")
    await rig.close()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601])
async def test_a_root_key_that_others_may_touch_is_refused(
    filled: Callable[[], Rig], nursery: trio.Nursery, mode: int
) -> None:
    rig = filled()
    rig.key_file.chmod(mode)
    rig = await reopened(rig, nursery)
    assert f"has mode {mode:04o}" in rig.reason
    await rig.close()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"ebsd-root-key-1 \n",
        b"ebsd-root-key-2 " + base64.b64encode(bytes(32)) + b"\n",
        b"ebsd-root-key-1 " + base64.b64encode(bytes(31)) + b"\n",
        b"ebsd-root-key-1 " + base64.b64encode(bytes(33)) + b"\n",
        b"ebsd-root-key-1 " + base64.b64encode(bytes(32)) + b"\nmore",
        b"ebsd-root-key-1 " + base64.b64encode(bytes(32)).replace(b"A=", b"B=") + b"\n",
        b"ebsd-root-key-1 " + base64.b64encode(bytes(32)).replace(b"AAAA", b"A!AA") + b"\n",
        bytes(32),
        bytes(10000),
    ],
)
async def test_malformed_root_keys(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(RootKeyFault) as caught:
        KeyFile(path).read()
    assert caught.value.fault is Fault.MALFORMED


async def test_root_key_file_round_trip_and_refusals(tmp_path: Path) -> None:
    path = tmp_path / "dir" / "key"
    with Secret.random(32) as key:
        KeyFile(path).store(key)
        text = path.read_bytes()
        assert text == b"ebsd-root-key-1 " + base64.b64encode(bytes(key.view)) + b"\n"
        with KeyFile(path).read() as again:
            assert again.equals(key)
        with pytest.raises(RootKeyFault, match="exists already"):
            KeyFile(path).store(key)
        with Credential("key", tmp_path / "dir").read() as again:
            assert again.equals(key)
        with pytest.raises(RootKeyFault):
            Credential("none", tmp_path).store(key)
    assert [entry.name for entry in path.parent.iterdir()] == ["key"]
    link = tmp_path / "link"
    link.symlink_to(path)
    os.mkfifo(tmp_path / "fifo", 0o600)
    for bad in (link, tmp_path / "fifo", tmp_path):
        with pytest.raises(RootKeyFault) as caught:
            KeyFile(bad).read()
        assert caught.value.fault is Fault.INSECURE
    if os.geteuid() == 0:
        os.chown(path, 12345, 12345)
        with pytest.raises(RootKeyFault, match="belongs to uid 12345"):
            KeyFile(path).read()


async def test_root_key_from_a_credential(tmp_path: Path, nursery: trio.Nursery) -> None:
    with Secret.random(32) as key:
        KeyFile(tmp_path / "ebsd-root").store(key)
    (tmp_path / "ebsd-root").chmod(0o440)
    rig = Rig(tmp_path, nursery, root_key=Credential("ebsd-root", tmp_path))
    assert rig.status == "running"
    assert rig.broker.status().root_key == "credential:ebsd-root"
    await rig.close()


async def test_no_state_where_one_is_expected(tmp_path: Path, nursery: trio.Nursery) -> None:
    rig = Rig(tmp_path, nursery, may_create=False)
    assert rig.status == "rescue"
    assert "but not their keys" in rig.reason
    await rig.close()
    assert not rig.key_file.exists()
    assert [path.name for path in rig.state.iterdir() if path.name != "audit"] == ["lock"]


# --- the switch of a state --------------------------------------------------------------------------------


@pytest.mark.parametrize("done", range(7))
async def test_a_first_start_that_was_cut_is_finished_or_forgotten(
    tmp_path: Path, nursery: trio.Nursery, done: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Cut(BaseException):
        pass

    steps = 0

    def counted(real: Callable[..., object]) -> Callable[..., object]:
        def step(*arguments: object, **options: object) -> object:
            nonlocal steps
            if steps == done:
                raise Cut
            steps += 1
            return real(*arguments, **options)

        return step

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", counted(Path.rename))
        patch.setattr(statefiles, "write_synced", counted(statefiles.write_synced))
        patch.setattr(
            "ebsd.kms.broker.create_database", counted(__import__("ebsd.kms.broker").kms.broker.create_database)
        )
        try:
            rig = Rig(tmp_path, nursery)
            await rig.close()
        except Cut:
            # the lock of the dead broker
            for fd in os.listdir("/proc/self/fd"):
                try:
                    if os.readlink(f"/proc/self/fd/{fd}") == str(tmp_path / "state" / "lock"):
                        os.close(int(fd))
                except FileNotFoundError:
                    continue
    rig = Rig(tmp_path, nursery)
    assert rig.status == "running", rig.reason
    await rig.close()
    assert sorted(path.name for path in rig.state.iterdir()) == ["audit", "epoch", "keys.sqlite", "lock"]


async def test_directory_of_somebody_else(tmp_path: Path, nursery: trio.Nursery) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs to give a directory away")
    (tmp_path / "state").mkdir()
    os.chown(tmp_path / "state", 12345, 12345)
    with pytest.raises(ConfigurationError):
        Rig(tmp_path, nursery)


# --- failing disks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "kind", "goes_on"),
    [(apsw.FullError, NoSpace, True), (apsw.IOError, KeyServiceUnavailable, False)],
)
async def test_a_failed_write_changes_nothing(
    tmp_path: Path,
    nursery: trio.Nursery,
    monkeypatch: pytest.MonkeyPatch,
    error: type[Exception],
    kind: type[Exception],
    goes_on: bool,
) -> None:
    rig = Rig(tmp_path, nursery)
    arn = await fill(rig)
    real = DocumentStore._commit

    class Failing:
        def __init__(self, db: apsw.Connection) -> None:
            self._db = db

        def __getattr__(self, name: str) -> object:
            return getattr(self._db, name)

        def __enter__(self) -> None:
            self._db.__enter__()

        def __exit__(self, *_: object) -> None:
            self._db.__exit__(error, error("broken"), None)
            raise error("broken")

    def commit(self: DocumentStore, *arguments: object) -> None:
        healthy, self._db = self._db, Failing(self._db)  # type: ignore[assignment]
        try:
            real(self, *arguments)  # type: ignore[arg-type]
        finally:
            self._db = healthy

    store = rig.broker.running.store
    model_before = repr(store.model)
    with monkeypatch.context() as patch:
        patch.setattr(DocumentStore, "_commit", commit)
        with refused(kind.code):  # type: ignore[attr-defined]
            await rig.ebsd("RaiseFloor", ResourceId=VOLUME, Generation=9)
    assert repr(store.model) == model_before
    if goes_on:
        await rig.ebsd("RaiseFloor", ResourceId=VOLUME, Generation=3)
    else:
        with refused("KMSInternalException", "start it again"):
            await rig.ebsd("RaiseFloor", ResourceId=VOLUME, Generation=3)
        await rig.wrapped(arn)
    rig = await reopened(rig, nursery)
    assert rig.status == "running", rig.reason
    assert (await rig.ebsd("DescribeAnchor", ResourceId=VOLUME))["Anchor"]["Floor"] == (3 if goes_on else 0)
    assert await rig.wrapped(arn, more="x")
    assert context(more="x")
    await rig.close()
