"""Sharing of snapshots: the rules, what the catalog finds for whom, and the recipient's rights at the key service."""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing
from ebsctl_fakes import Bench, snapshot_id
from ebsctl_fakes import snapshot as listed
from kms_rig import ALICE, BOB, ROOT, Rig, ask, caller, context, memory_directory, refused

from ebsd.control.broker import AccountSettings
from ebsd.control.catalogue import Catalogue
from ebsd.control.copying import Copying
from ebsd.control.sharing import Sharing
from ebsd.domain.errors import (
    AccessDenied,
    DefaultKeySnapshotNotShareable,
    EbsdError,
    EncryptedSnapshotNotPublic,
    InvalidParameterValue,
    PublicSharingBlocked,
    RemoteError,
    ShareLimitExceeded,
    SnapshotIdMalformed,
    SnapshotNotFound,
    SnapshotNotOwned,
)
from ebsd.domain.ids import AccountId, KeyArn, LineageId, SnapshotId, VolumeId
from ebsd.domain.model import Caller, Cipher, Integrity, Job, Lineage, Snapshot
from ebsd.domain.sharing import (
    EVERYBODY,
    MAX_SHARES,
    PermissionChange,
    PublicAccess,
    Scope,
    check_change,
    parse_blocking,
    parse_change,
    parse_scope,
    permissions_of,
)
from ebsd.domain.states import SnapshotState
from ebsd.domain.units import CHUNK, SECTOR
from ebsd.kms.aws import AwsKeys
from ebsd.kms.aws_settings import AwsSettings
from ebsd.kms.policy import SHARED_USE, Requester, default_policy
from ebsd.store.catalog import Catalog, Transaction
from ebsd.store.catalog_sharing import seen_by, seen_by_administrators

A, B, C = (AccountId(f"{uid:012}") for uid in (1001, 1002, 1003))
SNAPSHOT = SnapshotId("snap-0123456789abcdef0")


# --- what a request may say -------------------------------------------------------------------------------


def change(**given: Any) -> PermissionChange:
    return parse_change(**({"operation": None, "users": [], "groups": [], "permissions": None} | given))


def test_both_forms_of_ec2_say_the_same() -> None:
    added = PermissionChange(add=frozenset((A, EVERYBODY)))
    assert change(operation="add", users=[A], groups=["all"]) == added
    assert change(permissions={"Add": [{"UserId": A}, {"Group": "all"}]}) == added
    removed = PermissionChange(remove=frozenset((A,)))
    assert change(operation="remove", users=[A, A]) == removed
    assert change(permissions={"Remove": [{"UserId": A}]}) == removed
    assert change(operation="add", permissions={"Add": [{"UserId": A}]}) == PermissionChange(add=frozenset((A,)))


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ({}, "MissingParameter"),
        ({"operation": "add"}, "MissingParameter"),
        ({"users": [A]}, "MissingParameter"),
        ({"operation": "swap", "users": [A]}, "InvalidParameterValue"),
        ({"permissions": {"Add": [{"UserId": A}], "Remove": [{"UserId": B}]}}, "InvalidParameterCombination"),
        ({"operation": "add", "users": [A], "permissions": {"Remove": [{"UserId": B}]}}, "InvalidParameterCombination"),
        ({"operation": "remove", "users": [A], "permissions": {"Add": [{"UserId": B}]}}, "InvalidParameterCombination"),
        ({"permissions": {"Add": [{}]}}, "InvalidParameterCombination"),
        ({"permissions": {"Add": [{"UserId": A, "Group": "all"}]}}, "InvalidParameterCombination"),
        ({"operation": "add", "groups": ["wheel"]}, "InvalidAMIAttributeItemValue"),
        ({"permissions": {"Add": [{"Group": "All"}]}}, "InvalidAMIAttributeItemValue"),
        ({"operation": "add", "users": ["alice"]}, "InvalidUserID.Malformed"),
        ({"operation": "add", "users": ["all"]}, "InvalidUserID.Malformed"),
        ({"operation": "add", "users": ["1001"]}, "InvalidUserID.Malformed"),
        ({"operation": "add", "users": ["٠٠٠٠٠٠٠٠٠٠٠١"]}, "InvalidUserID.Malformed"),
        ({"operation": "add", "users": [f"{2**32 - 1:012}"]}, "InvalidUserID.Malformed"),
        ({"operation": "add", "users": [f"{n:012}" for n in range(501)]}, "InvalidParameterCombination"),
    ],
)
def test_requests_that_are_none(given: dict[str, Any], code: str) -> None:
    with pytest.raises(EbsdError) as caught:
        change(**given)
    assert caught.value.code == code


def test_500_changes_are_taken() -> None:
    assert len(change(operation="add", users=[f"{n:012}" for n in range(500)]).add) == 500


def test_permissions_are_shown_the_group_first() -> None:
    assert permissions_of([B, EVERYBODY, A]) == [{"Group": "all"}, {"UserId": A}, {"UserId": B}]


def test_states_of_the_block() -> None:
    assert parse_blocking("block-all-sharing") is PublicAccess.BLOCK_ALL
    assert parse_blocking("block-new-sharing") is PublicAccess.BLOCK_NEW
    for wrong in ("unblocked", "", "all"):
        with pytest.raises(EbsdError, match="InvalidParameterValue"):
            parse_blocking(wrong)


# --- what may be shared -----------------------------------------------------------------------------------

DEFAULT_KEY = "Encrypted snapshots with EBS default key cannot be shared."
PUBLICLY = "Encrypted snapshots cannot be shared publicly."


@pytest.mark.parametrize("blocked", PublicAccess)
@pytest.mark.parametrize(("encrypted", "managed"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("whom", [{A}, {EVERYBODY}, {A, EVERYBODY}], ids=str)
def test_what_may_be_shared_with_whom(whom: set[str], encrypted: bool, managed: bool, blocked: PublicAccess) -> None:
    facts: dict[str, Any] = {"encrypted": encrypted, "under_managed_key": managed, "blocked": blocked}
    expected = None
    if managed:
        expected = DEFAULT_KEY
    elif EVERYBODY in whom and encrypted:
        expected = PUBLICLY
    elif EVERYBODY in whom and blocked is not PublicAccess.UNBLOCKED:
        expected = f"Public sharing of snapshots is blocked for account {A} ({blocked.value})."
    if expected is None:
        check_change(PermissionChange(add=frozenset(whom)), SNAPSHOT, A, **facts)
    else:
        with pytest.raises(EbsdError) as caught:
            check_change(PermissionChange(add=frozenset(whom)), SNAPSHOT, A, **facts)
        assert (caught.value.code, caught.value.message) == ("OperationNotPermitted", expected)
    check_change(PermissionChange(remove=frozenset(whom)), SNAPSHOT, A, **facts)


# --- the catalog ------------------------------------------------------------------------------------------


def ident(number: int) -> SnapshotId:
    return SnapshotId(f"snap-{number:017x}")


def lineage(account: AccountId) -> LineageId:
    return LineageId(f"{account[-8:]}-9dad-41d1-80b4-00c04fd430c8")


def snapshot(number: int, account: AccountId) -> Snapshot:
    return Snapshot(
        id=ident(number), account=account, owner="o", name=f"s{number}", volume=VolumeId("vol-0123456789abcdef0"),
        size=CHUNK, state=SnapshotState.COMPLETED, message="", description="", cipher=Cipher.NONE, key_arn=None,
        wrapped_key=None, context={}, lineage=lineage(account), new_head=0, integrity=Integrity.NEW, authority=None,
        pause_us=None, started=f"{number:03d}", completed=None,
    )  # fmt: skip


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    """1: A's alone. 2: A's, for B. 3: A's, public. 4: A's, for B and C. 5: B's alone. 6: B's, public. 7: C's, for A."""
    made = Catalog(tmp_path / "catalog")

    def fill(t: Transaction) -> None:
        for account in (A, B, C):
            t.add_lineage(Lineage(lineage(account), account, SECTOR, Cipher.NONE))
        for number, account in enumerate((A, A, A, A, B, B, C), 1):
            t.add_snapshot(snapshot(number, account))
        for number, whom in ((2, [B]), (3, [EVERYBODY]), (4, [B, C]), (6, [EVERYBODY]), (7, [A])):
            t.add_shares(ident(number), whom)

    made.run(fill)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("account", "owners", "restorable_by", "hidden", "expected"),
    [
        (A, None, None, [], [1, 2, 3, 4, 7]),
        (B, None, None, [], [2, 4, 5, 6]),
        (C, None, None, [], [4, 7]),
        (B, ["self"], None, [], [5, 6]),
        (B, [A], None, [], [2, 3, 4]),
        (B, [A], None, [A], [2, 4]),
        (C, [A, B], None, [B], [3, 4]),
        (C, [C], None, [], [7]),
        (B, None, ["self"], [], [2, 4, 5, 6]),
        (B, None, ["all"], [], [3, 6]),
        (B, None, ["all"], [A], [6]),
        (B, None, ["all", "self"], [A, B], [2, 4, 5, 6]),
        (A, None, [B], [], [2, 4]),
        (C, None, [B], [], []),
        (B, None, [A], [], []),
        (B, [A], ["self"], [], [2, 4]),
        (B, [A], ["all"], [], [3]),
        (B, [], [], [], [2, 4, 5, 6]),
    ],
)
def test_who_sees_what(
    catalog: Catalog,
    account: AccountId,
    owners: list[str] | None,
    restorable_by: list[str] | None,
    hidden: list[AccountId],
    expected: list[int],
) -> None:
    scope = parse_scope(account, owners, restorable_by)
    where = seen_by(account, scope, hidden)
    found = catalog.run(lambda t: t.snapshots_where(*where, None, -1))
    assert [one.id for one in found] == [ident(number) for number in expected]
    pages, after = [], None
    while page := catalog.run(lambda t, after=after: t.snapshots_where(*where, after, 2)):  # type: ignore[misc]
        pages += page
        after = page[-1].started, page[-1].id
    assert pages == found


def test_administrators_see_all_and_may_narrow_it(catalog: Catalog) -> None:
    for scope, expected in (
        (Scope(), [1, 2, 3, 4, 5, 6, 7]),
        (Scope(frozenset((A,))), [1, 2, 3, 4]),
        (Scope(None, frozenset((B,))), [2, 4, 5, 6]),
        (Scope(None, frozenset((EVERYBODY,))), [3]),
    ):
        where = seen_by_administrators(scope, [B])
        found = catalog.run(lambda t, where=where: t.snapshots_where(*where, None, -1))  # type: ignore[misc]
        assert [one.id for one in found] == [ident(number) for number in expected]


def test_only_an_owner_finds_a_snapshot_to_change_it(catalog: Catalog) -> None:
    def find(account: AccountId, number: int, *, is_admin: bool = False) -> Snapshot:
        who = Caller(int(account), "who", account, is_admin=is_admin)
        return catalog.run(lambda t: t.find_snapshot(who, ident(number)))

    assert find(A, 2).id == ident(2)
    assert find(B, 2, is_admin=True).id == ident(2)
    with pytest.raises(SnapshotNotOwned) as caught:
        find(B, 2)
    assert A in caught.value.message
    for account, number in ((C, 2), (B, 1), (B, 3), (B, 99)):  # a public one is not told from none
        with pytest.raises(SnapshotNotFound):
            find(account, number)


def test_suspended_permissions_count_again_when_they_are_resumed(catalog: Catalog) -> None:
    where = seen_by(B, Scope(None, frozenset((B, EVERYBODY))), [])

    def seen() -> list[str]:
        return [one.id for one in catalog.run(lambda t: t.snapshots_where(*where, None, -1)) if one.account == A]

    before = seen()
    for number in (2, 3):
        catalog.run(lambda t, number=number: t.suspend_shares(ident(number)))  # type: ignore[misc]
    assert seen() == [ident(4)]
    assert not catalog.run(lambda t: t.is_shared_with(ident(2), B) or t.is_shared_with(ident(3), EVERYBODY))
    assert catalog.run(lambda t: t.shares(ident(2))) == [B]
    for number in (2, 3):
        catalog.run(lambda t, number=number: t.resume_shares(ident(number)))  # type: ignore[misc]
    assert seen() == before


def test_permissions_end_with_the_snapshot_and_have_a_limit(catalog: Catalog) -> None:
    catalog.run(lambda t: t.remove_snapshot(ident(2)))
    assert catalog.run(lambda t: t.shares(ident(2))) == []
    catalog.run(lambda t: t.add_shares(ident(1), [f"{n:012}" for n in range(MAX_SHARES)]))
    with pytest.raises(ShareLimitExceeded):
        catalog.run(lambda t: t.add_shares(ident(1), [EVERYBODY]))
    assert len(catalog.run(lambda t: t.shares(ident(1)))) == MAX_SHARES
    catalog.run(lambda t: t.remove_shares(ident(1)))
    assert catalog.run(lambda t: t.shares(ident(1))) == []


# --- use cases ----------------------------------------------------------------------------------------------


class FakeBroker:
    """Account settings and one key of each manager; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.hidden: frozenset[AccountId] = frozenset()
        self.access = PublicAccess.UNBLOCKED
        self.recorded: list[tuple[int, str, set[str], set[str], bool]] = []
        self.refuses = False
        self.slow = False
        self.answer = trio.Event()

    async def accounts_without_public_snapshots(self) -> frozenset[AccountId]:
        self.asked.append("blocks")
        return self.hidden

    async def account(self, who: Caller) -> AccountSettings:
        self.asked.append(f"account {who.account}")
        found = AccountSettings(True, "", self.access)
        if self.slow:
            await self.answer.wait()
        return found

    async def set_account(self, who: Caller, *, public_access: PublicAccess) -> AccountSettings:
        self.access = public_access
        return await self.account(who)

    async def record_sharing(
        self, who: Caller, resource: str, add: Collection[str], remove: Collection[str], *, reset: bool = False
    ) -> None:
        if self.refuses:
            raise RemoteError("Ebsd.AuditLogFull", "The audit log is full.", "")
        self.recorded.append((who.uid, resource, set(add), set(remove), reset))

    async def check_shared_key(self, who: Caller, key: KeyArn, context: dict[str, str]) -> None:
        self.asked.append(f"{who.account} uses {key}")
        raise RemoteError("AccessDeniedException", "User: bob is not authorized", "")

    async def describe_key(self, who: Caller, key: KeyArn) -> SimpleNamespace:
        self.asked.append(f"{who.account} {key}")
        return SimpleNamespace(manager="AWS" if key == MANAGED else "CUSTOMER")


MANAGED, CUSTOMER = KeyArn("managed"), KeyArn("customer")


@pytest.fixture
def broker() -> FakeBroker:
    return FakeBroker()


@pytest.fixture
def sharing(catalog: Catalog, broker: FakeBroker) -> Sharing:
    return Sharing(Catalogue(catalog, None), broker)  # type: ignore[arg-type]


def user(account: AccountId, *, is_admin: bool = False) -> Caller:
    return Caller(int(account), f"u{int(account)}", account, is_admin=is_admin)


@pytest.mark.trio
async def test_of_what_is_not_there_the_same_is_asked_as_of_what_is(sharing: Sharing, broker: FakeBroker) -> None:
    """An id that is nobody's, private, shared with others, public and blocked: one answer, at one cost."""
    broker.hidden = frozenset((A,))
    told = set()
    for number in (99, 1, 2, 3):
        broker.asked.clear()
        with pytest.raises(SnapshotNotFound) as caught:
            await sharing.reach(user(C), ident(number))
        told.add((caught.value.message.replace(ident(number), "ID"), caught.value.hint, tuple(broker.asked)))
    assert len(told) == 1
    assert (await sharing.reach(user(C), ident(4))).id == ident(4)
    broker.hidden = frozenset()
    assert (await sharing.reach(user(C), ident(3))).id == ident(3)
    with pytest.raises(SnapshotNotFound):  # one that he cannot reach spoils all
        await sharing.reach_all(user(C), [ident(3), ident(7), ident(1)])
    broker.asked.clear()
    assert (await sharing.reach(user(A), ident(1))).id == ident(1)
    assert (await sharing.reach(user(A), "s1")).id == ident(1)
    assert (await sharing.reach(user(C, is_admin=True), ident(1))).id == ident(1)
    assert broker.asked == [], "nothing is asked about what is one's own"
    with pytest.raises(SnapshotNotFound):
        await sharing.reach(user(B), "s2")  # names are one's own
    with pytest.raises(SnapshotIdMalformed):
        await sharing.reach(user(B), "snap-1")


def encrypt(catalog: Catalog, number: int, key: KeyArn) -> Snapshot:
    def change(t: Transaction) -> Snapshot:
        t._rows("UPDATE snapshot SET cipher=1 WHERE id=?", ident(number))
        t.set_snapshot_key(ident(number), key, b"blob", {"aws:ebs:id": "vol-0"})
        return t.snapshot(ident(number))

    return catalog.run(change)


@pytest.mark.trio
async def test_what_is_shared_is_judged_for_its_owner(catalog: Catalog, sharing: Sharing, broker: FakeBroker) -> None:
    public = PermissionChange(add=frozenset((EVERYBODY,)))
    for state in ("block-new-sharing", "block-all-sharing"):
        assert (await sharing.block(user(A), state)).value == state
        for who in (user(A), user(C, is_admin=True)):
            broker.asked.clear()
            with pytest.raises(PublicSharingBlocked):
                await sharing.modify(who, ident(1), None, public)
            assert broker.asked == [f"account {A}"]
    assert await sharing.unblock(user(A)) is PublicAccess.UNBLOCKED
    await sharing.modify(user(A), ident(1), "createVolumePermission", public)
    permissions = await sharing.describe(user(A), ident(1), "createVolumePermission")
    assert permissions == {"SnapshotId": ident(1), "CreateVolumePermissions": [{"Group": "all"}]}
    assert (await sharing.describe(user(A), ident(1), "productCodes"))["ProductCodes"] == []
    await sharing.reset(user(A), ident(1), "createVolumePermission")
    assert catalog.run(lambda t: t.shares(ident(1))) == []
    encrypt(catalog, 1, MANAGED)
    with pytest.raises(DefaultKeySnapshotNotShareable):
        await sharing.modify(user(A), ident(1), None, PermissionChange(add=frozenset((B,))))
    encrypt(catalog, 1, CUSTOMER)
    with pytest.raises(EncryptedSnapshotNotPublic):
        await sharing.modify(user(A), ident(1), None, public)
    await sharing.modify(user(A), ident(1), None, PermissionChange(add=frozenset((B,))))
    for attribute in ("productCodes", "kernel"):
        with pytest.raises(InvalidParameterValue):
            await sharing.reset(user(A), ident(1), attribute)
        with pytest.raises(InvalidParameterValue):
            await sharing.modify(user(A), ident(1), attribute, public)
    assert catalog.run(lambda t: t.shares(ident(1))) == [B]


@pytest.mark.trio
async def test_changes_are_recorded_before_they_are_made(
    catalog: Catalog, sharing: Sharing, broker: FakeBroker
) -> None:
    await sharing.modify(user(A), ident(1), None, PermissionChange(add=frozenset((B, EVERYBODY))))
    await sharing.modify(user(C, is_admin=True), ident(1), None, PermissionChange(remove=frozenset((C,))))
    await sharing.reset(user(A), "s1", "createVolumePermission")
    expected = [
        (int(A), ident(1), {B, EVERYBODY}, set(), False),
        (int(C), ident(1), set(), {C}, False),
        (int(A), ident(1), set(), {B, EVERYBODY}, True),
    ]
    assert broker.recorded == expected
    broker.refuses = True
    with pytest.raises(RemoteError):
        await sharing.modify(user(A), ident(1), None, PermissionChange(add=frozenset((B,))))
    with pytest.raises(RemoteError):
        await sharing.reset(user(A), ident(2), "createVolumePermission")
    assert catalog.run(lambda t: (t.shares(ident(1)), t.shares(ident(2)))) == ([], [B])
    for who in (user(B), user(C)):
        with pytest.raises((SnapshotNotOwned, SnapshotNotFound)):
            await sharing.reset(who, ident(2), "createVolumePermission")
    assert broker.recorded == expected


@pytest.mark.trio
async def test_nothing_becomes_public_once_that_is_blocked(
    catalog: Catalog, sharing: Sharing, broker: FakeBroker
) -> None:
    """Whoever comes first: when the block is answered, what is public is so already."""
    public = PermissionChange(add=frozenset((EVERYBODY,)))
    seen: list[bool] = []

    async def publish() -> None:
        await sharing.modify(user(A), ident(1), None, public)

    async def block() -> None:
        broker.slow = False
        await sharing.block(user(A), "block-new-sharing")
        seen.append(catalog.run(lambda t: t.is_shared_with(ident(1), EVERYBODY)))

    broker.slow = True
    async with trio.open_nursery() as nursery:
        nursery.start_soon(publish)
        await trio.testing.wait_all_tasks_blocked()  # it has looked at the account, and not been told yet
        nursery.start_soon(block)
        await trio.testing.wait_all_tasks_blocked()
        broker.answer.set()
    assert seen == [True], "it was public before the block was answered"
    await sharing.reset(user(A), ident(1), "createVolumePermission")
    with pytest.raises(PublicSharingBlocked):
        await publish()


@pytest.mark.trio
async def test_the_key_is_asked_for_where_it_is_somebody_elses(
    catalog: Catalog, sharing: Sharing, broker: FakeBroker
) -> None:
    encrypted, plain = encrypt(catalog, 2, CUSTOMER), catalog.run(lambda t: t.snapshot(ident(3)))
    await sharing.check_key(user(A), encrypted)
    await sharing.check_key(user(B), plain)
    assert broker.asked == []
    with pytest.raises(RemoteError) as caught:
        await sharing.check_key(user(B), encrypted)
    assert broker.asked == [f"{B} uses {CUSTOMER}"]
    assert "kms:Decrypt" in caught.value.hint


@pytest.mark.trio
async def test_a_permission_that_is_gone_before_the_job_is_committed_counts_no_more(
    catalog: Catalog, sharing: Sharing
) -> None:
    checks: list[Callable[[Transaction], None]] = []

    async def fill(caller: Caller, job: Job, destination: Snapshot, check: Callable[[Transaction], None]) -> Job:
        checks.append(check)
        return job

    async def require() -> None:
        return

    copying = Copying.__new__(Copying)
    copying._host = SimpleNamespace(random=bytes, now=lambda: "", space=SimpleNamespace(require=require))  # type: ignore[assignment]
    copying.fill = fill  # type: ignore[assignment,method-assign]
    source = await sharing.reach(user(B), ident(2))
    await copying.copy_into(user(B), source, snapshot(50, B))
    catalog.run(checks[0])
    await sharing.modify(user(A), ident(2), None, PermissionChange(remove=frozenset((B,))))
    with pytest.raises(SnapshotNotFound):
        catalog.run(checks[0])


# --- the recipient's rights on the key --------------------------------------------------------------------


@pytest.fixture
async def rig(nursery: trio.Nursery) -> AsyncIterator[Rig]:
    for directory in memory_directory():
        rig = Rig(directory, nursery)
        yield rig
        await rig.close()


def policy(*actions: str) -> str:
    document = json.loads(default_policy(A))
    allow = {"Effect": "Allow", "Principal": {"AWS": f"arn:aws:iam::{B}:root"}, "Resource": "*"}
    document["Statement"].append(allow | {"Action": [f"kms:{action}" for action in actions]})
    return json.dumps(document)


async def check(rig: Rig, key: str, uid: int = BOB) -> None:
    await rig.ebsd("CheckSharedKey", Caller=caller(uid), KeyId=key, EncryptionContext=context())


@pytest.mark.trio
async def test_every_right_on_the_key_is_needed(rig: Rig) -> None:
    key = await rig.key()
    with refused("AccessDeniedException"):
        await check(rig, key)
    with refused("AccessDeniedException"):
        await check(rig, key[:-1] + ("0" if key[-1] != "0" else "1"))
    rights = [action.value for action in SHARED_USE]
    await rig.kms(ALICE, "PutKeyPolicy", KeyId=key, Policy=policy(*rights))
    await check(rig, key)
    await check(rig, key, ALICE)
    await check(rig, key, ROOT)
    for missing in rights:
        left = [right for right in rights if right != missing]
        await rig.kms(ALICE, "PutKeyPolicy", KeyId=key, Policy=policy(*left))
        with refused("AccessDeniedException", f"kms:{missing}"):
            await check(rig, key)
    await rig.kms(ALICE, "PutKeyPolicy", KeyId=key, Policy=default_policy(A))
    principal = f"arn:aws:iam::{B}:root"
    grant = await rig.kms(ALICE, "CreateGrant", KeyId=key, GranteePrincipal=principal, Operations=rights)
    await check(rig, key)
    await rig.kms(ALICE, "DisableKey", KeyId=key)
    with refused("DisabledException"):
        await check(rig, key)
    await rig.kms(ALICE, "EnableKey", KeyId=key)
    await rig.kms(ALICE, "RevokeGrant", KeyId=key, GrantId=grant["GrantId"])
    with refused("AccessDeniedException"):
        await check(rig, key)


async def shared_session(rig: Rig, key: str, uid: int) -> Any:
    blob, grant = await rig.anchored(key), await rig.grant(key, uid)
    reply = await rig.ebsd(
        "OpenKeySession", Caller=caller(uid), ResourceId=context()["aws:ebs:id"], KeyId=key, GrantId=grant,
        CiphertextBlob=blob, EncryptionContext=context(),
    )  # fmt: skip

    return socket.socket(fileno=reply.fds[reply["Session"]])


@pytest.mark.trio
@pytest.mark.parametrize("ending", ["policy", "disabled"])
async def test_a_session_asks_again_for_the_recipients_rights(rig: Rig, ending: str) -> None:
    key = await rig.key()
    await rig.kms(ALICE, "PutKeyPolicy", KeyId=key, Policy=policy(*(action.value for action in SHARED_USE)))
    with await shared_session(rig, key, BOB) as session:
        if ending == "policy":
            await rig.kms(ALICE, "PutKeyPolicy", KeyId=key, Policy=policy("CreateGrant", "DescribeKey"))
        else:
            await rig.kms(ALICE, "DisableKey", KeyId=key)
        with refused("AccessDeniedException" if ending == "policy" else "DisabledException"):
            await ask(session)


@pytest.mark.trio
async def test_the_data_key_comes_with_the_rights_and_the_record_names_both(rig: Rig) -> None:
    key = await rig.key()
    await rig.kms(ALICE, "PutKeyPolicy", KeyId=key, Policy=policy(*(action.value for action in SHARED_USE)))
    with await shared_session(rig, key, BOB) as session:
        answer = await ask(session)
        assert answer.data_key is not None
        answer.data_key.wipe()
    for uid, sees in ((ALICE, True), (BOB, True), (1003, False)):
        reply = await rig._call(rig.servers.keys, uid, "io.ebsd.Audit.LookupEvents", {"EventName": "Decrypt"}, ())
        records = [json.loads(event["CloudTrailEvent"]) for event in reply["Events"]]
        assert [record["additionalEventData"]["onBehalfOf"]["accountId"] for record in records] == [B] * sees


@pytest.mark.trio
async def test_the_audit_log_tells_owner_and_actor_with_whom_a_snapshot_is_shared(rig: Rig) -> None:
    key = await rig.key()
    await rig.anchored(key)
    volume = context()["aws:ebs:id"]
    inherited = {"ResourceId": SNAPSHOT, "Encrypted": True, "SourceResourceId": volume}
    await rig.ebsd("CreateAnchor", Caller=caller(ALICE), **inherited)
    change = {"Caller": caller(ROOT), "ResourceId": SNAPSHOT, "Add": [B, EVERYBODY], "Remove": [], "Reset": False}
    await rig.ebsd("RecordSharing", **change)
    await rig.ebsd("RecordSharing", **change | {"Add": [], "Remove": [B], "Reset": True})
    with refused("Ebsd.IntegrityFailure"):
        await rig.ebsd("RecordSharing", **change | {"ResourceId": ident(77)})
    for uid, sees in ((ALICE, True), (BOB, False)):
        for name, member, whom in (("Modify", "add", [B, EVERYBODY]), ("Reset", "remove", [B])):
            asked = {"EventName": f"{name}SnapshotAttribute", "ResourceId": SNAPSHOT}
            reply = await rig._call(rig.servers.keys, uid, "io.ebsd.Audit.LookupEvents", asked, ())
            records = [json.loads(event["CloudTrailEvent"]) for event in reply["Events"]]
            assert [record["requestParameters"][member] for record in records] == [whom] * sees
            assert [record["userIdentity"]["userName"] for record in records] == ["user0"] * sees


def test_keys_in_aws_are_for_those_whom_the_configuration_names() -> None:
    keys = AwsKeys(AwsSettings(region="eu-west-1", users=(ALICE,)))
    arn = "arn:aws:kms:eu-west-1:111122223333:key/12345678-1234-1234-1234-123456789abc"

    async def check(uid: int) -> None:
        who = user(AccountId(f"{uid:012}"))
        await keys.check_shared_use(Requester(who, via_service=True), arn, context())

    trio.run(check, ALICE)
    with pytest.raises(AccessDenied):
        trio.run(check, BOB)


@pytest.mark.trio
async def test_the_block_of_public_access_is_a_setting_of_the_account(rig: Rig) -> None:
    assert (await rig.ebsd("ListPublicAccessBlocks"))["AccountIds"] == []
    for state, blocked in (("block-new-sharing", []), ("block-all-sharing", [A]), ("unblocked", [])):
        set_to = await rig.ebsd("SetAccount", Caller=caller(ALICE), SnapshotBlockPublicAccess=state)
        assert set_to["SnapshotBlockPublicAccess"] == state
        assert (await rig.ebsd("GetAccount", Caller=caller(ALICE)))["SnapshotBlockPublicAccess"] == state
        assert (await rig.ebsd("GetAccount", Caller=caller(BOB)))["SnapshotBlockPublicAccess"] == "unblocked"
        assert (await rig.ebsd("ListPublicAccessBlocks"))["AccountIds"] == blocked
    with refused("InvalidParameterValue"):
        await rig.ebsd("SetAccount", Caller=caller(ALICE), SnapshotBlockPublicAccess="on")


# --- ebsctl -----------------------------------------------------------------------------------------------


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    made.world.add_snapshots(listed())
    yield made
    made.server.close()


def test_share_names_users_by_name_uid_or_account(bench: Bench) -> None:
    assert bench.ok("share", "monday", "--add", "root", "0", "003999999999") == ""
    assert bench.server.parameters("EC2.ModifySnapshotAttribute") == {
        "SnapshotId": "monday",
        "OperationType": "add",
        "UserIds": ["000000000000", "000000000000", "003999999999"],
    }
    assert bench.ok("share", "monday") == bench.ok("share", "--show", "monday")
    assert bench.ok("share", "monday") == "003999999999\t-\n000000000000\troot\n"
    assert bench.ok("share", "monday", "--remove", "3999999999") == ""
    document = bench.document("share", "monday", "--public")
    assert document["CreateVolumePermissions"] == [{"Group": "all"}, {"UserId": "000000000000"}]
    assert document["SnapshotId"] == snapshot_id(1)
    assert bench.document("share", "monday", "--private")["CreateVolumePermissions"] == [{"UserId": "000000000000"}]
    assert bench.document("share", "monday", "--reset")["CreateVolumePermissions"] == []


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["--add"], 2),
        (["--remove"], 2),
        (["root"], 2),
        (["--public", "root"], 2),
        (["--reset", "root"], 2),
        (["--add", "no-such-user-here"], 3),
        (["--add", "4000000000"], 3),
        (["--add", "99999999999999999999"], 3),
    ],
)
def test_share_refuses(bench: Bench, words: list[str], status: int) -> None:
    bench.error(status, "share", "monday", *words)
    assert not [method for method, _ in bench.server.calls if "Attribute" in method]


def test_list_narrows_snapshots(bench: Bench) -> None:
    bench.ok("list", "snapshots", "--owner", "self", "--restorable-by", "root", "--restorable-by", "all")
    assert bench.server.parameters("EC2.DescribeSnapshots") == {
        "OwnerIds": ["self"],
        "RestorableByUserIds": ["000000000000", "all"],
    }
    assert "snapshots" in bench.error(2, "list", "volumes", "--owner", "self")["Message"]
